"""The program as its users start it: outputs, resumption, evaluation, and errors in one line."""

import json
import re
import signal
import subprocess
import sys
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image

import build
import dreamer
from benchmarks import dreams, sides, world_model
from benchmarks.teams import load_team
from config import Config, load_config, read_yaml
from envs import Environment
from envs.scenarios import ScenarioError
from envs.vmas import Vmas
from recorder import Recorder
from rollout import Player
from tests.test_resume import stop_after
from tools import UserError

ROOT = Path(__file__).parent.parent
SETTINGS = ROOT / "configs.yaml"
PRESETS = [name for name in read_yaml(SETTINGS) if name != "defaults"]
QUICK = [
    *("--configs", "vmas_vector", "debug", "--device", "cpu", "--threads", "1"),
    *("--time_limit", "20", "--envs", "4", "--prefill", "160", "--log_every", "80"),
    *("--eval_every", "240", "--save_every", "160", "--eval_episode_num", "3"),
]


def run(logdir: Path, *flags: str) -> None:
    dreamer.main([*QUICK, "--logdir", str(logdir), *flags])


def metrics(logdir: Path) -> list[dict]:
    return [json.loads(line) for line in (logdir / "metrics.jsonl").read_text().splitlines()]


@pytest.fixture(scope="module")
def finished(tmp_path_factory) -> Path:
    """The logdir of a run that used up its 480 steps."""
    logdir = tmp_path_factory.mktemp("run") / "new" / "folder"
    run(logdir, "--steps", "480")
    return logdir


def test_a_run_leaves_every_kind_of_output(finished):
    names = {path.name for path in finished.iterdir()}
    files = {"config.yaml", "metrics.jsonl", "latest.pt", "train_openl.gif", "eval_policy.gif"}
    assert files <= names
    assert any(name.startswith("events.out.tfevents") for name in names)
    assert len(list((finished / "train_eps").glob("*-20.npz"))) == 20
    assert len(list((finished / "eval_eps").glob("*-20.npz"))) == 3
    logged = set().union(*metrics(finished))
    for name in (
        *("train_return", "train_length", "eval_return", "eval_length", "fps", "train_ratio"),
        *("model_loss", "vector_loss", "image_loss", "reward_loss", "cont_loss", "kl"),
        *("prior_ent", "post_ent", "value_mean", "agent0_actor_entropy", "actor_loss"),
    ):
        assert name in logged, name
    rows = metrics(finished)
    assert [row["step"] for row in rows] == sorted({row["step"] for row in rows})
    assert rows[-1]["step"] == 480 and rows[-1]["train_ratio"] == pytest.approx(8, rel=0.3)
    assert all(value is not None for row in rows for value in row.values())


def test_the_readme_explains_every_metric(finished):
    text = (ROOT / "README.md").read_text()
    logged = {re.sub(r"agent\d+", "agentI", name) for name in set().union(*metrics(finished))}
    explained = set(re.findall(r"`(\w+)`", text)) | {"step", "memory_device_mib"}
    assert logged - explained == set()


def test_commands_of_the_readme_are_understood():
    blocks = re.findall(r"```sh\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)
    whole = re.sub(r"\\\n\s*", "", "".join(blocks))
    lines = [line.removesuffix("&") for line in whole.splitlines() if "dreamer.py" in line]
    assert len(lines) >= 7
    for line in lines:
        flags = line.replace("$seed", "0").partition("dreamer.py")[2].split()
        assert load_config(flags, SETTINGS).logdir


def test_the_code_of_the_readme_plays_a_trained_team(finished, monkeypatch):
    monkeypatch.chdir(ROOT)
    blocks = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)
    (code,) = (block for block in blocks if "Player" in block)
    names: dict = {}
    exec(code.replace("./logdir/balance", str(finished)), names)
    rows = names["rows"]
    assert rows["reward"].shape == (8, 3) and rows["action"].shape == (8, 3, 2)


