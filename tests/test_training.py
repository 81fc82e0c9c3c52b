"""Both training scripts and the evaluation, run as they are on tiny files and tiny models."""

import json
import math
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

import common
import data
import evaluate
import sample
import train_dpo
import train_sft
import world
from common import UserError
from model import ModelConfig, Transformer, pack
from tiny import (
    ANSWERS,
    DPO,
    SFT,
    command_line,
    dpo,
    lora,
    pairs,
    read_log,
    responses,
    run,
    same,
    sft,
    weights,
)

ROOT = Path(__file__).parents[1]
pytestmark = pytest.mark.usefixtures("workplace")


@pytest.fixture
def passes(monkeypatch):
    """Every forward pass of every model: [(in training mode, with gradient, its tokens), ...]."""
    seen, forward = [], Transformer.forward

    def watched(self, trees, cache=None):
        entered = []
        hook = self.embedding.register_forward_hook(lambda *args: entered.append(args[1][0]))
        try:
            return forward(self, trees, cache)
        finally:
            hook.remove()
            [tokens] = entered
            seen.append((self.training, torch.is_grad_enabled(), tokens.tolist()))

    monkeypatch.setattr(Transformer, "forward", watched)
    return seen


def n_bytes(text):
    return len(text.encode())  # in the byte vocabulary a byte is a token


def trunk_size(row, meta=True):
    """Tokens of the prompt: each text with a mark before it, and the mark of the assistant."""
    texts = [row["prompt"]]
    if meta:
        texts += [row[tier] for tier in ("system", "preference") if tier in row]
        texts += [text for example in row.get("examples", ()) for text in example.values()]
    return sum(1 + n_bytes(text) for text in texts) + 1


# ---------------------------------------------------------------- a step and its parts


@pytest.fixture
def gradients(monkeypatch):
    """The gradient of every step, before it is clipped."""
    seen, update = [], common.update

    def watched(model, *args):
        learned = [p for p in model.parameters() if p.requires_grad]
        seen.append(torch.cat([p.grad.flatten() for p in learned]))
        return update(model, *args)

    monkeypatch.setattr(common, "update", watched)
    return seen


@pytest.mark.parametrize("stage", [sft, dpo, lora])
def test_micro_batches_give_the_large_batch(stage, gradients, write_rows):
    """14 rows in batches of 5, the last one of 4; one pass, a few, and one pass for each row."""
    write_rows("pairs.jsonl", *(row | {"label_prob": i / 13} for i, row in enumerate(pairs())))
    logs, finals = [], []
    for micro_tokens in (100000, 300, 1):
        stage(f"out/{micro_tokens}", epochs=1, micro_tokens=micro_tokens, learning_rate=1e-4)
        logs.append(read_log(f"out/{micro_tokens}"))
        finals.append(weights(f"out/{micro_tokens}"))
    assert len(gradients) == 9
    for cut in (1, 2):
        for step in range(3):
            whole, sum_of_parts = gradients[step], gradients[3 * cut + step]
            assert (whole - sum_of_parts).norm() < 1e-4 * whole.norm()
            for key, value in logs[0][step].items():
                if key == "rewards/accuracies" and step == 0:
                    continue  # the sign of margins that are zero but for rounding
                assert logs[cut][step][key] == pytest.approx(value, rel=1e-4, abs=1e-5), key
        for name, p in finals[0].items():
            assert (finals[cut][name] - p).norm() < 1e-4 * p.norm(), name


def test_short_last_batch_is_a_mean_over_its_own_rows(write_rows):
    """A step of one row in batches of one and of five: the same loss and gradient."""
    write_rows("pairs.jsonl", *pairs()[:1])
    dpo("out/alone", batch_size=1, max_steps=1, sft_weight=1.0)
    dpo("out/large", batch_size=5, epochs=1, sft_weight=1.0)
    [alone], [large] = read_log("out/alone"), read_log("out/large")
    assert alone == large


def test_the_sft_term_of_dpo_is_the_mean_over_the_chosen_answer(write_rows):
    row = pairs()[0]
    write_rows("pairs.jsonl", row)
    dpo("out/a", batch_size=1, max_steps=1, sft_weight=0.5)
    [step] = read_log("out/a")
    n = n_bytes(row["chosen"]) + 1  # the end token
    assert step["loss/sft"] == pytest.approx(-step["logps/chosen"] / n, rel=1e-5)
    assert step["loss"] == pytest.approx(step["loss/dpo"] + 0.5 * step["loss/sft"], rel=1e-5)


