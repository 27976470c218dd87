"""Adapters of unknown origin: whatever is in the files, `load` and `inspect` read it right or raise
one of our errors, in bounded time and memory, and a file that `load` refuses in every model is not
called checked.
"""

from __future__ import annotations

import base64
import json
import os
import struct
import zlib

import pytest
import torch
from checkpoint_support import (
    CONFIG,
    TENSORS,
    config_of,
    edit_config,
    peft_file,
    read,
    refused,
    rewrite,
)
from safetensors.torch import save_file

import weft
from support import awake, net
from weft.checkpoint import files, header

BACKTRACKS = "(x+x+)+y|(.*a){25}|((l|l|l)*)*z"


def both_refuse(directory, *texts, error=weft.WeftError):
    """`load` and `inspect` refuse with these texts."""
    refused(net(), directory, *texts, error=error)
    with pytest.raises(error) as caught:
        weft.inspect(directory)
    for text in texts:
        assert text in str(caught.value)


def forged(directory, change):
    """Rewrite the header of one of our files and seal it again, as a forger would."""
    tensors, head = read(directory)
    parts = {
        "weft": json.loads(head["weft"]),
        "manifest": json.loads(zlib.decompress(base64.b64decode(head["weft_manifest"]))),
        "tensors": tensors,
    }
    change(parts)
    keys = sorted(parts["tensors"])
    if "keys" in parts["manifest"] and isinstance(parts["manifest"]["keys"], list):
        parts["manifest"]["keys"] = keys
    manifest = parts.get("raw") or json.dumps(parts["manifest"]).encode()
    text = {
        "weft": parts["weft"] if isinstance(parts["weft"], str) else json.dumps(parts["weft"]),
        "weft_manifest": base64.b64encode(zlib.compress(manifest, 9)).decode(),
        "weft_checksums": "".join(files.checksum(parts["tensors"][key]) for key in keys),
    }
    text = {**head, **text, "weft_seal": header._seal(text)}
    save_file(parts["tensors"], str(directory / TENSORS), text)


def ours(folder, method="LoRA", **changes):
    a = awake(method, **changes)
    return weft.save(a.model, folder)


@pytest.mark.parametrize("field", ["rank_pattern", "alpha_pattern"])
def test_an_expression_of_a_file_that_backtracks_is_matched_all_the_same(field, tmp_path):
    directory = peft_file(tmp_path / "a")
    edit_config(directory, **{field: {BACKTRACKS: 2, "(m+i*)+d": 3 if field[0] == "r" else 7}})
    adapter = weft.load(net(), directory)
    assert adapter.layers["mid"].method.r == 3
    assert adapter.layers["mid"].method.alpha == (5 if field[0] == "r" else 7)


def test_targets_that_backtrack(tmp_path):
    directory = peft_file(tmp_path / "a")
    edit_config(directory, target_modules="((l|l|l|a|y|e|r)+)+|mid")
    assert set(weft.load(net(), directory).layers) == {"layer", "mid"}
    edit_config(directory, target_modules=r"((?:x|layer|(y))*)*\2")
    refused(net(), directory, "groupref")
    edit_config(directory, target_modules="(" * 5000 + ")" * 5000)
    both_refuse(directory, "no regular expression")
    edit_config(directory, target_modules="(ab|.*c)*" * 50_000)
    both_refuse(directory, "450,000 characters")


def test_a_backtracking_pattern_in_our_own_header(tmp_path):
    directory = ours(tmp_path / "a")

    def change(parts):
        parts["weft"]["config"]["targets"] = ["((l|l|a|y|e|r)*)*z|((l|a|y|e|r)+)+", "mid"]

    forged(directory, change)
    assert set(weft.load(net(), directory).layers) == {"layer", "mid"}


@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.float8_e5m2, torch.complex64])
@pytest.mark.parametrize("writer", ["weft", "peft"])
def test_tensors_in_a_type_that_no_adapter_has(writer, dtype, tmp_path):
    directory = ours(tmp_path / "a") if writer == "weft" else peft_file(tmp_path / "a")

    def change(tensors):
        for key in tensors:
            tensors[key] = tensors[key].to(dtype)

    if writer == "weft":
        forged(directory, lambda parts: change(parts["tensors"]))
    else:
        rewrite(directory, change)
    both_refuse(directory, f"dtype {dtype}", error=weft.CheckpointError)


