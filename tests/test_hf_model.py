"""Models of the Llama family from Hugging Face folders and back: the same numbers as theirs."""

import json
import math
import os
import random
import shutil
import subprocess
import sys
import weakref
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

import common
import data
import evaluate
import hf_model
import sample
import train_dpo
import train_sft
import world
from common import UserError
from model import ModelConfig, adapt, from_weights, generate, pack, rope_frequencies
from test_data import STRANGE_TEXTS
from tiny import (
    DPO,
    LLAMA3,
    MODELS,
    SFT,
    new_model,
    pairs,
    read_log,
    run,
    same,
    their_model,
    weights,
)

ROOT = Path(__file__).parents[1]
CPU = torch.device("cpu")

# ---------------------------------------------------------------- models in


def ours(folder, dtype=torch.float32):
    """The model alone, without a tokenizer."""
    config = hf_model.read_config(Path(folder) / "config.json")
    return from_weights(config, hf_model.read_weights(Path(folder), config), CPU, dtype).eval()


def texts(vocab_size, *lengths):
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
    [tokens] = texts(vocab_size, 200)
    expected = their_logits(theirs, tokens)
    assert expected.std() > 0.5
    assert (our_logits(model, tokens) - expected).abs().max() < 1e-4
    prompts = texts(vocab_size, 5, 100, 1)
    found = generate(model, prompts, (), n_new)
    assert len({token for answer in found for token in answer}) > 10
    for prompt, answer in zip(prompts, found, strict=True):
        answered = theirs.generate(
            torch.tensor([prompt]), max_new_tokens=n_new, do_sample=False, eos_token_id=None
        )
        assert answered[0, len(prompt) :].tolist() == answer and len(answer) == n_new


def change_config(folder, **changes):
    """Replace keys of config.json; None takes one away."""
    path = Path(folder) / "config.json"
    config = json.loads(path.read_text()) | changes
    path.write_text(json.dumps({k: v for k, v in config.items() if v is not None}))


@pytest.mark.parametrize("name", MODELS)
def test_logits_and_greedy_answers_equal_theirs(name, tmp_path):
    theirs = their_model(name)
    theirs.save_pretrained(tmp_path)
    assert_same_model(theirs, ours(tmp_path))


@pytest.mark.parametrize("theta", [77.0, 1e4, 1e5, 5e5, 1e6])
@pytest.mark.parametrize("size", [32, 64, 128])
def test_rope_frequencies_equal_theirs_to_the_last_bit(theta, size):
    """Far into a long context a last bit of these is a different angle."""
    transformers = pytest.importorskip("transformers")
    config = transformers.LlamaConfig(head_dim=size, rope_theta=theta)
    theirs = transformers.models.llama.modeling_llama.LlamaRotaryEmbedding(config).inv_freq
    config = SimpleNamespace(head_size=size, rope_theta=theta, rope_scaling=None)
    assert torch.equal(rope_frequencies(config), theirs)


def test_weights_in_several_files(tmp_path):
    theirs = their_model("llama")
    theirs.save_pretrained(tmp_path, max_shard_size="40KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 3
    assert not (tmp_path / "model.safetensors").exists()
    assert_same_model(theirs, ours(tmp_path), 5)
    before = sample.weights_hash(tmp_path)
    for path in tmp_path.glob("*.safetensors"):
        whole = path.read_bytes()
        path.write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))
        assert sample.weights_hash(tmp_path) != before, path
        path.write_bytes(whole)
    assert sample.weights_hash(tmp_path) == before


def test_weights_in_bfloat16(tmp_path):
    """Their numbers are read exactly, and computed with in float32."""
    their_model("qwen3").bfloat16().save_pretrained(tmp_path)
    transformers = pytest.importorskip("transformers")
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32)
    assert_same_model(theirs, ours(tmp_path), 5)


@pytest.mark.parametrize("name", MODELS)
def test_config_of_older_versions(name, tmp_path):
    """rope_theta at the top, rope_scaling with `type`; no head_dim where the sizes give it."""
    theirs = their_model(name)
    theirs.save_pretrained(tmp_path)
    new = ours(tmp_path).config
    assert new.rope_theta == (77.0 if name == "mistral" else 10000.0)
    rope = json.loads((tmp_path / "config.json").read_text())["rope_parameters"]
    kind = rope.pop("rope_type")
    theta, scaling = rope.pop("rope_theta"), {"type": kind, **rope} if rope else None
    change_config(tmp_path, rope_parameters=None, rope_theta=theta, rope_scaling=scaling)
    if "llama" in name or name == "qwen2":
        change_config(tmp_path, head_dim=None)
    assert ours(tmp_path).config == new
    [tokens] = texts(97, 200)
    assert (our_logits(ours(tmp_path), tokens) - their_logits(theirs, tokens)).abs().max() < 1e-4


COUNTERPARTS = {
    "vocab_size": "vocab_size", "max_position_embeddings": "block_size", "num_hidden_layers":
    "n_layer", "num_attention_heads": "n_head", "num_key_value_heads": "n_kv_head", "hidden_size":
    "n_embd", "intermediate_size": "n_hidden", "rms_norm_eps": "norm_eps", "head_dim": "head_size",
    "tie_word_embeddings": "tied",
}


