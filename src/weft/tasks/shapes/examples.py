"""Examples of the four tasks: images (or frames), a text, and what a model should answer."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from .language import KINDS, captions, clip_question, question, sentence_of_two, ten_answers
from .world import WHOLE, Scene, Vocabulary, new_clip, new_scene


@dataclass(frozen=True)
class Example:
    """`scenes` are one image, two, or the frames of a clip. `references` are right answers: those
    of ten people, all captions, or one text.
    """

    scenes: tuple[Scene, ...]
    text: str
    target: str
    references: tuple[str, ...]
    answer_type: str = ""


def vqa(rng: random.Random, words: Vocabulary = WHOLE, kinds: Sequence[str] = KINDS) -> Example:
    """Returns a question about an image, with VL-Adapter's prompt."""
    scene = new_scene(rng, words)
    asked = question(scene, rng, words, kinds)
    answers = tuple(ten_answers(asked, rng))
    return Example((scene,), f"vqa: {asked.text}", asked.answer, answers, asked.answer_type)


def nlvr(rng: random.Random, words: Vocabulary = WHOLE) -> Example:
    """Returns a sentence about two images. As many are true as false."""
    wanted = rng.random() < 0.5
    while True:
        left, right = new_scene(rng, words), new_scene(rng, words)
        text, true = sentence_of_two(left, right, rng, words)
        if true == wanted:
            answer = "true" if true else "false"
            return Example((left, right), f"nlvr: {text}", answer, (answer,))


def caption(rng: random.Random, words: Vocabulary = WHOLE) -> Example:
    """Returns an image to be described."""
    scene = new_scene(rng, words)
    said = captions(scene, rng)
    return Example((scene,), "caption:", said[0], tuple(said))


def video(rng: random.Random, words: Vocabulary = WHOLE) -> Example:
    """Returns a question about a clip with four choices, as VL-Adapter writes TVQA's: the prompt is
    at the end, and the answer is "a0" to "a3".
    """
    frames, mover, way = new_clip(rng, words)
    asked, choices, index = clip_question(mover, way, rng)
    listed = " ".join(f"a{i} {choice}" for i, choice in enumerate(choices))
    return Example(tuple(frames), f"{asked} {listed} tvqa:", f"a{index}", (f"a{index}",))


MAKERS: dict[str, Callable[[random.Random], Example]] = {
    "shapes-vqa": vqa,
    "shapes-nlvr": nlvr,
    "shapes-caption": caption,
    "shapes-video": video,
}


def examples(task: str, split: str, n: int) -> list[Example]:
    """Returns n examples of a task's split: the same for every n that is larger, no split like
    another.
    """
    rng = random.Random(f"{task}/{split}")
    return [MAKERS[task](rng) for _ in range(n)]
