"""The layers, against plain reimplementations."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from layers import (
    MLP,
    BlockLinear,
    PairMLP,
    RMSNorm,
    StackedLinear,
    init_weights,
    largest,
    pairs_of,
)


def test_init_weights_has_the_promised_deviation_and_none_beyond_two():
    weight = init_weights(torch.empty(400, 400), fan_in=400, scale=2.0)
    assert weight.std().item() == pytest.approx(2.0 / 400**0.5, rel=0.02)
    assert weight.abs().max() <= 2 * 0.1 / 0.8796 + 1e-6
    assert (init_weights(torch.ones(3, 3), 3, scale=0) == 0).all()


def test_block_linear_equals_a_block_diagonal_matrix():
    layer, x = BlockLinear(12, 6, 3), torch.randn(5, 12)
    assert torch.allclose(layer(x), x @ torch.block_diag(*layer.weight), atol=1e-6)


@pytest.mark.parametrize("norm", [True, False])
def test_mlp_layers_are_linear_norm_silu(norm):
    mlp, x = MLP(5, 7, 2, norm), torch.randn(4, 5)
    expected = x
    for layer in (0, 2):
        expected = expected @ mlp[layer].weight.T
        expected = F.silu(rms_norm(expected) if norm else expected)
    assert torch.allclose(mlp(x), expected, atol=1e-5)


def rms_norm(x):
    return x / (x.square().mean(-1, keepdim=True) + 1e-4).sqrt()


@pytest.mark.parametrize("count", [0, 3])
def test_rms_norm_and_its_gradients_equal_the_formula(count):
    norm = RMSNorm(5, count)
    nn.init.normal_(norm.weight)
    x = torch.randn(4, 3, 5).transpose(0, 1)  # not contiguous, as stacked layers hand it on
    inputs = [tensor.detach().requires_grad_() for tensor in (x, x)]
    outputs = norm(inputs[0]), rms_norm(inputs[1]) * norm.weight
    assert torch.allclose(*outputs, atol=1e-6)
    pull = torch.randn(3, 4, 5)
    found, expected = (
        torch.autograd.grad((output * pull).sum(), [given, norm.weight])
        for output, given in zip(outputs, inputs, strict=True)
    )
    for left, right in zip(found, expected, strict=True):
        assert torch.allclose(left, right, atol=1e-5)
    assert norm(x.bfloat16()).dtype == torch.float32


def test_rms_norm_of_nothing_but_zeros_is_zero_with_a_finite_gradient():
    x = torch.zeros(2, 5, requires_grad=True)
    out = RMSNorm(5)(x)
    out.sum().backward()
    assert (out == 0).all() and torch.allclose(x.grad, torch.full((2, 5), 100.0))


def test_stacked_layers_equal_a_loop():
    stacked, x = StackedLinear(3, 4, 6), torch.randn(3, 5, 4)
    nn.init.normal_(stacked.bias)
    expected = [x[i] @ stacked.weight[i] + stacked.bias[i] for i in range(3)]
    assert torch.allclose(stacked(x), torch.stack(expected), atol=1e-6)


@pytest.mark.parametrize(
    "parts, pairs",
    [
        ([], []),
        ([2, 2], [(0, 1), (2, 3)]),
        ([5], [(0, 1), (2, 3), (4,)]),
        ([2, 1, 2, 1], [(0, 1), (2,), (3, 4), (5,)]),
        ([2, 1, 1, 1], [(0, 1), (2, 3), (4,)]),
        ([1, 3, 1], [(0,), (1, 2), (3,), (4,)]),
    ],
)
def test_neighbours_are_pairs_within_what_was_joined(parts, pairs):
    assert pairs_of(parts) == pairs


@pytest.mark.parametrize("norm", [True, False])
@pytest.mark.parametrize("parts", [[4], [5], [1], [2, 2, 1], [2, 1, 2, 1], [1, 4]])
def test_pairs_of_numbers_meet_others_in_the_last_layer_only(parts, norm):
    inputs = sum(parts)
    mlp, x, error = PairMLP(parts, 7, norm), torch.randn(3, 2, inputs), torch.rand(inputs)
    mlp.resolve(error)
    for layer in (mlp.first, mlp.second):
        nn.init.normal_(layer.bias)
    seen = []
    for pair, numbers in enumerate(pairs_of(parts)):
        both = torch.zeros(3, 2, 2)
        both[..., : len(numbers)] = x[..., list(numbers)]
        square = both.square().sum(-1, keepdim=True) + 1e-4
        least = square + 9 * error[list(numbers)].sum()
        both = torch.cat([both, square.sqrt(), least.sqrt().log()], -1)
        hidden = F.silu(both @ mlp.first.weight[pair] + mlp.first.bias[pair])
        seen.append(hidden @ mlp.second.weight[pair] + mlp.second.bias[pair])
    found, alone = mlp(x)
    assert torch.allclose(alone, torch.cat(seen, -1), atol=1e-5)
    expected = F.silu(torch.cat(seen, -1)) @ mlp.joint[0].weight.T
    expected = F.silu(rms_norm(expected) if norm else expected)
    assert torch.allclose(found, expected, atol=1e-5)


def test_a_pair_of_nothing_has_a_finite_gradient():
    mlp, x = PairMLP([4], 7), torch.zeros(3, 4, requires_grad=True)
    mlp.resolve(torch.zeros(4))
    sum(part.sum() for part in mlp(x)).backward()
    assert x.grad.isfinite().all()


def test_numbers_that_tremble_at_rest_look_as_if_at_rest():
    """An imagined lidar that sees nobody trembles, a real one does not: actors must not tell."""
    mlp, rest = PairMLP([12], 16), torch.zeros(512, 12)
    mlp.resolve(torch.full((12,), 0.07**2))
    still, trembling, moving = (
        mlp(rest + by * torch.randn_like(rest))[1] for by in (0.0, 0.07, 1.0)
    )
    assert (trembling - still).square().mean().sqrt() < 0.15 * moving.std(0).mean()


def test_the_largest_of_agents_has_the_gradient_of_a_maximum():
    x = torch.randn(5, 4, 3, 6, dtype=torch.float64, requires_grad=True)
    assert torch.equal(largest(x), x.amax(-2))
    assert torch.autograd.gradcheck(largest, x)
