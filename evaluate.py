"""Steerability: does the checkpoint follow the preference that it is shown?

    python evaluate.py --ckpt DIR --pref_data world|FILE[,FILE...] [--reference DIR]

An answer's score is log pi(y | m, x) - log pi_0(y | x): the checkpoint with the meta-prompt m
against the model that its training started from with the query x alone.
"""

import json
import time
from collections import defaultdict
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

import common
import data
import distributed
import few_shot
import hf_model
import world
from common import UserError
from model import answer_logps, for_inference, pack
from sample import answer, load_checkpoint, reference_folder, weights_hash


@dataclass(frozen=True)
class Options:
    """Measure how well a checkpoint follows preferences; prints a table, writes eval.json."""

    ckpt: str = "out/dpo"  # finished run, Hugging Face folder or org/name
    pref_data: str = "world"  # world, users, told, or preference files, separated by commas
    context: tuple[str, ...] = ()  # numbers of other choices of a row's user to be shown
    context_data: str = ""  # files to take those choices from; default: pref_data
    reference: str = ""  # pi_0; default: what training started from; from scratch the run itself
    max_new_tokens: int = 120  # longest generated answer, in tokens (world only)
    report: str = ""  # file for the results; default: eval.json in the folder of --ckpt
    micro_tokens: int = 4096  # tree tokens scored at once; answers are generated 128 at once
    device: str = "auto"  # auto, cpu, cuda, cuda:N, mps
    precision: str = "auto"  # auto, bf16, fp16, fp32

    def __post_init__(self):
        common.at_least(self, 1, "max_new_tokens", "micro_tokens")
        if not all(n.isdecimal() for n in self.context):
            raise UserError(f"--context: must be whole numbers, not {' '.join(self.context)}")
        if self.context_data and not self.context:
            raise UserError("--context_data needs --context: how many choices to take")


def load_preferences(names):
    """[(dataset name, records), ...] of the world's data of this name or of preference files."""
    if names in world.DATA:
        return [(name, make()) for name, make in world.DATA[names][1].items()]
    return data.read_preferences(names)


def add_contexts(datasets, sizes, source=""):
    """The datasets with N choices of each row's user as its examples, for each N of `sizes`.

    The choices are the user's others in all datasets, or those in the files `source`. Several
    sizes are several datasets, named `NAME, N=size`.
    """
    source = [row for _, rows in (load_preferences(source) if source else datasets) for row in rows]
    return [(f"{name}, N={n}" if len(sizes) > 1 else name,
             few_shot.with_context(records, n, source))
            for name, records in datasets for n in sizes]


# ---------------------------------------------------------------- log-probabilities


@torch.no_grad()  # not inference_mode, whose tensors FSDP cannot gather into
def pair_logps(model, examples, micro_tokens, progress="", z=None):
    """log p of the two answers of each example: (pairs, 2) float32 on the CPU, nats.

    z (pairs, n_latent) steers the model. Raises UserError when they are not finite.
    """
    device = model.embedding.weight.device
    logps = torch.empty(len(examples), 2, device=device)
    batches = data.micro_batches(examples, micro_tokens)
    hidden = not progress or distributed.RANK > 0
    for rows in tqdm(batches, desc=progress, leave=False, disable=hidden):
        trees = pack([examples[i].tree for i in rows], device)
        trees.z = None if z is None else z[rows]
        logps[rows] = answer_logps(model, trees).view(-1, 2)
    if not logps.isfinite().all():
        raise UserError("log-probabilities are not finite: the weights are broken, or --precision "
                        "is too low for them")
    return logps.cpu()


def pair_logps_once(model, examples, micro_tokens, progress=""):
    """`pair_logps`; rows of the same trunk and the same two answers, in any order, run once."""
    keys = [(tuple(e.trunk), *sorted(map(tuple, e.answers))) for e in examples]
    unique = list(dict.fromkeys(keys))
    trees = [data.Example(trunk, answers) for trunk, *answers in unique]
    found = dict(zip(unique, pair_logps(model, trees, micro_tokens, progress), strict=True))
    return torch.stack([found[key] if e.answers[0] <= e.answers[1] else found[key].flip(0)
                        for e, key in zip(examples, keys, strict=True)])


