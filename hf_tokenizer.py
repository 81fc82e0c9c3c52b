"""A Hugging Face folder's tokenizer.json and chat template, with the interface of data.Tokenizer.

Byte-level BPE (GPT-2, SmolLM2, Llama 3, Qwen) runs on tiktoken and gives the ids of `tokenizers`
, the library; any other kind runs on that library itself, which then has to be installed.
"""

import json
import re
import sys
import unicodedata
from datetime import datetime
from itertools import pairwise
from pathlib import Path

import jinja2
import regex
import tiktoken
from jinja2.ext import Extension, LoopControlExtension
from jinja2.sandbox import ImmutableSandboxedEnvironment

from common import UserError, content_hash, first_line, write_atomically

FILES = ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json",
         "chat_template.jinja", "generation_config.json")  # fmt: skip

# ---------------------------------------------------------------- byte-level BPE on tiktoken

GPT2_PATTERN = (
    r"'(?:[sdmt]|ll|ve|re)| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
)
# Between digits that are split off, each fragment ends where a digit begins.
FRAGMENT_PATTERN = r"'(?:[sdmt]|ll|ve|re)| ?\p{L}+| ?[^\s\p{L}\p{N}]+|\s+(?![^\s\p{N}])|\s+"

# Syntax that means the same to Oniguruma (`tokenizers`), fancy-regex (tiktoken) and `regex`.
PLAIN_REGEX = regex.compile(r"""(?:
    (?: \((?:\?i?:|\?[!=])? | \| )
  | (?: \) | \\p\{\w+\} | \\[sSrntd] | \\[^\w\s] | [^\\\[\](){}?*+|.^$]
      | \[\^?(?: \\p\{\w+\} | \\[sSrntd] | \\[^\w\s] | &(?!&) | [^\\\[\]&] )+\] )
    (?: (?: [?*+] | \{\d+(?:,\d*)?\} ) (?![+?]) )?
)+""", regex.X)  # fmt: skip

# How a vocabulary spells bytes: those that show as themselves, the others from U+0100 on.
SHOWN = [*range(33, 127), *range(161, 173), *range(174, 256)]
HIDDEN = sorted(set(range(256)) - set(SHOWN))
BYTE_OF = {chr(b): b for b in SHOWN} | {chr(256 + i): b for i, b in enumerate(HIDDEN)}


def as_bytes(token):
    """Bytes of a vocabulary entry; one that is not in byte-level spelling never comes from text."""
    byte_level = BYTE_OF.keys() >= set(token)
    return bytes([BYTE_OF[c] for c in token]) if byte_level else token.encode()


def split_pattern(pre_tokenizer):
    """One regular expression for what the pre-tokenizers do in turn, or None."""
    steps = pre_tokenizer or {}
    steps = steps.get("pretokenizers") if steps.get("type") == "Sequence" else [steps]
    match [{"use_regex": True} | step for step in steps]:
        case [{"type": "ByteLevel", "add_prefix_space": False, "use_regex": True}]:
            return GPT2_PATTERN
        case [{"type": "Digits", "individual_digits": bool(single)},
              {"type": "ByteLevel", "add_prefix_space": False, "use_regex": bool(words)}]:
            number = r"\p{N}" if single else r"\p{N}+"
            return f"{number}|" + (FRAGMENT_PATTERN if words else r"\P{N}+")
        case [{"type": "Split", "pattern": {"Regex": str(pattern)}, "behavior": "Isolated",
               "invert": False},
              {"type": "ByteLevel", "add_prefix_space": False, "use_regex": False}]:
            if PLAIN_REGEX.fullmatch(pattern) and not regex.match(pattern, ""):
                return rf"{pattern}|(?:(?!{pattern})[\s\S])+"
    return None


def is_nfc(normalizer):
    """True for a normalizer that is NFC, False for none at all, None for any other."""
    if not normalizer:
        return False
    steps = [normalizer]
    if normalizer.get("type") == "Sequence":
        steps = normalizer.get("normalizers")
    return True if all(step.get("type") == "NFC" for step in steps) else None


