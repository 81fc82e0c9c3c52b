"""bench.py in miniature, beside the peers where they are installed."""

import json
import os
import sys
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

import bench
import train_dpo
from common import UserError
from sample import load_checkpoint

KEYS = {"pairs_per_second", "peak_gib", "tokens_per_second"}


def last_line(command, *arguments):
    status, out, err = command(bench, *arguments, "--device", "cpu", "--precision", "fp32")
    assert status == 0, err
    return json.loads(out.splitlines()[-1])


def test_training_is_measured_without_a_peer(workplace, command):
    result = last_line(command, "train", "--init_from", "tiny", "--pref_data", "pairs.jsonl",
                       "--pairs", "6", "--rounds", "1")
    assert result["nanoAlign"].keys() >= KEYS
    assert 0 < result["nanoAlign"]["step_seconds"] < result["nanoAlign"]["seconds"]
    assert 0 < result["share_of_peak_in_steps"] < 1
    times = [value for key, value in result.items() if key.startswith("time_in_")]
    assert result["time_in_products"] > 0 and sum(times) == pytest.approx(1)
    assert "pairs_per_second_ratio" not in result


def test_operations_are_counted_by_weight_and_token(workplace, monkeypatch):
    """Six for each weight of the blocks and token of the tree, and of the head and answer token;
    four with adapters."""
    monkeypatch.setattr(bench, "matmul_peak", lambda *arguments: 1.0)
    examples, _ = bench.encoded_rows(bench.Job(".", "tiny", 2, 0, "cpu", "fp32"))
    model, _ = load_checkpoint("tiny", torch.device("cpu"))
    blocks = sum(p.numel() for p in model.blocks.parameters())
    head = model.embedding.weight.numel()
    learned = sum(len(answer) for x in examples for answer in x.answers)
    tokens = learned + sum(len(x.trunk) - 2 for x in examples)  # last tokens are only predicted
    for rank, each in ((0, 6), (2, 4)):
        found = bench.operations(bench.Job(".", "tiny", 2, rank, "cpu", "fp32"))
        assert found["operations"] == each * (blocks * tokens + head * learned)
        assert found["tokens"] == tokens


def test_memory_by_size_in_miniature(command, monkeypatch):
    monkeypatch.setitem(bench.SHAPES, "135M", (2, 2, 1, 16, 24, 2100, True))
    found = last_line(command, "memory", "--sizes", "135M", "--batch_size", "2")["memory_gib"]
    kinds = {"full", "full+checkpointing", "LoRA", "LoRA+checkpointing"}
    assert found["135M"].keys() == {"parameters"} | kinds
    assert all(0 < found["135M"][kind] < 4 for kind in kinds)


def test_prefixes_are_timed_beside_transformers(smol, command):
    pytest.importorskip("transformers")
    found = last_line(command, "prefix", "--init_from", smol, "--vs", "transformers",
                      "--rounds", "1")
    for side in ("nanoAlign", "transformers"):
        seconds = found["prefix_seconds"][side]
        assert seconds.keys() == {"1", "2", "8"} and all(len(x) == 4 for x in seconds.values())
        assert seconds["1"][3] > seconds["1"][0] > 0


