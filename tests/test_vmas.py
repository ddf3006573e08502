"""The VMAS adapter against plain VMAS loops, brute force and its own promises."""

import io
import itertools
import random
import subprocess
import sys
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from vmas import make_env
from vmas.simulator.environment import Environment

from envs.scenarios import ScenarioError
from envs.vmas import Vmas


def run(env: Vmas, actions: Tensor) -> list[dict]:
    """Rows of a reset and of one step for each action of (T, B, N, A)."""
    return [env.reset()] + [env.step(action) for action in actions]


def draw_actions(env: Vmas, steps: int) -> Tensor:
    return torch.stack([env.random_action() for _ in range(steps)])


def assert_equal(rows: list[dict], others: list[dict]) -> None:
    assert len(rows) == len(others)
    for t, (row, other) in enumerate(zip(rows, others, strict=True)):
        assert row.keys() == other.keys()
        for key in row:
            assert torch.equal(row[key], other[key]), f"{key} differs in row {t}"


def plain_actions(simulator, action: Tensor, discrete: bool) -> list[Tensor]:
    """What a user of VMAS would write by hand for `action` (B, N, A)."""
    result = []
    for i, agent in enumerate(simulator.agents):
        if discrete:
            result.append(action[:, i].argmax(-1, keepdim=True))
            continue
        force = action[:, i, : agent.action_size] * agent.action.u_range_tensor
        speech = 0 if agent.silent else simulator.world.dim_c
        words = action[:, i, agent.action_size : agent.action_size + speech] / 2 + 0.5
        result.append(torch.cat([force, words], -1))
    return result


def plain_rows(name: str, arguments: dict, seed: int, limit: int, actions: Tensor, discrete: bool):
    """The rows that a plain loop over the simulator gives, with a clock in Python."""
    copies = actions.shape[1]
    simulator = make_env(name, copies, continuous_actions=not discrete, **arguments)
    clock, over = [0] * copies, [False] * copies
    observations = simulator.reset(seed=seed)
    rewards = [torch.zeros(copies)] * simulator.n_agents
    done = torch.zeros(copies, dtype=torch.bool)
    rows = []
    for t in range(len(actions) + 1):
        first = [True] * copies if t == 0 else list(over)
        if t > 0 and all(over):
            observations = simulator.reset()
            clock = [0] * copies
        elif t > 0:
            stepped = simulator.step(plain_actions(simulator, actions[t - 1], discrete))
            observations, rewards, done, _ = stepped
            clock = [0 if over[i] else clock[i] + 1 for i in range(copies)]
            for i in range(copies):
                if over[i]:
                    simulator.reset_at(i, return_observations=False)
            if any(over):
                (fresh,) = simulator.get_from_scenario(True, False, False, False)
                for old, new in zip(observations, fresh, strict=True):
                    old[over] = new[over]
        mask = torch.tensor(first)
        row = {f"agent{i}": o.clone() for i, o in enumerate(observations)}
        paid = torch.stack([r.reshape(copies) for r in rewards], -1)
        row["reward"] = paid.masked_fill(mask[:, None], 0)
        row["is_first"] = mask
        row["is_terminal"] = done & ~mask
        row["is_last"] = row["is_terminal"] | torch.tensor([c == limit for c in clock])
        over = row["is_last"].tolist()
        rows.append(row)
    return rows


KINDS = {
    "simple_spread": {},  # one team reward
    "simple_tag": {},  # opposed rewards, unequal observations
    "simple_speaker_listener": {},  # unequal action sizes, communication
    "simple_world_comm": {},  # unequal actions and observations, communication
    "simple_crypto": {},  # communication alone matters
    "balance": {"n_agents": 4, "package_mass": 5, "random_package_pos_on_line": True},
    "buzz_wire": {},  # joints, early ends
    "reverse_transport": {},  # early ends right after a reset
    "navigation": {"n_agents": 9},  # draws while it builds, lidar
    "give_way": {},  # action range 0.5
    "road_traffic": {"n_agents": 3},  # ranges differ within an action
    "football": {"n_blue_agents": 2, "n_red_agents": 1},  # scripted opponents
    "wheel": {},  # rewards (B, 1)
    "het_mass": {},  # draws from NumPy in a reset
    "diff_drive": {},  # action sizes 2 and 3
}


