"""What a VMAS scenario's `extra_render` adds, recorded without OpenGL, as shapes of all copies.

While `extra_render` runs, for one copy after another, `vmas.simulator.rendering` is replaced by a
module whose geometries remember instead of drawing.
"""

from __future__ import annotations

import contextlib
import copy
import math
import sys
import types
import warnings
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from torch import Tensor

from envs.raster import CIRCLE_SIDES, Shape

PLOT_CELLS = 64  # points along each side at which a scenario's function plot is evaluated
VIRIDIS = "440154 482878 3e4989 31688e 26828e 1f9e89 35b779 6ece58 b5de2b fde725"


class Transform:
    """A scaling, then a rotation, then a translation."""

    def __init__(
        self, translation: Any = (0.0, 0.0), rotation: float = 0.0, scale: Any = (1.0, 1.0)
    ) -> None:
        self.set_translation(*translation)
        self.set_rotation(rotation)
        self.set_scale(*scale)

    def set_translation(self, newx: float, newy: float) -> None:
        self.translation = (float(newx), float(newy))

    def set_rotation(self, new: float) -> None:
        self.rotation = float(new)

    def set_scale(self, newx: float, newy: float) -> None:
        self.scale = (float(newx), float(newy))

    def apply(self, points: np.ndarray) -> np.ndarray:
        if self.scale != (1.0, 1.0):
            points = points * np.array(self.scale)
        if self.rotation:
            cos, sin = math.cos(self.rotation), math.sin(self.rotation)
            points = points @ np.array([[cos, sin], [-sin, cos]])
        return points if self.translation == (0.0, 0.0) else points + np.array(self.translation)


class Geom:
    """A geometry of one kind: its points, and the attributes that scenarios set."""

    def __init__(
        self, kind: str = "nothing", points: Any = (), width: float = 1.0, **details: Any
    ) -> None:
        self.kind, self.points, self.width, self.details = kind, points, width, details
        self.color: tuple[float, ...] = (0.0, 0.0, 0.0, 1.0)
        self.transforms: list[Transform] = []

    def set_color(self, r: float, g: float, b: float, alpha: float = 1.0) -> None:
        self.color = tuple(min(max(float(value), 0.0), 1.0) for value in (r, g, b, alpha))

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


def _array(points: Any) -> np.ndarray:
    """Points given as a tensor, or as nested sequences of numbers or of one-element tensors."""
    if isinstance(points, Tensor):
        return points.detach().cpu().double().numpy().reshape(-1, 2)
    rows = [p.tolist() if isinstance(p, Tensor) else [float(x) for x in p] for p in points]
    return np.array(rows, dtype=np.float64).reshape(-1, 2)


def _ellipse(
    radius_x: float = 10,
    radius_y: float = 5,
    res: int = CIRCLE_SIDES,
    filled: bool = True,
    angle: float = 2 * math.pi,
) -> Geom:
    whole = angle % (2 * math.pi) == 0
    if whole and radius_x == radius_y:  # a kind of its own, because it is cheap to draw
        return Geom("disc" if filled else "ring", [(0.0, 0.0), (float(radius_x), 0.0)])
    turns = [angle * (i / res - 0.5) for i in range(res)]
    points = [(math.cos(t) * radius_x, math.sin(t) * radius_y) for t in turns]
    return _polygon(points if whole else [*points, (0.0, 0.0)], filled)


def _polygon(v: Any, filled: bool = True, draw_border: bool = True) -> Geom:
    return Geom("polygon", v, border=draw_border) if filled else Geom("lines", v, close=True)


def _plot(
    f: Any,
    plot_range: Any,
    precision: float = 0.01,
    cmap_range: Any = None,
    cmap_alpha: float = 1.0,
    cmap_name: str = "viridis",
) -> Geom:
    """A function of position as an image; `f` maps points (n, 2) to n values or to RGBA (n, 4)."""
    sides = plot_range if isinstance(plot_range, (tuple, list)) else (plot_range, plot_range)
    (left, right), (low, high) = (
        side if isinstance(side, (tuple, list)) else (-float(side), float(side)) for side in sides
    )
    steps = (np.arange(PLOT_CELLS) + 0.5) / PLOT_CELLS
    grid = np.meshgrid(left + steps * (right - left), low + steps * (high - low))
    values = f(np.stack(grid, -1).reshape(-1, 2))
    values = values.detach().cpu().numpy() if isinstance(values, Tensor) else np.asarray(values)
    if values.size == PLOT_CELLS**2:
        values = _viridis(values.reshape(-1), cmap_range, cmap_alpha)
    return Geom("plot", [(left, low), (right, high)], image=np.clip(values, 0.0, 1.0))


