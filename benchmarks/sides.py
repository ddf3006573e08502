"""How each side of a team with opposed agents fares against random play.

    python -m benchmarks.sides --logdir ./logdir/tag --side 0 1 2 --side 3

Returns of both sides as they learned against each other say which is ahead, not whether either
learned. Here the agents of one side act by their modes, and all others at random; then all act, and
none. Prints a table of the agents' mean returns over whole episodes of one length.
"""

import argparse
import sys
from pathlib import Path

import torch
from torch import Tensor

from build import make_dreamer, make_env
from checkpoint import Checkpoints
from config import load_config
from dreamer import EVAL_SEED
from envs.vmas import Vmas
from learner import Learner
from models import Dreamer
from rollout import Player, Tally
from tools import UserError

ROOT = Path(__file__).parent.parent


def play_side(env: Vmas, dreamer: Dreamer, acting: list[int], steps: int) -> Tensor:
    """Mean returns (N,) of `steps` steps in each copy, where agents not `acting` play at random."""
    player = Player(env, dreamer, explore=False)
    tally = Tally(env.num_envs, env.n_agents, env.device)
    random = torch.ones(env.n_agents, dtype=torch.bool, device=env.device)
    random[acting] = False
    for _ in range(steps + 1):
        tally.add(player.step())
        # The model is told what was really done: the next row comes with this action.
        player.action = torch.where(random[:, None], env.random_action(), player.action)
    return tally.take()[0].mean(0)


def main(argv: list[str]) -> None:
    """Load the run, and play every side. Raises `UserError`."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--logdir", required=True)
    parser.add_argument("--side", type=int, nargs="+", action="append", help="agents, from 0")
    parser.add_argument("--episodes", type=int, default=256)
    args = parser.parse_args(argv)
    torch.set_num_threads(1)
    flags, saved = ["--logdir", args.logdir], Path(args.logdir) / "config.yaml"
    config = load_config(flags, ROOT / "configs.yaml", saved=saved)
    device = torch.device("cpu")
    env = make_env(config, device, args.episodes, EVAL_SEED + config.seed)
    everyone, sides = list(range(env.n_agents)), args.side or []
    if unknown := sorted({agent for side in sides for agent in side} - set(everyone)):
        raise UserError(f"--side {unknown[0]}: expected agents from 0 to {everyone[-1]}")
    if not (state := Checkpoints(Path(args.logdir)).load(device)):
        raise UserError(f"--logdir {args.logdir}: there is no latest.pt to play")
    learner = Learner(config, make_dreamer(config, env))
    learner.load_weights(state, args.logdir)
    print(f"{args.episodes} episodes, after {state['step']:,} steps of training")
    print("| agents that act |", " | ".join(f"agent{i}" for i in range(env.n_agents)), "|")
    print("|---" * (env.n_agents + 1) + "|")
    for acting in [[], *sides, everyone]:
        torch.manual_seed(config.seed)
        returns = play_side(env, learner.dreamer, acting, config.time_limit)
        names = ", ".join(map(str, acting)) or "none"
        print(f"| {names} |", " | ".join(f"{value:.1f}" for value in returns.tolist()), "|")


if __name__ == "__main__":
    try:
        main(sys.argv[1:])
    except UserError as error:
        print(f"sides.py: {error}", file=sys.stderr)
        sys.exit(2)
