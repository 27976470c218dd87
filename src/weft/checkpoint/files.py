"""The files of a checkpoint: written under another name, flushed and renamed; found and read
strictly, and never unpickled.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import re
import secrets
import shutil
import stat
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import IO, Any, NamedTuple, TextIO

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from ..errors import CheckpointError
from ..untrusted import json_text, regular_files

TENSORS, CONFIG = "adapter_model.safetensors", "adapter_config.json"
DIFFUSERS = "pytorch_lora_weights.safetensors"  # what diffusers calls its file of LoRA
# The layout of a run of `weft train` (training/run_dir.py), as far as it is needed here: its record,
# and where its adapters are, the result first. With eval.best the result is that of the best
# evaluation; best/ and the checkpoints count only if the run has no result yet.
RUN_RECORD, RUN_ADAPTERS, RUN_CHECKPOINTS = "run.json", ("adapter", "best"), "checkpoints"
_NUMBERED = re.compile(r"checkpoint-(\d+)")
# The largest that are read; a file of a model with 50,000 adapted layers is within both.
LARGEST_CONFIG, LARGEST_HEADER = 2**24, 2**26
_HIDDEN = re.compile(r"\.weft-[0-9a-f]{8}")
# What `write` may leave there: its files, and safetensors' own while it writes.
_WITHIN = re.compile(rf"{re.escape(TENSORS)}|{re.escape(CONFIG)}|\.tmp\w+")
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
_ORDER = {dtype: position for position, dtype in enumerate(_DTYPES)}


def write(
    directory: Path,
    tensors: Mapping[str, Tensor],
    metadata: Mapping[str, str],
    config: Mapping[str, Any],
) -> None:
    """Writes both files of a checkpoint. If the process is killed, the directory has a checkpoint
    that loads.

    Both are written into a hidden folder and renamed from there. The tensors' file is complete in
    itself: its header repeats the configuration, and from its rename on the new checkpoint counts.
    Between the two renames the new configuration is still in the hidden folder, by which a reader
    tells an interrupted save (`pending`) from an edited file. Raises OSError.
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
            for path in (hidden / CONFIG, hidden / TENSORS, hidden, directory):
                flush(path)
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
        for left in leftovers(directory):  # of killed saves: a living one would hold the lock
            shutil.rmtree(left, ignore_errors=True)


def run_of(adapter: str | Path) -> Path | None:
    """Returns the directory of the run of `weft train` that an adapter is in, or None.

    Raises CheckpointError if there is no adapter.
    """
    folder = find(adapter).tensors.resolve().parent  # that of a run stands for its adapter
    return next((f for f in folder.parents[:2] if (f / RUN_RECORD).is_file()), None)


def leftovers(directory: Path) -> list[Path]:
    """Returns the hidden folders of interrupted saves: with a name and content as `write` makes
    them, and nothing that a user may have put there.
    """
    return [
        child
        for child in directory.glob(".weft-*")
        if _HIDDEN.fullmatch(child.name)
        and child.is_dir()
        and not child.is_symlink()
        and all(_WITHIN.fullmatch(each.name) for each in child.iterdir())
    ]


def pending(directory: Path, config: Mapping[str, Any]) -> bool:
    """Returns True if an interrupted save has left exactly this configuration behind."""
    for left in directory.glob(f".weft-*/{CONFIG}"):
        with contextlib.suppress(CheckpointError):
            if read_config(left) == config:
                return True
    return False


def replace(path: Path, fill: Callable[[Path], Any]) -> None:
    """Calls `fill` with a temporary path, flushes the file and renames it to `path`.

    A link stays, and the file that it leads to is replaced. Into what is no regular file (a device,
    a FIFO, the standard output) the content is written. Raises OSError.
    """
    if _is_stream(path):
        with tempfile.TemporaryDirectory() as folder:
            filled = Path(folder) / path.name
            fill(filled)
            with filled.open("rb") as source, _stream(path) as stream:
                shutil.copyfileobj(source, stream)
        return
    path = Path(os.path.realpath(path))
    temporary = path.with_name(f".{path.name}.{os.getpid()}-{secrets.token_hex(4)}.tmp")
    try:
        fill(temporary)
        if path.exists():
            shutil.copymode(path, temporary)
        flush(temporary)
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
    flush(path.parent)


def _stream(path: Path) -> IO[bytes]:
    """Opens what is no regular file. The standard output keeps its own position, since it may be a
    file into which more is printed.
    """
    own = _standard(path)
    if own is None:
        return path.open("ab")
    own.flush()
    return os.fdopen(os.dup(own.fileno()), "wb")


def _is_stream(path: Path) -> bool:
    """Returns whether a path leads to something that must not be replaced by a file."""
    try:
        mode = path.stat().st_mode
    except FileNotFoundError:
        return False
    return not stat.S_ISREG(mode) or _standard(path) is not None


def _standard(path: Path) -> TextIO | None:
    """Returns the standard stream that a path leads to, such as /dev/stdout, or None."""
    for own in (sys.stdout, sys.stderr):
        with contextlib.suppress(OSError, ValueError, AttributeError):  # closed, or not of a file
            if os.path.samestat(path.stat(), os.fstat(own.fileno())):
                return own
    return None


