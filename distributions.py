"""What heads and actors predict, as distributions: numbers, and the actions of all agents.

Shapes use the symbols of `networks.py`.
"""

from functools import cached_property

import torch
import torch.nn.functional as F
from torch import Tensor


def symlog(x: Tensor) -> Tensor:
    """Compress large magnitudes: sign(x) ln(1 + |x|) (Hafner et al., arXiv 2301.04104)."""
    return torch.sign(x) * torch.log1p(torch.abs(x))


def symexp(x: Tensor) -> Tensor:
    """The inverse of `symlog`."""
    return torch.sign(x) * torch.expm1(torch.abs(x))


class Histogram:
    """A number predicted as a histogram over `bins` (K,), its logits (..., K).

    A number x stands at asinh(x / FINEST) on the axis of the bins: evenly where it is small, as
    many rewards of VMAS are hundredths, and by its logarithm where it is large. The target of a
    prediction is a normal around it, BLUR bins wide (HL-Gauss: Imani & White, 2018,
    arXiv 1806.04613; Farebrother et al., 2024, arXiv 2403.03950): what is learned from two-hot
    targets holds less well for new scenes (benchmarks/README.md).
    """

    FINEST = 0.01
    BLUR = 4.0

    def __init__(self, logits: Tensor, bins: Tensor):
        self.logits, self.bins = logits.float(), bins
        self.deviation = self.BLUR * (bins[1] - bins[0])

    @staticmethod
    def make_bins(count: int = 255, limit: float = 20.0) -> Tensor:
        """Evenly spaced places (K,), exactly symmetric about a zero in the middle."""
        positive = torch.linspace(0.0, limit, count // 2 + 1)
        return torch.cat([-positive[1:].flip(0), positive])

    @cached_property
    def log_probs(self) -> Tensor:
        """Of each bin (..., K)."""
        return self.logits.log_softmax(-1)

    @property
    def mean(self) -> Tensor:
        """The expectation (...), summed over pairs of opposite bins, so that equal tails cancel.

        For z normal, E[sinh(z)] = exp(variance / 2) sinh(E[z]), so the blur is taken out exactly.
        """
        half = len(self.bins) // 2
        # Of one half alone: some processors' sinh is not quite odd.
        numbers = torch.sinh(self.bins[half + 1 :])
        numbers = self.FINEST * torch.exp(-self.deviation.square() / 2) * numbers
        probs = self.logits.softmax(-1)
        more = probs[..., half + 1 :] - probs[..., :half].flip(-1)
        return (more * numbers).sum(-1)

    def loss(self, target: Tensor) -> Tensor:
        """Divergence (...) from the blurred numbers (...), which get no gradient."""
        place = torch.asinh(target.detach().float() / self.FINEST).unsqueeze(-1)
        place = place.clamp(self.bins[0], self.bins[-1])
        # Without a bound, the tails underflow, and there CPUs take ten times as long.
        target = (((place - self.bins) / self.deviation).square() / -2).clamp(min=-80)
        target = target.log_softmax(-1)
        return (target.exp() * (target - self.log_probs)).sum(-1)


class BoundedNormal:
    """Continuous actions of N agents: a normal with its mean inside (-1, 1).

    mean and width (..., N, A) are what a network says: the one goes through tanh, the other through
    a sigmoid from `min_std` to `max_std`, at first near the latter; mask (N, A) is 1 where an agent
    has that action. Samples may leave [-1, 1]: the environment and the RSSM bound them alike (see
    `RSSM.bound_action`).
    """

    def __init__(self, mean: Tensor, width: Tensor, mask: Tensor, min_std: float, max_std: float):
        std = (max_std - min_std) * torch.sigmoid(width.float() + 2.0) + min_std
        self.mean, self.mask = torch.tanh(mean.float()) * mask, mask
        self.normal = torch.distributions.Normal(self.mean, std, validate_args=False)

    @property
    def mode(self) -> Tensor:
        return self.mean

    def sample(self) -> Tensor:
        """(..., N, A), with the gradient of mean and width."""
        return self.normal.rsample() * self.mask

    def log_prob(self, action: Tensor) -> Tensor:
        """(..., N): the log-probability of each agent's own action."""
        return (self.normal.log_prob(action) * self.mask).sum(-1)

    def entropy(self) -> Tensor:
        """(..., N)"""
        return (self.normal.entropy() * self.mask).sum(-1)


class OneHotActions:
    """Discrete actions of N agents; logits (..., N, A), mask (N, A) is 1 for actions that exist."""

    def __init__(self, logits: Tensor, mask: Tensor, mix: float):
        logits = logits.float().masked_fill(mask == 0, -torch.inf)
        uniform = mask / mask.sum(-1, keepdim=True)
        self.probs, self.mask = (1 - mix) * logits.softmax(-1) + mix * uniform, mask
        if mix:
            self.log_probs = torch.where(mask > 0, self.probs, 1.0).log()
        else:  # finite, however sure
            self.log_probs = torch.where(mask > 0, logits.log_softmax(-1), 0.0)

    @property
    def mode(self) -> Tensor:
        return F.one_hot(self.probs.argmax(-1), self.probs.shape[-1]).float()

    def sample(self) -> Tensor:
        """One-hot (..., N, A), with the straight-through gradient of the probabilities."""
        noise = torch.empty_like(self.probs).exponential_()
        index = (self.probs.detach() / noise).argmax(-1)
        one_hot = F.one_hot(index, self.probs.shape[-1]).float()
        return one_hot + (self.probs - self.probs.detach())

    def log_prob(self, action: Tensor) -> Tensor:
        """(..., N): the log-probability of each agent's own action."""
        return (self.log_probs * action).sum(-1)

    def entropy(self) -> Tensor:
        """(..., N)"""
        return -(self.probs * self.log_probs).sum(-1)
