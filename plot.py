"""The figures and tables of README and RESULTS, from the logs and checkpoints of runs.

    python plot.py --run out/dpo
    python plot.py --prefix prefix.log
    python plot.py --latent out/np
    python plot.py --choices NP-DPO=out/np text=out/text --metrics accuracy generated_axes_right
    python plot.py --table SFT=out/sft DPO=out/dpo,out/dpo-1,out/dpo-2
"""

import json
import re
import statistics
from dataclasses import dataclass
from pathlib import Path

import torch

import common
import few_shot
import world
from common import UserError
from evaluate import COLUMNS
from sample import answer, load_checkpoint


@dataclass(frozen=True)
class Options:
    """Draw a run's evaluations, a benchmark, a latent or a comparison by N; or print a table."""

    run: str = "out/dpo"  # folder of a DPO run
    figure: str = ""  # picture to write; default: assets/, the kind of figure, .png
    prefix: str = ""  # what `bench.py prefix` printed: draw that instead
    latent: str = ""  # folder of an NP-DPO run on the world's users: draw its latent instead
    choices: tuple[str, ...] = ()  # NAME=DIR[,DIR...]: draw these runs by --context N
    table: tuple[str, ...] = ()  # NAME=DIR[,DIR...]: print runs or --report files, mean and spread
    metrics: tuple[str, ...] = ("flip_accuracy", "generated_axes_right")  # by key

    def __post_init__(self):
        shares = [key for key in COLUMNS if key != "pairs"]
        for key in self.metrics:
            if key not in shares:
                raise UserError(f"--metrics {key}: must be among {', '.join(shares)}")


def read_results(path):
    """{dataset name: {metric: value}} of an eval.json."""
    results = common.load_json(path).get("results")
    if not isinstance(results, dict) or not all(isinstance(x, dict) for x in results.values()):
        raise UserError(f"{path}: field 'results': must hold an object for each dataset")
    return results


def read_groups(groups):
    """{NAME: [results of each run]} of NAME=DIR[,DIR...], where a file may stand for a DIR."""
    runs = {}
    for group in groups:
        name, _, folders = group.partition("=")
        if not folders or name in runs:
            raise UserError(f"{group}: must be NAME=DIR[,DIR...], each NAME once")
        paths = [Path(folder) for folder in folders.split(",")]
        runs[name] = [read_results(path if path.is_file() else path / "eval.json")
                      for path in paths]
    return runs


def print_table(groups, metrics):
    """Markdown: a line for each dataset and, for each group of runs, mean (least to most)."""
    runs = read_groups(groups)
    every = [results for group in runs.values() for results in group]
    metrics = {key: COLUMNS[key] for key in metrics
               if any(r.get(key) is not None for results in every for r in results.values())}
    if not metrics:
        raise UserError("--table: no run has any of these --metrics")
    heads = [f"{name}, {metric}" for metric in metrics.values() for name in runs]
    print("| split | " + " | ".join(heads) + " |\n|---|" + "---|" * len(heads))
    for dataset in dict.fromkeys(name for results in every for name in results):
        cells = []
        for metric in metrics:
            for results in runs.values():
                found = [result.get(dataset, {}).get(metric) for result in results]
                values = [100 * value for value in found if value is not None]
                if not values:
                    cells.append("-")
                    continue
                if len(values) < len(results):
                    raise UserError(f"--table: {dataset}: not in all runs of one NAME")
                spread = f" ({min(values):.1f} to {max(values):.1f})" if len(values) > 1 else ""
                cells.append(f"{statistics.mean(values):.1f}{spread}")
        print(f"| `{dataset}` | " + " | ".join(cells) + " |")


def read_evaluations(path):
    """The lines of log.jsonl that hold an evaluation."""
    try:
        lines = [json.loads(line) for line in path.read_text().splitlines()]
    except OSError as error:
        raise UserError(f"{path}: {error.strerror}") from None
    except ValueError as error:
        raise UserError(f"{path}: not a log of whole lines: {error}") from None
    evaluations = [line for line in lines if "eval" in line]
    if not evaluations:
        raise UserError(f"{path}: no evaluation in this log")
    return evaluations


