"""Kill real runs with SIGKILL at random moments, in writes too, and see that nothing is lost.

python benchmarks/faults.py --faults 200 --seed 0

Says on stderr what each fault did, and prints one JSON object at the end. Processes are forked from
one that has imported everything, for speed.
"""

import argparse
import io
import json
import os
import random
import signal
import sys
import tempfile
import time
import warnings
from collections import Counter
from pathlib import Path

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).parent.parent))

import dreamer
from checkpoint import Checkpoints
from episodes import EpisodeFolder

FLAGS = [
    *("--configs", "vmas_vector", "debug", "--device", "cpu", "--threads", "1"),
    *("--probe.envs", "0", "--envs", "4", "--time_limit", "8", "--prefill", "40"),
    *("--train_ratio", "2", "--eval_episode_num", "2", "--eval_every", "400"),
    *("--log_every", "20", "--save_every", "20"),
]
# Where to die, and after how many calls of the function at most.
PLACES = {
    "anywhere": (None, "", 0),
    "in a checkpoint": (torch, "save", 5),
    "in an episode": (np, "savez_compressed", 20),
    "before a sync": (os, "fsync", 40),
    "before a rename": (os, "replace", 30),
    "after a rename": (os, "replace", 30),
}


def arm(place: str, calls: int) -> None:
    """Have this process die at one of its next calls of a function that writes."""
    module, name, _ = PLACES[place]
    real = getattr(module, name)

    def fatal(*args, **kwargs):
        nonlocal calls
        calls -= 1
        if calls:
            return real(*args, **kwargs)
        if place.startswith("in"):
            file = args[0] if module is np else args[1]
            whole = io.BytesIO()
            real(whole, **kwargs) if module is np else real(args[0], whole)
            file.write(whole.getvalue()[: whole.tell() // 2])
            file.flush()
        elif place.startswith("after"):
            real(*args, **kwargs)
        os.kill(os.getpid(), signal.SIGKILL)

    setattr(module, name, fatal)


def start(logdir: Path, steps: int, place: str = "", calls: int = 0) -> int:
    """Go on with the run in a process of its own; returns its id."""
    if pid := os.fork():
        return pid
    status = 1
    try:
        sys.stderr = open(logdir.parent / "stderr", "w")  # noqa: SIM115 (until the process ends)
        if calls:
            arm(place, calls)
        dreamer.main([*FLAGS, "--logdir", str(logdir), "--steps", str(steps)])
        status = 0
    except BaseException as error:
        print(repr(error), file=sys.__stderr__)
    os._exit(status)


def check(logdir: Path, final: bool = False) -> int:
    """The step that the run would go on from. Raises what is wrong with its files."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # between two renames there is no latest.pt
        state = Checkpoints(logdir).load(torch.device("cpu"))
    spaces = dict.fromkeys(("is_first", "is_last", "is_terminal"), ((), torch.bool))
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # no episode may be skipped
        EpisodeFolder(logdir / "train_eps", 10**9, spaces).find()
    if final:
        lines = (logdir / "metrics.jsonl").read_text().splitlines()
        steps = [json.loads(line)["step"] for line in lines]
        assert steps == sorted(set(steps)), steps
        left = [path.name for path in logdir.rglob("*.tmp")]
        assert not left, left
    return state["step"] if state else 0


def inject(faults: int, seed: int, logdir: Path) -> dict:
    """Kill the run `faults` times, then let it end; counts of what happened."""
    draw, last, counts = random.Random(seed), 0, Counter()
    for fault in range(faults):
        place = list(PLACES)[fault % len(PLACES)]
        most = PLACES[place][2]
        pid = start(logdir, 10**6, place, draw.randint(1, most) if most else 0)
        if not most:
            time.sleep(draw.uniform(0.1, 3))
            os.kill(pid, signal.SIGKILL)
        _, status = os.waitpid(pid, 0)
        killed = os.WIFSIGNALED(status) and os.WTERMSIG(status) == signal.SIGKILL
        step = check(logdir)
        counts[f"killed {place}"] += killed
        counts["lost"] += not killed or step < last
        counts["resumed"] += fault > 0 and killed
        last = max(last, step)
        end = "killed" if killed else f"ended with {status}"
        print(f"{fault + 1} of {faults}: {end} {place}, step {step}", file=sys.stderr, flush=True)
    _, status = os.waitpid(start(logdir, last + 80), 0)
    counts["resumed"] += not status
    counts["lost"] += bool(status)
    end = check(logdir, final=True)
    assert end >= last + 80, (end, last)
    return {"faults": faults, "seed": seed, "step": end, **counts}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--faults", type=int, default=200)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        print(json.dumps(inject(arguments.faults, arguments.seed, Path(folder) / "run")))


if __name__ == "__main__":
    main()