@pytest.mark.parametrize("discrete", [False, True])
@pytest.mark.parametrize("name", KINDS)
def test_equals_a_plain_loop(name, discrete):
    env = Vmas(name, 4, seed=7, time_limit=23, discrete=discrete, scenario_args=KINDS[name])
    actions = draw_actions(env, 30)
    expected = plain_rows(name, KINDS[name], 7, 23, actions, discrete)
    assert_equal(run(env, actions), expected)


@pytest.mark.parametrize(("name", "steps"), [("balance", 90), ("buzz_wire", 40)])
def test_equals_a_plain_loop_through_early_ends(name, steps):
    env = Vmas(name, 8, seed=1, time_limit=70)
    actions = draw_actions(env, steps)
    actions[:, :4, :, 1] += 1  # half of the copies push upwards, into walls
    actions.clamp_(-1, 1)
    rows = run(env, actions)
    assert_equal(rows, plain_rows(name, {}, 1, 70, actions, False))
    ends = torch.stack([row["is_last"] for row in rows])
    assert (ends.any(1) & ~ends.all(1)).any(), "no copy ended alone"


def test_a_scenario_that_is_edited_meanwhile_stays_the_same_task(counting):
    before = Vmas(counting, 2)
    Path(counting).write_text("this is no Python")
    after = Vmas(counting, 2, scenario_args={"n_agents": 3})
    assert after.obs_shapes[:2] == before.obs_shapes


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        (
            "reward.unsqueeze(-1)",
            "reward.mean()",
            r"reward of agent 0 has shape \(\), not \(2,\)",
        ),
        (
            "        return self.steps >= ",
            "        return torch.zeros(2, 2) >= ",
            r"what `done` returns has shape \(2, 2\), not \(2,\)",
        ),
        ("reward.unsqueeze(-1)", "reward / {}", r"TypeError: unsupported .*, line \d+\)"),
        ("self.steps += 1", "self.stepz += 1", r"AttributeError: .*counting.py, line 26\)"),
    ],
)
def test_a_fault_of_a_scenario_at_work_is_one_line(counting, old, new, message):
    path = Path(counting)
    path.write_text(path.read_text().replace(old, new))
    with pytest.raises(ScenarioError, match=message) as error:
        run(Vmas(counting, 2), torch.zeros(1, 2, 2, 2))
    assert counting in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("observation", "shape"), [("torch.zeros(5)", r"\(5, 1\)"), ("torch.zeros(2, 0)", r"\(2, 0\)")]
)
def test_an_observation_that_fits_no_copies_is_refused(counting, observation, shape):
    path = Path(counting)
    old = 'return parts if agent.name == "agent 0" else agent.state.pos'
    path.write_text(path.read_text().replace(old, f"return {observation}"))
    wrong = rf"observation of agent 0 has shape {shape}, not \(2, 1 or more\)"
    with pytest.raises(ScenarioError, match=wrong):
        Vmas(counting, 2)


def test_row_layout(counting):
    env = Vmas(counting, 3, image_size=16)
    assert (env.n_agents, env.num_envs, env.image_size, env.discrete) == (2, 3, 16, False)
    assert env.obs_shapes == [(4,), (2,)]
    for row in run(env, draw_actions(env, 1)):
        assert {key: (tuple(v.shape), v.dtype) for key, v in row.items()} == {
            "agent0": ((3, 4), torch.float32),
            "agent1": ((3, 2), torch.float32),
            "image": ((3, 16, 16, 3), torch.uint8),
            "reward": ((3, 2), torch.float32),
            "is_first": ((3,), torch.bool),
            "is_last": ((3,), torch.bool),
            "is_terminal": ((3,), torch.bool),
        }


