"""What a method is: the protocols that the rest of the library speaks, and the checks
configurations share.

A configuration is a frozen dataclass, and the configuration *is* the method. There are three kinds:

* a `Rule` turns one frozen weight W [out, in] into an effective weight W' with few trained numbers
  (LoRA, VeRA, DoRA, DVoRA); an `UpdateRule` is a rule of the form W' = W + delta, which DoRA can
  wrap; a rule that is no change of weights (Bottleneck) has `mergeable = False`, and its
  `effective_weight` raises UnsupportedError;
* a `Prompt` adds positions that the tokens attend to, and changes neither a weight nor a layer's
  map (Prefix, PreEmbed, PreLayer);
* every configuration can also train tensors that the model already has (`train`); Full, Head,
  BitFit and TopLayers do nothing else.

Tensors reach a rule as attributes of `p` (`p.A`, `p.B`, ...), so a rule can be read and tested
without any model.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, ClassVar, Protocol, runtime_checkable

import torch
from torch import Tensor, nn

from ..errors import ConfigError
from ..ops import counter
from ..ops.derived import Derived
from ..ops.factors import Factors
from . import train_spec

DTYPES = {
    "float32": torch.float32,
    "float64": torch.float64,
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
}

Shape = tuple[int, ...]


class Shared(nn.Module):
    """Frozen tensors that every layer of an adapter reads; redrawn from their seed, never
    trained.
    """

    def pool_key(self) -> tuple[Any, ...] | None:
        """(share_key, max_out, max_in, device) if another adapter may read the same tensors, else
        None.
        """
        return None


class Params(Protocol):
    """The tensors of one adapted layer, by attribute; `shape` is its (out, in), `training` switches
    dropout, `derived` keeps what is computed from them, `written` says that the layer's output may
    be written to.
    """

    shape: tuple[int, int]
    training: bool
    derived: Derived
    written: bool

    def __getattr__(self, name: str) -> Any: ...


class Host(Protocol):
    """One view over Linear, Conv1D and Embedding: all that a rule may know of the layer it adapts.

    A rule with `norm_hosts = True` also gets layer norms, of kind "norm", which have no weight
    matrix.
    """

    @property
    def kind(self) -> str: ...
    @property
    def out_features(self) -> int: ...
    @property
    def in_features(self) -> int: ...
    @property
    def device(self) -> torch.device: ...
    @property
    def bias(self) -> Tensor | None: ...
    def weight(self) -> Tensor:
        """W as [out, in], a view without a copy."""
        ...

    def run(self, x: Tensor) -> Tensor:
        """The layer's own output for another input."""
        ...

    def project(
        self, x: Tensor, A: Tensor, dropout: float, training: bool, dtype: torch.dtype | None = None
    ) -> Tensor:
        """x Aᵀ [..., r] for A [r, in], with dropout on x; x holds ids where the layer is an
        embedding.

        A tensor that trains is given as it is, with the `dtype` to compute in: cast where no
        gradient is recorded (as in a forward that is recomputed later) it would not show that it
        trains, and dropout would draw another mask.
        """
        ...


class Draw:
    """Starting values of one layer's tensors: a function of the seed and the tensor's name, of
    nothing else.
    """

    def __init__(self, seed: int, site: str) -> None:
        self.seed, self.site = seed, site

    def normal(self, tensor: str, shape: Shape, std: float, device: torch.device) -> Tensor:
        return counter.normal(
            counter.key_of(self.seed, self.site, tensor), 0, shape[0], shape[1], std, device
        )

    def uniform(self, tensor: str, shape: Shape, bound: float, device: torch.device) -> Tensor:
        return counter.uniform(
            counter.key_of(self.seed, self.site, tensor), 0, shape[0], shape[1], bound, device
        )


@runtime_checkable
class Rule(Protocol):
    """A rule W -> W'. `merge`, `export`, analysis and every test oracle call `effective_weight`."""

    targets: Any
    modules_to_save: tuple[str, ...]
    seed: int
    dtype: str
    mergeable: ClassVar[bool]

    def trained(self, out: int, in_: int) -> dict[str, Shape]:
        """Name and shape of every trained tensor of one layer, in the order in which they are
        written.
        """
        ...

    def start(self, host: Host, draw: Draw, shared: Shared | None) -> dict[str, Tensor]:
        """Starting values, float32, on the weight's device; W' must equal W."""
        ...

    def share(self, shapes: Sequence[tuple[int, int]], device: torch.device) -> Shared | None:
        """The frozen tensors shared by layers of these (out, in) shapes, or None."""
        ...

    def share_key(self) -> tuple[Any, ...] | None:
        """Layers with equal keys share; None where there is nothing to share."""
        ...

    def effective_weight(self, W: Tensor, p: Params) -> Tensor:
        """W' [out, in] in float32, or in float64 where W is float64."""
        ...

    def forward(self, x: Tensor, y: Tensor, host: Host, p: Params) -> Tensor:
        """The layer's output with the adapter, from its input x and its own output y = W x +
        bias.
        """
        ...


