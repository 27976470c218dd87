"""Training: `weft train`, and the same from Python.

`train(read_config("config.yaml", ["optim.lr=1e-3"]))` trains and returns a `Trained` with `.model`,
`.adapter` and `.evaluation`. `preview` shows samples as the model reads them. `from_dict` takes
plain values in place of a file.

run.py        one run, from top to bottom
config/       the configuration
data.py       samples from files, the hub or a task (formats.py: their columns); pictures.py: images
prepare.py    tokenizer and encoded samples; checks.py: what would fail later
adapted.py    the model with its adapter; start.py: an adapter to begin with
loop.py       the Trainer (trainer.py) with Weft's callbacks (callbacks.py, log.py, reports.py)
losses.py, optimizer.py, sampling.py    what is minimised, by which rates, in which order
run_dir.py, record.py, resume.py        the run's directory and its checkpoints
result.py, best.py, card.py, curves.py  the end of a run
"""

from importlib import import_module
from typing import Any

_PUBLIC = {
    "train": "run",
    "preview": "previews",
    "Trained": "run",
    "read_config": "config",
    "from_dict": "config",
    "RunConfig": "config",
}


def __getattr__(name: str) -> Any:
    """Imports a public name on first use."""
    if name not in _PUBLIC:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_PUBLIC[name]}"), name)


__all__ = ["RunConfig", "Trained", "from_dict", "preview", "read_config", "train"]
