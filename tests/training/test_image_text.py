"""`weft train` on vision-language models: pictures in conversations, their tokens, their batches."""

from __future__ import annotations

import json
import re
import shutil
from dataclasses import replace

import pytest
import tiny
import tiny_vision
import torch
from PIL import Image
from safetensors.torch import load_file

import weft
from weft.cli import main
from weft.encoding.image_files import open_image
from weft.encoding.rows import IGNORED
from weft.errors import ConfigError, WeftError
from weft.inference.generate import generate
from weft.inference.opened import open_model
from weft.training.config.sections import (
    DataSection,
    ModelSection,
    RunConfig,
    SaveSection,
    TrainSection,
)
from weft.training.losses import loss_for
from weft.training.prepare import find_sources, open_data
from weft.training.run import train
from weft.training.sampling import GroupedOrder

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


@pytest.fixture(scope="module")
def trained(folders, records, tmp_path_factory):
    """A run directory for each model."""
    made = {}

    def run(name):
        if name not in made:
            made[name] = tmp_path_factory.mktemp("runs") / name
            assert train(config(folders(name), records, made[name])).finished
        return made[name]

    return run


@pytest.mark.parametrize("name", ["llava", "qwen"])
def test_a_run_saves_its_processor_and_generates_with_it(
    folders, records, trained, capsys, tmp_path, name
):
    adapter = trained(name) / "adapter"
    saved = {path.name for path in adapter.iterdir()}
    assert {"tokenizer.json", "chat_template.jinja"} <= saved
    assert saved & {"processor_config.json", "preprocessor_config.json"}

    given = ["--model", str(folders(name)), "--adapter", str(adapter)]
    image = str(records.parent / "0-0.png")
    asked = ["--chat", "--prompt", "What is it?", "--max-new-tokens", "3"]
    assert main(["generate", *given, *asked, "--image", image, "--image", image]) == 0
    assert main(["generate", *given, *asked, "--image", image, "--set", "num_beams=2"]) == 0
    assert main(["generate", *given, *asked]) == 0
    assert main(["eval", *given, "--data", str(records), "--batch", "3"]) == 0
    out = capsys.readouterr().out
    assert "8 samples" in out
    assert "loss" in out

    merged = tmp_path / "merged"
    assert main(["merge", *given, "--out", str(merged)]) == 0
    assert main(["eval", "--model", str(merged), "--data", str(records)]) == 0
    losses = [
        line.split()[1]
        for line in (out + capsys.readouterr().out).splitlines()
        if line.startswith("  loss")
    ]
    assert abs(float(losses[0]) - float(losses[1])) < 2e-4