@pytest.mark.parametrize("name", ["responses.jsonl", "pairs.jsonl"])
def test_sft_loss_is_the_mean_over_all_learned_tokens(name, byte_tokenizer):
    """Of a file of pairs SFT learns the chosen answers under their meta-prompts, nothing else."""
    sft("out/a", epochs=1, batch_size=20, data=name)
    config = json.loads(Path("out/a/config.json").read_text())["model"]
    fresh = Transformer(ModelConfig(**config)).initialize(torch.Generator().manual_seed(0))
    logps = []
    for row in pairs() if name == "pairs.jsonl" else responses():
        response = row.pop("chosen", None) or row["response"]
        trunk = data.encode(row | {"rejected": ""}, byte_tokenizer, 256).trunk
        learned = [*response.encode(), byte_tokenizer.end]
        with torch.no_grad():
            outputs = fresh(pack([(trunk + learned, [])]))[len(trunk) - 1 : -1]
            logps += fresh.logits(outputs).log_softmax(-1)[range(len(learned)), learned].tolist()
    assert read_log("out/a")[0]["loss"] == pytest.approx(-sum(logps) / len(logps), abs=1e-5)


def test_the_smallest_model_has_a_hidden_layer():
    options = train_sft.Options(n_embd=4, n_head=2, n_kv_head=2, n_layer=1)
    assert train_sft.new_model(options, 10).config.n_hidden == 32


# ---------------------------------------------------------------- tokens that are run


@pytest.mark.parametrize("name", ["responses.jsonl", "pairs.jsonl"])
def test_sft_runs_each_token_of_each_tree_once(name, passes):
    sft("out/a", epochs=2, micro_tokens=300, data=name)
    with_meta = name == "pairs.jsonl"
    expected = 2 * sum(trunk_size(row, with_meta) + n_bytes(row["chosen"]) for row in pairs())
    assert sum(len(tokens) for _, _, tokens in passes) == expected
    assert sum(step["tokens"] for step in read_log("out/a")) == expected


def test_dpo_runs_each_token_of_each_tree_once(passes):
    """In every epoch through the policy, once in all through the reference."""
    dpo("out/a", epochs=2, micro_tokens=300)
    once = sum(trunk_size(r) + n_bytes(r["chosen"]) + n_bytes(r["rejected"]) for r in pairs())
    policy = [tokens for training, _, tokens in passes if training]
    reference = [tokens for training, _, tokens in passes if not training]
    assert sum(map(len, policy)) == 2 * once
    assert sum(map(len, reference)) == once
    assert sum(step["tokens"] for step in read_log("out/a")) == 2 * once


def test_reference_runs_only_the_rows_that_training_visits(passes):
    dpo("out/a", max_steps=1)
    policy, reference = (
        sorted(t for training, _, tokens in passes if training == who for t in tokens)
        for who in (True, False)
    )
    assert policy == reference


def test_evaluation_runs_each_token_of_each_tree_once(passes):
    """Both models: every row's tree, and the query alone once for both rows of a flip."""
    dpo("out/a", max_steps=1)
    passes.clear()
    run(evaluate, ckpt="out/a", pref_data="pairs.jsonl", micro_tokens=300)
    expected = 0
    for i, row in enumerate(pairs()):
        answers = n_bytes(row["chosen"]) + n_bytes(row["rejected"])
        expected += trunk_size(row) + answers
        expected += trunk_size(row, meta=False) + answers if i % 2 == 0 else 0
    assert sum(len(tokens) for _, _, tokens in passes) == 2 * expected
    assert not any(gradient for _, gradient, _ in passes)


def test_block_size_cuts_training_rows_and_no_evaluation(monkeypatch):
    """And rows that do not fit are known before training, though only some are watched."""
    seen, encode_both = [], evaluate.encode_both

    def watched(records, tokenizer, block_size, name):
        seen.append((len(records), block_size))
        return encode_both(records, tokenizer, block_size, name)

    monkeypatch.setattr(evaluate, "encode_both", watched)
    dpo("out/a", max_steps=1, eval_data="pairs.jsonl", block_size=200, eval_pairs=4)
    run(evaluate, ckpt="out/a", pref_data="pairs.jsonl")
    assert seen == 3 * [(len(pairs()), 256)]  # the watched part, all of it at the end, and again


