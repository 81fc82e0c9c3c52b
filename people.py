"""Real people: which of two statements about oneself would this person rather say?

    python people.py --data $DATA/people     # writes out/people/*.jsonl, prints what features tell

Training has the choices of some people between statements of group a; tested are others, on
statements of group b that no training row has, with their choices from group a or b as context.
The folder has choices_train.jsonl (pairs with `user`, and meta.group a or b), statements.jsonl
(`statement`, `facet`, `trait`) and answers_train.jsonl (`person`, who is a `user`, and `answers`,
1 to 5 or null for each line of statements.jsonl).
"""

import random
from collections import Counter, defaultdict
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F

import common
import data
import few_shot
import train_btl
from common import UserError


@dataclass(frozen=True)
class Options:
    """Write the training and evaluation files; print what features of statements predict."""

    data: str = ""  # folder with choices_train.jsonl, answers_train.jsonl, statements.jsonl
    out_dir: str = "out/people"  # folder of the files
    held_out: int = 50  # people to evaluate on, who are not trained on
    test_data: str = ""  # choices of further people to evaluate on instead
    seed: int = 0  # of who is held out

    def __post_init__(self):
        common.at_least(self, 1, "held_out")


TEST_ROWS = 10  # how many choices of each person are evaluated
SIZES = (0, 1, 3, 5, 10, 20)  # choices known
NP_BTL = train_btl.Options(
    context=20, targets=20, steps=200, n_hidden=256, n_layer=2, learning_rate=3e-3
)
NP_SEEDS = 3
RIDGES = (0.03, 0.1, 0.3, 1.0, 3.0, 10.0, 30.0)  # candidates for the regression's regularisation
COMPONENTS = 5  # of people's answers


def read_statements(path):
    """Statements with their facet and trait, all texts."""
    rows = []
    for line, row in data.read_lines(path):
        for field in ("statement", "facet", "trait"):
            if not isinstance(row.get(field), str):
                raise UserError(f"{line}: field '{field}': must be text")
        rows.append(row)
    return rows


def read_answers(path, n_statements, people):
    """(people, statements) agreement 1 to 5, NaN where missing, of those people that are wanted."""
    found = []
    for line, row in data.read_lines(path):
        answers = row.get("answers")
        if not isinstance(answers, list) or len(answers) != n_statements:
            raise UserError(f"{line}: field 'answers': must be a list of {n_statements}")
        if not all(answer in (None, 1, 2, 3, 4, 5) for answer in answers):
            raise UserError(f"{line}: field 'answers': must be 1 to 5 or null")
        if str(row.get("person")) in people:
            found.append(answers)
    if not found:
        raise UserError(f"{path}: no answers of the people of training")
    if len(found) < len(people):
        print(f"{path}: answers of {len(found)} of the {len(people)} people of training")
    found = np.array(found, dtype=float)
    unanswered = np.isnan(found).all(axis=0)
    if unanswered.any():
        raise UserError(f"{path}: statement {unanswered.argmax() + 1}: no person of training "
                        "answers it")
    return found


def hold_out(records, n, seed):
    """(records of the people of training, records of n other people).

    Raises UserError where there are too few people.
    """
    people = sorted({few_shot.user_of(record) for record in records})
    if len(people) <= n:
        raise UserError(f"--held_out {n}: there are {len(people)} people")
    random.Random(seed).shuffle(people)
    unseen = set(people[:n])
    return ([record for record in records if few_shot.user_of(record) not in unseen],
            [record for record in records if few_shot.user_of(record) in unseen])


def split(trained, unseen, test_rows):
    """{file name: records}: `train` and `val-a` are of group a, `train-b`, `val-b` and `test` of b.

    `test` is a part of `val-b`.

    trained, unseen: the records of some people and of others. Raises UserError where a person is
    on both sides, a statement in both groups, or a group or user is missing.
    """
    people = {few_shot.user_of(record) for record in trained}
    files, tested = {"train": [], "train-b": [], "val-a": [], "val-b": [], "test": []}, Counter()
    group_of = {}
    for record in trained + unseen:
        group = record.get("meta", {}).get("group")
        if group not in ("a", "b"):
            raise UserError(f"{record['where']}: field 'meta.group': must be a or b")
        for side in ("chosen", "rejected"):
            if group_of.setdefault(record[side], group) != group:
                raise UserError(f"{record['where']}: field '{side}': is a statement of both groups")
    for record in trained:
        files["train" if record["meta"]["group"] == "a" else "train-b"].append(record)
    for record in unseen:
        user, group = few_shot.user_of(record), record["meta"]["group"]
        if user in people:
            raise UserError(f"{record['where']}: field 'user': is one of the people of training")
        files[f"val-{group}"].append(record)
        tested[user] += group == "b"
        if group == "b" and tested[user] <= test_rows:
            files["test"].append(record)
    empty = [name for name, rows in files.items() if not rows]
    if empty:
        raise UserError(f"no choices for {empty[0]}: both groups are needed")
    return files


def contested(records):
    """How many of the choices are on pairs of which not everybody chose the same statement."""
    chosen = defaultdict(list)
    for record in records:
        chosen[few_shot.pair_of(few_shot.choice(record))].append(record["chosen"])
    return sum(len(found) for found in chosen.values() if len(set(found)) > 1)