def test_dict_observations_follow_the_order_of_names(counting):
    env = Vmas(counting, 2)
    row = run(env, torch.full((2, 2, 2, 2), 0.5))[-1]
    agent = env.simulator.agents[0]
    assert torch.equal(row["agent0"][:, 0], torch.full((2,), 2.0))  # pos: x (the clock), then y
    assert torch.equal(row["agent0"][:, 1], agent.state.pos[:, 1])
    assert torch.equal(row["agent0"][:, 2:], agent.state.vel)


def test_episodes_of_copies_end_and_begin_on_their_own(counting):
    env = Vmas(counting, 3, time_limit=5, scenario_args={"shortest": 4})
    rows = run(env, draw_actions(env, 12))
    flags = {
        key: torch.stack([row[key] for row in rows]).int().tolist()
        for key in rows[0]
        if key.startswith("is_")
    }
    # Copy 0 is done after 4 steps, copy 1 after 5 as the limit strikes, copy 2 by the limit.
    first = [{0, 5, 10}, {0, 6, 12}, {0, 6, 12}]
    last = [{4, 9}, {5, 11}, {5, 11}]
    terminal = [{4, 9}, {5, 11}, set()]
    for key, expected in {"is_first": first, "is_last": last, "is_terminal": terminal}.items():
        assert [{t for t in range(13) if flags[key][t][b]} for b in range(3)] == expected
    paid = torch.stack([row["reward"][:, 1] for row in rows]) / 2
    assert paid[:, 0].tolist() == [0, 1, 2, 3, 4, 0, 1, 2, 3, 4, 0, 1, 2]
    assert paid[:, 2].tolist() == [0, 1, 2, 3, 4, 5, 0, 1, 2, 3, 4, 5, 0]
    clock = torch.stack([row["agent0"][:, 0] for row in rows])
    assert torch.equal(clock, paid)  # an is_last row shows the end, an is_first row the new start


def test_time_limit_is_not_terminal():
    env = Vmas("simple_spread", 2, time_limit=3)
    rows = run(env, draw_actions(env, 8))
    assert [bool(row["is_last"].all()) for row in rows] == [t % 4 == 3 for t in range(9)]
    assert [bool(row["is_first"].all()) for row in rows] == [t % 4 == 0 for t in range(9)]
    assert not any(row["is_terminal"].any() for row in rows)
    endless = Vmas("simple", 2, time_limit=None)
    assert not any(row["is_last"].any() for row in run(endless, draw_actions(endless, 120)))


def test_restarts_end_all_copies_together_after_lengths_that_vary():
    env = Vmas("simple_spread", 2, time_limit=20, restart_from=4)
    rows = run(env, draw_actions(env, 400))
    assert not any(row["is_terminal"].any() for row in rows)
    lasts = [t for t, row in enumerate(rows) if row["is_last"].any()]
    firsts = [t for t, row in enumerate(rows) if row["is_first"].any()]
    assert all(rows[t]["is_last"].all() for t in lasts)
    assert all(rows[t]["is_first"].all() for t in firsts)
    assert firsts[1:] == [t + 1 for t in lasts][: len(firsts) - 1]
    lengths = torch.tensor([last - first for first, last in zip(firsts, lasts, strict=False)])
    assert lengths.min() < 7 and lengths.max() > 15
    assert lengths.min() >= 4 and lengths.max() <= 20
    assert abs(lengths.float().mean() - 16 / torch.tensor(5.0).log()) < 2.5  # log-uniform