def reference_logps(model, weights, examples, micro_tokens, progress):
    """`pair_logps_once` of a frozen model, kept under out/cache; `weights` is their hash.

    The file's name is the hash of all it depends on: weights, sizes, precision, device, torch's
    version, the code of the model, and the tokens of the examples, which hold tokenizer, template
    and limits.
    """
    code = Path(__file__).with_name("model.py").read_text(encoding="utf-8")
    device = model.embedding.weight.device.type
    autocast = torch.is_autocast_enabled(device) and str(torch.get_autocast_dtype(device))
    key = common.content_hash(
        weights, asdict(model.config), autocast, device, torch.__version__, code,
        [example.tree for example in examples],
    )
    path = Path("out/cache") / f"{key}.pt"
    if distributed.gather(path.exists())[0]:
        found = common.load_tensors(path)
        if getattr(found, "shape", None) != (len(examples), 2):
            raise UserError(f"{path}: not the log-probabilities of {len(examples)} pairs; "
                            "delete it")
        return found
    found = torch.empty(len(examples), 2)
    mine = examples[distributed.RANK :: distributed.WORLD]
    mine = pair_logps_once(model, mine, micro_tokens, progress) if mine else found[:0]
    for rank, part in enumerate(distributed.gather(mine)):
        found[rank :: distributed.WORLD] = part
    common.save_tensors(path, found)
    return found


def encode_both(records, tokenizer, block_size, what):
    """(examples with the meta-prompt, examples with the query alone).

    All rows of one pair are cut as the longest of their meta-prompts demands, so that every score
    compares the same texts.
    """
    bare = list(map(data.without_meta_prompt, records))
    shown, alone = [None] * len(records), [None] * len(records)
    for rows in same_pair(records):
        sizes = {i: data.structure_size(records[i], tokenizer) for i in rows}
        structure = max(*sizes.values(), data.structure_size(bare[rows[0]], tokenizer))
        for i in sorted(rows, key=sizes.get, reverse=True):  # an error names the longest one
            shown[i] = data.encode(records[i], tokenizer, block_size, structure)
            alone[i] = data.encode(bare[i], tokenizer, block_size, structure)
    data.print_cuts(shown, block_size, what)
    return shown, alone


# ---------------------------------------------------------------- flips and metrics


def pair_key(record):
    """What the two rows of a flip share: the query and the set of its two answers."""
    return json.dumps([record["prompt"], sorted((record["chosen"], record["rejected"]))])


def same_pair(records):
    """Rows grouped by query and answers, whatever their order: [[i, j, ...], ...]."""
    groups = defaultdict(list)
    for i, record in enumerate(records):
        groups[pair_key(record)].append(i)
    return list(groups.values())


def find_flips(records):
    """Pairs of rows with the same query and answers in opposite order: [(i, j), ...]."""
    flips = []
    for rows in same_pair(records):
        chosen = records[rows[0]]["chosen"]
        first = [i for i in rows if records[i]["chosen"] == chosen]
        second = [i for i in rows if records[i]["chosen"] != chosen]
        flips += zip(first, second, strict=False)
    return flips


def flip_groups(records):
    """Rows grouped for training, the two of a flip together: [[i, j], ..., [k], ...].

    In one step they cancel all that does not depend on the preference.
    """
    partner = dict(find_flips(records))
    second = set(partner.values())
    return [[i, partner[i]] if i in partner else [i]
            for i in range(len(records)) if i not in second]


def steerability(policy, policy_alone, reference, reference_alone, flips):
    """Which rows, or flips, are right, for each metric of the table.

    policy, policy_alone, reference, reference_alone: (pairs, 2) log-probabilities of chosen and
    rejected, with the meta-prompt and with the query alone. Returns {metric: (indices of the rows
    that it is counted on, right or not)}; for `flip_accuracy` the rows are the first of each flip.
    """

    def margins(scores):
        return (scores[:, 0] - scores[:, 1]).numpy()

    rows = np.arange(len(policy))
    score = margins(policy - reference_alone)
    alone = margins(policy_alone - reference_alone)
    found = {
        "accuracy": (rows, score > 0),
        # A tie counts half: without a preference there is nothing to choose by.
        "accuracy_no_preference": (rows, (np.sign(alone) + 1) / 2),
        "rewards_accuracy": (rows, margins(policy - reference) > 0),
        "raw_accuracy": (rows, margins(policy) > 0),
    }
    if flips:
        i, j = np.array(flips).T
        found["flip_accuracy"] = (i, (score[i] > 0) & (score[j] > 0))
        # Under the other row's meta-prompt this row's answers have the other row's margin, negated.
        opposite = np.concatenate([-score[j] > 0, -score[i] > 0])
        found["accuracy_opposite_preference"] = (np.concatenate([i, j]), opposite)
    return found


