"""Stage one, learn to speak: maximise log p of each response under its meta-prompt and query.

    python train_sft.py --data world|users|FILE[,FILE...] --out_dir DIR
"""

import dataclasses
import time
from dataclasses import dataclass
from pathlib import Path

import torch

import common
import data
import distributed
import few_shot
import world
from common import UserError
from model import ModelConfig, Transformer, adapt, answer_token_logps, pack
from sample import load_start, start_of


@dataclass(frozen=True)
class Options:
    """Supervised fine-tuning on prompts and responses, from scratch or from a checkpoint."""

    data: str = "world"  # world, users, or files of {prompt, response} or pairs, comma-separated
    context: int = 0  # few-shot: show up to this many other choices of a row's user
    init_from: str = "scratch"  # scratch, finished run, Hugging Face folder or org/name
    tokenizer: str = "world"  # from scratch: world, gpt2 or a FILE.tiktoken
    out_dir: str = ""  # folder of this run; default for the world: out/sft
    overwrite: bool = False  # replace a run that is there
    resume: bool = False  # go on with an unfinished run
    n_layer: int = 3  # from scratch: blocks
    n_head: int = 4  # from scratch: query heads
    n_kv_head: int = 4  # from scratch: key/value heads, a divisor of n_head
    n_embd: int = 128  # from scratch: channels
    fsdp: bool = False  # under torchrun, spread weights, gradients and optimizer over processes
    lora_rank: int = 0  # train adapters of this rank on a frozen model; 0: train the model
    activation_checkpointing: bool = False  # run blocks twice instead of keeping what they compute
    block_size: int = 0  # cut prompt and answer to this many tokens; 0: the model's, scratch 512
    epochs: float = 1.0  # passes over the data
    max_steps: int = 0  # stop after this many steps instead; 0: as many as the epochs take
    batch_size: int = 64  # rows a step
    micro_tokens: int = 4096  # tree tokens of one forward pass; changes memory, not the result
    learning_rate: float = 3e-3  # peak
    warmup_steps: int = 10  # linear, before the cosine to a fiftieth of the peak
    weight_decay: float = 0.1  # AdamW's, on matrices
    clip: float = 1.0  # largest gradient norm
    save_every: int = 100  # steps between checkpoints to resume from
    log_every: int = 10  # steps between printed lines; log.jsonl has every step
    seed: int = 0  # of initialisation, data order and contexts
    device: str = "auto"  # auto, cpu, cuda, cuda:N, mps
    precision: str = "auto"  # auto, bf16, fp16, fp32

    def __post_init__(self):
        common.at_least(
            self, 1, "n_layer", "n_head", "n_kv_head", "n_embd", "batch_size", "micro_tokens",
            "save_every", "log_every",
        )
        common.at_least(
            self, 0, "epochs", "max_steps", "learning_rate", "warmup_steps", "weight_decay",
            "seed", "lora_rank", "block_size", "context",
        )
        common.above_zero(self, "clip")
        if not self.init_from:
            raise UserError("--init_from: empty")
        if self.fsdp and self.lora_rank:
            raise UserError("--fsdp trains the whole model: leave out --lora_rank")
        if self.lora_rank and self.init_from == "scratch":
            raise UserError("--lora_rank needs a model to start from: --init_from")


def new_model(options, vocab_size):
    """A transformer from scratch; raises UserError when the sizes do not go together."""
    if options.n_embd % (2 * options.n_head) or options.n_head % options.n_kv_head:
        raise UserError("--n_embd must be a multiple of 2 * n_head, and n_head of n_kv_head")
    n_hidden = 32 * max(1, round(options.n_embd * 8 / 3 / 32))
    config = ModelConfig(vocab_size, options.block_size or 512, options.n_layer, options.n_head,
                         options.n_kv_head, options.n_embd, n_hidden)
    return Transformer(config).initialize(torch.Generator().manual_seed(options.seed))


