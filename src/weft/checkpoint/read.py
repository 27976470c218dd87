"""Reads an adapter's directory without a model."""

from __future__ import annotations

from pathlib import Path

from torch import Tensor

from ..errors import CheckpointError, ConfigError, UnsupportedError, WeftError
from ..untrusted.printable import one_line
from . import files, formats, header
from .checkpoint import Checkpoint
from .problems import fault_of


def read(path: str | Path, values: bool = True) -> Checkpoint:
    """Reads the checkpoint in a directory, whoever wrote it; see `files.find` for the run of
    `weft train`.

    Faults within the file become `problems`. With values=False those that NaN or infinity make are
    left to a load plan, which compares shapes with the model before. Raises CheckpointError if it
    cannot be read at all, UnsupportedError for a method or field of peft that Weft does not
    support.
    """
    while True:
        found = files.find(path)
        before = files.identity(found.tensors)
        try:
            checkpoint = _read_safely(found)
        except (CheckpointError, UnsupportedError):
            if files.identity(found.tensors) == before:
                raise
        else:
            if files.identity(found.tensors) == before:
                return _values_checked(checkpoint) if values else checkpoint
        # It was saved again in the meantime. The library opens the file more than once, so two
        # files may have been mixed.


def _values_checked(checkpoint: Checkpoint) -> Checkpoint:
    for module, layer in checkpoint.sites.items():
        for tensor, t in list(layer.tensors.items()):
            fault = fault_of(t, tuple(t.shape))
            if fault is not None:
                checkpoint.problems.append(
                    f"{layer.keys.get(tensor, tensor)!r} ({tensor} of {module!r}): {fault}"
                )
                del layer.tensors[tensor]
    for name, t in checkpoint.selected.items():
        # Full stores integer tensors too; they are held against the model's.
        whole = not t.is_floating_point() and not t.is_complex()
        fault = None if whole else fault_of(t, tuple(t.shape))
        if fault is not None:
            checkpoint.problems.append(f"{name!r}: {fault}")
    return checkpoint


def _read_safely(found: files.FoundFiles) -> Checkpoint:
    """Whatever someone has written into the files, the error is one of ours."""
    try:
        return _read_files(found)
    except WeftError:
        raise
    except Exception as error:
        what = one_line(f"{type(error).__name__}: {error}", 300)
        raise CheckpointError(
            f"{found.tensors.parent} holds no adapter that Weft or peft wrote, or it is damaged "
            f"({what})."
        ) from error


def _read_files(found: files.FoundFiles) -> Checkpoint:
    tensors, metadata = files.read_tensors(found.tensors)
    if not header.is_ours(metadata):
        checkpoint = _read_foreign(found, tensors, metadata)
    else:
        parsed = header.parse(found.tensors, metadata)
        checkpoint = parsed.checkpoint
        form = formats.by_name(parsed.layout)
        header.check_tensors(parsed, tensors, metadata["weft_checksums"])
        if found.config is None:
            checkpoint.notes.append(
                f"{files.CONFIG} is missing; the configuration in the tensors' file was used"
            )
        else:
            header.check_config(found.config, parsed)
        if form is None:
            raise CheckpointError(
                f"{found.tensors} has the layout {parsed.layout!r}, which this Weft does not "
                "know. Update weft."
            )
        checkpoint.peft_reads_it = form.peft_reads_it
        form.restore(checkpoint, tensors, parsed.manifest)
    checkpoint.notes += found.notes
    return checkpoint


def _read_file(
    found: files.FoundFiles, tensors: dict[str, Tensor], metadata: dict[str, str]
) -> Checkpoint:
    """Reads a file that needs no adapter_config.json. One of peft's name has lost it."""
    own = found.tensors.name != files.TENSORS
    form = formats.recognise_file(list(tensors), metadata) if own else None
    if form is None:
        raise CheckpointError(
            f"{found.tensors.parent} has no {files.CONFIG}, which says what the tensors are."
        )
    try:
        return form.read(metadata, tensors)
    except (ConfigError, CheckpointError, TypeError, ValueError, AttributeError) as error:
        raise CheckpointError(f"{found.tensors}: {error}") from None


def _read_foreign(
    found: files.FoundFiles, tensors: dict[str, Tensor], metadata: dict[str, str]
) -> Checkpoint:
    if found.config is None:
        return _read_file(found, tensors, metadata)
    config = files.read_config(found.config)
    form = formats.recognise(config)
    if form is None:
        known = [each.name for each in formats.FORMATS if each.peft_reads_it]
        raise UnsupportedError(
            f"{found.config} says peft_type={config.get('peft_type')!r}; Weft reads {known}."
        )
    try:
        return form.read(config, tensors)
    except (ConfigError, CheckpointError, TypeError, ValueError, AttributeError) as error:
        raise CheckpointError(f"{found.config}: {error}") from None
