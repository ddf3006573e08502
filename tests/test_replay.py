"""The replay ring, against plain Python lists."""

import os

import numpy as np
import pytest
import torch

from replay import Replay, fill
from tests.rows import LATENTS, SPACES, make_episode, make_row


def fill_with(ring, episodes):
    return fill(ring, [len(episode["is_first"]) for episode in episodes], iter(episodes))


def make_ring(steps, lengths=(7, 5, 11), capacity=60, **kwargs):
    ring = Replay(capacity, len(lengths), SPACES | LATENTS, latents=list(LATENTS), **kwargs)
    history = [make_row(time, lengths) for time in range(steps)]
    for row in history:
        ring.add(row)
    return ring, history


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


@pytest.mark.parametrize("recency", [1.0, 2.0])
@pytest.mark.parametrize(("steps", "starts"), [(18, range(0, 14)), (53, range(34, 49))])
def test_sampling_is_uniform_over_copies_and_over_powers_of_the_age(steps, starts, recency):
    ring, _ = make_ring(steps, recency=recency)
    draws, cells = 60_000, 3 * len(starts)
    data, _ = ring.sample(draws, 5)
    counts = torch.zeros(3, steps)
    counts.index_put_((data["copy"][:, 0], data["time"][:, 0]), torch.ones(()), accumulate=True)
    assert set(counts.sum(0).nonzero().flatten().tolist()) == set(starts)
    ages = torch.arange(len(starts) + 1) / len(starts)
    expected = draws / 3 * ages.pow(1 / recency).diff().flip(0)  # the oldest first
    chi_square = ((counts[:, list(starts)] - expected) ** 2 / expected).sum()
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
    data = ring.sample_episodes(150, length)
    assert data["time"].shape == (150, shown)
    assert not data["is_first"][:, 1:].any()
    found = set(zip(data["copy"][:, 0].tolist(), data["time"][:, 0].tolist(), strict=True))
    assert found == {key for key, count in rows.items() if count >= shown}
    check_sequences(data, history, ring)


def test_where_no_episode_begins_sequences_are_drawn_from_the_middle_of_one():
    ring, history = make_ring(70, lengths=(40, 43, 45))  # the last 20 rows: from the middle
    ring.rings["is_first"].zero_()
    for row in history[-20:]:
        row["is_first"] = torch.zeros_like(row["is_first"])
    for length, shown in ((5, 5), (50, 19)):
        data = ring.sample_episodes(30, length)
        assert data["time"].shape == (30, shown)
        check_sequences(data, history, ring)


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
    expected = ring.sample(50, 4)[1], ring.sample_episodes(9, 3)["time"]
    other.set_random_state(state)
    assert torch.equal(other.sample(50, 4)[1], expected[0])
    assert torch.equal(other.sample_episodes(9, 3)["time"], expected[1])


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
    assert fill_with(ring, episodes)
    assert ring.steps_per_copy == 33 // 4
    data, _ = next(ring.streams(100))
    for key in SPACES:
        stream = np.concatenate([episode[key] for episode in episodes])[:32]
        assert np.array_equal(data[key].flatten(0, 1).numpy(), stream), key
    assert data["is_first"].sum() == 4
    assert not any(ring.rings[key].any() for key in LATENTS)


def test_new_rows_are_not_joined_to_what_was_filled_in():
    ring = Replay(40, 2, SPACES)
    fill_with(ring, [make_episode(31)])
    for time in range(1, 4):
        ring.add(make_row(time, (100, 100)))
    data, _ = next(ring.streams(100))
    seam = data["time"].shape[1] - 3
    for copy in range(2):
        assert data["is_last"][copy, seam - 1] and data["is_first"][copy, seam]
        assert (
            not data["is_last"][copy, seam:].any() and not data["is_first"][copy, seam + 1 :].any()
        )


