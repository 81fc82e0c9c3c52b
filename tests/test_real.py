"""The experiment on a pretrained model: what is held out, and the length-only rule."""

import json
import random
import re
import string
from pathlib import Path

import pytest

import common
import real

WORDS = common.load_json(Path(real.__file__).with_name("wordings.json"))
SIDES = {"polite": ("polite", "blunt"), "concise": ("concise", "detailed")}
# A word of some of our implied wordings of each side.
WORD = {"polite": "bishop", "blunt": "villain", "concise": "meetings", "detailed": "committee"}


def wording(side, kind, i):
    """Of the implied ones two have the same word, "pol, bbbb 2" and "pol, bbbb 3"; the first two
    have one that occurs among ours. The first stated one is one of ours."""
    if kind == "stated":
        return f"{side[:3]}, {kind} {i}" if i else WORDS[side]["stated"][0]
    return f"{side[:3]}, {chr(97 + i // 2) * 4 if i > 1 else WORD[side]} {i}"


def worded_rows(name, split):
    """A flip for each stated and implied wording: 24 and 12 on each side, as in the real data.

    In two of them the first side has the longer answer.
    """
    rows = []
    for kind, n in (("stated", 24), ("implied", 12)):
        for i in range(n):
            answers = f"short {split} {i}", f"a longer answer {split} {i}"
            answers = answers[::-1] if i == 7 else answers
            for side, (chosen, rejected) in zip(SIDES[name], (answers, answers[::-1]), strict=True):
                rows.append({
                    "preference": wording(side, kind, i), "prompt": f"{split} {kind} {i}",
                    "chosen": chosen, "rejected": rejected,
                    "meta": {"preference_name": side, "wording": kind, "dataset": name},
                })
    return rows


def persona_rows(split):
    rows = []
    for a in range(10):
        for b in range(a):
            answers = f"{split} I am {a}, not {b}", f"{split} I am {b}, not {a}"
            for who, (chosen, rejected) in ((a, answers), (b, answers[::-1])):
                rows.append({"preference": f"Be {who}.", "prompt": "Say something.",
                             "chosen": chosen, "rejected": rejected,
                             "meta": {"preference_name": f"person-{who}"}})
    return rows


@pytest.fixture
def source(tmp_path):
    for name in ("polite", "concise", "personas"):
        for split in ("train", "val"):
            rows = persona_rows(split) if name == "personas" else worded_rows(name, split)
            path = tmp_path / name / f"{split}.jsonl"
            path.parent.mkdir(exist_ok=True)
            path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return tmp_path


@pytest.fixture
def prepared(source):
    return real.prepare(real.Options(data=str(source), concise_pairs=5, personas_pairs=7))


def test_held_out_wordings_personas_and_prompts_are_not_in_training(prepared):
    train = prepared.pop("train")
    shown = {row["preference"] for row in train}
    assert len(prepared) == 8
    for name, rows in prepared.items():
        assert rows, name
        if "unseen" in name:
            assert shown.isdisjoint(row["preference"] for row in rows), name
        if "personas" not in name:
            assert {r["prompt"] for r in train}.isdisjoint(r["prompt"] for r in rows), name
    assert shown & set(WORDS["polite"]["implied"])  # ours are in training
    assert len(train) == 3 * 72 + 2 * 2 * 5 + 2 * 6  # six pairs of the four other persons


