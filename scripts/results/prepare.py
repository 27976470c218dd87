"""Data and models that experiments create first: CIFAR-10 as folders, and a
pretrained ViT for it.
"""

from __future__ import annotations

import json
import random
import time
from collections.abc import Iterator
from io import BytesIO
from pathlib import Path
from typing import Any

SEED = 0
OLD, NEW = range(5), range(5, 10)
NAMES = ("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck")
POOL, TEST = 400, 400  # images per new class: for training and validation, and for the test
HELD_OUT = 200  # per old class, to score the pretrained model
STEPS, BATCH, LR, WEIGHT_DECAY, WARM_UP = 1200, 128, 1.5e-3, 0.05, 0.1


def cifar10(data: Path, work: Path) -> None:
    """Writes folders with the new classes and, if it does not exist, trains the Vision Transformer
    on the old ones.
    """
    import numpy as np

    held = {name: np.load(data / "CIFAR10" / f"{name}.npz") for name in ("train", "test")}
    for name, each in (("train", POOL), ("test", TEST)):
        for label in NEW:
            place = work / name / NAMES[label]
            place.mkdir(parents=True, exist_ok=True)
            for number, jpeg in enumerate(_jpegs(held[name], label, each)):
                (place / f"{number:04}.jpg").write_bytes(jpeg)
    if not (work / "vit" / "config.json").is_file():
        pretrain(held["train"], work / "vit")


def _jpegs(held: Any, label: int, most: int | None = None) -> Iterator[bytes]:
    import numpy as np

    rows = np.flatnonzero(held["y"] == label)
    raw, offsets = held["jpg"].tobytes(), held["off"]
    for row in rows[:most]:
        yield raw[offsets[row] : offsets[row + 1]]


def pretrain(held: Any, out: Path) -> None:
    """Trains the ViT on the old classes with one thread. Its directory has the settings and its
    accuracy on held-out images.
    """
    import torch
    from torch.nn.functional import cross_entropy

    torch.set_num_threads(1)
    torch.manual_seed(SEED)
    model = _vit()
    images = [(_pixels(jpeg, model.config), label) for label in OLD for jpeg in _jpegs(held, label)]
    random.Random(SEED).shuffle(images)
    labels = torch.tensor([label for _, label in images])
    pixels = torch.cat([one for one, _ in images])
    cut = HELD_OUT * len(OLD)
    optimiser = torch.optim.AdamW(model.parameters(), lr=LR, weight_decay=WEIGHT_DECAY)
    warm = round(WARM_UP * STEPS)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimiser, lambda s: min((s + 1) / warm, (STEPS - s) / max(1, STEPS - warm))
    )
    generator = torch.Generator().manual_seed(SEED)
    started = time.perf_counter()
    model.train()
    for _ in range(STEPS):
        rows = torch.randint(cut, len(labels), (BATCH,), generator=generator)
        loss = cross_entropy(
            model(pixel_values=_moved(pixels[rows], generator)).logits, labels[rows]
        )
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        schedule.step()
    model.eval()
    with torch.no_grad():
        right = torch.cat(
            [
                model(pixel_values=pixels[at : at + 100]).logits.argmax(1) == labels[at : at + 100]
                for at in range(0, cut, 100)
            ]
        )
    model.save_pretrained(out)
    about = {
        "parameters": model.num_parameters(),
        "images": len(labels) - cut,
        "steps": STEPS,
        "batch": BATCH,
        "seconds": round(time.perf_counter() - started),
        "held_out": cut,
        "held_out_accuracy": round(float(right.double().mean()), 4),
    }
    (out / "about.json").write_text(json.dumps(about, indent=1) + "\n", encoding="utf-8")


def _vit() -> Any:
    """65 tokens (patches of 4 x 4 and one for the class), width 64, six layers."""
    import transformers

    names = dict(enumerate(NAMES[: len(OLD)]))
    return transformers.ViTForImageClassification(
        transformers.ViTConfig(
            image_size=32,
            patch_size=4,
            hidden_size=64,
            intermediate_size=192,
            num_hidden_layers=6,
            num_attention_heads=4,
            hidden_dropout_prob=0.0,
            attention_probs_dropout_prob=0.0,
            id2label=names,
            label2id={name: number for number, name in names.items()},
        )
    )


def _pixels(jpeg: bytes, config: Any) -> Any:
    from PIL import Image

    from weft.tasks.images import plain

    return plain([Image.open(BytesIO(jpeg))], config)


def _moved(pixels: Any, generator: Any) -> Any:
    """Mirrors half of the images and shifts all by up to 3 pixels."""
    import torch

    mirrored = torch.rand(len(pixels), generator=generator) < 0.5
    pixels = torch.where(mirrored[:, None, None, None], pixels.flip(3), pixels)
    down, right = (int(torch.randint(-3, 4, (1,), generator=generator)) for _ in range(2))
    return pixels.roll((down, right), (2, 3))
