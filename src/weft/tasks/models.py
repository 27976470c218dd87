"""The model of a task: embedded, from a package (`packaged`), a `transformers` directory, or a hub
name.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from difflib import get_close_matches
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ..errors import ConfigError, UnsupportedError, WeftError
from . import csv_text, images
from .base import SPLITS, Labelled, Split, Task, capped
from .packaged import PACKAGED
from .vocabulary import check_ids, max_positions, padding, use_padding

ASSETS = Path(__file__).parent / "assets"
EMBEDDED = {"digits-vit": ASSETS / "digits_vit", "shapes-vl-bart": ASSETS / "shapes_vl_bart"}
KNOWN = [*EMBEDDED, *PACKAGED]
_HUB_NAME = re.compile(r"[\w.-]+(/[\w.-]+)?")
_CLASS = {"image": "AutoModelForImageClassification", "text": "AutoModelForSequenceClassification"}


@dataclass(frozen=True)
class ModelRef:
    """`name` as given; `source` is the argument of from_pretrained; if `local`, nothing may be
    downloaded.
    """

    name: str
    source: str
    local: bool

    @property
    def embedded(self) -> bool:
        return self.name in EMBEDDED

    @property
    def options(self) -> dict[str, Any]:
        """The arguments of every from_pretrained. Code that comes with a model is never run, and
        transformers does not ask for it on the terminal.
        """
        return {"local_files_only": self.local, "trust_remote_code": False}


@dataclass
class Prepared:
    """A task encoded for a model. `missing` names tensors that the checkpoint lacks or has in
    another shape.
    """

    model: nn.Module
    splits: dict[str, Labelled]
    classes: tuple[str, ...]
    missing: list[str]
    fingerprint: str
    notes: list[str] = field(default_factory=list)
    metric: str = "accuracy"


def find_model(name: str) -> ModelRef:
    """Finds the model that `name` refers to, without loading it.

    Embedded names and packages come first, then existing directories. A name that looks like a path
    is never looked up on the network. A package with a packed file is unpacked the first time.
    Raises ConfigError if a path is no model directory or a package is not installed.
    """
    if name in EMBEDDED:
        return ModelRef(name, str(EMBEDDED[name]), True)
    if name in PACKAGED:
        return ModelRef(name, str(PACKAGED[name].directory(name)), True)
    path = Path(name).expanduser()
    if path.is_dir():
        if not (path / "config.json").is_file():
            raise ConfigError(
                f"model {name!r}: this directory has no config.json, so it is no transformers "
                "model. "
                f"It has {sorted(p.name for p in path.iterdir())[:6]}."
            )
        return ModelRef(name, str(path), True)
    looks_local = (
        name.startswith((".", "/", "~")) or name.endswith("/") or not _HUB_NAME.fullmatch(name)
    )
    if looks_local or path.exists():
        raise ConfigError(
            f"model {name!r}: "
            f"{'this is a file' if path.exists() else 'there is no such directory'}. Give a "
            f"directory with config.json and model.safetensors, a hub name such as "
            f"google/vit-base-patch16-224, or one of {KNOWN}."
        )
    near = get_close_matches(name, KNOWN, n=1, cutoff=0.7)
    if near:
        raise ConfigError(f"model {name!r} is not known. Nearest: {near}.")
    return ModelRef(name, name, False)


def prepare(task: Task, ref: ModelRef, most: dict[str, int | None]) -> Prepared:
    """Loads the model in float32 with a head for the task's classes, and encodes the splits for it.

    `most` has the largest number of examples per split. Raises WeftError with one line that names
    the failure.
    """
    notes = list(task.notes)
    with quiet(), loading(ref, _CLASS[task.family]):
        model, missing = _load_model(ref, task)
        encode = (
            _text_encoder(ref, model, notes)
            if task.family == "text"
            else _image_encoder(ref, model, notes)
        )
        fingerprint = model_fingerprint(model, missing)
    splits: dict[str, Labelled] = {}
    for name in SPLITS:
        splits[name] = encode(capped(task.splits[name], most.get(name), name, notes))
    return Prepared(model.eval(), splits, task.classes, missing, fingerprint, notes, task.metric)


def _load_model(ref: ModelRef, task: Task) -> tuple[nn.Module, list[str]]:
    import transformers

    config = transformers.AutoConfig.from_pretrained(
        ref.source, **ref.options, num_labels=len(task.classes) or 1
    )
    model, report = getattr(transformers, _CLASS[task.family]).from_pretrained(
        ref.source,
        config=config,
        dtype=torch.float32,
        use_safetensors=True,
        ignore_mismatched_sizes=True,
        output_loading_info=True,
        **ref.options,
    )
    mismatched = [key if isinstance(key, str) else key[0] for key in report["mismatched_keys"]]
    missing = sorted({*report["missing_keys"], *mismatched})
    if len(missing) > len(model.state_dict()) // 2:
        raise WeftError(
            f"{len(missing)} of the {len(model.state_dict())} tensors of {type(model).__name__} "
            "are not in "
            f"its file (the first: {missing[0]!r}); the weights are those of another architecture."
        )
    return model, missing


def causal_model(ref: ModelRef) -> tuple[Any, str]:
    """Returns a causal language model in float32 and its fingerprint. It keeps no keys and values
    in training.

    Raises WeftError if it cannot be loaded or a tensor is missing in its file.
    """
    from transformers import AutoModelForCausalLM

    with quiet(), loading(ref, AutoModelForCausalLM.__name__):
        model, report = AutoModelForCausalLM.from_pretrained(
            ref.source,
            dtype=torch.float32,
            use_safetensors=True,
            output_loading_info=True,
            **ref.options,
        )
    missing = sorted(report["missing_keys"])
    if missing:
        raise WeftError(
            f"model {ref.name!r} has no weights for {missing[0]!r} ({len(missing)} tensors in "
            "total); they would be random. Give a checkpoint of this architecture."
        )
    fingerprint = model_fingerprint(model, [])
    model.config.use_cache = False  # `generate` enables it
    return model.eval(), fingerprint


def check_generates(ref: ModelRef) -> None:
    """Checks the configuration. Raises WeftError for an image model, an encoder, or an
    encoder-decoder.
    """
    import transformers

    with quiet(), loading(ref, "a configuration"):
        config = transformers.AutoConfig.from_pretrained(ref.source, **ref.options)
    kind, masked = type(config), transformers.MODEL_FOR_MASKED_LM_MAPPING
    encoder = kind in masked and not getattr(config, "is_decoder", False)
    if (
        kind not in transformers.MODEL_FOR_CAUSAL_LM_MAPPING
        or encoder
        or getattr(config, "is_encoder_decoder", False)
    ):
        raise WeftError(
            f"model {ref.name!r} ({config.model_type}) is no causal language model, which this "
            "task needs. Give one, such as a GPT-2 or a Llama: --model DIR."
        )


def _image_encoder(ref: ModelRef, model: Any, notes: list[str]) -> Any:
    processor = image_processor(ref, model.config, notes)
    return lambda split: images.encode(split, model.config, processor)


def image_processor(ref: ModelRef, config: Any, notes: list[str]) -> Any | None:
    """Returns the model's image processor, or None with a note about what is done instead."""
    from transformers import AutoImageProcessor

    if not ref.local or (Path(ref.source) / "preprocessor_config.json").is_file():
        return AutoImageProcessor.from_pretrained(ref.source, **ref.options)
    if not ref.embedded:
        height, width = images.image_size(config)
        notes.append(
            f"{ref.name} has no preprocessor_config.json: images are resized (bilinear) to "
            f"{height} x {width} and "
            "scaled to [-1, 1]."
        )
    return None


