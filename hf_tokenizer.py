"""A Hugging Face folder's tokenizer.json and chat template, with the interface of data.Tokenizer.

Byte-level BPE (GPT-2, SmolLM2, Llama 3, Qwen) runs on tiktoken with exactly the ids that the
`tokenizers` library gives; every other kind runs on that library, which then has to be installed.

The engines' Unicode tables differ, so ids may for: 13 digits of Unicode 17 where digits are split
off, NFC of marks that came after Unicode 9, and in a text that holds bytes without a token, the
letters and digits that came after Unicode 16. A template that shows the date (Llama 3.2) gives
other tokens each day, so a run started on one day is not resumed on another.
"""

import itertools
import json
import re
import unicodedata
from datetime import datetime
from functools import cache
from pathlib import Path

import jinja2
import regex
import tiktoken
from jinja2.ext import Extension, LoopControlExtension
from jinja2.sandbox import ImmutableSandboxedEnvironment

from common import (
    UserError,
    content_hash,
    first_line,
    load_json,
    save_json,
    write_atomically,
)
from data import TEXT_TIERS, prompt_turns

CONFIGS = ("special_tokens_map.json", "tokenizer_config.json")
MODEL_CONFIGS = ("config.json", "generation_config.json")
TOKENIZER_FILES = ("tokenizer.json", "chat_template.jinja", *CONFIGS)
# Makes transformers read tokenizer.json as it is: of some classes (LlamaTokenizer, GPT2Tokenizer)
# its version 5 builds the tokenizer anew, which then gives other ids.
AS_IT_IS = {"tokenizer_class": "PreTrainedTokenizerFast",
            "model_input_names": ["input_ids", "attention_mask"]}

# ---------------------------------------------------------------- added tokens

WHITE_SPACE = "".join(filter(regex.compile(r"\s").match, map(chr, range(0x3001))))


class AddedTokens(dict):
    """{content: token} with id and flags, found in a text as `tokenizers` finds them."""

    def __init__(self, tokens):
        super().__init__(tokens)
        self.plain = [content for content, token in self.items() if not token["special"]]
        longest_first = sorted(map(re.escape, self), key=len, reverse=True)
        self.pattern = re.compile("|".join(filter(None, longest_first)) or "(?!)")

    def cut(self, text, with_special=False):
        """Ids of added tokens and the texts between them; special ones only if asked for."""
        parts, start = [], 0
        found = with_special or any(content in text for content in self.plain)
        for match in self.pattern.finditer(text) if found else ():
            token, (begin, end) = self[match[0]], match.span()
            if token["single_word"] or token["special"] and not with_special:
                continue
            if token["lstrip"]:
                begin = start + len(text[start:begin].rstrip(WHITE_SPACE))
            if token["rstrip"]:
                end = len(text) - len(text[end:].lstrip(WHITE_SPACE))
            parts += [text[start:begin], token["id"]]
            start = end
        return [part for part in [*parts, text[start:]] if part != ""]


def added_tokens(spec, config, named, ids):
    """AddedTokens of tokenizer.json, to which tokenizer_config.json may add, also in `spec`.

    Those `named`, such as eos_token's, and those with `ids` are special whatever their flag says.
    """
    tokens = {t["content"]: t for t in spec.get("added_tokens") or []}
    for number, token in config.get("added_tokens_decoder", {}).items():
        tokens.setdefault(token["content"], token | {"id": int(number)})
    vocab = spec["model"]["vocab"]
    for content in sorted(named):
        if isinstance(vocab, dict) and content in vocab:
            tokens.setdefault(content, {"id": vocab[content], "content": content})
    for content, token in tokens.items():
        for flag in ("special", "single_word", "lstrip", "rstrip", "normalized"):
            token[flag] = bool(token.get(flag))
        token["special"] |= content in named or token["id"] in ids
    spec["added_tokens"] = [*tokens.values()]
    return AddedTokens(tokens)


# ---------------------------------------------------------------- byte-level BPE on tiktoken

