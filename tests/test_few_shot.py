"""Few-shot steering: contexts, the encoder, FiLM, NP-BTL, NP-DPO and choices as text."""

import json
import math
import random
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

import data
import evaluate
import few_shot
import people
import plot
import sample
import train_btl
import train_dpo
import train_sft
import world
from common import UserError
from model import AdaptersOff, Encoder, add_latent, answer_logps, generate, pack
from tiny import (
    CONFIG,
    capture_on_the_cpu,
    dpo,
    draw,
    draw_trees,
    new_model,
    read_log,
    run,
    same,
    sft,
    user_rows,
    weights,
)

LATENT = {"pref_data": "users.jsonl", "context": 4, "latent": 3}


@pytest.fixture
def users(workplace, write_rows):
    write_rows("users.jsonl", *user_rows())


# ---------------------------------------------------------------- whose choices


def test_a_context_is_what_the_same_user_chose_on_other_pairs():
    rows = user_rows()
    rows.append(rows[0] | {"chosen": rows[0]["rejected"], "rejected": rows[0]["chosen"]})
    contexts = few_shot.Contexts(rows)
    for i, row in enumerate(rows):
        drawn = contexts.draw(i, 99, random.Random(0))
        others = [r for r in rows[:-1]  # of a pair that a user chose from twice the first choice
                  if r["user"] == row["user"] and r["prompt"] != row["prompt"]]
        key = lambda r: (r["prompt"], r["chosen"], r["rejected"])  # noqa: E731
        assert sorted(map(key, drawn)) == sorted(map(key, others))
        assert contexts.draw(i, 2, random.Random(5)) == contexts.draw(i, 5, random.Random(5))[:2]


def test_a_choice_is_never_in_its_own_context_whatever_came_before():
    """A choice keeps the last turn only, so rows that differ before it are the same choice."""
    turns = lambda text: [{"role": "user", "content": text},  # noqa: E731
                          {"role": "assistant", "content": "ok"},
                          {"role": "user", "content": "go on"}]
    rows = [{"user": 1, "prompt": turns(text), "chosen": "x", "rejected": "y"} for text in "abc"]
    assert few_shot.Contexts(rows).sizes() == [0, 0, 0]


def test_a_context_tells_nothing_of_the_answers_that_are_to_be_compared():
    """To the same prompt, who prefers A to B says something of A against C."""
    def row(prompt, chosen, rejected):
        return {"user": "u", "prompt": prompt, "chosen": chosen, "rejected": rejected}

    rows = [row("p", "a", "b"), row("p", "c", "a"), row("p", "c", "d"), row("q", "a", "b"),
            row("p", "d", "c"), row("p", "c", "d")]
    drawn = few_shot.with_context(rows, 10)
    chosen = [sorted((c["prompt"], c["chosen"]) for c in r["examples"]) for r in drawn]
    assert chosen[0] == [("p", "c"), ("q", "a")]  # c over d, once
    assert chosen[2] == [("p", "a"), ("q", "a")]
    assert len(chosen[3]) == 3  # another prompt: all of p's pairs, each once


def test_a_context_from_another_source_has_the_same_users():
    rows = user_rows()
    a, b = ([r for r in rows if r["meta"]["group"] == g] for g in "ab")
    for record in few_shot.with_context(b, 3, a):
        asked = {choice["prompt"] for choice in record["examples"]}
        assert len(asked) == 3 and asked <= {r["prompt"] for r in a}
        likes_short = all(len(c["chosen"]) < len(c["rejected"]) for c in record["examples"])
        assert likes_short == bool(record["user"] % 2)


def test_a_user_is_the_same_as_a_number_and_as_text():
    rows = user_rows()
    as_text = [row | {"user": str(row["user"])} for row in rows]
    shown = [[r["examples"] for r in few_shot.with_context(some, 3, rows)]
             for some in (rows, as_text)]
    assert shown[0] == shown[1] and all(map(len, shown[0]))


def test_a_choice_of_uncertain_label_is_shown_to_nobody():
    rows = user_rows()
    doubtful = {row["prompt"] for row in rows[:2]}
    rows[0]["label_prob"], rows[1]["label_prob"] = 0.1, 0.9
    for i, row in enumerate(few_shot.with_context(rows, 9)):
        asked = {choice["prompt"] for choice in row["examples"]}
        assert bool(asked & doubtful) == (rows[i]["user"] != rows[0]["user"])
    nobodys = {k: v for k, v in rows[0].items() if k != "user"}
    assert few_shot.Contexts(rows[2:], [*rows[2:], nobodys]).sizes()


def test_that_a_stated_preference_is_not_shown_is_said(capsys):
    rows = user_rows()
    few_shot.with_context(rows, 1)
    assert "preference" not in capsys.readouterr().out
    stated = [rows[0] | {"preference": "Be brief."}, *rows[1:]]
    few_shot.with_context(stated, 0)
    assert "preference" not in capsys.readouterr().out
    few_shot.with_context(stated, 1)
    assert "1 choices were made under a system message or preference" in capsys.readouterr().out


def test_choices_are_taken_from_all_files_and_there_have_to_be_some(
    users, write_rows, command, tmp_path
):
    rows = user_rows()
    names = [write_rows(f"{g}.jsonl", *[r for r in rows if r["meta"]["group"] == g]) for g in "ab"]
    datasets = evaluate.load_preferences(",".join(map(str, names)))
    for _, records in evaluate.add_contexts(datasets, [6]):
        assert all(len(record["examples"]) == 6 for record in records)
    dpo("out/a", **LATENT)
    other = write_rows("other.jsonl", *[row | {"user": f"not {row['user']}"} for row in rows])
    for size, code in (("0", 0), ("2", 2)):
        status, _, err = command(evaluate, "--ckpt", "out/a", "--pref_data", "users.jsonl",
                                 "--context", size, "--context_data", other)
        assert status == code and ("nor any other's has a choice elsewhere" in err) == bool(code)


def test_what_does_not_fit_is_known_before_anything_is_evaluated(users, monkeypatch, command):
    dpo("out/a", pref_data="users.jsonl", context=1, max_steps=1)
    monkeypatch.setattr(evaluate, "pair_logps", None)
    status, _, err = command(evaluate, "--ckpt", "out/a", "--pref_data", "users.jsonl",
                             "--context", "0", "6")
    assert status == 2
    assert "users.jsonl:1: field 'examples' (or --context, --examples): with it" in err


def test_draws_that_show_nothing_are_no_error(users, monkeypatch):
    monkeypatch.setattr(random.Random, "randint", lambda self, a, b: 0)
    dpo("out/a", **LATENT | {"max_steps": 1})