def last_parts(token, priority):
    """The parts of a token before the last merge that makes it, or those that never merge.

    What the merges do within a token does not depend on its surroundings, so the token arises from
    these two parts and from no others, wherever it arises.
    """
    parts = tuple(token)
    while len(parts) > 2:
        best = min(pairwise(parts), key=lambda pair: priority.get(pair, len(priority)))
        if best not in priority:
            break
        i = list(pairwise(parts)).index(best)
        parts = (*parts[:i], best[0] + best[1], *parts[i + 2 :])
    return parts


class Unsupported(Exception):
    """What of a tokenizer.json only the `tokenizers` library can do."""


class ByteLevel:
    """Byte-level BPE. Raises Unsupported for a tokenizer.json that it cannot do exactly."""

    def __init__(self, spec, added):
        model, self.added = spec["model"], added
        self.pattern = split_pattern(spec.get("pre_tokenizer"))
        self.nfc = is_nfc(spec.get("normalizer"))
        why = self.unsupported(spec)
        if why:
            raise Unsupported(why)
        self.bytes = {i: as_bytes(token) for token, i in model["vocab"].items()}
        self.bytes |= {token["id"]: content.encode() for content, token in added.items()}
        self.plain = [c for c, t in added.items() if not t["special"]]
        self.raw = AddedTokens({c: t for c, t in added.items() if not t["normalized"]})
        self.normal = AddedTokens({self.normalize(c): t for c, t in added.items()
                                   if t["normalized"]})  # fmt: skip
        self.read_merges(model)

    def unsupported(self, spec):
        """What of this tokenizer.json is beyond this class, or None."""
        model, decoder = spec["model"], spec.get("decoder") or {}
        if model.get("type") != "BPE" or decoder.get("type") != "ByteLevel":
            return f"a tokenizer of type {model.get('type')} with decoder {decoder.get('type')}"
        if self.pattern is None:
            return "its field 'pre_tokenizer'"
        if self.nfc is None:
            return "its field 'normalizer'"
        for field in ("dropout", "unk_token", "continuing_subword_prefix", "end_of_word_suffix",
                      "byte_fallback"):  # fmt: skip
            if model.get(field):
                return f"its field 'model.{field}'"
        following = len(model["vocab"])  # the library numbers added tokens itself
        for content, token in self.added.items():
            number = model["vocab"].get(content, following)
            strips = token["lstrip"] or token["rstrip"]
            if token["id"] != number or token["single_word"] or strips and not token["special"]:
                return f"its added token {content}"
            following = max(following, number + 1)
        return None

    def read_merges(self, model):
        """tiktoken's ranks: of a token that merges make, the priority of its last merge.

        tiktoken merges whatever gives a token with a rank, and looks a whole piece up first; so
        entries that no merges make must have no rank, unless `ignore_merges` looks them up too.
        """
        pairs = [tuple(m.split(" ") if isinstance(m, str) else m) for m in model["merges"]]
        for a, b in pairs:
            if not {a, b, a + b} <= model["vocab"].keys():
                raise ValueError(f"field 'model.merges': {a} {b}: not in the vocabulary")
        priority = {pair: i for i, pair in enumerate(pairs)}
        special = {c for c, t in self.added.items() if t["special"] and len(c) > 1}
        vocab = {t: i for t, i in model["vocab"].items()
                 if t not in special and BYTE_OF.keys() >= set(t)}  # fmt: skip
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
        if not any(content in text for content in self.plain):
            return self.encode_plain(self.normalize(text))
        ids = []
        for part in self.raw.cut(text):
            rest = [part] if isinstance(part, int) else self.normal.cut(self.normalize(part))
            for x in rest:
                ids += [x] if isinstance(x, int) else self.encode_plain(x)
        return ids

    def encode_plain(self, text):
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
    """Any tokenizer.json, through the `tokenizers` library."""

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
                raise UserError(f"this tokenizer cannot encode the text {content} as plain text")
        return ids

    def decode(self, tokens):
        return self.tokenizer.decode(tokens, skip_special_tokens=False)

    def pieces(self, tokens):
        return [self.bytes.get(t, "").replace("\u2581", " ") for t in tokens]


