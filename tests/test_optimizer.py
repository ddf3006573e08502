"""LaProp against plain numbers; and that a learner goes on exactly where it was saved."""

import copy
import io
import math
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from build import make_dreamer, row_spaces
from config import load_config
from latents import LATENTS
from learner import Learner
from optimizer import LaProp, clip_adaptively
from replay import Replay


def run(optimizer, params, gradients):
    for gradient in gradients:
        for param, grad in zip(params, gradient, strict=True):
            param.grad = grad.clone()
        optimizer.step()


def gradients(params, steps, scale=1.0):
    return [[scale * torch.randn_like(param) for param in params] for _ in range(steps)]


# ---- one step at a time --------------------------------------------------------------------------


@pytest.mark.parametrize("warmup", [0, 4])
def test_laprop_against_plain_numbers(warmup):
    param = nn.Parameter(torch.tensor([0.7], dtype=torch.float64))
    optimizer = LaProp([param], lr=0.01, betas=(0.8, 0.95), eps=1e-8, agc=1e9, warmup=warmup)
    x, square, momentum = 0.7, 0.0, 0.0
    for step, grad in enumerate([0.5, -2.0, 0.0, 30.0, 1e-3, -0.4, 0.9], start=1):
        param.grad = torch.tensor([grad], dtype=torch.float64)
        optimizer.step()
        square = 0.95 * square + 0.05 * grad**2
        momentum = 0.8 * momentum + 0.2 * grad / (math.sqrt(square / (1 - 0.95**step)) + 1e-8)
        rate = 0.01 * min(1.0, step / warmup if warmup else 1.0)
        x -= rate * momentum / (1 - 0.8**step)
        assert param.item() == pytest.approx(x, abs=1e-9)


def test_the_rate_rises_linearly_and_falls_with_the_square_root():
    """A constant gradient moves a parameter by exactly the rate."""
    for decay, late in ((0, [1.0] * 4), (6, [1.0, 1.0, (6 / 7) ** 0.5, (6 / 8) ** 0.5])):
        param = nn.Parameter(torch.zeros(1, dtype=torch.float64))
        optimizer, moves = LaProp([param], lr=1.0, warmup=4, agc=1e9, decay=decay), []
        for _ in range(8):
            before = param.item()
            run(optimizer, [param], [[torch.ones(1, dtype=torch.float64)]])
            moves.append(before - param.item())
        assert moves == pytest.approx([0.25, 0.5, 0.75, 1.0, *late])


def test_the_first_step_is_as_long_for_small_gradients_as_for_large():
    params = [nn.Parameter(torch.ones(1)) for _ in range(2)]
    run(LaProp(params, lr=0.1, warmup=0), params, [[torch.tensor([1e-12]), torch.tensor([1e6])]])
    assert params[0].item() == pytest.approx(0.9) and params[1].item() == pytest.approx(0.9)


def test_groups_have_their_own_rate_and_parameters_without_gradient_rest():
    slow, fast, idle = (nn.Parameter(torch.ones(2)) for _ in range(3))
    groups = [{"params": [slow], "lr": 0.1}, {"params": [fast, idle], "lr": 0.2}]
    optimizer = LaProp(groups, warmup=0)
    slow.grad = fast.grad = torch.ones(2)
    optimizer.step()
    assert torch.allclose(slow, torch.full((2,), 0.9))
    assert torch.allclose(fast, torch.full((2,), 0.8))
    assert torch.equal(idle, torch.ones(2))


def test_zero_gradients_leave_parameters_where_they_are():
    param = nn.Parameter(torch.randn(3))
    before = param.detach().clone()
    run(LaProp([param], lr=1.0, warmup=0), [param], [[torch.zeros(3)]] * 3)
    assert torch.equal(param, before)


# ---- adaptive clipping ---------------------------------------------------------------------------


def test_clipping_against_brute_force():
    params = [torch.full((3,), 2.0), torch.full((4,), 0.1), torch.zeros(2), torch.tensor(5.0)]
    grads = [torch.randn(3), torch.randn(4) * 50, torch.randn(2), torch.tensor(-0.3)]
    before = [grad.clone() for grad in grads]
    norms = clip_adaptively([nn.Parameter(param) for param in params], grads, 0.3)
    for param, grad, old, norm in zip(params, grads, before, norms, strict=True):
        length = old.double().square().sum().sqrt().item()
        assert norm.item() == pytest.approx(length, rel=1e-5)
        allowed = 0.3 * max(1e-3, param.double().square().sum().sqrt().item())
        assert torch.allclose(grad, old * min(1.0, allowed / length), rtol=1e-4)
    assert torch.equal(grads[3], before[3]) and grads[1].norm() < before[1].norm()
    assert grads[2].norm().item() == pytest.approx(0.3e-3, rel=1e-4)


