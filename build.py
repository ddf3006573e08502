"""From the configuration to the environment and the networks, and what settings may be."""

import math
import re
from collections.abc import Sequence
from operator import attrgetter

import torch

from config import Config
from envs import Environment
from envs.scenarios import scenario_names
from envs.vmas import Vmas, opposed_agents
from models import Dreamer, ImagBehavior, ImageProbe, WorldModel
from tools import UserError

# What a trained team cannot be played without, as its networks are made for that.
NETWORKS = (
    *("task", "discrete", "reward", "reward_norm"),
    *("image_size", "mlp_keys", "cnn_keys", "predict_keys"),
    *("units", "layers", "head_layers", "norm", "cnn_depth", "cnn_points"),
    *("rssm", "probe.depth"),
)
# What must not change between a run and its resumption.
FIXED = (*NETWORKS, "scenario", "image_shades", "time_limit", "action_repeat")
# What must not change either, if the episodes under way and the replay are to be taken up.
EXACT = (
    *FIXED,
    *("envs", "train_restart", "dataset_size", "offline_traindir"),
    *("probe.envs", "probe.dataset_size"),
)
_CHOICES = {
    "reward": ("mean", "sum", "agent"),
    "imag_gradient": ("dynamics", "reinforce"),
    "precision": ("float32", "tf32", "bfloat16"),
}
_LEAST = {  # the least value of a setting, by its path
    0: (
        *("threads", "train_restart", "prefill", "train_ratio", "cnn_points", "imag_starts"),
        *("kl_free", "rssm.classes", "rssm.sharpness", "probe.envs", "actor.entropy"),
        *("model.lr", "model.warmup", "model.decay", "behavior.warmup", "probe.warmup"),
        *("actor.lr", "critic.lr", "probe.lr"),
    ),
    1: (
        *("steps", "envs", "time_limit", "action_repeat", "log_every", "eval_every", "save_every"),
        *("eval_episode_num", "eval_envs", "dataset_size", "batch_size", "recency"),
        *("imag_horizon", "units", "layers", "head_layers", "cnn_depth"),
        *("rssm.deter", "rssm.stoch", "rssm.blocks"),
        *("probe.batch_size", "probe.every", "probe.depth", "probe.dataset_size"),
    ),
    2: ("batch_length",),
}
_POSITIVE = ("model.agc", "behavior.agc", "actor.min_std")
_SHARES = ("discount", "discount_lambda", "rssm.unimix", "actor.unimix", "critic.slow_rate")
_TOTALS = ("envs", "batch_size", "imag_starts")  # of all ranks
_SEEDS = 10_000  # between two ranks' seeds


def check_values(config: Config) -> None:
    """Raise `UserError` for a value that no run can be built from."""
    for key, choices in _CHOICES.items():
        if getattr(config, key) not in choices:
            raise UserError(f"--{key} {getattr(config, key)}: expected {' or '.join(choices)}")
    _check_ranges(config)
    for key in ("mlp_keys", "cnn_keys", "predict_keys"):
        try:
            re.compile(getattr(config, key))
        except re.error as error:
            raise UserError(f"--{key} {getattr(config, key)}: {error}") from error
    if config.train_restart > config.time_limit:
        limit = f"time_limit, {config.time_limit}"
        raise UserError(f"--train_restart {config.train_restart}: expected at most {limit}")
    rssm = config.rssm
    if rssm.deter % rssm.blocks:
        raise UserError(f"--rssm.deter {rssm.deter}: expected a multiple of blocks, {rssm.blocks}")
    if rssm.classes and not 2 <= rssm.classes <= 256:
        raise UserError(f"--rssm.classes {rssm.classes}: expected 2 to 256, or 0 for normals")
    if config.image_size < 16 or config.image_size % 16:
        raise UserError(f"--image_size {config.image_size}: expected a multiple of 16")
    drawn = min(config.probe.envs, config.envs)
    for key, copies in (("dataset_size", config.envs), ("probe.dataset_size", drawn)):
        least = copies * (config.batch_length + 1)
        if (value := attrgetter(key)(config)) < least:
            why = f"batch_length + 1 rows of {copies} copies"
            raise UserError(f"--{key} {value}: expected {least} or more, {why}")


def _check_ranges(config: Config) -> None:
    """Raise `UserError` for a number that is too small, too large or not finite."""
    scales = tuple(f"loss_scales.{name}" for name in config.loss_scales.as_dict())
    for least, keys in (_LEAST | {0: _LEAST[0] + scales}).items():
        for key in keys:
            if not (value := attrgetter(key)(config)) >= least:
                raise UserError(f"--{key} {value}: expected {least} or more")
            if value == math.inf:
                raise UserError(f"--{key} {value}: expected a finite number")
    for key in _POSITIVE:
        if not 0 < (value := attrgetter(key)(config)) < math.inf:
            raise UserError(f"--{key} {value}: expected a finite number above 0")
    if not 0 <= config.seed < 2**32:
        raise UserError(f"--seed {config.seed}: expected 0 to {2**32 - 1}")
    if not config.actor.max_std >= config.actor.min_std:
        least = f"min_std, {config.actor.min_std}, or more"
        raise UserError(f"--actor.max_std {config.actor.max_std}: expected {least}")
    for key in _SHARES:
        if not 0 <= (value := attrgetter(key)(config)) <= 1:
            raise UserError(f"--{key} {value}: expected 0 to 1")


def share(config: Config, rank: int, ranks: int) -> Config:
    """One rank's part of the settings: its part of the totals, and a seed of its own."""
    values = config.as_dict()
    for key in _TOTALS:
        if values[key] % ranks:
            raise UserError(f"--{key} {values[key]}: expected a multiple of the {ranks} ranks")
        values[key] //= ranks
    values["dataset_size"] //= ranks
    values["seed"] += _SEEDS * rank
    return Config(values)