def test_each_side_can_be_tried_against_random_play(finished, capsys):
    sides.main(["--logdir", str(finished), "--side", "0", "--side", "1", "2", "--episodes", "3"])
    rows = [line.split("|") for line in capsys.readouterr().out.splitlines() if "|" in line]
    assert [row[1].strip() for row in rows[2:]] == ["none", "0", "1, 2", "0, 1, 2"]
    assert all(float(cell) < 0 for row in rows[2:] for cell in row[2:5])
    with pytest.raises(UserError, match="--side 3: expected agents from 0 to 2"):
        sides.main(["--logdir", str(finished), "--side", "3"])


def test_what_a_team_imagines_is_told_beside_what_happens(finished, capsys):
    dreams.main(["--logdir", str(finished), "--after", "4", "--episodes", "6"])
    told = capsys.readouterr().out
    rows = [line.split("|")[1:-1] for line in told.splitlines() if line.startswith("|")]
    (_, _, real, *_), exchanged = rows[:5], rows[7:]
    assert "6 episodes from their step 4 on" in told
    assert all(float(cell) < 0 for cell in real[1:]) and len(real) == 6
    assert [row[0].strip() for row in exchanged[:3]] == ["code", "vectors", "numbers 0, 1 of each"]
    with pytest.raises(UserError, match="--after 6: expected 1 to 5"):
        dreams.main(["--logdir", str(finished), "--after", "6"])
    with pytest.raises(UserError, match="--eval_episode_num 0: expected 1 or more"):
        dreams.main(["--logdir", str(finished), "--episodes", "0"])


def test_only_the_vectors_or_the_code_are_exchanged_for_what_was_foretold(finished):
    _, env, team, _ = load_team(str(finished))
    before, now = dreams.play(Player(env, team, explore=True), 3)[1][-2:]
    states = dreams.exchanged(team, before, env.random_action(), now)
    same = {
        name: [torch.equal(*pair) for pair in zip(state, now, strict=True)]
        for name, state in states.items()
    }
    assert same.pop("code") == [True, False, True]
    assert set(map(tuple, same.values())) == {(True, True, False)}
    pairs = [state[2] for name, state in states.items() if "numbers" in name]
    changed = torch.stack([pair != now[2] for pair in pairs])
    assert torch.equal(changed.sum(0), (states["vectors"][2] != now[2]).long())


def test_a_world_model_alone_learns_what_a_run_recorded(finished, capsys, monkeypatch):
    with pytest.raises(UserError, match="--time_limit 20: expected 24 or more"):
        world_model.main([str(finished)])
    monkeypatch.setattr(world_model, "HORIZONS", (0, 1, 5))
    argv = [str(finished), "--updates", "1", "150", "--loss_scales.next_vector", "3", "--model.lr"]
    world_model.main([*argv, "1e-2"])
    rows = [line.split("|")[1:-1] for line in capsys.readouterr().out.splitlines() if "|" in line]
    assert [row[0].strip() for row in rows[2:]] == ["1", "150"] and len(rows[0]) == 5
    early, late = ([cell.strip(" %").split(",") for cell in row[2:]] for row in rows[2:])
    assert float(late[1][0]) < 0.8 * float(early[1][0])  # vectors, one step ahead
    assert all(float(new) > float(old) for (_, old), (_, new) in zip(early, late, strict=True))
    with pytest.raises(UserError, match="expected 4 episodes or more, of 20 steps, found 3"):
        world_model.main([str(finished), "--episodes", "3"])


def test_recorded_episodes_are_whole_and_begin_at_their_first_row(finished):
    path = next(iter((finished / "train_eps").glob("*.npz")))
    with np.load(path, allow_pickle=False) as episode:
        assert episode["is_first"].tolist() == [True] + [False] * 20
        assert episode["is_last"].tolist() == [False] * 20 + [True]
        assert not episode["is_terminal"].any()
        assert not episode["action"][0].any() and not episode["reward"][0].any()
        assert "deter" not in episode and "image" not in episode


