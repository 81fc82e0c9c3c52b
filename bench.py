"""What it costs, beside the peers on the same work.

    python bench.py train  --init_from DIR --pref_data FILE [--vs trl]
    python bench.py sample --init_from DIR --pref_data FILE [--vs transformers]
    python bench.py prefix --init_from DIR [--vs transformers]    # cost of long shared prefixes
    python bench.py memory     # peak memory of one DPO step by model size, full and LoRA

Each measurement is a process of its own; the sides take turns. The last line is one JSON object.
"""

import contextlib
import dataclasses
import importlib.metadata
import importlib.util
import itertools
import json
import multiprocessing
import os
import random
import re
import resource
import shutil
import sys
import tempfile
import time
import traceback
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F

import common
import data
import evaluate
import hf_model
import train_dpo
from common import UserError, content_hash
from model import ModelConfig, Transformer, answer_logps, for_inference, generate, pack
from sample import load_checkpoint, load_tokenizer


@dataclass(frozen=True)
class Options:
    """Measure speed and memory; the last line is one JSON object."""

    what: str = "train"  # train, sample, prefix, memory
    init_from: str = ""  # finished run, Hugging Face folder or org/name
    pref_data: str = ""  # preference files, separated by commas
    vs: str = ""  # measure this peer too: trl (train) or transformers (sample, prefix)
    pairs: int = 16  # train: rows drawn from the data; one epoch of them is a round
    batch_size: int = 4  # train, memory: pairs a step
    rounds: int = 2  # train, sample, prefix: how often the sides take turns
    sizes: tuple[str, ...] = ("135M", "360M", "1.1B")  # memory: which of the shapes below
    lora_rank: int = 0  # adapters of this rank; train, 0: the whole model; memory, 0: 16
    device: str = "auto"  # auto, cpu, cuda, cuda:N, mps
    precision: str = "auto"  # auto, bf16, fp16, fp32

    def __post_init__(self):
        common.at_least(self, 1, "pairs", "batch_size", "rounds")
        common.at_least(self, 0, "lora_rank")
        peers = {"train": "trl", "sample": "transformers", "prefix": "transformers", "memory": ""}
        if self.what not in peers:
            raise UserError(f"{self.what}: must be {', '.join(peers)}")
        if self.vs not in ("", peers[self.what]):
            raise UserError(f"--vs {self.vs}: {self.what} has {peers[self.what] or 'no peer'}")
        if self.vs == "trl" and self.lora_rank:
            raise UserError("--vs trl trains the whole model: leave out --lora_rank")
        unknown = set(self.sizes) - set(SHAPES)
        if unknown:
            raise UserError(f"--sizes: {unknown.pop()}: must be among {', '.join(SHAPES)}")


# ---------------------------------------------------------------- a process for each measurement


def call(function, arguments, pipe):
    """In the new process: function(*arguments), its output hidden, with the memory that it took."""
    common.keep_memory()  # for the peers as for us
    try:
        with open(os.devnull, "w") as f, contextlib.redirect_stdout(f), \
                contextlib.redirect_stderr(f):
            found = function(*arguments)
        peak = peak_memory()
        if torch.cuda.is_available():
            on_cards = map(torch.cuda.max_memory_allocated, range(torch.cuda.device_count()))
            peak = max(on_cards) or peak
        pipe.send(found | {"peak_gib": peak / 2**30})
    except BaseException as error:
        pipe.send(str(error) if isinstance(error, UserError) else traceback.format_exc())


def peak_memory():
    """Bytes; from /proc where it says so, as Linux' getrusage counts what the parent had too."""
    status = Path("/proc/self/status")
    found = re.search(r"VmHWM:\s+(\d+)", status.read_text()) if status.exists() else None
    if found:
        return 2**10 * int(found[1])
    unit = 1 if sys.platform == "darwin" else 2**10
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def in_process(function, *arguments):
    """function(*arguments), a dict, with its peak memory; raises UserError when it fails."""
    context = multiprocessing.get_context("spawn")
    here, there = context.Pipe(False)
    process = context.Process(target=call, args=(function, arguments, there))
    process.start()
    there.close()
    try:
        found = here.recv()
    except EOFError:
        found = f"{getattr(function, 'func', function).__name__}: the process was killed"
    process.join()
    if isinstance(found, str):
        raise UserError(found)
    return found


