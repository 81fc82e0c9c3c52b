"""Answers of a checkpoint under one or several preferences, side by side, or a chat.

    python sample.py --ckpt out/dpo --prompt "How do I cook the rice?" \\
        --preference "I prefer a list." "My train leaves in one minute."
"""

import os
from dataclasses import dataclass, replace
from pathlib import Path

import torch

import common
import data
import few_shot
import hf_model
from common import PRECISIONS, UserError
from hf_tokenizer import HfTokenizer
from model import ModelConfig, adapt, add_latent, for_inference, from_weights, generate


@dataclass(frozen=True)
class Options:
    """Answer a prompt under each preference; without --prompt, chat on the terminal."""

    ckpt: str = "out/dpo"  # finished run, Hugging Face folder or org/name
    prompt: str = ""  # the query; without it, a chat
    system: str = ""  # the provider's rules and role
    preference: tuple[str, ...] = ()  # what the user wants; an answer for each
    examples: str = ""  # file of the user's earlier choices, as preference data
    samples: int = 1  # answers for each preference
    temperature: float = 0.0  # 0 always takes the likeliest token
    top_k: int = 0  # choose among the k likeliest tokens; 0: among all
    top_p: float = 1.0  # choose among the likeliest tokens that make up this probability
    max_new_tokens: int = 200  # longest answer, in tokens
    export: str = ""  # write the model as a Hugging Face folder here, and answer nothing
    seed: int = 0  # of the sampling
    device: str = "auto"  # auto, cpu, cuda, cuda:N, mps
    precision: str = "auto"  # auto, bf16, fp16, fp32

    def __post_init__(self):
        common.at_least(self, 1, "samples", "max_new_tokens")
        common.at_least(self, 0, "temperature", "top_k", "seed")
        if not 0 < self.top_p <= 1:
            raise UserError(f"--top_p must be above 0 and at most 1, not {self.top_p}")
        try:
            "".join((self.prompt, self.system, *self.preference)).encode()
        except UnicodeEncodeError:
            raise UserError("--prompt, --system or --preference: not UTF-8") from None


def load_checkpoint(folder, device, dtype=torch.float32):
    """(model, tokenizer) of a finished run or a Hugging Face folder.

    dtype is that of the blocks' linear layers, as in `model.from_weights`. Raises UserError when a
    file is missing, broken, or belongs to another model.
    """
    folder = hf_model.find(folder)
    if hf_model.is_pretrained(folder):
        model, tokenizer = hf_model.load(folder, device, dtype)
    else:
        model, tokenizer = load_run(folder, device, dtype)
    if tokenizer.vocab_size > model.config.vocab_size:
        raise UserError(f"{folder}: the tokenizer has {tokenizer.vocab_size} tokens, "
                        f"the model {model.config.vocab_size}")
    return model.eval(), tokenizer


def load_start(folder, device, dtype=torch.float32):
    """`load_checkpoint` of a model to train on; one that has a latent would read its choices by
    what it started from, so it is refused."""
    model, tokenizer = load_checkpoint(folder, device, dtype)
    if model.encoder is not None:
        raise UserError(f"--init_from {folder}: has a latent; take the model it started from")
    return model, tokenizer


def load_run(folder, device, dtype):
    """`load_checkpoint` of one of our runs: its weights, or adapters on its starting model."""
    weights = common.finished(folder)
    if not weights:
        raise UserError(f"{folder}: no finished run here (model.pt is missing), and no Hugging "
                        "Face model (config.json with a model_type)")
    tokenizer, _ = load_tokenizer(folder)
    config = common.load_json(folder / "config.json")
    tensors = common.load_tensors(weights)
    try:
        sizes = ModelConfig(**config["model"])
        if weights.name == "model.pt":
            model = from_weights(sizes, tensors.items(), device, dtype)
        else:
            model = load_base(folder, config, sizes, device, dtype)
            adapt(model, config["options"]["lora_rank"])
            if sizes.n_latent:
                add_latent(model, sizes.n_latent)
            common.load_trained(model, tensors)
        if sizes.n_latent:
            base = load_base(folder, config, sizes, device, dtype)
            model.features = few_shot.Features(for_inference(base), tokenizer)
    except (AttributeError, KeyError, TypeError, ValueError, ZeroDivisionError,
            RuntimeError) as error:
        if common.out_of_memory(error):
            raise
        reason = common.first_line(error)
        raise UserError(f"{weights}: not the weights of its config.json: {reason}") from None
    return model, tokenizer


