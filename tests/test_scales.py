"""Running statistics against their definitions."""

import numpy as np
import pytest
import torch

from distributions import symexp
from scales import Precision, ReturnScale, RewardScale, Standard


def test_a_standard_puts_vectors_on_one_footing():
    standard = Standard({"agent0": 1, "agent1": 2})
    symlogs = torch.randn(3, 4, 5, 3) * torch.tensor([2.0, 0.3, 0.01]) + 1
    batches = dict(zip(("agent0", "agent1"), symexp(symlogs).split([1, 2], -1), strict=True))
    assert torch.allclose(standard(batches), symlogs, atol=1e-5)
    for i in range(3):
        standard.update({key: rows[i] for key, rows in batches.items()})
    rows = symlogs.flatten(0, -2)
    deviation = rows.std(0, correction=0)
    assert deviation[2] < 0.05
    deviation[2] = 0.05  # less is noise
    assert torch.allclose(standard(batches), (symlogs - rows.mean(0)) / deviation, atol=1e-3)


def test_vectors_of_one_width_have_one_footing():
    """Or an MLP that agents share would see the same place at other numbers for each of them."""
    standard = Standard({"agent0": 2, "agent1": 3, "agent2": 2})
    shifts = {"agent0": torch.tensor([0.5, 0.0]), "agent1": torch.ones(3), "agent2": torch.zeros(2)}
    rows = {key: symexp(torch.randn(4000, len(by)) + by) for key, by in shifts.items()}
    for _ in range(200):
        standard.update(rows)
    same = symexp(torch.tensor([[0.25, 1.0]]))
    one, _, other = standard({"agent0": same, "agent1": torch.ones(1, 3), "agent2": same}).split(
        [2, 3, 2], -1
    )
    assert torch.equal(one, other) and one[0, 0].abs() < 0.1
    both = torch.cat([rows["agent0"], rows["agent2"]])
    rows |= {"agent0": both, "agent1": both[:, [0, 0, 0]], "agent2": both}
    found = torch.cat(standard(rows).split([2, 3, 2], -1)[::2])
    assert torch.allclose(found.mean(0), torch.zeros(2), atol=0.05)
    assert torch.allclose(found.std(0), torch.ones(2), atol=0.05)


def test_a_standard_goes_on_learning():
    standard, found = Standard({"agent0": 1}), []
    for offset in [0.0] * 2000 + [1.0] * 2000:
        standard.update({"agent0": symexp(torch.tensor([[offset - 0.5], [offset + 0.5]]))})
        found.append(standard.mean.item())
    assert found[1999] == pytest.approx(0, abs=1e-5)
    assert found[3999] == pytest.approx(1 - 0.999**2000, abs=1e-3)


def test_return_scale_against_numpy():
    scale, low, high = ReturnScale(2), np.zeros(2), np.zeros(2)
    for step in range(200):
        returns = torch.randn(5, 7, 2) * torch.tensor([10.0, 0.1]) + step
        low = 0.99 * low + 0.01 * np.percentile(returns.numpy(), 5, axis=(0, 1))
        high = 0.99 * high + 0.01 * np.percentile(returns.numpy(), 95, axis=(0, 1))
        given = scale.update(returns)
        np.testing.assert_allclose(given, np.maximum(1.0, high - low), rtol=1e-3)
    assert given[0] > 20 and given[1] == 1.0
    assert set(scale.state_dict()) == {"low", "high"}


def test_reward_scale_is_the_root_mean_square_of_all_rewards_then_follows_slowly():
    scale, seen = RewardScale(), []
    for _ in range(10):
        seen.append(3.0 + torch.randn(4, 6, 2))
        given = scale.update(seen[-1])
    assert given.item() == pytest.approx(torch.stack(seen).square().mean().sqrt().item(), rel=1e-5)
    scale.count.fill_(1e6)
    given = scale.update(torch.full((4, 6, 2), 100.0))
    expected = (torch.stack(seen).square().mean() * 0.999 + 0.001 * 100.0**2).sqrt()
    assert given.item() == pytest.approx(expected.item(), rel=1e-5)
    assert RewardScale().update(torch.zeros(4, 6, 2)) > 0  # nothing was paid yet


def test_precision_is_the_mean_square_error_where_a_row_follows():
    precision, follows = Precision(3), (torch.rand(2, 4) > 0.4).float()
    squares = [torch.rand(2, 4, 3) for _ in range(60)]
    means = [square[follows.bool()].mean(0) for square in squares]
    for square in squares:
        precision.update(square, follows)
    expected = torch.stack(means[:50]).mean(0)  # and then a fiftieth of each
    for mean in means[50:]:
        expected = 0.98 * expected + 0.02 * mean
    assert torch.allclose(precision.error, expected, atol=1e-5)
    before = precision.error.clone()
    precision.update(torch.rand(2, 4, 3), torch.zeros(2, 4))  # which says nothing
    assert torch.equal(precision.error, before)
