"""The model card and the picture of a run."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ..checkpoint import files

BLUE, ORANGE, GREEN = (
    "#0072B2",
    "#D55E00",
    "#009E73",
)  # Okabe and Ito's, which colour-blind readers can tell apart
_CLASS = {
    "causal-lm": "AutoModelForCausalLM",
    "classification": "AutoModelForSequenceClassification",
    "image-classification": "AutoModelForImageClassification",
    "regression": "AutoModelForSequenceClassification",
}


def card(record: Mapping[str, Any], adapter: str, peft_reads_it: bool) -> str:
    """README.md of a finished run. `adapter`: the adapter's folder, seen from where the card
    lies.
    """
    config = record["config"]
    method = config["method"]
    base, kind, classes = config["model"]["path"], record["kind"], record["classes"]
    labels = (
        f", num_labels={len(classes)}"
        if classes
        else ", num_labels=1"
        if kind == "regression"
        else ""
    )
    auto = _CLASS[kind]
    lines = [
        "---",
        f"base_model: {base}",
        f"library_name: {'peft' if peft_reads_it else 'weft'}",
        "tags: [weft, " + method["name"].lower() + "]",
        "---",
        "",
        f"# {method['name']} adapter for {base}",
        "",
        (
            f"{record['trained_numbers']:,} trained numbers ({record['head_numbers']:,} of them in "
            "the head), "
            f"{record['steps_done']} of {record['steps']} steps; seed {config['train']['seed']}. "
            "Trained with Weft; all "
            "settings are in `config.yaml` and `run.json` of the run."
        ),
        "",
        "## Load it",
        "",
        "```python",
        "import weft",
        f"from transformers import {auto}",
        "",
        f'model = {auto}.from_pretrained("{base}"{labels})',
        f'weft.load(model, "{adapter}")',
        "```",
        "",
    ]
    if peft_reads_it:
        lines += [
            "With peft:",
            "",
            "```python",
            "from peft import PeftModel",
            "",
            f'model = PeftModel.from_pretrained(model, "{adapter}")',
            "```",
            "",
        ]
    else:
        lines += [
            (
                f"peft has no form for {method['name']} as it is saved here. Where there is one, "
                "`weft export --to peft` "
                f"makes it: `weft export --adapter {adapter} --to peft --out DIR`."
            ),
            "",
        ]
    if classes:
        lines += ["Classes, in the order of the outputs: " + ", ".join(map(str, classes)) + ".", ""]
    lines += [
        "## What was trained on",
        "",
        *_facts(record),
        "",
        "## Result",
        "",
        *_results(record),
        "",
    ]
    return "\n".join(lines)


def _facts(record: Mapping[str, Any]) -> list[str]:
    config = record["config"]
    where = config["task"] or config["data"]["train"]
    optim, train = config["optim"], config["train"]
    rows = {
        "data": f"{where}: {record['samples']} samples, fingerprint {record['identity']['train']}",
        "steps": f"{record['steps']} of {train['batch']} x {train['accumulate']} samples",
        "optimiser": f"AdamW, lr {optim['lr']:g}, {optim['schedule']} with warm-up "
        f"{optim['warm_up']:g}, "
        f"weight decay {optim['weight_decay']:g}",
        "precision": f"{train['precision']}, base weights {config['model']['dtype']}",
    }
    return [f"- {name}: {text}" for name, text in rows.items()] + [
        f"- {note}" for note in record["notes"]
    ]


def _results(record: Mapping[str, Any]) -> list[str]:
    rows = (
        [f"- training loss of the last logged step: {record['last_loss']:.4f}"]
        if record.get("last_loss")
        else []
    )
    chosen = record.get("evaluation")
    if not chosen:
        return [*rows, "- no evaluation data was given"]
    which = (
        "best by " + record["config"]["eval"]["best"]
        if record["config"]["eval"]["best"]
        else "last"
    )
    numbers = ", ".join(
        f"{key} {value:.4f}"
        for key, value in chosen.items()
        if isinstance(value, float) and key not in ("epoch",)
    )
    return [*rows, f"- evaluation ({which}, step {chosen['step']}): {numbers}"]


def draw(rows: Sequence[Mapping[str, Any]], path: Path, title: str) -> bool:
    """Loss (training and evaluation), learning rate and gradient norm over the steps; False where
    there is nothing.
    """
    train = [row for row in rows if row["kind"] == "train"]
    held = [row for row in rows if row["kind"] == "eval" and "loss" in row]
    if not train:
        return False
    import matplotlib as mpl
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    with mpl.rc_context({"axes.spines.top": False, "axes.spines.right": False, "font.size": 10}):
        figure = Figure(figsize=(8.0, 6.5), dpi=150, layout="constrained")
        FigureCanvasAgg(figure)  # not pyplot: nothing global, no display
        above, rate, norm = figure.subplots(3, 1, sharex=True, height_ratios=(3, 1, 1))
        steps = [row["step"] for row in train]
        above.plot(
            steps, [row["loss"] for row in train], color=BLUE, linewidth=1.2, label="training"
        )
        if held:
            above.plot(
                [row["step"] for row in held],
                [row["loss"] for row in held],
                "o-",
                color=ORANGE,
                label="evaluation",
            )
        above.set_ylabel("loss")
        above.set_title(title, fontsize=11)
        above.legend(frameon=False)
        rate.plot(steps, [row["lr"] for row in train], color=GREEN)
        rate.set_ylabel("learning rate")
        norm.plot(steps, [row["grad_norm"] for row in train], color=BLUE, linewidth=1.0)
        norm.set_ylabel("gradient norm")
        norm.set_xlabel("optimiser step")
        for axes in (above, rate, norm):
            axes.grid(alpha=0.25)
        files.replace(
            path, lambda place: figure.savefig(place, format="png", metadata={"Software": None})
        )
    return True
