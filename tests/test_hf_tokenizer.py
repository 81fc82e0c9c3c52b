"""Hugging Face folders: the ids of `tokenizers` and of apply_chat_template, and no injection."""

import json
import os
import random
import sys
import unicodedata
from datetime import datetime
from pathlib import Path
from types import SimpleNamespace

import pytest

import data
import evaluate
import hf_model
import hf_tokenizer
from common import UserError
from hf_tokenizer import BYTE_OF, HfTokenizer, Library
from model import ModelConfig
from tiny import new_model

LLAMA3 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
QWEN2 = LLAMA3.replace("{1,3}", "")
KINDS = ("gpt2", "smollm2", "digit_runs", "digits_alone", "llama3", "qwen2", "ours")

# ---------------------------------------------------------------- texts

TEXTS = (
    "", " ", "a", "The theatre, the thermos; there: 'the then'!", "def f(x):\n    return x**2\n",
    "\tif (a&&b) {\r\n\t\treturn 0x1F;\r\n\t}", "https://example.org/a?b=c&d=%20#e", "...---===>>>",
    "it's IT'S I'll I'LL we've WE'VE don't DON'T i'm I'M he'd HE'D they're '\u017f 'K '\u017ft",
    "1 12 123 1234 12345 3.14159 1,000,000 a1b22c333 x 1  22   333\n4\n\n55 \t66",
    "٣٤٥ ۱۲۳ १२३ Ⅳ ⅷ ² ³½ ⑳ 一二三 ৴ 𝟘𝟙 \U00010107 x٣ ٣x  ٣", "naïve café ﬁ Straße İstanbul ǅ ʼn",
    "e\u0301 a\u0308o\u0302\u0323 q\u0307\u0323 \u0301lone \u200d \u0300\u0301 \u1100\u1161\u11a8",
    "\u212b \u1e9b\u0323 \u0958 \u2adc \ufb1d \u0344 =\u0338 >\u0338 <\u0338", "हिन्दी ไทย தமிழ் বাংলা",
    "你好,世界。こんにちは 안녕하세요", "שלום עולם \u200fمرحبا بالعالم\u200e", "\ufeffBOM \uffff",
    "👩‍👩‍👧‍👦🇩🇪👍🏽 ok ☝🏿❤️‍🔥 1️⃣", "𝔘𝔫𝔦𝔠𝔬𝔡𝔢 \U0010ffff \U000e0001\U000f0000\U000f0001 \ue000",
    " " * 300 + "x", "x" + " " * 300, "\n" * 100 + " y", "\t \t  \t" * 20, " \n \n\n  \n z",
    "=" * 130 + "\n" + "-" * 65, "\r\r\n\n\r", "  \r\n  x", "a \u00a0 b\u3000c\u2009\u2003d",
    "x" + "".join(map(chr, range(33))) + "y\x7f\x80\x85\x9f", "a\x04b t\x04he \x1dth\x16e the\x04",
    "".join(f"{c}w{c}1{c}{c}2" for c in hf_tokenizer.WHITE_SPACE), "a" * 700,
    "\u200b\u2060\u180e\u200c a\u180eb", "\x1c\x1d\x1e\x1f \x1c1\x1ca",
)


def texts():
    """TEXTS, and random ones: of pieces where splitting is delicate, and of all characters.

    Without those that Python does not know yet: about these the engines' Unicode versions differ.
    """
    generator = random.Random(0)
    pieces = [*" \n\t'\r.,1٣aé中日\u0301\u212b\x04\x85\xa0", "'s", "'LL", "  ", "the", "<x>", "<|",
              "|>", "the th"]
    for _ in range(400):
        yield "".join(generator.choices(pieces, k=generator.randint(1, 30)))
    planes = [(0, 0x80), (0x80, 0x800), (0x800, 0xD800), (0xE000, 0x10000), (0x10000, 0x20000),
              (0x10000, 0x33480), (0xE0000, 0x110000)]
    for _ in range(400):
        spans = generator.choices(planes, k=20)
        chars = [chr(generator.randrange(*span)) for span in spans]
        yield "".join(c + generator.choice(["", "", " ", "1"])
                      for c in chars if unicodedata.category(c) != "Cn")
    yield from TEXTS
    yield " ".join(TEXTS)


# ---------------------------------------------------------------- folders

SPECIALS = ("<|end|>", "<|im_start|>", "<|im_end|>", "<s>", "</s>")


def pre_tokenizer(kind):
    from tokenizers import Regex, pre_tokenizers
    from tokenizers.pre_tokenizers import ByteLevel, Digits, Split

    rest = ByteLevel(add_prefix_space=False, use_regex=False)
    words = ByteLevel(add_prefix_space=False, use_regex=True)
    steps = {
        "gpt2": [words],
        "smollm2": [Digits(individual_digits=True), words],
        "digit_runs": [Digits(individual_digits=False), words],
        "digits_alone": [Digits(individual_digits=True), rest],
        "llama3": [Split(Regex(LLAMA3), "isolated"), rest],
        "qwen2": [Split(Regex(QWEN2), "isolated"), rest],
        "ours": [Split(Regex(data.GPT2_PATTERN), "isolated"), rest],
        "letters": [Split(Regex(r"\p{L}+|\s(?=\d)"), "isolated"), rest],
    }[kind]
    return steps[0] if kind == "gpt2" else pre_tokenizers.Sequence(steps)


