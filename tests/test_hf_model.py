"""Models of the Llama family from Hugging Face folders and back: the same numbers as theirs."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from test_data import STRANGE_TEXTS
from tiny import CONFIG, draw_trees, new_model, pairs

import common
import data
import evaluate
import hf_model
import sample
import train_dpo
import train_sft
import world
from common import UserError
from hf_tokenizer import HfTokenizer
from model import ModelConfig, answer_logps, from_weights, generate, pack

ROOT = Path(__file__).parents[1]
CPU = torch.device("cpu")

# ---------------------------------------------------------------- models in

LLAMA3 = {"rope_type": "llama3", "rope_theta": 10000.0, "factor": 8.0, "low_freq_factor": 1.0,
          "high_freq_factor": 4.0, "original_max_position_embeddings": 32}  # fmt: skip
SIZES = {"vocab_size": 97, "hidden_size": 48, "intermediate_size": 80, "num_hidden_layers": 2,
         "num_attention_heads": 6, "num_key_value_heads": 2, "max_position_embeddings": 256,
         "bos_token_id": None, "eos_token_id": None, "pad_token_id": 0}  # fmt: skip
MODELS = {  # name -> (class, what is special about it)
    "llama": ("Llama", {"rope_parameters": LLAMA3}),
    "llama tied": ("Llama", {"rope_parameters": LLAMA3, "tie_word_embeddings": True}),
    "mistral": ("Mistral", {"head_dim": 12, "sliding_window": None}),
    "qwen2": ("Qwen2", {"num_key_value_heads": 6, "rms_norm_eps": 1e-5}),
    "qwen3": ("Qwen3", {"head_dim": 16, "tie_word_embeddings": True}),
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


def ours(folder, dtype=torch.float32):
    """The model alone, without a tokenizer."""
    config = hf_model.read_config(Path(folder) / "config.json")
    return from_weights(config, hf_model.read_weights(Path(folder), config), CPU, dtype).eval()


def prompts(vocab_size, *lengths):
    generator = torch.Generator().manual_seed(1)
    return [torch.randint(vocab_size, (n,), generator=generator).tolist() for n in lengths]


def their_logits(model, tokens):
    with torch.no_grad():
        return model(input_ids=torch.tensor([tokens])).logits[0]


def our_logits(model, tokens):
    with torch.no_grad():
        return model.logits(model(pack([(tokens, [])])))


def assert_same_model(theirs, model, n_new=64):
    """Logits at every position of a long text, and what is generated after several prompts."""
    vocab_size = theirs.config.vocab_size
    [tokens] = prompts(vocab_size, 200)
    expected = their_logits(theirs, tokens)
    assert expected.std() > 0.5
    assert (our_logits(model, tokens) - expected).abs().max() < 1e-4
    asked = prompts(vocab_size, 5, 100, 1)
    found = generate(model, asked, -1, n_new)
    for prompt, answer in zip(asked, found, strict=True):
        answered = theirs.generate(torch.tensor([prompt]), max_new_tokens=n_new, do_sample=False)
        assert answered[0, len(prompt) :].tolist() == answer
        assert len(answer) == n_new and len(set(answer)) > 5


@pytest.mark.parametrize("name", MODELS)
def test_logits_and_greedy_answers_equal_theirs(name, tmp_path):
    theirs = their_model(name)
    theirs.save_pretrained(tmp_path)
    model = ours(tmp_path)
    assert_same_model(theirs, model)
    assert model.config.tied == ("tied" in name or name == "qwen3")
    assert model.config.n_kv_head == theirs.config.num_key_value_heads