@pytest.mark.parametrize("copies", [3, 200])
def test_restarts_come_in_time_and_never_end_an_episode_that_is_only_beginning(counting, copies):
    """Copies end after 2, 3, ... steps of their own, so that with many some always begin."""
    env = Vmas(counting, copies, time_limit=9, scenario_args={"shortest": 2}, restart_from=2)
    rows = run(env, draw_actions(env, 200))
    together = [0]
    for t, (row, after) in enumerate(itertools.pairwise(rows)):
        assert not (row["is_first"] & row["is_last"]).any()
        assert torch.equal(row["is_last"], after["is_first"])
        if (row["is_last"] | row["is_first"]).all() and not row["is_first"].all():
            together.append(t)
    assert max(b - a for a, b in itertools.pairwise(together)) <= 10
    assert len(together) > 20
    assert any(row["is_last"].any() and not row["is_last"].all() for row in rows)
    ages = torch.zeros(copies)
    for row in rows:
        ages = torch.where(row["is_first"], 0, ages + 1)
        assert ages.max() <= 9


def test_ended_says_on_the_host_whether_a_row_is_the_last_of_any_copy(counting):
    env = Vmas(counting, 3, time_limit=7)
    env.reset()
    assert not env.ended
    seen = set()
    for action in draw_actions(env, 20):
        row = env.step(action)
        assert env.ended == row["is_last"].any()
        seen.add(env.ended)
    assert seen == {True, False}


def test_a_step_before_the_first_reset_is_a_reset():
    env, other = Vmas("simple", 2), Vmas("simple", 2)
    assert_equal([env.step(env.random_action())], [other.reset()])


@pytest.mark.parametrize("name", ["navigation", "road_traffic", "simple_spread"])
def test_info_is_what_the_scenario_gave(name):
    env, simulator = Vmas(name, 3, seed=4), make_env(name, 3)
    simulator.reset(seed=4)
    env.reset()
    action = env.random_action()
    assert env.info == {}
    env.step(action)
    *_, infos = simulator.step(plain_actions(simulator, action, discrete=False))
    numbers = [key for key, value in infos[0].items() if value.shape in ((3,), (3, 1))]
    assert list(env.info) == numbers and "pos" not in numbers  # which is two numbers a copy
    for key in numbers:
        given = torch.stack([info[key].reshape(3) for info in infos], -1).float()
        assert torch.equal(env.info[key], given)
    env.reset()
    assert env.info == {}


def test_info_of_some_agents(monkeypatch):
    env = Vmas("simple_spread", 2)
    told = [{}, {"a": torch.tensor([[1], [2]])}, {"b": {"c": torch.zeros(2)}}]
    told = dict(zip(env.simulator.agents, told, strict=True))
    monkeypatch.setattr(env.simulator.scenario, "info", told.get)
    env.reset()
    env.step(env.random_action())
    assert env.info.keys() == {"a"}
    assert env.info["a"].nan_to_num(-1).tolist() == [[-1, 1, -1], [-1, 2, -1]]


def test_info_of_repeated_actions_is_its_mean_until_the_end(counting):
    """What happens after an end is of no episode, and where one begins nothing was told yet."""
    path = Path(counting)
    told = "\n\n    def info(self, agent):\n        return {'step': self.steps}\n"
    path.write_text(path.read_text() + told)
    env = Vmas(counting, 3, action_repeat=3)  # whose copies end after 3, 4 and 5 steps
    env.reset()
    env.step(env.random_action())
    assert env.info["step"].tolist() == [[2, 2]] * 3
    env.step(env.random_action())
    assert env.info["step"].nan_to_num(-1).tolist() == [[-1, -1], [4, 4], [4.5, 4.5]]


def test_reset_in_the_middle_begins_everywhere(counting):
    env = Vmas(counting, 3, time_limit=5)
    run(env, draw_actions(env, 3))
    row = env.reset()
    assert row["is_first"].all() and not row["is_last"].any() and not row["reward"].any()
    assert [env.step(env.random_action())["is_last"].tolist() for _ in range(4)] == [
        [False, False, False],
        [False, False, False],
        [True, False, False],
        [False, True, False],
    ]


