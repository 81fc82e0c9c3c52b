"""What README and RESULTS say exists: commands, options, files, places, columns."""

import importlib
import json
import re
import shlex
from pathlib import Path

import pytest

import common
import evaluate
import plot

ROOT = Path(__file__).parent.parent
README, RESULTS = ((ROOT / name).read_text() for name in ("README.md", "RESULTS.md"))
BOTH = f"{README}\n{RESULTS}"
COMMANDS = re.findall(r"python (\w+)\.py((?: [^\n#]*)?)", BOTH.replace("\\\n", " "))


def test_every_script_is_shown():
    assert {name for name, _ in COMMANDS} == {
        "train_sft", "train_dpo", "train_btl", "evaluate", "sample", "data", "plot", "real",
        "people", "bench",
    }


@pytest.mark.parametrize(("name", "arguments"), COMMANDS)
def test_commands_have_valid_options(name, arguments):
    arguments = re.split("[`|]", arguments)[0].replace("$s", "1")
    common.parse_options(importlib.import_module(name).Options, shlex.split(arguments))


def test_files_exist():
    for name in re.findall(r"`([\w/]+\.(?:py|md|png))`|\((assets/[\w.]+)\)", BOTH):
        assert (ROOT / (name[0] or name[1])).exists(), name


def test_links_lead_somewhere():
    def places(text):
        heads = re.findall(r"(?m)^#+ (.*)$", text)
        return {re.sub(r"[^\w\- ]", "", head.lower()).replace(" ", "-") for head in heads}

    texts = {"README.md": README, "RESULTS.md": RESULTS}
    for source, text in texts.items():
        for file, place in re.findall(r"\]\(([\w.]*)#([\w-]+)\)", text):
            assert place in places(texts[file or source]), place


def test_metrics_of_the_readme_are_those_of_eval_json():
    table = README[README.index("| column of the table") : README.index("Each key has a boot")]
    keys = re.findall(r"\| `(\w+)` \|", table)
    assert set(keys) == {*evaluate.METRICS, *evaluate.GENERATED}
    for line in table.splitlines()[2:]:
        title, key = [cell.strip(" `") for cell in line.split("|")[1:3]] if line else (None, None)
        assert key is None or evaluate.COLUMNS[key] == title


def test_table_from_several_runs(tmp_path, capsys):
    """Mean and spread over runs; `-` where a metric does not apply."""
    for name, value in (("a", 0.5), ("b", 0.7)):
        (tmp_path / name).mkdir()
        results = {"x/val": {"flip_accuracy": value, "generated_axes_right": None},
                   "world": {"flip_accuracy": value, "generated_axes_right": value}}
        (tmp_path / name / "eval.json").write_text(json.dumps({"results": results}))
    plot.main(plot.Options(table=(f"M={tmp_path / 'a'},{tmp_path / 'b'}",)))
    out = capsys.readouterr().out
    assert "| `x/val` | 60.0 (50.0 to 70.0) | - |" in out
    assert "| `world` | 60.0 (50.0 to 70.0) | 60.0 (50.0 to 70.0) |" in out
    (tmp_path / "c").mkdir()
    (tmp_path / "c/eval.json").write_text('{"results": {"y/val": {"flip_accuracy": 0.25}}}')
    plot.main(plot.Options(table=(f"M={tmp_path / 'a'}", f"C={tmp_path / 'c'}")))
    assert "| `y/val` | - | 25.0 |" in capsys.readouterr().out
    for table, named in ((f"M={tmp_path / 'a'},{tmp_path / 'c'}", "not in all runs"),
                         (f"M={tmp_path / 'c'}", "no run has")):
        with pytest.raises(common.UserError, match=named):
            plot.main(plot.Options(table=(table,), metrics=("generated_axes_right",)
                                   if named == "no run has" else ("flip_accuracy",)))


def test_figure_from_a_log(tmp_path):
    pytest.importorskip("matplotlib").use("Agg")
    lines = [{"step": s, "eval": {"seen": {"flip_accuracy": s / 9}}, "by_axis": {"tone": s / 9}}
             for s in (0, 5, 9)]
    (tmp_path / "log.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    figure = tmp_path / "made/figure.png"
    plot.main(plot.Options(run=str(tmp_path), figure=str(figure)))
    with (tmp_path / "log.jsonl").open("a") as log:
        log.write('{"step"')  # a killed run's last line
    with pytest.raises(common.UserError, match=r"log\.jsonl: not a log"):
        plot.main(plot.Options(run=str(tmp_path), figure=str(figure)))
    assert figure.read_bytes().startswith(b"\x89PNG")


def test_figure_of_a_benchmark(tmp_path, capsys):
    pytest.importorskip("matplotlib").use("Agg")
    sides = {"nanoAlign": {"1": [1, 2], "2": [1, 3]}, "transformers": {"1": [1, 2], "2": [2, 6]}}
    log, figure = tmp_path / "prefix.log", tmp_path / "prefix.png"
    log.write_text("seconds\n" + json.dumps({"prefixes": [64, 256], "prefix_seconds": sides}))
    plot.main(plot.Options(prefix=str(log), figure=str(figure)))
    assert figure.read_bytes().startswith(b"\x89PNG")
    log.write_text("killed\n")
    with pytest.raises(common.UserError, match="not what bench.py prefix prints"):
        plot.main(plot.Options(prefix=str(log), figure=str(figure)))