# Of ByteLevel, and the same where digits are split off, so that a fragment ends before a digit.
BYTE_LEVEL_PATTERN = r"'(?:[sdmt]|ll|ve|re)| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
NO_DIGIT_PATTERN = r"'(?:[sdmt]|ll|ve|re)| ?\p{L}+| ?[^\s\p{L}\p{N}]+|\s+(?![^\s\p{N}])|\s+"

# Syntax that means the same to Oniguruma (`tokenizers`), fancy-regex (tiktoken) and `regex`.
COMMON_REGEX = regex.compile(r"""(?:
    (?: \((?:\?[:!=])? | \| | \\s\+\+\$ | \(\?i:(?:'(?:[sdmt]|ll|ve|re)\|?)+ )
  | (?: \) | \\p\{[LMNPSZ][a-z]?\} | \\[sSrntd] | \\[^\w\s] | [^\\\[\](){}?*+|.^$]
      | \[\^?(?: \\p\{[LMNPSZ][a-z]?\} | \\[sSrntd] | \\[^\w\s] | (?!&&|--|~~)[^\\\[\]] )+\] )
    (?: (?: [?*+]\+? | \{\d+(?:,\d*)?\} ) (?![+?]) )?
)+""", regex.X)

# How a vocabulary spells bytes: those that show as themselves, the others from U+0100 on.
SHOWN = [*range(33, 127), *range(161, 173), *range(174, 256)]
HIDDEN = sorted(set(range(256)) - set(SHOWN))
BYTE_OF = {chr(b): b for b in SHOWN} | {chr(256 + i): b for i, b in enumerate(HIDDEN)}


def as_bytes(token):
    """Bytes of a vocabulary entry; one that is not in byte-level spelling never comes from text."""
    byte_level = BYTE_OF.keys() >= set(token)
    return bytes([BYTE_OF[c] for c in token]) if byte_level else token.encode()


def steps_of(step, field):
    """The steps of a Sequence, or the one step that there is, or none."""
    if not step:
        return []
    return step[field] if step.get("type") == "Sequence" else [step]


def split_pattern(pre_tokenizer):
    """One regular expression for what the pre-tokenizers do in turn, or None."""
    steps = steps_of(pre_tokenizer, "pretokenizers")
    match [{"use_regex": True} | step for step in steps]:
        case [{"type": "ByteLevel", "add_prefix_space": False, "use_regex": True}]:
            return BYTE_LEVEL_PATTERN
        case [{"type": "Digits", "individual_digits": bool(single)},
              {"type": "ByteLevel", "add_prefix_space": False, "use_regex": bool(words)}]:
            number = r"\p{N}" if single else r"\p{N}+"
            return f"{number}|" + (NO_DIGIT_PATTERN if words else r"\P{N}+")
        case [{"type": "Split", "pattern": {"Regex": str(pattern)}, "behavior": "Isolated",
               "invert": False},
              {"type": "ByteLevel", "add_prefix_space": False, "use_regex": False}]:
            if COMMON_REGEX.fullmatch(pattern) and not regex.match(pattern, ""):
                return rf"{pattern}|(?:(?!{pattern})[\s\S])+"
    return None


def last_parts(token, priority):
    """The parts of a token before the last merge that makes it, or those that never merge.

    What the merges do within a token does not depend on its surroundings, so the token arises from
    these two parts and from no others, wherever it arises.
    """
    parts, never = list(token), len(priority)
    while len(parts) > 2:
        waiting = [priority.get(pair, never) for pair in itertools.pairwise(parts)]
        if min(waiting) == never:
            break
        i = waiting.index(min(waiting))
        parts[i : i + 2] = [parts[i] + parts[i + 1]]
    return tuple(parts)


class Unsupported(Exception):
    """What of a tokenizer.json only the `tokenizers` library can do."""