def test_peers_get_as_many_kernels_as_onednn_keeps(monkeypatch):
    monkeypatch.setenv("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "256")
    monkeypatch.setattr(torch.backends.cuda, "enable_cudnn_sdp", lambda on: None)
    bench.as_torch_comes()
    assert "ONEDNN_PRIMITIVE_CACHE_CAPACITY" not in os.environ


@pytest.mark.skipif(sys.platform != "linux", reason="getrusage is exact elsewhere")
def test_peak_memory_is_not_that_of_the_parent():
    alone = bench.in_process(dict)["peak_gib"]
    np.ones(2**27)  # 1 GiB, and gone
    assert 0 < bench.in_process(dict)["peak_gib"] < alone + 0.5


def test_memory_of_each_way_of_training_includes_the_reference(monkeypatch, workplace):
    Path("out/cache").mkdir(parents=True)
    seen = []
    monkeypatch.setattr(train_dpo, "main", lambda options: seen.append(Path("out").exists()))
    bench.one_step(SimpleNamespace(folder=".", dpo_options=train_dpo.Options()), False)
    assert seen == [False]


def test_a_killed_process_is_an_error_of_one_line():
    with pytest.raises(UserError, match="^_exit: the process was killed"):
        bench.in_process(partial(os._exit, 9))


def test_training_beside_trl(smol, command):
    pytest.importorskip("trl")
    result = last_line(command, "train", "--init_from", smol, "--pref_data", "pairs.jsonl",
                       "--pairs", "6", "--batch_size", "2", "--rounds", "1",
                       "--vs", "trl")
    ours, theirs = result["nanoAlign"], [result["TRL by 1"], result["TRL by 2"]]
    for side in theirs:
        assert side.keys() >= KEYS
        assert side["loss"] == pytest.approx(ours["loss"], abs=1e-3)
    assert result["peer"].keys() == {"trl", "datasets", "transformers", "settings"}
    best = min(theirs, key=lambda side: side["seconds"])
    ratio = ours["pairs_per_second"] / best["pairs_per_second"]
    assert result["pairs_per_second_ratio"] == pytest.approx(ratio)
    assert result["peak_memory_ratio"] == pytest.approx(ours["peak_gib"] / best["peak_gib"])


def test_sampling_writes_the_tokens_of_transformers(smol, command, write_rows):
    pytest.importorskip("transformers")
    row = {"preference": "Be brief.", "chosen": "a", "rejected": "b"}
    write_rows("eight.jsonl", *(row | {"prompt": f"What is {word}?"} for word in "abcdefgh"))
    result = last_line(command, "sample", "--init_from", smol, "--pref_data", "eight.jsonl",
                       "--rounds", "1", "--vs", "transformers")
    assert result["same_tokens"]
    for size in ("1", "8"):
        both = [result[side][f"tokens_per_second_batch_{size}"]
                for side in ("nanoAlign", "transformers")]
        assert result[f"tokens_per_second_ratio_batch_{size}"] == pytest.approx(both[0] / both[1])
        model, _ = load_checkpoint(smol, torch.device("cpu"))
        n = sum(p.numel() for p in (*model.blocks.parameters(), model.head_weight))
        share = 2 * n * both[0] / (1e9 * result["matmul_gflops"])
        assert result[f"share_of_peak_batch_{size}"] == pytest.approx(share)


@pytest.mark.parametrize(("arguments", "named"), [
    (["jump"], "jump: must be"), (["train", "--vs", "transformers"], "--vs transformers"),
    (["sample"], "--init_from is required"), (["memory", "--sizes", "7B"], "7B"),
    (["memory", "--vs", "trl"], "no peer"),
    (["train", "--vs", "trl", "--lora_rank", "2"], "--lora_rank"),
    (["sample", "--init_from", ".", "--pref_data", "x", "--vs", "transformers"], "--vs transf"),
])
def test_bench_names_what_it_cannot_do(arguments, named, command):
    status, _, err = command(bench, *arguments)
    assert status == 2 and named in err and len(err.splitlines()) == 1


def test_sampling_asks_the_first_eight_queries_that_fit(tiny_run, write_rows):
    queries = ["a long query " * 20, *"abcdefgh"]
    rows = [{"prompt": query, "chosen": "x", "rejected": "y"} for query in queries]
    for n, different in ((9, 8), (4, 3), (1, 0)):
        path = write_rows("pairs.jsonl", *rows[:n])
        options = bench.Options("sample", init_from=str(tiny_run), pref_data=str(path))
        if different:
            prompts = bench.sampling_prompts(options)
            assert len(prompts) == 8 and len({*map(tuple, prompts)}) == different
            found = bench.sample(options, torch.device("cpu"), "fp32")
            assert found["different_prompts"] == different
        else:
            with pytest.raises(UserError, match="no query leaves room for 64"):
                bench.sampling_prompts(options)
