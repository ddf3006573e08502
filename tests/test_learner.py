"""A step of training in either precision."""

import copy
from pathlib import Path

import pytest
import torch
from torch import Tensor

import latents
from config import load_config
from learner import Learner
from models import Dreamer
from replay import Replay

ROOT = Path(__file__).parent.parent


def make_learner(dreamer: Dreamer, precision: str) -> Learner:
    flags = ["--logdir", "none", "--precision", precision]
    flags += ["--imag_gradient", dreamer.behavior.imag_gradient]
    return Learner(load_config(flags, ROOT / "configs.yaml"), copy.deepcopy(dreamer))


@pytest.fixture
def make_dreamer(make_world, make_behavior):
    def make(gradient: str, norm: bool) -> Dreamer:
        sizes = {"units": 64, "deter": 64, "stoch": 8, "classes": 8, "norm": norm}
        world = make_world(**sizes)
        behavior = make_behavior(world.feat, units=64, imag_gradient=gradient)
        scales = load_config(["--logdir", "none"], ROOT / "configs.yaml").loss_scales
        return Dreamer(world, behavior, None, "mean", scales.as_dict())

    return make


@pytest.fixture
def replay(make_world, make_batch):
    """Rows of 8 copies for `make_dreamer`'s world."""
    world = make_world(deter=64, stoch=8, classes=8)
    batch = make_batch(world, batch=8, time=40)
    batch |= {
        key: value.unsqueeze(1).repeat(1, 40, *[1] * (value.ndim - 1))
        for key, value in batch.pop("initial").items()
    }
    spaces = {key: (tuple(value.shape[2:]), value.dtype) for key, value in batch.items()}
    replay = Replay(8 * 40, 8, spaces, latents=latents.LATENTS)
    for t in range(40):
        replay.add({key: value[:, t] for key, value in batch.items()})
    return replay


def updates(learner: Learner, replay: Replay, count: int) -> tuple[list[dict], dict[str, Tensor]]:
    """Metrics of some updates, and all gradients of the first one."""
    metrics = []
    replay = copy.deepcopy(replay)  # which refreshed states will be written to
    torch.manual_seed(0)
    for _ in range(count):
        metrics.append(learner.update(replay, 16, 16))
        if len(metrics) == 1:
            named = learner.dreamer.named_parameters()
            first = {name: p.grad.flatten().clone() for name, p in named if p.grad is not None}
    return metrics, first


@pytest.mark.parametrize(
    ("gradient", "norm"), [("dynamics", True), ("dynamics", False), ("reinforce", False)]
)
def test_bfloat16_learns_as_float32_does(make_dreamer, replay, gradient, norm, monkeypatch):
    # A code near a boundary falls on its other side by the least rounding: leave out the drawing.
    monkeypatch.setattr(latents, "sample_one_hot", torch.exp)
    dreamer = make_dreamer(gradient, norm)
    exact, rough = (
        updates(make_learner(dreamer, precision), replay, 20)
        for precision in ("float32", "bfloat16")
    )
    for part in ("world.", "behavior.actors.", "behavior.critic."):
        before, after = (
            torch.cat([grad for name, grad in run[1].items() if name.startswith(part)])
            for run in (exact, rough)
        )
        assert torch.cosine_similarity(before, after, dim=0) > 0.99
        assert not torch.equal(before, after)
    for name in (name for name in exact[0][0] if name.endswith(("_loss", "_norm"))):
        before, after = (
            torch.stack([metrics[name] for metrics in run[0]]) for run in (exact, rough)
        )
        if name.endswith("_loss"):
            torch.testing.assert_close(after, before, rtol=0.05, atol=0.03)
        else:  # which leap in the first updates, where norms follow layers that began at zero
            assert (after - before).norm() < 0.03 * before.norm(), name
