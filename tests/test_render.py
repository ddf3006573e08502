"""Drawing: shapes on pixels, cameras, what scenarios add, bad input, and VMAS's own frames."""

import colorsys
import math
import sys
import warnings

import numpy as np
import pytest
import torch
import vmas

from benchmarks.render import display, errors
from envs import extras, raster
from envs.raster import Camera, Shape
from envs.render import render

RED = (1.0, 0.0, 0.0)


def make(scenario="simple_spread", copies=3, **options):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        env = vmas.make_env(scenario, copies, "cpu", continuous_actions=True, seed=0, **options)
    for _ in range(3):
        env.step([env.get_random_action(agent) for agent in env.agents])
    return env


def canvas(*shapes, size=32, scale=1.0, pen=1.0):
    """Frames (B, size, size, 3) of shapes; with scale 1, the world's units are pixels."""
    copies = len(shapes[0].centre)
    frames = torch.full((copies, size, size, 3), 255, dtype=torch.uint8)
    middle = torch.full((copies,), size / 2)
    camera = Camera(size, size, torch.full((copies,), scale), middle, middle, scale, pen)
    raster.draw(frames, list(shapes), camera)
    return frames


def shape(kind, x, y, half, angle=0.0, **options):
    """A red shape in one copy."""
    angle = torch.tensor([[angle]])
    return Shape(kind, torch.tensor([[[x, y]]]), half, RED, torch.ones(1), angle, **options)


def ink(frames):
    """Pixels' worth of pure red in each frame (B,)."""
    return (255 - frames[..., 1].double()).sum((1, 2)) / 255


@pytest.mark.parametrize("radius", [0.2, 0.5, 0.6, 1.0, 5.0])
def test_a_disc_covers_its_area_wherever_it_is(radius):
    for x in (0.0, 0.3, 0.5):
        area = ink(canvas(shape("disc", x, -x / 3, (radius,) * 2)))
        assert area.item() == pytest.approx(
            math.pi * (radius * raster.ROUND) ** 2, rel=0.15
        )  # small ones are sampled


@pytest.mark.parametrize("half", [(6.0, 0.1), (6.0, 1.7), (0.2, 0.2)])
def test_a_box_covers_its_area_however_it_is_turned(half):
    for angle in (0.0, 0.4, math.pi / 2):
        area = ink(canvas(shape("box", 0.3, 0.1, half, angle)))
        assert area.item() == pytest.approx(4 * half[0] * half[1], rel=0.06, abs=0.03)


def test_a_polygon_covers_its_area_in_either_sense():
    corners = torch.tensor([[[-5.0, -4.0], [5.0, -4.0], [0.0, 6.0]]])
    for data in (corners, corners.flip(1)):
        area = ink(canvas(shape("polygon", 0.2, 0.4, (5.0, 5.0), data=data)))
        assert area.item() == pytest.approx(50, rel=0.05)


def test_motion_below_a_pixel_shows():
    frames = torch.cat([canvas(shape("disc", x, 0.0, (3.0, 3.0))) for x in (0.0, 0.1, 0.2)])
    dark = 255 - frames[..., 1].double()
    middle = (dark.sum(1) * torch.arange(32)).sum(1) / dark.sum((1, 2))
    torch.testing.assert_close(middle.diff(), torch.full((2,), 0.1).double(), atol=0.02, rtol=0)


def test_later_shapes_cover_earlier_ones_and_alpha_mixes():
    under = shape("box", 0.0, 0.0, (4.0, 4.0))
    over = shape("disc", 0.0, 0.0, (2.0, 2.0))
    over.color, over.alpha = (0.0, 0.0, 1.0), torch.tensor([0.5])
    assert canvas(under, over)[0, 16, 16].tolist() == [128, 0, 128]
    assert canvas(over, under)[0, 16, 16].tolist() == [255, 0, 0]


def test_a_rim_is_darker_half_inside_and_half_outside():
    frames = canvas(shape("box", 0.0, 0.0, (8.0, 8.0), rim=2.0))
    row = frames[0, 16, 6:10]  # background, rim outside, rim inside, body
    assert row[:, 0].tolist() == [255, 191, 191, 255]
    assert row[:, 1].tolist() == [255, 128, 0, 0]


