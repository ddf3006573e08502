"""What a scenario puts an observation together from, which its width alone does not tell."""

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode


class Parts(TorchFunctionMode):
    """Watches tensors being joined, so that their parts are known afterwards.

        with Parts() as parts:
            seen = torch.cat([position, velocity, is_eaten], -1)
        parts.widths(seen)  # [2, 2, 1]

    What is made of a joined tensor and is as large (a copy, a sum with noise) has the same parts.
    """

    JOINS = torch.cat, torch.concat, torch.concatenate, torch.hstack

    def __init__(self):
        super().__init__()
        # By identity: the tensor, kept so that no other gets it, and what it is joined from.
        self._joined: dict[int, tuple[Tensor, list[Tensor]]] = {}

    def __torch_function__(self, func, types, args=(), kwargs=None):
        made = func(*args, **(kwargs or {}))
        if isinstance(made, Tensor) and made.ndim and id(made) not in self._joined:
            parts = self._inherited(made, args)
            if func in self.JOINS:
                parts = list(args[0] if args else kwargs["tensors"])
            # Tensors may also be joined along another axis.
            if sum(part.shape[-1] for part in parts) == made.shape[-1]:
                self._joined[id(made)] = made, parts
        return made

    def _inherited(self, made: Tensor, args: tuple) -> list[Tensor]:
        """The parts of the first argument that is joined and as large as what was made."""
        known = (self._joined[id(arg)] for arg in args if id(arg) in self._joined)
        return next((parts for joined, parts in known if joined.shape == made.shape), [])

    def widths(self, tensor: Tensor) -> list[int]:
        """The last axis of each tensor that was joined to this one, in their order.

        Two numbers are one part, even if they were joined themselves, as x and y may be.
        """
        if tensor.shape[-1] <= 2 or id(tensor) not in self._joined:
            return [tensor.shape[-1]]
        _, parts = self._joined[id(tensor)]
        return [width for part in parts for width in self.widths(part)]