def test_clipping_keeps_zero_gradients_and_lets_zero_parameters_leave_zero():
    grads = [torch.zeros(3), torch.zeros(2)]
    clip_adaptively([nn.Parameter(torch.ones(3)), nn.Parameter(torch.zeros(2))], grads, 0.3)
    assert all(torch.equal(grad, torch.zeros_like(grad)) for grad in grads)
    param = nn.Parameter(torch.zeros(2))
    run(LaProp([param], lr=0.1, warmup=0), [param], [[torch.tensor([1.0, -3.0])]])
    assert torch.allclose(param, torch.tensor([-0.1, 0.1]))


def test_an_outlier_is_clipped_before_it_reaches_the_moments():
    """Without clipping, one huge gradient would silence the parameter for many steps."""
    param = nn.Parameter(torch.ones(1))
    optimizer = LaProp([param], lr=1e-6, agc=0.3, warmup=0)
    run(optimizer, [param], [[torch.tensor([1e6])]])
    assert optimizer.state[param]["square"].item() == pytest.approx(0.01 * 0.3**2, rel=1e-3)


def test_step_returns_the_norm_of_all_gradients_before_clipping():
    params = [nn.Parameter(torch.full((2,), 1e-6)), nn.Parameter(torch.ones(3))]
    optimizer = LaProp([{"params": params[:1]}, {"params": params[1:]}])
    params[0].grad, params[1].grad = torch.tensor([3.0, 0.0]), torch.tensor([0.0, 4.0, 0.0])
    assert optimizer.step().item() == pytest.approx(5.0)


# ---- saving --------------------------------------------------------------------------------------


def through_a_file(state):
    """What a checkpoint gives back."""
    file = io.BytesIO()
    torch.save(state, file)
    file.seek(0)
    return torch.load(file, weights_only=True)


def assert_same(left, right, path="state"):
    """Nested states, equal to the last bit."""
    assert type(left) is type(right), path
    if isinstance(left, torch.Tensor):
        assert left.dtype == right.dtype and torch.equal(left, right), path
    elif isinstance(left, dict):
        assert left.keys() == right.keys(), path
        for key in left:
            assert_same(left[key], right[key], f"{path}.{key}")
    elif isinstance(left, list | tuple):
        assert len(left) == len(right), path
        for index, pair in enumerate(zip(left, right, strict=True)):
            assert_same(*pair, f"{path}.{index}")
    else:
        assert left == right, path


def test_an_optimizer_goes_on_exactly_after_loading():
    params = [nn.Parameter(torch.randn(3, 2)), nn.Parameter(torch.zeros(4))]
    twins = copy.deepcopy(params)
    optimizer = LaProp(params, lr=0.1, warmup=10)
    early, late = gradients(params, 5), gradients(params, 5)
    run(optimizer, params, early)
    saved = through_a_file({"params": params, "optimizer": optimizer.state_dict()})
    twin = LaProp(twins, lr=0.1, warmup=10)
    twin.load_state_dict(saved["optimizer"])
    assert_same(twin.state_dict(), optimizer.state_dict())
    for param, value in zip(twins, saved["params"], strict=True):
        param.data.copy_(value)
    run(optimizer, params, late)
    run(twin, twins, late)
    assert all(torch.equal(left, right) for left, right in zip(params, twins, strict=True))
    assert_same(twin.state_dict(), optimizer.state_dict())


def test_settings_are_those_of_now_not_of_a_checkpoint():
    param = nn.Parameter(torch.ones(2))
    saved = LaProp([param], lr=0.1, agc=0.3, warmup=4)
    run(saved, [param], gradients([param], 3))
    optimizer = LaProp([param], lr=0.2, agc=0.5, warmup=9)
    optimizer.load_state_dict(saved.state_dict())
    (group,) = optimizer.param_groups
    assert (group["lr"], group["agc"], group["warmup"], group["count"]) == (0.2, 0.5, 9, 3)


def test_older_checkpoints_count_steps_by_plain_numbers():
    param = nn.Parameter(torch.ones(2))
    optimizer = LaProp([param], warmup=10)
    run(optimizer, [param], gradients([param], 3))
    saved = through_a_file(optimizer.state_dict())
    saved["param_groups"][0]["count"] = 3
    twin = nn.Parameter(param.detach().clone())
    other = LaProp([twin], warmup=10)
    other.load_state_dict(saved)
    late = gradients([param], 2)
    run(optimizer, [param], late)
    run(other, [twin], late)
    assert torch.equal(param, twin)


FLAGS = (
    "--logdir none --configs vmas_vector debug --image_size 16 --model.warmup 2 "
    "--behavior.warmup 2 --critic.lr 1e-2 --kl_free 0"
)


