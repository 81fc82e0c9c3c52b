"""What it costs.

    python bench.py memory     # peak memory of one DPO step by model size, full and LoRA
"""

import json
import multiprocessing
import os
import random
import subprocess
import sys
import tempfile
from dataclasses import asdict, dataclass
from pathlib import Path

import torch

import common
import data
from common import UserError
from model import ModelConfig, Transformer


@dataclass(frozen=True)
class Options:
    """Measure memory; the last line is one JSON object."""

    what: str = "memory"  # memory
    sizes: tuple[str, ...] = ("135M", "360M", "1.1B")  # which of the shapes below
    lora_rank: int = 16  # of the LoRA rows
    pairs: int = 4  # pairs a step, about 512 tokens each
    max_gib: float = 12.0  # skip what would not fit: 16 bytes a trained parameter
    precision: str = "bf16"  # bf16, fp32

    def __post_init__(self):
        common.at_least(self, 1, "lora_rank", "pairs")
        if self.what != "memory":
            raise UserError(f"{self.what}: must be memory")
        unknown = set(self.sizes) - set(SHAPES)
        if unknown:
            raise UserError(f"--sizes: {unknown.pop()}: must be among {', '.join(SHAPES)}")


# n_layer, n_head, n_kv_head, n_embd, n_hidden, vocab_size, tied
SHAPES = {
    "135M": (30, 9, 3, 576, 1536, 49152, True),  # SmolLM2
    "360M": (32, 15, 5, 960, 2560, 49152, True),  # SmolLM2
    "1.1B": (22, 32, 4, 2048, 5632, 32000, False),  # TinyLlama
}


def shape(name):
    *sizes, vocab_size, tied = SHAPES[name]
    return ModelConfig(vocab_size, 2048, *sizes, qk_norm=False, tied=tied)


def write_model(folder, config):
    """A run folder with random bfloat16 weights, as small on disk as a pretrained model's."""
    tokenizer = data.load_tokenizer("world")
    with torch.device("meta"):
        named = list(Transformer(config).named_parameters())
    weights = {n: (0.02 * torch.randn(p.shape)).bfloat16() for n, p in named}
    about = {"model": asdict(config), "tokenizer": tokenizer.describe()}
    common.save_json(folder / "config.json", about)
    tokenizer.save(folder)
    common.save_tensors(folder / "model.pt", weights)
    return sum(p.numel() for _, p in named)


def write_pairs(path, n):
    """Pairs of random letters, about 256 tokens of prompt and 128 of each answer."""
    rng = random.Random(0)

    def text(size):
        return "".join(rng.choices("bcdfghjklmnpqrstvwxz", k=size))

    rows = [{"prompt": text(256), "chosen": text(128), "rejected": text(128)} for _ in range(n)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def peak_gib(command, folder):
    """Run a command in a folder: the most memory that it held, GiB."""
    process = subprocess.Popen(
        command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, cwd=folder
    )
    error = process.stderr.read().decode()
    _, status, usage = os.wait4(process.pid, 0)
    process.returncode = status
    if status:
        reason = (error.strip() or f"status {status}").splitlines()[-1]
        raise UserError(f"{' '.join(command[:2])} failed: {reason}")
    return usage.ru_maxrss / 2**20


def memory(options):
    """{size: {"full": GiB, "full+checkpointing": ..., "LoRA": ..., "LoRA+checkpointing": ...}}"""
    result, here = {}, Path(__file__).parent
    for size in options.sizes:
        with tempfile.TemporaryDirectory() as folder:
            folder = Path(folder)
            with multiprocessing.get_context("spawn").Pool(1) as pool:
                n = pool.apply(write_model, (folder, shape(size)))  # its peak is not ours
            write_pairs(folder / "pairs.jsonl", options.pairs)
            found = result[size] = {"parameters": n}
            lora = ["--lora_rank", str(options.lora_rank)]
            for method, flags in {"full": [], "LoRA": lora}.items():
                if method == "full" and 16 * n / 2**30 > options.max_gib:
                    continue
                for kind in ("", "+checkpointing"):
                    extra = ["--activation_checkpointing"] if kind else []
                    found[method + kind] = peak_gib([
                        sys.executable, str(here / "train_dpo.py"), "--init_from", str(folder),
                        "--pref_data", str(folder / "pairs.jsonl"), "--max_steps", "1",
                        "--out_dir", str(folder / "run"), "--overwrite", "--device", "cpu",
                        "--batch_size", str(options.pairs), "--precision", options.precision,
                        "--warmup_steps", "0", *flags, *extra,
                    ], folder)  # fmt: skip
                    print(f"{size:>6} {method + kind:<20} {found[method + kind]:6.2f} GiB",
                          flush=True)
    return result


def main(options):
    result = memory(options)
    print(json.dumps({"memory_gib": result} | asdict(options) | common.provenance()))


if __name__ == "__main__":
    common.run(main, Options)