def test_fill_keeps_the_newest_that_fit():
    ring = Replay(20, 2, SPACES)
    assert fill_with(ring, [make_episode(9, start=100 * i) for i in range(5)])
    data, _ = next(ring.streams(100))
    times = [*range(300, 309), *range(400, 409)]
    assert data["time"].flatten().tolist() == times
    ring = Replay(20, 2, SPACES)
    assert fill_with(ring, [make_episode(9), make_episode(50, start=100)])
    assert next(ring.streams(100))[0]["time"].flatten().tolist() == list(range(100, 120))


def test_fill_without_an_episode_that_was_counted():
    """Another process prunes while the files are read."""
    episodes = [make_episode(rows, start=100 * rows) for rows in (9, 5, 11, 8)]
    sizes = [len(episode["is_first"]) for episode in episodes]
    for lost in range(4):
        rest = episodes[:lost] + episodes[lost + 1 :]
        short, whole = (Replay(60, 3, SPACES | LATENTS, latents=LATENTS) for _ in range(2))
        assert fill(short, sizes, iter(rest)) and fill_with(whole, rest)
        assert short.written == whole.written == sum(len(e["is_first"]) for e in rest) // 3
        for key in SPACES:
            rows = slice(whole.written)
            assert torch.equal(short.rings[key][rows], whole.rings[key][rows]), key
    assert not fill(Replay(60, 3, SPACES | LATENTS, latents=LATENTS), sizes, iter([]))


def test_fill_with_nothing_or_too_little_loads_nothing():
    ring = Replay(20, 4, SPACES)
    assert not fill_with(ring, []) and not fill_with(ring, [make_episode(3)])
    assert len(ring) == 0
    ring.add(make_row(1, (7, 7, 7, 7)))
    assert not ring.rings["is_first"].any()
    with pytest.raises(ValueError, match="empty"):
        fill_with(ring, [make_episode(9)])


def test_new_experience_is_not_joined_to_a_filled_past():
    ring = Replay(40, 2, SPACES | LATENTS, latents=list(LATENTS))
    fill_with(ring, [make_episode(9), make_episode(8, start=100)])
    for now in range(201, 204):
        ring.add(make_row(now, (1000, 1000)))
    data, _ = next(ring.streams(100))
    assert data["time"][1].tolist() == [*range(8, 9), *range(100, 107), *range(201, 204)]
    assert data["is_first"][1].nonzero().flatten().tolist() == [1, 8]


@pytest.mark.parametrize("steps", [9, 20, 53])
def test_a_saved_ring_goes_on_as_it_was(tmp_path, steps):
    """What is saved takes no more room than the rows held."""
    ring, _ = make_ring(steps)
    torch.save(ring.state_dict(), tmp_path / "ring.pt")
    twin, _ = make_ring(0)
    state = torch.load(tmp_path / "ring.pt", weights_only=True, mmap=True)
    twin.check(state)
    twin.load_state_dict(state)
    held = sum(rows.untyped_storage().nbytes() for rows in ring.state_dict()["rows"].values())
    assert held == ring.nbytes * ring.steps_per_copy // ring.length
    for now in range(steps, steps + 30):
        data = [r.sample(9, 4)[0] for r in (ring, twin)]
        for key in SPACES:
            assert torch.equal(data[0][key], data[1][key])
        for r in (ring, twin):
            r.add(make_row(now, (7, 5, 11)))
    assert all(torch.equal(ring.rings[key], twin.rings[key]) for key in ring.rings)


def test_a_ring_of_another_kind_is_refused():
    state = make_ring(9)[0].state_dict()
    make_ring(0)[0].check(state)
    for other in (Replay(60, 4, SPACES | LATENTS), Replay(60, 3, {"new": ((2,), torch.float32)})):
        with pytest.raises(ValueError, match=r"it has no .* of 9 rows"):
            other.check(state)


def test_a_memory_that_is_not_finite_is_none():
    ring, _ = make_ring(9, lengths=(100, 100))
    ring.rings["deter"][:] = float("nan")
    assert not ring.sample(50, 3)[0]["initial"]["deter"].any()
