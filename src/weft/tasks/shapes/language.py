"""What can be said about scenes: questions with answers, captions, sentences about two images, and
questions about clips. Every answer is computed from the scene, so it is right by construction.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from typing import NamedTuple

from .world import Scene, Thing, Vocabulary

NUMBERS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
WAYS = ("left", "right", "up", "down")
KINDS = ("colour", "exists", "count", "shape")
_WRONG = 0.1  # of the ten answers; people are imperfect


class Question(NamedTuple):
    """A question about one scene. `answer_type` is VQAv2's: yes/no, number or other."""

    text: str
    answer: str
    question_type: str
    answer_type: str
    others: tuple[str, ...]  # answers that would be wrong


def question(
    scene: Scene, rng: random.Random, words: Vocabulary, kinds: Sequence[str] = KINDS
) -> Question:
    """Returns a question of one of these kinds; "exists" if the scene has no thing that the drawn
    kind could ask for without doubt.
    """
    made = _MAKERS[rng.choice(list(kinds))](scene, rng, words)
    return made if made is not None else _exists(scene, rng, words)


def _colour(scene: Scene, rng: random.Random, words: Vocabulary) -> Question | None:
    found = _alone(scene, "shape")
    if not found:
        return None
    thing = rng.choice(found)
    return _asked(
        f"what color is the {thing.shape} ?", thing.colour, "what color is the", words.colours
    )


def _shape(scene: Scene, rng: random.Random, words: Vocabulary) -> Question | None:
    found = _alone(scene, "colour")
    if not found:
        return None
    thing = rng.choice(found)
    return _asked(f"what is the {thing.colour} object ?", thing.shape, "what is the", words.shapes)


def _exists(scene: Scene, rng: random.Random, words: Vocabulary) -> Question:
    if rng.random() < 0.5:
        thing = rng.choice(scene)
        colour, shape = thing.colour, thing.shape
    else:
        colour, shape = rng.choice(words.colours), rng.choice(words.shapes)
    found = any((t.colour, t.shape) == (colour, shape) for t in scene)
    text = f"is there a {colour} {shape} ?"
    return _asked(text, "yes" if found else "no", "is there a", ("yes", "no"), "yes/no")


def _count(scene: Scene, rng: random.Random, words: Vocabulary) -> Question:
    colour = rng.choice((rng.choice(scene).colour, rng.choice(words.colours)))
    answer = NUMBERS[sum(thing.colour == colour for thing in scene)]
    text = f"how many {colour} objects are there ?"
    return _asked(text, answer, "how many", NUMBERS[:5], "number")


_MAKERS = {"colour": _colour, "shape": _shape, "exists": _exists, "count": _count}


def _asked(
    text: str, answer: str, kind: str, all_answers: Sequence[str], of: str = "other"
) -> Question:
    return Question(text, answer, kind, of, tuple(a for a in all_answers if a != answer))


def _alone(scene: Scene, field: str) -> list[Thing]:
    """The things whose shape (or colour) no other thing of the scene has."""
    values = [getattr(thing, field) for thing in scene]
    return [t for t, value in zip(scene, values, strict=True) if values.count(value) == 1]


def ten_answers(asked: Question, rng: random.Random) -> list[str]:
    """Returns what ten people answer: most of them right, at least seven."""
    wrong = [rng.random() < _WRONG for _ in range(10)]
    while sum(wrong) > 3:
        wrong[wrong.index(True)] = False
    return [rng.choice(asked.others) if one else asked.answer for one in wrong]


def captions(scene: Scene, rng: random.Random, n: int = 5) -> list[str]:
    """Returns n descriptions: in another order at times, with sizes or without."""
    found = []
    for _ in range(n):
        things = list(scene) if rng.random() < 0.7 else rng.sample(scene, len(scene))
        sizes = rng.random() < 0.5
        named = [" ".join(["a", *([t.size] if sizes else []), t.colour, t.shape]) for t in things]
        found.append(" and ".join(named))
    return found


def sentence_of_two(
    left: Scene, right: Scene, rng: random.Random, words: Vocabulary
) -> tuple[str, bool]:
    """Returns a sentence about two images, and whether it is true."""
    colour, shape = rng.choice(words.colours), rng.choice(words.shapes)
    kind = rng.randrange(4)
    if kind == 0:
        both = all(any(t.shape == shape for t in scene) for scene in (left, right))
        return f"both images contain a {shape}", both
    if kind == 1:
        return "the left image has more objects than the right image", len(left) > len(right)
    in_left, in_right = (sum(t.colour == colour for t in s) for s in (left, right))
    if kind == 2:
        return f"there is a {colour} object in the left image", in_left > 0
    return f"there are at least two {colour} objects in total", in_left + in_right >= 2


def clip_question(mover: Thing, way: str, rng: random.Random) -> tuple[str, list[str], int]:
    """Returns a question about a clip, its four choices, and the index of the right one."""
    choices = list(WAYS)
    rng.shuffle(choices)
    return f"where does the {mover.colour} {mover.shape} move ?", choices, choices.index(way)


def clip_caption(mover: Thing, way: str) -> str:
    """Returns what happens in a clip."""
    return f"the {mover.colour} {mover.shape} moves {way}"
