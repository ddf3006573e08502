"""VMAS scenes to images: every copy in one call, in plain torch, with no OpenGL and no display.

A scene is a list of shapes from back to front, each of which exists in every copy. A shape is
blended into a window of pixels just large enough for it; the share of a pixel that it covers comes
from its signed distance, so that motion below a pixel shows.

What VMAS draws and this does not:
- text: what agents say, agents' numbers in football, titles in road_traffic (a `TextLine`);
- `plot_position_function`, an argument of `Environment.render` that has no counterpart here;
- `Image`, and subclasses of `Geom` that call OpenGL themselves, from a scenario's `extra_render`;
- filled polygons that are not convex: they come out as something else;
- stipple of lines (`LineStyle`).

A scenario's function plot (sampling) is evaluated on `PLOT_CELLS` x `PLOT_CELLS` points, and always
in the colours of viridis. `extra_render` is Python that handles one copy at a time: scenarios that
override it draw slower, and on a GPU each call waits for the device; nothing else here does.
"""

from __future__ import annotations

import colorsys
import contextlib
import math
import sys
import types
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

CPU_PIXELS = 2**18  # drawn at once: on a CPU the working set stays near its cache
GPU_PIXELS = 2**25
CIRCLE_SIDES = 30  # VMAS's circles are polygons
ROUND = math.sqrt(CIRCLE_SIDES / (2 * math.pi) * math.sin(2 * math.pi / CIRCLE_SIDES))  # equal area
PLOT_CELLS = 64
WHITE = 255
GRAY = (0.25, 0.25, 0.25)
BLACK = (0.15, 0.15, 0.15)
VIRIDIS = "440154 482878 3e4989 31688e 26828e 1f9e89 35b779 6ece58 b5de2b fde725"


@dataclass
class Camera:
    """Maps the world to pixels: column = x * scale + left, row = top - y * scale, per copy."""

    height: int
    width: int
    scale: Tensor  # (B,) pixels per unit of the world
    left: Tensor  # (B,)
    top: Tensor  # (B,)
    largest: float  # bound on `scale`, known without asking the device
    pen: float  # pixels of this picture per pixel of VMAS's viewer, in which strokes are measured


@dataclass
class Shape:
    """R parts of one colour in each of B copies; lengths in the world's units unless noted."""

    kind: str  # "disc", "ring", "box", "polygon", "grid" or "plot"
    centre: Tensor  # (B, R, 2)
    half: Any = (0.0, 0.0)  # half extents along the part's axes: two floats or (B, R, 2)
    color: Any = BLACK  # three floats from 0 to 1, or (B, 3)
    alpha: Any = 1.0  # float or (B,)
    angle: Tensor | None = None  # (B, R) radians
    stroke: float | None = None  # width of a line, in pixels of the viewer
    rim: float | None = None  # width of the darker outline, in pixels of the viewer
    reach: float = math.inf  # bound on the half extent of all parts together
    data: Tensor | None = None  # "polygon": corners (B, V, 2); "plot": RGBA (B, 4, cells, cells)

    def rows(self, part: slice) -> Shape:
        """The same shape in some of the copies."""
        cut = {k: v[part] for k, v in vars(self).items() if isinstance(v, Tensor)}
        return replace(self, **cut)


