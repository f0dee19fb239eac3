"""Names written beside points, so that none covers another, a point or its bar.

Points that cover each other share one block of names, the uppermost first. A block that had to move away from its
points gets a thin line to them.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from matplotlib.axes import Axes
from matplotlib.patheffects import withStroke
from matplotlib.transforms import Bbox

FONT, LINE, MARK = 10, 13, 6  # points (1/72 inch): size of a name, height of its line, half of a mark
NEAR, STEP, RINGS, DIRECTIONS = 9, 8, 16, 24  # how far from its points a block stands, and where else it is tried
CROSSING, COVERING = 2500, 10  # costs: a line over a name or a point; a pixel that covers one or leaves the axes
HALO = [withStroke(linewidth=2.5, foreground="white")]  # keeps a name legible over grid lines

# Where a block is tried: cost, direction and distance, the least cost first. Nearer costs less, to the right the least.
PLACES = sorted(
    (60 * ring + 10 * (1 - math.cos(angle)) + 10 * abs(math.sin(angle)), math.cos(angle), math.sin(angle), away)
    for ring, away in enumerate(range(NEAR, NEAR + STEP * RINGS, STEP))
    for angle in (2 * math.pi * k / DIRECTIONS for k in range(DIRECTIONS))
)


class Label(NamedTuple):
    """A name for the point (x, y), in data coordinates, from which a bar reaches so far up and down."""

    x: float
    y: float
    bar: float
    name: str
    colour: str


def place_labels(axes: Axes, labels: Sequence[Label]) -> None:
    """Write labels beside their points; the axes have been laid out and keep their limits."""
    scale = axes.figure.dpi / 72
    taken = [box for label in labels for box in _covered_by(axes, label, scale)]
    for group in _groups(axes, labels, 1.4 * MARK * scale):
        x, y = _pixels(axes, group).mean(axis=0)
        width = max(_width(axes, label) for label in group) / 2 + 2 * scale
        height = LINE * scale * len(group) / 2
        box = _best_place((x, y), width, height, taken, axes)
        if _gap(box, x, y) > 1.5 * NEAR * scale:
            ends = axes.transData.inverted().transform([(x, y), _nearest(box, x, y)])
            axes.plot(*ends.T, lw=0.8, color="#9aa5b1", zorder=1, scalex=False, scaley=False)
        side = "left" if box.x0 >= x else "right" if box.x1 <= x else "center"
        at = {"left": box.x0 + 2 * scale, "right": box.x1 - 2 * scale, "center": (box.x0 + box.x1) / 2}[side]
        for line, label in enumerate(group):
            place = axes.transData.inverted().transform((at, box.y1 - LINE * scale * (line + 0.5)))
            axes.text(*place, label.name, color=label.colour, fontsize=FONT, ha=side, va="center", path_effects=HALO)
        taken += [box, *_along((x, y), _nearest(box, x, y), scale)]


def _groups(axes: Axes, labels: Sequence[Label], near: float) -> list[list[Label]]:
    """Return labels whose points are nearer than `near` pixels to one of their group, the largest group first."""
    groups: list[list[Label]] = []
    for label in labels:
        own = _pixels(axes, [label])
        touched = [group for group in groups if np.hypot(*(_pixels(axes, group) - own).T).min() < near]
        groups = [group for group in groups if group not in touched]
        groups.append([*(each for group in touched for each in group), label])
    return [sorted(group, key=lambda each: -each.y) for group in sorted(groups, key=len, reverse=True)]


def _best_place(point: tuple[float, float], width: float, height: float, taken: Sequence[Bbox], axes: Axes) -> Bbox:
    """Return the box of half `width` and half `height` near a point that costs least."""
    inside, scale, least, best = axes.get_window_extent(), axes.figure.dpi / 72, math.inf, None
    for cost, dx, dy, away in PLACES:
        if cost >= least:
            break
        x, y = point[0] + dx * (away * scale + width), point[1] + dy * (away * scale + height)
        box = _around(x, y, width, height)
        lost = 4 * width * height - _shared(box, inside) + sum(_shared(box, other) for other in taken)
        cost += COVERING * lost
        if cost < least:
            line = _along(point, _nearest(box, *point), scale)
            cost += CROSSING * sum(any(_shared(piece, other) for piece in line) for other in taken)
        if cost < least:
            least, best = cost, box
    return best


def _covered_by(axes: Axes, label: Label, scale: float) -> list[Bbox]:
    """Return the boxes of a point's mark and of its bar."""
    (x, y), (_, top) = axes.transData.transform([(label.x, label.y), (label.x, label.y + label.bar)])
    return [_around(x, y, MARK * scale, MARK * scale), _around(x, y, 4 * scale, max(top - y, 1))]


def _along(start: tuple[float, float], end: tuple[float, float], scale: float) -> list[Bbox]:
    """Return small boxes along a line, but for its beginning, which lies on the point's own mark."""
    length = math.dist(start, end)
    steps = np.arange(2 * MARK * scale, length, 4 * scale) / max(length, 1)
    return [_around(*(np.array(start) + t * (np.array(end) - start)), scale, scale) for t in steps]


def _pixels(axes: Axes, labels: Sequence[Label]) -> np.ndarray:
    return axes.transData.transform([(label.x, label.y) for label in labels])


def _width(axes: Axes, label: Label) -> float:
    """Return how wide a name is, in pixels."""
    text = axes.text(label.x, label.y, label.name, fontsize=FONT)
    width = text.get_window_extent().width
    text.remove()
    return width


def _around(x: float, y: float, width: float, height: float) -> Bbox:
    return Bbox.from_extents(x - width, y - height, x + width, y + height)


def _shared(one: Bbox, other: Bbox) -> float:
    """Return the area in pixels that two boxes share."""
    width = min(one.x1, other.x1) - max(one.x0, other.x0)
    height = min(one.y1, other.y1) - max(one.y0, other.y0)
    return width * height if width > 0 and height > 0 else 0.0


def _nearest(box: Bbox, x: float, y: float) -> tuple[float, float]:
    """Return the point of a box that is nearest to (x, y)."""
    return min(max(x, box.x0), box.x1), min(max(y, box.y0), box.y1)


def _gap(box: Bbox, x: float, y: float) -> float:
    return math.dist(_nearest(box, x, y), (x, y))
