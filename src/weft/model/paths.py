"""Which way a layer is computed: fused, or the plain definition; and why."""

from __future__ import annotations

import logging
import os

import torch
from torch import Tensor
from torch.autograd import forward_ad

from ..errors import ConfigError

VARIABLE = "WEFT_REFERENCE"
_log = logging.getLogger("weft.paths")
_noted: set[str] = set()
_PLAIN_TYPES = (Tensor, torch.nn.Parameter)


def reference_asked() -> bool:
    """WEFT_REFERENCE=1 runs everything on the plain definitions. Raises ConfigError for any value
    but 1, 0 and nothing.
    """
    value = os.environ.get(VARIABLE, "")
    if value not in ("", "0", "1"):
        raise ConfigError(
            f"{VARIABLE}={value!r}: write 1 for the plain definitions, 0 or nothing for the fast "
            "paths."
        )
    return value == "1"


def note(reason: str) -> None:
    """Say in the log, once a process, that a layer is computed by its plain definition."""
    if reason not in _noted:
        _noted.add(reason)
        _log.info("a layer is computed by its plain definition: %s", reason)


def why_plain(x: Tensor, W: Tensor, bias: Tensor | None) -> str | None:
    """The reason why W x + bias with its update has to be computed by the plain definition; None
    where it need not.
    """
    if torch.compiler.is_compiling():
        return "torch.compile fuses the plain definition itself"
    if reference_asked():
        return f"{VARIABLE}=1 asks for it"
    if type(x) not in _PLAIN_TYPES or type(W) not in _PLAIN_TYPES:
        return "a tensor is of a class of its own (sharded, quantised or traced)"
    if torch.is_grad_enabled() and (W.requires_grad or (bias is not None and bias.requires_grad)):
        return "the layer's own weight or bias trains too"
    if x.dtype != W.dtype or x.device != W.device or not x.is_floating_point() or x.is_meta:
        return "input and weight differ in dtype or device"
    if (
        torch.is_autocast_enabled(x.device.type)
        and torch.get_autocast_dtype(x.device.type) != W.dtype
    ):
        return "autocast computes in another dtype than the weight's"
    if (
        forward_ad._current_level >= 0
        or torch._C._functorch.maybe_current_level() is not None
        or torch.jit.is_tracing()
    ):  # type: ignore[no-untyped-call, attr-defined]
        return "a transform of torch.func, forward-mode differentiation or a trace is at work"
    return None