def forces(env: Vmas, action: Tensor) -> list[Tensor]:
    """Each agent's action in the simulator's units."""
    env.step(action)
    return [agent.action.u for agent in env.simulator.agents]


def test_actions_map_to_each_agents_range(counting):
    env = Vmas(counting, 2)
    env.reset()
    action = torch.tensor([[[-1.0, 0.5], [1.0, 0.0]], [[7.0, -9.0], [-0.2, 1.0]]])
    first, second = forces(env, action)
    assert torch.equal(first, torch.tensor([[-0.5, 0.25], [0.5, -0.5]]))
    assert torch.equal(second, torch.tensor([[1.5, 0.0], [-0.2 * 1.5, 1.5]]))


def test_communication_maps_to_zero_one_and_padding_is_ignored():
    env = Vmas("simple_speaker_listener", 2)
    assert (env.action_sizes, env.action_width) == ([5, 2], 5)
    env.reset()
    action = torch.tensor([0.0, 0.0, -1.0, 0.0, 2.0]).expand(2, 2, 5).clone()
    action[:, 1, 2:] = 100.0
    env.step(action)
    speaker, listener = env.simulator.agents
    assert torch.equal(speaker.action.c, torch.tensor([[0.0, 0.5, 1.0]]).expand(2, 3))
    assert listener.action.u.shape == (2, 2)


def test_discrete_actions_are_indices_and_padding_is_never_picked():
    env = Vmas("simple_speaker_listener", 2, discrete=True)
    assert (env.action_sizes, env.action_width) == ([27, 9], 27)
    env.reset()
    action = torch.zeros(2, 2, 27)
    action[:, 0, 5] = 1  # (9 motions) x (3 words): the second motion, the third word
    action[:, 1, 4] = 1
    action[:, 1, 9:] = 50
    simulator, seen = env.simulator, []
    step, simulator.step = simulator.step, lambda actions: seen.extend(actions) or step(actions)
    env.step(action)
    assert [given.tolist() for given in seen] == [[[5], [5]], [[4], [4]]]
    assert torch.equal(simulator.agents[0].action.c, torch.tensor([[0.0, 0.0, 1.0]] * 2))


def test_wrong_action_shape():
    env = Vmas("simple", 2)
    env.reset()
    with pytest.raises(ValueError, match=r"shape \(2, 2\), expected \(2, 1, 2\)"):
        env.step(torch.zeros(2, 2))


@pytest.mark.parametrize("name", ["simple_speaker_listener", "diff_drive"])
def test_random_actions(name):
    env = Vmas(name, 500)
    action = env.random_action()
    assert action.shape == (500, env.n_agents, env.action_width)
    for i, size in enumerate(env.action_sizes):
        assert -1 <= action[:, i, :size].min() < -0.95 < 0.95 < action[:, i, :size].max() <= 1
        assert not action[:, i, size:].any()
    env = Vmas(name, 2000, discrete=True)
    action = env.random_action()
    assert action.dtype == torch.float32
    assert torch.equal(action.sum(-1), torch.ones(2000, env.n_agents))
    for i, size in enumerate(env.action_sizes):
        frequency = action[:, i].mean(0)
        assert not frequency[size:].any()
        assert torch.allclose(frequency[:size], torch.tensor(1 / size), atol=0.03)
    assert not torch.equal(action, env.random_action())


@pytest.mark.parametrize(("name", "limit"), [("balance", 40), ("simple_spread", 8)])
def test_action_repeat_equals_brute_force(name, limit):
    settings = {"num_envs": 6, "seed": 3, "image_size": 16, "time_limit": limit}
    env, single = Vmas(name, action_repeat=3, **settings), Vmas(name, **settings)
    actions = draw_actions(env, limit)
    rows = run(env, actions)
    singles = run(single, actions.repeat_interleave(3, 0)[:limit])
    assert_repeats(rows, singles, repeat=3)


