"""Settings: what presets and flags resolve to, and the one line that each mistake gets."""

import copy
import pickle
import re
from pathlib import Path

import pytest

from config import Config, check_compatible, load_config, read_yaml, save_config
from tools import UserError

YAML_TEXT = """
defaults:
  logdir: null
  task: vmas_simple_spread
  steps: 1_000_000  # how long
  lr: 1e-4
  train: true
  note: null
  layers: [64, 64]
  scales: []
  scenario: {}
  actor: {entropy: 3e-4, units: 256, dist: {name: normal}}

vmas: {task: vmas_balance, scenario: {n_agents: 3, probs: [1.0, 0]}}
debug: {steps: 1e3, lr: 1, actor: {units: 8}, layers: [2], train: false, note: short}
empty:
unknown: {stepz: 1}
unknown_nested: {actor: {entropi: 1}}
fraction: {steps: 1.5}
text: {lr: fast}
number: {task: 3}
words: {layers: [a]}
single: {layers: 3}
flag: {train: 1}
group: {actor: 3}
notgroup: {steps: {of: 3}}
tasks:
  steps: 5
  tasks:
    vmas_balance: {steps: 7, actor: {units: 9}, scenario: {n_agents: 4}}
    vmas_wheel: {}
tasks_unknown: {tasks: {vmas_balance: {stepz: 1}}}
tasks_words: {tasks: [vmas_balance]}
tasks_number: {tasks: {vmas_balance: 3}}
deep: {scenario: {a: {b: 1}}}
list: [1, 2]
"""


@pytest.fixture
def path(tmp_path: Path) -> Path:
    file = tmp_path / "configs.yaml"
    file.write_text(YAML_TEXT)
    return file


@pytest.fixture
def load(path):
    return lambda line: load_config(["--logdir", "runs", *line.split()], path)


def test_defaults(load):
    config = load("")
    assert config.as_dict() == {
        "logdir": "runs",
        "task": "vmas_simple_spread",
        "steps": 1_000_000,
        "lr": 1e-4,
        "train": True,
        "note": None,
        "layers": [64, 64],
        "scales": [],
        "scenario": {},
        "actor": {"entropy": 3e-4, "units": 256, "dist": {"name": "normal"}},
    }
    assert type(config.steps) is int
    assert config.actor.dist.name == "normal"


def test_presets_stack_in_order(load):
    config = load("--configs vmas debug")
    assert config.task == "vmas_balance"
    assert config.scenario.as_dict() == {"n_agents": 3, "probs": [1.0, 0]}
    assert (config.steps, config.lr, config.train, config.note) == (1000, 1.0, False, "short")
    assert (type(config.steps), type(config.lr)) == (int, float)
    assert (config.actor.units, config.actor.entropy) == (8, 3e-4)
    assert load("--configs=debug").layers == (2,)
    assert load("--configs empty").as_dict() == load("").as_dict()


def test_a_preset_may_hold_settings_for_single_tasks(load):
    config = load("--configs tasks --task vmas_balance")
    assert (config.steps, config.actor.units, config.actor.entropy) == (7, 9, 3e-4)
    assert config.scenario.as_dict() == {"n_agents": 4}
    assert "tasks" not in config.as_dict()
    assert load("--configs tasks --task vmas_wheel").steps == 5
    # The task may come from another preset, before or after; flags still win.
    for stack in ("vmas tasks", "tasks vmas"):
        assert load(f"--configs {stack} --scenario.n_agents 9").steps == 7
    assert load("--configs tasks vmas").scenario.n_agents == 3
    assert load("--configs vmas tasks --scenario.n_agents 9").scenario.n_agents == 9


@pytest.mark.parametrize(
    ("line", "complaint"),
    [
        ("tasks", "nothing for task vmas_simple_spread; it has vmas_balance, vmas_wheel"),
        ("tasks_unknown", "stepz: no such setting; nearest: steps"),
        ("tasks_words", "tasks: expected tasks, each with keys and values"),
        ("tasks_number", "tasks: expected tasks, each with keys and values"),
    ],
)
def test_settings_for_single_tasks_are_held_to_the_same_rules(load, line, complaint):
    task = "" if line == "tasks" else " --task vmas_balance"
    with pytest.raises(UserError) as error:
        load(f"--configs {line}{task}")
    assert str(error.value) == f"preset '{line}' of configs.yaml: {complaint}"


