"""LoRA: adapters that change nothing at first, and nothing but themselves later."""

import dataclasses
import json
import math
import shutil
from pathlib import Path

import pytest
import torch

import common
import data
import evaluate
import sample
import train_sft
from common import UserError
from model import AdaptersOff, Linear, adapt, answer_logps, generate, pack
from tiny import (
    dpo,
    draw_trees,
    has_adapters,
    lora,
    new_model,
    pairs,
    read_log,
    run,
    same,
    sft,
    weights,
)

pytestmark = pytest.mark.usefixtures("workplace")
CPU = torch.device("cpu")


def train(model, trees, n_steps):
    """Some steps as a run takes them: (losses, the optimizer)."""
    optimizer, losses = common.adamw(model, 1e-2, 0.1), []
    scaler = torch.amp.GradScaler("cpu", enabled=False)
    for _ in range(n_steps):
        loss = -answer_logps(model, trees).mean()
        loss.backward()
        losses.append(loss.item())
        assert {n for n, p in model.named_parameters() if p.grad is not None} == adapters(model)
        common.update(model, optimizer, scaler, 1.0, 1e-2)
    return losses, optimizer


def adapters(model):
    """Names of the adapters that a model of two blocks has."""
    layers = ("attention.qkv", "attention.out", "mlp.gate_up", "mlp.down")
    return {f"blocks.{i}.{layer}.{x}" for i in range(len(model.blocks)) for layer in layers
            for x in ("lora_a", "lora_b")}


def logps(model, trees):
    with torch.no_grad():
        return answer_logps(model, trees)


def logps_of_pairs(model, tokenizer):
    [(_, records)] = data.read_preferences("pairs.jsonl")
    examples = data.encode_all(records, tokenizer, model.config.block_size, "pairs")
    return evaluate.pair_logps(model, examples, 4096)


# ---------------------------------------------------------------- adapters


def test_adapter_worked_by_hand():
    """Rank 2: the weight gets 16 / 2 = 8 times B A; here that is 8 at (0, 1) and -16 at (2, 0)."""
    layer = Linear(2, 3)
    layer.add_adapter(2, torch.Generator().manual_seed(0))
    before = layer.weight.detach().clone()
    with torch.no_grad():
        layer.lora_a.copy_(torch.tensor([[0.0, 1.0], [2.0, 0.0]]))
        layer.lora_b.copy_(torch.tensor([[1.0, 0.0], [0.0, 0.0], [0.0, -1.0]]))
    change = torch.tensor([[0.0, 8.0], [0.0, 0.0], [-16.0, 0.0]])
    assert torch.equal(layer.merged(), before + change)
    x = torch.tensor([[3.0, 5.0]])
    expected = x @ before.t() + layer.bias + torch.tensor([[40.0, 0.0, -48.0]])
    assert torch.allclose(layer(x), expected, atol=1e-5)


def test_new_adapters_change_nothing_and_are_all_that_is_trained():
    model, trees = new_model(), pack(draw_trees(2))
    before, outputs = {n: p.clone() for n, p in model.named_parameters()}, logps(model, trees)
    adapt(model, 3)
    assert torch.equal(logps(model, trees), outputs)
    trained = common.trained(model)
    assert trained.keys() == adapters(model)
    for name, p in trained.items():
        layer = model.get_submodule(name.rpartition(".")[0])
        shape = (3, layer.in_features) if name.endswith("a") else (layer.out_features, 3)
        assert p.shape == shape and p.dtype == torch.float32
        assert (p == 0).all() == name.endswith("b")
    rest = {n: p for n, p in model.named_parameters() if n not in trained}
    assert same(dict(rest), before)
    adapt(again := new_model(), 3, seed=0)
    assert same(common.trained(again), trained)
    adapt(again := new_model(), 3, seed=1)
    assert not same(common.trained(again), trained)


def test_training_changes_the_adapters_and_nothing_else():
    model, trees = new_model(), pack(draw_trees(2))
    before = {n: p.clone() for n, p in model.named_parameters()}
    adapt(model, 3)
    start = {n: p.clone() for n, p in common.trained(model).items()}
    losses, optimizer = train(model, trees, 5)
    assert losses[-1] < losses[0] - 0.5
    assert {p for group in optimizer.param_groups for p in group["params"]} == set(
        common.trained(model).values())
    assert len(optimizer.state) == len(start)
    for name, p in model.named_parameters():
        assert torch.equal(p, before[name]) if name in before else not torch.equal(p, start[name])