def test_a_row_that_does_not_fit_is_named_and_not_its_partner(write_rows):
    brief, long = pairs()[:2]
    write_rows("long.jsonl", brief, long | {"preference": "Tell me everything. " * 20})
    dpo("out/a", max_steps=1)
    with pytest.raises(UserError, match="long.jsonl:2: field 'preference': with it"):
        run(evaluate, ckpt="out/a", pref_data="long.jsonl")


def test_a_scaled_step_whose_gradient_overflows_is_left_out(tmp_path):
    """As with fp16: weights stay, the scale is halved, and the log is still JSON."""
    model = torch.nn.Linear(2, 1, bias=False)
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    scaler = torch.amp.GradScaler("cpu", init_scale=4.0)
    before = model.weight.detach().clone()
    scaler.scale(model(torch.full((1, 2), math.inf)).sum()).backward()
    norm = common.update(model, optimizer, scaler, 1.0, 0.1)
    assert torch.equal(model.weight, before) and scaler.get_scale() == 2
    common.Log(tmp_path, 0).write(step=1, grad_norm=norm)
    assert (tmp_path / "log.jsonl").read_text() == '{"step": 1, "grad_norm": null}\n'

    scaler.scale(model(torch.ones(1, 2)).sum()).backward()
    assert common.update(model, optimizer, scaler, 10.0, 0.1) == pytest.approx(math.sqrt(2))
    assert torch.allclose(model.weight, before - 0.1) and scaler.get_scale() == 2

    nan = torch.full((1, 2), math.nan)
    scaler.scale(model(nan).sum()).backward()
    common.update(model, optimizer, scaler, 1.0, 0.1)  # the scale is 1 now
    scaler.scale(model(nan).sum()).backward()
    with pytest.raises(UserError, match="never finite"):
        common.update(model, optimizer, scaler, 1.0, 0.1)


# ---------------------------------------------------------------- the path in miniature


def test_bfloat16_starts_at_ln_2_too():
    dpo("out/a", max_steps=1, precision="bf16", micro_tokens=200)
    [step] = read_log("out/a")
    assert step["loss/dpo"] == pytest.approx(math.log(2), abs=0.01)


def test_sft_then_dpo_then_evaluation(write_rows):
    """SFT sees both answers under every preference and under none; DPO teaches to listen."""
    either = [row | {"response": row[answer]} for row in pairs() for answer in ANSWERS]
    speak = [{k: row[k] for k in row if k not in ANSWERS} for row in either]
    write_rows("speak.jsonl", *speak, *responses())
    sft("out/sft", data="speak.jsonl", epochs=40, batch_size=14, learning_rate=1e-2)
    losses = [step["loss"] for step in read_log("out/sft")]
    assert losses[0] > 5 and losses[-1] < 1
    dpo("out/dpo", init_from="out/sft", epochs=60, batch_size=7, learning_rate=5e-3,
        eval_data="pairs.jsonl", eval_every=25)
    steps = [row for row in read_log("out/dpo") if "loss" in row]
    first, last = steps[0], steps[-1]
    assert [step["step"] for step in steps] == list(range(1, len(steps) + 1))
    assert first["loss/dpo"] == pytest.approx(math.log(2), abs=1e-5)
    assert first["rewards/margins"] == pytest.approx(0, abs=1e-5)
    assert last["loss/dpo"] < 0.3 and last["rewards/margins"] > 1
    assert last["loss"] == pytest.approx(last["loss/dpo"] + last["loss/sft"], abs=1e-6)
    assert last["rewards/accuracies"] == 1
    [name] = {name for row in read_log("out/dpo") for name in row.get("eval", ())}
    looks = {row["step"]: row["eval"][name] for row in read_log("out/dpo") if "eval" in row}
    assert sorted(looks) == [*range(0, len(steps), 25), len(steps)]
    assert looks[0]["flip_accuracy"] < looks[len(steps)]["flip_accuracy"] == 1

    written = json.loads(Path("out/dpo/eval.json").read_text())["results"][name]
    run(evaluate, ckpt="out/dpo", pref_data="pairs.jsonl")
    result = json.loads(Path("out/dpo/eval.json").read_text())["results"][name]
    assert result == written
    assert result["pairs"] == 14 and result["flips"] == 7
    assert result["flip_accuracy"] == result["accuracy"] == 1
    assert result["accuracy_no_preference"] == 0.5
    assert result["accuracy_opposite_preference"] == 0
    assert set(result["by_preference_name"]) == {"happy", "sad"}


