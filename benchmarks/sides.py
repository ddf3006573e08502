"""How each side of a team with opposed agents fares against random play.

    python -m benchmarks.sides --logdir ./logdir/tag --side 0 1 2 --side 3

Returns of both sides as they learned against each other say which is ahead, not whether either
learned. Here the agents of one side act by their modes, and all others at random; then all act, and
none. Prints a table of the agents' mean returns over whole episodes.
"""

import argparse
import sys

import torch

from benchmarks.teams import load_team
from envs.scenarios import ScenarioError
from rollout import play_episodes
from tools import UserError


def main(argv: list[str]) -> None:
    """Load the run, and play every side. Raises `UserError` and `ScenarioError`."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--logdir", required=True)
    parser.add_argument("--side", type=int, nargs="+", action="append", help="agents, from 0")
    parser.add_argument("--episodes", type=int, default=256)
    args = parser.parse_args(argv)
    config, env, dreamer, step = load_team(args.logdir, "--eval_episode_num", str(args.episodes))
    everyone, sides = list(range(env.n_agents)), args.side or []
    if unknown := sorted({agent for side in sides for agent in side} - set(everyone)):
        raise UserError(f"--side {unknown[0]}: expected agents from 0 to {everyone[-1]}")
    print(f"{args.episodes} episodes, after {step:,} steps of training")
    print("| agents that act |", " | ".join(f"agent{i}" for i in range(env.n_agents)), "|")
    print("|---" * (env.n_agents + 1) + "|")
    for acting in [[], *sides, everyone]:
        torch.manual_seed(config.seed)
        others = [agent for agent in everyone if agent not in acting]
        returns = play_episodes(env, dreamer, args.episodes, at_random=others).returns
        names = ", ".join(map(str, acting)) or "none"
        print(f"| {names} |", " | ".join(f"{value:.1f}" for value in returns.mean(0).tolist()), "|")


if __name__ == "__main__":
    try:
        main(sys.argv[1:])
    except (UserError, ScenarioError) as error:
        print(f"sides.py: {error}", file=sys.stderr)
        sys.exit(2)
