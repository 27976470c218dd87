"""Files of a checkpoint: written beside their place, flushed, renamed; read with every byte
accounted for.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import secrets
import shutil
import sys
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from ..errors import CheckpointError

TENSORS, CONFIG = "adapter_model.safetensors", "adapter_config.json"
_PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl", ".pickle")

# The order in which safetensors lays out dtypes, and the names it gives them; both decide the size
# of its header.
_DTYPES = {
    torch.uint64: "U64",
    torch.int64: "I64",
    torch.float64: "F64",
    torch.complex64: "C64",
    torch.float32: "F32",
    torch.uint32: "U32",
    torch.int32: "I32",
    torch.bfloat16: "BF16",
    torch.float16: "F16",
    torch.uint16: "U16",
    torch.int16: "I16",
    torch.float8_e5m2fnuz: "F8_E5M2FNUZ",
    torch.float8_e4m3fnuz: "F8_E4M3FNUZ",
    torch.float8_e4m3fn: "F8_E4M3",
    torch.float8_e5m2: "F8_E5M2",
    torch.int8: "I8",
    torch.uint8: "U8",
    torch.bool: "BOOL",
}
_ORDER = {dtype: place for place, dtype in enumerate(_DTYPES)}


def write(
    directory: Path,
    tensors: Mapping[str, Tensor],
    metadata: Mapping[str, str],
    config: Mapping[str, Any],
) -> None:
    """Both files of a checkpoint. Killed at any point, the directory holds a checkpoint that loads.

    Both are made in a hidden folder of their own and renamed from there. The tensors' file is
    complete in itself: its header repeats the configuration, and its rename is the moment at which
    the new checkpoint counts. Between the two renames the new configuration still lies in the
    hidden folder, which is how a reader that finds header and configuration at odds tells an
    interrupted save (`pending`) from an edited file.
    """
    plain = {key: t.detach().cpu().contiguous().clone() for key, t in tensors.items()}
    directory.mkdir(parents=True, exist_ok=True)
    with _alone(directory):
        hidden = directory / f".weft-{secrets.token_hex(4)}"
        hidden.mkdir()
        complete = False
        try:
            (hidden / CONFIG).write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
            _save_tensors(hidden / TENSORS, plain, metadata)
            shutil.copymode(
                hidden / CONFIG, hidden / TENSORS
            )  # safetensors makes files that only the owner may read
            for made in (hidden / CONFIG, hidden / TENSORS, hidden, directory):
                flush(made)
            complete = True
            os.replace(hidden / TENSORS, directory / TENSORS)
        except BaseException:
            if (
                not complete or (hidden / TENSORS).exists()
            ):  # else the rename came first, and a reader needs the folder
                shutil.rmtree(hidden, ignore_errors=True)
            raise
        os.replace(hidden / CONFIG, directory / CONFIG)
        flush(directory)
        for left in directory.glob(".weft-*"):  # of killed saves: a living one would hold the lock
            shutil.rmtree(left, ignore_errors=True)


def pending(directory: Path, config: Mapping[str, Any]) -> bool:
    """An interrupted save has left exactly this configuration behind."""
    for left in directory.glob(f".weft-*/{CONFIG}"):
        with contextlib.suppress(CheckpointError):
            if read_config(left) == config:
                return True
    return False


def replace(path: Path, fill: Callable[[Path], Any]) -> None:
    """Let `fill` write a temporary file beside `path`, flush it to the disk, and rename it over
    `path`.
    """
    temporary = path.with_name(f".{path.name}.{os.getpid()}-{secrets.token_hex(4)}.tmp")
    try:
        fill(temporary)
        flush(temporary)
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
    flush(path.parent)


def read_tensors(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """All tensors, on the CPU, and the header's metadata. Raises CheckpointError."""
    try:
        with safe_open(str(path), framework="pt", device="cpu") as file:
            return {key: file.get_tensor(key) for key in file.keys()}, dict(file.metadata() or {})  # noqa: SIM118
    except (SafetensorError, OSError, ValueError, KeyError, AttributeError, RuntimeError) as error:
        raise CheckpointError(
            f"{path} is no readable safetensors file ({error}). It may have been cut off; copy or "
            "save "
            "it again."
        ) from None


