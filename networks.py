"""The parts that the world model and the behaviour are made of.

Symbols, here and in every other file:

    B  sequences, or parallel copies of the environment      N  agents
    T  time steps of a sequence                              A  action width of the widest agent
    M  imagined starts                                       R  rewards: 1 for a team, else N
    H  imagination horizon                                   E  embedding width
    S x K  categoricals and their classes                    D  deterministic width
    V  width of the vectors of all agents, head to tail
    F  width of a feature, the state as the heads see it: D + S * K for the RSSM's own, and then
       the vectors of all agents, seen or predicted (see `WorldModel.complete`)

Batch first, time on axis 1, agents after time: an action sequence is (B, T, N, A).
"""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from distributions import BoundedNormal, Histogram, OneHotActions
from latents import Normals, OneHots
from layers import (
    MLP,
    BlockLinear,
    Linear,
    PairMLP,
    RMSNorm,
    StackedLinear,
    activation,
    kinds_of,
    largest,
)

Latent = tuple[Tensor, Tensor]  # deter, stoch: memory and code of the RSSM
State = tuple[Tensor, Tensor, Tensor]  # and the vectors of the scene: see `WorldModel.complete`


class Head(nn.Module):
    """An MLP with a linear output (..., *shape), zero at the start where `scale` is 0."""

    def __init__(
        self,
        inputs: int,
        units: int,
        layers: int,
        shape: Sequence[int],
        scale: float,
        norm: bool = True,
    ):
        super().__init__()
        self.shape = tuple(shape)
        self.body = MLP(inputs, units, layers, norm)
        self.out = Linear(units, torch.Size(shape).numel(), scale=scale)

    def forward(self, feat: Tensor) -> Tensor:
        return self.out(self.body(feat)).float().view(*feat.shape[:-1], *self.shape)


class Sight(nn.Module):
    """Vectors (..., V) of a scene from an embedding of what is seen, and from what is remembered.

    They are linear in the embedding (..., E), which says where things are, but for what an MLP adds
    from it and the RSSM's features (..., F): how fast things go, and what is hidden.
    """

    def __init__(self, embed: int, inputs: int, units: int, layers: int, count: int, norm: bool):
        super().__init__()
        self.glimpse = Linear(embed, count)
        self.memory = Head(embed + inputs, units, layers, (count,), 0.0, norm)

    def forward(self, embed: Tensor, own: Tensor) -> Tensor:
        return self.glimpse(embed).float() + self.memory(torch.cat([embed, own], -1))


class NumberHead(Head):
    """A head that predicts `count` numbers as histograms, 0 at the start."""

    def __init__(
        self,
        inputs: int,
        units: int,
        layers: int,
        count: int,
        norm: bool = True,
        bins: int = 255,
    ):
        super().__init__(inputs, units, layers, (count, bins), scale=0.0, norm=norm)
        self.register_buffer("bins", Histogram.make_bins(bins), persistent=False)

    def forward(self, feat: Tensor) -> Histogram:
        """(..., F) to a distribution over (..., count)."""
        return Histogram(super().forward(feat), self.bins)