def take_turns(sides, rounds, *arguments):
    """{side: [what its function(*arguments) found in each round]}, printed as it comes."""
    found = {side: [] for side in sides}
    for _ in range(rounds):
        for side, function in sides.items():
            found[side].append(in_process(function, *arguments))
            print(side, found[side][-1], flush=True)
    return found


def as_torch_comes():
    """For the peers' processes: undo what our model.py and common.py set on import."""
    torch.backends.cuda.enable_cudnn_sdp(True)
    os.environ.pop("ONEDNN_PRIMITIVE_CACHE_CAPACITY", None)


def matmul_peak(device, precision):
    """Floating-point operations a second in products of square matrices, the best of ten times."""
    size, products = (2048, 1) if device == "cpu" else (8192, 10)  # a launch costs a GPU nothing
    dtype = common.PRECISIONS[precision]
    a, b = (torch.randn(size, size, device=device).to(dtype) for _ in range(2))
    best = 0.0
    for _ in range(10):
        start = time.perf_counter()
        for _ in range(products):
            c = a @ b
        c[0, 0].item()
        best = max(best, products * 2 * size**3 / (time.perf_counter() - start))
    return best


# ---------------------------------------------------------------- training


@dataclass(frozen=True)
class Job:
    """The work of one measurement of training."""

    folder: str  # where to work; holds pairs.jsonl
    init_from: str
    batch_size: int
    lora_rank: int
    device: str
    precision: str

    @property
    def dpo_options(self):
        return train_dpo.Options(
            pref_data="pairs.jsonl", init_from=self.init_from, out_dir="out/run", overwrite=True,
            lora_rank=self.lora_rank, epochs=1.0, batch_size=self.batch_size, sft_weight=0.0,
            learning_rate=1e-6, warmup_steps=0, log_every=1000,
            device=self.device, precision=self.precision,
        )


def train_ours(job):
    """train_dpo.py as it is, from its start to its end: {"seconds", "step_seconds", "loss"}."""
    os.chdir(job.folder)
    shutil.rmtree("out", ignore_errors=True)  # no reference from an earlier round
    start = time.perf_counter()
    train_dpo.main(job.dpo_options)
    seconds = time.perf_counter() - start
    lines = Path("out/run/log.jsonl").read_text().splitlines()
    steps = [line for line in map(json.loads, lines) if "seconds" in line]
    return {"seconds": seconds, "step_seconds": sum(step["seconds"] for step in steps),
            "loss": sum(step["loss"] for step in steps) / len(steps)}


KERNELS = {  # of a profile's operators: part of a name
    "products": ("aten::mm", "aten::addmm", "mkldnn"),
    "attention": ("attention", "aten::bmm"), "softmax": ("softmax", "logsumexp", "aten::exp_"),
    "copies": ("copy_", "fill_"), "indexing": ("index", "scatter", "cat"), "optimizer": ("adam",),
}


def profile_ours(job):
    """Which share of the operators' own time in `train_ours` is spent on what."""
    with torch.profiler.profile() as profiler:
        train_ours(job)
    shares = dict.fromkeys((*KERNELS, "rest"), 0.0)
    operators = [event for event in profiler.key_averages()
                 if event.device_type == torch.autograd.DeviceType.CPU]  # they hold their kernels
    spent = {event.key: event.self_device_time_total for event in operators}
    if not any(spent.values()):  # no GPU
        spent = {event.key: event.self_cpu_time_total for event in operators}
    for key, time_spent in spent.items():
        kind = next((kind for kind, parts in KERNELS.items()
                     if any(part in key for part in parts)), "rest")
        shares[kind] += time_spent / sum(spent.values())
    return shares


