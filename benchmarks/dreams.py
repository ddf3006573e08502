"""What a trained team imagines, beside what then happens: where do the two part?

    python -m benchmarks.dreams --logdir ./logdir/navigation --after 60

Plays copies of the task up to a step and on, and imagines from there. Prints two tables of
Markdown. By horizon: the rewards as they came, as imagined with the actions that were really
taken (is the model right?), and as imagined with the actors' own (do they act there as they do in
reality?). And by what is exchanged: how differently, beside how much, the actors act on the last
state once its code is drawn from the prior, or its vectors, or two numbers of each agent's, are
those moved there from the state before. Where that is much, they know dreams from reality.
"""

import argparse
import sys
from collections.abc import Callable

import torch
from torch import Tensor

from benchmarks.teams import load_team
from envs.scenarios import ScenarioError
from layers import pairs_of
from models import Dreamer, combine_rewards
from networks import State
from rollout import Player
from tools import UserError

HORIZONS = (1, 5, 10, 15)


def play(player: Player, steps: int) -> tuple[dict[str, Tensor], list[State]]:
    """The next rows, stacked to (B, steps, ...), and what was inferred from each (B, ...)."""
    rows, states = [], []
    for _ in range(steps):
        rows.append(player.step())
        states.append(player.state)
    return {key: torch.stack([row[key] for row in rows], 1) for key in rows[0]}, states


def imagine(dreamer: Dreamer, state: State, act: Callable[[int, Tensor], Tensor]) -> Tensor:
    """Rewards (B, H, R) imagined from a state, with actions that `act` gives for t and features."""
    world, actions = dreamer.world, []
    feats = [world.features(state)]
    for t in range(HORIZONS[-1]):
        actions.append(act(t, feats[-1]))
        state = world.img_step(state, actions[-1])
        feats.append(world.features(state))
    return world.foresee(torch.stack(feats, 1), torch.stack(actions, 1))[0]


def exchanged(dreamer: Dreamer, before: State, action: Tensor, now: State) -> dict[str, State]:
    """A state `now` with parts as the one `before` it and the action (B, N, A) foretold them."""
    world, (deter, stoch, vectors) = dreamer.world, now
    foretold = world.rssm.img_step(before, action)[1]
    moved = world.move(before[2], world.rssm.features((deter, stoch)), action)
    states = {"code": (deter, foretold, vectors)}
    if not world.widths:
        return states
    states["vectors"] = (deter, stoch, moved)
    pairs = [pair for parts in world.parts for pair in pairs_of(parts)]
    places = torch.tensor([pairs.index(pair) for pair in pairs for _ in pair])
    for place in places.unique().tolist():
        mixed = torch.where(places == place, moved, vectors)
        name = ", ".join(map(str, pairs[place]))
        states[f"numbers {name} of each"] = (deter, stoch, mixed)
    return states


def print_rewards(rewards: dict[str, Tensor]) -> None:
    """A row for each name, of rewards (B, H, R)."""
    print("| reward |", " | ".join(f"after {horizon}" for horizon in HORIZONS), "| all |")
    print("|---" * (len(HORIZONS) + 2) + "|")
    for name, reward in rewards.items():
        means = reward.mean((0, 2))
        cells = [means[horizon - 1] for horizon in HORIZONS] + [means.sum()]
        print(f"| {name} |", " | ".join(f"{cell:.4f}" for cell in cells), "|")


def print_actions(dreamer: Dreamer, now: State, states: dict[str, State]) -> None:
    """How differently the actors act on other states (B, ...) than on the one that is `now`."""
    mode, *others = (
        dreamer.behavior.actors(dreamer.world.features(state)).mode
        for state in (now, *states.values())
    )
    print("\n| foretold | actions differ by | of |\n|---|---|---|")
    for name, other in zip(states, others, strict=True):
        difference, size = (part.square().mean().sqrt() for part in (other - mode, mode))
        print(f"| {name} | {difference:.2f} | {size:.2f} |")


@torch.no_grad()
def main(argv: list[str]) -> None:
    """Load the run, play it and imagine. Raises `UserError` and `ScenarioError`."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--logdir", required=True)
    parser.add_argument("--after", type=int, default=20, help="steps that are played before")
    parser.add_argument("--episodes", type=int, default=256)
    args = parser.parse_args(argv)
    count = str(args.episodes)
    flags = "--eval_episode_num", count, "--eval_envs", count
    config, env, dreamer, step = load_team(args.logdir, *flags)
    most = config.time_limit - HORIZONS[-1]
    if not 1 <= args.after <= most:
        raise UserError(f"--after {args.after}: expected 1 to {most}")
    player = Player(env, dreamer, explore=True)
    past, states = play(player, 1 + args.after)
    future, _ = play(player, HORIZONS[-1])
    going_on = ~torch.cat([past["is_first"][:, 1:], future["is_first"]], 1).any(1)
    if not going_on.any():
        raise UserError(f"--after {args.after}: expected fewer, every episode ends before")
    before, now = (tuple(part[going_on] for part in state) for state in states[-2:])
    came, taken = (future[key][going_on] for key in ("reward", "action"))
    came = combine_rewards(came, config.reward)
    if dreamer.reward_scale:
        came = came / dreamer.reward_scale.square.sqrt()
    actors = dreamer.behavior.actors
    imagined = {
        "real": came,
        "imagined, real actions": imagine(dreamer, now, lambda t, _: taken[:, t]),
        "imagined, their own": imagine(dreamer, now, lambda _, feat: actors(feat).sample()),
    }
    print(
        f"After {step:,} steps of training, {len(came)} episodes from their step {args.after} on\n"
    )
    print_rewards(imagined)
    led_here = past["action"][going_on, -1]
    print_actions(dreamer, now, exchanged(dreamer, before, led_here, now))


if __name__ == "__main__":
    try:
        main(sys.argv[1:])
    except (UserError, ScenarioError) as error:
        print(f"dreams.py: {error}", file=sys.stderr)
        sys.exit(2)
