"""What holds simple_spread back: actors and critic in a model whose motion is exact.

    python -m benchmarks.exact_model                                # the reward is exact as well
    python -m benchmarks.exact_model --flat                         # actors and critic pool nothing
    python -m benchmarks.exact_model --reward pooled --period 300   # it is learned from few scenes

The team's `ImagBehavior` learns as in a run, but its world model is the task itself, written down
(`Spread`). With `--reward flat` or `pooled` only the reward is predicted, from what was observed so
far, by an MLP or by the world model's `TeamHead`, so that its share of the trouble can be seen.
Prints the real return (100 steps, 256 scenes, modes of the actors).
"""

import argparse
from types import SimpleNamespace

import torch
from torch import Tensor, nn

from distributions import symexp, symlog
from models import ImagBehavior
from networks import RSSM, NumberHead, TeamHead
from optimizer import LaProp

ROWS = 6_400  # what the team sees anew after every --period updates


class Spread:
    """simple_spread for N agents and landmarks, but agents that touch pass through each other.

    A state is a pair as the RSSM's, of which the first part (B, 6 N) is all: positions, velocities,
    landmarks.
    """

    DRAG, STEP = 0.25, 0.1

    def __init__(self, agents: int):
        self.agents = agents
        self.parts = [[4 * agents + 2]] * agents
        self.feat = agents * (4 * agents + 2)

    def new_scenes(self, count: int) -> Tensor:
        """States (count, 6 N) of agents at rest, somewhere, with landmarks somewhere."""
        place, landmarks = torch.rand(2, count, 2 * self.agents) * 2 - 1
        return torch.cat([place, torch.zeros_like(place), landmarks], -1)

    def _split(self, state: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor, Tensor]:
        return state[0].unflatten(-1, (3 * self.agents, 2)).split(self.agents, -2)

    def features(self, state: tuple[Tensor, Tensor]) -> Tensor:
        """(..., F): what the agents observe, symlog."""
        place, speed, landmarks = self._split(state)
        to_landmarks = (landmarks.unsqueeze(-3) - place.unsqueeze(-2)).flatten(-2)
        between = place.unsqueeze(-3) - place.unsqueeze(-2)
        others = [
            torch.cat([between[..., i, :i, :], between[..., i, i + 1 :, :]], -2).flatten(-2)
            for i in range(self.agents)
        ]
        seen = torch.cat([place, speed, to_landmarks, torch.stack(others, -2)], -1)
        return symlog(seen.flatten(-2))

    def img_step(self, state: tuple[Tensor, Tensor], action: Tensor) -> tuple[Tensor, Tensor]:
        """The next state, without collisions."""
        place, speed, landmarks = self._split(state)
        speed = speed * (1 - self.DRAG) + self.STEP * RSSM.bound_action(action)
        deter = torch.cat([place + self.STEP * speed, speed, landmarks], -2).flatten(-2)
        return deter, state[1]

    def reward(self, feat: Tensor) -> Tensor:
        """(..., F) to (..., 1): minus distances to landmarks and collisions, as VMAS counts."""
        seen = symexp(feat.unflatten(-1, (self.agents, -1)))
        _, to_landmarks, others = seen.split([4, 2 * self.agents, 2 * self.agents - 2], -1)
        distance = self._norm(to_landmarks).amin(-2).sum(-1)
        touching = torch.sigmoid((0.3 - self._norm(others)) * 50).sum((-2, -1))
        return (-self.agents * distance - touching).unsqueeze(-1)

    @staticmethod
    def _norm(pairs: Tensor) -> Tensor:
        return (pairs.unflatten(-1, (-1, 2)).square().sum(-1) + 1e-6).sqrt()


class LearnedReward(nn.Module):
    """The reward as a head on the observations learns it, from all that was seen so far."""

    def __init__(self, task: Spread, pooled: bool):
        super().__init__()
        self.task = task
        flat = NumberHead(task.feat, 128, 3, 1, norm=False)
        self.head = TeamHead(task.feat, task.parts, 128, 2, 1, norm=False) if pooled else flat
        if pooled:
            self.head.view.resolve(torch.zeros(task.feat))  # motion is exact
        self.optimizer = torch.optim.Adam(self.parameters(), lr=1e-3)
        self.seen: Tensor | None = None

    def learn(self, updates: int) -> None:
        """Regression on what was seen."""
        for _ in range(updates):
            feat = self.seen[torch.randint(len(self.seen), (512,))]
            loss = self.head(feat).loss(self.task.reward(feat)).mean()
            self.optimizer.zero_grad()
            loss.backward()
            self.optimizer.step()

    def forward(self, feat: Tensor) -> Tensor:
        return self.head(feat).mean


