"""The effect of an update: magnitude and direction of the weights over the checkpoints of a run,
and their correlation.

changes.py   delta M and delta D of one matrix, and of every matrix that an adapter changes
series.py    which directories are the checkpoints of which run
relate.py    correlation and slope: pooled, between matrices, within a matrix over time; with intervals
analyze.py   all of it for a model and its runs
report.py    text and JSON; plots.py the plot of the paper

Source: arXiv:2402.09353 (DoRA), section 3.2 and appendix A.
"""

from .analyze import Analysis, RunAnalysis, analyze
from .changes import Change, change
from .relate import Relation, relate
from .series import Series, read_series

__all__ = [
    "Analysis",
    "Change",
    "Relation",
    "RunAnalysis",
    "Series",
    "analyze",
    "change",
    "read_series",
    "relate",
]
