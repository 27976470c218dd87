"""A task of the world of shapes: images or clips and a text in, a text out, for a VL-BART.

The tower's features of every image are computed once. The validation score is the mean loss per
token of the answers; the test split is decoded once and scored by the task's metric.
"""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ...errors import WeftError
from ...tasks import SPLITS, Encoded, ShapesRef
from ...tasks.base import data_digest
from ...tasks.models import ModelRef, loading, model_fingerprint, quiet
from ...tasks.shapes.examples import Example, examples
from ...tasks.shapes.scores import METRICS, SCORERS, most_frequent
from ...tasks.shapes.tower import cell_boxes, features, load_tower
from ...training import scored
from ...training.losses import reduced
from .base import Facts, Guess, Tested
from .loop import Score, on_device

SIZES = {"train": 2000, "validation": 300, "test": 500}
ROWS = 100  # examples per batch in evaluation
LOSS = "loss"
BOXES = "absolute_vis_pos_embedding.0"  # five numbers wide: it would hold every rank down to 5


@dataclass(frozen=True)
class SeenSplit:
    """`tasks.Encoded`: texts [n, length], features [n, images, regions, width], and the decoder's
    tokens [n, length], which begin with the start token and end with padding.
    """

    texts: Tensor
    seen: Tensor
    tokens: Tensor
    pad: int

    def __len__(self) -> int:
        return len(self.texts)

    def batch(self, rows: Tensor) -> dict[str, Tensor]:
        """The model's inputs for these rows [n], without padding that no row needs."""
        texts = _cut(self.texts[rows], self.pad)
        return {
            "input_ids": texts,
            "attention_mask": texts.ne(self.pad).long(),
            "vis_feats": self.seen[rows],
            "vis_boxes": self._boxes.expand(len(rows), *self._boxes.shape),
            "decoder_input_ids": _cut(self.tokens[rows], self.pad),
        }

    @cached_property
    def _boxes(self) -> Tensor:
        """[images, regions, 4]; the frames of a clip are regions of one image."""
        images, regions = self.seen.shape[1:3]
        cells = cell_boxes()
        return cells.repeat(regions // len(cells), 1).expand(images, -1, -1)

    def wanted(self, rows: Tensor) -> Tensor:
        """The labels of these rows [n, length]: the decoder's tokens without the start token."""
        tokens = _cut(self.tokens[rows], self.pad)
        labels = tokens.masked_fill(tokens == self.pad, -100)
        labels[:, 0] = -100
        return labels

    def fingerprint(self) -> str:
        """16 hex digits over all tensors."""
        return data_digest(self.tokens, self.texts, self.seen)


def _cut(ids: Tensor, pad: int) -> Tensor:
    """ids [n, length] without the columns at the end that are padding alone."""
    used = int(ids.ne(pad).sum(1).max())
    return ids[:, :used]


@dataclass
class SeenTask:
    """`base.OpenTask` for the world of shapes."""

    model: Any
    tokenizer: Any
    name: str
    splits: Mapping[str, SeenSplit]
    questions: Sequence[Example]  # of the test split
    fingerprint: str
    notes: list[str]
    head: tuple[str, ...] = ()
    decoding: Mapping[str, Any] = field(default_factory=dict)

    @property
    def train(self) -> Encoded:
        """The training split."""
        return self.splits["train"]

    def facts(self) -> Facts:
        """Learning rates are chosen by the loss."""
        metric = METRICS[self.name]
        how = (
            "Learning rates are chosen by the lowest mean loss per token of the answers on the "
            f"validation split; the test split is decoded and scored by {metric}."
        )
        return Facts(
            kind="generation",
            metric=metric,
            chosen_by=LOSS,
            lowest=True,
            notes=(*self.notes, how),
            frozen=(BOXES,),
            sizes={name: len(split) for name, split in self.splits.items()},
            fingerprints={
                "model": self.fingerprint,
                **{name: split.fingerprint() for name, split in self.splits.items()},
            },
            guess=self._guess,
        )

    @cached_property
    def _guess(self) -> Guess:
        """The best of the answers that ignore the image."""
        texts = most_frequent(self.questions)
        score, right = SCORERS[self.name](texts, self.questions)
        return Guess(score, "giving the most frequent answer to every question of a kind", right)

    @torch.no_grad()
    def validate(self) -> Score:
        """Returns the mean loss over all tokens of the validation split's answers."""
        split, was_training, parts = self.splits["validation"], self.model.training, []
        self.model.eval()
        for rows in torch.split(torch.arange(len(split)), ROWS):
            inputs, labels = on_device(split, rows, self.model.device)
            with scored.answering(self.model, inputs, labels):
                parts.append(reduced(self.model(**inputs).logits, labels).sum(0))
        self.model.train(was_training)
        total, count, _ = torch.stack(parts).sum(0).tolist()
        return Score(total / count, total / count)

    def test(self) -> Tested:
        """Decodes and scores the test split."""
        score, right = SCORERS[self.name](self._answers(), self.questions)
        return Tested(Score(score, None), right, {METRICS[self.name]: score})

    @torch.no_grad()
    def _answers(self) -> list[str]:
        split, was_training, texts = self.splits["test"], self.model.training, []
        self.model.eval()
        for rows in torch.split(torch.arange(len(split)), ROWS):
            inputs, _ = on_device(split, rows, self.model.device)
            del inputs["decoder_input_ids"]
            made = self.model.generate(**inputs, **self.decoding)
            texts += self.tokenizer.batch_decode(made, skip_special_tokens=True)
        self.model.train(was_training)
        return texts


def open_seen(ref: ShapesRef, model: ModelRef, limits: Mapping[str, int | None]) -> SeenTask:
    """See `open_task.open_task`. Raises WeftError if the model is no VL-BART with the tower of the
    shapes beside it.
    """
    from ...models.vl_bart import VLBartForConditionalGeneration

    folder = Path(model.source)
    check_sees(model)
    with quiet(), loading(model, "a VL-BART"):
        import transformers

        tokenizer = transformers.AutoTokenizer.from_pretrained(model.source, **model.options)
        loaded = VLBartForConditionalGeneration.from_pretrained(
            model.source, dtype=torch.float32, use_safetensors=True, **model.options
        )
    tower = load_tower(folder)
    splits, notes = {}, []
    questions: list[Example] = []
    for name in SPLITS:
        size = limits.get(name) or SIZES[name]
        questions = examples(ref.kind, name, size)
        splits[name] = _encode(questions, name, ref.kind, tokenizer, loaded.config, tower)
    notes.append(
        "No method adapts the frozen image tower and the map of the five numbers of a box."
    )
    decoding = {
        "max_new_tokens": splits["test"].tokens.shape[1] + 4,
        "do_sample": False,
        "num_beams": 1,
    }
    return SeenTask(
        loaded.eval(),
        tokenizer,
        ref.kind,
        splits,
        questions,
        model_fingerprint(loaded, []),
        notes,
        decoding=decoding,
    )


def check_sees(model: ModelRef) -> None:
    """Raises WeftError if the configuration is not a VL-BART's."""
    import transformers

    from ...models import register

    register()
    with quiet(), loading(model, "a configuration"):
        config = transformers.AutoConfig.from_pretrained(model.source, **model.options)
    if config.model_type != "vl_bart":
        raise WeftError(
            f"model {model.name!r} ({config.model_type}) is no VL-BART, which this task needs. Give "
            "--model shapes-vl-bart, which is embedded."
        )


def _encode(
    given: Sequence[Example], split: str, task: str, tokenizer: Any, config: Any, tower: Any
) -> SeenSplit:
    from ...tasks.shapes.world import draw

    rng = random.Random(f"{task}/{split}/images")
    images = [draw(scene, rng) for example in given for scene in example.scenes]
    seen = features(tower, images).view(len(given), len(given[0].scenes), -1, config.feat_dim)
    if task == "shapes-video":  # the frames of a clip are regions of one image
        seen = seen.flatten(1, 2).unsqueeze(1)
    texts = _ids(tokenizer, [example.text for example in given])
    answers = _ids(tokenizer, [example.target for example in given])
    start = answers.new_full((len(given), 1), config.decoder_start_token_id)
    return SeenSplit(texts, seen, torch.cat([start, answers], 1), tokenizer.pad_token_id)


def _ids(tokenizer: Any, texts: list[str]) -> Tensor:
    found: Tensor = tokenizer(texts, padding=True, return_tensors="pt")["input_ids"]
    return found