def draw(axes, steps, curves, title, chance):
    for name, values in curves.items():
        axes.plot(steps, [100 * v for v in values], label=name, linewidth=1.8)
    axes.axhline(100 * chance, color="grey", linewidth=0.8, linestyle=":", label="chance")
    axes.set(title=title, xlabel="DPO steps", ylabel="%", ylim=(-3, 103))
    axes.legend(fontsize=8, loc="lower right")


def draw_run(plt, path):
    evaluations = read_evaluations(path)
    steps = [line["step"] for line in evaluations]
    splits = {name: [line["eval"][name]["flip_accuracy"] for line in evaluations]
              for name, first in evaluations[0]["eval"].items() if "flip_accuracy" in first}
    by_axis = {axis: [line["by_axis"][axis] for line in evaluations]
               for axis in evaluations[0].get("by_axis", {})}
    figure, (left, right) = plt.subplots(1, 2, figsize=(11, 4), constrained_layout=True)
    draw(left, steps, splits, "both rows of a flip right, by split", 0.25)
    draw(right, steps, by_axis, "pairs right that differ on one axis", 0.5)
    return figure


def draw_prefix(plt, path):
    """Seconds by length of the prefix; one colour for each number of answers."""
    try:
        found = json.loads(path.read_text().splitlines()[-1])
        sizes, sides = found["prefixes"], found["prefix_seconds"]
    except (OSError, ValueError, IndexError, KeyError, TypeError) as error:
        raise UserError(f"{path}: not what bench.py prefix prints: {error}") from None
    figure, axes = plt.subplots(figsize=(7, 4.2), constrained_layout=True)
    for (side, by_answers), style in zip(sides.items(), ("-", "--"), strict=False):
        for i, (n, seconds) in enumerate(by_answers.items()):
            axes.plot(sizes, seconds, style, color=f"C{i}", marker="o", markersize=3,
                      label=f"{side}, {n} answer{'s' * (n != '1')}")
    axes.set(xlabel="tokens of the shared prefix", ylabel="seconds, forward and backward pass",
             xscale="log", yscale="log", xticks=sizes, xticklabels=sizes)
    axes.minorticks_off()
    axes.legend(fontsize=8)
    return figure


def by_size(runs, metric):
    """{N: [value of each run]} in percent, over their datasets `NAME, N=size`.

    Raises UserError where the runs do not have the same one dataset.
    """
    found, names = {}, set()
    for results in runs:
        for dataset, result in results.items():
            match = re.fullmatch(r"(.*), N=(\d+)", dataset)
            if match and isinstance(result.get(metric), float | int):
                names.add(match[1])
                found.setdefault(int(match[2]), []).append(100 * result[metric])
    if len(names) > 1 or any(len(values) < len(runs) for values in found.values()):
        raise UserError("--choices: the runs of a NAME need one dataset and the same --context")
    return dict(sorted(found.items()))


def draw_choices(plt, groups, metrics):
    """Each metric by the number of choices known: mean over the runs of a NAME, least to most."""
    groups = read_groups(groups)
    curves = {key: {name: by_size(runs, key) for name, runs in groups.items()} for key in metrics}
    curves = {key: found for key, found in curves.items() if any(found.values())}
    if not curves:
        raise UserError("--choices: no run has any of these --metrics for several --context")
    figure, panels = plt.subplots(1, len(curves), figsize=(5.5 * len(curves), 4), squeeze=False,
                                  constrained_layout=True)
    for axes, (metric, found) in zip(panels[0], curves.items(), strict=True):
        sizes = sorted(set().union(*found.values()))
        for i, (name, curve) in enumerate(found.items()):
            if curve:
                low, mean, high = (list(map(f, curve.values()))
                                   for f in (min, statistics.mean, max))
                axes.plot(list(curve), mean, f"C{i}o-", markersize=3, label=name)
                axes.fill_between(list(curve), low, high, color=f"C{i}", alpha=0.2)
        of_users = all("users, N=0" in run for runs in groups.values() for run in runs)
        if metric == "accuracy" and of_users:
            bound = [100 * world.user_bound(n) for n in sizes]
            axes.plot(sizes, bound, color="grey", linestyle=":", label="best possible")
        axes.set(xlabel="choices known", ylabel=f"{COLUMNS[metric]}, %", xticks=sizes)
        axes.legend(fontsize=8)
    return figure


