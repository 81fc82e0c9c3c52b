"""Preference data: one record, readers, tokenizer, template; a record becomes a token tree.

As a script it shows records as the model sees them, with the learned tokens marked:

    python data.py --pref_data FILE [--ckpt DIR]
"""

import base64
import contextlib
import gzip
import itertools
import json
import math
import random
import re
import zlib
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

import tiktoken

from common import UserError, at_least, content_hash, load_json, run, write_atomically


@dataclass(frozen=True)
class Options:
    """Show preference data as the model sees it, the learned tokens marked."""

    pref_data: str = ""  # preference files, separated by commas
    ckpt: str = ""  # take the tokenizer and the context length of this checkpoint
    tokenizer: str = "world"  # without --ckpt: world, gpt2 or a FILE.tiktoken
    block_size: int = 512  # without --ckpt: context length in tokens
    rows: int = 3  # how many records to show

    def __post_init__(self):
        at_least(self, 1, "rows", "block_size")


TEXT_TIERS = ("system", "preference")
META_PROMPT = (*TEXT_TIERS, "examples")
SPECIAL_TOKENS = (
    "<|system|>", "<|preference|>", "<|example|>", "<|chosen|>", "<|rejected|>",
    "<|user|>", "<|assistant|>", "<|end|>",
)

# ---------------------------------------------------------------- tokenizer


class Tokenizer:
    """A tiktoken encoding with our special tokens behind its vocabulary."""

    def __init__(self, name, pattern, ranks):
        self.name, self.pattern, self.ranks = name, pattern, ranks
        first = max(ranks.values()) + 1
        self.special = {token: first + i for i, token in enumerate(SPECIAL_TOKENS)}
        self.encoding = tiktoken.Encoding(
            name, pat_str=pattern, mergeable_ranks=ranks, special_tokens=self.special
        )
        self.vocab_size = first + len(SPECIAL_TOKENS)
        self.end = self.special["<|end|>"]
        self.ends = [self.end]  # a pretrained model may stop at other tokens too

    def encode(self, text):
        """Ordinary tokens only: no text can produce a special token."""
        return self.encoding.encode_ordinary(text)

    encode_answer = encode

    def decode(self, tokens):
        return self.encoding.decode(tokens)

    def pieces(self, tokens):
        """Each token as text."""
        return [self.encoding.decode([token]) for token in tokens]

    def render(self, record, contents=None):
        """Tokens of all up to the answer; `contents` replace those of the prompt's turns.

        An absent tier leaves no trace.
        """
        special, tokens = self.special, []
        for tier in TEXT_TIERS:
            if record.get(tier):
                tokens += [special[f"<|{tier}|>"], *self.encode(record[tier])]
        for example in record.get("examples", ()):
            tokens += [special["<|example|>"], *self.encode(example["prompt"])]
            tokens += [special["<|chosen|>"], *self.encode(example["chosen"])]
            tokens += [special["<|rejected|>"], *self.encode(example["rejected"])]
        turns = prompt_turns(record)
        if contents is None:
            contents = [self.encode(turn["content"]) for turn in turns]
        for turn, content in zip(turns, contents, strict=True):
            tokens += [special[f"<|{turn['role']}|>"], *content]
            tokens += [self.end] if turn["role"] == "assistant" else []
        return tokens + [special["<|assistant|>"]]

    def describe(self):
        """What has to be known besides `tokenizer.tiktoken`; kept in config.json."""
        ranks = content_hash([piece.hex() for piece in sorted(self.ranks, key=self.ranks.get)])
        return {"name": self.name, "pattern": self.pattern, "ranks": ranks,
                "special_tokens": SPECIAL_TOKENS}

    def save(self, folder):
        lines = sorted((rank, base64.b64encode(piece)) for piece, rank in self.ranks.items())
        text = b"".join(b"%s %d\n" % (piece, rank) for rank, piece in lines)
        path = Path(folder) / "tokenizer.tiktoken"
        write_atomically(path, lambda temporary: temporary.write_bytes(text))

    @classmethod
    def load(cls, folder):
        """Raises UserError when it is missing, broken or not of our template."""
        path = Path(folder) / "config.json"
        about = load_json(path).get("tokenizer")
        if not isinstance(about, dict) or about.get("special_tokens") != list(SPECIAL_TOKENS):
            raise UserError(f"{path}: field 'tokenizer': not the special tokens of this version")
        for field in ("name", "pattern"):
            if not isinstance(about.get(field), str):
                raise UserError(f"{path}: field 'tokenizer.{field}': missing")
        ranks = read_ranks(Path(folder) / "tokenizer.tiktoken")
        try:
            tokenizer = cls(about["name"], about["pattern"], ranks)
        except ValueError as error:
            raise UserError(f"{path}: field 'tokenizer.pattern': {error}") from None
        found = tokenizer.describe()["ranks"]
        if about.get("ranks", found) != found:  # runs of earlier versions do not have it
            raise UserError(f"{folder}/tokenizer.tiktoken: not the vocabulary of its config.json")
        return tokenizer


