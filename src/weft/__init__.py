"""Weft: parameter-efficient fine-tuning with the LoRA family, exact and never silent."""

from .auditing.audit import audit
from .auditing.snapshot import snapshot
from .checkpoint import export, inspect, load, save
from .checkpoint.loftq import LoftQReport, loftq
from .errors import (
    AuditError,
    CheckpointError,
    ConfigError,
    MergeError,
    TargetError,
    UnsupportedError,
    WeftError,
)
from .methods import (
    AdaLoRA,
    BitFit,
    Bottleneck,
    DoRA,
    DVoRA,
    DyLoRA,
    Full,
    Head,
    LoRA,
    LoRAFA,
    PreEmbed,
    Prefix,
    PreLayer,
    TopLayers,
    VeRA,
)
from .model.adapter import Adapter
from .model.attach import adapters, attach
from .model.combine import combine
from .model.detach import detach
from .model.groups import parameter_groups
from .model.merge import effective_weight, merge, unmerge
from .model.merge_report import MergeReport
from .model.use import use

__version__ = "0.1.0"

__all__ = [
    "AdaLoRA",
    "Adapter",
    "AuditError",
    "BitFit",
    "Bottleneck",
    "CheckpointError",
    "ConfigError",
    "DVoRA",
    "DoRA",
    "DyLoRA",
    "Full",
    "Head",
    "LoRA",
    "LoRAFA",
    "LoftQReport",
    "MergeError",
    "MergeReport",
    "PreEmbed",
    "PreLayer",
    "Prefix",
    "TargetError",
    "TopLayers",
    "UnsupportedError",
    "VeRA",
    "WeftError",
    "adapters",
    "attach",
    "audit",
    "combine",
    "detach",
    "effective_weight",
    "export",
    "inspect",
    "load",
    "loftq",
    "merge",
    "parameter_groups",
    "save",
    "snapshot",
    "unmerge",
    "use",
]
