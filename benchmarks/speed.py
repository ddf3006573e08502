"""Speed of each part of a run, as a table of Markdown for the README.

    python benchmarks/speed.py                      # sizes x vectors and images x numbers of agents
    python benchmarks/speed.py --quick              # two minutes on two cores
    python benchmarks/speed.py --device cuda --envs 512 --precision bfloat16
    python benchmarks/speed.py --trace trace.json   # profiles updates of the defaults instead

Flags that are not listed by --help are settings of dreamer.py, for all rows.
"""

import argparse
import datetime
import multiprocessing
import platform
import resource
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import torch
from torch.profiler import ProfilerActivity, profile
from torch.utils.flop_counter import FlopCounterMode

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from build import make_dreamer, make_env, row_spaces, set_up_torch
from capture import Captured
from config import load_config
from latents import LATENTS
from learner import Learner
from replay import Replay
from rollout import Player
from tools import UserError, resolve_device

SETTINGS = Path(__file__).resolve().parent.parent / "configs.yaml"
SIZES = ("default", "size1m", "size12m", "size25m")
SEES = {"vectors": "vmas_vector", "images": "vmas"}
AGENTS = (1, 2, 4, 8)
Case = tuple[str, str, int]
QUICK: list[Case] = [
    *(("default", "vectors", agents) for agents in (2, 8)),
    ("default", "images", 3),
    ("size1m", "vectors", 3),
    ("size12m", "vectors", 2),
]
COLUMNS = (
    *("size", "sees", "agents", "environment steps/s", "frames/s", "policy steps/s", "updates/s"),
    *("GFLOP an update", "share of product rate", "peak memory, MiB"),
)


class Bench:
    """Everything that one row of the table times, with a replay of random rows."""

    def __init__(self, case: Case, flags: list[str]):
        size, sees, agents = case
        presets = [SEES[sees]] + [size] * (size != "default")
        argv = [
            "--configs",
            *presets,
            "--scenario.n_agents",
            str(agents),
            "--logdir",
            "none",
            *flags,
        ]
        self.config = load_config(argv, SETTINGS)
        set_up_torch(self.config)
        self.device = resolve_device(self.config.device)
        self.env = make_env(self.config, self.device, self.config.envs, seed=0)
        self.learner = Learner(self.config, make_dreamer(self.config, self.env))
        spaces = row_spaces(self.config, self.env, image=bool(self.env.image_size))
        rows = 2 * self.config.batch_length + 1
        self.replay = Replay(
            rows * self.config.envs, self.config.envs, spaces, self.device, 0, LATENTS
        )
        player = Player(self.env, self.learner.dreamer, True, self.config.capture)
        for _ in range(rows):
            self.rows = player.step(random=True)
            self.replay.add(self.rows)
        side = 8192 if self.device.type == "cuda" else 1024
        self.factor = torch.randn(side, side, device=self.device)
        self.player = player

    def act(self) -> None:
        """One step of the policy for all copies."""
        player = self.player
        player.act(self.rows, player.action, player.state)

    def warm_up(self) -> None:
        """Update until that costs what it will always cost: on a GPU it is captured first."""
        for _ in range(Captured.WARMUP + 1 if self.device.type == "cuda" else 1):
            self.update()

    def update(self) -> None:
        self.learner.update(self.replay, self.config.batch_size, self.config.batch_length)

    def seconds(self, call: Callable[[], object], least: float = 0.0) -> float:
        """What a call takes, on average over as many as fill `least` seconds."""
        start, calls = time.perf_counter(), 0
        while not calls or time.perf_counter() - start < least:
            call()
            calls += 1
            if self.device.type == "cuda":
                torch.cuda.synchronize()
        return (time.perf_counter() - start) / calls

    def product_rate(self, least: float) -> float:
        """FLOP/s of a large float32 product."""
        return 2 * len(self.factor) ** 3 / self.seconds(lambda: self.factor @ self.factor, least)

    def peak_memory(self) -> float:
        """MiB of this process, or on its GPU, at most so far."""
        if self.device.type == "cuda":
            return torch.cuda.max_memory_allocated() / 2**20
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        return peak / (2**20 if sys.platform == "darwin" else 2**10)


def measure(case: Case, flags: list[str], seconds: float) -> list[str]:
    """The row of the table for one case; each figure is taken over about `seconds`."""
    bench = Bench(case, flags)
    env, copies = bench.env, bench.config.envs
    with FlopCounterMode(display=False) as counter:
        bench.update()
    bench.warm_up()
    flops, shares, took = counter.get_total_flops(), [], []
    while len(took) < 3 or sum(took) < seconds:
        took.append(bench.seconds(bench.update))
        # Other work on the machine comes and goes: compare with products of the same moment.
        shares.append(flops / took[-1] / bench.product_rate(least=0.2 * took[-1]))
    stepping = bench.seconds(lambda: env.step(env.random_action()), seconds)
    return [
        *map(str, case),
        f"{copies * bench.config.action_repeat / stepping:,.0f}",
        f"{copies / bench.seconds(lambda: env.render(bench.config.image_size), seconds):,.0f}",
        f"{copies / bench.seconds(bench.act, seconds):,.0f}",
        f"{1 / statistics.median(took):.3g}",
        f"{flops / 1e9:.3g}",
        f"{statistics.median(shares):.2f}",
        f"{bench.peak_memory():,.0f}",
    ]