def test_adapters_off_is_the_model_without_them_also_after_training():
    model, trees, prompts = new_model(), pack(draw_trees(2)), [[1, 2, 3], [4, 5]]
    before, answers = logps(model, trees), generate(model, prompts, (), 10)
    adapt(model, 3)
    off = AdaptersOff(model)
    assert torch.equal(logps(off, trees), before)
    train(model, trees, 5)
    after = logps(model, trees)
    assert (after - before).abs().min() > 0.1
    assert torch.equal(logps(off, trees), before)
    assert generate(off, prompts, (), 10) == answers != generate(model, prompts, (), 10)
    assert torch.equal(logps(model, trees), after)  # they are on again
    with pytest.raises(TypeError):
        off(dataclasses.replace(trees, tokens=None))
    assert torch.equal(logps(model, trees), after)  # also when something went wrong
    assert off.config is model.config


def test_merged_adapters_give_the_adapted_model():
    model, trees = new_model(), pack(draw_trees(2))
    before = logps(model, trees)
    adapt(model, 3)
    train(model, trees, 5)
    adapted = logps(model, trees)
    adapt(model, 0)
    assert not has_adapters(model)
    assert all(p.requires_grad for p in model.parameters())
    merged = logps(model, trees)
    assert ((merged - adapted) / adapted).abs().max() < 1e-5
    assert (merged - before).abs().min() > 0.1
    adapt(model, 2)  # new ones on top of the merged ones
    assert torch.equal(logps(model, trees), merged)


# ---------------------------------------------------------------- runs


@pytest.fixture
def policies(monkeypatch):
    """The models that runs have trained, as they were when their run ended."""
    seen, finish = [], common.finish_run

    def watched(folder, model):
        seen.append(model)
        finish(folder, model)

    monkeypatch.setattr(common, "finish_run", watched)
    return seen


def test_run_writes_its_adapters_alone_and_loads_again(policies):
    lora("out/a", max_steps=4, lora_rank=3, learning_rate=1e-2)
    [policy] = policies
    saved = weights("out/a", "adapters.pt")
    assert not Path("out/a/model.pt").exists() and not Path("out/a/ckpt.pt").exists()
    assert saved.keys() == adapters(policy) and same(saved, common.trained(policy))
    first = read_log("out/a")[0]
    assert first["loss/dpo"] == pytest.approx(math.log(2), abs=1e-5)
    assert first["rewards/margins"] == pytest.approx(0, abs=1e-5)

    model, tokenizer = sample.load_checkpoint("out/a", CPU)
    found = logps_of_pairs(model, tokenizer)
    assert torch.equal(found, logps_of_pairs(policy, tokenizer))
    base, _ = sample.load_checkpoint("tiny", CPU)
    before = logps_of_pairs(base, tokenizer)
    assert torch.equal(logps_of_pairs(AdaptersOff(model), tokenizer), before)
    assert (found - before).abs().min() > 1e-3


def test_dpo_with_lora_learns_to_listen(policies):
    """The tiny model is random; SFT of all of it, then adapters: most flips right, as evaluated."""
    sft("out/sft", data="pairs.jsonl", epochs=25, batch_size=14, learning_rate=1e-2)
    lora("out/dpo", init_from="out/sft", epochs=60, batch_size=7, learning_rate=2e-2, lora_rank=4,
         eval_data="pairs.jsonl", eval_every=50)
    steps = [row for row in read_log("out/dpo") if "loss" in row]
    assert steps[0]["loss/dpo"] == pytest.approx(math.log(2), abs=1e-5)
    assert steps[-1]["loss/dpo"] < 0.3 and steps[-1]["rewards/accuracies"] == 1
    [(name, written)] = json.loads(Path("out/dpo/eval.json").read_text())["results"].items()
    assert written["flip_accuracy"] == written["rewards_accuracy"] == 1
    run(evaluate, ckpt="out/dpo", pref_data="pairs.jsonl")
    assert json.loads(Path("out/dpo/eval.json").read_text())["results"][name] == written
    run(evaluate, ckpt="out/dpo", pref_data="pairs.jsonl", reference="out/sft")
    assert json.loads(Path("out/dpo/eval.json").read_text())["results"][name] == written


