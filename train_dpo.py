"""Stage two, learn to listen: DPO on pairs whose label depends on the meta-prompt.

    python train_dpo.py                                     # the whole path on the built-in world
    python train_dpo.py --pref_data FILE[,FILE...] --out_dir DIR [--init_from DIR]
"""

import dataclasses
import json
import math
import time
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F

import common
import data
import distributed
import evaluate
import few_shot
import train_sft
import world
from common import UserError
from model import AdaptersOff, adapt, add_latent, answer_logps, for_inference, from_weights, pack
from sample import load_start, print_side_by_side, start_of


@dataclass(frozen=True)
class Options:
    """Direct preference optimisation, conditioned on system message, preference and examples."""

    pref_data: str = "world"  # world, users, told, or preference files, separated by commas
    eval_data: str = ""  # held-out preference files; the world brings its own
    context: int = 0  # few-shot: show up to this many other choices of a row's user
    latent: int = 0  # channels of a latent that carries them (NP-DPO); 0: they are text
    init_from: str = ""  # finished run, Hugging Face folder or org/name; default: an SFT run
    out_dir: str = ""  # folder of this run; default for the world: out/dpo
    overwrite: bool = False  # replace a run that is there
    resume: bool = False  # go on with an unfinished run
    blank_meta_prompt: bool = False  # static control: hide every meta-prompt in training
    beta: float = 0.2  # DPO's temperature
    sft_weight: float = 1.0  # weight of the chosen answer's mean negative log-likelihood
    btl_weight: float = 1.0  # with --latent: weight of NP-BTL's loss, by which z alone is to choose
    fsdp: bool = False  # under torchrun, spread weights, gradients and optimizer over processes
    lora_rank: int = 0  # train adapters of this rank on a frozen model; 0: train the model
    activation_checkpointing: bool = False  # run blocks twice instead of keeping what they compute
    block_size: int = 0  # cut training rows to this many tokens; 0: the model's context
    label_smoothing: float = 0.0  # e turns a label's probability p into (1 - e) p + e (1 - p)
    epochs: float = 4.0  # passes over the data
    max_steps: int = 0  # stop after this many steps instead; 0: as many as the epochs take
    batch_size: int = 24  # pairs a step; an even number splits no flip where each row is in one
    micro_tokens: int = 4096  # tree tokens of one forward pass; changes memory, not the result
    learning_rate: float = 2e-3  # peak
    warmup_steps: int = 30  # linear, before the cosine to a fiftieth of the peak
    weight_decay: float = 0.1  # AdamW's, on matrices
    clip: float = 1.0  # largest gradient norm
    eval_every: int = 125  # steps between evaluations of a fixed part of the evaluation data
    eval_pairs: int = 40  # how many pairs of each evaluation set that is
    save_every: int = 100  # steps between checkpoints to resume from
    log_every: int = 10  # steps between printed lines; log.jsonl has every step
    seed: int = 0  # of data order, contexts, new adapters and latent
    device: str = "auto"  # auto, cpu, cuda, cuda:N, mps
    precision: str = "auto"  # auto, bf16, fp16, fp32

    def __post_init__(self):
        common.at_least(
            self, 1, "batch_size", "micro_tokens", "eval_every", "eval_pairs", "save_every",
            "log_every",
        )
        common.at_least(
            self, 0, "sft_weight", "btl_weight", "epochs", "max_steps", "learning_rate",
            "warmup_steps", "weight_decay", "seed", "lora_rank", "block_size", "context",
            "latent",
        )
        if self.fsdp and (self.lora_rank or self.latent):
            raise UserError("--fsdp trains the whole model: leave out --lora_rank and --latent")
        if self.context and self.blank_meta_prompt:
            raise UserError("--context and --blank_meta_prompt exclude each other")
        common.above_zero(self, "beta", "clip")
        if not 0 <= self.label_smoothing <= 0.5:
            raise UserError(f"--label_smoothing must be 0 to 0.5, not {self.label_smoothing}")


def dpo_loss(
    policy_chosen_logps, policy_rejected_logps, reference_chosen_logps, reference_rejected_logps,
    beta, label_prob=1.0,
):
    """The DPO loss of each pair (Rafailov et al. 2023, arXiv:2305.18290, Eq. 7).

    policy_*_logps, reference_*_logps: (pairs,) float32, sums over the answer's tokens, nats.
    beta: DPO's temperature. label_prob: scalar or (pairs,), how likely the label is right.
    Returns losses, chosen_rewards, rejected_rewards: (pairs,) each.
    """
    chosen_rewards = beta * (policy_chosen_logps - reference_chosen_logps)
    rejected_rewards = beta * (policy_rejected_logps - reference_rejected_logps)
    margins = chosen_rewards - rejected_rewards
    losses = -label_prob * F.logsigmoid(margins) - (1 - label_prob) * F.logsigmoid(-margins)
    return losses, chosen_rewards, rejected_rewards


