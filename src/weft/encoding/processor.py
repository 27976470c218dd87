"""The processor of a vision-language model of `transformers`: its tokenizer with the chat template,
and what it makes of pictures.

A picture is one placeholder in a text, which the processor replaces by as many tokens as the model
has features for it. How many depends on the picture's size alone, so the text is known before the
picture is opened.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..checkpoint.tokenizer_files import PROCESSOR
from ..errors import ConfigError, UnsupportedError, WeftError
from ..tasks.models import ModelRef, loading, quiet

TEXT_KEYS = ("input_ids", "attention_mask", "text_replacement_offsets")
TYPES = ("mm_token_type_ids", "token_type_ids")  # which of a row's tokens are those of images


class Processor:
    """A processor of `transformers`, loaded from `ref`.

    tokenizer: has the chat template. placeholder: stands for one picture in a rendered text.
    image_ids: the tokens of pictures. Raises UnsupportedError if the processor is of a kind whose
    texts have no placeholders.
    """

    def __init__(self, inner: Any, ref: ModelRef) -> None:
        self.inner, self.ref, self.tokenizer = inner, ref, inner.tokenizer
        placeholder = getattr(inner, "image_token", None)
        if placeholder is None or not hasattr(inner, "image_processor"):
            raise UnsupportedError(
                f"model {ref.name!r}: {self.name} has no placeholder for images in a text, so weft "
                "cannot tell where a picture is. Train it in Python with weft.attach."
            )
        self.placeholder = str(getattr(placeholder, "content", placeholder))
        if getattr(inner, "chat_template", None):
            self.tokenizer.chat_template = inner.chat_template
        self._expansions: dict[tuple[int, int], str] = {}
        self.types, self.image_ids = self._marks()

    @property
    def name(self) -> str:
        """The name of the processor's class."""
        return type(self.inner).__name__

    @property
    def reserved(self) -> tuple[str, ...]:
        """Texts that stand for pictures, which no message may contain."""
        words = self.tokenizer.convert_ids_to_tokens(sorted(self.image_ids))
        return tuple(dict.fromkeys([self.placeholder, *words]))

    def expansion(self, size: tuple[int, int]) -> str:
        """Returns what replaces the placeholder of a picture of this size (width, height)."""
        if size not in self._expansions:
            self._expansions[size] = self._expanded(size)
        return self._expansions[size]

    def images(self, pictures: Sequence[Any]) -> tuple[dict[str, Tensor], int]:
        """Returns the model's inputs for pictures, in the order of the rows that they belong to,
        and the number of tokens that the texts of these rows have for them. Raises WeftError.
        """
        if not pictures:
            return {}, 0
        out = self._call(list(pictures), return_tensors="pt")
        found = {key: value for key, value in out.items() if key not in (*TEXT_KEYS, *TYPES)}
        return found, self.count(out["input_ids"][0].tolist())

    def count(self, ids: Sequence[int]) -> int:
        """Returns how many of these tokens are those of pictures."""
        return sum(token in self.image_ids for token in ids)

    def token_types(self, ids: Tensor) -> dict[str, Tensor]:
        """Returns what the model reads beside input_ids [rows, length] to tell the tokens of
        pictures (1) from others (0), if it does.
        """
        if self.types is None:
            return {}
        known = torch.tensor(sorted(self.image_ids), device=ids.device)
        return {self.types: torch.isin(ids, known).long()}

    def use_template(self, source: str) -> None:
        """Sets another chat template, which is saved with the processor."""
        self.tokenizer.chat_template = source

    def save_pretrained(self, folder: str | Path) -> None:
        """Writes the tokenizer with its chat template, and the processor's own files as they are,
        so that parts of it that cannot be loaded here are not lost.
        """
        from transformers.utils import cached_file

        self.tokenizer.save_pretrained(folder)
        for name in PROCESSOR:
            source = cached_file(
                self.ref.source,
                name,
                local_files_only=True,
                _raise_exceptions_for_missing_entries=False,
            )
            if source is not None:
                held = json.loads(Path(source).read_text(encoding="utf-8"))
                held.pop("chat_template", None)  # the tokenizer's is that of the run
                target = Path(folder) / name
                target.write_text(json.dumps(held, indent=2) + "\n", encoding="utf-8")

    def _marks(self) -> tuple[str | None, frozenset[int]]:
        """The name of the token types that the model reads, and the ids of pictures' tokens."""
        out = self._call([_blank((32, 32))])
        ids = list(out["input_ids"][0])
        for key in TYPES:
            inside = {i for i, kind in zip(ids, out.get(key, [[]])[0], strict=False) if kind == 1}
            if inside:
                return key, frozenset(inside)
        return None, frozenset([self.tokenizer.convert_tokens_to_ids(self.placeholder)])

    def _expanded(self, size: tuple[int, int]) -> str:
        ids = list(self._call([_blank(size)], add_special_tokens=False)["input_ids"][0])
        text = str(
            self.tokenizer.decode(
                ids, skip_special_tokens=False, clean_up_tokenization_spaces=False
            )
        )
        again = self.tokenizer(text, add_special_tokens=False)["input_ids"]
        if list(again) != ids:
            raise UnsupportedError(
                f"model {self.ref.name!r}: the text of {self.name} for a picture of {size[0]} x "
                f"{size[1]} is other tokens than the processor's, so samples cannot be checked. "
                "Train it in Python with weft.attach."
            )
        return text

    def _call(self, pictures: list[Any], **options: Any) -> Any:
        """What the processor makes of one row with these pictures and no other text."""
        try:
            with quiet():
                return self.inner(
                    text=[self.placeholder * len(pictures)], images=[pictures], **options
                )
        except Exception as error:  # of sizes that a processor does not take
            first = next(iter(str(error).splitlines()), type(error).__name__)
            sizes = ", ".join(f"{p.width} x {p.height}" for p in pictures)
            raise WeftError(f"{self.name} refuses pictures of {sizes}: {first}") from error