@pytest.mark.parametrize("rank", [0, 3])
def test_dpo_on_top_of_an_sft_run_with_lora(rank, policies):
    """It starts at ln 2 from the adapted model, and that model is its reference ever after."""
    sft("out/sft", init_from="tiny", lora_rank=2, max_steps=5, learning_rate=3e-2)
    start, tokenizer = sample.load_checkpoint("out/sft", CPU)
    assert has_adapters(start)
    expected = logps_of_pairs(start, tokenizer)
    tiny, _ = sample.load_checkpoint("tiny", CPU)
    assert (expected - logps_of_pairs(tiny, tokenizer)).abs().min() > 0.1

    dpo("out/dpo", init_from="out/sft", lora_rank=rank, max_steps=4, learning_rate=1e-2)
    first, *_, last = read_log("out/dpo")
    assert first["loss/dpo"] == pytest.approx(math.log(2), abs=1e-5)
    assert last["rewards/margins"] != 0
    model, _ = sample.load_checkpoint("out/dpo", CPU)
    assert torch.equal(logps_of_pairs(model, tokenizer), logps_of_pairs(policies[-1], tokenizer))
    if rank:
        off = logps_of_pairs(AdaptersOff(model), tokenizer)
        assert torch.allclose(off, expected, rtol=1e-5)


def test_lora_in_bfloat16(policies):
    """The frozen layers are bfloat16, the adapters are not, and the run loads as it was."""
    lora("out/a", max_steps=4, precision="bf16", learning_rate=1e-2)
    [policy] = policies
    kinds = {n: p.dtype for n, p in policy.named_parameters()}
    rounded = {name for name, kind in kinds.items() if kind == torch.bfloat16}
    assert rounded == {n.replace("lora_a", "weight") for n in adapters(policy) if "lora_a" in n}
    assert read_log("out/a")[0]["loss/dpo"] == pytest.approx(math.log(2), abs=0.01)
    model, tokenizer = sample.load_checkpoint("out/a", CPU, torch.bfloat16)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = logps_of_pairs(model, tokenizer)
        assert torch.equal(found, logps_of_pairs(policy, tokenizer))


def test_interrupted_run_leaves_a_small_checkpoint(monkeypatch):
    """What resuming needs is the adapters and their optimizer state; not the frozen weights."""
    with monkeypatch.context() as patch:
        patch.setattr(common, "finish_run", lambda *args: None)
        lora("out/a", max_steps=3, save_every=2)
    state = weights("out/a", "ckpt.pt")
    names = [name for name in state["model"] if "lora_" not in name]
    assert names == [] and len(state["optimizer"]["state"]) == len(state["model"]) == 8
    lora("out/a", max_steps=3, save_every=2, resume=True)
    assert weights("out/a").keys() == state["model"].keys()


def test_overwriting_with_and_without_lora():
    """No weights of the run before are left that a later load would find first."""
    for rank, name in ((2, "adapters.pt"), (0, "model.pt"), (3, "adapters.pt")):
        dpo("out/a", max_steps=1, lora_rank=rank, overwrite=Path("out/a").exists())
        assert [p.name for p in Path("out/a").glob("*.pt")] == [name]
        assert has_adapters(sample.load_checkpoint("out/a", CPU)[0]) == (rank > 0)


# ---------------------------------------------------------------- refusals


@pytest.mark.parametrize("on_top", [False, True])
def test_adapters_of_a_changed_or_missing_base_are_refused(on_top):
    lora("out/a", max_steps=1)
    if on_top:
        lora("out/b", init_from="out/a", max_steps=1)
    folder = "out/b" if on_top else "out/a"
    sample.load_checkpoint(folder, CPU)
    base = weights("tiny")
    common.save_tensors(Path("tiny/model.pt"), {n: p + 1e-3 for n, p in base.items()})
    with pytest.raises(UserError, match=r"tiny: has changed since .*out/a was trained from it"):
        sample.load_checkpoint(folder, CPU)
    common.save_tensors(Path("tiny/model.pt"), base)
    sample.load_checkpoint(folder, CPU)  # the same weights, written again
    shutil.rmtree("tiny")
    with pytest.raises(UserError, match="out/a: the model that it started from is not at .*tiny"):
        sample.load_checkpoint(folder, CPU)