def main(options):
    # 1. Options and seed.
    if not options.out_dir and options.data != "world":
        raise UserError("--out_dir is required on other data than the world")
    folder = Path(options.out_dir or "out/sft")
    device = common.pick_device(options.device)
    precision = common.pick_precision(options.precision, device)
    torch.manual_seed(options.seed)
    init_from = "" if options.init_from == "scratch" else options.init_from
    common.on_first(common.check_folder, folder, options.resume, options.overwrite, init_from)

    # 2. Data.
    if options.data in world.SFT_DATA:
        records = world.SFT_DATA[options.data]()
    else:
        records = data.read_responses(options.data)
    order = common.DataOrder(
        [[i] for i in range(len(records))],
        options.batch_size, options.epochs, options.max_steps, options.seed,
    )
    if options.context:  # drawn anew each time that a row is taken
        records = few_shot.with_random_contexts(records, order.rows, options.context, options.seed)
        order.rows = list(range(len(records)))
    records = [data.chosen_as_response(record) for record in records]

    # 3. Model and tokenizer. Rows become trees of tokens.
    first = distributed.first_device(device, options.fsdp)
    if not init_from:
        tokenizer = data.load_tokenizer(options.tokenizer)
        model = new_model(options, tokenizer.vocab_size).to(first)
    else:
        dtype = common.PRECISIONS[precision] if options.lora_rank else torch.float32
        model, tokenizer = load_start(init_from, first, dtype)
        for name in ("tokenizer", "n_layer", "n_head", "n_kv_head", "n_embd"):
            if getattr(options, name) != getattr(Options, name):
                print(f"--{name} is left aside: the model of --init_from has its own")
        adapt(model, options.lora_rank, options.seed)
    model.train()
    model.checkpointing = options.activation_checkpointing
    spread = distributed.spread(model, options.fsdp, device)
    block_size = min(options.block_size or model.config.block_size, model.config.block_size)
    examples = data.encode_all(records, tokenizer, block_size, options.data)

    # 4. Optimizer, and the folder of the run.
    optimizer = common.adamw(model, options.learning_rate, options.weight_decay)
    scaler = torch.amp.GradScaler(device.type, enabled=precision == "fp16")
    config = {
        "stage": "sft", "options": dataclasses.asdict(options), "precision": precision,
        "model": dataclasses.asdict(model.config), "tokenizer": tokenizer.describe(),
    }
    if init_from:
        config["reference"] = start_of(init_from, folder)
    run_hash = common.run_hash(config, examples)
    common.on_first(common.claim, folder, options.resume, options.overwrite)
    first_step = common.start_run(folder, options, config, run_hash, model, optimizer, scaler)
    tokenizer.save(folder)
    log = common.Log(folder, first_step)

    # 5. Loop.
    bar = common.progress_bar(order, first_step, "sft")
    for step in range(first_step, order.max_steps):
        if step % options.save_every == 0 and step > first_step:
            common.save_checkpoint(folder, step, run_hash, model, optimizer, scaler)
        start = time.perf_counter()
        batch = [examples[i] for i in order.batch(step)]
        n_learned = sum(len(example.answers[0]) for example in batch)

        # The loss is the mean over all learned tokens of the step, however it is cut.
        mean_loss = 0.0
        shares = data.shares(batch, options.micro_tokens, distributed.RANK, distributed.WORLD)
        for n, (micro, weight) in enumerate(shares, 1):
            distributed.sync_gradients(spread, n == len(shares))
            trees = pack([batch[i].tree for i in micro], device)
            with common.autocast(device, precision):
                token_logps = answer_token_logps(spread, trees)
            loss = -weight * token_logps.sum() / n_learned
            scaler.scale(loss * distributed.WORLD).backward()
            mean_loss += loss.detach()
        mean_loss = sum(distributed.gather(mean_loss.item()))

        rate = common.learning_rate(
            step, order.max_steps, options.warmup_steps, options.learning_rate
        )
        grad_norm = common.update(model, optimizer, scaler, options.clip, rate)

        fields = {"step": step + 1, "loss": mean_loss, "grad_norm": grad_norm,
                  "learning_rate": rate, "tokens": sum(map(data.tree_size, batch))}
        common.log_step(log, bar, fields, start, options.log_every)
    bar.close()

    # 6. Summary.
    common.finish_run(folder, model)


if __name__ == "__main__":
    common.run(main, Options)
