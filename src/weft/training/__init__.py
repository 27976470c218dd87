"""Training: the audit, `weft train` from Python (`train`, `preview`, `read_config`, `from_dict`), and the loop of `weft compare`.

    from weft.training import read_config, train
    done = train(read_config("config.yaml", ["optim.lr=1e-3"]))      # done.model, done.adapter, done.evaluation
"""

from importlib import import_module
from typing import Any

_PUBLIC = {"train": "run", "preview": "run", "Trained": "run", "read_config": "config", "from_dict": "config",
           "RunConfig": "config"}


def __getattr__(name: str) -> Any:
    """Imported when asked for: `import weft` needs the audit alone."""
    if name not in _PUBLIC:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_PUBLIC[name]}"), name)


__all__ = [*_PUBLIC]
