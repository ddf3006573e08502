"""Returns, behaviour, and all losses together, against brute force."""

import copy
import math

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from distributions import Histogram
from latents import OneHots
from models import (
    Dreamer,
    ImageProbe,
    combine_rewards,
    frozen,
    kl_losses,
    lambda_return,
)
from scales import RewardScale
from tests.worlds import IMAGE, VECTORS, states

SCALES = {"vector": 1.0, "image": 1.0, "reward": 1.5, "cont": 1.0, "dyn": 1.0, "rep": 0.1}
SCALES |= {"embed": 0.9, "actor": 0.7, "value": 1.2, "repval": 0.3}
SCALES |= {"next_vector": 1.1, "mean_vector": 0.8}


@pytest.fixture
def make_dreamer(make_world, make_behavior, awaken):
    """A dreamer of which no part is at its zero start; keywords as for its behaviour."""

    def make(reward: str = "mean", image: bool = False, told: bool = False, **changes) -> Dreamer:
        """With `image`, that is what is seen, and with `told`, vectors are predicted from it."""
        rewards = 2 if reward == "agent" else 1
        seen = IMAGE if image else VECTORS
        predicted = seen | (VECTORS if told else {})
        world = make_world(rewards=rewards, obs_shapes=seen, predicted_shapes=predicted)
        behavior = make_behavior(world.feat, rewards=rewards, parts=world.parts, **changes)
        for head in (world.reward, behavior.critic, behavior.slow_critic):
            awaken(head.head)
        probe = None if image else ImageProbe(world.feat, 16, 2)
        return Dreamer(world, behavior, probe, reward, SCALES)

    return make


# ---- returns, KL, scale --------------------------------------------------------------------------


@pytest.mark.parametrize("constant", [True, False])
def test_lambda_return_against_a_double_loop(constant):
    """The lambda-weighted mean of all n-step returns, by its definition."""
    reward, value = torch.randn(4, 7, 2).double(), torch.randn(4, 7, 2).double()
    discount = torch.rand(4, 7, 2).double()
    lam = 0.7 if constant else torch.rand(4, 7, 2).double()
    returns = lambda_return(reward, value, discount, lam)
    assert returns.shape == (4, 6, 2)
    lam = torch.as_tensor(lam).expand(4, 7, 2)
    for start in range(6):
        expected, share = torch.zeros(4, 2).double(), torch.ones(4, 2).double()
        rewards, product = torch.zeros(4, 2).double(), torch.ones(4, 2).double()
        for end in range(start + 1, 7):
            rewards = rewards + product * reward[:, end]
            product = product * discount[:, end]
            stop = 1 - lam[:, end] if end < 6 else 1.0
            expected += share * stop * (rewards + product * value[:, end])
            share = share * lam[:, end]
        assert torch.allclose(returns[:, start], expected)


def test_a_reward_belongs_to_the_state_that_it_leads_to():
    reward, zero = torch.tensor([100.0, 1.0, 10.0]).unsqueeze(-1), torch.zeros(3, 1)
    returns = lambda_return(reward, zero, torch.full((3, 1), 0.5), 1.0)
    assert returns.squeeze(-1).tolist() == [1.0 + 0.5 * 10.0, 10.0]
    value = torch.tensor([100.0, 0.0, 8.0]).unsqueeze(-1)
    discount = torch.tensor([0.0, 0.5, 0.25]).unsqueeze(-1)  # that of what follows the state
    returns = lambda_return(reward, value, discount, 1.0)
    assert returns.squeeze(-1).tolist() == [1.0 + 0.5 * (10.0 + 0.25 * 8.0), 10.0 + 0.25 * 8.0]


def test_kl_balance_gradients_and_free_nats():
    post = torch.randn(8, 3, 4, requires_grad=True)
    prior = torch.randn(8, 3, 4, requires_grad=True)
    latent = OneHots(3, 4, 0.01, 1.0)
    logs = latent.belief(post), latent.belief(prior)
    dynamics, representation = kl_losses(latent, *logs, 0.0)
    assert torch.equal(dynamics, latent.kl(*logs)) and torch.equal(dynamics, representation)
    reach = [
        [
            grad is not None and bool((grad != 0).any())
            for grad in torch.autograd.grad(
                loss.sum(), (post, prior), retain_graph=True, allow_unused=True
            )
        ]
        for loss in (dynamics, representation)
    ]
    assert reach == [[False, True], [True, False]]
    free = dynamics.detach().sort().values[3:5].mean().item()
    for loss, source in zip(kl_losses(latent, *logs, free), (prior, post), strict=True):
        assert torch.equal(loss, dynamics.clamp(min=free))
        grad = torch.autograd.grad(loss.sum(), source, retain_graph=True)[0]
        moved = grad.flatten(1).abs().sum(1) > 0
        assert torch.equal(moved, dynamics > free) and moved.sum() == 4


