"""Pictures of comparisons, drawn with matplotlib (extra `eval`) without its global state."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Sequence
from itertools import product
from pathlib import Path
from typing import Any

from ..core.packages import require
from .comparison import ORIGINAL, Panel, Standing

PIXELS = (1800, 800)
"""Width and height of a picture of two panels; one panel has half the width."""
DRAWN_FROM = "Description"
"""Key of the PNG's text that holds the digest of what was drawn."""

_DPI = 150
_STYLES: dict[Standing, dict[str, Any]] = {
    "front": {"color": "#0b6e4f", "markerfacecolor": "#0b6e4f"},
    "open": {"color": "#c77d0a", "markerfacecolor": "white"},
    "beaten": {"color": "#8a8a8a", "markerfacecolor": "#8a8a8a"},
}
_LEGEND: dict[Standing, str] = {"front": "on the front", "open": "may be on the front", "beaten": "beaten"}
# Where a name may stand: points from its marker, and directions. It goes where this sum is least: square pixels
# that it covers, of markers and names many times, of intervals once, and something for each point of distance.
_DISTANCES = (10, 16, 24, 34, 46, 60)
_ANGLES = tuple(math.pi * step / 8 for step in (1, -1, 7, -7, 2, -2, 6, -6, 4, -4, 3, -3, 5, -5, 0, 8))
_SOLID = 8.0
_PER_POINT = 12.0


def require_matplotlib() -> None:
    """Refuse early where no picture can be drawn.

    Raises:
        BackendError: matplotlib is absent or broken.
    """
    for name in ("figure", "backends.backend_agg"):
        require(f"matplotlib.{name}")


def draw(panels: Sequence[Panel], title: str) -> Any:
    """A figure with one or two panels: points with intervals and names, and the Pareto front.

    Args:
        panels: What to show, from the left.
        title: Above all.

    Returns:
        The `matplotlib.figure.Figure`, on an Agg canvas.

    Raises:
        BackendError: matplotlib is absent or broken.
    """
    require_matplotlib()
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    width, height = PIXELS
    figure = Figure(figsize=(width * len(panels) / 2 / _DPI, height / _DPI), dpi=_DPI, layout="constrained")
    FigureCanvasAgg(figure)
    figure.suptitle(title, fontsize=11)
    shown = list(zip(panels, figure.subplots(1, len(panels), squeeze=False)[0], strict=True))
    for panel, axes in shown:
        _plot(axes, panel)
    _legend(figure, panels)
    figure.canvas.draw()  # labels go where there is room, which is known once all else has its place
    figure.set_layout_engine("none")
    for panel, axes in shown:
        _label(axes, panel)
    return figure


def save_picture(panels: Sequence[Panel], title: str, path: Path) -> None:
    """Draw and write a PNG: the same bytes for the same points and version of matplotlib; it names its `digest`.

    Raises:
        BackendError: matplotlib is absent or broken.
    """
    metadata = {"Software": None, DRAWN_FROM: digest(panels, title)}
    draw(panels, title).savefig(path, format="png", dpi=_DPI, metadata=metadata)


def digest(panels: Sequence[Panel], title: str) -> str:
    """SHA-256 of everything that `draw` shows."""
    return hashlib.sha256(repr((title, tuple(panels))).encode()).hexdigest()


def _plot(axes: Any, panel: Panel) -> None:
    """Front, intervals, markers, axes."""
    standing = panel.standings()
    front = sorted((panel.points[name] for name, one in standing.items() if one == "front"), key=lambda p: p[0].value)
    axes.plot(
        [x.value for x, _ in front], [y.value for _, y in front], color="#0b6e4f", alpha=0.5, linewidth=1.2, zorder=1
    )
    for name, (x, y) in panel.points.items():
        style = _STYLES[standing[name]]
        axes.errorbar(
            x.value,
            y.value,
            xerr=[[x.value - x.low], [x.high - x.value]],
            yerr=[[y.value - y.low], [y.high - y.value]],
            fmt="none",
            ecolor=style["color"],
            alpha=0.4,
            elinewidth=0.8,
            capsize=2,
            zorder=2,
        )
        axes.plot(x.value, y.value, **_marker(name == ORIGINAL), **style, linestyle="none", zorder=3)
    axes.set_xlabel(panel.x.label)
    axes.set_ylabel(panel.y.label)
    axes.margins(0.12, 0.12)
    axes.grid(alpha=0.25)
    axes.spines[["top", "right"]].set_visible(False)
    if not panel.y.rising:
        axes.invert_yaxis()  # up is better in every panel
    axes.set_title(f"better is up and to the {'right' if panel.x.rising else 'left'}", fontsize=9)


