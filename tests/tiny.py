"""What the tests of models and of runs share: tiny models, tiny data, runs in miniature."""

import json
import math
import random
from pathlib import Path

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import common
import model as model_file
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


def has_adapters(model):
    return any("lora_" in name for name, _ in model.named_parameters())


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


# ---------------------------------------------------------------- models of transformers

LLAMA3 = {"rope_type": "llama3", "rope_theta": 10000.0, "factor": 8.0, "low_freq_factor": 1.0,
          "high_freq_factor": 4.0, "original_max_position_embeddings": 32}
SIZES = {"vocab_size": 97, "hidden_size": 48, "intermediate_size": 80, "num_hidden_layers": 2,
         "num_attention_heads": 6, "num_key_value_heads": 2, "max_position_embeddings": 256,
         "bos_token_id": None, "eos_token_id": None, "pad_token_id": 0}
MODELS = {  # name -> (class, what is special about it)
    "llama": ("Llama", {"rope_parameters": LLAMA3}),
    "llama tied": ("Llama", {"rope_parameters": LLAMA3, "tie_word_embeddings": True}),
    "mistral": ("Mistral", {"head_dim": 12, "sliding_window": None, "rope_parameters":
                            {"rope_type": "default", "rope_theta": 77.0}}),
    "qwen2": ("Qwen2", {"num_key_value_heads": 6, "rms_norm_eps": 1e-5}),
    "qwen3": ("Qwen3", {"head_dim": 16}),
}


def their_model(name, **changes):
    """A model of transformers with random weights, biases and norms."""
    transformers = pytest.importorskip("transformers")
    family, special = MODELS[name]
    config = getattr(transformers, f"{family}Config")(**SIZES | special | changes)
    torch.manual_seed(0)
    model = getattr(transformers, f"{family}ForCausalLM")(config).eval()
    with torch.no_grad():
        for name, p in model.named_parameters():
            p.uniform_(0.5, 1.5) if "norm" in name else p.normal_(0, 0.25)
    return model


CHATML = (
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' + m['content'] + '<|im_end|>\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)


def save_smol(folder):
    """Write a Hugging Face folder with transformers: Llama, byte-level BPE, ChatML."""
    transformers, tokenizers = map(pytest.importorskip, ("transformers", "tokenizers"))
    bpe = tokenizers.Tokenizer(tokenizers.models.BPE())
    bpe.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = tokenizers.decoders.ByteLevel()
    marks = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    bpe.train_from_iterator(
        [row[field] for row in pairs() for field in ("prompt", "chosen", "preference")],
        tokenizers.trainers.BpeTrainer(
            vocab_size=320, special_tokens=marks, show_progress=False,
            initial_alphabet=tokenizers.pre_tokenizers.ByteLevel.alphabet(),
        ),
    )
    fast = transformers.PreTrainedTokenizerFast(
        tokenizer_object=bpe, eos_token="<|im_end|>", pad_token="<|endoftext|>"
    )
    fast.chat_template = CHATML
    fast.save_pretrained(folder)
    model = their_model("llama tied", vocab_size=len(fast), eos_token_id=fast.eos_token_id)
    model.save_pretrained(folder)


# ---------------------------------------------------------------- runs

SFT = {
    "n_layer": 2, "n_head": 2, "n_kv_head": 1, "n_embd": 32, "block_size": 256,
    "learning_rate": 3e-3, "batch_size": 5, "warmup_steps": 2, "data": "responses.jsonl",
    "tokenizer": "tiny/tokenizer.tiktoken",
}
DPO = {
    "batch_size": 5, "warmup_steps": 2, "learning_rate": 1e-3, "epochs": 1.0,
    "pref_data": "pairs.jsonl", "init_from": "tiny",
}
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


def user_rows(n_users=6, n_rows=7):
    """Users who like all answers short, or all long."""
    rows = []
    for user in range(n_users):
        for i in range(n_rows):
            answers = f"No {i}.", f"Well, about {i}, I would say yes."
            chosen, rejected = answers if user % 2 else answers[::-1]
            rows.append({"user": user, "prompt": f"Do you like {i}?", "chosen": chosen,
                         "rejected": rejected, "meta": {"group": "ab"[i % 2]}})
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


class Tape(TorchDispatchMode):
    """Operations as they were called, to be done again on the same tensors: a graph on the CPU."""

    def __init__(self):
        super().__init__()
        self.calls = []

    def __torch_dispatch__(self, operation, types, args=(), kwargs=None):
        results = operation(*args, **(kwargs or {}))
        self.calls.append((operation, args, kwargs or {}, results))
        return results

    def replay(self):
        for operation, args, kwargs, results in self.calls:
            found = operation(*args, **kwargs)
            for old, new in zip(*map(tree_leaves, (results, found)), strict=True):
                if isinstance(old, torch.Tensor) and old.data_ptr() != new.data_ptr():
                    old.copy_(new)


def capture_on_the_cpu(monkeypatch):
    """Take the path of CUDA graphs on a CPU; returns the list of captures.

    It shows that a step may be done again from its tensors alone, not that CUDA captures it.
    """
    tapes = []

    def capture(function, device):
        function()
        with Tape() as tape:
            outputs = function()
        tapes.append(tape)
        outputs.fill_(math.nan)  # a capture computes nothing

        def replay():
            tape.replay()
            return outputs

        return replay

    monkeypatch.setattr(model_file, "GRAPHS", ("cpu",))
    monkeypatch.setattr(model_file, "capture", capture)
    return tapes
