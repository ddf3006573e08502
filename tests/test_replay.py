"""The replay ring and the episode folder, against plain Python lists."""

import errno
import io
import os
import re
import threading
import warnings
import zipfile

import numpy as np
import pytest
import torch

import replay as module
from replay import EpisodeFolder, Replay, fill

SPACES = {
    "copy": ((), torch.int64),
    "time": ((), torch.int64),
    "agent0": ((3,), torch.float32),
    "image": ((2, 2, 3), torch.uint8),
    "is_first": ((), torch.bool),
    "is_last": ((), torch.bool),
    "action": ((2, 2), torch.float32),
}
LATENTS = {"deter": ((4,), torch.float16), "stoch": ((3,), torch.uint8)}
KEYS = list(SPACES)


def make_row(time, lengths):
    """Row `time` of copies whose episodes have `lengths` rows; it says where it is from."""
    copies, lengths = torch.arange(len(lengths)), torch.tensor(lengths)
    noise = torch.Generator().manual_seed(time)
    return {
        "copy": copies,
        "time": torch.full_like(copies, time),
        "agent0": torch.randn(len(lengths), 3, generator=noise),
        "image": torch.randint(0, 256, (len(lengths), 2, 2, 3), generator=noise),
        "is_first": time % lengths == 0,
        "is_last": time % lengths == lengths - 1,
        "action": torch.randn(len(lengths), 2, 2, generator=noise),
        "deter": latent(copies, time, 4),
        "stoch": latent(copies, time, 3),
    }


def latent(copy, time, width):
    """Small whole numbers, exact in float16 and uint8, and never zero."""
    return ((copy * 31 + time) % 200 + 1)[:, None].expand(-1, width)


def make_ring(steps, lengths=(7, 5, 11), capacity=60, **kwargs):
    ring = Replay(capacity, len(lengths), SPACES | LATENTS, latents=list(LATENTS), **kwargs)
    history = [make_row(time, lengths) for time in range(steps)]
    for row in history:
        ring.add(row)
    return ring, history


def make_episode(rows, start=0):
    """An episode as `EpisodeFolder.load` gives it."""
    episode = [make_row(start + time, [10**6]) for time in range(rows)]
    arrays = {
        key: torch.cat([row[key] for row in episode]).to(dtype).numpy()
        for key, (_, dtype) in SPACES.items()
    }
    arrays["is_first"][:], arrays["is_last"][:] = np.eye(rows, dtype=bool)[[0, -1]]
    return arrays


def check_sequences(data, history, ring):
    """Every sequence is a piece of the true history, with the latents of the row before it."""
    oldest = len(history) - ring.steps_per_copy
    for b, (copy, start) in enumerate(zip(data["copy"][:, 0], data["time"][:, 0], strict=True)):
        assert start >= oldest
        for t in range(data["time"].shape[1]):
            true = history[start + t]
            for key, (_, dtype) in SPACES.items():
                assert torch.equal(data[key][b, t], true[key][copy].to(dtype)), key
        fresh = start == oldest or data["is_first"][b, 0]
        for key, (_, dtype) in LATENTS.items():
            past = history[start - 1][key][copy].to(dtype)
            assert torch.equal(data["initial"][key][b], past * (not fresh)), key


@pytest.mark.parametrize("steps", [6, 19, 20, 21, 40, 67])
def test_samples_are_pieces_of_the_true_history(steps):
    ring, history = make_ring(steps)
    assert ring.steps_per_copy == min(steps, 20) and len(ring) == 3 * ring.steps_per_copy
    for length in (1, 4, 6):
        data, index = ring.sample(60, length)
        assert index.shape == data["time"].shape == (60, length)
        assert data["image"].shape == (60, length, 2, 2, 3) and data["image"].dtype == torch.uint8
        assert not set(LATENTS) & set(data)
        check_sequences(data, history, ring)
        if steps > ring.length:  # the row before each start is still there
            assert data["time"].min() > steps - ring.length


