"""`weft.save`: writes an adapter into a directory, in the first format that can hold it."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from ..errors import CheckpointError, UnsupportedError
from ..methods import stacked
from ..model.adapter import STALE_NORM, Adapter
from ..model.state import State, state_of
from ..model.wiring import message, problems
from . import files, formats, header
from .checkpoint import Checkpoint
from .from_adapter import checkpoint_of


class FileContents(NamedTuple):
    """The two files of a checkpoint, in memory."""

    tensors: dict[str, Tensor]
    metadata: dict[str, str]
    config: dict[str, Any]


class Disk:
    """Called by `Adapter.save` and `Adapter.nbytes`; model/adapter.py may not import this room."""

    def save(self, model: nn.Module, path: str | Path, name: str, projections: bool) -> Path:
        """See `save`."""
        return save(model, path, name, projections)

    def file_size(self, adapter: Adapter) -> int:
        """Returns the size of the tensors' file in bytes, without writing it."""
        content = files_of(adapter, values=False)
        return files.file_size(content.tensors, content.metadata)


def save(
    model: nn.Module, path: str | Path, name: str = "default", projections: bool = False
) -> Path:
    """Writes the adapter `name` into the directory `path`, which is created if missing, and returns
    the path.

    The directory gets adapter_model.safetensors and adapter_config.json. For LoRA, DoRA, AdaLoRA,
    and for Prefix and PreEmbed of a causal language model, peft reads them too. Of VeRA the
    vectors, the seed and a checksum are saved, with projections=True also A and B, as peft reads
    them. Atomic: if the process is killed, the directory has a checkpoint that loads, the old one
    or the new one. Other files in it are left alone.

    Raises WeftError (no such adapter), CheckpointError (`path` cannot be written, tensors without
    values, NaN, a layer that was replaced after attach or that the model reads and never calls),
    UnsupportedError (projections=True for a method that peft has no form for).
    """
    state = state_of(model)
    adapter = state.adapter(name)
    directory = Path(path).expanduser()
    if directory.exists() and not directory.is_dir():
        raise CheckpointError(f"{str(path)!r} is a file; an adapter is saved into a directory.")
    changed = problems(state, adapter, whole=True)
    if changed:
        raise CheckpointError(f"{message(changed)} Nothing was saved.")
    unread = state.uncalled.problem(adapter)
    if unread is not None:
        raise CheckpointError(f"nothing was saved: {unread}")
    _check_values(adapter)
    _warn_of_others(state)
    content = files_of(adapter, projections)
    try:
        files.write(directory, *content)
    except OSError as error:
        raise CheckpointError(
            f"{str(path)!r} could not be written ({error}). A checkpoint that was there still "
            "loads, and is the old one."
        ) from error
    return directory


def files_of(adapter: Adapter, projections: bool = False, values: bool = True) -> FileContents:
    """Returns both files of an adapter; with values=False the checksums are zeros.

    Raises UnsupportedError if no format can hold it.
    """
    checkpoint = checkpoint_of(adapter, values, projections)
    choose = _choose_with_projections if projections else formats.choose
    form = choose(checkpoint, adapter.model)
    written = form.write(checkpoint, adapter.model)
    metadata = header.metadata_of(checkpoint, form.name, written, values)
    return FileContents(written.tensors, metadata, written.config)


def _choose_with_projections(checkpoint: Checkpoint, model: nn.Module) -> formats.Format:
    among = [each for each in formats.FORMATS if each.stores_projections]
    method = type(checkpoint.config)
    if not any(method in each.methods for each in among):
        raise UnsupportedError(
            f"projections=True stores frozen matrices that layers share, for peft; "
            f"{method.__name__} has none that peft could read. Save without it."
        )
    try:
        return formats.choose(checkpoint, model, among)
    except UnsupportedError as error:
        raise UnsupportedError(f"{error}; save without projections=True.") from None


def _warn_of_others(state: State) -> None:
    """Warns of tensors that train and are of no adapter: a head that was put in after attach."""
    ours = {id(p) for each in state.adapters.values() for p in each.parameters()}
    loose = [n for n, p in state.root.named_parameters() if p.requires_grad and id(p) not in ours]
    if loose:
        more = f" and {len(loose) - 1} more" if len(loose) > 1 else ""
        warnings.warn(
            f"{loose[0]!r}{more} may train (requires_grad) and belong to no adapter, so their values "
            "are not saved. Name their modules in modules_to_save when you attach, or freeze them.",
            stacklevel=3,
        )


def _check_values(adapter: Adapter) -> None:
    shapes = {
        id(p): shape
        for layer in adapter.layers.values()
        for p, shape in zip(
            layer.trainable().values(),
            stacked.shapes(layer.method, layer.full_shape).values(),
            strict=True,
        )
    }
    shapes |= {id(p): tuple(p.shape) for p in adapter.shared_parameters.values()}
    shapes |= {id(s.trained): tuple(s.original.shape) for s in adapter.selected_tensors.values()}
    shapes |= {
        id(layer.get_parameter("rows")): layer.method.shapes(*layer.shape)["rows"]
        for layer in adapter.token_layers.values()
    }
    for name in adapter.stale_layers():
        raise CheckpointError(f"{name!r}: {STALE_NORM} Nothing was saved.")
    for name, p in adapter.named_parameters():
        if p.is_meta:
            raise CheckpointError(f"{name!r} is on the meta device and has no values to save.")
        if tuple(p.shape) != tuple(shapes[id(p)]) or type(p.data) is not torch.Tensor:
            raise CheckpointError(
                f"{name!r} is a {type(p.data).__name__} of shape {list(p.shape)}, and the whole "
                f"tensor has {list(shapes[id(p)])}: a sharded model must gather its tensors before "
                "saving."
            )
        if not bool(p.isfinite().all()):
            raise CheckpointError(
                f"{name!r} holds NaN or infinity; nothing was saved. The last good checkpoint is "
                "intact."
            )
