"""That the world model learns a batch by heart, and that actors learn in worlds made by hand."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from models import combine_rewards
from networks import TeamHead
from optimizer import LaProp

# ---- world model ---------------------------------------------------------------------------------


def fit(world, batch, updates, rate):
    """Train on one batch; the mean losses before the first and after the last update.

    Losses weigh as by default, where vectors come first: so few codes cannot serve all alike.
    """
    optimizer, history = LaProp(world.parameters(), lr=rate, warmup=20), []
    reward = combine_rewards(batch["reward"], "mean")
    scales = {"vector": 30.0, "rep": 0.1}
    for _ in range(updates):
        losses, *_ = world.loss(batch, reward)
        history.append({name: loss.mean().item() for name, loss in losses.items()})
        optimizer.zero_grad()
        sum(scales.get(name, 1.0) * loss.mean() for name, loss in losses.items()).backward()
        optimizer.step()
    return history[0], history[-1]


def test_world_model_overfits_one_batch_of_vectors(make_world, make_batch):
    world = make_world(deter=32, units=32, classes=8)
    batch = make_batch(world, batch=4, time=4)
    batch["is_terminal"][2, 3] = True
    before, after = fit(world, batch, updates=120, rate=1e-2)
    assert after["vector"] < before["vector"] / 20
    assert after["reward"] < before["reward"] / 4
    assert after["cont"] < before["cont"] / 50


def test_world_model_overfits_one_batch_of_images(make_world, make_batch):
    """A square in another place and colour on each: noise would not fit through so few channels."""
    sizes = {"deter": 32, "units": 32, "cnn_depth": 4, "norm": True}
    world = make_world(obs_shapes={"image": (16, 16, 3)}, **sizes)
    batch = make_batch(world, batch=2, time=3, image=(16, 16, 3))
    batch["image"].fill_(255)
    for index, image in enumerate(batch["image"].flatten(0, 1)):
        image[index : index + 5, 11 - index : 16 - index, index % 3] = 0
    before, after = fit(world, batch, updates=300, rate=1e-2)  # all is nearly white before
    assert after["image"] < before["image"] / 20


def test_what_it_takes_to_be_near_is_learned_from_few_rows():
    """A touch is paid, and one row in two hundred shows one. Lengths alone leave it at 0.2."""
    head = TeamHead(8, [[4], [4]], 64, 2, 1, norm=False)
    head.view.resolve(torch.full((8,), 1e-5))  # vectors are as they are
    places = 3.4 * torch.rand(8_192, 2, 4) - 1.7
    near = (places[..., :2].norm(dim=-1) < 0.1).any(-1)
    x, reward = places.flatten(1), near.float().unsqueeze(-1)
    optimizer, shown = LaProp(head.parameters(), lr=2e-3, warmup=20), 6_144
    for _ in range(300):
        rows = torch.randint(shown, (256,))
        loss = head(x[rows]).loss(reward[rows]).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    expected = head(x[shown:]).mean.squeeze(-1)
    assert expected[near[shown:]].mean() > 0.6
    assert expected[~near[shown:]].mean() < 0.02


# ---- actors --------------------------------------------------------------------------------------


class HandMade(nn.Module):
    """A world with the interface of `WorldModel`, of two agents.

    The first part of a state is a context (M, 3), which `advance` moves; the second is the last
    action (M, 2, A). `rule` tells the rewards (..., R) from both.
    """

    def __init__(self, rule, width=2, advance=lambda context, action: context, goes_on=0.0):
        super().__init__()
        self.rule, self.width, self.advance, self.goes_on = rule, width, advance, goes_on

    @property
    def rssm(self):
        return self

    def features(self, state):
        return torch.cat([state[0], state[1].flatten(-2)], -1)

    def img_step(self, state, action):
        return self.advance(state[0], action), action

    def foresee(self, feat, action):
        context, last = feat[:, 1:, :3], feat[:, 1:, 3:].unflatten(-1, (2, self.width))
        return self.rule(context, last), torch.full_like(context[..., 0], self.goes_on)

    def learn(self, behavior, count):
        """The behaviour's losses from `count` random contexts before any action."""
        context = F.one_hot(torch.randint(0, 3, (1, count)), 3).float()
        start = context, torch.zeros(1, count, 2, self.width)
        losses, _ = behavior.loss(self, start, torch.zeros(1, count, dtype=torch.bool))
        return {name: loss.mean() for name, loss in losses.items()}


