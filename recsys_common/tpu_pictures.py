"""What does a TPU look like, to somebody who has to fit a model into it?

    systolic(axis, 128, rows=8192, columns=64)         # how much of a matrix unit a product uses
    lanes(axis, [8, 16, 64, 128, 129])                 # what a row of an embedding table fills of its tiles
    torus(axis, 4, 4)                                  # how the chips of a slice are wired
    roofline(axis, machines, points)                   # what bounds a step where

Each draws on a Matplotlib axis and returns it. The numbers are arguments: they come from chips.json and from reports.

Needs: nothing else.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np


def systolic(axis, side: int, rows: int, columns: int):
    """A matrix unit of side x side multipliers that holds a [rows, columns] part of a weight matrix, to scale.

    Weights stay where they are; the batch flows in from the left, sums flow out at the bottom. What the matrix does
    not reach of the unit multiplies zeros, and takes as long.
    """
    used = min(rows, side) * min(columns, side) / side**2
    axis.add_patch(_box(0, 0, side, side, "0.9"))
    axis.add_patch(_box(0, side - min(rows, side), min(columns, side), side, "tab:blue"))
    for place in np.linspace(0, side, 5)[:-1] + side / 8:
        axis.annotate("", (0, place), (-side / 5, place), arrowprops={"arrowstyle": "->", "color": "tab:orange"})
        axis.annotate("", (place, -side / 5), (place, 0), arrowprops={"arrowstyle": "->", "color": "tab:green"})
    axis.text(-side / 4, side / 2, "batch", rotation=90, ha="right", va="center", color="tab:orange")
    axis.text(side / 2, -side / 4, "sums", ha="center", va="top", color="tab:green")
    axis.set(title=f"weights [{rows}, {columns}]: {used:.0%} used", xlim=(-side / 2, side), ylim=(-side / 2, side))
    axis.set_aspect("equal")
    axis.axis("off")
    return axis


def lanes(axis, dims: Sequence[int], width: int = 128):
    """Rows of so many numbers in a memory whose rows have `width` lanes: numbers in blue, padding in grey."""
    for place, dim in enumerate(dims):
        stored = math.ceil(dim / width) * width
        axis.barh(place, stored, color="0.85", edgecolor="white")
        axis.barh(place, dim, color="tab:blue", edgecolor="white")
        axis.text(stored + 4, place, f"{dim / stored:.0%}", va="center")
    axis.set_yticks(range(len(dims)), [f"{dim} numbers" for dim in dims])
    axis.set(xlabel="lanes of 32 bits that a row takes", xlim=(0, 2.3 * width))
    axis.set_xticks(range(0, 2 * width + 1, width // 2))
    axis.invert_yaxis()
    axis.spines[["top", "right"]].set_visible(False)
    return axis


def torus(axis, width: int, height: int):
    """Chips of a slice, each wired to four neighbours; a slice that is a whole ring wraps around (dotted)."""
    for x in range(width):
        for y in range(height):
            axis.plot([x, x + (x < width - 1)], [y, y], color="tab:orange", zorder=1)
            axis.plot([x, x], [y, y + (y < height - 1)], color="tab:orange", zorder=1)
            axis.scatter(x, y, s=420, marker="s", color="tab:blue", zorder=2)
    for place in range(height):
        axis.plot(
            [-0.6, 0], [place, place], [width - 1, width - 0.4], [place, place], color="tab:orange", ls=":", zorder=1
        )
    for place in range(width):
        axis.plot(
            [place, place], [-0.6, 0], [place, place], [height - 1, height - 0.4], color="tab:orange", ls=":", zorder=1
        )
    axis.set(title=f"{width} x {height} chips", xlim=(-0.8, width - 0.2), ylim=(-0.8, height - 0.2))
    axis.set_aspect("equal")
    axis.axis("off")
    return axis


def roofline(axis, machines: dict[str, dict], points: Sequence[tuple[str, float, str]]):
    """What each machine reaches at each number of FLOPs per byte, and where steps stand on it.

    Args:
      machines: name -> {"flops", "bandwidth"}, a second.
      points: (name, FLOPs per byte, machine): steps.
    """
    intensity = np.logspace(-2, 4, 200)
    colors = {}
    for number, (name, rates) in enumerate(machines.items()):
        reached = np.minimum(rates["flops"], intensity * rates["bandwidth"])
        [line] = axis.plot(intensity, reached, color=f"C{number}", label=name)
        colors[name] = line.get_color()
    names = dict.fromkeys(name for name, _, _ in points)
    marks = dict(zip(names, "osD^vP*X", strict=False))
    for name, at, machine in points:
        reached = min(machines[machine]["flops"], at * machines[machine]["bandwidth"])
        axis.scatter(at, reached, color=colors[machine], marker=marks[name], s=60, edgecolor="white", zorder=3)
    for name, mark in marks.items():
        axis.scatter([], [], color="0.3", marker=mark, label=name)
    axis.set(xscale="log", yscale="log", xlabel="FLOPs for each byte of memory traffic", ylabel="FLOP/s, at most")
    axis.grid(alpha=0.3)
    axis.legend(fontsize=8, loc="lower right")
    return axis


def _box(left: float, bottom: float, right: float, top: float, color: str):
    from matplotlib.patches import Rectangle

    return Rectangle((left, bottom), right - left, top - bottom, facecolor=color, edgecolor="white")