GPT2_PATTERN = (
    r"'(?:[sdmt]|ll|ve|re)| ?\p{L}++| ?\p{N}++| ?[^\s\p{L}\p{N}]++|\s++$|\s+(?!\S)|\s"
)


def read_ranks(path):
    """{bytes: rank} of a .tiktoken file: a line for each token, base64 and its rank."""
    try:
        lines = [line.split() for line in path.read_bytes().splitlines() if line]
        ranks = {base64.b64decode(piece): int(rank) for piece, rank in lines}
    except OSError as error:
        raise UserError(f"{path}: {error.strerror}") from None
    except ValueError as error:
        raise UserError(f"{path}: not a .tiktoken file: {error}") from None
    if sorted(ranks.values()) != list(range(len(ranks))):
        raise UserError(f"{path}: not a .tiktoken file: the ranks are not 0, 1, 2, ...")
    missing = [b for b in range(256) if bytes([b]) not in ranks]
    if missing:
        raise UserError(f"{path}: not a byte-level vocabulary: byte {missing[0]} has no token")
    return ranks


def load_tokenizer(name):
    """`world`, `gpt2` (tiktoken fetches it once, or finds it in TIKTOKEN_CACHE_DIR), or a file."""
    if name == "world":
        import world

        return Tokenizer("world", world.PATTERN, world.bpe_ranks())
    if name == "gpt2":
        try:
            gpt2 = tiktoken.get_encoding("gpt2")
        except Exception as error:  # whatever the network stack raises
            raise UserError(
                f"--tokenizer gpt2: cannot fetch the vocabulary ({type(error).__name__}); "
                "set TIKTOKEN_CACHE_DIR to a folder that has it"
            ) from None
        return Tokenizer("gpt2", gpt2._pat_str, gpt2._mergeable_ranks)
    if not name.endswith(".tiktoken"):
        raise UserError(f"--tokenizer must be world, gpt2 or a FILE.tiktoken, not {name}")
    return Tokenizer(Path(name).stem, GPT2_PATTERN, read_ranks(Path(name)))


# ---------------------------------------------------------------- readers


def read_preferences(names):
    """Records of preference files (comma-separated): [(dataset name, [record, ...]), ...].

    Raises UserError naming file, line and field, or when a file has no pair to learn from.
    """
    datasets = []
    for path in map(Path, filter(None, names.split(","))):
        records, rated, ignored, unusable = [], {}, set(), []
        for line, fields in read_lines(path):
            try:
                if "chosen" in fields or "rejected" in fields:
                    ignored.update(fields.keys() - RECORD_FIELDS)
                    records.append(pair_record(fields, line))
                elif "completions" in fields:
                    ignored.update(fields.keys() - {"instruction", "completions"})
                    records += ultrafeedback(fields, line)
                elif "response" in fields:
                    ignored.update(fields.keys() - {"prompt", "response", *ASPECTS})
                    prompt, response, scores = helpsteer(fields, line)
                    rated.setdefault(prompt, (line, []))[1].append((response, scores))
                else:
                    raise UserError(f"{line}: field 'chosen': missing")
            except Unusable:
                unusable.append(line)
        for prompt, (line, completions) in rated.items():
            records += rated_pairs(split_prompt(prompt, line), completions, line)
        kept = [r for r in records if r["chosen"] != r["rejected"]]
        same = len(records) - len(kept)
        if same:
            print(f"{path}: skipped {same} of {len(records)} rows: both answers are the same")
        print_left_out(path, unusable, ignored)
        if not kept:
            raise UserError(f"{path}: no pair to learn from")
        datasets.append((dataset_name(path), kept))
    if not datasets:
        raise UserError("no data file given")
    clashes = [name for name, n in Counter(name for name, _ in datasets).items() if n > 1]
    if clashes:
        raise UserError(f"two data files are both named {clashes[0]}")
    return datasets


