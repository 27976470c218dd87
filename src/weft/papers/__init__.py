"""The papers' parameter counts, recomputed from real models and compared.

tables.json       the printed figures: table, row, configuration, and the reason if one is not reproduced
tables.py         reads that file
figures.py        parses "36.8K"; decides whether a count would be printed like that
architectures.py  the models, on the meta device
rebuild.py        attaches each row, counts, and compares with its figure
formulas.py       the closed form of each method
report.py         text and JSON
"""

from .rebuild import Result, rebuild
from .report import papers_json, papers_text
from .tables import find_table, tables

__all__ = ["Result", "papers_json", "papers_text", "find_table", "rebuild", "tables"]
