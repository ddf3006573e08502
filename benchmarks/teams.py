"""A trained team and its task, as `latest.pt` of a run holds them."""

from pathlib import Path

import torch

from build import check_values, make_dreamer, make_env
from checkpoint import Checkpoints
from config import Config, load_config
from dreamer import EVAL_SEED
from envs import Environment
from learner import Learner
from models import Dreamer
from tools import UserError

SETTINGS = Path(__file__).resolve().parent.parent / "configs.yaml"


def load_team(logdir: str, *flags: str) -> tuple[Config, Environment, Dreamer, int]:
    """Settings, copies of the task for an evaluation, team, steps that it has trained.

    `flags` are settings over those of the run. Scenes and draws are those of its seed, and no
    scenes of training. Raises `UserError` where there is nothing to load.
    """
    torch.set_num_threads(1)
    flags = ["--logdir", logdir, "--eval_only", "true", *flags]
    config = load_config(flags, SETTINGS, saved=Path(logdir) / "config.yaml")
    check_values(config)
    device, copies = torch.device("cpu"), min(config.eval_envs, config.eval_episode_num)
    env = make_env(config, device, copies, EVAL_SEED + config.seed)
    if not (state := Checkpoints(Path(logdir)).load(device)):
        raise UserError(f"--logdir {logdir}: there is no latest.pt to play")
    learner = Learner(config, make_dreamer(config, env))
    learner.load_weights(state, logdir)
    torch.manual_seed(config.seed)
    return config, env, learner.dreamer, state["step"]
