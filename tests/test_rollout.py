"""Acting in a batch of environments and the tally of its episodes, against brute force."""

import pytest
import torch

from latents import LATENTS
from models import Dreamer
from rollout import Episodes, Player, Tally, play_episodes, summarise

LENGTHS = (3, 1, 5)  # steps of each copy's episodes


class Countdown:
    """Three copies of two agents whose episodes end after their own number of steps.

    The observation is the copy and the step; agent i is paid (i + 1) * (copy + 1) + step / 10. The
    step is told of the second agent alone, and of any only after the first reset.
    """

    num_envs, n_agents, action_width = 3, 2, 2

    def __init__(self, lengths=LENGTHS):
        self.lengths = torch.tensor(lengths)
        self.actions, self.drawn, self.resets = [], [], 0

    def rows(self, first):
        copy, step = torch.arange(3.0), self.steps.float()
        reward = (copy + 1).unsqueeze(-1) * torch.tensor([1.0, 2.0]) + step.unsqueeze(-1) / 10
        return {
            "agent0": torch.stack([copy, step, copy * step], -1),
            "agent1": torch.stack([step, copy], -1),
            "reward": reward * ~first.unsqueeze(-1),
            "is_first": first,
            "is_last": self.steps == self.lengths,
            "is_terminal": torch.zeros(3, dtype=torch.bool),
        }

    def reset(self):
        self.resets += 1
        self.steps = torch.zeros(3, dtype=torch.long)
        return self.rows(torch.ones(3, dtype=torch.bool))

    def step(self, action):
        self.actions.append(action)
        first = self.steps == self.lengths
        self.steps = torch.where(first, 0, self.steps + 1)
        return self.rows(first)

    @property
    def info(self):
        step = self.steps.float()
        return {"step": torch.stack([step * torch.nan, step], -1)} if self.actions else {}

    def random_action(self):
        self.drawn.append(2 * torch.rand(3, 2, 2) - 1)
        return self.drawn[-1]


@pytest.fixture
def dreamer(make_world, make_behavior):
    world = make_world()
    return Dreamer(world, make_behavior(world.feat), None, "mean", {})


def record(steps, **kwargs):
    """Rows of a countdown played with noise."""
    env = Countdown(**kwargs)
    rows = [env.reset()]
    rows += [env.step(env.random_action()) for _ in range(steps - 1)]
    return rows


def episodes(rows, copy):
    """Returns per agent and length of each whole episode of a copy, by a plain loop."""
    found, total, length = [], [0.0, 0.0], 0
    for row in rows:
        if row["is_first"][copy]:
            total, length = [0.0, 0.0], 0
        else:
            length += 1
        total = [a + b for a, b in zip(total, row["reward"][copy].tolist(), strict=True)]
        if row["is_last"][copy]:
            found.append((*total, length))
    return found


# ---- player --------------------------------------------------------------------------------------


@pytest.mark.parametrize("explore", [False, True])
def test_player_feeds_rows_and_actions_to_the_policy(dreamer, explore):
    """Rows carry the action that led to them, none on a first row, and the latents there."""
    env, plain = Countdown(), Countdown()
    torch.manual_seed(1)
    player = Player(env, dreamer, explore)
    played = [player.step() for _ in range(9)]
    torch.manual_seed(1)
    state, action = dreamer.world.rssm.initial(3), torch.zeros(3, 2, 2)
    for time, rows in enumerate(played):
        expected = plain.step(action) if time else plain.reset()
        led_here = torch.where(expected["is_first"][:, None, None], 0.0, action)
        action, state = dreamer.policy(expected, led_here, state, explore)
        expected |= {"action": led_here, **dreamer.world.rssm.pack(state)}
        assert rows.keys() == expected.keys()
        assert all(torch.equal(rows[key], expected[key]) for key in rows)
    assert len(env.actions) == 8
    firsts = torch.stack([rows["is_first"] for rows in played])
    led = torch.stack([rows["action"] for rows in played]).abs().sum((-2, -1))
    assert torch.equal(led == 0, firsts) and firsts.sum() > 3


def test_player_without_exploration_plays_modes(dreamer):
    env = Countdown()
    player = Player(env, dreamer, explore=False)
    for _ in range(4):
        rows = player.step()
        feat = dreamer.world.features(player.state)
        assert torch.equal(player.state[2], dreamer.world.decoder.standard(rows))
        assert torch.allclose(player.action, dreamer.behavior.actors(feat).mode)


def test_player_plays_random_actions_when_asked(dreamer):
    env = Countdown(lengths=(9, 9, 9))
    player = Player(env, dreamer, explore=True)
    rows = [player.step(random=True) for _ in range(4)]
    player.step()
    assert len(env.drawn) == 4
    for taken, drawn in zip(env.actions, env.drawn, strict=True):
        assert torch.equal(taken, drawn)
    for row, drawn in zip(rows[1:], env.drawn, strict=False):
        assert torch.equal(row["action"], drawn)
    player.step()
    assert not any(torch.equal(env.actions[-1], drawn) for drawn in env.drawn)


# ---- tally ---------------------------------------------------------------------------------------