METRICS = ("accuracy", "flip_accuracy", "accuracy_no_preference", "accuracy_opposite_preference",
           "rewards_accuracy", "raw_accuracy")
GENERATED = ("generated_axes_right", "generated_all_right", "generated_on_topic")


def mean_and_interval(rows, right, records, rng):
    """Mean and its bootstrap 95 % interval: (mean, [low, high]).

    Resampled are whole users where rows name several, else whole queries or, where few queries
    serve for all pairs, whole pairs.
    """
    prompts = [json.dumps(records[i]["prompt"]) for i in rows]
    names = [few_shot.user_of(records[i]) if "user" in records[i] else prompt
             for i, prompt in zip(rows, prompts, strict=True)]
    if names == prompts or len(set(names)) == 1:  # no users, or a single one
        names = prompts if len(set(prompts)) >= 20 else [pair_key(records[i]) for i in rows]
    clusters = {name: n for n, name in enumerate(dict.fromkeys(names))}
    of_row, n = [clusters[name] for name in names], len(clusters)
    sums, counts = np.bincount(of_row, weights=right), np.bincount(of_row)
    draws = rng.multinomial(n, np.full(n, 1 / n), size=1000)
    low, high = np.percentile(draws @ sums / (draws @ counts), [2.5, 97.5])
    return float(np.mean(right)), [round(float(low), 4), round(float(high), 4)]


def summarize(found, records, flips):
    """The entry of eval.json for one dataset."""
    rng = np.random.default_rng(0)
    result = {"pairs": len(records), "flips": len(flips)}
    if any("examples" in record for record in records):  # fewer than N where a user has fewer
        shown = [len(record.get("examples", ())) for record in records]
        result["choices_shown"] = round(float(np.mean(shown)), 2)
    for metric in METRICS + tuple(m for m in GENERATED if m in found):
        result[metric], result[f"{metric}_ci"] = None, None
        if metric in found:
            mean, interval = mean_and_interval(*found[metric], records, rng)
            result[metric], result[f"{metric}_ci"] = round(mean, 4), interval
    for key in ("preference_name", "dataset"):
        groups = defaultdict(list)
        for record, right in zip(records, found["accuracy"][1], strict=True):
            if record.get("meta", {}).get(key) is not None:
                groups[str(record["meta"][key])].append(right)
        result[f"by_{key}"] = {
            name: {"pairs": len(group), "accuracy": round(float(np.mean(group)), 4)}
            for name, group in sorted(groups.items())
        }
    return result


# ---------------------------------------------------------------- generated answers


def score_generated(model, tokenizer, records, max_new_tokens, progress=""):
    """Greedy answers to world records, read by the world's checker.

    Returns ({metric: (rows, right)}, {axis: [right or not]}). Rows with the same wanted values,
    meta-prompt and query count once.
    """
    tiers = (*data.META_PROMPT, "prompt")
    unique = {json.dumps([r["meta"]["values"], *map(r.get, tiers)]): i
              for i, r in reversed(list(enumerate(records)))}
    rows = sorted(unique.values(), key=lambda i: len(records[i]["prompt"]))
    texts = []
    hidden = not progress or distributed.RANK > 0
    for start in tqdm(range(0, len(rows), 128), desc=progress, leave=False, disable=hidden):
        batch = [records[i] for i in rows[start : start + 128]]
        texts += answer(model, tokenizer, batch, max_new_tokens)
    axes, where, right, whole, topical = defaultdict(list), [], [], [], []
    for i, text in zip(rows, texts, strict=True):
        style, values = world.read_style(text), records[i]["meta"]["values"]
        hits = {axis: style[axis] == value for axis, value in values.items()}
        for axis, hit in hits.items():
            axes[axis].append(hit)
        where += [i] * len(hits)
        right += hits.values()
        whole.append(all(hits.values()))
        topical.append(world.on_topic(records[i]["prompt"], text))
    found = {"generated_axes_right": (where, right), "generated_all_right": (rows, whole),
             "generated_on_topic": (rows, topical)}
    return found, axes


