"""Experience in memory: a ring of rows.

A row is what one step of one environment copy leaves behind: observations, reward, flags and the
action that led there. B counts sequences, T time steps, L the rows that the ring holds of a copy.
"""

import itertools
import math
from collections.abc import Iterable, Iterator, Sequence

import numpy as np
import torch
from torch import Tensor

Spaces = dict[str, tuple[tuple[int, ...], torch.dtype]]
Episode = dict[str, np.ndarray]


class Replay:
    """A preallocated ring of the newest rows of every copy, one tensor (L, num_envs, ...) per key.

    All copies share one write head, a host integer, so that neither adding nor sampling ever waits
    for the device. Besides the rows, the ring keeps latents: the world model's state at each row.
    """

    def __init__(
        self,
        capacity: int,
        num_envs: int,
        spaces: Spaces,
        device: torch.device | str = "cpu",
        seed: int = 0,
        latents: Sequence[str] = (),
        recency: float = 1.0,
    ):
        """Reserve `capacity` rows over all copies; `latents` are those keys of `spaces`.

        With a `recency` above 1, newer rows are sampled more: see `sample`.
        """
        self.length = capacity // num_envs
        if self.length < 2:
            raise ValueError(f"a replay of {num_envs} copies needs room for {2 * num_envs} rows")
        self.num_envs = num_envs
        self.spaces = spaces
        self.latents, self.recency = tuple(latents), recency
        self.device = torch.device(device)
        self.rings = {
            key: _reserve((self.length, num_envs, *shape), dtype, self.device)
            for key, (shape, dtype) in spaces.items()
        }
        self.written = 0  # rows of each copy since the beginning, those overwritten included
        self._seam = -1  # value of `written` at which a filled past meets new experience
        self._generator = torch.Generator(self.device).manual_seed(seed)

    def __len__(self) -> int:
        return self.steps_per_copy * self.num_envs

    @property
    def steps_per_copy(self) -> int:
        """Rows held of each copy."""
        return min(self.written, self.length)

    @property
    def nbytes(self) -> int:
        """Bytes reserved in all."""
        return sum(ring.nbytes for ring in self.rings.values())

    def random_state(self) -> Tensor:
        """The state of the sampler, a byte tensor on the host."""
        return self._generator.get_state()

    def set_random_state(self, state: Tensor) -> None:
        """Go on from what `random_state` returned, unless that was on another kind of device."""
        if state.shape == self._generator.get_state().shape:
            self._generator.set_state(state.cpu())

    def state_dict(self) -> dict:
        """All rows held, which are not copied on a CPU, and the state of the sampler."""
        held = self.steps_per_copy
        # By way of NumPy, as torch would save the whole ring for a part of it.
        rows = {key: torch.from_numpy(r[:held].cpu().numpy()) for key, r in self.rings.items()}
        counts = {"written": self.written, "seam": self._seam}
        return {"rows": rows, "random": self.random_state(), **counts}

    def check(self, state: dict) -> None:
        """Raise ValueError if `state` is not that of a replay such as this."""
        held = min(state["written"], self.length)
        for key, ring in self.rings.items():
            rows = state["rows"].get(key)
            if rows is None or (rows.shape, rows.dtype) != ((held, *ring.shape[1:]), ring.dtype):
                raise ValueError(f"it has no {key} of {held} rows like {(*ring.shape[1:],)}")

    def load_state_dict(self, state: dict) -> None:
        """Go on from what `state_dict` returned."""
        for key, rows in state["rows"].items():
            self.rings[key][: len(rows)].copy_(rows)
        self.written, self._seam = state["written"], state["seam"]
        self.set_random_state(state["random"])

    def add(self, rows: dict[str, Tensor]) -> None:
        """Append one row (num_envs, ...) of every copy; keys without a space are ignored."""
        for key, (shape, _) in self.spaces.items():
            if key not in rows:
                raise ValueError(f"the rows lack {key}")
            if rows[key].shape != (self.num_envs, *shape):
                raise ValueError(f"{key} is {(*rows[key].shape,)}, not {(self.num_envs, *shape)}")
        head = self.written % self.length
        for key, ring in self.rings.items():
            ring[head].copy_(rows[key])
        if self.written == self._seam:
            # What was filled in ends in mid-episode: never join it to the row that came next.
            self.rings["is_first"][head] = self.rings["is_last"][head - 1] = True
        self.written += 1

    def sample(self, batch: int, length: int) -> tuple[dict, Tensor]:
        """Draw sequences of consecutive rows, uniformly over copies and, by `recency`, over time.

        The age of a sequence is that of the oldest, times a uniform number to that power. Returns a
        dict of (B, T, ...) without the latents, plus "initial": the latents (B, ...) of the row
        before each sequence, zeros where it starts an episode or the first row ever written; and an
        index for `write_back`, valid until the next `add`.
        """
        # Once rows have been overwritten, the oldest one left has lost the row before it.
        oldest = int(self.written > self.length)
        starts = self.steps_per_copy - length + 1
        if starts <= oldest:
            held = f"{self.steps_per_copy} rows of each copy, with room for {self.length}"
            raise ValueError(f"cannot sample {length} rows in a row: the replay holds {held}")
        share = torch.rand(batch, generator=self._generator, device=self.device)
        age = (share.pow(self.recency) * (starts - oldest)).long()
        position = (starts - 1 - age).clamp(min=oldest)  # a product may round up to the oldest
        return self._gather(position, self._random(0, self.num_envs, batch), length)

    def sample_episodes(self, batch: int, length: int) -> dict:
        """Draw sequences (as `sample` returns) of one episode each, from where it begins.

        If no episode has `length` rows in the ring, the longest are drawn, at their own length; if
        none begins there, one fills it, and sequences begin anywhere. Waits for the device.
        """
        steps = self.steps_per_copy
        position = torch.arange(steps, device=self.device)
        first = self.rings["is_first"][self._row(position)]  # (steps, num_envs), oldest first
        if not first.any():
            return self.sample(batch, min(length, steps - 1))[0]
        # Where the next episode begins, for each row: a minimum taken from the end backwards.
        begin = torch.where(first, position[:, None], steps)
        begin = torch.cat([begin[1:], torch.full_like(begin[:1], steps)])
        end = begin.flip(0).cummin(0).values.flip(0)
        rows = torch.where(first, end - position[:, None], 0)
        length = min(length, int(rows.max()))
        position, copy = torch.nonzero(rows >= length, as_tuple=True)
        choice = self._random(0, len(position), batch)
        return self._gather(position[choice], copy[choice], length)[0]

    def streams(self, chunk: int) -> Iterator[tuple[dict, Tensor]]:
        """Walk over all rows held in time order: (num_envs, chunk, ...) and index as in `sample`.

        The last chunk may be shorter. Latents written back are the next chunk's "initial" ones.
        """
        copy = torch.arange(self.num_envs, device=self.device)
        for start in range(0, self.steps_per_copy, chunk):
            length = min(chunk, self.steps_per_copy - start)
            yield self._gather(torch.full_like(copy, start), copy, length)

    def write_back(self, index: Tensor, latents: dict[str, Tensor]) -> None:
        """Store fresh latents (B, T, ...) at the rows of `index`; where two meet, either stays."""
        for key, value in latents.items():
            if value.shape != (shape := (*index.shape, *self.spaces[key][0])):
                raise ValueError(f"{key} is {(*value.shape,)}, not {shape}")
            self._put(key, index.flatten(), value.detach().flatten(0, 1))

    def _random(self, low: int, high: int, count: int) -> Tensor:
        return torch.randint(low, high, (count,), generator=self._generator, device=self.device)

    def _row(self, position: Tensor) -> Tensor:
        """Where in the ring the rows are that come `position` rows after the oldest one held."""
        return (position + (self.written - self.steps_per_copy)) % self.length

    def _gather(self, position: Tensor, copy: Tensor, length: int) -> tuple[dict, Tensor]:
        """The sequences of `copy` (B,) that start `position` (B,) rows after the oldest one."""
        time = torch.arange(length, device=self.device)
        index = self._row(position[:, None] + time) * self.num_envs + copy[:, None]  # (B, T)
        data = {key: self._take(key, index) for key in self.spaces if key not in self.latents}
        before = self._row(position - 1) * self.num_envs + copy
        no_past = (position == 0) | data["is_first"][:, 0]
        data["initial"] = {}
        for key in self.latents:
            past = torch.nan_to_num_(self._take(key, before), 0, 0, 0)  # a lost memory is none
            data["initial"][key] = past.masked_fill_(no_past.view(-1, *[1] * (past.ndim - 1)), 0)
        return data, index

    def _take(self, key: str, index: Tensor) -> Tensor:
        # On the CPU, index_select copies whole rows; indexing by tensors takes ten times as long.
        rows = self.rings[key].flatten(0, 1).index_select(0, index.flatten())
        return rows.unflatten(0, index.shape)

    def _put(self, key: str, index: Tensor, value: Tensor) -> None:
        # Unlike an indexed assignment, index_copy_ gives duplicates a fixed order on the CPU.
        ring = self.rings[key].flatten(0, 1)
        ring.index_copy_(0, index, value.to(ring))


