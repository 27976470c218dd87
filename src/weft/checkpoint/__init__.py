"""Adapters on disk: one directory per adapter, strict in both directions, atomic, never unpickled.

files.py          finds, writes and reads the two files of a directory; directories.py writes new ones
header.py         Weft's header in the tensors' file, sealed; header_fields.py checks its
                  form; drawn.py has the checksums of seeds
checkpoint.py     a checkpoint in memory; problems.py collects its faults
formats/          one file per format (Weft's own and those of peft), one list
from_adapter.py   adapter -> checkpoint; save.py writes it
read.py           directory -> checkpoint; load_plan.py matches it with a model (matching.py: names,
                  projections.py: VeRA's A and B); load.py fills the adapter
export.py         directory -> directory in another form, by the functions in conversions.py
inspect.py        directory -> description
"""

from ..model.adapter import bind_disk
from .checkpoint import LoadReport
from .export import Exported, export
from .inspect import Inspection, inspect
from .load import load
from .save import Disk, save

bind_disk(Disk())

__all__ = ["Exported", "Inspection", "LoadReport", "export", "inspect", "load", "save"]
