"""Models of the Llama family from Hugging Face folders, and back.

A folder has config.json, one or several *.safetensors, tokenizer.json; what its config asks for and
`model.Transformer` does not do is an error that names the key.
"""

import importlib
import json
import math
import re
from functools import cache
from pathlib import Path

import torch

import common
from common import UserError
from hf_tokenizer import AS_IT_IS, BYTE_OF, HfTokenizer
from model import Linear, ModelConfig, from_weights

FAMILIES = ("llama", "mistral", "qwen2", "qwen3")

# ---------------------------------------------------------------- config


def read_config(path):
    """ModelConfig of a Hugging Face config.json. Raises UserError naming the key."""
    asked = common.load_json(path)

    def refuse(key, why):
        raise UserError(f"{path}: field '{key}': {json.dumps(asked.get(key))}: {why}")

    def number(key, default=None, kind=int):
        value = default if asked.get(key) is None else asked[key]
        if not is_positive(value, kind):
            refuse(key, f"must be a {'whole ' if kind is int else ''}number above 0")
        return value

    family = asked.get("model_type")
    if family not in FAMILIES:
        refuse("model_type", f"must be one of {', '.join(FAMILIES)}")
    if asked.get("hidden_act", "silu") not in ("silu", "swish"):
        refuse("hidden_act", "must be silu")
    for key in ("attention_bias", "mlp_bias", "quantization_config", "rope_interleaved",
                "dual_chunk_attention_config"):
        if asked.get(key):
            refuse(key, "is not supported")
    if asked.get("is_causal") is False:
        refuse("is_causal", "attention to later tokens is not supported")
    context = number("max_position_embeddings")
    layers = asked.get("layer_types") or []
    if not isinstance(layers, list):
        refuse("layer_types", "must be a list")
    windowed = family == "mistral"
    if asked.get("use_sliding_window") and not windowed:
        full_layers = asked.get("max_window_layers", 28)
        if not isinstance(full_layers, int):
            refuse("max_window_layers", "must be a whole number")
        beyond = full_layers < number("num_hidden_layers")
        windowed = "sliding_attention" in layers if layers else beyond
    window = asked.get("sliding_window", 4096) if windowed else None
    if window is not None and not (is_positive(window) and window >= context):
        refuse("sliding_window", "a window is not supported; the model is exact up to that "
               f"length, with max_position_embeddings {window} instead of {context}")
    exact = ["full_attention", "sliding_attention"] if windowed else ["full_attention"]
    if any(kind not in exact for kind in layers):
        refuse("layer_types", f"must all be {' or '.join(exact)}")
    n_embd, n_head = number("hidden_size"), number("num_attention_heads")
    as_heads = n_head if family == "llama" or "num_key_value_heads" in asked else None
    n_kv_head = number("num_key_value_heads", as_heads)
    if n_head % n_kv_head:
        refuse("num_key_value_heads", f"must divide num_attention_heads {n_head}")
    if asked.get("head_dim") is None and n_embd % n_head:
        refuse("num_attention_heads", f"must divide hidden_size {n_embd}")
    head_size = number("head_dim", 128 if family == "qwen3" else n_embd // n_head)
    if head_size % 2:
        refuse("head_dim", "must be even")
    theta, scaling = read_rope(asked, refuse)
    return ModelConfig(
        vocab_size=number("vocab_size"), block_size=context, n_layer=number("num_hidden_layers"),
        n_head=n_head, n_kv_head=n_kv_head, n_embd=n_embd, head_size=head_size,
        n_hidden=number("intermediate_size"), rope_theta=theta, rope_scaling=scaling,
        norm_eps=number("rms_norm_eps", kind=int | float),
        qk_norm=family == "qwen3", qkv_bias=family == "qwen2",
        tied=bool(asked.get("tie_word_embeddings", False)),
    )


def is_positive(value, kind=int | float):
    return isinstance(value, kind) and not isinstance(value, bool) and 0 < value < math.inf


def read_rope(asked, refuse):
    """(theta, Llama 3's scaling or None), from `rope_parameters` or its older spelling."""
    key = "rope_scaling" if asked.get("rope_scaling") else "rope_parameters"  # it goes first
    rope = asked.get(key) or {}
    if not isinstance(rope, dict) or any(isinstance(value, dict) for value in rope.values()):
        refuse(key, "must be one object for all layers")
    theta = rope.get("rope_theta", asked.get("rope_theta", 10000.0))
    if not is_positive(theta):
        refuse(key if "rope_theta" in rope else "rope_theta", "must be a number above 0")
    kind = rope.get("rope_type", rope.get("type", "default"))
    partial = rope.get("partial_rotary_factor", asked.get("partial_rotary_factor"))
    if partial not in (None, 1.0):
        refuse("partial_rotary_factor" if "partial_rotary_factor" in asked else key,
               "partial rotation is not supported")
    if kind == "default":
        return theta, None
    if kind != "llama3":
        refuse(key, f"RoPE of type {kind} is not supported")
    names = ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings")
    if not all(is_positive(rope.get(name)) for name in names):
        refuse(key, f"must have the numbers {', '.join(names)}")
    if rope["low_freq_factor"] >= rope["high_freq_factor"]:
        refuse(key, "low_freq_factor must be below high_freq_factor")
    return theta, {name: rope[name] for name in names}


# ---------------------------------------------------------------- weights

# Each of our tensors is one of theirs, or several on top of each other.
LAYER = {
    "norm_1.weight": ["input_layernorm.weight"],
    "norm_2.weight": ["post_attention_layernorm.weight"],
    "attention.qkv.weight": [f"self_attn.{x}_proj.weight" for x in "qkv"],
    "attention.qkv.bias": [f"self_attn.{x}_proj.bias" for x in "qkv"],
    "attention.q_norm.weight": ["self_attn.q_norm.weight"],
    "attention.k_norm.weight": ["self_attn.k_norm.weight"],
    "attention.out.weight": ["self_attn.o_proj.weight"],
    "mlp.gate_up.weight": ["mlp.gate_proj.weight", "mlp.up_proj.weight"],
    "mlp.down.weight": ["mlp.down_proj.weight"],
}
WHOLE = {
    "embedding.weight": ["model.embed_tokens.weight"],
    "norm.weight": ["model.norm.weight"],
    "head.weight": ["lm_head.weight"],
}


def their_names(config):
    """{our tensor: [their tensors]} of a model."""
    absent = {"head.weight"} if config.tied else set()
    absent |= set() if config.qkv_bias else {"attention.qkv.bias"}
    absent |= set() if config.qk_norm else {"attention.q_norm.weight", "attention.k_norm.weight"}
    names = {ours: theirs for ours, theirs in WHOLE.items() if ours not in absent}
    for i in range(config.n_layer):
        for ours, theirs in LAYER.items():
            if ours not in absent:
                names[f"blocks.{i}.{ours}"] = [f"model.layers.{i}.{name}" for name in theirs]
    return names


def weight_files(folder):
    """{their tensor's name: file}. Raises UserError when the folder has no safetensors."""
    safetensors = needed("safetensors")
    path, index = folder / "model.safetensors", folder / "model.safetensors.index.json"
    if index.exists() and not path.exists():
        where = common.load_json(index).get("weight_map")
        if not isinstance(where, dict) or not all(isinstance(v, str) for v in where.values()):
            raise UserError(f"{index}: field 'weight_map': must map tensors to files")
        return {name: folder / Path(file).name for name, file in where.items()}
    if not path.exists():
        others = sorted(p.name for p in folder.iterdir() if p.suffix in (".bin", ".safetensors"))
        raise UserError(f"{folder}: model.safetensors is missing, and {index.name} too (here: "
                        f"{', '.join(others) or 'no weights'})")
    try:
        with safetensors.safe_open(path, framework="pt") as file:
            return dict.fromkeys(file.keys(), path)
    except (safetensors.SafetensorError, OSError) as error:
        raise UserError(f"{path}: truncated or not a safetensors file: {error}") from None


def read_weights(folder, config):
    """Yield (our name, tensor), one tensor in memory at a time.

    Raises UserError when a file is broken, or a tensor missing or left over.
    """
    safetensors = needed("safetensors")
    files, names = weight_files(folder), their_names(config)
    required = {name for theirs in names.values() for name in theirs}
    lacking = sorted(required - files.keys())
    left = sorted(name for name in files.keys() - required - {"lm_head.weight"}
                  if not name.endswith("rotary_emb.inv_freq"))
    for what, found in (("missing", lacking), ("not of this model's config", left)):
        if found:
            raise UserError(f"{folder}: tensor {found[0]}: {what}")

    def read(name):
        path = files[name]
        try:
            with safetensors.safe_open(path, framework="pt") as file:
                return file.get_tensor(name)
        except (safetensors.SafetensorError, OSError) as error:
            raise UserError(f"{path}: tensor {name}: {error}") from None

    head, embedding = "lm_head.weight", "model.embed_tokens.weight"
    if config.tied and head in files and not torch.equal(read(head), read(embedding)):
        raise UserError(f"{folder}: tensor {head}: is not the embedding that it is tied to")
    for ours, theirs in names.items():
        parts = [read(name) for name in theirs]
        if len({part.shape[1:] for part in parts}) > 1:
            shapes = ", ".join(str(list(part.shape)) for part in parts)
            raise ValueError(f"{', '.join(theirs)}: {shapes}, expected equally many columns")
        yield ours, parts[0] if len(parts) == 1 else torch.cat(parts)


def needed(module, why=""):
    """Import an optional package. Raises UserError that says how to install it."""
    try:
        return importlib.import_module(module)
    except ImportError:
        package = module.partition(".")[0]
        raise UserError(f"{why}this needs the package {package}: pip install {package}") from None


# ---------------------------------------------------------------- in


def find(name):
    """The folder that is meant: one that is here, or `org/name` on the hub or in its local cache.

    Raises UserError when there is neither.
    """
    folder = Path(name)
    if folder.is_dir():
        return folder
    if not re.fullmatch(r"(?!out/)[\w-][\w.-]*/[\w.-]+", str(name)):
        raise UserError(f"{name}: no such checkpoint folder")
    if folder.parent.is_dir():
        raise UserError(f"{name}: no such checkpoint folder, and not looked for on the hub, since "
                        f"there is a folder {folder.parent} here")
    return from_hub(str(name))


@cache
def from_hub(name):
    hub = needed("huggingface_hub", f"{name}: no such folder here; to look for it on the hub: ")
    try:
        return Path(hub.snapshot_download(name, **HUB_FILES))
    except Exception as error:  # whatever the network stack raises
        raise UserError(f"{name}: no such folder here, and not to be had from the hub: "
                        f"{common.first_line(error)}") from None


HUB_FILES = {"allow_patterns": ["*.json", "*.safetensors", "*.jinja", "tokenizer.model"],
             "ignore_patterns": ["*/*", "consolidated*"]}  # other copies of the same weights


def is_pretrained(folder):
    """Is this a Hugging Face model folder (and not one of our runs)?"""
    path = folder / "config.json"
    return path.exists() and "model_type" in common.load_json(path)


def load(folder, device, dtype):
    """(model, tokenizer) of a Hugging Face folder; dtype as in `model.from_weights`."""
    config = read_config(folder / "config.json")
    tokenizer = HfTokenizer.load(folder)
    try:
        return from_weights(config, read_weights(folder, config), device, dtype), tokenizer
    except ValueError as error:
        raise UserError(f"{folder}: {error}") from None


# ---------------------------------------------------------------- out


def export(folder, model, tokenizer):
    """Write a folder that `transformers` loads: float32 weights, adapters merged, tokenizer.

    Raises UserError when the folder is in use or no Hugging Face family has such a model.
    """
    folder = Path(folder)
    safetensors, save_file = needed("safetensors"), needed("safetensors.torch").save_file

    def write(path):
        try:
            save_file(dict(their_weights(model)), path, metadata={"format": "pt"})
        except safetensors.SafetensorError as error:  # as where the disk is full
            raise RuntimeError(str(error)) from None

    if model.config.n_latent:
        raise UserError(f"--export {folder}: no other tool steers a model by a latent")
    config = their_config(model.config, tokenizer)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        in_use = any(folder.iterdir())
    except OSError as error:
        raise UserError(f"--export {folder}: {error.strerror}") from None
    if in_use:
        raise UserError(f"--export {folder}: is in use")
    common.write_atomically(folder / "model.safetensors", write)
    if isinstance(tokenizer, HfTokenizer):
        tokenizer.export(folder)
    else:
        save_native_tokenizer(folder, tokenizer, model.config.block_size)
    ids = {key: config[key] for key in ("bos_token_id", "eos_token_id", "pad_token_id")}
    # Not the original's settings of sampling, which were for other weights.
    common.save_json(folder / "generation_config.json", ids)
    common.save_json(folder / "config.json", config)
    print(f"wrote {folder} (for transformers and what reads its folders)")


def their_config(config, tokenizer):
    """config.json of the family that has this model's parts."""
    if config.qk_norm and config.qkv_bias:
        raise UserError("--export: no Hugging Face family has both query/key norm and bias")
    family = "qwen3" if config.qk_norm else "qwen2" if config.qkv_bias else "llama"
    scaling = config.rope_scaling and {"rope_type": "llama3", **config.rope_scaling}
    return {
        "architectures": [f"{family.capitalize()}ForCausalLM"], "model_type": family,
        "vocab_size": config.vocab_size, "max_position_embeddings": config.block_size,
        "hidden_size": config.n_embd, "intermediate_size": config.n_hidden, "hidden_act": "silu",
        "num_hidden_layers": config.n_layer, "num_attention_heads": config.n_head,
        "num_key_value_heads": config.n_kv_head, "head_dim": config.head_size,
        "rms_norm_eps": config.norm_eps, "rope_theta": config.rope_theta, "rope_scaling": scaling,
        "attention_bias": False, "mlp_bias": False, "use_sliding_window": False,
        "tie_word_embeddings": config.tied, "dtype": "float32", "torch_dtype": "float32",
        "bos_token_id": None, "pad_token_id": tokenizer.end,
        "eos_token_id": tokenizer.ends if len(tokenizer.ends) > 1 else tokenizer.end,
    }


def their_weights(model):
    """Yield (their name, tensor in float32), the adapters merged."""
    config = model.config
    heads = (config.n_head, config.n_kv_head, config.n_kv_head)
    sizes = {3: [n * config.head_size for n in heads], 2: [config.n_hidden] * 2}
    for ours, theirs in their_names(config).items():
        path, _, leaf = ours.rpartition(".")
        module = model.get_submodule(path)
        merged = leaf == "weight" and isinstance(module, Linear)
        whole = (module.merged() if merged else getattr(module, leaf)).detach().float().cpu()
        parts = whole.split(sizes[len(theirs)]) if len(theirs) > 1 else [whole]
        for name, part in zip(theirs, parts, strict=True):
            yield name, part.clone()


# A turn of any role is its special token and its content; the roles are those of data.py's tiers.
CHAT_TEMPLATE = (
    "{% for m in messages %}{{ '<|' + m.role + '|>' + m.content }}"
    "{% if m.role == 'assistant' %}<|end|>{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)


def save_native_tokenizer(folder, tokenizer, block_size):
    """tokenizer.json of a tiktoken vocabulary, which merges whatever makes a token: so do we."""
    char_of = {byte: char for char, byte in BYTE_OF.items()}
    pieces = sorted(tokenizer.ranks, key=tokenizer.ranks.get)
    text = {piece: "".join(map(char_of.__getitem__, piece)) for piece in pieces}
    merges = [
        [text[piece[:i]], text[piece[i:]]]
        for piece in pieces
        for i in range(1, len(piece))
        if piece[:i] in text and piece[i:] in text
    ]
    byte_level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True,
                  "use_regex": False}
    split = {"type": "Split", "pattern": {"Regex": tokenizer.pattern}, "behavior": "Isolated",
             "invert": False}
    common.save_json(folder / "tokenizer.json", {
        "version": "1.0", "truncation": None, "padding": None, "normalizer": None,
        "added_tokens": [
            {"id": i, "content": token, "single_word": False, "lstrip": False, "rstrip": False,
             "normalized": False, "special": True} for token, i in tokenizer.special.items()
        ],
        "pre_tokenizer": {"type": "Sequence", "pretokenizers": [split, byte_level]},
        "post_processor": None, "decoder": byte_level,
        "model": {
            "type": "BPE", "dropout": None, "unk_token": None, "continuing_subword_prefix": None,
            "end_of_word_suffix": None, "fuse_unk": False, "byte_fallback": False,
            "ignore_merges": True, "merges": merges,
            "vocab": {text[piece]: rank for piece, rank in tokenizer.ranks.items()},
        },
    })
    common.save_json(folder / "tokenizer_config.json", {
        **AS_IT_IS, "model_max_length": block_size,
        "clean_up_tokenization_spaces": False, "chat_template": CHAT_TEMPLATE,
        "eos_token": "<|end|>", "pad_token": "<|end|>",
    })
