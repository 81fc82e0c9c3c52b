"""Answers of a checkpoint under one or several preferences, side by side, or a chat.

    python sample.py --ckpt out/dpo --prompt "How do I cook the rice?" \\
        --preference "I prefer a list." "My train leaves in one minute."
"""

from dataclasses import dataclass
from pathlib import Path

import torch

import common
import data
from common import UserError
from model import ModelConfig, Transformer, generate


@dataclass(frozen=True)
class Options:
    """Answer a prompt under each preference; without --prompt, chat on the terminal."""

    ckpt: str = "out/dpo"  # folder of a finished run
    prompt: str = ""  # the query; without it, a chat
    system: str = ""  # the provider's rules and role
    preference: tuple[str, ...] = ()  # what the user wants; an answer for each
    examples: str = ""  # file of the user's earlier choices, as preference data
    samples: int = 1  # answers for each preference
    temperature: float = 0.0  # 0 always takes the likeliest token
    top_k: int = 0  # choose among the k likeliest tokens; 0: among all
    top_p: float = 1.0  # choose among the likeliest tokens that make up this probability
    max_new_tokens: int = 200  # longest answer, in tokens
    seed: int = 0  # of the sampling
    device: str = "auto"  # auto, cpu, cuda, cuda:N, mps
    precision: str = "auto"  # auto, bf16, fp16, fp32

    def __post_init__(self):
        common.at_least(self, 1, "samples", "max_new_tokens")
        common.at_least(self, 0, "temperature", "top_k", "seed")
        if not 0 < self.top_p <= 1:
            raise UserError(f"--top_p must be above 0 and at most 1, not {self.top_p}")


def load_checkpoint(folder, device):
    """(model, tokenizer, config) of a finished run.

    Raises UserError when a file is missing, broken, or belongs to another model.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise UserError(f"{folder}: no such checkpoint folder")
    if not (folder / "model.pt").exists():
        raise UserError(f"{folder}: no finished run here (model.pt is missing)")
    config = common.load_json(folder / "config.json")
    tokenizer = data.Tokenizer.load(folder)
    try:
        model = Transformer(ModelConfig(**config["model"]))
    except (KeyError, TypeError, ZeroDivisionError, RuntimeError) as error:
        raise UserError(f"{folder / 'config.json'}: field 'model': {error}") from None
    load_weights(model, common.load_tensors(folder / "model.pt"), folder / "model.pt")
    if tokenizer.vocab_size != model.config.vocab_size:
        raise UserError(f"{folder}: the tokenizer has {tokenizer.vocab_size} tokens, "
                        f"the model {model.config.vocab_size}")
    return model.to(device).eval(), tokenizer, config


def load_weights(model, weights, path):
    try:
        model.load_state_dict(weights)
    except (RuntimeError, TypeError, AttributeError) as error:
        reason = " ".join(str(error).split())[:150]
        raise UserError(f"{path}: weights of another model: {reason}") from None


def answer(model, tokenizer, records, max_new_tokens=200, generator=None, **sampling):
    """Answers (texts) to records, each under its own meta-prompt, generated as one batch."""
    room = model.config.block_size
    prompts = [e.trunk for e in data.encode_all(records, tokenizer, room, "prompts")]
    found = generate(model, prompts, tokenizer.end, max_new_tokens, generator, **sampling)
    return [tokenizer.decode(tokens) for tokens in found]


def read_examples(name):
    """The `examples` tier from a file of preference data: [{prompt, chosen, rejected}, ...]."""
    if not name:
        return []
    examples = []
    for record in [record for _, rows in data.read_preferences(name) for record in rows]:
        prompt = record["prompt"]
        prompt = prompt if isinstance(prompt, str) else prompt[-1]["content"]
        examples.append({"prompt": prompt} | {f: record[f] for f in ("chosen", "rejected")})
    return examples


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
        except EOFError:
            return
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


def main(options):
    device = common.pick_device(options.device)
    model, tokenizer, _ = load_checkpoint(options.ckpt, device)
    examples = read_examples(options.examples)
    generator = torch.Generator(device).manual_seed(options.seed)
    names = ("temperature", "top_k", "top_p", "max_new_tokens")
    settings = {name: getattr(options, name) for name in names} | {"generator": generator}
    with common.autocast(device, common.pick_precision(options.precision, device)):
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