def train(kind, all_bytes=True, size=700):
    """A trained byte-level BPE with special tokens, as tokenizer.json's content."""
    tokenizers = pytest.importorskip("tokenizers")
    tokenizer = tokenizers.Tokenizer(tokenizers.models.BPE(ignore_merges=kind == "llama3"))
    tokenizer.pre_tokenizer = pre_tokenizer(kind)
    tokenizer.decoder = tokenizers.decoders.ByteLevel()
    if kind == "qwen2":
        tokenizer.normalizer = tokenizers.normalizers.NFC()
    alphabet = tokenizers.pre_tokenizers.ByteLevel.alphabet() if all_bytes else []
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=size, initial_alphabet=alphabet, special_tokens=[*SPECIALS[:1]],
        show_progress=False,
    )
    corpus = [text for text in TEXTS if all_bytes or text.isascii()] * 2
    tokenizer.train_from_iterator(corpus, trainer)
    tokenizer.add_special_tokens([*SPECIALS[1:]])
    return json.loads(tokenizer.to_str())


def with_added(spec, *contents, **flags):
    """The same tokenizer with ordinary added tokens."""
    tokenizers = pytest.importorskip("tokenizers")
    tokenizer = tokenizers.Tokenizer.from_str(json.dumps(spec))
    tokenizer.add_tokens([tokenizers.AddedToken(c, **{"normalized": False} | flags)
                          for c in contents])
    return json.loads(tokenizer.to_str())


CHATML = (
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' + m['content'] }}"
    "{{ '<|im_end|>' + '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
TEMPLATES = {
    "chatml": CHATML,
    "default_system": """\
{% if messages[0].role != 'system' %}
<|im_start|>system\nYou are kind.<|im_end|>
{% endif %}
""" + CHATML,
    "llama3": """\
{{- bos_token }}
{%- for m in messages %}
    {{- '<|im_start|>' + m.role + '<s>\n\n' }}
    {{- m['content'] | trim + '<|im_end|>' }}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|im_start|>assistant<s>\n\n' }}
{%- endif %}
""",
    "mistral": """\
{{ bos_token }}
{%- for m in messages %}
    {%- if (m.role == 'user') != (loop.index0 % 2 == 0) %}
        {{- raise_exception('roles must alternate') }}
    {%- endif %}
    {%- if m.role == 'user' %}
        {{- '[INST] ' + m.content + ' [/INST]' }}
    {%- else %}
        {%- generation %}{{ m.content + eos_token }}{% endgeneration %}
    {%- endif %}
{%- endfor %}
""",
    "date": """\
{%- set ns = namespace(n=0) -%}
<|im_start|>{{ strftime_now('%Y') }} {{ tools | tojson }}
{% for m in messages %}
    {% if ns.n > 99 %}{% break %}{% endif %}
    {% set ns.n = ns.n + 1 %}
{{ m.role }}: {{ m.content }}<|im_end|>
{% endfor %}
{% if add_generation_prompt %}assistant: {% endif %}
""",
    "llama2": """\
{%- set system, turns = '', messages -%}
{%- if messages[0].role == 'system' -%}
    {%- set system = '<<SYS>>\n' + messages[0].content + '\n<</SYS>>\n\n' -%}
    {%- set turns = messages[1:] -%}
{%- endif -%}
{%- for m in turns -%}
    {%- if m.role == 'user' -%}
        {{ bos_token + '[INST] ' + (system if loop.first else '') + m.content + ' [/INST]' }}
    {%- else -%}
        {{ ' ' + m.content + ' ' + eos_token }}
    {%- endif -%}
{%- endfor -%}
""",
}
FLAGS = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False}
EOS = {"__type": "AddedToken", "content": "</s>", "special": True} | FLAGS
CONFIG = {"bos_token": "<s>", "eos_token": EOS}


def by_hand(**model):
    """A tokenizer.json of all bytes and our special tokens, for tests without `tokenizers`."""
    vocab = {c: b for c, b in BYTE_OF.items()}
    added = [{"id": 256 + i, "content": c, "special": True} | FLAGS for i, c in enumerate(SPECIALS)]
    byte_level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True}
    model = {"type": "BPE", "vocab": vocab, "merges": []} | model
    return {"version": "1.0", "added_tokens": added, "normalizer": None, "model": model,
            "pre_tokenizer": byte_level, "decoder": byte_level}


@pytest.fixture
def write_folder(tmp_path):
    """write_folder(tokenizer.json, template, config) -> folder."""

    def write(spec, template=CHATML, config=CONFIG, name="model"):
        folder = tmp_path / name
        folder.mkdir(exist_ok=True)
        (folder / "tokenizer.json").write_text(json.dumps(spec))
        (folder / "tokenizer_config.json").write_text(json.dumps(config))
        if template is not None:
            (folder / "chat_template.jinja").write_text(template)
        return folder

    return write


def reference(folder):
    tokenizers = pytest.importorskip("tokenizers")
    tokenizer = tokenizers.Tokenizer.from_file(str(folder / "tokenizer.json"))
    tokenizer.encode_special_tokens = True
    return tokenizer


def same_ids(folder, kind=hf_tokenizer.ByteLevel):
    """Compare encode and decode with the library's on all texts; the tokenizer."""
    ours, theirs = HfTokenizer.load(folder), reference(folder)
    normal = theirs.normalizer and theirs.normalizer.normalize_str
    assert isinstance(ours.model, kind)
    assert ours.vocab_size == max(theirs.get_vocab(with_added_tokens=True).values()) + 1
    for text in texts():
        if normal is not None and normal(text) != unicodedata.normalize("NFC", text):
            assert any(unicodedata.combining(c) for c in text)  # a mark unknown to the library
            continue
        ids = theirs.encode(text, add_special_tokens=False).ids
        assert ours.encode(text) == ids, ascii(text)
        shown = theirs.decode(ids, skip_special_tokens=False)
        latin = ours.added.get("\u212b", {}).get("id") in ids  # the library garbles its letter
        assert ours.decode(ids) == shown or latin, ascii(text)
    return ours


# ---------------------------------------------------------------- ids


@pytest.mark.parametrize("all_bytes", [True, False])
@pytest.mark.parametrize("kind", KINDS)
def test_ids_are_those_of_tokenizers(kind, all_bytes, write_folder):
    same_ids(write_folder(train(kind, all_bytes)))


