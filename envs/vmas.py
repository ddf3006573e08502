"""Any VMAS scenario as one batched environment on the device.

Symbols: B parallel copies, N agents, A action width of the widest agent, O_i observation width of
agent i. A row is a dict of tensors about the state arrived at: agent0 (B, O_0), agent1, ...,
image (B, h, w, 3) uint8 when asked for, reward (B, N) float32, and is_first, is_last, is_terminal
(B,) bool. After a copy's is_last row, its next row is the first of a new episode.
"""

import contextlib
import random
import sys
import traceback
from collections.abc import Iterator

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from envs import Environment, snapshot
from envs.parts import Parts
from envs.render import render
from envs.scenarios import BaseScenario, ScenarioError, Simulator, build, digest, reason

# Correlation of two agents' rewards in random play. Measured on most of VMAS: -0.5 and below where
# agents are opposed, -0.1 and above elsewhere, with rewards of their own too.
_OPPOSED = -0.3


class Vmas:
    """B copies of a VMAS scenario, each with episodes of its own, stepped as one batch.

    Step for step the same as a plain VMAS loop that begins with `simulator.reset(seed=seed)`.

    Args:
        scenario: a name that VMAS ships, or the path of a .py file or the name of an importable
            module with a class `Scenario` in it.
        num_envs: B, the number of copies.
        device: where the simulator runs and all tensors live.
        seed: start of this environment's own random state.
        image_size: height and width of the image in each row; None for no image.
        time_limit: simulator steps after which an episode ends, not terminal; None for no limit.
        restart_from: if not 0, all copies end together, not terminal, after a number of simulator
            steps that is drawn anew each time, log-uniformly from this to the time limit. Those
            that have just begun, as an end of their own came before, go on.
        action_repeat: simulator steps per action; their rewards are summed.
        discrete: one-hot actions instead of continuous ones in [-1, 1].
        scenario_args: keyword arguments of the scenario.
        image_shades: whether shades tell agents, and round landmarks, of one colour apart.

    Raises:
        ScenarioError: for an unknown scenario or argument, or a scenario that VMAS cannot build.
    """

    def __init__(
        self,
        scenario: str,
        num_envs: int,
        device: torch.device | str = "cpu",
        seed: int = 0,
        image_size: int | None = None,
        time_limit: int | None = 100,
        action_repeat: int = 1,
        discrete: bool = False,
        scenario_args: dict | None = None,
        restart_from: int = 0,
        image_shades: bool = False,
    ):
        self.name, self.num_envs = scenario, num_envs
        self.device = torch.device(device)
        self.image_size, self._shades = image_size, image_shades
        self.discrete = discrete
        self._action_repeat = action_repeat
        self._time_limit, self._restart_from = time_limit, restart_from

        # VMAS is never given the seed: it would re-seed every CUDA device. Seeding again after
        # the build makes the first reset independent of what the build drew.
        self._random = _seeded_state(seed, self.device)
        with _global_random_state_kept(), self._own_random_state():
            self.simulator = build(
                scenario,
                scenario_args or {},
                num_envs=num_envs,
                device=self.device,
                max_steps=time_limit,
                continuous_actions=not discrete,
                terminated_truncated=True,
            )
            with Parts() as parts:
                observed = list(self._observe().values())
        for agent, obs in zip(self.simulator.agents, observed, strict=True):
            if len(obs) != num_envs or not obs.shape[1]:
                self._refuse(f"the observation of {agent.name}", obs, "1 or more")
        self.obs_shapes = [tuple(obs.shape[1:]) for obs in observed]
        self.obs_parts = [parts.widths(obs) for obs in observed]
        self._random = _seeded_state(seed, self.device)
        # Another stream than the simulator's, or random actions would follow its first draws.
        self._action_random = torch.Generator(self.device).manual_seed(seed + 2**31)
        self.n_agents = self.simulator.n_agents
        self._code = digest(type(self.simulator.scenario))
        self._describe_actions()

        # A scenario without a `done` of its own ends in all copies at once, by the time limit:
        # then ends are known on the host, without asking the device.
        self._ends_early = type(self.simulator.scenario).done is not BaseScenario.done
        self._steps = 0  # simulator steps since all copies were reset
        # On the host, so that drawing lengths never waits for the device.
        self._length_random = torch.Generator().manual_seed(seed + 2**30)
        self._length = self._draw_length()  # steps after which all copies are reset again
        self._is_last = torch.ones(num_envs, dtype=torch.bool, device=self.device)
        self._ended = list(range(num_envs))  # the same on the host: copies to reset next
        # What the scenario said of each agent in the simulator steps of the last action, and of
        # which copies that counts.
        self._infos: list[tuple[list[dict], Tensor]] = []

    def reset(self) -> dict[str, Tensor]:
        """Begin an episode in every copy and return the first rows."""
        with self._at_work():
            observations = self.simulator.reset()
        self._steps, self._length = 0, self._draw_length()
        row = self._blank_row() | _named(observations)
        row["is_first"] = torch.ones_like(row["is_first"])
        if self.image_size:
            row["image"] = self.render()
        self._is_last, self._ended, self._infos = row["is_last"], [], []
        return row

    @torch.no_grad()
    def step(self, action: Tensor) -> dict[str, Tensor]:
        """Advance all copies by one action and return their next rows.

        Copies whose last row was is_last begin a new episode instead; their action is ignored.

        Args:
            action: (B, N, A), in [-1, 1] (clamped) or one-hot; entries past an agent's own width
                are ignored.
        """
        if len(self._ended) == self.num_envs:
            return self.reset()
        actions = self._simulator_actions(action)
        fresh, restarts = self._is_last, self._ended
        row, ended = self._blank_row(), []
        pictured = torch.zeros_like(fresh)  # copies whose final image is taken already
        self._infos = []
        for remaining in reversed(range(self._action_repeat)):
            new, told = self._simulate(actions)
            new["reward"] += row["reward"]
            stopped = fresh | row["is_last"]
            self._infos.append((told, ~stopped))
            row = row | {key: _where(stopped, row[key], new[key]) for key in new}
            before, ended = ended, self._find_ended(row["is_last"])
            if len(ended) + len(restarts) == self.num_envs:
                break
            if self.image_size and remaining and len(ended) > len(before):
                # The simulator moves on, so the end of these copies is drawn now.
                row["image"] = _where(pictured, row["image"], self.render())
                pictured = row["is_last"]
        if restarts:
            row |= self._restart(restarts, fresh, row)
            if self._all_end():  # without those that begin now, so that no reset of all follows
                self._steps, self._length = 0, self._draw_length()
        if self.image_size:
            row["image"] = _where(pictured, row["image"], self.render())
        self._is_last, self._ended = row["is_last"], ended
        return row

    def render(
        self,
        size: int | tuple[int, int] | None = None,
        copies: int | None = None,
        follow: int | None = None,
        legible: bool = False,
    ) -> Tensor:
        """Draw the current scenes as (B, h, w, 3) uint8; see `envs.render.render`."""
        size = size or self.image_size or 64
        return render(self.simulator, size, copies, follow, self._shades, legible)

    @property
    def info(self) -> dict[str, Tensor]:
        """What the scenario's `info` gave during the last action, by name: (B, N) float32.

        Means over its simulator steps; NaN for an agent that gave none, and where an episode
        begins. What is not one number a copy is left out.
        """
        if not self._infos:
            return {}
        told = [_by_name(infos, self.num_envs) for infos, _ in self._infos]
        counts = torch.stack([counts.unsqueeze(-1) for _, counts in self._infos])
        names = [name for name in told[0] if all(name in numbers for numbers in told)]
        numbers = {name: torch.stack([step[name] for step in told]) for name in names}
        return {
            name: torch.where(counts, value, 0).sum(0) / counts.sum(0)
            for name, value in numbers.items()
        }

    @property
    def ended(self) -> bool:
        """Whether the last rows end an episode in any copy, known without asking the device."""
        return bool(self._ended)

    def random_action(self) -> Tensor:
        """Draw (B, N, A) uniform actions, zero past each agent's width, from own random state."""
        shape = (self.num_envs, self.n_agents)
        if self.discrete:
            uniform = torch.rand(shape, generator=self._action_random, device=self.device)
            # The minimum guards against a product that rounds up to the size itself.
            index = torch.minimum((uniform * self._sizes).long(), self._sizes - 1)
            return F.one_hot(index, self.action_width).float()
        shape = (*shape, self.action_width)
        uniform = torch.rand(shape, generator=self._action_random, device=self.device)
        return (2 * uniform - 1) * self._action_mask

    def random_state(self) -> dict:
        """Own random state as tensors and plain values, for a checkpoint."""
        torch_state, (name, keys, *rest), python_state, cuda_state = self._random
        return {
            "device": self.device.type,
            "torch": torch_state,
            "numpy": (name, torch.from_numpy(keys.astype(np.int64)), *rest),
            "python": python_state,
            "cuda": cuda_state,
            "action": self._action_random.get_state(),
            "length": self._length_random.get_state(),
        }

    def set_random_state(self, state: dict) -> None:
        """Continue from what `random_state` returned; on another kind of device, in part only."""
        name, keys, *rest = state["numpy"]
        numpy_state = (name, keys.cpu().numpy().astype(np.uint32), *rest)
        self._random[:3] = [state["torch"].cpu(), numpy_state, state["python"]]
        self._length_random.set_state(state["length"].cpu())
        if state["device"] == self.device.type:
            self._random[3] = state["cuda"] if state["cuda"] is None else state["cuda"].cpu()
            self._action_random.set_state(state["action"].cpu())

    def state_dict(self) -> dict:
        """Where every episode under way stands, for a checkpoint; not a copy."""
        return {
            "code": self._code,
            "simulator": snapshot.take(self.simulator),
            "steps": self._steps,
            "length": self._length,
            "is_last": self._is_last,
            "ended": self._ended,
            "random": self.random_state(),
        }

    def is_of_this_code(self, state: dict) -> bool:
        """Whether `state_dict` was of the scenario's present source, and of this VMAS."""
        return state.get("code") == self._code

    def load_state_dict(self, state: dict) -> None:
        """Go on from what `state_dict` returned for the same scenario and number of copies."""
        self.reset()
        self.step(self.random_action())  # the simulator makes some of its parts when first stepped
        snapshot.put(self.simulator, state["simulator"])
        self._steps, self._length = state["steps"], state["length"]
        self._is_last, self._ended = state["is_last"], state["ended"]
        self.set_random_state(state["random"])

    def _refuse(self, what: str, value: Tensor, expected: str = "") -> None:
        """Raise a `ScenarioError`: what the scenario gave for the copies has another shape."""
        wrong = f"{what} has shape {tuple(value.shape)}"
        right = f"({self.num_envs}, {expected})" if expected else f"({self.num_envs},)"
        raise ScenarioError(f"scenario '{self.name}': {wrong}, not {right}")

    @contextlib.contextmanager
    def _at_work(self) -> Iterator[None]:
        """Let the simulator work, from random states of its own; its faults are `ScenarioError`."""
        try:
            with self._own_random_state():
                yield
        except Exception as error:
            module = sys.modules[type(self.simulator.scenario).__module__]
            frames = traceback.extract_tb(error.__traceback__)
            place = ([frame for frame in frames if frame.filename == module.__file__] or frames)[-1]
            where = f"{place.filename}, line {place.lineno}"
            raise ScenarioError(f"scenario '{self.name}': {reason(error)} ({where})") from error

    @contextlib.contextmanager
    def _own_random_state(self) -> Iterator[None]:
        """Let the simulator draw from this environment's state and from nothing else.

        VMAS draws from a list that all its environments share, and on a GPU from the device's
        default generator too.
        """
        shared = Simulator.vmas_random_state
        others = list(shared)
        shared[:] = self._random[:3]
        if self.device.type == "cuda":
            others_cuda = torch.cuda.get_rng_state(self.device)
            torch.cuda.set_rng_state(self._random[3], self.device)
        try:
            yield
        finally:
            self._random[:3] = shared
            shared[:] = others
            if self.device.type == "cuda":
                self._random[3] = torch.cuda.get_rng_state(self.device)
                torch.cuda.set_rng_state(others_cuda, self.device)

    def _describe_actions(self) -> None:
        """Set the widths of the agents' actions and, if continuous, the ranges they map to."""
        spaces = self.simulator.action_space
        self.action_sizes = [int(s.n) if self.discrete else s.shape[0] for s in spaces]
        self.action_width = max(self.action_sizes)
        self._sizes = torch.tensor(self.action_sizes, device=self.device)
        self._action_mask = torch.arange(self.action_width, device=self.device) < (
            self._sizes.unsqueeze(-1)
        )  # (N, A)
        if not self.discrete:
            bounds = np.zeros((2, self.n_agents, self.action_width), np.float32)
            for i, space in enumerate(spaces):
                bounds[:, i, : self.action_sizes[i]] = space.low, space.high
            low, high = torch.from_numpy(bounds).to(self.device)
            self._action_centre, self._action_scale = (high + low) / 2, (high - low) / 2

    def _simulator_actions(self, action: Tensor) -> list[Tensor]:
        """Turn (B, N, A) into what VMAS takes: per agent its own range, or an index (B, 1)."""
        expected = (self.num_envs, self.n_agents, self.action_width)
        if action.shape != expected:
            raise ValueError(f"action has shape {tuple(action.shape)}, expected {expected}")
        if self.discrete:
            scores = action.masked_fill(~self._action_mask, -torch.inf)
            return list(scores.argmax(-1, keepdim=True).unbind(1))
        scaled = self._action_centre + self._action_scale * action.clamp(-1, 1)
        return [scaled[:, i, :size] for i, size in enumerate(self.action_sizes)]

    def _simulate(self, actions: list[Tensor]) -> tuple[dict[str, Tensor], list[dict]]:
        """Advance the simulator by one step; its row, image aside, and the agents' infos."""
        with self._at_work():
            observations, rewards, terminated, truncated, told = self.simulator.step(actions)
        self._steps += 1
        if terminated.numel() != self.num_envs:
            self._refuse("what `done` returns", terminated)
        terminal = terminated.reshape(self.num_envs).bool()
        truncated = truncated | self._all_end()
        for agent, reward in zip(self.simulator.agents, rewards, strict=True):
            if reward.numel() != self.num_envs:
                self._refuse(f"the reward of {agent.name}", reward)
        rewards = [reward.reshape(self.num_envs).float() for reward in rewards]
        row = {
            **_named(observations),
            "reward": torch.stack(rewards, -1),
            "is_last": terminal | truncated,
            "is_terminal": terminal,
        }
        return row, told

    def _find_ended(self, is_last: Tensor) -> list[int]:
        """Indices of the copies whose episode has ended; asks the device only if it must."""
        if self._all_end():
            return sorted(set(range(self.num_envs)).difference(self._ended))
        return is_last.nonzero().flatten().tolist() if self._ends_early else []

    def _all_end(self) -> bool:
        """Whether all copies end now together, but for those that are only beginning."""
        return self._length is not None and self._steps >= self._length

    def _draw_length(self) -> int | None:
        """Simulator steps after which all copies end together; None if they end on their own."""
        if not self._restart_from or self._time_limit is None:
            return None if self._ends_early else self._time_limit
        share = torch.rand((), generator=self._length_random, dtype=torch.float64).item()
        shortest = min(self._restart_from, self._time_limit)
        return round(shortest * (self._time_limit / shortest) ** share)

    def _restart(self, copies: list[int], fresh: Tensor, row: dict) -> dict[str, Tensor]:
        """Reset some copies, given by index and by mask (B,); their changes to the row."""
        with self._at_work():
            for index in copies:
                self.simulator.reset_at(index, return_observations=False)
            first = self._observe()
        changes = {key: _where(fresh, first[key], row[key]) for key in first}
        return changes | {"is_first": fresh}

    def _observe(self) -> dict[str, Tensor]:
        """Observations of the current state by name; call within `_own_random_state`."""
        (observations,) = self.simulator.get_from_scenario(
            get_observations=True, get_rewards=False, get_infos=False, get_dones=False
        )
        return _named(observations)

    def _blank_row(self) -> dict[str, Tensor]:
        """A row of zeros."""

        def zeros(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
            return torch.zeros(self.num_envs, *shape, dtype=dtype, device=self.device)

        row = {f"agent{i}": zeros(*shape) for i, shape in enumerate(self.obs_shapes)}
        if self.image_size:
            row["image"] = zeros(self.image_size, self.image_size, 3, dtype=torch.uint8)
        row["reward"] = zeros(self.n_agents)
        return row | {
            key: zeros(dtype=torch.bool) for key in ("is_first", "is_last", "is_terminal")
        }


def opposed_agents(env: Environment, steps: int = 60, hold: int = 15) -> tuple[int, int] | None:
    """Two agents of which one is paid for what the other is charged for, if random play shows any.

    Actions are held for `hold` steps: agents that tremble on the spot would seldom meet.
    """
    rewards = [env.reset()["reward"]]
    for step in range(steps):
        if step % hold == 0:
            action = env.random_action()
        rewards.append(env.step(action)["reward"])
    deviation = torch.cat(rewards).double()
    deviation -= deviation.mean(0)
    covariance = deviation.T @ deviation
    variance = covariance.diagonal().clamp(min=1e-6)  # a reward that hardly changes opposes none
    correlation = covariance / (variance * variance[:, None]).sqrt()
    if not correlation.min() <= _OPPOSED:  # nor where a reward is NaN, which no agent is paid
        return None
    return tuple(sorted(divmod(correlation.argmin().item(), env.n_agents)))


def _by_name(infos: list[dict], num_envs: int) -> dict[str, Tensor]:
    """What the agents' infos hold that is one number a copy: (B, N), NaN for an agent without."""
    numbers = {
        (name, agent): value.reshape(num_envs).float()
        for agent, info in enumerate(infos)
        for name, value in info.items()
        if isinstance(value, Tensor) and value.numel() == num_envs
    }
    names = dict.fromkeys(name for name, _ in numbers)
    if not names:
        return {}
    none = torch.full_like(next(iter(numbers.values())), torch.nan)
    agents = range(len(infos))
    return {name: torch.stack([numbers.get((name, i), none) for i in agents], -1) for name in names}


def _where(mask: Tensor, yes: Tensor, no: Tensor) -> Tensor:
    """`torch.where` with a mask (B,) for tensors (B, ...)."""
    return torch.where(mask.reshape(-1, *[1] * (yes.ndim - 1)), yes, no)


def _named(observations: list) -> dict[str, Tensor]:
    """The agents' observations, flattened, under the names of a row."""
    return {f"agent{i}": _flatten(obs) for i, obs in enumerate(observations)}


def _flatten(observation: Tensor | dict) -> Tensor:
    """An observation as (B, O); the parts of a dict in the order of their names."""
    if isinstance(observation, dict):
        return torch.cat([_flatten(observation[name]) for name in sorted(observation)], -1)
    return observation.reshape(len(observation), -1).float()


def _seeded_state(seed: int, device: torch.device) -> list:
    """States of torch, numpy, random and CUDA (or None) as seeding leaves them; seeds nothing."""
    return [
        torch.Generator().manual_seed(seed).get_state(),
        np.random.RandomState(seed % 2**32).get_state(),
        random.Random(seed).getstate(),
        torch.Generator(device).manual_seed(seed).get_state() if device.type == "cuda" else None,
    ]


@contextlib.contextmanager
def _global_random_state_kept() -> Iterator[None]:
    """Restore the random states of torch, numpy and random, which VMAS does only on success."""
    state = torch.get_rng_state(), np.random.get_state(), random.getstate()
    try:
        yield
    finally:
        torch.set_rng_state(state[0])
        np.random.set_state(state[1])
        random.setstate(state[2])