def _viridis(values: np.ndarray, limits: Any, alpha: float) -> np.ndarray:
    """Colours (n, 4) of values (n,), the map stretched over `limits` or over all values."""
    low, high = (None, None) if limits is None else limits
    low = values.min() if low is None else low
    high = values.max() if high is None else high
    place = (np.clip(values, low, high) - low) / max(high - low, 1e-5)
    anchors = np.array([list(bytes.fromhex(code)) for code in VIRIDIS.split()]) / 255
    knots = np.linspace(0, 1, len(anchors))
    bands = [np.interp(place, knots, anchors[:, c]) for c in range(3)]
    return np.stack([*bands, np.full(len(values), alpha)], -1)


def _module() -> types.ModuleType:
    """A module with the names that scenarios import from `vmas.simulator.rendering`."""

    def line(start: Any = (0.0, 0.0), end: Any = (0.0, 0.0), width: float = 1) -> Geom:
        return Geom("lines", (start, end), width, close=False)

    def polyline(v: Any, close: bool) -> Geom:
        return Geom("lines", v, close=close)

    def grid(spacing: float = 0.1, length: float = 50, width: float = 0.5) -> Geom:
        return Geom("grid", [(-length / 2, -length / 2), (spacing - length / 2, 0.0)], width)

    def circle(
        radius: float = 10, res: int = CIRCLE_SIDES, filled: bool = True, angle: float = 2 * math.pi
    ) -> Geom:
        return _ellipse(radius, radius, res, filled, angle)

    def nothing(*args: Any, **kwargs: Any) -> Geom:
        return Geom()

    def unknown(name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        warnings.warn(f"without OpenGL, {name} of {module.__name__} is not drawn", stacklevel=2)
        return nothing

    module = types.ModuleType("vmas.simulator.rendering")
    vars(module).update(
        Geom=Geom,
        Transform=Transform,
        Line=line,
        PolyLine=polyline,
        Grid=grid,
        FilledPolygon=lambda v, draw_border=True: _polygon(v, True, draw_border),
        Compound=lambda gs: Geom("group", parts=list(gs)),
        TextLine=nothing,
        make_circle=circle,
        make_ellipse=_ellipse,
        make_polygon=_polygon,
        make_polyline=lambda v: polyline(v, False),
        render_function_util=_plot,
        __getattr__=unknown,
    )
    return module


@contextlib.contextmanager
def _stand_in() -> Iterator[None]:
    """Replaces `vmas.simulator.rendering` for as long as it lasts."""
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


def extras(scenario: Any, copies: int, device: torch.device) -> list[Shape]:
    """What the scenario draws besides entities, back to front."""
    from vmas.simulator.scenario import BaseScenario

    if type(scenario).extra_render is BaseScenario.extra_render:
        return []
    with _stand_in():
        scenes = [scenario.extra_render(env_index=i) for i in range(copies)]
    # Copies can differ in what they show: align their lists, keeping the order within each
    slots: list[tuple[Any, dict[int, np.ndarray]]] = []
    for row, geoms in enumerate(scenes):
        at = 0
        for key, numbers in _runs(_flat(geoms)):
            at = next((i for i in range(at, len(slots)) if slots[i][0] == key), at)
            if at == len(slots) or slots[at][0] != key:
                slots.insert(at, (key, {}))
            slots[at][1][row] = numbers
            at += 1
    return [_shape(key, rows, copies, device) for key, rows in slots]


def _flat(geoms: list[Geom]) -> Iterator[Geom]:
    """Geometries that can be drawn, groups taken apart; a group's colour is its parts' too."""
    for geom in geoms:
        if geom.kind == "group":
            parts = [copy.copy(part) for part in geom.details["parts"]]
            for part in parts:
                part.color, part.transforms = geom.color, part.transforms + geom.transforms
            yield from _flat(parts)
        elif geom.kind != "nothing":
            yield geom


def _runs(geoms: Iterator[Geom]) -> Iterator[tuple[tuple[Any, ...], np.ndarray]]:
    """Key (kind, style, colour) and numbers (parts, n) of each run of geometries of one key.

    The numbers are those that `_shape` expects. Where coinciding lines meet, OpenGL's do not get
    darker but sums of their coverage would, so that doubles are removed.
    """
    last, run = None, []
    for geom in geoms:
        key, numbers = _record(geom)
        if run and not (key == last and key[0] in ("polyline", "disc")):
            yield last, _unique(last, run)
            run = []
        last = key
        run.append(numbers)
    if run:
        yield last, _unique(last, run)


def _unique(key: tuple[Any, ...], run: list[np.ndarray]) -> np.ndarray:
    numbers = np.concatenate(run)
    if key[0] != "polyline" or len(run) == 1 or key[2][3] < 1:
        return numbers
    swapped = (numbers[:, 0] > numbers[:, 2]) | (
        (numbers[:, 0] == numbers[:, 2]) & (numbers[:, 1] > numbers[:, 3])
    )
    numbers = np.where(swapped[:, None], numbers[:, [2, 3, 0, 1]], numbers)
    _, first = np.unique(numbers.round(3), axis=0, return_index=True)
    return numbers[np.sort(first)]


def _record(geom: Geom) -> tuple[tuple[Any, ...], np.ndarray]:
    """Key and numbers (parts, n) of one geometry."""
    points, width, style = geom.placed(), max(1.0, float(geom.width)), geom.details.get("border")
    if geom.kind == "lines":
        points = np.concatenate([points, points[:1]]) if geom.details["close"] else points
        kind = "line" if len(points) == 2 else "polyline"  # a line keeps a window of its own
        return (kind, width, geom.color), np.concatenate([points[:-1], points[1:]], 1)
    if geom.kind in ("disc", "ring"):
        radius = math.dist(points[0], points[1])
        return (geom.kind, width, geom.color), np.array([[*points[0], radius]])
    if geom.kind == "grid":
        spacing = points[1, 0] - points[0, 0]
        return (geom.kind, width, geom.color), np.array([[*points[0], spacing]])
    if geom.kind == "plot":
        image = geom.details["image"].reshape(-1)
        return (geom.kind, width, geom.color), np.concatenate([points.reshape(-1), image])[None]
    if len(points) == 4:
        side, up = points[2] - points[1], points[0] - points[1]
        if abs(side @ up) < 1e-9 and np.allclose(points[3], points[2] + up):
            size = [np.hypot(*side) / 2, np.hypot(*up) / 2, math.atan2(side[1], side[0])]
            return ("box", style, geom.color), np.array([[*points.mean(0), *size]])
    return ("polygon", style, geom.color, len(points)), points.reshape(1, -1)


def _shape(key: tuple[Any, ...], rows: dict[int, np.ndarray], copies: int, device: Any) -> Shape:
    """A shape from the numbers of the copies that have it; it is transparent in the others."""
    parts, width = max(len(row) for row in rows.values()), next(iter(rows.values())).shape[1]
    table = np.full((copies, parts, width), np.nan)
    for i, row in rows.items():
        table[i, : len(row)] = row
    absent = ~np.isfinite(table).all(-1)  # (B, R)
    kind, style, color = key[:3]
    table[absent] = [0.0, 0.0, -1.0] if kind == "disc" else 0.0  # so that not even a rim shows
    shown = torch.from_numpy(~absent.all(1)).float().to(device)
    look = {"color": color[:3], "alpha": shown * color[3]}
    if kind in ("polygon", "box"):
        look["rim"] = None if style else 0.0
    elif kind not in ("disc", "plot"):
        look["stroke"] = style
    numbers = torch.from_numpy(table).float().to(device)
    span = float(np.ptp(table[..., :2], (0, 1)).max() / 2)
    if kind in ("disc", "ring", "grid"):
        look["reach"] = float(table[..., 2].max())
        return Shape(kind, numbers[..., :2], numbers[..., [2, 2]], span=span, **look)
    if kind == "box":
        look["reach"] = float(np.hypot(table[..., 2], table[..., 3]).max())
        return Shape(kind, numbers[..., :2], numbers[..., 2:4], angle=numbers[..., 4], **look)
    if kind in ("line", "polyline"):
        reach = float(np.hypot(*np.moveaxis(table[..., 2:] - table[..., :2], -1, 0)).max()) / 2
        return _lines(numbers, look | {"reach": reach, "span": span + reach})
    return _area(kind, numbers[:, 0], look)


def _lines(ends: Tensor, look: dict[str, Any]) -> Shape:
    """Lines between pairs of points (B, R, 4)."""
    step = ends[..., 2:] - ends[..., :2]
    length = step.norm(dim=-1) / 2
    half = torch.stack([length, torch.zeros_like(length)], -1)
    angle = torch.atan2(step[..., 1], step[..., 0])
    return Shape("box", ends[..., :2] + step / 2, half, angle=angle, **look)


def _area(kind: str, numbers: Tensor, look: dict[str, Any]) -> Shape:
    """A polygon with corners (B, 2 V), or a plot between two corners, followed by its pixels."""
    corners = numbers[:, : 4 if kind == "plot" else None].unflatten(1, (-1, 2))  # (B, V, 2)
    low, high = corners.amin(1, keepdim=True), corners.amax(1, keepdim=True)
    middle, half = (low + high) / 2, (high - low) / 2
    if kind == "polygon":
        return Shape(kind, middle, half, data=corners - middle, **look)
    image = numbers[:, 4:].view(-1, PLOT_CELLS, PLOT_CELLS, 4).permute(0, 3, 1, 2)
    return Shape(kind, middle, half, data=image, **look)