def test_what_a_pattern_leaves_out_is_a_piece(write_folder):
    same_ids(write_folder(train("letters")))


@pytest.mark.parametrize("flags", [{"normalized": False}, {"normalized": True}])
@pytest.mark.parametrize("kind", ["gpt2", "qwen2"])
def test_ordinary_added_tokens_come_from_text(kind, flags, write_folder):
    spec = train(kind, all_bytes=flags["normalized"])
    contents = ("<x>", "the th", "  ", "|im", "d|", "\u212b", "日", "1", "<x><x>")
    spec = with_added(spec, *contents, **flags)
    ours = same_ids(write_folder(spec, name=f"{kind}{flags['normalized']}"))
    x = ours.added["<x>"]["id"]
    assert x in ours.encode("a <x> b") and "<x>" in ours.decode(ours.encode("a <x> b"))
    assert ours.encode("<x>") == [x]


@pytest.mark.parametrize("flags", [{"lstrip": True}, {"rstrip": True}, {"single_word": True}])
def test_added_tokens_with_odd_flags_go_through_the_library(flags, write_folder):
    same_ids(write_folder(with_added(train("gpt2"), "<x>", "the", **flags)), Library)


def renumbered(spec, generator):
    """The same tokenizer with its ids shuffled, so that merges and ids are in different orders."""
    vocab = spec["model"]["vocab"]
    ids = generator.sample(range(len(vocab)), len(vocab))
    new = dict(zip(vocab, ids, strict=True))
    added = [t | {"id": new.get(t["content"], t["id"])} for t in spec["added_tokens"]]
    return spec | {"added_tokens": added, "model": spec["model"] | {"vocab": new}}


@pytest.mark.parametrize("kind", ["gpt2", "smollm2", "llama3"])
def test_priority_is_the_order_of_merges_not_of_ids(kind, write_folder):
    same_ids(write_folder(renumbered(train(kind, all_bytes=False), random.Random(1))))


@pytest.mark.parametrize("as_text", [True, False])
@pytest.mark.parametrize("ignore_merges", [True, False])
def test_entries_that_no_merge_makes(ignore_merges, as_text, write_folder):
    """Only `ignore_merges` finds them, and only as a whole piece.

    "hell" has the merges he, ll and he+ll; "the" is left at t, he: so tiktoken may not know it.
    """
    vocab = {c: b for c, b in BYTE_OF.items()}
    merges = [("h", "e"), ("l", "l"), ("he", "ll"), ("e", "l"), ("o", "o"), ("oo", "o"),
              ("o", "oo")]
    for token in ("abcd", "wxyz", "\u0120abcd", *map("".join, merges)):
        vocab.setdefault(token, len(vocab))
    merges = [" ".join(m) for m in merges] if as_text else merges
    model = {"vocab": vocab, "merges": merges, "ignore_merges": ignore_merges}
    spec = by_hand(**model)
    for i, token in enumerate(spec["added_tokens"]):
        token["id"] = len(vocab) + i
    ours = HfTokenizer.load(write_folder(spec))
    assert (ours.encode("abcd") == [vocab["abcd"]]) == ignore_merges
    assert ours.encode("abcde") == [vocab[c] for c in "abcde"]
    assert ours.encode("hello") == [vocab["hell"], vocab["o"]]
    theirs = reference(write_folder(spec))
    for text in ("abcd", " abcd", "abcde", "helloo hell helll ooo oooo ooooo", "xwxyz wxyz"):
        assert ours.encode(text) == theirs.encode(text).ids
    same_ids(write_folder(spec))


def test_random_merges(write_folder):
    """Merge lists that no training gives: several ways to a token, tokens out of reach."""
    tokenizers = pytest.importorskip("tokenizers")
    generator, kinds = random.Random(0), set()
    for trial in range(80):
        vocab, merges = {c: b for c, b in BYTE_OF.items()}, {}
        pool = list("abc")
        for _ in range(generator.randint(3, 25)):
            a, b = generator.choices(pool, k=2)
            if len(a + b) < 7:
                vocab.setdefault(a + b, len(vocab))
                pool.append(a + b)
                merges[a, b] = None
        for _ in range(generator.randint(0, 2)):
            vocab.setdefault("".join(generator.choices("abc", k=4)), len(vocab))
        model = {"vocab": vocab, "merges": generator.sample([*merges], len(merges)),
                 "ignore_merges": trial % 2 == 0, "type": "BPE"}
        spec = by_hand(**model) | {"added_tokens": []}
        spec["added_tokens"] = [by_hand()["added_tokens"][0] | {"id": len(vocab)}]
        ours = HfTokenizer.load(write_folder(spec, config={"eos_token": SPECIALS[0]}))
        theirs = tokenizers.Tokenizer.from_str(json.dumps(spec))
        kinds.add(type(ours.model))
        for _ in range(100):
            text = "".join(generator.choices("abc  d", k=generator.randint(1, 14)))
            assert ours.encode(text) == theirs.encode(text).ids, (model, text)
    assert kinds == {hf_tokenizer.ByteLevel, Library}


def test_added_tokens_that_the_library_numbers_otherwise(write_folder):
    pytest.importorskip("tokenizers")
    spec = by_hand()
    spec["added_tokens"][-1]["id"] += 7
    ours = HfTokenizer.load(write_folder(spec))
    assert isinstance(ours.model, Library) and ours.vocab_size == 261


# ---------------------------------------------------------------- conversations

CONTENTS = (
    "Hi", "What's 12 + 30?", "def f():\n    return 1", "naïve 你好 👩‍👩‍👧‍👦", "a <b> c", "x\n\n\ny",
    "1", "'s", "!", "\u0301e\u0301", ">\u0338 =", "the\x04the", "<think>x</think>", "[INST]",
    "{{ bos_token }}", "\U000f0001 \ue000",
)


