"""Why a layer computes its update by the general definition rather than by the direct ways."""

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
asked = False  # what the variable said when it was read last
_PLAIN_TYPES = (Tensor, torch.nn.Parameter)
_current_level = torch._C._functorch.maybe_current_level
_is_tracing = torch._C._is_tracing
_any_autocast = torch._C._is_any_autocast_enabled


def reference_asked() -> bool:
    """Whether WEFT_REFERENCE=1 asks for the general definition everywhere.

    Raises ConfigError for any value but 1, 0 and nothing.
    """
    value = os.environ.get(VARIABLE, "")
    if value not in ("", "0", "1"):
        raise ConfigError(
            f"{VARIABLE}={value!r}: write 1 for the plain definitions, 0 or nothing for the fast "
            "paths."
        )
    return value == "1"


def refresh() -> None:
    """Reads the variable again: at attach, load and `weft.use`, not at every call of a layer.

    Raises ConfigError as `reference_asked`.
    """
    global asked  # noqa: PLW0603 - one per process, as the environment is
    asked = reference_asked()


def note(reason: str) -> None:
    """Logs, once per process and reason, that a layer is computed by the general definition."""
    if reason not in _noted:
        _noted.add(reason)
        _log.info("a layer is computed by its plain definition: %s", reason)


def of_the_tensors(x: Tensor, W: Tensor, bias: Tensor | None) -> str | None:
    """Returns why x [..., in], W [out, in] or the bias [out] needs the general definition, or None."""
    if type(x) not in _PLAIN_TYPES or type(W) not in _PLAIN_TYPES:
        return "a tensor is of a class of its own (sharded, quantised or traced)"
    if bias is not None and type(bias) not in _PLAIN_TYPES:
        return "a tensor is of a class of its own (sharded, quantised or traced)"
    if x.dtype != W.dtype or x.device != W.device or not x.is_floating_point() or x.is_meta:
        return "input and weight differ in dtype or device"
    return None


def _other_autocast(x: Tensor) -> bool:
    kind = x.device.type
    return torch.is_autocast_enabled(kind) and torch.get_autocast_dtype(kind) != x.dtype


def of_the_moment(x: Tensor) -> str | None:
    """Returns why the current mode needs the general definition for x [..., in], or None.

    Autocast, transforms and tracing are such modes; the tests are few and cheap.
    """
    if _any_autocast() and _other_autocast(x):
        return "autocast computes in another dtype than the weight's"
    if _current_level() is not None or forward_ad._current_level >= 0 or _is_tracing():
        return "a transform of torch.func, forward-mode differentiation or a trace is at work"
    return None
