"""`weft.save`: one directory an adapter, in peft's layout where peft has the method."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from .. import methods
from ..errors import CheckpointError, UnsupportedError
from ..model.adapter import Adapter
from ..model.state import state_of
from . import files, header, native, peft_adalora, peft_common, peft_lora, peft_prompt, peft_vera

NATIVE = "native"


@dataclass(frozen=True)
class Written:
    """The two files of a checkpoint, in memory."""

    tensors: dict[str, Tensor]
    metadata: dict[str, str]
    config: dict[str, Any]


class Disk:
    """What `Adapter.save` and `Adapter.nbytes` call (model/adapter.py may not import this room)."""

    def save(self, model: nn.Module, path: str | Path, name: str, projections: bool) -> Path:
        return save(model, path, name, projections)

    def file_size(self, adapter: Adapter) -> int:
        written = compose(adapter, values=False)
        return files.file_size(written.tensors, written.metadata)


def save(
    model: nn.Module, path: str | Path, name: str = "default", projections: bool = False
) -> Path:
    """Write the adapter `name` into the directory `path` (created where missing) and return the
    path.

    adapter_model.safetensors and adapter_config.json: for LoRA, DoRA, AdaLoRA, and for Prefix and
    PreEmbed of a causal language model, what peft reads too; for VeRA vectors, seed and checksum,
    or with projections=True also A and B, as peft reads them. Atomic: killed at any point, the
    directory holds a checkpoint that loads, the old one or the new one. Other files in it are left
    alone.

    Raises WeftError (no such adapter), CheckpointError (the place cannot be written, tensors
    without values, NaN), UnsupportedError (projections=True for what peft has no form for).
    """
    adapter = state_of(model).adapter(name)
    directory = Path(path).expanduser()
    if directory.exists() and not directory.is_dir():
        raise CheckpointError(f"{str(path)!r} is a file; an adapter is saved into a directory.")
    _check_values(adapter)
    written = compose(adapter, projections)
    try:
        files.write(directory, written.tensors, written.metadata, written.config)
    except OSError as error:
        raise CheckpointError(
            f"{str(path)!r} could not be written ({error}). A checkpoint that was there still "
            "loads, "
            "and is the old one."
        ) from error
    return directory


def compose(adapter: Adapter, projections: bool = False, values: bool = True) -> Written:
    """Both files of an adapter; values=False leaves checksums at zero."""
    config = adapter.config
    if projections and type(config) is not methods.VeRA:
        raise UnsupportedError(
            f"projections=True stores VeRA's A and B for peft; {type(config).__name__} has none "
            "that "
            "peft could read. Save without it."
        )
    if type(config) in (methods.LoRA, methods.DoRA):
        layout, (tensors, beside) = peft_lora.PEFT_TYPE, peft_lora.write(adapter)
    elif type(config) is methods.VeRA and (projections or config.draw == "stored"):
        layout, (tensors, beside) = peft_vera.PEFT_TYPE, peft_vera.write(adapter)
    elif isinstance(config, methods.AdaLoRA) and peft_adalora.why_not(adapter) is None:
        layout, (tensors, beside) = peft_adalora.PEFT_TYPE, peft_adalora.write(adapter)
    elif (codec := peft_prompt.codec_of(adapter)) is not None:
        tensors, beside = codec.write(adapter)
        return Written(
            tensors, header.make(adapter, codec.PEFT_TYPE, tensors, [], beside, values), beside
        )
    else:
        layout, (tensors, selected) = NATIVE, native.write(adapter)
        # A type that peft does not know makes it refuse the directory rather than misread it.
        beside = {
            "peft_type": f"WEFT_{type(config).__name__.upper()}",
            "weft": methods.to_json(header.said(adapter)),
        }
    if layout != NATIVE:
        selected, repeated = peft_common.base_tensors(adapter)
        tensors |= {peft_common.PREFIX + key: t for key, t in {**repeated, **selected}.items()}
    return Written(
        tensors, header.make(adapter, layout, tensors, list(selected), beside, values), beside
    )


def _check_values(adapter: Adapter) -> None:
    shapes = {
        id(p): shape
        for site in adapter.layers.values()
        for p, shape in zip(
            site.trainable().values(), site.method.shapes(*site.shape).values(), strict=True
        )
    }
    shapes |= {id(p): tuple(p.shape) for p in adapter.shared_parameters.values()}
    shapes |= {id(s.trained): tuple(s.original.shape) for s in adapter.selected_tensors.values()}
    for name, p in adapter.named_parameters():
        if p.is_meta:
            raise CheckpointError(f"{name!r} is on the meta device and has no values to save.")
        if tuple(p.shape) != tuple(shapes[id(p)]) or type(p.data) is not torch.Tensor:
            raise CheckpointError(
                f"{name!r} is a {type(p.data).__name__} of shape {list(p.shape)}, and the whole "
                "tensor "
                f"has {list(shapes[id(p)])}: a sharded model must gather its tensors before saving."
            )
        if not bool(p.isfinite().all()):
            raise CheckpointError(
                f"{name!r} holds NaN or infinity; nothing was saved. The last good checkpoint is "
                "intact."
            )