def test_action_repeat_with_ends_inside(counting):
    settings = {"num_envs": 6, "image_size": 16}
    env, single = Vmas(counting, action_repeat=4, **settings), Vmas(counting, **settings)
    actions = draw_actions(env, 6)
    rows = run(env, actions)
    assert_repeats(rows, run(single, actions.repeat_interleave(4, 0)), repeat=4)
    # Copies 0 and 1 end in the first repeat, 2 to 5 in the second, then 1 and 0 have begun.
    assert torch.stack([row["is_last"] for row in rows[:3]]).int().tolist() == [
        [0, 0, 0, 0, 0, 0],
        [1, 1, 0, 0, 0, 0],
        [0, 0, 1, 1, 1, 1],
    ]
    assert rows[1]["reward"][:, 1].tolist() == [12, 20, 20, 20, 20, 20]
    assert rows[2]["is_first"].tolist() == [True, True, False, False, False, False]
    assert not rows[2]["reward"][:2].any() and not rows[2]["agent0"][:2, 0].any()


def assert_repeats(rows: list[dict], singles: list[dict], repeat: int) -> None:
    """Each copy's first episode in `rows` is that of `singles`, `repeat` steps at a time."""
    for b in range(len(rows[0]["is_last"])):
        t = 0
        for row in rows[1:]:
            paid = torch.zeros_like(row["reward"][b])
            for _ in range(repeat):
                t += 1
                paid += singles[t]["reward"][b]
                if singles[t]["is_last"][b]:
                    break
            assert torch.equal(row["reward"][b], paid)
            for key in row.keys() - {"reward"}:
                assert torch.equal(row[key][b], singles[t][key][b]), f"{key} of copy {b} at {t}"
            if singles[t]["is_last"][b]:
                break
        else:
            pytest.fail(f"copy {b} never ended")


def test_images_show_the_rows_own_scenes(counting):
    env = Vmas(counting, 3, image_size=32)
    seen = [env.reset()["image"]]
    for action in draw_actions(env, 8):
        assert torch.equal(seen[-1], env.render())
        seen.append(env.step(action)["image"])
    assert len({image.numpy().tobytes() for image in seen}) > 4
    assert env.render(16).shape == (3, 16, 16, 3)
    assert env.render((16, 24), copies=2, follow=1, legible=True).shape == (2, 16, 24, 3)
    assert Vmas("simple", 2).render().shape == (2, 64, 64, 3)


def test_shades_are_in_the_rows_and_change_nothing_else():
    plain, shaded = (
        Vmas("simple_spread", 2, image_size=64, image_shades=shades) for shades in (False, True)
    )
    rows = plain.reset(), shaded.reset()
    assert not torch.equal(rows[0].pop("image"), rows[1]["image"])
    assert torch.equal(rows[1].pop("image"), shaded.render())
    torch.testing.assert_close(*rows, rtol=0, atol=0)


def global_state() -> list:
    """The states that everybody else draws from, users of plain VMAS included."""
    states = [torch.get_rng_state(), np.random.get_state(), random.getstate()]
    states += Environment.vmas_random_state
    return [state.tolist() if isinstance(state, Tensor) else repr(state) for state in states]


def test_random_states_are_separate():
    def make(index: int) -> Vmas:
        return Vmas(("navigation", "het_mass")[index], 3, seed=index, time_limit=3 - index)

    def play(env: Vmas) -> list[dict]:
        return [env.reset()] + [env.step(env.random_action()) for _ in range(10)]

    alone = [play(make(0)), play(make(1))]
    first, second = make(0), make(1)
    together = [[first.reset()], [second.reset()]]
    for t in range(10):
        together[0].append(first.step(first.random_action()))
        if t == 5:
            play(Vmas("simple", 2, seed=3))
        together[1].append(second.step(second.random_action()))
    assert_equal(together[0], alone[0])
    assert_equal(together[1], alone[1])
    assert not torch.equal(together[0][0]["agent0"], together[0][4]["agent0"])


