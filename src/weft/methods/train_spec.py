"""`train=`: tensors of the base model that train beside an adapter's own, checked as far as
possible without a model.

A word is one of
    "biases"         every bias vector outside the output head, the shifts of norms included
    "norms"          gain and shift of every layer norm and RMS norm outside the output head
    "head"           the output head, if it is not tied to the embedding
    "last:2"         the last 2 blocks before the output, and the norm behind them
    "all"            every tensor
    "target-biases"  the biases of the layers that the method adapts
    "c_fc.bias"      letters, digits, '_' and '.': the ending of a tensor's or a module's name, cut at
                     a dot; a module stands for all its tensors
Words add up, and a tensor that several of them select trains once.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from difflib import get_close_matches
from typing import Any

from ..errors import ConfigError

WORDS = ("biases", "norms", "head", "all", "target-biases")
_LAST = re.compile(r"last:([1-9][0-9]*)")
_ENDING = re.compile(r"[A-Za-z0-9_.]+")


def last_blocks(word: str) -> int | None:
    """Returns K for "last:K", or None for another word."""
    found = _LAST.fullmatch(word)
    return int(found[1]) if found else None


def is_name(word: str) -> bool:
    """Returns True if the word is the ending of a name."""
    return word not in WORDS and _ENDING.fullmatch(word) is not None


def nearest_words(word: str) -> list[str]:
    """Returns the known words that are most like this one."""
    return get_close_matches(word.lower(), [*WORDS, "last:2"], n=2, cutoff=0.5)


def normalise(method: str, train: Any, adapts_layers: bool) -> tuple[str, ...]:
    """Returns the words as a tuple, each once; `method` is the configuration's name, for messages.

    Raises ConfigError if a word is not possible in any model, with the nearest known word.
    """
    words = (train,) if isinstance(train, str) else train
    if not isinstance(words, Sequence) or not all(isinstance(word, str) for word in words):
        raise ConfigError(
            f"{method}(train={train!r}): write a list of {[*WORDS, 'last:2']}, or of endings of "
            'module or tensor names, for example ["biases"].'
        )
    for word in words:
        if word not in WORDS and last_blocks(word) is None and not is_name(word):
            near = nearest_words(word) or [*WORDS, "last:2"]
            raise ConfigError(
                f"{method}(train=[{word!r}]): neither a known word nor the ending of a name. "
                f"Nearest: {near}."
            )
        if word == "target-biases" and not adapts_layers:
            raise ConfigError(
                f"{method}(train=['target-biases']): {method} adapts no layers. Nearest: "
                "['biases'], which means all bias vectors."
            )
    return tuple(dict.fromkeys(words))