def test_generate_sees_what_transformers_sees(folders, records):
    import transformers

    opened = open_model(str(folders("llava")), None, images=True)
    image = str(records.parent / "1-0.png")
    ours = generate(opened, ["What?"], {"max_new_tokens": 6}, chat=True, images=[image])
    processor = opened.processor.inner
    parts = [{"type": "image"}, {"type": "text", "text": "What?"}]
    text = processor.apply_chat_template(
        [{"role": "user", "content": parts}], add_generation_prompt=True
    )
    inputs = processor(text=[text], images=[open_image(image)], return_tensors="pt")
    model = transformers.AutoModelForImageTextToText.from_pretrained(folders("llava")).eval()
    out = model.generate(**inputs, max_new_tokens=6, do_sample=False)
    theirs = opened.tokenizer.decode(
        out[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True
    )
    assert ours == [theirs]


def test_a_resumed_run_gives_the_same_adapter(folders, records, trained, tmp_path):
    whole = config(folders("llava"), records, tmp_path / "half")
    stopped = replace(whole, save=SaveSection(every=2))
    assert train(stopped).finished
    for path in (tmp_path / "half" / "checkpoints").iterdir():
        if path.name.endswith("-4"):
            shutil.rmtree(path)
    record = json.loads((tmp_path / "half" / "run.json").read_text())
    (tmp_path / "half" / "run.json").write_text(json.dumps({**record, "status": "running"}))
    assert train(stopped, go_on=True).finished
    first, second = (
        load_file(run / "adapter" / "adapter_model.safetensors")
        for run in (trained("llava"), tmp_path / "half")
    )
    assert first.keys() == second.keys()
    assert all(torch.equal(first[key], second[key]) for key in first)


ANSWER = {"role": "assistant", "content": "A cat."}
FORMS = {
    "path": {
        "messages": [
            {
                "role": "user",
                "content": [
                    {"type": "image", "path": "0-0.png"},
                    {"type": "text", "text": "What?"},
                ],
            },
            ANSWER,
        ]
    },
    "TRL": {
        "images": ["0-0.png"],
        "messages": [
            {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "What?"}]},
            ANSWER,
        ],
    },
    "TRL without places": {
        "images": ["0-0.png"],
        "messages": [{"role": "user", "content": "What?"}, ANSWER],
    },
    "TRL prompt": {
        "image": "0-0.png",
        "prompt": [{"role": "user", "content": "What?"}],
        "completion": [ANSWER],
    },
    "LLaVA": {
        "id": "1",
        "image": "0-0.png",
        "conversations": [
            {"from": "human", "value": "<image>\nWhat?"},
            {"from": "gpt", "value": "A cat."},
        ],
    },
    "prompt": {"image": "0-0.png", "prompt": "What?", "completion": "A cat."},
    "instruction": {"image": "0-0.png", "instruction": "What?", "output": "A cat."},
}


@pytest.mark.parametrize("form", FORMS)
def test_all_ways_to_write_a_picture_are_one(folders, records, tmp_path, form):
    wanted = opened(folders("llava"), written(records, "path"), tmp_path).train[0]
    found = opened(
        folders("llava"), written(records, form), tmp_path, ignore=("id",) * ("id" in FORMS[form])
    )
    assert found.kind == "image-text"
    assert found.train[0] == wanted
    assert found.train[0]["images"] == (str(records.parent / "0-0.png"),)


def written(records, form):
    return rows_of(records.parent / f"{form.replace(' ', '-')}.jsonl", FORMS[form])


def one(content, **more):
    return {"messages": [{"role": "user", "content": content}, ANSWER], **more}


IMAGE, TEXT = {"type": "image", "path": "0-0.png"}, {"type": "text", "text": "What?"}
REFUSED = {
    "there is no image": one([{"type": "image", "path": "none.png"}, TEXT]),
    "it is no picture": one([{"type": "image", "path": "data.jsonl"}, TEXT]),
    "truncated": one([{"type": "image", "path": "cut.png"}, TEXT]),
    "has 2 frames": one([{"type": "image", "path": "two.gif"}, TEXT]),
    "2 images and places for 1": one([{"type": "image"}, TEXT], images=["0-0.png", "1-0.png"]),
    "there is none left for it": one(
        [{"type": "image"}, {"type": "image"}, TEXT], images=["0-0.png"]
    ),
    "is an address": one([{"type": "image", "url": "https://a.b/c.png"}, TEXT]),
    "is the path of a file": one([{"type": "image", "path": 3}, TEXT]),
    "of the type 'video'": one([{"type": "video", "path": "a.mp4"}, TEXT]),
    "nothing reads its key 'detail'": one([{**IMAGE, "detail": "high"}, TEXT]),
    "has the text '<image>'": one([IMAGE, {"type": "text", "text": "Is <image> here?"}]),
    "only text can be learned": {
        "messages": [
            {"role": "user", "content": "Draw."},
            {"role": "assistant", "content": [IMAGE, TEXT]},
        ]
    },
}


