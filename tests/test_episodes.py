"""The folder of episodes, against plain Python lists."""

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

import episodes as episodes_module
from episodes import EpisodeFolder
from replay import Replay, fill
from tests.rows import LATENTS, SPACES, make_episode, make_row

KEYS = list(SPACES)


def load(folder, **limits):
    return [folder.read(path) for path, _ in folder.find(**limits)]


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
    folder = EpisodeFolder(tmp_path / "a" / "b", 10**6, SPACES)
    run_folder(folder, steps, lengths)
    folder.close()
    episodes = load(EpisodeFolder(folder.folder, 10**6, SPACES))
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
    folder.close()
    episodes = load(folder)
    ring = Replay(1000, 3, SPACES | LATENTS, latents=list(LATENTS))
    assert fill(ring, [len(e["is_first"]) for e in episodes], episodes)
    data, _ = next(ring.streams(1000))
    assert spans(episodes) == true_episodes(60, (7, 5, 11))
    for key in SPACES:
        stream = np.concatenate([episode[key] for episode in episodes])
        stream = stream[: len(stream) // 3 * 3]
        assert np.array_equal(data[key].flatten(0, 1).numpy(), stream)


def test_interrupted_episodes_are_absent(tmp_path):
    folder = EpisodeFolder(tmp_path, 10**6, SPACES)
    run_folder(folder, 10, (8, 8), start=3)  # begins in mid-episode: 3..7, 8..12
    run_folder(folder, 19, (8, 8), start=16)  # a reset: 16..23, 24..31, 32..34
    folder.close()
    assert spans(load(folder)) == [(c, s, s + 7) for s in (16, 24) for c in (0, 1)]


def test_rows_without_a_beginning_are_not_joined_to_an_earlier_episode(tmp_path):
    folder = EpisodeFolder(tmp_path, 10**6, SPACES)
    for now in range(12):
        row = make_row(now, (12, 12))
        row["is_first"][1], row["is_last"][1] = now in (0, 9), now in (5, 8, 9, 11)
        folder.add(row)
    folder.close()  # copy 1: 0..5 whole, 6..8 without a beginning, 9 alone, 10..11 without
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert spans(load(folder)) == [(1, 0, 5), (0, 0, 11)]


def test_collecting_makes_room_after_going_round(tmp_path):
    folder = EpisodeFolder(tmp_path, 10**6, SPACES)
    run_folder(folder, 40, (40, 20))
    run_folder(folder, 200, (200, 100), start=200)
    folder.close()
    episodes = load(folder)
    assert spans(episodes[:3]) == [(1, 0, 19), (0, 0, 39), (1, 20, 39)]
    assert spans(episodes[3:]) == [(1, 200, 299), (0, 200, 399), (1, 300, 399)]
    assert all((np.diff(episode["time"]) == 1).all() for episode in episodes)


def test_host_flag_skips_the_look_at_is_last(tmp_path):
    folder = EpisodeFolder(tmp_path, 10**6, SPACES)
    for now in range(16):
        folder.add(make_row(now, (8, 4)), ended=now % 4 == 3)
    run_folder(folder, 8, (8, 4), start=16, ended=False)
    folder.close()
    assert spans(load(folder)) == true_episodes(16, (8, 4))


def test_the_oldest_files_are_pruned(tmp_path):
    foreign = tmp_path / "00000000-mine.npz"
    foreign.write_bytes(b"not to be deleted")
    folder = EpisodeFolder(tmp_path, 20, SPACES)
    run_folder(folder, 60, (6,))
    folder.close()
    with pytest.warns(UserWarning, match="mine"):
        assert spans(load(folder)) == [(0, s, s + 5) for s in (36, 42, 48, 54)]
    folder = EpisodeFolder(tmp_path, 11, SPACES)  # what another process wrote counts too
    run_folder(folder, 6, (6,), start=60)
    folder.close()
    assert foreign.exists()
    foreign.unlink()
    assert spans(load(folder)) == [(0, 54, 59), (0, 60, 65)]


def test_endless_episodes_are_given_up(tmp_path):
    folder = EpisodeFolder(tmp_path, 50, SPACES)
    with pytest.warns(UserWarning, match="longer than the 50 steps") as caught:
        run_folder(folder, 400, (10**6, 20))
    assert len(caught) == 1
    assert folder._rows.length == 64  # memory stays bounded
    folder.close()
    assert {copy for copy, _, _ in spans(load(folder))} == {1}


def test_names_sort_by_age_when_the_clock_jumps_back(tmp_path, monkeypatch):
    hours = iter([12, 10, 10, 11, 9])

    class Clock(episodes_module.datetime.datetime):
        @classmethod
        def now(cls, tz):
            return cls(2030, 1, 2, next(hours), tzinfo=tz)

    monkeypatch.setattr(episodes_module.datetime, "datetime", Clock)
    folder = EpisodeFolder(tmp_path, 10**6, SPACES)
    run_folder(folder, 16, (4,))
    folder.close()
    folder = EpisodeFolder(tmp_path, 10**6, SPACES)  # the same after a restart
    run_folder(folder, 4, (4,), start=16)
    folder.close()
    assert spans(load(folder)) == [(0, s, s + 3) for s in range(0, 20, 4)]
    assert min(path.name for path in tmp_path.iterdir()).startswith("20300102T120000000000-")


def test_load_prefers_the_newest(tmp_path):
    folder = EpisodeFolder(tmp_path, 10**6, SPACES)
    run_folder(folder, 50, (5,))
    folder.close()
    assert spans(load(folder, max_steps=11)) == [(0, 40, 44), (0, 45, 49)]
    assert spans(load(folder, max_steps=12)) == [(0, s, s + 4) for s in (35, 40, 45)]
    assert load(folder, max_steps=3) == []
    assert load(EpisodeFolder(tmp_path / "missing", 10, SPACES)) == []
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
        assert load(EpisodeFolder(tmp_path, 100, SPACES)) == []
        with np.load(source, allow_pickle=False) as file:
            seen.append({key: file[key] for key in file.files})
        replace(source, target)

    (tmp_path / ".episode.tmp").write_bytes(b"left by a killed process")
    monkeypatch.setattr(os, "replace", watch)
    folder = EpisodeFolder(tmp_path, 100, SPACES)
    run_folder(folder, 5, (5,))
    folder.close()
    assert spans(seen) == spans(load(folder)) == [(0, 0, 4)]
    assert len(list(tmp_path.iterdir())) == 1


def test_failed_writes_warn_once_and_leave_nothing(tmp_path, monkeypatch):
    healthy = np.savez_compressed

    def full(file, **arrays):
        file.write(b"half")
        raise OSError(errno.ENOSPC, "No space left on device")

    folder = EpisodeFolder(tmp_path, 10**6, SPACES)
    monkeypatch.setattr(np, "savez_compressed", full)
    with pytest.warns(UserWarning, match="cannot write .*No space left") as caught:
        run_folder(folder, 20, (5, 4))
        folder.close()
    assert len(caught) == 1 and list(tmp_path.iterdir()) == []
    monkeypatch.setattr(np, "savez_compressed", healthy)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        run_folder(folder, 20, (5, 4), start=20)
        folder.close()
    assert len(load(folder)) == 9


def test_a_folder_that_cannot_be_made_stops_nothing(tmp_path):
    (tmp_path / "file").touch()
    folder = EpisodeFolder(tmp_path / "file" / "eps", 100, SPACES)
    with warnings.catch_warnings():  # even where warnings are errors, the writer lives on
        warnings.simplefilter("error")
        with pytest.raises(UserWarning, match=r"an episode is lost: .*file"):
            run_folder(folder, 5, (5,))
            folder.close()
        run_folder(folder, 5, (5,), start=5)
        folder.close()
    assert load(folder) == []


def test_closing_twice_and_going_on(tmp_path):
    threads = threading.active_count()
    folder = EpisodeFolder(tmp_path, 100, SPACES)
    folder.close()
    run_folder(folder, 5, (5,))
    folder.close()
    folder.close()
    assert threading.active_count() == threads
    run_folder(folder, 5, (5,), start=5)
    folder.close()
    assert len(load(folder)) == 2


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
        episodes = load(EpisodeFolder(tmp_path, 50, SPACES))
    assert len(episodes) == 2 and len(caught) == 1
    message = str(caught[0].message)
    assert re.match(r"skipping .*b\.npz: \S", message) and "\n" not in message


class Trap:
    sprung = False

    def __reduce__(self):
        return setattr, (Trap, "sprung", True)


def test_a_file_that_is_gone_when_its_turn_comes_is_skipped(tmp_path):
    for stem in ("a", "b", "c"):
        (tmp_path / f"{stem}.npz").write_bytes(GOOD)
    folder = EpisodeFolder(tmp_path, 50, SPACES)
    paths = [path for path, _ in folder.find()]
    rest = folder.episodes(paths)
    next(rest)
    paths[1].unlink()
    with pytest.warns(UserWarning, match=r"skipping .*b\.npz: it is gone"):
        assert len(list(rest)) == 1


def test_reading_never_runs_code(tmp_path):
    trap = np.array([[Trap()] * 3] * 6, dtype=object)
    (tmp_path / "a.npz").write_bytes(archive_bytes(replaced(agent0=trap)))
    with pytest.warns(UserWarning, match="agent0|pickle"):
        assert load(EpisodeFolder(tmp_path, 10**6, SPACES)) == []
    assert not Trap.sprung


def test_a_bomb_is_not_unpacked(tmp_path):
    (tmp_path / "a.npz").write_bytes(HOSTILE_BYTES["bomb"])
    with pytest.warns(UserWarning, match="copy has more than 51 rows"):
        assert load(EpisodeFolder(tmp_path, 50, SPACES)) == []


def test_strange_entries_are_skipped(tmp_path):
    (tmp_path / "folder.npz").mkdir()
    os.mkfifo(tmp_path / "pipe.npz")
    (tmp_path / "dangling.npz").symlink_to(tmp_path / "nowhere")
    (tmp_path / "notes.txt").write_text("not ours")
    with pytest.warns(UserWarning) as caught:
        assert load(EpisodeFolder(tmp_path, 50, SPACES)) == []
    assert len(caught) == 3


def test_a_flipped_byte_never_changes_an_episode(tmp_path):
    path, true = tmp_path / "a.npz", make_episode(6)
    folder = EpisodeFolder(tmp_path, 50, SPACES)
    for at in range(0, len(GOOD), 17):
        path.write_bytes(GOOD[:at] + bytes([GOOD[at] ^ 0x55]) + GOOD[at + 1 :])
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            episodes = load(folder)
        for episode in episodes:
            assert all(np.array_equal(episode[key], true[key]) for key in SPACES), at


def test_recorded_extras_do_no_harm(tmp_path):
    (tmp_path / "mine.npz").write_bytes(archive_bytes(replaced(extra=np.zeros(3))))
    (episode,) = load(EpisodeFolder(tmp_path, 50, SPACES))
    assert list(episode) == KEYS


def test_episodes_under_way_are_gone_on_with(tmp_path):
    folder = EpisodeFolder(tmp_path, 10**6, SPACES)
    run_folder(folder, 23, (7, 5, 90))
    torch.save(folder.state_dict(), tmp_path / "state.pt")
    run_folder(folder, 40, (7, 5, 90), start=23)  # and is killed: these steps are played again
    folder.close()
    folder = EpisodeFolder(tmp_path, 10**6, SPACES)
    folder.load_state_dict(torch.load(tmp_path / "state.pt", weights_only=True))
    run_folder(folder, 90, (7, 5, 90), start=23)
    folder.close()
    assert spans(load(folder)) == true_episodes(113, (7, 5, 90))


def test_where_all_episodes_have_just_ended_none_is_gone_on_with(tmp_path):
    folder = EpisodeFolder(tmp_path, 10**6, SPACES)
    run_folder(folder, 12, (6, 6, 6))
    state = folder.state_dict()
    assert state.keys() == {"stamp"}
    again = EpisodeFolder(tmp_path, 10**6, SPACES)
    again.load_state_dict(state)
    run_folder(again, 7, (6, 6, 6), start=12)
    again.close()
    assert spans(load(again)) == true_episodes(19, (6, 6, 6))


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_nothing_waits_for_the_gpu(tmp_path):
    spaces = SPACES | LATENTS
    ring = Replay(60, 3, spaces, device="cuda", latents=list(LATENTS))
    folder = EpisodeFolder(tmp_path, 10**6, SPACES)
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
    assert len(load(folder)) == 3 * (200 // 7 - 50 // 7 - 1) + 3