def set_up_torch(config: Config) -> None:
    """Settings of the whole process: threads, and how exact a GPU's products are."""
    if config.threads:
        torch.set_num_threads(config.threads)
    for products in (torch.backends.cuda.matmul, torch.backends.cudnn):
        products.allow_tf32 = config.precision == "tf32"


def check_reward(config: Config) -> None:
    """Raise `UserError` if a team's reward would be made of rewards that are opposed.

    Measured in a small copy of the task, which leaves every random state as it was.
    """
    if config.reward == "agent" or config.force_reward:
        return
    calm = Config(config.as_dict() | {"cnn_keys": "^$", "time_limit": 10**6})
    env = make_env(calm, torch.device("cpu"), 64, config.seed)
    if pair := opposed_agents(env):
        one, other = (f"agent{index}" for index in pair)
        raise UserError(
            f"--reward {config.reward}: what pays {one} costs {other} in {config.task}; expected "
            "--reward agent, or --force_reward true to learn from such a reward all the same"
        )


def make_env(
    config: Config, device: torch.device, num_envs: int, seed: int, training: bool = False
) -> Environment:
    """The task in `num_envs` copies; with images in its rows only if the world model sees them.

    For `training`, episodes end early as `train_restart` says.
    """
    suite, _, scenario = config.task.partition("_")
    if suite != "vmas" or not scenario:
        hint = f", such as vmas_{config.task}" if config.task in scenario_names() else ""
        raise UserError(f"--task {config.task}: expected vmas_ and the name of a scenario{hint}")
    return Vmas(
        scenario,
        num_envs,
        device,
        seed,
        image_size=config.image_size if re.fullmatch(config.cnn_keys, "image") else None,
        time_limit=config.time_limit,
        action_repeat=config.action_repeat,
        discrete=config.discrete,
        scenario_args=config.scenario.as_dict(),
        restart_from=config.train_restart if training else 0,
        image_shades=config.image_shades,
    )


def make_dreamer(config: Config, env: Environment) -> Dreamer:
    """The networks for this environment, on its device."""
    vectors = _by_agent(env.obs_shapes)
    image = {"image": (env.image_size, env.image_size, 3)} if env.image_size else {}
    seen = _matching(vectors, config.mlp_keys) | image
    if not seen:
        raise UserError("mlp_keys and cnn_keys match nothing: expected 'agent\\d+' or 'image'")
    known = vectors | image
    predicted = _matching(known, config.predict_keys)
    if not predicted:
        raise UserError(f"--predict_keys {config.predict_keys}: matches none of {', '.join(known)}")
    rewards = env.n_agents if config.reward == "agent" else 1
    if 0 < config.imag_starts < rewards and config.imag_gradient == "dynamics":
        least = f"{rewards} or more: each start teaches one agent"
        raise UserError(f"--imag_starts {config.imag_starts}: expected {least}")
    sizes = {"units": config.units, "layers": config.layers}
    world = WorldModel(
        seen,
        (env.n_agents, env.action_width),
        rewards,
        predicted_shapes=predicted,
        obs_parts=_by_agent(env.obs_parts),
        cnn_depth=config.cnn_depth,
        cnn_points=config.cnn_points,
        kl_free=config.kl_free,
        head_layers=config.head_layers,
        norm=config.norm,
        **sizes,
        **config.rssm.as_dict(),
    )
    actor = config.actor
    behavior = ImagBehavior(
        world.feat,
        env.action_sizes,
        env.discrete,
        rewards,
        **sizes,
        min_std=actor.min_std,
        max_std=actor.max_std,
        unimix=actor.unimix,
        horizon=config.imag_horizon,
        starts=config.imag_starts,
        discount=config.discount,
        lam=config.discount_lambda,
        entropy=actor.entropy,
        imag_gradient=config.imag_gradient,
        slow_rate=config.critic.slow_rate,
        parts=world.parts,
    )
    probe = None
    if config.probe.envs and not world.decoder.image:
        size, points = config.image_size, config.cnn_points
        probe = ImageProbe(world.feat, size, config.probe.depth, points, config.units)
    scales = config.loss_scales.as_dict()
    dreamer = Dreamer(world, behavior, probe, config.reward, scales, config.reward_norm)
    return dreamer.to(env.device)


def _by_agent(values: Sequence) -> dict:
    """What there is for each agent, by the key of its vector in rows."""
    return {f"agent{i}": value for i, value in enumerate(values)}


def _matching(shapes: dict[str, tuple], pattern: str) -> dict[str, tuple]:
    return {key: shape for key, shape in shapes.items() if re.fullmatch(pattern, key)}


def row_spaces(config: Config, env: Environment, image: bool) -> dict[str, tuple]:
    """Shape and type of everything that a row of the replay holds."""
    vectors = _by_agent(env.obs_shapes)
    spaces = {key: (shape, torch.float32) for key, shape in vectors.items()}
    if image:
        spaces["image"] = ((config.image_size, config.image_size, 3), torch.uint8)
    spaces["reward"] = ((env.n_agents,), torch.float32)
    spaces |= dict.fromkeys(("is_first", "is_last", "is_terminal"), ((), torch.bool))
    spaces["action"] = ((env.n_agents, env.action_width), torch.float32)
    spaces["deter"] = ((config.rssm.deter,), torch.float16)
    spaces["stoch"] = ((config.rssm.stoch,), torch.uint8 if config.rssm.classes else torch.float16)
    width = sum(shape[0] for shape in _matching(vectors, config.predict_keys).values())
    spaces["vectors"] = ((width,), torch.float16)
    return spaces