def read_records(names):
    """The records of all files of `read_preferences` together."""
    return [record for _, records in read_preferences(names) for record in records]


def save_records(path, records):
    """Write records as a file that `read_preferences` reads."""
    rows = [{k: v for k, v in record.items() if k != "where"} for record in records]
    text = "".join(json.dumps(row) + "\n" for row in rows)
    write_atomically(path, lambda temporary: temporary.write_text(text))


ASPECTS = ("helpfulness", "correctness", "coherence", "complexity", "verbosity")
RECORD_FIELDS = {*META_PROMPT, "prompt", "chosen", "rejected", "label_prob", "user", "meta"}


def print_left_out(path, unusable, ignored):
    if unusable:
        print(f"{unusable[0]}: the first of {len(unusable)} dialogues that were skipped: an "
              "empty turn, no question or answer at the end, or two prompts")
    if ignored:
        print(f"{path}: ignored fields: {', '.join(sorted(ignored))}")


def read_responses(names):
    """Records of SFT files: meta-prompt, prompt, and `response`, `chosen` and `rejected`, or both.

    UltraFeedback's rated completions become pairs, as in `read_preferences`; a HelpSteer row is its
    response. Raises UserError that names the line.
    """
    records = []
    for path in map(Path, filter(None, names.split(","))):
        ignored, unusable = set(), []
        for line, fields in read_lines(path):
            if "completions" in fields and "chosen" not in fields:
                records += ultrafeedback(fields, line)
                ignored.update(fields.keys() - {"instruction", "completions"})
                continue
            if "output" in fields and not fields.keys() & {"response", "chosen"}:
                fields["response"] = fields.pop("output")  # as the Multifaceted Collection has it
            ignored.update(fields.keys() - RECORD_FIELDS - {"response"})
            if "chosen" not in fields:
                ignored.update(fields.keys() & {"rejected"})
            try:
                records.append(response_record(fields, line))
            except Unusable:
                unusable.append(line)
        print_left_out(path, unusable, ignored)
    if not records:
        raise UserError("--data: no rows to learn from")
    return records


def response_record(fields, line):
    """One record of SFT data from a row that is not UltraFeedback's."""
    if "chosen" in fields:
        fields = with_prompt(fields, line)
        record = pair_record(fields, line)
    else:
        record = common_fields(fields, line)
        record["prompt"] = take_prompt(fields, record, line)
    if "response" in fields or "chosen" not in fields:
        record["response"] = answer_text(fields, "response", record, line)
    return record


def chosen_as_response(record):
    """A preference pair as an SFT row: its response if it has one, else its chosen answer."""
    if "chosen" not in record:
        return record
    rest = {k: v for k, v in record.items() if k not in ("chosen", "rejected")}
    return {"response": record["chosen"]} | rest


def dataset_name(path):
    """`polite/val` for .../polite/val.jsonl."""
    return f"{path.resolve().parent.name}/{re.sub(r'[.]jsonl([.]gz)?$', '', path.name)}"


def read_lines(path):
    """Yield ("file:line", fields) for each line of a .jsonl or .jsonl.gz file."""
    opener = gzip.open if path.suffix == ".gz" else open
    number = 0
    try:
        with opener(path, "rb") as f:
            for number, raw in enumerate(f, 1):
                text = raw.decode("utf-8-sig" if number == 1 else "utf-8")
                if not text.strip():
                    continue
                fields = json.loads(text)
                if not isinstance(fields, dict):
                    raise UserError(f"{path}:{number}: not a JSON object")
                # A null is a field that is absent, as where columns of several sources meet.
                yield f"{path}:{number}", {k: v for k, v in fields.items() if v is not None}
    except UnicodeDecodeError as error:
        raise UserError(f"{path}:{number}: not UTF-8: byte {error.start + 1}") from None
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path}:{number}: not valid JSON: {error}") from None
    except (OSError, EOFError, zlib.error) as error:
        reason = getattr(error, "strerror", None) or error
        raise UserError(f"{path}: cannot read: {reason}") from None
    if number == 0:
        raise UserError(f"{path}: the file is empty")