def check_first_step(losses, margins, lengths, beta, precision):
    """Before training policy and reference are the same model: every loss must be ln 2.

    Two batches of other shapes may round differently, by `each` nats a token, at random.
    """
    each = {"fp32": 1e-3, "bf16": 0.1, "fp16": 0.05}[precision]
    tolerance = beta * each * math.sqrt(lengths.max())
    furthest = torch.stack([margins, losses - math.log(2)]).abs().max()
    if not furthest <= tolerance:  # NaN too
        raise UserError(
            f"step 0: DPO loss {losses.mean():.4f} instead of 0.6931, largest margin "
            f"{margins.abs().max():.4f}: the reference is not the starting model"
        )


# ---------------------------------------------------------------- evaluation while training


class Watch:
    """A fixed part of each evaluation set, scored again and again while the policy trains."""

    def __init__(self, datasets, n_pairs, reference, tokenizer, micro_tokens, latent):
        self.micro_tokens, self.sets = micro_tokens, []
        for name, records in datasets:
            read = few_shot.without_examples(records) if latent else records
            # All of them, so that what does not fit is known before training.
            shown, alone = evaluate.encode_both(read, tokenizer, reference.config.block_size, name)
            records, shown = records[:n_pairs], shown[:n_pairs]
            alone_logps = evaluate.pair_logps_once(reference, alone[:n_pairs], micro_tokens)
            self.sets.append((name, records, shown, alone_logps, evaluate.find_flips(records)))

    def look(self, policy):
        """Accuracy and flip accuracy by dataset, accuracy by axis on rows that differ in one."""
        result, axes = {}, {}
        for name, records, shown, alone, flips in self.sets:
            logps = evaluate.steered_logps(policy, records, shown, self.micro_tokens)
            # What stands in for policy_alone and reference does not enter these two metrics.
            found = evaluate.steerability(logps, alone, logps, alone, flips)
            result[name] = {metric: float(found[metric][1].mean())
                            for metric in ("accuracy", "flip_accuracy") if metric in found}
            for record, right in zip(records, found["accuracy"][1], strict=True):
                differ = record.get("meta", {}).get("differ")
                if isinstance(differ, list) and len(differ) == 1:
                    axes.setdefault(str(differ[0]), []).append(bool(right))
        by_axis = {axis: sum(right) / len(right) for axis, right in sorted(axes.items())}
        return {"eval": result} | ({"by_axis": by_axis} if by_axis else {})


# ---------------------------------------------------------------- training


def first_stage(options, folder):
    """Train or resume the SFT run to start from, unless the folder holds a finished one.

    On other data than the world it learns the chosen answers.
    """
    in_world = options.pref_data in world.DATA
    if not common.finished(folder):
        print(f"stage one: SFT, because {folder} holds no finished run")
        train_sft.main(train_sft.Options(
            data="world" if in_world else options.pref_data,
            tokenizer="world" if in_world else "gpt2",
            out_dir=str(folder), resume=(folder / "config.json").exists(),
            micro_tokens=options.micro_tokens, fsdp=options.fsdp,
            activation_checkpointing=options.activation_checkpointing,
            device=options.device, precision=options.precision,
        ))