def load_base(folder, config, sizes, device, dtype):
    """The model that a run started from; ValueError when its sizes are not those of the run."""
    model, _ = load_checkpoint(reference_folder(folder, config), device, dtype)
    if replace(model.config, n_latent=sizes.n_latent) != sizes:
        raise ValueError("the starting model's config.json has changed")
    return model


def load_tokenizer(folder):
    """(tokenizer, context length) of what `load_checkpoint` loads. Raises UserError as it does."""
    folder = hf_model.find(folder)
    path = folder / "config.json"
    if hf_model.is_pretrained(folder):
        return HfTokenizer.load(folder), hf_model.read_config(path).block_size
    config = common.load_json(path)
    about = config.get("tokenizer")
    if config.get("stage") == "np-btl":
        raise UserError(f"{folder}: is a reward model, which judges answers and writes none")
    theirs = isinstance(about, dict) and about.get("kind") == "huggingface"
    try:
        block_size = int(config["model"]["block_size"])
    except (KeyError, TypeError, ValueError) as error:
        raise UserError(f"{path}: field 'model': {error}") from None
    return (HfTokenizer if theirs else data.Tokenizer).load(folder), block_size


def weights_hash(folder):
    """Hash of all the weights that `load_checkpoint` reads; None of a run that has none yet."""
    folder = hf_model.find(folder)
    if hf_model.is_pretrained(folder):
        files = set(hf_model.weight_files(folder).values())
        return common.content_hash(*map(common.file_hash, sorted(files)))
    path = common.finished(folder)
    if path is None or path.name == "model.pt":
        return path and common.file_hash(path)
    base = common.load_json(folder / "config.json").get("reference") or {}
    return common.content_hash(common.file_hash(path), base.get("hash"))


def start_of(init_from, folder):
    """What config.json of the run in `folder` keeps about its starting model."""
    path = os.path.relpath(hf_model.find(init_from).resolve(), folder.resolve())
    return {"path": path, "hash": weights_hash(init_from)}


def reference_folder(folder, config):
    """Where a run's starting model lies; UserError when it is gone or has changed."""
    try:
        path, recorded_hash = config["reference"]["path"], config["reference"]["hash"]
        found = (Path(folder) / path).resolve()
    except (TypeError, KeyError):
        raise UserError(f"{Path(folder) / 'config.json'}: field 'reference': must have path and "
                        "hash") from None
    if not found.is_dir():
        raise UserError(f"{folder}: the model that it started from is not at {found}")
    if weights_hash(found) != recorded_hash:
        raise UserError(f"{found}: has changed since {folder} was trained from it")
    return found


def answer_tokens(model, tokenizer, records, max_new_tokens, generator=None, z=None, **sampling):
    """Answers (lists of tokens) to records, each under its own meta-prompt, made as one batch.

    Where the model has an encoder, `examples` become its latent, unless z (records, n_latent) is
    given.
    """
    room = model.config.block_size
    if model.encoder is not None:
        with torch.no_grad():
            z = few_shot.latents(model, records) if z is None else z
        records = few_shot.without_examples(records)
    prompts = [e.trunk for e in data.encode_all(records, tokenizer, room, "prompts")]
    return generate(model, prompts, tokenizer.ends, max_new_tokens, generator, z, **sampling)