def conversations():
    """Records and the messages that they mean, the system turn apart."""
    generator = random.Random(2)
    for n in range(40):
        roles = ["user", "assistant"] * (n % 4) + ["user"]
        turns = [{"role": role, "content": generator.choice(CONTENTS)} for role in roles]
        system, preference = generator.choices([None, *CONTENTS], k=2)
        record = {"prompt": turns if n % 3 else turns[0]["content"]}
        record |= {"system": system} if system else {}
        record |= {"preference": preference} if preference else {}
        yield record, "\n\n".join(filter(None, (system, preference))), turns if n % 3 else turns[:1]


def transformers_tokenizer(folder):
    transformers = pytest.importorskip("transformers")
    return transformers.PreTrainedTokenizerFast.from_pretrained(folder)


def same_conversations(folder, takes_system=True):
    """Compare `render` with transformers on all conversations."""
    ours, theirs = HfTokenizer.load(folder), transformers_tokenizer(folder)
    assert ours.takes_system == takes_system
    for record, meta, turns in conversations():
        messages = [dict(turn) for turn in turns]
        if meta and takes_system:
            messages.insert(0, {"role": "system", "content": meta})
        elif meta:
            messages[0]["content"] = meta + "\n\n" + messages[0]["content"]
        expected = theirs.apply_chat_template(
            messages, add_generation_prompt=True, tokenize=True, return_dict=False
        )
        assert ours.render(record) == expected, record
        assert ours.decode(expected) == theirs.decode(expected, clean_up_tokenization_spaces=False)
    return ours


@pytest.mark.parametrize("kind", ["gpt2", "smollm2", "qwen2"])
@pytest.mark.parametrize("template", TEMPLATES)
def test_ids_are_those_of_apply_chat_template(kind, template, write_folder, capsys):
    spec = with_added(train(kind, all_bytes=False), "<think>", "</think>", "system")
    folder = write_folder(spec, TEMPLATES[template])
    ours = same_conversations(folder, template != "mistral")
    end = "</s>" if template in ("mistral", "llama2") else "<|im_end|>"
    assert ours.decode([ours.end]) == end
    out = capsys.readouterr().out
    assert out.count("takes no system turn") == (template == "mistral")
    assert "would change contents" not in out


@pytest.mark.parametrize("strips", [("lstrip",), ("rstrip",), ("lstrip", "rstrip")])
def test_white_space_around_special_tokens(strips, write_folder):
    spec = train("gpt2")
    for token in spec["added_tokens"]:
        token |= dict.fromkeys(strips, True)
    template = CHATML.replace("<|im_end|>", " \n <|im_end|> \u3000")
    same_conversations(write_folder(spec, template.replace("start|>", "start|>\n ")))


def sentence_piece(first_only):
    """A tokenizer of the Llama 2 kind: a prefix space, no byte-level spelling, byte fallback."""
    tokenizers = pytest.importorskip("tokenizers")
    from tokenizers import decoders, normalizers, pre_tokenizers

    fallback = [f"<0x{b:02X}>" for b in range(256)]
    model = tokenizers.models.BPE(unk_token="<unk>", byte_fallback=True, fuse_unk=True)
    tokenizer = tokenizers.Tokenizer(model)
    if first_only:
        tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first", split=False)
    else:
        tokenizer.normalizer = normalizers.Sequence(
            [normalizers.Prepend("\u2581"), normalizers.Replace(" ", "\u2581")]
        )
    tokenizer.decoder = decoders.Sequence([
        decoders.Replace("\u2581", " "), decoders.ByteFallback(), decoders.Fuse(),
        decoders.Strip(" ", 1, 0),
    ])
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=900, special_tokens=["<unk>", "<s>", "</s>", *fallback], show_progress=False,
        max_token_length=6,
    )
    corpus = ("def f(x): return 1", "What is this? The theatre, the thermos!", "naïve [INST] x")
    tokenizer.train_from_iterator(corpus * 3, trainer)
    spec = json.loads(tokenizer.to_str())
    spec["added_tokens"] = spec["added_tokens"][:3]
    return spec


@pytest.mark.parametrize("template", ["llama2", "mistral"])
@pytest.mark.parametrize("first_only", [True, False])
def test_sentence_piece(first_only, template, write_folder):
    config = CONFIG | {"unk_token": "<unk>"}
    folder = write_folder(sentence_piece(first_only), TEMPLATES[template], config)
    ours = same_conversations(folder, template != "mistral")
    assert isinstance(ours.model, Library) and ours.decode([ours.end]) == "</s>"
    assert ours.pieces(ours.encode("the theatre"))[0].startswith(" ")
    ids = ours.render({"prompt": "a</s><s> <unk>b", "system": "<s>"})
    assert ids.count(ours.added["<s>"]["id"]) == 1 and ours.end not in ids
    assert "</s><s> <unk>b" in ours.decode(ids)
    for ids in (ours.render({"prompt": "a <unk> b"}), ours.encode_answer("a <unk> b")):
        assert ours.added["<unk>"]["id"] not in ids


@pytest.mark.parametrize("kind", ["LlamaTokenizer", "GPT2Tokenizer", None])
def test_an_exported_tokenizer_keeps_its_ids(kind, write_folder, tmp_path):
    """transformers 5 builds those of some classes anew, as if `legacy` or digits were not there."""
    transformers = pytest.importorskip("transformers")
    spec = sentence_piece(False) if kind == "LlamaTokenizer" else train("smollm2")
    config = CONFIG | {"unk_token": "<unk>"} if kind == "LlamaTokenizer" else CONFIG
    config = config | ({"tokenizer_class": kind, "legacy": False} if kind else {})
    template = TEMPLATES["llama2" if kind == "LlamaTokenizer" else "chatml"]
    ours = HfTokenizer.load(write_folder(spec, template, config))
    model = new_model(ModelConfig(ours.vocab_size, 64, 1, 2, 1, 16, 32))
    hf_model.export(tmp_path / "out", model, ours)
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path / "out")
    for text in ("What is 12 + 30?", "Items:\n\n1. the theatre", "def f(x): return 1"):
        asked = [{"role": "user", "content": text}]
        ids = theirs.apply_chat_template(asked, add_generation_prompt=True, return_dict=False)
        assert ours.render({"prompt": text}) == ids
        assert theirs(text).keys() == {"input_ids", "attention_mask"}  # what `generate` takes
    assert HfTokenizer.load(tmp_path / "out").describe() == ours.describe()