def test_generated_answers_are_judged_by_their_own_row(monkeypatch):
    rows = world.evaluation_pairs("seen")  # 200: more than a batch
    for side in ANSWERS:
        monkeypatch.setattr(evaluate, "answer", lambda model, tokenizer, batch, n, side=side: [
            row[side] for row in batch])
        found, _ = evaluate.score_generated(None, None, rows, 9)
        shares = {metric: sum(right) / len(right) for metric, (_, right) in found.items()}
        assert shares["generated_all_right"] == (side == "chosen")
        assert shares["generated_on_topic"] == 1
        assert (shares["generated_axes_right"] == 1) == (side == "chosen")


def test_eval_json_has_every_key(monkeypatch, write_rows):
    dpo("out/a", max_steps=1)
    write_rows("single.jsonl", *pairs()[:1])
    train_set, single = data.read_preferences("pairs.jsonl,single.jsonl")
    split = ("seen", world.evaluation_pairs("seen")[:2])
    for row in split[1]:  # in bytes, the world's own preferences do not fit a tiny context
        row.pop("system", None)
        row["preference"] = "Brief."
    monkeypatch.setattr(evaluate, "load_preferences", lambda names: [train_set, single, split])
    run(evaluate, ckpt="out/a", max_new_tokens=5)
    report = json.loads(Path("out/a/eval.json").read_text())
    assert {"time", "command", "reference"} <= report.keys()
    folder = Path.cwd().name
    results = report["results"]
    assert list(results) == [f"{folder}/pairs", f"{folder}/single", "seen"]
    metrics = ["accuracy", "flip_accuracy", "accuracy_no_preference",
               "accuracy_opposite_preference", "rewards_accuracy", "raw_accuracy"]
    for name, result in results.items():
        generated = ["generated_axes_right", "generated_all_right"] if name == "seen" else []
        assert ("generated_axes_right" in result) == (name == "seen")
        for metric in metrics + generated:
            value, interval = result[metric], result[f"{metric}_ci"]
            if result["flips"] == 0 and metric in (metrics[1], metrics[3]):
                assert value is None and interval is None
            else:
                assert 0 <= interval[0] <= value <= interval[1] <= 1
    assert [results[name]["flips"] for name in results] == [7, 0, 1]


def test_evaluation_uses_the_recorded_reference_and_notices_a_changed_one():
    dpo("out/a", max_steps=3)
    run(evaluate, ckpt="out/a", pref_data="pairs.jsonl")
    recorded = json.loads(Path("out/a/eval.json").read_text())["results"]
    run(evaluate, ckpt="out/a", pref_data="pairs.jsonl", reference="tiny")
    assert json.loads(Path("out/a/eval.json").read_text())["results"] == recorded
    shutil.copy("tiny/tokenizer.tiktoken", "copy.tiktoken")  # --overwrite removes the other
    sft("tiny", max_steps=1, overwrite=True, tokenizer="copy.tiktoken")
    with pytest.raises(UserError, match="has changed since"):
        run(evaluate, ckpt="out/a", pref_data="pairs.jsonl")


# ---------------------------------------------------------------- stop and go on


def assert_same_run(a, b):
    """Weights, optimizer, random state and log of two finished runs are equal bit for bit."""
    assert same(weights(a), weights(b))
    last = weights(a, "last.pt")
    assert last["optimizer"]["state"] and {"model", "random_state", "step"} <= last.keys()
    assert same(last, weights(b, "last.pt"))
    assert read_log(a) == read_log(b)


