"""Bad input: one line on stderr that names the place, exit status 2, nothing half-written."""

import errno
import fcntl
import gzip
import json
import math
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import common
import data
import evaluate
import sample
import train_dpo
import train_sft

PAIR = {"prompt": "Tea?", "chosen": "Yes.", "rejected": "No."}
RESPONSE = {"prompt": "Tea?", "response": "Yes."}
NO_SPACE = OSError(errno.ENOSPC, "No space left on device")
SIZES = ("--n_layer", 1, "--n_head", 2, "--n_kv_head", 1, "--n_embd", 16, "--block_size", 64)


def snapshot(folder):
    """{path: content} of all files below a folder, but for the locks of runs."""
    return {path: path.read_bytes() for path in Path(folder).rglob("*")
            if path.is_file() and path.name != ".lock"}


@pytest.fixture
def refused(command, tmp_path):
    """refused(script, *arguments) -> the one line of the error; no file may have changed."""

    def call(script, *arguments):
        before = snapshot(tmp_path)
        status, _, err = command(script, *arguments)
        assert status == 2, err
        assert err.startswith("error: ") and err.endswith("\n") and err.count("\n") == 1, err
        assert len(err) > len("error: \n") and "Traceback" not in err
        assert snapshot(tmp_path) == before
        return err.removesuffix("\n")

    return call


@pytest.fixture
def byte_vocabulary(tmp_path, byte_tokenizer):
    """A FILE.tiktoken for --tokenizer, small enough to train with at once."""
    byte_tokenizer.save(tmp_path)
    return tmp_path / "tokenizer.tiktoken"


@pytest.fixture
def sft(byte_vocabulary, write_rows):
    """Arguments of an SFT run of one step; a later option replaces an earlier one."""
    rows = write_rows("sft.jsonl", RESPONSE)
    return ("--data", rows, "--tokenizer", byte_vocabulary, *SIZES, "--max_steps", 1,
            "--device", "cpu", "--precision", "fp32")


@pytest.fixture
def dpo(tiny_run, write_rows):
    """Arguments of a DPO run of one step on one pair."""
    rows = write_rows("pairs.jsonl", PAIR)
    return ("--pref_data", rows, "--init_from", tiny_run, "--max_steps", 1, "--device", "cpu",
            "--precision", "fp32")


# ---------------------------------------------------------------- rows

