"""The configuration of `weft train`: one frozen dataclass a section, read from YAML and checked
before anything is loaded.

Every key has its default here. `read_config` refuses, naming file, key and the nearest name, what
no field stands for, a value of another type, a key that stands twice, and combinations that cannot
be meant. No model and no data is opened.
"""

from __future__ import annotations

import dataclasses
import math
import types
import typing
from collections.abc import Mapping, Sequence
from dataclasses import MISSING, dataclass, field
from difflib import get_close_matches
from pathlib import Path
from typing import Any

from .. import methods
from ..errors import ConfigError

KINDS = ("causal-lm", "classification", "regression")
FORMATS = ("auto", "prompt", "text", "messages", "instruction", "label")
DTYPES = ("auto", "float32", "bfloat16", "float16")
SCHEDULES = ("linear", "cosine", "constant")
REPORTERS = {"tensorboard": "tensorboard", "wandb": "wandb", "mlflow": "mlflow"}
# The order of a section's fields is the order in which a resolved configuration is written.


@dataclass(frozen=True, kw_only=True)
class ModelSection:
    """What is adapted. `kind` None: classification where the data has labels, else a causal
    language model.
    """

    path: str
    tokenizer: str | None = None  # None: the model's own
    kind: str | None = None
    dtype: str = "float32"  # of the frozen weights; "auto" as the checkpoint has them
    labels: tuple[str, ...] | None = (
        None  # class names in order; None: those of the training data, sorted
    )

    def __post_init__(self) -> None:
        _one_of(self, "dtype", DTYPES)
        if self.kind is not None:
            _one_of(self, "kind", KINDS)


@dataclass(frozen=True, kw_only=True)
class AdapterSection:
    """`start`: a saved adapter of the same method, whose tensors this run begins with; None begins
    anew.
    """

    start: str | None = None


@dataclass(frozen=True, kw_only=True)
class DataSection:
    """Where samples come from and how they become tokens (docs/train.md lists the formats)."""

    train: str | None = (
        # a .jsonl, .json, .csv, .tsv or .parquet file, or a hub name; None where `task` brings it
        None
    )
    eval: str | None = None
    eval_share: float = 0.0  # of the training samples, held out where `eval` is None
    config: str | None = None  # of a hub name
    split: str = "train"
    eval_split: str = "validation"
    format: str = "auto"
    columns: Mapping[str, str] = field(
        default_factory=dict
    )  # our name -> the file's, e.g. {prompt: question}
    max_length: int = 512
    loss_on: str = "completion"  # or "all"
    chat_template: str | None = None  # a file; None: the tokenizer's own

    def __post_init__(self) -> None:
        _one_of(self, "format", FORMATS)
        _one_of(self, "loss_on", ("completion", "all"))
        _within(self, "max_length", 2)
        _within(self, "eval_share", 0.0, 1.0, open_high=True)
        if self.eval is not None and self.eval_share:
            raise ConfigError(
                "data.eval_share holds out a part of data.train, and data.eval is given too; take "
                "one."
            )


@dataclass(frozen=True, kw_only=True)
class OptimSection:
    """AdamW. `lr` is the peak rate; `head_lr` that of the output head and `modules_to_save` (None:
    lr); `lr_factors` multiplies lr for the method's tensors of that name, so {B: 16} is LoRA+
    (arXiv:2402.12354).

    Weight decay acts on matrices; vectors (biases, norms, magnitudes, VeRA's b and d) have none.
    """

    lr: float = 2e-4
    head_lr: float | None = None
    lr_factors: Mapping[str, float] = field(default_factory=dict)
    weight_decay: float = 0.0
    betas: tuple[float, ...] = (0.9, 0.999)
    eps: float = 1e-8
    clip: float = 1.0  # largest gradient norm; 0 does not clip
    schedule: str = "linear"
    warm_up: float = 0.03  # a number of steps, or below 1 a share of them
    label_smoothing: float = 0.0

    def __post_init__(self) -> None:
        for name in ("lr", "head_lr", "eps"):
            if getattr(self, name) is not None:
                _within(self, name, 0.0, open_low=True)
        for name, value in self.lr_factors.items():
            if not math.isfinite(value) or value <= 0:
                raise ConfigError(f"optim.lr_factors.{name}={value!r}: write a number above 0.")
        for name in ("weight_decay", "clip", "warm_up"):
            _within(self, name, 0.0)
        _within(self, "label_smoothing", 0.0, 1.0, open_high=True)
        if len(self.betas) != 2 or not all(0 <= beta < 1 for beta in self.betas):
            raise ConfigError(f"optim.betas={list(self.betas)}: write two numbers in [0, 1).")
        if self.warm_up >= 1 and self.warm_up != int(self.warm_up):
            raise ConfigError(
                f"optim.warm_up={self.warm_up}: write a number of steps, or a share of them below "
                "1."
            )
        _one_of(self, "schedule", SCHEDULES)