def read_tensors(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Returns all tensors [...], on the CPU, and the header's metadata. Raises CheckpointError."""
    try:
        _check_size(path)
        with safe_open(str(path), framework="pt", device="cpu") as file:
            _check_header(path)  # whose form the library has checked
            return {key: file.get_tensor(key) for key in file.keys()}, dict(file.metadata() or {})  # noqa: SIM118
    except (SafetensorError, OSError, ValueError, KeyError, AttributeError, RuntimeError) as error:
        raise CheckpointError(
            f"{path} is no readable safetensors file ({error}). It may have been cut off; copy or "
            "save it again."
        ) from None


def read_config(path: Path) -> dict[str, Any]:
    """Reads a JSON object. Raises CheckpointError."""
    try:
        data = json_text.loads(regular_files.read_bytes(path, LARGEST_CONFIG))
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path} is no readable JSON: {error}.") from None
    if not isinstance(data, dict):
        raise CheckpointError(
            f"{path} holds {type(data).__name__}; an adapter's configuration is an object."
        )
    return data


class FoundFiles(NamedTuple):
    """The files of a checkpoint. `config` is None if there is none; `notes` say which of several
    directories was chosen.
    """

    tensors: Path
    config: Path | None
    notes: tuple[str, ...] = ()


def find(path: str | Path) -> FoundFiles:
    """Returns the files of the checkpoint in a directory.

    If the directory is a run of `weft train`, they are those of its result, adapter/; of a run
    without a result those of best/, else of the newest checkpoint. Every reader of an adapter's
    directory calls this. Raises CheckpointError, naming the cure.
    """
    try:
        return _find(path, Path(path).expanduser())
    except (OSError, RuntimeError, ValueError) as error:  # a folder that nobody may read, ~nobody
        raise CheckpointError(f"{str(path)!r} cannot be read: {error}.") from None


def _find(path: str | Path, given: Path) -> FoundFiles:
    if not given.exists():
        raise CheckpointError(
            f"{str(path)!r} does not exist. Give the directory that weft.save, weft train or "
            "peft's save_pretrained wrote."
        )
    if not given.is_dir():
        _check_regular(given)
        if given.suffix == ".safetensors" and given.name != TENSORS:
            return FoundFiles(given, None)  # of a format that is one file
        if given.name != TENSORS:
            _refuse_pickles(given.parent, [given.name])
            raise CheckpointError(
                f"{str(path)!r} is a file. Give the directory that weft.save, weft train or peft's "
                f"save_pretrained wrote, which holds {TENSORS}."
            )
        given = given.parent
    directory, notes = _adapter_directory(given)
    tensors, config = directory / TENSORS, directory / CONFIG
    _check_regular(tensors)
    _check_regular(config)
    if tensors.is_file():
        return FoundFiles(tensors, config if config.is_file() else None, notes)
    if (directory / DIFFUSERS).is_file():
        return FoundFiles(directory / DIFFUSERS, None, notes)
    have = sorted(p.name for p in directory.iterdir())
    _refuse_pickles(directory, have)
    raise CheckpointError(f"{directory} has no {TENSORS}; it holds {have[:8] or 'nothing'}.")


def _check_regular(path: Path) -> None:
    kind = regular_files.kind_of(path)
    if kind is not None:
        raise CheckpointError(f"{path} is {kind}; put the file itself there.")


def _check_size(path: Path) -> None:
    """Refuses a header that is larger than any adapter's, before anything reads it."""
    _check_regular(path)
    with path.open("rb") as file:
        size = int.from_bytes(file.read(8), "little")
    if size > LARGEST_HEADER:
        raise ValueError(f"its header claims {size:,} bytes, at most {LARGEST_HEADER:,} are read")


def _check_header(path: Path) -> None:
    """Refuses names that are given twice, of which the library takes one."""
    with path.open("rb") as file:
        json_text.check_keys(file.read(int.from_bytes(file.read(8), "little")))


def _adapter_directory(directory: Path) -> tuple[Path, tuple[str, ...]]:
    """The directory itself, or the one of a run that has its adapter, with a note."""
    if (directory / TENSORS).is_file() or not (directory / RUN_RECORD).is_file():
        return directory, ()
    checkpoints = directory / RUN_CHECKPOINTS
    numbered = sorted(
        (int(match[1]), child)
        for child in (checkpoints.iterdir() if checkpoints.is_dir() else ())
        if (match := _NUMBERED.fullmatch(child.name))
    )
    candidates = [
        *(directory / name for name in RUN_ADAPTERS),
        *(child for _, child in reversed(numbered)),
    ]
    there = [child for child in candidates if (child / TENSORS).is_file()]
    if not there:
        raise CheckpointError(
            f"{directory} is a run of weft train that has no adapter yet: neither "
            f"{', '.join(f'{name}/' for name in RUN_ADAPTERS)} nor a checkpoint in "
            f"{RUN_CHECKPOINTS}/. Finish it with weft train --resume."
        )
    names = [child.relative_to(directory).as_posix() for child in there]
    rest = f"; it also has {', '.join(names[1:3])}" if names[1:] else ""
    return there[0], (f"this is a run of weft train, and its {names[0]} was read{rest}",)


def identity(path: Path) -> tuple[int, ...]:
    """Returns values that change if another file replaces this one; inode numbers are reused."""
    found = path.stat()
    return found.st_ino, found.st_ctime_ns, found.st_mtime_ns, found.st_size


def checksum(t: Tensor) -> str:
    """Returns 16 hex digits of SHA-256 over dtype, shape and bits of a tensor [...]."""
    t = t.detach().cpu().contiguous()
    digest = hashlib.sha256(f"{t.dtype}{tuple(t.shape)}".encode())
    digest.update(t.reshape(-1).view(torch.uint8).numpy().data if t.numel() else b"")
    return digest.hexdigest()[:16]


def file_size(tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> int:
    """Returns the size in bytes of the file that `write` makes of tensors [...], without values."""
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
    """One save into a directory at a time; the system frees the lock of a killed process."""
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
    """Forces the contents of a file, or the renames in a directory, to the disk."""
    if os.name != "posix" and path.is_dir():
        return
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