HUGE = "9" * 400


@pytest.mark.parametrize(
    "change",
    [
        {"lora_alpha": HUGE},
        {"r": HUGE},
        {"lora_dropout": HUGE},
        {"rank_pattern": f'{{"mid": {HUGE}}}'},
        {"alpha_pattern": f'{{"mid": {HUGE}}}'},
        {"lora_alpha": "1e999"},
        {"lora_alpha": "NaN"},
        {"lora_alpha": "9" * 20},
        {"lora_alpha": '"\\ud800"'},
        {"target_modules": "[" * 100_000 + "]" * 100_000},
        {"target_modules": '["mid", 5]'},
        {"target_modules": "[" * 80 + '"mid"' + "]" * 80},
        {"auto_mapping": '"Net"'},
        {"auto_mapping": '{"base_model_class": 5}'},
        {"modules_to_save": '"\\ud800"'},
        {"target_modules": '["mid", "\\udfff"]'},
    ],
    ids=str,
)
def test_extreme_values_of_a_configuration(change, tmp_path):
    directory = peft_file(tmp_path / "a")
    field, value = next(iter(change.items()))
    config = config_of(directory)
    config[field] = "VALUE"
    (directory / CONFIG).write_text(json.dumps(config).replace('"VALUE"', value))
    if field == "lora_alpha" and value == "9" * 20:  # large, and a number all the same
        weft.inspect(directory)
        return
    both_refuse(directory, CONFIG, error=weft.CheckpointError)


def test_a_repeated_key_of_a_configuration(tmp_path):
    directory = peft_file(tmp_path / "a")
    text = (directory / CONFIG).read_text().rstrip()[:-1]
    (directory / CONFIG).write_text(text + ', "lora_alpha": 500}')
    both_refuse(directory, "'lora_alpha' is given twice", error=weft.CheckpointError)


@pytest.mark.parametrize("name", [CONFIG, TENSORS])
@pytest.mark.parametrize("what", ["a FIFO", "a device", "a directory", "a link to nothing"])
@pytest.mark.parametrize("writer", ["weft", "peft"])
def test_what_is_no_regular_file_is_not_opened(writer, what, name, tmp_path):
    directory = ours(tmp_path / "a") if writer == "weft" else peft_file(tmp_path / "a")
    (directory / name).unlink()
    make = {
        "a FIFO": os.mkfifo,
        "a device": lambda path: path.symlink_to("/dev/zero"),
        "a directory": lambda path: path.mkdir(),
        "a link to nothing": lambda path: path.symlink_to("nowhere"),
    }
    make[what](directory / name)
    both_refuse(directory, name, what, error=weft.CheckpointError)


@pytest.mark.parametrize("name", [CONFIG, TENSORS])
def test_a_file_that_is_too_large_is_not_read(name, tmp_path):
    directory = peft_file(tmp_path / "a")
    with (directory / name).open("wb") as file:
        file.write(struct.pack("<Q", 2**40))
        file.truncate(3 * 2**30)  # of zeros, which take no space
    both_refuse(directory, "bytes", error=weft.CheckpointError)


def test_a_compressed_manifest_is_not_unpacked_without_end(tmp_path):
    directory = ours(tmp_path / "a")
    forged(directory, lambda parts: parts.update(raw=b" " * 2**26))
    both_refuse(directory, "larger than", error=weft.CheckpointError)
    forged(ours(tmp_path / "a"), lambda parts: parts.update(raw=b"[" * 10**6))
    both_refuse(directory, "nested", error=weft.CheckpointError)


