"""Experience: a ring of rows in memory (`Replay`) and whole episodes on disk (`EpisodeFolder`).

A row is what one step of one environment copy leaves behind: observations, reward, flags and the
action that led there. B counts sequences, T time steps, L the rows that the ring holds of a copy.
"""

import collections
import datetime
import math
import os
import queue
import re
import threading
import uuid
import warnings
import zipfile
from collections.abc import Iterator, Sequence
from pathlib import Path

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
    ):
        """Reserve `capacity` rows over all copies; `latents` are those keys of `spaces`."""
        self.length = capacity // num_envs
        if self.length < 2:
            raise ValueError(f"a replay of {num_envs} copies needs room for {2 * num_envs} rows")
        self.num_envs = num_envs
        self.spaces = spaces
        self.latents = tuple(latents)
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
        self._generator.set_state(state.cpu())

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
            self.rings["is_first"][head] = True
        self.written += 1

    def sample(self, batch: int, length: int) -> tuple[dict, Tensor]:
        """Draw sequences of consecutive rows of one copy, uniformly over copies and starts.

        Returns a dict of (B, T, ...) without the latents, plus "initial": the latents (B, ...) of
        the row before each sequence, zeros where it starts an episode or the first row ever
        written; and an index for `write_back`, valid until the next `add`.
        """
        # Once rows have been overwritten, the oldest one left has lost the row before it.
        oldest = int(self.written > self.length)
        starts = self.steps_per_copy - length + 1
        if starts <= oldest:
            held = f"{self.steps_per_copy} rows of each copy, with room for {self.length}"
            raise ValueError(f"cannot sample {length} rows in a row: the replay holds {held}")
        position = self._random(oldest, starts, batch)
        return self._gather(position, self._random(0, self.num_envs, batch), length)

    def sample_episode_starts(self, batch: int, length: int) -> dict:
        """Draw sequences (as `sample` returns) that begin where an episode does and stay within it.

        If no episode has `length` rows in the ring, the longest are drawn, at their own length.
        Raises ValueError if no episode begins in the ring. Waits for the device.
        """
        steps = self.steps_per_copy
        position = torch.arange(steps, device=self.device)
        first = self.rings["is_first"][self._row(position)]  # (steps, num_envs), oldest first
        if not first.any():
            raise ValueError("no episode begins in the replay")
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
            past = self._take(key, before)
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
    if device.type != "cpu":
        return torch.zeros(shape, dtype=dtype, device=device)
    # NumPy's zeros come from calloc, where torch.zeros would write to every page.
    pages = np.zeros(math.prod(shape) * dtype.itemsize, dtype=np.uint8)
    return torch.from_numpy(pages).view(dtype).view(shape)


def fill(replay: Replay, episodes: Sequence[Episode]) -> bool:
    """Lay the newest of `episodes` (oldest first) that fit into an empty replay, with zero latents.

    The copies' streams must be of one length: the episodes, head to tail, are cut into `num_envs`
    equal pieces, and the remainder at the end is dropped. Returns whether anything was loaded.
    """
    if replay.written:
        raise ValueError("only an empty replay can be filled")
    room = replay.length * replay.num_envs
    sizes = [len(episode["is_first"]) for episode in episodes]
    rows, oldest = sum(sizes), 0
    while rows > room and oldest < len(episodes) - 1:
        rows, oldest = rows - sizes[oldest], oldest + 1
    piece = min(rows, room) // replay.num_envs
    if not piece:
        return False
    start = 0  # place in the one long stream
    for episode, size in zip(episodes[oldest:], sizes[oldest:], strict=True):
        end = min(start + size, piece * replay.num_envs)
        place = torch.arange(start, end, device=replay.device)
        index = place % piece * replay.num_envs + place // piece
        for key in replay.spaces.keys() - set(replay.latents):
            replay._put(key, index, torch.from_numpy(episode[key][: end - start]))
        start = end
    replay.written = replay._seam = piece
    return True