TURN = {"role": "user", "content": "Tea?"}
DEEP = "[" * 100_000
BAD_ROWS = {  # name -> (row, what the message must name besides file and line)
    "broken JSON": ('{"prompt": "Tea?", "chosen"', ""),
    "two objects": (json.dumps(PAIR) * 2, ""),
    "no object": ("[1, 2]", "object"),
    "too deep": (DEEP, ""),
    "endless number": ('{"prompt": ' + "1" * 5000 + "}", ""),
    "not UTF-8": (b'{"prompt": "Tea\xff?", "chosen": "a", "rejected": "b"}', "UTF-8"),
    "UTF-16": (json.dumps(PAIR).encode("utf-16"), "UTF-8"),
    "missing chosen": ({"prompt": "Tea?", "rejected": "No."}, "'chosen'"),
    "missing rejected": ({"prompt": "Tea?", "chosen": "No."}, "'rejected'"),
    "missing both": ({"prompt": "Tea?"}, "'chosen'"),
    "missing prompt": ({"chosen": "Yes.", "rejected": "No."}, "'prompt'"),
    "null chosen": (PAIR | {"chosen": None}, "'chosen'"),
    "empty prompt": (PAIR | {"prompt": ""}, "'prompt'"),
    "blank rejected": (PAIR | {"rejected": " \n"}, "'rejected'"),
    "number as prompt": (PAIR | {"prompt": 3}, "'prompt'"),
    "object as chosen": (PAIR | {"chosen": {"text": "Yes."}}, "'chosen'"),
    "number as system": (PAIR | {"system": 3}, "'system'"),
    "list as preference": (PAIR | {"preference": ["Be brief."]}, "'preference'"),
    "text as examples": (PAIR | {"examples": "none"}, "'examples'"),
    "example without answer": (PAIR | {"examples": [{"prompt": "a", "chosen": "b"}]},
                               "'examples[0].rejected'"),
    "text as example": (PAIR | {"examples": [PAIR, "x"]}, "'examples[1]'"),
    "text as meta": (PAIR | {"meta": "x"}, "'meta'"),
    "list as user": (PAIR | {"user": []}, "'user'"),
    "truth as user": (PAIR | {"user": True}, "'user'"),
    "empty user": (PAIR | {"user": ""}, "'user'"),
    "label_prob above 1": (PAIR | {"label_prob": 1.1}, "'label_prob'"),
    "label_prob below 0": (PAIR | {"label_prob": -0.1}, "'label_prob'"),
    "label_prob NaN": (PAIR | {"label_prob": float("nan")}, "'label_prob'"),
    "label_prob infinite": (PAIR | {"label_prob": float("inf")}, "'label_prob'"),
    "label_prob a bool": (PAIR | {"label_prob": True}, "'label_prob'"),
    "label_prob a text": (PAIR | {"label_prob": "0.9"}, "'label_prob'"),
    "surrogate in prompt": (PAIR | {"prompt": "Tea \ud800?"}, "'prompt'"),
    "surrogate in system": (PAIR | {"system": "\udfff"}, "'system'"),
    "surrogate in a turn": (PAIR | {"prompt": [TURN | {"content": "\ud800"}]}, "'prompt[0]"),
    "no turns": (PAIR | {"prompt": []}, "'prompt'"),
    "unknown role": (PAIR | {"prompt": [TURN | {"role": "tool"}]}, "'prompt[0].role'"),
    "turn without content": (PAIR | {"prompt": [{"role": "user"}]}, "'prompt[0].content'"),
    "text as turn": (PAIR | {"prompt": ["Tea?"]}, "'prompt[0]"),
    "system turn only": (PAIR | {"prompt": [TURN | {"role": "system"}]}, "'prompt'"),
    "last turn not the user's": (PAIR | {"prompt": [TURN, TURN | {"role": "assistant"}]},
                                 "'prompt'"),
    "late system turn": (PAIR | {"prompt": [TURN, TURN | {"role": "system"}, TURN]}, "'prompt'"),
    "two systems": (PAIR | {"system": "a", "prompt": [TURN | {"role": "system"}, TURN]},
                    "'system'"),
    "answer of a user": (PAIR | {"chosen": [TURN]}, "'chosen'"),
    "answers to another prompt": (PAIR | {"chosen": [TURN | {"content": "Milk?"},
                                                     TURN | {"role": "assistant"}]}, "'chosen'"),
    "score a text": (RESPONSE | {"helpfulness": "good"}, "'helpfulness'"),
    "score NaN": (RESPONSE | {"helpfulness": float("nan")}, "'helpfulness'"),
    "no scores": (RESPONSE, "'chosen'"),
    "no completions": ({"instruction": "Tea?", "completions": 3}, "'completions'"),
    "completion without ratings": ({"instruction": "Tea?", "completions": [{"response": "a"}]},
                                   "'completions[0].annotations'"),
    "completion without response": ({"instruction": "Tea?", "completions": [{"annotations": {}}]},
                                    "'completions[0].response'"),
    "no instruction": ({"completions": []}, "'instruction'"),
}


@pytest.mark.parametrize("kind", BAD_ROWS)
def test_bad_row(refused, write_rows, byte_vocabulary, kind):
    row, field = BAD_ROWS[kind]
    path = write_rows("bad.jsonl", PAIR, "", row, PAIR)
    message = refused(data, "--pref_data", path, "--tokenizer", byte_vocabulary)
    assert f"{path}:3:" in message and field in message and len(message) < 500


BAD_RESPONSES = {
    "missing": ({"prompt": "Tea?"}, "'response'"),
    "empty": ({"prompt": "Tea?", "response": ""}, "'response'"),
    "a number": ({"prompt": "Tea?", "response": 4}, "'response'"),
    "no prompt": ({"response": "Yes."}, "'prompt'"),
    "label_prob": (RESPONSE | {"label_prob": 7}, "'label_prob'"),
}


@pytest.mark.parametrize("kind", BAD_RESPONSES)
def test_bad_sft_row(refused, write_rows, sft, tmp_path, kind):
    row, field = BAD_RESPONSES[kind]
    path = write_rows("bad.jsonl", RESPONSE, row)
    message = refused(train_sft, *sft, "--data", path, "--out_dir", tmp_path / "out")
    assert f"{path}:2:" in message and field in message
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("row", ["broken JSON", "not UTF-8", "label_prob NaN", "empty prompt"])
def test_bad_row_stops_every_script(refused, write_rows, dpo, tiny_run, tmp_path, row):
    path = write_rows("bad.jsonl", PAIR, BAD_ROWS[row][0])
    out = tmp_path / "out"
    for arguments in (
        (train_dpo, *dpo, "--pref_data", path, "--out_dir", out),
        (train_dpo, *dpo, "--eval_data", path, "--out_dir", out),
        (evaluate, "--ckpt", tiny_run, "--pref_data", path, "--device", "cpu"),
        (sample, "--ckpt", tiny_run, "--prompt", "Tea?", "--examples", path),
        (data, "--ckpt", tiny_run, "--pref_data", path),
    ):
        assert f"{path}:2:" in refused(*arguments)
        assert not out.exists()