@pytest.mark.parametrize(("steps", "starts"), [(18, range(0, 14)), (53, range(34, 49))])
def test_sampling_is_uniform_over_copies_and_starts(steps, starts):
    ring, _ = make_ring(steps)
    draws, cells = 60_000, 3 * len(starts)
    data, _ = ring.sample(draws, 5)
    counts = torch.zeros(3, steps)
    counts.index_put_((data["copy"][:, 0], data["time"][:, 0]), torch.ones(()), accumulate=True)
    assert set(counts.sum(0).nonzero().flatten().tolist()) == set(starts)
    chi_square = ((counts[:, list(starts)] - draws / cells) ** 2 / (draws / cells)).sum()
    assert chi_square < cells + 5 * (2 * cells) ** 0.5  # five standard deviations


def test_too_long_a_sequence_is_an_error():
    ring, _ = make_ring(4)
    ring.sample(1, 4)
    with pytest.raises(ValueError, match="holds 4 rows of each copy, with room for 20"):
        ring.sample(1, 5)
    ring, _ = make_ring(21)  # the row before the oldest one is gone
    ring.sample(1, 19)
    with pytest.raises(ValueError, match="20 rows"):
        ring.sample(1, 20)


def test_write_back_changes_those_latents_and_nothing_else():
    ring, _ = make_ring(47)
    before = {key: value.clone() for key, value in ring.rings.items()}
    data, index = ring.sample(8, 4)
    written = {}
    fresh = {
        "deter": torch.randint(-9, 9, (8, 4, 4)).float().requires_grad_(),
        "stoch": torch.randint(0, 99, (8, 4, 3)),
    }
    ring.write_back(index, fresh)
    for b in range(8):
        for t in range(4):
            place = int(data["time"][b, t]) % ring.length, int(data["copy"][b, t])
            written.setdefault(place, []).append((b, t))
    for key, after in ring.rings.items():
        assert not after.requires_grad
        for place in np.ndindex(ring.length, 3):
            value = after[place]
            if key in LATENTS and place in written:
                assert any(torch.equal(value, fresh[key][at].to(value)) for at in written[place])
            else:
                assert torch.equal(value, before[key][place])


def test_latents_written_back_are_the_next_initial_ones():
    ring, _ = make_ring(9, lengths=(100, 100))
    _, index = next(ring.streams(9))
    deter = torch.arange(18.0).view(2, 9, 1).expand(2, 9, 4)
    ring.write_back(index, {"deter": deter})
    data, _ = ring.sample(50, 3)
    copy, start = data["copy"][:, 0], data["time"][:, 0]
    expected = torch.where(start[:, None] > 0, deter[copy, start - 1], 0)
    assert torch.equal(data["initial"]["deter"].float(), expected)


def test_write_back_refuses_the_wrong_shape():
    ring, _ = make_ring(9)
    _, index = ring.sample(4, 2)
    with pytest.raises(ValueError, match=r"deter is \(2, 4, 4\), not \(4, 2, 4\)"):
        ring.write_back(index, {"deter": torch.zeros(2, 4, 4)})


@pytest.mark.parametrize("steps", [20, 53])
def test_streams_walk_over_all_rows_in_time_order(steps):
    ring, history = make_ring(steps)
    chunks = list(ring.streams(7))
    assert [data["time"].shape for data, _ in chunks] == [(3, 7), (3, 7), (3, 6)]
    times = torch.cat([data["time"] for data, _ in chunks], 1)
    assert torch.equal(times, torch.arange(steps - 20, steps).expand(3, -1))
    for data, _ in chunks:
        check_sequences(data, history, ring)


