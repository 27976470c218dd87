"""The handle that `attach` returns: one adapter's tensors, counted, listed, planned and saved."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from ..errors import CheckpointError, ConfigError, MergeError, UnsupportedError, WeftError
from .layer import AdapterLayer
from .plan import Plan, plan_of
from .plan_entries import Frozen
from .selected import Selected
from .stepping import follow


class Disk(Protocol):
    """What the checkpoint room lends to the handle; the model room may not import it."""

    def save(self, model: nn.Module, path: str | Path, name: str, projections: bool) -> Path: ...
    def file_size(self, adapter: Adapter) -> int: ...


_disk: list[Disk] = []


def bind_disk(disk: Disk) -> None:
    """Called once, by the checkpoint room."""
    _disk[:] = [disk]


STATE = "_weft_model_state"  # where a model keeps its adapters (state.py)


@dataclass(eq=False, repr=False)
class Adapter:
    """An adapter attached to `model` under `name`.

    `layers` maps module names to the adapted layers' tensors, `selected_tensors` maps full tensor
    names to base tensors trained as copies (`train` and `modules_to_save`), `frozen` lists what stays frozen and why.
    """

    name: str
    config: Any
    model: nn.Module
    layers: dict[str, AdapterLayer] = field(default_factory=dict)
    selected_tensors: dict[str, Selected] = field(default_factory=dict)
    frozen: list[Frozen] = field(default_factory=list)
    routed: list[str] = field(default_factory=list)
    load_report: Any = None

    def __repr__(self) -> str:
        parts = [(len(self.layers), "layer"), (len(self.selected_tensors), "base tensor")]
        what = ", ".join(f"{n} {noun}{'s' * (n != 1)}" for n, noun in parts if n)
        return f"<weft.Adapter {self.name!r}: {type(self.config).__name__}, {what}, {self.num_parameters:,} trained numbers>"

    @property
    def sites(self) -> dict[str, AdapterLayer]:
        """The name of `layers` before version 0.2."""
        return self.layers

    @property
    def is_attached(self) -> bool:
        """Whether the model carries this very handle; not a copy of it, nor one that was detached."""
        state = self.model.__dict__.get(STATE)
        return state is not None and state.adapters.get(self.name) is self

    @property
    def selected(self) -> dict[str, nn.Parameter]:
        """Full tensor name -> the trained copy."""
        return {name: s.trained for name, s in self.selected_tensors.items()}

    @property
    def shared_parameters(self) -> dict[str, nn.Parameter]:
        """Trained tensors that all layers share: "shared.<tensor>"; none for most methods."""
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

    def named_parameters(self) -> Iterator[tuple[str, nn.Parameter]]:
        """Every declared tensor: "<module>.<tensor>" for layers, the base tensor's own name for
        selected ones, and "shared.<tensor>" for what all layers share.
        """
        for module, layer in self.layers.items():
            for tensor, parameter in layer.trainable().items():
                yield (f"{module}.{tensor}" if module else tensor), parameter
        yield from self.shared_parameters.items()
        yield from self.selected.items()

    def parameters(self) -> Iterator[nn.Parameter]:
        """What the optimiser gets."""
        return (parameter for _, parameter in self.named_parameters())

    @property
    def num_parameters(self) -> int:
        """The number of trained numbers."""
        return sum(p.numel() for p in self.parameters())

    @property
    def num_head_parameters(self) -> int:
        """Those of them that belong to the head or to `modules_to_save`; the papers count these
        apart.
        """
        return sum(s.trained.numel() for s in self.selected_tensors.values() if s.head)

    @property
    def nbytes(self) -> int:
        """Bytes of adapter_model.safetensors as `save` writes it, header and all."""
        return self._on_disk().file_size(self)

    def save(self, path: str | Path, projections: bool = False) -> Path:
        """See `weft.save`."""
        return self._on_disk().save(self.model, path, self.name, projections)

    @property
    def steps(self) -> int:
        """Optimiser steps that an adapter of a rule with a schedule has been through; 0 for
        others.
        """
        counts = [
            int(layer.get_buffer("step"))
            for layer in self.layers.values()
            if "step" in layer.buffer_names
        ]
        return max(counts, default=0)

    @property
    def ranks(self) -> dict[str, int]:
        """Module -> rank in force; where a method moves rank between layers, what it has
        reached.
        """
        return {
            module: layer.rank for module, layer in self.layers.items() if layer.rank is not None
        }

    def plan_steps(self, total: int) -> None:
        """Tell a method with a schedule how many optimiser steps will be taken, where its
        configuration leaves that open.

        Weft's trainer calls it. Raises ConfigError where the schedule does not fit into so many
        steps.
        """
        self.config = self.config.with_steps(total)
        for layer in self.layers.values():
            layer.method = layer.method.with_steps(total)

    def truncate(self, r: int) -> None:
        """Keep the first `r` ranks of every layer and drop the rest, where a method has trained
        nested ranks.

        The tensors are new ones, which an optimiser made before does not hold. Raises ConfigError
        (no such rank), UnsupportedError (the method's ranks are not nested), MergeError (merged).
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
        """A copy, or an adapter from a pickle, goes on stepping like the original."""
        self.__dict__.update(state)
        follow(self)

    def plan(self) -> Plan:
        """Returns a table of what is trained, and of what stays frozen and why; print it."""
        return plan_of(
            type(self.config).__name__,
            self.model,
            self.layers,
            {**self.shared_parameters, **self.selected},
            self.frozen,
            self.ranks if self.config.moves_rank else None,
        )

    @staticmethod
    def _on_disk() -> Disk:
        if not _disk:
            raise WeftError("import weft, not weft.model alone, to save adapters.")
        return _disk[0]
