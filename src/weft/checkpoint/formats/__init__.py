"""The checkpoint formats. A new format is a file in this folder and a line in FORMATS, or in FILES
if it has no adapter_config.json and is only read.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from typing import Any

from torch import nn

from ...errors import UnsupportedError
from ..checkpoint import Checkpoint
from .base import FileFormat, Format
from .diffusers import DiffusersFormat
from .kohya import KohyaFormat
from .native import NativeFormat
from .peft_adalora import AdaLoraFormat
from .peft_convolutions import fault_of as convolution_fault
from .peft_lora import LoraFormat
from .peft_prompt import PrefixFormat, PromptFormat
from .peft_vera import VeraFormat

# An adapter is written in the first of these that can hold it.
FORMATS: tuple[Format, ...] = (
    LoraFormat(),
    AdaLoraFormat(),
    PrefixFormat(),
    PromptFormat(),
    NativeFormat(),
    VeraFormat(),
)

FILES: tuple[FileFormat, ...] = (KohyaFormat(), DiffusersFormat())


def choose(
    checkpoint: Checkpoint, model: nn.Module | None = None, among: Sequence[Format] = FORMATS
) -> Format:
    """Returns the first format that can hold a checkpoint.

    Raises UnsupportedError with the reasons if there is none.
    """
    method = type(checkpoint.config)
    reasons = []
    for each in among:
        if method not in each.methods:
            continue
        why = each.why_not(checkpoint, model)
        if why is None:
            return each
        reasons.append(f"in the format {each.name} {why}")
    text = "; ".join(reasons) or f"none of {[each.name for each in among]} is for this method"
    raise UnsupportedError(f"{method.__name__}: {text}")


def by_name(name: str) -> Format | None:
    """Returns the format that a header names, or None if this Weft does not have it."""
    return next((each for each in FORMATS if each.name == name), None)


def recognise(config: Mapping[str, Any]) -> Format | None:
    """Returns the format of an adapter_config.json beside a file without Weft's header, or None."""
    return next((each for each in FORMATS if each.recognises(config)), None)


def recognise_file(keys: Collection[str], metadata: Mapping[str, str]) -> FileFormat | None:
    """Returns the format of a tensors' file that has no adapter_config.json, or None."""
    return next((each for each in FILES if each.recognises(keys, metadata)), None)


__all__ = [
    "FILES",
    "FORMATS",
    "FileFormat",
    "Format",
    "by_name",
    "choose",
    "convolution_fault",
    "recognise",
    "recognise_file",
]
