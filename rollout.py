"""A team at play: acting in a batch of environments, and the tally of its episodes."""

import time
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from types import MappingProxyType
from typing import NamedTuple

import torch
from torch import Tensor

from capture import captured
from envs import Environment
from models import Dreamer
from tools import memory_in_use


class Player:
    """Lets a team act in B copies and hands out their rows one time step after the other.

    With `explore`, actions are drawn from the actors; without, they are the actors' modes.
    """

    def __init__(self, env: Environment, dreamer: Dreamer, explore: bool, capture: bool = False):
        self.env, self.rssm = env, dreamer.world.rssm
        self.act = captured(partial(dreamer.policy, explore=explore), capture)
        self.action: Tensor | None = None

    def step(self, random: bool = False) -> dict[str, Tensor]:
        """The next row of every copy, with the action that led to it and the model's latents.

        With `random`, uniform actions are played instead of the actors'.
        """
        if self.action is None:
            rows = self.env.reset()
            size = (self.env.num_envs, self.env.n_agents, self.env.action_width)
            self.action = rows["reward"].new_zeros(size)
            self.state = self.rssm.initial(self.env.num_envs)
        else:
            rows = self.env.step(self.action)
        led_here = self.action * (~rows["is_first"]).float()[:, None, None]
        action, state = self.act(rows, led_here, self.state)
        # An observation that is not finite costs its copy a memory and an action, no more.
        action = torch.nan_to_num(action, 0, 0, 0)
        self.state = tuple(torch.nan_to_num(part, 0, 0, 0) for part in state)
        self.action = self.env.random_action() if random else action
        return {**rows, "action": led_here, **self.rssm.pack(self.state)}

    def state_dict(self) -> dict:
        """What the team remembers of the episodes under way."""
        return {} if self.action is None else {"action": self.action, "state": self.state}

    def load_state_dict(self, state: dict) -> None:
        """Go on from what `state_dict` returned, in an environment that does the same."""
        if state:
            self.action, self.state = state["action"], state["state"]


class Episodes(NamedTuple):
    """What came of whole episodes: returns (episodes, N), lengths (episodes,) in actions.

    `info` is what an environment tells of agents, by name, as means over the steps (episodes, N).
    """

    returns: Tensor
    lengths: Tensor
    info: Mapping[str, Tensor] = MappingProxyType({})


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

    def state_dict(self) -> dict:
        """The episodes under way, and those ended and not asked for."""
        return {"now": self.now, "ended": list(self.ended)}

    def load_state_dict(self, state: dict) -> None:
        """Go on from what `state_dict` returned."""
        self.now, self.ended = state["now"], state["ended"]

    def take(self) -> Episodes:
        """The episodes that have ended since last asked."""
        totals = torch.cat([self.now[:0], *(now[last] for now, last in self.ended)])
        self.ended.clear()
        return Episodes(totals[:, :-1], totals[:, -1])


class Meter:
    """What happened since the last report: episodes, speed, the achieved train ratio, memory."""

    def __init__(self, env: Environment, replayed: int, step: int, updates: int):
        self.device = env.device
        self.tally = Tally(env.num_envs, env.n_agents, env.device)
        self.replayed = replayed  # steps an update
        self.last = step, updates, time.monotonic()

    def take(self, step: int, updates: int) -> dict[str, float]:
        """Metrics since the last call."""
        now = step, updates, time.monotonic()
        steps, updates, seconds = (b - a for a, b in zip(self.last, now, strict=True))
        self.last = now
        return {
            **summarise(self.tally.take(), "train"),
            "fps": steps / seconds,
            "updates_per_second": updates / seconds,
            "train_ratio": updates * self.replayed / max(steps, 1),
            **memory_in_use(self.device),
        }

    def state_dict(self) -> dict:
        """What was counted since the last report."""
        step, updates, since = self.last
        last = step, updates, time.monotonic() - since
        return {"tally": self.tally.state_dict(), "last": last}

    def load_state_dict(self, state: dict) -> None:
        """Go on from what `state_dict` returned; the time in between does not count."""
        self.tally.load_state_dict(state["tally"])
        step, updates, seconds = state["last"]
        self.last = step, updates, time.monotonic() - seconds


def summarise(episodes: Episodes, prefix: str) -> dict[str, float]:
    """Metrics of episodes: means of return and length, each agent's if they differ, and of info."""
    if not len(episodes.lengths):
        return {}
    agents, length = episodes.returns.mean(0), episodes.lengths.mean().item()
    metrics = {f"{prefix}_return": agents.mean().item(), f"{prefix}_length": length}
    if (agents - agents[0]).abs().max() > 1e-4:
        metrics |= {f"{prefix}_return_agent{i}": v for i, v in enumerate(agents.tolist())}
    info = episodes.info.items()
    return metrics | {f"{prefix}_info/{name}": value.nanmean().item() for name, value in info}


def play_episodes(
    env: Environment,
    dreamer: Dreamer,
    episodes: int | None = None,
    keep: Callable[[dict[str, Tensor]], None] = lambda rows: None,
    at_random: Sequence[int] = (),
) -> Episodes:
    """Play whole episodes with the actors' modes: by default one in each copy.

    Rounds of one episode a copy follow each other, and each begins with a reset of all, as some
    scenarios draw what all copies share only then. Agents `at_random` play uniform actions; `keep`
    is shown every row of the first round.
    """
    episodes = episodes or env.num_envs
    rounds = [_play_round(env, dreamer, keep, at_random)]
    while len(rounds) * env.num_envs < episodes:
        rounds.append(_play_round(env, dreamer, lambda rows: None, at_random))
    names = [name for name in rounds[0].info if all(name in played.info for played in rounds)]
    return Episodes(
        torch.cat([played.returns for played in rounds])[:episodes],
        torch.cat([played.lengths for played in rounds])[:episodes],
        {name: torch.cat([played.info[name] for played in rounds])[:episodes] for name in names},
    )


def _play_round(
    env: Environment,
    dreamer: Dreamer,
    keep: Callable[[dict[str, Tensor]], None],
    at_random: Sequence[int],
) -> Episodes:
    """One whole episode in each copy."""
    player = Player(env, dreamer, explore=False)
    tally = Tally(env.num_envs, env.n_agents, dreamer.device)
    playing = torch.ones(env.num_envs, dtype=torch.bool, device=dreamer.device)
    totals, info = torch.zeros_like(tally.now), {}
    while playing.any():
        rows = player.step()
        if at_random:  # the model is told what they really did: the next row comes with it
            player.action[:, at_random] = env.random_action()[:, at_random]
        keep(rows)
        tally.add(rows)
        totals = torch.where(playing.unsqueeze(-1), tally.now, totals)
        counts = (playing & ~rows["is_first"]).unsqueeze(-1)
        for name, value in env.info.items():
            info[name] = info.get(name, 0) + torch.where(counts, value, 0)
        playing &= ~rows["is_last"]
    returns, lengths = totals[:, :-1], totals[:, -1]
    return Episodes(returns, lengths, {name: info[name] / lengths.unsqueeze(-1) for name in info})
