"""Log-likelihood scores by lm-evaluation-harness (the package `lm-eval`), through its public API,
of the model in memory with its adapter.

Tasks, prompts and metrics are the harness's. The commonsense sets are boolq, piqa, social_iqa,
hellaswag, winogrande, arc_easy, arc_challenge and openbookqa. The papers' numbers are from
generate-and-match (`weft.tasks.commonsense`) and are not comparable with these.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from difflib import get_close_matches
from pathlib import Path
from typing import Any

from ..errors import ConfigError, WeftError
from .opened import Opened


@dataclass(frozen=True)
class Harness:
    """scores: task to metric to value, with the harness's names. versions, shots and examples are
    by task. release: the version of the harness.
    """

    scores: dict[str, dict[str, float]]
    versions: dict[str, Any]
    shots: dict[str, Any]
    examples: dict[str, int]
    release: str


def find_tasks(names: Sequence[str], include: Path | None = None) -> Any:
    """Returns the harness's index of tasks, with those of the folder `include`.

    Raises ConfigError, with the nearest names, if it has no task of a name; ImportError if the
    package is not installed.
    """
    from lm_eval.tasks import TaskManager

    if include is not None and not include.is_dir():
        raise ConfigError(f"--lm-eval-path {str(include)!r}: there is no such folder.")
    index = TaskManager(include_path=None if include is None else str(include))
    for name in names:
        if name not in index.all_tasks:
            near = get_close_matches(name, index.all_tasks, n=3) or [
                "arc_easy",
                "piqa",
                "hellaswag",
            ]
            raise ConfigError(
                f"--lm-eval {name!r}: lm-eval has no task of that name. Nearest: {', '.join(near)}."
            )
    return index


def harness_scores(
    opened: Opened,
    names: Sequence[str],
    index: Any,
    shots: int | None = None,
    limit: int | None = None,
    batch: int = 8,
) -> Harness:
    """Scores the first `limit` examples of these tasks. shots: examples in the prompt, None for
    each task's own number.

    Raises WeftError if the model is not a language model, or with the first line of an error of
    the harness.
    """
    import lm_eval
    from lm_eval.models.huggingface import HFLM

    if not opened.model.can_generate():
        raise WeftError(
            f"{type(opened.model).__name__} is not a language model; lm-eval needs the likelihood "
            "of text."
        )
    wrapped = HFLM(
        pretrained=opened.model,
        tokenizer=opened.tokenizer,
        batch_size=batch,
        max_length=opened.limit,
    )
    try:
        found = lm_eval.simple_evaluate(
            model=wrapped,
            tasks=list(names),
            task_manager=index,
            num_fewshot=shots,
            limit=limit,
            log_samples=False,
            bootstrap_iters=0,
        )
    except Exception as error:  # datasets, the hub and the harness raise errors of any kind
        first = next(
            (line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__
        )
        raise WeftError(f"lm-eval could not score {', '.join(names)}: {first}") from error
    result: dict[str, Any] = dict(found or {})
    scores = {
        name: {key: float(value) for key, value in row.items() if _is_number(value)}
        for name, row in result["results"].items()
    }
    return Harness(
        scores,
        dict(result.get("versions", {})),
        dict(result.get("n-shot", {})),
        {name: int(n["effective"]) for name, n in result.get("n-samples", {}).items()},
        str(lm_eval.__version__),
    )


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)
