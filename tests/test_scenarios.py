"""Every scenario that VMAS ships trains; files of one's own do too; mistakes get one line."""

import re
from pathlib import Path

import pytest
import torch

import dreamer
from build import check_reward, make_dreamer, make_env, row_spaces
from checkpoint import load_checkpoint, save_checkpoint
from config import Config, load_config, read_yaml
from envs.scenarios import ScenarioError, scenario_names
from envs.vmas import Vmas, opposed_agents
from latents import LATENTS
from learner import Learner
from replay import Replay
from rollout import Player, play_episodes
from tools import UserError

ROOT = Path(__file__).parent.parent
SETTINGS = ROOT / "configs.yaml"
BENCHMARL = read_yaml(SETTINGS)["benchmarl"]["tasks"]
CPU = torch.device("cpu")
FEWER = {"pollock": 2, "road_traffic": 3, "waterfall": 2}  # agents; their steps take long
ABSTRACT = """
from vmas.simulator.scenario import BaseScenario


class Scenario(BaseScenario):
    def observation(self, agent): ...
"""


def load(task: str, *flags: str) -> Config:
    return load_config(["--task", task, "--logdir", "unused", *flags], SETTINGS)


@pytest.mark.parametrize("discrete", [False, True])
@pytest.mark.parametrize("name", scenario_names())
def test_every_scenario_trains(name, discrete, tmp_path):
    """VMAS 1.5.2 builds all that it ships, with its own arguments and with BenchMARL's."""
    task, flags = f"vmas_{name}", ["--envs", "2", "--discrete", str(discrete).lower()]
    if not discrete:
        flags += ["--reward", "agent"]
    if name in FEWER:
        flags += ["--scenario.n_agents", str(FEWER[name])]
    presets = ["benchmarl"] if discrete and task in BENCHMARL else []
    flags += ["--configs", "vmas_vector", "debug", *presets, "--time_limit", "6"]
    config = load(task, *flags)
    env = make_env(config, CPU, config.envs, seed=0, training=True)
    learner = Learner(config, make_dreamer(config, env))
    replay = Replay(500, config.envs, row_spaces(config, env, image=False), CPU, 0, LATENTS)
    player = Player(env, learner.dreamer, explore=True)
    starts = 0
    for _ in range(121):
        rows = player.step()
        assert all(value.isfinite().all() for value in rows.values())
        starts += rows["is_first"].sum()
        replay.add(rows)
    assert starts >= 17 * config.envs
    for _ in range(2):
        metrics = learner.update(replay, config.batch_size, config.batch_length)
        assert not [key for key, value in metrics.items() if not value.isfinite()]

    save_checkpoint(tmp_path / "latest.pt", learner.state_dict())
    restored = Learner(config, make_dreamer(config, env))
    restored.load_state_dict(load_checkpoint(tmp_path / "latest.pt", CPU))
    played = play_episodes(make_env(config, CPU, 2, seed=1), restored.dreamer)
    assert played.returns.shape == (2, env.n_agents) and played.returns.isfinite().all()
    assert (played.lengths <= 6).all() and played.lengths.min() > 0
    assert all(value.shape == (2, env.n_agents) for value in played.info.values())


def test_scenario_names():
    assert len(scenario_names()) == len(set(scenario_names())) == 41
    assert {"balance", "simple_spread", "waterfall"} < set(scenario_names())


@pytest.mark.parametrize("name", FEWER)
def test_the_slow_ones_run_with_all_their_agents(name):
    env = Vmas(name, 2)
    env.reset()
    row = env.step(env.random_action())
    assert env.n_agents > FEWER[name] and row["reward"].isfinite().all()


def test_benchmarl_arguments_reach_the_scenario():
    config = load("vmas_balance", "--configs", "vmas_vector", "benchmarl")
    assert (config.time_limit, config.reward) == (100, "mean")
    assert make_env(config, CPU, 2, 0).n_agents == 4
    assert load("vmas_balance").scenario.as_dict() == {}
    with pytest.raises(UserError, match=r"nothing for task vmas_drone; it has vmas_balance, "):
        load("vmas_drone", "--configs", "benchmarl")


OPPOSED = {
    "simple_tag": {},
    "simple_adversary": {},
    "simple_push": {},
    "simple_world_comm": {},
    "simple_crypto": {},
    "football": {"ai_red_agents": False},
}
TEAMS = {
    "simple_spread": {},  # one reward for all
    "simple": {},  # one agent
    "navigation": {"shared_rew": False},  # rewards of their own
    "dispersion": {},  # they compete for food, but none loses by another's meal
    "ball_trajectory": {},  # rewards that hardly change
}


@pytest.mark.parametrize("name", OPPOSED)
def test_opposed_rewards_are_found(name):
    pair = opposed_agents(Vmas(name, 64, time_limit=None, scenario_args=OPPOSED[name]))
    assert pair and pair[0] < pair[1]


@pytest.mark.parametrize("name", TEAMS)
def test_rewards_that_are_only_different_are_not_opposed(name):
    assert opposed_agents(Vmas(name, 64, time_limit=None, scenario_args=TEAMS[name])) is None


def test_rewards_that_are_no_numbers_are_not_opposed(counting):
    path = Path(counting)
    path.write_text(
        path.read_text().replace("return reward.unsqueeze(-1)", "return reward * torch.nan")
    )
    assert opposed_agents(Vmas(counting, 4)) is None