def test_the_parts_of_a_bundle_look_like_as_many_shapes():
    spots = torch.tensor([[[-8.0, 0.0], [0.3, 5.0], [9.0, -3.0]]])
    turns = torch.tensor([[0.0, 0.7, 1.5]])
    for rim in (None, 1.0):
        bundle = Shape("box", spots, (3.0, 1.0), RED, torch.ones(1), turns, rim=rim)
        parts = [
            Shape("box", spots[:, [i]], (3.0, 1.0), RED, torch.ones(1), turns[:, [i]], rim=rim)
            for i in range(3)
        ]
        assert (canvas(bundle).int() - canvas(*parts).int()).abs().max() <= 1


def test_a_grid_has_its_lines_where_they_belong():
    frames = canvas(Shape("grid", torch.zeros(1, 1, 2), (8.0, 8.0), RED, torch.ones(1), stroke=1.0))
    dark = (255 - frames[0, 4, :, 1].int()).nonzero().flatten().tolist()
    assert dark == [0, 7, 8, 15, 16, 23, 24, 31]


@pytest.mark.parametrize("scenario", ["simple_spread", "navigation", "football"])
def test_windows_chunks_and_copies_do_not_matter(scenario, monkeypatch):
    env = make(scenario)
    frames = render(env)
    assert frames.shape == (3, 64, 64, 3) and frames.dtype == torch.uint8
    assert torch.equal(render(env, copies=2), frames[:2])
    monkeypatch.setattr(raster, "_can_ask", lambda tensor: False)  # as on a GPU
    assert torch.equal(render(env), frames)
    monkeypatch.setattr(raster, "CPU_PIXELS", 64)
    monkeypatch.setattr(raster, "FEWEST", 1)
    assert torch.equal(render(env), frames)


def test_the_camera_follows_and_zooms_out():
    env = make(copies=1)
    for i, agent in enumerate(env.agents):
        agent.set_pos(torch.tensor([[30.0 * i, 0.0]]), None)
        agent.color = RED if i == 2 else (0.0, 0.0, 1.0)
    middle = render(env, 65, follow=2)[0, 32, 32]
    assert middle[0] > middle[2] and middle[1] == middle[2]
    assert (render(env, 128)[0, 63:65] < 255).any(0)[-8:].any()  # the furthest is still in view


def test_a_wide_picture_shows_more_and_stretches_nothing():
    env = make(copies=1)
    square, wide = render(env, 64), render(env, (64, 128))
    assert torch.equal(square, wide[:, :, 32:96])


def test_entities_without_a_finite_position_are_left_out():
    env = make()
    hidden = make()
    hidden.world.landmarks[0]._render = torch.tensor([False, True, True])
    env.world.landmarks[0].state.pos[0] = math.nan
    assert torch.equal(render(env), render(hidden))
    env.agents[0].state.pos[:] = math.inf
    assert (render(env) < 255).any() and (render(env, follow=0) < 255).any()


def test_colours_can_differ_between_copies():
    env = make(copies=2)
    env.world.landmarks[0].color = torch.tensor([[1.0, 0.0, 0.0], [0.0, 0.0, 1.0]])
    env.world.landmarks[0].set_pos(torch.tensor([[1.0, 1.0]]), None)
    env.agents[0].color = torch.tensor([0.0, 1.0, 0.0])
    env.agents[0].set_pos(torch.tensor([[-1.0, 1.0]]), None)
    frames = render(env, 144, copies=2)  # 50 pixels a unit
    assert frames[:, 22, 122].tolist() == [[255, 0, 0], [0, 0, 255]]
    assert (frames[:, 22, 22, 1] > frames[:, 22, 22, 0]).all()


