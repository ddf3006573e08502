"""How well an actor knows what its own action was worth, where N agents share one reward.

    python -m benchmarks.credit

Estimates the same gradient in three ways: that of the return, with respect to what the actors do
first in 128 scenes, in a model of simple_spread that is exact (`exact_model.Spread`). `dynamics`
follows the model back to each action. `reinforce` weighs log-probabilities by the return, less the
critic's value, which no action of that moment changes. `counterfactual` (after COMA: Foerster et
al., 2018, arXiv 1705.08926) takes for actor i the return of a rollout in which a^i alone was drawn
anew as its baseline, with all later noise the same, and so needs N rollouts more. Printed is the
mean cosine between an estimate and the mean of many by `dynamics`, for N = 2, 4, 8. For `dynamics`
1 is without noise. The other two also count how later actions answer to the first one, which it
does not, so they may stay below 1 without noise.
"""

import argparse
from collections.abc import Callable

import torch
from torch import Tensor

from benchmarks.exact_model import Spread, learn, make_behavior, make_world, play
from models import ImagBehavior, frozen, lambda_return
from optimizer import LaProp

ESTIMATES = 16  # of each kind
REFERENCE = 256  # estimates by `dynamics` that the reference is the mean of


class Credit:
    """Gradients of the return with respect to the first joint action, from given starts."""

    def __init__(self, task: Spread, behavior: ImagBehavior, starts: Tensor):
        self.task, self.behavior = task, behavior
        self.world, self.pool = make_world(task), starts

    def draw(self) -> None:
        """Choose starts (M,) anew, and the noise of what follows the first action."""
        chosen = torch.randint(len(self.pool), (self.behavior.starts,))
        self.start = self.pool[chosen], self.pool[chosen][:, :0, None]
        self.noise = int(torch.randint(2**31, ()))
        self.feat = self.task.features(self.start)
        self.policy = self.behavior.actors(self.feat)

    def outcome(self, action: Tensor) -> Tensor:
        """Return (M,) of the start if the team takes `action` (M, N, A) first."""
        behavior = self.behavior
        with torch.random.fork_rng(), frozen(behavior.actors, behavior.critic):
            torch.manual_seed(self.noise)
            state = self.task.img_step(self.start, action)
            feat, _, _ = behavior.imagine(self.world, state)
            reward = self.task.reward(feat)
            discount = torch.full_like(reward, behavior.discount)
            later = lambda_return(reward, behavior.critic(feat).mean, discount, behavior.lam)
        return (reward[:, 0] + behavior.discount * later[:, 0]).squeeze(-1)

    def dynamics(self) -> Tensor:
        """What is to be increased: the return itself."""
        return self.outcome(self.policy.sample()).mean()

    def reinforce(self) -> Tensor:
        """The log-probabilities, weighed by how much more came than the critic expected."""
        action = self.policy.sample().detach()
        with torch.no_grad():
            gain = self.outcome(action) - self.behavior.critic(self.feat).mean.squeeze(-1)
        return (self.policy.log_prob(action).sum(-1) * gain).mean()

    def counterfactual(self) -> Tensor:
        """The log-probability of each agent, weighed by what its own action changed."""
        action, other = (self.policy.sample().detach() for _ in range(2))
        gains = []
        with torch.no_grad():
            outcome = self.outcome(action)
            for agent in range(self.task.agents):
                instead = action.clone()
                instead[:, agent] = other[:, agent]
                gains.append(outcome - self.outcome(instead))
        return (self.policy.log_prob(action) * torch.stack(gains, -1)).sum(-1).mean()

    def gradient(self, objective: Callable[[], Tensor]) -> Tensor:
        """One estimate, all parameters of the actors head to tail."""
        self.draw()
        parameters = list(self.behavior.actors.parameters())
        parts = torch.autograd.grad(objective(), parameters)
        return torch.cat([part.flatten() for part in parts])


def main() -> None:
    """Train each team a little, then print the table."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--agents", type=int, nargs="+", default=[2, 4, 8])
    parser.add_argument("--updates", type=int, default=100, help="before the gradients are taken")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    print("| agents | dynamics | reinforce | counterfactual |\n|---|---|---|---|")
    for agents in args.agents:
        torch.manual_seed(args.seed)
        task = Spread(agents)
        behavior, world = make_behavior(task), make_world(task)
        optimizer = LaProp([{"params": behavior.parameters(), "lr": 1e-3}], warmup=100)
        states = play(task, behavior, 64, 100, explore=True)[0].flatten(0, 1)
        for _ in range(args.updates):
            learn(behavior, world, optimizer, states[torch.randint(len(states), (32, 16))])
        states = play(task, behavior, 64, 100, explore=True)[0].flatten(0, 1)
        credit = Credit(task, behavior, states)
        reference = sum(credit.gradient(credit.dynamics) for _ in range(REFERENCE))
        row = [f"{agents}"]
        for objective in (credit.dynamics, credit.reinforce, credit.counterfactual):
            estimates = [credit.gradient(objective) for _ in range(ESTIMATES)]
            cosines = torch.stack([e @ reference / e.norm() / reference.norm() for e in estimates])
            row.append(f"{cosines.mean():.3f}")
        print(f"| {' | '.join(row)} |", flush=True)


if __name__ == "__main__":
    main()
