"""A language model's logits for the tokens in the loss alone.

The head multiplies every position by the whole vocabulary, and for a small model with a large
vocabulary that is most of a step, in time and in memory. The loss reads only the positions whose
next token is in it: a third of them for prompts with short answers. So the head is given these
positions alone. Everything before the head runs as ever, so the loss and its gradients are equal up
to rounding.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from ..encoding.rows import IGNORED
from ..model import prompts
from ..model.statistics import in_eval

# Whether the model's logits at some positions are those of its head at these positions.
_CAN_SELECT: WeakKeyDictionary[nn.Module, bool] = WeakKeyDictionary()


def next_tokens(labels: Tensor) -> tuple[Tensor, Tensor]:
    """Returns which positions predict a token in the loss [rows, length], and these tokens [n].

    Position i predicts the token of labels [rows, length] at i + 1, the last position none.
    """
    following = torch.nn.functional.pad(labels[:, 1:], (0, 1), value=IGNORED)
    inside = following != IGNORED
    return inside, following[inside]


def at(logits: Tensor, inside: Tensor) -> Tensor:
    """Returns the logits [n, words] of the n positions inside [rows, length].

    `logits` are those of all positions, [rows, length, words], or the ones that `logits_in_loss`
    left, [1, n, words]. Raises ValueError for any other shape.
    """
    if logits.shape[:2] == inside.shape:
        return logits[inside]
    if logits.shape[0] == 1 and logits.shape[1] == int(inside.sum()):
        return logits[0]
    raise ValueError(
        f"logits of shape {list(logits.shape)} do not belong to labels of shape "
        f"{list(inside.shape)}: the model changes the length of its rows."
    )


@contextmanager
def answering(model: nn.Module, inputs: Mapping[str, Any], labels: Tensor | None) -> Iterator[None]:
    """Inside this context, a forward of a language model with these inputs and labels [rows,
    length] may return logits [1, n, words], for the n tokens in the loss, in the order of the rows.

    The labels also tell virtual tokens between prompt and answer where the answer begins. If the
    labels are of another kind, the logits are those of a forward outside. So they are if the
    model's logits are not what its head returns, which is tried once per model.
    """
    if labels is None or labels.ndim != 2:
        with prompts.answering(model, None):
            yield
        return
    if model not in _CAN_SELECT:
        _CAN_SELECT[model] = _agrees(model, inputs, labels)
    with prompts.answering(model, labels):
        if not _CAN_SELECT[model]:
            yield
            return
        with _selected(model, next_tokens(labels)[0]):
            yield


@contextmanager
def _selected(model: nn.Module, inside: Tensor) -> Iterator[None]:
    """Gives the model's head the positions inside [rows, length] alone."""

    def select(module: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...] | None:
        states = args[0] if args else None
        if not isinstance(states, Tensor) or states.shape[:2] != inside.shape:
            return None
        return states[inside.to(states.device)].unsqueeze(0), *args[1:]

    head: Any = _head(model)
    handle = head.register_forward_pre_hook(select)
    try:
        yield
    finally:
        handle.remove()


def _head(model: nn.Module) -> nn.Module | None:
    try:
        found = model.get_output_embeddings()  # type: ignore[operator]
    except (AttributeError, NotImplementedError):
        return None
    return found if isinstance(found, nn.Module) else None


@torch.no_grad()
def _agrees(model: nn.Module, inputs: Mapping[str, Any], labels: Tensor) -> bool:
    """Whether the head's logits of some positions are the model's, tried on a batch."""
    if _head(model) is None:
        return False
    inputs, labels = _one_row(inputs, labels)
    inside, _ = next_tokens(labels)
    with in_eval(model):
        with prompts.answering(model, labels):
            whole = model(**inputs).logits
        if whole.shape[:2] != inside.shape:
            return False
        try:
            with prompts.answering(model, labels), _selected(model, inside):
                found = model(**inputs).logits
        except (RuntimeError, ValueError, IndexError, TypeError):
            return False  # the model goes on with the shape of all positions
    wanted = whole[inside]
    if found.shape != (1, *wanted.shape):
        return False
    scale = wanted.float().abs().amax() if len(wanted) else 0.0
    error = (found[0] - wanted).float().abs()
    return bool((error <= torch.finfo(wanted.dtype).eps ** 0.5 * scale).all())


def _one_row(inputs: Mapping[str, Any], labels: Tensor) -> tuple[dict[str, Any], Tensor]:
    """The row with the most tokens in the loss, if every input is one tensor [rows, length]."""
    if any(not isinstance(v, Tensor) or v.shape != labels.shape for v in inputs.values()):
        return dict(inputs), labels
    row = int((labels != IGNORED).sum(1).argmax())
    return {key: value[row : row + 1] for key, value in inputs.items()}, labels[row : row + 1]