class ByteLevel:
    """Byte-level BPE. Raises Unsupported for a tokenizer.json that it cannot do exactly."""

    def __init__(self, spec, added):
        self.check(spec, added)
        self.pattern = split_pattern(spec["pre_tokenizer"])
        self.nfc = bool(steps_of(spec.get("normalizer"), "normalizers"))
        self.first = AddedTokens({c: t for c, t in added.items() if not t["normalized"]})
        self.second = AddedTokens({self.normalize(content): token
                                   for content, token in added.items() if token["normalized"]})
        self.bytes = {i: as_bytes(token) for token, i in spec["model"]["vocab"].items()}
        self.bytes |= {token["id"]: content.encode() for content, token in added.items()}
        self.read_merges(spec["model"], {c for c, t in added.items() if t["special"]})

    def check(self, spec, added):
        model, decoder = spec["model"], spec.get("decoder") or {}
        if model.get("type") != "BPE" or decoder.get("type") != "ByteLevel":
            raise Unsupported(f"type {model.get('type')} with decoder {decoder.get('type')}")
        if not split_pattern(spec.get("pre_tokenizer")):
            raise Unsupported("its field 'pre_tokenizer'")
        if any(s["type"] != "NFC" for s in steps_of(spec.get("normalizer"), "normalizers")):
            raise Unsupported("its field 'normalizer'")
        for field in ("dropout", "unk_token", "continuing_subword_prefix", "end_of_word_suffix",
                      "byte_fallback"):
            if model.get(field):
                raise Unsupported(f"its field 'model.{field}'")
        following = len(model["vocab"])  # the library numbers added tokens itself
        for content, token in added.items():
            number = model["vocab"].get(content, following)
            strips = token["lstrip"] or token["rstrip"]
            if token["id"] != number or token["single_word"] or strips and not token["special"]:
                raise Unsupported(f"its added token {content}")
            following = max(following, number + 1)

    def read_merges(self, model, special):
        """tiktoken's ranks: of a token that merges make, the priority of its last merge.

        tiktoken merges whatever gives a token with a rank, and looks a whole piece up first; so
        entries that no merges make must have no rank, unless `ignore_merges` looks them up too.
        """
        pairs = [tuple(m.split(" ") if isinstance(m, str) else m) for m in model["merges"]]
        for a, b in pairs:
            if not {a, b, a + b} <= model["vocab"].keys():
                raise ValueError(f"field 'model.merges': {a} {b}: not in the vocabulary")
        priority = {pair: i for i, pair in enumerate(pairs)}
        vocab = {token: i for token, i in model["vocab"].items() if BYTE_OF.keys() >= set(token)
                 and not (token in special and len(token) > 1)}
        made = {a + b: last_parts(a + b, priority) for a, b in pairs if a + b in vocab}
        ranks = {token: priority[parts] for token, parts in made.items() if parts in priority}
        lacking = [c for c in BYTE_OF if c not in vocab]
        whole = [t for t in vocab if len(t) > 1 and t not in ranks]
        if not model.get("ignore_merges"):
            whole = []
        elif whole and (lacking or any(len(last_parts(t, priority)) == 2 for t in whole)):
            raise Unsupported("ignore_merges with tokens that no merges make")
        ranks |= {token: len(pairs) + i for i, token in enumerate([*BYTE_OF, *whole])}
        self.lacking = b"".join(map(as_bytes, lacking))
        self.lacking_ranks = {ranks[c] for c in lacking}
        self.id_of = {rank: vocab.get(token) for token, rank in ranks.items()}
        ranks = {as_bytes(token): rank for token, rank in ranks.items()}
        self.encoding = tiktoken.Encoding(
            "huggingface", pat_str=self.pattern, mergeable_ranks=ranks, special_tokens={}
        )

    def normalize(self, text):
        return unicodedata.normalize("NFC", text) if self.nfc else text

    def encode(self, text):
        ids = []
        for part in self.first.cut(text):
            rest = [part] if isinstance(part, int) else self.second.cut(self.normalize(part))
            for x in rest:
                ids += [x] if isinstance(x, int) else self.encode_between(x)
        return ids

    def encode_between(self, text):
        """Bytes without a token drop out of their piece before its merges."""
        ranks = self.encoding.encode_ordinary(text)
        if not self.lacking_ranks.isdisjoint(ranks):
            pieces = (match[0].encode() for match in regex.finditer(self.pattern, text))
            pieces = filter(None, (piece.translate(None, self.lacking) for piece in pieces))
            ranks = [r for piece in pieces for r in self.encoding._encode_single_piece(piece)]
        return [self.id_of[rank] for rank in ranks]

    def decode(self, tokens):
        return b"".join(self.bytes.get(t, b"") for t in tokens).decode(errors="replace")

    def pieces(self, tokens):
        return [self.decode([t]) for t in tokens]


