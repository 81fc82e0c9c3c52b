"""bench.py in miniature, beside the peers where they are installed."""

import json

import pytest

import bench
from common import UserError

KEYS = {"pairs_per_second", "peak_gib", "tokens_per_second"}


def last_line(command, *arguments):
    status, out, err = command(bench, *arguments, "--device", "cpu", "--precision", "fp32")
    assert status == 0, err
    return json.loads(out.splitlines()[-1])


def test_training_is_measured_without_a_peer(workplace, command):
    result = last_line(command, "train", "--init_from", "tiny", "--pref_data", "pairs.jsonl",
                       "--pairs", "6", "--rounds", "1")  # fmt: skip
    assert result["nanoAlign"].keys() >= KEYS
    assert 0 < result["nanoAlign"]["step_seconds"] < result["nanoAlign"]["seconds"]
    assert 0 < result["share_of_peak_in_steps"] < 1
    times = [value for key, value in result.items() if key.startswith("time_in_")]
    assert result["time_in_products"] > 0 and sum(times) == pytest.approx(1)
    assert "pairs_per_second_ratio" not in result


def test_training_beside_trl(smol, command):
    pytest.importorskip("trl")
    result = last_line(command, "train", "--init_from", smol, "--pref_data", "pairs.jsonl",
                       "--pairs", "6", "--rounds", "1", "--vs", "trl")  # fmt: skip
    assert result["TRL"].keys() >= KEYS
    assert result["peer"].keys() == {"trl", "datasets", "transformers", "settings"}
    ratio = result["nanoAlign"]["pairs_per_second"] / result["TRL"]["pairs_per_second"]
    assert result["pairs_per_second_ratio"] == pytest.approx(ratio)
    memory = result["nanoAlign"]["peak_gib"] / result["TRL"]["peak_gib"]
    assert result["peak_memory_ratio"] == pytest.approx(memory)


def test_sampling_writes_the_tokens_of_transformers(smol, command, write_rows):
    pytest.importorskip("transformers")
    row = {"preference": "Be brief.", "chosen": "a", "rejected": "b"}
    write_rows("eight.jsonl", *(row | {"prompt": f"What is {word}?"} for word in "abcdefgh"))
    result = last_line(command, "sample", "--init_from", smol, "--pref_data", "eight.jsonl",
                       "--rounds", "1", "--vs", "transformers")  # fmt: skip
    assert result["same_tokens"]
    for size in ("1", "8"):
        both = [result[side][f"tokens_per_second_batch_{size}"]
                for side in ("nanoAlign", "transformers")]  # fmt: skip
        assert result[f"tokens_per_second_ratio_batch_{size}"] == pytest.approx(both[0] / both[1])


@pytest.mark.parametrize(("arguments", "named"), [
    (["jump"], "jump: must be"), (["train", "--vs", "transformers"], "--vs transformers"),
    (["sample"], "--init_from is required"), (["memory", "--sizes", "7B"], "7B"),
    (["memory", "--vs", "trl"], "no peer"),
    (["train", "--vs", "trl", "--lora_rank", "2"], "--lora_rank"),
    (["sample", "--init_from", ".", "--pref_data", "x", "--vs", "transformers"], "--vs transf"),
])  # fmt: skip
def test_bench_names_what_it_cannot_do(arguments, named, command):
    status, _, err = command(bench, *arguments)
    assert status == 2 and named in err and len(err.splitlines()) == 1


def test_sampling_asks_the_first_eight_queries_that_fit(tiny_run, write_rows):
    queries = ["a long query " * 20, *"abcdefgh"]
    rows = [{"prompt": query, "chosen": "x", "rejected": "y"} for query in queries]
    for n, message in ((9, ""), (8, "needs eight different queries .* has 7$")):
        path = write_rows("pairs.jsonl", *rows[:n])
        options = bench.Options("sample", init_from=str(tiny_run), pref_data=str(path))
        if message:
            with pytest.raises(UserError, match=message):
                bench.sampling_prompts(options)
        else:
            assert len({*map(tuple, bench.sampling_prompts(options))}) == 8
