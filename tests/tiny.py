"""What the tests of models and of runs share: tiny models, tiny data, runs in miniature."""

import json
import random
from pathlib import Path

import torch

import common
import train_dpo
import train_sft
from model import ModelConfig, Transformer

# ---------------------------------------------------------------- models

CONFIG = ModelConfig(
    vocab_size=29, block_size=40, n_layer=2, n_head=4, n_kv_head=2, n_embd=32, n_hidden=48
)


def new_model(config=CONFIG, seed=0):
    """A model with weights so large that position, order and context matter to every output."""
    model = Transformer(config).initialize(torch.Generator().manual_seed(seed))
    generator = torch.Generator().manual_seed(seed + 1)
    with torch.no_grad():
        for p in model.parameters():
            p.mul_(8) if p.dim() == 2 else p.uniform_(0.5, 1.5, generator=generator)
    return model.eval()


def draw(rng, n):
    return [rng.randrange(CONFIG.vocab_size) for _ in range(n)]


def draw_trees(n_branches, n_trees=6, seed=0):
    """Trees of unequal trunks and unequal answers, one of which is a single token."""
    rng = random.Random(seed)
    trees = [
        (draw(rng, rng.randint(1, 15)), [draw(rng, rng.randint(1, 12)) for _ in range(n_branches)])
        for _ in range(n_trees)
    ]
    trees[1][1][0] = draw(rng, 1)
    return trees


# ---------------------------------------------------------------- runs

SFT = {
    "n_layer": 2, "n_head": 2, "n_kv_head": 1, "n_embd": 32, "block_size": 256,
    "learning_rate": 3e-3, "batch_size": 5, "warmup_steps": 2, "data": "responses.jsonl",
    "tokenizer": "tiny/tokenizer.tiktoken",
}  # fmt: skip
DPO = {
    "batch_size": 5, "warmup_steps": 2, "learning_rate": 1e-3, "epochs": 1.0,
    "pref_data": "pairs.jsonl", "init_from": "tiny",
}  # fmt: skip
ANSWERS = ("chosen", "rejected")


def pairs():
    """Fourteen rows, every two of them a flip: a user who is happy, or sad, about something."""
    rows = []
    for i, thing in enumerate(("tea", "the sea", "rain", "my bicycle", "a song", "bread", "snow")):
        answers = f"Yes, I like {thing}{' a lot' * (i % 3)}!", "No."
        for mood, (chosen, rejected) in (("happy", answers), ("sad", answers[::-1])):
            meta = {"preference": f"I am {mood}."}
            if i % 2:
                meta |= {"system": "You are a friend."}
            if i == 3:
                meta["examples"] = [{"prompt": "Fun?", "chosen": chosen, "rejected": rejected}]
            rows.append(meta | {"prompt": f"Do you like {thing}?", "chosen": chosen,
                                "rejected": rejected, "meta": {"preference_name": mood}})
    return rows


def responses():
    """The same answers as SFT data, without any preference."""
    return [{"prompt": row["prompt"], "response": row["chosen"]} for row in pairs()]


def command_line(options):
    """Options as a command line has them."""
    options = {"device": "cpu", "precision": "fp32"} | options
    return [word for key, value in options.items() if value is not False
            for word in ([f"--{key}"] if value is True else [f"--{key}", str(value)])]


def run(module, **options):
    """The real main of a script, its options read from a command line; then let the folder go."""
    try:
        module.main(common.parse_options(module.Options, command_line(options)))
    finally:
        common.LOCKS.clear()


def sft(out_dir, **options):
    run(train_sft, out_dir=out_dir, **SFT | options)


def dpo(out_dir, **options):
    run(train_dpo, out_dir=out_dir, **DPO | options)


def lora(out_dir, **options):
    run(train_dpo, out_dir=out_dir, **DPO | {"lora_rank": 2} | options)


def read_log(folder):
    """log.jsonl without times."""
    rows = [json.loads(line) for line in (Path(folder) / "log.jsonl").read_text().splitlines()]
    return [{k: v for k, v in row.items() if k != "seconds"} for row in rows]


def weights(folder, name=""):
    """What a finished run has learned, or another file of tensors in its folder."""
    path = Path(folder) / name if name else common.finished(Path(folder))
    return torch.load(path, weights_only=True)


def same(a, b):
    """Whether two nests of tensors and numbers are equal bit for bit."""
    if isinstance(a, torch.Tensor):
        return torch.equal(a, b)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[k], b[k]) for k in a)
    if isinstance(a, list | tuple):
        return len(a) == len(b) and all(map(same, a, b))
    return a == b
