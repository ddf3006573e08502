"""What random, idle and scripted teams get: the levels that results are held against.

    python -m benchmarks.reference
    python -m benchmarks.reference --tasks simple_spread --configs vmas original

By a plain VMAS loop, without any of this project's environment code: 512 episodes of one seed, cut
at their first end, mean over agents, by default with BenchMARL's arguments. Scripted is VMAS's own
heuristic, where a scenario has one, and `Spread` for simple_spread. Where a package is to be moved,
`full_force` says how far all of a team's strength takes it.
"""

import argparse
import importlib
import itertools
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from torch import Tensor
from vmas import make_env, mpe_scenarios, scenarios
from vmas.simulator.environment import Environment

from config import Config, load_config

SETTINGS = Path(__file__).parent.parent / "configs.yaml"
TASKS = (
    "simple_spread",
    "balance",
    "navigation",
    "transport",
    "reverse_transport",
    "discovery",
    "simple_speaker_listener",
    "simple_tag",
)
Policy = Callable[[Environment, list[Tensor]], list[Tensor]]


def at_random(env: Environment, _: list[Tensor]) -> list[Tensor]:
    """Uniform over each agent's range."""
    return [env.get_random_action(agent) for agent in env.agents]


def idle(env: Environment, _: list[Tensor]) -> list[Tensor]:
    """No force, no word."""
    return [torch.zeros_like(action) for action in at_random(env, [])]


class Spread:
    """Each agent goes to the landmark of the best assignment at the start, around the others."""

    GAIN, DAMPING, REPULSION, REACH = 10.0, 3.0, 6.0, 0.38

    def __init__(self):
        self.goal = None

    def __call__(self, env: Environment, _: list[Tensor]) -> list[Tensor]:
        place, velocity = (
            torch.stack([getattr(agent.state, name) for agent in env.agents], 1)
            for name in ("pos", "vel")
        )  # (B, N, 2)
        if self.goal is None:
            self.goal = self._assign(
                place, torch.stack([x.state.pos for x in env.world.landmarks], 1)
            )
        apart = place.unsqueeze(2) - place.unsqueeze(1)
        distance = apart.norm(dim=-1, keepdim=True).clamp(min=1e-3)
        away = (apart / distance * (self.REACH - distance).clamp(min=0)).sum(2) / self.REACH
        force = self.GAIN * (self.goal - place) - self.DAMPING * velocity + self.REPULSION * away
        return list(force.clamp(-1, 1).unbind(1))

    @staticmethod
    def _assign(place: Tensor, landmarks: Tensor) -> Tensor:
        """(B, N, 2): a landmark for each agent, the sum of their distances the smallest."""
        agents = torch.arange(place.shape[1])
        orders = torch.tensor(list(itertools.permutations(agents.tolist())))
        costs = torch.cdist(place, landmarks)[:, agents, orders].sum(-1)
        chosen = orders[costs.argmin(-1)]
        return landmarks.gather(1, chosen.unsqueeze(-1).expand_as(landmarks))


def scripted(task: str) -> Policy | None:
    """The scripted team of a task, if there is one."""
    if task == "simple_spread":
        return Spread()
    package = "vmas.scenarios.mpe" if task in mpe_scenarios else "vmas.scenarios"
    heuristic = getattr(importlib.import_module(f"{package}.{task}"), "HeuristicPolicy", None)
    if not heuristic:
        return None
    policy = heuristic(continuous_action=True)

    def act(env: Environment, observations: list[Tensor]) -> list[Tensor]:
        pairs = zip(observations, env.agents, strict=True)
        return [policy.compute_action(seen, u_range=agent.u_range) for seen, agent in pairs]

    return act


def _start(
    task: str, copies: int, seed: int, presets: Sequence[str]
) -> tuple[Environment, list[Tensor], Config]:
    """A task's environment with what is observed first, and its settings."""
    flags = ["--configs", *presets, "--task", f"vmas_{task}", "--logdir", "none"]
    config = load_config(flags, SETTINGS)
    torch.manual_seed(seed)
    settings = {"max_steps": config.time_limit, "clamp_actions": True, **config.scenario.as_dict()}
    env = make_env(task, copies, "cpu", seed=seed, **settings)
    return env, env.reset(seed=seed), config


@torch.no_grad()
def play(task: str, policy: Policy, copies: int, seed: int, presets: Sequence[str]) -> Tensor:
    """Returns (copies,) of an episode in each copy."""
    env, observations, config = _start(task, copies, seed, presets)
    total, alive = torch.zeros(copies), torch.ones(copies)
    for step in range(config.time_limit):
        if step % config.action_repeat == 0:
            actions = policy(env, observations)
        observations, rewards, done, _ = env.step(actions)
        total += torch.stack([reward.view(copies) for reward in rewards]).mean(0) * alive
        alive *= (~done).float()
    return total


def full_force(env: Environment, steps: int) -> Tensor | None:
    """What a package's way to its goal pays if nothing else binds: (copies,), None without one.

    As if the agents, the package and what bears it were one body, along each axis of which all
    agents push as hard as they can until it is there. Drag lets it go no faster, and no other way
    takes one body nearer in as many steps; a ball that leaves its line may be a little faster.
    The environment has just been reset.
    """
    scenario, world = env.scenario, env.world
    packages = getattr(scenario, "packages", None) or [getattr(scenario, "package", None)]
    if packages[0] is None:
        return None
    (package,) = packages
    mass = sum(entity.mass for entity in world.entities if entity.movable)
    force = sum(agent.action.u_multiplier * agent.u_range for agent in world.agents)
    way = package.goal.state.pos - package.state.pos  # (copies, 2)
    push = (way.sign() * force / mass + world._gravity) * world._sub_dt
    velocity, gone = torch.zeros_like(way), torch.zeros_like(way)
    for _ in range(steps):
        velocity = velocity * (1 - world._drag)
        for _ in range(world._substeps):
            velocity = velocity + push
            gone = gone + velocity * world._sub_dt
    left = (way.abs() - gone.abs()).clamp(min=0)
    return scenario.shaping_factor * (way.norm(dim=-1) - left.norm(dim=-1))


def _cell(task: str, policy: Policy | None, copies: int, seed: int, presets: Sequence[str]) -> str:
    if not policy:
        return ""
    try:
        return _mean(play(task, policy, copies, seed, presets))
    except ModuleNotFoundError as error:  # of a heuristic that plans
        return f"needs {error.name}"


def _mean(returns: Tensor | None) -> str:
    if returns is None:
        return ""
    return f"{returns.mean():.2f} ± {1.96 * returns.std() / len(returns) ** 0.5:.2f}"


def main(argv: Sequence[str] | None = None) -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    shipped = sorted([*scenarios, *mpe_scenarios])
    parser.add_argument("--tasks", nargs="+", default=TASKS, choices=shipped, metavar="TASK")
    parser.add_argument("--copies", type=int, default=512)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--configs", nargs="+", default=["vmas_vector", "benchmarl"])
    args = parser.parse_args(argv)
    print("| task | random | idle | scripted | full force |\n|---|---|---|---|---|")
    for task in args.tasks:
        policies = at_random, idle, scripted(task)
        cells = [_cell(task, policy, args.copies, args.seed, args.configs) for policy in policies]
        env, _, config = _start(task, args.copies, args.seed, args.configs)
        cells.append(_mean(full_force(env, config.time_limit)))
        print(f"| {task} | {' | '.join(cells)} |", flush=True)


if __name__ == "__main__":
    main()