# ---------------------------------------------------------------- files


def test_missing_and_empty_files(refused, write_rows, sft, dpo, tmp_path):
    empty, blank = write_rows("empty.jsonl"), write_rows("blank.jsonl", "", "  ")
    for path in (tmp_path / "gone.jsonl", tmp_path / "gone.jsonl.gz", tmp_path, empty, blank):
        out = ("--out_dir", tmp_path / "out")
        assert str(path) in refused(train_dpo, *dpo, "--pref_data", path, *out)
        message = refused(train_sft, *sft, "--data", path, *out)
        assert str(path) in message or "--data" in message
    assert not (tmp_path / "out").exists()


def test_no_file_at_all(refused, tiny_run):
    assert "data file" in refused(data, "--ckpt", tiny_run)
    assert "data file" in refused(evaluate, "--ckpt", tiny_run, "--pref_data", ",")


DAMAGES = ("truncated", "no gzip", "flipped bits", "broken block", "checksum")


@pytest.mark.parametrize("damage", DAMAGES)
def test_damaged_gzip(refused, tmp_path, dpo, damage):
    rows = "".join(json.dumps(PAIR | {"user": i * 7919}) + "\n" for i in range(300)).encode()
    whole = gzip.compress(rows)
    middle = len(whole) // 2
    path = tmp_path / "rows.jsonl.gz"
    path.write_bytes({
        "truncated": whole[:middle],
        "no gzip": rows,
        "flipped bits": whole[:middle] + b"\xff" * 40 + whole[middle + 40 :],
        "broken block": whole[:10] + b"\xff" * 40 + whole[50:],
        "checksum": whole[:-6],
    }[damage])
    assert str(path) in refused(train_dpo, *dpo, "--pref_data", path, "--out_dir", tmp_path / "out")


def test_meta_prompt_longer_than_the_context(refused, write_rows, dpo, tiny_run, tmp_path):
    """The tiny model reads 256 tokens, a byte each."""
    long = "x" * 300
    for tier, value in {"system": long, "preference": long, "examples": [PAIR] * 30}.items():
        path = write_rows("long.jsonl", PAIR, PAIR | {tier: value})
        message = refused(train_dpo, *dpo, "--pref_data", path, "--out_dir", tmp_path / "out")
        assert f"{path}:2:" in message and f"'{tier}'" in message
    ask = ("--ckpt", tiny_run, "--prompt", "Tea?", "--device", "cpu")
    assert "preference" in refused(sample, *ask, "--preference", long)


def test_rated_rows_that_do_not_fit_name_their_file(refused, write_rows, byte_vocabulary):
    rows = [RESPONSE | {"response": r, "helpfulness": i} for i, r in enumerate(("yes", "no"))]
    path = write_rows("rated.jsonl", *rows)
    small = ("--tokenizer", byte_vocabulary, "--block_size", 40)
    message = refused(data, "--pref_data", path, *small)
    assert str(path) in message


# ---------------------------------------------------------------- checkpoints


def loaders(folder):
    """Every command that reads a checkpoint, with its arguments."""
    rows = folder.parent / "pairs.jsonl"
    rows.write_text(json.dumps(PAIR) + "\n")
    return (
        (sample, "--ckpt", folder, "--prompt", "Tea?", "--device", "cpu"),
        (evaluate, "--ckpt", folder, "--pref_data", rows, "--device", "cpu"),
        (train_dpo, "--init_from", folder, "--pref_data", rows, "--out_dir", folder.parent / "out"),
        (train_sft, "--init_from", folder, "--data", rows, "--out_dir", folder.parent / "out"),
    )


def check_all_refuse(refused, folder, *names):
    for arguments in loaders(folder):
        message = refused(*arguments)
        assert str(folder) in message and all(name in message for name in names), message
        assert not (folder.parent / "out").exists()


@pytest.mark.parametrize("size", [0, 1, 100, 3000, -1000, -1])
def test_truncated_weights(refused, tiny_run, size):
    path = tiny_run / "model.pt"
    whole = path.read_bytes()
    path.write_bytes(whole[:size])
    check_all_refuse(refused, tiny_run, "model.pt")


