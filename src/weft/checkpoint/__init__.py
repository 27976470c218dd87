"""ON DISK: one directory an adapter, strict in both directions, atomic, never unpickled.

files.py      safetensors and JSON on the disk: atomic writes, checked reads
content.py    what a checkpoint says, whoever wrote it
native.py     Weft's own layout: the tensors of equal shape stacked, so that a file is little more than its numbers
peft_*.py     the layouts of `peft`, both ways, one file a method
save.py load.py matching.py inspection.py
"""

from ..model.adapter import bind_disk
from .content import LoadReport
from .inspection import Inspection, inspect
from .load import load
from .save import Disk, save

bind_disk(Disk())

__all__ = ["Inspection", "LoadReport", "inspect", "load", "save"]