@pytest.mark.parametrize("steps", [3, 20, 61, 64])
@pytest.mark.parametrize("length", [1, 3, 6, 9, 50])
def test_episode_starts_are_the_ones_a_search_finds(steps, length):
    ring, history = make_ring(steps)
    rows = {}  # of the part of each episode that is in the ring, by its beginning
    for copy in range(3):
        for now in range(steps - ring.steps_per_copy, steps):
            if history[now]["is_first"][copy]:
                start = now
                rows[copy, start] = 0
            if any(key[0] == copy for key in rows):
                rows[copy, start] += 1
    shown = min(length, max(rows.values()))
    data = ring.sample_episode_starts(150, length)
    assert data["time"].shape == (150, shown)
    assert not data["is_first"][:, 1:].any()
    found = set(zip(data["copy"][:, 0].tolist(), data["time"][:, 0].tolist(), strict=True))
    assert found == {key for key, count in rows.items() if count >= shown}
    check_sequences(data, history, ring)


def test_episode_starts_need_an_episode():
    ring, _ = make_ring(0)
    with pytest.raises(ValueError, match="no episode begins"):
        ring.sample_episode_starts(1, 5)
    ring.add(make_row(1, (7, 5, 11)))
    with pytest.raises(ValueError, match="no episode begins"):
        ring.sample_episode_starts(1, 5)


def test_add_names_what_is_wrong():
    ring, _ = make_ring(0)
    row = make_row(0, (7, 5, 11))
    with pytest.raises(ValueError, match="lack agent0"):
        ring.add({key: value for key, value in row.items() if key != "agent0"})
    with pytest.raises(ValueError, match=r"agent0 is \(3, 1\), not \(3, 3\)"):
        ring.add(row | {"agent0": torch.zeros(3, 1)})
    with pytest.raises(ValueError, match="needs room for 6 rows"):
        Replay(5, 3, SPACES)
    assert len(ring) == 0
    ring.add(row | {"unknown": torch.zeros(1)})
    assert len(ring) == 3


def test_random_state_round_trip():
    ring, _ = make_ring(30, seed=3)
    twin, _ = make_ring(30, seed=3)
    other, _ = make_ring(30, seed=4)
    assert torch.equal(ring.sample(50, 4)[1], twin.sample(50, 4)[1])
    assert not torch.equal(other.sample(50, 4)[1], twin.sample(50, 4)[1])
    state = ring.random_state()
    assert isinstance(state, torch.Tensor)
    expected = ring.sample(50, 4)[1], ring.sample_episode_starts(9, 3)["time"]
    other.set_random_state(state)
    assert torch.equal(other.sample(50, 4)[1], expected[0])
    assert torch.equal(other.sample_episode_starts(9, 3)["time"], expected[1])


def test_sampling_leaves_the_global_random_state_alone():
    ring, _ = make_ring(30)
    state = torch.get_rng_state()
    ring.sample(5, 4)
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.skipif(not os.path.exists("/proc/self/statm"), reason="needs Linux's /proc")
def test_memory_is_taken_as_rows_are_written():
    def resident():
        with open("/proc/self/statm") as file:
            return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")

    before = resident()
    spaces = {"image": ((64, 64, 3), torch.uint8), "is_first": ((), torch.bool)}
    ring = Replay(200_000, 16, spaces)
    assert ring.nbytes == 200_000 * (64 * 64 * 3 + 1)
    ring.add({"image": torch.ones(16, 64, 64, 3), "is_first": torch.ones(16, dtype=torch.bool)})
    assert ring.rings["image"][0].all() and not ring.rings["image"][-1].any()
    assert resident() - before < 2**26


def test_every_dtype_has_its_ring():
    for dtype in (torch.bfloat16, torch.float64, torch.bool, torch.int16):
        ring = Replay(8, 2, {"x": ((3,), dtype), "is_first": ((), torch.bool)})
        ring.add({"x": torch.ones(2, 3), "is_first": torch.ones(2)})
        assert torch.equal(ring.rings["x"][0], torch.ones(2, 3, dtype=dtype))


