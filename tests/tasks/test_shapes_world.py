"""The world of shapes: what is said about a scene is true of it."""

import random
import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from weft.tasks.shapes.language import (
    KINDS,
    NUMBERS,
    captions,
    clip_question,
    question,
    sentence_of_two,
    ten_answers,
)
from weft.tasks.shapes.world import COLOURS, KNOWN, SHAPES, SIDE, WHOLE, draw, new_clip, new_scene

seeds = st.integers(0, 2**32)


def right_answer(scene, text):
    """The answer, read off the question's words alone."""
    asked = text.split()
    if text.startswith("what color"):
        (thing,) = [t for t in scene if t.shape == asked[4]]
        return thing.colour
    if text.startswith("what is"):
        (thing,) = [t for t in scene if t.colour == asked[3]]
        return thing.shape
    if text.startswith("how many"):
        return NUMBERS[[t.colour for t in scene].count(asked[2])]
    return "yes" if any(t.colour == asked[3] and t.shape == asked[4] for t in scene) else "no"


@given(seeds, st.sampled_from([WHOLE, KNOWN]))
def test_every_answer_is_true_of_its_scene(seed, words):
    rng = random.Random(seed)
    scene = new_scene(rng, words)
    assert 2 <= len(scene) <= 4 and len({(t.x, t.y) for t in scene}) == len(scene)
    assert all(t.colour in words.colours and t.shape in words.shapes for t in scene)
    for kind in KINDS:
        asked = question(scene, rng, words, [kind])
        assert asked.answer == right_answer(scene, asked.text)
        assert asked.answer not in asked.others
        given_by_people = ten_answers(asked, rng)
        assert len(given_by_people) == 10 and given_by_people.count(asked.answer) >= 7


@given(seeds)
def test_captions_name_every_thing(seed):
    rng = random.Random(seed)
    scene = new_scene(rng)
    for text in captions(scene, rng):
        named = [part.split() for part in re.split(" and ", text)]
        assert sorted(tuple(words[-2:]) for words in named) == sorted(
            (t.colour, t.shape) for t in scene
        )


@given(seeds)
def test_sentences_about_two_images_are_judged_right(seed):
    rng = random.Random(seed)
    left, right = new_scene(rng), new_scene(rng)
    text, true = sentence_of_two(left, right, rng, WHOLE)
    if text.startswith("both"):
        shape = text.split()[-1]
        assert true == ({shape} <= {t.shape for t in left} & {t.shape for t in right})
    elif text.startswith("the left"):
        assert true == (len(left) > len(right))
    else:
        colour = next(c for c in COLOURS if c in text.split())
        n = [sum(t.colour == colour for t in scene) for scene in (left, right)]
        assert true == (n[0] > 0 if "left image" in text else sum(n) >= 2)


@given(seeds, st.integers(3, 8))
def test_a_clip_has_one_thing_that_crosses_the_grid(seed, frames):
    rng = random.Random(seed)
    scenes, mover, way = new_clip(rng, frames=frames)
    assert len(scenes) == frames
    path = []
    for scene in scenes:
        (one,) = [t for t in scene if (t.colour, t.shape) == (mover.colour, mover.shape)]
        path.append((one.x, one.y))
        assert set(scene) - {one} == {
            t for t in scenes[0] if t.colour != mover.colour or t.shape != mover.shape
        }
    step = {"left": (-1, 0), "right": (1, 0), "up": (0, -1), "down": (0, 1)}[way]
    assert (path[-1][0] - path[0][0], path[-1][1] - path[0][1]) == tuple(
        (SIDE - 1) * d for d in step
    )
    _, choices, index = clip_question(mover, way, rng)
    assert choices[index] == way and len(set(choices)) == 4


def test_a_clip_needs_frames():
    with pytest.raises(ValueError, match="needs 3 frames to cross"):
        new_clip(random.Random(0), frames=2)


def test_a_seed_gives_the_same_image_and_shapes_look_different():
    pytest.importorskip("PIL")
    images = {}
    for shape in SHAPES:
        thing = new_scene(random.Random(1), least=2)[0]
        scene = (thing.__class__(1, 1, "red", shape, "large"),)
        one, again = (draw(scene, random.Random(5)) for _ in range(2))
        assert one.tobytes() == again.tobytes() and one.size == (48, 48) and one.mode == "RGB"
        images[shape] = one.tobytes()
    assert len(set(images.values())) == len(SHAPES)
