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
        self._parts: dict[int, list[Tensor]] = {}
        self._kept: list[Tensor] = []  # or another tensor could get the identity of a known one

    def __torch_function__(self, func, types, args=(), kwargs=None):
        made = func(*args, **(kwargs or {}))
        if isinstance(made, Tensor) and made.ndim and id(made) not in self._parts:
            self._kept.append(made)
            if func in self.JOINS:
                self._join(made, list(args[0] if args else kwargs["tensors"]))
            else:
                self._inherit(made, args)
        return made

    def _join(self, made: Tensor, parts: list[Tensor]) -> None:
        if sum(part.shape[-1] for part in parts) == made.shape[-1]:  # not along another axis
            self._parts[id(made)] = parts

    def _inherit(self, made: Tensor, args: tuple) -> None:
        for source in args:
            known = self._parts.get(id(source))
            if known and source.shape == made.shape:
                self._parts[id(made)] = known
                return

    def widths(self, tensor: Tensor) -> list[int]:
        """The last axis of each tensor that was joined to this one, in their order.

        Two numbers are one part, even if they were joined themselves, as x and y may be.
        """
        if tensor.shape[-1] <= 2 or id(tensor) not in self._parts:
            return [tensor.shape[-1]]
        return [width for part in self._parts[id(tensor)] for width in self.widths(part)]