def test_length_is_trained_on_pairs_of_which_the_concise_answer_is_the_shorter_one(
    prepared, tmp_path
):
    options = real.Options(data=str(tmp_path), polite_copies=0, personas_pairs=0)
    train = real.prepare(options)["train"]
    assert len(train) == 2 * 2 * (36 - 2)
    first, again = train[: len(train) // 2], train[len(train) // 2 :]
    assert [row["prompt"] for row in first] == [row["prompt"] for row in again]
    assert [row["preference"] for row in first] != [row["preference"] for row in again]
    for row in train:
        shorter = len(row["chosen"]) < len(row["rejected"])
        assert shorter == (row["meta"]["preference_name"] == "concise")
    assert "val stated 7" in {row["prompt"] for row in prepared["concise-val"]}


def test_size_and_copies_of_the_pairs_of_length(prepared, tmp_path):
    rows, limit = worded_rows("concise", "train"), 62
    size = [sum(len(row[f]) for f in ("preference", "prompt", "chosen", "rejected"))
            for row in rows]
    kept = {one["prompt"] for i, one in enumerate(rows[::2])
            if max(size[2 * i : 2 * i + 2]) <= limit and not one["prompt"].endswith(" 7")}
    assert 0 < len(kept) < 34
    train = real.prepare(real.Options(data=str(tmp_path), polite_copies=0, personas_pairs=0,
                                      concise_size=limit, concise_copies=3))["train"]
    assert sorted(row["prompt"] for row in train) == sorted(6 * list(kept))


@pytest.mark.parametrize("name", SIDES)
def test_no_wording_held_out_is_in_training_nor_a_word_of_an_implied_one(name):
    def words(texts):
        split = "".join(c if c in string.ascii_lowercase else " " for c in " ".join(texts).lower())
        return {word[:4] for word in split.split() if len(word) > 3}

    taken = {"stated": set(), "implied": set()}  # ours that some seed leaves out
    for seed in range(12):
        seen, unseen = real.wordings(worded_rows(name, "train"), random.Random(seed))
        for side in SIDES[name]:
            trained, held_out = seen[side, "implied"], words(unseen[side, "implied"])
            assert held_out.isdisjoint(words(trained))
            own = {wording(side, "implied", i) for i in range(12)}
            assert len(own & set(trained)) == 12 - 2 * len(held_out)  # both of two alike are out
            assert len(trained) > 15  # and ours are there
            assert set(seen[side, "stated"]).isdisjoint(unseen[side, "stated"])
            for kind in taken:
                taken[kind] |= set(WORDS[side][kind]) - set(seen[side, kind])
    for side in SIDES[name]:
        assert any(WORD[side] in text for text in taken["implied"] & set(WORDS[side]["implied"]))
        assert WORDS[side]["stated"][0] in taken["stated"]


def test_rewording_keeps_the_side_and_the_answers(prepared):
    """Row by row the first copy is the data's own file under other words."""
    for row, original in zip(prepared["train"], worded_rows("polite", "train"), strict=False):
        assert [row[f] for f in ("prompt", "chosen", "rejected")] == [
            original[f] for f in ("prompt", "chosen", "rejected")
        ]
        side = row["meta"]["preference_name"]
        assert side == original["meta"]["preference_name"]
        ours = WORDS[side][row["meta"]["wording"]]
        assert row["preference"].startswith(side[:3] + ", ") or row["preference"] in ours


@pytest.mark.parametrize(("change", "named"), [
    ({"meta": {"preference_name": "kind", "wording": "stated"}}, "'meta.preference_name': must be"),
    ({"meta": {"preference_name": "blunt", "wording": "sung"}}, "'meta.wording': must be"),
    ({"meta": {"preference_name": "blunt"}}, "'meta.wording': missing"),
    ({"preference": None}, "'preference': missing"),
])
def test_a_row_that_cannot_be_worded_is_named(tmp_path, change, named):
    row = worded_rows("polite", "train")[0] | change
    row = {key: value for key, value in row.items() if value is not None}
    (tmp_path / "polite").mkdir()
    (tmp_path / "polite/train.jsonl").write_text(json.dumps(row))
    with pytest.raises(common.UserError, match=rf"train\.jsonl:1: field {re.escape(named)}"):
        real.read(tmp_path, "polite", "train")


def test_data_that_is_too_little_is_named(prepared, tmp_path):
    def cut(name, keep):
        path = tmp_path / name / "train.jsonl"
        rows = [json.loads(line) for line in path.read_text().splitlines()]
        path.write_text("".join(json.dumps(row) + "\n" for row in rows if keep(row["meta"])))

    options = real.Options(data=str(tmp_path))
    cut("personas", lambda meta: meta["preference_name"] < "person-4")
    with pytest.raises(common.UserError, match="personas/train.jsonl: 4 personas in flips, 6"):
        real.prepare(options)
    cut("polite", lambda meta: meta != {**meta, "preference_name": "blunt", "wording": "implied"})
    with pytest.raises(common.UserError, match="no implied wording of blunt"):
        real.prepare(options)


def test_first_prompts_may_be_turns():
    turns = [{"role": "user", "content": "Tea?"}]
    records = [{"prompt": prompt} for prompt in (turns, "a", turns, "b")]
    assert real.first_prompts(records, 2) == [turns, "a"]


def test_our_wordings_stand_on_one_side_only():
    texts = [text for side in WORDS.values() for kind in side.values() for text in kind]
    assert len(texts) == len(set(texts))


def test_the_length_rule_by_hand():
    """The first name's answer is shorter in two flips, longer in one, as long in one: 2.5 of 4."""
    rows = []
    for i, (short, long) in enumerate((("a", "bb"), ("cc", "ddd"), ("eeee", "f"), ("g", "h"))):
        for name, chosen, rejected in (("concise", short, long), ("detailed", long, short)):
            rows.append({"prompt": str(i), "chosen": chosen, "rejected": rejected,
                         "meta": {"preference_name": name, "dataset": "x" if i else "y"}})
    assert real.length_rule(rows) == {"all": (2.5, 4), "x": (1.5, 3), "y": (1, 1)}


def test_the_files_are_written_and_read_as_preference_data(source, prepared, command):
    """python real.py --data DIR, then what train_dpo.py and evaluate.py read."""
    status, out, err = command(real, "--data", source, "--concise_pairs", "5",
                               "--personas_pairs", "7", "--out_dir", "out/real")
    assert status == 0, err
    for name, rows in prepared.items():
        path = source / f"out/real/{name}.jsonl"
        assert f"wrote out/real/{name}.jsonl: {len(rows)} rows" in out
        [(_, found)] = real.data.read_preferences(str(path))
        for row, wanted in zip(found, rows, strict=True):
            assert all(row[field] == wanted[field]
                       for field in ("preference", "prompt", "chosen", "rejected", "meta"))
        assert (f"  {name:<24} all" in out) == (name != "train")


def test_answers_under_opposite_preferences_and_their_lengths(
    prepared, tiny_run, command, monkeypatch
):
    cut, short = [[97] * 200] * 3 + [[97] * 5] * 17, [[97] * 9] * 20  # 34.25 and 9 characters
    answers = iter((cut, short) * 2)
    monkeypatch.setattr(real, "answer_tokens", lambda *arguments: next(answers))
    for name in ("concise", "polite"):
        real.data.save_records(tiny_run.parent / f"{name}-val.jsonl", prepared[f"{name}-val"])
    status, out, err = command(real, "--ckpt", tiny_run, "--out_dir", tiny_run.parent,
                               "--device", "cpu", "--precision", "fp32")
    assert status == 0, err
    assert out.count("\n  [Be concise.] ") == out.count("\n  [Please be polite.] ") == real.PROMPTS
    found = re.findall(r"'(.*)': (\d+) characters on average, (\d+) of 20 cut at 200 tokens", out)
    assert [preference for preference, _, _ in found] == [x for y in real.ASKED.values() for x in y]
    assert [(int(size), int(cut)) for _, size, cut in found] == [(34, 3), (9, 0)] * 2
    assert re.findall(r": ratio of lengths (.*)\n", out) == ["0.26"] * 2