class TeamView(nn.Module):
    """What the vectors of all agents amount to, through one MLP for all agents of a kind.

    Kinds are those of `kinds_of`. What their MLP makes of each vector, and of each pair in it, is
    pooled by the maximum, so that what is learned about one agent holds for all of its kind.
    `parts` are the widths of what each agent's vector is joined from.
    """

    def __init__(self, parts: Sequence[Sequence[int]], units: int, norm: bool = True):
        super().__init__()
        self.widths = [sum(own) for own in parts]
        self.members = kinds_of([tuple(own) for own in parts])
        self.mlps = nn.ModuleList(PairMLP(parts[kind[0]], units, norm) for kind in self.members)
        self.outputs = sum(units + mlp.pairs * mlp.SEEN for mlp in self.mlps)
        order = [i for members in self.members for i in members]
        place = torch.tensor([order.index(i) for i in range(len(order))], dtype=torch.long)
        self.register_buffer("place", place, persistent=False)

    def resolve(self, error: Tensor) -> None:
        """Take in how well vectors are predicted: mean square errors (sum of widths)."""
        parts = error.split(self.widths) if self.widths else ()
        for members, mlp in zip(self.members, self.mlps, strict=True):
            mlp.resolve(torch.stack([parts[i] for i in members]).mean(0))

    def forward(self, vectors: Tensor) -> tuple[Tensor, Tensor]:
        """Vectors head to tail (..., sum of widths), as the decoder has them, each and pooled.

        Returns (..., N, units) and (..., outputs), or twice `vectors` if they are of width 0.
        """
        if not self.widths:
            return vectors, vectors
        parts = vectors.split(self.widths, -1)
        seen = [
            mlp(torch.stack([parts[i] for i in members], -2))
            for members, mlp in zip(self.members, self.mlps, strict=True)
        ]
        pooled = torch.cat([largest(part) for both in seen for part in both], -1)
        views = [view for view, _ in seen]
        if len(views) == 1:
            return views[0], pooled
        return torch.cat(views, -2).index_select(-2, self.place), pooled


class TeamHead(nn.Module):
    """Predicts numbers from features and from a `TeamView` of the vectors at their end.

    The reward head and the critic: from the state alone, they know the scenes that they were
    trained on and little of new ones (benchmarks/README.md); without `parts` of vectors, that is
    what they see. With a number for each agent (`count` is N), one head predicts them all, shown
    who the agent is and its own view.
    """

    def __init__(
        self,
        inputs: int,
        parts: Sequence[Sequence[int]],
        units: int,
        layers: int,
        count: int,
        norm: bool = True,
    ):
        super().__init__()
        self.shape = (count,)
        self.view = TeamView(parts, units, norm)
        self.vectors, own = sum(self.view.widths), count > 1 and count == len(parts)
        # What all share is multiplied once, not once for each agent.
        self.joint = Linear(inputs - self.vectors + self.view.outputs, units)
        self.own = Linear(units + count, units, bias=False) if own else None
        self.activation = activation(units, norm)
        self.head = NumberHead(units, units, layers - 1, 1 if own else count, norm)

    def forward(self, feat: Tensor) -> Histogram:
        """(..., F) to a distribution over (..., count)."""
        state, vectors = feat.split([feat.shape[-1] - self.vectors, self.vectors], -1)
        each, pooled = self.view(vectors)
        seen = self.joint(torch.cat([state, pooled], -1))
        if self.own is None:
            return self.head(self.activation(seen))
        who = torch.eye(each.shape[-2], device=feat.device).expand(*each.shape[:-1], -1)
        seen = seen.unsqueeze(-2) + self.own(torch.cat([each, who], -1))
        numbers = self.head(self.activation(seen))
        return Histogram(numbers.logits.squeeze(-2), numbers.bins)


