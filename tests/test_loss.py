"""The DPO loss and the metrics of steerability, against numbers worked by hand."""

import math

import numpy as np
import pytest
import torch

from common import UserError
from evaluate import find_flips, mean_and_interval, steerability, summarize
from train_dpo import check_first_step, dpo_loss


def tensors(*columns):
    return [torch.tensor(column, dtype=torch.float32) for column in columns]


def sigmoid(x):
    return 1 / (1 + math.exp(-x))


def loss_of_margin(margin, label_prob=1.0):
    """dpo_loss of one pair with beta 1 and the whole margin in the policy's chosen answer."""
    losses, _, _ = dpo_loss(*tensors([margin], [0.0], [0.0], [0.0]), 1.0, label_prob)
    return losses.item()


# ---------------------------------------------------------------- the loss


def test_dpo_loss_worked_by_hand():
    """Two pairs, beta = 0.1. Rewards are beta times how much likelier than under the reference.

        pair 1: policy -10, -14; reference -12, -13
            chosen reward   0.1 * (-10 + 12) =  0.2
            rejected reward 0.1 * (-14 + 13) = -0.1
            margin 0.3, loss -log sigmoid(0.3) = log(1 + e^-0.3) = 0.5544
        pair 2: policy -30, -20; reference -25, -22
            chosen reward   0.1 * (-30 + 25) = -0.5
            rejected reward 0.1 * (-20 + 22) =  0.2
            margin -0.7, loss log(1 + e^0.7) = 1.1032
    """
    losses, chosen_rewards, rejected_rewards = dpo_loss(
        *tensors([-10, -30], [-14, -20], [-12, -25], [-13, -22]), 0.1
    )
    assert chosen_rewards.tolist() == pytest.approx([0.2, -0.5], abs=1e-6)
    assert rejected_rewards.tolist() == pytest.approx([-0.1, 0.2], abs=1e-6)
    expected = [math.log(1 + math.exp(-0.3)), math.log(1 + math.exp(0.7))]
    assert expected == pytest.approx([0.5544, 1.1032], abs=1e-4)
    assert losses.tolist() == pytest.approx(expected, abs=1e-6)


@pytest.mark.parametrize("label_prob", [1.0, 0.7, 0.0])
def test_loss_is_ln_2_where_policy_equals_reference(label_prob):
    chosen, rejected = tensors([-3.0, -800.0, -41.5], [-9.0, -2.0, -41.5])
    losses, *rewards = dpo_loss(chosen, rejected, chosen, rejected, 0.3, label_prob)
    assert losses.tolist() == pytest.approx([math.log(2)] * 3, abs=1e-6)
    assert all((reward == 0).all() for reward in rewards)


def test_swapping_the_answers_negates_the_margins():
    a, b, c, d = torch.randn(4, 50, generator=torch.Generator().manual_seed(0)) * 20
    losses, chosen, rejected = dpo_loss(a, b, c, d, 0.1)
    swapped_losses, swapped_chosen, swapped_rejected = dpo_loss(b, a, d, c, 0.1)
    assert torch.equal(chosen - rejected, -(swapped_chosen - swapped_rejected))
    # log sigmoid(x) - log sigmoid(-x) = x, so the losses differ by the margin.
    assert torch.allclose(swapped_losses - losses, chosen - rejected, atol=1e-5)


def test_gradient_signs_and_size():
    """d loss / d chosen = -beta * sigmoid(-margin); for the rejected answer it is the opposite."""
    logps = tensors([-10.0, -30.0], [-14.0, -20.0], [-12.0, -25.0], [-13.0, -22.0])
    for x in logps:
        x.requires_grad_()
    dpo_loss(*logps, 0.1)[0].sum().backward()
    expected = [-0.1 * sigmoid(-0.3), -0.1 * sigmoid(0.7)]
    assert logps[0].grad.tolist() == pytest.approx(expected, abs=1e-6)
    assert logps[1].grad.tolist() == pytest.approx([-g for g in expected], abs=1e-6)


def test_label_prob():
    assert loss_of_margin(1.7, 0.5) == pytest.approx(loss_of_margin(-1.7, 0.5))
    assert loss_of_margin(0.1, 0.5) > loss_of_margin(0.0, 0.5)  # it wants no margin at all
    assert loss_of_margin(1.7, 0.0) == pytest.approx(loss_of_margin(-1.7))
    logps = tensors([1.0, 1.0, 1.0], [0.0] * 3, [0.0] * 3, [0.0] * 3)
    losses, chosen_rewards, _ = dpo_loss(*logps, 1.0, torch.tensor([1.0, 0.25, 0.0]))
    right, wrong = math.log(1 + math.exp(-1)), math.log(1 + math.e)
    expected = [right, 0.25 * right + 0.75 * wrong, wrong]
    assert losses.tolist() == pytest.approx(expected, abs=1e-6)
    assert chosen_rewards.tolist() == [1.0] * 3  # rewards do not depend on the label


