"""A trained team and its task, as `latest.pt` of a run holds them."""

from pathlib import Path

import torch

from build import make_dreamer, make_env
from checkpoint import Checkpoints
from config import Config, load_config
from dreamer import EVAL_SEED
from envs import Environment
from learner import Learner
from models import Dreamer
from tools import UserError

SETTINGS = Path(__file__).resolve().parent.parent / "configs.yaml"


def load_team(logdir: str, copies: int = 0) -> tuple[Config, Environment, Dreamer, int]:
    """Settings, copies of the task (by default `eval_envs`), team, steps that it has trained.

    Scenes and draws are those of the run's seed, and no scenes of training. Raises `UserError`
    where there is nothing to load.
    """
    torch.set_num_threads(1)
    flags = ["--logdir", logdir, "--eval_only", "true"]
    config = load_config(flags, SETTINGS, saved=Path(logdir) / "config.yaml")
    device = torch.device("cpu")
    env = make_env(config, device, copies or config.eval_envs, EVAL_SEED + config.seed)
    if not (state := Checkpoints(Path(logdir)).load(device)):
        raise UserError(f"--logdir {logdir}: there is no latest.pt to play")
    learner = Learner(config, make_dreamer(config, env))
    learner.load_weights(state, logdir)
    torch.manual_seed(config.seed)
    return config, env, learner.dreamer, state["step"]