def test_the_prediction_gif_shows_truth_prediction_and_error(finished):
    with Image.open(finished / "train_openl.gif") as gif:
        assert gif.size == (6 * 64, 3 * 64) and gif.n_frames > 5


def test_the_same_command_with_more_steps_goes_on(finished):
    before = metrics(finished)
    updates = torch.load(finished / "latest.pt", weights_only=True)["updates"]
    run(finished, "--steps", "640")
    after = metrics(finished)
    assert after[: len(before)] == before
    assert [row["step"] for row in after[len(before) :]] == [560, 640]
    state = torch.load(finished / "latest.pt", weights_only=True)
    assert state["step"] == 640
    assert state["updates"] == pytest.approx(updates + 160 * 8 / 32, abs=1)


def test_a_run_goes_on_with_its_own_settings_where_no_presets_are_given(finished):
    settings, before = (finished / "config.yaml").read_text(), metrics(finished)[-1]["step"]
    dreamer.main(["--logdir", str(finished), "--steps", str(before + 80)])
    now, goal = (finished / "config.yaml").read_text(), f"steps: {before + 80}"
    assert metrics(finished)[-1]["step"] == before + 80
    assert now == re.sub(r"(?m)^steps: .*", goal, settings)


def test_a_finished_run_is_left_alone(finished, capsys):
    before = {path: path.read_bytes() for path in finished.rglob("*") if path.is_file()}
    run(finished, "--steps", "400")
    assert {path: path.read_bytes() for path in finished.rglob("*") if path.is_file()} == before
    assert re.search("has its .* steps; give a larger --steps", capsys.readouterr().out)


def test_a_run_that_is_stopped_before_its_first_step_claims_no_checkpoint(
    tmp_path, monkeypatch, capsys
):
    stopped = nullcontext(SimpleNamespace(requested=True))
    monkeypatch.setattr(dreamer, "GracefulExit", lambda: stopped)
    run(tmp_path)
    assert not (tmp_path / "latest.pt").exists() and "saved" not in capsys.readouterr().err


def test_evaluation_alone_prints_one_json_object_and_writes_a_gif(finished, capsys):
    dreamer.main(["--eval_only", "True", "--logdir", str(finished), "--eval_episode_num", "5"])
    figures = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert set(figures) == {
        *("eval_return_mean", "eval_return_ci95", "eval_length_mean", "episodes"),
    }
    assert figures["episodes"] == 5 and figures["eval_length_mean"] == 20
    assert figures["eval_return_mean"] < 0 < figures["eval_return_ci95"]
    with Image.open(finished / "eval.gif") as gif:
        assert min(gif.size) >= 256 and gif.n_frames > 5
    # A trained team may be tried under other conditions.
    dreamer.main(["--eval_only", "True", "--logdir", str(finished), "--time_limit", "12"])
    assert json.loads(capsys.readouterr().out.splitlines()[-1])["eval_length_mean"] == 12


def test_evaluation_repeats_itself_and_changes_no_random_state(finished, capsys):
    lines = []
    for _ in range(2):
        state = torch.get_rng_state()
        config = load_config(["--logdir", str(finished)], SETTINGS, saved=finished / "config.yaml")
        env = dreamer.make_env(config, torch.device("cpu"), config.envs, config.seed)
        torch.set_rng_state(state)
        team = dreamer.make_dreamer(config, env)
        team.load_state_dict(torch.load(finished / "latest.pt", weights_only=True)["dreamer"])
        before = torch.get_rng_state()
        episodes, _ = dreamer.play(config, team, 64, 1, lambda rows: None)
        assert torch.equal(torch.get_rng_state(), before)
        lines.append(episodes.returns)
    assert torch.equal(*lines)