def latent_points(model, records):
    """z of each record, (n, n_latent), and its place in their first two principal components."""
    z = few_shot.latents(model, records)
    centered = z - z.mean(0)
    return z, centered @ torch.linalg.svd(centered, full_matrices=False)[2][:2].T


def continuum(model, tokenizer, records, z_from, z_to, wanted, steps=9):
    """Along the line between two latents: {axis: share of answers that have the wanted value}."""
    shares = {axis: [] for axis in wanted}
    for part in torch.linspace(0, 1, steps):
        z = torch.lerp(z_from, z_to, part).expand(len(records), -1)
        styles = [world.read_style(text) for text in answer(model, tokenizer, records, z=z)]
        for axis, value in wanted.items():
            shares[axis].append(statistics.mean(style[axis] == value for style in styles))
    return shares


@torch.no_grad()
def draw_latent(plt, folder):
    """Users of the evaluation by their latents, coloured by what they want; a line between two."""
    options = common.load_json(Path(folder) / "config.json").get("options", {})
    if options.get("pref_data") != "users":
        raise UserError(f"--latent {folder}: was not trained on the world's users")
    model, tokenizer = load_checkpoint(folder, torch.device("cpu"))
    if model.config.n_latent < 2:
        raise UserError(f"--latent {folder}: this run has no latent of two channels or more")
    records = few_shot.with_context(world.user_pairs(evaluation=True), 16)
    z, points = latent_points(model, records)
    figure, grid = plt.subplots(2, 3, figsize=(11, 6.4), constrained_layout=True)
    for axes, (axis, values) in zip(grid.flat, world.AXES.items(), strict=False):
        for value in values:
            rows = [i for i, r in enumerate(records) if r["meta"]["values"][axis] == value]
            axes.scatter(*points[rows].T, s=8, label=value)
        axes.set(title=axis, xlabel="first principal component", ylabel="second")
        axes.legend(fontsize=8)
    one, other = ([i for i, r in enumerate(records) if r["user"] == user] for user in (0, 1))
    asked = [{"prompt": prompt} for prompt in dict.fromkeys(r["prompt"] for r in records)][:40]
    wanted = records[other[0]]["meta"]["values"]
    shares = continuum(model, tokenizer, asked, z[one].mean(0), z[other].mean(0), wanted)
    for axis, found in shares.items():
        way = torch.linspace(0, 1, len(found)).tolist()
        grid.flat[-1].plot(way, [100 * x for x in found], label=wanted[axis])
    grid.flat[-1].set(title="from one user to the opposite one", xlabel="part of the way",
                      ylabel="% of answers", ylim=(-3, 103))
    grid.flat[-1].legend(fontsize=8)
    return figure


def main(options):
    if options.table:
        print_table(options.table, options.metrics)
        return
    try:
        import matplotlib.pyplot as plt
    except ImportError:
        raise UserError("plot.py needs matplotlib: pip install -r requirements-dev.txt") from None
    if options.latent:
        kind, figure = "latent", draw_latent(plt, options.latent)
    elif options.choices:
        kind, figure = "choices", draw_choices(plt, options.choices, options.metrics)
    elif options.prefix:
        kind, figure = "prefix", draw_prefix(plt, Path(options.prefix))
    else:
        kind, figure = "listening", draw_run(plt, Path(options.run) / "log.jsonl")
    path = Path(options.figure or f"assets/{kind}.png")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        figure.savefig(path, dpi=110)
    except (OSError, ValueError) as error:
        raise UserError(f"--figure {path}: {common.first_line(error)}") from None
    print(f"wrote {path}")


if __name__ == "__main__":
    common.run(main, Options)
