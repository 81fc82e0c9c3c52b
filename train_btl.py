"""NP-BTL: a reward model that infers from a few of a user's choices what this user wants.

    python train_btl.py                                  # the paper's synthetic task, five seeds
    python train_btl.py --pref_data FILE[,FILE...] --init_from DIR --out_dir DIR

Kobalczyk et al. 2024, arXiv:2412.13998. On files an answer is seen through the outputs of a frozen
model; `evaluate.py --ckpt OUT_DIR --pref_data FILE --context N` then measures it.
"""

import dataclasses
import time
from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from tqdm import tqdm

import common
import data
import distributed
import few_shot
import world
from common import UserError
from few_shot import Features, RewardModel
from model import for_inference
from sample import load_start, start_of


@dataclass(frozen=True)
class Options:
    """Train a Bradley-Terry reward model that a latent steers, read off a few choices."""

    pref_data: str = "synthetic"  # synthetic, users (of the world), or files of rows with `user`
    init_from: str = ""  # on users or files: the frozen model that reads the answers
    out_dir: str = ""  # folder of this run; default for synthetic: out/btl
    overwrite: bool = False  # replace a run that is there
    context: int = 10  # most choices to infer a user's preference from; drawn are 0 to this many
    targets: int = 16  # further choices of each user; predicted are all that are not in the context
    latent: int = 8  # channels of the latent
    kl_weight: float = 0.0  # variational latent: weight of KL(z given all pairs, z given context)
    n_hidden: int = 64  # channels of the layers
    n_layer: int = 3  # layers of the reward
    steps: int = 500  # optimizer steps
    batch_size: int = 64  # users a step
    learning_rate: float = 6e-3  # peak
    weight_decay: float = 0.0  # AdamW's, on matrices
    warmup_steps: int = 50  # linear, before the cosine to a fiftieth of the peak
    seeds: int = 5  # synthetic: how many models are trained, with seeds seed, seed + 1, ...
    seed: int = 0  # of initialisation, users and contexts
    device: str = "auto"  # auto, cpu, cuda, cuda:N, mps

    def __post_init__(self):
        common.at_least(
            self, 1, "context", "targets", "latent", "n_hidden", "n_layer", "steps", "batch_size",
            "seeds",
        )
        common.at_least(self, 0, "kl_weight", "learning_rate", "weight_decay", "warmup_steps",
                        "seed")


def btl_loss(chosen_rewards, rejected_rewards):
    """-log p(chosen above rejected) of each pair, nats (Bradley and Terry 1952)."""
    return -F.logsigmoid(chosen_rewards - rejected_rewards)


def kl_divergence(mean, variance, prior_mean, prior_variance):
    """KL of diagonal Gaussians, (B, Z) each, summed over channels: (B,) nats."""
    ratio = variance / prior_variance
    distance = (mean - prior_mean) ** 2 / prior_variance
    return 0.5 * (ratio + distance - 1 - ratio.log()).sum(1)


def batch_loss(model, pairs, present, known, kl_weight):
    """Mean loss of a batch of users, whose pairs are part context, part targets.

    pairs: (B, P, 2, F), chosen first; present: (B, P), 0 where a user has fewer pairs; known:
    (B, P), 1 where a pair is in the context, which has a user's first ones. With kl_weight z is
    drawn from the posterior given all pairs, and its divergence from that given the context is
    added (Poddar et al. 2024, arXiv:2408.10075, with the context's posterior as the prior).
    """
    longest = max(1, int(known.sum(1).max()))
    mean, variance = model.encoder(pairs[:, :longest], known[:, :longest])
    z, divergence = mean, 0.0
    if kl_weight:
        full = model.encoder(pairs, present)
        z = full[0] + full[1].sqrt() * torch.randn_like(mean)
        divergence = kl_divergence(*full, mean, variance).mean()
    rewards = model(pairs, z)
    targets = present - known
    losses = btl_loss(*rewards.unbind(-1))
    return (losses * targets).sum() / targets.sum() + kl_weight * divergence