# ---------------------------------------------------------------- any other kind


class Library:
    """Any tokenizer.json, through the `tokenizers` library.

    A SentencePiece kind puts a space before whatever it encodes, so also before each stretch of a
    prompt that cannot be encoded as a whole.
    """

    def __init__(self, spec, added):
        from tokenizers import Tokenizer

        self.tokenizer = Tokenizer.from_str(json.dumps(spec))
        self.tokenizer.no_truncation()
        self.tokenizer.no_padding()
        for content, token in added.items():
            token["id"] = self.tokenizer.token_to_id(content)
        self.special = {c: t["id"] for c, t in added.items() if t["special"] and len(c) > 1}
        self.bytes = {i: t for t, i in self.tokenizer.get_vocab(with_added_tokens=True).items()}

    def encode(self, text, with_special=False):
        self.tokenizer.encode_special_tokens = not with_special
        ids = self.tokenizer.encode(text, add_special_tokens=False).ids
        for content, token in () if with_special else self.special.items():
            if content in text and token in ids:
                raise UserError(f"this tokenizer takes the text {content} for a special token")
        return ids

    def decode(self, tokens):
        return self.tokenizer.decode(tokens, skip_special_tokens=False)

    def pieces(self, tokens):
        return [self.bytes.get(t, "").replace("\u2581", " ") for t in tokens]


# ---------------------------------------------------------------- chat template

DEFAULT_TEMPLATE = """\
{{ bos_token }}{% for message in messages %}
{{ {"system": "", "user": "User:\n", "assistant": "Assistant:\n"}[message.role] }}\
{{ message.content }}{{ eos_token if message.role == "assistant" }}

{% endfor %}{{ "Assistant:\n" if add_generation_prompt }}"""

# While a template is rendered a character stands for each content, so that the template cannot
# act on a content and a content cannot pass for the template's text.
META = "\U000f0000"
SENTINEL = re.compile("([\U000f0000-\U000ffffd])")


def by_sentinel(values, first=0):
    """{sentinel: value}, META for the meta-prompt and those that follow for the turns."""
    return {chr(ord(META) + i): value for i, value in enumerate(values, first)}


class Generation(Extension):
    """The tag {% generation %}, in which templates mark what a model has said."""

    tags = {"generation"}

    def parse(self, parser):
        line = next(parser.stream).lineno
        body = parser.parse_statements(["name:endgeneration"], drop_needle=True)
        return jinja2.nodes.Scope(body, lineno=line)


def compile_template(source):
    """A template in the environment that Hugging Face's templates are written for."""

    def raise_exception(message):
        raise jinja2.TemplateError(message)

    def tojson(x, ensure_ascii=False, indent=None, separators=None, sort_keys=False):
        return json.dumps(x, ensure_ascii=ensure_ascii, indent=indent, separators=separators,
                          sort_keys=sort_keys)

    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[LoopControlExtension, Generation]
    )
    environment.filters["tojson"] = tojson
    environment.globals["raise_exception"] = raise_exception
    environment.globals["strftime_now"] = datetime.now().strftime
    return environment.from_string(source)


def find_template(folder, config):
    """The file that a chat template would be in, and the template or None. Raises UserError."""
    path = folder / "chat_template.jinja"
    if path.exists():
        try:
            return path, path.read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise UserError(f"{path}: cannot read: {first_line(error)}") from None
    path, template = folder / "tokenizer_config.json", config.get("chat_template")
    if isinstance(template, list):
        named = {t.get("name"): t.get("template") for t in template if isinstance(t, dict)}
        template = named.get("default", template)
    if not isinstance(template, str | None):
        raise UserError(f"{path}: field 'chat_template': neither text nor a list with a default")
    return path, template


