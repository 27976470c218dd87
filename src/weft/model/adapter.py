"""The handle that `attach` returns: one adapter's tensors, counted, listed, planned and saved."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from ..errors import CheckpointError, ConfigError, MergeError, UnsupportedError, WeftError
from .active import STATE
from .layer import AdapterLayer
from .plan import Plan, plan_of
from .plan_entries import Frozen
from .selected import Selected
from .stepping import follow


class Disk(Protocol):
    """The functions of weft.checkpoint that the handle needs; weft.model may not import it."""

    def save(self, model: nn.Module, path: str | Path, name: str, projections: bool) -> Path: ...
    def file_size(self, adapter: Adapter) -> int: ...


_disk: list[Disk] = []


def bind_disk(disk: Disk) -> None:
    """Called once, by weft.checkpoint."""
    _disk[:] = [disk]


STALE_NORM = (
    "its weight was edited through `.data` or a pointer, in numbers that no check looks at, so outputs "
    "since then used an old norm. It is computed again from now on. Edit weights in place under "
    "torch.no_grad() instead."
)


@dataclass(eq=False, repr=False)
class Adapter:
    """An adapter attached to `model` under `name`.

    `layers` maps module names to the adapted layers' tensors, `selected_tensors` maps full tensor
    names to base tensors trained as copies (`train` and `modules_to_save`), `token_layers` maps the
    names of embeddings and heads to the rows of new tokens, which tied ones share, and `frozen`
    lists the layers and tensors that stay frozen, with the reason.
    """

    name: str
    config: Any
    model: nn.Module
    layers: dict[str, AdapterLayer] = field(default_factory=dict)
    selected_tensors: dict[str, Selected] = field(default_factory=dict)
    token_layers: dict[str, AdapterLayer] = field(default_factory=dict)
    frozen: list[Frozen] = field(default_factory=list)
    routed: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)  # of attaching: what it left out
    load_report: Any = None
    loftq: str | None = None  # how the layers are packed whose loss its start made good
    number: int = field(default_factory=itertools.count().__next__)  # no other adapter has it

    def __repr__(self) -> str:
        parts = [(len(self.layers), "layer"), (len(self.selected_tensors), "base tensor")]
        parts += [(sum(len(p) for p in self.token_rows.values()), "row")]
        what = ", ".join(f"{n} {noun}{'s' * (n != 1)}" for n, noun in parts if n)
        return f"<weft.Adapter {self.name!r}: {type(self.config).__name__}, {what}, {self.num_parameters:,} trained numbers>"

    @property
    def sites(self) -> dict[str, AdapterLayer]:
        """The name of `layers` before version 0.2."""
        return self.layers

    @property
    def is_attached(self) -> bool:
        """Whether the model has exactly this handle; False for a copy of it or after a detach."""
        state = self.model.__dict__.get(STATE)
        return state is not None and state.adapters.get(self.name) is self

    @property
    def selected(self) -> dict[str, nn.Parameter]:
        """The trained copies by full tensor name."""
        return {name: s.trained for name, s in self.selected_tensors.items()}

    @property
    def shared_parameters(self) -> dict[str, nn.Parameter]:
        """The trained tensors that all layers share, as "shared.<tensor>"; most methods have none."""
        modules = {
            id(layer.shared): layer.shared
            for layer in self.layers.values()
            if layer.shared is not None
        }
        return {
            f"shared.{name}": p
            for module in modules.values()
            for name, p in module.named_parameters()
        }

    @property
    def token_rows(self) -> dict[str, nn.Parameter]:
        """The rows of new tokens [n, width], each once, by the first module that reads them."""
        found = {name: layer.get_parameter("rows") for name, layer in self.token_layers.items()}
        known: dict[int, str] = {}
        return {n: p for n, p in found.items() if known.setdefault(id(p), n) == n}

    @property
    def packed_as(self) -> tuple[str, ...]:
        """The names of the formats of the packed layers that it is on."""
        found = {layer.base.packed_as for layer in self.layers.values()}
        return tuple(sorted(found - {None}))

    def every_layer(self) -> dict[str, AdapterLayer]:
        """Returns `layers` and `token_layers`."""
        return {**self.layers, **self.token_layers}

    def named_parameters(self) -> Iterator[tuple[str, nn.Parameter]]:
        """Yields every trained tensor: "<module>.<tensor>" for layers, the base tensor's own name
        for selected ones, "shared.<tensor>" for those that all layers share, and "<module>.rows"
        for the rows of new tokens.
        """
        for module, layer in self.layers.items():
            for tensor, parameter in layer.trainable().items():
                yield (f"{module}.{tensor}" if module else tensor), parameter
        yield from self.shared_parameters.items()
        yield from self.selected.items()
        yield from ((f"{module}.rows".lstrip("."), p) for module, p in self.token_rows.items())

    def parameters(self) -> Iterator[nn.Parameter]:
        """Yields every trained tensor, for the optimiser."""
        return (parameter for _, parameter in self.named_parameters())

    @property
    def num_parameters(self) -> int:
        """The number of trained numbers."""
        return sum(p.numel() for p in self.parameters())

    @property
    def num_head_parameters(self) -> int:
        """The number of those that belong to the head or to `modules_to_save`; the papers count
        them separately.
        """
        return sum(s.trained.numel() for s in self.selected_tensors.values() if s.head)

    @property
    def nbytes(self) -> int:
        """The size in bytes of adapter_model.safetensors as `save` writes it, including the header."""
        return self._on_disk().file_size(self)

    def save(self, path: str | Path, projections: bool = False) -> Path:
        """See `weft.save`."""
        return self._on_disk().save(self.model, path, self.name, projections)

    @property
    def steps(self) -> int:
        """The optimiser steps that an adapter of a method with a schedule has taken; 0 for others."""
        counts = [
            int(layer.get_buffer("step"))
            for layer in self.layers.values()
            if "step" in layer.buffer_names
        ]
        return max(counts, default=0)

    @property
    def ranks(self) -> dict[str, int]:
        """The current rank of each module; methods that move rank between layers change it."""
        return {
            module: layer.rank for module, layer in self.layers.items() if layer.rank is not None
        }

    def plan_steps(self, total: int) -> None:
        """Sets the number of optimiser steps of a method with a schedule, if its configuration left
        it open.

        Weft's trainer calls it. Raises ConfigError if the schedule does not fit into that many
        steps.
        """
        self.config = self.config.with_steps(total)
        for layer in self.layers.values():
            layer.method = layer.method.with_steps(total)

    def truncate(self, r: int) -> None:
        """Keeps the first `r` ranks of every layer and drops the rest, for methods with nested
        ranks.

        The tensors are new ones, which an optimiser created before does not have. Raises
        ConfigError (no such rank), UnsupportedError (the method's ranks are not nested), MergeError
        (merged).
        """
        if any(layer.active.merged == self.name for layer in self.layers.values()):
            raise MergeError(
                f"adapter {self.name!r} is merged; call weft.unmerge(model) before truncating it."
            )
        if not self.config.nested:
            raise UnsupportedError(
                f"the ranks of {type(self.config).__name__} are not trained to be nested, so the "
                "first "
                f"{r} of them are no adapter."
            )
        most = max(self.ranks.values())
        if type(r) is not int or not 1 <= r <= most:
            raise ConfigError(f"truncate({r!r}): adapter {self.name!r} has the ranks 1 to {most}.")
        for layer in self.layers.values():
            layer.become(layer.method.truncated(r))
        self.config = self.config.truncated(r)
        if self.is_attached:
            active = next(iter(self.layers.values())).active
            active.follow(self.name, self.parameters(), changed=True)

    def stale_layers(self) -> list[str]:
        """Returns the layers whose kept norm is not that of their weights, and drops these norms."""
        return [name for name, layer in self.layers.items() if layer.is_stale()]

    def training_state(self) -> dict[str, Tensor]:
        """Returns the state beside tensors and optimiser that a run needs to resume bit for bit.

        It has copies of the layers' buffers, which `model.state_dict()` has too: for DyLoRA
        "<module>.step" []. Most methods have none.
        """
        return {
            f"{module}.{name}": layer.get_buffer(name).detach().clone()
            for module, layer in self.layers.items()
            for name in layer.buffer_names
        }

    @torch.no_grad()
    def load_training_state(self, state: Mapping[str, Tensor]) -> None:
        """Copies the buffers that `training_state` returned, such as step [], into the layers.

        Raises CheckpointError if names or shapes differ.
        """
        live = {
            f"{module}.{name}": layer.get_buffer(name)
            for module, layer in self.layers.items()
            for name in layer.buffer_names
        }
        odd = sorted(live.keys() ^ state.keys()) or [
            n for n, t in live.items() if t.shape != state[n].shape
        ]
        if odd:
            raise CheckpointError(
                f"the training state does not fit adapter {self.name!r}: {odd[:8]} are on one side "
                "only "
                "or of another shape."
            )
        for name, t in live.items():
            t.copy_(state[name])

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Restores a copy or a pickle, which follows optimiser steps like the original."""
        self.__dict__.update(state)
        follow(self)

    def plan(self) -> Plan:
        """Returns a printable table of the trained and the frozen tensors, with reasons."""
        return plan_of(
            type(self.config).__name__,
            self.model,
            self.layers,
            {**self.shared_parameters, **self.selected},
            self.token_rows,
            self.frozen,
            self.ranks if self.config.moves_rank else None,
        )

    @staticmethod
    def _on_disk() -> Disk:
        if not _disk:
            raise WeftError("import weft, not weft.model alone, to save adapters.")
        return _disk[0]