def test_a_legible_picture_tells_agents_apart_and_marks_goals():
    env = make(copies=1)
    for i, agent in enumerate(env.agents):
        agent.set_pos(torch.tensor([[i - 1.0, 0.9]]), None)
    env.world.landmarks[0].set_pos(torch.tensor([[0.0, -0.5]]), None)
    plain, clear = render(env, 288)[0], render(env, 288, legible=True)[0]  # 100 pixels a unit
    agents = [(54, 44), (54, 144), (54, 244)]
    assert len({tuple(plain[at].tolist()) for at in agents}) == 1
    assert len({tuple(clear[at].tolist()) for at in agents}) == 3
    halo = (194, 144 + 7)
    assert plain[halo].tolist() == [255] * 3 and clear[halo].max() < 255


def test_shades_tell_agents_and_round_landmarks_apart():
    env = make(copies=1)
    for row, entities in ((0.9, env.agents), (-0.9, env.world.landmarks)):
        for i, entity in enumerate(entities):
            entity.set_pos(torch.tensor([[i - 1.0, row]]), None)
    plain, shaded = render(env, 288)[0], render(env, 288, shades=True)[0]  # 100 pixels a unit
    for row in (54, 234):
        assert len({tuple(plain[row, col].tolist()) for col in (44, 144, 244)}) == 1
        assert len({tuple(shaded[row, col].tolist()) for col in (44, 144, 244)}) == 3
    assert torch.equal((plain < 255).any(-1), (shaded < 255).any(-1))  # the same shapes


def test_shades_of_grey_landmarks_are_no_shades_of_agents():
    """As in simple_tag, whose obstacles are black and whose predators are red."""
    env = make("simple_tag", copies=1)
    shown = [*env.agents, *env.world.landmarks]
    for i, entity in enumerate(shown):
        entity.set_pos(torch.tensor([[0.4 * i - 1.0, 0.0]]), None)
    size = 288
    shaded = render(env, size, shades=True)[0].float() / 255
    columns = [round(size / 2 + entity.state.pos[0, 0].item() * 100) for entity in shown]
    hues = [colorsys.rgb_to_hls(*shaded[size // 2, col].tolist())[0] for col in columns]
    for mark in hues[len(env.agents) :]:
        assert all(abs((mark - hue + 0.5) % 1 - 0.5) > 0.1 for hue in hues[: len(env.agents)])


@pytest.mark.parametrize("scenario", ["wheel", "balance", "transport"])
def test_shades_leave_lone_colours_and_walls_alone(scenario):
    env = make(scenario)
    for i, agent in enumerate(env.agents):
        agent.color = (0.1 * i, 0.5, 0.5)
    for other in env.world.landmarks:
        other.color = (0.3, 0.3, 0.3) if not hasattr(other.shape, "radius") else other.color
    assert torch.equal(render(env), render(env, shades=True))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"size": 0}, "size must be"),
        ({"size": (64, -1)}, "size must be"),
        ({"size": (64,)}, "size must be"),
        ({"size": 64.0}, "size must be"),
        ({"copies": 0}, "copies must be an int from 1 to 3"),
        ({"copies": 4}, "copies must be an int from 1 to 3"),
        ({"follow": 3}, "follow must be None or an agent from 0 to 2, got 3"),
        ({"follow": -1}, "follow must be"),
    ],
)
def test_bad_arguments_are_named(options, message):
    with pytest.raises(ValueError, match=message):
        render(make(), **options)


def test_bad_simulators_are_named():
    with pytest.raises(ValueError, match="vmas Environment, got str"):
        render("simple_spread")
    env = make()
    env.scenario.viewer_zoom = 0
    with pytest.raises(ValueError, match="viewer_zoom must be positive"):
        render(env)


def test_a_scenario_adds_shapes_without_opengl():
    before = sys.modules.get("vmas.simulator.rendering")
    env = make("football", enable_shooting=True)
    red, green, blue = render(env, (64, 96))[0, 32, 24].tolist()
    assert green > 150 > red == blue  # the pitch
    assert sys.modules.get("vmas.simulator.rendering") is before