def test_later_configs_replaces_earlier(load):
    assert load("--configs vmas --lr 2 --configs debug").task == "vmas_simple_spread"


def test_flags_win_over_presets_and_later_flags_over_earlier(load):
    assert load("--lr 5 --configs debug --steps 3 --steps=4").as_dict() == {
        **load("--configs debug").as_dict(),
        "lr": 5.0,
        "steps": 4,
    }


@pytest.mark.parametrize(
    ("line", "value"),
    [
        ("--steps 1e6", 1_000_000),
        ("--steps=2_000", 2000),
        ("--steps -1", -1),
        ("--lr 3", 3.0),
        ("--lr -1e-3", -1e-3),
        ("--lr -.5", -0.5),
        ("--lr -inf", float("-inf")),
        ("--train true", True),
        ("--train False", False),
        ("--task 7", "7"),
        ("--task=--odd=1", "--odd=1"),
        ("--task=", ""),
        ("--note 5", 5),
        ("--note null", None),
        ("--note 1e-3", 1e-3),
        ("--note [", "["),
        ("--note 2024-01-01", "2024-01-01"),
        ("--layers 1 2 1e3", (1, 2, 1000)),
        ("--layers=1 2", (1, 2)),
        ("--layers 3 --layers -4 5", (-4, 5)),
        ("--scales 1 x true", (1, "x", True)),
        ("--actor.entropy 1e-3", 1e-3),
        ("--actor.dist.name -5", "-5"),
        ("--scenario.n_agents 4", 4),
        ("--scenario.shared_rew false", False),
        ("--scenario.dist_shaping -2.5", -2.5),
        ("--scenario.probs=[1,0.5]", (1, 0.5)),
        ("--scenario.as_dict 1", 1),
        ("--logdir 2024", "2024"),
    ],
)
def test_value_of_flag(load, line, value):
    config = load(line)
    found = config.as_dict()
    for part in line.lstrip("-").replace("=", " ").split()[0].split("."):
        found = found[part]
    found = tuple(found) if isinstance(found, list) else found
    assert found == value
    assert type(found) is type(value)


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("--stepz 3", "--stepz: no such setting; nearest: --steps"),
        ("--entropy 3", "--entropy: no such setting; nearest: --actor.entropy"),
        ("--actor.unit 3", "--actor.unit: no such setting; nearest: --actor.units"),
        ("--n_agents 3", "--n_agents: no such setting; nearest: --scenario.n_agents"),
        ("--steps.of 3", "--steps.of: no such setting; nearest: --steps"),
        ("--scenario.a.b 3", "--scenario.a.b: no such setting; nearest: --scenario"),
        ("--scenario. 3", "--scenario.: no such setting; nearest: --scenario"),
        ("--Steps 3", "--Steps: no such setting; nearest: --steps"),
        ("-- 3", "--: no such setting; nearest: --scenario."),
        ("--configs vmaz", "--configs: unknown preset 'vmaz'; nearest: vmas"),
        ("--steps 1.5", "--steps: expected a whole number, got 1.5"),
        ("--steps many", "--steps: expected a whole number, got 'many'"),
        ("--steps true", "--steps: expected a whole number, got 'true'"),
        ("--steps inf", "--steps: expected a whole number, got inf"),
        ("--lr fast", "--lr: expected a number, got 'fast'"),
        ("--lr=", "--lr: expected a number, got ''"),
        ("--lr 1" + "0" * 400, "--lr: expected a number, got 1" + "0" * 400),
        ("--train 1", "--train: expected true or false, got '1'"),
        ("--train yes", "--train: expected true or false, got 'yes'"),
        ("--note=[1]", "--note: expected a single value, got [1]"),
        ("--layers 1 b", "--layers: expected a list, each item a whole number, got [1, 'b']"),
        ("--scenario.n={a:1}", "--scenario.n: expected"),
        ("--actor 3", "--actor: a group has no value of its own; it has actor.entropy"),
        ('--actor={"entropi":3}', "--actor.entropi: no such setting; nearest: --actor.entropy"),
        ("--config vmas", "--config: no such setting; nearest: --configs"),
        ("--scenario 3", "--scenario: a group has no value of its own; it has scenario.NAME"),
        ("--steps", "--steps needs a value: a whole number"),
        ("--train --steps 3", "--train needs a value: true or false"),
        ("--layers", "--layers needs a value: a list, each item a whole number"),
        ("--scenario.n", "--scenario.n needs a value: a value"),
        ("--configs", "--configs needs a value"),
        ("--steps 3 4", "unexpected argument '4': --steps takes one value"),
        ("--task -x", "unexpected argument '-x'"),
        ("--configs unknown", "preset 'unknown' of configs.yaml: stepz: no such setting; nearest:"),
        ("--configs unknown_nested", "actor.entropi: no such setting; nearest: actor.entropy"),
        ("--configs fraction", "preset 'fraction' of configs.yaml: steps: expected a whole number"),
        ("--configs text", "lr: expected a number, got 'fast'"),
        ("--configs number", "task: expected text, got 3"),
        ("--configs words", "layers: expected a list, each item a whole number, got ['a']"),
        ("--configs single", "layers: expected a list"),
        ("--configs flag", "train: expected true or false, got 1"),
        ("--configs group", "actor: a group has no value of its own"),
        ("--configs notgroup", "preset 'notgroup' of configs.yaml: steps.of: no such setting"),
        ("--configs deep", "preset 'deep' of configs.yaml: scenario.a.b: no such setting"),
        ("--configs list", "preset 'list' of configs.yaml: expected keys with values"),
    ],
)
def test_mistakes_get_one_clear_line(load, line, message):
    with pytest.raises(UserError) as caught:
        load(line)
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


