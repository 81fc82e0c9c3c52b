"""What several test files share: one thread, a tokenizer, a tiny finished run, a command line."""

import dataclasses
import json
import shutil
import sys

import pytest
import torch

import common
import data
import tiny
from model import ModelConfig, Transformer

torch.set_num_threads(1)


@pytest.fixture(scope="session")
def world_tokenizer():
    return data.load_tokenizer("world")


@pytest.fixture(scope="session")
def byte_tokenizer():
    """A token for each byte, so that lengths can be worked out by hand."""
    return data.Tokenizer("bytes", data.GPT2_PATTERN, {bytes([b]): b for b in range(256)})


@pytest.fixture
def write_rows(tmp_path):
    """write_rows(name, *rows) -> path of a file, a line for each row (object, text or bytes)."""

    def write(name, *rows):
        lines = [row if isinstance(row, str | bytes) else json.dumps(row) for row in rows]
        lines = [line.encode() if isinstance(line, str) else line for line in lines]
        path = tmp_path / name
        path.write_bytes(b"".join(line + b"\n" for line in lines))
        return path

    return write


@pytest.fixture
def tiny_run(tmp_path, byte_tokenizer):
    """Folder of a finished run: a model of one block over bytes, with random weights."""
    folder = tmp_path / "tiny"
    folder.mkdir()
    config = ModelConfig(byte_tokenizer.vocab_size, 256, 1, 2, 1, 16, 32)
    model = Transformer(config).initialize(torch.Generator().manual_seed(0))
    about = {"stage": "sft", "model": dataclasses.asdict(config),
             "tokenizer": byte_tokenizer.describe()}
    common.save_json(folder / "config.json", about)
    common.save_tensors(folder / "model.pt", model.state_dict())
    byte_tokenizer.save(folder)
    return folder


@pytest.fixture
def workplace(tmp_path, monkeypatch, tiny_run, write_rows):
    """The test works in a folder of its own that holds `tiny`, a finished run, and the data."""
    monkeypatch.chdir(tmp_path)
    write_rows("pairs.jsonl", *tiny.pairs())
    write_rows("responses.jsonl", *tiny.responses())


@pytest.fixture
def smol(workplace):
    """Name of a Hugging Face folder in the test's folder, written by transformers."""
    tiny.save_smol("smol")
    return "smol"


@pytest.fixture
def keep_ckpt(monkeypatch):
    """Keep the last checkpoint of a finished run as last.pt: a finished run drops it."""
    finish = common.finish_run

    def keep(folder, model):
        shutil.copy(folder / "ckpt.pt", folder / "last.pt")
        finish(folder, model)

    monkeypatch.setattr(common, "finish_run", keep)


@pytest.fixture
def command(monkeypatch, capfd, tmp_path):
    """command(script, *arguments) -> (exit status, stdout, stderr), as from a shell in tmp_path."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(common, "LOCKS", [])

    def call(script, *arguments):
        common.LOCKS.clear()  # each command is a process of its own: its locks end with it
        monkeypatch.setattr(sys, "argv", [script.__file__, *map(str, arguments)])
        capfd.readouterr()
        status = 0
        try:
            common.run(script.main, script.Options)
        except SystemExit as stop:
            status = stop.code
        return status, *capfd.readouterr()

    return call
