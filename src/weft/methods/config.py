"""The base classes of all configurations: common fields, their checks, and the defaults of a
method.

`Config` alone only trains tensors of the base model; a `TensorConfig` has tensors of its own; a
`LayerConfig` adapts layers; a `LowRankConfig` by a low-rank update. A method overrides the
defaults.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from ..errors import ConfigError
from ..ops.low_rank import LowRank
from . import token_spec, train_spec
from .base import BaseLayer, Params, Shape, Shared
from .checks import check_alpha, check_choice, check_count, check_number
from .field_types import check_types, checked
from .rng import Rng
from .target_spec import Overrides, normalise, normalise_blocks, normalise_names

# Fields that hold for the whole model, most of them its parts, so that no layer can override them.
CHOOSING = (
    "targets",
    "exclude",
    "within",
    "layers",
    "modules_to_save",
    "train",
    "freeze_batch_norm",
    "new_tokens",
)
DTYPES = {
    "float32": torch.float32,
    "float64": torch.float64,
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
}


@dataclass(frozen=True, kw_only=True)
class Config:
    """The base of all configurations: tensors of the base model that train beside the adapter's
    own.
    """

    modules_to_save: tuple[str, ...] = ()
    train: tuple[str, ...] = ()
    freeze_batch_norm: bool = False
    new_tokens: Any = ()

    learning_rates: ClassVar[tuple[float, ...]] = (1e-3, 3e-3, 1e-2)  # tried by `weft compare`
    mergeable: ClassVar[bool] = True
    not_mergeable: ClassVar[str] = ""  # why not, for messages
    starts_at_base: ClassVar[bool] = True  # the output is unchanged until something trains
    by_row: ClassVar[bool] = True  # rows of one batch may use different adapters
    adapts_norms: ClassVar[bool] = False  # layer norms may be its targets
    model_fields: ClassVar[tuple[str, ...]] = ()  # fields that cannot differ between layers
    nested: ClassVar[bool] = False  # the first ranks are an adapter too: see `truncated`
    moves_rank: ClassVar[bool] = False  # layers gain and lose ranks: see `rank`

    def __post_init__(self) -> None:
        value: Any = self.modules_to_save
        if (
            isinstance(value, str)
            or not isinstance(value, Sequence)
            or not all(isinstance(v, str) and v for v in value)
        ):
            raise ConfigError(
                f"{type(self).__name__}(modules_to_save={value!r}): write a list of module name "
                'endings, for example ["classifier"].'
            )
        object.__setattr__(self, "modules_to_save", tuple(value))
        words = train_spec.normalise(type(self).__name__, self.train, isinstance(self, LayerConfig))
        object.__setattr__(self, "train", words)
        check_types(self)
        tokens = token_spec.normalise(type(self).__name__, self.new_tokens)
        object.__setattr__(self, "new_tokens", tokens)

    @property
    def selection(self) -> tuple[str, ...]:
        """The base tensors that the method itself trains, in the words of `train`."""
        return ()

    @property
    def follows_steps(self) -> bool:
        """Whether it acts around optimiser steps; then tensors that move without one are an error."""
        return False

    @property
    def audit_after(self) -> int:
        """Steps after which every tensor has moved, if they are more than the audit's own."""
        return 0

    def finished(self) -> Config:
        """Returns the configuration that a file holds, if other tensors train than are saved."""
        return self

    def with_steps(self, total: int) -> Config:
        """Returns the configuration for a run of `total` optimiser steps, if it left that open."""
        return self