# ---------------------------------------------------------------- the synthetic task


def synthetic_pairs(users, n, generator):
    """(users, n, 2, 1) pairs of answers y, uniform in [0, 1], the one chosen first.

    The reward is y below 0.5, else 2 y for one half of the users and 1 - y for the other.
    """
    y = torch.rand(users, n, 2, generator=generator)
    kind = torch.randint(2, (users, 1, 1), generator=generator)
    rewards = torch.where(y < 0.5, y, torch.where(kind == 0, 2 * y, 1 - y))
    first = rewards[..., :1] > rewards[..., 1:]
    return torch.where(first, y, y.flip(-1))[..., None]


def synthetic_bound(n):
    """Best possible accuracy with n choices known: half of all pairs tell the two kinds apart."""
    return 1 - 2 ** -(n + 2)


DATA_SEED = 2**20  # added to a run's seed, so that users are not drawn as weights are
PAPER = {0: 75.2, 1: 80.0, 3: 88.2, 5: 93.6, 10: 97.2}  # accuracy in percent with n choices known


@torch.no_grad()
def synthetic_accuracy(model, n, device, users=10000, targets=8):
    """Share of right predictions for users that were never trained on, n choices known."""
    pairs = synthetic_pairs(users, n + targets, torch.Generator().manual_seed(2**31)).to(device)
    known = torch.ones(users, n, device=device)
    rewards = model(pairs[:, n:], model.encoder(pairs[:, :n], known)[0])
    return (rewards[..., 0] > rewards[..., 1]).float().mean().item()


def synthetic(options, folder, device):
    """The table: accuracy by number of known choices, mean and spread over seeds."""
    common.claim(folder, None, options.overwrite)
    common.clear(folder, options.overwrite)
    torch.set_num_threads(1)  # products as small as these run slower on several
    found = defaultdict(list)
    for seed in range(options.seed, options.seed + options.seeds):
        generator = torch.Generator().manual_seed(DATA_SEED + seed)

        def draw(generator=generator):
            n = options.context + options.targets
            pairs = synthetic_pairs(options.batch_size, n, generator)
            return pairs, torch.ones(pairs.shape[:2])

        model = train(options, 1, draw, seed, device)
        for n in PAPER:
            found[n].append(synthetic_accuracy(model, n, device))
    print(f"choices known{'bound':>10}{'paper':>10}{'ours':>10}"
          f"   (least to most of {options.seeds} seeds)")
    for n, values in found.items():
        low, mean, high = (100 * x for x in (min(values), sum(values) / len(values), max(values)))
        print(f"{n:>13}{100 * synthetic_bound(n):>10.1f}{PAPER[n]:>10.1f}{mean:>10.1f}"
              f"   ({low:.1f} to {high:.1f})")
    report = {"accuracy": found, "bound": {n: synthetic_bound(n) for n in PAPER}}
    common.save_json(folder / "synthetic.json", report | common.provenance())


# ---------------------------------------------------------------- training


def train(options, n_features, draw, seed, device, log=None):
    """A reward model trained on draw() -> (pairs (B, P, 2, F), present (B, P))."""
    torch.manual_seed(seed)
    model = RewardModel(n_features, options.latent, options.n_hidden, options.n_layer).to(device)
    optimizer = common.adamw(model, options.learning_rate, options.weight_decay)
    scaler = torch.amp.GradScaler(device.type, enabled=False)
    bar = tqdm(range(options.steps), desc=f"btl, seed {seed}", unit="step", leave=False)
    for step in bar:
        pairs, present = (x.to(device) for x in draw())
        if step == 0:
            model.encoder.standardize(pairs[present > 0].flatten(0, 1))
        most = (present.sum(1) - 1).clamp(0, options.context)  # of the context: a target is left
        n_known = (torch.rand(len(pairs), device=device) * (most + 1)).floor()
        known = (torch.arange(pairs.shape[1], device=device) < n_known[:, None]).float()
        loss = batch_loss(model, pairs, present, known, options.kl_weight)
        loss.backward()
        rate = common.learning_rate(
            step, options.steps, options.warmup_steps, options.learning_rate
        )
        grad_norm = common.update(model, optimizer, scaler, 1.0, rate)
        if log:
            log.write(step=step + 1, loss=loss.item(), grad_norm=grad_norm, learning_rate=rate)
        bar.set_postfix(loss=f"{loss.item():.4f}", refresh=False)
    return model.eval()