def test_showing_predictions_changes_no_random_state(finished, tmp_path):
    config = load_config(["--logdir", str(finished)], SETTINGS, saved=finished / "config.yaml")
    env = dreamer.make_env(config, torch.device("cpu"), config.envs, config.seed)
    team = dreamer.make_dreamer(config, env)
    recorder, player, videos = Recorder(config, env, tmp_path), Player(env, team, True), []
    for _ in range(dreamer.OPEN_LOOP + 2):
        recorder.add(player.step())
    before = torch.get_rng_state(), recorder.pictures.random_state()
    logger = SimpleNamespace(video=lambda name, frames: videos.append(frames))
    dreamer.show_predictions(recorder.pictures, team, logger)
    after = torch.get_rng_state(), recorder.pictures.random_state()
    assert len(videos) == 1 and all(map(torch.equal, before, after))


def test_learning_from_recorded_episodes_takes_no_environment_steps(finished, tmp_path):
    flags = ("--offline_traindir", str(finished / "train_eps"), "--steps", "240")
    run(tmp_path, *flags)
    assert not (tmp_path / "train_eps").exists()
    last = metrics(tmp_path)[-1]
    assert last["step"] == 240 and last["vector_loss"] > 0 and "eval_return" in last


def test_ranks_share_a_folder_of_recorded_episodes(finished, tmp_path, monkeypatch):
    config = load_config(["--logdir", "x"], SETTINGS, saved=finished / "config.yaml")
    env = dreamer.make_env(config, torch.device("cpu"), config.envs, 0)
    team, held = dreamer.make_dreamer(config, env), []
    for rank in range(2):
        recorder = Recorder(config, env, tmp_path / str(rank))
        with monkeypatch.context() as patch:
            patch.setattr("distributed.ranks", lambda: 2)
            patch.setattr("distributed.rank", lambda rank=rank: rank)
            recorder.load(team, str(finished / "train_eps"))
        recorder.folder.close()
        rows = recorder.replay.rings["agent0"][: recorder.replay.steps_per_copy].flatten(0, 1)
        held.append(set(map(tuple, rows.tolist())))
    assert len(held[0]) >= 200 <= len(held[1]) and not held[0] & held[1]


def test_an_episode_longer_than_the_replay_still_gives_pictures(tmp_path):
    flags = ("--time_limit", "400", "--probe.dataset_size", "240", "--steps", "480")
    run(tmp_path, *flags, "--eval_episode_num", "1")
    with Image.open(tmp_path / "train_openl.gif") as gif:
        assert gif.n_frames > 5
    with Image.open(tmp_path / "eval_policy.gif") as gif:
        assert gif.n_frames <= 200
    assert metrics(tmp_path)[-1]["eval_length"] == 400


def test_the_image_head_draws_at_the_size_asked_for(tmp_path):
    run(tmp_path, "--image_size", "32", "--steps", "240")
    with Image.open(tmp_path / "train_openl.gif") as gif:
        assert gif.size == (6 * 32, 3 * 32)


def test_no_updates_pile_up_while_there_are_too_few_rows(tmp_path):
    run(tmp_path, "--prefill", "16", "--batch_length", "40", "--steps", "240", "--log_every", "8")
    done = [row["updates_per_second"] > 0 for row in metrics(tmp_path)]
    first = metrics(tmp_path)[done.index(True)]
    assert first["step"] >= 164 and first["train_ratio"] < 2 * 8 + 20  # one update is 20 a step


def test_steps_count_every_simulator_step_of_an_action(tmp_path):
    run(tmp_path, "--action_repeat", "2", "--steps", "320")
    rows = metrics(tmp_path)
    assert rows[-1]["step"] == 320 and rows[-1]["eval_length"] == 10  # actions of 2 steps each
    assert torch.load(tmp_path / "latest.pt", weights_only=True)["updates"] == pytest.approx(
        (320 - 64) * 8 / 32, abs=2
    )


def test_the_first_actions_of_a_team_are_not_its_first_lesson(tmp_path):
    run(tmp_path, "--steps", "160")  # all of them random
    updates = torch.load(tmp_path / "latest.pt", weights_only=True)["updates"]
    assert updates == pytest.approx((160 - 32) * 8 / 32, abs=2)  # from 9 rows of each copy on