# ---------------------------------------------------------------- the whole evaluation

WORLD_SETS = {name for _, evaluation in world.DATA.values() for name in evaluation}


@torch.no_grad()
def steered_logps(model, records, examples, micro_tokens, progress=""):
    """`pair_logps`; a model that has an encoder is steered by what it makes of the records."""
    if model.encoder is None:
        return pair_logps_once(model, examples, micro_tokens, progress)
    return pair_logps(model, examples, micro_tokens, progress, few_shot.latents(model, records))


def evaluate(policies, reference, weights, tokenizer, datasets, micro_tokens,
             max_new_tokens=Options.max_new_tokens):
    """{policy name: {dataset name: entry of eval.json}} for models {policy name: model}.

    The reference may be one of them; `weights` is the hash of its weights.
    """
    results, alone_logps = {policy: {} for policy in policies}, {}
    latent = any(model.encoder is not None for model in policies.values())
    block_size = min(model.config.block_size for model in (reference, *policies.values()))
    encoded = []  # all of them first, so that what does not fit stops here
    for name, records in datasets:
        read = few_shot.without_examples(records) if latent else records
        encoded.append((name, records, read, *encode_both(read, tokenizer, block_size, name)))
    for name, records, read, shown, alone in encoded:
        logps = {reference: [
            reference_logps(reference, weights, examples, micro_tokens, f"reference, {name}")
            for examples in (shown, alone)
        ]}
        tokens = common.content_hash([example.tree for example in alone])
        for policy, model in policies.items():
            if model in logps:
                continue
            key, progress = (policy, tokens), f"{policy}, {name}"
            if key not in alone_logps:  # the same for every number of choices
                alone_logps[key] = steered_logps(
                    model, [{}] * len(records), alone, micro_tokens, f"{progress}, query alone"
                )
            logps[model] = [steered_logps(model, records, shown, micro_tokens, progress),
                            alone_logps[key]]
        flips = find_flips(records)
        for policy, model in policies.items():
            found, axes = steerability(*logps[model], *logps[reference], flips), {}
            if name.split(",")[0] in WORLD_SETS:  # also "users, N=4" of add_contexts
                asked = read if model is reference else records
                generated, axes = score_generated(
                    model, tokenizer, asked, max_new_tokens, f"{policy} answers {name}"
                )
                found |= generated
            entry = results[policy][name] = summarize(found, records, flips)
            if axes:
                entry["generated_by_axis"] = {axis: round(float(np.mean(right)), 4)
                                              for axis, right in axes.items()}
    return results


COLUMNS = {
    "pairs": "pairs", "flip_accuracy": "flips right", "accuracy": "accuracy",
    "accuracy_no_preference": "dropped", "accuracy_opposite_preference": "opposite",
    "rewards_accuracy": "rewards", "raw_accuracy": "raw", "generated_axes_right": "axes right",
    "generated_all_right": "all right", "generated_on_topic": "on topic",
}


def percent(share):
    return "-" if share is None else f"{100 * share:.1f}"


def print_table(results):
    """One line for each dataset; percentages, `-` where a metric does not apply."""
    keys = [key for key in COLUMNS if any(key in result for result in results.values())]
    width = max(len(name) for name in results)
    print(" " * width + "".join(f"{COLUMNS[key]:>12}" for key in keys))
    for name, result in results.items():
        cells = (str(result[key]) if key == "pairs" else percent(result.get(key)) for key in keys)
        print(f"{name:<{width}}" + "".join(f"{cell:>12}" for cell in cells))


def load_reward_model(folder, config, device, micro_tokens):
    """(reward model, how it sees answers) of a run of train_btl.py."""
    base, tokenizer = load_checkpoint(reference_folder(folder, config), device)
    path = Path(folder) / "model.pt"
    try:
        model = few_shot.RewardModel(**config["model"]).to(device).eval()
        common.load_trained(model, common.load_tensors(path))
    except (AttributeError, KeyError, TypeError, ValueError, RuntimeError) as error:
        if common.out_of_memory(error):
            raise
        raise UserError(f"{path}: not the weights of its config.json: {error}") from None
    return model, few_shot.Features(for_inference(base), tokenizer, micro_tokens)