# ---------------------------------------------------------------- added tokens

WHITE_SPACE = "".join(filter(regex.compile(r"\s").match, map(chr, range(0x3001))))


class AddedTokens(dict):
    """{content: token} with id and flags, found in a text as `tokenizers` finds them."""

    def __init__(self, tokens):
        super().__init__(tokens)
        longest_first = sorted(map(re.escape, self), key=len, reverse=True)
        self.pattern = re.compile("|".join(longest_first) or "(?!)")

    def cut(self, text, with_special=False):
        """Ids of added tokens and the texts between them; special ones only if asked for."""
        parts, start = [], 0
        for match in self.pattern.finditer(text):
            token, (begin, end) = self[match[0]], match.span()
            if token["special"] and not with_special:
                continue
            if token["lstrip"]:
                begin = start + len(text[start:begin].rstrip(WHITE_SPACE))
            if token["rstrip"]:
                end = len(text) - len(text[end:].lstrip(WHITE_SPACE))
            parts += [text[start:begin], token["id"]]
            start = end
        return [part for part in [*parts, text[start:]] if part != ""]


def added_tokens(spec, named):
    """AddedTokens of tokenizer.json; those that the configuration names count as special.

    Changes `spec` accordingly.
    """
    tokens = spec["added_tokens"] = spec.get("added_tokens") or []
    added, vocab = {t["content"]: t for t in tokens}, spec["model"]["vocab"]
    for content in named:
        if content not in added and isinstance(vocab, dict) and content in vocab:
            added[content] = {"id": vocab[content], "content": content}
            tokens.append(added[content])
    for token in tokens:
        for flag in ("special", "single_word", "lstrip", "rstrip", "normalized"):
            token[flag] = bool(token.get(flag))
        token["special"] |= token["content"] in named
    return AddedTokens(added)


# ---------------------------------------------------------------- chat template

DEFAULT_TEMPLATE = """\
{{ bos_token }}{% for message in messages %}
{{ {"system": "", "user": "User:\n", "assistant": "Assistant:\n"}[message.role] }}\
{{ message.content }}{{ eos_token if message.role == "assistant" }}

{% endfor %}{{ "Assistant:\n" if add_generation_prompt }}"""

# While a template is rendered, a character stands for each content: U+F0000 for the meta-prompt,
# U+F0001 for the first turn, and so on.
META = "\U000f0000"
SENTINEL = re.compile("([\U000f0000-\U000ffffd])")
MAX_EVENTS = 3_000_000  # lines and calls of one rendering; a long conversation needs some 10,000


def sentinel(place):
    return chr(ord(META) + place)


def place(character):
    return ord(character) - ord(META)


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
    environment.globals["strftime_now"] = lambda format: datetime.now().strftime(format)
    return environment.from_string(source)


def limited(function, **arguments):
    """Call a function; RuntimeError when it takes more than MAX_EVENTS lines and calls."""
    count, before = 0, sys.gettrace()

    def trace(*_):
        nonlocal count
        count += 1
        if count > MAX_EVENTS:
            raise RuntimeError("it does not come to an end")
        return trace

    sys.settrace(trace)
    try:
        return function(**arguments)
    finally:
        sys.settrace(before)


def example_text(example):
    return (f"Query: {example['prompt']}\nPreferred answer: {example['chosen']}\n"
            f"Answer passed over: {example['rejected']}")


def meta_prompt(record):
    """System, preference and examples as one text, "" when all are absent."""
    tiers = [record.get("system"), record.get("preference")]
    return "\n\n".join(filter(None, [*tiers, *map(example_text, record.get("examples") or ())]))


# ---------------------------------------------------------------- the folder


def read(path):
    try:
        return path.read_bytes()
    except OSError as error:
        raise UserError(f"{path}: {error.strerror}") from None


