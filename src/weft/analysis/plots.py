"""The plot of the paper: delta M over delta D, one panel per run and role, with the line of the
pooled slope.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from .analyze import EVERY, Analysis, RunAnalysis

PICTURE = "changes.png"
PANEL, DPI = (3.9, 3.1), 150
MARKS = ("o", "s", "^", "D", "v", "P", "X", "*")
GREY = "#666666"
MOST = 8  # rows of panels; for more roles there is one panel


def draw_changes(found: Analysis, out: Path) -> str:
    """Writes the plot into the directory `out` and returns its name. Color is the layer, shape the
    step.
    """
    import matplotlib as mpl
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    roles = [role for role in found.runs[0].relations if role != EVERY] or [EVERY]
    roles = roles if len(roles) <= MOST else [EVERY]
    with mpl.rc_context({"axes.spines.top": False, "axes.spines.right": False, "font.size": 9}):
        size = (PANEL[0] * len(found.runs) + 0.9, PANEL[1] * len(roles) + 0.5)
        figure = Figure(figsize=size, dpi=DPI, layout="constrained")
        FigureCanvasAgg(figure)  # instead of pyplot: no global state, no display
        axes = figure.subplots(len(roles), len(found.runs), squeeze=False)
        shades = None
        for row, role in zip(axes, roles, strict=True):
            for panel, run in zip(row, found.runs, strict=True):
                shades = _panel(panel, run, role)
        if shades is not None:
            bar = figure.colorbar(shades, ax=axes.ravel().tolist(), fraction=0.03, pad=0.01)
            bar.set_label("matrix, first to last in the model")
            bar.set_ticks([])
        temporary = out / f".{PICTURE}.tmp"
        figure.savefig(
            temporary, format="png", metadata={"Software": None}
        )  # without a date: equal data give equal files
        temporary.replace(out / PICTURE)
    return PICTURE


def _panel(axes: Any, run: RunAnalysis, role: str) -> Any:
    points = run.of(role)
    modules = list(dict.fromkeys(p.module for p in points))
    shades = None
    for place, step in enumerate(run.steps):
        at_step = [p for p in points if p.step == step]
        shades = axes.scatter(
            [p.delta_d for p in at_step],
            [p.delta_m for p in at_step],
            marker=MARKS[place % len(MARKS)],
            s=26,
            c=[modules.index(p.module) / max(1, len(modules) - 1) for p in at_step],
            cmap="viridis",
            vmin=0,
            vmax=1,
            alpha=0.85,
            label=f"step {step}",
            linewidths=0,
        )
    pooled = run.relations[role][0]
    title = f"{run.label}: {role}"
    if pooled.r is not None and pooled.slope is not None:
        x, y = np.array([p.delta_d for p in points]), np.array([p.delta_m for p in points])
        ends = np.array([x.min(), x.max()])
        axes.plot(
            ends,
            y.mean() + pooled.slope * (ends - x.mean()),
            color=GREY,
            linewidth=1.2,
            linestyle="--",
            zorder=1,
        )
        title += f"\npooled r = {pooled.r:+.2f}" + (
            f" ({pooled.r_interval[0]:+.2f} to {pooled.r_interval[1]:+.2f})"
            if pooled.r_interval
            else ""
        )
    axes.set_title(title, fontsize=9)
    axes.set_xlabel("ΔD")
    axes.set_ylabel("ΔM")
    axes.grid(alpha=0.25)
    axes.ticklabel_format(style="sci", scilimits=(-3, 3))
    axes.margins(0.08)
    if len(run.steps) <= len(MARKS):
        legend = axes.legend(fontsize=7, frameon=False, loc="best")
        for handle in legend.legend_handles:
            handle.set_array(None)  # otherwise the color map decides
            handle.set_color(GREY)
    return shades
