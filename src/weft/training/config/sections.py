"""The sections of a configuration. Every key has its default here.

Values and combinations of values that make no sense raise ConfigError, with the key. No model and
no data is opened.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from ... import methods
from ...auditing.audit import UNREACHED
from ...errors import ConfigError
from ...model.groups import check_factors
from ...tasks.quantize import DEVICES, DTYPES, QUANTIZE
from .checks import Section, nearest, one_of, within

LANGUAGE = ("causal-lm", "image-text")  # models that write text
KINDS = (*LANGUAGE, "classification", "regression")
FORMATS = ("auto", "prompt", "text", "messages", "instruction", "label")
SCHEDULES = ("linear", "cosine", "constant")
REPORTERS = {"tensorboard": "tensorboard", "wandb": "wandb", "mlflow": "mlflow"}
# The order of a section's fields is the order in which a resolved configuration is written.


@dataclass(frozen=True, kw_only=True)
class ModelSection(Section):
    """The model. `kind` None means classification if the data has labels, image-text if it has
    images, else a causal language model.
    """

    path: str
    tokenizer: str | None = None  # None: the model's own
    kind: str | None = None
    dtype: str = "float32"  # of the frozen weights; "auto" as the checkpoint has them
    quantize: str | None = None  # a name of tasks.quantize.QUANTIZE; None: not quantised
    # Class names in the order of the outputs; None: those of the training data, sorted.
    labels: tuple[str, ...] | None = None
    # Tokens to add, whose rows train; "tokenizer": those for which the model has no embedding.
    new_tokens: Any = None

    def __post_init__(self) -> None:
        super().__post_init__()
        one_of(self, "dtype", DTYPES)
        if self.quantize is not None:
            one_of(self, "quantize", tuple(QUANTIZE))
        if self.new_tokens is not None:
            object.__setattr__(self, "new_tokens", _new_tokens(self.new_tokens))
        if self.kind is not None:
            one_of(self, "kind", KINDS)
        if self.labels is not None and len(self.labels) < 2:
            raise ConfigError(
                f"model.labels={list(self.labels)}: a classification needs two classes at least."
            )
        for name in self.labels or ():
            if name != name.strip() or not name or (self.labels or ()).count(name) > 1:
                raise ConfigError(
                    f"model.labels={list(self.labels or ())}: {name!r} must be a name without blanks "
                    "around it that is given once."
                )


def _new_tokens(given: Any) -> Any:
    """Checks model.new_tokens. Raises ConfigError."""
    if given == "tokenizer":
        return given
    texts = isinstance(given, list | tuple) and all(isinstance(t, str) and t for t in given)
    if not texts or not given or len(set(given)) != len(given):
        raise ConfigError(
            f"model.new_tokens={given!r}: write a list of different tokens, for example "
            '["<tool>", "</tool>"], or tokenizer for those that the tokenizer has and the model '
            "has no embeddings for."
        )
    return tuple(given)


@dataclass(frozen=True, kw_only=True)
class AdapterSection(Section):
    """`start` is a saved adapter of the same method whose tensors this run begins with. None draws
    new ones. With `other_base` it may have been trained on other weights than the run's base has.
    `loftq` begins with what model.quantize took from the weights.
    """

    start: str | None = None
    other_base: bool = False
    loftq: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.loftq and self.start is not None:
            raise ConfigError("adapter.loftq and adapter.start are two starts; leave one out.")
        if self.other_base and self.start is None:
            raise ConfigError("adapter.other_base does nothing without adapter.start.")


@dataclass(frozen=True, kw_only=True)
class DataSection(Section):
    """The samples and how they become tokens (docs/train.md lists the formats)."""

    # A .jsonl, .json, .csv, .tsv or .parquet file, a folder, a glob, a data set saved to disk, a hub
    # name, or a list of these; None if `task` has the data.
    train: str | tuple[str, ...] | None = None
    eval: str | tuple[str, ...] | None = None
    eval_share: float = 0.0  # of the training samples, held out if `eval` is None
    config: str | None = None  # of a hub name
    split: str = "train"
    eval_split: str = "validation"
    format: str = "auto"
    # Weft's name -> the file's, for example {prompt: question}.
    columns: Mapping[str, str] = field(default_factory=dict)
    # Columns and keys of messages that have no meaning for training; all others must be read.
    ignore: tuple[str, ...] = ()
    max_length: int = 512
    loss_on: str = "completion"  # or "all"
    chat_template: str | None = None  # a file; None: the tokenizer's own

    def __post_init__(self) -> None:
        super().__post_init__()
        one_of(self, "format", FORMATS)
        one_of(self, "loss_on", ("completion", "all"))
        within(self, "max_length", 2)
        within(self, "eval_share", 0.0, 1.0, open_high=True)
        if self.eval is not None and self.eval_share:
            raise ConfigError(
                "data.eval_share holds out a part of data.train, but data.eval is given too; take "
                "one."
            )


@dataclass(frozen=True, kw_only=True)
class OptimSection(Section):
    """AdamW. `lr` is the peak rate, `head_lr` that of the output head and `modules_to_save` (None:
    lr). `lora_plus` multiplies lr for LoRA's B, the ratio of LoRA+ (arXiv:2402.12354), and
    `lr_factors` for the method's tensors of any name. See `weft.parameter_groups`.
    """

    lr: float = 2e-4
    head_lr: float | None = None
    lora_plus: float | None = None
    lr_factors: Mapping[str, float] = field(default_factory=dict)
    weight_decay: float = 0.0
    betas: tuple[float, ...] = (0.9, 0.999)
    eps: float = 1e-8
    clip: float = 1.0  # largest gradient norm; 0 does not clip
    schedule: str = "linear"
    warm_up: float = 0.03  # a number of steps, or below 1 a share of them
    label_smoothing: float = 0.0

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("lr", "head_lr", "lora_plus", "eps"):
            if getattr(self, name) is not None:
                within(self, name, 0.0, open_low=True)
        for name in ("weight_decay", "clip", "warm_up"):
            within(self, name, 0.0)
        within(self, "label_smoothing", 0.0, 1.0, open_high=True)
        if len(self.betas) != 2 or not all(0 <= beta < 1 for beta in self.betas):
            raise ConfigError(f"optim.betas={list(self.betas)}: write two numbers in [0, 1).")
        if self.warm_up >= 1 and self.warm_up != int(self.warm_up):
            raise ConfigError(
                f"optim.warm_up={self.warm_up}: write a number of steps, or a share of them below "
                "1."
            )
        one_of(self, "schedule", SCHEDULES)


@dataclass(frozen=True, kw_only=True)
class TrainSection(Section):
    """Duration, batches and device. Give `steps` or `epochs`; neither means 3 epochs."""

    steps: int | None = None
    epochs: int | None = None
    batch: int = 8  # samples per device and micro-batch
    accumulate: int = 1  # micro-batches per optimiser step
    precision: str = "float32"  # "bfloat16": autocast; trained tensors keep their dtype
    gradient_checkpointing: bool = False
    seed: int = 0
    device: str = "auto"

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("steps", "epochs"):
            if getattr(self, name) is not None:
                within(self, name, 1)
        if self.steps is not None and self.epochs is not None:
            raise ConfigError("train.steps and train.epochs are both given; give one of them.")
        for name in ("batch", "accumulate"):
            within(self, name, 1)
        within(self, "seed", 0, 2**32 - 1)
        one_of(self, "precision", ("float32", "bfloat16"))
        one_of(self, "device", DEVICES)


@dataclass(frozen=True, kw_only=True)
class AuditSection(Section):
    """`unreached` "allow" accepts layers that gradients reach never, or more rarely than others, in
    the audited steps (layerdrop, an unused pooler, an expert without tokens), and names them in the
    log and in run.json.
    """

    unreached: str = "refuse"

    def __post_init__(self) -> None:
        super().__post_init__()
        one_of(self, "unreached", UNREACHED)


@dataclass(frozen=True, kw_only=True)
class EvalSection(Section):
    """Evaluation. `every` None means once per epoch. `best` names the metric that chooses the
    adapter to keep ("loss", "accuracy", ...; None keeps the last). `patience` stops after that many
    evaluations without a better one.
    """

    every: int | None = None
    batch: int | None = None  # None: train.batch
    # How many answers are generated, for a task whose answers are text; None: all, 0: none.
    records: int | None = None
    best: str | None = None
    patience: int | None = None
    min_delta: float = 0.0

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("every", "batch", "patience"):
            if getattr(self, name) is not None:
                within(self, name, 1)
        within(self, "min_delta", 0.0)
        if self.records is not None:
            within(self, "records", 0)
        if self.patience is not None and self.best is None:
            raise ConfigError(
                "eval.patience needs eval.best, the metric that must improve, for example loss."
            )


@dataclass(frozen=True, kw_only=True)
class SaveSection(Section):
    """Checkpoints for `--resume` and `weft analyze`. `every` None means once per epoch; one is
    always written at the end and on Ctrl-C. `keep` is how many of the newest are kept; None keeps
    all, like transformers' save_total_limit.
    """

    every: int | None = None
    keep: int | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("every", "keep"):
            if getattr(self, name) is not None:
                within(self, name, 1)


@dataclass(frozen=True, kw_only=True)
class LogSection(Section):
    """`every` is the number of steps between lines of log.jsonl, which is always written.
    `report_to` names other reporters.
    """

    every: int = 1
    report_to: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        super().__post_init__()
        within(self, "every", 1)
        for name in self.report_to:
            if name not in REPORTERS:
                raise ConfigError(
                    f"log.report_to: {name!r} is not known. {nearest(name, REPORTERS)}"
                )


@dataclass(frozen=True, kw_only=True)
class RunConfig(Section):
    """A complete configuration. `method` is a Weft configuration. `task` is a name of `weft.tasks`
    and replaces data.train.
    """

    out: str
    model: ModelSection
    method: Any
    adapter: AdapterSection = field(default_factory=AdapterSection)
    task: str | None = None
    data: DataSection = field(default_factory=DataSection)
    optim: OptimSection = field(default_factory=OptimSection)
    train: TrainSection = field(default_factory=TrainSection)
    audit: AuditSection = field(default_factory=AuditSection)
    eval: EvalSection = field(default_factory=EvalSection)
    save: SaveSection = field(default_factory=SaveSection)
    log: LogSection = field(default_factory=LogSection)

    def __post_init__(self) -> None:
        super().__post_init__()
        if not isinstance(self.method, methods.Config):
            raise ConfigError(
                f"method={self.method!r:.80}: write a configuration, for example weft.LoRA(r=8)."
            )
        if self.adapter.loftq and self.model.quantize is None:
            raise ConfigError(
                "adapter.loftq begins with what model.quantize takes from the weights, and "
                "model.quantize is not given."
            )
        _check_task_or_data(self)
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
            for name in ("every", "best", "patience"):
                if getattr(self.eval, name) is not None:
                    raise ConfigError(
                        f"eval.{name} needs evaluation data: give data.eval or data.eval_share."
                    )
        method, optim = self.method, self.optim
        own = list(method.shapes(8, 8)) if isinstance(method, methods.TensorConfig) else []
        check_factors(method, own, optim.lr_factors, optim.lora_plus, "optim.")


def _check_task_or_data(config: RunConfig) -> None:
    """Raises ConfigError unless data.train or task is given, and for keys that a task ignores."""
    task, data, unset = config.task, config.data, DataSection()
    if task is None:
        if data.train is None:
            raise ConfigError(
                "data.train and task: give one of them, your own data or the name of a task."
            )
        return
    if data.train is not None:
        raise ConfigError(f"task={task!r} brings its data; leave data.train out.")
    for f in dataclasses.fields(DataSection):
        used = f.name in ("max_length", "loss_on")
        if not used and getattr(data, f.name) != getattr(unset, f.name):
            raise ConfigError(
                f"task={task!r} brings its data, so data.{f.name} has no meaning; leave it out."
            )
