"""The configuration of `weft train`: one frozen dataclass per section, read from YAML and checked
before anything is loaded.

sections.py     the sections with their defaults and checks
read.py         YAML and plain values to a `RunConfig`, and back
build.py        a mapping to a dataclass, with checks of names and types
checks.py       checks of single values
yaml_loader.py  YAML in which 1e-3 is a number and duplicate keys are errors, read and written
"""

from .read import dump, from_dict, read_config, to_dict
from .sections import (
    AdapterSection,
    AuditSection,
    DataSection,
    EvalSection,
    LogSection,
    ModelSection,
    OptimSection,
    RunConfig,
    SaveSection,
    TrainSection,
)

__all__ = [
    "AdapterSection",
    "AuditSection",
    "DataSection",
    "EvalSection",
    "LogSection",
    "ModelSection",
    "OptimSection",
    "RunConfig",
    "SaveSection",
    "TrainSection",
    "dump",
    "from_dict",
    "read_config",
    "to_dict",
]