class RSSM(nn.Module):
    """The recurrent state-space model over the joint state of the team.

    What it infers or imagines is a pair: deter (B, D), the memory, and stoch (B, S, K), drawn from
    what is believed. The state that it goes on from also has the vectors (B, V) of the scene (see
    `WorldModel.complete`), so that what follows from them need not be guessed from codes. The
    memory is a block-diagonal GRU (Hafner et al., Nature 2025). With `classes` 0, stoch holds S
    normals instead of categoricals.
    """

    def __init__(
        self,
        embed: int,
        actions: int,
        deter: int,
        stoch: int,
        classes: int,
        units: int,
        blocks: int = 8,
        unimix: float = 0.01,
        sharpness: float = 1.0,
        norm: bool = True,
        vectors: int = 0,
    ):
        super().__init__()
        self.vectors = vectors
        self.latent = OneHots(stoch, classes, unimix, sharpness) if classes else Normals(stoch)
        self.deter, self.blocks = deter, blocks
        drawn = self.latent.shape[0] * self.latent.shape[1]
        self.feat = deter + drawn
        self.from_deter = MLP(deter, units, 1, norm)
        self.from_stoch = MLP(drawn, units, 1, norm)
        self.from_scene = MLP(actions + vectors, units, 1, norm)
        # The inputs that all blocks share are a dense layer; the memory's own are block-diagonal.
        self.core_shared = Linear(3 * units, deter)
        self.core_own = BlockLinear(deter, deter, blocks)
        self.core_norm = activation(deter, norm)
        self.gates = BlockLinear(deter, 3 * deter, blocks)
        self.gates_bias = nn.Parameter(torch.zeros(3 * deter))
        self.prior_head = Head(deter, units, 2, self.latent.parameters, 1.0, norm)
        self.post_deter = Linear(deter, units)
        self.post_embed = Linear(embed, units, bias=False)
        self.post_head = nn.Sequential(
            activation(units, norm),
            Linear(units, torch.Size(self.latent.parameters).numel()),
            nn.Unflatten(-1, self.latent.parameters),
        )

    def initial(self, batch: int) -> State:
        """The state before an episode: all zeros."""
        shapes = (self.deter,), self.latent.shape, (self.vectors,)
        return tuple(self.gates_bias.new_zeros(batch, *shape) for shape in shapes)

    def pack(self, state: State) -> dict[str, Tensor]:
        """A state as the replay stores it: half precision, and the index of each category."""
        deter, stoch, vectors = state
        stoch = self.latent.pack(stoch)
        return {"deter": deter.half(), "stoch": stoch, "vectors": vectors.half()}

    def unpack(self, stored: dict[str, Tensor]) -> State:
        """The state that `pack` stored."""
        deter, vectors = stored["deter"].float(), stored["vectors"].float()
        return deter, self.latent.unpack(stored["stoch"]), vectors

    @staticmethod
    def bound_action(action: Tensor) -> Tensor:
        """Bring numbers beyond [-1, 1] back onto it, as the environment does, with a gradient."""
        return action / action.detach().abs().clamp(min=1.0)

    def features(self, latent: Latent) -> Tensor:
        """(..., D + S * K): what a pair of memory and code is to others."""
        deter, stoch = latent
        return torch.cat([deter, stoch.flatten(-2)], -1)

    def _next_deter(self, state: State, action: Tensor) -> Tensor:
        deter, stoch, vectors = state
        scene = torch.cat([self.bound_action(action).flatten(-2), vectors], -1)
        parts = [self.from_deter(deter), self.from_stoch(stoch.flatten(-2)), self.from_scene(scene)]
        hidden = self.core_norm(self.core_shared(torch.cat(parts, -1)) + self.core_own(deter))
        gates = (self.gates(hidden) + self.gates_bias).unflatten(-1, (self.blocks, 3, -1))
        reset, candidate, update = (gate.flatten(-2) for gate in gates.unbind(-2))
        candidate = torch.tanh(torch.sigmoid(reset) * candidate)
        return torch.lerp(deter, candidate, torch.sigmoid(update - 1))

    def prior(self, deter: Tensor) -> Tensor:
        """The belief (..., S, P) about the next stoch, before it is observed."""
        return self.latent.belief(self.prior_head(deter))

    def img_step(self, state: State, action: Tensor) -> Latent:
        """Imagine the memory and the code that the joint action (B, N, A) leads to."""
        deter = self._next_deter(state, action)
        return deter, self.latent.sample(self.prior(deter))

    def obs_step(self, state: State, action: Tensor, embed: Tensor, is_first: Tensor) -> Latent:
        """Infer memory and code (B, ...) from the last state, the action, and what is seen now."""
        keep = (~is_first).to(embed.dtype).unsqueeze(-1)
        return self.infer_step(state, action, self.post_embed(embed), keep)[:2]

    def observe(
        self,
        action: Tensor,
        embed: Tensor,
        is_first: Tensor,
        state: State,
        complete: Callable[[int, Latent], Tensor],
    ) -> tuple[State, Tensor]:
        """Infer the states of sequences; `state` is the one before the first step.

        Args: action (B, T, N, A) that led to each step, embed (B, T, E), is_first (B, T) bool;
        `complete` gives the vectors (B, V) of step t, of which memory and code are inferred.
        Returns: states (B, T, ...), posterior beliefs (B, T, S, P).
        """
        keep = (~is_first).to(embed.dtype).unsqueeze(-1)
        embed_part = self.post_embed(embed)
        states, beliefs = [], []
        for t in range(embed.shape[1]):
            deter, stoch, post = self.infer_step(state, action[:, t], embed_part[:, t], keep[:, t])
            vectors = complete(t, (deter, stoch))
            states.append((deter, stoch, vectors))
            beliefs.append(post)
            state = deter, stoch, vectors.detach()  # what follows must not bend them
        states = tuple(torch.stack(part, 1) for part in zip(*states, strict=True))
        return states, torch.stack(beliefs, 1)

    def infer_step(
        self, state: State, action: Tensor, embed_part: Tensor, keep: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Infer deter, stoch and the posterior of a step.

        action is (B, N, A), embed_part (B, units); keep (B, 1) is 0 where an episode begins.
        """
        deter, stoch, vectors = state
        before = deter * keep, stoch * keep.unsqueeze(-1), vectors * keep
        deter = self._next_deter(before, action * keep.unsqueeze(-1))
        post = self.latent.belief(self.post_head(self.post_deter(deter) + embed_part))
        return deter, self.latent.sample(post), post


class Actors(nn.Module):
    """One policy per agent, as one module of stacked weights, so that N cost about what one does.

    Every actor sees the joint state, and through a `TeamView` the vectors at its end: its own
    agent's, and what all amount to. All actors learn that view together, and the layer that reads
    the joint state, whose product is the widest; what an actor makes of them is its own. `parts`
    are those of the agents' vectors, if there are any.

    `action_sizes` holds each agent's action width; narrower agents are padded to the widest, here
    and nowhere else: the padding is masked out of samples, log-probabilities and entropies.
    """

    def __init__(
        self,
        inputs: int,
        action_sizes: Sequence[int],
        discrete: bool,
        units: int,
        layers: int,
        min_std: float = 0.1,
        max_std: float = 1.0,
        unimix: float = 0.01,
        parts: Sequence[Sequence[int]] = (),
    ):
        super().__init__()
        self.discrete, self.min_std, self.max_std, self.unimix = discrete, min_std, max_std, unimix
        count, width = len(action_sizes), max(action_sizes)
        self.view = TeamView(parts, units)
        self.vectors = sum(self.view.widths)
        self.joint = Linear(inputs + self.view.outputs, units)
        self.own = None
        if len(parts) == count:
            self.own = StackedLinear(count, units, units)
        body = [RMSNorm(units, count), nn.SiLU()]
        for _ in range(layers - 1):
            body += [StackedLinear(count, units, units), RMSNorm(units, count), nn.SiLU()]
        outputs = width if discrete else 2 * width
        self.body = nn.Sequential(*body, StackedLinear(count, units, outputs, scale=0.01))
        mask = torch.arange(width) < torch.tensor(action_sizes).unsqueeze(-1)
        self.register_buffer("mask", mask.float(), persistent=False)

    def forward(self, feat: Tensor) -> BoundedNormal | OneHotActions:
        """Joint state (..., F) to the distribution of the actions (..., N, A)."""
        out = self.body(self._see(feat.flatten(0, -2)))
        out = out.transpose(0, 1).unflatten(0, feat.shape[:-1])
        if self.discrete:
            return OneHotActions(out, self.mask, self.unimix)
        mean, width = out.chunk(2, -1)
        return BoundedNormal(mean, width, self.mask, self.min_std, self.max_std)

    def _see(self, feat: Tensor) -> Tensor:
        """(M, F) to the first layer of each actor (N, M, units), before its norm."""
        each, pooled = self.view(feat[:, feat.shape[-1] - self.vectors :])
        seen = self.joint(torch.cat([feat, pooled], -1))
        if self.own is not None:
            return seen + self.own(each.transpose(0, 1))
        return seen.expand(len(self.mask), -1, -1)