@pytest.mark.parametrize("stage", [sft, dpo])
def test_kill_minus_nine_and_resume(stage, keep_ckpt):
    """SIGKILL at a random moment; nothing is lost but the steps since the last checkpoint."""
    options = {"max_steps": 130, "save_every": 5}
    if stage is dpo:
        options |= {"eval_data": "pairs.jsonl", "eval_every": 7}
    script = "train_sft.py" if stage is sft else "train_dpo.py"
    settings = (SFT if stage is sft else DPO) | options | {"out_dir": "out/cut"}
    line = [sys.executable, ROOT / script, *command_line(settings)]
    wanted, pause = random.randint(6, 60), random.random() / 50  # lines of the log, seconds
    process = subprocess.Popen(line, env=os.environ | {"OMP_NUM_THREADS": "1"},
                               stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    log, ckpt = Path("out/cut/log.jsonl"), Path("out/cut/ckpt.pt")
    while not (ckpt.exists() and len(log.read_bytes().splitlines()) >= wanted):
        assert process.poll() is None
        time.sleep(0.001)
    time.sleep(pause)
    process.send_signal(signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL
    assert not Path("out/cut/model.pt").exists()
    saved = weights("out/cut", "ckpt.pt")["step"]
    assert 0 <= read_log("out/cut")[-1]["step"] - saved <= 5

    before = log.read_bytes().splitlines()[:saved]
    stage("out/cut", **options, resume=True)
    assert log.read_bytes().splitlines()[:saved] == before  # with their seconds
    stage("out/whole", **options)
    assert_same_run("out/cut", "out/whole")


@pytest.mark.parametrize("steps", [1, 2, 3, 4, 5])
@pytest.mark.parametrize("stage", [sft, dpo, lora])
def test_stop_after_any_step_and_resume(stage, steps, keep_ckpt, monkeypatch):
    """Before the first checkpoint too, and where an evaluation falls on a checkpoint or not."""
    options = {"max_steps": 6, "save_every": 3}
    if stage is not sft:
        options |= {"eval_data": "pairs.jsonl", "eval_every": 2}
    update, done = common.update, []

    def stop(*args):
        if len(done) == steps:
            raise KeyboardInterrupt
        done.append(1)
        return update(*args)

    with monkeypatch.context() as patch:
        patch.setattr(common, "update", stop)
        with pytest.raises(KeyboardInterrupt):
            stage("out/cut", **options)
    with pytest.raises(UserError, match="in use"):
        stage("out/cut", **options)
    done.clear()
    with monkeypatch.context() as patch:
        patch.setattr(common, "update", lambda *args: done.append(1) or update(*args))
        stage("out/cut", **options, resume=True)
    assert len(done) == (6 if steps < 3 else 3)
    stage("out/whole", **options)
    assert_same_run("out/cut", "out/whole")


@pytest.mark.parametrize(
    "torn", ['{"step": 6, "lo', '{"step": 6, "eval": {"a": {"accuracy": 0.5}', '{"step": 6}']
)
def test_resume_with_a_torn_last_line_in_the_log(torn, keep_ckpt, monkeypatch):
    options = {"max_steps": 6, "save_every": 5}
    sft("out/whole", **options)
    with monkeypatch.context() as patch:
        patch.setattr(common, "finish_run", lambda *args: None)
        sft("out/cut", **options)
    lines = (Path("out/cut/log.jsonl")).read_text().splitlines()
    Path("out/cut/log.jsonl").write_text("\n".join([*lines[:5], torn]))
    sft("out/cut", **options, resume=True)
    assert read_log("out/cut") == read_log("out/whole")


@pytest.mark.parametrize("changed", ["options", "order", "label_prob"])
def test_resume_with_other_options_or_data_is_an_error(changed, monkeypatch, write_rows):
    with monkeypatch.context() as patch:
        patch.setattr(common, "finish_run", lambda *args: None)
        dpo("out/cut", max_steps=2, save_every=1)
    rows = {
        "options": pairs(),
        "order": pairs()[::-1],
        "label_prob": [row | {"label_prob": 0.9} for row in pairs()],
    }[changed]
    write_rows("pairs.jsonl", *rows)
    with pytest.raises(UserError, match="cannot resume"):
        dpo("out/cut", max_steps=2, beta=0.3 if changed == "options" else 0.2, resume=True)


def test_resume_with_the_same_data_and_model_elsewhere(monkeypatch):
    """The log goes on from step 2, and the run then stands on the model where it lies now."""
    lora("out/whole", max_steps=3, save_every=2)
    with monkeypatch.context() as patch:
        patch.setattr(common, "finish_run", lambda *args: None)
        lora("out/cut", max_steps=3, save_every=2)
    Path("tiny").rename("moved")
    Path("pairs.jsonl").rename("again.jsonl")
    lora("out/cut", max_steps=3, save_every=2, resume=True, init_from="moved",
         pref_data="./again.jsonl")
    assert read_log("out/cut") == read_log("out/whole")
    assert same(weights("out/cut"), weights("out/whole"))
    sample.load_checkpoint("out/cut", torch.device("cpu"))


def test_finished_run_is_not_overwritten():
    dpo("out/a", max_steps=1)
    before = weights("out/a")
    for again in ({}, {"resume": True}):
        with pytest.raises(UserError, match=r"\bfinished"):
            dpo("out/a", max_steps=2, **again)
        with pytest.raises(UserError, match=r"\bfinished"):
            sft("out/a", max_steps=2, **again)
    assert same(weights("out/a"), before) and len(read_log("out/a")) == 1
    dpo("out/a", max_steps=2, overwrite=True)
    assert not same(weights("out/a"), before) and len(read_log("out/a")) == 2


def test_evaluation_does_not_change_training(keep_ckpt):
    for name, options in {
        "never": {}, "rarely": {"eval_data": "pairs.jsonl", "eval_every": 100},
        "often": {"eval_data": "pairs.jsonl", "eval_every": 1, "eval_pairs": 3},
    }.items():
        dpo(f"out/{name}", max_steps=5, save_every=2, seed=3, **options)
        assert same(weights(f"out/{name}"), weights("out/never"))
        states = [weights(f"out/{run}", "last.pt")["random_state"] for run in (name, "never")]
        assert torch.equal(*states)
        steps = [row for row in read_log(f"out/{name}") if "loss" in row]
        assert steps == read_log("out/never")


# ---------------------------------------------------------------- the reference


def test_reference_is_cached_by_all_that_it_depends_on(passes, write_rows, monkeypatch, tmp_path):
    def reference_passes(out_dir, **options):
        passes.clear()
        dpo(out_dir, max_steps=3, **options)
        return sum(not training for training, _, _ in passes)

    assert reference_passes("out/first") > 0
    assert reference_passes("out/second") == 0
    assert same(weights("out/first"), weights("out/second"))
    assert reference_passes("out/other_beta", beta=0.5) == 0
    sft("other_sft", max_steps=1, init_from="tiny")
    assert reference_passes("out/other_weights", init_from="other_sft") > 0
    assert reference_passes("out/no_meta", blank_meta_prompt=True) > 0
    write_rows("pairs.jsonl", *[row | {"rejected": row["rejected"] + " Maybe."} for row in pairs()])
    assert reference_passes("out/other_rows") > 0
    assert reference_passes("out/bf16", precision="bf16") > 0
    (tmp_path / "model.py").write_text("# another\n")
    monkeypatch.setattr(evaluate, "__file__", str(tmp_path / "evaluate.py"))
    assert reference_passes("out/code") > 0


def test_in_bfloat16_both_models_run_under_autocast_and_weights_stay_float32(monkeypatch):
    seen, forward = set(), Transformer.forward

    def watched(self, *args):
        seen.add((self.training, torch.is_autocast_enabled("cpu")))
        return forward(self, *args)

    monkeypatch.setattr(Transformer, "forward", watched)
    dpo("out/a", max_steps=1, precision="bf16", eval_data="pairs.jsonl")
    assert seen == {(True, True), (False, True)}
    assert {p.dtype for p in weights("out/a").values()} == {torch.float32}


def test_cache_depends_on_the_model_config(passes):
    """The same weights with another RoPE base are another reference."""
    dpo("out/one", max_steps=1)
    shutil.copytree("tiny", "other")
    config = json.loads(Path("other/config.json").read_text())
    config["model"]["rope_theta"] = 100.0
    Path("other/config.json").write_text(json.dumps(config))
    passes.clear()
    dpo("out/other", init_from="other", max_steps=1)
    assert any(not training for training, _, _ in passes)


@pytest.mark.parametrize("broken", ["empty", "half", "text", "shape"])
def test_broken_cache_is_an_error_or_made_again(broken):
    dpo("out/first", max_steps=2)
    [cached] = Path("out/cache").iterdir()
    whole = cached.read_bytes()
    if broken == "shape":
        torch.save(torch.load(cached, weights_only=True)[1:], cached)
    else:
        half = whole[: len(whole) // 2]
        cached.write_bytes({"empty": b"", "half": half, "text": b"not a cache"}[broken])
    try:
        dpo("out/second", max_steps=2)
    except UserError as error:
        assert cached.name in str(error)
    else:
        assert same(weights("out/first"), weights("out/second"))


def test_wrong_reference_stops_the_run():
    dpo("out/first", max_steps=2)
    [cached] = Path("out/cache").iterdir()
    wrong = torch.load(cached, weights_only=True)
    wrong[:, 0] += 1.0
    torch.save(wrong, cached)
    with pytest.raises(UserError, match="not the starting model"):
        dpo("out/second", max_steps=2)
    assert not Path("out/second/model.pt").exists()


def test_adapters_are_off_in_evaluation_mode(passes):
    """With LoRA policy and reference are one model, which learns in training mode."""
    lora("out/a", max_steps=3, eval_data="pairs.jsonl", eval_every=1)
    assert {(training, gradient) for training, gradient, _ in passes} == {
        (False, False), (True, True),
    }


def test_reference_stays_frozen_and_in_evaluation_mode(monkeypatch, passes):
    models = []

    def watch(name):
        make = getattr(train_dpo, name)

        def watched(*args):
            models.append(make(*args))
            return models[-1]

        monkeypatch.setattr(train_dpo, name, watched)

    watch("load_start")
    watch("from_weights")
    dpo("out/a", max_steps=3, eval_data="pairs.jsonl", eval_every=1)
    (policy, _), reference = models
    start, _ = sample.load_checkpoint("tiny", torch.device("cpu"))
    trees = pack([([1, 2, 3], [[4, 5], [6, 7, 8]])])
    with torch.no_grad():
        assert torch.allclose(reference(trees), start(trees), atol=1e-5)
        assert not torch.allclose(policy(trees), start(trees), atol=1e-3)
    assert not reference.training
    assert all(p.grad is None for p in reference.parameters())
    assert same(dict(policy.state_dict()), dict(weights("out/a")))
    assert not same(dict(policy.state_dict()), dict(weights("tiny")))
    assert all(training == gradient for training, gradient, _ in passes)


# ---------------------------------------------------------------- what is learned from


def test_static_control_sees_no_meta_prompt(passes):
    special = data.Tokenizer.load("tiny").special
    marks = {special[f"<|{tier}|>"] for tier in ("system", "preference", "example")}

    def marks_seen():
        return {token for _, _, tokens in passes for token in tokens} & marks

    dpo("out/shown", epochs=1)
    assert marks_seen() == marks
    passes.clear()
    dpo("out/hidden", epochs=1, blank_meta_prompt=True)
    assert passes and marks_seen() == set()
    passes.clear()
    run(evaluate, ckpt="out/hidden", pref_data="pairs.jsonl")
    assert marks_seen() == marks  # the control is evaluated with the meta-prompt shown


def test_static_control_is_trained_as_much(gradients, monkeypatch):
    """The same pairs in each step, at the same learning rates."""
    answers, answer_logps = [], train_dpo.answer_logps

    def watched(model, trees):
        answers.append((len(gradients), tuple(trees.targets.tolist())))  # of which step
        return answer_logps(model, trees)

    monkeypatch.setattr(train_dpo, "answer_logps", watched)
    found = []
    for name in ("shown", "hidden"):
        dpo(f"out/{name}", epochs=2.0, micro_tokens=1, blank_meta_prompt=name == "hidden")
        rates = [row["learning_rate"] for row in read_log(f"out/{name}")]
        found.append((sorted(answers), rates))
        answers.clear(), gradients.clear()
    assert found[0] == found[1] and len(found[0][0]) == 28


def test_a_held_out_set_that_shares_prompts_is_told(write_rows, capsys):
    new = [row | {"prompt": f"{row['prompt']} Really?"} for row in pairs()[:2]]
    for rows, said in ((pairs()[:4] + new, "held: 4 of 6 rows ask what training asks"), (new, "")):
        path = write_rows("held.jsonl", *rows)
        dpo("out/a", max_steps=1, eval_data=path, overwrite=True)
        out = capsys.readouterr().out
        assert said in out and ("ask what training asks" in out) == bool(said)


def test_label_prob_of_the_rows_is_used(write_rows):
    """A label that is surely wrong is the opposite one; smoothing 1/4 turns 1 and 0 to 3/4, 1/4."""
    settings = {"max_steps": 3, "sft_weight": 0.0}
    rows = pairs()
    for name, changed in {
        "swapped": [r | {"chosen": r["rejected"], "rejected": r["chosen"]} for r in rows],
        "wrong": [r | {"label_prob": 0.0} for r in rows],
        "some": [r | {"label_prob": [0.75, 0.25][i % 2]} for i, r in enumerate(rows)],
        "sure": [r | {"label_prob": [1.0, 0.0][i % 2]} for i, r in enumerate(rows)],
        # Whole flips, so that the order of training is the same.
        "half": [r | {"label_prob": 1.0 - i // 2 % 2} for i, r in enumerate(rows)],
        "mended": [r | {"chosen": r["rejected"], "rejected": r["chosen"]} if i // 2 % 2 else r
                   for i, r in enumerate(rows)],
    }.items():
        write_rows("pairs.jsonl", *changed)
        smoothing = {"label_smoothing": 0.25} if name == "sure" else {}
        dpo(f"out/{name}", **settings | smoothing)
    losses = {name: [step["loss/dpo"] for step in read_log(f"out/{name}")]
              for name in ("swapped", "wrong", "some", "sure", "half", "mended")}
    assert losses["half"] == pytest.approx(losses["mended"], rel=1e-4)
    assert losses["wrong"] == pytest.approx(losses["swapped"], rel=1e-4)
    assert losses["some"] == losses["sure"]
    assert same(weights("out/some"), weights("out/sure"))
    assert abs(losses["some"][-1] - losses["wrong"][-1]) > 1e-4


def test_scores_compare_the_same_text_when_answers_are_cut(byte_tokenizer):
    """The rows of a flip have meta-prompts of other lengths, their answers are too long: a model
    for which all tokens are equally likely has no margin, with or without the meta-prompt."""
    records = [
        {"preference": "Brief.", "prompt": "Rain?", "chosen": "a" * 90, "rejected": "b" * 70},
        {"preference": "Be brief, please.", "prompt": "Rain?", "chosen": "b" * 70,
         "rejected": "a" * 90},
    ]
    shown, alone = evaluate.encode_both(records, byte_tokenizer, 64, "long")
    assert all(s.answers == a.answers for s, a in zip(shown, alone, strict=True))
    assert shown[0].answers == shown[1].answers[::-1]
    longest = max(len(e.trunk) + max(map(len, e.answers)) for e in shown)
    assert longest == 64


# ---------------------------------------------------------------- what users type first


def test_the_main_command_in_miniature(monkeypatch, capsys):
    """python train_dpo.py: defaults throughout, but for the number of rows."""
    rows = world.SFT_DATA["world"]()[:70]
    monkeypatch.setitem(world.SFT_DATA, "world", lambda: rows)
    monkeypatch.setattr(world, "TRAIN_ROWS", 30)
    monkeypatch.setattr(world, "EVAL_ROWS", 4)
    train_dpo.main(train_dpo.Options(device="cpu"))
    shown = capsys.readouterr().out
    assert "stage one" in shown
    assert [entry["step"] for entry in read_log("out/dpo") if "loss" in entry][-1] == 5
    results = common.load_json(Path("out/dpo/eval.json"))["results"]
    assert list(results) == list(world.SPLITS)
    for name, entry in results.items():
        [line] = [line for line in shown.splitlines() if line.startswith(f"{name} ")]
        for key in ("flip_accuracy", "accuracy", "generated_axes_right", "generated_on_topic"):
            assert f"-> {100 * entry[key]:.1f}" in line
    assert "preference: My train leaves in one minute." in shown
    assert not weights("out/dpo")["embedding.weight"].equal(weights("out/sft")["embedding.weight"])
    train_dpo.first_stage(train_dpo.Options(), Path("out/sft"))  # it is finished: used again
    assert "stage one" not in capsys.readouterr().out


def test_chat(monkeypatch, capsys):
    """Tiers change at any moment, /new forgets turns but not tiers, a refused query is no turn."""
    lines = ["Hi", "/preference Be brief.", "Tea?", "bad", "b\udcffd", "/system  Be kind. ",
             "/what", "", "/new", "Why?", "/preference", "Still?", "/quit", "never"]
    asked = []

    def respond(record):
        asked.append(json.loads(json.dumps(record)))
        if record["prompt"][-1]["content"] == "bad":
            raise UserError("too long")
        return f"answer {len(asked)}"

    monkeypatch.setattr("builtins.input", lambda _: lines.pop(0))
    sample.chat(respond, sample.Options(ckpt="x", system="Rule.", preference=("Be", "polite.")), [])
    said = [[turn["content"] for turn in record["prompt"]] for record in asked]
    assert said == [["Hi"], ["Hi", "answer 1", "Tea?"],
                    ["Hi", "answer 1", "Tea?", "answer 2", "bad"],
                    ["Why?"], ["Why?", "answer 4", "Still?"]]
    tiers = [(record.get("system"), record.get("preference")) for record in asked]
    assert tiers == [("Rule.", "Be polite."), *[("Rule.", "Be brief.")] * 2,
                     ("Be kind.", "Be brief."), ("Be kind.", None)]
    shown = capsys.readouterr().out
    assert all(text in shown for text in ("too long", "not UTF-8", "unknown command /what"))
    assert lines == ["never"]
