"""Functions of tensors as CUDA graphs.

An update of a team is thousands of small kernels, and a GPU would wait for Python before each of
them. Captured once as a graph, they are launched together.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch.utils import _pytree as pytree

import distributed


class Captured:
    """A function of tensors, called as it is a few times and then replayed as a CUDA graph.

    It takes and returns tensors, alone or in tuples and dicts. It must never wait for the device,
    and what it changes it must change in place. The tensors that it returns are overwritten by the
    next call. Calls with other shapes than the first one's, or on a CPU, run as they are.
    """

    WARMUP = 3  # calls in which libraries make their plans and optimisers their averages

    def __init__(self, function: Callable):
        self.function, self.calls = function, 0
        self.graph: torch.cuda.CUDAGraph | None = None
        self.shapes: list | None = None

    def __call__(self, *args: Any) -> Any:
        leaves, structure = pytree.tree_flatten(args)
        if not leaves[0].is_cuda:
            return self.function(*args)
        shapes = [(leaf.shape, leaf.dtype) for leaf in leaves]
        if self.shapes is None:
            self.shapes, self.inputs = shapes, [leaf.clone() for leaf in leaves]
        if shapes != self.shapes:
            return self.function(*args)
        with torch.cuda.device(leaves[0].device):
            if self.calls < self.WARMUP:
                self.calls += 1
                return self._aside(args)
            for own, leaf in zip(self.inputs, leaves, strict=True):
                own.copy_(leaf)
            if self.graph is None:
                self._capture(pytree.tree_unflatten(self.inputs, structure))
            self.graph.replay()
        return pytree.tree_unflatten(*self.outputs)  # in a dict of the caller's own

    def _aside(self, args: tuple) -> Any:
        """Call the function on a stream of its own, as libraries must be readied on one."""
        stream, current = torch.cuda.Stream(), torch.cuda.current_stream()
        stream.wait_stream(current)
        with torch.cuda.stream(stream):
            outputs = self.function(*args)
        current.wait_stream(stream)
        return outputs

    def _capture(self, args: tuple) -> None:
        self.graph = torch.cuda.CUDAGraph()
        # Other threads, such as the writer of episodes, may go on meanwhile.
        with torch.cuda.graph(self.graph, capture_error_mode="thread_local"):
            self.outputs = pytree.tree_flatten(self.function(*args))
        # On the stream of the capture, torch sets back where the generator's numbers begin; a
        # busy GPU may do so after the first replay has set it, which then draws old numbers.
        torch.cuda.synchronize()


def captured(function: Callable, wanted: bool) -> Callable:
    """The function as `Captured`, if that is `wanted` and there are no other ranks to wait for."""
    return Captured(function) if wanted and distributed.ranks() == 1 else function