def parse(path, content):
    try:
        content = json.loads(content)
    except ValueError as error:
        raise UserError(f"{path}: not valid JSON: {error}") from None
    if not isinstance(content, dict):
        raise UserError(f"{path}: not a JSON object")
    return content


def special_tokens(config):
    """{"eos_token": text, ...} of tokenizer_config.json, where a token is text or an object."""
    tokens = {k: v.get("content") if isinstance(v, dict) else v for k, v in config.items()
              if k.endswith("_token")}  # fmt: skip
    return {k: v for k, v in tokens.items() if isinstance(v, str)}


def chat_template(folder, files, config):
    """The path of the file that holds the chat template, and the template or None."""
    if "chat_template.jinja" in files:
        path = folder / "chat_template.jinja"
        try:
            return path, files["chat_template.jinja"].decode()
        except UnicodeDecodeError as error:
            raise UserError(f"{path}: not UTF-8: byte {error.start + 1}") from None
    path, template = folder / "tokenizer_config.json", config.get("chat_template")
    if isinstance(template, list):
        named = {t.get("name"): t.get("template") for t in template if isinstance(t, dict)}
        template = named.get("default", template)
    if not isinstance(template, str | None):
        raise UserError(f"{path}: field 'chat_template': neither text nor a list with a default")
    return path, template


# ---------------------------------------------------------------- the tokenizer