def train_trl(job, at_once):
    """DPOTrainer on the same token ids in the same order: {"seconds", "loss"}.

    From loading the model to the last step, reference log-probabilities included, which it
    computes beforehand. Steps of the same size in passes of `at_once` pairs, each padded to its
    longest (all sizes that divide a step are tried, the fastest is compared), with its fused head,
    under autocast, without checkpointing of activations and without saving the model.
    """
    import datasets
    import transformers
    import trl

    class Trainer(trl.DPOTrainer):
        def _prepare_dataset(self, dataset, *args):
            return dataset  # it is tokenised already

    as_torch_comes()
    os.chdir(job.folder)
    examples, order = encoded_rows(job)
    rows = [examples[i] for i in order]
    rows = {"prompt_ids": [row.trunk for row in rows],
            "chosen_ids": [row.answers[0] for row in rows],
            "rejected_ids": [row.answers[1] for row in rows]}
    start = time.perf_counter()
    model = transformers.AutoModelForCausalLM.from_pretrained(job.init_from, dtype=torch.float32)
    arguments = trl.DPOConfig(
        output_dir="out/trl", max_length=None, num_train_epochs=1, learning_rate=1e-6,
        per_device_train_batch_size=at_once, precompute_ref_log_probs=True,
        gradient_accumulation_steps=job.batch_size // at_once,
        bf16=job.precision == "bf16", fp16=job.precision == "fp16", use_cpu=job.device == "cpu",
        gradient_checkpointing=False, train_sampling_strategy="sequential", logging_steps=1000,
        save_strategy="no", report_to="none", disable_tqdm=True,
        dataloader_pin_memory=job.device != "cpu",
    )
    result = Trainer(
        model, None, arguments, train_dataset=datasets.Dataset.from_dict(rows),
        processing_class=transformers.AutoTokenizer.from_pretrained(job.init_from),
    ).train()
    return {"seconds": time.perf_counter() - start, "loss": result.training_loss}


def encoded_rows(job):
    """(examples of pairs.jsonl, the order in which train_dpo.py takes them)."""
    records = data.read_records("pairs.jsonl")
    tokenizer, block_size = load_tokenizer(job.init_from)
    examples = data.encode_all(records, tokenizer, block_size, "pairs.jsonl")
    groups = evaluate.flip_groups(records)
    return examples, common.DataOrder(groups, job.batch_size, 1.0, 0, seed=0).rows


def weights(init_from):
    """How many weights a token meets in products: (in the blocks, in the head)."""
    config = load_checkpoint(init_from, torch.device("cpu"))[0].config
    with torch.device("meta"):
        blocks = sum(p.numel() for p in Transformer(config).blocks.parameters())
    return blocks, config.vocab_size * config.n_embd


def operations(job):
    """{"tokens", "operations", "matmul_peak"}: tree tokens and operations in products of an epoch.

    Two for each weight and token forward, four more backward; blocks run for every tree token, the
    head for every learned one. Frozen weights need no gradient of their own, so LoRA takes four.
    """
    os.chdir(job.folder)
    examples, order = encoded_rows(job)
    blocks, head = weights(job.init_from)
    tokens = sum(data.tree_size(examples[i]) for i in order)
    learned = sum(len(answer) for i in order for answer in examples[i].answers)
    once = blocks * tokens + head * learned
    peak = matmul_peak(job.device, job.precision)
    each = 4 if job.lora_rank else 6
    return {"tokens": tokens, "operations": each * once, "matmul_peak": peak}


def train(options, device, precision):
    """Speed and memory of one epoch of `pairs` rows drawn from the data, reference included."""
    records = data.read_records(options.pref_data)
    rows = random.Random(0).sample(records, min(options.pairs, len(records)))
    sides = {"nanoAlign": train_ours}
    if options.vs:
        cuts = [n for n in range(1, options.batch_size + 1) if options.batch_size % n == 0]
        sides |= {f"TRL by {n}": partial(train_trl, at_once=n) for n in cuts}
    with tempfile.TemporaryDirectory() as folder:
        data.save_records(Path(folder, "pairs.jsonl"), rows)
        init_from = str(hf_model.find(options.init_from).resolve())
        job = Job(folder, init_from, options.batch_size, options.lora_rank, str(device), precision)
        needed = in_process(operations, job)
        shares = in_process(profile_ours, job)
        found = take_turns(sides, options.rounds, job)

    result = {"pairs": len(rows), "tree_tokens": needed["tokens"]}
    for side, runs in found.items():
        best = min(runs, key=lambda run: run["seconds"])
        result[side] = best | {"pairs_per_second": len(rows) / best["seconds"],
                               "tokens_per_second": needed["tokens"] / best["seconds"],
                               "peak_gib": max(run["peak_gib"] for run in runs)}
    ours, peak = result["nanoAlign"], needed["matmul_peak"]
    result["matmul_gflops"] = peak / 1e9
    result |= {f"time_in_{name}": share for name, share in shares.items() if name != "peak_gib"}
    result["share_of_peak_in_steps"] = needed["operations"] / ours["step_seconds"] / peak
    if options.vs:
        theirs = min((result[f"TRL by {n}"] for n in cuts), key=lambda side: side["seconds"])
        result["pairs_per_second_ratio"] = theirs["seconds"] / ours["seconds"]
        result["peak_memory_ratio"] = ours["peak_gib"] / theirs["peak_gib"]
    return result


