"""Weft's own format, for adapters that no format of peft can hold.

The tensors of all layers that have one name, shape and dtype are stacked: "b.768.float32"
[layers, 768]. One tensor per layer would cost about a hundred bytes of header each, a fair part of
a file of VeRA's vectors. Base tensors that were trained as copies keep their names, after "base/";
the rows of new tokens have "tokens/" and the name of their module.
The order of the layers is that of the manifest. The `peft_type` is unknown to peft, which makes it
refuse the directory instead of misreading it.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from ... import methods
from ...errors import CheckpointError
from ...methods import stacked
from ..checkpoint import Checkpoint, Written
from ..problems import report_extra, take

_SELECTED, _TOKENS = "base/", "tokens/"
_MARKER = "WEFT_"


class NativeFormat:
    """See the module's text."""

    name = "native"
    methods = tuple(methods.METHODS.values())
    peft_reads_it = False
    stores_projections = False

    def why_not(self, checkpoint: Checkpoint, model: nn.Module | None = None) -> str | None:
        if checkpoint.projections is not None:
            return (
                "A and B came from a file, so no seed gives them, and this format has no matrices"
            )
        return None

    def write(self, checkpoint: Checkpoint, model: nn.Module | None = None) -> Written:
        groups: dict[str, list[Tensor]] = {}
        for layer in checkpoint.sites.values():
            for tensor, value in layer.tensors.items():
                key = _stack_key(tensor, tuple(value.shape), str(value.dtype))
                groups.setdefault(key, []).append(value)
        tensors = {key: torch.stack(parts) for key, parts in groups.items()}
        tensors |= {_SELECTED + name: t for name, t in checkpoint.selected.items()}
        tensors |= {_TOKENS + name: t for name, t in checkpoint.tokens.items()}
        config = {
            "peft_type": f"{_MARKER}{type(checkpoint.config).__name__.upper()}",
            "weft": methods.to_json(checkpoint.config),
        }
        return Written(tensors, config, list(checkpoint.selected))

    def recognises(self, config: Mapping[str, Any]) -> bool:
        kind = config.get("peft_type")
        return isinstance(kind, str) and kind.startswith(_MARKER)

    def read(self, config: Mapping[str, Any], tensors: dict[str, Tensor]) -> Checkpoint:
        """Raises CheckpointError: without its header a file of this format cannot be read."""
        raise CheckpointError(
            "the tensors' file has lost the header that Weft wrote into it; some tool has written "
            "the file again without its metadata. Use the original."
        )

    def restore(
        self, checkpoint: Checkpoint, tensors: dict[str, Tensor], manifest: Mapping[str, Any]
    ) -> None:
        """Splits each stack [layers, ...] into one tensor per layer, in the manifest's order."""
        groups: dict[str, list[tuple[str, str]]] = {}
        shapes: dict[str, tuple[int, ...]] = {}
        for module, layer in checkpoint.sites.items():
            for tensor, shape in stacked.file_shapes(layer.rule, layer.known_shape()).items():
                key = _stack_key(tensor, shape, layer.rule.dtype)
                groups.setdefault(key, []).append((module, tensor))
                shapes[key] = shape
        for key, members in groups.items():
            what = f"{members[0][1]} of {len(members)} layers, the first {members[0][0]!r}"
            found = take(tensors, key, (len(members), *shapes[key]), what, checkpoint.problems)
            for row, (module, tensor) in enumerate(members):
                checkpoint.sites[module].keys[tensor] = key
                if found is not None:
                    checkpoint.sites[module].tensors[tensor] = found[row]
        selected = manifest["selected"]
        take_selected(checkpoint, tensors, _SELECTED, selected)
        tokens = {name: _TOKENS + name for name in checkpoint.token_ids}
        take_tokens(checkpoint, tensors, tokens)
        expected = [*groups, *(_SELECTED + name for name in selected), *tokens.values()]
        report_extra(checkpoint.problems, tensors, expected)

    def why_not_model(self, root: nn.Module) -> str | None:
        return None


def take_selected(
    checkpoint: Checkpoint, tensors: dict[str, Tensor], prefix: str, names: Collection[str]
) -> None:
    """Moves base tensors [...] trained as copies, under `prefix` + name, into the checkpoint.

    Full stores integer tensors too; they are checked against the model.
    """
    for name in names:
        key = prefix + name
        if key in tensors and not tensors[key].is_floating_point():
            checkpoint.selected[name] = tensors.pop(key)
            continue
        found = take(tensors, key, None, "a base tensor trained as a copy", checkpoint.problems)
        if found is not None:
            checkpoint.selected[name] = found


def take_tokens(
    checkpoint: Checkpoint, tensors: dict[str, Tensor], keys: Mapping[str, str]
) -> None:
    """Moves the rows of new tokens [n, width] into the checkpoint, by module; `keys` names theirs."""
    for module, key in keys.items():
        what = f"rows of the new tokens of {module!r}"
        found = take(tensors, key, None, what, checkpoint.problems)
        if found is not None:
            checkpoint.tokens[module] = found


def _stack_key(tensor: str, shape: tuple[int, ...], dtype: str) -> str:
    return f"{tensor}.{'x'.join(map(str, shape))}.{dtype.removeprefix('torch.')}"
