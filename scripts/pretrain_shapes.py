"""Train the embedded vision-language model: an image tower and a small VL-BART for the world of shapes.

    python scripts/pretrain_shapes.py [--out DIR] [--steps N]

The tower learns the colour, shape and size in each cell of an image, of the whole world. VL-BART learns,
on its frozen features, questions for colours and for whether a thing is there, and captions, with four
colours and three shapes only; the rest of the world, counting, pairs of images and clips are new to it.
Seeded; the same torch build on the same kind of CPU writes the same bits.
"""

from __future__ import annotations

import argparse
import json
import platform
import random
import time
from pathlib import Path

import torch
import transformers
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

import weft
from weft.models.vl_bart import PLACES, VLBartConfig, VLBartForConditionalGeneration
from weft.tasks.shapes import examples as made
from weft.tasks.shapes.language import NUMBERS, WAYS
from weft.tasks.shapes.tower import (
    ATTRIBUTES,
    WIDTH,
    Tower,
    as_pixels,
    cell_boxes,
    features,
    save_tower,
)
from weft.tasks.shapes.world import COLOURS, KNOWN, SHAPES, SIDE, SIZES, Scene, draw, new_scene

OUT = Path(weft.__file__).parent / "tasks" / "assets" / "shapes_vl_bart"
SEED, BATCH, WARM_UP = 0, 64, 0.1
TOWER_IMAGES, TOWER_STEPS, TOWER_LR = 4000, 700, 2e-3
IMAGES, HELD_OUT, LR, WEIGHT_DECAY = 8000, 500, 1e-3, 0.01
MARKS = ("<s>", "<pad>", "</s>", "<unk>", "<mask>")
WORDS = """
vqa: nlvr: caption: tvqa: a is there an what color the object how many objects are ? and both images
contain left image has more than right in at least total true false yes no where does move moves a0 a1 a2
a3
"""


def new_tokenizer() -> transformers.PreTrainedTokenizerFast:
    """One token per word, and VL-BART's tokens for places."""
    known = [*WORDS.split(), *COLOURS, *SHAPES, *SIZES, *NUMBERS, *WAYS]
    listed = list(dict.fromkeys([*MARKS, *known]))
    raw = Tokenizer(models.WordLevel({word: i for i, word in enumerate(listed)}, unk_token="<unk>"))
    raw.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    raw.post_processor = processors.TemplateProcessing(
        single="<s> $A </s>", special_tokens=[("<s>", 0), ("</s>", 2)]
    )
    tokenizer = transformers.PreTrainedTokenizerFast(
        tokenizer_object=raw,
        bos_token="<s>",
        pad_token="<pad>",
        eos_token="</s>",
        unk_token="<unk>",
        mask_token="<mask>",
        clean_up_tokenization_spaces=False,
    )
    places = [f"<vis_extra_id_{i}>" for i in reversed(range(PLACES))]
    tokenizer.add_special_tokens({"additional_special_tokens": places})
    return tokenizer


def new_model(tokenizer: transformers.PreTrainedTokenizerFast) -> VLBartForConditionalGeneration:
    """Width 96, two layers on each side. With BART's init_std of 0.02 it never looks at the image."""
    config = VLBartConfig(
        vocab_size=len(tokenizer),
        d_model=96,
        encoder_layers=2,
        decoder_layers=2,
        encoder_attention_heads=4,
        decoder_attention_heads=4,
        encoder_ffn_dim=192,
        decoder_ffn_dim=192,
        max_position_embeddings=64,
        feat_dim=WIDTH,
        n_images=2,
        init_std=0.1,
        dropout=0.0,
        attention_dropout=0.0,
        activation_dropout=0.0,
        forced_eos_token_id=None,
        bos_token_id=0,
        pad_token_id=1,
        eos_token_id=2,
        decoder_start_token_id=2,
    )
    return VLBartForConditionalGeneration(config)


def attributes(scene: Scene) -> list[list[int]]:
    """The number of colour, shape and size in each cell, row by row; 0 in an empty one."""
    found = [[0] * len(ATTRIBUTES) for _ in range(SIDE * SIDE)]
    for thing in scene:
        numbers = (
            list(COLOURS).index(thing.colour),
            SHAPES.index(thing.shape),
            SIZES.index(thing.size),
        )
        found[thing.y * SIDE + thing.x] = [number + 1 for number in numbers]
    return found


def schedule(optimiser: torch.optim.Optimizer, steps: int) -> torch.optim.lr_scheduler.LambdaLR:
    """Linear warm-up and decay."""
    warm = round(WARM_UP * steps)
    return torch.optim.lr_scheduler.LambdaLR(
        optimiser, lambda s: (s + 1) / warm if s < warm else max(0.0, (steps - s) / (steps - warm))
    )