def test_latents_of_many_records_are_those_of_a_few_at_once(users):
    dpo("out/a", **LATENT)
    model, _ = sample.load_checkpoint("out/a", torch.device("cpu"))
    rows = few_shot.with_context(user_rows(), 4)
    with torch.no_grad():
        whole, parts = few_shot.latents(model, rows), few_shot.latents(model, rows, at_once=5)
    assert len(parts) == 42 and (whole - parts).abs().max() < 1e-5 < whole.std()


def test_fewer_choices_than_asked_are_told(capsys):
    assert all(len(r["examples"]) == 6 for r in few_shot.with_context(user_rows(), 9))
    assert "42 of 42 rows have fewer than 9 choices" in capsys.readouterr().out


def test_random_contexts_have_every_size_and_are_drawn_anew():
    rows = user_rows()
    drawn = few_shot.with_random_contexts(rows, [0] * 200, 4, seed=1)
    sizes = [len(r["examples"]) for r in drawn]
    assert all(sizes.count(n) > 20 for n in range(5)) and max(sizes) == 4
    assert drawn == few_shot.with_random_contexts(rows, [0] * 200, 4, seed=1)
    assert drawn != few_shot.with_random_contexts(rows, [0] * 200, 4, seed=2)


def test_a_row_without_a_user_is_named():
    row = {"prompt": "a", "chosen": "b", "rejected": "c", "where": "x.jsonl:7"}
    with pytest.raises(UserError, match=r"x.jsonl:7: field 'user': missing"):
        few_shot.Contexts([row])
    del row["where"]
    with pytest.raises(UserError, match=r"built-in data \(--context needs `users`\)"):
        few_shot.Contexts([row])


# ---------------------------------------------------------------- encoder and FiLM


def random_pairs(users=3, n=4, size=5, seed=0):
    return torch.randn(users, n, 2, size, generator=torch.Generator().manual_seed(seed))


def test_the_order_of_choices_does_not_matter_and_absent_ones_are_not_seen():
    encoder, pairs = Encoder(5, 3), random_pairs()
    mean, variance = encoder(pairs, torch.ones(3, 4))
    again = encoder(pairs[:, [2, 0, 3, 1]], torch.ones(3, 4))
    assert torch.allclose(mean, again[0], atol=1e-6)
    two = encoder(pairs[:, :2], torch.ones(3, 2))
    padded = encoder(pairs, torch.tensor([1.0, 1, 0, 0]).expand(3, 4))
    assert torch.allclose(two[0], padded[0], atol=1e-6) and not torch.allclose(mean, two[0])
    nothing = encoder(pairs, torch.zeros(3, 4))
    assert (nothing[0] == 0).all() and (nothing[1] == 1).all()  # the prior
    assert (variance < two[1]).all() and (two[1] < 1).all()  # more choices, more certain


def test_which_answer_was_chosen_matters():
    encoder, pairs = Encoder(5, 3), random_pairs()
    one, other = (encoder(p, torch.ones(3, 4))[0] for p in (pairs, pairs.flip(2)))
    assert not torch.allclose(one, other, atol=1e-3)


def test_standardized_features_have_mean_0_and_deviation_1():
    encoder, x = Encoder(5, 3), random_pairs().flatten(0, 2) * 7 + 3
    encoder.standardize(x)
    found = encoder.normalize(x)
    assert torch.allclose(found.mean(0), torch.zeros(5), atol=1e-5)
    assert torch.allclose(found.std(0, correction=0), torch.ones(5), atol=1e-5)
    encoder.standardize(x[:1])
    assert (encoder.scale == 1).all() and (encoder.normalize(x[:1]) == 0).all()


def steered(seed=0):
    """A model whose latent does something."""
    model = new_model()
    add_latent(model, 3)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for block in model.blocks:
            for film in (block.film_1, block.film_2):
                film.scale_shift.weight.normal_(0, 0.5, generator=generator)
    return model


def test_a_new_latent_changes_nothing():
    model, trees = new_model(), pack(draw_trees(2))
    before = answer_logps(model, trees)
    add_latent(model, 3)
    assert torch.equal(answer_logps(model, trees), before)
    trees.z = torch.randn(6, 3)
    assert torch.equal(answer_logps(model, trees), before)


def knowing(model, choices):
    """The model with random features of the answers of these choices."""
    generator, table = torch.Generator().manual_seed(3), {}
    for found in choices:
        for side in ("chosen", "rejected"):
            n = 2 * model.config.n_embd
            table.setdefault(found[side], torch.randn(n, generator=generator))
    model.features = lambda asked: torch.stack(
        [torch.stack([table[found["chosen"]], table[found["rejected"]]]) for found in asked]
    )
    return model


def test_what_a_latent_thinks_of_two_answers_by_hand():
    """reward_head @ features, weighted by z: here its second channel likes a high feature 0."""
    model, rows = new_model(), user_rows()[:2]
    add_latent(model, 3)
    knowing(model, rows)
    with torch.no_grad():
        model.encoder.scale.fill_(2.0)
        model.reward_head.weight.zero_()[1, 0] = 5.0
    found = few_shot.rewards(model, rows, torch.tensor([[9.0, 0.5, 9.0], [0.0, 0.0, 0.0]]))
    expected = model.features(rows)[0, :, 0] * 2.0 * 5.0 * 0.5
    assert torch.allclose(found[0], expected) and (found[1] == 0).all()


def test_the_encoder_learns_before_the_policy_listens():
    """FiLM starts as the identity, so at step 0 only NP-BTL's loss has a gradient for z."""
    model = new_model()
    add_latent(model, 3)
    rows = few_shot.with_context(user_rows(), 3)[:6]
    knowing(model, [choice for row in rows for choice in (row, *row["examples"])])
    trees = pack(draw_trees(2))
    trees.z = few_shot.latents(model, rows)
    logps = answer_logps(model, trees).view(-1, 2)
    none = torch.autograd.grad(logps[:, 0].sum(), trees.z, retain_graph=True)[0]
    assert (none == 0).all()
    few_shot.rewards(model, rows, trees.z)[:, 0].sum().backward()
    assert model.encoder.layers[0].weight.grad.abs().max() > 0


def test_a_latent_steers_its_own_tree_only():
    """Packed with other trees under other latents a tree scores as alone."""
    model, trees, z = steered(), draw_trees(2), torch.randn(6, 3)
    packed = pack(trees)
    packed.z = z
    found = answer_logps(model, packed).view(-1, 2)
    for i, tree in enumerate(trees):
        alone = pack([tree])
        alone.z = z[i : i + 1]
        assert torch.allclose(answer_logps(model, alone), found[i], atol=1e-4)
    packed.z = z.roll(1, 0)
    assert (answer_logps(model, packed).view(-1, 2) - found).abs().min() > 1e-3
    assert torch.equal(answer_logps(AdaptersOff(model), packed), answer_logps(model, pack(trees)))


