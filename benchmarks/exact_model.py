"""What holds simple_spread back: actors and critic in a model whose motion is exact.

    python -m benchmarks.exact_model                                # the reward is exact as well
    python -m benchmarks.exact_model --flat                         # actors and critic pool nothing
    python -m benchmarks.exact_model --reward pooled --period 300   # it is learned from few scenes

The team's `ImagBehavior` learns as in a run, but its world model is the task itself, written down:
three agents with drag, three landmarks, the reward of the scenario. With `--reward flat` or
`pooled` only the reward is predicted, from what was observed so far, by an MLP or by the world
model's `TeamHead`, so that its share of the trouble can be seen. Prints the real return (100
steps, 256 scenes, modes of the actors).
"""

import argparse
from types import SimpleNamespace

import torch
from torch import Tensor, nn

from distributions import symexp, symlog
from models import ImagBehavior
from networks import RSSM, NumberHead, TeamHead
from optimizer import LaProp

AGENTS, ROWS = 3, 6_400  # what the team sees anew after every --period updates
DRAG, STEP = 0.25, 0.1


class Motion:
    """Agents that accelerate and slow down; positions, velocities, landmarks are deter (B, 18)."""

    widths = [14] * AGENTS
    feat = sum(widths)

    def features(self, state: tuple[Tensor, Tensor]) -> Tensor:
        """(..., F): what the agents observe, symlog."""
        place, speed, landmarks = state[0].unflatten(-1, (3 * AGENTS, 2)).split(AGENTS, -2)
        to_landmarks = (landmarks.unsqueeze(-3) - place.unsqueeze(-2)).flatten(-2)
        between = place.unsqueeze(-3) - place.unsqueeze(-2)
        others = [
            torch.cat([between[..., i, :i, :], between[..., i, i + 1 :, :]], -2).flatten(-2)
            for i in range(AGENTS)
        ]
        seen = torch.cat([place, speed, to_landmarks, torch.stack(others, -2)], -1)
        return symlog(seen.flatten(-2))

    def img_step(self, state: tuple[Tensor, Tensor], action: Tensor) -> tuple[Tensor, Tensor]:
        """The next state, without collisions."""
        place, speed, landmarks = state[0].unflatten(-1, (3 * AGENTS, 2)).split(AGENTS, -2)
        speed = speed * (1 - DRAG) + STEP * RSSM.bound_action(action)
        deter = torch.cat([place + STEP * speed, speed, landmarks], -2).flatten(-2)
        return deter, state[1]


def exact_reward(feat: Tensor) -> Tensor:
    """(..., F) to (..., 1): minus the distances to landmarks and the collisions, as VMAS counts."""
    seen = symexp(feat.unflatten(-1, (AGENTS, 14)))
    to_landmarks, others = seen[..., 4:10], seen[..., 10:14].unflatten(-1, (2, 2))
    distance = (to_landmarks.unflatten(-1, (AGENTS, 2)).square().sum(-1) + 1e-6).sqrt()
    touching = torch.sigmoid((0.3 - others.square().sum(-1).sqrt()) * 50).sum((-2, -1))
    return (-AGENTS * distance.amin(-2).sum(-1) - touching).unsqueeze(-1)


class LearnedReward(nn.Module):
    """The reward as a head on the observations learns it, from all that was seen so far."""

    def __init__(self, pooled: bool):
        super().__init__()
        flat = NumberHead(Motion.feat, 128, 3, 1, norm=False)
        self.head = TeamHead(Motion.feat, Motion.widths, 128, 2, 1, norm=False) if pooled else flat
        self.optimizer = torch.optim.Adam(self.parameters(), lr=1e-3)
        self.seen: Tensor | None = None

    def learn(self, updates: int) -> None:
        """Regression on what was seen."""
        for _ in range(updates):
            feat = self.seen[torch.randint(len(self.seen), (512,))]
            loss = self.head(feat).loss(exact_reward(feat)).mean()
            self.optimizer.zero_grad()
            loss.backward()
            self.optimizer.step()

    def forward(self, feat: Tensor) -> Tensor:
        return self.head(feat).mean


def new_scenes(count: int) -> Tensor:
    """States (count, 18) of agents at rest, somewhere, with landmarks somewhere."""
    place, landmarks = torch.rand(2, count, 2 * AGENTS) * 2 - 1
    return torch.cat([place, torch.zeros_like(place), landmarks], -1)


def play(
    behavior: ImagBehavior, scenes: int, steps: int, explore: bool, restart: float = 0.0
) -> tuple[Tensor, Tensor]:
    """States (scenes, steps, 18) and the mean return of new scenes.

    With `restart`, that share of the scenes is replaced by new ones at every step.
    """
    motion, none = Motion(), torch.zeros(scenes, 0, 1)
    state, states, total = new_scenes(scenes), [], 0.0
    with torch.no_grad():
        for _ in range(steps):
            state = torch.where(torch.rand(scenes, 1) < restart, new_scenes(scenes), state)
            actors = behavior.actors(motion.features((state, none)))
            action = actors.sample() if explore else actors.mode
            state, _ = motion.img_step((state, none), action.clamp(-1, 1))
            total = total + exact_reward(motion.features((state, none))).mean()
            states.append(state)
    return torch.stack(states, 1), total


def main() -> None:
    """Train, and print the real return now and then."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
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
    learned = None if args.reward == "exact" else LearnedReward(args.reward == "pooled")
    reward = learned or exact_reward
    world = SimpleNamespace(
        rssm=Motion(),
        features=Motion().features,
        parameters=lambda: iter(() if learned is None else learned.parameters()),
        reward=lambda feat: SimpleNamespace(mean=reward(feat)),
        cont=lambda feat: torch.full(feat.shape[:-1], 20.0),
    )
    sizes = {"units": 128, "layers": 2, "min_std": 0.1, "max_std": 1.0, "unimix": 0.01}
    behavior = ImagBehavior(
        *(Motion.feat, [2] * AGENTS, False, 1),
        **sizes,
        horizon=args.horizon,
        starts=128,
        discount=0.95,
        lam=0.95,
        entropy=args.entropy,
        imag_gradient="dynamics",
        slow_rate=0.02,
        widths=() if args.flat else Motion.widths,
    )
    groups = [
        {"params": behavior.actors.parameters(), "lr": args.lr},
        {"params": behavior.critic.parameters(), "lr": 1e-3},
    ]
    optimizer = LaProp(groups, warmup=args.warmup)
    pool = torch.empty(0, 18)
    for update in range(args.updates):
        if update % args.period == 0:
            scenes = ROWS // args.episode
            states, _ = play(behavior, scenes, args.episode, explore=True, restart=args.restart)
            pool = torch.cat([pool, states.flatten(0, 1)])
            if learned:
                learned.seen = world.features((pool, pool))
                learned.learn(args.period)
        starts = pool[torch.randint(len(pool), (32, 16))]
        ends = torch.zeros(32, 16, dtype=torch.bool)
        losses, _ = behavior.loss(world, (starts, starts[..., :0, None]), ends)
        optimizer.zero_grad()
        (losses["actor"].mean() + losses["value"].mean()).backward()
        optimizer.step()
        behavior.update_slow()
        if (update + 1) % 300 == 0:
            _, total = play(behavior, 256, 100, explore=False)
            print(f"{update + 1} updates, {len(pool):,} steps: return {total:.1f}", flush=True)


if __name__ == "__main__":
    main()
