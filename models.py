"""What is learned: the world model, the behaviour inside it (actors, critic), and their losses.

Shapes use the symbols of `networks.py`. Every loss is a (B, T) or (M, H) tensor in a dict; the
`loss_scales` of the configuration weigh them and `Dreamer.losses` sums them, once.
"""

import copy
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from distributions import Histogram
from latents import Normals, OneHots
from networks import RSSM, Actors, Head, Latent, Sight, State, TeamHead
from observations import (
    MultiDecoder,
    MultiEncoder,
    image_error,
    make_image_decoder,
    vector_sizes,
)
from scales import Precision, ReturnScale, RewardScale


def lambda_return(
    reward: Tensor, value: Tensor, discount: Tensor, lam: float | Tensor = 0.95
) -> Tensor:
    """TD(lambda) returns of states 0 to H-1 (Sutton & Barto, section 12).

    All arguments are (..., H+1, R), entry t about state t: the reward got on arriving there, its
    value, the discount of what follows. Returns (..., H, R):
    ret[t] = reward[t+1] + discount[t+1] * ((1 - lam) * value[t+1] + lam * ret[t+1]).
    """
    fixed = reward + discount * (1 - lam) * value
    carry = discount * lam
    ret = value[..., -1, :]
    returns = []
    for t in range(value.shape[-2] - 1, 0, -1):
        ret = fixed[..., t, :] + carry[..., t, :] * ret
        returns.append(ret)
    return torch.stack(returns[::-1], -2)


def kl_losses(
    latent: OneHots | Normals, post: Tensor, prior: Tensor, free: float
) -> tuple[Tensor, Tensor]:
    """DreamerV3's two halves of the KL, each with `free` nats: dynamics, representation."""
    dynamics = latent.kl(post.detach(), prior).clamp(min=free)
    representation = latent.kl(post, prior.detach()).clamp(min=free)
    return dynamics, representation


def combine_rewards(reward: Tensor, mode: str) -> Tensor:
    """The rewards (..., N) that agents got as those that are learned (..., R).

    `mean` and `sum` make one team reward; `agent` keeps each agent's own.
    """
    if mode == "agent":
        return reward
    team = reward.mean(-1, keepdim=True) if mode == "mean" else reward.sum(-1, keepdim=True)
    return team


@contextmanager
def frozen(*modules: nn.Module) -> Iterator[None]:
    """Record what runs inside without gradients for these modules' parameters.

    Gradients still flow through the modules to their inputs, which is what lets an actor learn
    through the world model without changing it.
    """
    parameters = [p for module in modules for p in module.parameters() if p.requires_grad]
    for parameter in parameters:
        parameter.requires_grad_(False)
    try:
        yield
    finally:
        for parameter in parameters:
            parameter.requires_grad_(True)