@pytest.mark.parametrize("reward", ["mean", "agent"])
def test_normalised_rewards_are_learned_alike_whatever_their_unit(reward, make_dreamer, make_batch):
    """And not if they are learned as they are."""
    dreamer = make_dreamer(reward)
    batch = make_batch(dreamer.world)
    learned = {}
    for norm in (True, False):
        for unit in (1.0, 1e-3):
            twin = copy.deepcopy(dreamer)
            twin.reward_scale = RewardScale() if norm else None
            torch.manual_seed(1)
            loss, _, metrics = twin.losses(batch | {"reward": unit * batch["reward"]})
            learned[norm, unit] = loss.item(), metrics["reward_loss"].item()
            assert ("reward_rms" in metrics) == norm
    assert learned[True, 1.0] == pytest.approx(learned[True, 1e-3], rel=1e-5)
    assert learned[False, 1.0] != pytest.approx(learned[False, 1e-3], rel=1e-2)


def test_combine_rewards():
    reward = torch.tensor([[1.0, 2.0, 6.0]])
    assert combine_rewards(reward, "mean").tolist() == [[3.0]]
    assert combine_rewards(reward, "sum").tolist() == [[9.0]]
    assert combine_rewards(reward, "agent") is reward


def test_frozen_lets_gradients_through_and_restores_even_after_an_error():
    layer, x = nn.Linear(2, 2), torch.ones(1, 2, requires_grad=True)
    layer.bias.requires_grad_(False)
    with frozen(layer):
        out = layer(x).sum()
    assert layer.weight.requires_grad and not layer.bias.requires_grad
    out.backward()
    assert x.grad.abs().sum() > 0 and layer.weight.grad is None
    with pytest.raises(KeyError), frozen(layer):
        raise KeyError
    assert layer.weight.requires_grad


# ---- behaviour -----------------------------------------------------------------------------------


@pytest.mark.parametrize("discrete", [False, True])
def test_imagine_is_one_rollout_from_the_start_states(make_dreamer, discrete):
    dreamer = make_dreamer(discrete=discrete)
    world, behavior = dreamer.world, dreamer.behavior
    start = tuple(part.flatten(0, 1) for part in states(world))
    torch.manual_seed(1)
    feat, action, entropy = behavior.imagine(world, start)
    assert feat.shape == (6, 4, world.feat)
    assert action.shape == (6, 3, 2, 2) and entropy.shape == (6, 3, 2)
    torch.manual_seed(1)
    state = start
    for t in range(3):
        assert torch.equal(feat[:, t], world.features(state))
        policy = behavior.actors(world.features(state))
        assert torch.allclose(action[:, t], policy.sample())
        assert torch.allclose(entropy[:, t], policy.entropy())
        state = world.img_step(state, action[:, t])
    assert torch.equal(feat[:, 3], world.features(state))


@pytest.mark.parametrize("discrete", [False, True])
def test_actors_take_the_states_that_they_see_as_given(make_dreamer, discrete):
    """An action's gradient reaches later states, but no policy's reaction to them."""
    dreamer = make_dreamer(discrete=discrete)
    deter, *rest = (part.flatten(0, 1) for part in states(dreamer.world))
    deter.requires_grad_()
    feat, action, entropy = dreamer.behavior.imagine(dreamer.world, (deter, *rest))
    weight = torch.randn_like(feat[:, 1:])
    assert torch.autograd.grad((feat[:, 1:] * weight).sum(), deter, retain_graph=True)[0].any()
    for part in (action, entropy):
        last = (part[:, -1] * torch.randn_like(part[:, -1])).sum()
        assert torch.autograd.grad(last, deter, retain_graph=True, allow_unused=True)[0] is None