def test_weights_that_are_not_finite(command, tiny_run, write_rows):
    weights = torch.load(tiny_run / "model.pt", weights_only=True)
    torch.save({name: x * math.nan for name, x in weights.items()}, tiny_run / "model.pt")
    rows = write_rows("rows.jsonl", PAIR)
    status, _, err = command(evaluate, "--ckpt", tiny_run, "--pref_data", rows, "--device", "cpu")
    assert status == 2 and "error: log-probabilities are not finite" in err
    assert not (tiny_run / "eval.json").exists()


def test_weights_of_another_model(refused, tiny_run):
    path = tiny_run / "model.pt"
    weights = torch.load(path, weights_only=True)
    first = next(iter(weights))
    for other in (
        {"weight": torch.zeros(2)},
        {k: v for k, v in weights.items() if k != first},
        weights | {first: torch.zeros(3, 3)},
        weights | {"more": torch.zeros(3)},
        weights | {first: 3},
        [1, 2],
        None,
    ):
        torch.save(other, path)
        check_all_refuse(refused, tiny_run, "model.pt")


BAD_CONFIGS = {
    "not JSON": "{",
    "empty": "",
    "not UTF-8": b"\xff\xfe{}",
    "a list": [1],
    "null": None,
    "no fields": {},
    "no model": {"model": None},
    "no tokenizer": {"tokenizer": None},
    "tokenizer a text": {"tokenizer": "world"},
    "tokenizer without name": {"tokenizer": {"name": None}},
    "tokenizer without pattern": {"tokenizer": {"pattern": None}},
    "pattern that is none": {"tokenizer": {"pattern": "(("}},
    "other special tokens": {"tokenizer": {"special_tokens": ["<a>"]}},
    "special tokens null": {"tokenizer": {"special_tokens": 3}},
    "model a list": {"model": [1]},
    "nested too deep": DEEP,
    "size missing": {"model": {"vocab_size": None}},
    "size a text": {"model": {"n_layer": "four"}},
    "size zero": {"model": {"n_head": 0}},
    "size negative": {"model": {"n_embd": -16}},
    "unknown size": {"model": {"n_expert": 3}},
}


def spoil(config, change):
    """`config` with fields replaced, one level deep; None takes a field away."""
    config = dict(config)
    for key, value in change.items():
        if value is None:
            config.pop(key, None)
        elif isinstance(value, dict) and isinstance(config.get(key), dict):
            config[key] = spoil(config[key], value)
        else:
            config[key] = value
    return config


@pytest.mark.parametrize("kind", BAD_CONFIGS)
def test_broken_config(refused, tiny_run, kind):
    path, change = tiny_run / "config.json", BAD_CONFIGS[kind]
    if isinstance(change, dict) and change:
        change = spoil(json.loads(path.read_text()), change)
    if not isinstance(change, str | bytes):
        change = json.dumps(change)
    path.write_bytes(change.encode() if isinstance(change, str) else change)
    check_all_refuse(refused, tiny_run, "config.json")


def test_data_script_reads_a_broken_config(refused, tiny_run, write_rows):
    path = tiny_run / "config.json"
    config = json.loads(path.read_text())
    for model in (None, {"block_size": None}, {"block_size": "long"}):
        path.write_text(json.dumps(spoil(config, {"model": model})))
        message = refused(data, "--ckpt", tiny_run, "--pref_data", write_rows("p.jsonl", PAIR))
        assert str(path) in message


@pytest.mark.parametrize("content", [None, b"", b"AA== 0\n", b"YQ==\n", b"?? ??\n", b"\xff\n"])
def test_missing_or_broken_tokenizer(refused, tiny_run, content):
    path = tiny_run / "tokenizer.tiktoken"
    if content is None:
        path.unlink()
    else:
        path.write_bytes(content)
    check_all_refuse(refused, tiny_run, "tokenizer.tiktoken")


def test_tokenizer_of_another_model(refused, tiny_run):
    with (tiny_run / "tokenizer.tiktoken").open("ab") as f:
        f.write(b"YWI= 256\n")  # "ab"
    check_all_refuse(refused, tiny_run, "token")


def test_tokenizer_with_a_rank_twice(refused, tiny_run):
    with (tiny_run / "tokenizer.tiktoken").open("ab") as f:
        f.write(b"YWI= 7\n")  # "ab", with the rank of another token
    check_all_refuse(refused, tiny_run, "tokenizer.tiktoken")


