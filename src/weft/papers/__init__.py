"""THE PAPERS' FIGURES: every parameter count that they print, rebuilt from a real model and
compared.

tables.json       the figures: table, row, configuration, what is printed, and why where it does not reproduce
tables.py         that file, read
figures.py        "36.8K" as a number; does a count print like that
architectures.py  the models, on the meta device
rebuild.py        each row attached, counted and held against its figure
formulas.py       the closed form of each method
report.py         text and JSON
"""

from .rebuild import Result, rebuild
from .report import as_json, as_text
from .tables import find, tables

__all__ = ["Result", "as_json", "as_text", "find", "rebuild", "tables"]
