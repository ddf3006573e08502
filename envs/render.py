"""VMAS scenes to images: every copy in one call, in plain torch, with no OpenGL and no display.

`render` lists what a scene shows (this file and `extras.py`) and has it drawn (`raster.py`).

What VMAS draws and this does not:
- text: what agents say, agents' numbers in football, titles in road_traffic (`TextLine`);
- `plot_position_function`, an argument of `Environment.render` that has no counterpart here;
- from a scenario's `extra_render`: `Image`, `Point`, stippled lines, and whatever calls OpenGL
  itself; polygons that are not convex come out as others, circles scaled unevenly as circles;
- sensors other than `Lidar`.

Where a scenario plots a function (sampling), it is evaluated on 64 x 64 points, and the colours are
always those of viridis. `extra_render` handles one copy at a time, in Python: scenarios that
override it draw slower, and on a GPU they wait for the device; nothing else here does.
"""

from __future__ import annotations

import colorsys
import math
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from envs.extras import extras
from envs.raster import Camera, Shape, draw

WHITE = 255
LEGIBLE_PEN = 0.6  # strokes of large pictures are at least so many pixels wide per pixel of VMAS's
GRAY = (0.25, 0.25, 0.25)
BLACK = (0.15, 0.15, 0.15)
TINTS = (0.0, 2 / 3, 1 / 3)  # hues for greys that are to be told apart: red, blue, green


def render(
    simulator: Any,
    size: int | tuple[int, int] = 64,
    copies: int | None = None,
    follow: int | None = None,
    shades: bool = False,
    legible: bool = False,
) -> Tensor:
    """Draw the current state of a `vmas.Environment`.

    The camera is that of `Environment.render`: it zooms out to fit all agents, or stays on the
    agent whose index is `follow`. Where the picture's aspect is not the viewer's, the view is
    widened, never cropped or stretched. `copies` draws only the first so many. `shades` tells
    agents, and round landmarks, of one colour apart, which look alike in VMAS. `legible` is for
    people: opaque agents in such shades, thicker strokes, lidar faint and beneath, halos around
    goals.
    An entity whose position is not finite is left out.

    Returns uint8 (B, h, w, 3) on the simulator's device. Raises ValueError on a bad argument.
    """
    height, width, copies = _check(simulator, size, copies, follow)
    frames = torch.full(
        (copies, height, width, 3), WHITE, dtype=torch.uint8, device=simulator.device
    )
    with torch.no_grad():
        camera = _camera(simulator, height, width, copies, follow)
        shapes = _scene(simulator, copies, shades, legible)
        if legible:
            camera.pen = max(camera.pen, LEGIBLE_PEN)
        draw(frames, shapes, camera)
    return frames


def _check(simulator: Any, size: Any, copies: Any, follow: Any) -> tuple[int, int, int]:
    """Height, width and number of copies, or a ValueError."""
    if not (hasattr(simulator, "scenario") and hasattr(simulator, "world")):
        raise ValueError(f"simulator must be a vmas Environment, got {type(simulator).__name__}")
    sides = size if isinstance(size, (tuple, list)) else (size, size)
    if len(sides) != 2 or not all(_is_int(side) and side > 0 for side in sides):
        raise ValueError(f"size must be a positive int or (height, width) of them, got {size!r}")
    total, agents = simulator.num_envs, simulator.n_agents
    copies = total if copies is None else copies
    if not (_is_int(copies) and 1 <= copies <= total):
        raise ValueError(f"copies must be an int from 1 to {total}, got {copies!r}")
    if follow is not None and not (_is_int(follow) and 0 <= follow < agents):
        raise ValueError(f"follow must be None or an agent from 0 to {agents - 1}, got {follow!r}")
    if simulator.scenario.viewer_zoom <= 0:
        raise ValueError(f"viewer_zoom must be positive, got {simulator.scenario.viewer_zoom}")
    return sides[0], sides[1], copies


