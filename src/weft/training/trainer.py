"""`transformers.Trainer` for one Weft adapter: its own parameter groups, order of the samples, and
checkpoints.

Only this file and callbacks.py import transformers at their top, since they derive from its
classes; `run.py` imports them when a run begins.
"""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.utils.data import DataLoader, Sampler
from transformers import PrinterCallback, Trainer, TrainingArguments

from ..errors import ConfigError
from ..model import prompts
from ..model.adapter import Adapter
from . import generate, processes
from .config import OptimSection, RunConfig
from .loop import seeded
from .losses import collate, first, loss_for, metrics_for, reduced
from .prepare import Data
from .resume import read_state, write_state


class EpochOrder(Sampler[int]):
    """Row numbers in an order that is a function of the seed and the epoch, whatever was drawn
    before.
    """

    def __init__(self, rows: int, seed: int) -> None:
        self.rows, self.seed, self.epoch = rows, seed, 0

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch

    def __iter__(self) -> Iterator[int]:
        generator = torch.Generator().manual_seed(self.seed * 1_000_003 + self.epoch)
        return iter(torch.randperm(self.rows, generator=generator).tolist())

    def __len__(self) -> int:
        return self.rows


class AdapterTrainer(Trainer):  # type: ignore[misc]
    """A Trainer that moves, saves and restores an adapter and nothing else."""

    def __init__(
        self,
        adapter: Adapter,
        optim: OptimSection,
        data: Data,
        args: TrainingArguments,
        callbacks: list[Any] | None = None,
        records: int | None = None,
    ) -> None:
        self.adapter, self.optim, self.data, self.records = adapter, optim, data, records
        self.answered: dict[str, float] = {}
        self.order = EpochOrder(len(data.train), args.seed)
        super().__init__(
            model=adapter.model,
            args=args,
            train_dataset=data.train,
            eval_dataset=data.eval,
            data_collator=partial(collate, pad=data.pad),
            compute_loss_func=loss_for(data.kind, optim.label_smoothing),
            compute_metrics=self._measured,
            callbacks=callbacks,
            preprocess_logits_for_metrics=reduced if data.kind == "causal-lm" else first,
        )
        self.remove_callback(PrinterCallback)  # callbacks.Log speaks

    def create_optimizer(self, model: nn.Module | None = None) -> torch.optim.Optimizer:
        """AdamW over the adapter's tensors."""
        self.optimizer: torch.optim.Optimizer | None
        if self.optimizer is None:
            self.optimizer = torch.optim.AdamW(
                groups(self.adapter, self.optim),
                lr=self.optim.lr,
                eps=self.optim.eps,
                betas=(self.optim.betas[0], self.optim.betas[1]),
            )
        return self.optimizer

    def get_train_dataloader(self) -> DataLoader[Any]:
        """Samples in the order of `EpochOrder`; nothing is drawn from a global generator."""
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
        """The evaluation samples in their order; nothing is drawn from a global generator."""
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
        """The Trainer's, which gives a model no labels where the loss is not its own."""
        with prompts.answering(self.adapter.model, inputs.get("labels")):
            return super().compute_loss(model, inputs, return_outputs, num_items_in_batch)

    def evaluate(
        self,
        eval_dataset: Any = None,
        ignore_keys: list[str] | None = None,
        metric_key_prefix: str = "eval",
    ) -> dict[str, float]:
        """The Trainer's, and before it the scores of a task's generated answers, which go into the
        same log line.
        """
        self.answered = self._answers() if eval_dataset is None else {}
        found: dict[str, float] = super().evaluate(eval_dataset, ignore_keys, metric_key_prefix)
        return found

    def _measured(self, found: Any) -> dict[str, float]:
        return {**metrics_for(self.data.kind)(found), **self.answered}

    def _answers(self) -> dict[str, float]:
        task, renderer, most = self.data.task, self.data.renderer, self.records
        if task is None or renderer is None or most == 0:
            return {}
        records = task.eval_records("validation")[:most]
        with seeded(self.args.seed, self.args.device):
            texts = generate.answer(
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
        """The adapter as `weft.save` writes it, and what it carries from step to step. Not finished
        before `on_save`.
        """
        place = Path(output_dir if output_dir is not None else self.args.output_dir)
        if self.args.should_save:
            shutil.rmtree(place, ignore_errors=True)  # of a run that was killed while it wrote
            self.adapter.save(place)
            write_state(self.adapter, place)
        if self.args.world_size > 1:
            torch.distributed.barrier()  # the others write their random states into the folder next

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        """The Trainer's; a full disk, which torch.save calls a RuntimeError, is an OSError."""
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


def groups(adapter: Adapter, optim: OptimSection) -> list[dict[str, Any]]:
    """The optimiser's parameter groups: each has one rate and one weight decay. Raises ConfigError
    for a useless rate.
    """
    found: dict[tuple[str, float, float], list[nn.Parameter]] = {}

    def add(name: str, rate: float, parameter: nn.Parameter) -> None:
        decay = optim.weight_decay if parameter.ndim >= 2 else 0.0
        found.setdefault((name, rate, decay), []).append(parameter)

    for site in adapter.layers.values():
        for tensor, parameter in site.trainable().items():
            factor = optim.lr_factors.get(tensor, 1.0)
            add(tensor if factor != 1.0 else "adapter", optim.lr * factor, parameter)
    heads = [s for s in adapter.selected_tensors.values() if s.head]
    for selected in adapter.selected_tensors.values():
        rate = optim.head_lr if selected.head and optim.head_lr is not None else optim.lr
        add("head" if selected.head else "base", rate, selected.trained)
    if optim.head_lr is not None and not heads:
        raise ConfigError(
            "optim.head_lr is given, and no head is trained. Name it in method.modules_to_save, or "
            "leave "
            "optim.head_lr out."
        )
    return [
        {"params": tensors, "lr": rate, "weight_decay": decay, "name": name}
        for (name, rate, decay), tensors in found.items()
    ]


def arguments(
    config: RunConfig, folder: Path, steps: int, per_epoch: int, data: Data
) -> TrainingArguments:
    """What the Trainer must know; checkpoints, logs and reports that are Weft's own are left to the
    callbacks.
    """
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
        max_steps=steps,
        per_device_train_batch_size=train.batch,
        per_device_eval_batch_size=config.eval.batch or train.batch,
        gradient_accumulation_steps=train.accumulate,
        learning_rate=config.optim.lr,
        max_grad_norm=config.optim.clip,
        lr_scheduler_type=schedule,
        warmup_steps=int(warm) if warm >= 1 else round(warm * steps),
        bf16=train.precision == "bfloat16",
        seed=train.seed,
        data_seed=train.seed,
        use_cpu=not cuda,
        dataloader_pin_memory=cuda,
        eval_strategy="steps" if evaluates else "no",
        eval_steps=config.eval.every or per_epoch,
        save_strategy="steps",
        save_steps=config.save.every or per_epoch,
        logging_strategy="steps",
        logging_steps=config.log.every,
        logging_nan_inf_filter=False,
        report_to=list(config.log.report_to) or "none",
        include_num_input_tokens_seen="non_padding" if text else "no",
        remove_unused_columns=False,
        label_names=["labels"],
        ddp_backend="gloo" if processes.count() > 1 and not cuda else None,
        ddp_find_unused_parameters=False,
        disable_tqdm=True,
        log_level="error",
        run_name=Path(config.out).name,
    )
    if args.n_gpu > 1:  # one process, one device: DataParallel would copy the model at every step
        args._n_gpu = 1
    return args


def checkpointing(model: Any) -> None:
    """Recompute activations in backward. Without re-entry, so that gradients reach adapters over a
    frozen embedding.
    """
    enable = getattr(model, "activation_checkpointing_enable", None)
    if enable is not None:
        enable(activation_checkpointing_kwargs={"use_reentrant": False})
    else:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