ZEPHYR = """{% for message in messages %}
{{ '<|' + message['role'] + '|>\n' + message['content'] + eos_token }}
{% if loop.last and add_generation_prompt %}
{{ '<|assistant|>' }}
{% endif %}
{% endfor %}"""


BARE = """{% for m in messages %}<s>{{ m['content'] }}</s>{% endfor %}\
{% if add_generation_prompt %}<s>{% endif %}"""


SPACED = BARE.replace("{{", "{{ ' ' * (m.role == 'assistant') }}{{")  # as Llama 2's does


@pytest.mark.parametrize("template", [ZEPHYR, BARE, SPACED])
@pytest.mark.parametrize("first_only", [True, False])
def test_sentence_piece_answers_are_those_of_the_whole_conversation(
    first_only, template, write_folder
):
    """What follows the prompt in transformers' ids, be it behind a line, a token or a space."""
    folder = write_folder(sentence_piece(first_only), template, CONFIG | {"unk_token": "<unk>"})
    ours, theirs = HfTokenizer.load(folder), transformers_tokenizer(folder)
    for text in ("the theatre", "What is this?", "x\ny", " the", "é!", "1"):
        turns = [{"role": "user", "content": "What?"}, {"role": "assistant", "content": text}]
        prompt = ours.render({"prompt": "What?"})
        ids = theirs.apply_chat_template(turns, tokenize=True, return_dict=False)
        answer = [*ours.encode_answer(text), ours.end]
        assert ids[: len(prompt + answer)] == prompt + answer, (text, ours.pieces(ids))
    row = {"prompt": "What?", "chosen": "the theatre", "rejected": "What is this?"}
    both = [[*ours.encode_answer(text), ours.end] for text in ("the theatre", "What is this?")]
    assert data.encode(row, ours, 64).answers == both
    assert ours.encode_answer("a</s>") == ours.encode("a</s>")  # what spells a special token


@pytest.mark.parametrize("config", [CONFIG, CONFIG | {"unk_token": "<unk>"}])
def test_characters_without_a_token_leave_the_rest_as_it_is(config, write_folder):
    """They are unknown, which is a special token to some folders and unnamed in others."""
    spec = sentence_piece(False)
    spec["model"]["byte_fallback"] = False
    ours = HfTokenizer.load(write_folder(spec, ZEPHYR, config))
    known, more = ours.encode_answer("the x"), ours.encode_answer("the \u4e2d")
    assert more[:-1] == known[:-1] and ours.decode(more[-1:]) == "<unk>"


def test_what_a_normalizer_turns_into_a_special_token_stays_text(write_folder):
    """Full-width signs under NFKC: the library would find the token in the normalized text."""
    spec = sentence_piece(False)
    given = spec["normalizer"]["normalizers"]
    spec["normalizer"]["normalizers"] = [{"type": "NFKC"}, *given]
    spec["added_tokens"] = [token | {"normalized": True} for token in spec["added_tokens"]]
    ours = HfTokenizer.load(write_folder(spec, BARE, CONFIG | {"unk_token": "<unk>"}))
    text = "hi \uff1c/s\uff1e there"
    assert ours.end in ours.model.encode(text, with_special=True)
    ids = ours.render({"prompt": text})
    assert ids.count(ours.end) == 1 and ids.count(ours.added["<s>"]["id"]) == 2  # the template's
    assert ours.end not in ours.encode_answer(text)


def test_a_template_with_a_date_shows_one_day(write_folder, capsys, monkeypatch):
    folder = write_folder(by_hand(), "{{ strftime_now('%d') }}" + CHATML, CONFIG)
    days = iter(range(1, 9))
    monkeypatch.setattr(hf_tokenizer, "datetime", SimpleNamespace(now=lambda: datetime(
        2026, 1, next(days))))
    ours = HfTokenizer.load(folder)
    one = ours.render({"prompt": "a"})
    assert ours.render({"prompt": "a"}) == one and "would change" not in capsys.readouterr().out


def test_real_folder():
    folder = os.environ.get("SMOLLM2")
    if not folder:
        pytest.skip("set SMOLLM2 to the folder of SmolLM2-135M-Instruct")
    same_ids(Path(folder))
    assert same_conversations(Path(folder)).end == 2


# ---------------------------------------------------------------- without `tokenizers`


@pytest.fixture
def chatml(write_folder):
    return HfTokenizer.load(write_folder(by_hand()))


def test_a_record_by_hand(chatml):
    """Bytes are their own ids here, special tokens follow from 256."""
    start, end = 257, 258
    record = {"system": "S", "preference": "P", "prompt": [
        {"role": "user", "content": "q"}, {"role": "assistant", "content": "a"},
        {"role": "user", "content": "r"},
    ], "examples": [{"prompt": "x", "chosen": "good", "rejected": "bad"}]}
    meta = "S\n\nP\n\nQuery: x\nPreferred answer: good\nAnswer passed over: bad"
    expected = []
    for role, content in (("system", meta), ("user", "q"), ("assistant", "a"), ("user", "r")):
        expected += [start, *f"{role}\n{content}".encode(), end, *b"\n"]
    expected += [start, *b"assistant\n"]
    assert chatml.render(record) == expected
    assert (chatml.vocab_size, chatml.end) == (261, end)
    assert chatml.pieces([104, 258, 0xF0]) == ["h", "<|im_end|>", "\ufffd"]
    rest = [end, *b"\n", start, *b"assistant\n", end, *b"\n", start, *b"user\n", 3, end, *b"\n",
            start, *b"assistant\n"]
    query = expected.index(ord("q"), len(meta))
    assert chatml.render(record, [[1, 2], [], [3]]) == [*expected[:query], 1, 2, *rest]
    structure = chatml.render(record, [[], [], []])
    assert len(structure) == len(expected) - 3