@dataclass(frozen=True, kw_only=True)
class TrainSection:
    """How long, in what portions, on what. Of `steps` and `epochs` one is given; neither means 3
    epochs.
    """

    steps: int | None = None
    epochs: int | None = None
    batch: int = 8  # samples a device and micro-batch
    accumulate: int = 1  # micro-batches an optimiser step
    precision: str = (
        "float32"  # "bfloat16": autocast; the trained tensors stay as the method has them
    )
    gradient_checkpointing: bool = False
    seed: int = 0
    device: str = "auto"

    def __post_init__(self) -> None:
        for name in ("steps", "epochs"):
            if getattr(self, name) is not None:
                _within(self, name, 1)
        if self.steps is not None and self.epochs is not None:
            raise ConfigError("train.steps and train.epochs both say how long; give one of them.")
        for name in ("batch", "accumulate"):
            _within(self, name, 1)
        _within(self, "seed", 0, 2**32 - 1)
        _one_of(self, "precision", ("float32", "bfloat16"))
        _one_of(self, "device", ("auto", "cpu", "cuda"))


@dataclass(frozen=True, kw_only=True)
class EvalSection:
    """Evaluation on the evaluation data. `every` None: once an epoch. `best` names the metric that
    chooses the adapter that is kept ("loss", "accuracy", ...; None keeps the last); `patience`
    stops after so many evaluations without a better one.
    """

    every: int | None = None
    batch: int | None = None  # None: train.batch
    records: int | None = (
        None  # of a task whose answers are text: how many are generated; None all, 0 none
    )
    best: str | None = None
    patience: int | None = None
    min_delta: float = 0.0

    def __post_init__(self) -> None:
        for name in ("every", "batch", "patience"):
            if getattr(self, name) is not None:
                _within(self, name, 1)
        _within(self, "min_delta", 0.0)
        if self.records is not None:
            _within(self, "records", 0)
        if self.patience is not None and self.best is None:
            raise ConfigError(
                "eval.patience needs eval.best, the metric that shall improve, for example loss."
            )


@dataclass(frozen=True, kw_only=True)
class SaveSection:
    """Checkpoints to go on from, which `weft analyze` follows over time too. `every` None: once an
    epoch, and always at the end and on Ctrl-C. `keep`: how many, the newest; None keeps all, as
    transformers' save_total_limit does.
    """

    every: int | None = None
    keep: int | None = None

    def __post_init__(self) -> None:
        for name in ("every", "keep"):
            if getattr(self, name) is not None:
                _within(self, name, 1)


@dataclass(frozen=True, kw_only=True)
class LogSection:
    """`every`: steps between two lines of log.jsonl, which is always written. `report_to`: more
    places.
    """

    every: int = 1
    report_to: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        _within(self, "every", 1)
        for name in self.report_to:
            if name not in REPORTERS:
                raise ConfigError(
                    f"log.report_to: {name!r} is not known. {_nearest(name, REPORTERS)}"
                )