# ---------------------------------------------------------------- features of statements


def standardized(answers):
    """(people, statements) answers in standard deviations from a statement's mean.

    0 where an answer is missing or everybody's is the same.
    """
    spread, deviation = answers - np.nanmean(answers, axis=0), np.nanstd(answers, axis=0)
    return np.nan_to_num(spread / np.where(deviation > 0, deviation, 1))


def rating_features(statements, answers):
    """{statement: float32 features}: mean agreement, loadings on COMPONENTS principal components.

    answers: (people, statements), agreement 1 to 5, NaN where missing. Means have standard
    deviation 1 over statements, and so have loadings on the first component; those on the others
    are as much smaller as they tell less. Raises UserError where people or statements do not
    differ.
    """
    mean = np.nanmean(answers, axis=0)
    _, sizes, loadings = np.linalg.svd(standardized(answers), full_matrices=False)
    loadings = (sizes[:, None] * loadings)[:COMPONENTS]
    if mean.std() < 1e-6 or loadings[0].std() < 1e-6:
        raise UserError(f"the answers of {len(answers)} people of training do not differ")
    rows = np.vstack([(mean - mean.mean()) / mean.std(), loadings / loadings[0].std()])
    names = [row["statement"] for row in statements]
    return dict(zip(names, torch.from_numpy(rows.T).float(), strict=True))


def trait_features(statements, answers):
    """{statement: (traits + facets,) float32}: its sign at its trait and its facet, else 0.

    answers: (people, statements), agreement 1 to 5, NaN where missing. A statement's sign is that
    of its loading on the first principal component of its trait.
    """
    traits = sorted({row["trait"] for row in statements})
    facets = sorted({row["facet"] for row in statements})
    spread = standardized(answers)
    table = {}
    for trait in traits:
        own = [i for i, row in enumerate(statements) if row["trait"] == trait]
        signs = np.sign(np.linalg.svd(spread[:, own], full_matrices=False)[2][0])
        for i, sign in zip(own, signs, strict=True):
            row = statements[i]
            hits = [row["trait"] == x for x in traits] + [row["facet"] == x for x in facets]
            table[row["statement"]] = torch.tensor(hits) * float(sign)
    return table


def pair_features(choices, table):
    """(n, 2, features) of the statements chosen and those passed over."""
    rows = [table[choice[side]] for choice in choices for side in ("chosen", "rejected")]
    n_features = len(next(iter(table.values())))
    return torch.stack(rows).unflatten(0, (-1, 2)) if rows else torch.zeros(0, 2, n_features)


# ---------------------------------------------------------------- per-person logistic regression


def differences(choices, table):
    """(n, features) of the statements chosen minus those passed over."""
    chosen, rejected = pair_features(choices, table).unbind(1)
    return chosen - rejected


def fit(x, prior, ridge):
    """Logistic regression for each of B people at once, by damped Newton: (B, features).

    x (B, n, features), rows of zeros count nothing; minimised is the sum of -log sigmoid(x w) plus
    ridge / 2 times the squared distance of w from the prior.
    """

    def loss(w):
        fits = F.logsigmoid((x @ w[..., None])[..., 0]).sum(1)
        return ridge / 2 * (w - prior).pow(2).sum(1) - fits

    w = prior.expand(len(x), -1).clone()
    eye = torch.eye(x.shape[2])
    for _ in range(20):
        p = torch.sigmoid(-(x @ w[..., None])[..., 0])
        gradient = ridge * (w - prior) - (p[:, None] @ x)[:, 0]
        curvature = ridge * eye + x.transpose(1, 2) @ (x * (p * (1 - p))[..., None])
        step = torch.linalg.solve(curvature, gradient[..., None])[..., 0]
        for _ in range(10):  # where choices are nearly separable a whole step goes too far
            step = torch.where((loss(w - step) > loss(w))[:, None], step / 2, step)
        w = w - step
    return w


def regression_right(records, table, prior, ridge):
    """(n,) 1.0 where the regression on a record's `examples` gets it right; a tie is wrong."""
    x = torch.nn.utils.rnn.pad_sequence(
        [differences(record["examples"], table) for record in records], batch_first=True
    )
    w = fit(x, prior, ridge)
    return ((differences(records, table) * w).sum(1) > 0).float()


def regression(train, train_b, tests, table):
    """({kind of context: {N: (n,) 1.0 where it is right}}, the ridge that was chosen).

    Prior and ridge come from the people of training: `train` are their choices in group a,
    `train_b` those in b. tests: {kind: {N: records with N `examples`}}.
    """
    x = differences(train, table)
    population = fit(x[None], torch.zeros(x.shape[1]), 1.0)
    tuning = few_shot.with_context(train_b[::10], 10, train)
    ridge = max(RIDGES, key=lambda r: regression_right(tuning, table, population, r).mean())
    found = {kind: {n: regression_right(records, table, population, ridge)
                    for n, records in by_n.items()} for kind, by_n in tests.items()}
    return found, ridge