def text_field(value, field, line):
    if not isinstance(value, str):
        found = "missing" if value is None else f"must be text, not {type(value).__name__}"
        raise UserError(f"{line}: field '{field}': {found}")
    if not value.strip():
        raise UserError(f"{line}: field '{field}': empty")
    try:
        value.encode()
    except UnicodeEncodeError:
        raise UserError(f"{line}: field '{field}': not valid Unicode (lone surrogate)") from None
    return value


def common_fields(fields, line):
    """The fields that every kind of record may have: meta-prompt, label_prob, user, meta."""
    record = {}
    for field in TEXT_TIERS:
        if fields.get(field, "") != "":
            record[field] = text_field(fields[field], field, line)
    examples = fields.get("examples")
    if not isinstance(examples, list | None):
        raise UserError(f"{line}: field 'examples': must be a list of choices")
    for i, example in enumerate(examples or []):
        if not isinstance(example, dict):
            raise UserError(f"{line}: field 'examples[{i}]': must be an object")
        choice = {f: text_field(example.get(f), f"examples[{i}].{f}", line)
                  for f in ("prompt", "chosen", "rejected")}
        record.setdefault("examples", []).append(choice)
    p = fields.get("label_prob", 1.0)
    if isinstance(p, bool) or not isinstance(p, int | float) or not 0 <= p <= 1:
        raise UserError(f"{line}: field 'label_prob': must be between 0 and 1, not {p!r}")
    record["label_prob"] = float(p)
    record["where"] = line  # for messages; never shown to the model
    for field, kinds in (("user", str | int), ("meta", dict)):
        if field in fields:
            if not isinstance(fields[field], kinds) or isinstance(fields[field], bool):
                raise UserError(f"{line}: field '{field}': wrong type")
            if fields[field] == "":
                raise UserError(f"{line}: field '{field}': empty")
            record[field] = fields[field]
    return record


def pair_record(fields, line):
    """One record from a row with `chosen` and `rejected`, in any of the common layouts."""
    record, fields = common_fields(fields, line), with_prompt(fields, line)
    record["prompt"] = take_prompt(fields, record, line)
    for field in ("chosen", "rejected"):
        record[field] = answer_text(fields, field, record, line)
    if record["label_prob"] < 0.5:  # the other answer is the likelier one
        record["chosen"], record["rejected"] = record["rejected"], record["chosen"]
        record["label_prob"] = 1 - record["label_prob"]
    return record


def with_prompt(fields, line):
    """A pair's fields; a prompt that stands in both answers instead becomes one."""
    if "prompt" in fields:
        return fields
    chosen, rejected = (
        turns(fields[field], field, line) if isinstance(fields.get(field), list)
        else transcript(text_field(fields.get(field), field, line), field, line)
        for field in ("chosen", "rejected")
    )
    if not chosen[:-1] and not rejected[:-1]:
        raise UserError(f"{line}: field 'prompt': missing")
    if chosen[:-1] != rejected[:-1]:
        if isinstance(fields["chosen"], str):
            raise Unusable
        raise UserError(f"{line}: field 'rejected': its prompt differs from that of 'chosen'")
    response = fields.get("response")  # of SFT data: beside transcripts it may be one too
    if isinstance(response, str) and response.lstrip().startswith("Human:"):
        fields = fields | {"response": transcript(response, "response", line)}
    return fields | {"prompt": chosen[:-1], "chosen": chosen[-1:], "rejected": rejected[-1:]}


BEGINNING = re.compile(r"\s*Human:.*\n\nAssistant:\s*", re.DOTALL)


def is_beginning(prompt):
    """Whether it is a transcript up to the answer, as files made from HH-RLHF have it."""
    return isinstance(prompt, str) and BEGINNING.fullmatch(prompt) is not None


def split_prompt(prompt, line):
    """The turns of a transcript's beginning or of a HelpSteer2 prompt; other text as it is."""
    if is_beginning(prompt):
        return transcript(f"{prompt.strip()} -", "prompt", line)[:-1]
    pieces = re.split(r"\n<extra_id_1>(User|Assistant)[ \t\r]*(?=\n)", prompt)
    if len(pieces) == 1:
        return prompt
    if not all(map(str.strip, pieces)) or pieces[-2] != "User":
        raise Unusable
    return [{"role": who.lower(), "content": content.strip("\r\n")}
            for who, content in zip(["user", *pieces[1::2]], pieces[::2], strict=True)]