@dataclass(frozen=True, kw_only=True)
class TensorConfig(Config):
    """A method with tensors of its own: how they are drawn and stored."""

    seed: int = 0
    dtype: str = "float32"

    def __post_init__(self) -> None:
        dtype: Any = self.dtype
        if isinstance(dtype, torch.dtype):
            object.__setattr__(self, "dtype", str(dtype).removeprefix("torch."))
        check_choice(self, "dtype", list(DTYPES))
        super().__post_init__()
        if self.seed < 0:
            raise ConfigError(
                f"{type(self).__name__}(seed={self.seed}): seed must be a whole number from 0 to "
                "2**63-1."
            )

    def shapes(self, out: int, in_: int) -> dict[str, Shape]:
        """Returns name and shape of every trained tensor of a layer [out, in], in the file's order.

        Raises NotImplementedError: every method defines its own.
        """
        raise NotImplementedError

    def initial(self, layer: BaseLayer, rng: Rng, shared: Shared | None) -> dict[str, Tensor]:
        """Returns float32 initial values of a layer [out, in], with the shapes of `file_shapes`.

        They must leave the output unchanged if `starts_at_base`. Raises NotImplementedError here:
        every method defines its own.
        """
        raise NotImplementedError

    def start_shapes(self, out: int, in_: int) -> dict[str, Shape]:
        """Returns name and shape of the frozen tensors of a layer [out, in] that record where its
        training began, in the file's order. `initial` returns their values too, and a file has
        them.
        """
        return {}

    def file_shapes(self, out: int, in_: int) -> dict[str, Shape]:
        """Returns name and shape of every tensor of a layer [out, in] that a file has."""
        return {**self.shapes(out, in_), **self.start_shapes(out, in_)}

    def frozen(self, out: int, in_: int, takes_ids: bool, rng: Rng) -> dict[str, Tensor]:
        """Returns the frozen tensors of one layer [out, in], which no file contains.

        They are a function of the arguments, with the same bits on every device and version.
        """
        return {}

    def shared(self, shapes: Sequence[tuple[int, int]], device: torch.device) -> Shared | None:
        """Returns the tensors that layers of these (out, in) share, or None."""
        return None

    def share_key(self) -> tuple[Any, ...] | None:
        """Returns a key that is equal for layers which share, or None."""
        return None

    def rank(self, p: Params) -> int | None:
        """Returns the rank in force, or None for a method without ranks."""
        return None

    def truncated(self, r: int) -> TensorConfig:
        """Returns the configuration of rank `r`, or itself if it has no more; for nested methods."""
        return self

    def finished_tensors(self, p: Params) -> dict[str, Tensor]:
        """Returns the tensors that a file contains, with the shapes of the finished configuration:
        the trained ones, unless others are saved (Prefix with an MLP saves keys [n, out], values
        [n, in]).
        """
        return {name: getattr(p, name) for name in self.file_shapes(*p.shape)}

    def buffers(self, out: int, in_: int, device: torch.device) -> dict[str, Tensor]:
        """Returns initial values of the state that a layer [out, in] carries from step to step.

        They are buffers of the layer, so a resumed run continues bit for bit. The buffer `step` []
        counts the steps.
        """
        return {}

    def extra_state(self, p: Params) -> str | None:
        """Extra state for the checkpoint header, or None."""
        return None

    def is_extra_state(self, text: str) -> bool:
        """Returns whether a text of a file may be one that `extra_state` returned."""
        return type(self).load_extra_state is not TensorConfig.load_extra_state

    def load_extra_state(self, p: Params, text: str) -> None:
        """Restores the state that `extra_state` returned."""

    def unmoved(self, p: Params) -> tuple[str, ...]:
        """Returns trained tensors that the method itself keeps at their initial values."""
        return ()

    def before_step(self, layers: Mapping[str, Any], grad_scale: float, repeated: bool) -> None:
        """Called before an optimiser step, without gradients being recorded.

        `layers` maps module names to their tensors, whose gradients are `grad_scale` times too
        large. `repeated`: a closure has computed new gradients within the same step.
        """

    def after_step(self, layers: Mapping[str, Any]) -> None:
        """Called after an optimiser step; the gradients are still there, at their own size."""


@dataclass(frozen=True, kw_only=True)
class LayerConfig(TensorConfig):
    """A method that adapts layers: those that `targets` names, only inside the modules `within` and
    the blocks with the numbers `layers` (empty: everywhere), without those that `exclude` names.
    """

    targets: Any = "all-linear"
    exclude: Any = ()
    within: Any = ()
    layers: Any = ()

    def __post_init__(self) -> None:
        super().__post_init__()
        method = type(self).__name__
        object.__setattr__(self, "targets", normalise(self.targets))
        for field in ("exclude", "within"):
            object.__setattr__(self, field, normalise_names(method, field, getattr(self, field)))
        object.__setattr__(self, "layers", normalise_blocks(method, self.layers))
        if isinstance(self.targets, Overrides):
            for _, fields in self.targets.entries:
                checked(type(self), dict(fields))

    @property
    def blocks_left_out(self) -> int:
        """How many blocks of every stack, counted from its input, are not adapted."""
        return 0


@dataclass(frozen=True, kw_only=True)
class LowRankConfig(LayerConfig):
    """A method of the form W' = σ ∘ (W + s diag(b) B diag(d) A), defined by its factors."""

    r: int = 8
    dropout: float = 0.0

    def __post_init__(self) -> None:
        super().__post_init__()
        check_count(self, "r", 1)
        check_number(self, "dropout", low=0.0, high=1.0, open_high=True)

    def rank(self, p: Params) -> int | None:
        return self.r

    def factors(self, p: Params, training: bool = False) -> LowRank:
        """Returns the layer's factors, without copies, for evaluation or for the current training
        step.

        Raises NotImplementedError here: every method defines its own.
        """
        raise NotImplementedError


@dataclass(frozen=True, kw_only=True)
class ScaledConfig(LowRankConfig):
    """A low-rank method with LoRA's scale s. alpha=None means alpha = r, so s = 1 for every r."""

    alpha: float | None = None
    rslora: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        check_alpha(self)

    @property
    def scale(self) -> float:
        """s = alpha / r, or alpha / sqrt(r) with rslora."""
        return scaling(self.r, self.alpha, self.rslora)


def scaling(r: int, alpha: float | None, rslora: bool = False) -> float:
    """Returns s = alpha / r, or alpha / sqrt(r) with rslora; alpha=None means alpha = r."""
    alpha = float(r if alpha is None else alpha)
    return alpha / math.sqrt(r) if rslora else alpha / r
