"""Beliefs about the stochastic half of a state: draws, divergences, what the replay keeps."""

import pytest
import torch
from torch.distributions import Categorical, Independent, Normal
from torch.distributions import kl_divergence as torch_kl

from latents import Normals, OneHots, sample_one_hot, uniform_mix
from networks import RSSM


def one_hots(classes=4, mix=0.01, sharpness=1.0):
    return OneHots(3, classes, mix, sharpness)


def test_uniform_mix():
    logits = torch.tensor([[100.0, 0, 0, 0], [1.0, 2, 3, 4]])
    probs = uniform_mix(logits, 0.04).exp()
    assert torch.allclose(probs[0], torch.tensor([0.97, 0.01, 0.01, 0.01]))
    assert torch.allclose(probs[1], 0.96 * logits[1].softmax(-1) + 0.01)


def test_samples_are_exactly_one_hot():
    """Also in the last bit: what the replay stores is what the model saw."""
    sample = sample_one_hot(uniform_mix(torch.randn(2000, 4), 0.01))
    assert set(sample.unique().tolist()) == {0.0, 1.0}


def test_one_hot_samples_have_the_right_frequencies():
    probs = torch.tensor([[0.5, 0.3, 0.0, 0.2], [0.01, 0.01, 0.01, 0.97]])
    samples = sample_one_hot(probs.log().expand(40_000, 2, 4))
    assert torch.allclose(samples.mean(0), probs, atol=0.012)
    assert samples[:, 0, 2].abs().max() == 0
    both = (samples[:, 0, 0] * samples[:, 1, 3]).mean()  # independent draws
    assert both.item() == pytest.approx(0.5 * 0.97, abs=0.012)


def test_one_hot_samples_pass_the_gradient_of_probabilities():
    logits, weight = torch.randn(5, 4, requires_grad=True), torch.randn(5, 4)
    (sample_one_hot(uniform_mix(logits, 0.1)) * weight).sum().backward()
    expected = torch.autograd.grad((uniform_mix(logits, 0.1).exp() * weight).sum(), logits)[0]
    assert torch.allclose(logits.grad, expected, atol=1e-6)


def test_normal_draws_follow_the_belief_with_its_gradient():
    raw = torch.tensor([[[0.5, 0.0], [-2.0, -4.0], [30.0, 60.0]]], requires_grad=True)
    latent = Normals(3)
    belief = latent.belief(raw)
    expected = torch.tensor([1.1, 0.1 + 2 * torch.sigmoid(torch.tensor(-2.0)).item(), 2.1])
    assert torch.allclose(belief[0, :, 0], raw[0, :, 0])
    assert torch.allclose(belief[0, :, 1], expected)
    draws = latent.sample(belief.expand(40_000, 3, 2))
    assert draws.shape == (40_000, 3, 1)
    assert torch.allclose(draws.mean(0)[:, 0], raw[0, :, 0], atol=0.05)
    assert torch.allclose(draws.std(0)[:, 0], expected, rtol=0.03)
    # The expected square of a draw is mean^2 + std^2: its gradient sees the noise as well.
    grad = torch.autograd.grad(draws[:, 0].square().mean(), raw)[0][0, 0]
    assert torch.allclose(grad, torch.tensor([2 * 0.5, 2 * 1.1 * 0.25]), atol=0.1)


@pytest.mark.parametrize("kind", ["one_hots", "normals"])
def test_kl_and_entropy_against_torch(kind):
    if kind == "one_hots":
        latent = one_hots()
        beliefs = [latent.belief(torch.randn(5, 6, 3, 4)) for _ in range(2)]
        joint = [Independent(Categorical(logits=belief), 1) for belief in beliefs]
    else:
        latent = Normals(3)
        beliefs = [latent.belief(torch.randn(5, 6, 3, 2)) for _ in range(2)]
        joint = [Independent(Normal(*belief.unbind(-1)), 1) for belief in beliefs]
    assert torch.allclose(latent.kl(*beliefs), torch_kl(*joint), atol=1e-5)
    assert latent.kl(beliefs[0], beliefs[0]).abs().max() < 1e-6
    assert torch.allclose(latent.entropy(beliefs[0]), joint[0].entropy(), atol=1e-5)


def test_beliefs_that_are_sure_stay_finite_without_a_mix():
    latent = OneHots(1, 3, mix=0.0, sharpness=1.0)
    raw = torch.tensor([[[300.0, 0, -5]]]), torch.tensor([[[0.0, 300, 1]]])
    one, two = (latent.belief(logits) for logits in raw)
    assert torch.allclose(latent.kl(one, two), torch.tensor(300.0))
    assert latent.entropy(one) == 0


def test_the_replay_holds_256_classes():
    latent = OneHots(1, 256, 0.01, 1.0)
    stoch = torch.eye(256)[:, None]
    assert torch.equal(latent.unpack(latent.pack(stoch)), stoch)


def test_the_replay_holds_normals_in_half_precision():
    stoch = torch.randn(50, 3, 1)
    stored = Normals(3).pack(stoch)
    assert stored.shape == (50, 3) and stored.dtype == torch.float16
    assert torch.allclose(Normals(3).unpack(stored), stoch, rtol=1e-3, atol=1e-6)
    assert torch.equal(Normals(3).pack(Normals(3).unpack(stored)), stored)


def test_sharpness_multiplies_the_logits():
    raw = torch.randn(7, 3, 4)
    belief = one_hots(mix=0.0, sharpness=4.0).belief(raw)
    assert torch.allclose(belief, (4 * raw).log_softmax(-1), atol=1e-5)


@pytest.mark.parametrize("classes", [0, 4])
def test_rssm_draws_from_its_beliefs(classes):
    rssm = RSSM(embed=7, actions=6, deter=12, stoch=3, classes=classes, units=10, blocks=3)
    start = tuple(part.expand(20_000, *part.shape[1:]) for part in rssm.initial(1))
    deter, stoch = rssm.img_step(start, torch.zeros(20_000, 2, 3))
    prior = rssm.prior(deter[0])
    assert torch.allclose(stoch.mean(0), prior.exp() if classes else prior[:, :1], atol=0.04)
    action, embed = torch.zeros(1, 1, 2, 3), torch.randn(1, 1, 7)
    sequence = action, embed, torch.ones(1, 1, dtype=torch.bool)
    sequence = (part.expand(20_000, *part.shape[1:]) for part in sequence)
    (_, stoch, _), post = rssm.observe(*sequence, start, lambda t, latent: latent[0][:, :0])
    expected = post[0, 0].exp() if classes else post[0, 0, :, :1]
    assert torch.allclose(stoch[:, 0].mean(0), expected, atol=0.04)