class EpisodeFolder:
    """Whole episodes as one file each, "<UTC time>-<id>-<length>.npz", the oldest pruned first.

    Rows are collected where they are; when an episode ends, it goes to the host and a thread
    writes it. An episode without its beginning or its end never becomes a file. Lengths and
    steps count transitions: one less than an episode has rows.
    """

    def __init__(
        self,
        folder: Path | str,
        limit_steps: int,
        spaces: Spaces,
        keys: Sequence[str] | None = None,
        queue_size: int = 64,
    ):
        """Keep at most `limit_steps` steps in `folder`, which is made when first written to.

        Files hold `keys`, all of `spaces` if None. While `queue_size` episodes wait to be written,
        so does the caller of `add`.
        """
        self.folder = Path(folder)
        self.limit_steps = limit_steps
        self.spaces = {key: spaces[key] for key in (spaces if keys is None else keys)}
        own = re.compile(r"(\d{8})T(\d{12})-[0-9a-f]{8}-(\d+)\.npz")
        found = [own.fullmatch(path.name) for path in sorted(self.folder.glob("*.npz"))]
        self._files = collections.deque((name[0], int(name[3])) for name in found if name)
        self._steps = sum(steps for _, steps in self._files)
        self._stamp = max((int(name[1] + name[2]) for name in found if name), default=0)
        self._rows: Replay | None = None  # of the episodes under way
        self._queue: queue.Queue[Episode | None] = queue.Queue(queue_size)
        self._thread: threading.Thread | None = None
        self._problem = ""
        self._warned = False

    def add(self, rows: dict[str, Tensor], ended: bool | None = None) -> None:
        """Collect one row (num_envs, ...) of every copy and hand over the episodes that it ends.

        `ended=False` promises that no row is_last, which spares a GPU the wait for an answer.
        """
        if self._rows is None:
            num_envs = len(rows["is_last"])
            self._rows = Replay(64 * num_envs, num_envs, self.spaces, rows["is_last"].device)
            self._begins = np.zeros(num_envs, dtype=np.int64)  # no copy needs rows written earlier
        if self._rows.written - self._begins.min() == self._rows.length:
            self._make_room()
        self._rows.add(rows)
        if ended is not False and len(copies := np.flatnonzero(rows["is_last"].cpu().numpy())):
            self._hand_over(copies)
        endless = self._rows.written - self._begins > self.limit_steps + 1
        if endless.any():
            self._begins[endless] = self._rows.written
            self._problem = f"an episode is longer than the {self.limit_steps} steps of its folder"
        self._report()

    def flush(self) -> None:
        """Wait until every episode handed over has been written."""
        self._queue.join()
        self._report()

    def close(self) -> None:
        """Wait as `flush` does, then end the thread (which `add` would start again)."""
        if self._thread is not None:
            self._queue.put(None)
            self._thread.join()
            self._thread = None
        self._report()

    def load(self, max_steps: int | None = None) -> list[Episode]:
        """The newest episodes, `max_steps` steps at most, oldest first.

        A file that does not hold an episode of these spaces is skipped with a warning.
        """
        episodes, steps = [], 0
        for path in sorted(self.folder.glob("*.npz"), reverse=True):
            try:
                episode = self._read(path)
            except Exception as error:  # a hostile archive can raise nearly anything
                warnings.warn(f"skipping {path}: {str(error) or repr(error)}", stacklevel=2)
                continue
            steps += len(episode["is_first"]) - 1
            if max_steps is not None and steps > max_steps:
                break
            episodes.append(episode)
        return episodes[::-1]

    def _make_room(self) -> None:
        old = self._rows
        self._rows = Replay(2 * len(old), old.num_envs, self.spaces, old.device)
        for key, ring in old.rings.items():
            self._rows.rings[key][: old.length] = ring.roll(-(old.written % old.length), 0)
        self._rows.written = old.length
        self._begins -= old.written - old.length

    def _hand_over(self, copies: np.ndarray) -> None:
        """Give the writer the episodes that the newest row of `copies` ends."""
        if self._thread is None:
            self._thread = threading.Thread(target=self._work, daemon=True)
            self._thread.start()
        start, end = int(self._begins[copies].min()), self._rows.written
        time = torch.arange(start, end, device=self._rows.device) % self._rows.length
        chosen = torch.from_numpy(copies).to(self._rows.device)
        rows = {  # one transfer a key, however many episodes end
            key: ring.index_select(1, chosen).index_select(0, time).cpu().numpy()
            for key, ring in self._rows.rings.items()
        }
        for column, copy in enumerate(copies):
            # From the latest beginning on: what a reset interrupted before it is dropped.
            begins = start + np.flatnonzero(rows["is_first"][:, column])
            if len(begins) and self._begins[copy] <= begins[-1] < end - 1:
                part = slice(begins[-1] - start, None)
                self._queue.put({key: value[part, column].copy() for key, value in rows.items()})
        self._begins[copies] = end

    def _work(self) -> None:
        while True:
            episode = self._queue.get()
            try:
                if episode is None:
                    return
                self._write(episode)
            except Exception as error:  # whatever it is, recording must not end the run
                self._problem = f"cannot write to {self.folder}: {str(error) or repr(error)}"
            finally:
                self._queue.task_done()

    def _write(self, episode: Episode) -> None:
        # Names must sort by age even when the clock stands still or jumps back.
        now = datetime.datetime.now(datetime.UTC)
        self._stamp = max(int(f"{now:%Y%m%d%H%M%S%f}"), self._stamp + 1)
        day, time = divmod(self._stamp, 10**12)
        steps = len(episode["is_first"]) - 1
        name = f"{day:08}T{time:012}-{uuid.uuid4().hex[:8]}-{steps}.npz"
        self.folder.mkdir(parents=True, exist_ok=True)
        temporary = self.folder / ".episode.tmp"  # one name: what a kill leaves is overwritten
        try:
            with open(temporary, "wb") as file:
                np.savez_compressed(file, **episode)
            os.replace(temporary, self.folder / name)
        finally:
            temporary.unlink(missing_ok=True)
        self._files.append((name, steps))
        self._steps += steps
        while self._steps > self.limit_steps:
            name, steps = self._files.popleft()
            self._steps -= steps
            (self.folder / name).unlink(missing_ok=True)

    def _report(self) -> None:
        """Warn of the first problem only, in the caller's thread, where a warning may raise."""
        if self._problem and not self._warned:
            self._warned = True
            warnings.warn(self._problem, stacklevel=3)

    def _read(self, path: Path) -> Episode:
        if not (path.is_file() and zipfile.is_zipfile(path)):  # opening a pipe would never return
            raise ValueError("not a whole .npz archive")
        episode, most = {}, self.limit_steps + 1
        with np.load(path, allow_pickle=False) as archive:
            for key, (shape, dtype) in self.spaces.items():
                row = torch.empty(shape, dtype=dtype).numpy()
                if key not in archive.files:
                    raise ValueError(f"it lacks {key}")
                # A small file may unpack to more than the memory holds: look before.
                if archive.zip.getinfo(f"{key}.npy").file_size > most * row.nbytes + 4096:
                    raise ValueError(f"{key} has more than {most} rows")
                value = episode[key] = archive[key]
                if (value.shape[1:], value.dtype) != (row.shape, row.dtype):
                    kind = f"{value.dtype} {value.shape[1:]}"
                    raise ValueError(f"{key} is {kind} a row, not {row.dtype} {shape}")
                if not np.isfinite(value).all():
                    raise ValueError(f"{key} holds NaN or infinity")
        sizes = {len(value) for value in episode.values()}
        if len(sizes) > 1 or not 2 <= min(sizes) <= most:
            raise ValueError(f"it has {sorted(sizes)} rows, not one number from 2 to {most}")
        for key, place in (("is_first", 0), ("is_last", min(sizes) - 1)):
            if list(np.flatnonzero(episode[key])) != [place]:
                raise ValueError(f"{key} is not true in row {place} alone")
        return episode