@runtime_checkable
class UpdateRule(Rule, Protocol):
    """A rule of the form W' = W + delta(p)."""

    def factors(self, host: Host, p: Params, x: Tensor | None = None) -> Factors:
        """See `Factored`."""
        ...

    def delta(self, p: Params, dtype: torch.dtype = torch.float32) -> Tensor:
        """[out, in], computed in `dtype`: float32, or float64 where W is."""
        ...

    def update(self, x: Tensor, host: Host, p: Params, dtype: torch.dtype) -> Tensor:
        """x deltaᵀ [..., out] in `dtype`, without building delta."""
        ...


@runtime_checkable
class Factored(Protocol):
    """A rule whose W' has the form of ops/factors.py: one fused function computes its layers, which
    join mixed batches.
    """

    def factors(self, host: Host, p: Params, x: Tensor | None = None) -> Factors:
        """The layer's tensors as they are, of which `forward` computes the same output; `x`, where
        it is given, is the input to come, for a rule that needs W for more than its output.
        """
        ...


@runtime_checkable
class Fixed(Protocol):
    """A rule with frozen tensors of each layer's own, which no file holds: they are drawn again."""

    def fixed(
        self, kind: str, shape: tuple[int, int], draw: Draw, device: torch.device
    ) -> dict[str, Tensor]:
        """Name and float32 value: a function of the arguments with the same bits on every device
        and version.
        """
        ...


@runtime_checkable
class Stateful(Protocol):
    """A rule that carries more from step to step than its trained tensors. The tensors are buffers
    of the layer: in the model's state_dict, so that a resumed run goes on bit for bit.
    """

    def state(self, shape: tuple[int, int], device: torch.device) -> dict[str, Tensor]:
        """Names and starting values; `step` among them counts the optimiser's steps."""
        ...

    def reached(self, p: Params) -> str | None:
        """What an adapter's file must tell of it, beside the tensors, in a short text; None where
        there is nothing.
        """
        ...

    def restore(self, p: Params, text: str) -> None:
        """Put back what `reached` told."""
        ...

    def still(self, p: Params) -> tuple[str, ...]:
        """Trained tensors that the rule itself keeps where they started, so that the audit does not
        ask them to move.
        """
        ...


@runtime_checkable
class Stepped(Protocol):
    """A rule that acts around every optimiser step that takes place (model/stepping.py calls it,
    without gradients).

    It is called on the adapter's configuration, with all its layers' tensors by module name.
    """

    @property
    def follows_steps(self) -> bool:
        """With these values of its fields it does act; then tensors that move without a step are an
        error.
        """
        ...

    def before_step(self, sites: Mapping[str, Any], scale: float, again: bool) -> None:
        """Gradients are there, `scale` times too large; `again` in the same step where a closure
        has made new ones.
        """
        ...

    def after_step(self, sites: Mapping[str, Any]) -> None:
        """The tensors have moved; the gradients are still there, at their own size."""
        ...


@runtime_checkable
class Nested(Protocol):
    """A rule that has trained every smaller rank too: the first part of its tensors is an
    adapter.
    """

    def shortened(self, r: int) -> Any:
        """The rule of rank `r`, or itself where it has no more than that."""
        ...


