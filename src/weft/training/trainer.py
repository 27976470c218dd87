"""`transformers.Trainer` for one Weft adapter, with its own parameter groups, order of the samples,
and checkpoints.

This file, callbacks.py, log.py and reports.py import transformers at their top, since they derive
from its classes. `run.py` imports them only when a run begins.
"""

from __future__ import annotations

import shutil
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.utils.data import DataLoader
from transformers import PrinterCallback, Trainer, TrainingArguments

from ..encoding.collate import collate
from ..errors import ConfigError
from ..inference.generate import answer
from ..model.adapter import Adapter
from . import processes, scored
from .config.sections import LANGUAGE, RunConfig
from .losses import first, loss_for, metrics_for, reduced
from .optimizer import groups
from .prepare import Data, Length
from .resume import read_state, write_state
from .sampling import EpochOrder, seeded


class AdapterTrainer(Trainer):  # type: ignore[misc]
    """A Trainer that moves, saves and restores an adapter and nothing else."""

    def __init__(
        self,
        config: RunConfig,
        data: Data,
        adapter: Adapter,
        args: TrainingArguments,
        order: EpochOrder,
        callbacks: list[Any],
    ) -> None:
        self.config, self.data, self.adapter, self.order = config, data, adapter, order
        self.answer_scores: dict[str, float] = {}
        super().__init__(
            model=adapter.model,
            args=args,
            train_dataset=data.train,
            eval_dataset=data.eval,
            data_collator=data.collator or partial(collate, pad=data.pad),
            compute_loss_func=loss_for(data.kind, config.optim.label_smoothing),
            compute_metrics=self._metrics,
            callbacks=callbacks,
            preprocess_logits_for_metrics=reduced if data.kind in LANGUAGE else first,
        )
        self.remove_callback(PrinterCallback)  # log.Log prints

    def create_optimizer(self, model: nn.Module | None = None) -> torch.optim.Optimizer:
        """Returns AdamW over the adapter's tensors. Raises ConfigError for a rate without tensors."""
        self.optimizer: torch.optim.Optimizer | None
        if self.optimizer is None:
            optim = self.config.optim
            self.optimizer = torch.optim.AdamW(
                groups(self.adapter, optim),
                lr=optim.lr,
                eps=optim.eps,
                betas=(optim.betas[0], optim.betas[1]),
            )
        return self.optimizer

    def get_train_dataloader(self) -> DataLoader[Any]:
        """Returns the samples in the order of `EpochOrder`, without use of a global generator."""
        loader: DataLoader[Any] = self.accelerator.prepare(
            DataLoader(
                self.train_dataset,
                batch_size=self._train_batch_size,
                sampler=self.order,
                collate_fn=self.data_collator,
                pin_memory=self.args.dataloader_pin_memory,
                generator=torch.Generator().manual_seed(self.args.seed),
            )
        )
        return loader

    def get_eval_dataloader(self, eval_dataset: Any = None) -> DataLoader[Any]:
        """Returns the evaluation samples in their order, without use of a global generator."""
        loader: DataLoader[Any] = self.accelerator.prepare(
            DataLoader(
                eval_dataset if eval_dataset is not None else self.eval_dataset,
                batch_size=self.args.eval_batch_size,
                collate_fn=self.data_collator,
                pin_memory=self.args.dataloader_pin_memory,
                generator=torch.Generator().manual_seed(self.args.seed),
            )
        )
        return loader

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: Any = None,
    ) -> Any:
        """Calls the Trainer's, which passes no labels to the model. The logits of a language model
        are those of the tokens in the loss.
        """
        labels = inputs.get("labels")
        others = {key: value for key, value in inputs.items() if key != "labels"}
        with scored.answering(self.adapter.model, others, labels):
            return super().compute_loss(model, inputs, return_outputs, num_items_in_batch)

    def evaluate(
        self,
        eval_dataset: Any = None,
        ignore_keys: list[str] | None = None,
        metric_key_prefix: str = "eval",
    ) -> dict[str, float]:
        """Scores a task's generated answers, then calls the Trainer's, so that all scores are in
        one log line.
        """
        self.answer_scores = self._answers() if eval_dataset is None else {}
        found: dict[str, float] = super().evaluate(eval_dataset, ignore_keys, metric_key_prefix)
        return found

    def _metrics(self, found: Any) -> dict[str, float]:
        return {**metrics_for(self.data.kind)(found), **self.answer_scores}

    def _answers(self) -> dict[str, float]:
        task, renderer, limit = self.data.task, self.data.renderer, self.config.eval.records
        if task is None or renderer is None or limit == 0:
            return {}
        records = task.eval_records("validation")[:limit]
        with seeded(self.args.seed, self.args.device):
            texts = answer(
                self.model,
                renderer,
                [r["prompt"] for r in records],
                task.generation,
                self.args.eval_batch_size,
            )
        return {
            name: value
            for name, value in task.scorer(texts, records).scores.items()
            if value is not None
        }

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """Writes the adapter like `weft.save`, and its training state. The checkpoint is complete
        only after `on_save`.
        """
        folder = Path(output_dir if output_dir is not None else self.args.output_dir)
        if self.args.should_save:
            shutil.rmtree(folder, ignore_errors=True)  # of a run that was killed in a save
            self.adapter.save(folder)
            write_state(self.adapter, folder)
        if self.args.world_size > 1:
            torch.distributed.barrier()  # the others write their random states into the folder next

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        """Calls the Trainer's. Raises OSError if the disk is full, for which torch.save raises
        RuntimeError.
        """
        try:
            super()._save_checkpoint(model, trial)
        except RuntimeError as error:
            if not any(
                word in str(error)
                for word in ("PytorchStreamWriter", "inline_container", "iostream")
            ):
                raise
            raise OSError(
                f"checkpoint-{self.state.global_step} could not be written whole"
            ) from error

    def _load_from_checkpoint(
        self, resume_from_checkpoint: str, model: nn.Module | None = None
    ) -> None:
        read_state(self.adapter, Path(resume_from_checkpoint))


