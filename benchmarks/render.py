"""Drawing: frames a second beside VMAS's own, and fidelity to VMAS's own.

    python benchmarks/render.py                  # speed over scenarios, batches and sizes
    python benchmarks/render.py --fidelity       # errors over scenarios, states and cameras
    python benchmarks/render.py --device cuda    # speed on a GPU, without VMAS's column

VMAS's side needs OpenGL and a display; without a display Xvfb is started
(Debian: apt-get install xvfb libgl1-mesa-dri libglu1-mesa libgl1).
"""

import argparse
import contextlib
import math
import os
import shutil
import subprocess
import sys
import time
import warnings
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import numpy as np
import torch
import vmas
from vmas.simulator.environment import Environment

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from envs.render import render

SCENARIOS = [
    "balance",
    "ball_passage",
    "ball_trajectory",
    "buzz_wire",
    "discovery",
    "dispersion",
    "dropout",
    "flocking",
    "football",
    "give_way",
    "joint_passage",
    "joint_passage_size",
    "multi_give_way",
    "navigation",
    "passage",
    "reverse_transport",
    "road_traffic",
    "transport",
    "wheel",
    "wind_flocking",
    "simple",
    "simple_adversary",
    "simple_crypto",
    "simple_push",
    "simple_reference",
    "simple_speaker_listener",
    "simple_spread",
    "simple_tag",
    "simple_world_comm",
]
PIXELS = 64  # height of the compared pictures, roughly


@contextlib.contextmanager
def display() -> Iterator[None]:
    """A display that VMAS can draw to, Xvfb where there is none; OSError says what is missing."""
    server = None
    try:
        if not os.environ.get("DISPLAY"):
            if shutil.which("Xvfb") is None:
                raise OSError("neither a display nor Xvfb is there")
            ours, theirs = os.pipe()
            command = ["Xvfb", "-displayfd", str(theirs), "-screen", "0", "1800x1000x24"]
            server = subprocess.Popen(command, pass_fds=[theirs], stderr=subprocess.DEVNULL)
            os.close(theirs)
            with os.fdopen(ours) as pipe:
                os.environ["DISPLAY"] = ":" + pipe.readline().strip()
        try:
            from vmas.simulator import rendering
        except Exception as error:
            raise OSError(f"OpenGL cannot be loaded: {error}") from error
        rendering.TextLine.render1 = lambda self: None  # text is not drawn by `render` either
        yield
    finally:
        if server is not None:
            server.terminate()
            server.wait()
            del os.environ["DISPLAY"]


def make(scenario: str, copies: int, device: str = "cpu") -> Environment:
    """An environment some random steps into its episodes."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        env = vmas.make_env(scenario, copies, device, continuous_actions=True, seed=0)
    for _ in range(10):
        env.step([env.get_random_action(agent) for agent in env.agents])
    return env


def picture_size(env: Environment) -> tuple[int, int]:
    """Height and width near PIXELS whose aspect is most nearly the viewer's."""
    wide, high = env.scenario.viewer_size
    heights = sorted(range(PIXELS - 16, PIXELS + 17), key=lambda h: abs(h - PIXELS))
    height = min(heights, key=lambda h: abs(h * wide / high - round(h * wide / high)))
    return height, round(height * wide / high)


def area_weights(full: int, few: int) -> np.ndarray:
    """Matrix (few, full) by which `full` pixels in a row are averaged into `few`."""
    edges = np.arange(few + 1)[:, None] * full / few
    low, high = np.arange(full), np.arange(full) + 1
    return (np.minimum(edges[1:], high) - np.maximum(edges[:-1], low)).clip(0) * few / full


def reference(
    env: Environment,
    size: tuple[int, int],
    copy: int,
    follow: int | None,
) -> np.ndarray:
    """VMAS's own frame (h, w, 3), reduced by area averaging."""
    frame = env.render("rgb_array", env_index=copy, agent_index_focus=follow)
    down, across = (area_weights(full, few) for full, few in zip(frame.shape, size, strict=False))
    return np.einsum("hH,wW,HWc->hwc", down, across, frame, optimize=True)


def errors(scenario: str, states: int) -> list[tuple[float, float]]:
    """For each camera: worst mean absolute error of a frame, worst of a 4 x 4 block, of 255."""
    env = make(scenario, states)
    size, worst = picture_size(env), []
    env.render("rgb_array")  # the first frame differs: OpenGL's line width is not yet set
    for follow in (None, 0):
        ours = render(env, size, follow=follow).numpy()
        theirs = np.stack([reference(env, size, copy, follow) for copy in range(states)])
        gap = torch.from_numpy(np.abs(ours.astype(np.float32) - theirs).mean(-1))  # (B, h, w)
        blocks = torch.nn.functional.avg_pool2d(gap[:, None], 4, stride=1)
        worst.append((gap.mean((1, 2)).max().item(), blocks.max().item()))
    env.viewer.close()
    return worst


def fidelity(scenarios: list[str], states: int) -> None:
    print(f"errors out of 255, the worst of {states} states")
    print("| scenario | frame, whole | block, whole | frame, following | block, following |")
    print("|---|---|---|---|---|")
    for scenario in scenarios:
        cells = [f"{value:.2f}" for pair in errors(scenario, states) for value in pair]
        print("|", " | ".join([scenario, *cells]), "|", flush=True)


def rate(draw: Callable[[], object], frames: int, seconds: float = 1.0) -> float:
    """Frames a second of a function that draws so many of them, by its fastest call."""
    draw()
    fastest, end = math.inf, time.perf_counter() + seconds
    while time.perf_counter() < end:
        start = time.perf_counter()
        draw()
        fastest = min(fastest, time.perf_counter() - start)
    return frames / fastest


def speed(scenarios: list[str], device: str) -> None:
    """Tables over scenarios, over batches and over sizes."""
    print(f"frames a second on {device}, {torch.get_num_threads()} thread(s)")
    print("| scenario | copies | size | ours | VMAS, 700 high | ratio |")
    print("|---|---|---|---|---|---|")
    cases = [(scenario, 64, 64) for scenario in scenarios]
    cases += [("simple_spread", copies, 64) for copies in (16, 256, 1024)]
    cases += [("simple_spread", 16, size) for size in (128, 256, 512)]
    for scenario, copies, size in cases:
        env = make(scenario, copies, device)
        ours = rate(partial(finished, env, size), copies)
        cells = [scenario, copies, size, f"{ours:,.0f}"]
        if device == "cpu":
            theirs = rate(partial(env.render, "rgb_array"), 1)
            cells += [f"{theirs:,.0f}", f"{ours / theirs:.0f}"]
            env.viewer.close()
        print("|", " | ".join(map(str, cells)), "|", flush=True)


def finished(env: Environment, size: int) -> torch.Tensor:
    """The frames, once they are there."""
    frames = render(env, size)
    if frames.is_cuda:
        torch.cuda.synchronize()
    return frames


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("--fidelity", action="store_true")
    parser.add_argument("--states", type=int, default=20)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--scenarios", nargs="*", default=SCENARIOS)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    with display() if args.device == "cpu" else contextlib.nullcontext():
        if args.fidelity:
            fidelity(args.scenarios, args.states)
        else:
            speed(args.scenarios, args.device)
