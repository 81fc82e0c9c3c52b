"""Two gloo processes under torchrun against one: the same losses, weights and files."""

import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

import common
import data
import distributed
from tiny import DPO, SFT, command_line, read_log, user_rows, weights

HERE = Path(__file__).parent.parent
EQUAL = {"loss", "loss/dpo", "loss/sft", "rewards/chosen", "rewards/margins",
         "logps/chosen", "rewards/accuracies", "learning_rate"}


LAUNCHER = ["-m", "torch.distributed.run", "--standalone"]


def start(script, processes, **options):
    """A process that runs a training script, alone or under torchrun."""
    launcher = [*LAUNCHER, f"--nproc_per_node={processes}"]
    settings = (SFT if script == "train_sft.py" else DPO) | options
    command = [sys.executable, *(launcher if processes > 1 else []), str(HERE / script),
               *command_line(settings)]
    return subprocess.Popen(command, env=os.environ | {"OMP_NUM_THREADS": "1"}, text=True,
                            stdout=subprocess.PIPE, stderr=subprocess.STDOUT)


def train(script, processes, **options):
    process = start(script, processes, **options)
    out, _ = process.communicate()
    assert process.returncode == 0, out
    return out


def check_same(one, two):
    """Logs of two runs agree to 1e-5, and so do the weights."""
    one_log, two_log = read_log(one), read_log(two)
    assert [row["step"] for row in one_log] == [row["step"] for row in two_log]
    for a, b in zip(one_log, two_log, strict=True):
        for key in EQUAL & a.keys():
            assert b[key] == pytest.approx(a[key], rel=1e-5, abs=1e-5), (key, a["step"])
        if "grad_norm" in a:
            assert b["grad_norm"] == pytest.approx(a["grad_norm"], rel=1e-4)
    a, b = weights(one), weights(two)
    assert a.keys() == b.keys()
    assert max((a[name] - b[name]).abs().max() for name in a) < 1e-4


@pytest.mark.parametrize("how", [{}, {"fsdp": True}, {"lora_rank": 2}])
def test_two_processes_learn_what_one_does(workplace, how):
    """Unequal trees and cuts: five rows a step, the last step has four, few tokens at a time."""
    settings = {"micro_tokens": 100, "epochs": 2.0, "eval_data": "pairs.jsonl", "eval_every": 3}
    train("train_dpo.py", 1, out_dir="out/one", **settings)
    out = train("train_dpo.py", 2, out_dir="out/two", **settings, **how)
    assert out.count("dpo:   0%") == 1  # one process shows its progress
    if "lora_rank" in how:
        train("train_dpo.py", 1, out_dir="out/one", overwrite=True, **settings, **how)
    check_same("out/one", "out/two")
    assert out.count("flips right") == 1  # one process prints


def test_two_processes_learn_to_read_choices(workplace, write_rows):
    write_rows("users.jsonl", *user_rows())
    settings = {"pref_data": "users.jsonl", "context": 4, "latent": 3, "epochs": 2.0}
    train("train_dpo.py", 1, out_dir="out/one", **settings)
    train("train_dpo.py", 2, out_dir="out/two", **settings)
    check_same("out/one", "out/two")


@pytest.mark.parametrize("fsdp", [False, True])
def test_sft_in_two_processes(workplace, fsdp):
    """Each tree a batch, so that one process runs a tree that does not count."""
    train("train_sft.py", 1, out_dir="out/one", micro_tokens=1)
    train("train_sft.py", 2, out_dir="out/two", fsdp=fsdp, micro_tokens=1)
    check_same("out/one", "out/two")


@pytest.mark.parametrize("fsdp", [False, True])
@pytest.mark.parametrize(("first", "then"), [(2, 1), (1, 2)])
def test_resume_on_another_number_of_processes(workplace, first, then, fsdp):
    settings = {"epochs": 40.0, "save_every": 1, "learning_rate": 1e-4}
    train("train_dpo.py", 1, out_dir="out/whole", **settings)
    process = start("train_dpo.py", first, out_dir="out/cut", fsdp=fsdp and first > 1, **settings)
    while not Path("out/cut/ckpt.pt").exists():
        assert process.poll() is None, process.communicate()[0]
        time.sleep(0.01)
    process.terminate()
    process.communicate()
    assert not Path("out/cut/model.pt").exists(), "it finished before it was stopped"
    log, saved = Path("out/cut/log.jsonl"), weights("out/cut", "ckpt.pt")["step"]
    before = log.read_bytes().splitlines()[:saved]
    train("train_dpo.py", then, out_dir="out/cut", fsdp=fsdp and then > 1, resume=True, **settings)
    assert log.read_bytes().splitlines()[:saved] == before  # with their seconds
    check_same("out/whole", "out/cut")


