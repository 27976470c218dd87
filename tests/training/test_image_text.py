"""`weft train` on vision-language models: pictures in conversations, their tokens, their batches."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
import tiny_vision
import torch

import weft
from weft.encoding.image_files import open_image
from weft.encoding.rows import IGNORED
from weft.training.config.sections import DataSection, ModelSection, RunConfig, TrainSection
from weft.training.losses import loss_for
from weft.training.prepare import find_sources, open_data
from weft.training.run import train

MODELS = ("llava", "llava_next", "idefics3", "qwen", "gemma")


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """A folder for each model, made when a test asks for it."""
    made = {}

    def folder(name):
        if name not in made:
            where = tmp_path_factory.mktemp(name)
            made[name] = getattr(tiny_vision, name)(where)
        return made[name]

    return folder


@pytest.fixture(scope="module")
def records(tmp_path_factory):
    return tiny_vision.conversations(tmp_path_factory.mktemp("pictures"))


def config(folder, data, out, **changes):
    made = RunConfig(
        out=str(out),
        model=ModelSection(path=str(folder)),
        method=weft.LoRA(
            r=2, within="text_model" if folder.name.startswith("idefics") else "language_model"
        ),
        data=DataSection(train=str(data), max_length=1024),
        train=TrainSection(steps=4, batch=3),
    )
    return replace(made, **changes)


def opened(folder, data, tmp_path, **section):
    made = config(folder, data, tmp_path / "run")
    made = replace(made, data=replace(made.data, **section))
    return open_data(made, find_sources(made))


def rows_of(path, *rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def by_transformers(data, records, nested):
    """What the processor itself makes of the texts and pictures of all records."""
    texts, pictures = [], []
    for line in records.read_text().splitlines():
        asked, said = json.loads(line)["messages"]
        named = [part["path"] for part in asked["content"] if "path" in part]
        pictures.append([open_image(str(records.parent / name)) for name in named])
        parts = [*[{"type": "image"}] * len(named), asked["content"][-1]]
        answer = [{"type": "text", "text": said["content"]}]
        whole = [{"role": "user", "content": parts}, {"role": "assistant", "content": answer}]
        texts.append(data.tokenizer.apply_chat_template(whole, tokenize=False))
    return data.processor.inner(
        text=texts,
        images=pictures if nested else [each for row in pictures for each in row],
        return_tensors="pt",
        padding=True,
        padding_side="right",
    )


@pytest.mark.parametrize("name", MODELS)
def test_the_loss_of_a_batch_is_that_of_transformers_with_labels_made_by_hand(
    folders, records, tmp_path, name
):
    import transformers

    data = opened(folders(name), records, tmp_path)
    model = transformers.AutoModelForImageTextToText.from_pretrained(folders(name)).eval()
    batch = data.collator([data.train[i] for i in range(len(data.train))])
    labels = batch.pop("labels")
    with torch.no_grad():
        ours = loss_for(data.kind)(model(**batch), labels)

    theirs = by_transformers(data, records, nested=name in ("idefics3", "gemma"))
    by_hand = torch.full_like(theirs["input_ids"], IGNORED)
    for row, line in enumerate(records.read_text().splitlines()):
        answer = json.loads(line)["messages"][1]["content"]
        ids = theirs["input_ids"][row].tolist()
        wanted = data.tokenizer(answer, add_special_tokens=False)["input_ids"]
        start = next(i for i in range(len(ids), -1, -1) if ids[i : i + len(wanted)] == wanted)
        stop = start + len(wanted) + 1  # the token that ends the turn
        start -= labels[row, start - 1].item() != IGNORED  # a blank after the header
        by_hand[row, start:stop] = theirs["input_ids"][row, start:stop]
    with torch.no_grad():
        reference = model(**theirs, labels=by_hand).loss
    assert torch.equal(batch["input_ids"], theirs["input_ids"])
    torch.testing.assert_close(ours, reference, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("name", ["llava", "idefics3", "qwen"])
def test_a_run_trains_saves_its_processor_and_resumes_to_the_same_adapter(
    folders, records, tmp_path, name
):
    made = config(folders(name), records, tmp_path / "run")
    done = train(made)
    assert done.finished
    saved = {p.name for p in (tmp_path / "run" / "adapter").iterdir()}
    assert {"tokenizer.json", "chat_template.jinja"} <= saved
    assert saved & {"processor_config.json", "preprocessor_config.json"}
