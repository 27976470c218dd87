"""A tiny model of every architecture that a recipe names, and a little data for every task in the
form that people have.
"""

from __future__ import annotations

import io
import json

import numpy as np
import tiny
import torch
from PIL import Image

from weft.tasks.glue import SETS

CLASSES = {"food101": 101, "flowers102": 102, "resisc45": 45}


def models(folder):
    """gpt2, roberta, llama and vit, each as its own configuration builds it."""
    import transformers as t

    small = {k: v for k, v in tiny.WIDTH.items() if not k.startswith("max")}
    torch.manual_seed(0)
    made = {
        "gpt2": t.GPT2LMHeadModel(
            t.GPT2Config(
                vocab_size=260,
                n_positions=1024,
                n_embd=16,
                n_layer=2,
                n_head=2,
                bos_token_id=2,
                eos_token_id=2,
            )
        ),
        "llama": t.LlamaForCausalLM(t.LlamaConfig(**tiny.WIDTH, tie_word_embeddings=False)),
        "roberta": t.RobertaModel(t.RobertaConfig(**small, max_position_embeddings=520)),
        "vit": t.ViTModel(
            t.ViTConfig(
                image_size=8,
                patch_size=4,
                hidden_size=16,
                intermediate_size=28,
                num_hidden_layers=2,
                num_attention_heads=2,
            )
        ),
    }
    for name, model in made.items():
        model.save_pretrained(folder / name)
        if name != "vit":
            tiny.tokenizer(None if name == "roberta" else tiny.CHATML).save_pretrained(
                folder / name
            )
    t.ViTImageProcessor(size={"height": 8, "width": 8}).save_pretrained(folder / "vit")
    return folder


def lines(path, rows):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def e2e(place):
    """The challenge's own tables; several references a meaning in dev and test."""
    place.mkdir()
    rows = [f'"name[The {i}], eatType[pub]",The {i} is a pub.\n' for i in range(8)]
    for name, held in (
        ("trainset", rows),
        ("devset", [*rows[:2], rows[0]]),
        ("testset_w_refs", [*rows[2:4], rows[2]]),
    ):
        (place / f"{name}.csv").write_text("mr,ref\n" + "".join(held), encoding="utf-8")
    return place


def glue(place, name):
    """Train and dev as GLUE publishes them."""
    known = SETS[name]
    place.mkdir()
    for split, size in (("train", 12), (known.dev[0], 6)):
        rows = (
            []
            if name == "cola"
            else ["\t".join([*known.texts[0], "score" if name == "stsb" else "label"])]
        )
        for i in range(size):
            label = (
                f"{i % 6 * 0.9:.1f}" if name == "stsb" else known.classes[i % len(known.classes)]
            )
            texts = [f"{split} {column} {i}" for column in known.texts[0]]
            rows.append(
                "\t".join(["src", str(i % 2), "*", *texts] if name == "cola" else [*texts, label])
            )
        (place / f"{split}.tsv").write_text("\n".join(rows) + "\n")
    return place


def commonsense(place):
    """LLM-Adapters' folder: the merged training file, and a test file of each set."""
    asked = {
        "boolq": "false",
        "piqa": "solution2",
        "social_i_qa": "answer3",
        "hellaswag": "ending4",
        "winogrande": "option1",
        "ARC-Easy": "answer4",
        "ARC-Challenge": "answer1",
        "openbookqa": "answer2",
    }
    rows = {
        name: {
            "instruction": f"Say {answer}",
            "input": "",
            "output": f"the correct answer is {answer}",
            "answer": answer,
        }
        for name, answer in asked.items()
    }
    for name, row in rows.items():
        (place / name).mkdir(parents=True)
        (place / name / "test.json").write_text(json.dumps([row]))
    (place / "commonsense_170k.json").write_text(
        json.dumps([*rows.values()] * 151)
    )  # of fewer nothing is held out
    return place


def wikisql(place):
    """The authors' questions and tables."""
    for split, count in (("train", 6), ("dev", 2), ("test", 2)):
        lines(
            place / f"{split}.jsonl",
            [
                {
                    "question": f"How many {i}?",
                    "table_id": "t",
                    "phase": 1,
                    "sql": {"sel": 1, "agg": 3, "conds": [[0, 0, f"{i}"]]},
                }
                for i in range(count)
            ],
        )
        lines(
            place / f"{split}.tables.jsonl",
            [{"id": "t", "header": ["A", "B"], "types": ["text", "real"], "rows": []}],
        )
    return place


def samsum(place):
    """The authors' files."""
    place.mkdir()
    for split, count in (("train", 6), ("val", 2), ("test", 2)):
        (place / f"{split}.json").write_text(
            json.dumps(
                [
                    {
                        "id": str(i),
                        "dialogue": f"Al: hi {i}\r\nBo: yo",
                        "summary": f"Al and Bo greet {i} times.",
                    }
                    for i in range(count)
                ]
            )
        )
    return place


def cifar100(place):
    """The authors' binary files: three training images and one test image a class."""
    place.mkdir()
    (place / "fine_label_names.txt").write_text("".join(f"class_{i:02d}\n" for i in range(100)))
    for name, each in (("train", 3), ("test", 1)):
        rows = b"".join(
            bytes([label // 5, label]) + bytes([2 * label + i]) * 3072
            for label in range(100)
            for i in range(each)
        )
        (place / f"{name}.bin").write_bytes(rows)
    return place


def image_folders(place, classes):
    """train/<class>/*.png and test/<class>/*.png."""
    for split, each in (("train", 3), ("test", 1)):
        for label in range(classes):
            (place / split / f"c{label:03d}").mkdir(parents=True)
            for i in range(each):
                held = io.BytesIO()
                Image.fromarray(np.full((4, 4, 3), 2 * label + i, np.uint8)).save(held, "PNG")
                (place / split / f"c{label:03d}" / f"{i}.png").write_bytes(held.getvalue())
    return place


def task(folder, kind):
    """The data of a task by its name in a recipe, made once, and what `--set task=` says then."""
    name = kind.removesuffix("-paper")
    place = folder / name
    if not place.exists():
        if name in SETS:
            glue(place, name)
        elif name in CLASSES:
            image_folders(place, CLASSES[name])
        else:
            {
                "e2e": e2e,
                "commonsense": commonsense,
                "wikisql": wikisql,
                "samsum": samsum,
                "cifar100": cifar100,
            }[name](place)
    return f"{kind}:{place}" + (":per_class=1" if name == "cifar100" or name in CLASSES else "")


def alpaca(path):
    """Alpaca's file: one list of instruction, input and output, the second often empty."""
    path.write_text(
        json.dumps(
            [
                {
                    "instruction": f"Add {i}.",
                    "input": "to 2" if i % 2 else "",
                    "output": f"{2 + i}.",
                }
                for i in range(8)
            ]
        )
    )
    return path


def questions(path):
    """MT-Bench's, as FastChat has them."""
    return lines(
        path,
        [{"question_id": 81, "category": "writing", "turns": ["Write one line.", "And another."]}],
    )
