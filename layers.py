"""The layers that all networks are made of.

Shapes use the symbols of `networks.py`.
"""

from collections import defaultdict
from collections.abc import Sequence
from itertools import groupby

import torch
import torch.nn.functional as F
from torch import Tensor, nn


def init_weights(weight: Tensor, fan_in: int, scale: float = 1.0) -> Tensor:
    """Fill with a truncated normal of deviation scale / sqrt(fan_in) (zeros for scale 0)."""
    if scale == 0:
        return nn.init.zeros_(weight)
    # Cutting a normal at two deviations shrinks its deviation to this share.
    std = scale / fan_in**0.5 / 0.87962566
    return nn.init.trunc_normal_(weight, std=std, a=-2 * std, b=2 * std)


class Linear(nn.Linear):
    """A linear layer that starts as DreamerV3's do."""

    def __init__(self, inputs: int, outputs: int, bias: bool = True, scale: float = 1.0):
        super().__init__(inputs, outputs, bias)
        init_weights(self.weight, inputs, scale)
        if bias:
            nn.init.zeros_(self.bias)


class BlockLinear(nn.Module):
    """A block-diagonal linear layer: `blocks` groups of inputs feed their own group of outputs."""

    def __init__(self, inputs: int, outputs: int, blocks: int):
        super().__init__()
        shape = (blocks, inputs // blocks, outputs // blocks)
        self.weight = nn.Parameter(init_weights(torch.empty(shape), inputs // blocks))

    def forward(self, x: Tensor) -> Tensor:
        """(M, inputs) to (M, outputs), without a bias."""
        blocks, inputs, _ = self.weight.shape
        x = x.view(-1, blocks, inputs).transpose(0, 1)
        return torch.bmm(x, self.weight).transpose(0, 1).flatten(1)


class _RMSNorm(torch.autograd.Function):
    """RMSNorm of x (G, M, units) with scales (G, 1, units), in few passes over memory.

    torch has no kernel for it on CPUs: what it puts together takes two to three times as long.
    """

    @staticmethod
    def forward(ctx, x: Tensor, scale: Tensor, eps: float) -> Tensor:
        norm = torch.linalg.vector_norm(x, dim=-1, keepdim=True)
        inverse = torch.rsqrt(norm.square() / x.shape[-1] + eps)
        ctx.save_for_backward(x, scale, inverse)
        return (x * inverse).mul_(scale)

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor, Tensor, None]:
        x, scale, inverse = ctx.saved_tensors
        product = grad * x
        of_scale = inverse.transpose(1, 2) @ product
        along = product @ scale.transpose(1, 2) * inverse.square() / x.shape[-1]  # (G, M, 1)
        of_x = torch.mul(grad, scale, out=product).addcmul_(x, along, value=-1).mul_(inverse)
        return of_x, of_scale, None


class RMSNorm(nn.Module):
    """RMSNorm over the last axis, in float32, whatever the precision of the product before it.

    With `count`, that many norms over (count, M, units), each with its own scale.
    """

    EPS = 1e-4

    def __init__(self, units: int, count: int = 0):
        super().__init__()
        self.weight = nn.Parameter(torch.ones((count, 1, units) if count else units))

    def forward(self, x: Tensor) -> Tensor:
        x, units = x.float(), x.shape[-1]
        if x.is_cuda:
            return F.rms_norm(x, (units,), eps=self.EPS) * self.weight
        groups = self.weight.view(-1, 1, units)
        return _RMSNorm.apply(x.reshape(len(groups), -1, units), groups, self.EPS).view(x.shape)


class _Largest(torch.autograd.Function):
    """The maximum over the last axis but one; on CPUs torch's own takes ten times as long."""

    @staticmethod
    def forward(ctx, x: Tensor) -> Tensor:
        most = x.amax(-2)
        ctx.save_for_backward(x, most)
        return most

    @staticmethod
    def backward(ctx, grad: Tensor) -> Tensor:
        x, most = ctx.saved_tensors
        return (x - most.unsqueeze(-2)).ge_(0).mul_(grad.unsqueeze(-2))


def largest(x: Tensor) -> Tensor:
    """The maximum (..., units) over agents (..., N, units); equals all get the gradient."""
    return _Largest.apply(x)


def activation(units: int, norm: bool = True) -> nn.Sequential:
    """SiLU, after RMSNorm if `norm`.

    A norm takes away how large its input is, which predictions of positions and distances need.
    """
    return nn.Sequential(RMSNorm(units), nn.SiLU()) if norm else nn.Sequential(nn.SiLU())


class MLP(nn.Sequential):
    """`layers` of linear, RMSNorm (if `norm`) and SiLU.

    The linear layers need their bias: without it, RMSNorm would hide how large an input is.
    """

    def __init__(self, inputs: int, units: int, layers: int, norm: bool = True):
        parts = []
        for _ in range(layers):
            parts += [Linear(inputs, units), activation(units, norm)]
            inputs = units
        super().__init__(*parts)


class StackedLinear(nn.Module):
    """N linear layers as one batched product: weight (N, inputs, outputs)."""

    def __init__(self, count: int, inputs: int, outputs: int, scale: float = 1.0):
        super().__init__()
        self.weight = nn.Parameter(init_weights(torch.empty(count, inputs, outputs), inputs, scale))
        self.bias = nn.Parameter(torch.zeros(count, 1, outputs))

    def forward(self, x: Tensor) -> Tensor:
        """(N, M, inputs) to (N, M, outputs)."""
        return torch.baddbmm(self.bias, x, self.weight)


def kinds_of(vectors: Sequence) -> list[list[int]]:
    """Which agents are of a kind, that is, have vectors described alike: a list for each kind."""
    kinds = defaultdict(list)
    for agent, vector in enumerate(vectors):
        kinds[vector].append(agent)
    return list(kinds.values())


def pairs_of(parts: Sequence[int]) -> list[tuple[int, ...]]:
    """The numbers of a vector that go together, given the widths of its parts.

    Neighbours within a part do, and neighbouring parts of one number: pairs_of([2, 1, 3, 1, 1]) is
    [(0, 1), (2,), (3, 4), (5,), (6, 7)].
    """
    stretches = []
    for single, run in groupby(parts, lambda width: width == 1):
        widths = list(run)
        stretches += [len(widths)] if single else widths
    pairs, start = [], 0
    for width in stretches:
        numbers = range(start, start + width)
        pairs += [tuple(numbers[i : i + 2]) for i in range(0, width, 2)]
        start += width
    return pairs


class PairMLP(nn.Module):
    """An MLP for one agent's vector: two layers for each pair of its numbers, one for all.

    What VMAS's agents observe is positions, velocities and distances head to tail, and rewards
    are made of what single ones of them mean, most often of how long they are. An MLP that sees all
    numbers at once has to learn which belong together, and knows less of new scenes
    (benchmarks/README.md). The first layer also sees that length, and its logarithm, in which what
    is near stands as far apart as what is far: being within reach is a small part of a scene.
    `resolve` sets what no logarithm is less than. RMSNorm (if `norm`) is in the last layer alone.

    Pairs are those of `pairs_of` the parts that the vector is joined from; a single number is
    paired with 0.
    """

    HIDDEN, SEEN = 32, 16  # units of a pair's layers
    SOFT = 1e-2  # no length is less: at 0 its gradient has no direction
    # The least length of a logarithm, in errors of prediction. Numbers that are imagined tremble,
    # such as what a lidar sees of nobody. In finer logarithms actors tell imagined scenes from real
    # ones by that, and learn to act well in the former alone (benchmarks/README.md).
    BLUR = 3.0

    def __init__(self, parts: Sequence[int], units: int, norm: bool = True):
        super().__init__()
        pairs, inputs = pairs_of(parts), sum(parts)
        self.pairs = len(pairs)
        order = torch.tensor([(*pair, inputs)[:2] for pair in pairs]).flatten()
        self.register_buffer("order", order, persistent=False)
        self.in_order = order[:inputs].equal(torch.arange(inputs))
        self.register_buffer("least", torch.zeros(self.pairs, 1, 1))  # squared
        self.resolve(torch.ones(inputs))
        self.first = StackedLinear(self.pairs, 4, self.HIDDEN)
        self.second = StackedLinear(self.pairs, self.HIDDEN, self.SEEN)
        self.joint = nn.Sequential(Linear(self.pairs * self.SEEN, units), activation(units, norm))

    @torch.no_grad()
    def resolve(self, error: Tensor) -> None:
        """Take in how well the inputs are predicted: their mean square errors (inputs)."""
        self.least.copy_(self.BLUR**2 * self._pair(error.unsqueeze(0)).sum(-1, keepdim=True))

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """(..., inputs) to (..., units), and what the layers of pairs say alone (..., P * SEEN)."""
        pairs = self._pair(x.flatten(0, -2))
        square = pairs.square().sum(-1, keepdim=True) + self.SOFT**2
        hidden = torch.cat([pairs, square.sqrt(), 0.5 * (square + self.least).log()], -1)
        hidden = F.silu(self.first(hidden))
        seen = self.second(hidden).transpose(0, 1).flatten(1)
        shape = x.shape[:-1]
        return self.joint(F.silu(seen)).unflatten(0, shape), seen.unflatten(0, shape)

    def _pair(self, rows: Tensor) -> Tensor:
        """(M, inputs) to (P, M, 2)."""
        if rows.shape[-1] < len(self.order):
            rows = F.pad(rows, (0, 1))
        if not self.in_order:
            rows = rows.index_select(-1, self.order)
        return rows.unflatten(-1, (self.pairs, 2)).transpose(0, 1)