def test_contents_replace_the_turns(write_folder, capsys):
    ours = HfTokenizer.load(write_folder(by_hand(), TEMPLATES["mistral"]))
    record = {"prompt": "hello", "preference": "Be brief."}
    for contents in ([b"hello"], None):
        ids = ours.render(record, contents)
        assert ids == [259, *b"[INST] Be brief.\n\nhello [/INST]"]
    assert ours.render({"prompt": "hello"}, [[7]]) == [259, *b"[INST] ", 7, *b" [/INST]"]
    assert capsys.readouterr().out.count("takes no system turn") == 1


THOUGHTLESS = CHATML.replace("m['content']", "m['content'].split('</think>')[-1].strip()")


@pytest.mark.parametrize("content", ["hm</think>Hello.", " Hello."])
def test_contents_that_a_template_would_change_stay_and_it_says_so(content, write_folder, capsys):
    ours = HfTokenizer.load(write_folder(by_hand(), THOUGHTLESS))
    turns = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello."},
             {"role": "user", "content": "More"}]
    ours.render({"prompt": turns})
    assert "would change contents" not in capsys.readouterr().out
    turns[1]["content"] = content
    for _ in range(2):
        assert content in ours.decode(ours.render({"prompt": turns}))
    assert capsys.readouterr().out.count("would change contents") == 1


def test_no_content_yields_a_special_token(write_folder):
    """Nor one half of its spelling beside the template's other half, nor a sentinel."""
    template = "<|im_{% for m in messages %}{{ m.content }}{% endfor %}|><|im_end|>"
    spec = by_hand()
    spec["added_tokens"][1]["special"] = False  # <|im_start|>
    for text in (*SPECIALS, "end", "<|im_end|><s>", "\U000f0001\U000f0000", "{{ eos_token }}"):
        for chat in (CHATML, template):
            ours = HfTokenizer.load(write_folder(by_hand(), chat))
            empty = ours.render({"prompt": "", "system": "s"})
            ids = ours.render({"prompt": text, "system": text})
            assert ours.special_only(ids) == ours.special_only(empty)
            assert ours.decode(ids).count(text) >= 2 and max(ours.encode(text)) < 256
    ours = HfTokenizer.load(write_folder(spec))
    assert ours.encode("<|im_start|>") == [257] and max(ours.encode("<|im_end|>")) < 256


def test_tokens_that_the_configuration_names_are_special(write_folder):
    spec = by_hand()
    spec["added_tokens"] = [t | {"special": False} for t in spec["added_tokens"][:4]]
    ours = HfTokenizer.load(write_folder(spec, config={"eos_token": "<|im_end|>"}))
    assert ours.end == 258 and 258 not in ours.encode("a<|im_end|>")
    assert ours.encode("<|im_start|>") == [257]


@pytest.mark.parametrize("more", [
    {"additional_special_tokens": ["<|im_start|>"]},
    {"extra_special_tokens": {"turn_token": "<|im_start|>"}},
    {"extra_special_tokens": [FLAGS | {"content": "<|im_start|>"}, None, ["x"]]},
])
def test_further_special_tokens_of_the_configuration(write_folder, more):
    spec = by_hand()
    spec["added_tokens"][1]["special"] = False
    ours = HfTokenizer.load(write_folder(spec, config=CONFIG | more))
    assert max(ours.encode("<|im_start|>")) < 256
    odd = {key: 5 for key in more}
    assert HfTokenizer.load(write_folder(spec, config=CONFIG | odd)).encode("<|im_start|>") == [257]


def test_added_tokens_of_the_configuration(write_folder):
    spec = by_hand()
    *spec["added_tokens"], last = spec["added_tokens"]
    config = CONFIG | {"added_tokens_decoder": {"260": last, "97": FLAGS | {"content": "a"}}}
    ours = HfTokenizer.load(write_folder(spec, None, config))
    assert ours.end == 260 and ours.encode("a</s>") == [*b"a</s>"] and ours.vocab_size == 261


def test_normalized_added_tokens_are_sought_in_normalized_text(write_folder):
    spec = by_hand() | {"normalizer": {"type": "NFC"}}
    spec["added_tokens"].append(FLAGS | {"id": 261, "content": "\u212b", "normalized": True})
    ours = HfTokenizer.load(write_folder(spec))
    assert ours.encode("A\u030a") == ours.encode("\u00c5") == [261]


def test_steps_of_a_normalizer_that_are_none(write_folder):
    nothing = {"normalizer": {"type": "Sequence", "normalizers": []}}
    ours = HfTokenizer.load(write_folder(by_hand() | nothing))
    assert ours.encode("A\u030a") == [*"A\u030a".encode()]