def choices_by_user(records, features):
    """[features (n, 2, F) of the choices of a user], a pair of answers once.

    Raises UserError for a row without a user, or whose label is uncertain.
    """
    by_user = defaultdict(dict)
    for record in records:
        if not few_shot.is_certain(record):
            raise UserError(f"{record['where']}: field 'label_prob': NP-BTL needs certain labels")
        found = few_shot.choice(record)
        by_user[few_shot.user_of(record)].setdefault(few_shot.pair_of(found), found)
    return [features(list(found.values())) for found in by_user.values()]


def train_on_users(options, users, seed, device, log=None):
    """A reward model of users' choices, [(n, 2, F)].

    A step takes up to context + targets random choices of each of batch_size random users; unlike
    in `few_shot.Contexts`, one that is known may share an answer with one that is predicted.
    """
    generator = torch.Generator().manual_seed(DATA_SEED + seed)
    size = min(options.context + options.targets, max(map(len, users)))
    n_features = users[0].shape[2]

    def draw():
        pairs = users[0].new_zeros(options.batch_size, size, 2, n_features)
        present = pairs.new_zeros(pairs.shape[:2])
        for i in range(options.batch_size):
            own = users[torch.randint(len(users), (), generator=generator)]
            order = torch.randperm(len(own), generator=generator)[:size]
            pairs[i, : len(order)], present[i, : len(order)] = own[order], 1
        return pairs, present

    return train(options, n_features, draw, seed, device, log)


def on_files(options, folder, device):
    """Train on the choices of the users of files; writes a run's folder."""
    if not options.init_from:
        raise UserError("--init_from is required: the model that reads the answers")
    if options.pref_data == "users":
        records = world.user_pairs()
    else:
        records = data.read_records(options.pref_data)
    base, tokenizer = load_start(options.init_from, device)
    features = Features(for_inference(base), tokenizer)
    few_shot.say_stated(records)
    users = choices_by_user(records, features)
    again = len(records) - sum(map(len, users))
    if again:
        print(f"{options.pref_data}: left out {again} of {len(records)} rows on pairs that their "
              "user had already chosen from")
    if max(map(len, users)) < 2:
        raise UserError(f"{options.pref_data}: no user has two choices, to see one and predict one")
    config = {
        "stage": "np-btl", "options": dataclasses.asdict(options),
        "model": {"n_features": features.table.shape[1], "n_latent": options.latent,
                  "n_hidden": options.n_hidden, "n_layer": options.n_layer},
        "tokenizer": tokenizer.describe(), "reference": start_of(options.init_from, folder),
    }
    common.claim(folder, None, options.overwrite)
    common.clear(folder, options.overwrite)
    common.save_json(folder / "config.json", config | common.provenance())
    log = common.Log(folder, 0)
    model = train_on_users(options, users, options.seed, device, log)
    common.finish_run(folder, model)


def main(options):
    if distributed.WORLD > 1:
        raise UserError("train_btl.py is one process: start it without torchrun")
    if options.pref_data != "synthetic" and not options.out_dir:
        raise UserError("--out_dir is required on other data than the synthetic task")
    if options.pref_data == "synthetic" and options.init_from:
        raise UserError("--init_from: the synthetic task has no answers to read; add --pref_data")
    device, folder = common.pick_device(options.device), Path(options.out_dir or "out/btl")
    start = time.perf_counter()
    common.check_folder(folder, None, options.overwrite, options.init_from)
    work = synthetic if options.pref_data == "synthetic" else on_files
    work(options, folder, device)
    print(f"{time.perf_counter() - start:.0f} s")


if __name__ == "__main__":
    common.run(main, Options)