def test_stray_argument_and_missing_logdir(path):
    with pytest.raises(UserError, match="unexpected argument 'vmas'"):
        load_config(["vmas"], path)
    for argv in ([], ["--steps", "3"], ["--logdir", ""], ["--logdir="]):
        with pytest.raises(UserError, match="--logdir is missing"):
            load_config(argv, path)
    assert load_config([], path, required=()).logdir is None
    with pytest.raises(UserError, match="--note is missing"):
        load_config(["--logdir", "runs"], path, required=("logdir", "note"))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("defaults: {a: 1", "cannot read"),
        ("defaults: {a: 1, a: 2}", "duplicate key"),
        ("- 1", "expected keys with values"),
        ("", "expected keys with values"),
        ("vmas: {a: 1}", "has no group 'defaults'"),
        ("defaults: 3", "has no group 'defaults'"),
    ],
)
def test_unreadable_yaml(tmp_path, text, message):
    path = tmp_path / "configs.yaml"
    path.write_text(text)
    with pytest.raises(UserError, match=message) as caught:
        load_config([], path)
    assert "\n" not in str(caught.value)
    assert str(path) in str(caught.value)


def test_yaml_that_is_not_there_or_not_text(tmp_path):
    with pytest.raises(UserError, match="No such file"):
        load_config([], tmp_path / "none.yaml")
    (tmp_path / "bytes.yaml").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(UserError, match="cannot read"):
        load_config([], tmp_path / "bytes.yaml")


def test_help_lists_presets_keys_and_defaults(path, capsys):
    with pytest.raises(SystemExit) as caught:
        load_config(["--steps", "wrong", "--help"], path)
    assert caught.value.code == 0
    out, err = capsys.readouterr()
    assert not err
    rows = dict(line.split(maxsplit=1) for line in out.splitlines() if line.startswith("  --"))
    assert rows["--actor.dist.name"] == "normal"
    assert rows["--layers"] == "64 64"
    assert rows["--steps"].split(maxsplit=1) == ["1000000", "# how long"]
    assert rows["--train"] == "true"
    assert rows["--note"] == "null"
    assert rows["--scales"] == "[]"
    assert rows["--scenario"] == "(any --scenario.NAME VALUE)"
    assert "presets: vmas debug empty" in out
    with pytest.raises(SystemExit):
        load_config(["--help"], REAL)
    assert re.search(r"--rssm.deter +256 +# width of the memory", capsys.readouterr().out)