def _marker(original: bool) -> dict[str, Any]:
    """A star for the original, dots for the others."""
    return {"marker": "*", "markersize": 14} if original else {"marker": "o", "markersize": 7}


def _legend(figure: Any, panels: Sequence[Panel]) -> None:
    """What the colours and the star mean, below all panels."""
    from matplotlib.lines import Line2D

    seen = {one for panel in panels for one in panel.standings().values()}
    entries = [(words, _STYLES[one], False) for one, words in _LEGEND.items() if one in seen]
    entries.append((ORIGINAL, {"color": "black", "markerfacecolor": "white"}, True))
    handles = [
        Line2D([], [], linestyle="none", label=words, **_marker(star), **style) for words, style, star in entries
    ]
    figure.legend(handles=handles, fontsize=8, loc="outside lower center", ncols=len(handles), frameon=False)


def _label(axes: Any, panel: Panel) -> None:
    """Write each name beside its point, where it covers least of what is there."""
    renderer = axes.figure.canvas.get_renderer()
    room = axes.get_window_extent(renderer).extents
    taken: list[tuple[float, Any]] = []
    for x, y in panel.points.values():
        (left, bottom), (right, top), (across, up) = axes.transData.transform(
            [(x.low, y.low), (x.high, y.high), (x.value, y.value)]
        )
        taken.append((_SOLID, (across - 10, up - 10, across + 10, up + 10)))
        taken.append((1.0, (left, up - 3, right, up + 3)))
        taken.append((1.0, (across - 3, min(bottom, top), across + 3, max(bottom, top))))
    for name, (x, y) in panel.points.items():
        best: tuple[float, Any, Any] | None = None
        for distance, angle in product(_DISTANCES, _ANGLES):
            offset = (round(distance * math.cos(angle), 3), round(distance * math.sin(angle), 3))
            text = _annotation(axes, name, (x.value, y.value), offset, line=False)
            box = text.get_window_extent(renderer).extents
            text.remove()
            cost = sum(weight * _overlap(box, other) for weight, other in taken)
            cost += _SOLID * _outside(box, room) + _PER_POINT * distance
            if best is None or cost < best[0]:
                best = (cost, offset, box)
        if best is not None:
            _annotation(axes, name, (x.value, y.value), best[1])
            taken.append((_SOLID, best[2]))


def _annotation(
    axes: Any, name: str, point: tuple[float, float], offset: tuple[float, float], line: bool = True
) -> Any:
    """A name at an offset in points from its point, with a thin line where that is far."""
    far = math.hypot(*offset) > _DISTANCES[0] + 1
    return axes.annotate(
        name,
        point,
        xytext=offset,
        textcoords="offset points",
        ha="center" if abs(offset[0]) < 0.1 else ("left" if offset[0] > 0 else "right"),
        va="center",
        fontsize=8,
        arrowprops={"arrowstyle": "-", "color": "#8a8a8a", "linewidth": 0.5} if line and far else None,
        zorder=4,
    )


def _overlap(one: Sequence[float], other: Sequence[float]) -> float:
    """Square pixels that two boxes (left, bottom, right, top) share."""
    width = min(one[2], other[2]) - max(one[0], other[0])
    height = min(one[3], other[3]) - max(one[1], other[1])
    return max(width, 0.0) * max(height, 0.0)


def _outside(box: Sequence[float], room: Sequence[float]) -> float:
    """Square pixels of a box that are not in the room."""
    return (box[2] - box[0]) * (box[3] - box[1]) - _overlap(box, room)