def make_learner(seed, flags=""):
    """A learner of a team of two, with a replay of noise that has images for the probe."""
    settings = Path(__file__).parents[1] / "configs.yaml"
    config = load_config([*FLAGS.split(), *flags.split()], settings)
    env = SimpleNamespace(
        obs_shapes=[(3,), (2,)],
        obs_parts=[[3], [2]],
        action_sizes=[1, 2],
        action_width=2,
        n_agents=2,
        discrete=config.discrete,
        image_size=None,
        device=torch.device("cpu"),
    )
    torch.manual_seed(seed)
    learner = Learner(config, make_dreamer(config, env))
    spaces = row_spaces(config, env, image=True)
    replay = Replay(120, 4, spaces, "cpu", 0, LATENTS)
    noise = torch.Generator().manual_seed(0)
    for time in range(30):
        rows = {}
        for key, (shape, dtype) in spaces.items():
            size = 4, *shape
            rows[key] = (
                torch.randint(0, 4, size, generator=noise, dtype=dtype)
                if dtype == torch.uint8
                else torch.randn(size, generator=noise).to(dtype)
            )
        rows["is_first"] = torch.full((4,), time % 10 == 0)
        rows["is_last"] = torch.full((4,), time % 10 == 9)
        rows["is_terminal"] = rows["is_last"]
        replay.add(rows)
    return learner, replay


def teach(learner, replay, updates):
    metrics = []
    for _ in range(updates):
        metrics.append(learner.update(replay, 3, 6))
        metrics.append(learner.update_probe(replay, 2, 4))
    return metrics


CASES = ["", "--imag_gradient reinforce --discrete true --reward agent"]


@pytest.mark.parametrize("flags", CASES)
def test_a_learner_goes_on_exactly_after_loading(flags):
    """Every tensor, every optimiser, every metric; and the latents written to the replay."""
    learner, replay = make_learner(1, flags)
    teach(learner, replay, 3)
    saved = through_a_file(learner.state_dict())
    latents = {key: ring.clone() for key, ring in replay.rings.items()}
    draws = replay.random_state()
    torch.manual_seed(5)
    expected = teach(learner, replay, 2)

    twin, other = make_learner(2, flags)
    fresh = copy.deepcopy(twin.state_dict())
    twin.load_state_dict(saved)
    assert_same(twin.state_dict(), saved)
    for key, ring in other.rings.items():
        ring.copy_(latents[key])
    other.set_random_state(draws)
    torch.manual_seed(5)
    assert_same(teach(twin, other, 2), expected)
    assert_same(twin.state_dict(), learner.state_dict())
    assert_same(other.rings, replay.rings)
    assert twin.updates == 5 and fresh["updates"] == 0


def test_a_checkpoint_holds_every_part():
    learner, replay = make_learner(1)
    teach(learner, replay, 1)
    state = learner.state_dict()
    names = {name for name, _ in learner.dreamer.named_parameters()}
    assert names <= set(state["dreamer"])
    parts = {".".join(name.split(".")[:2]) for name in state["dreamer"]}
    assert {"behavior.actors", "behavior.critic", "behavior.slow_critic"} <= parts
    assert {"behavior.scale", "probe.decoder", "world.rssm", "world.encoder"} <= parts
    owned = [
        id(param)
        for optimizer in learner.optimizers.values()
        for group in optimizer.param_groups
        for param in group["params"]
    ]
    trained = {id(param) for param in learner.dreamer.parameters() if param.requires_grad}
    assert len(owned) == len(set(owned)) and set(owned) == trained
    assert set(state["optimizers"]) == {"model", "behavior", "probe"}


def test_an_update_moves_all_but_the_probe_and_update_probe_only_that():
    learner, replay = make_learner(1)
    dreamer = learner.dreamer
    cases = (learner.update, ("world", "behavior")), (learner.update_probe, "probe")
    for update, moving in cases:
        for _ in range(3):  # heads that start at zero hold back their inputs' gradient
            before = {name: p.detach().clone() for name, p in dreamer.named_parameters()}
            update(replay, 3, 6)
        after = dreamer.named_parameters()
        moved = {name for name, p in after if not torch.equal(p, before[name])}
        assert moved == {name for name in before if name.startswith(moving)}


def test_an_update_refreshes_the_latents_that_it_replayed():
    learner, replay = make_learner(1)
    for update in (learner.update, learner.update_probe):
        before = {key: ring.clone() for key, ring in replay.rings.items()}
        update(replay, 1, 6)
        changed = {key: replay.rings[key] != before[key] for key in before}
        assert changed["deter"].any(-1).sum() == 6 and changed["stoch"].any()
        assert {key for key in changed if changed[key].any()} == set(LATENTS)