def test_config_is_read_only_and_says_what_is_missing(load):
    config = load("")
    with pytest.raises(AttributeError, match="read-only"):
        config.steps = 3
    with pytest.raises(AttributeError, match="read-only"):
        config.actor.units = 3
    with pytest.raises(AttributeError, match="read-only"):
        del config.steps
    with pytest.raises(AttributeError, match="'stepz'; nearest: steps"):
        _ = config.stepz
    config.as_dict()["actor"]["units"] = 0
    config.as_dict()["layers"].append(0)
    assert (config.actor.units, config.layers) == (256, (64, 64))


def test_config_can_be_copied_and_pickled(load):
    config = load("--configs vmas")
    assert copy.deepcopy(config).as_dict() == config.as_dict()
    assert pickle.loads(pickle.dumps(config)).as_dict() == config.as_dict()
    assert "vmas_balance" in repr(config)


def test_saved_config_reads_back_as_it_was(load, tmp_path):
    config = load("--configs vmas --task 1e6 --lr 1e-5 --note true --actor.entropy 3e22")
    save_config(config, tmp_path / "config.yaml")
    saved = read_yaml(tmp_path / "config.yaml")
    assert saved == config.as_dict()
    assert list(saved) == list(config.as_dict())
    assert [type(value) for value in saved.values()] == [
        type(value) for value in config.as_dict().values()
    ]
    assert [file.name for file in tmp_path.glob("config.yaml*")] == ["config.yaml"]


def test_saved_settings_come_between_defaults_and_presets(load, path, tmp_path):
    saved = tmp_path / "config.yaml"
    save_config(load("--configs vmas --lr 2 --steps 5 --scenario.x 1"), saved)
    argv = ["--configs", "debug", "--steps", "7"]
    config = load_config(argv, path, saved=saved)
    assert (config.logdir, config.task, config.lr, config.steps) == ("runs", "vmas_balance", 1.0, 7)
    assert config.scenario.as_dict() == {"n_agents": 3, "probs": [1.0, 0], "x": 1}
    saved.write_text("stepz: 3\nlr: 4")  # what a later version no longer has is passed over
    with pytest.warns(match=r"config.yaml: stepz: no such setting; nearest: steps"):
        assert load_config(["--logdir", "x"], path, saved=saved).lr == 4
    saved.write_text("steps: many")
    with pytest.raises(UserError, match=r"config.yaml: steps: expected a whole number"):
        load_config(argv, path, saved=saved)


def test_a_group_takes_keys_with_values(load):
    config = load('--actor={"entropy":1,"dist":{"name":"x"}} --scenario={"n":4}')
    assert (config.actor.entropy, config.actor.units, config.actor.dist.name) == (1.0, 256, "x")
    assert config.scenario.as_dict() == {"n": 4}


def test_check_compatible_names_every_difference():
    saved = {"task": "a", "lr": 1.0, "rssm": {"deter": 8, "stoch": 4}, "scenario": {}, "old": 1}
    now = {"task": "b", "lr": 2.0, "rssm": {"deter": 9, "stoch": 4}, "scenario": {"n": 3}}
    config = Config(now)
    check_compatible(saved, config, ["rssm.stoch"])
    check_compatible(saved, Config(saved), list(saved))
    with pytest.raises(UserError) as caught:
        check_compatible(saved, config, ["task", "rssm", "scenario", "old"])
    assert str(caught.value) == (
        "the saved run has other settings (--configs, flags): "
        "task: saved a, now b; rssm.deter: saved 8, now 9; "
        "scenario.n: saved nothing, now 3; old: saved 1, now nothing"
    )


REAL = Path(__file__).parent.parent / "configs.yaml"


@pytest.mark.parametrize("preset", [name for name in read_yaml(REAL) if name != "defaults"])
def test_every_preset_of_the_project_loads(preset):
    config = load_config(["--configs", preset, "--logdir", "runs"], REAL)
    assert config.logdir == "runs"


def test_the_flags_that_people_type_are_there():
    line = "--configs vmas debug --task vmas_balance --steps 1e6 --scenario.n_agents 4"
    config = load_config([*line.split(), "--eval_only", "True", "--logdir", "runs"], REAL)
    assert (config.steps, config.scenario.n_agents, config.eval_only) == (1_000_000, 4, True)