def test_a_function_plot_has_the_colours_of_its_values():
    env = make("sampling", copies=2)
    shapes = extras.extras(env.scenario, 2, env.device)
    image = next(s for s in shapes if s.kind == "plot").data  # (B, 4, cells, cells)
    peak = image[:, 0].flatten(1).argmax(1)  # the brightest colour of viridis is the reddest
    rows, cols = peak // extras.PLOT_CELLS, peak % extras.PLOT_CELLS
    spots = (torch.stack([cols, rows], -1) + 0.5) / extras.PLOT_CELLS * 2 - 1
    for copy, spot in enumerate(spots):
        values = env.scenario.sample_single_env(torch.stack([spot, -spot]), copy)
        assert values[0] > values[1]
    assert np.allclose(extras._viridis(np.array([0.0, 1.0]), None, 0.5)[0, [0, 3]], [68 / 255, 0.5])


def test_copies_may_add_different_shapes(monkeypatch):
    env = make(copies=3)

    def added(env_index):
        from vmas.simulator import rendering

        spot = rendering.make_circle(0.1)
        spot.add_attr(rendering.Transform(translation=(1.2, 1.2)))
        spot.set_color(1.0, 0.0, 0.0)
        block = rendering.make_polygon([(-1.3, 1.1), (-1.3, 1.3), (-1.1, 1.3), (-1.1, 1.1)])
        block.set_color(0.0, 1.0, 0.0, 1.0)
        group = rendering.Compound([rendering.make_ellipse(0.1, 0.2)])
        group.add_attr(rendering.Transform(translation=(1.2, -1.2)))
        return [[spot, block], [block], [rendering.TextLine("no"), spot, group]][env_index]

    type(env.scenario).extra_render, kept = (
        (lambda self, env_index=0: added(env_index)),
        (type(env.scenario).extra_render),
    )
    try:
        frames = render(env, 144)  # 50 pixels a unit
    finally:
        type(env.scenario).extra_render = kept
    assert (frames[:, 12, 132, 1] < 128).tolist() == [True, False, True]
    assert (frames[:, 12, 12, 0] < 128).tolist() == [True, True, False]
    assert (frames[:, 132, 132, 0] < 128).tolist() == [False, False, True]


def test_what_cannot_be_drawn_is_said():
    with extras._stand_in():
        from vmas.simulator import rendering

        with pytest.warns(UserWarning, match="without OpenGL, Image of .* is not drawn"):
            geometry = rendering.Image(None, x=0, y=0, scale=1)
    assert not list(extras._flat([geometry]))


def regress(frames, spots, train):
    """Median distance between held-out positions and those read off linearly, in pixels."""
    pixels = frames.flatten(1).float() / 255
    spots = spots * 64 / (2 * 1.44)
    mean, centre = pixels[:train].mean(0), spots[:train].mean(0)
    seen = pixels[:train] - mean
    gram = seen @ seen.T
    gram.diagonal().add_(0.3)
    weights = seen.T @ torch.linalg.solve(gram, spots[:train] - centre)
    found = (pixels[train:] - mean) @ weights + centre
    return (found - spots[train:]).norm(dim=-1).median().item()


def test_positions_can_be_read_off_linearly():
    """One agent's, the rest being still; and, all moving, the mean of agents that look alike."""
    env = vmas.make_env("simple_spread", 1900, "cpu", seed=0)
    frames = render(env)
    team = torch.stack([agent.state.pos for agent in env.agents], 1).mean(1)
    assert regress(frames[..., 2].float() - frames[..., 0], team, 1500) < 1 / 3
    for entity in env.world.entities:
        if entity is not env.agents[0]:
            entity.set_pos(entity.state.pos[:1].repeat(1900, 1), None)
    assert regress(render(env), env.agents[0].state.pos, 1500) < 1 / 3


@pytest.mark.parametrize(
    "scenario", ["simple_spread", "navigation", "passage", "football", "wheel"]
)
def test_frames_are_those_of_vmas(scenario, opengl):
    for frame, block in errors(scenario, states=2):
        assert frame <= 2 and block <= 40


@pytest.fixture(scope="module")
def opengl():
    """A display with OpenGL, or a skip that says why there is none."""
    shown = display()
    try:
        shown.__enter__()
    except OSError as error:
        pytest.skip(f"VMAS's own frames cannot be had: {error}")
    yield
    shown.__exit__(None, None, None)