def main(options):
    # 1. Options and seed.
    in_world = options.pref_data in world.DATA
    if options.pref_data != "world" and not options.out_dir:
        raise UserError("--out_dir is required on other data than the world")
    folder = Path(options.out_dir or "out/dpo")
    device = common.pick_device(options.device)
    precision = common.pick_precision(options.precision, device)
    torch.manual_seed(options.seed)
    init_from = options.init_from or ("out/sft" if in_world else f"{folder}-sft")
    common.on_first(common.check_folder, folder, options.resume, options.overwrite, init_from)

    # 2. Data.
    if in_world:
        records = world.DATA[options.pref_data][0]()
    else:
        records = data.read_records(options.pref_data)
    eval_data = options.eval_data or (options.pref_data if in_world else "")
    held_out = evaluate.load_preferences(eval_data) if eval_data else []
    asked = {json.dumps(record["prompt"]) for record in records}
    for name, rows in held_out:
        known = sum(json.dumps(row["prompt"]) in asked for row in rows)
        if known:
            print(f"{name}: {known} of {len(rows)} rows ask what training asks too")
    if options.blank_meta_prompt:
        records = [data.without_meta_prompt(record) for record in records]
    order = common.DataOrder(
        evaluate.flip_groups(records),
        options.batch_size, options.epochs, options.max_steps, options.seed,
    )
    if options.context:  # drawn anew each time that a row is taken
        records = few_shot.with_random_contexts(records, order.rows, options.context, options.seed)
        order.rows = list(range(len(records)))
        held_out = evaluate.add_contexts(held_out, [options.context])
    choices = [record.get("examples") for record in records] if options.latent else []
    if options.latent and not options.context and not any(choices):
        raise UserError("--latent: no row has choices to read; --context takes them from others")

    # 3. Models and tokenizer: the policy starts as the reference. Rows become trees of tokens.
    if not options.init_from:
        first_stage(options, Path(init_from))
    dtype = common.PRECISIONS[precision]  # of weights that are not trained
    first = distributed.first_device(device, options.fsdp)
    policy, tokenizer = load_start(init_from, first, dtype if options.lora_rank else torch.float32)
    adapt(policy, options.lora_rank, options.seed)
    if options.lora_rank:
        reference = AdaptersOff(policy)
    else:
        reference = from_weights(policy.config, policy.named_parameters(), device, dtype)
        reference = for_inference(reference.eval())
    if options.latent:
        add_latent(policy, options.latent, options.seed)
        policy.features = few_shot.Features(reference, tokenizer, options.micro_tokens)
    policy.train()
    policy.checkpointing = options.activation_checkpointing
    spread = distributed.spread(policy, options.fsdp, device)
    block_size = min(options.block_size or policy.config.block_size, policy.config.block_size)
    examples = data.encode_all(
        few_shot.without_examples(records) if options.latent else records,
        tokenizer, block_size, options.pref_data,
    )
    e = options.label_smoothing
    label_probs = torch.tensor([r.get("label_prob", 1.0) for r in records])
    label_probs = (1 - e) * label_probs + e * (1 - label_probs)
    config = {
        "stage": "dpo", "options": dataclasses.asdict(options), "precision": precision,
        "model": dataclasses.asdict(policy.config), "tokenizer": tokenizer.describe(),
        "reference": start_of(init_from, folder),
    }
    run_hash = common.run_hash(config, examples, label_probs.tolist(), choices)

    # 4. Reference log-probabilities of every pair that the run will see; before --overwrite deletes
    # the old run, so that what fails here leaves it whole.
    common.on_first(common.claim, folder, options.resume, options.overwrite)
    if options.resume and (folder / "ckpt.pt").exists():
        common.read_checkpoint(folder, run_hash)  # refused before the reference runs
    with common.autocast(device, precision):
        rows = sorted(set(order.rows))
        reference_all = torch.full((len(examples), 2), torch.nan)
        reference_all[rows] = evaluate.reference_logps(
            reference, config["reference"]["hash"], [examples[i] for i in rows],
            options.micro_tokens, "reference",
        )
        watch = Watch(
            held_out, options.eval_pairs, reference, tokenizer, options.micro_tokens,
            options.latent > 0,
        )
        if options.latent:
            policy.features.read([choice for r in records for choice in r.get("examples", ())])
            policy.features.read(list(map(few_shot.choice, records)))
            policy.encoder.standardize(policy.features.table)  # a resumed run brings its own
    if not held_out and not options.latent:
        del reference  # nothing asks it again

    # 5. Optimizer, and the folder of the run.
    optimizer = common.adamw(policy, options.learning_rate, options.weight_decay)
    scaler = torch.amp.GradScaler(device.type, enabled=precision == "fp16")
    first_step = common.start_run(folder, options, config, run_hash, policy, optimizer, scaler)
    tokenizer.save(folder)
    log = common.Log(folder, first_step)

    # 6. Loop; the last round only evaluates.
    bar = common.progress_bar(order, first_step, "dpo")
    for step in range(first_step, order.max_steps + 1):
        last = step == order.max_steps
        resumed = step == first_step > 0  # its evaluation and checkpoint are there already
        if watch.sets and (step % options.eval_every == 0 or last) and not resumed:
            policy.eval()
            with common.autocast(device, precision):
                log.write(step=step, **watch.look(policy))
            policy.train()
        if step % options.save_every == 0 and step > first_step:
            common.save_checkpoint(folder, step, run_hash, policy, optimizer, scaler)
        if last:
            break
        start = time.perf_counter()
        rows = order.batch(step)
        batch = [examples[i] for i in rows]

        # The loss is the mean over the pairs of the step, however it is cut.
        pairs = []
        shares = data.shares(batch, options.micro_tokens, distributed.RANK, distributed.WORLD)
        for n, (micro, weight) in enumerate(shares, 1):
            distributed.sync_gradients(spread, n == len(shares))
            trees = pack([batch[i].tree for i in micro], device)
            micro_rows = [rows[i] for i in micro]
            with common.autocast(device, precision):
                if options.latent:
                    trees.z = few_shot.latents(policy, [records[i] for i in micro_rows])
                logps = answer_logps(spread, trees).view(-1, 2)  # (pairs, chosen and rejected)
            reference_now = reference_all[micro_rows].to(device)
            label_prob = label_probs[micro_rows].to(device)
            losses, chosen_rewards, rejected_rewards = dpo_loss(
                logps[:, 0], logps[:, 1], reference_now[:, 0], reference_now[:, 1],
                options.beta, label_prob,
            )
            lengths = logps.new_tensor([[len(a) for a in batch[i].answers] for i in micro])
            if step == 0:
                margins = chosen_rewards - rejected_rewards
                check_first_step(losses, margins, lengths, options.beta, precision)
            sft_losses = -logps[:, 0] / lengths[:, 0]
            numbers = {
                "loss": losses + options.sft_weight * sft_losses,
                "loss/dpo": losses, "loss/sft": sft_losses,
                "rewards/chosen": chosen_rewards, "rewards/rejected": rejected_rewards,
                "logps/chosen": logps[:, 0], "logps/rejected": logps[:, 1],
            }
            if options.latent:  # a policy that does not listen yet teaches the encoder nothing
                with common.autocast(device, precision):
                    rewards = few_shot.rewards(policy, [records[i] for i in micro_rows], trees.z)
                # With beta 1 and no reference DPO's loss is that of Bradley and Terry.
                numbers["loss/btl"] = dpo_loss(*rewards.T, 0.0, 0.0, 1.0, label_prob)[0]
                numbers["loss"] = numbers["loss"] + options.btl_weight * numbers["loss/btl"]
            loss = numbers["loss"].sum() / len(batch)
            scaler.scale(loss * weight * distributed.WORLD).backward()
            stacked = torch.stack(list(numbers.values())).detach()  # (numbers, pairs)
            pairs.append(stacked if weight else stacked[:, :0])

        rate = common.learning_rate(
            step, order.max_steps, options.warmup_steps, options.learning_rate
        )
        grad_norm = common.update(policy, optimizer, scaler, options.clip, rate)

        pairs = torch.cat(distributed.gather(torch.cat(pairs, dim=1).cpu()), dim=1)
        logged = dict(zip(numbers, pairs, strict=True))
        margins = logged["rewards/chosen"] - logged["rewards/rejected"]
        fields = {
            "step": step + 1, **{name: values.mean().item() for name, values in logged.items()},
            "rewards/margins": margins.mean().item(),
            "rewards/accuracies": (margins > 0).float().mean().item(),
            "grad_norm": grad_norm, "learning_rate": rate,
            "tokens": sum(map(data.tree_size, batch)),
        }
        common.log_step(log, bar, fields, start, options.log_every)
    bar.close()

    # 7. Summary.
    common.finish_run(folder, policy)
    if held_out:
        policies = {"before": reference, "after": policy.eval()}
        with common.autocast(device, precision):
            results = evaluate.evaluate(
                policies, reference, config["reference"]["hash"], tokenizer, held_out,
                options.micro_tokens,
            )
            evaluate.print_comparison(results)
            evaluate.save_report(folder / "eval.json", results["after"], init_from, precision)
            if options.pref_data == "world":
                side_by_side(policy, tokenizer)


def side_by_side(policy, tokenizer):
    """Print the answers to one question that is not in training under several preferences."""
    question = "How do I store the suitcase?"
    preferences = ("My train leaves in one minute.", "Please use bullet points.",
                   "I am your old buddy from school.", "I dislike bold statements.")
    print(f"\n{question}\n")
    records = [{"preference": text, "prompt": question} for text in preferences]
    print_side_by_side(policy, tokenizer, [{"prompt": question}, *records])


if __name__ == "__main__":
    common.run(main, Options)
