"""Numbers as histograms, and actions, against plain reimplementations."""

import math

import pytest
import torch
from torch.distributions import Categorical, Normal

from distributions import (
    BoundedNormal,
    Histogram,
    OneHotActions,
    symexp,
    symlog,
)
from networks import NumberHead

SIZES = (1, 3, 2)  # action widths of three agents


# ---- numbers -------------------------------------------------------------------------------------


def test_symexp_inverts_symlog():
    x = torch.tensor([-1e4, -3.0, -0.1, 0.0, 1e-3, 1.0, 250.0, 1e6], dtype=torch.float64)
    assert torch.allclose(symexp(symlog(x)), x)
    assert torch.allclose(symlog(torch.tensor([torch.e - 1, 1 - torch.e])), torch.tensor([1.0, -1]))


def test_bins_are_symmetric_and_even():
    bins = Histogram.make_bins()
    assert len(bins) == 255 and bins[127] == 0
    assert torch.equal(bins, -bins.flip(0))
    assert torch.allclose(bins, torch.linspace(-20, 20, 255), atol=1e-5)


def blurred(number, bins):
    """The target of a histogram as log-probabilities, in double precision."""
    width = 4 * (bins[1] - bins[0])
    places = [((math.asinh(number / 0.01) - bin) / width) ** 2 / 2 for bin in bins]
    return torch.log_softmax(-torch.tensor(places, dtype=torch.float64), -1)


@pytest.mark.parametrize("number", [-2e4, -77.0, -1.0, -0.013, 0.0, 0.001, 0.4, 3.0, 1e5])
def test_a_histogram_that_met_its_target_has_the_number_as_its_mean(number):
    bins = Histogram.make_bins()
    prediction = Histogram(blurred(number, bins.tolist()), bins)
    assert prediction.mean.item() == pytest.approx(number, rel=1e-3, abs=1e-5)
    assert prediction.loss(torch.tensor(number)).item() == pytest.approx(0, abs=1e-4)


def test_a_histogram_of_chances_has_their_expectation():
    bins = Histogram.make_bins()
    seldom, often = (blurred(number, bins.tolist()).exp() for number in (-1.0, 0.02))
    prediction = Histogram((0.1 * seldom + 0.9 * often).log(), bins)
    assert prediction.mean.item() == pytest.approx(0.1 * -1.0 + 0.9 * 0.02, rel=1e-3)


def test_numbers_beyond_the_bins_count_as_the_outermost():
    bins = Histogram.make_bins(41, 8.0)
    prediction = Histogram(torch.randn(41), bins)
    edge, beyond = 0.01 * math.sinh(8.0), torch.tensor([1e9, -1e9])
    assert torch.allclose(prediction.loss(beyond), prediction.loss(torch.tensor([edge, -edge])))


@pytest.mark.parametrize("logit", [0.0, 3.3])
def test_a_histogram_mean_is_exactly_zero_for_equal_logits(logit):
    assert (Histogram(torch.full((7, 255), logit), Histogram.make_bins()).mean == 0).all()
    assert (NumberHead(6, 8, 1, 2)(torch.randn(5, 6)).mean == 0).all()


def test_histogram_mean_and_loss_against_brute_force():
    bins = Histogram.make_bins(21, 4.0)
    logits = torch.randn(6, 2, 21)
    number = torch.randn(6, 2) * 0.1
    prediction = Histogram(logits, bins)
    shrink = math.exp(-((4 * 0.4) ** 2) / 2)
    values = torch.tensor([0.01 * shrink * math.sinh(bin) for bin in bins.tolist()])
    for i in range(6):
        for j in range(2):
            p = logits[i, j].double().exp() / logits[i, j].double().exp().sum()
            assert prediction.mean[i, j].item() == pytest.approx(
                (p * values).sum().item(), abs=1e-5
            )
            target = blurred(number[i, j].item(), bins.tolist())
            divergence = (target.exp() * (target - p.log())).sum().item()
            assert prediction.loss(number)[i, j].item() == pytest.approx(divergence, rel=1e-4)


def test_histogram_loss_gives_its_target_no_gradient():
    logits, target = torch.randn(3, 5, requires_grad=True), torch.ones(3, requires_grad=True)
    Histogram(logits, Histogram.make_bins(5, 2.0)).loss(target).sum().backward()
    assert target.grad is None and logits.grad.abs().sum() > 0


# ---- distributions -------------------------------------------------------------------------------


def test_one_hot_actions_are_exactly_one_hot():
    sample = OneHotActions(torch.randn(2000, 1, 4), torch.ones(1, 4), 0.01).sample()
    assert set(sample.unique().tolist()) == {0.0, 1.0}


def make_mask(sizes=SIZES):
    mask = torch.zeros(len(sizes), max(sizes))
    for agent, size in enumerate(sizes):
        mask[agent, :size] = 1
    return mask