@pytest.mark.parametrize("p", [1.0, 0.8, 0.0])
def test_label_smoothing_mixes_the_two_labels(p):
    """A share e of labels flipped at random: the expected loss is that of (1 - e) p + e (1 - p)."""
    e, margin = 0.1, 0.9
    mixed = (1 - e) * loss_of_margin(margin, p) + e * loss_of_margin(margin, 1 - p)
    assert loss_of_margin(margin, (1 - e) * p + e * (1 - p)) == pytest.approx(mixed, abs=1e-6)


def test_large_margins_stay_finite_and_float32():
    logps = tensors([0.0, -9000.0], [-9000.0, 0.0], [-9000.0, 0.0], [0.0, -9000.0])
    logps[0].requires_grad_()
    losses, chosen_rewards, rejected_rewards = dpo_loss(*logps, 1.0, torch.tensor([1.0, 1.0]))
    assert losses.tolist() == [0.0, 18000.0]
    assert losses.dtype == chosen_rewards.dtype == rejected_rewards.dtype == torch.float32
    losses.sum().backward()
    assert logps[0].grad.tolist() == [0.0, -1.0]


def test_first_step_check():
    zero, off = torch.zeros(4), torch.tensor([0.0, 0.0, 0.0, 0.01])
    losses = torch.full((4,), math.log(2))
    lengths = torch.full((4, 2), 9.0)
    check_first_step(losses, zero, lengths, 0.1, "fp32")
    for wrong in (off, -off, torch.full((4,), math.nan)):
        with pytest.raises(UserError, match="reference is not the starting model"):
            check_first_step(losses, wrong, lengths, 0.1, "fp32")
    for precision in ("bf16", "fp16"):  # 0.1 and 0.05 nats a token, at random: 9 are 3 times one
        limit = 0.1 * 3 * {"bf16": 0.1, "fp16": 0.05}[precision]
        check_first_step(losses, off * 99 * limit, lengths, 0.1, precision)
        with pytest.raises(UserError, match="reference is not the starting model"):
            check_first_step(losses, off * 101 * limit, lengths, 0.1, precision)


# ---------------------------------------------------------------- steerability


def with_margins(margins):
    """(pairs, 2) log-probabilities whose chosen answer is ahead by these margins."""
    rejected = torch.linspace(-50, -40, len(margins))
    return torch.stack((rejected + torch.tensor(margins), rejected), dim=1).double()


def test_every_metric_on_scores_made_by_hand():
    """Five rows; (0, 1) and (2, 3) flip, row 4 has no partner. Margins, chosen minus rejected:

        row                              0     1     2     3     4
        policy                           3   -0.5    5    -4     0
        reference without meta-prompt    1    -1     3    -3     0
        score = difference               2    0.5    2    -1     0    right where above 0
        policy without meta-prompt       2    -2     3    -3    -1
        less the reference without it    1    -1     0     0    -1    0 counts half
        reference with meta-prompt       4     0     1     1    -2
        reward = policy less that       -1   -0.5    4    -5     2
        under the partner's preference -0.5   -2     1    -2          minus the partner's score
    """
    found = steerability(
        with_margins([3, -0.5, 5, -4, 0]), with_margins([2, -2, 3, -3, -1]),
        with_margins([4, 0, 1, 1, -2]), with_margins([1, -1, 3, -3, 0]), [(0, 1), (2, 3)],
    )
    found = {metric: dict(zip(*map(list, pair), strict=True)) for metric, pair in found.items()}
    assert found == {
        "accuracy": {0: True, 1: True, 2: True, 3: False, 4: False},
        "flip_accuracy": {0: True, 2: False},
        "accuracy_no_preference": {0: 1, 1: 0, 2: 0.5, 3: 0.5, 4: 0},
        "accuracy_opposite_preference": {0: False, 1: False, 2: True, 3: False},
        "rewards_accuracy": {0: False, 1: False, 2: True, 3: False, 4: True},
        "raw_accuracy": {0: True, 1: False, 2: True, 3: False, 4: False},
    }


def test_flip_metrics_are_absent_without_flips():
    scores = with_margins([1.0, 2.0])
    found = steerability(scores, scores, scores, scores, [])
    assert "flip_accuracy" not in found and "accuracy_opposite_preference" not in found
    assert not found["rewards_accuracy"][1].any()  # policy equals reference: a tie is wrong