def test_the_image_head_can_be_left_behind_and_begun_anew(finished, tmp_path):
    from_run = ("--from_checkpoint", str(finished / "latest.pt"), "--steps", "240")
    run(tmp_path / "without", *from_run, "--probe.envs", "0")
    run(tmp_path / "without", "--steps", "320")
    assert "image_loss" in metrics(tmp_path / "without")[-1]


def test_the_world_model_sees_images_alone_and_predicts_what_predict_keys_say(tmp_path):
    flags = ("--configs", "vmas", "debug", "--steps", "240", "--task", "vmas_balance")
    cases = {
        "told": ((), {"vector_loss", "image_loss", "probe_grad_norm"}),
        "alone": (("--predict_keys", "image"), {"image_loss"}),
        "both": (("--predict_keys", ".*"), {"vector_loss", "image_loss"}),
    }
    for name, (more, expected) in cases.items():
        run(tmp_path / name, *flags, *more)
        logged = set().union(*metrics(tmp_path / name))
        assert logged & {"vector_loss", "image_loss", "probe_grad_norm"} == expected
    path = next(iter((tmp_path / "told" / "train_eps").glob("*.npz")))
    with np.load(path, allow_pickle=False) as episode:
        assert episode["image"].shape[1:] == (64, 64, 3)


def test_an_agent_can_learn_from_its_own_return_and_discrete_actions(tmp_path, capsys):
    flags = ("--task", "vmas_navigation", "--reward", "agent", "--scenario.shared_rew", "false")
    discrete = ("--discrete", "true", "--imag_gradient", "reinforce")
    run(tmp_path, *flags, *discrete, "--steps", "240")
    assert "eval_return_agent0" in set().union(*metrics(tmp_path))
    dreamer.main(["--eval_only", "True", "--logdir", str(tmp_path)])
    figures = json.loads(capsys.readouterr().out.splitlines()[-1])
    each = [figures[f"eval_return_agent{i}"] for i in range(4)]
    assert figures["eval_return_mean"] == pytest.approx(sum(each) / 4)
    told = {"eval_info/pos_rew", "eval_info/final_rew", "eval_info/agent_collisions"}
    assert told <= figures.keys() and told <= set().union(*metrics(tmp_path))


def test_training_episodes_can_begin_anew_before_the_time_limit(tmp_path):
    run(tmp_path, "--train_restart", "4", "--steps", "240")
    lengths = {int(path.stem.split("-")[-1]) for path in (tmp_path / "train_eps").glob("*.npz")}
    assert len(lengths) > 1 and min(lengths) >= 4 and max(lengths) <= 20
    assert metrics(tmp_path)[-1]["eval_length"] == 20


class Bare:
    """An environment that shows what `Environment` names, and nothing else."""

    def __init__(self, env: Vmas):
        self._env = env

    def __getattr__(self, name: str):
        if name not in {*Environment.__annotations__, *vars(Environment)}:
            raise AttributeError(f"an Environment has no {name}")
        return getattr(self._env, name)


def test_a_run_asks_of_an_environment_only_what_is_promised(tmp_path, monkeypatch):
    make = build.make_env
    for module in (build, dreamer):
        monkeypatch.setattr(module, "make_env", lambda *args, **kw: Bare(make(*args, **kw)))
    with monkeypatch.context() as patch:
        stop_after(patch, 9)
        run(tmp_path, "--probe.envs", "4")
    assert (tmp_path / "moment.pt").exists()
    run(tmp_path, "--probe.envs", "4", "--steps", "320")
    assert {"eval_return", "image_loss"} <= metrics(tmp_path)[-1].keys()


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_saves_and_ends_the_run(tmp_path, number):
    command = [sys.executable, ROOT / "dreamer.py", *QUICK, "--logdir", tmp_path]
    process = subprocess.Popen(
        [*command, "--steps", "100000"], stderr=subprocess.PIPE, text=True, cwd=tmp_path
    )
    for line in process.stderr:
        if line.startswith("step"):
            break
    process.send_signal(number)
    process.stderr.read()
    assert process.wait() == 0
    state = torch.load(tmp_path / "latest.pt", weights_only=True)
    assert 0 < state["step"] < 100_000