def make_world(task: Spread, learned: LearnedReward | None = None) -> SimpleNamespace:
    """What `ImagBehavior` asks of a world model, by the task itself."""
    reward = learned or task.reward
    return SimpleNamespace(
        img_step=task.img_step,
        features=task.features,
        parameters=lambda: iter(() if learned is None else learned.parameters()),
        foresee=lambda feat, action: (reward(feat[:, 1:]), torch.ones(action.shape[:2])),
    )


def make_behavior(
    task: Spread,
    horizon: int = 15,
    entropy: float = 1e-3,
    pools: bool = True,
    gradient: str = "dynamics",
) -> ImagBehavior:
    """Actors and critic with the defaults of `configs.yaml`."""
    behavior = ImagBehavior(
        *(task.feat, [2] * task.agents, False, 1),
        **{"units": 128, "layers": 2, "min_std": 0.1, "max_std": 1.0, "unimix": 0.01},
        horizon=horizon,
        starts=128,
        discount=0.95,
        lam=0.95,
        entropy=entropy,
        imag_gradient=gradient,
        slow_rate=0.02,
        parts=task.parts if pools else (),
    )
    behavior.resolve(torch.zeros(task.feat))  # motion is exact
    return behavior


def play(
    task: Spread,
    behavior: ImagBehavior,
    scenes: int,
    steps: int,
    explore: bool,
    restart: float = 0.0,
) -> tuple[Tensor, Tensor]:
    """States (scenes, steps, 6 N) and the mean return of new scenes.

    With `restart`, that share of the scenes is replaced by new ones at every step.
    """
    none, state, states, total = torch.zeros(scenes, 0, 1), task.new_scenes(scenes), [], 0.0
    with torch.no_grad():
        for _ in range(steps):
            state = torch.where(torch.rand(scenes, 1) < restart, task.new_scenes(scenes), state)
            actors = behavior.actors(task.features((state, none)))
            action = actors.sample() if explore else actors.mode
            state, _ = task.img_step((state, none), action.clamp(-1, 1))
            total = total + task.reward(task.features((state, none))).mean()
            states.append(state)
    return torch.stack(states, 1), total


def learn(
    behavior: ImagBehavior, world: SimpleNamespace, optimizer: LaProp, starts: Tensor
) -> None:
    """One update from states (B, T, 6 N)."""
    ends = torch.zeros(starts.shape[:2], dtype=torch.bool)
    losses, _ = behavior.loss(world, (starts, starts[..., :0, None]), ends)
    optimizer.zero_grad()
    (losses["actor"].mean() + losses["value"].mean()).backward()
    optimizer.step()
    behavior.update_slow()


def main() -> None:
    """Train, and print the real return now and then."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--agents", type=int, default=3)
    parser.add_argument("--gradient", choices=("dynamics", "reinforce"), default="dynamics")
    parser.add_argument("--reward", choices=("exact", "flat", "pooled"), default="exact")
    parser.add_argument("--flat", action="store_true", help="actors and critic pool nothing")
    parser.add_argument("--episode", type=int, default=100, help="steps of a training episode")
    parser.add_argument("--restart", type=float, default=0.0, help="share of steps that end one")
    parser.add_argument("--updates", type=int, default=900)
    parser.add_argument("--period", type=int, default=40, help="updates per 6,400 steps")
    parser.add_argument("--horizon", type=int, default=15)
    parser.add_argument("--lr", type=float, default=1e-3, help="of the actors")
    parser.add_argument("--entropy", type=float, default=1e-3)
    parser.add_argument("--warmup", type=int, default=200)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    torch.manual_seed(args.seed)
    task = Spread(args.agents)
    learned = None if args.reward == "exact" else LearnedReward(task, args.reward == "pooled")
    world = make_world(task, learned)
    behavior = make_behavior(task, args.horizon, args.entropy, not args.flat, args.gradient)
    groups = [
        {"params": behavior.actors.parameters(), "lr": args.lr},
        {"params": behavior.critic.parameters(), "lr": 1e-3},
    ]
    optimizer = LaProp(groups, warmup=args.warmup)
    pool = task.new_scenes(0)
    for update in range(args.updates):
        if update % args.period == 0:
            scenes = ROWS // args.episode
            states, _ = play(task, behavior, scenes, args.episode, True, args.restart)
            pool = torch.cat([pool, states.flatten(0, 1)])
            if learned:
                learned.seen = world.features((pool, pool))
                learned.learn(args.period)
        learn(behavior, world, optimizer, pool[torch.randint(len(pool), (32, 16))])
        if (update + 1) % 300 == 0:
            _, total = play(task, behavior, 256, 100, explore=False)
            print(f"{update + 1} updates, {len(pool):,} steps: return {total:.1f}", flush=True)


if __name__ == "__main__":
    main()
