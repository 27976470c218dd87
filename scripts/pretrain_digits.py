"""Train the embedded model of `weft compare`: a small Vision Transformer that has seen the digits 0
to 4 only.

    python scripts/pretrain_digits.py [--out DIR] [--steps N]

Data: the 901 images of 0 to 4 in scikit-learn's load_digits. The images of 5 to 9, which `weft
compare` adapts to, are never loaded into training or into a choice. Each image is shown in four
orientations and the model tells digit and orientation (20 classes): with five classes alone it
learns features that hardly carry over to another digit. About half a minute on one core. Seeded;
the same torch build on the same kind of CPU writes the same bits.
"""

from __future__ import annotations

import argparse
import json
import platform
import random
import time
from pathlib import Path

import sklearn
import torch
import transformers
from torch import Tensor
from torch.nn.functional import cross_entropy

import weft
from weft.tasks.digits import OLD, digit_images
from weft.tasks.images import plain

OUT = Path(weft.__file__).parent / "tasks" / "assets" / "digits_vit"
SEED, HELD_OUT, BATCH, LR, WEIGHT_DECAY, WARM_UP = 0, 151, 64, 2e-3, 0.05, 0.1
TURNS = 4


def new_model() -> transformers.ViTForImageClassification:
    """17 tokens (16 patches of 2 x 2 and one for the class), width 48, four layers."""
    names = {d + len(OLD) * k: f"{d} turned by {90 * k} degrees" for k in range(TURNS) for d in OLD}
    return transformers.ViTForImageClassification(
        transformers.ViTConfig(
            image_size=8,
            patch_size=2,
            num_channels=1,
            hidden_size=48,
            intermediate_size=112,
            num_hidden_layers=4,
            num_attention_heads=4,
            hidden_dropout_prob=0.0,
            attention_probs_dropout_prob=0.0,
            id2label=names,
            label2id={name: number for number, name in names.items()},
        )
    )


def turned(pixels: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """Every image [n, 1, 8, 8] in four orientations; the class is digit + 5 x quarter turns."""
    return (
        torch.cat([torch.rot90(pixels, k, (2, 3)) for k in range(TURNS)]),
        torch.cat([labels + len(OLD) * k for k in range(TURNS)]),
    )


def train(model: torch.nn.Module, pixels: Tensor, labels: Tensor, steps: int) -> None:
    optimiser = torch.optim.AdamW(model.parameters(), lr=LR, weight_decay=WEIGHT_DECAY)
    warm = max(1, round(WARM_UP * steps))
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimiser, lambda s: min((s + 1) / warm, (steps - s) / max(1, steps - warm))
    )
    generator = torch.Generator().manual_seed(SEED)
    order = torch.empty(0, dtype=torch.int64)
    model.train()
    for _ in range(steps):
        if len(order) < BATCH:
            order = torch.randperm(len(labels), generator=generator)
        rows, order = order[:BATCH], order[BATCH:]
        loss = cross_entropy(model(pixel_values=pixels[rows]).logits, labels[rows])
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        schedule.step()
    model.eval()


@torch.no_grad()
def accuracy(model: torch.nn.Module, pixels: Tensor, labels: Tensor) -> float:
    return float((model(pixel_values=pixels).logits.argmax(1) == labels).double().mean())


README = """# digits-vit: the embedded model of `weft compare`

A Vision Transformer of {numbers:,} parameters (8 x 8 grey images, patches of 2 x 2, width 48, four layers), made for
Weft by `scripts/pretrain_digits.py` on {date}, Apache-2.0 like the rest.

* Data: the {images} images of the digits 0 to 4 in scikit-learn {sklearn}'s `load_digits` (from UCI's "Optical
  Recognition of Handwritten Digits", E. Alpaydin and C. Kaynak, CC BY 4.0). No image of 5 to 9 was used.
* Training: {steps} steps of {batch} images, AdamW, learning rate {lr}, seed {seed}; each image in four orientations,
  20 classes (digit and orientation). {seconds:.0f} s on one core ({machine}, torch {torch}, transformers {transformers}).
* Accuracy on {held} held-out images of 0 to 4, all four orientations: {accuracy:.1%} (0 is much the same upside down).

Plain `transformers`: `ViTForImageClassification.from_pretrained(DIR)`. Pixels are scaled to [-1, 1].
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--out", type=Path, default=OUT)
    parser.add_argument("--steps", type=int, default=1200)
    args = parser.parse_args()
    torch.set_num_threads(1)  # the bits depend on how a sum is split over threads
    torch.manual_seed(SEED)
    random.seed(SEED)
    model = new_model()
    images, digits = digit_images(OLD)
    order = random.sample(range(len(images)), len(images))
    pixels, labels = plain(images, model.config)[order], torch.tensor(digits)[order]
    started = time.perf_counter()
    train(model, *turned(pixels[HELD_OUT:], labels[HELD_OUT:]), args.steps)
    seconds = time.perf_counter() - started
    score = accuracy(model, *turned(pixels[:HELD_OUT], labels[:HELD_OUT]))
    model.save_pretrained(args.out)
    (args.out / "model.safetensors").chmod(0o644)
    (args.out / "README.md").write_text(
        README.format(
            numbers=model.num_parameters(),
            date=time.strftime("%Y-%m-%d"),
            images=len(images),
            sklearn=sklearn.__version__,
            steps=args.steps,
            batch=BATCH,
            lr=LR,
            seed=SEED,
            seconds=seconds,
            machine=platform.machine(),
            torch=torch.__version__,
            transformers=transformers.__version__,
            held=HELD_OUT,
            accuracy=score,
        ),
        encoding="utf-8",
    )
    print(
        json.dumps(
            {
                "out": str(args.out),
                "seconds": round(seconds, 1),
                "held_out_accuracy": round(score, 4),
            }
        )
    )


if __name__ == "__main__":
    main()
