"""The earlier name of `load_plan.py`, which training/start.py still imports."""

from .load_plan import LoadPlan as Placement

__all__ = ["Placement"]
