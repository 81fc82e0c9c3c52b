"""Records, readers, template, truncation, batches: nothing is lost, nothing is invented."""

import gzip
import json
import random
from types import SimpleNamespace

import pytest
import torch

import data
import sample
from common import DataOrder, UserError
from data import SPECIAL_TOKENS, Example, Tokenizer, encode, encode_all, micro_batches
from evaluate import find_flips

FULL = {
    "system": "You are a nurse.",
    "preference": "Be brief.",
    "examples": [{"prompt": "Tea?", "chosen": "Yes.", "rejected": "No, never."}],
    "prompt": "How do I store the guitar?",
    "chosen": "Hey! Put it in a dry place.",
    "rejected": "Good day. Perhaps a dry place.",
}

STRANGE_TEXTS = (
    "", " ", "\n", "\r\n\r\n", "\t  \t", "   leading", "trailing   ", "a  b   c", "x\u00a0y\u2003z",
    "\u200b\u200d\ufeff", "\x00\x01\x1f\x7f\x85", "naïve café", "e\u0301a\u0308o\u0302\u0323",
    "你好,世界。こんにちは 안녕", "שלום עולם \u200fمرحبا بالعالم", "हिन्दी ไทย",
    "👩‍👩‍👧‍👦🇩🇪👍🏽 ok", "𝔘𝔫𝔦𝔠𝔬𝔡𝔢 \U0010ffff", "__init__ _a_ 1_000 ‿ ٣٤",
    "!!?...---==>>", "\u2028\u2029", "<|end|>", "<|endoftext|>", "l'été d'or it's",
    "\ud7ff\ue000\ufffd\uffff",
)


def decode_with_marks(tokenizer, tokens):
    """Text in which only tokens that are special show as [name]."""
    names = {token: name.strip("<|>") for name, token in tokenizer.special.items()}
    return "".join(f"[{names[t]}]" if t in names else tokenizer.decode([t]) for t in tokens)


def count_special(tokenizer, tokens):
    return sum(token in tokenizer.special.values() for token in tokens)


# ---------------------------------------------------------------- template


def test_whole_record_is_rendered_in_the_order_of_the_template(byte_tokenizer):
    example = encode(FULL, byte_tokenizer, 512)
    assert decode_with_marks(byte_tokenizer, example.trunk) == (
        "[system]You are a nurse.[preference]Be brief."
        "[example]Tea?[chosen]Yes.[rejected]No, never."
        "[user]How do I store the guitar?[assistant]"
    )
    assert (example.cut_prompt, example.cut_answers) == (False, 0)


def test_several_turns_end_the_assistants_ones(byte_tokenizer):
    turns = [("user", "Hi"), ("assistant", "Hello"), ("user", "Tea?")]
    record = {"prompt": [{"role": role, "content": text} for role, text in turns], "response": "No"}
    example = encode(record, byte_tokenizer, 64)
    trunk = decode_with_marks(byte_tokenizer, example.trunk)
    assert trunk == "[user]Hi[assistant]Hello[end][user]Tea?[assistant]"


@pytest.mark.parametrize("tiers", [{}, {"system": ""}, {"preference": "", "examples": []}])
def test_an_absent_tier_leaves_no_trace(world_tokenizer, tiers):
    record = {"prompt": "Tea?", "chosen": "Yes.", "rejected": "No."} | tiers
    trunk = encode(record, world_tokenizer, 64).trunk
    assert decode_with_marks(world_tokenizer, trunk) == "[user]Tea?[assistant]"
    only = encode(record | {"preference": "P"}, world_tokenizer, 64).trunk
    assert decode_with_marks(world_tokenizer, only) == "[preference]P[user]Tea?[assistant]"


@pytest.mark.parametrize("text", ["Yes.", " s", "\n", "a<|end|>", "<|end|><|end|>", "é👍"])
def test_learned_tokens_are_the_answer_and_its_end_token_once(world_tokenizer, text):
    record = {"prompt": "Tea?", "chosen": text, "rejected": "x"}
    answer = encode(record, world_tokenizer, 64).answers[0]
    assert world_tokenizer.decode(answer) == text + "<|end|>"
    assert answer.count(world_tokenizer.end) == 1 and answer[-1] == world_tokenizer.end


def test_prompt_and_answer_are_tokenised_apart(world_tokenizer):
    """Neither the trunk nor an answer's tokens depend on what stands beside them."""
    answers = ("s", " s", "\n", "guitar?", "The guitar.", "<|assistant|>")
    rows = [FULL | {"chosen": text} for text in answers]
    trunks = [encode(row, world_tokenizer, 512).trunk for row in rows]
    assert all(trunk == trunks[0] for trunk in trunks)
    for text in answers:
        seen = {tuple(encode({"prompt": prompt, "response": text}, world_tokenizer, 64).answers[0])
                for prompt in ("x", "x ", "x\n", "the guitar")}
        assert len(seen) == 1