class WorldModel(nn.Module):
    """Encoder, RSSM and the heads that predict observations, rewards and continuation.

    Args: obs_shapes, what the model sees; action_shape (N, A); rewards R; predicted_shapes, what it
    predicts (by default what it sees); obs_parts, the widths of what vectors are joined from (by
    default one part each); the rest are the sizes of `configs.yaml`.
    """

    def __init__(
        self,
        obs_shapes: dict[str, tuple[int, ...]],
        action_shape: tuple[int, int],
        rewards: int,
        deter: int,
        stoch: int,
        classes: int,
        units: int,
        layers: int,
        cnn_depth: int,
        blocks: int,
        unimix: float,
        kl_free: float,
        sharpness: float,
        head_layers: int,
        norm: bool,
        cnn_points: int,
        predicted_shapes: dict[str, tuple[int, ...]] | None = None,
        obs_parts: dict[str, Sequence[int]] | None = None,
    ):
        super().__init__()
        self.kl_free = kl_free
        self.encoder = MultiEncoder(obs_shapes, units, layers, cnn_depth, norm, cnn_points)
        shapes = predicted_shapes or obs_shapes
        sizes = vector_sizes(shapes)
        self.widths = list(sizes.values())
        self.parts = [(obs_parts or {}).get(key, [width]) for key, width in sizes.items()]
        count = sum(self.widths)
        self.rssm = RSSM(
            self.encoder.outputs,
            action_shape[0] * action_shape[1],
            deter=deter,
            stoch=stoch,
            classes=classes,
            units=units,
            blocks=blocks,
            unimix=unimix,
            sharpness=sharpness,
            norm=norm,
            vectors=count,
        )
        own = self.rssm.feat
        self.decoder = MultiDecoder(shapes, own, units, layers, cnn_depth, norm, cnn_points)
        self.feat = own + count
        self.sight = self.motion = self.drift = None
        if not sizes.keys() <= obs_shapes.keys():
            self.sight = Sight(self.encoder.outputs, own, units, layers, count, norm)
        self.precision = Precision(count)
        if self.widths:
            actions = action_shape[0] * action_shape[1]
            self.motion = Head(self.feat + actions, units, layers, (count,), 0.0, norm)
            self.drift = Head(deter + count + actions, units, layers, (count,), 0.0, norm)
        self.reward = TeamHead(deter + count, self.parts, units, head_layers, rewards, norm)
        self.cont = Head(deter + count, units, head_layers, (), 1.0, norm)

    def features(self, state: State) -> Tensor:
        """(..., F): what heads, actors and critic see of a state: the RSSM's, and the vectors."""
        return torch.cat([self.rssm.features(state[:2]), state[2]], -1)

    def complete(self, latent: Latent, seen: Tensor, embed: Tensor) -> Tensor:
        """The vectors (..., V) of a scene of which the RSSM inferred memory and code.

        These are those `seen`, where all of them are, and else read off the embedding (..., E) of
        what is seen, as a code of the whole scene knows them several times less precisely
        (benchmarks/README.md); both as `Standard` has them.
        """
        return self.sight(embed, self.rssm.features(latent)) if self.sight else seen

    def seen(self, obs: dict[str, Tensor], embed: Tensor) -> Tensor:
        """The observed vectors (..., V), as `Standard` has them; of width 0 if not all are seen."""
        return embed[..., :0] if self.sight or not self.widths else self.decoder.standard(obs)

    def obs_step(self, state: State, action: Tensor, obs: dict[str, Tensor]) -> State:
        """Infer the state (B, ...) from the last one, the action (B, N, A), and what is seen."""
        embed = self.encoder(obs)
        latent = self.rssm.obs_step(state, action, embed, obs["is_first"])
        return (*latent, self.complete(latent, self.seen(obs, embed), embed))

    def img_step(self, state: State, action: Tensor) -> State:
        """Imagine the state that the joint action (B, N, A) leads to."""
        deter, stoch = self.rssm.img_step(state, action)
        own = self.rssm.features((deter, stoch))
        return deter, stoch, self.move(state[2], own, action)

    def move(self, vectors: Tensor, own: Tensor, action: Tensor) -> Tensor:
        """The vectors (..., V) that a joint action (..., N, A) leads to.

        It is their change that is predicted, from themselves: a code of the whole scene knows them
        several times less precisely (benchmarks/README.md). own (..., .) are the RSSM's features of
        the state that it leads to.
        """
        return self._shift(self.motion, vectors, own, action)

    def _shift(self, head: Head | None, vectors: Tensor, known: Tensor, action: Tensor) -> Tensor:
        """Vectors (..., V) and what a head adds to them, given what is `known` and the action."""
        if head is None:
            return vectors
        action = self.rssm.bound_action(action).flatten(-2)
        return vectors + head(torch.cat([known, vectors, action], -1))

    def expect(self, feat: Tensor, action: Tensor) -> Tensor:
        """What joint actions (B, T, N, A) lead to on average: memories and vectors (B, T, D + V).

        feat (B, T+1, F) are those of the states before and after each. The memory is that of the
        state after, which knows the state before and the action, and nothing else; the vectors move
        there without a code.

        Rewards and continuation are learned and imagined from this, not from states that are drawn:
        a rare event is told by many categoricals of a code at once, so hardly any draw has it, but
        how likely it is can be learned (benchmarks/README.md).
        """
        memory, vectors = feat[:, 1:, : self.rssm.deter], feat[:, :-1, self.rssm.feat :]
        return torch.cat([memory, self._shift(self.drift, vectors, memory, action)], -1)

    def foresee(self, feat: Tensor, action: Tensor) -> tuple[Tensor, Tensor]:
        """Rewards (M, H, R) and chances to go on (M, H) that imagined actions lead to.

        feat (M, H+1, F) are those of the states that actions (M, H, N, A) stand between.
        """
        expected = self.expect(feat, action)
        return self.reward(expected).mean, torch.sigmoid(self.cont(expected))

    def update_scales(self, batch: dict[str, Tensor]) -> None:
        """Take in how large the vectors of replayed sequences are, and how precise of late."""
        for part in (self.encoder, self.decoder):
            if part.standard:
                part.standard.update(batch)
        self.reward.view.resolve(self.precision.error)

    def infer(self, batch: dict[str, Tensor], embed: Tensor) -> tuple[State, Tensor]:
        """The states of replayed sequences, and the posterior, as `RSSM.observe`.

        `embed` (B, T, E) is what the encoder says of them.
        """
        sequence, seen = (batch["action"], embed, batch["is_first"]), self.seen(batch, embed)

        def complete(t: int, latent: Latent) -> Tensor:
            return self.complete(latent, seen[:, t], embed[:, t])

        return self.rssm.observe(*sequence, self.rssm.unpack(batch["initial"]), complete)

    def states(self, batch: dict[str, Tensor]) -> State:
        """The states (B, T, ...) of replayed sequences."""
        return self.infer(batch, self.encoder(batch))[0]

    def loss(
        self, batch: dict[str, Tensor], reward: Tensor
    ) -> tuple[dict[str, Tensor], State, Tensor, dict[str, Tensor]]:
        """Losses (B, T), states, their features and metrics of replayed sequences.

        `batch` holds rows (B, T, ...) and under `initial` the state before their first one;
        reward is (B, T, R).
        """
        latent = self.rssm.latent
        embed = self.encoder(batch)
        (deter, stoch, vectors), post = self.infer(batch, embed)
        prior = self.rssm.prior(deter)
        own = self.rssm.features((deter, stoch))
        truth = self.decoder.standard(batch) if self.sight else vectors
        guesses = {"vector": self.decoder.vectors(own)} if self.widths else {}
        if self.sight:
            guesses["embed"] = vectors
        losses = {name: (guess - truth).square().sum(-1) for name, guess in guesses.items()}
        if self.decoder.image:
            losses["image"] = self.decoder.image_loss(own, batch["image"])
        vectors = vectors.detach()  # the heads' losses must not bend them away from the truth
        feat = torch.cat([own, vectors], -1)
        losses |= self._step_losses(feat, truth, batch, reward)
        losses["dyn"], losses["rep"] = kl_losses(latent, post, prior, self.kl_free)
        post, prior = post.detach(), prior.detach()
        metrics = {
            "kl": latent.kl(post, prior).mean(),
            "prior_ent": latent.entropy(prior).mean(),
            "post_ent": latent.entropy(post).mean(),
        }
        return losses, (deter, stoch, vectors), feat, metrics

    def _step_losses(
        self, feat: Tensor, truth: Tensor, batch: dict[str, Tensor], reward: Tensor
    ) -> dict[str, Tensor]:
        """Losses (B, T) of what steps lead to, 0 where an episode begins.

        feat (B, T, F) are those of inferred states, truth (B, T, V) the vectors observed.
        """
        action, follows = batch["action"][:, 1:], (~batch["is_first"][:, 1:]).float()
        memory, mean = self.expect(feat, action).split([self.rssm.deter, truth.shape[-1]], -1)
        losses = self._head_losses(torch.cat([memory, mean.detach()], -1), batch, reward)
        if self.widths:
            moved = self._moved(feat, action)
            guesses = {"next_vector": moved, "mean_vector": mean}
            squares = {name: (guess - truth[:, 1:]).square() for name, guess in guesses.items()}
            self.precision.update(squares["next_vector"], follows)
            losses |= {name: square.sum(-1) for name, square in squares.items()}
        return {name: F.pad(loss * follows, (1, 0)) for name, loss in losses.items()}

    def _moved(self, feat: Tensor, action: Tensor) -> Tensor:
        """The vectors (B, T, V) of steps with features (B, T+1, F), by the posterior's codes.

        These tell how things went that could not be foreseen, such as a bounce. Moved by a code
        that does not tell, vectors would be the mean of all ways it may go: smoother than what
        happens, and actors learn to trust that (benchmarks/README.md).
        """
        own, vectors = feat.split([self.rssm.feat, feat.shape[-1] - self.rssm.feat], -1)
        return self.move(vectors[:, :-1], own[:, 1:], action)

    def _head_losses(
        self, expected: Tensor, batch: dict[str, Tensor], reward: Tensor
    ) -> dict[str, Tensor]:
        """Of the reward and continue heads (B, T-1), given what is expected (B, T-1, D + V)."""
        alive = (~batch["is_terminal"][:, 1:]).float()
        ends = F.binary_cross_entropy_with_logits(self.cont(expected), alive, reduction="none")
        return {"reward": self.reward(expected).loss(reward[:, 1:]).mean(-1), "cont": ends}

    @torch.no_grad()
    def open_loop(self, batch: dict[str, Tensor], observed: int = 5) -> Tensor:
        """Features (B, T, F) of a sequence of which only the first steps are seen.

        The rest is predicted from the real actions alone, as in imagination. The sequence holds one
        episode.
        """
        seen = {key: value[:, :observed] for key, value in batch.items() if key != "initial"}
        states = self.states(seen | {"initial": batch["initial"]})
        feats = list(self.features(states).unbind(1))
        state = tuple(part[:, -1] for part in states)
        for action in batch["action"][:, observed:].unbind(1):
            state = self.img_step(state, action)
            feats.append(self.features(state))
        return torch.stack(feats, 1)