def compare(base: Case, other: Case, base_flags: list[str], flags: list[str], pairs: int) -> float:
    """How many times as long an update of `other` takes, as the median of alternating pairs."""
    benches = Bench(base, base_flags), Bench(other, flags)
    ratios = []
    for bench in benches:
        bench.warm_up()
    for _ in range(pairs):
        first, second = (bench.seconds(bench.update) for bench in benches)
        ratios.append(second / first)
    return statistics.median(ratios)


def in_processes(function: Callable, calls: list[tuple]) -> Iterator:
    """Results one by one; a fresh process each, as memory's peak is a process's."""
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(1, mp_context=context, max_tasks_per_child=1) as pool:
        for call in calls:
            yield pool.submit(function, *call).result()


def machine(device: torch.device) -> str:
    """Where, when and with what the figures were taken."""
    name = platform.processor() or platform.machine()
    if device.type == "cuda":
        name = torch.cuda.get_device_name(device)
    elif (info := Path("/proc/cpuinfo")).exists():
        models = [line for line in info.read_text().splitlines() if line.startswith("model name")]
        name = models[0].partition(":")[2].strip() if models else name
    date = datetime.datetime.now(datetime.UTC).date()
    return f"{date}, {name}, {torch.get_num_threads()} threads, torch {torch.__version__}"


def print_row(cells: tuple | list) -> None:
    print("|", " | ".join(cells), "|", flush=True)


def trace(path: str, flags: list[str]) -> None:
    """Profile three updates: a table on stderr, a trace for a browser at `path`."""
    bench = Bench(("default", "vectors", 3), flags)
    bench.warm_up()
    activities = [ProfilerActivity.CPU]
    activities += [ProfilerActivity.CUDA] * (bench.device.type == "cuda")
    with profile(activities=activities) as profiler:
        bench.seconds(lambda: [bench.update() for _ in range(3)])
    key = f"self_{bench.device.type}_time_total"
    print(profiler.key_averages().table(sort_by=key, row_limit=40), file=sys.stderr)
    profiler.export_chrome_trace(path)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--quick", action="store_true", help="few rows, in about two minutes")
    parser.add_argument("--sizes", nargs="*", default=SIZES, choices=SIZES)
    parser.add_argument("--sees", nargs="*", default=list(SEES), choices=list(SEES))
    parser.add_argument("--agents", nargs="*", type=int, default=AGENTS)
    parser.add_argument("--device", default="auto")
    parser.add_argument("--trace", metavar="FILE", help="profile updates into FILE instead")
    args, flags = parser.parse_known_args()
    flags += ["--device", args.device]
    try:
        load_config(["--logdir", "none", *flags], SETTINGS)
        device = resolve_device(args.device)
    except UserError as error:
        parser.error(str(error))
    if args.trace:
        trace(args.trace, flags)
        return
    cases = [(size, sees, n) for size in args.sizes for sees in args.sees for n in args.agents]
    if args.quick:
        cases = QUICK
    print(machine(device) + (f", {' '.join(flags)}" if flags[2:] else ""))
    print()
    print_row(COLUMNS)
    print_row(["---"] * len(COLUMNS))
    seconds = 0.3 if args.quick else 2.0
    for row in in_processes(measure, [(case, flags, seconds) for case in cases]):
        print_row(row)
    print()
    print_row(("an update at size12m, vectors", "times the other's duration"))
    print_row(["---"] * 2)
    two, eight = (("size12m", "vectors", agents) for agents in (2, 8))
    exact, fast = ([*flags, "--precision", kind] for kind in ("float32", "bfloat16"))
    pairs = 3 if args.quick else 11
    calls = {
        "8 agents / 2 agents": (two, eight, flags, flags, pairs),
        "bfloat16 / float32, 2 agents": (two, two, exact, fast, pairs),
    }
    if device.type == "cuda":
        plain, graph = ([*flags, "--capture", kind] for kind in ("false", "true"))
        calls["captured / not, 2 agents"] = (two, two, plain, graph, pairs)
    for name, ratio in zip(calls, in_processes(compare, list(calls.values())), strict=True):
        print_row([name, f"{ratio:.2f}"])


if __name__ == "__main__":
    main()
