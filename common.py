"""What no reader of the algorithm needs: options, errors, devices, schedule, files of a run."""

import argparse
import contextlib
import ctypes
import dataclasses
import hashlib
import inspect
import json
import math
import os
import re
import shlex
import subprocess
import sys
import time
import traceback
import typing
from pathlib import Path

import torch
from tqdm import tqdm

import distributed
from distributed import part_of, saved, whole

# oneDNN keeps a compiled kernel for each shape; batches differ in length, and by default it keeps
# a gigabyte of them. Attention needs 100 for a span of 2,048 tokens, 400 from 4,096 on.
os.environ.setdefault("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "256")


class UserError(Exception):
    """Something the user can mend; its one line names the place and the trouble. Exit status 2."""


def first_line(error):
    return (str(error) or type(error).__name__).splitlines()[0]


# ---------------------------------------------------------------- options


class OneLineParser(argparse.ArgumentParser):
    def error(self, message):
        raise UserError(f"{message} (see --help)")


def parse_options(cls, argv):
    """Read `--key value` into the dataclass `cls`; the comment behind a field is its help text.

    The field `what`, if there is one, is given without its name.
    """
    comments = dict(re.findall(r"^ {4}(\w+):.*?  # (.*)$", inspect.getsource(cls), re.M))
    parser = OneLineParser(description=cls.__doc__, allow_abbrev=False)
    for field in dataclasses.fields(cls):
        text = comments[field.name].replace("%", "%%")
        settings = {"default": field.default, "help": f"{text} (default: {field.default})"}
        if field.type is bool:
            settings["action"] = "store_true"
        elif typing.get_origin(field.type) is tuple:
            settings |= {"nargs": "+", "metavar": "TEXT"}
        else:
            settings |= {"type": field.type, "metavar": field.type.__name__.upper()}
        if field.name == "what":
            parser.add_argument("what", nargs="?", **settings | {"metavar": "what"})
        else:
            parser.add_argument(f"--{field.name}", **settings)
    values = vars(parser.parse_args(argv))
    return cls(**{k: tuple(v) if isinstance(v, list) else v for k, v in values.items()})


def at_least(options, least, *names):
    """Raise UserError for an option that is smaller than `least`, too large, or not a number."""
    for name in names:
        value = getattr(options, name)
        if not least <= value < 2**31:  # NaN compares as false
            raise UserError(f"--{name} must be at least {least} and below 2**31, not {value}")


def above_zero(options, *names):
    """Raise UserError for an option that is not above 0 and finite."""
    for name in names:
        value = getattr(options, name)
        if not 0 < value < math.inf:
            raise UserError(f"--{name} must be above 0 and finite, not {value}")


def keep_memory():
    """Have glibc, where it is the allocator, keep what is freed: the next step wants it again.

    To touch a new page can cost more than what is computed in it (LOG.md).
    """
    try:
        mallopt = ctypes.CDLL("libc.so.6").mallopt
    except (OSError, AttributeError):
        return
    max_mmap, trim_threshold = -4, -1  # their names in malloc.h: M_MMAP_MAX, M_TRIM_THRESHOLD
    mallopt(max_mmap, 0)
    mallopt(trim_threshold, -1)  # never


def run(main, cls):
    """Run a script's main with options from the command line; a UserError is one line, exit 2."""
    keep_memory()
    if distributed.RANK:
        sys.stdout = open(os.devnull, "w")
    try:
        status = attempt(main, cls)
    except SystemExit as end:  # --help, or another process that has said why
        status = end.code
    except Exception:
        traceback.print_exc()
        status = 1
    distributed.leave(status)
    sys.exit(status)


def attempt(main, cls):
    """Run main: the exit status, 0 or that of an error that one line explains."""
    try:
        main(parse_options(cls, sys.argv[1:]))
        sys.stdout.flush()
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130
    except (MemoryError, RuntimeError) as error:
        if not out_of_memory(error):
            raise
        print(f"error: out of memory: {first_line(error)}", file=sys.stderr)
        return 2
    except BrokenPipeError:  # the reader of our output has gone
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    except OSError as error:
        if error.filename is None:
            raise
        print(f"error: {error.filename}: {error.strerror}", file=sys.stderr)
        return 2
    return 0


def out_of_memory(error):
    signs = ("DefaultCPUAllocator", "out of memory")  # of a CPU, of a GPU
    return isinstance(error, MemoryError) or any(sign in str(error) for sign in signs)


def on_first(function, *arguments):
    """What function(*arguments) gives in the first of several processes; they stop if it fails."""
    found = error = None
    if not distributed.RANK:
        try:
            found = function(*arguments)
        except UserError as trouble:
            error = trouble
        except OSError as trouble:
            error = UserError(f"{trouble.filename}: {trouble.strerror}")
    found, failed = distributed.gather((found, error is not None))[0]
    if failed:
        raise error or SystemExit(2)
    return found


# ---------------------------------------------------------------- device and precision


def pick_device(name):
    """`auto`, `cpu`, `cuda`, `cuda:1` or `mps` as a torch.device that is there."""
    if name == "auto":
        mps = torch.backends.mps.is_available()
        name = "cuda" if torch.cuda.is_available() else "mps" if mps else "cpu"
    if name == "cuda":
        name = f"cuda:{os.environ.get('LOCAL_RANK', 0)}"  # torchrun's number of the process
    elif name.startswith("cuda") and distributed.WORLD > 1:
        raise UserError(f"--device {name}: under torchrun each process takes its own: cuda")
    try:
        device = torch.device(name)
        torch.zeros(1, device=device)
        if device.type not in ("cpu", "cuda", "mps"):
            raise RuntimeError("must be auto, cpu, cuda, cuda:N or mps")
        distributed.start(device)
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        raise UserError(f"--device {name}: {first_line(error)}") from None
    return device


PRECISIONS = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}


