"""Files of a checkpoint: written under a temporary name, flushed, renamed; read with every byte accounted for."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from ..errors import CheckpointError

TENSORS, CONFIG = "adapter_model.safetensors", "adapter_config.json"

# The order in which safetensors lays out dtypes (by alignment, widest first), and the names it gives them.
_DTYPES = {torch.int64: "I64", torch.float64: "F64", torch.float32: "F32", torch.int32: "I32", torch.bfloat16: "BF16",
           torch.float16: "F16", torch.int16: "I16", torch.int8: "I8", torch.uint8: "U8", torch.bool: "BOOL"}


def write(directory: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str], config: Mapping[str, Any]) -> None:
    """Both files of a checkpoint. Killed at any point, the directory holds a checkpoint that loads.

    The tensors' file is complete in itself: its header repeats the configuration. Its rename is the moment at which
    the new checkpoint counts. The configuration is on the disk under its temporary name before that, so a reader that
    finds header and configuration at odds can tell an interrupted save (`pending` finds it) from an edited file.
    """
    directory.mkdir(parents=True, exist_ok=True)
    plain = {key: t.detach().cpu().contiguous().clone() for key, t in tensors.items()}
    waiting = _temporary(directory / CONFIG)
    text = json.dumps(config, indent=2, sort_keys=True) + "\n"
    with waiting.open("w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    replace(directory / TENSORS, lambda path: save_file(plain, str(path), metadata=dict(metadata)))
    os.replace(waiting, directory / CONFIG)
    _flush(directory)
    _sweep(directory)


def pending(directory: Path, config: Mapping[str, Any]) -> bool:
    """An interrupted save has left exactly this configuration under its temporary name."""
    for left in directory.glob(f".{CONFIG}.*.tmp"):
        with contextlib.suppress(CheckpointError):
            if read_config(left) == config:
                return True
    return False


def replace(path: Path, fill: Callable[[Path], Any]) -> None:
    """Let `fill` write a temporary file beside `path`, flush it to the disk, and rename it over `path`."""
    temporary = _temporary(path)
    try:
        fill(temporary)
        temporary.chmod(0o666 & ~_umask())
        with temporary.open("rb+") as file:
            os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
    _flush(path.parent)


def read_tensors(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """All tensors, on the CPU, and the header's metadata. Raises CheckpointError."""
    try:
        with safe_open(str(path), framework="pt", device="cpu") as file:
            return {key: file.get_tensor(key) for key in file.keys()}, dict(file.metadata() or {})  # noqa: SIM118
    except (SafetensorError, OSError, ValueError) as error:
        raise CheckpointError(f"{path} is no readable safetensors file ({error}). It may have been cut off; copy or save "
                              "it again.") from None


def read_config(path: Path) -> dict[str, Any]:
    """A JSON object. Raises CheckpointError."""
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path} is no readable JSON: {error}.") from None
    if not isinstance(data, dict):
        raise CheckpointError(f"{path} holds {type(data).__name__}; an adapter's configuration is an object.")
    return data


def find(path: str | Path) -> tuple[Path, Path | None]:
    """The tensors' file and the configuration of a checkpoint directory. Raises CheckpointError, naming the cure."""
    directory = Path(path).expanduser()
    if not directory.exists():
        raise CheckpointError(f"{str(path)!r} does not exist. Give the directory that weft.save or peft's "
                              "save_pretrained wrote.")
    if directory.is_file():
        directory = directory.parent
    tensors, config = directory / TENSORS, directory / CONFIG
    if tensors.is_file():
        return tensors, config if config.is_file() else None
    have = sorted(p.name for p in directory.iterdir())
    pickled = [name for name in have if name.endswith((".bin", ".pt", ".pth", ".ckpt"))]
    if pickled:
        raise CheckpointError(f"{directory} holds {pickled[0]}, a pickle, which can run any code and is never opened. "
                              "Convert it where you trust it: load it in peft and save_pretrained(safe_serialization="
                              f"True), which writes {TENSORS}.")
    raise CheckpointError(f"{directory} has no {TENSORS}; it holds {have[:8] or 'nothing'}.")


def checksum(t: Tensor) -> str:
    """16 hex digits of SHA-256 over dtype, shape and bits."""
    held = t.detach().cpu().contiguous()
    digest = hashlib.sha256(f"{held.dtype}{tuple(held.shape)}".encode())
    digest.update(held.reshape(-1).view(torch.uint8).numpy().tobytes() if held.numel() else b"")
    return digest.hexdigest()[:16]


def file_size(tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> int:
    """Bytes of the safetensors file that `write` makes of these, without making it (and without values)."""
    order = list(_DTYPES)
    entries: dict[str, Any] = {"__metadata__": dict(metadata)}
    offset = 0
    for key, t in sorted(tensors.items(), key=lambda item: (order.index(item[1].dtype), item[0])):
        end = offset + t.numel() * t.element_size()
        entries[key] = {"dtype": _DTYPES[t.dtype], "shape": list(t.shape), "data_offsets": [offset, end]}
        offset = end
    header = len(json.dumps(entries, separators=(",", ":"), ensure_ascii=False).encode())
    return 8 + -(-header // 8) * 8 + offset


def _temporary(path: Path) -> Path:
    return path.with_name(f".{path.name}.{os.getpid()}.tmp")


def _flush(directory: Path) -> None:
    """A rename is on the disk only when its directory is."""
    if os.name != "posix":
        return
    handle = os.open(directory, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _sweep(directory: Path) -> None:
    """Remove what killed saves have left; those of living processes stay."""
    for left in [*directory.glob(f".{TENSORS}.*.tmp"), *directory.glob(f".{CONFIG}.*.tmp")]:
        with contextlib.suppress(OSError):
            if not _alive(left.suffixes[-2]):
                left.unlink()


def _alive(suffix: str) -> bool:
    try:
        os.kill(int(suffix.lstrip(".")), 0)
    except (ValueError, ProcessLookupError):
        return False
    except OSError:
        return True
    return True


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask
