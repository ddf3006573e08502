"""Small networks, batches and a scenario that several test files build on."""

import signal

import pytest
import torch
from torch import nn

from models import ImagBehavior, WorldModel
from networks import NumberHead

torch.set_num_threads(1)
# A shell has what it runs in the background ignore SIGINT, and so would the runs tested here.
signal.signal(signal.SIGINT, signal.default_int_handler)

COUNTING = """
import torch
from vmas.simulator.core import Agent, World
from vmas.simulator.scenario import BaseScenario


class Scenario(BaseScenario):
    '''Copy i ends after `shortest + i` steps; agent k is paid k + 1 times the steps so far.'''

    def make_world(self, batch_dim, device, **kwargs):
        self.shortest = kwargs.get("shortest", 3)
        self.steps = torch.zeros(batch_dim, device=device)
        world = World(batch_dim, device)
        for i in range(kwargs.get("n_agents", 2)):
            world.add_agent(Agent(f"agent {i}", u_range=0.5 + i))
        world.add_agent(Agent("scripted", action_script=self.drift))
        return world

    def drift(self, agent, world):
        agent.action.u = torch.ones(world.batch_dim, 2, device=world.device)

    def reset_world_at(self, env_index=None):
        self.steps[slice(None) if env_index is None else env_index] = 0

    def post_step(self):
        self.steps += 1

    def observation(self, agent):
        parts = {"vel": agent.state.vel, "pos": {"y": agent.state.pos[:, 1], "x": self.steps}}
        return parts if agent.name == "agent 0" else agent.state.pos

    def reward(self, agent):
        reward = self.steps * (self.world.agents.index(agent) + 1)
        return reward.unsqueeze(-1) if agent.name == "agent 0" else reward

    def done(self):
        return self.steps >= self.shortest + torch.arange(len(self.steps))
"""


@pytest.fixture
def counting(tmp_path) -> str:
    """Path of a scenario file whose episodes and rewards are known beforehand."""
    path = tmp_path / "counting.py"
    path.write_text(COUNTING)
    return str(path)


@pytest.fixture(autouse=True)
def seed() -> None:
    """Every test starts from the same random state, whatever ran before it."""
    torch.manual_seed(0)


@pytest.fixture
def make_world():
    """A small world model; keywords replace any of its arguments."""

    def make(**changes) -> WorldModel:
        shapes = {"agent0": (3,), "agent1": (2,)}
        sizes = {"deter": 16, "stoch": 3, "classes": 4, "units": 12, "layers": 1, "cnn_depth": 2}
        rest = {"blocks": 2, "unimix": 0.01, "kl_free": 0.0, "sharpness": 1.0}
        rest |= {"head_layers": 2, "norm": False, "cnn_points": 0}
        head = {"obs_shapes": shapes, "action_shape": (2, 2), "rewards": 1}
        return WorldModel(**{**head, **sizes, **rest, **changes})

    return make


@pytest.fixture
def awaken():
    """Lets a head that starts at zero predict smooth numbers of modest size."""

    def change(head: NumberHead) -> None:
        nn.init.normal_(head.out.weight, std=0.5)
        distance = torch.arange(255) - 127
        head.out.bias.data = -(distance.square() / 20.0).repeat(head.shape[0])

    return change


@pytest.fixture
def make_behavior():
    """A small behaviour of two agents with one and two actions; keywords replace arguments."""

    def make(feat: int, **changes) -> ImagBehavior:
        actors = {"action_sizes": (1, 2), "discrete": False, "units": 12, "layers": 1}
        policy = {"min_std": 0.1, "max_std": 1.0, "unimix": 0.01, "entropy": 3e-4}
        returns = {"rewards": 1, "discount": 0.9, "lam": 0.8, "slow_rate": 0.02}
        rollout = {"horizon": 3, "starts": 1000, "imag_gradient": "dynamics"}
        return ImagBehavior(feat, **{**actors, **policy, **returns, **rollout, **changes})

    return make


@pytest.fixture
def make_batch():
    """Replayed sequences (B, T, ...) of two agents for `make_world`, with a zero initial state."""

    def make(world: WorldModel, batch: int = 3, time: int = 5, **shapes) -> dict:
        shapes = shapes or {"agent0": (3,), "agent1": (2,)}
        rssm, size = world.rssm, (batch, time)
        rows = {key: torch.randn(*size, *shape) for key, shape in shapes.items()}
        if "image" in rows:
            rows["image"] = torch.randint(0, 256, rows["image"].shape, dtype=torch.uint8)
        names = ("is_first", "is_last", "is_terminal")
        flags = {key: torch.zeros(size, dtype=torch.bool) for key in names}
        flags["is_first"][:, 0] = True
        initial = rssm.pack(rssm.initial(batch))
        action = 2 * torch.rand(*size, 2, 2) - 1
        reward = torch.randn(*size, 2)
        return {**rows, **flags, "action": action, "reward": reward, "initial": initial}

    return make