say_once = cache(print)


def example_text(example):
    return (f"Query: {example['prompt']}\nPreferred answer: {example['chosen']}\n"
            f"Answer passed over: {example['rejected']}")


def content_of(token):
    """The text of a token as configs give it: the text itself or an object."""
    return token.get("content") if isinstance(token, dict) else token


def meta_prompt(record):
    """System, preference and examples as one text, "" when all are absent."""
    tiers = [record.get(tier) for tier in TEXT_TIERS]
    return "\n\n".join(filter(None, [*tiers, *map(example_text, record.get("examples") or ())]))


# ---------------------------------------------------------------- the tokenizer


def known_ids(*configs):
    """{"bos_token_id": ids, "eos_token_id": ids}, of each what the last config that has it says."""
    ids = {"bos_token_id": [], "eos_token_id": []}
    for key, config in itertools.product(ids, configs):
        if config.get(key) is not None:
            found = config[key] if isinstance(config[key], list) else [config[key]]
            ids[key] = [i for i in found if type(i) is int]
    return ids


class HfTokenizer:
    """Tokenizer and chat template; `files` is {name: bytes} of what `save` writes."""

    @classmethod
    def load(cls, folder):
        """Raises UserError when a file is missing, broken or of a kind that nothing here reads."""
        folder = Path(folder)
        if (folder / "tokenizer.model").exists() and not (folder / "tokenizer.json").exists():
            raise UserError(f"{folder}: has a tokenizer.model but no tokenizer.json, which "
                            "save_pretrained of transformers' AutoTokenizer writes")
        return cls(folder)

    def __init__(self, folder):
        self.folder, self.skeletons = folder, {}
        spec = load_json(folder / "tokenizer.json")
        names = [name for name in (*TOKENIZER_FILES, *MODEL_CONFIGS) if (folder / name).exists()]
        found = {name: load_json(folder / name) if name in names else {}
                 for name in (*CONFIGS, *MODEL_CONFIGS)}
        config = found[CONFIGS[0]] | found[CONFIGS[1]]
        self.variables = {k: content_of(v) for k, v in config.items()
                          if k.endswith("_token") and isinstance(content_of(v), str)}
        ids = known_ids(*(found[name] for name in MODEL_CONFIGS))
        self.read(spec, config, sum(ids.values(), []))
        self.files = {name: (folder / name).read_bytes() for name in names if name != "config.json"}
        self.template_path, template = find_template(folder, config)
        if not template:
            say_once(f"{folder}: no chat template, turns are written as User: and Assistant:")
            self.files["chat_template.jinja"] = DEFAULT_TEMPLATE.encode()
            self.name_tokens(config, ids)
        given = found["generation_config.json"]
        lacking = {key: known for key, known in ids.items() if known and given.get(key) is None}
        if lacking:
            self.bring("generation_config.json", lacking)
        self.template = self.attempt(compile_template, source=template or DEFAULT_TEMPLATE)
        self.probe([i for i in ids["eos_token_id"] if i in self.model.bytes])

    def name_tokens(self, config, ids):
        """bos_token and eos_token for the template that stands in, where only ids are known.

        A bos_token that is null stays none; without an eos_token no answer would end.
        """
        content = {token["id"]: text for text, token in self.added.items()}
        for key, known in ids.items():
            name = key.removesuffix("_id")
            absent = name not in (config if key == "bos_token_id" else self.variables)
            if absent and known and known[0] in content:
                self.variables[name] = content[known[0]]
                self.bring("tokenizer_config.json", {name: content[known[0]]})

    def bring(self, name, fields):
        """Add to a file what a trained or exported model shall have with it."""
        self.files[name] = json.dumps(self.content(name) | fields, indent=2).encode()

    def content(self, name):
        """A file of JSON; without it, {}."""
        return json.loads(self.files.get(name, b"{}"))

    def read(self, spec, config, ids):
        """Tokens that the configuration names, or the model by their `ids`, are special."""
        more = [config.get(kind) for kind in ("additional_special_tokens", "extra_special_tokens")]
        more = [list(x.values()) if isinstance(x, dict) else x for x in more]
        more = [content_of(token) for x in more if isinstance(x, list) for token in x]
        named = {*self.variables.values(), *(text for text in more if isinstance(text, str))}
        try:
            self.added = added_tokens(spec, config, named, ids)
            try:
                self.model = ByteLevel(spec, self.added)
            except Unsupported as error:
                reason = error
                self.model = Library(spec, self.added)
        except ImportError:
            raise UserError(f"{self.folder / 'tokenizer.json'}: {reason} needs the tokenizers "
                            "library: pip install tokenizers") from None
        except Exception as error:  # whatever comes of a file that is not what it should be
            what = f"field {error}: missing" if isinstance(error, KeyError) else first_line(error)
            raise UserError(f"{self.folder / 'tokenizer.json'}: not a tokenizer: {what}") from None
        self.vocab_size = max(self.model.bytes) + 1
        self.special = {token["id"] for token in self.added.values() if token["special"]}

    def probe(self, model_ends):
        """Learn from the template which token ends an answer and whether it takes a system turn.

        `model_ends`: ids at which the model stops too.
        """
        whole = self.fill(("user", "assistant"), False, False)
        answered, _, behind = whole.partition(chr(ord(META) + 2))
        after = self.special_only(self.split(behind))
        eos = self.added.get(self.variables.get("eos_token"), {}).get("id")
        self.ends = after[:1] or [eos] * (eos is not None)
        self.ends += [token for token in model_ends if token not in self.ends]
        if not self.ends:
            raise UserError(f"{self.folder / 'tokenizer_config.json'}: field 'eos_token': missing, "
                            "no config names an eos_token_id, and the chat template ends no answer "
                            "with a special token")
        self.end = self.ends[0]
        asked = self.fill(("user",), False, True)
        self.tail = SENTINEL.split(asked)[-1]
        lead = answered.removeprefix(asked)
        self.lead = lead if lead.isspace() else ""  # Llama 2 has a space there
        self.takes_system = True
        try:
            self.fill(("user",), True, True)
        except UserError:
            self.takes_system = False
            say_once(f"{self.folder}: the chat template takes no system turn: "
                     "the meta-prompt goes to the head of the first query")

    def attempt(self, function, **arguments):
        """Run what a template can make fail in any way. Raises UserError."""
        try:
            return function(**arguments)
        except Exception as error:
            raise UserError(f"{self.template_path}: field 'chat_template': "
                            f"{first_line(error)}") from None

    def rendered(self, **about):
        return self.template.render(**about, tools=None, documents=None, **self.variables)

    def messages(self, turns, meta):
        """The turns with the meta-prompt: the system turn or, if none can be, before a query."""
        if not meta or self.takes_system:
            return [{"role": "system", "content": meta}] * bool(meta) + turns
        first = [turn["role"] for turn in turns].index("user")
        query = turns[first] | {"content": f"{meta}\n\n{turns[first]['content']}"}
        return [*turns[:first], query, *turns[first + 1 :]]

    def fill(self, roles, with_meta, to_answer):
        """The template's text for some turns, with a sentinel for each content."""
        turns = [{"role": role, "content": sentinel}
                 for sentinel, role in by_sentinel(roles, 1).items()]
        messages = self.messages(turns, META * with_meta)
        text = self.attempt(self.rendered, messages=messages, add_generation_prompt=to_answer)
        if sorted(SENTINEL.findall(text)) != [*META * with_meta, *by_sentinel(roles, 1)]:
            raise UserError(f"{self.template_path}: field 'chat_template': does not show each of "
                            f"the turns {', '.join(m['role'] for m in messages)} once")
        return text

    def split(self, text):
        """Ids of added tokens, texts and sentinels, in their order."""
        parts = self.added.cut(text, with_special=True)
        parts = [[part] if isinstance(part, int) else SENTINEL.split(part) for part in parts]
        return [x for part in parts for x in part if x != ""]

    def special_only(self, items):
        return [x for x in items if x in self.special]

    def skeleton(self, roles, with_meta):
        """The template's text for such a conversation and its `split`, cached."""
        key = roles, with_meta
        if key not in self.skeletons:
            text = self.fill(roles, with_meta, True)
            self.skeletons[key] = text, self.split(text)
        return self.skeletons[key]

    def render(self, record, contents=None):
        """Tokens of a record up to its answer, as apply_chat_template gives them.

        `contents`: tokens for each turn instead of its text. No text yields a special token.
        """
        turns = prompt_turns(record)
        texts = by_sentinel([meta_prompt(record), *(turn["content"] for turn in turns)])
        text, items = self.skeleton(tuple(turn["role"] for turn in turns), bool(texts[META]))
        if contents is None:
            whole = SENTINEL.sub(lambda match: texts[match[0]], text)
            self.compare(whole, self.messages(turns, texts[META]))
            if isinstance(self.model, Library):
                ids = self.encode_whole(whole, text)
                if ids is not None:
                    return ids
        given, ids, stretch = by_sentinel(contents or (), 1), [], ""
        for item in items:
            if isinstance(item, str) and item not in given:
                stretch += texts.get(item, item)
            else:
                ids += [*self.encode(stretch), *given.get(item, [item])]
                stretch = ""
        return ids + self.encode(stretch)

    def compare(self, whole, messages):
        """Say so once where the template would change what the prompt says, or refuse it."""
        try:
            theirs = self.attempt(self.rendered, messages=messages, add_generation_prompt=True)
        except UserError:
            theirs = None
        if whole != theirs:
            say_once(f"{self.folder}: the chat template would change contents (outer white space, "
                     "thoughts in earlier answers): here they stay as they are")

    def encode(self, text):
        """Ordinary text: what spells a special token is encoded as any other text."""
        return self.model.encode(text) if text else []

    def encode_whole(self, text, bare):
        """Ids of template and contents; None where contents give special ids that `bare` has not.

        They may spell a special token, a normalizer may too; what has no token is unknown only.
        """
        unknown = self.special_only(self.model.encode(META))  # no vocabulary has this character
        both = [self.model.encode(x, with_special=True) for x in (text, bare)]
        special = [[i for i in self.special_only(ids) if i not in unknown] for ids in both]
        spelled = [self.special_only(self.split(x)) for x in (text, bare)]
        return both[0] if special[0] == special[1] and spelled[0] == spelled[1] else None

    def encode_answer(self, text):
        """An answer as it is encoded behind the prompt.

        A SentencePiece kind puts a space before what it encodes alone. Where the prompt's ids do
        not depend on what follows, an answer begins as in the whole conversation instead.
        """
        if isinstance(self.model, Library):
            before = self.model.encode(self.tail, with_special=True)
            both = self.encode_whole(self.tail + self.lead + text, self.tail)
            if both is not None and both[: len(before)] == before:
                return both[len(before) :]
        return self.encode(text)

    def decode(self, tokens):
        return self.model.decode(tokens)

    def pieces(self, tokens):
        """Each token as text."""
        return self.model.pieces(tokens)

    def describe(self):
        """Changes when a file of the tokenizer or template does; kept in config.json.

        Not with what `export` changes.
        """
        contents = {name: self.files.get(name, b"").decode("latin-1") for name in TOKENIZER_FILES}
        contents["tokenizer_config.json"] = self.content("tokenizer_config.json") | AS_IT_IS
        return {"kind": "huggingface", "hash": content_hash(contents, self.end)}

    def save(self, folder):
        for name, content in self.files.items():
            write_atomically(Path(folder) / name, lambda path, c=content: path.write_bytes(c))

    def export(self, folder):
        """Save, for transformers to give the same ids."""
        self.save(folder)
        config = self.content("tokenizer_config.json") | AS_IT_IS
        save_json(Path(folder) / "tokenizer_config.json", config)
