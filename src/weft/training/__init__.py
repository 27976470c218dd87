"""Training: the audit, what `weft train` does from Python, and the loop of `weft compare`.

`train(read_config("config.yaml", ["optim.lr=1e-3"]))` trains and returns a `Trained` with `.model`,
`.adapter` and `.evaluation`; `preview` shows what would be trained on; `from_dict` takes plain
values in place of a file.
"""

from importlib import import_module
from typing import Any

_PUBLIC = {
    "train": "run",
    "preview": "run",
    "Trained": "run",
    "read_config": "config",
    "from_dict": "config",
    "RunConfig": "config",
}


def __getattr__(name: str) -> Any:
    """Imported when asked for: `import weft` needs the audit alone."""
    if name not in _PUBLIC:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_PUBLIC[name]}"), name)


__all__ = ["RunConfig", "Trained", "from_dict", "preview", "read_config", "train"]
