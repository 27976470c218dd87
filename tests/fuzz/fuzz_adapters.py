"""Adapter files, Weft's own and peft's, damaged at random or forged with a right checksum."""

from __future__ import annotations

import base64
import hashlib
import json
import math
import os
import re
import shutil
import struct
import zlib
from functools import cache
from pathlib import Path
from random import Random
from typing import Any

import torch
from fuzz_mutations import Raw, dumps, flipped, mutated
from safetensors import safe_open
from safetensors.torch import save_file

import weft
from support import RULES, awake, inputs, net
from weft.checkpoint.files import checksum

TENSORS, CONFIG = "adapter_model.safetensors", "adapter_config.json"
PEFT = ["LoRA", "DoRA", "AdaLoRA", "VeRA"]
_HOME: list[Path] = []


class Finding(Exception):
    """An outcome that must not be."""


@cache
def original(method: str, writer: str) -> Path:
    """An adapter of `support.net`, in a folder that is never written to again."""
    folder = _HOME[0] / f"{writer}-{method}"
    targets = {"layer": {}, "mid": {"r": 2}} if method in ("LoRA", "DoRA") else ["layer", "mid"]
    kept = ["head"] if method in ("LoRA", "VeRA") else []
    a = awake(method, targets=targets, modules_to_save=kept)
    weft.save(a.model, folder, projections=method == "VeRA" and writer == "peft")
    if writer == "peft":
        tensors, _ = read(folder)
        save_file(tensors, str(folder / TENSORS), {"format": "pt"})
    return folder


@cache
def output_of(folder: Path) -> torch.Tensor:
    model = net()
    weft.load(model, folder)
    return run(model)


def read(folder: Path) -> tuple[dict[str, torch.Tensor], dict[str, str]]:
    with safe_open(str(folder / TENSORS), framework="pt") as file:
        return {key: file.get_tensor(key) for key in file.keys()}, dict(file.metadata() or {})  # noqa: SIM118


def run(model: torch.nn.Module) -> torch.Tensor:
    with torch.no_grad():
        out: torch.Tensor = model.eval()(inputs("linear"))
    return out


def case(rng: Random, folder: Path, home: Path) -> str:
    """Damages an adapter in `folder`, reads it, and says what happened. Raises Finding, or what
    Weft raised if it was no error of its own.
    """
    if not _HOME:
        _HOME.append(home)
    writer = rng.choice(["weft", "peft"])
    method = rng.choice(RULES if writer == "weft" else PEFT)
    source = original(method, writer)
    shutil.copytree(source, folder, dirs_exist_ok=True)
    kinds = [damage, damage, edit_config, edit_tensors, special]
    how = rng.choice([*kinds, forge, forge, forge] if writer == "weft" else [*kinds, edit_config])
    how(rng, folder)
    seen: list[str] = []
    for reading in (weft.inspect, lambda path: weft.load(net(), path)):
        found = _read_or_refused(reading, folder)
        seen.append("refused" if found is None else "read")
    if seen == ["read", "read"]:
        model = found.model
        if writer == "weft" and how is not forge:
            if not torch.equal(run(model), output_of(source)):
                raise Finding(
                    f"{how.__name__}: a damaged file of {method} loads as another adapter"
                )
        elif method == "LoRA":
            check_lora(folder, model, found, writer)
    elif seen == ["refused", "read"]:
        raise Finding(f"{how.__name__}: inspect refuses what load reads")
    return f"{writer} {how.__name__} {seen[1]}"


def _read_or_refused(reading: Any, folder: Path) -> Any:
    try:
        return reading(folder)
    except weft.WeftError as error:
        check_text(error)
        return None


def check_text(error: Exception) -> None:
    text = str(error)
    if not text.strip() or len(text) > 30_000:
        raise Finding(f"a message of {len(text)} characters")


def damage(rng: Random, folder: Path) -> None:
    path = folder / rng.choice([TENSORS, TENSORS, CONFIG])
    path.write_bytes(flipped(rng, path.read_bytes()))


def edit_config(rng: Random, folder: Path) -> None:
    path = folder / CONFIG
    path.write_text(dumps(mutated(rng, json.loads(path.read_text()))), encoding="utf-8")


def edit_tensors(rng: Random, folder: Path) -> None:
    """Another header of the tensors' file, or other values."""
    path = folder / TENSORS
    data = path.read_bytes()
    size = struct.unpack("<Q", data[:8])[0]
    if rng.random() < 0.5:
        text = dumps(mutated(rng, json.loads(data[8 : 8 + size]))).encode("utf-8", "replace")
        text += b" " * (-len(text) % 8)
        claimed = rng.choice([len(text)] * 6 + [0, 2**24, 2**40, 2**63])
        path.write_bytes(struct.pack("<Q", claimed) + text + data[8 + size :])
        return
    tensors, metadata = read(folder)
    _change_tensors(rng, tensors)
    save_file(tensors, str(path), metadata)


