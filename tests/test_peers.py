"""Where `trl` is installed: the same DPO loss, and the same ten steps of training.

With time to wait, the same steps, and logits and greedy tokens, of a pretrained model on real rows:

    SMOLLM2=DIR SMOLLM2_DATA=FILE pytest -s tests/test_peers.py -k smollm2
"""

import json
import math
import os
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

import common
import data
import evaluate
import sample
import train_dpo
from model import generate, pack
from tiny import pairs, read_log, run
from train_dpo import dpo_loss

BETA = 0.2
PAIRS = {"prompt_ids": [[1, 2]], "chosen_ids": [[3, 4]], "rejected_ids": [[5]]}


def trl_trainer(folder, rows, schedule=None, **settings):
    """TRL's DPOTrainer on rows of token ids, in their order, in float32, without dropout.

    folder: a Hugging Face folder. rows: {prompt_ids, chosen_ids, rejected_ids}, lists each.
    schedule: learning rate at a step, as a part of the peak.
    """
    trl = pytest.importorskip("trl")
    import datasets
    import transformers

    class Trainer(trl.DPOTrainer):
        def _prepare_dataset(self, dataset, *args):
            return dataset  # it is tokenised already

        def create_scheduler(self, num_training_steps, optimizer=None):
            optimizer = optimizer or self.optimizer
            self.lr_scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, schedule)
            return self.lr_scheduler

    load = transformers.AutoModelForCausalLM.from_pretrained
    policy, reference = (load(folder, dtype=torch.float32) for _ in range(2))
    arguments = trl.DPOConfig(
        output_dir="out/trl", beta=BETA, max_length=None, bf16=False, use_cpu=True,
        gradient_checkpointing=False, train_sampling_strategy="sequential", logging_steps=1,
        save_strategy="no", report_to="none", disable_tqdm=True, dataloader_pin_memory=False,
        optim="adamw_torch", adam_beta1=0.9, adam_beta2=0.95, adam_epsilon=1e-8, **settings,
    )
    return Trainer(
        policy, reference, arguments, train_dataset=datasets.Dataset.from_dict(rows),
        processing_class=transformers.AutoTokenizer.from_pretrained(folder),
    )


# ---------------------------------------------------------------- the loss


def trl_loss(trainer, policy, reference):
    """Loss, rewards and gradients of one pair in TRL's code.

    policy: (2, T) log-probabilities of the tokens of chosen and rejected, which a model would give;
    reference: (2,) their sums under the reference.
    """
    policy = policy.clone().requires_grad_()
    T = policy.shape[1]
    nothing = torch.zeros(2, T)
    outputs = SimpleNamespace(log_probs=policy, entropy=nothing, mean_logits=nothing,
                              is_top1=nothing.bool())
    inputs = {
        "input_ids": torch.ones(2, T + 1).long(), "attention_mask": torch.ones(2, T + 1).long(),
        "completion_mask": torch.ones(2, T + 1).long(),
        "ref_chosen_logps": reference[:1], "ref_rejected_logps": reference[1:],
    }
    loss = trainer.compute_loss(lambda **_: outputs, inputs)
    loss.backward()
    metrics = trainer._metrics["train"]
    rewards = [metrics[f"rewards/{name}"][-1] for name in ("chosen", "rejected")]
    return loss.item(), rewards, policy.grad[:, 0].tolist()


@pytest.mark.parametrize(("loss_type", "smoothing"), [
    ("sigmoid", 0.0), ("aot", 0.0), ("aot", 0.1), ("aot", 0.5), ("robust", 0.1), ("robust", 0.3),
])
def test_dpo_loss_of_trl(loss_type, smoothing, smol):
    """TRL smooths labels in its sorted loss, which is DPO's where there is one pair, with our
    label_prob 1 - e. Its robust loss ((1 - e) L(m) - e L(-m)) / (1 - 2 e) has what would be the
    label_prob (1 - e) / (1 - 2 e), above 1, in our formula."""
    trainer = trl_trainer(smol, PAIRS)
    trainer.model.train()
    trainer.precompute_ref_logps = True
    trainer.loss_types, trainer.label_smoothing = [loss_type], smoothing
    label_prob = 1 - smoothing
    if loss_type == "robust":
        label_prob /= 1 - 2 * smoothing
    generator = torch.Generator().manual_seed(0)
    losses = []
    for scale in (0.1, 1.0, 1.0, 3.0, 20.0):
        policy = -scale * torch.rand(2, 9, generator=generator)
        reference = policy.sum(1) + scale * torch.randn(2, generator=generator)
        loss, rewards, gradients = trl_loss(trainer, policy, reference)
        sums = policy.sum(1, keepdim=True).requires_grad_()
        ours = dpo_loss(sums[0], sums[1], reference[:1], reference[1:], BETA, label_prob)
        ours[0].sum().backward()
        assert ours[0].item() == pytest.approx(loss, rel=1e-5, abs=1e-6)
        assert [x.item() for x in ours[1:]] == pytest.approx(rewards, rel=1e-5, abs=1e-6)
        assert sums.grad[:, 0].tolist() == pytest.approx(gradients, rel=1e-4, abs=1e-7)
        losses.append(loss)
    assert max(losses) - min(losses) > 0.5