def test_tally_against_a_plain_loop():
    rows, tally = record(23), Tally(3, 2, torch.device("cpu"))
    taken = []
    for time, row in enumerate(rows):
        tally.add(row)
        if time in (0, 4, 5, 22):  # episodes go on from one report to the next
            returns, lengths, _ = tally.take()
            assert returns.shape == (len(lengths), 2)
            taken += [(*r, n) for r, n in zip(returns.tolist(), lengths.tolist(), strict=True)]
    expected = [episode for copy in range(3) for episode in episodes(rows, copy)]
    assert len(expected) == 5 + 11 + 3
    for left, right in zip(sorted(taken), sorted(expected), strict=True):
        assert left == pytest.approx(right, rel=1e-5)


def test_tally_of_nothing_is_empty():
    tally = Tally(3, 2, torch.device("cpu"))
    returns, lengths, _ = tally.take()  # as when learning from recorded episodes alone
    assert returns.shape == (0, 2) and lengths.shape == (0,)
    tally.add(record(1)[0])
    for _ in range(2):
        returns, lengths, _ = tally.take()
        assert returns.shape == (0, 2) and lengths.shape == (0,)


def test_summary_is_the_mean_over_agents_and_names_them_where_they_differ():
    returns, lengths = torch.tensor([[1.0, 3.0], [2.0, 6.0]]), torch.tensor([10.0, 15.0])
    info = {"hits": torch.tensor([[1.0, torch.nan], [2.0, torch.nan]])}
    summary = summarise(Episodes(returns, lengths, info), "eval")
    assert summary == {
        "eval_return": 3.0,
        "eval_length": 12.5,
        "eval_return_agent0": 1.5,
        "eval_return_agent1": 4.5,
        "eval_info/hits": 1.5,
    }
    same = summarise(Episodes(torch.tensor([[2.0, 2.0]]), torch.tensor([7.0])), "train")
    assert same == {"train_return": 2.0, "train_length": 7.0}
    assert summarise(Episodes(torch.zeros(0, 2), torch.zeros(0)), "train") == {}


# ---- episodes ------------------------------------------------------------------------------------


@pytest.mark.parametrize("lengths", [LENGTHS, (4, 4, 4), (1, 9, 2)])
def test_play_episodes_counts_exactly_one_whole_episode_of_each_copy(dreamer, lengths):
    kept = []
    returns, steps, info = play_episodes(Countdown(lengths), dreamer, keep=kept.append)
    assert len(kept) == max(lengths) + 1 and steps.tolist() == list(lengths)
    for copy in range(3):
        first = episodes(kept, copy)[0]
        assert (*returns[copy].tolist(), steps[copy].item()) == pytest.approx(first, rel=1e-5)
    assert info["step"][:, 0].isnan().all()  # 1, 2, ..., of the second agent
    assert info["step"][:, 1].tolist() == [(length + 1) / 2 for length in lengths]
    assert set(kept[0]) >= {"agent0", "reward", "is_first", "action", *LATENTS}


def test_play_episodes_plays_modes_without_gradients(dreamer):
    plays = []
    for seed in (1, 2):
        torch.manual_seed(seed)
        dreamer.behavior.actors.max_std = 10.0 * seed
        rows = []
        returns = play_episodes(Countdown((1, 1, 1)), dreamer, keep=rows.append).returns
        assert not returns.requires_grad and not rows[-1]["action"].requires_grad
        state = dreamer.world.rssm.unpack(rows[0])
        feat = dreamer.world.features(state)
        plays.append((rows[1]["action"], dreamer.behavior.actors(feat).mode))
    for action, mode in plays:
        assert torch.allclose(action, mode, atol=1e-3)  # the memory was stored in half precision


def test_play_episodes_in_rounds_that_each_begin_with_a_reset(dreamer):
    env, kept = Countdown((3, 1, 5)), []
    returns, lengths, info = play_episodes(env, dreamer, 7, keep=kept.append)
    assert env.resets == 3 and len(kept) == 6  # of the first round
    assert lengths.tolist() == [3, 1, 5, 3, 1, 5, 3]
    assert torch.equal(returns[3:6], returns[:3]) and torch.equal(returns[6], returns[0])
    assert info["step"][:, 1].tolist() == [2, 1, 3, 2, 1, 3, 2]


def test_some_agents_play_at_random(dreamer):
    env, told = Countdown([4, 4, 4]), []
    policy = dreamer.policy

    def heard(rows, led_here, *rest, **options):
        told.append(led_here)
        return policy(rows, led_here, *rest, **options)

    dreamer.policy = heard
    returns = play_episodes(env, dreamer, at_random=[1]).returns
    expected = [[k * copy + t / 10 for t in range(1, 5) for k in (1, 2)] for copy in (1, 2, 3)]
    assert returns.flatten().tolist() == pytest.approx(
        [sum(paid[agent::2]) for paid in expected for agent in (0, 1)]
    )
    for played, drawn, heard_of in zip(env.actions, env.drawn, told[1:], strict=False):
        assert torch.equal(played[:, 1], drawn[:, 1])
        assert not (played[:, 0] == drawn[:, 0]).any()
        assert torch.equal(heard_of, played)