@pytest.mark.parametrize("captured", [False, True])
@pytest.mark.parametrize("equal", [True, False])
def test_steered_generation_with_a_cache_equals_that_without(equal, captured, monkeypatch):
    if captured:
        capture_on_the_cpu(monkeypatch)
    model, rng = steered(), random.Random(0)
    prompts = [draw(rng, 3) + draw(rng, n) for n in (1, 5, 9, 2)]
    z = torch.randn(4, 3)
    z = z[:1].expand(4, 3) if equal else z
    answers = generate(model, prompts, [0], 12, z=z)
    for prompt, answer, mine in zip(prompts, answers, z, strict=True):
        tokens = list(prompt)
        for _ in range(12):
            trees = pack([(tokens, [])])
            trees.z = mine[None]
            token = int(model.logits(model(trees)[-1:]).argmax())
            if token == 0:
                break
            tokens.append(token)
        assert tokens[len(prompt):] == answer
    assert generate(model, prompts, [0], 12) != answers


# ---------------------------------------------------------------- features


def test_features_are_mean_and_last_of_what_the_model_says_to_an_answer():
    model, trees = new_model(), draw_trees(2)
    found = few_shot.answer_features(model, pack(trees)).view(-1, 2, 2 * CONFIG.n_embd)
    for i, (trunk, answers) in enumerate(trees):
        for j, answer in enumerate(answers):
            outputs = model(pack([(trunk + answer[:-1], [])]))[len(trunk) - 1 :]
            expected = torch.cat((outputs.mean(0), outputs[-1]))
            assert torch.allclose(found[i, j], expected, atol=1e-4)


def test_each_answer_is_read_once(tiny_run):
    model, tokenizer = sample.load_checkpoint(tiny_run, torch.device("cpu"))
    features = few_shot.Features(model, tokenizer)
    choices = [few_shot.choice(row) for row in user_rows()]
    found = features(choices)
    assert found.shape == (42, 2, 32) and len(features.table) == 14
    assert torch.equal(features(choices[3:5]), found[3:5]) and len(features.table) == 14
    assert torch.equal(found[0], found[7].flip(0))  # the other user chose the other answer


# ---------------------------------------------------------------- NP-BTL


def test_the_bound_of_the_synthetic_task_is_that_of_exact_inference():
    """A reasoner who knows both reward functions: keep the kinds that explain all choices."""
    generator = torch.Generator().manual_seed(0)
    pairs = train_btl.synthetic_pairs(40000, 4, generator)[..., 0]
    explains = torch.stack([rewards(pairs).diff(dim=-1)[..., 0] < 0 for rewards in (
        lambda y: torch.where(y < 0.5, y, 2 * y), lambda y: torch.where(y < 0.5, y, 1 - y))])
    assert explains.any(0).all()
    agree = (explains[0] == explains[1]).float()
    assert agree.mean() == pytest.approx(0.5, abs=0.01)  # half of the pairs conflict
    for n in (0, 1, 3):
        possible = explains[:, :, :n].all(2).float()  # (kind, user)
        says_so = (possible[:, :, None] * explains[:, :, n:]).sum(0) / possible.sum(0)[:, None]
        assert says_so.mean() == pytest.approx(train_btl.synthetic_bound(n), abs=0.006)