def train_tower() -> tuple[Tower, list[float]]:
    """Returns the tower and its accuracies on held-out cells with a thing: colour, shape, size."""
    rng = random.Random(f"{SEED}/tower")
    scenes = [new_scene(rng, least=1, most=6) for _ in range(TOWER_IMAGES + HELD_OUT)]
    pixels = as_pixels([draw(scene, rng) for scene in scenes])
    wanted = torch.tensor([attributes(scene) for scene in scenes])
    tower = Tower()
    optimiser = torch.optim.AdamW(tower.parameters(), TOWER_LR)
    rates = schedule(optimiser, TOWER_STEPS)
    sizes = list(ATTRIBUTES.values())
    for _ in range(TOWER_STEPS):
        rows = torch.randint(TOWER_IMAGES, (BATCH,))
        parts = tower.head(tower(pixels[rows])).split(sizes, -1)
        loss = sum(
            cross_entropy(part.flatten(0, 1), wanted[rows, :, i].flatten())
            for i, part in enumerate(parts)
        )
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        rates.step()
    with torch.no_grad():
        parts = tower.head(tower(pixels[TOWER_IMAGES:])).split(sizes, -1)
    there = wanted[TOWER_IMAGES:, :, 0] > 0
    return tower, [
        float((part.argmax(-1) == wanted[TOWER_IMAGES:, :, i])[there].float().mean())
        for i, part in enumerate(parts)
    ]


def batch(
    tokenizer: transformers.PreTrainedTokenizerFast, texts: list[str], targets: list[str]
) -> tuple[dict[str, Tensor], Tensor]:
    """The inputs of a batch without its features, and the decoder's labels."""
    given = tokenizer(texts, padding=True, return_tensors="pt", return_token_type_ids=False)
    labels = tokenizer(targets, padding=True, return_tensors="pt")["input_ids"]
    return dict(given), labels.masked_fill(labels == tokenizer.pad_token_id, -100)


def train_model(tower: Tower, steps: int) -> tuple[nn.Module, object, float]:
    """Returns VL-BART, its tokenizer, and the share of held-out questions that it answers."""
    rng = random.Random(f"{SEED}/model")
    tokenizer = new_tokenizer()
    model = new_model(tokenizer)
    scenes = [new_scene(rng, KNOWN) for _ in range(IMAGES + HELD_OUT)]
    seen = features(tower, [draw(scene, rng) for scene in scenes]).unsqueeze(1)
    # The cells' boxes say nothing that their places do not: with a gain of 1 it learns half as well.
    nn.init.zeros_(model.model.encoder.visual_embedding.absolute_vis_pos_embedding[1].weight)
    boxes = cell_boxes().expand(BATCH, 1, -1, -1)
    optimiser = torch.optim.AdamW(model.parameters(), LR, weight_decay=WEIGHT_DECAY)
    rates = schedule(optimiser, steps)
    for _ in range(steps):
        rows = [rng.randrange(IMAGES) for _ in range(BATCH)]
        pairs = [_pair(scenes[row], rng) for row in rows]
        inputs, labels = batch(tokenizer, [t for t, _ in pairs], [a for _, a in pairs])
        optimiser.zero_grad()
        model(**inputs, vis_feats=seen[rows], vis_boxes=boxes, labels=labels).loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimiser.step()
        rates.step()
    return model, tokenizer, _accuracy(model.eval(), tokenizer, scenes[IMAGES:], seen[IMAGES:])


def _pair(scene: Scene, rng: random.Random) -> tuple[str, str]:
    """A text and what to answer: two questions to one caption."""
    if rng.random() < 1 / 3:
        return "caption:", made.captions(scene, rng, 1)[0]
    asked = made.question(scene, rng, KNOWN, ("colour", "exists"))
    return f"vqa: {asked.text}", asked.answer


@torch.no_grad()
def _accuracy(model: nn.Module, tokenizer: object, scenes: list[Scene], seen: Tensor) -> float:
    rng = random.Random(f"{SEED}/held out")
    asked = [made.question(scene, rng, KNOWN, ("colour", "exists")) for scene in scenes]
    inputs, _ = batch(tokenizer, [f"vqa: {q.text}" for q in asked], [q.answer for q in asked])
    out = model.generate(**inputs, vis_feats=seen, max_new_tokens=4, do_sample=False, num_beams=1)
    said = tokenizer.batch_decode(out, skip_special_tokens=True)
    return sum(a == q.answer for a, q in zip(said, asked, strict=True)) / len(asked)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=OUT)
    parser.add_argument("--steps", type=int, default=2000)
    args = parser.parse_args()
    torch.set_num_threads(1)
    torch.manual_seed(SEED)
    begun = time.process_time()
    tower, accuracies = train_tower()
    print("tower", [f"{a:.3f}" for a in accuracies], f"{time.process_time() - begun:.0f} s")
    model, tokenizer, right = train_model(tower.requires_grad_(False).eval(), args.steps)
    spent = time.process_time() - begun
    args.out.mkdir(parents=True, exist_ok=True)
    model.save_pretrained(args.out)
    tokenizer.save_pretrained(args.out)
    save_tower(tower, args.out)
    numbers = sum(p.numel() for p in model.parameters())
    record = {
        "questions": round(right, 4),
        "tower": dict(zip(ATTRIBUTES, accuracies, strict=True)),
        "numbers": numbers,
        "steps": args.steps,
        "cpu_seconds": round(spent),
        "machine": platform.machine(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
    }
    (args.out / "pretraining.json").write_text(json.dumps(record, indent=1) + "\n")
    print(json.dumps(record))


if __name__ == "__main__":
    main()