def take_prompt(fields, record, line):
    """The prompt; a system turn at its head moves into the record's system tier."""
    prompt = fields.get("prompt")
    if not isinstance(prompt, list):
        prompt = split_prompt(text_field(prompt, "prompt", line), line)
    if isinstance(prompt, str):
        return prompt
    prompt = turns(prompt, "prompt", line)
    if prompt[0]["role"] == "system":
        system, prompt = prompt[0]["content"], prompt[1:]
        if record.setdefault("system", system) != system:
            raise UserError(f"{line}: field 'prompt': its system turn is not the field 'system'")
    roles = [turn["role"] for turn in prompt]
    if not prompt or roles[-1] != "user":
        raise UserError(f"{line}: field 'prompt': must end with a user turn")
    if "system" in roles:
        raise UserError(f"{line}: field 'prompt': a system turn must come first")
    return prompt[0]["content"] if len(prompt) == 1 else prompt


def answer_text(fields, field, record, line):
    """An answer as text; of a message list the last turn, which must be the assistant's.

    The turns before it must be those of the record's prompt, with or without its system message.
    """
    answer = fields.get(field)
    if isinstance(answer, str) and is_beginning(fields["prompt"]):
        answer = answer.strip().removeprefix(fields["prompt"].strip()).strip()
        if not answer or answer.startswith("Human:"):
            raise Unusable
    if not isinstance(answer, list):
        return text_field(answer, field, line)
    answer = turns(answer, field, line)
    if answer[-1]["role"] != "assistant":
        raise UserError(f"{line}: field '{field}': must end with an assistant turn")
    prompt = prompt_turns(record)
    system = {"role": "system", "content": record.get("system")}
    if answer[:-1] not in ([], prompt, [system, *prompt], prompt_turns(fields)):
        raise UserError(f"{line}: field '{field}': its first turns are not the prompt's")
    return answer[-1]["content"]


def turns(messages, field, line):
    """Check a list of {role, content} turns."""
    checked = []
    for i, turn in enumerate(messages):
        if not isinstance(turn, dict) or turn.get("role") not in ("system", "user", "assistant"):
            raise UserError(f"{line}: field '{field}[{i}].role': must be system, user or assistant")
        if turn["role"] == "system" and turn.get("content") == "":
            continue  # absent, as an empty field is
        content = text_field(turn.get("content"), f"{field}[{i}].content", line)
        checked.append({"role": turn["role"], "content": content})
    if not checked:
        raise UserError(f"{line}: field '{field}': empty")
    return checked


class Unusable(Exception):
    """A dialogue with an empty turn, without a last answer, or to another prompt: skipped."""


def transcript(text, field, line):
    """Turns of an HH-RLHF transcript: "\\n\\nHuman: ...\\n\\nAssistant: ..."."""
    pieces = re.split(r"(?:^|\n\n)(Human|Assistant):", text)
    if len(pieces) < 5 or pieces[0].strip():
        raise UserError(f"{line}: field 'prompt': missing, and '{field}' is no transcript")
    messages = [
        {"role": "user" if who == "Human" else "assistant", "content": content.strip()}
        for who, content in zip(pieces[1::2], pieces[2::2], strict=True)
    ]
    last = [turn["role"] for turn in messages[-2:]]
    if last != ["user", "assistant"] or not all(turn["content"] for turn in messages):
        raise Unusable
    return turns(messages, field, line)


def ultrafeedback(fields, line):
    """The pairs of an UltraFeedback row."""
    prompt = text_field(fields.get("instruction"), "instruction", line)
    completions = fields["completions"]
    if not isinstance(completions, list) or not all(isinstance(c, dict) for c in completions):
        raise UserError(f"{line}: field 'completions': must be a list of objects")
    rated = []
    for i, completion in enumerate(completions):
        response = text_field(completion.get("response"), f"completions[{i}].response", line)
        annotations = completion.get("annotations")
        if not isinstance(annotations, dict):
            raise UserError(f"{line}: field 'completions[{i}].annotations': missing")
        scores = {}
        for aspect, rating in annotations.items():
            rating = rating.get("Rating") if isinstance(rating, dict) else rating
            if rating not in (None, "N/A"):
                scores[aspect] = score(rating, f"completions[{i}].annotations.{aspect}", line)
        rated.append((response, scores))
    return rated_pairs(prompt, rated, line)