def test_policy_that_ignores_the_meta_prompt():
    """Both rows of a flip then get one score with its sign turned: never are both of them right."""
    one, other = torch.randn(2, 40, 2, generator=torch.Generator().manual_seed(0)).unbind(0)
    one[7] = 0.0  # a tie
    flips = [(2 * i, 2 * i + 1) for i in range(40)]
    policy, reference = (torch.stack((x, x.flip(1)), dim=1).view(80, 2) for x in (one, other))
    reference[14:16] = 0.0
    found = steerability(policy, policy, reference, reference, flips)
    assert not found["flip_accuracy"][1].any()
    assert found["accuracy_no_preference"][1].mean() == 0.5
    assert found["accuracy"][1].mean() == found["accuracy_opposite_preference"][1].mean()
    assert found["accuracy"][1].sum() == 39  # half of all, but for the tie


def test_accuracy_by_preference_and_by_dataset():
    scores, nothing = with_margins([1.0, -1.0, 1.0, 1.0, -1.0]), with_margins([0.0] * 5)
    records = [row(f"q{i}", "a", "b") | {"meta": {"preference_name": name, "dataset": source}}
               for i, (name, source) in enumerate(["ax", "by", "ay", "bx", "bx"])]
    found = steerability(scores, nothing, nothing, nothing, [])
    del records[4]["meta"]["preference_name"]
    summary = summarize(found, records, [])
    assert summary["by_preference_name"] == {"a": {"pairs": 2, "accuracy": 1.0},
                                             "b": {"pairs": 2, "accuracy": 0.5}}
    assert summary["by_dataset"] == {"x": {"pairs": 3, "accuracy": 0.6667},
                                     "y": {"pairs": 2, "accuracy": 0.5}}


def test_policy_that_always_obeys():
    flips = [(2 * i, 2 * i + 1) for i in range(10)]
    obeys, nothing = with_margins([2.0] * 20), with_margins([0.0] * 20)
    found = steerability(obeys, nothing, nothing, nothing, flips)
    assert found["flip_accuracy"][1].all() and len(found["flip_accuracy"][1]) == 10
    assert not found["accuracy_opposite_preference"][1].any()
    assert len(found["accuracy_opposite_preference"][1]) == 20


def row(prompt, chosen, rejected):
    return {"prompt": prompt, "chosen": chosen, "rejected": rejected}


def test_find_flips_with_several_rows_in_each_direction():
    talk = [{"role": "user", "content": "q"}]
    records = [
        row("q", "a", "b"), row("q", "a", "b"), row("q", "b", "a"), row("q", "a", "b"),
        row("q", "b", "a"), row("other", "b", "a"), row("q", "a", "c"), row(talk, "x", "y"),
        row(talk, "y", "x"),
    ]
    flips = [set(flip) for flip in find_flips(records)]
    assert len(flips) == 3  # three against two make two; the third row has no partner left
    assert {7, 8} in flips
    flat = [i for flip in flips for i in flip]
    assert len(flat) == len(set(flat))
    for i, j in map(sorted, flips):
        assert (records[i]["chosen"], records[i]["rejected"]) == (
            records[j]["rejected"], records[j]["chosen"])
        assert records[i]["prompt"] == records[j]["prompt"]


# ---------------------------------------------------------------- intervals


def interval(right, records):
    rng = np.random.default_rng(0)
    mean, (low, high) = mean_and_interval(np.arange(len(right)), right, records, rng)
    assert mean == pytest.approx(np.mean(right))
    assert 0 <= low <= mean <= high <= 1
    return high - low


def test_bootstrap_interval():
    """Against 2 * 1.96 * sqrt(p (1 - p) / n), the width for n independent queries."""
    widths = []
    for n in (50, 5000):
        right = np.arange(n) % 5 > 0  # four of five
        widths.append(interval(right, [row(f"q{i}", "a", "b") for i in range(n)]))
        assert widths[-1] == pytest.approx(2 * 1.96 * math.sqrt(0.16 / n), rel=0.2)
    assert interval(np.ones(30, bool), [row(f"q{i}", "a", "b") for i in range(30)]) == 0
    # One person says nothing of others, but their queries something of other queries.
    mine = [row(f"q{i}", "a", "b") | {"user": 1} for i in range(50)]
    assert interval(np.arange(50) % 5 > 0, mine) == pytest.approx(widths[0], rel=0.01)
    # Asking the same fifty queries a hundred times each teaches nothing more about them.
    again = np.repeat(np.arange(50) % 5 > 0, 100)
    repeated = interval(again, [row(f"q{i // 100}", "a", "b") for i in range(5000)])
    assert repeated == pytest.approx(widths[0], rel=0.2)