@runtime_checkable
class Prompt(Protocol):
    """Trained vectors at virtual positions. Its places in a model are found by structure
    (model/prompts/).

    `where`: what it attaches to, "attention" (keys and values of every self-attention; it then has
    `keys_values`), "embeddings" (the model's input) or "block" (the input of every block; for both,
    tensors `before` and `after`). `trained` and `start` are those of a Rule; (out, in) are the
    widths of keys and values, or twice the width of the states. `by_row`: rows of one batch may use
    different ones. `starts_at_base`: whether step 0 leaves the output as it was.
    """

    modules_to_save: tuple[str, ...]
    seed: int
    dtype: str
    mergeable: ClassVar[bool]
    where: ClassVar[str]
    by_row: ClassVar[bool]
    starts_at_base: ClassVar[bool]

    def trained(self, out: int, in_: int) -> dict[str, Shape]: ...
    def start(self, host: Host, draw: Draw, shared: Shared | None) -> dict[str, Tensor]: ...
    def share(self, shapes: Sequence[tuple[int, int]], device: torch.device) -> Shared | None:
        """As of a Rule; what is shared may hold parameters, which then train."""
        ...

    def share_key(self) -> tuple[Any, ...] | None: ...


@runtime_checkable
class Reparameterised(Protocol):
    """A method that trains other tensors than a file of it holds."""

    def finished(self) -> Any:
        """The configuration that a file says."""
        ...

    def finished_tensors(self, p: Params) -> dict[str, Tensor]:
        """The tensors of one layer that a file holds, by the names of that configuration."""
        ...


def wide(t: Tensor) -> Tensor:
    """float32, or float64 left as it is: the dtypes in which an effective weight is defined."""
    return t if t.dtype == torch.float64 else t.float()


@contextmanager
def full_precision(device: torch.device) -> Iterator[None]:
    """Autocast would round the weight's norm to bfloat16; inside this it does not."""
    if device.type == "meta" or not torch.is_autocast_enabled(device.type):
        yield
        return
    with torch.autocast(device.type, enabled=False):
        yield


def check_rank(config: Any) -> None:
    check_count(config, "r", 1)


def check_count(config: Any, field: str, low: int) -> None:
    value = getattr(config, field)
    if isinstance(value, bool) or not isinstance(value, int) or value < low:
        raise ConfigError(
            f"{type(config).__name__}({field}={value!r}): {field} must be a whole number, {low} or "
            "more."
        )


def check_number(
    config: Any,
    field: str,
    *,
    low: float,
    high: float = math.inf,
    open_low: bool = False,
    open_high: bool = False,
) -> None:
    """Refuse a field that is no finite number in the range, naming the range."""
    value, name = getattr(config, field), type(config).__name__
    ok = isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
    if (
        ok
        and (low < value if open_low else low <= value)
        and (value < high if open_high else value <= high)
    ):
        return
    left, right = "(" if open_low else "[", ")" if open_high or high == math.inf else "]"
    raise ConfigError(
        f"{name}({field}={value!r}): {field} must be a number in {left}{low}, {high}{right}."
    )


def check_choice(config: Any, field: str, allowed: Sequence[str]) -> None:
    value = getattr(config, field)
    if value not in allowed:
        raise ConfigError(
            f"{type(config).__name__}({field}={value!r}): {field} must be one of {list(allowed)}."
        )


def check_common(config: Any) -> None:
    """The fields every rule has: seed, dtype, modules_to_save, and targets as far as they need no
    model; and dropout where there is any.
    """
    from .target_spec import (
        normalise,
    )  # here, so that a configuration module can be read from the top

    if hasattr(config, "dropout"):
        check_number(config, "dropout", low=0.0, high=1.0, open_high=True)
    check_tensors(config)
    check_modules(config)
    object.__setattr__(config, "targets", normalise(config.targets))


def check_tensors(config: Any) -> None:
    """The fields that say how tensors are drawn and held: seed and dtype, which becomes a name."""
    if (
        isinstance(config.seed, bool)
        or not isinstance(config.seed, int)
        or not 0 <= config.seed < 2**63
    ):
        raise ConfigError(
            f"{type(config).__name__}(seed={config.seed!r}): seed must be a whole number from 0 to "
            "2**63-1."
        )
    if isinstance(config.dtype, torch.dtype):
        object.__setattr__(config, "dtype", str(config.dtype).removeprefix("torch."))
    check_choice(config, "dtype", list(DTYPES))


def check_modules(config: Any) -> None:
    value = config.modules_to_save
    if (
        isinstance(value, str)
        or not isinstance(value, Sequence)
        or not all(isinstance(v, str) and v for v in value)
    ):
        raise ConfigError(
            f"{type(config).__name__}(modules_to_save={value!r}): write a list of module name "
            "endings, "
            'for example ["classifier"].'
        )
    object.__setattr__(config, "modules_to_save", tuple(value))
    words = train_spec.normalise(type(config).__name__, config.train, hasattr(config, "targets"))
    object.__setattr__(config, "train", words)