def helpsteer(fields, line):
    """(prompt, response, {aspect: score}) of a HelpSteer row."""
    prompt = text_field(fields.get("prompt"), "prompt", line)
    split_prompt(prompt, line)  # a dialogue that is unusable is so here
    response = text_field(fields.get("response"), "response", line)
    scores = {aspect: score(value, aspect, line) for aspect, value in fields.items()
              if aspect in ASPECTS}
    if not scores:
        raise UserError(f"{line}: field 'chosen': missing")
    return prompt, response, scores


def score(value, field, line):
    try:
        number = float(value)
    except (TypeError, ValueError, OverflowError):
        number = math.nan
    if not math.isfinite(number):
        raise UserError(f"{line}: field '{field}': not a score: {value!r}")
    return number


def rated_pairs(prompt, completions, line):
    """A pair for each two completions and each aspect on which their scores differ."""
    records = []
    for (a, scores_a), (b, scores_b) in itertools.combinations(completions, 2):
        for aspect in sorted(scores_a.keys() & scores_b.keys()):
            if scores_a[aspect] != scores_b[aspect]:
                chosen, rejected = (a, b) if scores_a[aspect] > scores_b[aspect] else (b, a)
                name = aspect.replace("_", " ")
                records.append({
                    "preference": f"What matters most to me is {name}.", "prompt": prompt,
                    "chosen": chosen, "rejected": rejected, "label_prob": 1.0, "where": line,
                    "meta": {"preference_name": name},
                })
    return records


# ---------------------------------------------------------------- template


def without_meta_prompt(record):
    return {k: v for k, v in record.items() if k not in META_PROMPT}


@dataclass
class Example:
    """A record as tokens: the trunk (all up to the answer) and the answers with their end."""

    trunk: list
    answers: list
    cut_prompt: bool = False
    cut_answers: int = 0

    @property
    def tree(self):
        return self.trunk, self.answers


def prompt_turns(record):
    prompt = record["prompt"]
    return [{"role": "user", "content": prompt}] if isinstance(prompt, str) else prompt


