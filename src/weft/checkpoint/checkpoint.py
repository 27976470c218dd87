"""A checkpoint in memory, whichever format it is written in, and the report of loading one."""

from __future__ import annotations

from collections.abc import Callable, Collection
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from torch import Tensor

from ..errors import UnsupportedError
from ..model.adapter import Adapter
from ..model.structure import Structure
from ..ops.convolution import Geometry
from .fingerprint import Fingerprint
from .naming import Naming


@dataclass
class CheckpointLayer:
    """One adapted layer. `kind` and `shape`, (out, in) or (E, out, in) of fused experts, are None
    if the file does not record them. `geometry` is what the kernel of a convolution means; its
    tensors here are those of [out, in].

    `keys` maps tensor names to keys in the file. `reached` is the training state that a method
    saves as text beside its tensors, or None.
    """

    rule: Any
    tensors: dict[str, Tensor] = field(default_factory=dict)
    keys: dict[str, str] = field(default_factory=dict)
    kind: str | None = None
    shape: tuple[int, ...] | None = None
    reached: str | None = None
    geometry: Geometry | None = None

    def trained(self) -> list[Tensor]:
        """Returns the trained tensors [...], without those that training began at."""
        start = self.rule.start_shapes(1, 1)
        return [t for name, t in self.tensors.items() if name not in start]

    def known_shape(self) -> tuple[int, ...]:
        """Returns (out, in) or (E, out, in), derived from the tensors if the file does not record
        it.

        Raises UnsupportedError if the tensors do not tell it either, as in VeRA files of peft.
        """
        if self.shape is not None:
            return self.shape
        for left, right in (("B", "A"), ("P", "Q")):
            if left in self.tensors:
                B, A = self.tensors[left], self.tensors[right]
                return (*B.shape[:-1], A.shape[-1])
        raise UnsupportedError(
            "peft's VeRA files do not say the width of a layer. Load it with weft.load and save "
            "it; that file can be exported."
        )


@dataclass
class Checkpoint:
    """The content of an adapter's files, not yet matched against a model.

    `sites` are the adapted layers by canonical module name. `selected` are base tensors trained as
    copies, by full name; `aliases` are the other names of those that are tied. `repeated` are base
    tensors that the file stores but the adapter does not train. `projections` are VeRA's A [r, in]
    and B [out, r] if the file stores them; `checksums` are those of tensors that are drawn from a
    seed, by share key. `problems` are faults within the file. If `in_order`, the file names no
    modules, and its layers are those of the model in order. `fingerprint` is that of the base, which
    files of peft and of early versions do not have. `loftq` is how the layers were packed whose loss the
    adapter made good at its start, if it did, and `packed` the formats of the packed layers that it was
    saved on, if it was on some. `biases` says which biases of the base
    a file of peft must have: "none", "all", or "targets" (those of the adapted layers). `adapted`
    names the layers of a model that the file must have, beside those of `config`; it also gets the
    names of the tensors that are trained in full. `naming` finds the model's name for each layer if the
    file has names of another kind. `tokens` are the rows of new tokens [n, width], by
    the first module that reads them, `token_ids` their ids, and `token_counts` the number of rows in
    the base's table, if the file records it.
    """

    config: Any
    writer: str
    format: str
    base: dict[str, Any] = field(default_factory=dict)
    sites: dict[str, CheckpointLayer] = field(default_factory=dict)
    selected: dict[str, Tensor] = field(default_factory=dict)
    aliases: dict[str, Tensor] = field(default_factory=dict)
    repeated: dict[str, Tensor] = field(default_factory=dict)
    tokens: dict[str, Tensor] = field(default_factory=dict)
    token_ids: dict[str, tuple[int, ...]] = field(default_factory=dict)
    token_counts: dict[str, int] = field(default_factory=dict)
    projections: tuple[Tensor, Tensor] | None = None
    checksums: dict[str, str] = field(default_factory=dict)
    peft_reads_it: bool = True
    in_order: bool = False
    biases: str = "none"
    naming: Naming | None = None
    adapted: Callable[[Structure, Collection[str]], list[str]] | None = None
    fingerprint: Fingerprint | None = None
    loftq: str | None = None
    packed: tuple[str, ...] = ()
    problems: list[str] = field(default_factory=list)
    mapped: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    @property
    def numbers(self) -> int:
        """The number of trained values in the file."""
        trained = [t for layer in self.sites.values() for t in layer.trained()]
        return sum(t.numel() for t in [*trained, *self.selected.values(), *self.tokens.values()])

    @property
    def words(self) -> int:
        """The number of token embeddings that the base must have; 0 without new tokens."""
        last = [number for ids in self.token_ids.values() for number in ids]
        return max([*self.token_counts.values(), *(number + 1 for number in last)], default=0)

    @property
    def new_rows(self) -> int:
        """The number of different tokens whose rows the file has."""
        return len({number for ids in self.token_ids.values() for number in ids})

    @property
    def kinds(self) -> set[str]:
        """The kinds of the adapted layers, without embeddings and convolutions."""
        return {layer.kind or "linear" for layer in self.sites.values()} - {
            "embedding",
            "convolution",
        }


class Written(NamedTuple):
    """The files of a checkpoint in a format: tensors by key, adapter_config.json, and the names of
    the base tensors trained as copies.
    """

    tensors: dict[str, Tensor]
    config: dict[str, Any]
    selected: list[str]


@dataclass
class LoadReport:
    """The result of loading: problems (none if strict), names that were mapped, and notes."""

    adapter: Adapter
    problems: list[str]
    mapped: list[str]
    notes: list[str]

    @property
    def ok(self) -> bool:
        """True if every tensor of the file was used and every tensor of the adapter was filled."""
        return not self.problems

    def __str__(self) -> str:
        head = (
            f"loaded {self.adapter.name!r}: {self.adapter.num_parameters:,} numbers, "
            f"{len(self.problems)} problem{'' if len(self.problems) == 1 else 's'}"
        )
        return "\n".join(
            [
                head,
                *(f"  problem: {p}" for p in self.problems),
                *(f"  mapped: {m}" for m in self.mapped),
                *(f"  note: {n}" for n in self.notes),
            ]
        )