def test_a_name_that_the_tensors_file_has_twice(tmp_path):
    directory = peft_file(tmp_path / "a")
    data = (directory / TENSORS).read_bytes()
    size = struct.unpack("<Q", data[:8])[0]
    text = data[8 : 8 + size].decode().rstrip()
    key = next(k for k in json.loads(text) if k != "__metadata__")
    entry = json.dumps(key) + ":" + json.dumps(json.loads(text)[key])
    text = (text[:-1] + "," + entry + "}").encode()
    (directory / TENSORS).write_bytes(struct.pack("<Q", len(text)) + text + data[8 + size :])
    both_refuse(directory, "given twice", error=weft.CheckpointError)


@pytest.mark.parametrize("method", ["VeRA", "DVoRA", "LoRAFA"])
def test_a_layer_that_claims_a_size_which_no_tensor_confirms(method, tmp_path):
    directory = ours(tmp_path / "a", method)

    def change(parts):
        parts["manifest"]["sites"][0][2][1] = 10**9

    forged(directory, change)
    with pytest.raises(weft.CheckpointError, match="1000000000"):
        weft.load(net(), directory)
    with pytest.raises(weft.CheckpointError, match="1000000000"):
        weft.inspect(directory)
    with pytest.raises(weft.CheckpointError, match="1000000000"):
        weft.export(directory, "lora" if method != "DVoRA" else "peft", tmp_path / "out")


def test_a_prefix_of_many_layers(tmp_path):
    (tmp_path / "a").mkdir()
    save_file({"prompt_embeddings": torch.ones(4, 48)}, str(tmp_path / "a" / TENSORS))
    config = {"peft_type": "PREFIX_TUNING", "num_virtual_tokens": 4, "token_dim": 24}
    for change in ({"num_layers": 10**9}, {"num_layers": 1, "token_dim": 10**18}):
        (tmp_path / "a" / CONFIG).write_text(json.dumps({**config, **change}))
        both_refuse(tmp_path / "a", "prompt_embeddings", error=weft.CheckpointError)


def test_empty_tensors_that_would_grow(tmp_path):
    import peft

    directory = peft_file(tmp_path / "a")
    made = peft.AdaLoraConfig(init_r=6, target_r=3, total_step=9, target_modules=["mid"])
    config = {**made.to_dict(), "peft_type": "ADALORA", "target_modules": ["mid"]}
    config["rank_pattern"] = {"base_model.model.mid.lora_E": [False] * 6}
    (directory / CONFIG).write_text(json.dumps(config, default=str))
    key = "base_model.model.mid.lora_"
    tensors = {
        key + "A": torch.zeros(0, 10**9),
        key + "B": torch.zeros(10**9, 0),
        key + "E": torch.zeros(0, 1),
    }
    save_file(tensors, str(directory / TENSORS))
    both_refuse(directory, "empty", error=weft.CheckpointError)


@pytest.mark.parametrize(
    "change",
    [
        lambda p: p["manifest"].update(base=[1]),
        lambda p: p["manifest"].update(base={"class": 5}),
        lambda p: p["manifest"].update(base={"class": "Net", "inner": {"class": "Net"}}),
        lambda p: p["manifest"].update(selected=5),
        lambda p: p["manifest"].update(selected=["a", ["b"]]),
        lambda p: p["manifest"].update(sites={"layer": 1}),
        lambda p: p["manifest"]["sites"].append(p["manifest"]["sites"][0]),
        lambda p: p["manifest"]["sites"][0].__setitem__(2, [2.5, True]),
        lambda p: p["manifest"]["sites"][0].__setitem__(2, [-3, 7]),
        lambda p: p["manifest"]["sites"][0].__setitem__(3, {"r": "3"}),
        lambda p: p["manifest"].update(adapter_config=None),
        lambda p: p["manifest"].update(reached={"layer": "1"}),
        lambda p: p["manifest"].update(keys="abc"),
        lambda p: p["manifest"].pop("keys"),
        lambda p: p["weft"].update(config=7),
        lambda p: p["weft"].update(layout=["LORA"]),
        lambda p: p["weft"].update(shared={"x": 1}),
        lambda p: p["weft"]["config"].update(targets={"mid": {"bogus": 1}}),
        lambda p: p.update(weft="[" * 5000),
        lambda p: p.update(weft="5"),
    ],
)
def test_a_header_that_says_what_weft_never_writes(change, tmp_path):
    directory = ours(tmp_path / "a")
    forged(directory, change)
    both_refuse(directory, error=weft.CheckpointError)