def encode(record, tokenizer, block_size, structure=0):
    """Tokenise a record to at most `block_size` tokens a path, trunk and one answer.

    What is too long is cut: the query in its middle, an answer at its end (and then it is not
    taught to end there); each keeps at least half of what the meta-prompt and the template leave,
    which are counted as `structure` tokens at least. Raises UserError when that is too little.
    """
    where, turns = record.get("where", "this prompt"), prompt_turns(record)
    texts = [record[f] for f in ("chosen", "rejected", "response") if f in record]
    with placed(record):
        contents = [tokenizer.encode(turn["content"]) for turn in turns]
        answers = [tokenizer.encode_answer(text) + [tokenizer.end] for text in texts]
    structure = max(structure, structure_size(record, tokenizer))

    room = block_size - structure  # for contents and the longest answer
    if room < 2 * len(contents) + 2:
        tier = max(META_PROMPT, key=lambda tier: len(str(record.get(tier) or "")))
        if not record.get(tier):
            raise UserError(f"{where}: field 'prompt': "
                            f"{len(turns)} turns do not fit into a context of {block_size}")
        drawn = " (or --context, --examples)" if tier == "examples" else ""
        raise UserError(f"{where}: field '{tier}'{drawn}: with it {structure} tokens are taken of "
                        f"a context of {block_size}")
    query_size = sum(map(len, contents))
    answer_room = max(room // 2, room - query_size)
    kept = [answer[:answer_room] for answer in answers]
    contents = cut_middle(contents, room - max(map(len, kept), default=answer_room))

    is_cut = sum(map(len, contents)) < query_size
    trunk = tokenizer.render(record, contents if is_cut else None)
    n_cut = sum(len(answer) > answer_room for answer in answers)
    return Example(trunk, kept, is_cut, n_cut)


def structure_size(record, tokenizer):
    """Tokens of a trunk beside the contents of its turns: the meta-prompt and the template.

    Raises UserError where a chat template does not take these turns.
    """
    with placed(record):
        return len(tokenizer.render(record, [[] for _ in prompt_turns(record)]))


@contextlib.contextmanager
def placed(record):
    """Put a record's place before what its tokenizer or template refuses."""
    try:
        yield
    except UserError as error:
        raise UserError(f"{record.get('where', 'this prompt')}: {error}") from None


def cut_middle(contents, room):
    """Take tokens out of the middle of the longest list until all fit into `room`."""
    sizes = list(map(len, contents))
    for _ in range(sum(sizes) - room):
        sizes[sizes.index(max(sizes))] -= 1
    return [tokens[: (size + 1) // 2] + tokens[len(tokens) - size // 2 :]
            for tokens, size in zip(contents, sizes, strict=True)]


def encode_all(records, tokenizer, block_size, what):
    """Encode records and print what was cut."""
    examples = [encode(record, tokenizer, block_size) for record in records]
    print_cuts(examples, block_size, what)
    return examples


def print_cuts(examples, block_size, what):
    prompts = sum(e.cut_prompt for e in examples)
    answers = sum(e.cut_answers for e in examples)
    alike = sum(e.cut_answers > 0 and len(set(map(tuple, e.answers))) == 1 < len(e.answers)
                for e in examples)
    if prompts or answers:
        print(f"{what}: cut {prompts} queries and {answers} answers of {len(examples)} rows "
              f"to fit {block_size} tokens")
    if alike:
        print(f"{what}: {alike} of them have the same answer twice then, and tell no preference")


# ---------------------------------------------------------------- batches


def tree_size(example):
    """Tokens that are run: the trunk, and each answer without its last token."""
    return len(example.trunk) + sum(len(answer) - 1 for answer in example.answers)


def micro_batches(examples, micro_tokens, rows=None):
    """Cut `rows` of the examples, or all, into lists of at most `micro_tokens` tree tokens each.

    Longest first, so that trees of one batch are of like size. A tree that alone is larger gets a
    batch of its own.
    """
    sizes = [tree_size(e) for e in examples]
    batches, used = [], micro_tokens + 1
    for i in sorted(range(len(examples)) if rows is None else rows, key=lambda i: -sizes[i]):
        if used + sizes[i] > micro_tokens:
            batches.append([])
            used = 0
        batches[-1].append(i)
        used += sizes[i]
    return batches


def shares(examples, micro_tokens, rank, world):
    """What one of `world` processes runs of a step: [(indices, weight), ...].

    Trees are dealt out so that processes have about equally many tokens. All processes have equally
    many batches, as gradients are summed in the last; one that lacks some gets a tree of weight 0.
    """
    dealt, used = [[] for _ in range(world)], [0] * world
    for i in sorted(range(len(examples)), key=lambda i: -tree_size(examples[i])):
        least = used.index(min(used))
        dealt[least].append(i)
        used[least] += tree_size(examples[i])
    batches = [micro_batches(examples, micro_tokens, mine) for mine in dealt]
    idle = [([dealt[0][-1]], 0.0)] * (max(map(len, batches)) - len(batches[rank]))
    return [(rows, 1.0) for rows in batches[rank]] + idle


# ---------------------------------------------------------------- python data.py


def show(example, tokenizer):
    """The trunk as text, then each answer with every learned token between bars."""
    print(f"  trunk, {len(example.trunk)} tokens, read once:")
    print("    " + tokenizer.decode(example.trunk).replace("\n", "\n    "))
    for i, answer in enumerate(example.answers):
        print(f"  answer {i + 1}, {len(answer)} tokens, all learned:")
        pieces = [piece.replace("\n", "\\n") for piece in tokenizer.pieces(answer)]
        print("    |" + "|".join(pieces) + "|")


def main(options):
    if options.ckpt:
        import sample  # reads every kind of checkpoint; it imports this file

        tokenizer, block_size = sample.load_tokenizer(options.ckpt)
    else:
        tokenizer, block_size = load_tokenizer(options.tokenizer), options.block_size
    for name, records in read_preferences(options.pref_data):
        examples = encode_all(records, tokenizer, block_size, name)
        for i in random.Random(0).sample(range(len(records)), min(options.rows, len(records))):
            print(f"{name}, row {i + 1}")
            show(examples[i], tokenizer)


if __name__ == "__main__":
    run(main, Options)
