"""`weft.export`: writes an adapter's directory in another form, without a model, and measures the
error.

Every conversion is exact in mathematics; the error is the rounding of the numbers written.
Approximations are refused.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from .. import methods
from ..errors import CheckpointError, ConfigError, UnsupportedError
from . import files, formats, header
from .checkpoint import Checkpoint
from .conversions import FORMS, check_fixed, conversion, factors
from .directories import is_taken, new_directory
from .problems import refuse
from .read import read
from .tokenizer_files import copy_tokenizer


@dataclass(frozen=True)
class Exported:
    """The result of an export. `error`: largest ‖delta written - delta read‖ / ‖delta read‖ of a
    layer, in float64.
    """

    path: str
    method: str
    to: str
    layers: int
    nbytes: int
    error: float
    notes: tuple[str, ...] = ()

    def __str__(self) -> str:
        head = (
            f"{self.method} of {self.layers} layers, now {self.to}: {self.nbytes:,} bytes; updates "
            f"differ by {self.error:.1e} (relative, measured)"
        )
        return "\n".join([head, *(f"note: {note}" for note in self.notes)])


def export(path: str | Path, to: str, out: str | Path) -> Exported:
    """Writes the adapter in the directory `path` into the directory `out` in the form `to`.

    to="lora": plain LoRA, for every low-rank method without magnitudes (of AdaLoRA the triplets in
    force). to="peft": a form that peft reads: LoRA, DoRA and AdaLoRA unchanged, VeRA with its
    matrices, and the same LoRA for the others. The adapter's tokenizer goes along. The result is
    read again, and its updates are compared with the original's, layer by layer.

    Raises ConfigError (an unknown form), UnsupportedError (the method has no such form, with the
    reason), and CheckpointError (the file is damaged, `out` is not empty or cannot be written).
    """
    if to not in FORMS:
        raise ConfigError(f"export(to={to!r}): to must be one of {list(FORMS)}.")
    source, target = Path(path).expanduser(), Path(out).expanduser()
    if is_taken(target):
        raise CheckpointError(f"{str(out)!r} exists and is not empty; give a new directory.")
    checkpoint = read(source)
    refuse(source, checkpoint.problems)
    if checkpoint.naming is not None:
        raise UnsupportedError(
            f"this file of {checkpoint.writer} does not have the names of the model's modules. weft.load "
            "it onto its model and weft.save it; that can be exported."
        )
    check_fixed(checkpoint)
    notes = list(checkpoint.notes)
    if _has_form(checkpoint, to):
        found = files.find(source)
        content = (*files.read_tensors(found.tensors), files.read_config(_config_file(found)))
    else:
        content = _converted(checkpoint, to)
        notes += _conversion_notes(checkpoint)
    try:
        with new_directory(target) as temporary:
            files.write(temporary, *content)
            copy_tokenizer(source, temporary)
    except OSError as error:
        raise CheckpointError(f"{str(out)!r} could not be written ({error}).") from error
    again = read(target)
    refuse(target, again.problems)
    size = files.find(target).tensors.stat().st_size
    return Exported(
        str(out),
        type(checkpoint.config).__name__,
        type(again.config).__name__,
        len(again.sites),
        size,
        _error(checkpoint, again),
        tuple(notes),
    )


def _config_file(found: files.FoundFiles) -> Path:
    if found.config is None:
        raise CheckpointError(
            f"{found.tensors.parent} has no {files.CONFIG}; load the adapter and save it again."
        )
    return found.config


def _has_form(checkpoint: Checkpoint, to: str) -> bool:
    """The file has the form already. Files of VeRA are always written again, with A and B."""
    if to == "lora":
        return type(checkpoint.config) is methods.LoRA and checkpoint.peft_reads_it
    shared = any(layer.rule.share_key() is not None for layer in checkpoint.sites.values())
    return checkpoint.peft_reads_it and not shared


def _converted(checkpoint: Checkpoint, to: str) -> tuple[Any, Any, Any]:
    """Tensors, header and configuration in the new form."""
    convert = conversion(checkpoint, to)
    if convert is None:
        raise UnsupportedError(_why_not(checkpoint.config, to))
    new = convert(checkpoint)
    try:
        form = formats.choose(new, among=[f for f in formats.FORMATS if f.peft_reads_it])
    except UnsupportedError as error:
        other = next((f for f in FORMS if conversion(checkpoint, f) not in (None, convert)), "")
        hint = f" Export to {other!r}." if other else ""
        raise UnsupportedError(f"{error}.{hint}") from None
    written = form.write(new)
    return written.tensors, header.metadata_of(new, form.name, written), written.config


def _why_not(config: Any, to: str) -> str:
    name = type(config).__name__
    own_tensors = isinstance(config, methods.TensorConfig)
    if not own_tensors:
        return (
            f"{name} trains copies of base tensors and has no form {to!r}; use weft merge, which "
            "writes a plain model."
        )
    if not config.mergeable:
        why = config.not_mergeable if to == "lora" else "peft has no form for it as it is"
        return f"{name} cannot be exported to {to!r}: it is no change of weights; {why}."
    if to == "peft":
        why = "peft has no such method; weft merge writes it into the weights of a plain model"
    elif isinstance(config, methods.LowRankMethod):
        why = (
            "its magnitudes rescale the rows of the base weight itself, which no product of two "
            "thin matrices can do; weft merge writes it into the weights"
        )
    else:
        why = "its update is no product of two thin matrices; weft merge writes it into the weights"
    return f"{name} cannot be exported to {to!r}: {why}."


def _conversion_notes(checkpoint: Checkpoint) -> list[str]:
    empty = [
        module
        for module, layer in checkpoint.sites.items()
        if "lam" in layer.tensors and not layer.tensors["lam"].any()
    ]
    notes = []
    if empty:
        notes.append(f"{len(empty)} layers keep no triplet and are left out, {empty[0]!r} first")
    if checkpoint.tokens:
        notes.append("the rows of new tokens go along")
    if checkpoint.selected:
        notes.append("the head or other modules trained in full go along")
    return notes


def _error(before: Checkpoint, after: Checkpoint) -> float:
    """Largest relative difference of a layer's update. With m there is no update; then the tensors
    are compared bit for bit.
    """
    worst = 0.0
    for module, layer in before.sites.items():
        low_rank = isinstance(layer.rule, methods.LowRankMethod)
        f = factors(before, module) if low_rank else None
        if f is None or f.m is not None:
            same = all(
                torch.equal(t, after.sites[module].tensors[name])
                for name, t in layer.tensors.items()
            )
            worst = max(worst, 0.0 if same else float("inf"))
            continue
        wanted = f.delta(torch.float64)
        size = float(wanted.norm())
        left_out = module not in after.sites
        found = 0 * wanted if left_out else factors(after, module).delta(torch.float64)
        worst = max(worst, float((found - wanted).norm()) / (size or 1.0))
    same = before.tokens.keys() == after.tokens.keys() and all(
        torch.equal(rows, after.tokens[module]) for module, rows in before.tokens.items()
    )
    return worst if same else float("inf")