@pytest.mark.parametrize("marks", ["1", "1" * 4, "2x1", ""])
def test_triplets_in_force_that_are_not_those_of_the_rank(marks, tmp_path):
    directory = ours(tmp_path / "a", "AdaLoRA")
    forged(directory, lambda p: p["manifest"]["reached"].update(layer=marks))
    both_refuse(directory, "reached", error=weft.CheckpointError)


@pytest.mark.parametrize("method", ["VeRA", "DVoRA", "LoRAFA"])
def test_inspect_draws_again_what_the_seed_decides(method, tmp_path):
    directory = ours(tmp_path / "a", method)
    weft.inspect(directory)
    forged(
        directory, lambda p: p["weft"].update(shared=dict.fromkeys(p["weft"]["shared"], "0" * 16))
    )
    with pytest.raises(weft.CheckpointError):
        weft.load(net(), directory)
    with pytest.raises(weft.CheckpointError, match="saved"):
        weft.inspect(directory)


@pytest.mark.parametrize(
    ("method", "field"), [("LoRA", "r"), ("DoRA", "r"), ("VeRA", "r"), ("LoRA", "rank_pattern")]
)
def test_inspect_holds_peft_tensors_against_their_rank(method, field, tmp_path):
    directory = peft_file(tmp_path / "a", method)
    edit_config(directory, **{field: 4 if field == "r" else {"mid": 4}})
    both_refuse(directory, "expected", error=weft.CheckpointError)


def test_sizes_are_compared_before_values_are_read(tmp_path):
    """A file with holes takes no space, and reading what it claims to hold would take minutes."""
    directory, n = peft_file(tmp_path / "a"), 10**9
    key = "base_model.model.layer.lora_"
    entries = {
        key + "A.weight": {"dtype": "F32", "shape": [3, n], "data_offsets": [0, 12 * n]},
        key + "B.weight": {
            "dtype": "F32",
            "shape": [11, 3],
            "data_offsets": [12 * n, 12 * n + 132],
        },
    }
    text = json.dumps(entries).encode()
    text += b" " * (-len(text) % 8)
    with (directory / TENSORS).open("wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        file.truncate(8 + len(text) + 12 * n + 132)
    refused(net(), directory, "shape [3, 1000000000] in the file, [3, 7] expected")


@pytest.mark.parametrize("name", ["lora_A", "head"])
def test_inspect_refuses_values_that_load_refuses(name, tmp_path):
    directory = peft_file(tmp_path / "a", modules_to_save=["head"])

    def change(tensors):
        key = next(k for k in tensors if name in k)
        tensors[key] = torch.full_like(tensors[key], float("nan"))

    rewrite(directory, change)
    both_refuse(directory, "it holds NaN or infinity", error=weft.CheckpointError)


def test_a_folder_that_cannot_be_read_is_one_of_our_errors(tmp_path):
    for path in ("x" * 5000, "~nobody-of-this-name/a", "a\0b"):
        with pytest.raises(weft.CheckpointError):
            weft.inspect(path)


def test_names_of_a_file_do_not_steer_the_terminal(tmp_path, capfd):
    from weft.cli import main

    evil = "\x1b]0;t\x07\x9b2J\u202e"
    directory = ours(tmp_path / "a")

    def change(parts):
        parts["manifest"]["base"]["class"] += evil
        parts["manifest"]["adapter_config"]["base_model_name_or_path"] = evil
        parts["weft"]["config"]["targets"] = ["layer", "mid", f".*{evil}"]

    forged(directory, change)
    edit_config(directory, base_model_name_or_path=evil)
    assert main(["inspect", str(directory)]) == 0
    weft.export(directory, "lora", tmp_path / evil)
    assert main(["inspect", str(tmp_path / evil)]) == 0
    rewrite(directory, lambda t: t.update({evil: torch.ones(2)}))
    assert main(["inspect", str(directory)]) == 1
    assert not set("".join(capfd.readouterr())) & set(evil[0] + "\x07\x9b\u202e")
