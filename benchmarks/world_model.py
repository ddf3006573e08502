"""How well a world model alone learns what a run has recorded, on episodes that it is not shown.

    python -m benchmarks.world_model LOGDIR --episodes 64 --updates 130 260 400
    python -m benchmarks.world_model LOGDIR --model.warmup 200 --cnn_points 64

Prints a table of Markdown. By horizon, 0 being what is seen, of one future drawn as in imagination:
the root mean square error of all vectors, in standard deviations, and how much is known of the
reward, as it is foreseen from the state before: 1 less its mean absolute error over that of its
median. Flags that are not listed by --help are settings of dreamer.py, over those of the run.
"""

import argparse
import sys
import time
from pathlib import Path

import torch
from torch import Tensor

from build import check_values, make_dreamer, make_env, row_spaces, set_up_torch
from config import Config, load_config
from envs import Environment
from episodes import EpisodeFolder
from latents import LATENTS
from models import Dreamer, WorldModel, combine_rewards
from optimizer import LaProp
from replay import Replay, fill
from tools import UserError

SETTINGS = Path(__file__).resolve().parent.parent / "configs.yaml"
HORIZONS = (0, 1, 5, 15)
SEEN = 8  # steps of an episode that are seen before anything is predicted
Sequences = dict[str, Tensor]


def load(config: Config, env: Environment, logdir: Path, episodes: int) -> tuple[Replay, Sequences]:
    """A replay of the oldest episodes, but for every fourth, which are held out (B, T, ...).

    Raises `UserError` if there are too few.
    """
    latent_spaces = row_spaces(config, env, image=bool(env.image_size))
    spaces = {key: space for key, space in latent_spaces.items() if key not in LATENTS}
    folder = EpisodeFolder(logdir / "train_eps", 10**9, spaces)
    least = SEEN + HORIZONS[-1] + 1
    if config.time_limit < least:
        raise UserError(f"--time_limit {config.time_limit}: expected {least} or more")
    found = folder.find()[:episodes]
    whole = [entry for entry in found[3::4] if entry[1] == config.time_limit + 1]
    shown = [entry for entry in found if entry not in whole]
    if not whole:
        need = f"4 episodes or more, of {config.time_limit} steps"
        raise UserError(f"{logdir}: expected {need}, found {len(found)}, 0 as long")
    rows = sum(count for _, count in shown)
    replay = Replay(rows, 1, latent_spaces, env.device, config.seed, LATENTS)
    fill(replay, [count for _, count in shown], folder.episodes(path for path, _ in shown))
    others = list(folder.episodes(path for path, _ in whole))
    return replay, {
        key: torch.stack([torch.from_numpy(episode[key]) for episode in others]).to(env.device)
        for key in spaces
    }


def teach(config: Config, dreamer: Dreamer, optimizer: LaProp, replay: Replay) -> None:
    """One update of the world model alone, as in a run, but for `reward_norm` and `recency`."""
    batch, index = replay.sample(config.batch_size, config.batch_length)
    world = dreamer.world
    world.update_scales(batch)
    reward = combine_rewards(batch["reward"], config.reward)
    losses, state, *_ = world.loss(batch, reward)
    optimizer.zero_grad()
    sum(dreamer.loss_scales[name] * loss.mean() for name, loss in losses.items()).backward()
    optimizer.step()
    replay.write_back(index, world.rssm.pack(tuple(part.detach() for part in state)))


@torch.no_grad()
def judge(world: WorldModel, batch: Sequences, mode: str) -> list[str]:
    """A cell for each horizon, of predictions from every other state of held-out episodes."""
    count, length = batch["is_first"].shape
    batch = batch | {"initial": world.rssm.pack(world.rssm.initial(count))}
    reward, truth = combine_rewards(batch["reward"], mode), world.decoder.standard(batch)
    starts, states = torch.arange(SEEN, length - HORIZONS[-1], 2), world.states(batch)
    before, state = (tuple(x[:, t].flatten(0, 1) for x in states) for t in (starts - 1, starts))
    cells = []
    for horizon in range(HORIZONS[-1] + 1):
        action = batch["action"][:, starts + horizon].flatten(0, 1)
        if horizon:
            before, state = state, world.img_step(state, action)
        if horizon in HORIZONS:
            vectors, got = (x[:, starts + horizon].flatten(0, 1) for x in (truth, reward))
            error = (state[2] - vectors).square().mean().sqrt()
            feat = torch.stack([world.features(before), world.features(state)], 1)
            missed = (world.foresee(feat, action.unsqueeze(1))[0][:, 0] - got).abs().mean()
            known = 1 - missed / (got - got.median(0).values).abs().mean()
            cells.append(f"{error:.3f}, {100 * known:.0f} %")
    return cells


def main(argv: list[str]) -> None:
    """Teach and judge, as often as is asked for."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("logdir", type=Path, help="the folder of a run")
    parser.add_argument(
        "--episodes", type=int, default=96, help="the oldest ones, a quarter held out"
    )
    parser.add_argument("--updates", type=int, nargs="+", default=[130, 260, 400])
    args, flags = parser.parse_known_args(argv)
    flags += ["--logdir", str(args.logdir)]
    config = load_config(flags, SETTINGS, saved=args.logdir / "config.yaml")
    check_values(config)
    set_up_torch(config)
    torch.manual_seed(config.seed)
    env = make_env(config, torch.device("cpu"), 1, config.seed)
    dreamer = make_dreamer(config, env)
    replay, hidden = load(config, env, args.logdir, args.episodes)
    optimizer = LaProp(dreamer.world.parameters(), **config.model.as_dict())
    heads = ("updates", "CPU seconds", *(f"{horizon} steps" for horizon in HORIZONS))
    print(f"| {' | '.join(heads)} |\n{'|---' * len(heads)}|")
    seconds = 0.0
    for update in range(1, max(args.updates) + 1):
        begin = time.process_time()
        teach(config, dreamer, optimizer, replay)
        seconds += time.process_time() - begin
        if update in args.updates:
            cells = (f"{update:,}", f"{seconds:.0f}", *judge(dreamer.world, hidden, config.reward))
            print(f"| {' | '.join(cells)} |", flush=True)


if __name__ == "__main__":
    try:
        main(sys.argv[1:])
    except UserError as error:
        print(f"world_model.py: {error}", file=sys.stderr)
        sys.exit(2)