def test_fill_lays_episodes_head_to_tail():
    episodes = [make_episode(rows, start=100 * i) for i, rows in enumerate((7, 12, 5, 9))]
    ring = Replay(300, 4, SPACES | LATENTS, latents=list(LATENTS))
    assert fill(ring, episodes)
    assert ring.steps_per_copy == 33 // 4
    data, _ = next(ring.streams(100))
    for key in SPACES:
        stream = np.concatenate([episode[key] for episode in episodes])[:32]
        assert np.array_equal(data[key].flatten(0, 1).numpy(), stream), key
    assert data["is_first"].sum() == 4
    assert not any(ring.rings[key].any() for key in LATENTS)


def test_fill_keeps_the_newest_that_fit():
    ring = Replay(20, 2, SPACES)
    assert fill(ring, [make_episode(9, start=100 * i) for i in range(5)])
    data, _ = next(ring.streams(100))
    times = [*range(300, 309), *range(400, 409)]
    assert data["time"].flatten().tolist() == times
    ring = Replay(20, 2, SPACES)
    assert fill(ring, [make_episode(9), make_episode(50, start=100)])
    assert next(ring.streams(100))[0]["time"].flatten().tolist() == list(range(100, 120))


def test_fill_with_nothing_or_too_little_loads_nothing():
    ring = Replay(20, 4, SPACES)
    assert not fill(ring, []) and not fill(ring, [make_episode(3)])
    assert len(ring) == 0
    ring.add(make_row(1, (7, 7, 7, 7)))
    assert not ring.rings["is_first"].any()
    with pytest.raises(ValueError, match="empty"):
        fill(ring, [make_episode(9)])


def test_new_experience_is_not_joined_to_a_filled_past():
    ring = Replay(40, 2, SPACES | LATENTS, latents=list(LATENTS))
    fill(ring, [make_episode(9), make_episode(8, start=100)])
    for now in range(201, 204):
        ring.add(make_row(now, (1000, 1000)))
    data, _ = next(ring.streams(100))
    assert data["time"][1].tolist() == [*range(8, 9), *range(100, 107), *range(201, 204)]
    assert data["is_first"][1].nonzero().flatten().tolist() == [1, 8]


# The folder


def run_folder(folder, steps, lengths, start=0, **kwargs):
    for now in range(start, start + steps):
        folder.add(make_row(now, lengths), **kwargs)


def true_episodes(steps, lengths):
    """(copy, first row, last row) of every whole episode, by its end and copy."""
    return [
        (copy, now - length + 1, now)
        for now in range(steps)
        for copy, length in enumerate(lengths)
        if now % length == length - 1
    ]


def spans(episodes):
    return [(int(e["copy"][0]), int(e["time"][0]), int(e["time"][-1])) for e in episodes]


@pytest.mark.parametrize("lengths", [(7, 5, 11), (6, 6), (150, 40, 3), (130,)])
def test_whole_episodes_and_only_those_become_files(tmp_path, lengths):
    steps = 210
    folder = EpisodeFolder(tmp_path / "a" / "b", 10**6, SPACES | LATENTS, KEYS)
    run_folder(folder, steps, lengths)
    folder.close()
    episodes = EpisodeFolder(folder.folder, 10**6, SPACES).load()
    assert spans(episodes) == true_episodes(steps, lengths)
    for episode in episodes:
        assert list(episode) == KEYS
        copy, times = int(episode["copy"][0]), episode["time"]
        history = [make_row(int(now), lengths) for now in times]
        for key, (_, dtype) in SPACES.items():
            true = torch.stack([row[key][copy] for row in history]).to(dtype).numpy()
            assert np.array_equal(episode[key], true) and episode[key].dtype == true.dtype
    for path in folder.folder.iterdir():
        match = re.fullmatch(r"\d{8}T\d{12}-[0-9a-f]{8}-(\d+)\.npz", path.name)
        with np.load(path, allow_pickle=False) as file:
            assert sorted(file.files) == sorted(KEYS)
            assert int(match[1]) == len(file["time"]) - 1


