"""Where settings of the networks, the behaviour and the optimisers arrive, and what the metrics of
an update are made of."""

import copy
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.distributions import Categorical, kl_divergence

from build import check_values, make_dreamer, make_env
from config import load_config
from layers import BlockLinear, RMSNorm, StackedLinear
from learner import Learner
from models import lambda_return
from recorder import Recorder

ROOT = Path(__file__).parent.parent
VECTORS, IMAGES = "vmas_vector debug", "vmas debug"
LOSSES = ("vector", "embed", "image", "next_vector", "mean_vector", "reward", "cont")
LOSSES += ("dyn", "rep", "actor", "value", "repval")
# No value is a default or stands twice: each can be told from all others.
SETTINGS = {
    "scenario": {"n_agents": 5},
    **{"envs": 12, "dataset_size": 600, "batch_size": 10, "batch_length": 11, "image_size": 32},
    "recency": 1.5,
    **{"units": 20, "layers": 4, "head_layers": 3, "cnn_depth": 13, "cnn_points": 7},
    "rssm": {"deter": 24, "stoch": 9, "classes": 6, "blocks": 2, "unimix": 0.05, "sharpness": 1.7},
    "loss_scales": {name: 2.25 + index for index, name in enumerate(LOSSES)},
    **{"kl_free": 0.7, "imag_horizon": 14, "imag_starts": 19},
    **{"discount": 0.91, "discount_lambda": 0.83},
    "actor": {"lr": 0.003, "entropy": 0.004, "min_std": 0.15, "max_std": 0.9, "unimix": 0.06},
    "critic": {"lr": 0.005, "slow_rate": 0.03},
    "model": {"lr": 0.007, "agc": 0.4, "warmup": 30, "decay": 45},
    "behavior": {"agc": 0.5, "warmup": 50},
    "probe": {"envs": 8, "dataset_size": 160, "batch_size": 16, "every": 18}
    | {"depth": 17, "lr": 0.009, "warmup": 60},
}


def flags(settings: dict, prefix: str = "--") -> Iterator[str]:
    for key, value in settings.items():
        if isinstance(value, dict):
            yield from flags(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}={value}"


def build(presets: str = VECTORS, **changes) -> SimpleNamespace:
    """What dreamer.py makes of the settings above, of which `changes` replaces some."""
    argv = ["--configs", *presets.split(), "--logdir=none", *flags(SETTINGS | changes)]
    config = load_config(argv, ROOT / "configs.yaml")
    check_values(config)
    env = make_env(config, torch.device("cpu"), config.envs, config.seed, training=True)
    learner = Learner(config, make_dreamer(config, env))
    return SimpleNamespace(config=config, env=env, learner=learner, dreamer=learner.dreamer)


def test_the_settings_here_are_complete_and_can_be_told_apart():
    defaults = load_config(["--logdir", "none"], ROOT / "configs.yaml").as_dict()
    for group in ("rssm", "loss_scales", "actor", "critic", "model", "behavior", "probe"):
        assert SETTINGS[group].keys() == defaults[group].keys()
    assert not set(flags(SETTINGS)) & set(flags(defaults))
    values = [flag.partition("=")[2] for flag in flags(SETTINGS)]
    assert len(set(values)) == len(values)


@pytest.mark.parametrize(("reward", "gradient"), [("sum", "dynamics"), ("agent", "reinforce")])
def test_settings_of_losses_and_returns_arrive(reward, gradient):
    dreamer = build(reward=reward, imag_gradient=gradient).dreamer
    world, behavior = dreamer.world, dreamer.behavior
    assert (behavior.horizon, behavior.starts, behavior.imag_gradient) == (14, 19, gradient)
    assert (behavior.discount, behavior.lam) == (0.91, 0.83)
    assert (behavior.entropy, behavior.slow_rate, world.kl_free) == (0.004, 0.03, 0.7)
    assert dreamer.reward == reward and dreamer.loss_scales == SETTINGS["loss_scales"]
    assert dreamer.reward_scale is None and build(reward_norm=True).dreamer.reward_scale is not None
    shapes = {world.reward.shape, behavior.critic.shape, behavior.scale.low.shape}
    assert shapes == {(5,) if reward == "agent" else (1,)}


def test_settings_of_the_optimisers_arrive():
    built = build()
    behavior, constant = built.dreamer.behavior, SETTINGS["behavior"] | {"decay": 0}
    actors, critic = constant | {"lr": 0.003}, constant | {"lr": 0.005}
    expected = {
        "model": [(built.dreamer.world, SETTINGS["model"])],
        "behavior": [(behavior.actors, actors), (behavior.critic, critic)],
        "probe": [(built.dreamer.probe, {"lr": 0.009, "warmup": 60, "decay": 0})],
    }
    assert built.learner.optimizers.keys() == expected.keys()
    for name, parts in expected.items():
        groups = built.learner.optimizers[name].param_groups
        for group, (part, settings) in zip(groups, parts, strict=True):
            assert {key: group[key] for key in settings} == settings, name
            assert set(group["params"]) == set(part.parameters()), name