def test_the_two_answers_are_rendered_alike(world_tokenizer):
    """White space too, at which tokenizers and templates like to differ."""
    row = FULL | {"chosen": "\n Hey! ", "rejected": " Good day.\n"}
    swapped = row | {"chosen": row["rejected"], "rejected": row["chosen"]}
    one, other = (encode(row, world_tokenizer, 512) for row in (row, swapped))
    assert one.trunk == other.trunk and one.answers == other.answers[::-1]


@pytest.mark.parametrize("mark", SPECIAL_TOKENS)
def test_text_from_data_cannot_produce_a_special_token(world_tokenizer, mark):
    def spoil(value):
        if isinstance(value, str):
            return f"{mark}{value} {mark}\n{mark}"
        return [{k: spoil(v) for k, v in choice.items()} for choice in value]

    spoilt = {field: spoil(value) for field, value in FULL.items()}
    clean, example = (encode(row, world_tokenizer, 2048) for row in (FULL, spoilt))
    assert count_special(world_tokenizer, example.trunk) == 7
    assert count_special(world_tokenizer, clean.trunk) == 7
    assert [count_special(world_tokenizer, answer) for answer in example.answers] == [1, 1]
    assert world_tokenizer.decode(example.answers[0][:-1]) == spoilt["chosen"]


# ---------------------------------------------------------------- tokenizer


@pytest.fixture(scope="module")
def loaded_tokenizer(world_tokenizer, tmp_path_factory):
    """The world's tokenizer, saved in a checkpoint's folder and loaded again."""
    folder = tmp_path_factory.mktemp("saved")
    world_tokenizer.save(folder)
    config = json.dumps({"tokenizer": world_tokenizer.describe()})
    (folder / "config.json").write_text(config)
    return Tokenizer.load(folder)


def test_a_saved_tokenizer_is_the_same(world_tokenizer, loaded_tokenizer):
    assert loaded_tokenizer.ranks == world_tokenizer.ranks
    assert loaded_tokenizer.special == world_tokenizer.special
    for text in (*STRANGE_TEXTS, *FULL["chosen"].split()):
        assert loaded_tokenizer.encode(text) == world_tokenizer.encode(text)


@pytest.mark.parametrize("text", STRANGE_TEXTS)
def test_strange_text_round_trips(world_tokenizer, loaded_tokenizer, byte_tokenizer, text):
    for tokenizer in (world_tokenizer, loaded_tokenizer, byte_tokenizer):
        assert tokenizer.decode(tokenizer.encode(text)) == text


def test_every_code_point_and_random_text_round_trip(world_tokenizer, byte_tokenizer):
    points = [chr(i) for i in range(0x110000) if not 0xD800 <= i < 0xE000]
    texts = ["".join(points[i : i + 5000]) for i in range(0, len(points), 5000)]
    rng = random.Random(0)
    common_ones = points[:0x250] + list(" \n\t_'") * 20  # where the pattern's cases meet
    for _ in range(500):
        texts.append("".join(rng.choices(rng.choice((common_ones, points)), k=rng.randint(1, 30))))
    for text in texts:
        for tokenizer in (world_tokenizer, byte_tokenizer):
            assert tokenizer.decode(tokenizer.encode(text)) == text


def test_world_answers_are_few_tokens(world_tokenizer):
    """The vocabulary is made for the world: a word is about one token, not its letters."""
    text = "Good day. The following will certainly serve you well."
    assert len(world_tokenizer.encode(text)) <= len(text.split()) + 3


# ---------------------------------------------------------------- truncation


def test_query_is_cut_in_its_middle_and_answer_at_its_end(byte_tokenizer):
    """Worked by hand, a token for each byte, in a context of 20.

    [user] and [assistant] leave 18: 9 for the answer, 9 for the query. The query keeps 5 + 4 of
    its bytes, the long answer its first 9 without an end token, the short one stays whole.
    """
    record = {"prompt": "abcdefghijklmnop", "chosen": "0123456789X", "rejected": "no"}
    example = encode(record, byte_tokenizer, 20)
    assert decode_with_marks(byte_tokenizer, example.trunk) == "[user]abcdemnop[assistant]"
    answers = [decode_with_marks(byte_tokenizer, answer) for answer in example.answers]
    assert answers == ["012345678", "no[end]"]
    assert (example.cut_prompt, example.cut_answers) == (True, 1)


