import torch
from vmas import make_env

from benchmarks.reference import full_force

UP = torch.tensor([[0.0, 1.0]])


def test_full_force_is_what_a_lift_straight_up_comes_close_to():
    env = make_env("balance", 1, "cpu", n_agents=4, random_package_pos_on_line=False)
    env.reset(seed=0)
    package = env.scenario.package
    package.goal.set_pos(package.state.pos + 1.5 * UP, None)
    most = full_force(env, 100)
    below = package.state.pos.clone()
    for _ in range(100):
        env.step([UP for _ in env.agents])
    lifted = env.scenario.shaping_factor * (package.state.pos - below).norm(dim=-1)
    assert most * 0.98 < lifted <= most


def test_full_force_ends_at_the_goal_and_needs_a_package():
    env = make_env("reverse_transport", 8, "cpu")
    env.reset(seed=0)
    package = env.scenario.package
    package.goal.set_pos(package.state.pos + 0.05 * UP, None)
    assert torch.allclose(full_force(env, 1000), torch.tensor(5.0))
    assert full_force(make_env("navigation", 1, "cpu"), 100) is None