def test_files_fill_a_replay_with_the_same_rows(tmp_path):
    folder = EpisodeFolder(tmp_path, 10**6, SPACES)
    run_folder(folder, 60, (7, 5, 11))
    folder.flush()
    episodes = folder.load()
    ring = Replay(1000, 3, SPACES | LATENTS, latents=list(LATENTS))
    assert fill(ring, episodes)
    data, _ = next(ring.streams(1000))
    assert spans(episodes) == true_episodes(60, (7, 5, 11))
    for key in SPACES:
        stream = np.concatenate([episode[key] for episode in episodes])
        stream = stream[: len(stream) // 3 * 3]
        assert np.array_equal(data[key].flatten(0, 1).numpy(), stream)
    folder.close()


def test_interrupted_episodes_are_absent(tmp_path):
    folder = EpisodeFolder(tmp_path, 10**6, SPACES)
    run_folder(folder, 10, (8, 8), start=3)  # begins in mid-episode: 3..7, 8..12
    run_folder(folder, 19, (8, 8), start=16)  # a reset: 16..23, 24..31, 32..34
    folder.close()
    assert spans(folder.load()) == [(c, s, s + 7) for s in (16, 24) for c in (0, 1)]


def test_rows_without_a_beginning_are_not_joined_to_an_earlier_episode(tmp_path):
    folder = EpisodeFolder(tmp_path, 10**6, SPACES)
    for now in range(12):
        row = make_row(now, (12, 12))
        row["is_first"][1], row["is_last"][1] = now in (0, 9), now in (5, 8, 9, 11)
        folder.add(row)
    folder.close()  # copy 1: 0..5 whole, 6..8 without a beginning, 9 alone, 10..11 without
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert spans(folder.load()) == [(1, 0, 5), (0, 0, 11)]


def test_collecting_makes_room_after_going_round(tmp_path):
    folder = EpisodeFolder(tmp_path, 10**6, SPACES)
    run_folder(folder, 40, (40, 20))
    run_folder(folder, 200, (200, 100), start=200)
    folder.close()
    episodes = folder.load()
    assert spans(episodes[:3]) == [(1, 0, 19), (0, 0, 39), (1, 20, 39)]
    assert spans(episodes[3:]) == [(1, 200, 299), (0, 200, 399), (1, 300, 399)]
    assert all((np.diff(episode["time"]) == 1).all() for episode in episodes)


def test_host_flag_skips_the_look_at_is_last(tmp_path):
    folder = EpisodeFolder(tmp_path, 10**6, SPACES)
    for now in range(16):
        folder.add(make_row(now, (8, 4)), ended=now % 4 == 3)
    run_folder(folder, 8, (8, 4), start=16, ended=False)
    folder.close()
    assert spans(folder.load()) == true_episodes(16, (8, 4))


def test_the_oldest_files_are_pruned(tmp_path):
    foreign = tmp_path / "00000000-mine.npz"
    foreign.write_bytes(b"not to be deleted")
    folder = EpisodeFolder(tmp_path, 20, SPACES)
    run_folder(folder, 60, (6,))
    folder.close()
    with pytest.warns(UserWarning, match="mine"):
        assert spans(folder.load()) == [(0, s, s + 5) for s in (36, 42, 48, 54)]
    folder = EpisodeFolder(tmp_path, 11, SPACES)  # what another process wrote counts too
    run_folder(folder, 6, (6,), start=60)
    folder.close()
    assert foreign.exists()
    foreign.unlink()
    assert spans(folder.load()) == [(0, 54, 59), (0, 60, 65)]


def test_endless_episodes_are_given_up(tmp_path):
    folder = EpisodeFolder(tmp_path, 50, SPACES)
    with pytest.warns(UserWarning, match="longer than the 50 steps") as caught:
        run_folder(folder, 400, (10**6, 20))
    assert len(caught) == 1
    assert folder._rows.length == 64  # memory stays bounded
    folder.close()
    assert {copy for copy, _, _ in spans(folder.load())} == {1}


def test_names_sort_by_age_when_the_clock_jumps_back(tmp_path, monkeypatch):
    hours = iter([12, 10, 10, 11, 9])

    class Clock(module.datetime.datetime):
        @classmethod
        def now(cls, tz):
            return cls(2030, 1, 2, next(hours), tzinfo=tz)

    monkeypatch.setattr(module.datetime, "datetime", Clock)
    folder = EpisodeFolder(tmp_path, 10**6, SPACES)
    run_folder(folder, 16, (4,))
    folder.close()
    folder = EpisodeFolder(tmp_path, 10**6, SPACES)  # the same after a restart
    run_folder(folder, 4, (4,), start=16)
    folder.close()
    assert spans(folder.load()) == [(0, s, s + 3) for s in range(0, 20, 4)]
    assert min(path.name for path in tmp_path.iterdir()).startswith("20300102T120000000000-")


def test_load_prefers_the_newest(tmp_path):
    folder = EpisodeFolder(tmp_path, 10**6, SPACES)
    run_folder(folder, 50, (5,))
    folder.close()
    assert spans(folder.load(max_steps=11)) == [(0, 40, 44), (0, 45, 49)]
    assert spans(folder.load(max_steps=12)) == [(0, s, s + 4) for s in (35, 40, 45)]
    assert folder.load(max_steps=3) == []
    assert EpisodeFolder(tmp_path / "missing", 10, SPACES).load() == []
    assert not (tmp_path / "missing").exists()


def test_a_slow_disk_holds_the_caller_up(tmp_path, monkeypatch):
    gate, written = threading.Event(), []
    folder = EpisodeFolder(tmp_path, 10**6, SPACES, queue_size=3)
    monkeypatch.setattr(folder, "_write", lambda episode: (gate.wait(60), written.append(episode)))
    caller = threading.Thread(target=run_folder, args=(folder, 40, (4,)))
    caller.start()
    stuck = 5 * 4  # rows: three episodes wait, and one is in each thread's hands
    for _ in range(1000):
        if folder._queue.full() and folder._rows.written == stuck:
            break
        caller.join(0.02)
    caller.join(0.2)
    assert caller.is_alive() and folder._rows.written == stuck
    gate.set()
    caller.join(60)
    folder.close()
    assert spans(written) == true_episodes(40, (4,))


def test_a_file_appears_whole_or_not_at_all(tmp_path, monkeypatch):
    seen, replace = [], os.replace

    def watch(source, target):
        assert EpisodeFolder(tmp_path, 100, SPACES).load() == []
        with np.load(source, allow_pickle=False) as file:
            seen.append({key: file[key] for key in file.files})
        replace(source, target)

    (tmp_path / ".episode.tmp").write_bytes(b"left by a killed process")
    monkeypatch.setattr(os, "replace", watch)
    folder = EpisodeFolder(tmp_path, 100, SPACES)
    run_folder(folder, 5, (5,))
    folder.close()
    assert spans(seen) == spans(folder.load()) == [(0, 0, 4)]
    assert len(list(tmp_path.iterdir())) == 1


def test_failed_writes_warn_once_and_leave_nothing(tmp_path, monkeypatch):
    healthy = np.savez_compressed

    def full(file, **arrays):
        file.write(b"half")
        raise OSError(errno.ENOSPC, "No space left on device")

    folder = EpisodeFolder(tmp_path, 10**6, SPACES)
    monkeypatch.setattr(np, "savez_compressed", full)
    with pytest.warns(UserWarning, match="cannot write to .*No space left") as caught:
        run_folder(folder, 20, (5, 4))
        folder.flush()
    assert len(caught) == 1 and list(tmp_path.iterdir()) == []
    monkeypatch.setattr(np, "savez_compressed", healthy)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        run_folder(folder, 20, (5, 4), start=20)
        folder.close()
    assert len(folder.load()) == 9


def test_a_folder_that_cannot_be_made_stops_nothing(tmp_path):
    (tmp_path / "file").touch()
    folder = EpisodeFolder(tmp_path / "file" / "eps", 100, SPACES)
    with warnings.catch_warnings():  # even where warnings are errors, the writer lives on
        warnings.simplefilter("error")
        with pytest.raises(UserWarning, match="cannot write"):
            run_folder(folder, 5, (5,))
            folder.flush()
        run_folder(folder, 5, (5,), start=5)
        folder.close()
    assert folder.load() == []


def test_closing_twice_and_going_on(tmp_path):
    threads = threading.active_count()
    folder = EpisodeFolder(tmp_path, 100, SPACES)
    folder.close()
    run_folder(folder, 5, (5,))
    folder.close()
    folder.close()
    folder.flush()
    assert threading.active_count() == threads
    run_folder(folder, 5, (5,), start=5)
    folder.close()
    assert len(folder.load()) == 2


def replaced(**arrays):
    return make_episode(6) | arrays


def flags(*true):
    return np.isin(np.arange(6), true)


def spoiled(key, value):
    episode = make_episode(6)
    episode[key].flat[3] = value
    return episode


HOSTILE = {
    "missing key": {k: v for k, v in make_episode(6).items() if k != "action"},
    "no keys": {},
    "wrong shape": replaced(agent0=np.zeros((6, 4), np.float32)),
    "wrong rank": replaced(agent0=np.zeros(6, np.float32)),
    "no rank": replaced(copy=np.zeros((), np.int64)),
    "one row short": replaced(agent0=np.zeros((5, 3), np.float32)),
    "wrong float": replaced(agent0=np.zeros((6, 3), np.float64)),
    "wrong endian": replaced(agent0=np.zeros((6, 3), ">f4")),
    "text": replaced(agent0=np.full((6, 3), "text")),
    "pickles": replaced(agent0=np.full((6, 3), None, dtype=object)),
    "nan": spoiled("agent0", np.nan),
    "inf": spoiled("action", -np.inf),
    "no rows": {k: v[:0] for k, v in make_episode(6).items()},
    "one row": {k: v[:1] for k, v in make_episode(6).items()},
    "too many rows": make_episode(60),
    "no beginning": replaced(is_first=flags()),
    "two beginnings": replaced(is_first=flags(0, 3)),
    "no end": replaced(is_last=flags()),
    "early end": replaced(is_last=flags(2, 5)),
}


def archive_bytes(arrays):
    file = io.BytesIO()
    np.savez_compressed(file, **arrays)
    return file.getvalue()


def bomb_bytes():
    """A small file that unpacks to much more, and says that it is gigabytes."""
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w", zipfile.ZIP_DEFLATED) as archive:
        for key, (shape, dtype) in SPACES.items():
            header = io.BytesIO()
            kind = np.lib.format.dtype_to_descr(torch.empty(0, dtype=dtype).numpy().dtype)
            form = {"descr": kind, "fortran_order": False, "shape": (10**9, *shape)}
            np.lib.format.write_array_header_1_0(header, form)
            archive.writestr(f"{key}.npy", header.getvalue() + bytes(2**24))
    return file.getvalue()


GOOD = archive_bytes(make_episode(6))
HOSTILE_BYTES = {name: archive_bytes(arrays) for name, arrays in HOSTILE.items()} | {
    "empty": b"",
    "truncated": GOOD[:-200],
    "headless": GOOD[200:],
    "noise": bytes(range(256)) * 20,
    "text file": b"not an episode",
    "plain array": b"\x93NUMPY\x01\x00",
    "broken stream": GOOD[:120] + b"\xff" * 60 + GOOD[180:],
    "bomb": bomb_bytes(),
}


@pytest.mark.parametrize("name", HOSTILE_BYTES)
def test_bad_files_are_skipped_with_one_warning(tmp_path, name):
    for stem in ("a", "c"):
        (tmp_path / f"{stem}.npz").write_bytes(GOOD)
    (tmp_path / "b.npz").write_bytes(HOSTILE_BYTES[name])
    with pytest.warns(UserWarning) as caught:
        episodes = EpisodeFolder(tmp_path, 50, SPACES).load()
    assert len(episodes) == 2 and len(caught) == 1
    message = str(caught[0].message)
    assert re.match(r"skipping .*b\.npz: \S", message) and "\n" not in message


class Trap:
    sprung = False

    def __reduce__(self):
        return setattr, (Trap, "sprung", True)


def test_reading_never_runs_code(tmp_path):
    trap = np.array([[Trap()] * 3] * 6, dtype=object)
    (tmp_path / "a.npz").write_bytes(archive_bytes(replaced(agent0=trap)))
    with pytest.warns(UserWarning, match="agent0|pickle"):
        assert EpisodeFolder(tmp_path, 10**6, SPACES).load() == []
    assert not Trap.sprung


def test_a_bomb_is_not_unpacked(tmp_path):
    (tmp_path / "a.npz").write_bytes(HOSTILE_BYTES["bomb"])
    with pytest.warns(UserWarning, match="copy has more than 51 rows"):
        assert EpisodeFolder(tmp_path, 50, SPACES).load() == []


def test_strange_entries_are_skipped(tmp_path):
    (tmp_path / "folder.npz").mkdir()
    os.mkfifo(tmp_path / "pipe.npz")
    (tmp_path / "dangling.npz").symlink_to(tmp_path / "nowhere")
    (tmp_path / "notes.txt").write_text("not ours")
    with pytest.warns(UserWarning) as caught:
        assert EpisodeFolder(tmp_path, 50, SPACES).load() == []
    assert len(caught) == 3


def test_a_flipped_byte_never_changes_an_episode(tmp_path):
    path, true = tmp_path / "a.npz", make_episode(6)
    folder = EpisodeFolder(tmp_path, 50, SPACES)
    for at in range(0, len(GOOD), 17):
        path.write_bytes(GOOD[:at] + bytes([GOOD[at] ^ 0x55]) + GOOD[at + 1 :])
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            episodes = folder.load()
        for episode in episodes:
            assert all(np.array_equal(episode[key], true[key]) for key in SPACES), at


def test_recorded_extras_do_no_harm(tmp_path):
    (tmp_path / "mine.npz").write_bytes(archive_bytes(replaced(extra=np.zeros(3))))
    (episode,) = EpisodeFolder(tmp_path, 50, SPACES).load()
    assert list(episode) == KEYS


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_nothing_waits_for_the_gpu(tmp_path):
    spaces = SPACES | LATENTS
    ring = Replay(60, 3, spaces, device="cuda", latents=list(LATENTS))
    folder = EpisodeFolder(tmp_path, 10**6, spaces, KEYS)
    rows = [{k: v.cuda() for k, v in make_row(t, (7, 7, 7)).items()} for t in range(200)]
    torch.cuda.set_sync_debug_mode("error")
    try:
        for row in rows[:50]:
            ring.add(row)
            folder.add(row, ended=False)
            if len(ring) > 20:
                _, index = ring.sample(4, 5)
                fresh = torch.ones(4, 5, 4, device="cuda")
                ring.write_back(index, {"deter": fresh})
    finally:
        torch.cuda.set_sync_debug_mode("default")
    for now, row in enumerate(rows[50:], 50):
        folder.add(row, ended=now % 7 == 6)
    folder.close()
    assert len(folder.load()) == 3 * (200 // 7 - 50 // 7 - 1) + 3