def reads_images(config: Any) -> bool:
    """Whether a configuration is that of a vision-language model that writes text."""
    import transformers

    return type(config) in transformers.MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING


def open_processor(ref: ModelRef, config: Any, files: ModelRef | None = None) -> Processor:
    """Returns the processor of the model with this configuration, from `files` if given.

    Without torchvision a processor that also reads videos is loaded without that part. Raises
    ConfigError if the model reads no images, WeftError if its processor cannot be loaded.
    """
    if not reads_images(config):
        raise ConfigError(
            f"model {ref.name!r} ({config.model_type}) is no vision-language model of transformers "
            "(AutoModelForImageTextToText), and the data has images. Give one, such as a LLaVA, "
            "Qwen-VL or SmolVLM, or leave the images out with data.ignore."
        )
    source = files or ref
    with quiet(), loading(source, "a processor for images and text"):
        inner = _loaded(source, config)
    return Processor(inner, source)


def _loaded(ref: ModelRef, config: Any) -> Any:
    from transformers import AutoProcessor

    try:
        return AutoProcessor.from_pretrained(ref.source, **ref.options)
    except ImportError as error:
        cls = _without_videos(config)
        if cls is None or "orchvision" not in str(error):
            raise
    return cls.from_pretrained(ref.source, **ref.options)


def _without_videos(config: Any) -> Any:
    """The model's processor class as one that has no part for videos, or None if that is no part
    of it.
    """
    from transformers.models.auto.processing_auto import PROCESSOR_MAPPING

    cls = PROCESSOR_MAPPING.get(type(config), None)
    if cls is None or "video_processor" not in cls.get_attributes():
        return None

    class WithoutVideos(cls):  # type: ignore[misc, valid-type]
        def __init__(
            self,
            image_processor: Any = None,
            tokenizer: Any = None,
            chat_template: Any = None,
            **more: Any,
        ) -> None:
            super().__init__(
                image_processor=image_processor,
                tokenizer=tokenizer,
                video_processor=None,
                chat_template=chat_template,
                **more,
            )

    WithoutVideos.__name__ = cls.__name__
    return WithoutVideos


def _blank(size: tuple[int, int]) -> Any:
    from PIL import Image

    return Image.new("RGB", size)