def popularity(records, statements, answers):
    """(n,) 1.0 where the statement that people agree with more is chosen; a tie is wrong."""
    names = [row["statement"] for row in statements]
    mean = dict(zip(names, np.nanmean(answers, axis=0), strict=True))
    return torch.tensor([float(mean[r["chosen"]] > mean[r["rejected"]]) for r in records])


# ---------------------------------------------------------------- NP-BTL on the same features


@torch.no_grad()
def reward_right(model, records, features):
    """(n,) 1.0 where a reward model steered by a record's `examples` is right; a tie is wrong."""
    rewards = model(features(records), few_shot.latents(model, records, features))
    return (rewards[:, 0] > rewards[:, 1]).float()


def neural_process(train, tests, table, seed):
    """{kind of context: {N: (n,) 1.0 where NP-BTL is right}}.

    A statement's features are its row of `table`.
    """
    features = partial(pair_features, table=table)
    users = train_btl.choices_by_user(train, features)
    model = train_btl.train_on_users(NP_BTL, users, seed, torch.device("cpu"))
    return {kind: {n: reward_right(model, records, features) for n, records in by_n.items()}
            for kind, by_n in tests.items()}


# ---------------------------------------------------------------- main


def interval(right, records):
    """(mean, half of its 95 % interval) of right (n,), which says how right each record is.

    The interval is that of other people, with the same statements and training. What one person
    says hangs together, so deviations are added up by person before they are squared.
    """
    mean, deviations = right.mean().item(), defaultdict(float)
    for record, value in zip(records, right.tolist(), strict=True):
        deviations[few_shot.user_of(record)] += value - mean
    if len(deviations) == 1:
        return mean, None  # one person says nothing of others
    return mean, 1.96 * sum(d**2 for d in deviations.values()) ** 0.5 / len(records)


def summary(found, records):
    """`interval` of each N of each kind, and of what the most choices gain over none."""
    result = {}
    for kind, by_n in found.items():
        by_n = by_n | {"gain": by_n[SIZES[-1]] - by_n[0]}
        result[kind] = {n: interval(right, records) for n, right in by_n.items()}
    return result


def print_line(name, shares):
    cells = (f"{100 * x:7.1f} +- " + ("  -" if y is None else f"{100 * y:3.1f}") for x, y in shares)
    print(f"{name:<24}" + "".join(cells))


def main(options):
    folder, out = Path(options.data), Path(options.out_dir)
    if not options.data:
        raise UserError("--data is required: a folder with choices_train.jsonl")
    records = data.read_records(str(folder / "choices_train.jsonl"))
    if options.test_data:
        trained, unseen = records, data.read_records(options.test_data)
    else:
        trained, unseen = hold_out(records, options.held_out, options.seed)
    files = split(trained, unseen, TEST_ROWS)
    statements = read_statements(folder / "statements.jsonl")
    known = {row["statement"] for row in statements}
    for record in trained + unseen:
        for side in ("chosen", "rejected"):
            if record[side] not in known:
                raise UserError(f"{record['where']}: field '{side}': not in statements.jsonl")
    people = set(map(few_shot.user_of, trained))
    answers = read_answers(folder / "answers_train.jsonl", len(statements), people)
    tables = {"traits and facets": trait_features(statements, answers),
              "means and components": rating_features(statements, answers)}
    tests = {f"context from {kind}": {
        n: few_shot.with_context(files["test"], n, files[f"val-{kind}"]) for n in SIZES
    } for kind in ("a", "b")}
    popular = interval(popularity(files["test"], statements, answers), files["test"])
    report = {"popularity": popular}
    for name, table in tables.items():
        found, ridge = regression(files["train"], files["train-b"], tests, table)
        runs = [neural_process(files["train"], tests, table, seed) for seed in range(NP_SEEDS)]
        mean = {kind: {n: sum(run[kind][n] for run in runs) / NP_SEEDS for n in SIZES}
                for kind in tests}
        report[name] = {"ridge": ridge, "regression": summary(found, files["test"]),
                        "NP-BTL": summary(mean, files["test"]),
                        "NP-BTL, each run": [summary(run, files["test"]) for run in runs]}

    for name, rows in files.items():
        path = out / f"{name}.jsonl"
        before = path.read_bytes() if path.exists() else None
        data.save_records(path, rows)
        if before not in (None, path.read_bytes()):
            print(f"{path}: replaces other choices, on which runs may stand")
        print(f"{path}: {len(rows)} choices of {len(set(map(few_shot.user_of, rows)))} people, "
              f"{contested(rows)} on pairs on which two of them disagree")
    common.save_json(out / "baselines.json", report | common.provenance())

    print(f"\nright choices on {out / 'test'}.jsonl, % and 95 % interval, by number known")
    print(f"{'':<24}" + "".join(f"{n:>7}{'':7}" for n in (*SIZES, "gain")))
    for name in tables:
        for method in ("regression", "NP-BTL"):
            print(f"{method} on {name}")
            for kind, by_n in report[name][method].items():
                print_line(f"  {kind}", by_n.values())
    print_line("popular answer", [popular])


if __name__ == "__main__":
    common.run(main, Options)