def answer(model, tokenizer, records, max_new_tokens=200, **settings):
    """The texts of `answer_tokens`."""
    found = answer_tokens(model, tokenizer, records, max_new_tokens, **settings)
    return list(map(tokenizer.decode, found))


def meta_prompt(system, preference, examples):
    tiers = {"system": system, "preference": preference, "examples": examples}
    return {tier: content for tier, content in tiers.items() if content}


def print_side_by_side(model, tokenizer, records, **settings):
    """Print the answer to each record under the tiers that it was given."""
    for record, text in zip(records, answer(model, tokenizer, records, **settings), strict=True):
        tiers = [f"{tier}: {record[tier]}" for tier in data.TEXT_TIERS if tier in record]
        print("\n".join(tiers) or "(neither system message nor preference)")
        print("  " + text.replace("\n", "\n  ") + "\n")


def chat(respond, options, examples):
    """Read queries until the end of input; /preference and /system change the tiers."""
    system, preference, turns = options.system, " ".join(options.preference), []
    print("/preference TEXT, /system TEXT change the tiers; /new forgets the talk; /quit ends")
    while True:
        try:
            line = input("> ").strip()
            line.encode()  # a lone surrogate is a byte that was no UTF-8
        except EOFError:
            return
        except UnicodeError:
            print("not UTF-8")
            continue
        command, _, text = line.partition(" ")
        if command == "/quit":
            return
        elif command == "/preference":
            preference = text.strip()
        elif command == "/system":
            system = text.strip()
        elif command == "/new":
            turns = []
        elif command.startswith("/"):
            print(f"unknown command {command}")
        elif line:
            turns.append({"role": "user", "content": line})
            record = meta_prompt(system, preference, examples)
            try:
                text = respond(record | {"prompt": turns})
            except UserError as error:
                print(error)
                turns.pop()
                continue
            print(text)
            turns.append({"role": "assistant", "content": text})


def read_examples(path):
    """The choices of one user, from a preference file."""
    records, first = data.read_records(path), {}
    certain = list(filter(few_shot.is_certain, records))
    if not certain:
        raise UserError(f"--examples {path}: no choice that is certain (label_prob 1)")
    for row in certain:
        first.setdefault(few_shot.pair_of(few_shot.choice(row)), row)
    rows = list(first.values())
    if len(rows) < len(records):
        print(f"--examples {path}: {len(records) - len(rows)} of {len(records)} choices are left "
              "out: of uncertain label, or on a pair that came before")
    users = {few_shot.user_of(row) for row in certain if "user" in row}
    if len(users) > 1:
        print(f"--examples {path}: the choices of {len(users)} users, read as one's")
    few_shot.say_stated(rows)
    return list(map(few_shot.choice, rows))


def main(options):
    device = common.pick_device(options.device)
    precision = common.pick_precision(options.precision, device)
    if options.export:
        model, tokenizer = load_checkpoint(options.ckpt, torch.device("cpu"))
        hf_model.export(options.export, model, tokenizer)
        return
    examples = read_examples(options.examples) if options.examples else []
    model, tokenizer = load_checkpoint(options.ckpt, device, PRECISIONS[precision])
    model = for_inference(model, sampling=True)
    generator = torch.Generator(device).manual_seed(options.seed)
    names = ("temperature", "top_k", "top_p", "max_new_tokens")
    settings = {name: getattr(options, name) for name in names} | {"generator": generator}
    with common.autocast(device, precision):
        if not options.prompt:
            chat(lambda record: answer(model, tokenizer, [record], **settings)[0],
                 options, examples)
            return
        records = [
            meta_prompt(options.system, preference, examples) | {"prompt": options.prompt}
            for preference in options.preference or ("",)
            for _ in range(options.samples)
        ]
        print_side_by_side(model, tokenizer, records, **settings)


if __name__ == "__main__":
    common.run(main, Options)