def render(
    simulator: Any,
    size: int | tuple[int, int] = 64,
    copies: int | None = None,
    follow: int | None = None,
    legible: bool = False,
) -> Tensor:
    """Draw the current state of a `vmas.Environment`.

    The camera is that of `Environment.render`: it zooms out to fit all agents, or stays on the
    agent whose index is `follow`. Where the picture's aspect is not the viewer's, the view is
    widened, never cropped or stretched. `copies` draws only the first so many. `legible` is for
    people: thicker strokes, shades to tell agents of one colour apart, and halos around goals.
    An entity whose position is not finite is left out.

    Returns uint8 (B, h, w, 3) on the simulator's device. Raises ValueError on a bad argument.
    """
    height, width, copies = _check(simulator, size, copies, follow)
    frames = torch.full(
        (copies, height, width, 3), WHITE, dtype=torch.uint8, device=simulator.device
    )
    with torch.no_grad():
        camera = _camera(simulator, height, width, copies, follow)
        shapes = _scene(simulator, copies, legible)
        if legible:
            camera.pen = max(camera.pen, 0.9)
        chunk = max(1, _budget(frames) // (height * width))
        for start in range(0, copies, chunk):
            part = slice(start, start + chunk)
            view = replace(
                camera, scale=camera.scale[part], left=camera.left[part], top=camera.top[part]
            )
            for shape in shapes:
                _draw(frames[part], shape.rows(part), view)
    return frames


def _check(simulator: Any, size: Any, copies: Any, follow: Any) -> tuple[int, int, int]:
    """Height, width and number of copies, or a ValueError."""
    if not (hasattr(simulator, "scenario") and hasattr(simulator, "world")):
        raise ValueError(f"simulator must be a vmas Environment, got {type(simulator).__name__}")
    sides = (size, size) if isinstance(size, int) else size
    if not (
        isinstance(sides, (tuple, list))
        and len(sides) == 2
        and all(isinstance(s, int) and not isinstance(s, bool) and s > 0 for s in sides)
    ):
        raise ValueError(f"size must be a positive int or (height, width) of them, got {size!r}")
    total, agents = simulator.num_envs, len(simulator.world.agents)
    copies = total if copies is None else copies
    if not (isinstance(copies, int) and 1 <= copies <= total):
        raise ValueError(f"copies must be an int from 1 to {total}, got {copies!r}")
    if follow is not None and not (isinstance(follow, int) and 0 <= follow < agents):
        raise ValueError(f"follow must be None or an agent from 0 to {agents - 1}, got {follow!r}")
    if simulator.scenario.viewer_zoom <= 0:
        raise ValueError(f"viewer_zoom must be positive, got {simulator.scenario.viewer_zoom}")
    return sides[0], sides[1], copies


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
        middle_x, middle_y = x[:, follow], y[:, follow]
        scale = torch.full_like(middle_x, largest)
    left, top = width / 2 - middle_x * scale, height / 2 + middle_y * scale
    return Camera(height, width, scale, left, top, largest, min(width / view_w, height / view_h))


# What is drawn ------------------------------------------------------------------------------------


def _scene(sim: Any, copies: int, legible: bool) -> list[Shape]:
    """What is drawn, from back to front."""
    shapes = _boundary(sim, copies)
    if sim.scenario.plot_grid:
        spot = torch.zeros(copies, 1, 2, device=sim.device)
        spacing = float(sim.scenario.grid_spacing)
        shapes.append(Shape("grid", spot, (spacing, 25.0), BLACK, 0.3, stroke=1.0))
    shapes += _extras(sim, copies)
    shapes += _entities(sim, copies, legible)
    # OpenGL keeps the width of the last line, and so VMAS's outlines have it, across frames too
    pen = next((s.stroke for s in reversed(shapes) if s.stroke is not None), 2.0)
    for shape in shapes:
        pen = shape.stroke if shape.stroke is not None else pen
        if shape.stroke is None and shape.rim is None and shape.kind != "plot":
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
        shapes.append(Shape("box", centre, half, GRAY, 1.0, turn, stroke=1.0))
    return shapes


def _entities(sim: Any, copies: int, legible: bool) -> list[Shape]:
    """Landmarks and agents, each agent followed by its lidar's rays and its action's arrow."""
    entities = sim.world.entities
    spots = torch.stack([e.state.pos[:copies] for e in entities], 1).float()  # (B, E, 2)
    seen = torch.stack([e.is_rendering[:copies] for e in entities], 1).to(spots.device)
    seen = seen & spots.isfinite().all(-1)
    spots = spots.nan_to_num(0.0, 0.0, 0.0)
    turns = torch.stack([e.state.rot[:copies, 0] for e in entities], 1).float()  # (B, E)
    turns = turns.nan_to_num(0.0, 0.0, 0.0)
    shades = _shades(entities) if legible else {}
    shapes, halos = [], []
    for i, entity in enumerate(entities):
        spot, turn, shown = spots[:, i : i + 1], turns[:, i : i + 1], seen[:, i].float()
        color, alpha = _color(entity, copies, spot.device)
        color = shades.get(entity.name, color)
        shapes.append(_body(entity.shape, spot, turn, color, shown * alpha))
        if legible and _is_goal(entity):
            halos += _halo(shapes[-1], 0.03 * float(sim.scenario.viewer_zoom))
        for sensor in getattr(entity, "sensors", None) or []:
            shapes += _rays(sensor, spot, turn, shown)
        force = entity.state.force if getattr(entity, "_render_action", False) else None
        if force is not None:
            tip = force[:copies, None].float() * (10 * entity.shape.circumscribed_radius())
            shapes.append(_arrow(spot, tip.nan_to_num(0.0, 0.0, 0.0), color, shown))
    return halos + shapes


def _color(entity: Any, copies: int, device: torch.device) -> tuple[Any, Any]:
    """An entity's colour, three floats or (B, 3), and alpha, a float or (B,)."""
    color, alpha = entity.color, getattr(entity, "_alpha", 1.0)
    if isinstance(color, Tensor):
        color = color.to(device).float().clamp(0, 1)
        color = color[:copies] if color.dim() > 1 else color.expand(copies, -1)
        return color[:, :3], color[:, 3] if color.shape[1] == 4 else alpha
    return tuple(color[:3]), color[3] if len(color) == 4 else alpha


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
    black = (0.0, 0.0, 0.0)
    dots = Shape("disc", spot + ends, (0.01, 0.01), sensor.render_color, alpha, reach=reach + 0.01)
    return [
        Shape("box", spot + ends / 2, half, black, alpha, angles, stroke=1.0, reach=reach),
        dots,
    ]


def _arrow(spot: Tensor, tip: Tensor, color: Any, shown: Tensor) -> Shape:
    """The line by which VMAS shows an agent's force."""
    length = tip.norm(dim=-1)
    half = torch.stack([length / 2, torch.zeros_like(length)], -1)
    angle = torch.atan2(tip[..., 1], tip[..., 0])
    return Shape("box", spot + tip / 2, half, color, shown, angle, stroke=2.0)


def _shades(entities: list[Any]) -> dict[str, tuple[float, ...]]:
    """Colours by which agents of one colour are told apart: darker to lighter, hue turned a bit."""
    teams: dict[tuple[float, ...], list[str]] = {}
    for entity in entities:
        if hasattr(entity, "sensors") and not isinstance(entity.color, Tensor):
            teams.setdefault(tuple(entity.color), []).append(entity.name)
    shades = {}
    for color, names in teams.items():
        hue, _, saturation = colorsys.rgb_to_hls(*color[:3])
        for i, name in enumerate(names if len(names) > 1 else []):
            turn = i / (len(names) - 1) - 0.5
            rgb = colorsys.hls_to_rgb((hue - 0.18 * turn) % 1, 0.5 + 0.36 * turn, saturation)
            shades[name] = rgb
    return shades


def _is_goal(entity: Any) -> bool:
    """Whether this is a round mark on the ground, the look of a goal in VMAS."""
    return hasattr(entity.shape, "radius") and not (
        entity.collide or entity.movable or hasattr(entity, "sensors")
    )


def _halo(goal: Shape, gap: float) -> list[Shape]:
    """A pale disc with an edge, under a goal."""
    wide = (goal.half[0] + gap,) * 2
    reach = goal.reach + gap
    pale = replace(goal, half=wide, alpha=0.25 * goal.alpha, rim=0.0, reach=reach)
    return [pale, replace(pale, kind="ring", alpha=goal.alpha, stroke=1.5)]


# What scenarios add -------------------------------------------------------------------------------


class Geom:
    """Stands in for VMAS's geometry while `extra_render` runs: remembers instead of drawing."""

    def __init__(
        self, kind: str = "nothing", points: Any = (), width: float = 1.0, **details: Any
    ) -> None:
        self.kind, self.points, self.width, self.details = kind, points, width, details
        self.color, self.transforms = (0.0, 0.0, 0.0, 1.0), []

    def set_color(self, r: float, g: float, b: float, alpha: float = 1.0) -> None:
        self.color = (r, g, b, alpha)

    def add_attr(self, attr: Any) -> None:
        if isinstance(attr, Transform):
            self.transforms.append(attr)

    def set_linewidth(self, x: float) -> None:
        self.width = x

    def placed(self) -> np.ndarray:
        """The points (V, 2) after this geometry's transforms, the first added acting first."""
        points = _array(self.points)
        for transform in self.transforms:
            points = transform.apply(points)
        return points


class Transform:
    """A scaling, then a rotation, then a translation."""

    def __init__(self, translation=(0.0, 0.0), rotation=0.0, scale=(1.0, 1.0)) -> None:
        self.set_translation(*translation)
        self.set_rotation(rotation)
        self.set_scale(*scale)

    def set_translation(self, x: float, y: float) -> None:
        self.translation = (float(x), float(y))

    def set_rotation(self, angle: float) -> None:
        self.rotation = float(angle)

    def set_scale(self, x: float, y: float) -> None:
        self.scale = (float(x), float(y))

    def apply(self, points: np.ndarray) -> np.ndarray:
        if self.scale != (1.0, 1.0):
            points = points * np.array(self.scale)
        if self.rotation:
            cos, sin = math.cos(self.rotation), math.sin(self.rotation)
            points = points @ np.array([[cos, sin], [-sin, cos]])
        return points + np.array(self.translation)


def _array(points: Any) -> np.ndarray:
    """Points given as a tensor, or as nested sequences of numbers or of one-element tensors."""
    if isinstance(points, Tensor):
        return points.detach().cpu().numpy().astype(np.float64).reshape(-1, 2)
    return np.array([[float(x) for x in point] for point in points]).reshape(-1, 2)


def _ellipse(radius_x=10, radius_y=5, res=CIRCLE_SIDES, filled=True, angle=2 * math.pi) -> Geom:
    turns = [angle * (i / res - 0.5) for i in range(res)]
    points = [(math.cos(t) * radius_x, math.sin(t) * radius_y) for t in turns]
    whole = angle % (2 * math.pi) == 0
    points += [] if whole else [(0.0, 0.0)]
    if whole and radius_x == radius_y:  # its own kind, because it is cheap to draw
        points = [(0.0, 0.0), (float(radius_x), 0.0)]
        return Geom("disc" if filled else "ring", points)
    return _polygon(points, filled)


def _polygon(v: Any, filled: bool = True, draw_border: bool = True) -> Geom:
    return Geom("polygon", v, border=draw_border) if filled else Geom("polyline", v, close=True)


def _plot(
    f: Any,
    plot_range: Any,
    precision: float = 0.01,
    cmap_range: Any = None,
    cmap_alpha: float = 1.0,
    cmap_name: str = "viridis",
) -> Geom:
    """A function of position as an image; `f` maps (n, 2) points to n values or to RGBA (n, 4)."""
    span = plot_range if isinstance(plot_range, (tuple, list)) else (plot_range, plot_range)
    (left, right), (low, high) = (
        s if isinstance(s, (tuple, list)) else (-float(s), float(s)) for s in span
    )
    steps = (np.arange(PLOT_CELLS) + 0.5) / PLOT_CELLS
    grid = np.meshgrid(left + steps * (right - left), low + steps * (high - low))
    values = f(np.stack(grid, -1).reshape(-1, 2))
    values = values.detach().cpu().numpy() if isinstance(values, Tensor) else np.asarray(values)
    if values.size == PLOT_CELLS**2:
        values = _viridis(values.reshape(-1), cmap_range, cmap_alpha)
    image = np.clip(values.reshape(PLOT_CELLS, PLOT_CELLS, 4), 0.0, 1.0)
    return Geom("plot", [(left, low), (right, high)], image=image)


def _viridis(values: np.ndarray, limits: Any, alpha: float) -> np.ndarray:
    """Colours (n, 4) of values (n,), the map stretched over `limits` or over all values."""
    low, high = limits or (None, None)
    low = values.min() if low is None else low
    high = values.max() if high is None else high
    place = (np.clip(values, low, high) - low) / max(high - low, 1e-5)
    anchors = np.array([list(bytes.fromhex(code)) for code in VIRIDIS.split()]) / 255
    knots = np.linspace(0, 1, len(anchors))
    bands = [np.interp(place, knots, anchors[:, c]) for c in range(3)]
    return np.stack([*bands, np.full(len(values), alpha)], -1)


def _module() -> types.ModuleType:
    """A module with the names that scenarios import from `vmas.simulator.rendering`."""
    module = types.ModuleType("vmas.simulator.rendering")
    module.Geom, module.Transform = Geom, Transform
    module.Line = lambda start=(0.0, 0.0), end=(0.0, 0.0), width=1: Geom(
        "polyline", (start, end), width, close=False
    )
    module.PolyLine = lambda v, close: Geom("polyline", v, close=close)
    module.FilledPolygon = lambda v, draw_border=True: _polygon(v, True, draw_border)
    module.Grid = lambda spacing=0.1, length=50, width=0.5: Geom(
        "grid", [(0.0, 0.0), (spacing, length / 2)], width
    )
    module.Compound = lambda gs: Geom("group", parts=list(gs))
    module.Point = lambda: Geom("polyline", [(0.0, 0.0)] * 2, close=False)
    module.TextLine = module.Image = lambda *args, **kwargs: Geom()
    module.LineWidth = module.LineStyle = module.Color = lambda *args, **kwargs: None
    module.make_ellipse, module.make_polygon = _ellipse, _polygon
    module.make_circle = lambda radius=10, res=CIRCLE_SIDES, filled=True, angle=2 * math.pi: (
        _ellipse(radius, radius, res, filled, angle)
    )
    module.make_polyline = lambda v: module.PolyLine(v, False)
    module.render_function_util = _plot
    return module


@contextlib.contextmanager
def _stand_in() -> Iterator[None]:
    """Makes `vmas.simulator.rendering` importable without OpenGL, for as long as it lasts."""
    import vmas.simulator as package

    name, missing = "vmas.simulator.rendering", object()
    module, attribute = sys.modules.get(name), vars(package).get("rendering", missing)
    sys.modules[name] = package.rendering = _module()
    try:
        yield
    finally:
        del sys.modules[name], package.rendering
        if module is not None:
            sys.modules[name] = module
        if attribute is not missing:
            package.rendering = attribute


def _extras(sim: Any, copies: int) -> list[Shape]:
    """What the scenario's `extra_render` adds, as shapes of all copies."""
    from vmas.simulator.scenario import BaseScenario

    if type(sim.scenario).extra_render is BaseScenario.extra_render:
        return []
    with _stand_in():
        scenes = [sim.scenario.extra_render(env_index=i) for i in range(copies)]
    # Copies can differ in what they show: align their lists, keeping the order within each
    slots: list[tuple[Any, dict[int, np.ndarray]]] = []
    for copy, geoms in enumerate(scenes):
        at = 0
        for key, numbers in (record for geom in geoms for record in _records(geom)):
            found = (i for i in range(at, len(slots)) if slots[i][0] == key)
            at = next(found, at)
            if at == len(slots) or slots[at][0] != key:
                slots.insert(at, (key, {}))
            slots[at][1][copy] = numbers
            at += 1
    return [_slot(key, rows, copies, sim.device) for key, rows in slots]


def _records(geom: Geom) -> Iterator[tuple[tuple[Any, ...], np.ndarray]]:
    """What a geometry is, and its numbers: colour (4), then those that `_slot` expects."""
    if geom.kind == "group":
        for part in geom.details["parts"]:
            part.color, part.transforms = geom.color, part.transforms + geom.transforms
            yield from _records(part)
        return
    if geom.kind == "nothing":
        return
    points, width = geom.placed(), max(1.0, float(geom.width))
    key: tuple[Any, ...] = (geom.kind, width)
    if geom.kind in ("disc", "ring"):
        points = np.array([*points[0], np.hypot(*(points[1] - points[0]))])
    elif geom.kind == "grid":
        points = np.array([*points[0], *(points[1] - points[0])])
    elif geom.kind == "polyline":
        points = np.concatenate([points, points[:1]]) if geom.details["close"] else points
        key = (geom.kind, width, len(points))
    elif geom.kind == "polygon":
        (side, up), border = points[[2, 0]] - points[1] if len(points) > 2 else (0, 0), geom.details
        key = (geom.kind, border["border"], len(points))
        if len(points) == 4 and abs(side @ up) < 1e-9 and np.allclose(points[3], points[2] + up):
            key = ("box", border["border"])
            turn = math.atan2(side[1], side[0])
            points = np.array([*points.mean(0), np.hypot(*side) / 2, np.hypot(*up) / 2, turn])
    elif geom.kind == "plot":
        points = np.concatenate([points.reshape(-1), geom.details["image"].reshape(-1)])
    yield key, np.concatenate([[float(c) for c in geom.color], points.reshape(-1)])


def _slot(key: tuple[Any, ...], rows: dict[int, np.ndarray], copies: int, device: Any) -> Shape:
    """A shape from the numbers of the copies that have it; it is transparent in the others."""
    table = np.zeros((copies, len(next(iter(rows.values())))))
    table[list(rows)] = np.stack(list(rows.values()))
    spare = np.nan_to_num(table[:, 4:], nan=0.0, posinf=0.0, neginf=0.0)
    numbers = torch.from_numpy(spare).float().to(device)
    colors = torch.from_numpy(table[:, :4]).float().clamp_(0, 1).to(device)
    look = {"color": colors[:, :3], "alpha": colors[:, 3] * numbers.isfinite().all(1)}
    kind, centre = key[0], numbers[:, None, :2]
    if kind in ("disc", "ring"):
        half = numbers[:, 2].expand(2, 1, -1).permute(2, 1, 0)
        stroke = key[1] if kind == "ring" else None
        return Shape(kind, centre, half, stroke=stroke, reach=spare[:, 2].max(), **look)
    if kind == "box":
        reach = np.hypot(spare[:, 2], spare[:, 3]).max()
        rim = None if key[1] else 0.0
        half = numbers[:, None, 2:4]
        return Shape(kind, centre, half, angle=numbers[:, 4:], rim=rim, reach=reach, **look)
    if kind == "grid":
        half = tuple(spare[next(iter(rows)), 2:4])
        return Shape(kind, centre, half, stroke=key[1], **look)
    if kind == "plot":
        image = numbers[:, 4:].view(-1, PLOT_CELLS, PLOT_CELLS, 4).permute(0, 3, 1, 2)
        corners = numbers[:, :4].view(-1, 2, 2)
        half = (corners[:, 1:] - corners[:, :1]) / 2
        return Shape(kind, corners.mean(1, keepdim=True), half, data=image, **look)
    points, spread = numbers.view(copies, -1, 2), np.ptp(spare.reshape(copies, -1, 2), 1).max() / 2
    if kind == "polygon":
        rim, middle = None if key[1] else 0.0, (points.amax(1) + points.amin(1))[:, None] / 2
        return Shape(kind, middle, rim=rim, reach=spread, data=points - middle, **look)
    step = points[:, 1:] - points[:, :-1]
    half = torch.stack([step.norm(dim=-1) / 2, torch.zeros_like(step[..., 0])], -1)
    angle, middle = torch.atan2(step[..., 1], step[..., 0]), points[:, :-1] + step / 2
    return Shape("box", middle, half, angle=angle, stroke=key[1], reach=spread, **look)


# Pixels -------------------------------------------------------------------------------------------


@dataclass
class Placed:
    """A shape's parts in pixels, before rounding to whole ones; all (B, R) unless noted."""

    col: Tensor
    row: Tensor
    half: tuple[Tensor, Tensor]  # each (B, R) or (B, 1)
    axes: tuple[Tensor, Tensor] | None  # cosine and sine
    corners: Tensor | None  # (B, V, 2), from the centre, y upwards
    width: float  # half the stroke
    rim: float  # half the rim


def _place(shape: Shape, camera: Camera) -> Placed:
    scale = camera.scale[:, None]
    half = shape.half.unbind(-1) if isinstance(shape.half, Tensor) else shape.half
    half_x, half_y = half[0] * scale, half[1] * scale
    width = 0.0 if shape.stroke is None else shape.stroke * camera.pen / 2
    if shape.kind == "box" and width:
        half_y = half_y + width
    return Placed(
        col=shape.centre[..., 0] * scale + camera.left[:, None],
        row=camera.top[:, None] - shape.centre[..., 1] * scale,
        half=(half_x, half_y),
        axes=None if shape.angle is None else (shape.angle.cos(), shape.angle.sin()),
        corners=shape.data * scale[..., None] if shape.kind == "polygon" else None,
        width=width,
        rim=(shape.rim or 0.0) * camera.pen / 2,
    )


def _draw(frames: Tensor, shape: Shape, camera: Camera) -> None:
    """Blend one shape into the frames (B, h, w, 3), within a window of pixels around it."""
    placed = _place(shape, camera)
    rows, cols = _window(shape, placed, camera)
    alpha = shape.alpha
    alpha = alpha[:, None, None, None] if isinstance(alpha, Tensor) else alpha
    color = shape.color
    color = color[:, :, None, None] if isinstance(color, Tensor) else color
    if shape.kind == "plot":
        color, alpha = _sample(shape, placed, rows, cols)
    step = max(1, 2 * _budget(frames) // (rows.numel() * cols.shape[1]))
    clear, total, inked = 1.0, 0.0, 0.0
    for start in range(0, shape.centre.shape[1], step):
        part = slice(start, start + step)
        dx = (cols[:, None] + 0.5 - placed.col[:, part, None])[:, :, None]  # (B, R, 1, kw)
        dy = (placed.row[:, part, None] - rows[:, None] - 0.5)[..., None]  # (B, R, kh, 1), upwards
        veil, ink = _layers(_cover(shape.kind, dx, dy, placed, part), alpha)
        if shape.centre.shape[1] == 1:
            return _blend(frames, rows, cols, veil[:, 0], ink[:, 0], color)
        clear = clear * (1 - veil).prod(1)
        total, inked = total + veil.sum(1), inked + ink.sum(1)
    veil = 1 - clear
    _blend(frames, rows, cols, veil, veil * inked / (total + 1e-9), color)


def _budget(frames: Tensor) -> int:
    """Pixels to draw at once."""
    return CPU_PIXELS if frames.device.type == "cpu" else GPU_PIXELS


def _window(shape: Shape, placed: Placed, camera: Camera) -> tuple[Tensor, Tensor]:
    """Rows (B, kh) and columns (B, kw) that hold the shape, as many in all copies.

    On a CPU the windows are measured; on a GPU, where asking would stall, they are bounded.
    """
    wide, high = placed.half
    if placed.axes is not None:
        cos, sin = placed.axes[0].abs(), placed.axes[1].abs()
        wide, high = cos * wide + sin * high, sin * wide + cos * high
    if placed.corners is not None:
        wide, high = placed.corners.abs().amax(1, keepdim=True).unbind(-1)
    margin = max(placed.rim, placed.width) + 0.5
    windows = []
    for spot, extent, length in (
        (placed.row, high, camera.height),
        (placed.col, wide, camera.width),
    ):
        low = (spot - extent - margin).amin(1).floor()
        if shape.kind == "grid":
            side = length
        elif low.device.type == "cpu":
            top = (spot + extent + margin).amax(1).ceil().clamp(0, length)
            side = max(1, int((top - low.clamp(0, length)).max()))
        else:
            side = 2 * (shape.reach * camera.largest + margin) + 2
            side = math.ceil(min(length, side))
        start = low.clamp(0, length - side).long()
        windows.append(start[:, None] + torch.arange(side, device=start.device))
    return windows[0], windows[1]


def _cover(kind: str, dx: Tensor, dy: Tensor, placed: Placed, part: slice) -> list[Tensor]:
    """Share (B, R, kh, kw) of each pixel within the parts; with a rim, of them grown, as they are,
    and shrunk by half the rim."""
    grow = (placed.rim, 0.0, -placed.rim) if placed.rim else (0.0,)
    half_x, half_y = (h[:, part if h.shape[1] > 1 else slice(1), None, None] for h in placed.half)
    if kind in ("disc", "ring"):
        distance = (dx * dx + dy * dy).sqrt_()
        radius = half_x * ROUND
        if kind == "ring":
            return [_overlap(distance - radius, placed.width)]
        return [_disc(distance, radius + g) for g in grow]
    if kind == "grid":
        across, along = (_stripes(d, half_x, placed.width) for d in (dx, dy))
        return [across + along - 0.3 * across * along]
    if placed.corners is not None:
        distance = _outside(dx, dy, placed.corners)
        return [(0.5 + g - distance).clamp_(0, 1) for g in grow]
    if placed.axes is not None:
        cos, sin = (a[:, part, None, None] for a in placed.axes)
        dx, dy = dx * cos + dy * sin, dy * cos - dx * sin
    return [_overlap(dx, half_x + g) * _overlap(dy, half_y + g) for g in grow]


def _overlap(distance: Tensor, half: Any) -> Tensor:
    """Share of a pixel covered by a stripe of this half width at this distance."""
    if isinstance(half, float):
        return (half + 0.5 - distance.abs()).clamp_(0.0, max(0.0, min(1.0, 2 * half)))
    half = half.clamp(min=0)
    return (half + 0.5 - distance.abs()).clamp_(min=0).minimum((2 * half).clamp_(max=1))


def _disc(distance: Tensor, radius: Tensor) -> Tensor:
    """A ramp one pixel wide whose sum over pixels is the disc's area, however small it is."""
    square = radius.clamp(min=0) ** 2
    edge = (square - 1 / 12).clamp_(min=0.25).sqrt_() + 0.5
    return (edge - distance).clamp_(0, 1) * (3 * square).clamp_(max=1)


def _stripes(distance: Tensor, spacing: Tensor, half: float) -> Tensor:
    """Share of a pixel covered by endless stripes of this half width and spacing."""

    def covered(x: Tensor) -> Tensor:  # length covered from 0 to x
        whole = (x / spacing).round()
        return whole * 2 * half + (x - whole * spacing).clamp(-half, half)

    return (covered(distance + 0.5) - covered(distance - 0.5)).clamp_(0, 1)


def _outside(dx: Tensor, dy: Tensor, corners: Tensor) -> Tensor:
    """Signed distance to a convex polygon's furthest side; corners (B, V, 2) in either sense."""
    x, y = corners.unbind(-1)
    next_x, next_y = x.roll(-1, 1), y.roll(-1, 1)
    sense = (x * next_y - y * next_x).sum(1, keepdim=True).sign()  # (B, 1)
    side_x, side_y = next_x - x, next_y - y
    length = (side_x * side_x + side_y * side_y).sqrt().clamp(min=1e-9)
    normal_x, normal_y = side_y * sense / length, -side_x * sense / length
    offset = normal_x * x + normal_y * y
    worst = None
    for v in range(corners.shape[1]):
        at = (slice(None), v, None, None, None)
        distance = dx * normal_x[at] + dy * normal_y[at] - offset[at]
        worst = distance if worst is None else torch.maximum(worst, distance)
    return worst


def _sample(shape: Shape, placed: Placed, rows: Tensor, cols: Tensor) -> tuple[Tensor, Tensor]:
    """Colour (B, 3, kh, kw) and alpha (B, 1, kh, kw) of a plot in the window's pixels."""
    x = (cols + 0.5 - placed.col) / placed.half[0]
    y = (placed.row - rows - 0.5) / placed.half[1]
    where = torch.stack(torch.broadcast_tensors(x[:, None, :], y[:, :, None]), -1)
    image = torch.nn.functional.grid_sample(
        shape.data, where, padding_mode="border", align_corners=False
    )
    alpha = shape.alpha[:, None, None, None] if isinstance(shape.alpha, Tensor) else shape.alpha
    return image[:, :3], image[:, 3:] * alpha


def _layers(cover: list[Tensor], alpha: Any) -> tuple[Tensor, Tensor]:
    """How much the background is hidden, and how much colour is laid on, in each pixel."""
    if len(cover) == 1:
        veil = cover[0] * alpha
        return veil, veil
    # The rim lies half inside the body and half outside, at half the body's colour and alpha
    outer, body, inner = cover
    body = body * (alpha - alpha * alpha / 2)
    veil = outer * (alpha / 2) + body - inner * (alpha / 2 - alpha * alpha / 2)
    ink = outer * (alpha / 4) + body - inner * (alpha / 4 - alpha * alpha / 2)
    return veil, ink


def _blend(
    frames: Tensor, rows: Tensor, cols: Tensor, veil: Tensor, ink: Tensor, color: Any
) -> None:
    """frames * (1 - veil) + color * ink in the window; veil and ink (B, kh, kw)."""
    copies, height, width, _ = frames.shape
    copy = torch.arange(copies, device=frames.device)[:, None] * height
    pixel = ((copy + rows) * (3 * width))[:, :, None] + (cols * 3)[:, None, :]
    index = torch.stack([pixel, pixel + 1, pixel + 2]).view(-1)
    flat = frames.view(-1)
    patch = flat.gather(0, index).view(3, *pixel.shape).float()
    patch.mul_(1 - veil)
    if isinstance(color, Tensor):
        patch.add_(color.transpose(0, 1) * (ink * 255))
    else:
        for band, value in zip(patch, color, strict=True):
            band.add_(ink, alpha=255 * value)
    flat.scatter_(0, index, patch.add_(0.5).to(torch.uint8).view(-1))