def _text_encoder(ref: ModelRef, model: Any, notes: list[str]) -> Any:
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(ref.source, **ref.options)
    places = max_positions(model.config, model) or csv_text.MAX_TOKENS
    limit = min(csv_text.MAX_TOKENS, tokenizer.model_max_length, places)
    pad, note = padding(tokenizer, model.config)
    notes += [] if note is None else [note]
    use_padding(model.config, pad)
    notes.append(f"Texts are cut off after {limit} tokens.")

    def encoded(split: Split) -> csv_text.TextSplit:
        found = csv_text.encode_texts(split, tokenizer, limit, pad)
        rows = (row["input_ids"] for row in found.rows)
        check_ids(rows, tokenizer, model.config, f"{ref.name}, example")
        return found

    return encoded


def model_fingerprint(model: Any, missing: list[str]) -> str:
    """Returns 16 hex digits over the configuration and the names and bits of all pretrained
    tensors.
    """
    plain = {
        k: v
        for k, v in model.config.to_dict().items()
        if not k.startswith("_") and k != "transformers_version"
    }
    sha = hashlib.sha256(json.dumps(plain, sort_keys=True, default=str).encode())
    for name, tensor in sorted(model.state_dict().items()):
        if name not in missing:
            sha.update(name.encode())
            sha.update(
                tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()
            )
    return sha.hexdigest()[:16]


@contextmanager
def quiet() -> Iterator[None]:
    """Silences progress bars and the load report of transformers: `Prepared.missing` has what is
    missing.
    """
    from transformers.utils import logging

    before = logging.get_verbosity()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(before)


@contextmanager
def loading(ref: ModelRef, cls: str, what: str = "model") -> Iterator[None]:
    """Turns errors of from_pretrained into a WeftError of one line, UnsupportedError if the model
    needs code of its own. `what` the name is of is said in it. A WeftError is passed on.
    """
    try:
        yield
    except WeftError:
        raise
    except Exception as error:  # OSError, ValueError, KeyError, errors of safetensors, and more
        first = next(
            (line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__
        )
        if "trust_remote_code" in str(error):
            raise UnsupportedError(
                f"{what} {ref.name!r} needs Python code that comes with it (auto_map in its "
                "config.json), which Weft does not run. If you trust it, load it in Python with "
                "trust_remote_code=True, and call weft.attach or weft.load on the model."
            ) from error
        where = "from its directory" if ref.local else "from the hub (it is no directory here)"
        raise WeftError(
            f"{what} {ref.name!r} could not be loaded {where} as {cls}: {first}"
        ) from error