def pick_precision(name, device):
    """`auto` is the precision in which the device is fast: bf16, else fp16 on CUDA, else fp32."""
    if name == "auto":
        if device.type == "cuda":
            return "bf16" if torch.cuda.get_device_capability(device)[0] >= 8 else "fp16"
        fast = torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()
        return "bf16" if device.type == "cpu" and fast else "fp32"
    if name not in PRECISIONS or (name == "fp16" and device.type != "cuda"):
        raise UserError(f"--precision must be auto, bf16, fp32, or fp16 on cuda, not {name}")
    return name


def autocast(device, precision):
    """Context in which matrix products run in `precision`, whatever the type of the weights."""
    enabled = precision != "fp32"
    return torch.autocast(device.type, dtype=PRECISIONS[precision], enabled=enabled)


# ---------------------------------------------------------------- schedule and data order


def learning_rate(step, max_steps, warmup_steps, peak):
    """Linear warm-up, then a cosine down to a fiftieth of the peak; `step` counts from 0."""
    if step < warmup_steps:
        return peak * (step + 1) / warmup_steps
    progress = (step - warmup_steps) / max(1, max_steps - warmup_steps)
    return peak * (0.51 + 0.49 * math.cos(math.pi * progress))


class DataOrder:
    """Which rows step t trains on: epochs of permutations, one after the other.

    `groups` are lists of rows that stay together. The order depends on the seed alone, so a resumed
    run needs nothing but its step.
    """

    def __init__(self, groups, batch_size, epochs, max_steps, seed):
        n_rows = sum(map(len, groups))
        total = max_steps * batch_size if max_steps > 0 else math.ceil(n_rows * epochs)
        generator = torch.Generator().manual_seed(seed)
        if total > 2**28:
            raise UserError(f"--epochs, or --max_steps times --batch_size: {total} rows are more "
                            "than can be laid out")
        self.rows = []
        while len(self.rows) < total:
            for group in torch.randperm(len(groups), generator=generator).tolist():
                self.rows += groups[group]
        del self.rows[total:]
        self.batch_size = batch_size
        self.max_steps = math.ceil(total / batch_size)
        if not self.max_steps:
            raise UserError("--epochs must be above 0")

    def batch(self, step):
        return self.rows[step * self.batch_size : (step + 1) * self.batch_size]


# ---------------------------------------------------------------- the folder of a run

WEIGHTS = ("model.pt", "adapters.pt")  # either makes a run a finished one
RUN_FILES = (
    "config.json", "log.jsonl", "ckpt.pt", "eval.json", *WEIGHTS, "tokenizer.tiktoken",
    "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "chat_template.jinja",
    "generation_config.json",
)


def finished(folder):
    """The path of a finished run's weights, or None."""
    return next((folder / name for name in WEIGHTS if (folder / name).exists()), None)