def test_bounded_normal_against_torch():
    mean, width = torch.randn(50, 3, 3), torch.randn(50, 3, 3)
    policy = BoundedNormal(mean, width, make_mask(), 0.2, 0.9)
    action = policy.sample()
    log_prob, entropy = policy.log_prob(action), policy.entropy()
    assert action.shape == (50, 3, 3) and log_prob.shape == entropy.shape == (50, 3)
    for agent, size in enumerate(SIZES):
        own = agent, slice(size)
        std = 0.7 / (1 + torch.exp(-width[:, *own] - 2)) + 0.2
        normal = Normal(torch.tanh(mean[:, *own]), std)
        assert torch.allclose(log_prob[:, agent], normal.log_prob(action[:, *own]).sum(-1))
        assert torch.allclose(entropy[:, agent], normal.entropy().sum(-1))
        assert torch.allclose(policy.mode[:, *own], normal.mean)
        assert (action[:, agent, size:] == 0).all() and (policy.mode[:, agent, size:] == 0).all()


def test_bounded_normal_samples_have_its_mean_and_deviation():
    mean, width = torch.tensor([[0.5, -1.0]]), torch.tensor([[-3.0, 1.0]])
    policy = BoundedNormal(mean.expand(40_000, 1, 2), width, torch.ones(1, 2), 0.1, 1.0)
    sample = policy.sample()
    assert torch.allclose(sample.mean(0), torch.tanh(mean), atol=0.02)
    assert torch.allclose(sample.std(0), 0.9 * torch.sigmoid(width + 2) + 0.1, atol=0.02)


def test_bounded_normal_samples_carry_the_gradient_of_mean_and_width():
    mean = torch.zeros(4, 1, 2, requires_grad=True)
    width = torch.zeros(4, 1, 2, requires_grad=True)
    policy = BoundedNormal(mean, width, torch.tensor([[1.0, 0.0]]), 0.1, 1.0)
    policy.sample().square().sum().backward()
    assert mean.grad[..., 0].abs().min() > 0 and width.grad[..., 0].abs().min() > 0
    assert mean.grad[..., 1].abs().max() == 0 and width.grad[..., 1].abs().max() == 0


def test_one_hot_actions_against_torch():
    logits = torch.randn(50, 3, 3)
    policy = OneHotActions(logits, make_mask(), 0.05)
    action = policy.sample()
    log_prob, entropy = policy.log_prob(action), policy.entropy()
    assert action.shape == (50, 3, 3) and log_prob.shape == entropy.shape == (50, 3)
    for agent, size in enumerate(SIZES):
        probs = 0.95 * logits[:, agent, :size].softmax(-1) + 0.05 / size
        own = Categorical(probs=probs)
        assert torch.allclose(
            log_prob[:, agent], own.log_prob(action[:, agent].argmax(-1)), atol=1e-5
        )
        assert torch.allclose(entropy[:, agent], own.entropy(), atol=1e-5)
        assert torch.equal(policy.mode[:, agent].argmax(-1), probs.argmax(-1))
        assert policy.mode[:, agent].sum(-1).eq(1).all()


def test_actions_that_are_certain_have_an_entropy_without_mixing():
    logits = torch.tensor([120.0, 0.0, 0.0]).expand(3, 3).clone().requires_grad_()
    policy = OneHotActions(logits, make_mask(), 0.0)
    (policy.entropy().sum() + policy.log_prob(policy.mode).sum()).backward()
    assert policy.entropy().tolist() == pytest.approx([0.0] * 3, abs=1e-5)
    assert logits.grad.isfinite().all()


def test_padding_of_discrete_actions_is_never_drawn():
    # The padded logits are the highest, and uniform mixing must not revive them either.
    logits = torch.tensor([0.0, 0.0, 50.0]).expand(20_000, 3, 3)
    policy = OneHotActions(logits, make_mask(), 0.3)
    frequencies = policy.sample().mean(0)
    assert (frequencies[0] == torch.tensor([1.0, 0, 0])).all()
    assert frequencies[2, 2] == 0
    expected = 0.7 * torch.tensor([0.0, 0.0, 1.0]) + 0.1
    assert torch.allclose(frequencies[1], expected, atol=0.02)
    assert torch.allclose(frequencies[2, :2], torch.tensor([0.5, 0.5]), atol=0.02)
    assert policy.mode[:, 0, 0].all() and policy.mode[:, 2, 2].sum() == 0


def test_one_hot_actions_have_finite_gradients_despite_padding():
    logits = torch.randn(8, 3, 3, requires_grad=True)
    policy = OneHotActions(logits, make_mask(), 0.01)
    action, weight = policy.sample(), torch.randn(8, 3, 3)
    ((action * weight).sum() + policy.entropy().sum() + policy.log_prob(action).sum()).backward()
    assert logits.grad.isfinite().all()
    assert logits.grad[:, 0].abs().max() < 1e-6  # one action leaves no choice
    assert logits.grad[:, 1].abs().min() > 0


def test_one_hot_actions_pass_the_gradient_of_probabilities():
    logits, weight = torch.randn(6, 3, 3, requires_grad=True), torch.randn(6, 3, 3)
    policy = OneHotActions(logits, make_mask(), 0.1)
    gradient = torch.autograd.grad((policy.sample() * weight).sum(), logits, retain_graph=True)[0]
    expected = torch.autograd.grad((policy.probs * weight).sum(), logits)[0]
    assert torch.allclose(gradient, expected, atol=1e-6) and expected.abs().sum() > 0