def _is_int(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _camera(sim: Any, height: int, width: int, copies: int, follow: int | None) -> Camera:
    """The view of `Environment.render`, widened where the picture's aspect is another."""
    scenario, agents = sim.scenario, sim.world.agents
    view_w, view_h = scenario.viewer_size
    zoom, aspect = float(scenario.viewer_zoom), view_w / view_h
    half_w, half_h = zoom * max(1.0, aspect), zoom * max(1.0, 1.0 / aspect)
    spots = torch.stack([a.state.pos[:copies] for a in agents], 1).float()  # (B, N, 2)
    x, y = spots.nan_to_num_(0.0, 0.0, 0.0).unbind(-1)  # (B, N)
    largest = min(width / (2 * half_w), height / (2 * half_h))
    if follow is None:
        middle_x, middle_y = (float(value) for value in scenario.render_origin)
        margin = 2 * max(a.shape.circumscribed_radius() for a in agents)
        out_x = ((x - middle_x).abs().amax(1) + margin) / half_w
        out_y = ((y - middle_y).abs().amax(1) + margin) / half_h
        scale = largest / torch.maximum(out_x, out_y).clamp_(min=zoom)
        largest /= zoom
    else:
        index = agents.index(sim.agents[follow])  # scripted agents have no number
        middle_x, middle_y = x[:, index], y[:, index]
        scale = torch.full_like(middle_x, largest)
    left, top = width / 2 - middle_x * scale, height / 2 + middle_y * scale
    return Camera(height, width, scale, left, top, largest, min(width / view_w, height / view_h))


def _scene(sim: Any, copies: int, shades: bool, legible: bool) -> list[Shape]:
    """What is drawn, from back to front."""
    shapes = _boundary(sim, copies)
    if sim.scenario.plot_grid:
        corner = torch.full((copies, 1, 2), -25.0, device=sim.device)
        half = (float(sim.scenario.grid_spacing),) * 2
        alpha = torch.full((copies,), 0.3, device=sim.device)
        shapes.append(Shape("grid", corner, half, BLACK, alpha, stroke=1.0))
    shapes += extras(sim.scenario, copies, sim.device)
    shapes += _entities(sim, copies, shades, legible)
    # OpenGL keeps the width of the last line, and so VMAS's outlines have it, across frames too
    pen = next((s.stroke for s in reversed(shapes) if s.stroke is not None), 2.0)
    for shape in shapes:
        pen = shape.stroke if shape.stroke is not None else pen
        if shape.stroke is None and shape.rim is None:
            shape.rim = pen
    return shapes


def _boundary(sim: Any, copies: int) -> list[Shape]:
    """The edges of a bounded world."""
    x, y = sim.world.x_semidim, sim.world.y_semidim
    if not sim.scenario.visualize_semidims or (x is None and y is None):
        return []
    far = 100.0  # stands for no bound
    sides = []
    if y is not None:
        sides += [((0.0, s * y), (far if x is None else x, 0.0), 0.0) for s in (1, -1)]
    if x is not None:
        sides += [((s * x, 0.0), (far if y is None else y, 0.0), math.pi / 2) for s in (1, -1)]
    shapes = []
    for (mid_x, mid_y), half, angle in sides:
        centre = torch.zeros(copies, 1, 2, device=sim.device)
        centre[..., 0] += float(mid_x)
        centre[..., 1] += float(mid_y)
        turn = torch.full((copies, 1), angle, device=sim.device)
        shapes.append(Shape("box", centre, half, GRAY, torch.ones_like(turn[:, 0]), turn, 1.0))
    return shapes


def _entities(sim: Any, copies: int, shades: bool, legible: bool) -> list[Shape]:
    """Landmarks and agents, each agent followed by its lidar's rays and its action's arrow."""
    entities = sim.world.entities
    spots = torch.stack([e.state.pos[:copies] for e in entities], 1).float()  # (B, E, 2)
    seen = torch.stack([e.is_rendering[:copies] for e in entities], 1).to(spots.device)
    seen = seen & spots.isfinite().all(-1)
    spots = spots.nan_to_num(0.0, 0.0, 0.0)
    turns = torch.stack([e.state.rot[:copies, 0] for e in entities], 1).float()  # (B, E)
    turns = turns.nan_to_num(0.0, 0.0, 0.0)
    agents = [entity for entity in entities if _is_agent(entity)]
    marks = [entity for entity in entities if _is_round(entity) and not _is_agent(entity)]
    told = _shades(agents) if shades or legible else {}
    if shades:
        told |= _shades(marks, taken=[_hue(agent.color)[0] for agent in agents if _told(agent)])
    under, shapes = [], []
    for i, entity in enumerate(entities):
        spot, turn, shown = spots[:, i : i + 1], turns[:, i : i + 1], seen[:, i].float()
        color, alpha = _color(entity, copies, spot.device)
        color = told.get(entity.name, color)
        if legible and _is_agent(entity):
            alpha = 1.0
        shapes.append(_body(entity.shape, spot, turn, color, shown * alpha))
        if legible and _is_goal(entity):
            under += _halo(shapes[-1], 0.03 * float(sim.scenario.viewer_zoom))
        for sensor in getattr(entity, "sensors", None) or []:
            rays = _rays(sensor, spot, turn, shown)
            if legible:  # they would hide the agent
                under += [replace(ray, alpha=ray.alpha * 0.4) for ray in rays]
            else:
                shapes += rays
        force = entity.state.force if getattr(entity, "_render_action", False) else None
        if force is not None:
            tip = force[:copies, None].float() * (10 * entity.shape.circumscribed_radius())
            shapes.append(_arrow(spot, tip.nan_to_num(0.0, 0.0, 0.0), color, shown))
    return under + shapes


def _color(entity: Any, copies: int, device: torch.device) -> tuple[Any, Any]:
    """An entity's colour, three floats or (B, 3), and alpha, a float or (B,)."""
    color, alpha = entity.color, getattr(entity, "_alpha", 1.0)
    if isinstance(color, Tensor):
        color = color.to(device).float().clamp(0, 1)
        color = color[:copies] if color.dim() > 1 else color.expand(copies, -1)
        return color[:, :3], color[:, 3] if color.shape[1] == 4 else alpha
    color = tuple(min(max(float(value), 0.0), 1.0) for value in color)
    return color[:3], color[3] if len(color) == 4 else alpha


def _body(body: Any, spot: Tensor, turn: Tensor, color: Any, alpha: Any) -> Shape:
    """The shape of an entity: sphere, box or line."""
    reach = body.circumscribed_radius()
    if hasattr(body, "radius"):
        return Shape("disc", spot, (body.radius,) * 2, color, alpha, reach=reach)
    if type(body).__name__ == "Line":
        half = (body.length / 2, 0.0)
        return Shape("box", spot, half, color, alpha, turn, stroke=body.width, reach=reach)
    return Shape("box", spot, (body.length / 2, body.width / 2), color, alpha, turn, reach=reach)


def _rays(sensor: Any, spot: Tensor, turn: Tensor, shown: Tensor) -> list[Shape]:
    """A lidar's rays, and the dots where they end."""
    lengths = getattr(sensor, "_last_measurement", None)
    if lengths is None or not sensor._render:
        return []
    lengths = lengths[: len(spot)].float().nan_to_num(0.0, 0.0, 0.0)  # (B, R)
    angles = sensor._angles[: len(spot)] + turn
    ends = torch.stack([angles.cos(), angles.sin()], -1) * lengths[..., None]
    half = torch.stack([lengths / 2, torch.zeros_like(lengths)], -1)
    alpha, reach = shown * sensor.alpha, float(sensor._max_range)
    ray = Shape("box", spot + ends / 2, half, (0.0, 0.0, 0.0), alpha, angles, stroke=1.0)
    dots = Shape("disc", spot + ends, (0.01, 0.01), sensor.render_color, alpha, reach=0.01)
    return [replace(ray, reach=reach / 2, span=reach), replace(dots, span=reach)]


def _arrow(spot: Tensor, tip: Tensor, color: Any, shown: Tensor) -> Shape:
    """The line by which VMAS shows an agent's force."""
    length = tip.norm(dim=-1)
    half = torch.stack([length / 2, torch.zeros_like(length)], -1)
    angle = torch.atan2(tip[..., 1], tip[..., 0])
    return Shape("box", spot + tip / 2, half, color, shown, angle, stroke=2.0)


def _shades(entities: list[Any], taken: Sequence[float] = ()) -> dict[str, tuple[float, ...]]:
    """Colours by which entities of one colour are told apart: darker to lighter, hue turned.

    Greys differ by more than their lightness: they are tinted by a hue far from those `taken`.
    """
    alike: dict[tuple[float, ...], list[str]] = {}
    for entity in entities:
        if _told(entity):
            alike.setdefault(tuple(entity.color), []).append(entity.name)
    shades = {}
    for color, names in alike.items():
        hue, saturation = _hue(color)
        if not saturation:
            hue = next((tint for tint in TINTS if _far(tint, taken)), TINTS[0])
        for i, name in enumerate(names if len(names) > 1 else []):
            turn = i / (len(names) - 1) - 0.5
            tint, lightness = (hue - 0.18 * turn) % 1, 0.5 + 0.36 * turn
            shades[name] = colorsys.hls_to_rgb(tint, lightness, max(saturation, 0.5))
    return shades


def _told(entity: Any) -> bool:
    """Whether it has a colour that all copies share."""
    return not isinstance(entity.color, Tensor)


def _hue(color: Sequence[float]) -> tuple[float, float]:
    """Hue and saturation, each from 0 to 1."""
    hue, _, saturation = colorsys.rgb_to_hls(*color[:3])
    return hue, saturation


def _far(hue: float, others: Sequence[float]) -> bool:
    """Whether it is a quarter of the circle, or more, from all others."""
    return all(abs((hue - other + 0.5) % 1 - 0.5) >= 0.25 for other in others)


def _is_agent(entity: Any) -> bool:
    return hasattr(entity, "sensors")


def _is_goal(entity: Any) -> bool:
    """Whether this is a round mark on the ground, the look of a goal in VMAS."""
    fixed = not (entity.collide or entity.movable or _is_agent(entity))
    return fixed and _is_round(entity)


def _is_round(entity: Any) -> bool:
    return hasattr(entity.shape, "radius")


def _halo(goal: Shape, gap: float) -> list[Shape]:
    """A pale disc with an edge, under a goal."""
    wide = (goal.half[0] + gap,) * 2
    reach = goal.reach + gap
    pale = replace(goal, half=wide, alpha=0.25 * goal.alpha, rim=0.0, reach=reach)
    return [pale, replace(pale, kind="ring", alpha=goal.alpha, stroke=1.5)]