def read_config(path: Path) -> dict[str, Any]:
    """A JSON object. Raises CheckpointError."""
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise CheckpointError(f"{path} is no readable JSON: {error}.") from None
    if not isinstance(data, dict):
        raise CheckpointError(
            f"{path} holds {type(data).__name__}; an adapter's configuration is an object."
        )
    return data


def find(path: str | Path) -> tuple[Path, Path | None]:
    """The tensors' file and the configuration of a checkpoint directory. Raises CheckpointError,
    naming the cure.
    """
    directory = Path(path).expanduser()
    if not directory.exists():
        raise CheckpointError(
            f"{str(path)!r} does not exist. Give the directory that weft.save or peft's "
            "save_pretrained wrote."
        )
    if directory.is_file():
        if directory.name != TENSORS:
            _refuse_pickles(directory.parent, [directory.name])
            raise CheckpointError(
                f"{str(path)!r} is a file. Give the directory that weft.save or peft's "
                "save_pretrained "
                f"wrote, which holds {TENSORS}."
            )
        directory = directory.parent
    tensors, config = directory / TENSORS, directory / CONFIG
    if tensors.is_file():
        return tensors, config if config.is_file() else None
    have = sorted(p.name for p in directory.iterdir())
    _refuse_pickles(directory, have)
    raise CheckpointError(f"{directory} has no {TENSORS}; it holds {have[:8] or 'nothing'}.")


def identity(path: Path) -> tuple[int, ...]:
    """What changes where another file takes this one's place; the number alone is soon used
    again.
    """
    found = path.stat()
    return found.st_ino, found.st_ctime_ns, found.st_mtime_ns, found.st_size


def checksum(t: Tensor) -> str:
    """16 hex digits of SHA-256 over dtype, shape and bits."""
    held = t.detach().cpu().contiguous()
    digest = hashlib.sha256(f"{held.dtype}{tuple(held.shape)}".encode())
    digest.update(held.reshape(-1).view(torch.uint8).numpy().data if held.numel() else b"")
    return digest.hexdigest()[:16]


def file_size(tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> int:
    """Bytes of the safetensors file that `write` makes of these, without making it (and without
    values).
    """
    entries: dict[str, Any] = {"__metadata__": dict(metadata)}
    offset = 0
    for key, t in sorted(tensors.items(), key=lambda item: (_ORDER[item[1].dtype], item[0])):
        end = offset + t.numel() * t.element_size()
        entries[key] = {
            "dtype": _DTYPES[t.dtype],
            "shape": list(t.shape),
            "data_offsets": [offset, end],
        }
        offset = end
    header = len(json.dumps(entries, separators=(",", ":"), ensure_ascii=False).encode())
    return 8 + -(-header // 8) * 8 + offset


@contextlib.contextmanager
def _alone(directory: Path) -> Iterator[None]:
    """One save into a directory at a time, whoever else does; the system frees the lock of a killed
    one.
    """
    if sys.platform == "win32":
        yield
        return
    import fcntl

    handle = os.open(directory, os.O_RDONLY)
    try:
        with contextlib.suppress(OSError):  # a file system without locks
            fcntl.flock(handle, fcntl.LOCK_EX)
        yield
    finally:
        with contextlib.suppress(OSError):  # by name: a forked child may hold the handle open
            fcntl.flock(handle, fcntl.LOCK_UN)
        os.close(handle)


def _save_tensors(path: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> None:
    try:
        save_file(dict(tensors), str(path), metadata=dict(metadata))
    except SafetensorError as error:  # a full disk, for one; no OSError, although it is one
        raise OSError(str(error)) from None


def _refuse_pickles(directory: Path, names: list[str]) -> None:
    pickled = [name for name in names if name.endswith(_PICKLES)]
    if pickled:
        raise CheckpointError(
            f"{directory} holds {pickled[0]}, a pickle, which can run any code and is never "
            "opened. "
            "Convert it where you trust it: load it in peft and save_pretrained(safe_serialization="
            f"True), which writes {TENSORS}."
        )


def flush(path: Path) -> None:
    """Contents, or for a directory its renames, are on the disk."""
    if os.name != "posix" and path.is_dir():
        return
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