def lineage(folder):
    """The folders of a model and of those that it was trained from, resolved."""
    found = []
    while folder.resolve() not in found:
        found.append(folder.resolve())
        path = folder / "config.json"
        base = load_json(path).get("reference") if path.exists() else None
        if isinstance(base, dict) and isinstance(base.get("path"), str):
            folder = folder / base["path"]
    return found


def check_folder(folder, resume, overwrite, init_from=""):
    """Raises UserError when the folder holds something and no option says what to do with it.

    resume: None for a run that has no such option.
    """
    if resume and overwrite:
        raise UserError("--resume and --overwrite exclude each other")
    if init_from and folder.resolve() in lineage(Path(init_from)):
        raise UserError(f"--out_dir {folder}: is the folder of the starting model, or of one that "
                        "it was trained from")
    names = {path.name for path in folder.iterdir()} if folder.is_dir() else set()
    names = {name for name in names if name != ".lock" and not name.endswith(".tmp")}
    ours = names & {"log.jsonl", "ckpt.pt", *WEIGHTS}
    if "config.json" in names:
        ours = "stage" in load_json(folder / "config.json")
    if names & set(RUN_FILES) and not ours:
        raise UserError(f"--out_dir {folder}: holds a model that is no run of ours")
    if finished(folder) and resume:
        raise UserError(f"{folder}: this run is finished, there is nothing to resume; "
                        f"evaluate.py --ckpt {folder} evaluates it")
    if finished(folder) and not overwrite:
        raise UserError(f"{folder}: holds a finished run; --overwrite replaces it")
    if names and not resume and not overwrite:
        way = "" if resume is None else "--resume goes on with an unfinished run, "
        raise UserError(f"{folder}: is in use; {way}--overwrite starts it again")