def test_retrained_adapters_are_another_reference():
    lora("out/a", max_steps=1)
    lora("out/b", init_from="out/a", max_steps=1)
    lora("out/a", max_steps=2, overwrite=True)
    with pytest.raises(UserError, match=r"out/a: has changed since .*out/b was trained from it"):
        sample.load_checkpoint("out/b", CPU)


def test_no_run_replaces_what_its_starting_model_stands_on():
    lora("out/a", max_steps=1)
    lora("out/b", init_from="out/a", max_steps=1)
    before = weights("out/a")
    for folder in ("out/a", "out/b", "tiny"):
        with pytest.raises(UserError, match=f"--out_dir {folder}: is the folder of the starting"):
            lora(folder, init_from="out/b", max_steps=1, overwrite=True)
    assert same(weights("out/a"), before)


def test_the_same_adapters_on_another_base_are_other_weights(capsys):
    """The reference's cache is found by this hash. At rate 0 the adapters stay as they began."""
    sft("other", init_from="tiny", max_steps=1)
    out = capsys.readouterr().out
    assert "--n_embd is left aside" in out and "--tokenizer is left aside" in out
    for base in ("tiny", "other"):
        sft(f"out/{base}", init_from=base, lora_rank=2, max_steps=1, learning_rate=0)
    assert same(weights("out/tiny"), weights("out/other"))
    trained, whole = (sum(p.numel() for p in weights(f).values()) for f in ("out/tiny", "tiny"))
    line = f"out/tiny: trains {trained:,} of {trained + whole:,} parameters"
    assert line in capsys.readouterr().out
    assert sample.weights_hash("out/tiny") != sample.weights_hash("out/other")


@pytest.mark.parametrize("broken", ["missing", "more", "rank", "half", "numbers", "list"])
def test_broken_adapters_are_refused(broken):
    lora("out/a", max_steps=1)
    path = Path("out/a/adapters.pt")
    saved = weights("out/a")
    first = next(iter(saved))
    if broken == "half":
        path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    else:
        torch.save({
            "missing": {n: p for n, p in saved.items() if n != first},
            "more": saved | {"norm.weight": torch.ones(16)},
            "rank": {n: p[:1] if n.endswith("a") else p[:, :1] for n, p in saved.items()},
            "numbers": dict.fromkeys(saved, 0.5),
            "list": [*saved.values()],
        }[broken], path)
    with pytest.raises(UserError, match=r"adapters\.pt"):
        sample.load_checkpoint("out/a", CPU)


def test_resuming_with_another_rank_is_refused(monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr(common, "finish_run", lambda *args: None)
        lora("out/a", max_steps=2, save_every=1)
    for rank in (0, 3):
        with pytest.raises(UserError, match="cannot resume"):
            lora("out/a", max_steps=2, save_every=1, resume=True, lora_rank=rank)


def test_lora_needs_a_model_to_start_from():
    with pytest.raises(UserError, match="--lora_rank needs a model to start from"):
        run(train_sft, data="pairs.jsonl", tokenizer="tiny/tokenizer.tiktoken", out_dir="out/a",
            lora_rank=2)
    assert not Path("out").exists()


def test_activation_checkpointing_and_block_size(write_rows):
    """Activation checkpointing: the same log and weights. A block size cuts what is longer."""
    lora("out/a", max_steps=4)
    lora("out/b", max_steps=4, activation_checkpointing=True)
    assert read_log("out/a") == read_log("out/b") and same(weights("out/a"), weights("out/b"))
    write_rows("pairs.jsonl", *[row | {"prompt": row["prompt"] * 5} for row in pairs()])
    lora("out/whole", max_steps=1, batch_size=14)
    lora("out/cut", max_steps=1, batch_size=14, block_size=120)
    whole, cut = (read_log(name)[0]["tokens"] for name in ("out/whole", "out/cut"))
    assert cut < whole
