"""A team at play: acting in a batch of environments, and the tally of its episodes."""

from collections.abc import Callable
from typing import Protocol

import torch
from torch import Tensor

from models import Dreamer


class Environment(Protocol):
    """What a batch of environments offers; `envs.vmas.Vmas` is one."""

    num_envs: int
    n_agents: int
    action_width: int

    def reset(self) -> dict[str, Tensor]: ...

    def step(self, action: Tensor) -> dict[str, Tensor]: ...

    def random_action(self) -> Tensor: ...


class Player:
    """Lets a team act in B copies and hands out their rows one time step after the other.

    With `explore`, actions are drawn from the actors; without, they are the actors' modes.
    """

    def __init__(self, env: Environment, dreamer: Dreamer, explore: bool):
        self.env, self.dreamer, self.explore = env, dreamer, explore
        self.rows: dict[str, Tensor] | None = None

    def step(self, random: bool = False) -> dict[str, Tensor]:
        """The next row of every copy, with the action that led to it and the model's latents.

        With `random`, uniform actions are played instead of the actors'.
        """
        rssm = self.dreamer.world.rssm
        if self.rows is None:
            self.rows = self.env.reset()
            size = (self.env.num_envs, self.env.n_agents, self.env.action_width)
            self.action = self.rows["reward"].new_zeros(size)
            self.state = rssm.initial(self.env.num_envs)
        else:
            self.rows = self.env.step(self.action)
        led_here = self.action * (~self.rows["is_first"]).float()[:, None, None]
        action, self.state = self.dreamer.policy(self.rows, led_here, self.state, self.explore)
        self.action = self.env.random_action() if random else action
        return {**self.rows, "action": led_here, **rssm.pack(self.state)}


class Tally:
    """Returns and lengths of the episodes that end, kept on the device until asked for.

    An episode's return is the mean over agents of their summed rewards, as BenchMARL reports it.
    """

    def __init__(self, num_envs: int, n_agents: int, device: torch.device):
        self.now = torch.zeros(num_envs, n_agents + 1, device=device)
        self.ended: list[tuple[Tensor, Tensor]] = []

    def add(self, rows: dict[str, Tensor]) -> None:
        """Take in the next row of every copy."""
        steps = (~rows["is_first"]).float().unsqueeze(-1)
        self.now = torch.cat([rows["reward"], steps], -1) + self.now * steps
        self.ended.append((self.now, rows["is_last"]))

    def take(self) -> tuple[Tensor, Tensor]:
        """Returns (episodes, N) and lengths (episodes,) of the episodes ended since last asked."""
        totals = torch.cat([self.now[:0], *(now[last] for now, last in self.ended)])
        self.ended.clear()
        return totals[:, :-1], totals[:, -1]


def summarise(returns: Tensor, lengths: Tensor, prefix: str) -> dict[str, float]:
    """Metrics of episodes: their mean return and length, and each agent's if they differ."""
    if not len(returns):
        return {}
    agents = returns.mean(0)
    metrics = {f"{prefix}_return": agents.mean().item(), f"{prefix}_length": lengths.mean().item()}
    if (agents - agents[0]).abs().max() > 1e-4:
        metrics |= {f"{prefix}_return_agent{i}": v for i, v in enumerate(agents.tolist())}
    return metrics


def play_episodes(
    env: Environment,
    dreamer: Dreamer,
    keep: Callable[[dict[str, Tensor]], None] = lambda rows: None,
) -> tuple[Tensor, Tensor]:
    """Play one whole episode in each copy with the actors' modes; `keep` is shown every row.

    Returns the agents' returns (B, N) and the episodes' lengths (B,).
    """
    player = Player(env, dreamer, explore=False)
    playing = torch.ones(env.num_envs, dtype=torch.bool, device=player.dreamer.device)
    returns = torch.zeros(env.num_envs, env.n_agents, device=playing.device)
    lengths = torch.zeros(env.num_envs, device=playing.device)
    while playing.any():
        rows = player.step()
        keep(rows)
        returns += rows["reward"] * playing.unsqueeze(-1)
        lengths += playing & ~rows["is_first"]
        playing &= ~rows["is_last"]
    return returns, lengths