def test_every_key_is_read(tmp_path, monkeypatch):
    read: set[str] = set()
    paths: dict[int, str] = {}
    get, as_dict = Config.__getattr__, Config.as_dict

    def walk(group: Config, prefix: str) -> list[str]:
        paths[id(group)] = prefix
        keys = []
        for name, value in group._values.items():
            below = walk(value, f"{prefix}{name}.") if isinstance(value, Config) else []
            keys += below or [prefix + name]
        return keys

    def spy(group: Config, name: str):
        if id(group) in paths:
            read.add(paths[id(group)] + name)
        return get(group, name)

    def spy_all(group: Config) -> dict:
        read.update(paths.get(id(group), "?") + name for name in group._values)
        return as_dict(group)

    monkeypatch.setattr(Config, "__getattr__", spy)
    monkeypatch.setattr("run.save_config", lambda config, path: None)
    monkeypatch.setattr(dreamer, "check_values", lambda config: None)
    monkeypatch.setattr(dreamer, "share", lambda config, rank, ranks: config)
    for preset in ("vmas", "vmas_vector"):
        flags = [*QUICK, "--configs", preset, "debug", "--logdir", str(tmp_path / preset)]
        config = load_config([*flags, "--steps", "240"], SETTINGS)
        keys = walk(config, "")
        monkeypatch.setattr(dreamer, "load_config", lambda *_, made=config: made)
        monkeypatch.setattr(Config, "as_dict", spy_all)
        dreamer.main([])
        monkeypatch.setattr(Config, "as_dict", as_dict)
    assert not [key for key in keys if key not in read]


@pytest.mark.parametrize("preset", PRESETS)
def test_a_preset_makes_networks(preset, tmp_path):
    config = load_config(["--configs", preset, "--logdir", "x", "--envs", "2"], SETTINGS)
    env = dreamer.make_env(config, torch.device("cpu"), 2, 0)
    sizes = {"size1m": 1e6, "size12m": 12e6, "size25m": 25e6}
    team = dreamer.make_dreamer(config, env)
    if preset in sizes:
        count = sum(p.numel() for p in team.world.parameters())
        assert 0.5 < count / sizes[preset] < 1.6


