"""The record of a run in run.json before its first step."""

from __future__ import annotations

from typing import Any

from ..auditing.base_digest import base_fingerprint
from ..auditing.snapshot import Snapshot
from . import processes
from .adapted import Adapted
from .prepare import Data


def facts(data: Data, adapted: Adapted, steps: int) -> dict[str, Any]:
    """Returns the facts that a reader of the run wants to know."""
    return {
        "kind": data.kind,
        "format": data.format,
        "classes": data.classes and list(data.classes),
        "steps": steps,
        "samples": len(data.train),
        "eval_samples": None if data.eval is None else len(data.eval),
        "trained_numbers": adapted.adapter.num_parameters,
        "head_numbers": adapted.adapter.num_head_parameters,
        "embeddings": data.new_tokens.words or None,
        "counts": vars(data.train.counts),
        "started_from": adapted.started,
        "rendered_at": None if data.rendered_at is None else data.rendered_at.isoformat(),
        "notes": data.notes + adapted.notes,
    }


def identity(data: Data, adapted: Adapted, before: Snapshot) -> dict[str, Any]:
    """Returns the values that must not change when a run is resumed."""
    return {
        "model": base_fingerprint(before.base, adapted.missing),
        "train": data.train.fingerprint(),
        "eval": None if data.eval is None else data.eval.fingerprint(),
        "processes": processes.count(),
        "start": None if adapted.started is None else adapted.started["fingerprint"],
        "trained": {
            name: f"{list(p.shape)} {str(p.dtype).removeprefix('torch.')}"
            for name, p in adapted.adapter.named_parameters()
        },
    }
