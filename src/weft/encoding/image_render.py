"""Conversations with pictures to tokens: as render.py, with each picture's tokens in its place."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import replace
from datetime import datetime
from typing import Any

from ..errors import WeftError
from ..tasks.files import Row
from .conversation import Conversation, asked, conversation, texts_of
from .image_files import ImageFile, check_image
from .processor import Processor
from .render import Renderer, Tokens
from .template import ChatTemplate


class ImageRenderer(Renderer):
    """Renders conversations with pictures. Each picture of a record is in its text once.

    The tokenizer's start (a bos token) is put before a text that does not begin with it, as the
    processors of `transformers` do. Raises WeftError, naming the record, if a picture cannot be
    read, or max_length would cut through the tokens of one.
    """

    def __init__(
        self,
        processor: Processor,
        max_length: int,
        loss_on: str = "completion",
        template: str | None = None,
        stops: Iterable[int] = (),
        now: datetime | None = None,
    ) -> None:
        super().__init__(processor.tokenizer, max_length, loss_on, template, stops, now)
        self.processor = processor
        self.template = ChatTemplate(
            processor.tokenizer, template, self.template.now, processor.placeholder
        )
        self._files: dict[str, ImageFile] = {}

    def picture_prompt(self, text: str, sizes: Sequence[tuple[int, int]]) -> str:
        """Returns a user's message with pictures of these sizes before it as text, up to where the
        answer begins.
        """
        images = [{"type": "image"}] * len(sizes)
        content: Any = [*images, {"type": "text", "text": text}] if images else text
        talk = asked([{"role": "user", "content": content}])
        self._check_reserved(talk, "the prompt")
        expansions = tuple(self.processor.expansion(size) for size in sizes)
        return self.chat_prompt_of(replace(talk, images=expansions))

    def started(self, ids: list[int]) -> list[int]:
        """Returns the tokens with the tokenizer's start before them, if they have none."""
        return ids if ids[: len(self.start)] == self.start else [*self.start, *ids]

    def _chat(self, row: Row, where: str) -> Tokens:
        files = [self._file(name, where) for name in row.get("images", ())]
        tokens = super()._chat(row, where)
        added = len(self.started(tokens.ids)) - len(tokens.ids)
        ids = self.started(tokens.ids)
        if len(ids) > self.max_length and self.processor.count(ids[self.max_length :]):
            raise WeftError(
                f"{where}: it has {len(ids)} tokens, {self.processor.count(ids)} of them of its "
                f"{len(files)} images, and data.max_length={self.max_length} would cut through an "
                f"image. Set data.max_length to {len(ids)}, or make the images smaller."
            )
        return replace(
            tokens,
            ids=ids,
            in_loss=[self.loss_on == "all"] * added + tokens.in_loss,
            ends=[None if end is None else end + added for end in tokens.ends],
            images=tuple(files),
        )

    def _conversation(self, row: Row, where: str) -> Conversation:
        talk = conversation(row, where)
        self._check_reserved(talk, where)
        files = [self._file(name, where) for name in row.get("images", ())]
        try:
            expansions = tuple(self.processor.expansion(file.size) for file in files)
        except WeftError as error:
            raise WeftError(f"{where}: {error}") from None
        return replace(talk, images=expansions)

    def _file(self, name: str, where: str) -> ImageFile:
        if name not in self._files:
            self._files[name] = check_image(name, where)
        return self._files[name]

    def _check_reserved(self, talk: Conversation, where: str) -> None:
        for number, text in texts_of(talk):
            found = next((word for word in self.processor.reserved if word in text), None)
            if found is not None:
                raise WeftError(
                    f"{where}: message {number} has the text {found!r}, with which this model marks "
                    "the place of an image. Write the image as a part of the content, {type: image}, "
                    "or change the text."
                )