ERRORS = [
    (["--task", "vmas_simple_spred"], "simple_spread"),
    (["--task", "atari_pong"], "vmas_"),
    (["--task", "vmas_"], "vmas_"),
    (["--task", "simple_spread"], "such as vmas_simple_spread"),
    (["--task", "vmas_no_package.meet"], "no module 'no_package'"),
    (["--model", "{lr: 1, decai: 3}"], "model.decai: no such setting; nearest: --model.decay"),
    (["--scenario.n_agent", "4"], "n_agents"),
    (["--scenario.n_agents", "nine"], "n_agents|scenario"),
    (["--configs", "vmas_vectr"], "vmas_vector"),
    (["--train_ration", "4"], "train_ratio"),
    (["--actor.entropi", "4"], "actor.entropy"),
    (["--steps", "1.5"], "steps"),
    (["--steps", "many"], "steps"),
    (["--steps", "0"], "steps"),
    (["--envs", "-3"], "envs"),
    (["--discrete", "1"], "true or false"),
    (["--device", "cuda:7"], "cpu"),
    (["--device", "gpu"], "cpu"),
    (["--reward", "team"], "mean"),
    (["--task", "vmas_simple_adversary"], "--reward agent"),
    (["--configs", "benchmarl", "--task", "vmas_drone"], "vmas_balance"),
    (["--imag_gradient", "both"], "dynamics"),
    (["--mlp_keys", "("], "mlp_keys"),
    (["--mlp_keys", "^$"], "mlp_keys"),
    (["--predict_keys", "agent_0"], "agent_0: matches none of agent0, agent1, agent2"),
    (["--predict_keys", "image"], "image: matches none of agent0"),
    (["--cnn_points", "-1"], "cnn_points -1: expected 0 or more"),
    (["--rssm.deter", "30", "--rssm.blocks", "8"], "deter"),
    (["--rssm.classes", "1000"], "classes"),
    (["--image_size", "50"], "image_size"),
    (["--dataset_size", "10"], "dataset_size"),
    (["--train_restart", "-1"], "train_restart -1: expected 0 or more"),
    (["--batch_length", "1"], "batch_length 1: expected 2 or more"),
    (["--rssm.blocks", "0"], "rssm.blocks 0: expected 1 or more"),
    (["--probe.every", "0"], "probe.every 0: expected 1 or more"),
    (["--probe.dataset_size", "20"], "probe.dataset_size 20: expected 36 or more"),
    (["--task", "vmas_navigation", "--reward", "agent", "--imag_starts", "2"], "4 or more"),
    (["--threads", "-1"], "threads -1: expected 0 or more"),
    (["--model.lr", "nan"], "model.lr nan: expected 0 or more"),
    (["--train_ratio", "inf"], "train_ratio inf: expected a finite number"),
    (["--loss_scales.rep", "-0.1"], "loss_scales.rep -0.1: expected 0 or more"),
    (["--model.agc", "0"], "model.agc 0.0: expected a finite number above 0"),
    (["--actor.max_std", "0.05"], "max_std 0.05: expected min_std, 0.1, or more"),
    (["--seed", "-1"], "seed -1: expected 0 to"),
    (["--discount", "1.5"], "discount 1.5: expected 0 to 1"),
    (["--offline_traindir", "nowhere"], "nowhere: there is no such folder"),
    (["--eval_only", "True"], "there is no run to evaluate"),
    (["--train_restart", "30"], "train_restart 30: expected at most time_limit, 20"),
    (["stray"], "stray"),
    (["--steps"], "steps"),
]


@pytest.mark.parametrize(("flags", "expected"), ERRORS, ids=lambda value: " ".join(value)[:40])
def test_an_error_of_the_user_is_one_line_and_leaves_nothing(flags, expected, tmp_path):
    logdir = tmp_path / "logdir"
    with pytest.raises((UserError, ScenarioError), match=expected) as error:
        run(logdir, *flags)
    assert "\n" not in str(error.value)
    assert not logdir.exists()


def test_an_error_ends_with_status_2_and_no_traceback(tmp_path):
    for flags in (["--logdir", tmp_path / "x", "--stepz", "3"], ["--configs", "vmas"]):
        command = [sys.executable, ROOT / "dreamer.py", *map(str, flags)]
        done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path)
        assert done.returncode == 2 and not done.stdout
        assert len(done.stderr.splitlines()) == 1 and "Traceback" not in done.stderr
    assert not list(tmp_path.iterdir())


def test_help_that_nobody_reads_to_its_end_is_no_error():
    command = [sys.executable, ROOT / "dreamer.py", "--help"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        process.stdout.close()
        assert process.stderr.read() == b"" and process.wait() == 0


def test_a_logdir_of_another_run_is_refused_field_by_field(finished):
    before = {path: path.stat().st_mtime_ns for path in finished.rglob("*")}
    with pytest.raises(UserError, match=r"task: saved vmas_simple_spread, now vmas_balance"):
        run(finished, "--task", "vmas_balance")
    with pytest.raises(UserError, match=r"units: saved 16, now 24"):
        run(finished, "--units", "24", "--steps", "9000")
    assert {path: path.stat().st_mtime_ns for path in finished.rglob("*")} == before


def test_a_logdir_with_a_name_too_long_is_refused(tmp_path):
    with pytest.raises(UserError, match=r"--logdir .*xxx: File name too long"):
        run(tmp_path / ("x" * 300))


def test_a_logdir_that_is_a_file_is_refused(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match="file"):
        run(tmp_path / "file")
