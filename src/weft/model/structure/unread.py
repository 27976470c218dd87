"""Modules that compute something and change no output, as far as a configuration and code show.

Two conventions of transformers are known. A vision-language model whose configuration has
`vision_feature_layer` reads the tower's state after so many blocks, so the blocks after it, and
the norm and the pooler behind them, are computed for nothing. And a pooler hands its vector to
the modules around it as `pooler_output`, or in a tuple: if none of their classes reads that, or
an item of a tuple after the first, nothing does.

What only an input decides is not known here: a projection that one of two losses reads, an expert
without tokens. The audit names that.
"""

from __future__ import annotations

import dis
import inspect
from collections.abc import Collection, Iterable, Iterator, Mapping
from types import CodeType
from typing import Any

from torch import nn

from ..base_layers import is_norm
from .blocks import norm_behind
from .names import within

_FIELD = "vision_feature_layer"
_POOLED = "pooler_output"


def find_unread(
    root: nn.Module, modules: Mapping[str, nn.Module], blocks: Iterable[str], head: Collection[str]
) -> dict[str, str]:
    """Returns the outermost modules that nothing reads, with the reasons.

    `modules` are the model's own, `blocks` the names of its repeated blocks, in order, and `head`
    the modules of its output head. In a model without a head the caller may read all.
    """
    if not head:
        return {}
    found: dict[str, str] = {}
    stacks: dict[str, list[str]] = {}
    for block in blocks:
        stacks.setdefault(block.rpartition(".")[0], []).append(block)
    for name, module in modules.items():
        layer = getattr(getattr(module, "config", None), _FIELD, None)
        if layer is not None:
            for tower in _towers(name, module):
                found |= _behind(root, tower, stacks, layer)
    for name, module in modules.items():
        if _is_pooler(name, module) and not within(name, [*found, *head]):
            around = [modules[n] for n in _parents(name) if n in modules]
            if len(around) < 2 or not _hands_on(type(around[-1])):
                continue
            if not any(_reads_pooled(type(m)) for m in around[:-1]):
                found[name] = "a pooler whose vector no module around it reads"
    return found


def _towers(name: str, module: nn.Module) -> Iterator[str]:
    """The children that are built from the configuration's `vision_config`."""
    kind = type(getattr(getattr(module, "config", None), "vision_config", None))
    for label, child in module.named_children():
        if kind is not type(None) and type(getattr(child, "config", None)) is kind:
            yield f"{name}.{label}".lstrip(".")


def _behind(
    root: nn.Module, tower: str, stacks: Mapping[str, list[str]], layer: int | list[int]
) -> dict[str, str]:
    """The blocks of a tower that come after the last state that is read, and what follows them."""
    inside = [stack for stack in stacks if within(stack, [tower])]
    if len(inside) != 1:
        return {}
    (stack,) = inside
    blocks = stacks[stack]
    read = max(
        index if index >= 0 else len(blocks) + 1 + index
        for index in ([layer] if isinstance(layer, int) else layer)
    )
    if read >= len(blocks):
        return {}
    reason = f"behind the last state that is read ({_FIELD}={layer})"
    norm = norm_behind(root, stack)
    after = [norm] if norm is not None and within(norm, [tower]) else []
    for name, module in root.get_submodule(tower).named_modules(prefix=tower):
        if _is_pooler(name, module) or (is_norm(module) and name.endswith("post_layernorm")):
            after.append(name)
    return dict.fromkeys([*blocks[read:], *(n for n in after if not within(n, [stack]))], reason)


def _is_pooler(name: str, module: nn.Module) -> bool:
    return name.rpartition(".")[2] == "pooler" or "PoolingHead" in type(module).__name__


def _parents(name: str) -> list[str]:
    """The names of the modules around one, from the root to its parent."""
    parts = name.split(".")[:-1]
    return [".".join(parts[:i]) for i in range(len(parts) + 1)]


def _hands_on(cls: type[nn.Module]) -> bool:
    """Whether a class calls its pooler's vector `pooler_output` when it returns it."""
    return any(
        _POOLED in code.co_names
        or any(_POOLED in c for c in code.co_consts if isinstance(c, tuple))
        for code in _own_codes(cls)
    )


def _reads_pooled(cls: type[nn.Module]) -> bool:
    """Whether the code of a class, as far as it is its own, reads a pooled vector. True if that
    cannot be told.
    """
    return any(_loads_pooled(code) for code in _own_codes(cls))


def _own_codes(cls: type) -> Iterator[CodeType]:
    """The code of a class and of its bases, without what all models have."""
    for base in cls.__mro__:
        general = base.__module__.startswith(("torch.", "builtins", "transformers."))
        if not general or base.__module__.startswith("transformers.models."):
            yield from _codes(base)


def _codes(cls: type) -> Iterator[CodeType]:
    for label, value in vars(cls).items():
        # What makes a model reads no output.
        if label.strip("_").startswith("init") or isinstance(value, classmethod):
            continue
        plain: Any = value.fget if isinstance(value, property) else value
        plain = getattr(plain, "__func__", plain)  # of a staticmethod
        code = getattr(inspect.unwrap(plain), "__code__", None) if callable(plain) else None
        if isinstance(code, CodeType):
            yield from _with_inner(code)


def _with_inner(code: CodeType) -> Iterator[CodeType]:
    yield code
    for constant in code.co_consts:
        if isinstance(constant, CodeType):
            yield from _with_inner(constant)


def _may_be_outputs(step: dis.Instruction) -> bool:
    """Whether a step of the code may leave several outputs of a module: `outputs[:2]`, `bert(x)`."""
    taken = step.opname in ("BINARY_SUBSCR", "BINARY_SLICE") or step.argrepr == "[]"
    return taken or step.opname.startswith("CALL") or "output" in str(step.argval)


_CONSTANT = ("LOAD_CONST", "LOAD_SMALL_INT")


def _loads_pooled(code: CodeType) -> bool:
    """Whether code reads the attribute or the key `pooler_output`, or an item after the first
    of something.
    """
    last: Any = None
    for step in dis.get_instructions(code):
        if step.argval == _POOLED and step.opname != "STORE_ATTR":
            return True
        if step.opname.startswith("UNPACK") and last is not None and _may_be_outputs(last):
            return True
        item = step.opname == "BINARY_SUBSCR" or step.argrepr == "[]"
        index = last.argval if item and last is not None and last.opname in _CONSTANT else 0
        if isinstance(index, int) and index != 0:
            return True
        last = step
    return False
