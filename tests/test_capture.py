"""CUDA graphs, and compiled steps, do what the functions do that they were made from."""

import copy
from functools import partial
from pathlib import Path

import pytest
import torch
from torch import Tensor

import latents
from build import make_dreamer, make_env, row_spaces
from capture import Captured, captured
from config import Config, load_config
from distributions import BoundedNormal
from latents import LATENTS
from learner import Learner
from models import Dreamer
from replay import Replay
from rollout import Player

ROOT = Path(__file__).parent.parent
needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")


def test_on_a_cpu_a_captured_function_is_the_function():
    calls = []
    act = captured(lambda x: calls.append(x) or {"twice": 2 * x}, wanted=True)
    for number in range(6):
        assert act(torch.tensor(float(number)))["twice"] == 2 * number
    assert len(calls) == 6


@needs_gpu
def test_a_graph_reads_what_it_is_given_and_changes_things_in_place():
    total, calls, drawn, expected = torch.zeros((), device="cuda"), [], set(), 0.0

    def add(data: dict, pair: tuple) -> tuple:
        calls.append(1)
        total.add_(data["x"].sum())
        return total.clone(), {"y": data["x"] + pair[0], "noise": torch.rand(4, device="cuda")}

    graph = Captured(add)
    for number in range(9):
        x = torch.full((3,), float(number), device="cuda")
        now, more = graph({"x": x}, (10 * x, x))
        expected += 3 * number
        drawn.add(tuple(more["noise"].tolist()))
        assert now == expected and (more["y"] == 11 * number).all()
        more["y"] = None  # the dict is the caller's
    assert len(calls) == Captured.WARMUP + 1
    assert len(drawn) == 9
    x = torch.ones(5, device="cuda")
    now, _ = graph({"x": x}, (x, x))  # another shape
    assert now == expected + 5 and len(calls) == Captured.WARMUP + 2


@pytest.fixture
def exact(monkeypatch):
    """Convolutions in full precision, and always the same."""
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)
    monkeypatch.setattr(torch.backends.cudnn, "deterministic", True)


@needs_gpu
@pytest.mark.parametrize("sees", ["vmas_vector", "vmas"])
@pytest.mark.parametrize(
    "flags", [[], ["--imag_gradient", "reinforce"], ["--reward", "agent"], ["--discrete", "true"]]
)
def test_captured_updates_are_the_plain_ones(exact, sees, flags):
    """The same losses over 20 updates, and the same weights and gradients after them."""
    compare(sees, flags, ["--capture", "false"], ["--capture", "true"])


@needs_gpu
@pytest.mark.parametrize("sees", ["vmas_vector", "vmas"])
def test_compiled_updates_are_the_plain_ones(exact, sees, monkeypatch):
    # Compiled code draws other numbers: leave out the drawing, but not the gradient of widths.
    monkeypatch.setattr(latents, "sample_one_hot", torch.exp)
    monkeypatch.setattr(BoundedNormal, "sample", lambda self: self.mean + self.normal.scale / 2)
    compare(sees, [], ["--capture", "false"], ["--capture", "true", "--compile", "true"])


def compare(sees: str, flags: list[str], *kinds: list[str]) -> None:
    """Train the same networks in two ways."""
    plain, fast = (settings(sees, flags + kind) for kind in kinds)
    dreamer, replay = make_team(plain)
    expected, found = (train(config, dreamer, replay) for config in (plain, fast))
    for name, series in expected.items():
        error = (found[name] - series).norm() / series.norm().clamp(min=1e-6)
        assert error < 0.01, f"{name}: {error}"


@needs_gpu
def test_a_captured_policy_is_the_plain_one():
    config = settings("vmas_vector", [])
    env = make_env(config, torch.device("cuda"), config.envs, seed=0)
    dreamer = make_dreamer(config, env)
    player, act = Player(env, dreamer, True), Captured(partial(dreamer.policy, explore=True))
    for seed in range(8):
        rows, given = player.step(), (player.action, player.state)
        torch.manual_seed(seed)
        action, state = dreamer.policy(rows, *given, explore=True)
        torch.manual_seed(seed)
        torch.testing.assert_close(act(rows, *given), (action, state))


def settings(sees: str, flags: list[str]) -> Config:
    flags = ["--logdir", "none", "--envs", "32", "--batch_size", "16", *flags]
    return load_config(["--configs", sees, "debug", *flags], ROOT / "configs.yaml")


def make_team(config: Config) -> tuple[Dreamer, Replay]:
    """Networks on a GPU and a replay with images, of random play."""
    env = make_env(config, torch.device("cuda"), config.envs, seed=0)
    torch.manual_seed(0)
    dreamer, rows = make_dreamer(config, env), 60
    spaces = row_spaces(config, env, image=True)
    replay = Replay(rows * config.envs, config.envs, spaces, "cuda", 0, LATENTS)
    player = Player(env, dreamer, explore=True)
    for _ in range(rows):
        replay.add(player.step(random=True) | {"image": env.render(config.image_size)})
    return dreamer, replay


def train(config: Config, dreamer: Dreamer, replay: Replay) -> dict[str, Tensor]:
    """Metrics of 20 updates, how far weights have gone then, and the last gradients, by name."""
    before = dict(dreamer.named_parameters())
    dreamer, replay = copy.deepcopy(dreamer), copy.deepcopy(replay)
    torch.manual_seed(0)
    learner, series = Learner(config, dreamer), []
    for number in range(20):
        metrics = learner.update(replay, config.batch_size, config.batch_length)
        if number % 4 == 0:
            metrics |= learner.update_probe(replay, 4, config.batch_length)
        series.append({name: value.clone() for name, value in metrics.items()})
    found = {
        name: torch.stack([metrics[name] for metrics in series if name in metrics])
        for name in series[0]
    }
    for name, parameter in dreamer.named_parameters():
        found[name] = parameter.detach() - before[name].detach()
        if parameter.grad is not None:
            found[f"gradient of {name}"] = parameter.grad.clone()
    return found