def arguments(config: RunConfig, folder: Path, length: Length, data: Data) -> TrainingArguments:
    """Returns the Trainer's arguments. Raises ConfigError if train.device is not available."""
    evaluates, text = data.eval is not None, data.kind != "image-classification"
    train, cuda = config.train, torch.cuda.is_available() and config.train.device != "cpu"
    if train.device == "cuda" and not cuda:
        raise ConfigError("train.device=cuda: torch sees no CUDA device here. See `weft doctor`.")
    warm = config.optim.warm_up
    schedule = (
        "constant_with_warmup" if config.optim.schedule == "constant" else config.optim.schedule
    )
    args = TrainingArguments(
        output_dir=str(folder),
        max_steps=length.steps,
        per_device_train_batch_size=train.batch,
        per_device_eval_batch_size=config.eval.batch or train.batch,
        gradient_accumulation_steps=train.accumulate,
        learning_rate=config.optim.lr,
        max_grad_norm=config.optim.clip,
        lr_scheduler_type=schedule,
        warmup_steps=int(warm) if warm >= 1 else round(warm * length.steps),
        bf16=train.precision == "bfloat16",
        seed=train.seed,
        data_seed=train.seed,
        use_cpu=not cuda,
        dataloader_pin_memory=cuda,
        eval_strategy="steps" if evaluates else "no",
        eval_steps=config.eval.every or length.per_epoch,
        save_strategy="steps",
        save_steps=config.save.every or length.per_epoch,
        logging_strategy="steps",
        logging_steps=config.log.every,
        logging_nan_inf_filter=False,
        report_to=list(config.log.report_to) or "none",
        include_num_input_tokens_seen="non_padding" if text else "no",
        remove_unused_columns=False,
        label_names=["labels"],
        ddp_backend="gloo" if processes.count() > 1 and not cuda else None,
        # Layers that are not reached have no gradient to wait for.
        ddp_find_unused_parameters=config.audit.unreached == "allow",
        disable_tqdm=True,
        log_level="error",
        run_name=Path(config.out).name,
    )
    if args.n_gpu > 1:  # one process, one device: DataParallel would copy the model at every step
        args._n_gpu = 1
    return args


def recompute_activations(model: Any) -> None:
    """Makes the model recompute activations in backward, without re-entry, so that gradients reach
    adapters above a frozen embedding.
    """
    enable = getattr(model, "activation_checkpointing_enable", None)
    if enable is not None:
        enable(activation_checkpointing_kwargs={"use_reentrant": False})
    else:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
