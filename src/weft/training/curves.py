"""The curves of a run as a picture."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ..checkpoint import files

# Okabe and Ito's colours, which colour-blind readers can tell apart.
BLUE, ORANGE, GREEN = "#0072B2", "#D55E00", "#009E73"


def draw(rows: Sequence[Mapping[str, Any]], path: Path, title: str) -> bool:
    """Draws the loss (training and evaluation), learning rate and gradient norm by step, and
    returns False if there is nothing to draw.
    """
    train = [row for row in rows if row["kind"] == "train"]
    evaluations = [row for row in rows if row["kind"] == "eval" and "loss" in row]
    if not train:
        return False
    import matplotlib as mpl
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    with mpl.rc_context({"axes.spines.top": False, "axes.spines.right": False, "font.size": 10}):
        figure = Figure(figsize=(8.0, 6.5), dpi=150, layout="constrained")
        FigureCanvasAgg(figure)  # not pyplot: nothing global, no display
        loss, rate, norm = figure.subplots(3, 1, sharex=True, height_ratios=(3, 1, 1))
        steps = [row["step"] for row in train]
        loss.plot(
            steps, [row["loss"] for row in train], color=BLUE, linewidth=1.2, label="training"
        )
        if evaluations:
            loss.plot(
                [row["step"] for row in evaluations],
                [row["loss"] for row in evaluations],
                "o-",
                color=ORANGE,
                label="evaluation",
            )
        loss.set_ylabel("loss")
        loss.set_title(title, fontsize=11)
        loss.legend(frameon=False)
        rate.plot(steps, [row["lr"] for row in train], color=GREEN)
        rate.set_ylabel("learning rate")
        norm.plot(steps, [row["grad_norm"] for row in train], color=BLUE, linewidth=1.0)
        norm.set_ylabel("gradient norm")
        norm.set_xlabel("optimiser step")
        for axes in (loss, rate, norm):
            axes.grid(alpha=0.25)
        files.replace(
            path, lambda file: figure.savefig(file, format="png", metadata={"Software": None})
        )
    return True
