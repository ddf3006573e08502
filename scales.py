"""Running statistics of what is learned from: how large it is, and how precisely it is known.

They are buffers, so that a checkpoint holds them, and the same on all ranks. Shapes use the symbols
of `networks.py`.
"""

import torch
from torch import Tensor, nn

from distributed import concatenate
from distributions import symlog
from layers import kinds_of


def newest_share(count: Tensor, slowest: float = 1e-3) -> Tensor:
    """Count one more batch, in place; its share (0-d) in an average of all that follows slowly."""
    count += 1
    return (1 / count).clamp(min=slowest)


class Standard(nn.Module):
    """Vectors of observations, head to tail (..., outputs), after symlog and on one footing: about
    mean 0 and deviation 1 each number. Takes those that `sizes` maps to their widths.

    What is small, like a lidar's reading, would be drowned by positions, both as an input and in
    the squared error of its prediction. Means and deviations are those of the replayed rows, over
    all agents of a kind (`kinds_of`): what learns about one agent from another (`TeamView`) must
    find the same place at the same numbers.
    """

    FINEST = 0.05  # deviations below it count as this much: not every trifle is worth predicting

    def __init__(self, sizes: dict[str, int]):
        super().__init__()
        self.keys, self.widths = list(sizes), list(sizes.values())
        self.outputs = sum(self.widths)
        self.register_buffer("mean", torch.zeros(self.outputs))
        self.register_buffer("square", torch.ones(self.outputs))
        self.register_buffer("count", torch.zeros(()))

    @torch.no_grad()
    def update(self, obs: dict[str, Tensor]) -> None:
        """Take in how large observed vectors are."""
        rows = concatenate(self._join(obs).flatten(0, -2))
        rate = newest_share(self.count)
        self.mean.lerp_(self._of_kind(rows.mean(0)), rate)
        self.square.lerp_(self._of_kind(rows.square().mean(0)), rate)

    def forward(self, obs: dict[str, Tensor]) -> Tensor:
        deviation = (self.square - self.mean.square()).clamp(min=self.FINEST**2).sqrt()
        return (self._join(obs) - self.mean) / deviation

    def _of_kind(self, numbers: Tensor) -> Tensor:
        """Each agent's numbers (outputs) as the mean over agents of its kind."""
        parts = list(numbers.split(self.widths))
        for members in kinds_of(self.widths):
            mean = torch.stack([parts[i] for i in members]).mean(0)
            for i in members:
                parts[i] = mean
        return torch.cat(parts)

    def _join(self, obs: dict[str, Tensor]) -> Tensor:
        return symlog(torch.cat([obs[key] for key in self.keys], -1))


class Precision(nn.Module):
    """Mean square errors (V,) of vectors predicted one step ahead, of the last 50 updates or so."""

    def __init__(self, count: int):
        super().__init__()
        self.register_buffer("error", torch.ones(count))
        self.register_buffer("count", torch.zeros(()))

    @torch.no_grad()
    def update(self, square: Tensor, follows: Tensor) -> None:
        """Take in square errors (B, T, V) where `follows` (B, T) is 1."""
        known = follows.unsqueeze(-1)
        sums = torch.cat([square * known, known], -1).sum((0, 1)).unsqueeze(0)
        sums = concatenate(sums).sum(0)  # of all ranks
        counted = sums[-1:]
        share = newest_share(self.count, 0.02) * (counted > 0)
        self.error.lerp_(sums[:-1] / counted.clamp(min=1), share)


class RewardScale(nn.Module):
    """The root mean square of the rewards that are learned, averaged over updates, in a buffer."""

    LEAST = 1e-6

    def __init__(self):
        super().__init__()
        self.register_buffer("square", torch.zeros(()))
        self.register_buffer("count", torch.zeros(()))

    @torch.no_grad()
    def update(self, reward: Tensor) -> Tensor:
        """Take in replayed rewards (..., R), and give the scale (0-d), never below `LEAST`."""
        rows = concatenate(reward.flatten(0, -2))
        self.square.lerp_(rows.square().mean(), newest_share(self.count))
        return self.square.sqrt().clamp(min=self.LEAST)


class ReturnScale(nn.Module):
    """The range between the 5th and 95th percentile of returns, averaged over updates.

    One range per reward, kept in buffers so that a checkpoint holds it.
    """

    def __init__(self, rewards: int, decay: float = 0.99, limit: float = 1.0):
        super().__init__()
        self.decay, self.limit = decay, limit
        self.register_buffer("low", torch.zeros(rewards))
        self.register_buffer("high", torch.zeros(rewards))
        self.register_buffer("ends", torch.tensor([0.05, 0.95]), persistent=False)

    @torch.no_grad()
    def update(self, returns: Tensor) -> Tensor:
        """Take in returns (..., R) and give the scale (R,), never below `limit`."""
        flat = concatenate(returns.detach().flatten(0, -2).float())
        low, high = torch.quantile(flat, self.ends, dim=0)
        self.low.lerp_(low, 1 - self.decay)
        self.high.lerp_(high, 1 - self.decay)
        return (self.high - self.low).clamp(min=self.limit)