BOTH_STAGES = """
import sys
sys.path.insert(0, {here!r})
import torch, distributed, sample, train_sft
train_sft.main(train_sft.Options(**{options!r}))
sample.load_checkpoint("out/first", torch.device("cpu"))
distributed.leave()
"""


def test_no_process_goes_on_before_the_run_is_written(workplace):
    """What the second stage of each process reads, the first process has written."""
    options = SFT | {"out_dir": "out/first", "device": "cpu"}
    Path("both.py").write_text(BOTH_STAGES.format(here=str(HERE), options=options))
    found = subprocess.run([sys.executable, *LAUNCHER, "--nproc_per_node=2", "both.py"],
                           capture_output=True, text=True)
    assert found.returncode == 0, found.stderr


SHARDED = """
import sys
sys.path.insert(0, {here!r})
import torch, distributed
from model import answer_logps, pack
from sample import load_checkpoint
device = torch.device("cpu")
distributed.start(device)
model = distributed.spread(load_checkpoint("tiny", device)[0].train(), True, device)
distributed.sync_gradients(model, False)
answer_logps(model, pack([([1, 2], [[3, 4]])], device)).sum().backward()
for p in model.parameters():
    assert p.grad.to_local().shape == p.to_local().shape != p.shape
distributed.leave()
"""


def test_fsdp_holds_no_whole_gradient_between_the_passes_of_a_step(workplace):
    Path("sharded.py").write_text(SHARDED.format(here=str(HERE)))
    found = subprocess.run([sys.executable, *LAUNCHER, "--nproc_per_node=2", "sharded.py"],
                           capture_output=True, text=True)
    assert found.returncode == 0, found.stderr


def test_one_process_writes(tmp_path, monkeypatch):
    monkeypatch.setattr(distributed, "RANK", 1)
    common.save_json(tmp_path / "a.json", {})
    common.save_tensors(tmp_path / "a.pt", {})
    common.Log(tmp_path, 0).write(step=1)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("options", [{"pref_data": "none.jsonl"}, {"out_dir": "tiny"}])
def test_an_error_is_one_line_and_the_others_stop(workplace, options):
    process = start("train_dpo.py", 2, **{"out_dir": "out/two"} | options)
    out, _ = process.communicate(timeout=60)
    assert process.returncode != 0 and "error: " in out
    assert f'File "{HERE}' not in out  # torchrun prints a traceback of its own


def test_what_was_printed_before_a_failure_is_not_lost(tmp_path):
    script = f"import sys; sys.path.insert(0, {str(HERE)!r}); import distributed; "
    script += "print('seen'); distributed.leave(2)"
    env = {k: v for k, v in os.environ.items() if k != "PYTHONUNBUFFERED"}
    found = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True,
                           env=env | {"RANK": "0", "WORLD_SIZE": "2"})
    assert (found.returncode, found.stdout) == (2, "seen\n")


def test_shares_cover_a_step_once(byte_tokenizer):
    """Every tree once with weight 1, and equally many batches for each process."""
    generator = torch.Generator().manual_seed(0)
    sizes = torch.randint(1, 60, (11, 3), generator=generator).tolist()
    examples = [data.Example([1] * a, [[2] * b, [3] * c]) for a, b, c in sizes]
    for world in (1, 2, 3, 12):
        found = [data.shares(examples, 120, rank, world) for rank in range(world)]
        assert len({len(batches) for batches in found}) == 1
        rows = [i for batches in found for rows, weight in batches if weight for i in rows]
        assert sorted(rows) == list(range(11))
        assert all(weight in (0.0, 1.0) and rows for batches in found for rows, weight in batches)
        tokens = [sum(data.tree_size(examples[i]) for rows, weight in batches if weight
                      for i in rows) for batches in found]
        if world < 4:
            assert max(tokens) - min(tokens) <= max(map(data.tree_size, examples))
    alone = [rows for rows, _ in data.shares(examples, 120, 0, 1)]
    assert alone == data.micro_batches(examples, 120)


def test_with_fsdp_a_model_is_loaded_into_main_memory(monkeypatch):
    """So that no device has to hold it whole; `spread` moves it, block by block."""
    device = torch.device("meta")
    assert distributed.first_device(device, True) == device  # a single process spreads nothing
    monkeypatch.setattr(distributed, "WORLD", 2)
    assert distributed.first_device(device, False) == device
    assert distributed.first_device(device, True) == torch.device("cpu")