# ---------------------------------------------------------------- sampling

NEW_TOKENS = 64  # of each answer; end tokens do not stop it, so that all do the same work


def sampling_prompts(options):
    """Token lists of eight queries under the first row's meta-prompt; of fewer some come again."""
    records = data.read_records(options.pref_data)
    tokenizer, block_size = load_tokenizer(options.init_from)
    first = {k: v for k, v in records[0].items() if k in data.META_PROMPT}
    queries = {json.dumps(r["prompt"]): r["prompt"] for r in records}.values()
    prompts = (tokenizer.render(first | {"prompt": query}) for query in queries)
    fitting = (prompt for prompt in prompts if len(prompt) + NEW_TOKENS <= block_size)
    prompts = list(itertools.islice(fitting, 8))
    if not prompts:
        raise UserError(f"--pref_data {options.pref_data}: no query leaves room for {NEW_TOKENS} "
                        "tokens")
    return list(itertools.islice(itertools.cycle(prompts), 8))


def time_sampling(write, prompts):
    """Tokens a second of write(prompts, n) one by one and all at once, and what was written."""
    write(prompts, 2)
    answers, start = [], time.perf_counter()
    for prompt in prompts[:4]:
        answers += write([prompt], NEW_TOKENS)
    middle = time.perf_counter()
    together = write(prompts, NEW_TOKENS)
    seconds = time.perf_counter() - middle
    return {"tokens_per_second_batch_1": sum(map(len, answers)) / (middle - start),
            "tokens_per_second_batch_8": sum(map(len, together)) / seconds,
            "tokens": content_hash(answers, together)}


def sample_ours(init_from, prompts, device, precision):
    device = torch.device(device)
    model, _ = load_checkpoint(init_from, device, common.PRECISIONS[precision])
    model = for_inference(model, sampling=True)

    def write(prompts, n):
        with common.autocast(device, precision):
            return generate(model, prompts, (), n)

    return time_sampling(write, prompts)


def sample_transformers(init_from, prompts, device, precision):
    """Greedy `generate` of transformers with its cache, eight prompts at once padded on the left,
    weights in `precision`."""
    import transformers

    as_torch_comes()
    load = transformers.AutoModelForCausalLM.from_pretrained
    model = load(init_from, dtype=common.PRECISIONS[precision]).to(device).eval()
    model.generation_config = transformers.GenerationConfig(pad_token_id=0)

    @torch.inference_mode()
    def write(prompts, n):
        longest = max(map(len, prompts))
        ids = [[0] * (longest - len(prompt)) + prompt for prompt in prompts]
        mask = [[0] * (longest - len(prompt)) + [1] * len(prompt) for prompt in prompts]
        ids, mask = (torch.tensor(x, device=device) for x in (ids, mask))
        found = model.generate(ids, attention_mask=mask, max_new_tokens=n, do_sample=False)
        return found[:, longest:].tolist()

    return time_sampling(write, prompts)


def sampling_operations(init_from, device, precision):
    """{"operations" of a new token in products, "matmul_peak"}."""
    return {"operations": 2 * sum(weights(init_from)),
            "matmul_peak": matmul_peak(device, precision)}


def sample(options, device, precision):
    """Greedy tokens a second, one prompt at a time and eight that share a meta-prompt.

    The share of the peak counts the new tokens' products, over a time with the prompt's in it.
    """
    prompts = sampling_prompts(options)
    init_from = str(hf_model.find(options.init_from).resolve())
    needed = in_process(sampling_operations, init_from, str(device), precision)
    sides = {"nanoAlign": sample_ours}
    sides |= {"transformers": sample_transformers} if options.vs else {}
    found = take_turns(sides, options.rounds, init_from, prompts, str(device), precision)
    result = {"prompt_tokens": [len(prompt) for prompt in prompts],
              "different_prompts": len({*map(tuple, prompts)})}
    keys = ("tokens_per_second_batch_1", "tokens_per_second_batch_8")
    for side, runs in found.items():
        result[side] = {key: max(run[key] for run in runs) for key in keys}
        result[side]["peak_gib"] = max(run["peak_gib"] for run in runs)
    peak = needed["matmul_peak"]
    result["matmul_gflops"] = peak / 1e9
    for key in keys:
        share = result["nanoAlign"][key] * needed["operations"] / peak
        result[key.replace("tokens_per_second", "share_of_peak")] = share
    if options.vs:
        for key in keys:
            ratio = result["nanoAlign"][key] / result["transformers"][key]
            result[key.replace("second", "second_ratio")] = ratio
        written = {run["tokens"] for runs in found.values() for run in runs}
        result["same_tokens"] = len(written) == 1
    return result