def _change_tensors(rng: Random, tensors: dict[str, torch.Tensor]) -> None:
    key = rng.choice(list(tensors))
    t = tensors[key]
    match rng.randrange(7):
        case 0:
            types = [torch.float8_e4m3fn, torch.float16, torch.float64, torch.int8, torch.bool]
            tensors[key] = t.to(rng.choice([*types, torch.complex64, torch.bfloat16]))
        case 1:
            tensors[key] = t.t().contiguous() if t.ndim == 2 else t[:-1].clone()
        case 2:
            tensors[key] = t.new_zeros(rng.choice([(), (0,), (0, 10**9), (1,) * 9]))
        case 3:
            tensors[key] = torch.full_like(t, rng.choice([float("nan"), float("inf")]))
        case 4:
            tensors[rng.choice([key + "x", "", "a" * 3000, "base_model.model.z", "\x1b[2J"])] = (
                tensors.pop(key) if rng.random() < 0.5 else t.clone()
            )
        case 5:
            del tensors[key]
        case 6:
            other = rng.choice(list(tensors))
            tensors[key], tensors[other] = tensors[other].clone(), t.clone()


def special(rng: Random, folder: Path) -> None:
    path = folder / rng.choice([TENSORS, CONFIG])
    path.unlink()
    match rng.randrange(5):
        case 0:
            os.mkfifo(path)
        case 1:
            path.symlink_to(rng.choice(["/dev/zero", "/dev/full", "nowhere", path.name]))
        case 2:
            path.mkdir()
        case 3:
            path.write_bytes(b"")
        case 4:
            with path.open("wb") as file:
                file.write(struct.pack("<Q", rng.choice([2, 2**20, 2**40])))
                file.truncate(rng.choice([9, 2**24, 3 * 2**30]))


def forge(rng: Random, folder: Path) -> None:
    """A changed header under a right checksum, as someone with bad intentions writes it."""
    tensors, head = read(folder)
    inner = json.loads(head["weft"])
    manifest = json.loads(zlib.decompress(base64.b64decode(head["weft_manifest"])))
    both = mutated(rng, {"weft": inner, "manifest": manifest})
    if rng.random() < 0.3:
        _change_tensors(rng, tensors)
        if isinstance(both, dict) and isinstance(both.get("manifest"), dict):
            both["manifest"]["keys"] = sorted(tensors)
    if not isinstance(both, dict):
        both = {"weft": both}
    packed = zlib.compress(dumps(both.get("manifest")).encode("utf-8", "surrogatepass"))
    text = {
        "weft": dumps(both.get("weft")),
        "weft_manifest": base64.b64encode(packed).decode(),
        "weft_checksums": "".join(checksum(tensors[key]) for key in sorted(tensors)),
    }
    seal = hashlib.sha256("\x1f".join(text.values()).encode()).hexdigest()[:16]
    config = both["manifest"].get("adapter_config") if isinstance(both.get("manifest"), dict) else 0
    if isinstance(config, dict) and rng.random() < 0.7:
        (folder / CONFIG).write_text(dumps(config))
    save_file(tensors, str(folder / TENSORS), {**head, **text, "weft_seal": seal})


def check_lora(folder: Path, model: torch.nn.Module, adapter: Any, writer: str) -> None:
    """The output is that of W + s B A, read from the files here once more and in another way."""
    tensors, head = read(folder)
    if writer == "weft":
        config = json.loads(head["weft"])["config"]
        manifest = json.loads(zlib.decompress(base64.b64decode(head["weft_manifest"])))
        layers = {site[0]: {**config, **site[3]} for site in manifest["sites"]}
    else:
        config = json.loads((folder / CONFIG).read_text())
        layers = {module: _peft_fields(config, module) for module in ("layer", "mid")}
    if config.get("use_dora") or config.get("method", "LoRA").lower() != "lora":
        return
    base = net()
    state = base.state_dict()
    for module, fields in layers.items():
        A, B = (_tensor_of(tensors, module, part) for part in ("lora_A", "lora_B"))
        r, alpha = fields["r"], fields["alpha"]
        alpha = r if alpha is None else alpha
        if len(A) != r or type(fields.get("rslora", False)) is not bool:
            raise Finding(f"{module!r}: rank {len(A)} in the file, r={r!r}, {fields!r}")
        s = alpha / math.sqrt(r) if fields.get("rslora") else alpha / r
        state[f"{module}.weight"] = state[f"{module}.weight"] + s * B.double() @ A.double()
    for key in state:
        if f"base_model.model.{key}" in tensors and key.startswith("head."):
            state[key] = tensors[f"base_model.model.{key}"]
    base.load_state_dict(state)
    found, wanted = run(model), run(base)
    if not bool(wanted.isfinite().all()) or float(wanted.abs().max()) > 1e20:
        return
    if not torch.allclose(found, wanted, rtol=1e-3, atol=1e-4 * float(wanted.abs().max())):
        raise Finding(f"the output is not that of the file: {float((found - wanted).abs().max())}")


def _tensor_of(tensors: dict[str, torch.Tensor], module: str, part: str) -> torch.Tensor:
    """The one tensor of a part, which may have an adapter's name or no prefix in its key."""
    found = [t for key, t in tensors.items() if re.search(rf"(^|\.){module}\.{part}(\.|$)", key)]
    if len(found) != 1:
        raise Finding(f"{len(found)} tensors for {module}.{part}")
    return found[0]


def _peft_fields(config: dict[str, Any], module: str) -> dict[str, Any]:
    fields = {"r": config.get("r", 8), "alpha": config.get("lora_alpha", 8)}
    for field, pattern in (("r", "rank_pattern"), ("alpha", "alpha_pattern")):
        for expression, value in (config.get(pattern) or {}).items():
            if re.match(rf"(.*\.)?({expression})$", module):  # short names: no case takes long
                fields[field] = value
                break
    return {**fields, "rslora": config.get("use_rslora") or False}


__all__ = ["Finding", "Raw", "case"]