def test_another_vocabulary_of_the_same_size_is_noticed(refused, tiny_run, byte_tokenizer):
    """Of the checkpoint itself, and of a reference beside it."""
    other = data.Tokenizer(byte_tokenizer.name, byte_tokenizer.pattern,
                           {bytes([255 - i]): i for i in range(256)})
    folder = tiny_run.with_name("other")
    shutil.copytree(tiny_run, folder)
    other.save(folder)
    check_all_refuse(refused, folder, "tokenizer.tiktoken")
    config = common.load_json(folder / "config.json")
    common.save_json(folder / "config.json", config | {"tokenizer": other.describe()})
    message = refused(evaluate, "--ckpt", tiny_run, "--reference", folder)
    assert "another tokenizer" in message


def test_checkpoint_that_is_not_there_or_not_finished(refused, tiny_run):
    check_all_refuse(refused, tiny_run.parent / "gone")
    (tiny_run / "model.pt").unlink()
    check_all_refuse(refused, tiny_run, "model.pt")


def test_reference_that_has_gone_or_changed(refused, command, tiny_run, dpo, write_rows, tmp_path):
    out = tmp_path / "out"
    status, _, err = command(train_dpo, *dpo, "--out_dir", out)
    assert status == 0, err
    rows = write_rows("again.jsonl", PAIR)
    arguments = (evaluate, "--ckpt", out, "--pref_data", rows, "--device", "cpu")
    weights = torch.load(tiny_run / "model.pt", weights_only=True)
    changed = {k: v + 1 for k, v in weights.items()}
    common.save_tensors(tiny_run / "model.pt", changed)
    assert str(tiny_run) in refused(*arguments)
    (tiny_run / "model.pt").unlink()
    assert str(tiny_run) in refused(*arguments)


@pytest.mark.parametrize("reference", ["sft", {"hash": ""}, {"path": 3, "hash": ""}])
def test_broken_reference_in_the_config(
    command, refused, dpo, tiny_run, write_rows, tmp_path, reference
):
    path = tiny_run / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"reference": reference}))
    rows = write_rows("pairs.jsonl", PAIR)
    message = refused(evaluate, "--ckpt", tiny_run, "--pref_data", rows, "--device", "cpu")
    assert str(path) in message
    status, _, err = command(train_dpo, *dpo, "--out_dir", tmp_path / "run")
    assert status == 0, err  # a start needs none


# ---------------------------------------------------------------- no space


def test_no_space_leaves_the_old_file_whole(tmp_path, monkeypatch):
    path = tmp_path / "model.pt"
    common.save_tensors(path, {"a": torch.ones(3)})
    before = snapshot(tmp_path)

    def fill(content, target):
        Path(target).write_bytes(b"half of it")
        raise NO_SPACE

    monkeypatch.setattr(torch, "save", fill)
    with pytest.raises(common.UserError, match="model.pt.*No space left"):
        common.save_tensors(path, {"a": torch.zeros(3)})
    assert snapshot(tmp_path) == before


def test_no_space_as_torch_reports_it(tmp_path, monkeypatch):
    """torch's writer turns ENOSPC into a RuntimeError of several lines."""

    def fill(content, target):
        Path(target).write_bytes(b"half of it")
        raise RuntimeError("[enforce fail at inline_container.cc:664] . unexpected pos\nframe #0")

    monkeypatch.setattr(torch, "save", fill)
    with pytest.raises(common.UserError, match="model.pt") as error:
        common.save_tensors(tmp_path / "model.pt", {})
    assert "\n" not in str(error.value) and snapshot(tmp_path) == {}


def test_what_an_interrupted_write_leaves_is_deleted(tmp_path, monkeypatch):
    """By the write itself, or after a kill by the next run in the folder."""

    def interrupt(content, target):
        Path(target).write_bytes(b"half of it")
        raise KeyboardInterrupt

    monkeypatch.setattr(torch, "save", interrupt)
    with pytest.raises(KeyboardInterrupt):
        common.save_tensors(tmp_path / "ckpt.pt", {})
    assert snapshot(tmp_path) == {}
    for name in ("ckpt.pt.77.tmp", "mine.tmp", "ckpt.pt"):
        (tmp_path / name).write_bytes(b"x")
    assert common.clear(tmp_path, overwrite=False)
    assert {path.name for path in tmp_path.iterdir()} == {"mine.tmp", "ckpt.pt"}


def test_no_space_on_saving_the_weights(command, sft, tmp_path, monkeypatch):
    """The last line is the error, there is no half file, and the run counts as unfinished."""

    def fill(content, target):
        Path(target).write_bytes(b"half of it")
        raise NO_SPACE

    monkeypatch.setattr(torch, "save", fill)
    out = tmp_path / "out"
    status, _, err = command(train_sft, *sft, "--out_dir", out)
    assert status == 2 and "Traceback" not in err
    assert err.splitlines()[-1] == f"error: {out / 'model.pt'}: cannot write: {NO_SPACE.strerror}"
    assert {path.name for path in snapshot(out)} == {
        "config.json", "log.jsonl", "tokenizer.tiktoken",
    }