@pytest.mark.parametrize("reason", REFUSED)
def test_a_wrong_picture_is_an_error_with_record_and_reason(folders, records, tmp_path, reason):
    whole = (records.parent / "0-0.png").read_bytes()
    (records.parent / "cut.png").write_bytes(whole[: len(whole) // 2])
    frames = [Image.new("RGB", (8, 8), color) for color in ("red", "blue")]
    frames[0].save(records.parent / "two.gif", save_all=True, append_images=frames[1:])
    path = rows_of(records.parent / "wrong.jsonl", FORMS["path"], REFUSED[reason])
    with pytest.raises(WeftError, match=re.escape(reason)) as caught:
        opened(folders("llava"), path, tmp_path)
    assert "sample 2" in str(caught.value)


def test_an_image_is_never_cut(folders, records, tmp_path):
    with pytest.raises(WeftError, match=r"data.jsonl, sample 1: .* would cut through an image"):
        opened(folders("idefics3"), records, tmp_path, max_length=40)


def test_a_template_that_drops_the_picture_is_refused(folders, records, tmp_path):
    template = tmp_path / "text.jinja"
    template.write_text(
        "{% for m in messages %}{{ m['role'] }}: {% if m['content'] is string %}{{ m['content'] }}"
        "{% else %}{{ m['content'][-1]['text'] }}{% endif %}</s>{% endfor %}"
    )
    with pytest.raises(WeftError, match=r"sample 1: .* 0 placeholders '<image>' for 1 images"):
        opened(folders("llava"), records, tmp_path, chat_template=str(template))


def test_a_template_with_generation_blocks_marks_the_same_tokens(folders, records, tmp_path):
    template = tmp_path / "marked.jinja"
    template.write_text(
        "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{% if m['role'] == 'assistant' %}"
        "{% generation %}{{ m['content'] }}<|im_end|>{% endgeneration %}\n{% else %}"
        "{% if m['content'] is string %}{{ m['content'] }}{% else %}"
        "{% for c in m['content'] %}{% if c['type'] == 'image' %}<|image_pad|>{% else %}{{ c['text'] }}"
        "{% endif %}{% endfor %}{% endif %}<|im_end|>\n{% endif %}{% endfor %}"
    )
    data = opened(folders("qwen"), records, tmp_path, chat_template=str(template))
    for number, row in enumerate(data.train.rows):
        learned = [token for token in row["labels"] if token != IGNORED]
        assert data.tokenizer.decode(learned) == f"It is number {number}.<|im_end|>"


def test_images_and_a_text_model_do_not_go_together(records, tmp_path):
    folder = tiny.language_model(tmp_path / "text")
    with pytest.raises(ConfigError, match="is no vision-language model"):
        opened(folder, records, tmp_path)


def test_pictures_are_opened_by_the_batch_and_changed_ones_are_noticed(folders, tmp_path):
    (tmp_path / "data").mkdir()
    records = tiny_vision.conversations(tmp_path / "data")
    data = opened(folders("qwen"), records, tmp_path)
    assert not any("pixel_values" in row for row in data.train.rows)
    tiny_vision.picture(records.parent / "0-0.png", (64, 64))
    with pytest.raises(WeftError, match="a file was changed"):
        data.collator([data.train[0]])


def test_batches_are_of_one_modality_and_of_similar_length():
    lengths = [10 + i % 17 for i in range(90)]
    kinds = [i % 3 > 0 for i in range(90)]
    order = GroupedOrder(lengths, kinds, 4, seed=3)
    seen = list(order)
    assert sorted(seen) == list(range(90))
    batches = [seen[i : i + 4] for i in range(0, 90, 4)]
    assert sum(len({kinds[row] for row in batch}) > 1 for batch in batches) <= 1
    spread = [max(lengths[r] for r in b) - min(lengths[r] for r in b) for b in batches[:-2]]
    assert sum(spread) / len(spread) < 4
    order.set_epoch(1)
    assert list(order) != seen
    order.set_epoch(0)
    assert list(order) == seen