@torch.no_grad()
def evaluate_rewards(model, features, datasets):
    """`evaluate` of a reward model: {dataset name: entry of eval.json}, rewards as the score."""
    results = {}
    for name, records in datasets:
        answers = features([few_shot.choice(record) for record in records])
        found = [model(answers, few_shot.latents(model, asked, features)).cpu()
                 for asked in (records, [{}] * len(records))]
        flips, nothing = find_flips(records), torch.zeros(len(records), 2)
        right = steerability(*found, nothing, nothing, flips)
        del right["rewards_accuracy"], right["raw_accuracy"]  # these are of log-probabilities
        results[name] = summarize(right, records, flips)
    return results


def save_report(path, results, reference, precision):
    """Write the file of an evaluation."""
    report = {"results": results, "time": time.strftime("%Y-%m-%d %H:%M:%S"),
              "reference": str(reference), "precision": precision} | common.provenance()
    common.save_json(path, report)
    print(f"wrote {path}")


def print_comparison(results):
    """The steerability table of several policies side by side, in percent."""
    policies = list(results)
    first = results[policies[0]]
    keys = [k for k in ("flip_accuracy", "accuracy", "generated_axes_right", "generated_on_topic")
            if any(result.get(k) is not None for result in first.values())]
    width = max(map(len, first))
    print("\n" + " " * width + "".join(f"{COLUMNS[key]:>16}" for key in keys))
    print(" " * width + f"{' -> '.join(policies):>16}" * len(keys))
    for name in first:
        cells = (" -> ".join(percent(results[p][name].get(key)) for p in policies) for key in keys)
        print(f"{name:<{width}}" + "".join(f"{cell:>16}" for cell in cells))


def load_reference(options, policy, tokenizer, config, device, dtype):
    """(pi_0, its folder): --reference, or the recorded start of training, or the model itself."""
    if options.reference:
        folder = Path(options.reference)
    elif not config.get("reference"):
        return policy, Path(options.ckpt)
    else:
        try:
            folder = reference_folder(options.ckpt, config)
        except UserError as error:
            raise UserError(f"{error}; give --reference") from None
    reference, its_tokenizer = load_checkpoint(folder, device, dtype)
    if reference.encoder is not None:
        raise UserError(f"--reference {folder}: has a latent; take what its training started from")
    if its_tokenizer.describe() != tokenizer.describe():
        raise UserError(f"{folder}: has another tokenizer than {options.ckpt}")
    return reference, folder


def main(options):
    device = common.pick_device(options.device)
    precision = common.pick_precision(options.precision, device)
    dtype = common.PRECISIONS[precision]
    ckpt = hf_model.find(options.ckpt)
    config = common.load_json(ckpt / "config.json")
    path = Path(options.report or ckpt / "eval.json")
    if path.is_dir():
        raise UserError(f"--report {path}: is a folder")
    datasets = load_preferences(options.pref_data)
    if options.context:
        datasets = add_contexts(datasets, list(map(int, options.context)), options.context_data)
    if config.get("stage") == "np-btl":
        if options.reference:
            raise UserError(f"--reference: {ckpt} is a reward model, which has none")
        model, features = load_reward_model(ckpt, config, device, options.micro_tokens)
        if any(any(map(row.get, data.TEXT_TIERS)) for _, records in datasets for row in records):
            print("a reward model does not read the rows' system messages and preferences")
        results = evaluate_rewards(model, features, datasets)
        print_table(results)
        save_report(path, results, "none: rewards are compared as they are", "fp32")
        return
    policy, tokenizer = load_checkpoint(ckpt, device, dtype)
    if policy.features:
        policy.features.micro_tokens = options.micro_tokens
    reference, folder = load_reference(options, policy, tokenizer, config, device, dtype)
    policy, reference = for_inference(policy), for_inference(reference)
    with common.autocast(device, precision):
        results = evaluate(
            {"policy": policy}, reference, weights_hash(folder), tokenizer, datasets,
            options.micro_tokens, options.max_new_tokens,
        )["policy"]
    print_table(results)
    save_report(path, results, folder, precision)


if __name__ == "__main__":
    common.run(main, Options)