@pytest.mark.parametrize("name", ["config.json", "tokenizer.tiktoken", "log.jsonl"])
def test_no_space_on_writing_a_small_file(command, sft, tmp_path, monkeypatch, name):
    real = {method: getattr(Path, method) for method in ("write_text", "write_bytes")}

    def fill(method):
        def write(path, content, *arguments, **settings):
            if path.name.startswith(name):
                real[method](path, content[: len(content) // 2])
                raise NO_SPACE
            return real[method](path, content, *arguments, **settings)

        return write

    for method in real:
        monkeypatch.setattr(Path, method, fill(method))
    status, _, err = command(train_sft, *sft, "--out_dir", tmp_path / "out")
    assert status == 2 and "Traceback" not in err
    assert name in err.splitlines()[-1] and err.splitlines()[-1].startswith("error: ")
    assert not [path for path in snapshot(tmp_path) if path.name.startswith(name)
                and path.parent.name == "out"]


def test_a_log_that_was_cut_off_is_mended_on_resuming(tmp_path):
    """A full disk or a kill may leave part of a line, which may end in a brace of its own."""
    for rest in ('{"step": 2, "loss"', '{"step": 2, "eval": {"polite": {"accuracy": 0.5}'):
        (tmp_path / "log.jsonl").write_text('{"step": 1, "loss": 3.0}\n' + rest)
        common.Log(tmp_path, 2)
        assert (tmp_path / "log.jsonl").read_text() == '{"step": 1, "loss": 3.0}\n'


# ---------------------------------------------------------------- options

BAD_OPTIONS = {
    "unknown": (("--learning_rat", "1"), "--learning_rat"),
    "abbreviated": (("--learning", "1"), "--learning"),
    "stray word": (("more",), "more"),
    "without value": (("--seed",), "--seed"),
    "value of a switch": (("--overwrite=yes",), "--overwrite"),
    "a text as number": (("--batch_size", "many"), "--batch_size"),
    "a fraction as whole number": (("--batch_size", "1.5"), "--batch_size"),
    "negative batch": (("--batch_size", "-4"), "--batch_size"),
    "no batch": (("--batch_size", "0"), "--batch_size"),
    "NaN learning rate": (("--learning_rate", "nan"), "--learning_rate"),
    "infinite learning rate": (("--learning_rate", "inf"), "--learning_rate"),
    "negative learning rate": (("--learning_rate=-1e-3",), "--learning_rate"),
    "no epochs": (("--max_steps", "0", "--epochs", "0"), "--epochs"),
    "NaN epochs": (("--epochs", "nan"), "--epochs"),
    "negative steps": (("--max_steps", "-1"), "--max_steps"),
    "negative seed": (("--seed", "-1"), "--seed"),
    "endless seed": (("--seed", "1" + "0" * 30), "--seed"),
    "negative clip": (("--clip", "-1"), "--clip"),
    "clip that stops training": (("--clip", "0"), "--clip"),
    "no saving": (("--save_every", "0"), "--save_every"),
    "no such device": (("--device", "abacus"), "--device"),
    "device that is not here": (("--device", "cuda:99"), "--device"),
    "no such precision": (("--precision", "int3"), "--precision"),
    "fp16 on the CPU": (("--device", "cpu", "--precision", "fp16"), "--precision"),
}


@pytest.mark.parametrize("kind", BAD_OPTIONS)
def test_bad_option_of_training(refused, sft, dpo, tmp_path, kind):
    options, name = BAD_OPTIONS[kind]
    out = tmp_path / "out"
    for script, arguments in ((train_sft, sft), (train_dpo, dpo)):
        assert name in refused(script, *arguments, "--out_dir", out, *options)
        assert not out.exists()


OTHER_BAD_OPTIONS = (
    (train_sft, "n_head", ("--n_head", "3")),
    (train_sft, "--init_from", ("--init_from", "")),
    (train_sft, "n_head", ("--n_head", "4", "--n_kv_head", "3")),
    (train_sft, "--n_layer", ("--n_layer", "0")),
    (train_sft, "--tokenizer", ("--tokenizer", "gpt5")),
    (train_sft, "gone.tiktoken", ("--tokenizer", "gone.tiktoken")),
    (train_sft, "--out_dir", ("--data", "x.jsonl")),
    (train_dpo, "--beta", ("--beta", "0")),
    (train_dpo, "--beta", ("--beta", "nan")),
    (train_dpo, "--label_smoothing", ("--label_smoothing", "0.6")),
    (train_dpo, "--label_smoothing", ("--label_smoothing", "nan")),
    (train_dpo, "--sft_weight", ("--sft_weight", "-1")),
    (evaluate, "--micro_tokens", ("--micro_tokens", "0")),
    (evaluate, "gone", ("--ckpt", "gone")),
    (sample, "--temperature", ("--temperature", "-0.1")),
    (sample, "--temperature", ("--temperature", "nan")),
    (sample, "not UTF-8", ("--prompt", "caf\udce9")),
    (sample, "--top_p", ("--top_p", "0")),
    (sample, "--top_p", ("--top_p", "nan")),
    (sample, "--top_k", ("--top_k", "-1")),
    (sample, "--samples", ("--samples", "0")),
    (sample, "--preference", ("--preference",)),
    (train_sft, "out of memory", ("--n_embd", "2000000000")),
    (train_sft, "--max_steps", ("--max_steps", "100000000")),
    (sample, "File name too long", ("--ckpt", "a" * 300, "--prompt", "Tea?")),
    (data, "--rows", ("--rows", "-1")),
    (data, "--block_size", ("--block_size", "0")),
)


@pytest.mark.parametrize(("script", "name", "options"), OTHER_BAD_OPTIONS)
def test_bad_option(refused, byte_vocabulary, script, name, options):
    quick = ("--tokenizer", byte_vocabulary) if script is train_sft else ()
    assert name in refused(script, *quick, *options)


# ---------------------------------------------------------------- the output folder


@pytest.mark.parametrize("script", [train_sft, train_dpo])
def test_folder_of_a_finished_run(command, refused, sft, dpo, write_rows, tmp_path, script):
    out, arguments = tmp_path / "out", sft if script is train_sft else dpo
    assert command(script, *arguments, "--out_dir", out)[0] == 0
    assert str(out) in refused(script, *arguments, "--out_dir", out)
    assert "finished" in refused(script, *arguments, "--out_dir", out, "--resume")
    # --overwrite deletes nothing before the new run can begin.
    bad = write_rows("bad.jsonl", "{")
    name = "--data" if script is train_sft else "--pref_data"
    refused(script, *arguments, "--out_dir", out, "--overwrite", name, bad)
    if script is train_dpo:
        long = write_rows("long.jsonl", PAIR | {"preference": "x" * 300})
        refused(script, *arguments, "--out_dir", out, "--overwrite", "--eval_data", long)
    assert command(script, *arguments, "--out_dir", out, "--overwrite")[0] == 0


@pytest.mark.parametrize("script", [train_sft, train_dpo])
def test_folder_of_an_unfinished_run_or_of_something_else(refused, sft, dpo, tmp_path, script):
    arguments = sft if script is train_sft else dpo
    for name in ("config.json", "ckpt.pt", "letter.txt"):
        out = tmp_path / name.split(".")[0]
        out.mkdir()
        (out / name).write_text("mine")
        assert str(out) in refused(script, *arguments, "--out_dir", out)


def test_broken_checkpoint_on_resuming(refused, sft, tmp_path):
    out = tmp_path / "out"
    out.mkdir()
    for content in (b"", b"mine"):
        (out / "ckpt.pt").write_bytes(content)
        message = refused(train_sft, *sft, "--out_dir", out, "--resume")
        assert str(out / "ckpt.pt") in message
    for state in ({"step": 1}, [1], {"step": 1, "run": "another"}):
        torch.save(state, out / "ckpt.pt")
        message = refused(train_sft, *sft, "--out_dir", out, "--resume")
        assert str(out / "ckpt.pt") in message


@pytest.mark.parametrize("script", [train_sft, train_dpo])
def test_out_dir_that_is_a_file_or_below_one(refused, sft, dpo, tmp_path, script):
    arguments = sft if script is train_sft else dpo
    path = tmp_path / "letter.txt"
    path.write_text("mine")
    for out in (path, path / "deeper"):
        assert str(out) in refused(script, *arguments, "--out_dir", out)
    assert path.read_text() == "mine"


def test_overwriting_the_model_that_training_starts_from(refused, dpo, tiny_run):
    """It is the reference too, and would be deleted before anything is trained from it."""
    refused(train_dpo, *dpo, "--out_dir", tiny_run, "--overwrite")
    assert (tiny_run / "model.pt").exists()


def test_cache_that_cannot_be_written(command, dpo, tmp_path):
    """Reference log-probabilities are kept in out/cache, and here `out` is a file."""
    (tmp_path / "out").write_text("mine")
    status, _, err = command(train_dpo, *dpo, "--out_dir", tmp_path / "run")
    assert status == 2 and err.splitlines()[-1].startswith("error: out/cache")


def test_weights_of_another_project_are_not_overwritten(refused, dpo, tmp_path):
    theirs = tmp_path / "theirs"
    theirs.mkdir()
    (theirs / "config.json").write_text('{"model": "gpt2"}')
    (theirs / "model.pt").write_bytes(b"theirs")
    assert "no run of ours" in refused(train_dpo, *dpo, "--out_dir", theirs, "--overwrite")
    assert (theirs / "model.pt").read_bytes() == b"theirs"


def test_too_little_memory_is_not_taken_for_broken_weights(refused, tiny_run, monkeypatch):
    def from_weights(*args):
        raise RuntimeError("DefaultCPUAllocator: can't allocate memory")

    monkeypatch.setattr(sample, "from_weights", from_weights)
    message = refused(sample, "--ckpt", tiny_run, "--prompt", "Tea?")
    assert "out of memory" in message and "config.json" not in message


def test_folder_that_one_may_not_enter(refused, dpo, tmp_path, monkeypatch):
    """As a user who is not root would see it."""
    def is_dir(path, true=Path.is_dir):
        if path.name == "shut":
            raise PermissionError(errno.EACCES, "Permission denied", str(path))
        return true(path)

    monkeypatch.setattr(Path, "is_dir", is_dir)
    shut = tmp_path / "shut"
    assert "shut: Permission denied" in refused(train_dpo, *dpo, "--out_dir", shut)
    assert "shut: Permission denied" in refused(sample, "--ckpt", shut, "--prompt", "Tea?")


def test_first_stage_lies_beside_the_folder_of_the_run(monkeypatch, write_rows, tmp_path):
    class Begun(Exception):
        pass

    def begin(options):
        assert options.micro_tokens == 77 and options.fsdp and options.activation_checkpointing
        raise Begun(options.out_dir)

    monkeypatch.setattr(train_sft, "main", begin)
    rows = str(write_rows("pairs.jsonl", PAIR))
    with pytest.raises(Begun, match=f"{tmp_path}/mine-sft$"):
        train_dpo.main(train_dpo.Options(
            pref_data=rows, out_dir=f"{tmp_path}/mine/", device="cpu", micro_tokens=77,
            activation_checkpointing=True, fsdp=True,
        ))


def test_folder_locked_by_another_process(refused, sft, tmp_path):
    """flock is held by whoever opened the file, so this process can play the other one."""
    out = tmp_path / "out"
    out.mkdir()
    with (out / ".lock").open("w") as other:
        fcntl.flock(other, fcntl.LOCK_EX)
        for options in ((), ("--overwrite",), ("--resume",)):
            message = refused(train_sft, *sft, "--out_dir", out, *options)
            assert str(out) in message and "another process" in message


# ---------------------------------------------------------------- a real process


def test_real_process_ends_with_status_2_and_one_line(tmp_path, write_rows, tiny_run):
    path = write_rows("bad.jsonl", PAIR, "{")
    script = Path(train_dpo.__file__)
    arguments = ["--pref_data", path, "--init_from", tiny_run, "--out_dir", tmp_path / "out"]
    found = subprocess.run(
        [sys.executable, script, *arguments], capture_output=True, text=True, cwd=tmp_path
    )
    assert found.returncode == 2
    assert found.stderr.startswith(f"error: {path}:2: ") and found.stderr.count("\n") == 1
    assert not (tmp_path / "out").exists()


CHATTY = '''
import sys
from dataclasses import dataclass
sys.path.insert(0, {here!r})
import common
@dataclass(frozen=True)
class Options:
    """Print."""
    lines: int = 200  # how many
common.run(lambda options: print("line\\n" * options.lines), Options)
'''


def test_a_reader_who_leaves_is_no_error(tmp_path):
    """As `| head -1` does; what is printed is still in Python's buffer when the reader is gone."""
    path = tmp_path / "chatty.py"
    path.write_text(CHATTY.format(here=str(Path(common.__file__).parent)))
    buffered = {k: v for k, v in os.environ.items() if k != "PYTHONUNBUFFERED"}
    process = subprocess.Popen([sys.executable, str(path)], stdout=subprocess.PIPE,
                               stderr=subprocess.PIPE, text=True, env=buffered)
    process.stdout.close()
    assert process.stderr.read() == "" and process.wait() == 0