class ImageProbe(nn.Module):
    """Draws what a world model believes, without teaching it: features are detached."""

    def __init__(self, inputs: int, size: int, depth: int, points: int = 0, units: int = 128):
        super().__init__()
        self.decoder = make_image_decoder(inputs, size, depth, points, units, norm=True)

    def forward(self, feat: Tensor) -> Tensor:
        """Features (..., F) to images (..., size, size, 3), about (0, 1)."""
        return self.decoder(feat.detach())

    def loss(self, feat: Tensor, image: Tensor) -> Tensor:
        """The `image_error` (...) of what it draws of features (..., F)."""
        return image_error(self(feat), image)


class ImagBehavior(nn.Module):
    """The actors, one per agent, and the critic of the joint state, learning in imagination."""

    def __init__(
        self,
        feat: int,
        action_sizes: Sequence[int],
        discrete: bool,
        rewards: int,
        units: int,
        layers: int,
        min_std: float,
        max_std: float,
        unimix: float,
        horizon: int,
        starts: int,
        discount: float,
        lam: float,
        entropy: float,
        imag_gradient: str,
        slow_rate: float,
        parts: Sequence[Sequence[int]] = (),
    ):
        super().__init__()
        self.actors = Actors(
            feat,
            action_sizes,
            discrete,
            units,
            layers,
            min_std=min_std,
            max_std=max_std,
            unimix=unimix,
            parts=parts,
        )
        self.critic = TeamHead(feat, parts, units, layers, rewards)
        self.slow_critic = copy.deepcopy(self.critic).requires_grad_(False)
        self.scale = ReturnScale(rewards)
        self.horizon, self.starts = horizon, starts
        self.discount, self.lam, self.entropy = discount, lam, entropy
        self.imag_gradient, self.slow_rate = imag_gradient, slow_rate

    def imagine(
        self, world: WorldModel, state: State, learner: Tensor | None = None
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Let all agents act in the world model for H steps from states (M, ...).

        With `learner` (M, N), only marked actions carry a gradient. Returns features (M, H+1, F),
        actions (M, H, N, A) and the policies' entropies (M, H, N).
        """
        feats, actions, entropies = [world.features(state)], [], []
        for _ in range(self.horizon):
            state, feat, action, entropy = self.imagine_step(world, state, feats[-1], learner)
            feats.append(feat)
            actions.append(action)
            entropies.append(entropy)
        return torch.stack(feats, 1), torch.stack(actions, 1), torch.stack(entropies, 1)

    def imagine_step(
        self, world: WorldModel, state: State, feat: Tensor, learner: Tensor | None
    ) -> tuple[State, Tensor, Tensor, Tensor]:
        """Let all agents act once: the next state and its features, their actions and entropies."""
        policy = self.actors(feat.detach())
        action = policy.sample()
        if learner is not None:
            action = torch.where(learner.unsqueeze(-1), action, action.detach())
        state = world.img_step(state, action)
        return state, world.features(state), action, policy.entropy()

    def loss(
        self, world: WorldModel, state: State, is_terminal: Tensor
    ) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """Losses (M, H) and metrics of one imagined rollout from replayed states (B, T, ...)."""
        start, alive = self._choose_starts(state, is_terminal)
        own, through_model = self.critic.shape[0] > 1, self.imag_gradient == "dynamics"
        learner = self._learners(len(alive)) if own and through_model else None
        with frozen(world, self.critic), torch.set_grad_enabled(through_model):
            feat, action, entropy = self.imagine(world, start, learner)
            reward, cont = world.foresee(feat, action)
            # From here on entry t is about state t; nothing depends on those of the first one.
            reward = F.pad(reward, (0, 0, 1, 0))
            discount = F.pad(self.discount * cont, (1, 0)).unsqueeze(-1).expand_as(reward)
            value = self.critic(feat).mean
            returns = lambda_return(reward, value, discount, self.lam)
        follows = torch.cat([alive[:, None], discount[:, 1:-1, 0].detach()], 1)
        weight = follows.cumprod(1)  # (M, H): the share of futures that get this far
        scale = self.scale.update(returns)
        feat = feat.detach()[:, :-1]
        if through_model:
            gain = returns / scale
            if learner is not None:
                # Each start teaches one agent, by its own return; N restores the mean over starts.
                gain = (gain * learner.unsqueeze(1)).sum(-1, keepdim=True) * learner.shape[-1]
            objective = gain.squeeze(-1)
        else:
            policy = self.actors(feat)
            entropy = policy.entropy()
            advantage = (returns - value[:, :-1]) / scale
            objective = (policy.log_prob(action) * advantage).sum(-1)
        losses = {
            "actor": -weight * (objective + self.entropy * entropy.sum(-1)),
            "value": weight * self._critic_loss(self.critic(feat), feat, returns),
        }
        # Of the real actions: padding is always within.
        beyond = (action.detach().abs() > 1).float().sum((-2, -1)) / self.actors.mask.sum()
        metrics = {
            "imag_reward": reward.detach()[:, 1:].mean(),
            "imag_return": returns.detach().mean(),
            "value_mean": value.detach().mean(),
            "return_scale": scale.mean(),
            "actor_entropy": entropy.detach().mean(),
            "action_saturation": beyond.mean(),
        }
        for agent, mean in enumerate(entropy.detach().mean((0, 1)).unbind()):
            metrics[f"agent{agent}_actor_entropy"] = mean
        return losses, metrics

    def replay_loss(
        self, feat: Tensor, reward: Tensor, is_last: Tensor, is_terminal: Tensor
    ) -> Tensor:
        """The critic's loss (B, T) on what really happened; it shapes the features too.

        feat (B, T, F), reward (B, T, R). Where an episode ends, its last value stands for the rest
        and nothing is learned across the seam.
        """
        value = self.critic(feat)
        discount = self.discount * (~is_terminal).float().unsqueeze(-1)
        lam = self.lam * (~is_last).float().unsqueeze(-1)
        mean = value.mean.detach()
        discount, lam = discount.expand_as(mean), lam.expand_as(mean)
        returns = lambda_return(reward, mean, discount, lam)
        before = Histogram(value.logits[:, :-1], value.bins)
        loss = self._critic_loss(before, feat[:, :-1], returns)
        return F.pad(loss * (~is_last[:, :-1]).float(), (0, 1))

    def _critic_loss(self, value: Histogram, feat: Tensor, returns: Tensor) -> Tensor:
        """Towards the returns, and towards the slow copy's own view, which steadies it."""
        with torch.no_grad():
            slow = self.slow_critic(feat.detach()).mean
        return (value.loss(returns) + value.loss(slow)).mean(-1)

    def _choose_starts(self, state: State, is_terminal: Tensor) -> tuple[State, Tensor]:
        """At most `starts` of the B * T states, detached, and 0 where no future follows (M,)."""
        state = tuple(part.detach().flatten(0, 1) for part in state)
        alive = (~is_terminal).float().flatten()
        if 0 < self.starts < len(alive):
            chosen = torch.randperm(len(alive), device=alive.device)[: self.starts]
            state, alive = tuple(part[chosen] for part in state), alive[chosen]
        return state, alive

    def _learners(self, count: int) -> Tensor:
        """(M, N): deal the starts out to the agents at random, as many to each."""
        agents = self.actors.mask.shape[0]
        turn = torch.randperm(count, device=self.actors.mask.device) % agents
        return F.one_hot(turn, agents).bool()

    def resolve(self, error: Tensor) -> None:
        """Let actors and critic tell apart what the world model does: see `TeamView.resolve`."""
        for part in (self.actors, self.critic, self.slow_critic):
            part.view.resolve(error)

    @torch.no_grad()
    def update_slow(self) -> None:
        """Move the slow critic a little towards the critic."""
        torch._foreach_lerp_(
            list(self.slow_critic.parameters()), list(self.critic.parameters()), self.slow_rate
        )


class Dreamer(nn.Module):
    """A team of agents with one world model: acts, and says what is to be minimised."""

    def __init__(
        self,
        world: WorldModel,
        behavior: ImagBehavior,
        probe: ImageProbe | None,
        reward: str,
        loss_scales: dict[str, float],
        reward_norm: bool = False,
    ):
        super().__init__()
        self.world, self.behavior, self.probe = world, behavior, probe
        self.reward, self.loss_scales = reward, loss_scales
        self.reward_scale = RewardScale() if reward_norm else None

    @property
    def device(self) -> torch.device:
        """Where the networks are."""
        return next(self.parameters()).device

    @property
    def draws(self) -> bool:
        """Whether there is a part that predicts images."""
        return self.probe is not None or self.world.decoder.image

    def compile_steps(self) -> None:
        """Let torch.compile fuse what is repeated step by step, when it is first called."""
        for part, name in ((self.world.rssm, "infer_step"), (self.behavior, "imagine_step")):
            setattr(part, name, torch.compile(getattr(part, name), dynamic=False))

    @torch.no_grad()
    def infer(self, batch: dict[str, Tensor]) -> State:
        """The states (B, T, ...) of replayed sequences."""
        return self.world.states(batch)

    @torch.no_grad()
    def policy(
        self, rows: dict[str, Tensor], action: Tensor, state: State, explore: bool
    ) -> tuple[Tensor, State]:
        """Act on what B copies show now: actions (B, N, A) within bounds, and the new state.

        action (B, N, A) and state are those of the step before. Without `explore`, the actors'
        modes are played.
        """
        state = self.world.obs_step(state, action, rows)
        actors = self.behavior.actors(self.world.features(state))
        action = actors.sample() if explore else actors.mode
        return action.clamp(-1.0, 1.0), state

    def losses(self, batch: dict[str, Tensor]) -> tuple[Tensor, State, dict[str, Tensor]]:
        """One number to minimise, the inferred states (to refresh the replay), and metrics."""
        self.world.update_scales(batch)
        self.behavior.resolve(self.world.precision.error)
        reward = combine_rewards(batch["reward"], self.reward)
        units = {}
        if self.reward_scale:
            units["reward_rms"] = self.reward_scale.update(reward)
            reward = reward / units["reward_rms"]
        losses, state, feat, metrics = self.world.loss(batch, reward)
        model_losses = list(losses)
        losses["repval"] = self.behavior.replay_loss(
            feat, reward, batch["is_last"], batch["is_terminal"]
        )
        assert all(loss.shape == batch["is_first"].shape for loss in losses.values())
        imagined, more = self.behavior.loss(self.world, state, batch["is_terminal"])
        assert len({loss.shape for loss in imagined.values()}) == 1
        losses |= imagined
        if strange := losses.keys() - self.loss_scales.keys():
            raise KeyError(f"loss_scales gives no weight for {', '.join(sorted(strange))}")
        means = {name: loss.mean() for name, loss in losses.items()}
        scaled = {name: self.loss_scales[name] * mean for name, mean in means.items()}
        metrics |= units | more | {f"{name}_loss": mean.detach() for name, mean in means.items()}
        metrics["model_loss"] = sum(scaled[name].detach() for name in model_losses)
        state = tuple(part.detach() for part in state)
        return sum(scaled.values()), state, metrics

    @torch.no_grad()
    def video_pred(self, batch: dict[str, Tensor]) -> Tensor:
        """Truth, prediction and error (T, 3 * size, B * size, 3) uint8, one above the other.

        The first five frames are observed, the rest predicted open-loop. `batch` holds images and
        sequences of one episode each.
        """
        feat = self.world.open_loop(batch)
        own = feat[..., : self.world.rssm.feat]
        predicted = self.probe(feat) if self.probe else self.world.decoder.cnn(own)
        predicted = predicted.clamp(0, 1)  # keypoints have no sigmoid
        truth = batch["image"].float() / 255
        error = (predicted - truth + 1) / 2
        video = torch.cat([truth, predicted, error], 2)  # (B, T, 3 * size, size, 3)
        video = torch.cat(list(video), 2)
        return (video * 255).round().to(torch.uint8)