@dataclass(frozen=True, kw_only=True)
class RunConfig:
    """All of it. `method` is a Weft configuration, `task` a name of `weft.tasks`, in place of
    data.train.
    """

    out: str
    model: ModelSection
    method: Any
    adapter: AdapterSection = field(default_factory=AdapterSection)
    task: str | None = None
    data: DataSection = field(default_factory=DataSection)
    optim: OptimSection = field(default_factory=OptimSection)
    train: TrainSection = field(default_factory=TrainSection)
    eval: EvalSection = field(default_factory=EvalSection)
    save: SaveSection = field(default_factory=SaveSection)
    log: LogSection = field(default_factory=LogSection)

    def __post_init__(self) -> None:
        if (self.task is None) == (self.data.train is None):
            raise ConfigError(
                "data.train and task: give one of them, the data of your own or the name of a task."
                if self.task is None
                else f"task={self.task!r} brings its data; leave data.train out."
            )
        for f in dataclasses.fields(DataSection) if self.task is not None else ():
            if f.name not in ("max_length", "loss_on") and getattr(self.data, f.name) != getattr(
                DataSection(), f.name
            ):
                raise ConfigError(
                    f"task={self.task!r} brings its data, so data.{f.name} has no meaning; leave "
                    "it out."
                )
        if (
            self.optim.warm_up >= 1
            and self.train.steps is not None
            and self.optim.warm_up >= self.train.steps
        ):
            raise ConfigError(
                f"optim.warm_up={self.optim.warm_up:g} is all of train.steps={self.train.steps} or "
                "more."
            )
        if self.task is None and self.data.eval is None and not self.data.eval_share:
            given = [
                name
                for name in ("every", "best", "patience")
                if getattr(self.eval, name) is not None
            ]
            if given:
                raise ConfigError(
                    f"eval.{given[0]} needs evaluation data: give data.eval or data.eval_share."
                )
        _check_factors(self.method, self.optim)


_SECTIONS = {f.name: f for f in dataclasses.fields(RunConfig)}


def read_config(path: str | Path, settings: Sequence[str] = ()) -> RunConfig:
    """The configuration in a YAML file with the overrides `settings` ("optim.lr=1e-3"). Raises
    ConfigError, one line.
    """
    file = Path(path).expanduser()
    try:
        text = file.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{str(path)!r} cannot be read: {error}") from None
    data = _parse(text, str(path))
    if not isinstance(data, dict):
        raise ConfigError(
            f"{path}: a configuration is a mapping with the keys {', '.join(_SECTIONS)}."
        )
    for setting in settings:
        _override(data, setting)
    return from_dict(data)


def from_dict(data: Mapping[str, Any]) -> RunConfig:
    """The same from plain values, as YAML gives them. Raises ConfigError."""
    data = dict(data)
    method = data.pop("method", None)
    if not isinstance(method, Mapping) or not isinstance(method.get("name"), str):
        raise ConfigError(
            "method: write a mapping with a name, for example method: {name: LoRA, r: 8}."
        )
    fields = {k: v for k, v in method.items() if k != "name"}
    try:
        config = methods.from_json({**fields, "method": method["name"]})
    except TypeError as error:  # a value of a type that a method's own check does not expect
        raise ConfigError(f"method: {error}") from None
    except ConfigError as error:
        raise ConfigError(f"method: {error}") from None
    return _build(RunConfig, {**data, "method": config}, "")  # type: ignore[no-any-return]


def to_dict(config: RunConfig) -> dict[str, Any]:
    """Plain values of every field, defaults included; `from_dict` reads them."""
    plain: dict[str, Any] = _plain(config)
    method = methods.to_json(config.method)
    plain["method"] = {"name": method.pop("method"), **method}
    return plain


def dump(config: RunConfig) -> str:
    """The resolved configuration as YAML."""
    import yaml

    text: str = yaml.safe_dump(to_dict(config), sort_keys=False, allow_unicode=True, width=100)
    return text


def _plain(value: Any) -> Any:
    if (
        dataclasses.is_dataclass(value)
        and not isinstance(value, type)
        and type(value) not in methods.METHODS.values()
    ):
        return {f.name: _plain(getattr(value, f.name)) for f in dataclasses.fields(value)}
    if isinstance(value, Mapping):
        return {k: _plain(v) for k, v in value.items()}
    return list(value) if isinstance(value, tuple) else value


def _parse(text: str, where: str) -> Any:
    import yaml

    from .yaml_loader import loader

    try:
        return yaml.load(text, Loader=loader())  # of a subclass of SafeLoader
    except yaml.YAMLError as error:
        raise ConfigError(f"{where} is no readable YAML: {' '.join(str(error).split())}") from None


def _override(data: dict[str, Any], setting: str) -> None:
    key, equals, text = setting.partition("=")
    path = key.split(".")
    if not equals or not all(path):
        raise ConfigError(f"--set {setting!r}: write KEY=VALUE, for example --set optim.lr=1e-3.")
    place = data
    for name in path[:-1]:
        inner = place.setdefault(name, {})
        if inner is None:
            inner = place[name] = {}
        if not isinstance(inner, dict):
            raise ConfigError(f"--set {setting!r}: {name!r} is a value and has no keys below it.")
        place = inner
    place[path[-1]] = _parse(text, f"--set {setting!r}")


