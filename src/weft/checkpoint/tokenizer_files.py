"""The tokenizer, or the processor of a vision-language model, that an adapter was trained with, in
its directory.

`weft train` saves it beside the adapter, with the chat template of the run, as TRL does. What uses
the adapter later reads it there and not in the base's directory: the model must see the same text.
An adapter in `best/` or `checkpoints/` of a run has it in `tokenizer/` of the run.
"""

from __future__ import annotations

import shutil
from pathlib import Path

from . import files

CONFIG, TEMPLATE = "tokenizer_config.json", "chat_template.jinja"
MORE_TEMPLATES = "additional_chat_templates"  # a folder
RUN_TOKENIZER = "tokenizer"  # a folder of a run
PROCESSOR = ("processor_config.json", "preprocessor_config.json", "video_preprocessor_config.json")
NAMES = {
    CONFIG,
    TEMPLATE,
    "chat_template.json",
    "tokenizer.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "vocab.txt",
    "merges.txt",
    "tokenizer.model",
    "spiece.model",
    "sentencepiece.bpe.model",
    "sentencepiece.model",
    "source.spm",
    "target.spm",
    "tekken.json",
}


def tokenizer_folder(adapter: str | Path | None) -> Path | None:
    """Returns the folder with the tokenizer of an adapter, or None if it has none.

    Raises CheckpointError if there is no adapter.
    """
    if adapter is None:
        return None
    tensors, run = files.find(adapter).tensors, files.run_of(adapter)
    places = [tensors.parent, tensors.resolve().parent]
    places += [] if run is None else [run / RUN_TOKENIZER]
    return next((place for place in places if (place / CONFIG).is_file()), None)


def has_tokenizer(folder: Path) -> bool:
    """Returns whether a directory has files of a tokenizer."""
    return any((folder / name).is_file() for name in NAMES)


def has_processor(folder: Path) -> bool:
    """Returns whether a directory has files of a processor of images."""
    return any((folder / name).is_file() for name in PROCESSOR)


def lone_template(adapter: str | Path | None) -> str | None:
    """Returns the chat template in an adapter's directory without a tokenizer, or None."""
    if adapter is None or tokenizer_folder(adapter) is not None:
        return None
    path = files.find(adapter).tensors.parent / TEMPLATE
    return path.read_text(encoding="utf-8") if path.is_file() else None


def copy_tokenizer(adapter: str | Path, target: Path) -> bool:
    """Copies the tokenizer of an adapter into a directory. Returns whether it is a whole one, so
    that files of another tokenizer do not belong beside it.
    """
    folder = tokenizer_folder(adapter)
    source = folder or files.find(adapter).tensors.parent
    for path in sorted(source.iterdir()):
        if path.is_file() and path.name in (*NAMES, *PROCESSOR):
            shutil.copy(path, target / path.name)
    if (source / MORE_TEMPLATES).is_dir():
        shutil.copytree(source / MORE_TEMPLATES, target / MORE_TEMPLATES, dirs_exist_ok=True)
    return folder is not None
