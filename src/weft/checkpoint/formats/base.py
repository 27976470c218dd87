"""The interface of a checkpoint format."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any, Protocol

from torch import Tensor, nn

from ..checkpoint import Checkpoint, Written


class Format(Protocol):
    """A layout of adapter_model.safetensors and adapter_config.json.

    Weft's own files begin with a header (header.py) that names the format, so `restore` reads a
    file that Weft wrote, and `read` one that peft wrote.
    """

    @property
    def name(self) -> str:
        """The layout in Weft's header; in formats of peft also the `peft_type`."""

    @property
    def methods(self) -> Collection[type[Any]]:
        """The methods whose adapters the format can hold."""

    @property
    def peft_reads_it(self) -> bool:
        """True if `PeftModel.from_pretrained` reads this format."""

    @property
    def stores_projections(self) -> bool:
        """True if the file stores the frozen matrices that the layers share."""

    def why_not(self, checkpoint: Checkpoint, model: nn.Module | None = None) -> str | None:
        """Returns why the format cannot hold this checkpoint of one of its methods, or None.

        `model` is the model of the adapter; None if the checkpoint was read from a file.
        """

    def write(self, checkpoint: Checkpoint, model: nn.Module | None = None) -> Written:
        """Returns the files, without Weft's header. `why_not` must have returned None."""

    def recognises(self, config: Mapping[str, Any]) -> bool:
        """Returns True if an adapter_config.json beside a file without Weft's header is ours."""

    def read(self, config: Mapping[str, Any], tensors: dict[str, Tensor]) -> Checkpoint:
        """Reads a file without Weft's header.

        Raises CheckpointError or ConfigError if the configuration is not usable, UnsupportedError
        if it has something that Weft does not support. Other faults become `problems`.
        """

    def restore(
        self, checkpoint: Checkpoint, tensors: dict[str, Tensor], manifest: Mapping[str, Any]
    ) -> None:
        """Fills a checkpoint from the tensors [...] of a file whose header has been read."""

    def why_not_model(self, root: nn.Module) -> str | None:
        """Returns why a file of this format means something else in this model, or None."""


class FileFormat(Protocol):
    """A layout of one safetensors file by itself, which other tools write and Weft reads."""

    @property
    def name(self) -> str:
        """The tool's name."""

    def recognises(self, keys: Collection[str], metadata: Mapping[str, str]) -> bool:
        """Returns True if a file with these keys and metadata is of this format."""

    def read(self, metadata: Mapping[str, str], tensors: dict[str, Tensor]) -> Checkpoint:
        """Reads such a file. Raises as `Format.read`."""
