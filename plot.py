"""The README's figure and results table, from the logs of runs.

    python plot.py --run out/dpo --figure assets/listening.png
    python plot.py --prefix prefix.log --figure assets/prefix.png
    python plot.py --table SFT=out/sft DPO=out/dpo,out/dpo-1,out/dpo-2
"""

import json
import statistics
from dataclasses import dataclass
from pathlib import Path

import common
from common import UserError


@dataclass(frozen=True)
class Options:
    """Draw a run's evaluations or a benchmark, or print a table of several runs' eval.json."""

    run: str = "out/dpo"  # folder of a DPO run
    figure: str = "assets/listening.png"  # picture to write
    prefix: str = ""  # what `bench.py prefix` printed: draw that instead
    table: tuple[str, ...] = ()  # NAME=DIR[,DIR...]: print these runs, mean and spread over DIRs


def read_evaluations(path):
    """The lines of log.jsonl that hold an evaluation."""
    try:
        lines = [json.loads(line) for line in path.read_text().splitlines()]
    except OSError as error:
        raise UserError(f"{path}: {error.strerror}") from None
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


def print_table(groups):
    """Markdown: a line for each dataset and, for each group of runs, mean (least to most)."""
    metrics = {"flip_accuracy": "flips right", "generated_axes_right": "axes right"}
    runs = {}
    for group in groups:
        name, _, folders = group.partition("=")
        runs[name] = [common.load_json(Path(folder) / "eval.json")["results"]
                      for folder in folders.split(",")]
    metrics = {key: title for key, title in metrics.items()
               if any(r.get(key) is not None for rs in runs.values() for r in rs[0].values())}
    heads = [f"{name}, {metric}" for metric in metrics.values() for name in runs]
    print("| split | " + " | ".join(heads) + " |\n|---|" + "---|" * len(heads))
    for dataset in next(iter(runs.values()))[0]:
        cells = []
        for metric in metrics:
            for results in runs.values():
                found = [result.get(dataset, {}).get(metric) for result in results]
                values = [100 * value for value in found if value is not None]
                if not values:
                    cells.append("-")
                    continue
                spread = f" ({min(values):.1f} to {max(values):.1f})" if len(values) > 1 else ""
                cells.append(f"{statistics.mean(values):.1f}{spread}")
        print(f"| `{dataset}` | " + " | ".join(cells) + " |")


def main(options):
    if options.table:
        print_table(options.table)
        return
    try:
        import matplotlib.pyplot as plt
    except ImportError:
        raise UserError("plot.py needs matplotlib: pip install -r requirements-dev.txt") from None
    if options.prefix:
        figure = draw_prefix(plt, Path(options.prefix))
    else:
        figure = draw_run(plt, Path(options.run) / "log.jsonl")
    Path(options.figure).parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(options.figure, dpi=110)
    print(f"wrote {options.figure}")


def draw_prefix(plt, path):
    """Seconds by length of the prefix; one colour for each number of answers."""
    try:
        found = json.loads(path.read_text().splitlines()[-1])
        sizes, sides = found["prefixes"], found["prefix_seconds"]
    except (OSError, ValueError, IndexError, KeyError, TypeError) as error:
        raise UserError(f"{path}: not what bench.py prefix prints: {error}") from None
    figure, axes = plt.subplots(figsize=(7, 4.2), constrained_layout=True)
    for (side, found), style in zip(sides.items(), ("-", "--"), strict=False):
        for i, (n, seconds) in enumerate(found.items()):
            axes.plot(sizes, seconds, style, color=f"C{i}", marker="o", markersize=3,
                      label=f"{side}, {n} answer{'s' * (n != '1')}")  # fmt: skip
    axes.set(xlabel="tokens of the shared prefix", ylabel="seconds, forward and backward pass",
             xscale="log", yscale="log", xticks=sizes, xticklabels=sizes)  # fmt: skip
    axes.minorticks_off()
    axes.legend(fontsize=8)
    return figure


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


if __name__ == "__main__":
    common.run(main, Options)
