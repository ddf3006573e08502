"""Data-parallel training under torchrun: every rank runs dreamer.py, and they share gradients.

    torchrun --nproc_per_node=2 dreamer.py --configs vmas --logdir ./logdir/run

Each rank steps its own copies and samples its own replay; the first one logs, saves and evaluates.
Alone, without torchrun, nothing here does anything.
"""

import os
from collections.abc import Callable, Iterable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from config import Config
from tools import GracefulExit, UserError

_TOTALS = ("envs", "batch_size", "imag_starts")
_SEEDS = 10_000  # between two ranks' seeds


def rank() -> int:
    """This process's place among the ranks; the first is 0."""
    return dist.get_rank() if dist.is_initialized() else 0


def ranks() -> int:
    """How many processes train together."""
    return dist.get_world_size() if dist.is_initialized() else 1


def join(config: Config) -> Config:
    """Meet the other ranks that torchrun has started; returns this one's share of the settings.

    The share has its part of the totals, and a seed and a GPU of its own. Raises `UserError`.
    """
    count = int(os.environ.get("WORLD_SIZE", 1))
    if count == 1:
        return config
    values = config.as_dict()
    for key in _TOTALS:
        if values[key] % count:
            raise UserError(f"--{key} {values[key]}: expected a multiple of the {count} ranks")
        values[key] //= count
    values["dataset_size"] //= count
    values["seed"] += _SEEDS * int(os.environ["RANK"])
    if torch.cuda.is_available() and values["device"] in ("auto", "cuda"):
        values["device"] = f"cuda:{int(os.environ['LOCAL_RANK']) % torch.cuda.device_count()}"
        torch.cuda.set_device(values["device"])
    gpu = values["device"].startswith("cuda")
    dist.init_process_group("cpu:gloo,cuda:nccl" if gpu else "gloo")
    return Config(values)


def leave() -> None:
    """Part from the other ranks."""
    if dist.is_initialized():
        dist.destroy_process_group()


def average_gradients(parameters: Iterable[nn.Parameter]) -> None:
    """Give all ranks the mean of their gradients, in one message."""
    if ranks() == 1:
        return
    grads = [p.grad for p in parameters if p.grad is not None]
    flat = torch.cat([grad.flatten() for grad in grads])
    _together(dist.all_reduce, flat)
    parts = (flat / ranks()).split([grad.numel() for grad in grads])
    torch._foreach_copy_(grads, [part.view_as(g) for part, g in zip(parts, grads, strict=True)])


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


class Agreed:
    """A `GracefulExit` as all ranks see it at the same point; all must ask equally often."""

    def __init__(self, own: GracefulExit):
        self._own = own

    @property
    def requested(self) -> bool:
        """Whether any rank was asked to stop."""
        if ranks() == 1:
            return self._own.requested
        asked = torch.tensor(int(self._own.requested))
        _together(dist.all_reduce, asked)
        return asked.item() > 0


class Muted:
    """Stands for the logger and the progress of ranks that have none: swallows every call."""

    def __getattr__(self, name: str) -> Callable[..., dict]:
        return lambda *args, **kwargs: {}


def _together(collective: Callable, *args: Any) -> None:
    try:
        collective(*args)
    except RuntimeError as error:
        lost = "another rank of this run has ended; the same command resumes from latest.pt"
        raise UserError(lost) from error
