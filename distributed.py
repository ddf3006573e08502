"""Data-parallel training under torchrun: every rank runs dreamer.py, and they share gradients.

    torchrun --nproc_per_node=2 dreamer.py --configs vmas --logdir ./logdir/run

Each rank steps its own copies and samples its own replay; the first one logs, saves and evaluates.
Alone, without torchrun, nothing here does anything.
"""

import os
import signal
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor


class RankLost(RuntimeError):
    """Another rank of this run has ended, so that this one cannot go on."""

    def __init__(self) -> None:
        super().__init__("another rank of this run has ended; the same command resumes it")


def rank() -> int:
    """This process's place among the ranks; the first is 0."""
    return dist.get_rank() if dist.is_initialized() else 0


def ranks() -> int:
    """How many processes train together."""
    return dist.get_world_size() if dist.is_initialized() else 1


def started() -> tuple[int, int]:
    """The place of this process, and the number of processes, as torchrun has started them."""
    return int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))


def join(device: str) -> str:
    """Meet the other ranks that torchrun has started; returns the device of this one."""
    if started()[1] == 1:
        return device
    if torch.cuda.is_available() and device in ("auto", "cuda"):
        device = f"cuda:{int(os.environ['LOCAL_RANK']) % torch.cuda.device_count()}"
        torch.cuda.set_device(device)
    dist.init_process_group("cpu:gloo,cuda:nccl" if device.startswith("cuda") else "gloo")
    return device


def leave() -> None:
    """Part from the other ranks."""
    if dist.is_initialized():
        dist.destroy_process_group()


def average(tensors: list[Tensor]) -> None:
    """Set each tensor to its mean over all ranks, in one message."""
    if ranks() == 1:
        return
    flat = torch.cat([tensor.flatten() for tensor in tensors])
    _together(dist.all_reduce, flat)
    parts = (flat / ranks()).split([tensor.numel() for tensor in tensors])
    means = [part.view_as(tensor) for part, tensor in zip(parts, tensors, strict=True)]
    torch._foreach_copy_(tensors, means)


def concatenate(rows: Tensor) -> Tensor:
    """The rows (M, ...) of all ranks, as many from each, without gradients."""
    if ranks() == 1:
        return rows
    parts = [torch.empty_like(rows) for _ in range(ranks())]
    _together(dist.all_gather, parts, rows.contiguous())
    return torch.cat(parts)


def gather(value: Any) -> list:
    """Every rank's value, the first rank's first."""
    values = [value] * ranks()
    if ranks() > 1:
        _together(dist.all_gather_object, values, value)
    return values


def anywhere(holds: bool) -> bool:
    """Whether something holds on any rank; all must ask together."""
    if ranks() == 1:
        return holds
    found = torch.tensor(int(holds))
    _together(dist.all_reduce, found)
    return found.item() > 0


@contextmanager
def first_enters(context: AbstractContextManager) -> Iterator[None]:
    """Lets the first rank into `context`, and the others on after it."""
    with context if rank() == 0 else nullcontext():
        anywhere(False)
        yield


class Muted:
    """Stands for the logger and the progress of ranks that have none: swallows every call."""

    def __getattr__(self, name: str) -> Callable[..., dict]:
        return lambda *args, **kwargs: {}


def _together(collective: Callable, *args: Any) -> None:
    try:
        collective(*args)
    except RuntimeError as error:
        # torchrun ends the other ranks with SIGTERM, which must not come before they have said why.
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        raise RankLost from error
