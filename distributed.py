"""Several processes under torchrun: PyTorch's DDP, or FSDP2 where training outgrows one device.

    torchrun --nproc_per_node=2 train_dpo.py ...

Each process runs its share of a step's trees; both engines average gradients over processes, so a
loss that is divided once by what is in the whole step is multiplied by their number. Rank 0 alone
writes and prints.
"""

import contextlib
import os
import sys

import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel

RANK, WORLD = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))


def start(device):
    if device.type == "cuda":
        torch.cuda.set_device(device)
    if WORLD > 1 and not dist.is_initialized():
        dist.init_process_group("nccl" if device.type == "cuda" else "gloo")


def leave(status=0):
    """End one of several processes; one alone goes on.

    One that fails does not take leave of the others: they may be in the middle of an exchange, for
    which NCCL would wait; torchrun ends them. PyTorch keeps references to the group (DTensor's
    caches, default arguments of functions), so gloo's threads outlive it, and one that frees a
    tensor while Python exits aborts the process. So this is not Python's own way out: what is
    still to be flushed to a file is lost.
    """
    if WORLD > 1:
        if not status and dist.is_initialized():
            dist.destroy_process_group()
        with contextlib.suppress(OSError):  # the reader of our output has gone
            sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status or 0)


def gather(x):
    """[x of rank 0, x of rank 1, ...] in every process; x is anything that can be pickled."""
    found = [x]
    if WORLD > 1:
        found = [None] * WORLD
        dist.all_gather_object(found, x)
    return found


def first_device(device, fsdp):
    """Where to load a model that `spread` gets: no device has to hold one whole that fsdp cuts."""
    return torch.device("cpu") if fsdp and WORLD > 1 else device


def spread(model, fsdp, device):
    """What to call instead of the model, so that backward passes average gradients over processes.

    With fsdp the model's parameters themselves become DTensors, block by block on the device: each
    process keeps a part of the float32 weights, of their gradients and of the optimizer's state.
    Under autocast it holds the model once in 16 bits.
    """
    if WORLD == 1:
        return model
    if not fsdp:
        return DistributedDataParallel(model)
    from torch.distributed.fsdp import fully_shard  # slow to import

    mesh = dist.device_mesh.init_device_mesh(device.type, (WORLD,))
    for module in (*model.blocks, model):
        fully_shard(module, mesh=mesh)
    return model


def sync_gradients(model, now):
    """Say whether the next backward pass averages gradients over processes: the last of a step.

    With fsdp each pass does, so that no process holds a whole gradient.
    """
    if isinstance(model, DistributedDataParallel):
        model.require_backward_grad_sync = now


def whole(x):
    """A tensor of which this process may have only a part; every process must ask for it."""
    return x.full_tensor() if hasattr(x, "full_tensor") else x


def saved(x):
    """A tensor as the first process saves it; the others hold no copy."""
    if not hasattr(x, "full_tensor"):
        return x
    x = x.full_tensor()
    return x.new_empty(0) if RANK else x.cpu()


def part_of(x, parameter):
    """The inverse of `whole`: x as `parameter` is spread, if it is."""
    if not hasattr(parameter, "placements"):
        return x
    from torch.distributed.tensor import distribute_tensor

    return distribute_tensor(x.to(parameter.device), parameter.device_mesh, parameter.placements)