def test_dynamics_gradient_equals_finite_differences(make_behavior, awaken):
    """Exact where the policy is the same in all states: its last bias alone decides."""
    mix, push = torch.randn(3, 3), torch.randn(4, 3)
    world = HandMade(
        lambda context, action: (context.square() + action[..., 1, :1]).sum(-1, keepdim=True),
        advance=lambda context, action: torch.tanh(context @ mix + action.flatten(-2) @ push),
        goes_on=0.88,
    )
    behavior = make_behavior(7, horizon=4, entropy=0.1)
    behavior.scale.decay = 1.0  # stays at its lower limit of one
    awaken(behavior.critic.head)
    last = behavior.actors.body[-1]
    nn.init.zeros_(last.weight)
    nn.init.normal_(last.bias, std=0.5)

    def objective():
        torch.manual_seed(1)
        return world.learn(behavior, 64)["actor"]

    objective().backward()
    flat, slopes, step = last.bias.data.view(-1), [], 2e-2
    for index, centre in enumerate(flat.tolist()):
        ends = []
        for move in (step, -step):
            flat[index] = centre + move
            ends.append(objective().item())
        flat[index] = centre
        slopes.append((ends[0] - ends[1]) / (2 * step))
    assert torch.allclose(last.bias.grad.flatten(), torch.tensor(slopes), rtol=0.02, atol=2e-3)
    assert (last.bias.grad.abs() > 0.01).sum() == 6  # agent 0 has one mean and one width of two


def mean_gradient(behavior, rule, count=200):
    """The gradient of the actors' loss for each agent's means (N, A), which start at zero."""
    behavior.scale.decay = 1.0
    nn.init.zeros_(behavior.actors.body[-1].weight)
    HandMade(rule).learn(behavior, count)["actor"].backward()
    return behavior.actors.body[-1].bias.grad.squeeze(1)[:, :2]


ONE_STEP = {"horizon": 1, "entropy": 0.0, "action_sizes": (2, 2)}


def test_a_team_reward_pays_every_actor_for_its_share(make_behavior):
    grad = mean_gradient(
        make_behavior(7, **ONE_STEP),
        lambda _, action: 3 * action[..., 0, :1] - 50 * action[..., 1, 1:],
    )
    assert torch.allclose(grad, torch.tensor([[-3.0, 0], [0, 50]]), rtol=1e-4)


def test_with_own_rewards_the_returns_of_others_are_ignored(make_behavior):
    """Each agent's action matters more to the other than to itself."""

    def rule(_, action):
        mine, theirs = action[..., 0, 0], action[..., 1, 1]
        return torch.stack([3 * mine + 100 * theirs, 2 * theirs - 50 * mine], -1)

    grad = mean_gradient(make_behavior(7, **ONE_STEP, rewards=2), rule)
    assert torch.allclose(grad, torch.tensor([[-3.0, 0], [0, -2]]), rtol=1e-4)


@pytest.mark.parametrize("discrete", [False, True])
@pytest.mark.parametrize("gradient", ["dynamics", "reinforce"])
def test_an_agent_without_reward_of_its_own_learns_nothing(make_behavior, gradient, discrete):
    def rule(_, action):
        paid = action[..., 0, 0] + 0.5 * action[..., 1, 0]
        return torch.stack([torch.zeros_like(paid), paid], -1)

    behavior = make_behavior(7, **ONE_STEP, rewards=2, imag_gradient=gradient, discrete=discrete)
    HandMade(rule).learn(behavior, 60)["actor"].backward()
    for parameter in behavior.actors.body.parameters():  # what each has of its own
        reach = parameter.grad.flatten(1).abs().amax(1) > 0
        assert reach.tolist() == [False, True]


@pytest.mark.parametrize("reward", ["team", "agent"])
@pytest.mark.parametrize("discrete", [False, True])
@pytest.mark.parametrize("gradient", ["dynamics", "reinforce"])
def test_actors_solve_a_problem_of_one_step(make_behavior, gradient, discrete, reward):
    """Reach a target that differs by context and agent, in imagination alone."""
    mask = torch.tensor([[1.0, 1, 0], [1, 1, 1]])
    if discrete:
        target = F.one_hot(torch.tensor([[0, 2], [1, 0], [1, 1]]), 3).float()
    else:
        target = mask * torch.tensor([0.6, -0.4, 0.2]) * torch.tensor([[[1.0]], [[-1]], [[0.5]]])

    def rule(context, action):
        wanted = torch.einsum("...c,cna->...na", context, target)
        own = -(action - wanted).square().sum(-1)
        return own if reward == "agent" else own.mean(-1, keepdim=True)

    behavior = make_behavior(
        9,
        **ONE_STEP | {"action_sizes": (2, 3)},
        rewards=2 if reward == "agent" else 1,
        imag_gradient=gradient,
        discrete=discrete,
    )
    world, optimizer = HandMade(rule, width=3), LaProp(behavior.parameters(), lr=2e-2, warmup=10)
    for _ in range(80):
        losses = world.learn(behavior, 96)
        optimizer.zero_grad()
        (losses["actor"] + losses["value"]).backward()
        optimizer.step()
    played = behavior.actors(F.pad(torch.eye(3), (0, 6))).mode
    assert (played - target).abs().max() < (1e-6 if discrete else 0.25)