class HfTokenizer:
    """The tokenizer and chat template of a folder whose files are {name: bytes}."""

    def __init__(self, folder, files):
        folder = Path(folder)
        self.name, self.files, self.skeletons = folder.resolve().name, files, {}
        configs = {name: parse(folder / name, files.get(name, b"{}")) for name in FILES
                   if name.endswith(".json")}  # fmt: skip
        config = configs["special_tokens_map.json"] | configs["tokenizer_config.json"]
        self.variables = special_tokens(config)
        self.path = folder / "tokenizer.json"
        self.read(configs["tokenizer.json"])
        self.template_path, text = chat_template(folder, files, config)
        if text is None:
            print(f"{folder}: no chat template, turns are written as User: and Assistant:")
        self.template = self.attempt(compile_template, source=text or DEFAULT_TEMPLATE)
        self.probe()

    def read(self, spec):
        """Raises UserError when tokenizer.json is not what it should be."""
        named = [*self.variables.values()]
        try:
            self.added = added_tokens(spec, named)
            try:
                self.model = ByteLevel(spec, self.added)
            except Unsupported as error:
                self.model = self.through_library(spec, error)
        except (AttributeError, IndexError, KeyError, TypeError, ValueError) as error:
            what = f"field {error}: missing" if isinstance(error, KeyError) else first_line(error)
            raise UserError(f"{self.path}: not a tokenizer: {what}") from None
        self.vocab_size = max(self.model.bytes) + 1
        self.special = {t["id"] for t in self.added.values() if t["special"]}

    def through_library(self, spec, reason):
        try:
            return Library(spec, self.added)
        except ImportError:
            raise UserError(f"{self.path}: {reason} needs the tokenizers library: "
                            "pip install tokenizers") from None
        except Exception as error:  # the library raises no other kind
            raise UserError(f"{self.path}: {first_line(error)}") from None

    def probe(self):
        """Learn from the template which token ends an answer and whether it takes a system turn."""
        items = self.split(self.fill(("user", "assistant"), False, False))
        after = items[items.index(sentinel(2)) + 1 :]
        eos = self.added.get(self.variables.get("eos_token"), {}).get("id")
        self.end = next((x for x in after if x in self.special), eos)
        if self.end is None:
            raise UserError(f"{self.path.parent / 'tokenizer_config.json'}: field 'eos_token': "
                            "missing, and the chat template ends no answer with a special token")
        self.fill(("user",), False, True)
        try:
            self.fill(("user",), True, True)
            self.takes_system = True
        except UserError:
            self.takes_system = False
            print(f"{self.path.parent}: the chat template takes no system turn: "
                  "the meta-prompt goes to the head of the first query")

    def attempt(self, function, **arguments):
        """Run what a template may break. Raises UserError."""
        try:
            return limited(function, **arguments)
        except Exception as error:  # a template is a program: anything can happen
            raise UserError(f"{self.template_path}: field 'chat_template': "
                            f"{first_line(error)}") from None

    def fill(self, roles, with_system, with_answer):
        """The template's text for some turns, with a sentinel for each content."""
        messages = [{"role": role, "content": sentinel(i)} for i, role in enumerate(roles, 1)]
        if with_system:
            messages.insert(0, {"role": "system", "content": META})
        text = self.attempt(self.template.render, messages=messages, tools=None, documents=None,
                            add_generation_prompt=with_answer, **self.variables)  # fmt: skip
        if sorted(SENTINEL.findall(text)) != [message["content"] for message in messages]:
            raise UserError(f"{self.template_path}: field 'chat_template': does not show each of "
                            f"the turns {', '.join(m['role'] for m in messages)} once")
        return text

    def split(self, text):
        """Ids of added tokens, texts and sentinels, in their order."""
        parts = self.added.cut(text, with_special=True)
        parts = [[part] if isinstance(part, int) else SENTINEL.split(part) for part in parts]
        return [x for part in parts for x in part if x != ""]

    def specials(self, items):
        return [x for x in items if x in self.special]

    def skeleton(self, roles, with_meta):
        """The template's text for such a conversation and its `split`, cached."""
        key = roles, with_meta
        if key not in self.skeletons:
            text = self.fill(roles, with_meta and self.takes_system, True)
            if with_meta and not self.takes_system:
                query = sentinel(1 + roles.index("user"))
                text = text.replace(query, f"{META}\n\n{query}")
            self.skeletons[key] = text, self.split(text)
        return self.skeletons[key]

    def render(self, record, contents=None):
        """Tokens of a record up to its answer, as apply_chat_template gives them.

        `contents`: tokens to use instead of each turn's own. No content yields a special token.
        """
        turns = record["prompt"]
        if isinstance(turns, str):
            turns = [{"role": "user", "content": turns}]
        texts = [meta_prompt(record), *(turn["content"] for turn in turns)]
        text, items = self.skeleton(tuple(turn["role"] for turn in turns), bool(texts[0]))
        if contents is None and isinstance(self.model, Library):
            whole = SENTINEL.sub(lambda match: texts[place(match[0])], text)
            if self.specials(self.split(whole)) == self.specials(items):
                return self.model.encode(whole, with_special=True)
        ids, stretch = [], ""
        for item in items:
            if isinstance(item, int):
                ids += [*self.encode(stretch), item]
                stretch = ""
            elif not SENTINEL.fullmatch(item):
                stretch += item
            elif contents is None or item == META:
                stretch += texts[place(item)]
            else:
                ids += [*self.encode(stretch), *contents[place(item) - 1]]
                stretch = ""
        return ids + self.encode(stretch)

    def encode(self, text):
        """Ordinary text: what spells a special token is encoded as any other text."""
        return self.model.encode(text) if text else []

    def decode(self, tokens):
        return self.model.decode(tokens)

    def pieces(self, tokens):
        """Each token as text."""
        return self.model.pieces(tokens)

    def describe(self):
        """Changes whenever a file of the folder does; kept in config.json."""
        contents = {name: content.decode(errors="replace") for name, content in self.files.items()}
        return {"kind": "huggingface", "hash": content_hash(contents)}

    def save(self, folder):
        for name, content in self.files.items():
            write_atomically(Path(folder) / name, lambda path, c=content: path.write_bytes(c))

    @classmethod
    def load(cls, folder):
        """Raises UserError when a file is missing, broken or of a kind that nothing here reads."""
        folder = Path(folder)
        files = {name: read(folder / name) for name in FILES if (folder / name).exists()}
        if "tokenizer.json" not in files:
            if (folder / "tokenizer.model").exists():
                raise UserError(f"{folder}: has a tokenizer.model but no tokenizer.json, which "
                                "save_pretrained of transformers' AutoTokenizer writes")
            raise UserError(f"{folder / 'tokenizer.json'}: no such file")
        return cls(folder, files)
