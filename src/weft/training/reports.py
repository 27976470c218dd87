"""Weights & Biases and MLflow: the run's configuration, which the Trainer's own reporters do not
send, and the end of a run.
"""

from __future__ import annotations

from typing import Any

from transformers import TrainerCallback

from .config.read import to_dict
from .config.sections import RunConfig
from .resume import flat


class Report(TrainerCallback):  # type: ignore[misc]
    """Sends the configuration: the Trainer's reporters know nothing of the method and the data.

    W&B has it as `weft` in the run's config, MLflow as parameters such as "weft.method.r". A
    reporter's run that was opened for this run is closed at its end; otherwise the next run of the
    process would be written into it.
    """

    def __init__(self, config: RunConfig) -> None:
        self.config = config
        self.own = [
            name for name in config.log.report_to if name in _ACTIVE and _ACTIVE[name]() is None
        ]

    def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        if not state.is_world_process_zero:
            return
        if "wandb" in self.config.log.report_to:
            import wandb

            wandb.config.update({"weft": to_dict(self.config)}, allow_val_change=True)
        if "mlflow" in self.config.log.report_to:
            import mlflow
            from mlflow.utils.validation import MAX_PARAM_VAL_LENGTH

            mlflow.log_params(
                {
                    f"weft.{key}": str(value)[:MAX_PARAM_VAL_LENGTH]
                    for key, value in flat(to_dict(self.config)).items()
                }
            )

    def close(self, failed: bool) -> None:
        """Closes the reports of this run."""
        for name in self.own:
            if _ACTIVE[name]() is not None:
                _END[name](failed)


def _wandb_run() -> Any:
    import wandb

    return wandb.run


def _mlflow_run() -> Any:
    import mlflow

    return mlflow.active_run()


def _end_wandb(failed: bool) -> None:
    import wandb

    wandb.finish(exit_code=int(failed))


def _end_mlflow(failed: bool) -> None:
    import mlflow

    mlflow.end_run("FAILED" if failed else "FINISHED")


_ACTIVE = {"wandb": _wandb_run, "mlflow": _mlflow_run}
_END = {"wandb": _end_wandb, "mlflow": _end_mlflow}