def _build(cls: type[Any], data: Any, where: str) -> Any:
    """An instance of a section from a mapping; `where` is its dotted place with a dot behind it, or
    ''.
    """
    name = where.rstrip(".") or "the configuration"
    if data is None and where:
        data = {}
    if not isinstance(data, Mapping):
        raise ConfigError(
            f"{name}={data!r}: write a mapping with keys of "
            f"{[f.name for f in dataclasses.fields(cls)]}."
        )
    hints = typing.get_type_hints(cls)
    known = {f.name: f for f in dataclasses.fields(cls)}
    for key in data:
        if key not in known:
            raise ConfigError(f"{where}{key} is not known. {_nearest(str(key), known, where)}")
    values = {}
    for key, f in known.items():
        if key in data:
            values[key] = _value(hints[key], data[key], where + key)
        elif f.default is MISSING and f.default_factory is MISSING:
            raise ConfigError(f"{where}{key} is missing.")
    return cls(**values)


def _value(hint: Any, value: Any, where: str) -> Any:
    if dataclasses.is_dataclass(hint):
        return _build(typing.cast(type[Any], hint), value, where + ".")
    origin = typing.get_origin(hint)
    if hint is Any:
        return value
    if origin in (typing.Union, types.UnionType):
        if value is None:
            return None
        return _value(next(t for t in typing.get_args(hint) if t is not type(None)), value, where)
    if origin is tuple:
        if not isinstance(value, list | tuple):
            raise ConfigError(f"{where}={value!r}: write a list.")
        return tuple(_value(typing.get_args(hint)[0], item, where) for item in value)
    if origin is not None:  # a mapping
        if not isinstance(value, Mapping):
            raise ConfigError(f"{where}={value!r}: write a mapping.")
        return {
            str(k): _value(typing.get_args(hint)[1], v, f"{where}.{k}") for k, v in value.items()
        }
    return _scalar(hint, value, where)


def _scalar(hint: type[Any], value: Any, where: str) -> Any:
    if hint is float and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    if type(value) is hint:
        return value
    said = {int: "a whole number", float: "a number", str: "text", bool: "true or false"}[hint]
    raise ConfigError(f"{where}={value!r}: write {said}.")


def _nearest(name: str, known: Any, where: str = "") -> str:
    near = get_close_matches(name, known, n=2, cutoff=0.5)
    return (
        f"Nearest: {', '.join(where + n for n in near)}." if near else f"Known: {', '.join(known)}."
    )


def _section(config: Any) -> str:
    return type(config).__name__.removesuffix("Section").lower()


def _one_of(config: Any, name: str, allowed: Sequence[str]) -> None:
    value = getattr(config, name)
    if value not in allowed:
        raise ConfigError(
            f"{_section(config)}.{name}={value!r} is not one of {', '.join(allowed)}. "
            + (
                f"Nearest: {near[0]}."
                if (near := get_close_matches(str(value), allowed, n=1))
                else ""
            )
        )


def _within(
    config: Any,
    name: str,
    low: float,
    high: float = math.inf,
    *,
    open_low: bool = False,
    open_high: bool = False,
) -> None:
    value = getattr(config, name)
    if (
        math.isfinite(value)
        and (low < value if open_low else low <= value)
        and (value < high if open_high else value <= high)
    ):
        return
    above = f"above {low:g}" if open_low else f"{low:g} or more"
    below = "" if high == math.inf else f" and {'below' if open_high else 'at most'} {high:g}"
    raise ConfigError(f"{_section(config)}.{name}={value!r}: it must be {above}{below}.")


def _check_factors(method: Any, optim: OptimSection) -> None:
    """The names in lr_factors are tensors that the method trains."""
    own = list(method.trained(8, 8)) if hasattr(method, "trained") else []
    for name in optim.lr_factors:
        if name not in own:
            have = (
                f"It trains {', '.join(own)}."
                if own
                else "It has no tensors of its own; use optim.lr."
            )
            raise ConfigError(
                f"optim.lr_factors.{name}: {type(method).__name__} trains no tensor of that name. "
                f"{have}"
            )