@pytest.mark.parametrize("name", ["config.json", "generation_config.json"])
def test_folder_whose_tokens_are_known_by_number_alone(write_folder, tmp_path, name):
    """Neither tokenizer_config.json nor a template; what is saved is read as the same."""
    spec = by_hand()
    spec["added_tokens"] = [token | {"special": False} for token in spec["added_tokens"]]
    folder = write_folder(spec, None, {})
    (folder / "tokenizer_config.json").unlink()
    for ends in (None, -1, [99999], "260", [[260]]):
        (folder / name).write_text(json.dumps({"eos_token_id": ends}))
        with pytest.raises(UserError, match="field 'eos_token': missing, no config names an eos_t"):
            HfTokenizer.load(folder)
    (folder / name).write_text(json.dumps({"bos_token_id": 259, "eos_token_id": [260, 256, -1]}))
    ours = HfTokenizer.load(folder)
    ours.save(tmp_path)
    turns = [{"role": role, "content": role[0]} for role in ("user", "assistant", "user")]
    text = "<s>User:\nu\n\nAssistant:\na</s>\n\nUser:\nu\n\nAssistant:\n"
    for tokenizer in (ours, HfTokenizer.load(tmp_path)):
        assert (tokenizer.end, tokenizer.ends) == (260, [260, 256])
        assert tokenizer.decode(tokenizer.render({"prompt": turns})) == text
        assert tokenizer.describe() == ours.describe()
        assert tokenizer.special == {256, 259, 260} and max(tokenizer.encode("</s>")) < 256


@pytest.mark.parametrize("template", [None, CHATML])
def test_a_bos_token_that_is_null_is_none_but_special(write_folder, tmp_path, template):
    spec = by_hand()
    spec["added_tokens"] = [token | {"special": False} for token in spec["added_tokens"]]
    folder = write_folder(spec, template, {"bos_token": None, "eos_token": None})
    ids = {"bos_token_id": 259, "eos_token_id": 258}
    (folder / "config.json").write_text(json.dumps(ids))
    turns = [{"role": role, "content": role[0]} for role in ("user", "assistant", "user")]
    HfTokenizer.load(folder).save(tmp_path)
    for ours in map(HfTokenizer.load, (folder, tmp_path)):
        found = ours.render({"prompt": turns})
        assert 259 not in found and found.count(258) == (1 if template is None else 3)
        assert ours.special == {258, 259} and max(ours.encode("<s>")) < 256


def test_the_template_goes_before_the_numbers(write_folder):
    """A base model's folder: the template ends a turn, the model may stop elsewhere too."""
    template = CHATML + "{{ bos_token }}{{ eos_token }}"
    folder = write_folder(by_hand(), template, {})
    (folder / "config.json").write_text(json.dumps({"bos_token_id": 259, "eos_token_id": 256}))
    ours = HfTokenizer.load(folder)
    assert (ours.end, ours.ends) == (258, [258, 256])
    row = {"prompt": "a", "chosen": "b", "rejected": "c"}
    assert data.encode(row, ours, 64).answers == [[*ours.encode(text), 258] for text in "bc"]
    assert ours.decode(ours.render({"prompt": "a"})).endswith("<|im_start|>assistant\n")
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": [258, 260]}))
    assert HfTokenizer.load(folder).ends == [258, 260]


def test_folder_without_template(write_folder, capsys, tmp_path):
    ours = HfTokenizer.load(write_folder(by_hand(), None))
    assert capsys.readouterr().out.count("no chat template") == 1
    ours.save(tmp_path)  # with the template that stands in
    again = HfTokenizer.load(tmp_path)
    assert again.describe() == ours.describe() and not capsys.readouterr().out
    turns = [{"role": role, "content": content}
             for role, content in (("user", "a"), ("assistant", "b"), ("user", "c"))]
    text = "<s>S\n\nUser:\na\n\nAssistant:\nb</s>\n\nUser:\nc\n\nAssistant:\n"
    assert ours.decode(ours.render({"system": "S", "prompt": turns})) == text
    assert ours.end == 260
    ours = HfTokenizer.load(write_folder(by_hand(), None, {"eos_token": "</s>"}))
    assert ours.decode(ours.render({"prompt": "a"})) == "User:\na\n\nAssistant:\n"


def test_template_in_the_configuration(write_folder):
    named = [{"name": "rag", "template": "x"}, {"name": "default", "template": CHATML}]
    for template in (CHATML, named):
        folder = write_folder(by_hand(), None, CONFIG | {"chat_template": template})
        assert HfTokenizer.load(folder).end == 258


def test_save_copies_the_bytes(write_folder, tmp_path):
    folder = write_folder(by_hand())
    (folder / "generation_config.json").write_text('{ "eos_token_id": 258}')
    ours = HfTokenizer.load(folder)
    (tmp_path / "copy").mkdir()
    ours.save(tmp_path / "copy")
    names = {path.name for path in (tmp_path / "copy").iterdir()}
    assert names == set(ours.files) == {path.name for path in folder.iterdir()}
    for name in names:
        assert (tmp_path / "copy" / name).read_bytes() == (folder / name).read_bytes()
    (tmp_path / "copy" / "generation_config.json").unlink()  # says nothing about tokens
    copy = HfTokenizer.load(tmp_path / "copy")
    assert copy.describe() == ours.describe() == json.loads(json.dumps(ours.describe()))
    write_folder(by_hand(), CHATML + " ")
    assert HfTokenizer.load(folder).describe() != ours.describe()


# ---------------------------------------------------------------- errors


def splitting(pattern):
    split = {"type": "Split", "pattern": {"Regex": pattern}, "behavior": "Isolated",
             "invert": False}
    rest = {"type": "ByteLevel", "add_prefix_space": False, "use_regex": False}
    return {"type": "Sequence", "pretokenizers": [split, rest]}


MESSAGE = "{% for m in messages %}{{ m.content }}{% endfor %}"


@pytest.mark.parametrize("template, reason", [
    ("{% for m in messages %}", "Unexpected end of template"),
    ("{{ raise_exception('only tools') }}", "only tools"),
    ("<|im_start|>", "does not show each of the turns user, assistant once"),
    (MESSAGE * 2, "does not show each of the turns user, assistant once"),
    (MESSAGE + "{{ messages[0].content[1:] }}{{ messages | length / 0 }}", "division by zero"),
    (MESSAGE + "{{ ''.__class__.__mro__ }}", "unsafe"),
    (MESSAGE + "{{ raise_exception.__globals__['x'] }}", "unsafe"),
    (MESSAGE + "{{ messages.append(1) }}", "unsafe"),
    ("{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}", "recursion"),
    (MESSAGE + "{{ nothing.at.all }}", "undefined"),
])
def test_templates_that_cannot_be_used(template, reason, write_folder):
    folder = write_folder(by_hand(), template)
    with pytest.raises(UserError) as error:
        HfTokenizer.load(folder)
    assert str(error.value).startswith(f"{folder / 'chat_template.jinja'}: field 'chat_template': ")
    assert reason in str(error.value) and "\n" not in str(error.value)


