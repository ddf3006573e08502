"""Environments: batches of copies that step on the device. `vmas.py` has the only suite so far."""

from typing import Protocol

import torch
from torch import Tensor


class Environment(Protocol):
    """What a run asks of B copies of a task with N agents; rows are as `envs.vmas` describes.

    `obs_shapes` are those of the agents' vectors, `obs_parts` the widths of what each is joined
    from, `action_sizes` the widths of their actions, `action_width` the largest of these,
    `image_size` None where rows have no image.
    """

    num_envs: int
    n_agents: int
    device: torch.device
    obs_shapes: list[tuple[int, ...]]
    obs_parts: list[list[int]]
    action_sizes: list[int]
    action_width: int
    discrete: bool
    image_size: int | None

    @property
    def info(self) -> dict[str, Tensor]:
        """What the task tells of the last step and nobody learns from, by name: (B, N).

        NaN for an agent of which it tells nothing.
        """
        ...

    @property
    def ended(self) -> bool:
        """Whether the last rows end an episode in any copy, known without asking the device."""
        ...

    def reset(self) -> dict[str, Tensor]:
        """Begin an episode in every copy; the first rows."""
        ...

    def step(self, action: Tensor) -> dict[str, Tensor]:
        """The rows after actions (B, N, A); copies that had ended begin anew instead."""
        ...

    def random_action(self) -> Tensor:
        """Actions (B, N, A), drawn uniformly."""
        ...

    def render(
        self, size: int | None = None, copies: int | None = None, *, legible: bool = False
    ) -> Tensor:
        """The scenes of the first copies now, (copies, size, size, 3) uint8."""
        ...

    def random_state(self) -> dict:
        """Plain values and tensors, with the device's type under `device`."""
        ...

    def set_random_state(self, state: dict) -> None:
        """Draw from now on as after `random_state`."""
        ...

    def state_dict(self) -> dict:
        """Where every episode under way stands, as plain values and tensors."""
        ...

    def load_state_dict(self, state: dict) -> None:
        """Go on from there; ValueError if that is not possible."""
        ...

    def is_of_this_code(self, state: dict) -> bool:
        """Whether `state_dict` was of the task as it is now."""
        ...
