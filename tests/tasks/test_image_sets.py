"""The papers' image sets in the forms in which people have them, in full and with a few images a
class.
"""

import io
import json

import numpy as np
import pytest
import torch
from PIL import Image

from weft.errors import ConfigError, WeftError
from weft.tasks import find_task, image_sets, images
from weft.tasks.base import SPLITS, Split
from weft.tasks.image_folder import Stored


def encoded(value, form="PNG"):
    """A 4 x 4 image that no other value has."""
    pixels = np.full((4, 4, 3), value % 250, np.uint8)
    pixels[0, 0] = (value // 250, value % 250, 7)
    out = io.BytesIO()
    Image.fromarray(pixels).save(out, form)
    return out.getvalue()


def cifar(folder, train=3, test=2):
    """Every image has its own red, a green second pixel in its first row, and a blue first
    pixel.
    """
    place = folder / "cifar-100-binary"
    place.mkdir()
    (place / "fine_label_names.txt").write_text(
        "".join(f"class_{i:02d}\n" for i in range(100)) + "\n"
    )
    for name, each, start in (("train", train, 0), ("test", test, 100)):
        rows = b""
        for label in range(100):
            for i in range(each):
                red, green = bytes([start + i] * 1024), bytes([0, 9]) + bytes(1022)
                rows += bytes([label // 5, label]) + red + green + bytes([label]) + bytes(1023)
        (place / f"{name}.bin").write_bytes(rows)
    return place


def class_folders(place, classes, each, start=0):
    for label in range(classes):
        (place / f"c{label:03d}").mkdir(parents=True)
        for i in range(each):
            (place / f"c{label:03d}" / f"{i}.png").write_bytes(encoded(start + label * each + i))
    return place


def food(folder):
    place = folder / "food-101"
    (place / "meta").mkdir(parents=True)
    for name, numbers in (("train", (1, 2, 3)), ("test", (4,))):
        (place / "meta" / f"{name}.txt").write_text(
            "".join(f"dish{i}/{n}\n" for i in range(101) for n in numbers)
        )
    for i in range(101):
        (place / "images" / f"dish{i}").mkdir(parents=True)
        for n in (1, 2, 3, 4):
            (place / "images" / f"dish{i}" / f"{n}.jpg").write_bytes(encoded(4 * i + n, "JPEG"))
    return place


def flowers(folder):
    from scipy.io import savemat

    (folder / "jpg").mkdir()
    numbers = list(range(1, 307))
    for n in numbers:
        (folder / "jpg" / f"image_{n:05d}.jpg").write_bytes(encoded(n, "JPEG"))
    savemat(
        folder / "imagelabels.mat", {"labels": np.array([[(n - 1) % 102 + 1 for n in numbers]])}
    )
    savemat(
        folder / "setid.mat",
        {"trnid": [numbers[:102]], "valid": [numbers[102:204]], "tstid": [numbers[204:]]},
    )
    return folder


def parquet(path, labels, column="label", image="image", start=0):
    import pyarrow as pa
    from pyarrow import parquet as pq

    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(
        pa.table(
            {
                image: [{"bytes": encoded(start + i), "path": None} for i in range(len(labels))],
                column: labels,
                "coarse_label": [0] * len(labels),
            }
        ),
        path,
    )


def contents(split):
    return [images.open_image(item).tobytes() for item in split.items]


def counts(task):
    return {name: (len(task.splits[name]), len(set(task.splits[name].labels))) for name in SPLITS}


def test_cifar_100_binary_with_one_image_a_class(tmp_path):
    place = cifar(tmp_path)
    for path in (place, tmp_path):  # the folder itself, or where it was unpacked
        task = find_task(f"cifar100:{path}:per_class=1").load()
        assert counts(task) == {"train": (100, 100), "validation": (100, 100), "test": (200, 100)}
    assert task.classes == tuple(f"class_{i:02d}" for i in range(100))
    image, label = task.splits["test"].items[31], task.splits["test"].labels[31]
    assert label == 15 and image.size == (32, 32)
    assert [image.getpixel(at) for at in ((0, 0), (1, 0), (0, 1))] == [
        (101, 0, 15),
        (101, 9, 0),
        (101, 0, 0),
    ]
    assert not set(contents(task.splits["train"])) & set(contents(task.splits["validation"]))
    again = find_task(f"cifar100:{place}:per_class=1").load()
    assert contents(again.splits["train"]) == contents(task.splits["train"])
    assert (
        len({pixels[0] for pixels in contents(task.splits["train"])}) > 1
    )  # not the first of every class
    assert "drawn by a fixed seed" in task.notes[-1]


def test_in_full_a_part_of_train_is_for_validation(tmp_path):
    task = find_task(f"cifar100:{cifar(tmp_path)}").load()
    assert counts(task) == {"train": (200, 100), "validation": (100, 100), "test": (200, 100)}
    assert "10%" in task.notes[-1]


def test_resisc45_reports_all_other_images(tmp_path):
    class_folders(tmp_path / "NWPU-RESISC45", 45, 5)
    task = find_task(f"resisc45:{tmp_path}:per_class=2").load()
    assert counts(task) == {"train": (90, 45), "validation": (90, 45), "test": (45, 45)}
    assert len({pixels for name in SPLITS for pixels in contents(task.splits[name])}) == 225
    assert isinstance(task.splits["train"].items[0], Stored)  # not opened before it is needed
    assert sum(len(task.splits[name]) for name in SPLITS) == 225
    full = find_task(f"resisc45:{tmp_path}").load()
    assert counts(full)["train"] == (135, 45) and "no test set" in full.notes[-1]


def test_resisc45_in_parts_is_put_together_for_the_papers_protocol(tmp_path):
    for start, part in enumerate(("train", "val", "test")):
        class_folders(tmp_path / part, 45, 2, start * 90)
    assert counts(find_task(f"resisc45:{tmp_path}").load()) == dict.fromkeys(SPLITS, (90, 45))
    few = find_task(f"resisc45:{tmp_path}:per_class=1").load()
    assert counts(few) == {"train": (45, 45), "validation": (45, 45), "test": (180, 45)}
    assert len({pixels for name in SPLITS for pixels in contents(few.splits[name])}) == 270


def test_food101_as_torchvision_unpacks_it(tmp_path):
    place = food(tmp_path)
    task = find_task(f"food101:{tmp_path}:per_class=1").load()
    assert counts(task) == {"train": (101, 101), "validation": (101, 101), "test": (101, 101)}
    assert {item.name.rpartition("/")[2] for item in task.splits["test"].items} == {"4.jpg"}
    (place / "images" / "dish7" / "2.jpg").unlink()
    with pytest.raises(WeftError, match="1 of 303 are missing"):
        find_task(f"food101:{place}").load()


def test_flowers102_uses_its_own_validation(tmp_path):
    task = find_task(f"flowers102:{flowers(tmp_path)}:per_class=1").load()
    assert (
        counts(task) == dict.fromkeys(SPLITS, (102, 102))
        and "the validation part" in task.notes[-1]
    )
    assert task.splits["validation"].items[0].name.endswith("image_00103.jpg")
    assert (
        task.splits["validation"].labels[9] == 9
    )  # classes 1 to 102 in the order of their numbers
    assert counts(find_task(f"flowers102:{tmp_path}").load()) == dict.fromkeys(SPLITS, (102, 102))
    with pytest.raises(WeftError, match="'1' has 1 images, and 2 are needed"):
        find_task(f"flowers102:{tmp_path}:per_class=2").load()
    (tmp_path / "setid.mat").write_bytes(b"no matlab")
    with pytest.raises(WeftError, match="cannot be read"):
        find_task(f"flowers102:{tmp_path}").load()


def test_the_hubs_parquet_files(tmp_path):
    labels = [i % 100 for i in range(200)]
    parquet(tmp_path / "cifar100" / "train-00000-of-00002.parquet", labels, "fine_label", "img")
    parquet(
        tmp_path / "cifar100" / "train-00001-of-00002.parquet",
        labels[:100],
        "fine_label",
        "img",
        200,
    )
    parquet(
        tmp_path / "cifar100" / "test-00000-of-00001.parquet",
        labels[:100],
        "fine_label",
        "img",
        300,
    )
    task = find_task(f"cifar100:{tmp_path}:per_class=1").load()
    assert counts(task) == dict.fromkeys(SPLITS, (100, 100))
    assert contents(task.splits["test"])[3] == Image.open(io.BytesIO(encoded(303))).tobytes()
    for name in ("train", "validation"):
        parquet(tmp_path / "food" / f"{name}-0.parquet", [i % 101 for i in range(202)])
    task = find_task(f"food101:{tmp_path / 'food'}").load()
    assert counts(task)["test"] == (202, 101) and "is used instead" in task.notes[0]
    with pytest.raises(WeftError, match="coarse_label"):
        find_task(f"resisc45:{tmp_path}").load()


def test_a_pickle_is_refused_without_being_opened(tmp_path):
    for name in ("train", "test", "meta"):
        (tmp_path / name).write_bytes(b"cos\nsystem\n(S'exit 1'\ntR.")
        (tmp_path / name).chmod(0)
    with pytest.raises(WeftError, match="cifar-100-binary"):
        find_task(f"cifar100:{tmp_path}").load()


@pytest.mark.parametrize("damage", ["cut", "label"])
def test_damaged_cifar_is_an_error(tmp_path, damage):
    file = cifar(tmp_path) / "train.bin"
    held = file.read_bytes()
    file.write_bytes(held[:-1] if damage == "cut" else held[:1] + b"\xff" + held[2:])
    with pytest.raises(WeftError, match=r"train\.bin has"):
        find_task(f"cifar100:{tmp_path}").load()


def test_what_is_missing_is_named(tmp_path):
    (tmp_path / "readme").write_text("x")
    with pytest.raises(WeftError, match="readme"):
        find_task(f"food101:{tmp_path}").load()
    class_folders(tmp_path / "train", 44, 2)
    with pytest.raises(WeftError, match=r"only \['train'\]"):
        find_task(f"resisc45:{tmp_path}").load()
    class_folders(tmp_path / "test", 44, 2)
    with pytest.raises(WeftError, match="44 classes, and the set has 45"):
        find_task(f"resisc45:{tmp_path}").load()


@pytest.mark.parametrize("wrong", [":per_clas=10", ":per_class=0", ":per_class=ten", ":per_class="])
def test_an_option_that_cannot_be_meant_is_refused(tmp_path, wrong):
    with pytest.raises(ConfigError, match="per_class=N"):
        find_task(f"food101:{tmp_path}{wrong}")


def test_names_and_places_are_checked_before_anything_is_read(tmp_path):
    with pytest.raises(ConfigError, match="write food101:DIR"):
        find_task("food101")
    with pytest.raises(ConfigError, match="does not exist"):
        find_task(f"food101:{tmp_path / 'x'}:per_class=3")
    with pytest.raises(ConfigError, match="its own test data"):
        find_task(f"food101:{tmp_path}", test=str(tmp_path))
    with pytest.raises(ConfigError, match=r"Nearest.*cifar100"):
        find_task(f"cifar10:{tmp_path}")


def test_a_split_too_large_to_keep_gives_the_same_pixels(tmp_path, monkeypatch):
    from transformers import ViTConfig

    config = ViTConfig(image_size=6, num_channels=3)
    items = [Stored(f"{i}", encoded(i)) for i in range(70)]
    split = Split(items, [i % 2 for i in range(70)])
    held = images.encode(split, config, None)
    monkeypatch.setattr(images, "KEPT_BYTES", 70 * 3 * 36 * 4 - 1)
    streamed = images.encode(split, config, None)
    assert isinstance(held, images.ImageSplit) and isinstance(streamed, images.StreamedSplit)
    rows = torch.tensor([69, 3, 3, 64])
    assert torch.equal(held.batch(rows)["pixel_values"], streamed.batch(rows)["pixel_values"])
    assert torch.equal(held.labels, streamed.labels)
    other = Split([*items[:-1], Stored("x", encoded(1000))], split.labels)
    prints = {
        images.encode(s, c, None).fingerprint()
        for s in (split, other)
        for c in (config, ViTConfig(image_size=5))
    }
    assert len(prints) == 4 and streamed.fingerprint() in prints


def test_every_set_is_listed():
    from weft.tasks import FAMILIES, IMAGES

    assert set(IMAGES) == set(image_sets.SETS) and all(f"{name}:DIR" in FAMILIES for name in IMAGES)
    json.dumps(FAMILIES)


def test_a_set_is_made_ready_for_a_model_with_a_head_for_its_classes(tmp_path):
    from transformers import ViTConfig, ViTForImageClassification

    from weft.tasks.models import find_model, prepare

    class_folders(tmp_path / "data", 45, 4)
    shape = ViTConfig(
        image_size=6,
        patch_size=3,
        hidden_size=12,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=20,
    )
    ViTForImageClassification(shape).save_pretrained(tmp_path / "vit")
    task = find_task(f"resisc45:{tmp_path / 'data'}:per_class=1").load()
    prepared = prepare(task, find_model(str(tmp_path / "vit")), {"test": 50})
    rows = torch.tensor([0, 44])
    assert prepared.model(**prepared.splits["train"].batch(rows)).logits.shape == (2, 45)
    assert (
        prepared.splits["train"].labels[rows].tolist() == [0, 44]
        and len(prepared.splits["test"].labels) == 50
    )
    assert any("drawn by a fixed seed" in note for note in prepared.notes)