def test_conversation_that_the_template_refuses(write_folder):
    ours = HfTokenizer.load(write_folder(by_hand(), TEMPLATES["mistral"]))
    turns = [{"role": "user", "content": "a"}, {"role": "user", "content": "b"}]
    with pytest.raises(UserError, match="chat_template.jinja: .*: roles must alternate"):
        ours.render({"prompt": turns})
    record = {"prompt": turns, "chosen": "c", "rejected": "d", "where": "f.jsonl:7"}
    with pytest.raises(UserError, match="^f.jsonl:7: [^ ]*chat_template.jinja: .*alternate"):
        evaluate.encode_both([record], ours, 512, "f")


@pytest.mark.parametrize("name, content, reason", [
    ("tokenizer.json", "{", "tokenizer.json: not valid JSON"),
    ("tokenizer.json", "[]", "tokenizer.json: not a JSON object"),
    ("tokenizer.json", "{}", "tokenizer.json: not a tokenizer: field 'model': missing"),
    ("tokenizer.json", json.dumps(by_hand(merges=["a b"])), "field 'model.merges': a b: not in"),
    ("tokenizer.json", json.dumps(by_hand(merges=[3])), "tokenizer.json: not a tokenizer"),
    ("tokenizer.json", json.dumps(by_hand(merges=[["a"]])), "tokenizer.json: not a tokenizer"),
    ("tokenizer.json", json.dumps(by_hand() | {"pre_tokenizer": splitting("(")}), "missing )"),
    ("tokenizer.json", json.dumps(by_hand() | {"added_tokens": [{}]}), "field 'content': missing"),
    ("tokenizer.json", None, "tokenizer.json: No such file"),
    ("tokenizer_config.json", "\xff", "tokenizer_config.json: not valid JSON"),
    ("tokenizer_config.json", "[]", "tokenizer_config.json: not a JSON object"),
    ("chat_template.jinja", "\xff", "chat_template.jinja: cannot read"),
])
def test_broken_files(name, content, reason, write_folder):
    folder = write_folder(by_hand())
    (folder / name).unlink()
    if content is not None:
        (folder / name).write_bytes(content.encode("latin-1"))
    with pytest.raises(UserError) as error:
        HfTokenizer.load(folder)
    assert str(folder) in str(error.value) and reason in str(error.value)
    assert "\n" not in str(error.value)


def test_template_of_another_type(write_folder):
    for template in (7, [{"name": "rag", "template": "x"}], [1]):
        folder = write_folder(by_hand(), None, CONFIG | {"chat_template": template})
        with pytest.raises(UserError, match="tokenizer_config.json: field 'chat_template'"):
            HfTokenizer.load(folder)


def test_no_token_ends_an_answer(write_folder):
    folder = write_folder(by_hand(), None, {})
    with pytest.raises(UserError, match="tokenizer_config.json: field 'eos_token': missing"):
        HfTokenizer.load(folder)
    (folder / "generation_config.json").write_text('{"eos_token_id": 256}')  # GPT-2 has it there
    ours = HfTokenizer.load(folder)
    turns = [{"role": role, "content": role} for role in ("user", "assistant", "user")]
    assert ours.end == 256 and 256 in ours.render({"prompt": turns})


def test_folder_with_a_sentencepiece_model_only(tmp_path):
    (tmp_path / "tokenizer.model").write_bytes(b"x")
    with pytest.raises(UserError, match="has a tokenizer.model but no tokenizer.json"):
        HfTokenizer.load(tmp_path)


@pytest.mark.parametrize("change, reason", [
    ({"model": {"type": "WordPiece", "vocab": {"a": 0}}}, "type WordPiece"),
    ({"model": {"type": "Unigram", "vocab": [["a", 0.0]]}}, "type Unigram"),
    (by_hand(byte_fallback=True), "'model.byte_fallback'"),
    (by_hand(dropout=0.1), "'model.dropout'"),
    (by_hand(unk_token="a"), "'model.unk_token'"),
    ({"normalizer": {"type": "NFKC"}}, "'normalizer'"),
    ({"pre_tokenizer": {"type": "ByteLevel", "add_prefix_space": True}}, "'pre_tokenizer'"),
    ({"pre_tokenizer": None}, "'pre_tokenizer'"),
    ({"added_tokens": [by_hand()["added_tokens"][0] | {"single_word": True}]}, "<|end|>"),
])
def test_other_kinds_need_the_library(change, reason, write_folder, monkeypatch):
    monkeypatch.setitem(sys.modules, "tokenizers", None)
    folder = write_folder(by_hand() | change)
    with pytest.raises(UserError) as error:
        HfTokenizer.load(folder)
    assert str(error.value).startswith(f"{folder / 'tokenizer.json'}: ")
    assert reason in str(error.value) and str(error.value).endswith("pip install tokenizers")


@pytest.mark.parametrize("pattern", [
    r"\w+", r"\p{Alpha}", "(?i:ss)", "^a", ".", "a{1,2}+", "a$", r"\h", "[a&&b]", "[a--b]", "a*",
    "[[:alpha:]]",
])
def test_patterns_that_mean_something_else_elsewhere(pattern):
    assert hf_tokenizer.split_pattern(splitting(pattern)) is None
    assert hf_tokenizer.split_pattern(splitting(QWEN2))