def test_a_team_reward_of_opposed_rewards_is_refused_unless_forced():
    before = torch.get_rng_state()
    for mode in ("mean", "sum"):
        with pytest.raises(UserError, match=r"agent0 costs agent3 in .*--reward agent") as error:
            check_reward(load("vmas_simple_tag", "--reward", mode))
        assert "\n" not in str(error.value)
    check_reward(load("vmas_simple_tag", "--reward", "agent"))
    check_reward(load("vmas_simple_tag", "--force_reward", "true"))
    assert torch.equal(torch.get_rng_state(), before)


def message(*args, **kwargs) -> str:
    with pytest.raises(ScenarioError) as error:
        Vmas(*args, num_envs=2, **kwargs)
    text = str(error.value)
    assert "\n" not in text
    return text


@pytest.mark.parametrize("name", ["blance", "balance.", "ba lance", "balance.x"])
def test_unknown_scenario(name):
    assert message(name).startswith(f"unknown scenario '{name}'; nearest: balance")


def test_unknown_scenario_like_no_other():
    assert message("qqq").endswith("choose from: " + ", ".join(scenario_names()))


@pytest.mark.parametrize("name", scenario_names())
def test_unknown_argument(name):
    text = message(name, scenario_args={"n_agentz": 3})
    assert text.startswith(f"scenario '{name}' has no argument 'n_agentz'; ")


def test_unknown_argument_names_the_nearest():
    def hint(name: str) -> str:
        return message(name, scenario_args={"n_agent": 3}).split("; ")[1]

    assert hint("navigation") == hint("road_traffic") == "nearest: n_agents"
    assert hint("football") == "nearest: n_red_agents, n_blue_agents, ai_red_agents"
    assert hint("reverse_transport").startswith("nearest: n_agents")
    assert hint("het_mass") == "choose from: blue_mass, green_mass, mass_noise"
    assert hint("simple") == "it shows none"


def test_names_of_vmas_settings_are_no_scenario_arguments():
    assert "no argument 'dict_spaces'" in message("simple", scenario_args={"dict_spaces": True})
    assert "no argument 'wrapper'" in message("simple", scenario_args={"wrapper": "gym"})


def test_scenario_that_vmas_cannot_build():
    assert message("balance", scenario_args={"n_agents": 1}) == (
        "VMAS cannot build scenario 'balance' with n_agents=1: "
        "AssertionError: assert self.n_agents > 1"
    )
    assert "no agent to control" in message("football", scenario_args={"ai_blue_agents": True})


def test_the_example_of_the_readme_trains(tmp_path):
    """One's own scenario, with an argument of its own, from the file to a checkpoint."""
    blocks = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)
    (example,) = (block for block in blocks if "class Scenario" in block)
    path = tmp_path / "meet.py"
    path.write_text(example)
    flags = ("--configs", "vmas_vector", "debug", "--device", "cpu", "--steps", "240")
    flags += ("--prefill", "160", "--time_limit", "20", "--scenario.n_agents", "3")
    dreamer.main([*flags, "--task", f"vmas_{path}", "--logdir", str(tmp_path / "run")])
    saved = read_yaml(tmp_path / "run" / "config.yaml")
    assert saved["scenario"] == {"n_agents": 3}
    assert (tmp_path / "run" / "latest.pt").exists()


def test_scenario_file(counting, tmp_path, monkeypatch):
    source = Path(counting).read_text()
    assert Vmas(counting, 2, scenario_args={"n_agents": 3, "shortest": 9}).n_agents == 3
    assert message(counting, scenario_args={"n_agent": 3}) == (
        f"scenario '{counting}' has no argument 'n_agent'; nearest: n_agents"
    )
    monkeypatch.syspath_prepend(tmp_path)
    (tmp_path / "package").mkdir()
    (tmp_path / "package" / "inner.py").write_text(source)
    assert Vmas("counting", 2).n_agents == 2
    assert Vmas("package.inner", 2).n_agents == 2


def test_scenario_file_with_named_arguments(counting, tmp_path):
    path = tmp_path / "named.py"
    path.write_text(
        Path(counting)
        .read_text()
        .replace("**kwargs", "shortest=3, n_agents=2")
        .replace('kwargs.get("shortest", 3)', "shortest")
        .replace('kwargs.get("n_agents", 2)', "n_agents")
    )
    assert Vmas(str(path), 2, scenario_args={"n_agents": 3}).n_agents == 3
    assert message(str(path), scenario_args={"n_agent": 3}).endswith(
        "has no argument 'n_agent'; nearest: n_agents"
    )


@pytest.mark.parametrize(
    ("source", "complaint"),
    [
        ("def", "cannot load scenario '{}': SyntaxError: invalid syntax"),
        ("import nowhere", "cannot load scenario '{}': ModuleNotFoundError: No module named"),
        ("x = 1", "scenario '{}' has no class Scenario"),
        ("class Scenario: pass", "scenario '{}': its Scenario is not a VMAS BaseScenario"),
        (
            ABSTRACT,
            "cannot load scenario '{}': TypeError: Can't instantiate abstract class Scenario",
        ),
        (None, "there is no scenario file {}"),
    ],
)
def test_bad_scenario_file(tmp_path, source, complaint):
    path = tmp_path / "bad.py"
    if source is not None:
        path.write_text(source)
    assert message(str(path)).startswith(complaint.format(path))