@pytest.mark.parametrize("reward", ["mean", "agent"])
@pytest.mark.parametrize("gradient", ["dynamics", "reinforce"])
def test_one_rollout_feeds_everything(make_dreamer, monkeypatch, gradient, reward):
    dreamer = make_dreamer(reward, imag_gradient=gradient)
    steps, step = [], dreamer.world.rssm.img_step
    monkeypatch.setattr(dreamer.world.rssm, "img_step", lambda *a: steps.append(a) or step(*a))
    state = states(dreamer.world)
    losses, _ = dreamer.behavior.loss(dreamer.world, state, torch.zeros(2, 3, dtype=torch.bool))
    assert len(steps) == 3 and all(loss.shape == (6, 3) for loss in losses.values())


def divergence(logits, number, bins):
    return Histogram(logits, bins).loss(number)


@pytest.mark.parametrize("discrete", [False, True])
@pytest.mark.parametrize("reward", ["mean", "agent"])
@pytest.mark.parametrize("gradient", ["dynamics", "reinforce"])
def test_behavior_losses_against_brute_force(make_dreamer, gradient, reward, discrete):
    dreamer = make_dreamer(reward, imag_gradient=gradient, discrete=discrete, entropy=0.1)
    world, behavior = dreamer.world, dreamer.behavior
    behavior.scale.low.fill_(-2.0)
    behavior.scale.high.fill_(3.0)
    scale = copy.deepcopy(behavior.scale)
    state, ends = states(world), torch.tensor([[False, False, True], [False] * 3])
    torch.manual_seed(1)
    losses, _ = behavior.loss(world, state, ends)
    torch.manual_seed(1)
    dealt = gradient == "dynamics" and reward == "agent"
    whose = behavior._learners(6).long().argmax(-1) if dealt else [0] * 6
    with torch.no_grad():
        feat, action, entropy = behavior.imagine(world, [part.flatten(0, 1) for part in state])
        rewards, cont = world.foresee(feat, action)
        rewards, cont = F.pad(rewards, (0, 0, 1, 0)), F.pad(cont, (1, 0))
        values = behavior.critic(feat).mean
        log_prob = behavior.actors(feat[:, :-1]).log_prob(action)
        critic, slow = behavior.critic(feat), behavior.slow_critic(feat).mean
        count = rewards.shape[-1]
        returns = torch.zeros(6, 4, count)
        returns[:, 3] = values[:, 3]
        for t in (2, 1, 0):
            mixed = 0.2 * values[:, t + 1] + 0.8 * returns[:, t + 1]
            returns[:, t] = rewards[:, t + 1] + 0.9 * cont[:, t + 1, None] * mixed
        scales = scale.update(returns[:, :3])
        assert (scales > 1).all()
        for m in range(6):
            for t in range(3):
                weight = 0.0 if m == 2 else math.prod(0.9 * cont[m, k] for k in range(1, t + 1))
                bonus = 0.1 * entropy[m, t].sum()
                scaled = returns[m, t] / scales
                advantage = (returns[m, t] - values[m, t]) / scales
                if gradient == "reinforce":
                    gain = (log_prob[m, t] * advantage).sum()
                else:  # with rewards of their own, each start is one agent's
                    gain = scaled[whose[m]] * count
                assert losses["actor"][m, t].item() == pytest.approx(
                    -float(weight * (gain + bonus)), abs=2e-4
                )
                logits = critic.logits[m, t]
                value = divergence(logits, returns[m, t], critic.bins)
                value += divergence(logits, slow[m, t], critic.bins)
                assert losses["value"][m, t].item() == pytest.approx(
                    float(weight * value.mean()), abs=1e-3
                )


def test_saturation_is_the_share_of_real_actions_beyond_their_bounds(make_dreamer):
    dreamer = make_dreamer(min_std=1e3, max_std=1e3)  # of widths 1 and 2, and hardly ever within
    _, metrics = dreamer.behavior.loss(
        dreamer.world, states(dreamer.world), torch.zeros(2, 3, dtype=torch.bool)
    )
    assert metrics["action_saturation"] > 0.9


def test_starts_are_dealt_out_at_random_as_many_to_each_agent(make_behavior):
    behavior = make_behavior(8, rewards=2)
    dealt = torch.stack([behavior._learners(10) for _ in range(200)])
    assert (dealt.sum(-1) == 1).all() and (dealt.sum(1) == 5).all()
    assert (dealt.float().mean(0) - 0.5).abs().max() < 0.2  # no place is one agent's