# ---------------------------------------------------------------- ten steps


def our_steps(folder, file, rate, n_steps, n_pairs):
    """train_dpo.py as it is: its log, a dict for each step."""
    run(train_dpo, pref_data=file, init_from=folder, out_dir="out/ours", beta=BETA, sft_weight=0,
        max_steps=n_steps, batch_size=n_pairs, learning_rate=rate, warmup_steps=2,
        weight_decay=0.1, clip=1.0)
    return read_log("out/ours")


def their_steps(folder, file, rate, n_steps, n_pairs):
    """The same rows in the same order through DPOTrainer.train: its log."""
    [(_, records)] = data.read_preferences(file)
    tokenizer, block_size = sample.load_tokenizer(folder)
    examples = data.encode_all(records, tokenizer, block_size, file)
    order = common.DataOrder(evaluate.flip_groups(records), n_pairs, 1, n_steps, 0).rows
    rows = {"prompt_ids": [examples[i].trunk for i in order],
            "chosen_ids": [examples[i].answers[0] for i in order],
            "rejected_ids": [examples[i].answers[1] for i in order]}
    trainer = trl_trainer(
        folder, rows, lambda step: common.learning_rate(step, n_steps, 2, 1.0), max_steps=n_steps,
        per_device_train_batch_size=n_pairs, learning_rate=rate, weight_decay=0.1,
        max_grad_norm=1.0,
    )
    trainer.train()
    return [row for row in trainer.state.log_history if "loss" in row]


KEYS = ("loss", "grad_norm", "rewards/margins", "logps/chosen", "logps/rejected")


def compare_steps(folder, rows, rate, n_steps=10, n_pairs=4):
    """Train on rows (records) from a Hugging Face folder with nanoAlign and with TRL, and compare.

    Prints both logs; loss and gradient norm must agree at each step, and the loss must fall.
    """
    Path("rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    both = [steps(folder, "rows.jsonl", rate, n_steps, n_pairs)
            for steps in (our_steps, their_steps)]
    print("\nstep           " + "".join(f"{key:>16}" for key in KEYS))
    for step, pair in enumerate(zip(*both, strict=True)):
        for name, row in zip(("nanoAlign", "TRL"), pair, strict=True):
            print(f"{step + 1:<4} {name:<10}" + "".join(f"{row[key]:>16.6f}" for key in KEYS))
    ours, theirs = ([[row[key] for row in rows] for key in KEYS] for rows in both)
    assert len(ours[0]) == n_steps
    assert ours[0][0] == pytest.approx(math.log(2), abs=1e-4)
    assert min(theirs[0]) < math.log(2) - 0.05
    assert ours[0] == pytest.approx(theirs[0], abs=1e-4)
    assert ours[1] == pytest.approx(theirs[1], rel=0.01)
    assert ours[2] == pytest.approx(theirs[2], abs=1e-3)
    for i in (3, 4):
        assert ours[i] == pytest.approx(theirs[i], abs=1e-2)


def test_ten_steps_of_trl(smol):
    compare_steps(smol, pairs(), 1e-3)


@pytest.mark.skipif("SMOLLM2" not in os.environ, reason="minutes; see the top of this file")
def test_ten_steps_of_trl_on_smollm2(workplace):
    """Three batches of rows that share flips, so that ten steps see each row three times."""
    folder = Path(os.environ["SMOLLM2"]).resolve()
    lines = Path(os.environ["SMOLLM2_DATA"]).read_text().splitlines()[:12]
    compare_steps(folder, map(json.loads, lines), float(os.environ.get("SMOLLM2_RATE", 5e-6)))


@pytest.mark.skipif("SMOLLM2" not in os.environ, reason="minutes; see the top of this file")
def test_logits_and_greedy_tokens_of_smollm2():
    """50 prompts, each under its preference: ids, logits, and the first 64 greedy tokens."""
    transformers = pytest.importorskip("transformers")
    folder = Path(os.environ["SMOLLM2"])
    theirs = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    their_tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    ours, tokenizer = sample.load_checkpoint(folder, torch.device("cpu"))
    [(_, records)] = data.read_preferences(os.environ["SMOLLM2_DATA"])
    largest = 0.0
    for record in records[: 50 * 4 : 4]:
        turns = [{"role": "system", "content": record["preference"]},
                 {"role": "user", "content": record["prompt"].strip()}]
        ids = tokenizer.render(record | {"prompt": record["prompt"].strip()})
        assert ids == their_tokenizer.apply_chat_template(
            turns, add_generation_prompt=True, tokenize=True, return_dict=False
        )
        with torch.no_grad():
            expected = theirs(torch.tensor([ids])).logits[0]
            found = ours.logits(ours(pack([(ids, [])])))
        largest = max(largest, (expected - found).abs().max().item())
        written = theirs.generate(torch.tensor([ids]), max_new_tokens=64, do_sample=False,
                                  pad_token_id=tokenizer.end)[0, len(ids):].tolist()
        [mine] = generate(ours, [ids], tokenizer.ends, 64)
        assert mine == [token for token in written if token != tokenizer.end]
    print(f"largest difference of a logit: {largest:.1e}")
    assert largest < 1e-4
