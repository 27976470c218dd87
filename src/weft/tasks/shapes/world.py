"""Scenes of coloured shapes on a grid of 3 x 3 cells, and their images of 48 x 48 pixels.

A scene is drawn from a `random.Random` alone, so a seed gives the same scenes everywhere; images
agree bit for bit where the versions of Pillow and numpy do.
"""

from __future__ import annotations

import math
import random
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from PIL import Image

COLOURS = {
    "red": (220, 40, 40),
    "green": (40, 170, 60),
    "blue": (50, 80, 220),
    "yellow": (235, 205, 40),
    "purple": (150, 60, 190),
    "orange": (245, 140, 30),
}
SHAPES = ("circle", "square", "triangle", "cross", "diamond", "star")
SIZES = ("small", "large")
SIDE, CELL = 3, 16  # cells per side, pixels per cell
_FINE = 3  # drawn this many times larger, then scaled down
_RADIUS = {"small": 0.25, "large": 0.40}  # of a cell
_JITTER, _SHADE, _NOISE = 1.0, 15, 4.0  # pixels; of 255; standard deviation of 255


@dataclass(frozen=True)
class Vocabulary:
    """The colours and shapes that scenes are made of."""

    colours: tuple[str, ...] = tuple(COLOURS)
    shapes: tuple[str, ...] = SHAPES


WHOLE = Vocabulary()
# What the embedded model was trained on; the rest of the world is new to it.
KNOWN = Vocabulary(("red", "green", "blue", "yellow"), ("circle", "square", "triangle"))


@dataclass(frozen=True)
class Thing:
    """One object: column and row of its cell, from 0, and its looks."""

    x: int
    y: int
    colour: str
    shape: str
    size: str


Scene = tuple[Thing, ...]  # row by row, from the left


def new_scene(
    rng: random.Random, words: Vocabulary = WHOLE, least: int = 2, most: int = 4
) -> Scene:
    """Returns a scene of `least` to `most` things in cells of their own."""
    cells = [(y, x) for y in range(SIDE) for x in range(SIDE)]
    chosen = sorted(rng.sample(cells, rng.randint(least, most)))
    return tuple(
        Thing(x, y, rng.choice(words.colours), rng.choice(words.shapes), rng.choice(SIZES))
        for y, x in chosen
    )


def new_clip(
    rng: random.Random, words: Vocabulary = WHOLE, frames: int = 4
) -> tuple[list[Scene], Thing, str]:
    """Returns `frames` scenes, the thing that moves as it is in the first, and where it goes:
    "left", "right", "up" or "down". It crosses the grid along its row or column; all others stay.
    """
    if frames < SIDE:
        raise ValueError(f"frames={frames}: a thing needs {SIDE} frames to cross the grid")
    way = rng.choice(("left", "right", "up", "down"))
    lane = rng.randrange(SIDE)
    path = [round(i * (SIDE - 1) / (frames - 1)) for i in range(frames)]
    if way in ("left", "up"):
        path.reverse()
    across = way in ("left", "right")
    others = [
        thing for thing in new_scene(rng, words, 2, 4) if (thing.y if across else thing.x) != lane
    ]
    free = [
        (colour, shape)
        for colour in words.colours
        for shape in words.shapes
        if all((thing.colour, thing.shape) != (colour, shape) for thing in others)
    ]
    colour, shape = rng.choice(free)
    mover = Thing(0, 0, colour, shape, rng.choice(SIZES))
    places = [(step, lane) if across else (lane, step) for step in path]
    moved = [replace(mover, x=x, y=y) for x, y in places]
    scenes = [tuple(sorted([*others, one], key=lambda t: (t.y, t.x))) for one in moved]
    return scenes, moved[0], way


def draw(scene: Scene, rng: random.Random) -> Image.Image:
    """Returns the image of a scene, RGB, 48 x 48: places, shades and pixels vary with `rng`."""
    import numpy as np
    from PIL import Image, ImageDraw

    side = SIDE * CELL
    paper = tuple(rng.randint(215, 245) for _ in range(3))
    image = Image.new("RGB", (side * _FINE, side * _FINE), paper)
    pen = ImageDraw.Draw(image)
    for thing in scene:
        _draw_thing(pen, thing, rng)
    small = image.resize((side, side), Image.Resampling.LANCZOS)
    noise = np.random.RandomState(rng.randrange(2**31)).randn(side, side, 3) * _NOISE
    pixels = np.asarray(small, dtype=np.float32) + noise
    return Image.fromarray(pixels.clip(0, 255).astype(np.uint8))


def _draw_thing(pen: Any, thing: Thing, rng: random.Random) -> None:
    unit = CELL * _FINE
    r = _RADIUS[thing.size] * unit
    x, y = ((at + 0.5) * unit + rng.uniform(-_JITTER, _JITTER) * _FINE for at in (thing.x, thing.y))
    shade = tuple(
        max(0, min(255, value + rng.randint(-_SHADE, _SHADE))) for value in COLOURS[thing.colour]
    )
    if thing.shape == "circle":
        pen.ellipse([x - r, y - r, x + r, y + r], fill=shade)
    else:
        pen.polygon([(x + r * a, y + r * b) for a, b in _OUTLINES[thing.shape]], fill=shade)


def _star() -> Sequence[tuple[float, float]]:
    turns = [(k * math.pi / 5, 0.45 if k % 2 else 1.0) for k in range(10)]
    return [(r * math.sin(angle), -r * math.cos(angle)) for angle, r in turns]


def _cross() -> Sequence[tuple[float, float]]:
    w = 0.3
    arm = [(-w, -1.0), (w, -1.0), (w, -w)]  # the upper arm; the others are its turns by 90 degrees
    return [point for turn in range(4) for point in [_turned(x, y, turn) for x, y in arm]]


def _turned(x: float, y: float, quarters: int) -> tuple[float, float]:
    for _ in range(quarters):
        x, y = -y, x
    return x, y


_OUTLINES: dict[str, Sequence[tuple[float, float]]] = {
    "square": [(-0.85, -0.85), (0.85, -0.85), (0.85, 0.85), (-0.85, 0.85)],
    "triangle": [(0.0, -1.0), (0.95, 0.8), (-0.95, 0.8)],
    "diamond": [(0.0, -1.0), (0.75, 0.0), (0.0, 1.0), (-0.75, 0.0)],
    "cross": _cross(),
    "star": _star(),
}