def test_replay_loss_against_brute_force_at_seams(make_dreamer):
    dreamer, size = make_dreamer(), (4, 9)
    behavior = dreamer.behavior
    feat, reward = torch.randn(*size, dreamer.world.feat), torch.randn(*size, 1)
    last, terminal = torch.zeros(2, *size, dtype=torch.bool)
    last[0, 3] = last[1, 4] = terminal[1, 4] = last[2, 0] = last[3, 8] = terminal[3, 8] = True
    loss = behavior.replay_loss(feat, reward, last, terminal)
    critic, slow = behavior.critic(feat), behavior.slow_critic(feat).mean
    value = critic.mean
    for b in range(4):
        carried = value[b, 8]
        assert loss[b, 8] == 0
        for t in range(7, -1, -1):
            rest = value[b, t + 1] if last[b, t + 1] else 0.2 * value[b, t + 1] + 0.8 * carried
            carried = reward[b, t + 1] + (0.0 if terminal[b, t + 1] else 0.9 * rest)
            expected = divergence(critic.logits[b, t], carried, critic.bins)
            expected += divergence(critic.logits[b, t], slow[b, t], critic.bins)
            expected = 0.0 if last[b, t] else expected.item()
            assert loss[b, t].item() == pytest.approx(expected, rel=1e-4)
    later = feat.clone(), reward.clone()
    later[0][0, 4:], later[1][0, 4:] = 3.0, 100.0
    beyond = behavior.replay_loss(*later, last, terminal)
    assert torch.equal(beyond[0, :4], loss[0, :4]) and not torch.equal(beyond[0], loss[0])


def test_starts_are_all_states_or_a_random_part_of_them(make_dreamer):
    dreamer = make_dreamer(starts=4)
    state, ends = states(dreamer.world), torch.zeros(2, 3, dtype=torch.bool)
    ends[0, 1] = True
    seen = set()
    for _ in range(50):
        (deter, *rest), alive = dreamer.behavior._choose_starts(state, ends)
        assert all(len(part) == 4 for part in (deter, *rest, alive))
        for row, *others, living in zip(deter, *rest, alive, strict=True):
            index = int((state[0].flatten(0, 1) == row).all(-1).nonzero())
            for part, other in zip(state[1:], others, strict=True):
                assert torch.equal(other, part.flatten(0, 1)[index])
            assert living == (index != 1)
            seen.add(index)
    assert seen == set(range(6))


def test_no_limit_of_starts_takes_every_state(make_dreamer):
    dreamer = make_dreamer(starts=0)
    ends = torch.zeros(2, 3, dtype=torch.bool)
    losses, _ = dreamer.behavior.loss(dreamer.world, states(dreamer.world), ends)
    assert losses["actor"].shape == (6, 3)


# ---- which loss reaches which parameters ---------------------------------------------------------


def reached(loss, dreamer):
    """Names of the parameters that a loss moves."""
    dreamer.zero_grad(set_to_none=True)
    loss.mean().backward(retain_graph=True)
    named = dreamer.named_parameters()
    return {name for name, p in named if p.grad is not None and p.grad.abs().sum() > 0}


def names(dreamer, *prefixes):
    return {name for name, _ in dreamer.named_parameters() if name.startswith(prefixes)}


CORE = ("world.encoder", *(f"world.rssm.{part}" for part in ("from", "core", "gates", "post")))
REACH = {
    "vector": (*CORE, "world.decoder.mlp"),
    "embed": (*CORE, "world.sight"),
    "image": (*CORE, "world.decoder.cnn"),
    "reward": (*CORE, "world.reward"),
    "cont": (*CORE, "world.cont"),
    "next_vector": (*CORE, "world.motion"),
    "mean_vector": (*CORE, "world.drift"),
    "dyn": (*CORE, "world.rssm.prior"),
    "rep": CORE,
    "repval": (*CORE, "behavior.critic"),
    "actor": ("behavior.actors",),
    "value": ("behavior.critic",),
}


