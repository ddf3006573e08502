"""How each side of a team with opposed agents fares against random play.

    python -m benchmarks.sides --logdir ./logdir/tag --side 0 1 2 --side 3

Returns of both sides as they learned against each other say which is ahead, not whether either
learned. Here the agents of one side act by their modes, and all others at random; then all act, and
none. Prints a table of the agents' mean returns over whole episodes.
"""

import argparse
import sys
from pathlib import Path

import torch

from build import make_dreamer, make_env
from checkpoint import Checkpoints
from config import load_config
from dreamer import EVAL_SEED
from envs.scenarios import ScenarioError
from learner import Learner
from rollout import play_episodes
from tools import UserError

ROOT = Path(__file__).parent.parent


def main(argv: list[str]) -> None:
    """Load the run, and play every side. Raises `UserError` and `ScenarioError`."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--logdir", required=True)
    parser.add_argument("--side", type=int, nargs="+", action="append", help="agents, from 0")
    parser.add_argument("--episodes", type=int, default=256)
    args = parser.parse_args(argv)
    torch.set_num_threads(1)
    flags = ["--logdir", args.logdir, "--eval_only", "true"]
    saved = Path(args.logdir) / "config.yaml"
    config = load_config(flags, ROOT / "configs.yaml", saved=saved)
    device = torch.device("cpu")
    copies = min(config.eval_envs, args.episodes)
    env = make_env(config, device, copies, EVAL_SEED + config.seed)
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
        others = [agent for agent in everyone if agent not in acting]
        returns = play_episodes(env, learner.dreamer, args.episodes, at_random=others).returns
        names = ", ".join(map(str, acting)) or "none"
        print(f"| {names} |", " | ".join(f"{value:.1f}" for value in returns.mean(0).tolist()), "|")


if __name__ == "__main__":
    try:
        main(sys.argv[1:])
    except (UserError, ScenarioError) as error:
        print(f"sides.py: {error}", file=sys.stderr)
        sys.exit(2)