def test_the_reward_model_reaches_the_bound(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    train_btl.main(train_btl.Options(seeds=1, steps=400, device="cpu"))
    found = json.loads(Path("out/btl/synthetic.json").read_text())["accuracy"]
    for n, [value] in found.items():
        assert value < train_btl.synthetic_bound(int(n)) + 0.01  # not by looking at the targets
        assert value > train_btl.synthetic_bound(int(n)) - 0.03


def test_only_targets_are_learned():
    """The loss of a batch is the mean over pairs that are present and not in the context."""
    torch.manual_seed(0)
    model, pairs = few_shot.RewardModel(5, 3, 16, 2), random_pairs()
    with torch.no_grad():
        for film in model.films:
            film.scale_shift.weight.normal_()
    present = torch.tensor([[1.0, 1, 1, 1], [1, 1, 1, 0], [1, 1, 0, 0]])
    known = torch.tensor([[1.0, 1, 0, 0], [0, 0, 0, 0], [1, 0, 0, 0]])
    losses = []
    for i, (context, targets) in enumerate((([0, 1], [2, 3]), ([], [0, 1, 2]), ([0], [1]))):
        z, _ = model.encoder(pairs[i, None, context], torch.ones(1, len(context)))
        for j in targets:
            a, b = model(pairs[i, j][None], z)[0].tolist()
            losses.append(math.log1p(math.exp(b - a)))
    found = train_btl.batch_loss(model, pairs, present, known, 0.0)
    assert found.item() == pytest.approx(sum(losses) / 6, abs=1e-5)
    # A variational latent: drawn given all pairs; nothing to pay where the context is all pairs.
    full = train_btl.batch_loss(model, pairs, present, known, 1e-9)
    assert full.item() != pytest.approx(found.item(), abs=1e-4)
    assert train_btl.batch_loss(model, pairs, present, known, 2.0) > full + 0.01


def test_kl_divergence_is_that_of_torch():
    generator = torch.Generator().manual_seed(0)
    a, b = (torch.randn(2, 4, 3, generator=generator) for _ in range(2))
    normals = [torch.distributions.Normal(x[0], x[1].exp().sqrt()) for x in (a, b)]
    expected = torch.distributions.kl_divergence(*normals).sum(1)
    found = train_btl.kl_divergence(a[0], a[1].exp(), b[0], b[1].exp())
    assert torch.allclose(found, expected, atol=1e-5)


def test_a_reward_model_needs_users_with_two_choices(users, write_rows, command):
    for extra, named in (({}, "no user has two choices"), ({"label_prob": 0.9}, "label_prob")):
        write_rows("one.jsonl", *[row | {"user": i} | extra for i, row in enumerate(user_rows())])
        status, _, err = command(train_btl, "--pref_data", "one.jsonl", "--init_from", "tiny",
                                 "--out_dir", "out/r", "--device", "cpu")
        assert status == 2 and named in err and not Path("out/r").exists()


def test_a_reward_model_says_that_it_does_not_read_preferences(users, write_rows, command):
    write_rows("stated.jsonl", *[row | {"preference": "Be brief."} for row in user_rows()])
    for path, said in (("stated.jsonl", True), ("users.jsonl", False)):
        status, out, err = command(
            train_btl, "--pref_data", path, "--init_from", "tiny", "--out_dir", "out/r",
            "--device", "cpu", "--steps", "1", "--overwrite",
        )
        assert status == 0, err
        assert ("made under a system message or preference" in out) is said


def test_a_reward_model_of_files_is_evaluated_like_the_others(
    users, command, write_rows, monkeypatch
):
    run_btl = ("--pref_data", "users.jsonl", "--init_from", "tiny", "--out_dir", "out/r",
               "--device", "cpu", "--steps", "150", "--context", "3", "--targets", "3")
    status, _, err = command(train_btl, *run_btl)
    assert status == 0, err
    asked = ("--ckpt", "out/r", "--pref_data", "users.jsonl", "--context", "0", "3", "9")
    write_rows("told.jsonl", *[row | {"preference": "Be brief."} for row in user_rows()])
    status, out, err = command(evaluate, "--ckpt", "out/r", "--pref_data", "told.jsonl",
                               "--report", "told.json")
    assert status == 0 and "does not read the rows' system messages and preferences" in out
    status, _, err = command(evaluate, *asked, "--report", "out")
    assert status == 2 and "--report out: is a folder" in err
    status, out, err = command(evaluate, *asked, "--report", "new/found.json")
    assert status == 0, err
    status, table, err = command(plot, "--table", "NP-BTL=new/found.json", "--metrics", "accuracy")
    assert status == 0 and "| 100.0 |" in table, err
    assert not Path("out/r/eval.json").exists()
    status, out, err = command(evaluate, *asked)
    assert status == 0, err
    results = json.loads(Path("out/r/eval.json").read_text())["results"]
    shown = [result["choices_shown"] for result in results.values()]
    assert shown == [0, 3, 6]  # each user has seven
    [few] = [v for k, v in results.items() if k.endswith("N=3")]
    [none] = [v for k, v in results.items() if k.endswith("N=0")]
    assert few["accuracy"] == few["flip_accuracy"] == 1.0
    assert none["flip_accuracy"] == 0.0 and few["accuracy_no_preference"] == 0.5
    assert few["rewards_accuracy"] is None  # there is no reference
    Path("out/started").mkdir()
    Path("out/started/log.jsonl").write_text("")
    status, _, err = command(train_btl, *run_btl[:4], "--out_dir", "out/started")
    assert status == 2 and "is in use" in err and "--resume" not in err
    sizes, read = [], few_shot.Features.read
    monkeypatch.setattr(few_shot.Features, "read", lambda self, choices: sizes.append(
        self.micro_tokens) or read(self, choices))
    assert command(evaluate, *asked, "--micro_tokens", "99")[0] == 0
    assert set(sizes) == {99}
    for arguments, named in ((run_btl, "--overwrite"), (run_btl[:2], "--out_dir"),
                             (run_btl[2:4], "--init_from"),
                             ((*run_btl[:2], "--out_dir", "out/q"), "--init_from"),
                             (("--out_dir", "out/r"), "out/r")):
        status, _, err = command(train_btl, *arguments)
        assert status == 2 and named in err and len(err.splitlines()) == 1
    status, _, err = command(sample, "--ckpt", "out/r", "--prompt", "Hi", "--device", "cpu")
    assert status == 2 and "reward model" in err and len(err.splitlines()) == 1


# ---------------------------------------------------------------- NP-DPO and choices as text


@pytest.mark.parametrize("how", [{}, {"lora_rank": 2}])
def test_np_dpo_learns_resumes_and_loads(users, how, write_rows):
    """Starts at ln 2; resumed equals uninterrupted; what is saved answers as what was trained."""
    rows = user_rows()
    write_rows("others.jsonl", *rows[:-1], rows[-1] | {"user": 0})  # the same texts
    settings = LATENT | how | {"epochs": 6.0, "learning_rate": 5e-3, "save_every": 7,
                               "eval_data": "users.jsonl", "eval_every": 10, "sft_weight": 1.0,
                               "btl_weight": 0.5}
    dpo("out/whole", **settings)
    log = read_log("out/whole")
    assert log[1]["loss/dpo"] == pytest.approx(math.log(2), abs=1e-5)
    terms = [log[1][f"loss/{term}"] for term in ("dpo", "sft", "btl")]
    assert log[1]["loss"] == pytest.approx(np.dot([1, 1, 0.5], terms))
    assert log[-2]["loss/btl"] < 0.7 * log[1]["loss/btl"]
    stop = train_dpo.common.save_checkpoint
    calls = []

    def save(*arguments):
        stop(*arguments)
        calls.append(1)
        if len(calls) == 2:
            raise KeyboardInterrupt

    train_dpo.common.save_checkpoint = save
    try:
        with pytest.raises(KeyboardInterrupt):
            dpo("out/cut", **settings)
    finally:
        train_dpo.common.save_checkpoint = stop
    with pytest.raises(UserError, match="cannot resume"):
        dpo("out/cut", resume=True, **settings | {"pref_data": "others.jsonl"})
    dpo("out/cut", resume=True, **settings)
    assert same(weights("out/cut"), weights("out/whole")) and read_log("out/cut") == log
    assert any(name.startswith("encoder.") for name in weights("out/whole"))
    [after] = json.loads(Path("out/whole/eval.json").read_text())["results"].values()
    [watched] = [row["eval"] for row in log if "eval" in row][-1].values()
    assert watched["accuracy"] > 0.9

    run(evaluate, ckpt="out/whole", pref_data="users.jsonl", context=4)
    [found] = json.loads(Path("out/whole/eval.json").read_text())["results"].values()
    run(evaluate, ckpt="out/whole", pref_data="users.jsonl", context=0)
    [none] = json.loads(Path("out/whole/eval.json").read_text())["results"].values()
    assert found == after and found["accuracy"] > 0.9 and found["flip_accuracy"] > 0.8
    assert none["flip_accuracy"] == 0 and found["accuracy_no_preference"] == 0.5


def test_evaluation_reads_choices_in_parts_of_micro_tokens(users, monkeypatch):
    dpo("out/a", **LATENT | {"max_steps": 1})
    sizes, read = [], few_shot.Features.read
    monkeypatch.setattr(few_shot.Features, "read", lambda self, choices: sizes.append(
        self.micro_tokens) or read(self, choices))
    run(evaluate, ckpt="out/a", pref_data="users.jsonl", context=4, micro_tokens=99)
    assert set(sizes) == {99}


def test_the_weight_of_what_z_alone_is_to_learn(users):
    """0 leaves the linear map as it started; the other parts of step 0 are the same."""
    settings = LATENT | {"weight_decay": 0.0, "epochs": 2.0}
    dpo("out/start", **settings, btl_weight=0.0, max_steps=1)
    dpo("out/none", **settings, btl_weight=0.0)
    dpo("out/half", **settings, btl_weight=0.5)
    start, none, half = (weights(f"out/{name}")["reward_head.weight"]
                         for name in ("start", "none", "half"))
    assert torch.equal(none, start) and (half - start).abs().max() > 1e-3
    first = [read_log(f"out/{name}")[0] for name in ("none", "half")]
    assert first[0]["loss/btl"] == first[1]["loss/btl"] > 0
    assert first[1]["loss"] - first[0]["loss"] == pytest.approx(0.5 * first[0]["loss/btl"])


def test_the_starting_model_reads_the_choices(users):
    """Not the trained one: its outputs have moved since the encoder learned to read them."""
    dpo("out/a", **LATENT, learning_rate=5e-3, epochs=3.0)
    model, tokenizer = sample.load_checkpoint("out/a", torch.device("cpu"))
    start, _ = sample.load_checkpoint("tiny", torch.device("cpu"))
    choices = [few_shot.choice(row) for row in user_rows()[:5]]
    expected = few_shot.Features(start, tokenizer)(choices)
    assert torch.allclose(model.features(choices), expected, atol=1e-4)
    moved = few_shot.Features(model, tokenizer)(choices)
    assert (moved - expected).abs().max() > 0.01


def test_a_starting_model_of_other_sizes_is_refused(users):
    """Its weights are the same, but it would read the choices otherwise."""
    dpo("out/a", **LATENT)
    path = Path("tiny/config.json")
    path.write_text(path.read_text().replace('"rope_theta": 10000.0', '"rope_theta": 500.0'))
    with pytest.raises(UserError, match="starting model's config.json has changed"):
        sample.load_checkpoint("out/a", torch.device("cpu"))


def test_examples_that_rows_bring_are_read_or_said_to_give_way(users, write_rows, capsys):
    rows = few_shot.with_context(user_rows(), 3)
    write_rows("own.jsonl", *rows)
    dpo("out/a", pref_data="own.jsonl", latent=3)
    assert "give way" not in capsys.readouterr().out
    dpo("out/b", pref_data="own.jsonl", latent=3, context=2)
    assert "42 of 42 rows: their own examples give way" in capsys.readouterr().out


def test_choices_as_text_are_the_examples_tier(users, monkeypatch):
    """Plain DPO on prompts that hold 0 to 4 other choices; the reference sees them too."""
    seen, encode = [], data.encode
    monkeypatch.setattr(data, "encode", lambda row, *rest: seen.append(row) or encode(row, *rest))
    dpo("out/a", pref_data="users.jsonl", context=4, epochs=2.0)
    sizes = [len(record["examples"]) for record in seen[:84]]
    assert set(sizes) == {0, 1, 2, 3, 4}
    tokens = sum(row["tokens"] for row in read_log("out/a"))
    dpo("out/b", pref_data="users.jsonl", epochs=2.0)
    assert tokens > 2 * sum(row["tokens"] for row in read_log("out/b"))
    assert sample.load_checkpoint("out/a", torch.device("cpu"))[0].encoder is None


def test_sft_learns_chosen_answers_behind_choices(users, monkeypatch, write_rows):
    seen, encode = [], data.encode
    monkeypatch.setattr(data, "encode", lambda row, *rest: seen.append(row) or encode(row, *rest))
    sft("out/a", data="users.jsonl", context=4, epochs=2.0)
    chosen = {(row["user"], row["prompt"]): row["chosen"] for row in user_rows()}
    assert {len(row["examples"]) for row in seen[:84]} == {0, 1, 2, 3, 4}
    for row in seen[:84]:
        assert row["response"] == chosen[row["user"], row["prompt"]] and "rejected" not in row
        assert all(choice["prompt"] != row["prompt"] for choice in row["examples"])
    sft("out/world", data="users", context=1, tokenizer="world", max_steps=1, block_size=512)
    assert len(read_log("out/world")) == 1
    write_rows("sft.jsonl", {"prompt": "a", "response": "b", "user": "c"})
    with pytest.raises(UserError, match=r"sft.jsonl:1: field 'chosen': missing"):
        sft("out/b", data="sft.jsonl", context=4)


@pytest.mark.parametrize("latent", [0, 3])
def test_sample_reads_examples_as_the_checkpoint_was_trained(
    users, latent, command, write_rows, capfd
):
    dpo("out/a", pref_data="users.jsonl", context=4, latent=latent, epochs=8.0, learning_rate=5e-3)
    rows = user_rows()
    write_rows("short.jsonl", *rows[7:11])
    write_rows("long.jsonl", *[row | {"preference": "Be brief."} for row in rows[:4]])
    answers = []
    write_rows("both.jsonl", *rows[5:9])
    for name in ("short", "long", "both"):
        status, out, err = command(sample, "--ckpt", "out/a", "--prompt", "Do you like 9?",
                                   "--examples", f"{name}.jsonl", "--device", "cpu",
                                   "--precision", "fp32")
        assert status == 0, err
        assert ("the choices of 2 users" in out) == (name == "both")
        assert ("4 choices were made under a system message" in out) == (name == "long")
        answers.append(out)
    assert answers[0] != answers[1]
    # A pair that comes again, even the other way round, and a choice in doubt are left out.
    again = [rows[8] | {"chosen": rows[8]["rejected"], "rejected": rows[8]["chosen"]}]
    write_rows("again.jsonl", *rows[7:11], rows[7], *again, rows[12] | {"label_prob": 0.9})
    assert sample.read_examples("again.jsonl") == sample.read_examples("short.jsonl")
    out = capfd.readouterr().out
    assert "3 of 7 choices are left out" in out and "choices of 2 users" not in out
    write_rows("two.jsonl", rows[8], *[row | {"user": "another"} for row in again])
    assert len(sample.read_examples("two.jsonl")) == 1
    assert "choices of 2 users" in capfd.readouterr().out
    write_rows("doubt.jsonl", *[row | {"label_prob": 0.9} for row in rows[:4]])
    status, _, err = command(sample, "--ckpt", "out/none", "--prompt", "Why?", "--examples",
                             "doubt.jsonl")
    assert status == 2 and "--examples doubt.jsonl: no choice that is certain" in err


@pytest.mark.parametrize(("options", "named"), [
    ({"context": -1}, "--context"), ({"latent": -1}, "--latent"),
    ({"latent": 2, "fsdp": True}, "--latent"),
    ({"context": 2}, "field 'user': missing"),
    ({"latent": 2, "pref_data": "users.jsonl"}, "no row has choices"),
    ({"context": 2, "blank_meta_prompt": True}, "exclude each other"),
    ({"init_from": "latent"}, "has a latent"),
])
def test_what_cannot_be_is_named(users, options, named, command):
    if options.get("init_from"):
        dpo("latent", **LATENT)
    with pytest.raises(UserError, match=named):
        dpo("out/a", **options)
    if "init_from" in options:
        status, _, err = command(evaluate, "--ckpt", "tiny", "--pref_data", "users.jsonl",
                                 "--reference", "latent")
        assert status == 2 and "--reference latent: has a latent" in err
        with pytest.raises(UserError, match=named):
            sft("out/a", init_from="latent")


@pytest.mark.parametrize(("arguments", "named"), [
    (["--context", "two"], "--context"), (["--context", "-1"], "--context"),
    (["--context", "1", "--pref_data", "pairs.jsonl"], "field 'user'"),
    (["--context", "1", "--context_data", "none.jsonl"], "none.jsonl"),
    (["--context_data", "users.jsonl"], "--context_data needs --context"),
])
def test_evaluate_names_what_is_wrong_with_a_context(users, arguments, named, command):
    status, _, err = command(evaluate, "--ckpt", "tiny", "--pref_data", "users.jsonl",
                             "--device", "cpu", *arguments)
    assert status == 2 and named in err and len(err.splitlines()) == 1


# ---------------------------------------------------------------- the world's users


def test_the_commands_on_the_worlds_users_in_miniature(workplace, monkeypatch, command):
    """RESULTS.md's, with fewer rows and steps."""
    for name, n in (("TRAIN_COUPLES", 1), ("TRAIN_PAIRS", 40), ("SFT_USERS", 2), ("SFT_ROWS", 50),
                    ("EVAL_COUPLES", 1)):
        monkeypatch.setattr(world, name, n)
    start, users = ("--init_from", "out/sft"), ("--pref_data", "users")
    few = ("--device", "cpu", "--batch_size", "20", "--epochs", "1")
    for arguments in (
        (train_sft, "--out_dir", "out/sft", "--block_size", "4096", *few),
        (train_dpo, *start, *users, "--context", "3", "--latent", "4", "--out_dir", "out/np", *few),
        (train_dpo, *start, "--pref_data", "told", "--out_dir", "out/told", *few),
        (train_sft, *start, "--data", "users", "--context", "3", "--out_dir", "out/text", *few),
        (train_btl, *start, *users, "--context", "3", "--targets", "2", "--latent", "4",
         "--steps", "2", "--out_dir", "out/btl", "--device", "cpu"),
        *((evaluate, "--ckpt", f"out/{name}", *users, "--context", "0", "3", "--device", "cpu",
           "--max_new_tokens", "3") for name in ("np", "text", "btl")),
    ):
        status, out, err = command(*arguments)
        assert status == 0, (arguments, err)
    for name in ("np", "text", "btl"):
        results = json.loads(Path(f"out/{name}/eval.json").read_text())["results"]
        assert list(results) == ["users, N=0", "users, N=3"]
        for entry in results.values():
            assert entry["pairs"] == 40 and entry["flips"] == 20
            assert (entry.get("generated_axes_right") is None) == (name == "btl")
    results = json.loads(Path("out/told/eval.json").read_text())["results"]
    assert results["told"]["generated_axes_right"] is not None


@pytest.mark.parametrize("evaluation", [False, True])
def test_users_of_the_world_choose_by_their_values(evaluation):
    rows = world.user_pairs(evaluation)
    values = {}
    for row in rows[:: 1 if evaluation else 37]:
        wanted, [axis] = row["meta"]["values"], row["meta"]["differ"]
        assert values.setdefault(row["user"], wanted) == wanted
        chosen, rejected = (world.read_style(row[side]) for side in ("chosen", "rejected"))
        assert chosen[axis] == wanted[axis] != rejected[axis]
        assert all(chosen[other] == rejected[other] for other in world.AXES if other != axis)
        assert "preference" not in row and "system" not in row
    assert len(evaluate.find_flips(rows)) == len(rows) // 2
    if evaluation:
        assert len({row["user"] for row in rows[:40]}) == 32
        assert len({tuple(found.values()) for found in values.values()}) == 32


def test_users_of_the_sft_stage_are_answered_as_they_choose():
    """A response has all five values of its user, whose choices elsewhere tell them."""
    rows, values = world.user_rows(), {}
    assert not {row["prompt"] for row in rows} & {r["prompt"] for r in world.user_pairs(True)}
    for row in rows[::7]:
        style = world.read_style(row["response"])
        assert values.setdefault(row["user"], style) == style and None not in style.values()
        chosen, rejected = (world.read_style(row[side]) for side in ("chosen", "rejected"))
        differ = [axis for axis in world.AXES if chosen[axis] != rejected[axis]]
        assert differ and all(chosen[axis] == style[axis] for axis in differ)
        assert world.on_topic(row["prompt"], row["response"])
    assert len(values) == world.SFT_USERS
    assert len({tuple(style.values()) for style in values.values()}) == 32
    assert data.chosen_as_response(rows[0])["response"] == rows[0]["response"]


def test_users_of_the_evaluation_ask_what_training_never_asks():
    train, test = world.user_pairs(), world.user_pairs(True)
    assert not {row["prompt"] for row in train} & {row["prompt"] for row in test}
    for rows, evaluation in ((train, False), (test, True)):
        told = world.user_pairs(evaluation, told=True)
        assert all(row.pop("preference") for row in told) and told == rows


def test_generated_answers_of_all_users_count_also_without_a_context(workplace):
    """Two users who ask the same want different things, so no row stands for both."""
    model, tokenizer = sample.load_checkpoint("tiny", torch.device("cpu"))
    rows = [row | {"prompt": "?"} for row in world.user_pairs(True)[:64]]
    found, axes = evaluate.score_generated(model, tokenizer, rows + rows, 2)
    assert len(found["generated_all_right"][0]) == 32
    assert {axis: len(right) for axis, right in axes.items()} == dict.fromkeys(world.AXES, 32)


def test_the_term_on_z_heeds_uncertain_labels(users):
    """A label that is as likely wrong as right costs ln 2 at least, whatever is learned."""
    dpo("out/a", **LATENT, label_smoothing=0.5, epochs=6.0, learning_rate=5e-3)
    assert min(row["loss/btl"] for row in read_log("out/a")) >= math.log(2) - 1e-6


def test_the_figure_of_a_latent(users, command):
    pytest.importorskip("matplotlib").use("Agg")
    dpo("out/a", **LATENT)
    status, _, err = command(plot, "--latent", "out/a")
    assert status == 2 and "was not trained on the world's users" in err
    for folder in ("out/a", "tiny"):  # as if it had been
        path = Path(folder, "config.json")
        config = json.loads(path.read_text()) | {"options": {"pref_data": "users"}}
        path.write_text(json.dumps(config))
    status, _, err = command(plot, "--latent", "out/a", "--figure", "latent.png")
    assert status == 0, err
    assert Path("latent.png").read_bytes().startswith(b"\x89PNG")
    status, _, err = command(plot, "--latent", "tiny")
    assert status == 2 and "has no latent" in err


def test_the_figure_of_choices_has_mean_and_spread_of_runs(workplace, command):
    pytest.importorskip("matplotlib").use("Agg")
    for run_dir, shares in (("a", (0.5, 0.7)), ("b", (0.5, 0.9)), ("none", ())):
        results = {f"users, N={n}": {"accuracy": share, "generated_axes_right": None}
                   for n, share in zip((0, 4), shares, strict=False)} or {"users": {"accuracy": 1}}
        Path(run_dir).mkdir()
        Path(run_dir, "eval.json").write_text(json.dumps({"results": results}))
    for folder, results in (("two", {"x, N=0": {"accuracy": 1}, "y, N=0": {"accuracy": 0}}),
                            ("odd", {"x, N=y": {"accuracy": 1}, "x, N=1": {"accuracy": "1"}})):
        Path(folder).mkdir()
        Path(folder, "eval.json").write_text(json.dumps({"results": results}))
    runs = plot.read_groups(["both=a,b"])["both"]
    assert plot.by_size(runs, "accuracy") == {0: [50, 50], 4: [70, 90]}
    assert plot.by_size(runs, "generated_axes_right") == {}
    status, _, err = command(plot, "--choices", "both=a,b", "one=a", "--figure", "choices.png",
                             "--metrics", "accuracy", "generated_axes_right")
    assert status == 0, err
    assert Path("choices.png").read_bytes().startswith(b"\x89PNG")
    for wrong in (("x=none",), ("x=odd",), ("x=two",), ("x=a,two",), ("a",), ("x=a", "x=b")):
        status, _, err = command(plot, "--choices", *wrong, "--metrics", "accuracy")
        assert status == 2 and len(err.splitlines()) == 1, err
    assert not Path("assets").exists()


def test_on_the_way_between_two_latents_answers_change(monkeypatch):
    """At the ends the answers are those of the ends."""
    texts = [world.write_answer(world.draw_content(random.Random(0), True), style) for style in (
        {axis: values[i] for axis, values in world.AXES.items()} for i in (0, 1))]
    monkeypatch.setattr(plot, "answer", lambda model, tokenizer, records, z: [
        texts[int(row[0] > 0.5)] for row in z])
    wanted = {axis: values[1] for axis, values in world.AXES.items()}
    ends = torch.zeros(3), torch.ones(3)
    found = plot.continuum(None, None, [{"prompt": "a"}] * 2, *ends, wanted, steps=5)
    assert found == {axis: [0, 0, 0, 1, 1] for axis in world.AXES}


# ---------------------------------------------------------------- real people


def people_data(write_rows, n_people=8):
    """People whose answers follow five traits; a statement with `not` is reversed."""
    rng = random.Random(0)
    statements = [{"statement": f"{trait} {i}{' not' * (i % 2)}", "trait": trait,
                   "facet": f"{trait}{i // 10}"} for trait in "NEOAC" for i in range(60)]
    answers, choices = [], []
    for person in range(n_people):
        level = {trait: rng.choice((-1, 1)) for trait in "NEOAC"}
        given = [3 + 2 * level[s["trait"]] * (-1) ** (i % 2) for i, s in enumerate(statements)]
        answers.append({"person": person, "answers": given})
        for first, group in enumerate("ab"):
            half = [i for i in range(300) if i // 2 % 2 == first]
            for _ in range(30):
                i, j = rng.sample(half, 2)
                if given[i] != given[j]:
                    i, j = (i, j) if given[i] > given[j] else (j, i)
                    choices.append({"user": str(person), "prompt": "Which?",
                                    "chosen": statements[i]["statement"],
                                    "rejected": statements[j]["statement"],
                                    "meta": {"group": group}})
    write_rows("choices_train.jsonl", *choices)
    write_rows("answers_train.jsonl", *answers)
    write_rows("statements.jsonl", *statements)
    return choices


def read_people(tmp_path):
    """(statements, (people, statements) answers) that people_data wrote."""
    statements = [json.loads(line) for line in (tmp_path / "statements.jsonl").open()]
    rows = [json.loads(line) for line in (tmp_path / "answers_train.jsonl").open()]
    return statements, np.array([row["answers"] for row in rows], dtype=float)


@pytest.fixture
def short_np_btl(monkeypatch):
    monkeypatch.setattr(people, "NP_BTL", replace(people.NP_BTL, steps=2))


def test_people_who_are_held_out_are_in_no_training_file(
    tmp_path, write_rows, command, short_np_btl
):
    people_data(write_rows)
    status, _, err = command(people, "--data", tmp_path, "--held_out", "2")
    assert status == 0, err
    read = {name: [json.loads(line) for line in Path(f"out/people/{name}.jsonl").open()]
            for name in ("train", "val-a", "val-b", "test")}
    who = {name: {row["user"] for row in rows} for name, rows in read.items()}
    assert who["val-a"] == who["val-b"] and len(who["val-b"]) == 2 and len(who["train"]) == 6
    assert not who["train"] & who["val-b"]
    assert {row["meta"]["group"] for row in read["train"] + read["val-a"]} == {"a"}
    assert len(read["test"]) == 20 and all(row in read["val-b"] for row in read["test"])
    status, out, err = command(people, "--data", tmp_path, "--held_out", "2")
    assert status == 0 and "replaces" not in out
    status, out, err = command(people, "--data", tmp_path, "--held_out", "3")
    assert status == 0 and "out/people/train.jsonl: replaces other choices" in out
    assert "people of training" not in out
    answers = (tmp_path / "answers_train.jsonl").read_text().splitlines(True)
    (tmp_path / "answers_train.jsonl").write_text("".join(answers[:-5]))
    status, out, err = command(people, "--data", tmp_path, "--held_out", "2")
    assert status == 0 and "people of training" in out, err
    (tmp_path / "answers_train.jsonl").write_text("".join(answers))
    status, _, err = command(people, "--data", tmp_path, "--held_out", "8")
    assert status == 2 and "--held_out 8" in err
    # Other people, all of the first ones being trained on.
    further = [row | {"user": f"other {row['user']}"} for row in read["val-a"] + read["val-b"]]
    rows = write_rows("further.jsonl", *further)
    status, _, err = command(people, "--data", tmp_path, "--test_data", rows)
    assert status == 0, err
    train = [json.loads(line) for line in Path("out/people/train.jsonl").open()]
    test = [json.loads(line) for line in Path("out/people/test.jsonl").open()]
    assert len({row["user"] for row in train}) == 8
    assert test == [row | {"user": f"other {row['user']}"} for row in read["test"]]
    status, _, err = command(people, "--data", tmp_path, "--test_data",
                             tmp_path / "choices_train.jsonl")
    assert status == 2 and "people of training" in err and len(err.splitlines()) == 1


@pytest.mark.parametrize(("name", "row", "named"), [
    ("choices_train.jsonl", {"user": "1", "prompt": "?", "chosen": "new", "rejected": "N 0",
                             "meta": {"group": "a"}}, "field 'chosen': not in statements"),
    ("choices_train.jsonl", {"user": "1", "prompt": "?", "chosen": "N 2", "rejected": "N 0",
                             "meta": {}}, "field 'meta.group'"),
    ("choices_train.jsonl", {"user": "1", "prompt": "?", "chosen": "N 2", "rejected": "N 0",
                             "meta": {"group": "a"}}, "is a statement of both groups"),
    ("statements.jsonl", {"statement": "a", "trait": 3, "facet": "b"}, "field 'trait'"),
    ("answers_train.jsonl", {"person": 3, "answers": [1, 2]}, "field 'answers': must be a list"),
    ("answers_train.jsonl", {"person": 3, "answers": [9] * 300}, "field 'answers': must be 1"),
])
def test_bad_data_of_people_is_named_and_nothing_is_written(
    tmp_path, write_rows, command, name, row, named
):
    people_data(write_rows)
    with (tmp_path / name).open("a") as f:
        f.write(json.dumps(row) + "\n")
    status, _, err = command(people, "--data", tmp_path, "--held_out", "2")
    assert status == 2 and named in err and name in err and len(err.splitlines()) == 1
    assert not Path("out").exists()


def test_choices_are_contested_where_two_people_disagree():
    pairs = ("ab", "ba", "ab", "cd", "cd", "ef")  # chosen, rejected
    rows = [{"prompt": [{"role": "user", "content": "?"}], "chosen": x, "rejected": y}
            for x, y in pairs]
    assert people.contested(rows) == 3
    assert people.contested([*rows, {"prompt": "!", "chosen": "d", "rejected": "c"}]) == 3


@pytest.mark.parametrize(("n", "scale"), [(6, 1), (20, 30)])
def test_the_regression_minimises_its_objective(n, scale):
    """Few rows are separable; of many large ones some are not, and whole Newton steps diverge."""
    generator = torch.Generator().manual_seed(0)
    x, prior = torch.randn(9, n, 4, generator=generator), torch.randn(4, generator=generator)
    x *= scale
    w = people.fit(x, prior, 0.5).requires_grad_()
    losses = -torch.nn.functional.logsigmoid((x @ w[..., None])[..., 0]).sum()
    (losses + 0.25 * (w - prior).pow(2).sum()).backward()
    assert w.grad.abs().max() < 1e-4 * scale
    assert torch.equal(people.fit(torch.zeros(3, 0, 4), prior, 0.5), prior.expand(3, 4))


@pytest.mark.parametrize("alike", [True, False])
def test_the_ridge_is_chosen_on_people_of_training(alike):
    """Strong where all want the same, weak where each has wishes of their own."""
    generator = torch.Generator().manual_seed(0)
    table = {str(i): torch.randn(4, generator=generator) for i in range(60)}
    wishes = torch.randn(1 if alike else 40, 4, generator=generator).expand(40, 4)

    def choices(person, n):
        for i in range(n):
            one, other = torch.randperm(60, generator=generator)[:2].tolist()
            wanted = (table[str(one)] - table[str(other)]) @ wishes[person]
            noise = 3 * alike * torch.randn((), generator=generator)
            one, other = (one, other) if wanted + noise > 0 else (other, one)
            yield {"user": str(person), "prompt": f"{i}?", "chosen": str(one),
                   "rejected": str(other)}

    train, train_b = ([row for person in range(40) for row in choices(person, 200)] for _ in "ab")
    _, ridge = people.regression(train, train_b, {}, table)
    assert (ridge >= 10) == alike


def test_the_sign_of_a_statement_is_found_from_answers(tmp_path, write_rows):
    people_data(write_rows, 40)
    statements, answers = read_people(tmp_path)
    table = people.trait_features(statements, answers)
    for trait in "NEOAC":
        own = [s["statement"] for s in statements if s["trait"] == trait]
        signs = [table[text][table[text] != 0][0].item() for text in own]
        assert len(set(signs[::2])) == len(set(signs[1::2])) == 1 and signs[0] == -signs[1]


def test_means_and_components_of_answers(tmp_path, write_rows):
    """Answers that follow five traits are combinations of five components."""
    people_data(write_rows, 40)
    statements, answers = read_people(tmp_path)
    with pytest.raises(UserError, match="1 people of training do not differ"):
        people.rating_features(statements, answers[:1])
    table = people.rating_features(statements, answers)
    rows = np.array([table[s["statement"]].tolist() for s in statements])
    assert np.corrcoef(rows[:, 0], answers.mean(0))[0, 1] > 0.999
    spread = (answers - answers.mean(0)) / answers.std(0)
    fitted = spread @ np.linalg.pinv(rows[:, 1:].T) @ rows[:, 1:].T
    assert np.abs(fitted - spread).max() < 1e-4
    holes = np.where(np.random.default_rng(0).random(answers.shape) < 0.05, np.nan, answers)
    again = people.rating_features(statements, holes)
    assert all(row.isfinite().all() for row in again.values())


@pytest.mark.parametrize("features", [people.trait_features, people.rating_features])
def test_a_neural_process_infers_what_a_person_is_like(tmp_path, write_rows, features):
    records = people_data(write_rows, 200)
    files = people.split(*people.hold_out(records, 50, 0), 10)
    tests = {kind: {n: few_shot.with_context(files["test"], n, files[f"val-{kind}"])
                    for n in (0, 20)} for kind in "ab"}
    table = features(*read_people(tmp_path))
    found = people.neural_process(files["train"], tests, table, seed=0)
    for kind in "ab":  # no statement of b is in training
        assert found[kind][0].mean() < 0.6 < 0.65 < found[kind][20].mean()


def test_an_interval_counts_people(capsys):
    """Who says the same four times counts once; where all do equally well it is 0."""
    rows = [{"user": user} for user in range(25) for _ in range(4)]
    right = torch.tensor([float(user < 20) for user in range(25) for _ in range(4)])
    half = 1.96 * (0.8 * 0.2 / 25) ** 0.5
    assert people.interval(right, rows) == pytest.approx((0.8, half))
    assert people.interval(torch.tensor([1.0, 0.0] * 50), rows) == pytest.approx((0.5, 0))
    # Three rows of one person, all right, and one of another, wrong: off by 3/4 each.
    rows, right = [{"user": user} for user in "aaab"], torch.tensor([1.0, 1.0, 1.0, 0.0])
    assert people.interval(right, rows) == pytest.approx((0.75, 1.96 * 2**0.5 * 0.75 / 4))
    assert people.interval(right[:3], rows[:3]) == (1, None)
    people.print_line("one", [(1.0, None), (0.5, 0.25)])
    assert capsys.readouterr().out.split() == ["one", "100.0", "+-", "-", "50.0", "+-", "25.0"]


def test_the_gain_is_that_of_the_most_choices():
    rows, ones = [{"user": user} for user in "aabb"], torch.ones(4)
    by_n = {n: ones if n == 20 else 0 * ones for n in people.SIZES}
    found = people.summary({"from a": by_n}, rows)["from a"]
    assert found["gain"] == found[20] == (1, 0) and found[10] == (0, 0)