def claim(folder, resume, overwrite):
    """Make a run's folder and lock it, as long as the process lives; nothing in it changes.

    Raises UserError when another process trains there, or when `check_folder` does.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        lock(folder)
        check_folder(folder, resume, overwrite)
    except OSError as error:
        raise UserError(f"{folder}: cannot use this folder: {error.strerror}") from None


def clear(folder, overwrite):
    """Delete what --overwrite replaces and what was cut short while it was written.

    True if there is a checkpoint to go on with.
    """
    for name in RUN_FILES:
        for path in folder.glob(f"{name}.*.tmp"):
            path.unlink(missing_ok=True)
        if overwrite:
            (folder / name).unlink(missing_ok=True)
    return (folder / "ckpt.pt").exists()


LOCKS = []  # open files: a lock lasts as long as its file is open


def lock(folder):
    try:
        import fcntl
    except ImportError:  # Windows: nothing guards against two processes in one folder
        return
    LOCKS.append(open(folder / ".lock", "w"))
    try:
        fcntl.flock(LOCKS[-1], fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise UserError(f"{folder}: another process is training in this folder") from None


def write_atomically(path, write):
    """Call write(temporary path), then rename, so that `path` is either old or whole.

    Its folder is made where it is missing. Of several processes the first one writes.
    """
    if distributed.RANK:
        return
    temporary = path.with_name(f"{path.name}.{os.getpid()}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write(temporary)
        os.replace(temporary, path)
    except BaseException as error:
        with contextlib.suppress(OSError):
            temporary.unlink()
        if not isinstance(error, OSError | RuntimeError):
            raise
        reason = getattr(error, "strerror", None) or first_line(error)
        raise UserError(f"{path}: cannot write: {reason}") from None


def save_json(path, content):
    text = json.dumps(content, indent=1) + "\n"
    write_atomically(path, lambda temporary: temporary.write_text(text))


def save_tensors(path, content):
    write_atomically(path, lambda temporary: torch.save(content, temporary))


def load_json(path):
    try:
        content = json.loads(path.read_bytes())
    except OSError as error:
        raise UserError(f"{path}: {error.strerror}") from None
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path}: not valid JSON: {error}") from None
    if not isinstance(content, dict):
        raise UserError(f"{path}: not a JSON object")
    return content


def load_tensors(path):
    """torch.load without code, onto the CPU; the file is mapped: what is not read takes no memory.

    Raises UserError when it is missing or broken.
    """
    try:
        return torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except FileNotFoundError:
        raise UserError(f"{path}: no such file") from None
    except Exception as error:  # a broken file fails in many ways: zip, pickle, storage
        raise UserError(f"{path}: truncated or not a checkpoint: {first_line(error)}") from None


def file_hash(path):
    try:
        with open(path, "rb") as f:
            return hashlib.file_digest(f, "sha256").hexdigest()[:16]
    except OSError as error:
        raise UserError(f"{path}: {error.strerror}") from None


def content_hash(*parts):
    """Hash of anything that JSON can hold, the same in every process."""
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()[:16]


def provenance():
    """How this run came about: command, versions, git commit."""
    try:
        here = Path(__file__).parent
        git = ["git", "-C", str(here), "describe", "--always", "--dirty", "--abbrev=12"]
        commit = subprocess.run(git, capture_output=True, text=True).stdout.strip()
    except OSError:
        commit = ""
    versions = {"python": sys.version.split()[0], "torch": torch.__version__}
    return {"command": shlex.join(sys.argv), "versions": versions, "git_commit": commit}


# ---------------------------------------------------------------- training state


def trained(model):
    """{name: parameter} of what is trained: all, or the adapters."""
    return {name: p for name, p in model.named_parameters() if p.requires_grad}


@torch.no_grad()
def load_trained(model, tensors):
    """Copy tensors into the trained parameters. Raises ValueError when they are others."""
    parameters = trained(model)
    if not isinstance(tensors, dict) or tensors.keys() != parameters.keys():
        raise ValueError("other tensors than this model trains")
    for name, p in parameters.items():
        if tensors[name].shape != p.shape:
            raise ValueError(f"{name}: {list(tensors[name].shape)}, expected {list(p.shape)}")
        p.copy_(part_of(tensors[name], p))


def adamw(model, peak, weight_decay):
    """AdamW; weight decay on matrices only."""
    matrices = [p for p in trained(model).values() if p.dim() >= 2]
    others = [p for p in trained(model).values() if p.dim() < 2]
    groups = [{"params": matrices, "weight_decay": weight_decay},
              {"params": others, "weight_decay": 0.0}]
    return torch.optim.AdamW(groups, lr=peak, betas=(0.9, 0.95), fused=True)


def update(model, optimizer, scaler, clip, rate):
    """One optimizer step at this learning rate, gradients clipped: their norm before clipping.

    Raises UserError when the gradient is not finite (with fp16 the scaler skips such a step).
    """
    for group in optimizer.param_groups:
        group["lr"] = rate
    scaler.unscale_(optimizer)
    norm = whole(torch.nn.utils.clip_grad_norm_(model.parameters(), clip))
    if not scaler.is_enabled() and not norm.isfinite():
        raise UserError("the gradient is not finite: lower --learning_rate")
    scaler.step(optimizer)
    scaler.update()
    if scaler.is_enabled() and scaler.get_scale() < 1:  # 65,536 at first, halved by each such step
        raise UserError("the gradient is never finite: lower --learning_rate")
    optimizer.zero_grad(set_to_none=True)
    return norm.item()


def save_checkpoint(folder, step, run_hash, model, optimizer, scaler):
    """All that a run needs to go on: its data order follows from the seed and the step."""
    tensors = {name: saved(p.detach()) for name, p in trained(model).items()}
    state = {"step": step, "run": run_hash, "model": tensors,
             "optimizer": optimizer_state(optimizer, lambda x, _: saved(x)),
             "scaler": scaler.state_dict(), "random_state": torch.get_rng_state()}
    save_tensors(folder / "ckpt.pt", state)


def optimizer_state(optimizer, change, state=None):
    """An optimizer's state, or another's, with each moment x of a parameter p as change(x, p)."""
    state = state or optimizer.state_dict()
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    moments = {i: {k: change(x, parameters[i]) if k != "step" else x for k, x in found.items()}
               for i, found in state["state"].items()}
    return state | {"state": moments}


def read_checkpoint(folder, run_hash):
    """What `save_checkpoint` wrote.

    Raises UserError when the file is broken or was written under other options or data.
    """
    path = folder / "ckpt.pt"
    state = load_tensors(path)
    if not isinstance(state, dict) or state.get("run") != run_hash:
        raise UserError(f"{path}: cannot resume: options, data or starting model have "
                        "changed; delete it to start again")
    return state


def restore_checkpoint(folder, run_hash, model, optimizer, scaler):
    """Restore what `save_checkpoint` wrote: the number of steps done.

    Raises UserError as `read_checkpoint` does, or when it is of another model.
    """
    state = read_checkpoint(folder, run_hash)
    try:
        load_trained(model, state["model"])
        optimizer.load_state_dict(optimizer_state(optimizer, part_of, state["optimizer"]))
        scaler.load_state_dict(state["scaler"])
        torch.set_rng_state(state["random_state"])
    except (AttributeError, KeyError, TypeError, ValueError, RuntimeError) as error:
        raise UserError(f"{folder}/ckpt.pt: truncated or of another model: {error}") from None
    return state["step"]


def run_hash(config, examples, *more):
    """What a resumed run must share with the one that it goes on with.

    Training rows, tokenizer and weights count by what is in them, not by where they lie.
    """
    how = {"out_dir", "overwrite", "resume", "save_every", "log_every", "device", "micro_tokens",
           "activation_checkpointing", "fsdp", "init_from", "data", "pref_data",
           "tokenizer"}
    options = {k: v for k, v in config["options"].items() if k not in how}
    rows = [example.tree for example in examples]
    start = (config.get("reference") or {}).get("hash")
    return content_hash(config | {"options": options, "reference": start}, rows, *more)


def start_run(folder, options, config, run_hash, model, optimizer, scaler):
    """In a folder that is claimed, resume or write config.json: how many steps are done."""
    learned = sum(p.numel() for p in trained(model).values())
    every = sum(p.numel() for p in model.parameters())
    print(f"{folder}: trains {learned:,} of {every:,} parameters")
    if on_first(clear, folder, options.overwrite):
        done = restore_checkpoint(folder, run_hash, model, optimizer, scaler)
        save_json(folder / "config.json", load_json(folder / "config.json") | config)
        return done
    save_json(folder / "config.json", config | provenance())
    return 0


def finish_run(folder, model):
    """Write what was trained, which makes the run a finished one; drop what only resuming needs."""
    tensors = {name: saved(p.detach()) for name, p in trained(model).items()}
    path = folder / ("adapters.pt" if any("lora_" in name for name in tensors) else "model.pt")
    save_tensors(path, tensors)
    if not distributed.RANK:
        (folder / "ckpt.pt").unlink(missing_ok=True)
    distributed.gather(None)  # no process looks for the file before it is there
    print(f"wrote {path} (the weights after the last step)")


# ---------------------------------------------------------------- the log


class Log:
    """log.jsonl of a run: one object a step; a resumed run goes on behind the line of its step."""

    def __init__(self, folder, step):
        self.path = folder / "log.jsonl"
        lines = self.path.read_text().splitlines(True) if self.path.exists() and step else []
        # A killed run may have logged steps beyond its checkpoint, the last of them in part.
        kept = [line for line in lines if line.endswith("\n") and json.loads(line)["step"] <= step]
        write_atomically(self.path, lambda temporary: temporary.write_text("".join(kept)))

    def write(self, **fields):
        """Of several processes the first one writes. JSON has no NaN: it becomes null."""
        if distributed.RANK:
            return
        odd = {k for k, v in fields.items() if isinstance(v, float) and not math.isfinite(v)}
        fields |= dict.fromkeys(odd)
        try:
            with self.path.open("a") as f:
                f.write(json.dumps(fields) + "\n")
        except OSError as error:
            raise UserError(f"{self.path}: cannot write: {error.strerror}") from None


def progress_bar(order, first_step, name):
    """Of several processes one shows it."""
    return tqdm(total=order.max_steps, initial=first_step, desc=name, unit="step",
                disable=distributed.RANK > 0)


def log_step(log, bar, fields, start, log_every):
    """Write a step to the log; move the bar on and print every log_every-th line."""
    seconds = time.perf_counter() - start
    bar.update()
    bar.set_postfix(loss=f"{fields['loss']:.4f}", refresh=False)
    if fields["step"] % log_every == 0 or fields["step"] in (1, bar.total):
        tqdm.write(aligned(fields))
    log.write(**fields, seconds=round(seconds, 4))


def aligned(fields):
    """The fields of one step as an aligned line."""
    show = {int: "{:>5d}", float: "{:>9.4g}"}
    return "  ".join(f"{k} {show[type(v)].format(v)}" for k, v in fields.items())