def test_what_fits_exactly_is_not_cut(byte_tokenizer):
    """2 marks + 8 bytes of query + 10 of answer with its end are 20."""
    record = {"prompt": "abcdefgh", "chosen": "012345678", "rejected": "no"}
    example = encode(record, byte_tokenizer, 20)
    assert (example.cut_prompt, example.cut_answers) == (False, 0)
    example = encode(record, byte_tokenizer, 19)
    assert example.cut_prompt + example.cut_answers == 1


def random_record(rng):
    def text(longest):
        return "".join(rng.choices("abcdefgh ", k=rng.randint(1, longest)))

    roles = rng.choice((("user",), ("user", "assistant", "user")))
    record = {"prompt": [{"role": role, "content": text(80)} for role in roles]}
    record |= {"chosen": text(80), "rejected": text(80)}
    for tier in ("system", "preference"):
        if rng.random() < 0.5:
            record[tier] = text(40)
    if rng.random() < 0.3:
        record["examples"] = [{f: text(10) for f in ("prompt", "chosen", "rejected")}]
    return record


def split_turns(tokenizer, tokens):
    """Pieces of ordinary tokens between special ones, and the special ones."""
    pieces, marks = [[]], []
    for token in tokens:
        if token in tokenizer.special.values():
            marks.append(token)
            pieces.append([])
        else:
            pieces[-1].append(token)
    return [piece for piece in pieces if piece], marks