@pytest.mark.parametrize("family", ["Llama", "Mistral", "Qwen2", "Qwen3"])
def test_absent_keys_are_refused_or_mean_what_they_mean_to_transformers(family, tmp_path):
    """Each key of a config in turn, and all keys about RoPE and windows at once."""
    transformers = pytest.importorskip("transformers")
    path, read = tmp_path / "config.json", 0
    [name] = {name for name, (kind, _) in MODELS.items() if kind == family and "tied" not in name}
    for absent in ((), *COUNTERPARTS, ("rope_parameters", "sliding_window", "use_sliding_window",
                   "max_window_layers", "layer_types")):
        their_model(name).config.save_pretrained(tmp_path)
        change_config(tmp_path, **dict.fromkeys([absent] if isinstance(absent, str) else absent))
        try:
            config = hf_model.read_config(path)
        except UserError as error:
            assert absent and f"field '{absent}'" in str(error)
            continue
        theirs = transformers.AutoConfig.from_pretrained(tmp_path)
        for key, ours in COUNTERPARTS.items():
            expected = getattr(theirs, key, theirs.hidden_size // theirs.num_attention_heads)
            assert getattr(config, ours) == expected, (absent, key)
        assert config.rope_theta == theirs.rope_parameters["rope_theta"]
        assert (config.rope_scaling is None) == (theirs.rope_parameters["rope_type"] == "default")
        window = getattr(theirs, "sliding_window", None)
        assert window is None or window >= config.block_size
        read += 1
    assert read >= 4


# ---------------------------------------------------------------- what is refused

PLAIN = {"model_type": "llama", "vocab_size": 97, "hidden_size": 48, "intermediate_size": 80,
         "num_hidden_layers": 2, "num_attention_heads": 6, "num_key_value_heads": 2,
         "max_position_embeddings": 256, "rms_norm_eps": 1e-5}
MISTRAL, QWEN2 = {"model_type": "mistral"}, {"model_type": "qwen2"}
WINDOWED = QWEN2 | {"use_sliding_window": True, "max_window_layers": 1}
LONG = {"max_position_embeddings": 5000}
NESTED = {"full_attention": {"rope_type": "default", "rope_theta": 5.0}}
REFUSED = {  # key that the message names -> configs
    "model_type": [{"model_type": x} for x in ("gpt2", "gemma2", "LLAMA", None, ["llama"], {})],
    "hidden_act": [{"hidden_act": x} for x in ("gelu", "relu", ["silu"])],
    "attention_bias": [{"attention_bias": True}],
    "mlp_bias": [{"mlp_bias": True}],
    "is_causal": [{"is_causal": False}],
    "max_window_layers": [WINDOWED | {"max_window_layers": x} for x in ("2", None)],
    "quantization_config": [{"quantization_config": {"quant_method": "fp8"}}],
    "rope_interleaved": [{"rope_interleaved": True}],
    "dual_chunk_attention_config": [{"dual_chunk_attention_config": {"chunk_size": 8}}],
    "sliding_window": [
        MISTRAL | {"sliding_window": 64}, MISTRAL | {"sliding_window": 255}, MISTRAL | LONG,
        WINDOWED | {"sliding_window": 64}, WINDOWED | LONG, MISTRAL | {"sliding_window": "64"},
        *(MISTRAL | {"sliding_window": 64, "use_sliding_window": x} for x in (False, None)),
    ],
    "layer_types": [
        QWEN2 | {"layer_types": ["full_attention", "sliding_attention"]},
        {"layer_types": ["linear_attention"] * 2}, {"layer_types": 2},
        MISTRAL | {"sliding_window": None, "layer_types": ["chunked_attention"] * 2},
    ],
    "rope_scaling": [
        *({"rope_scaling": {"rope_type": x, "factor": 2.0}} for x in
          ("linear", "dynamic", "yarn", "longrope", "su", "mrope", "llama3", None)),
        {"rope_scaling": {"type": "linear", "factor": 2.0}}, {"rope_scaling": "linear"},
        {"rope_scaling": {"type": "linear", "factor": 2.0},
         "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0}},
    ],
    "rope_parameters": [
        *({"rope_parameters": {"rope_type": x, "rope_theta": 10000.0, "factor": 2.0}} for x in
          ("linear", "dynamic", "yarn", "longrope")),
        *({"rope_parameters": LLAMA3 | {"factor": x}} for x in (0, -8.0, "8", True, None)),
        {"rope_parameters": LLAMA3 | {"low_freq_factor": 4.0}},
        {"rope_parameters": {"partial_rotary_factor": 0.5}},
        {"rope_parameters": {"rope_theta": "10000"}}, {"rope_parameters": NESTED},
        {"rope_parameters": [LLAMA3]},
    ],
    "partial_rotary_factor": [{"partial_rotary_factor": x} for x in (0.5, 0.25)],
    "rope_theta": [{"rope_theta": x} for x in (0, -1.0, "10000", True, math.nan, [1])],
    "head_dim": [{"head_dim": x} for x in (0, 7, "8", 8.5)],
    **{key: [{key: x} for x in (0, -1, "6", True, [6], 6.5, math.nan, math.inf)]
       for key in PLAIN if key not in ("model_type", "rms_norm_eps")},
    "rms_norm_eps": [{"rms_norm_eps": x} for x in (0, -1e-5, "1e-5", True, math.nan, math.inf)],
}
REFUSED["num_key_value_heads"] += [{"num_key_value_heads": 4}, {"num_key_value_heads": 12}]
REFUSED["num_attention_heads"] += [{"num_attention_heads": 5, "num_key_value_heads": 5}]


@pytest.mark.parametrize("key", REFUSED)
def test_config_that_the_model_cannot_do_is_refused_by_its_key(key, tmp_path):
    path = tmp_path / "config.json"
    accepted = []
    for change in REFUSED[key]:
        path.write_text(json.dumps(PLAIN | change))
        try:
            hf_model.read_config(path)
            accepted.append(change)
        except UserError as error:
            assert str(error).startswith(f"{path}: field '{key}': "), (change, str(error))
            assert "\n" not in str(error)
    assert accepted == []


def test_config_that_lacks_a_size_is_refused(tmp_path):
    path = tmp_path / "config.json"
    for key in PLAIN.keys() - {"num_key_value_heads"}:
        path.write_text(json.dumps({k: v for k, v in PLAIN.items() if k != key}))
        with pytest.raises(UserError, match=f"field '{key}'"):
            hf_model.read_config(path)


@pytest.mark.parametrize("change", [
    {}, {"hidden_act": "swish"}, {"attention_bias": False, "mlp_bias": False},
    MISTRAL | {"sliding_window": None}, MISTRAL | {"sliding_window": 256}, MISTRAL,
    MISTRAL | LONG | {"sliding_window": 5000}, QWEN2 | LONG | {"sliding_window": 64},
    WINDOWED | {"sliding_window": 256}, QWEN2 | {"layer_types": ["full_attention"] * 2},
    WINDOWED | LONG | {"layer_types": ["full_attention"] * 2},
    WINDOWED | LONG | {"max_window_layers": 2}, {"is_causal": True},
    {"rope_scaling": None}, {"partial_rotary_factor": 1.0}, {"quantization_config": None},
    {"torch_dtype": "bfloat16", "attention_dropout": 0.0, "pretraining_tp": 1},
])
def test_config_that_asks_for_nothing_special_is_read(change, tmp_path):
    """A window that no text reaches beyond changes nothing."""
    path = tmp_path / "config.json"
    path.write_text(json.dumps(PLAIN | change))
    assert hf_model.read_config(path) == ModelConfig(
        vocab_size=97, block_size=(PLAIN | change)["max_position_embeddings"], n_layer=2, n_head=6,
        n_kv_head=2, n_embd=48, n_hidden=80, rope_theta=10000.0, norm_eps=1e-5, qk_norm=False,
        qkv_bias="qwen2" in change.values(), head_size=8, tied=False,
    )


# ---------------------------------------------------------------- broken folders


@pytest.fixture
def exported(tmp_path):
    """A Hugging Face folder with a random model over bytes, written by our own export."""
    pytest.importorskip("safetensors")
    tokenizer = data.Tokenizer("bytes", r"\s+|\S+", {bytes([b]): b for b in range(256)})
    config = ModelConfig(tokenizer.vocab_size, 512, 2, 4, 2, 32, 48, qk_norm=False, tied=False)
    folder = tmp_path / "theirs"
    hf_model.export(folder, new_model(config), tokenizer)
    return folder


def tensors_of(folder, name="model.safetensors"):
    from safetensors.torch import load_file

    return load_file(Path(folder) / name)


def write_tensors(folder, tensors, name="model.safetensors"):
    from safetensors.torch import save_file

    save_file(tensors, Path(folder) / name, metadata={"format": "pt"})


def refusal(folder):
    """The one line that says why a folder cannot be loaded."""
    with pytest.raises(UserError) as error:
        sample.load_checkpoint(folder, CPU)
    assert "\n" not in str(error.value)
    return str(error.value)


@pytest.mark.parametrize("name", [
    "model.embed_tokens.weight", "model.norm.weight", "lm_head.weight",
    "model.layers.1.self_attn.k_proj.weight", "model.layers.0.mlp.up_proj.weight",
])
def test_missing_tensor(exported, name):
    tensors = tensors_of(exported)
    del tensors[name]
    write_tensors(exported, tensors)
    message = refusal(exported)
    assert message.startswith(f"{exported}: tensor {name}: missing")


@pytest.mark.parametrize("name", [
    "model.layers.2.mlp.up_proj.weight", "model.layers.0.self_attn.q_proj.bias",
    "model.layers.0.self_attn.q_norm.weight", "model.layers.0.mlp.gate_proj.weight_scale",
    "score.weight",
])
def test_tensor_that_is_left_over(exported, name):
    write_tensors(exported, tensors_of(exported) | {name: torch.ones(3)})
    assert f"tensor {name}: " in refusal(exported)


def test_tensors_that_mean_nothing_are_ignored(exported, tmp_path):
    """RoPE's frequencies, which old versions saved, and a tied head that repeats the embedding."""
    before, _ = sample.load_checkpoint(exported, CPU)
    frequencies = {"model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(4)}
    write_tensors(exported, tensors_of(exported) | frequencies)
    after, _ = sample.load_checkpoint(exported, CPU)
    assert same(dict(before.state_dict()), dict(after.state_dict()))
    change_config(exported, tie_word_embeddings=True)
    tensors = tensors_of(exported)
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].clone()
    write_tensors(exported, tensors)
    tied, _ = sample.load_checkpoint(exported, CPU)
    assert not hasattr(tied, "head") and torch.equal(tied.head_weight, before.embedding.weight)


def test_tied_head_that_is_not_the_embedding(exported):
    """transformers 4 takes the embedding, 5 takes this head: no one knows what is meant."""
    change_config(exported, tie_word_embeddings=True)
    assert "lm_head.weight" in refusal(exported)


@pytest.mark.parametrize("name", ["model.norm.weight", "model.layers.1.self_attn.v_proj.weight",
                                  "lm_head.weight"])
def test_tensor_of_another_shape(exported, name):
    tensors = tensors_of(exported)
    write_tensors(exported, tensors | {name: tensors[name][:-1].clone()})
    assert str(exported) in refusal(exported)


def test_parts_of_another_width(exported):
    tensors, name = tensors_of(exported), "model.layers.0.self_attn.k_proj.weight"
    write_tensors(exported, tensors | {name: tensors[name][:, 1:].clone()})
    assert name in refusal(exported)


def test_the_hash_is_of_the_weights_that_are_read(exported):
    before = sample.weights_hash(exported)
    (exported / "model.pt").write_bytes(b"of another tool")
    assert sample.weights_hash(exported) == before
    tensors = tensors_of(exported)
    write_tensors(exported, {name: tensor + 1 for name, tensor in tensors.items()})
    assert sample.weights_hash(exported) != before


@pytest.mark.parametrize("size", [0, 7, 100, -1000, -1])
def test_truncated_weights(exported, size):
    path = exported / "model.safetensors"
    path.write_bytes(path.read_bytes()[:size])
    assert str(path) in refusal(exported)


@pytest.fixture
def sharded(exported):
    """The same weights in two files with an index."""
    tensors = list(tensors_of(exported).items())
    files = {"a.safetensors": dict(tensors[::2]), "b.safetensors": dict(tensors[1::2])}
    for file, part in files.items():
        write_tensors(exported, part, file)
    (exported / "model.safetensors").unlink()
    where = {name: file for file, part in files.items() for name in part}
    common.save_json(exported / "model.safetensors.index.json", {"weight_map": where})
    return exported


def test_one_file_goes_before_an_index(sharded):
    """As for transformers, whose save_pretrained may leave an old index behind."""
    tensors = dict(hf_model.read_weights(sharded, hf_model.read_config(sharded / "config.json")))
    theirs = {}
    for file in ("a.safetensors", "b.safetensors"):
        theirs |= tensors_of(sharded, file)
        (sharded / file).unlink()
    write_tensors(sharded, {name: tensor + 1 for name, tensor in theirs.items()})
    model, _ = sample.load_checkpoint(sharded, CPU)
    assert torch.equal(model.norm.weight, tensors["norm.weight"] + 1)


def test_index_of_several_files(sharded):
    sample.load_checkpoint(sharded, CPU)
    whole = (sharded / "b.safetensors").read_bytes()
    (sharded / "b.safetensors").write_bytes(whole[:-1])
    assert str(sharded / "b.safetensors") in refusal(sharded)
    (sharded / "b.safetensors").unlink()
    assert str(sharded / "b.safetensors") in refusal(sharded)


@pytest.mark.parametrize("spoilt", ["file", "tensor", "outside", "number", "list", "json"])
def test_broken_index(sharded, spoilt):
    path = sharded / "model.safetensors.index.json"
    where = json.loads(path.read_text())["weight_map"]
    name = "model.norm.weight"
    index = {
        "file": {"weight_map": where | {name: "c.safetensors"}},
        "tensor": {"weight_map": where | {name: {"a": "b", "b": "a"}[where[name][0]]
                                          + ".safetensors"}},
        "outside": {"weight_map": where | {name: "../secret.safetensors"}},
        "number": {"weight_map": where | {name: 3}},
        "list": {"weight_map": [*where]},
        "json": None,
    }[spoilt]
    path.write_text(json.dumps(index)[: None if index else 2])
    named = {"file": "c.safetensors", "tensor": name, "outside": f"{sharded}/secret.safetensors"}
    assert named.get(spoilt, str(path)) in refusal(sharded)


def test_weights_in_another_format_or_none(exported):
    weights = exported / "model.safetensors"
    weights.rename(exported / "pytorch_model.bin")
    message = refusal(exported)
    assert "model.safetensors is missing" in message and "pytorch_model.bin" in message
    (exported / "pytorch_model.bin").rename(exported / "model-00001-of-00002.safetensors")
    message = refusal(exported)
    assert "index.json" in message and "00001-of-00002" in message
    (exported / "model-00001-of-00002.safetensors").unlink()
    assert "model.safetensors is missing" in refusal(exported)


def test_optional_packages_are_asked_for(exported, tmp_path, monkeypatch, byte_tokenizer):
    for package in ("safetensors", "safetensors.torch", "huggingface_hub"):
        monkeypatch.setitem(sys.modules, package, None)  # as if it were not installed
    assert "pip install safetensors" in refusal(exported)
    message = refusal("org/name")
    assert "org/name" in message and "pip install huggingface_hub" in message
    with pytest.raises(UserError, match="pip install safetensors"):
        hf_model.export(tmp_path / "out", new_model(), byte_tokenizer)
    assert not (tmp_path / "out").exists()


def test_context_of_the_tokenizer_is_not_that_of_the_model(exported):
    """A vocabulary that is larger than the embedding is refused; a smaller one is padding."""
    config = json.loads((exported / "config.json").read_text())
    tensors = tensors_of(exported)
    for rows in (config["vocab_size"] - 1, config["vocab_size"] + 56):
        padded = {name: torch.cat((tensors[name], torch.zeros(56, 32)))[:rows]
                  for name in ("model.embed_tokens.weight", "lm_head.weight")}
        write_tensors(exported, tensors | padded)
        change_config(exported, vocab_size=rows)
        if rows < config["vocab_size"]:
            assert "token" in refusal(exported)
        else:
            model, tokenizer = sample.load_checkpoint(exported, CPU)
            assert model.config.vocab_size == tokenizer.vocab_size + 56


def test_weights_are_read_one_at_a_time(sharded, monkeypatch):
    """When a tensor comes, only the one before it is still alive."""
    given, read = [], hf_model.read_weights

    def watched(folder, config):
        for name, tensor in read(folder, config):
            assert sum(before() is not None for before in given) <= 1, name
            given.append(weakref.ref(tensor))
            yield name, tensor

    monkeypatch.setattr(hf_model, "read_weights", watched)
    model, _ = sample.load_checkpoint(sharded, CPU)
    assert len(given) == len(list(model.parameters())) > 10


# ---------------------------------------------------------------- models out


def render_of(tokenizer, messages):
    found = tokenizer.apply_chat_template(messages, add_generation_prompt=True)
    return found if isinstance(found, list) else found["input_ids"]


@pytest.fixture(scope="module")
def world_export(tmp_path_factory, world_tokenizer):
    """(folder, our model from scratch that it was written from, over the world's vocabulary)."""
    pytest.importorskip("safetensors")
    config = ModelConfig(world_tokenizer.vocab_size, 256, 2, 4, 2, 32, 48)
    model, folder = new_model(config), tmp_path_factory.mktemp("out") / "theirs"
    hf_model.export(folder, model, world_tokenizer)
    return folder, model


def test_exported_model_is_the_same_to_transformers(world_export):
    transformers = pytest.importorskip("transformers")
    folder, model = world_export
    theirs = transformers.AutoModelForCausalLM.from_pretrained(folder)
    assert type(theirs).__name__ == "Qwen3ForCausalLM" and theirs.dtype == torch.float32
    assert_same_model(theirs, model)
    assert_same_model(theirs, sample.load_checkpoint(folder, CPU)[0], 5)


def test_exported_model_answers_the_same_texts(world_export, world_tokenizer):
    """As transformers is used: chat template, generate until the end token, decode."""
    transformers = pytest.importorskip("transformers")
    folder, model = world_export
    theirs = transformers.AutoModelForCausalLM.from_pretrained(folder)
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    for record in world.evaluation_pairs("seen")[:3]:
        messages = [{"role": "preference", "content": record["preference"]},
                    {"role": "user", "content": record["prompt"]}]
        ids = torch.tensor([render_of(tokenizer, messages)])
        asked = {tier: record[tier] for tier in ("preference", "prompt")}
        found = theirs.generate(ids, max_new_tokens=30, do_sample=False)[0, ids.shape[1] :]
        [text] = sample.answer(model, world_tokenizer, [asked], max_new_tokens=30)
        assert tokenizer.decode(found, skip_special_tokens=True) == text and text


def random_texts(n):
    rng = random.Random(0)
    points = [chr(i) for i in range(0x3000) if not 0xD800 <= i < 0xE000]
    meeting = [*" \n\t\r_'1a.", "'s", "'LL", "  ", "the", "é", "e\u0301", "\u00a0", "中", "👍🏽"]
    return ["".join(rng.choices(rng.choice((meeting, points)), k=rng.randint(1, 25)))
            for _ in range(n)]


def test_exported_tokenizer_gives_our_ids(world_export, world_tokenizer):
    transformers = pytest.importorskip("transformers")
    tokenizer = transformers.AutoTokenizer.from_pretrained(world_export[0])
    assert len(tokenizer) == world_tokenizer.vocab_size
    assert tokenizer.eos_token_id == tokenizer.pad_token_id == world_tokenizer.end
    rows = world.sft_rows()[::20] + world.training_pairs()[::20]
    own = {row[f] for row in rows for f in ("system", "preference", "prompt", "response", "chosen")
           if f in row}
    assert len(own) > 300
    strange = [text for text in STRANGE_TEXTS if "<|" not in text]
    for text in [*own, *strange, *random_texts(1500)]:
        ids = world_tokenizer.encode(text)
        assert tokenizer(text, add_special_tokens=False).input_ids == ids, text
        assert tokenizer.decode(ids) == text
    # What spells a special token is one to them unless they are told not to look for any.
    for text in ("<|end|>", "a<|user|>b <|assistant|>"):
        found = tokenizer(text, add_special_tokens=False, split_special_tokens=True).input_ids
        assert found == world_tokenizer.encode(text)


@pytest.mark.parametrize("seed", range(5))
def test_exported_vocabulary_may_be_any(seed, tmp_path):
    """Also one with tokens that no merges make: they are found where they are a whole piece."""
    tokenizers = pytest.importorskip("tokenizers")
    rng = random.Random(seed)
    words = {"".join(rng.choices("ab c", k=rng.randint(2, 5))).encode() for _ in range(30)}
    pieces = [bytes([b]) for b in range(256)] + rng.sample(sorted(words), len(words))
    ours = data.Tokenizer("any", data.GPT2_PATTERN, {piece: i for i, piece in enumerate(pieces)})
    hf_model.save_native_tokenizer(tmp_path, ours, 64)
    theirs = tokenizers.Tokenizer.from_file(str(tmp_path / "tokenizer.json"))
    used = set()
    for _ in range(500):
        text = "".join(rng.choices("aabbc  ", k=rng.randint(1, 12)))
        ids = ours.encode(text)
        assert theirs.encode(text, add_special_tokens=False).ids == ids, text
        used.update(ids)
    assert len(used) > 10


def test_exported_chat_template_renders_as_we_do(world_export, world_tokenizer):
    transformers = pytest.importorskip("transformers")
    tokenizer = transformers.AutoTokenizer.from_pretrained(world_export[0])
    talk = [{"role": role, "content": text} for role, text in
            (("user", "Hi \n"), ("assistant", " Hello. "), ("user", "\nHow do I cook?"))]
    for meta in ({}, {"system": "You are kind."}, {"preference": "Be brief.\n"},
                 {"system": "You are\n\nkind.", "preference": " In a list."}):
        for prompt in ("How do I store the guitar?", talk, talk[:1], talk + talk[1:]):
            record = meta | {"prompt": prompt}
            messages = [{"role": tier, "content": text} for tier, text in meta.items()]
            messages += data.prompt_turns(record)
            ids = world_tokenizer.render(record)
            assert render_of(tokenizer, messages) == ids
            said = messages + [{"role": "assistant", "content": "Yes. "}]
            whole = tokenizer.apply_chat_template(said, tokenize=False)
            answer = [*world_tokenizer.encode("Yes. "), world_tokenizer.end]
            assert tokenizer(whole, add_special_tokens=False).input_ids == ids + answer


@pytest.mark.parametrize("name", MODELS)
def test_round_trip_of_each_family(name, tmp_path, byte_tokenizer):
    """theirs -> ours -> theirs: the same numbers, and the same config but for Mistral's name."""
    transformers = pytest.importorskip("transformers")
    theirs = their_model(name, vocab_size=byte_tokenizer.vocab_size)
    theirs.save_pretrained(tmp_path / "in")
    model = ours(tmp_path / "in")
    hf_model.export(tmp_path / "out", model, byte_tokenizer)
    again = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert type(again) is type(theirs) or name == "mistral"
    before, after = theirs.state_dict(), again.state_dict()
    assert before.keys() == after.keys()
    assert all(torch.equal(after[key], p) for key, p in before.items())
    assert_same_model(again, model, 5)
    [tokens] = texts(97, 200)
    assert (their_logits(again, tokens) - their_logits(theirs, tokens)).abs().max() < 1e-5
    assert ours(tmp_path / "out").config == model.config


def test_export_adds_the_adapters_to_the_weights(tmp_path, byte_tokenizer):
    transformers = pytest.importorskip("transformers")
    model = new_model(ModelConfig(byte_tokenizer.vocab_size, 256, 2, 4, 2, 32, 48))
    [tokens] = texts(97, 200)
    before = our_logits(model, tokens)
    adapt(model, 3)
    generator = torch.Generator().manual_seed(0)
    for name, p in model.named_parameters():
        if "lora_b" in name:
            p.data.normal_(0, 0.05, generator=generator)
    hf_model.export(tmp_path / "out", model, byte_tokenizer)
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert_same_model(theirs, model, 5)
    assert (our_logits(model, tokens) - before).abs().max() > 0.1
    assert not any("lora" in name for name in tensors_of(tmp_path / "out"))


@pytest.mark.parametrize("content", ["model.safetensors", "notes.txt"])
def test_export_into_a_folder_in_use_is_refused(tmp_path, byte_tokenizer, content):
    pytest.importorskip("safetensors")
    folder = tmp_path / "out"
    folder.mkdir()
    (folder / content).write_text("mine")
    with pytest.raises(UserError, match=f"--export {folder}: is in use"):
        hf_model.export(folder, new_model(), byte_tokenizer)
    assert {path.name: path.read_text() for path in folder.iterdir()} == {content: "mine"}
    with pytest.raises(UserError, match=f"--export {folder / content}"):
        hf_model.export(folder / content, new_model(), byte_tokenizer)


def test_export_of_what_no_family_has_is_refused(tmp_path, byte_tokenizer):
    pytest.importorskip("safetensors")
    config = ModelConfig(byte_tokenizer.vocab_size, 64, 1, 4, 2, 32, 48, qkv_bias=True)
    with pytest.raises(UserError, match="--export: "):
        hf_model.export(tmp_path / "out", new_model(config), byte_tokenizer)
    assert not (tmp_path / "out").exists()


def test_qwen2_with_a_head_size_of_its_own(tmp_path):
    theirs = their_model("qwen2", head_dim=12)
    theirs.save_pretrained(tmp_path / "theirs")
    model = ours(tmp_path / "theirs")
    byte_tokenizer = data.Tokenizer("bytes", r"\s+|\S+", {bytes([b]): b for b in range(80)})
    hf_model.export(tmp_path / "ours", model, byte_tokenizer)
    assert_same_model(type(theirs).from_pretrained(tmp_path / "ours"), model)


def test_an_answer_ends_at_any_of_the_end_tokens_of_the_model(smol):
    """Here, in transformers and in what is exported, also where only config.json lists them."""
    import transformers

    model, tokenizer = sample.load_checkpoint(smol, CPU)
    ids = tokenizer.render({"prompt": "Do you like it?"})
    [free] = generate(model, [ids], (), 12)
    stop = next(i for i in range(3, 12) if free[i] not in free[:i])
    change_config(smol, eos_token_id=[tokenizer.end, free[stop]])
    Path(smol, "generation_config.json").unlink(missing_ok=True)
    model, tokenizer = sample.load_checkpoint(smol, CPU)
    hf_model.export("out/ended", model, tokenizer)
    for folder in (smol, "out/ended"):
        model, tokenizer = sample.load_checkpoint(folder, CPU)
        assert sample.answer(model, tokenizer, [{"prompt": "Do you like it?"}], 12) == [
            tokenizer.decode(free[:stop])
        ]
        theirs = transformers.AutoModelForCausalLM.from_pretrained(folder)
        found = theirs.generate(torch.tensor([ids]), max_new_tokens=12, do_sample=False)
        assert found[0, len(ids) :].tolist() == free[: stop + 1]


# ---------------------------------------------------------------- the whole path

@pytest.fixture(params=["exported", "smol"])
def start(request, workplace):
    """Name of a Hugging Face folder beside the data: a model that was not trained on them."""
    return Path(request.getfixturevalue(request.param)).name


STEPS = {"max_steps": 4, "batch_size": 6, "warmup_steps": 1, "learning_rate": 1e-3}


def evaluated(ckpt, **options):
    run(evaluate, ckpt=ckpt, pref_data="pairs.jsonl", **options)
    [results] = json.loads((Path(ckpt) / "eval.json").read_text())["results"].values()
    return results


def logps_of_pairs(folder):
    model, tokenizer = sample.load_checkpoint(folder, CPU)
    [(_, records)] = data.read_preferences("pairs.jsonl")
    examples = data.encode_all(records, tokenizer, model.config.block_size, "pairs")
    return evaluate.pair_logps(model, examples, 4096)


@pytest.mark.parametrize("rank", [0, 2])
def test_sft_dpo_evaluation_and_export(start, rank):
    """Each stage starts from what the one before has written, from a pretrained model on."""
    before = {path.name: path.read_bytes() for path in Path(start).iterdir()}
    run(train_sft, data="pairs.jsonl", init_from=start, out_dir="out/sft", lora_rank=rank, **STEPS)
    losses = [step["loss"] for step in read_log("out/sft")]
    assert losses[-1] < losses[0]
    run(train_dpo, pref_data="pairs.jsonl", init_from="out/sft", out_dir="out/dpo", lora_rank=rank,
        eval_data="pairs.jsonl", **STEPS)
    steps = [row for row in read_log("out/dpo") if "loss" in row]
    assert steps[0]["loss/dpo"] == pytest.approx(math.log(2), abs=1e-4)
    assert steps[-1]["loss"] < steps[0]["loss"]
    assert {path.name: path.read_bytes() for path in Path(start).iterdir()} == before

    [written] = json.loads(Path("out/dpo/eval.json").read_text())["results"].values()
    assert evaluated("out/dpo") == written
    keys = {key for metric in evaluate.METRICS for key in (metric, f"{metric}_ci")}
    assert keys <= written.keys() and None not in written.values()
    assert written["pairs"] == 14 and written["flips"] == 7

    found = logps_of_pairs("out/dpo")
    assert (found - logps_of_pairs(start)).abs().max() > 1e-2
    run(sample, ckpt="out/dpo", export="out/theirs")
    assert torch.allclose(logps_of_pairs("out/theirs"), found, rtol=1e-4)


def test_untrained_model_answers_and_is_evaluated(start, command):
    """It is its own reference, and as good as chance would have it without a preference."""
    found = evaluated(start)
    assert found["accuracy_no_preference"] == 0.5 and found["rewards_accuracy"] == 0
    asked = ("--prompt", "Do you like tea?", "--max_new_tokens", 5, "--device", "cpu")
    status, out, err = command(
        sample, "--ckpt", start, *asked, "--preference", "I am happy.", "I am sad."
    )
    assert status == 0, err
    assert out.count("preference: ") == 2 and "preference: I am sad." in out
    status, out, err = command(data, "--ckpt", start, "--pref_data", "pairs.jsonl")
    assert status == 0, err
    assert "Do you like" in out and "I am" in out


def test_answer_under_a_preference_is_that_of_transformers(smol):
    """The chat template with the preference as system turn, greedy, until the end token."""
    import transformers

    theirs = transformers.AutoModelForCausalLM.from_pretrained(smol)
    their_tokenizer = transformers.AutoTokenizer.from_pretrained(smol)
    model, tokenizer = sample.load_checkpoint(smol, CPU)
    for row in pairs():
        meta = [row[tier] for tier in ("system", "preference") if tier in row]
        messages = [{"role": "system", "content": "\n\n".join(meta)},
                    {"role": "user", "content": row["prompt"]}]
        if "examples" not in row:
            ids = render_of(their_tokenizer, messages)
            assert tokenizer.render(row) == ids
            found = theirs.generate(torch.tensor([ids]), max_new_tokens=20, do_sample=False)
            [answer] = generate(model, [ids], tokenizer.ends, 20)
            assert found[0, len(ids) :].tolist() in (answer, [*answer, tokenizer.end])


def test_block_size_cuts_what_is_longer(start, write_rows, capsys):
    """It cannot be more than the model's context, and the model keeps that."""
    context = json.loads(Path(start, "config.json").read_text())["max_position_embeddings"]
    write_rows("pairs.jsonl", *[row | {"prompt": row["prompt"] * 60} for row in pairs()[:4]])
    limits = {0: context, 120: 120, 100_000: context}
    for module, source in ((train_sft, "data"), (train_dpo, "pref_data")):
        tokens = []
        for block_size, limit in limits.items():
            folder = f"out/{module.__name__}-{block_size}"
            run(module, **{source: "pairs.jsonl"}, init_from=start, out_dir=folder,
                block_size=block_size, **STEPS | {"max_steps": 1, "batch_size": 4})
            assert f"of 4 rows to fit {limit} tokens" in capsys.readouterr().out
            tokens.append(read_log(folder)[0]["tokens"])
            model, _ = sample.load_checkpoint(folder, CPU)
            assert model.config.block_size == context
        whole, cut, wide = tokens
        assert 4 * 100 < cut < 4 * 120 + 100 < whole == wide


@pytest.mark.parametrize("rank", [0, 2])
def test_changed_pretrained_weights_are_noticed(exported, workplace, rank):
    run(train_dpo, pref_data="pairs.jsonl", init_from="theirs", out_dir="out/dpo", lora_rank=rank,
        **STEPS)
    recorded = evaluated("out/dpo")
    assert evaluated("out/dpo", reference="theirs") == recorded
    tensors = tensors_of(exported)
    write_tensors(exported, tensors | {"model.norm.weight": tensors["model.norm.weight"] + 1})
    with pytest.raises(UserError, match="theirs: has changed since out/dpo was trained from it"):
        evaluated("out/dpo")


def test_a_file_that_is_never_read_is_no_part_of_the_weights(exported):
    before = sample.weights_hash(exported)
    shutil.copy(exported / "model.safetensors", exported / "consolidated.safetensors")
    assert sample.weights_hash(exported) == before


def test_no_space_on_export_is_one_line(workplace, monkeypatch):
    safetensors = pytest.importorskip("safetensors")

    def fill(tensors, path, metadata):
        raise safetensors.SafetensorError("No space left on device (os error 28)")

    monkeypatch.setattr("safetensors.torch.save_file", fill)
    model, tokenizer = sample.load_checkpoint("tiny", torch.device("cpu"))
    with pytest.raises(UserError, match=r"model.safetensors: cannot write: No space left"):
        hf_model.export("full", model, tokenizer)


def test_no_run_replaces_a_pretrained_model(exported, workplace):
    """--overwrite is meant for runs; it would delete config.json and tokenizer.json."""
    before = {path.name: path.read_bytes() for path in exported.iterdir()}
    for options in ({}, {"overwrite": True}, {"resume": True}):
        for init_from in ("tiny", "theirs"):
            with pytest.raises(UserError, match="--out_dir|in use"):
                run(train_dpo, **DPO | STEPS | {"init_from": init_from}, out_dir="theirs",
                    **options)
        with pytest.raises(UserError, match="--out_dir|in use"):
            run(train_sft, **SFT | STEPS, out_dir="theirs", **options)
    found = {p.name: p.read_bytes() for p in exported.iterdir() if p.name != ".lock"}
    assert found == before


def test_runs_of_a_pretrained_model_can_be_resumed(exported, workplace, keep_ckpt, monkeypatch):
    options = {"pref_data": "pairs.jsonl", "init_from": "theirs", "save_every": 2, "lora_rank": 2}
    run(train_dpo, out_dir="out/whole", **STEPS | options)
    with monkeypatch.context() as patch:
        patch.setattr(common, "finish_run", lambda *args: None)
        run(train_dpo, out_dir="out/cut", **STEPS | options)
    run(train_dpo, out_dir="out/cut", resume=True, **STEPS | options)
    assert same(weights("out/cut"), weights("out/whole"))
    assert same(weights("out/cut", "last.pt"), weights("out/whole", "last.pt"))
    assert read_log("out/cut") == read_log("out/whole")


# ---------------------------------------------------------------- the hub

HASHES = ("0123456789abcdef" * 3)[:40], ("fedcba9876543210" * 3)[:40]
ASK = """
import json, sys
from pathlib import Path
import hf_model, sample
from common import UserError

def tried(function, *arguments):
    try:
        return str(function(*arguments))
    except UserError as error:
        return f"error: {error}"

names = json.loads(sys.argv[1])
found = {name: tried(hf_model.find, name) for name in names}
start = sample.start_of("org/name", Path("out/run"))
about = [start["hash"], sample.start_of("org/other", Path("out/run"))["hash"],
         str(sample.reference_folder("out/run", {"reference": start}))]
print(json.dumps([found, about]))
"""


def test_models_of_the_hub_are_found_in_its_cache(exported, tmp_path, monkeypatch):
    """A process without network, with a cache laid out as huggingface_hub does."""
    pytest.importorskip("huggingface_hub")
    cache, place = tmp_path / "hub", tmp_path / "place"
    snapshots = []
    for name, commit in zip(("name", "other"), HASHES, strict=True):
        snapshots.append(cache / f"models--org--{name}" / "snapshots" / commit)
        snapshots[-1].mkdir(parents=True)
        (cache / f"models--org--{name}" / "refs").mkdir()
        (cache / f"models--org--{name}" / "refs" / "main").write_text(commit)
        for path in exported.iterdir():
            (snapshots[-1] / path.name).write_bytes(path.read_bytes())
    tensors = tensors_of(exported)
    write_tensors(snapshots[1], tensors | {"model.norm.weight": torch.ones(32)})
    for folder in ("out/run", "here/model", "org2"):
        (place / folder).mkdir(parents=True)
    names = ("org/name", "org/nothing", "out/nothing", "nothing", "a/b/c", "./org/name", "org2/x",
             "here/model", str(place / "org/name"), "../org/name", "org/name/", "")
    environment = {"HF_HUB_OFFLINE": "1", "HF_HUB_CACHE": str(cache), "PYTHONPATH": str(ROOT)}
    ran = subprocess.run(
        [sys.executable, "-c", ASK, json.dumps(names)], cwd=place, capture_output=True, text=True,
        env=os.environ | environment,
    )
    assert ran.returncode == 0, ran.stderr
    found, (one_hash, other_hash, reference) = json.loads(ran.stdout.splitlines()[-1])
    assert found.pop("org/name") == reference == str(snapshots[0])
    assert found.pop("here/model") == "here/model"
    assert one_hash != other_hash
    message = found.pop("org/nothing")
    assert message.startswith("error: org/nothing: no such folder here, and not to be had from the")
    assert "\n" not in message and len(message) < 400
    found.pop("")
    assert found.pop("org2/x").endswith("not looked for on the hub, since there is a folder org2 "
                                        "here")
    for name, message in found.items():
        assert message == f"error: {name}: no such checkpoint folder"


def test_evaluation_of_a_model_from_the_hub_comes_to_an_end(
    exported, workplace, monkeypatch, capsys
):
    """There is no folder org/name to write a report into."""
    found, real = {"org/name": exported}, hf_model.find
    monkeypatch.setattr(hf_model, "find", lambda name: found.get(str(name)) or real(name))
    run(evaluate, ckpt="org/name", pref_data="pairs.jsonl")
    assert "accuracy" in capsys.readouterr().out
    run(train_dpo, pref_data="pairs.jsonl", init_from="org/name", out_dir="out/dpo", **STEPS)
    recorded = evaluated("out/dpo")
    assert evaluated("out/dpo", reference="org/name") == recorded