@pytest.mark.parametrize("discrete", [False, True])
@pytest.mark.parametrize("reward", ["mean", "agent"])
@pytest.mark.parametrize("gradient", ["dynamics", "reinforce"])
@pytest.mark.parametrize("sees", ["vectors", "image", "image, told"])
def test_each_loss_reaches_its_parameters_and_no_others(
    make_dreamer, make_batch, gradient, reward, discrete, sees
):
    """Without an entropy bonus, so that the actors' gradient is that of the returns alone."""
    image, told = sees != "vectors", sees == "image, told"
    settings = {"imag_gradient": gradient, "discrete": discrete, "action_sizes": (2, 2)}
    dreamer = make_dreamer(reward, image, told, entropy=0.0, **settings)
    world = dreamer.world
    for head in filter(None, (world.motion, world.drift, world.sight and world.sight.memory)):
        nn.init.normal_(head.out.weight)  # they add nothing at the start
    batch = make_batch(dreamer.world, **VECTORS, **(IMAGE if image else {}))
    reward = combine_rewards(batch["reward"], dreamer.reward)
    losses, state, feat, _ = dreamer.world.loss(batch, reward)
    flags = batch["is_last"], batch["is_terminal"]
    losses["repval"] = dreamer.behavior.replay_loss(feat, reward, *flags)
    losses |= dreamer.behavior.loss(dreamer.world, state, flags[1])[0]
    unseen = {"vector", "embed", "next_vector", "mean_vector"}
    missing = {"vectors": {"image", "embed"}, "image": unseen, "image, told": set()}
    assert set(losses) == set(REACH) - missing[sees]
    for name, loss in losses.items():
        assert reached(loss, dreamer) == names(dreamer, *REACH[name]), name
    reached(losses["actor"], dreamer)
    for name, parameter in dreamer.behavior.actors.named_parameters():
        if not name.startswith(("view.", "joint.")):  # what every agent has of its own
            assert (parameter.grad.flatten(1).abs().sum(1) > 0).all()


def test_the_probe_teaches_itself_alone(make_dreamer, make_batch):
    dreamer = make_dreamer()
    batch = make_batch(dreamer.world, agent0=(3,), agent1=(2,), image=(16, 16, 3))
    _, state, *_ = dreamer.world.loss(batch, combine_rewards(batch["reward"], "mean"))
    feat = dreamer.world.features(state)
    loss = dreamer.probe.loss(feat, batch["image"])
    pixels = (dreamer.probe(feat) - batch["image"] / 255).square()
    assert torch.allclose(loss, pixels.flatten(2).sum(-1), rtol=1e-4)
    assert reached(loss, dreamer) == names(dreamer, "probe")


@pytest.mark.parametrize("mode", ["mean", "sum", "agent"])
def test_losses_are_weighed_and_summed_once(make_dreamer, make_batch, mode):
    dreamer = make_dreamer(mode)
    twin, batch = copy.deepcopy(dreamer), make_batch(dreamer.world)
    batch["is_last"][0, 2] = batch["is_first"][0, 3] = batch["is_terminal"][0, 2] = True
    torch.manual_seed(1)
    total, state, metrics = dreamer.losses(batch)
    torch.manual_seed(1)
    twin.world.update_scales(batch)
    reward = {"mean": batch["reward"].mean(-1, True), "sum": batch["reward"].sum(-1, True)}
    reward = reward.get(mode, batch["reward"])
    parts, inferred, feat, _ = twin.world.loss(batch, reward)
    flags = batch["is_last"], batch["is_terminal"]
    parts["repval"] = twin.behavior.replay_loss(feat, reward, *flags)
    parts |= twin.behavior.loss(twin.world, inferred, flags[1])[0]
    means = {name: part.mean().item() for name, part in parts.items()}
    assert means.keys() == SCALES.keys() - {"image", "embed"}
    for name, value in means.items():
        assert metrics[f"{name}_loss"].item() == pytest.approx(value, rel=1e-5), name
    assert total.item() == pytest.approx(sum(SCALES[n] * v for n, v in means.items()), rel=1e-4)
    taught = ("vector", "next_vector", "mean_vector", "reward", "cont", "dyn", "rep")
    model = sum(SCALES[n] * means[n] for n in taught)
    assert metrics["model_loss"].item() == pytest.approx(model, rel=1e-4)
    assert all(torch.equal(left, right) for left, right in zip(state, inferred, strict=True))
    assert not any(part.requires_grad for part in state)
    assert all(value.shape == () for value in metrics.values())


