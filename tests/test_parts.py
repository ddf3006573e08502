"""What an observation is joined from."""

from pathlib import Path

import pytest
import torch

from build import make_dreamer, make_env
from config import load_config
from envs.parts import Parts
from envs.vmas import Vmas

SETTINGS = Path(__file__).parents[1] / "configs.yaml"


def test_parts_of_parts_are_told_but_not_of_two_numbers():
    two, one, three = (torch.randn(4, width) for width in (2, 1, 3))
    with Parts() as parts:
        place = torch.cat([one, one], -1)
        thing = torch.concat((place, one), dim=1)
        seen = torch.cat(tensors=[two, thing, torch.hstack([three, thing])], dim=-1)
        plain = three + 1
    assert parts.widths(seen) == [2, 2, 1, 3, 2, 1]
    assert parts.widths(place) == [2]
    assert parts.widths(plain) == parts.widths(three) == [3]


@pytest.mark.parametrize(
    "change",
    [
        torch.clone,
        torch.nan_to_num,
        lambda seen: seen + 0.1 * torch.randn(4, 3),
        lambda seen: seen.clamp(-1, 1).float().reshape(4, -1),
    ],
)
def test_what_is_made_of_a_joined_tensor_has_its_parts(change):
    with Parts() as parts:
        seen = change(torch.cat([torch.randn(4, 2), torch.randn(4, 1)], -1))
    assert parts.widths(seen) == [2, 1]


@pytest.mark.parametrize("change", [lambda seen: seen[:, 1:], lambda seen: seen.repeat(1, 2)])
def test_what_has_another_width_is_one_part(change):
    with Parts() as parts:
        seen = change(torch.cat([torch.randn(4, 3), torch.randn(4, 1)], -1))
    assert parts.widths(seen) == [seen.shape[-1]]


def test_tensors_joined_along_another_axis_are_one_part():
    with Parts() as parts:
        seen = torch.cat([torch.randn(4, 3), torch.randn(4, 3)], 0)
    assert parts.widths(seen) == [3]


def test_parts_are_those_that_a_scenario_joins(counting):
    assert Vmas("dispersion", 2, scenario_args={"n_food": 2}).obs_parts == [[2, 2, 2, 1, 2, 1]] * 4
    assert Vmas("navigation", 2).obs_parts[0] == [2, 2, 2, 12]
    # A dict, flattened in the order of its names: pos (x, y), vel.
    assert Vmas(counting, 2).obs_parts == [[2, 2], [2]]


def test_a_flag_does_not_tear_the_pairs_after_it_apart():
    flags = "--configs debug --task vmas_dispersion --envs 2 --logdir none"
    config = load_config(flags.split(), SETTINGS)
    env = make_env(config, torch.device("cpu"), 2, 0)
    dreamer = make_dreamer(config, env)
    (mlp,) = dreamer.world.reward.view.mlps
    rows = env.reset()["agent0"]
    food = [row.squeeze(1) for row in mlp._pair(rows)[2:].split(1)]
    assert mlp.pairs == 2 + 2 * (len(food) // 2)
    for number, pair in enumerate(food):
        start = 4 + 3 * (number // 2)
        if number % 2:
            assert torch.equal(pair[0, :, 0], rows[:, start + 2]) and (pair[0, :, 1] == 0).all()
        else:
            assert torch.equal(pair[0], rows[:, start : start + 2])