def test_random_records_are_cut_as_promised(byte_tokenizer):
    rng, refused, cut = random.Random(1), 0, 0
    for _ in range(3000):
        record, block_size = random_record(rng), rng.randint(10, 220)
        whole = encode(record, byte_tokenizer, 10_000)
        n_turns = len(record["prompt"])
        marks = 2 if n_turns == 1 else 5  # [user] and [assistant], or the five of three turns
        meta = whole.trunk[: whole.trunk.index(byte_tokenizer.special["<|user|>"])]
        assert data.structure_size(record, byte_tokenizer) == len(meta) + marks
        try:
            example = encode(record, byte_tokenizer, block_size)
        except UserError:
            # Refused only if the query and an answer had a handful of tokens between them.
            assert block_size - len(meta) < marks + 2 * n_turns + 2
            refused += 1
            continue
        longest = max(map(len, example.answers))
        assert len(example.trunk) + longest <= block_size
        # The meta-prompt and every special token stay.
        assert example.trunk[: len(meta)] == meta
        pieces, special = split_turns(byte_tokenizer, example.trunk[len(meta) :])
        originals, all_special = split_turns(byte_tokenizer, whole.trunk[len(meta) :])
        assert special == all_special and len(special) == marks
        # A turn keeps its head and its tail, an answer its head.
        for piece, original in zip(pieces, originals, strict=True):
            keep = len(piece)
            assert piece == original[: (keep + 1) // 2] + original[len(original) - keep // 2 :]
        for answer, original in zip(example.answers, whole.answers, strict=True):
            assert answer == original[: len(answer)]
        # What is cut is counted, and nothing is cut that need not be.
        assert example.cut_prompt == (len(example.trunk) < len(whole.trunk))
        assert example.cut_answers == sum(
            len(a) < len(b) for a, b in zip(example.answers, whole.answers, strict=True)
        )
        if example.cut_prompt or example.cut_answers:
            assert len(whole.trunk) + max(map(len, whole.answers)) > block_size
            assert len(example.trunk) + longest == block_size
            cut += 1
    assert refused > 50 and cut > 500  # the cases above did occur


def test_what_was_cut_is_printed(byte_tokenizer, capsys):
    long, short = "x" * 50, "ok"
    rows = [
        {"prompt": long, "chosen": long, "rejected": long + "y"},
        {"prompt": long, "chosen": short, "rejected": "no"},
        {"prompt": short, "chosen": short, "rejected": "no"},
    ]
    encode_all(rows, byte_tokenizer, 40, "mine")
    assert capsys.readouterr().out == (
        "mine: cut 2 queries and 2 answers of 3 rows to fit 40 tokens\n"
        "mine: 1 of them have the same answer twice then, and tell no preference\n"
    )
    encode_all(rows[2:], byte_tokenizer, 40, "mine")
    assert capsys.readouterr().out == ""


def test_a_query_that_is_cut_for_sampling_is_told(command, tiny_run):
    status, out, err = command(
        sample, "--ckpt", tiny_run, "--prompt", "x" * 400, "--max_new_tokens", 2
    )
    assert status == 0 and "cut 1 quer" in out + err


@pytest.mark.parametrize("tier", ["system", "preference", "examples"])
def test_a_meta_prompt_that_does_not_fit_is_an_error(byte_tokenizer, tier):
    long = "x" * 100
    choice = {"prompt": long, "chosen": "a", "rejected": "b"}
    record = FULL | {tier: [choice] if tier == "examples" else long, "where": "f.jsonl:7"}
    with pytest.raises(UserError, match=rf"^f\.jsonl:7: field '{tier}'"):
        encode(record, byte_tokenizer, 100)


def test_a_context_too_small_blames_no_tier_that_is_absent(byte_tokenizer):
    turns = [{"role": role, "content": "hi"} for role in ("user", "assistant") * 10]
    record = {"prompt": turns[:-1], "chosen": "a", "rejected": "b", "where": "f.jsonl:7"}
    for examples in ({}, {"examples": []}):
        with pytest.raises(UserError) as error:
            encode(record | examples, byte_tokenizer, 20)
        assert "f.jsonl:7: field 'prompt'" in str(error.value)


# ---------------------------------------------------------------- readers


@pytest.fixture
def read(write_rows):
    """Records of a preference file with these rows."""

    def read_rows(*rows):
        [(_, records)] = data.read_preferences(str(write_rows("rows.jsonl", *rows)))
        return records

    return read_rows


def shown(record):
    """What the model gets to see of a record."""
    fields = ("system", "preference", "examples", "prompt", "chosen", "rejected")
    return {field: record[field] for field in fields if field in record}


def turn(role, content):
    return {"role": role, "content": content}


SIMPLE = {"prompt": "Tea?", "chosen": "Yes.", "rejected": "No."}


def test_trl_strings(read):
    for row in (SIMPLE, SIMPLE | {"label_prob": None, "preference": None}):
        [record] = read(row)
        assert shown(record) == SIMPLE and record["label_prob"] == 1.0


def test_every_field_of_a_record_is_kept(read):
    row = FULL | {"label_prob": 0.75, "user": 3, "meta": {"preference_name": "n"}}
    [record] = read(row)
    assert {field: record[field] for field in row} == row


def test_the_likelier_answer_is_the_chosen_one(read):
    [record] = read(SIMPLE | {"label_prob": 0.25})
    assert shown(record) == SIMPLE | {"chosen": "No.", "rejected": "Yes."}
    assert record["label_prob"] == 0.75
    [record] = read(SIMPLE | {"label_prob": 0.5})
    assert shown(record) == SIMPLE


def test_trl_message_lists(read):
    ask, yes, no = turn("user", "Tea?"), turn("assistant", "Yes."), turn("assistant", "No.")
    apart = {"prompt": [ask], "chosen": [yes], "rejected": [no]}
    repeated = {"prompt": [ask], "chosen": [ask, yes], "rejected": [ask, no]}
    text_prompt = {"prompt": "Tea?", "chosen": [ask, yes], "rejected": [ask, no]}
    no_prompt = {"chosen": [ask, yes], "rejected": [ask, no]}
    records = read(apart, repeated, text_prompt, no_prompt)
    assert [shown(record) for record in records] == [SIMPLE] * 4


def test_trl_messages_with_a_system_turn_and_several_turns(read):
    rule, talk = turn("system", "Be kind."), [
        turn("user", "Hi"), turn("assistant", "Hello"), turn("user", "Tea?"),
    ]
    yes, no = turn("assistant", "Yes."), turn("assistant", "No.")
    rows = [
        {"prompt": [rule, *talk], "chosen": [yes], "rejected": [no]},
        {"prompt": [rule, *talk], "chosen": [*talk, yes], "rejected": [*talk, no]},
        {"chosen": [rule, *talk, yes], "rejected": [rule, *talk, no]},
        {"system": "Be kind.", "prompt": talk, "chosen": [rule, *talk, yes], "rejected": [no]},
        {"system": "Be kind.", "prompt": [rule, *talk], "chosen": [yes], "rejected": [no]},
    ]
    expected = {"system": "Be kind.", "prompt": talk, "chosen": "Yes.", "rejected": "No."}
    assert [shown(record) for record in read(*rows)] == [expected] * 5
    for row in rows[3:]:
        with pytest.raises(UserError, match=r":1: field '(chosen|prompt)': its "):
            read(row | {"system": "Be rude."})


def test_hh_transcripts_of_several_turns(read):
    talk = "\n\nHuman: Hi\n\nAssistant: Hello.\nHow are you?\n\nHuman: Tea?\n\nAssistant:"
    [record] = read({"chosen": f"{talk} Yes: tea.", "rejected": f"{talk} No."})
    asked = [turn("user", "Hi"), turn("assistant", "Hello.\nHow are you?"), turn("user", "Tea?")]
    assert shown(record) == {"prompt": asked, "chosen": "Yes: tea.", "rejected": "No."}
    [single] = read({"chosen": "\n\nHuman: Tea?\n\nAssistant: Yes.",
                     "rejected": "\n\nHuman: Tea?\n\nAssistant: No."})
    assert shown(single) == SIMPLE


def test_a_prompt_may_be_the_beginning_of_a_transcript(read, write_rows, capsys):
    talk = "\n\nHuman: Hi\n\nAssistant: Hello.\n\nHuman: Tea?\n\nAssistant:"
    asked = [turn("user", "Hi"), turn("assistant", "Hello."), turn("user", "Tea?")]
    expected = {"prompt": asked, "chosen": "Yes: tea.", "rejected": "No."}
    lists = {"chosen": [turn("assistant", "Yes: tea.")],
             "rejected": [turn("user", talk), turn("assistant", "No.")]}
    rows = [
        {"prompt": talk, "chosen": " Yes: tea.", "rejected": " No."},
        {"prompt": f"{talk[2:]} ", "chosen": "Yes: tea.", "rejected": "No."},
        {"prompt": talk, "chosen": f"{talk} Yes: tea.", "rejected": f"{talk} No."},
        {"prompt": talk} | lists,
        {"prompt": talk.strip(), "chosen": f"{talk} Yes: tea.", "rejected": " No."},
    ]
    assert [shown(record) for record in read(*rows)] == [expected] * 5
    [record] = read({"prompt": talk, "chosen": "A\n\nHuman: B\n\nAssistant: C", "rejected": "D"})
    assert record["prompt"] == asked and record["chosen"].endswith("Assistant: C")
    [quoted] = read(SIMPLE | {"prompt": "Go on:\n\nHuman: Hi\n\nAssistant:"})
    assert quoted["prompt"] == "Go on:\n\nHuman: Hi\n\nAssistant:"
    for row in ({"response": " Yes: tea."}, {"output": " Yes: tea."},
                {"response": f"{talk} Yes: tea."}, rows[0] | {"response": "Yes: tea."}):
        [record] = data.read_responses(str(write_rows("sft.jsonl", {"prompt": talk} | row)))
        assert (record["prompt"], record["response"]) == (asked, "Yes: tea.")
    capsys.readouterr()
    for spoilt in (" ", "\n\nHuman: Milk?\n\nAssistant: No.", talk):
        assert len(read(rows[0], rows[0] | {"rejected": spoilt})) == 1
        assert "rows.jsonl:2: the first of 1 dialogues that were skipped" in capsys.readouterr().out


UNUSABLE = {
    "another prompt": "\n\nHuman: Milk?\n\nAssistant: No.",
    "no answer": "\n\nHuman: Tea?\n\nAssistant: ",
    "an empty turn": "\n\nHuman:\n\nAssistant: No.",
    "the user last": "\n\nHuman: Tea?\n\nAssistant: No.\n\nHuman: Why?",
    "two answers": "\n\nHuman: Tea?\n\nAssistant: Yes.\n\nAssistant: No.",
}


@pytest.mark.parametrize("rejected", UNUSABLE.values(), ids=UNUSABLE)
def test_unusable_transcripts_are_skipped_and_counted(write_rows, capsys, rejected):
    """A few rows in a thousand of HH-RLHF are no pairs."""
    chosen = "\n\nHuman: Tea?\n\nAssistant: Yes."
    spoilt = {"chosen": chosen, "rejected": rejected}
    path = str(write_rows("a.jsonl", spoilt, spoilt, SIMPLE))
    for read in (data.read_records, data.read_responses):
        [record] = read(path)
        assert record["chosen"] == SIMPLE["chosen"]
        assert "a.jsonl:1: the first of 2 dialogues that were skipped" in capsys.readouterr().out
    with pytest.raises(UserError, match="no pair to learn from"):
        data.read_records(str(write_rows("a.jsonl", spoilt)))
    answers = {field: [turn("user", f"{field}?"), turn("assistant", "Yes.")]
               for field in ("chosen", "rejected")}
    with pytest.raises(UserError, match=r":1: field 'rejected': its prompt differs"):
        data.read_records(str(write_rows("a.jsonl", answers)))
    answers = {field: answers[field][1:] for field in answers}
    with pytest.raises(UserError, match=r":1: field 'prompt': missing"):
        data.read_records(str(write_rows("a.jsonl", answers)))


def test_nulls_and_empty_system_turns_are_absent(read, write_rows):
    nulls = dict.fromkeys(("system", "completions", "response", "unknown", "label_prob"))
    turns = [turn("system", ""), turn("user", "Tea?")]
    answers = {field: [*turns, turn("assistant", SIMPLE[field])]
               for field in ("chosen", "rejected")}
    for row in (SIMPLE | nulls, SIMPLE | {"prompt": turns}, answers):
        [record] = read(row)
        assert shown(record) == SIMPLE
        [record] = data.read_responses(str(write_rows("sft.jsonl", row)))
        assert "response" not in record and record["chosen"] == SIMPLE["chosen"]


def test_multifaceted_rows(read, write_rows):
    [record] = read(SIMPLE | {"system": "You are a bus driver."})
    assert shown(record) == SIMPLE | {"system": "You are a bus driver."}
    row = {"system": "You are a bus driver.", "prompt": "Tea?", "output": "Yes.", "main_source": ""}
    [record] = data.read_responses(str(write_rows("sft.jsonl", row)))
    assert [record[f] for f in ("system", "prompt", "response")] == [*row.values()][:3]
    [record] = data.read_responses(str(write_rows("sft.jsonl", SIMPLE | {"output": "Another."})))
    assert "response" not in record


def completion(response, **ratings):
    annotations = {a: {"Rating": r, "Rationale": "because"} for a, r in ratings.items()}
    return {"response": response, "annotations": annotations}


def test_ultrafeedback_completions_become_pairs_for_each_aspect(read):
    """Three completions: helpfulness differs in all 3 pairs, honesty (one N/A) in 1."""
    row = {"instruction": "Tea?", "completions": [
        completion("A", helpfulness="5", honesty="2"),
        completion("B", helpfulness="3", honesty="4"),
        completion("C", helpfulness="1", honesty="N/A"),
    ]}
    records = read(row)
    found = {(r["meta"]["preference_name"], r["chosen"], r["rejected"]) for r in records}
    expected = {("helpfulness", *pair) for pair in ("AB", "AC", "BC")} | {("honesty", "B", "A")}
    assert found == expected and len(records) == 4
    assert all(r["meta"]["preference_name"] in r["preference"] for r in records)
    flips = [{records[i]["chosen"], records[j]["chosen"]} for i, j in find_flips(records)]
    assert flips == [{"A", "B"}]


def test_helpsteer_rows_become_pairs_and_disagreeing_aspects_flip(read):
    """A beats B on correctness, B beats A on verbosity, coherence ties; C has another prompt."""
    rows = [
        {"prompt": "Tea?", "response": "A", "correctness": 4, "verbosity": 1, "coherence": 3},
        {"prompt": "Milk?", "response": "C", "correctness": 0, "verbosity": 0, "coherence": 0},
        {"prompt": "Tea?", "response": "B", "correctness": 2, "verbosity": 3, "coherence": 3},
    ]
    records = read(*rows)
    found = {(r["meta"]["preference_name"], r["chosen"], r["rejected"]) for r in records}
    assert found == {("correctness", "A", "B"), ("verbosity", "B", "A")}
    assert {r["prompt"] for r in records} == {"Tea?"}
    [(i, j)] = find_flips(records)
    assert records[i]["chosen"] == records[j]["rejected"]
    assert records[i]["preference"] != records[j]["preference"]


def test_helpsteer_prompts_of_several_turns(read, write_rows, capsys):
    prompt = "Hi\n\n<extra_id_1>Assistant\n\nHello\n\n<extra_id_1>User\n\nTea?"
    rows = [{"prompt": prompt, "response": r, "verbosity": i} for i, r in enumerate("AB")]
    asked = [turn("user", "Hi"), turn("assistant", "Hello"), turn("user", "Tea?")]
    [record] = read(*rows)
    assert (record["prompt"], record["chosen"], record["rejected"]) == (asked, "B", "A")
    for record in data.read_responses(str(write_rows("sft.jsonl", *rows))):
        assert record["prompt"] == asked
    [pair] = read({"prompt": prompt, "chosen": [turn("user", prompt), turn("assistant", "A")],
                   "rejected": "B"})
    assert shown(pair) == {"prompt": asked, "chosen": "A", "rejected": "B"}
    for spoilt in (prompt[:-4], prompt + "\n<extra_id_1>Assistant\nYes.",
                   "Hi\n<extra_id_1>Assistant\n<extra_id_1>User\nTea?"):
        assert len(read(rows[0], rows[1], rows[0] | {"prompt": spoilt})) == 1
        assert "rows.jsonl:3: the first of 1 dialogues" in capsys.readouterr().out


def test_of_rated_completions_sft_learns_the_chosen_ones(write_rows):
    """Of three completions the worst on the only aspect is never chosen; other rows stay."""
    rated = [completion(r, helpfulness=i) for i, r in enumerate("CBA")]
    plain = {"prompt": "Milk?", "response": "D"}
    path = write_rows("mixed.jsonl", {"instruction": "Tea?", "completions": rated}, plain)
    rows = map(data.chosen_as_response, data.read_responses(str(path)))
    assert [(row["prompt"], row["response"]) for row in rows] == [
        ("Tea?", "B"), ("Tea?", "A"), ("Tea?", "A"), ("Milk?", "D")
    ]


def test_a_rated_row_keeps_its_system_message_or_says_that_it_is_ignored(read, capsys):
    rows = [{"system": "Be kind.", "prompt": "Tea?", "response": r, "helpfulness": i}
            for i, r in enumerate("AB")]
    [record] = read(*rows)
    assert record.get("system") == "Be kind." or "system" in capsys.readouterr().out


def test_fields_that_are_not_read_are_named(read, write_rows, capsys):
    """Of a pair those of rated rows too; in SFT data as in preference data."""
    read(SIMPLE | {"verbosity": 1, "instruction": "x"})
    assert "ignored fields: instruction, verbosity" in capsys.readouterr().out
    path = write_rows("sft.jsonl", {"prompt": "q", "response": "r", "preferance": "Be kind."})
    data.read_responses(str(path))
    assert "ignored fields: preferance" in capsys.readouterr().out
    data.read_responses(str(write_rows("sft.jsonl", {"prompt": "q", "response": "r"})))
    assert capsys.readouterr().out == ""
    rated = {"completions": [completion(r, helpfulness=i) for i, r in enumerate("AB")]}
    read({"instruction": "Tea?", "verbosity": 1} | rated)
    assert "ignored fields: verbosity" in capsys.readouterr().out


def test_a_response_beside_answers_that_hold_the_prompt(write_rows):
    answers = {field: [turn("user", "Tea?"), turn("assistant", text)]
               for field, text in (("chosen", "A"), ("rejected", "B"), ("response", "C"))}
    [record] = data.read_responses(str(write_rows("sft.jsonl", answers)))
    assert (record["prompt"], record["response"]) == ("Tea?", "C")
    system = turn("system", "Be kind.")
    answers = {field: [system, *turns] for field, turns in answers.items()}
    prompt = {"prompt": [system, turn("user", "Tea?")]}
    alone = {"response": answers["response"]}
    for row in (answers, answers | prompt, alone | prompt):
        [record] = data.read_responses(str(write_rows("sft.jsonl", row)))
        found = [record[field] for field in ("system", "prompt", "response")]
        assert found == ["Be kind.", "Tea?", "C"]
    answers = {field: f"\n\nHuman: Tea?\n\nAssistant: {text}"
               for field, text in (("chosen", "A"), ("rejected", "B"), ("response", "C"))}
    for row in (answers, answers | {"response": "C"}):
        [record] = data.read_responses(str(write_rows("sft.jsonl", row)))
        assert (record["prompt"], record["response"]) == ("Tea?", "C")


def test_gzip_bom_crlf_and_blank_lines(tmp_path):
    line = json.dumps(SIMPLE | {"prompt": "Tea, 茶?"}, ensure_ascii=False).encode()
    plain, packed = tmp_path / "a.jsonl", tmp_path / "b.jsonl.gz"
    plain.write_bytes(b"\xef\xbb\xbf" + line + b"\r\n\r\n   \n" + line)
    packed.write_bytes(gzip.compress(plain.read_bytes()))
    datasets = data.read_preferences(f"{plain},{packed}")
    folder = tmp_path.name
    assert [name for name, _ in datasets] == [f"{folder}/a", f"{folder}/b"]
    for _, records in datasets:
        assert [shown(r) for r in records] == [SIMPLE | {"prompt": "Tea, 茶?"}] * 2
        assert [r["where"].rsplit(":", 1)[1] for r in records] == ["1", "4"]


def test_a_bom_before_a_blank_line_is_no_error(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_bytes(b"\xef\xbb\xbf\r\n" + json.dumps(SIMPLE).encode())
    [(_, records)] = data.read_preferences(str(path))
    assert [shown(r) for r in records] == [SIMPLE]


@pytest.mark.parametrize("wrap", [str, lambda text: [{"role": "assistant", "content": text}]])
def test_answers_keep_their_outer_white_space(read, wrap):
    """Chosen and rejected alike: what stood in one alone would tell them apart."""
    text, other = "\n Yes. ", " No.\n"
    prompt = SIMPLE["prompt"] if wrap is str else [{"role": "user", "content": "Tea?"}]
    row = SIMPLE | {"prompt": prompt}
    [one] = read(row | {"chosen": wrap(text), "rejected": wrap(other)})
    [two] = read(row | {"chosen": wrap(other), "rejected": wrap(text)})
    assert (one["chosen"], one["rejected"]) == (two["rejected"], two["chosen"]) == (text, other)


@pytest.mark.parametrize("refused", ["Tea?", "Yes."])
def test_text_that_a_tokenizer_refuses_is_named_by_its_place(refused):
    def encode_text(text):
        if text == refused:
            raise UserError("takes the text for a special token")
        return [1]

    tokenizer = SimpleNamespace(encode=encode_text, encode_answer=encode_text, end=0)
    with pytest.raises(UserError, match=r"^x\.jsonl:7: takes the text"):
        encode(SIMPLE | {"where": "x.jsonl:7"}, tokenizer, 64)


def test_identical_answers_are_skipped_and_counted(read, capsys):
    same = SIMPLE | {"rejected": "Yes."}
    assert len(read(same, SIMPLE, same)) == 1
    assert "skipped 2 of 3 rows" in capsys.readouterr().out
    with pytest.raises(UserError, match=r"rows\.jsonl: no pair"):
        read(same)


def test_unknown_fields_are_named(read, capsys):
    read(SIMPLE | {"prefernce": "Be brief."})
    assert "prefernce" in capsys.readouterr().out


def test_two_files_of_one_name_are_an_error(write_rows):
    path = write_rows("a.jsonl", SIMPLE)
    with pytest.raises(UserError, match="both named"):
        data.read_preferences(f"{path},{path}")


def test_responses_of_sft_rows_and_of_pairs(write_rows, world_tokenizer):
    """In SFT a tree has one branch: the response, or else the chosen answer of a pair."""
    both = SIMPLE | {"chosen": "Maybe.", "response": "Yes."}
    path = write_rows("sft.jsonl", {"prompt": "Tea?", "response": "Yes."}, SIMPLE, both)
    rows = map(data.chosen_as_response, data.read_responses(str(path)))
    examples = [encode(row, world_tokenizer, 64) for row in rows]
    for example in examples:
        assert [world_tokenizer.decode(a) for a in example.answers] == ["Yes.<|end|>"]


# ---------------------------------------------------------------- batches


@pytest.mark.parametrize("limit", [1, 50, 120, 10**6])
def test_micro_batches_take_each_row_once_within_the_limit(limit):
    rng = random.Random(0)
    examples = [Example([0] * rng.randint(1, 60), [[0] * rng.randint(1, 30) for _ in range(2)])
                for _ in range(100)]
    sizes = [data.tree_size(example) for example in examples]
    batches = micro_batches(examples, limit)
    assert sorted(i for batch in batches for i in batch) == list(range(100))
    for batch in batches:
        assert len(batch) == 1 or sum(sizes[i] for i in batch) <= limit
    assert len(batches) == (1 if limit == 10**6 else 100 if limit == 1 else len(batches))


def test_tree_size_counts_what_is_run():
    """A trunk of 3, and answers of 4 and 2 tokens, the last of which are only predicted."""
    assert data.tree_size(Example([1, 2, 3], [[4, 5, 6, 7], [8, 9]])) == 3 + 3 + 1


def all_batches(order):
    return [order.batch(step) for step in range(order.max_steps)]


def rows_alone(n):
    return [[i] for i in range(n)]


def test_rows_of_a_group_stay_together():
    rows = DataOrder([[0, 1], [2, 3], [4, 5]], 6, 4, 0, 0).rows
    assert all(b == a + 1 for a, b in zip(rows[::2], rows[1::2], strict=True))
    assert sorted(rows) == sorted(list(range(6)) * 4)


def test_the_same_seed_gives_the_same_order_whatever_else_is_drawn():
    torch.manual_seed(1)
    first = all_batches(DataOrder(rows_alone(50), 8, 3, 0, 7))
    torch.manual_seed(2)
    state = torch.get_rng_state()
    again = DataOrder(rows_alone(50), 8, 3, 0, 7)
    assert torch.equal(torch.get_rng_state(), state)
    # A resumed run asks for the later steps only.
    assert [again.batch(step) for step in range(10, again.max_steps)] == first[10:]
    assert all_batches(DataOrder(rows_alone(50), 8, 3, 0, 8)) != first
    # How long the run is does not change how it begins.
    assert all_batches(DataOrder(rows_alone(50), 8, 9, 0, 7))[: len(first) - 1] == first[:-1]


def test_an_epoch_takes_each_row_once():
    order = DataOrder(rows_alone(10), 4, 2, 0, 0)
    rows = [i for batch in all_batches(order) for i in batch]
    assert sorted(rows[:10]) == sorted(rows[10:]) == list(range(10)) and rows[:10] != rows[10:]
    assert [len(batch) for batch in all_batches(order)] == [4] * 5
    assert len(all_batches(DataOrder(rows_alone(10), 4, 0.5, 0, 0))) == 2  # 5 rows
    assert [len(batch) for batch in all_batches(DataOrder(rows_alone(10), 4, 1, 6, 0))] == [4] * 6