def _reserve(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
    """Zeros; on the host they take memory page by page, as rows are written."""
    if device.type != "cpu" or not math.prod(shape):  # no bytes cannot be viewed as another type
        return torch.zeros(shape, dtype=dtype, device=device)
    # NumPy's zeros come from calloc, where torch.zeros would write to every page.
    pages = np.zeros(math.prod(shape) * dtype.itemsize, dtype=np.uint8)
    return torch.from_numpy(pages).view(dtype).view(shape)


def fill(replay: Replay, sizes: Sequence[int], episodes: Iterable[Episode]) -> bool:
    """Lay the newest of `episodes` (oldest first, of `sizes` rows) that fit into an empty replay.

    The copies' streams must be of one length: the episodes, head to tail, are cut into `num_envs`
    equal pieces, and the remainder at the end is dropped. Latents are zero. One episode is held
    at a time; some may turn out to be gone. Returns whether anything was loaded.
    """
    if replay.written:
        raise ValueError("only an empty replay can be filled")
    room = replay.length * replay.num_envs
    rows, oldest = sum(sizes), 0
    while rows > room and oldest < len(sizes) - 1:
        rows, oldest = rows - sizes[oldest], oldest + 1
    piece = min(rows, room) // replay.num_envs
    if not piece:
        return False
    start = 0  # place in the one long stream
    for episode in itertools.islice(episodes, oldest, None):
        end = min(start + len(episode["is_first"]), piece * replay.num_envs)
        place = torch.arange(start, end, device=replay.device)
        index = place % piece * replay.num_envs + place // piece
        for key in replay.spaces.keys() - set(replay.latents):
            replay._put(key, index, torch.from_numpy(episode[key][: end - start]))
        start = end
    if start < piece * replay.num_envs:
        piece = _recut(replay, piece, start)
    replay.written = replay._seam = piece
    return piece > 0


def _recut(replay: Replay, piece: int, rows: int) -> int:
    """Cut the first `rows` of a stream in pieces of `piece` rows anew; returns their new length."""
    fewer = rows // replay.num_envs
    for ring in replay.rings.values():
        stream = ring[:piece].transpose(0, 1).flatten(0, 1)[: fewer * replay.num_envs]
        ring[:fewer] = stream.unflatten(0, (replay.num_envs, fewer)).transpose(0, 1)
    return fewer
