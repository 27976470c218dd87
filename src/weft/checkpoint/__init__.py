"""ON DISK: one directory an adapter, strict in both directions, atomic, never unpickled.

files.py      safetensors and JSON on the disk: atomic writes, checked reads
content.py    what a checkpoint says, whoever wrote it
header.py     what the tensors' file says of itself, sealed
native.py     Weft's own layout: the tensors of equal shape stacked, so that a file is little more than its numbers
peft_*.py     the layouts of `peft`, both ways, one file a method
placement.py  a checkpoint held against a model; matching.py for names, matrices.py for VeRA's A and B
save.py load.py inspection.py export.py
"""

from ..model.adapter import bind_disk
from .content import LoadReport
from .export import Exported, export
from .inspection import Inspection, inspect
from .load import load
from .save import Disk, save

bind_disk(Disk())

__all__ = ["Exported", "Inspection", "LoadReport", "export", "inspect", "load", "save"]