# ---------------------------------------------------------------- long prefixes

PREFIXES, ANSWERS, ANSWER = (64, 256, 1024, 2048), (1, 2, 8), 32  # tokens, answers, tokens of each


def time_passes(run):
    """{answers: [seconds for each prefix]} of run(prefix, answers): a forward and backward pass."""
    generator = random.Random(0)
    draw = lambda n: [generator.randrange(256) for _ in range(n)]  # noqa: E731
    wait = torch.accelerator.synchronize if torch.accelerator.is_available() else lambda: None
    seconds = {}
    for n in ANSWERS:
        for size in PREFIXES:
            work = draw(size), [draw(ANSWER) for _ in range(n)]
            run(*work)  # kernels are made or chosen at the first time
            wait()
            start = time.perf_counter()
            run(*work)
            wait()
            seconds.setdefault(str(n), []).append(time.perf_counter() - start)
    return seconds


def prefix_ours(init_from, device, precision):
    device = torch.device(device)
    model, _ = load_checkpoint(init_from, device)
    model.train()

    def run(prefix, answers):
        with common.autocast(device, precision):
            logps = answer_logps(model, pack([(prefix, answers)], device))
        logps.sum().backward()
        model.zero_grad()

    return {"seconds": time_passes(run)}


def prefix_transformers(init_from, device, precision):
    """A row for each answer, at most 4,096 tokens at once, logits where an answer is predicted;
    under autocast."""
    import transformers

    as_torch_comes()
    device = torch.device(device)
    model = transformers.AutoModelForCausalLM.from_pretrained(init_from, dtype=torch.float32)
    model.to(device).train()

    def run(prefix, answers):
        rows = torch.tensor([prefix + answer for answer in answers], device=device)
        for ids in rows.split(max(1, 4096 // rows.shape[1])):
            with common.autocast(device, precision):
                logits = model(ids, logits_to_keep=ANSWER + 1).logits[:, :-1]
            targets = ids[:, -ANSWER:]
            F.cross_entropy(logits.flatten(0, 1).float(), targets.flatten()).backward()
        model.zero_grad()

    return {"seconds": time_passes(run)}


def prefix(options, device, precision):
    """Seconds of one forward and backward pass by number of answers and length of their prefix."""
    init_from = str(hf_model.find(options.init_from).resolve())
    sides = {"nanoAlign": prefix_ours}
    sides |= {"transformers": prefix_transformers} if options.vs else {}
    turns = take_turns(sides, options.rounds, init_from, str(device), precision)
    best = {side: {n: np.min([run["seconds"][n] for run in runs], axis=0).tolist()
                   for n in runs[0]["seconds"]} for side, runs in turns.items()}
    print("seconds    answers" + "".join(f"{size:>10}" for size in PREFIXES))
    for side, found in best.items():
        for n, seconds in found.items():
            print(f"{side:<14}{n:>4}" + "".join(f"{x:10.2f}" for x in seconds))
    return {"prefixes": PREFIXES, "prefix_seconds": best}


# ---------------------------------------------------------------- memory by model size

MAX_GIB = 12.0  # what would not fit into as much is skipped: 16 bytes a trained parameter
# n_layer, n_head, n_kv_head, n_embd, n_hidden, vocab_size, tied
SHAPES = {
    "135M": (30, 9, 3, 576, 1536, 49152, True),  # SmolLM2
    "360M": (32, 15, 5, 960, 2560, 49152, True),  # SmolLM2
    "1.1B": (22, 32, 4, 2048, 5632, 32000, False),  # TinyLlama
}


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
    return {"parameters": sum(p.numel() for _, p in named)}


def write_pairs(path, n):
    """Pairs of random letters, about 256 tokens of prompt and 128 of each answer."""
    rng = random.Random(0)

    def text(size):
        return "".join(rng.choices("bcdfghjklmnpqrstvwxz", k=size))

    rows = [{"prompt": text(256), "chosen": text(128), "rejected": text(128)} for _ in range(n)]
    data.save_records(path, rows)


def one_step(job, checkpointing):
    os.chdir(job.folder)
    shutil.rmtree("out", ignore_errors=True)  # no reference from another way of training
    options = {"max_steps": 1, "activation_checkpointing": checkpointing}
    train_dpo.main(dataclasses.replace(job.dpo_options, **options))
    return {}


def memory(options, device, precision):
    """{"memory_gib": {size: {"parameters", "full": GiB, "full+checkpointing", "LoRA", ...}}}

    Of one DPO step of `batch_size` pairs of about 512 tokens, models with random weights.
    """
    result = {}
    for size in options.sizes:
        *widths, vocab_size, tied = SHAPES[size]
        config = ModelConfig(vocab_size, 2048, *widths, qk_norm=False, tied=tied)
        with tempfile.TemporaryDirectory() as folder:
            n = in_process(write_model, Path(folder), config)["parameters"]
            write_pairs(Path(folder, "pairs.jsonl"), options.batch_size)
            found = result[size] = {"parameters": n}
            for method, rank in {"full": 0, "LoRA": options.lora_rank or 16}.items():
                if method == "full" and 16 * n / 2**30 > MAX_GIB:
                    continue
                job = Job(folder, folder, options.batch_size, rank, str(device), precision)
                for kind, checkpointing in {"": False, "+checkpointing": True}.items():
                    found[method + kind] = in_process(one_step, job, checkpointing)["peak_gib"]
                    print(f"{size:>6} {method + kind:<20} {found[method + kind]:6.2f} GiB",
                          flush=True)
    return {"memory_gib": result}


# ---------------------------------------------------------------- python bench.py


def print_result(result):
    """The sides as a table, then what there is one of."""
    sides = {name: value for name, value in result.items() if isinstance(value, dict)}
    print("\n" + " " * 28 + "".join(f"{name:>14}" for name in sides))
    for key in next(iter(sides.values())):
        cells = (f"{side[key]:14.2f}" if key in side else f"{'-':>14}" for side in sides.values())
        print(f"{key:<28}" + "".join(cells))
    for name, value in result.items():
        if not isinstance(value, dict):
            print(f"{name:<34}" + (f"{value:.2f}" if isinstance(value, float) else str(value)))


PEERS = {"train": train_trl, "sample": sample_transformers, "prefix": prefix_transformers}


def main(options):
    device = common.pick_device(options.device)
    precision = common.pick_precision(options.precision, device)
    if device.type == "cuda":  # the processes of the measurements see this one card
        cards = os.environ.get("CUDA_VISIBLE_DEVICES")
        card = cards.split(",")[device.index] if cards else str(device.index)
        os.environ["CUDA_VISIBLE_DEVICES"] = card
        device = torch.device("cuda:0")
    required = {"memory": (), "prefix": ("init_from",)}
    for name in required.get(options.what, ("init_from", "pref_data")):
        if not getattr(options, name):
            raise UserError(f"--{name} is required")
    conditions = {"options": asdict(options), "precision": precision}
    if options.vs:
        modules = ("trl", "datasets", "transformers") if options.vs == "trl" else (options.vs,)
        for module in modules:
            if importlib.util.find_spec(module) is None:
                raise UserError(f"--vs {options.vs}: needs the package {module}")
        conditions["peer"] = {module: importlib.metadata.version(module) for module in modules}
        conditions["peer"]["settings"] = " ".join(PEERS[options.what].__doc__.split())
        if not hf_model.is_pretrained(hf_model.find(options.init_from)):
            raise UserError(f"--vs {options.vs}: --init_from must be a Hugging Face folder")
    measure = {"train": train, "sample": sample, "prefix": prefix, "memory": memory}[options.what]
    result = measure(options, device, precision)
    if options.what in ("train", "sample"):
        print_result(result)
    for name, value in conditions.get("peer", {}).items():
        print(f"{name}: {value}")
    print(json.dumps(result | conditions | common.provenance()))


if __name__ == "__main__":
    common.run(main, Options)
