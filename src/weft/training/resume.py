"""Checkpoints for resuming: their files, whether one is whole, and whether it belongs to this run.

    checkpoint-N/   adapter_model.safetensors, adapter_config.json   the adapter, in the format of weft.save
                    weft_state.safetensors                           the method's training state
                    optimizer.pt scheduler.pt rng_state.pth trainer_state.json     the Trainer's
                    complete.json                                    sizes and checksums of all these, written last

complete.json is renamed into place when all else is on the disk. A folder without it is incomplete
and never used.
"""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from ..checkpoint import files
from ..checkpoint.load import load
from ..errors import CheckpointError, ConfigError
from ..model.adapter import Adapter
from ..model.detach import detach
from ..model.state import state_of
from ..untrusted.regular_files import sha256_of

STATE, COMPLETE = "weft_state.safetensors", "complete.json"
_NAME = re.compile(r"checkpoint-(\d+)")
# Keys that may differ when a run is resumed: paths (the contents are compared), the device, and what
# is only logged or kept.
MAY_DIFFER = (
    "out",
    "model.path",
    "model.tokenizer",
    "adapter.start",
    "audit",
    "data.train",
    "data.eval",
    "data.chat_template",
    "data.config",
    "data.split",
    "data.eval_split",
    "data.columns",
    "data.ignore",
    "train.device",
    "eval.batch",
    "save",
    "log",
)


def write_state(adapter: Adapter, folder: Path) -> None:
    """Writes the method's training state, and the names of the trained tensors in the optimiser's
    order.
    """
    names = json.dumps([name for name, _ in adapter.named_parameters()])
    tensors = {name: t.cpu().contiguous() for name, t in adapter.training_state().items()}
    files.replace(
        folder / STATE, lambda path: save_file(tensors, str(path), metadata={"trained": names})
    )


@torch.no_grad()
def read_state(adapter: Adapter, folder: Path) -> None:
    """Copies a checkpoint's tensors and training state into an attached adapter. Raises
    CheckpointError if they do not fit.
    """
    refill(adapter, folder)
    tensors, metadata = files.read_tensors(folder / STATE)
    mine = [name for name, _ in adapter.named_parameters()]
    if json.loads(metadata.get("trained", "[]")) != mine:
        raise CheckpointError(
            f"{folder} was saved with other trained tensors, or with these in another order."
        )
    adapter.load_training_state(tensors)


@torch.no_grad()
def refill(adapter: Adapter, folder: Path) -> None:
    """Copies the trained tensors of a saved adapter into `adapter`, whose Parameters stay the same
    objects. Raises CheckpointError if they do not fit.
    """
    model, name = adapter.model, "weft-refill"
    stored = load(model, folder, name=name)
    try:
        theirs, mine = dict(stored.named_parameters()), dict(adapter.named_parameters())
        if theirs.keys() != mine.keys():
            odd = sorted(theirs.keys() ^ mine.keys())
            raise CheckpointError(
                f"{folder} and this run train different tensors; on one side only: {odd[:6]}."
            )
        for key, parameter in mine.items():
            parameter.copy_(theirs[key])
        for module, layer in adapter.layers.items():
            for tensor in layer.start_names:  # what training began at, for the run that goes on
                layer.get_buffer(tensor).copy_(stored.layers[module].get_buffer(tensor))
    finally:
        detach(model, name)
        state_of(model).set_default(adapter.name)


def complete(folder: Path) -> None:
    """Flushes all files of the folder, then writes complete.json with their checksums."""
    listed = {}
    for path in sorted(folder.rglob("*")):
        if path.is_file() and path.name != COMPLETE:
            files.flush(path)
            listed[str(path.relative_to(folder))] = {
                "bytes": path.stat().st_size,
                "sha256": sha256_of(path),
            }
    files.flush(folder)
    text = json.dumps({"schema": 1, "files": listed}, indent=1) + "\n"
    files.replace(folder / COMPLETE, lambda path: path.write_text(text, encoding="utf-8"))
    files.flush(folder.parent)


def newest(folder: Path) -> tuple[Path, int] | None:
    """Returns the whole checkpoint with the most steps, and its step, or None. Damaged ones are
    ignored.
    """
    return next(((path, step) for step, path in _numbered(folder) if is_whole(path)), None)


def is_whole(folder: Path) -> bool:
    """Whether complete.json exists and every file in it has the listed size and checksum."""
    try:
        listed = json.loads((folder / COMPLETE).read_text(encoding="utf-8"))["files"]
        return all(
            (folder / name).stat().st_size == entry["bytes"]
            and sha256_of(folder / name) == entry["sha256"]
            for name, entry in listed.items()
        )
    except (OSError, ValueError, KeyError, TypeError):
        return False


def prune(folder: Path, keep: int | None) -> None:
    """Removes all but the `keep` newest whole checkpoints (None: all), and incomplete ones."""
    kept = 0
    for _, path in _numbered(folder):
        if (path / COMPLETE).is_file() and (keep is None or kept < keep):
            kept += 1
        else:
            shutil.rmtree(path, ignore_errors=True)


def check_same(before: Mapping[str, Any], now: Mapping[str, Any], where: Path) -> None:
    """Raises ConfigError, naming the difference, unless two identities of a run are the same."""
    for key, text in (
        ("model", "the model's weights"),
        ("train", "the training data"),
        ("eval", "the evaluation data"),
        ("start", "the tensors of adapter.start"),
        ("processes", "the numbers of processes"),
    ):
        if before.get(key) != now.get(key):
            raise ConfigError(
                f"{where} has a run in which {text} differ: {before.get(key)} there, "
                f"{now.get(key)} here. Use those it was started with, or give another out."
            )
    theirs, mine = before["trained"], now["trained"]
    odd = [name for name in {**theirs, **mine} if theirs.get(name) != mine.get(name)]
    if odd:
        there, here = (side.get(odd[0], "not trained") for side in (theirs, mine))
        raise ConfigError(
            f"{where} has a run that trains other tensors: {odd[0]!r} is {there} there and {here} "
            f"here ({len(odd)} differ)."
        )


def check_config(before: Mapping[str, Any], now: Mapping[str, Any], where: Path) -> None:
    """Raises ConfigError, naming the key, if a key of the resolved configuration differs that must
    not.
    """
    theirs, mine = flat(before), flat(now)
    for key in {**theirs, **mine}:
        free = any(key == name or key.startswith(name + ".") for name in MAY_DIFFER)
        if not free and theirs.get(key) != mine.get(key):
            raise ConfigError(
                f"{where} has a run with {key}={theirs.get(key)!r}, and this one has "
                f"{mine.get(key)!r}. Resume with what it was started with, or give another out."
            )


def flat(data: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Returns nested mappings with dotted keys: {"a": {"b": 1}} as {"a.b": 1}."""
    out: dict[str, Any] = {}
    for key, value in data.items():
        out |= (
            flat(value, f"{prefix}{key}.")
            if isinstance(value, Mapping)
            else {f"{prefix}{key}": value}
        )
    return out


def _numbered(folder: Path) -> list[tuple[int, Path]]:
    found = [
        (int(match[1]), path)
        for path in (folder.iterdir() if folder.is_dir() else ())
        if (match := _NAME.fullmatch(path.name)) and path.is_dir()
    ]
    return sorted(found, reverse=True)