def test_sizes_of_batches_and_of_the_replay_arrive(tmp_path):
    built = build()
    recorder, learner = Recorder(built.config, built.env, tmp_path), built.learner
    recorder.folder.close()
    sizes = [ring.rings["reward"].shape for ring in (recorder.replay, recorder.pictures)]
    assert sizes == [(600 // 12, 12, 5), (160 // 8, 8, 5)]
    assert recorder.replay.recency == recorder.pictures.recency == 1.5
    assert (learner.batch, learner.length) == (10, 11)
    assert (learner.probe.batch_size, learner.probe.every) == (16, 18)


def test_actors_draw_as_widely_as_told():
    dreamer = build().dreamer
    for bias, bound in ((-1e3, 0.15), (1e3, 0.9)):
        dreamer.behavior.actors.body[-1].bias.data.fill_(bias)
        policy = dreamer.behavior.actors(torch.zeros(1, dreamer.world.feat))
        assert torch.allclose(policy.normal.stddev, torch.full((1, 5, 2), bound))
    dreamer = build(discrete=True).dreamer
    dreamer.behavior.actors.body[-1].bias.data[..., 0] = 1e3
    policy = dreamer.behavior.actors(torch.zeros(1, dreamer.world.feat))
    assert torch.allclose(policy.probs[..., 1:], torch.full((1, 5, 8), 0.06 / 9))


def test_the_state_is_as_large_mixed_and_sharp_as_told():
    world = build().dreamer.world
    rssm, seen = world.rssm, sum(world.widths)
    deter, stoch, vectors = rssm.initial(3)
    assert deter.shape == (3, 24) and stoch.shape == (3, 9, 6) and vectors.shape == (3, seen)
    assert rssm.core_own.weight.shape == (2, 12, 12) and rssm.gates.weight.shape == (2, 12, 36)
    memory = torch.randn(3, 24)
    expected = 0.95 * (1.7 * rssm.prior_head(memory)).softmax(-1) + 0.05 / 6
    assert torch.allclose(rssm.prior(memory).exp(), expected, atol=1e-6)


@pytest.mark.parametrize("presets", [VECTORS, IMAGES])
def test_layers_are_as_wide_as_told(presets):
    dreamer = build(presets).dreamer
    world, critic, rssm = dreamer.world, dreamer.behavior.critic, dreamer.world.rssm
    heads = (world.cont, world.decoder.mlp, world.reward.head, critic.head, rssm.prior_head)
    widths = {head.out.in_features for head in (*heads, dreamer.probe.decoder.places)}
    layers = (rssm.from_deter[0], rssm.post_deter, critic.joint, dreamer.behavior.actors.joint)
    read = world.encoder.mlp if presets == VECTORS else world.encoder.cnn.mlp
    widths |= {layer.out_features for layer in (*layers, *read) if hasattr(layer, "out_features")}
    assert widths == {20}


def depth(part: nn.Module) -> tuple[int, int]:
    """How many layers with weights it has, and how many norms."""
    weighty = (nn.Linear, StackedLinear, BlockLinear, nn.Conv2d, nn.ConvTranspose2d)
    found = list(part.modules())
    return tuple(sum(isinstance(m, kinds) for m in found) for kinds in (weighty, RMSNorm))


@pytest.mark.parametrize("norm", [False, True])
def test_parts_have_as_many_layers_and_norms_as_told(norm):
    """With `layers` 4 and `head_layers` 3; a view of vectors has three layers and one norm."""
    dreamer = build(norm=norm).dreamer
    world, behavior = dreamer.world, dreamer.behavior
    assert depth(world.encoder) == (4, 4 * norm)
    assert depth(world.decoder) == (4 + 1, 4 * norm)
    assert depth(world.rssm) == (3 + 3 + 3 + 3, 7 * norm)  # inputs, core, prior, posterior
    assert depth(world.reward) == (3 + 3 + 1, (1 + 3) * norm)
    assert depth(world.cont) == (3 + 1, 3 * norm)
    assert depth(behavior.critic) == depth(behavior.slow_critic) == (3 + 4 + 1, 1 + 4)
    assert depth(behavior.actors) == (3 + 5 + 1, 1 + 4)  # the first of the 4 is in two parts


def channels(part: nn.Module) -> list[int]:
    """What comes out of each convolution to half the size, or goes into one to twice the size."""
    kinds = nn.Conv2d | nn.ConvTranspose2d
    return [m.weight.shape[0] for m in part.modules() if isinstance(m, kinds)]


@pytest.mark.parametrize("norm", [False, True])
def test_networks_of_images_are_as_told(norm):
    marks = build(IMAGES, norm=norm).dreamer
    plain = build(IMAGES, norm=norm, cnn_points=0).dreamer
    drawing = build(IMAGES, norm=norm, cnn_points=0, predict_keys="image").dreamer
    seen, drawn = [13 * n for n in (2, 3, 4, 4)], (4, 4, 3, 2)
    for part, depths, widths in (
        (marks.world.encoder, (2 + 4, 4 * norm), [2 * 13, 7]),
        (marks.probe, (3 + 2, 0), [7, 2 * 17]),
        (plain.world.encoder, (4, 4 * norm), seen),
        (plain.probe, (1 + 4, 4), [17 * n for n in drawn]),
        (drawing.world.decoder, (1 + 4, 4 * norm), [13 * n for n in drawn]),
    ):
        assert (depth(part), channels(part)) == (depths, widths)
    feat = torch.zeros(1, marks.world.feat)
    assert {marks.probe(feat).shape, plain.probe(feat).shape} == {(1, 32, 32, 3)}


def beliefs(world, batch):
    """Posterior and prior, and the divergence (B, T) between them by torch."""
    (deter, *_), post = world.infer(batch, world.encoder(batch))
    post, prior = (Categorical(logits=belief) for belief in (post, world.rssm.prior(deter)))
    return post, prior, kl_divergence(post, prior).sum(-1)


def test_both_halves_of_the_kl_have_free_nats_and_its_metric_has_none(make_world, make_batch):
    world = make_world(norm=True)
    batch = make_batch(world)
    torch.manual_seed(1)
    kl = beliefs(world, batch)[2].detach()
    free = kl.median().item()
    assert (kl < free - 0.01).any() and (kl > free + 0.01).any()
    generous = make_world(kl_free=free, norm=True)
    generous.load_state_dict(world.state_dict())
    torch.manual_seed(1)
    losses, *_, metrics = generous.loss(batch, batch["reward"].mean(-1, keepdim=True))
    for name in ("dyn", "rep"):
        assert torch.allclose(losses[name], kl.clamp(min=free), atol=1e-5), name
    assert metrics["kl"].item() == pytest.approx(kl.mean().item(), abs=1e-5)


@pytest.mark.parametrize(("reward", "gradient"), [("mean", "dynamics"), ("agent", "reinforce")])
def test_metrics_against_brute_force(make_batch, awaken, reward, gradient):
    changes = {"reward": reward, "imag_gradient": gradient, "imag_starts": 0}
    dreamer = build(scenario={"n_agents": 2}, **changes).dreamer
    world, behavior = dreamer.world, dreamer.behavior
    for head in (world.reward, behavior.critic):
        awaken(head.head)
    nn.init.normal_(behavior.actors.body[-1].weight)  # or all entropies would be alike
    behavior.scale.low -= 2.0 + torch.arange(len(behavior.scale.low))  # of each reward its own
    behavior.scale.high.fill_(3.0)
    scale = copy.deepcopy(behavior.scale)
    batch = make_batch(world, **{f"agent{i}": (width,) for i, width in enumerate(world.widths)})
    torch.manual_seed(1)
    _, state, metrics = dreamer.losses(batch)
    torch.manual_seed(1)
    with torch.no_grad():
        post, prior, kl = beliefs(world, batch)
        feat, action, _ = behavior.imagine(world, tuple(part.flatten(0, 1) for part in state))
        rewards, cont = world.foresee(feat, action)
        values, first = behavior.critic(feat).mean, (0, 0, 1, 0)
        discount = F.pad(0.91 * cont.unsqueeze(-1), first).expand_as(values)
        returns = lambda_return(F.pad(rewards, first), values, discount, 0.83)
        entropy = behavior.actors(feat[:, :-1]).entropy()
    expected = {
        "kl": kl,
        "prior_ent": prior.entropy().sum(-1),
        "post_ent": post.entropy().sum(-1),
        "imag_reward": rewards,
        "imag_return": returns,
        "value_mean": values,
        "return_scale": scale.update(returns),
        "actor_entropy": entropy,
        **{f"agent{i}_actor_entropy": entropy[..., i] for i in range(2)},
        "action_saturation": ((action < -1) | (action > 1)).float(),
    }
    assert metrics["return_scale"] > 1  # above its limit
    for name, value in expected.items():
        assert metrics[name].item() == pytest.approx(value.mean().item(), rel=1e-4), name