def test_every_view_resolves_what_the_world_model_did_until_then(make_dreamer, make_batch):
    dreamer = make_dreamer()
    world, behavior = dreamer.world, dreamer.behavior
    parts = world.reward, behavior.critic, behavior.slow_critic, behavior.actors
    batch = make_batch(world)
    nn.init.normal_(world.motion.out.weight)
    dreamer.losses(batch)
    error = world.precision.error.clone()
    assert (error != 1).all()
    dreamer.losses(batch)
    for part in parts:
        three, two = (mlp.least.flatten() for mlp in part.view.mlps)  # widths of the two agents
        assert torch.allclose(three, 9 * torch.stack([error[:2].sum(), error[2]]))
        assert torch.allclose(two, 9 * error[3:].sum())


def test_slow_critic_follows_a_little(make_dreamer):
    behavior = make_dreamer().behavior
    before = copy.deepcopy(behavior.slow_critic)
    behavior.update_slow()
    for slow, old, new in zip(
        behavior.slow_critic.parameters(),
        before.parameters(),
        behavior.critic.parameters(),
        strict=True,
    ):
        assert torch.allclose(slow, 0.98 * old + 0.02 * new) and not slow.requires_grad


# ---- the whole -----------------------------------------------------------------------------------


@pytest.mark.parametrize("discrete", [False, True])
def test_policy_infers_then_acts_within_bounds(make_dreamer, make_batch, discrete):
    dreamer = make_dreamer(discrete=discrete, max_std=5.0)
    rows = {k: v[:, 0] for k, v in make_batch(dreamer.world).items() if k != "initial"}
    rows["is_first"][:] = False
    start = tuple(part[0] for part in states(dreamer.world, 1, 3))
    torch.manual_seed(1)
    action, state = dreamer.policy(rows, rows["action"], start, explore=True)
    torch.manual_seed(1)
    expected = dreamer.world.obs_step(start, rows["action"], rows)
    policy = dreamer.behavior.actors(dreamer.world.features(expected))
    assert all(torch.equal(left, right) for left, right in zip(state, expected, strict=True))
    assert torch.allclose(action, policy.sample().clamp(-1, 1)) and action.abs().max() <= 1
    torch.manual_seed(1)
    action, _ = dreamer.policy(rows, rows["action"], start, explore=False)
    assert torch.allclose(action, policy.mode) and not action.requires_grad


def test_infer_gives_the_states_of_the_loss(make_dreamer, make_batch):
    dreamer = make_dreamer()
    batch = make_batch(dreamer.world)
    torch.manual_seed(1)
    _, expected, _ = dreamer.losses(batch)
    torch.manual_seed(1)
    state = dreamer.infer(batch)
    assert all(torch.equal(left, right) for left, right in zip(state, expected, strict=True))


@pytest.mark.parametrize("image", [False, True])
def test_video_shows_truth_prediction_and_error(make_dreamer, make_batch, image):
    dreamer = make_dreamer(image=image)
    assert dreamer.draws
    shapes = {} if image else {"agent0": (3,), "agent1": (2,)}
    batch = make_batch(dreamer.world, 3, 7, image=(16, 16, 3), **shapes)
    torch.manual_seed(1)
    video = dreamer.video_pred(batch)
    torch.manual_seed(1)
    feat = dreamer.world.open_loop(batch)
    drawn = dreamer.world.decoder.cnn(feat) if image else dreamer.probe(feat)
    assert video.shape == (7, 48, 48, 3) and video.dtype == torch.uint8
    for b in range(3):
        column, truth = video[:, :, 16 * b : 16 * b + 16], batch["image"][b]
        assert torch.equal(column[:, :16], truth)
        assert (column[:, 16:32] - 255 * drawn[b]).abs().max() < 0.51
        error = (255 * (drawn[b] + 1) - truth) / 2
        assert (column[:, 32:] - error).abs().max() < 0.51


def test_the_products_of_an_update_can_be_counted(make_dreamer, make_batch):
    dreamer = make_dreamer()
    with FlopCounterMode(display=False) as counter:  # as benchmarks/speed.py does
        dreamer.losses(make_batch(dreamer.world))[0].backward()
    assert counter.get_total_flops() > 0