def test_global_random_state_is_untouched(counting):
    before = global_state()
    env = Vmas("het_mass", 2, time_limit=2, image_size=16)
    run(env, draw_actions(env, 6))
    with pytest.raises(ScenarioError):
        Vmas("navigation", 2, scenario_args={"n_agents": "four"})
    env.set_random_state(env.random_state())
    assert global_state() == before


def test_seeds_differ_and_repeat():
    rows = [Vmas("simple", 2, seed=seed).reset() for seed in (0, 0, 1)]
    assert torch.equal(rows[0]["agent0"], rows[1]["agent0"])
    assert not torch.equal(rows[0]["agent0"], rows[2]["agent0"])
    stream = 2 * torch.rand(2, 1, 2, generator=torch.Generator().manual_seed(0)) - 1
    assert not torch.equal(Vmas("simple", 2, seed=0).random_action(), stream)


@pytest.mark.parametrize("discrete", [False, True])
@pytest.mark.parametrize("name", ["navigation", "het_mass", "balance"])
def test_random_state_is_saved_and_restored(name, discrete):
    env = Vmas(name, 3, seed=5, time_limit=4, discrete=discrete, restart_from=2)
    run(env, draw_actions(env, 6))
    file = io.BytesIO()
    torch.save(env.random_state(), file)
    actions = draw_actions(env, 10)
    rows = run(env, actions)
    file.seek(0)
    other = Vmas(name, 3, seed=6, time_limit=4, discrete=discrete, restart_from=2)
    other.set_random_state(torch.load(file, weights_only=True))
    assert torch.equal(draw_actions(other, 10), actions)
    assert_equal(run(other, actions), rows)


class Syncs(TorchDispatchMode):
    """Counts the operations whose result or shape the host has to wait for on a GPU."""

    def __init__(self):
        super().__init__()
        self.count = Counter()

    def __torch_dispatch__(self, operation, types, args=(), kwargs=None):
        name = operation.name()
        if name in ("aten::_local_scalar_dense", "aten::nonzero", "aten::_to_copy"):
            self.count[name] += 1
        return operation(*args, **(kwargs or {}))


@pytest.mark.parametrize(("name", "extra"), [("simple_spread", 0), ("balance", 1)])
def test_a_step_waits_for_the_device_only_to_find_early_ends(name, extra):
    env = Vmas(name, 3)
    env.reset()
    action = env.random_action()
    with Syncs() as inside:
        env.simulator.step([action[:, i] for i in range(env.n_agents)])
    with Syncs() as whole:
        env.step(action)
    added = whole.count - inside.count
    assert added["aten::nonzero"] == extra
    assert added["aten::_local_scalar_dense"] == added["aten::_to_copy"] == 0


def test_import_prints_nothing():
    done = subprocess.run(
        [sys.executable, "-c", "import envs.vmas"],
        capture_output=True,
        cwd=Path(__file__).parents[1],
    )
    assert (done.returncode, done.stdout, done.stderr) == (0, b"", b"")


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_random_states_are_separate_on_a_gpu():
    def play(*envs: Vmas) -> list[dict]:
        rows = [[env.step(env.random_action()) for env in envs] for _ in range(8)]
        return [row for row, *_ in rows]

    def make(seed: int) -> Vmas:
        return Vmas("navigation", 3, "cuda", seed=seed, time_limit=3)

    before = torch.cuda.get_rng_state()
    alone = play(make(1))
    assert_equal(play(make(1), make(2)), alone)
    env = make(3)
    env.set_random_state(make(1).random_state())
    assert_equal(play(env), alone)
    assert torch.equal(torch.cuda.get_rng_state(), before)
