"""Metrics of the multimodal benchmarks: one file per family, each with functions of texts alone and
a scorer of the authors' files, for `weft score`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path

from ..generation import Report
from . import captions, choices, gqa, nlvr2, pope, vqa

FileScorer = Callable[[Path, Path], Report]
SCORERS: Mapping[str, FileScorer] = {
    **captions.SCORERS,
    **choices.SCORERS,
    **gqa.SCORERS,
    **nlvr2.SCORERS,
    **pope.SCORERS,
    **vqa.SCORERS,
}
