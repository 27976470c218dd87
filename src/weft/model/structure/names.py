"""Names of modules: without the parts that wrappers add, and which one contains another."""

from __future__ import annotations

import re
from collections.abc import Iterable

from ...errors import ConfigError
from ...untrusted.json_text import shortened
from ...untrusted.patterns import fullmatch

# In the name or the class of a module.
ATTENTION = re.compile(r"attn|attention", re.IGNORECASE)

# The name parts that torch.compile, FSDP and activation checkpointing add to what they wrap.
WRAPPERS = ("_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module")


def canonical(name: str) -> str:
    """Returns a name without the parts that wrappers add."""
    return ".".join(part for part in name.split(".") if part not in WRAPPERS)


def called(name: str) -> tuple[str, str]:
    """Returns a name, and the same without the parts that wrappers add."""
    return name, canonical(name)


def matches(field: str, pattern: str, name: str) -> bool:
    """Returns whether a regular expression of the configuration's `field` matches the whole name.

    Raises ConfigError if that cannot be found out in bounded time.
    """
    try:
        return fullmatch(pattern, name)
    except ValueError as error:
        raise ConfigError(f"{field}: {shortened(pattern)} cannot be matched: {error}.") from None


def within(name: str, modules: Iterable[str]) -> bool:
    """Returns True if `name` is one of these modules or is inside one."""
    return any(name == module or name.startswith(module + ".") for module in modules)


def ends_in(name: str, ending: str) -> bool:
    """Returns True if the last parts of `name` are `ending`: "attn.c_proj" ends in "c_proj"."""
    return name == ending or name.endswith("." + ending)
