"""The arguments of a decoder's forward, with virtual tokens among the real ones.

The decoder gets `inputs_embeds` with the trained vectors inserted, a wider attention mask, and
position ids that count them.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ...errors import UnsupportedError
from .forward import code_names, parameters_of
from .layout import TokenLayout


@dataclass(frozen=True, eq=False)
class DecoderInputs:
    """Rewrites the arguments of one decoder. `names` are those of its forward.

    `counts_tokens`: its default position ids count the mask's tokens (OPT). `limit`: the number of
    learned positions, or None if positions are computed (rotary, ALiBi).
    """

    base: nn.Module
    names: tuple[str, ...]
    counts_tokens: bool
    limit: int | None

    @classmethod
    def of(cls, base: nn.Module) -> DecoderInputs:
        """Reads the decoder's properties from its class and its embeddings."""
        counts = "cumsum" in code_names(type(base))
        return cls(base, parameters_of(type(base)), counts, _learned_positions(base))

    def begin(
        self,
        config: Any,
        layer: Any,
        given: dict[str, Any],
        labels: Tensor | None,
        prompt_length: int | None,
    ) -> tuple[dict[str, Any], TokenLayout]:
        """Returns the arguments for the first tokens of a sequence, and their layout.

        The layout extends input_ids or inputs_embeds [batch, tokens] by the virtual tokens. `layer`
        has the trained tensors of PreEmbed, or is None if every block replaces the states. Raises
        UnsupportedError if an argument has no meaning with virtual tokens.
        """
        if given.get("token_type_ids") is not None:
            raise UnsupportedError(
                "virtual tokens have no type in token_type_ids. Call the model without it."
            )
        mask, ids = plain_mask(given.get("attention_mask")), given.pop("input_ids", None)
        x = given["inputs_embeds"] if ids is None else self.base.get_input_embeddings()(ids)  # type: ignore[operator]
        end = prompt_end(config, x.shape[1], mask, labels, prompt_length)
        positions = given.get("position_ids")
        _check_positions(positions, mask)
        layout = TokenLayout(config.l_p, config.l_i, end, x.shape[1], x.device)
        self._check_room(layout.total)
        given.pop("cache_position", None)
        given["inputs_embeds"] = layout.extend(x, *vectors(config, layer, x))
        if mask is not None:
            given["attention_mask"] = layout.mask(mask)
        if positions is not None:
            given["position_ids"] = layout.positions(positions, mask)
        return given, layout

    def resume(self, config: Any, given: dict[str, Any], layout: TokenLayout) -> dict[str, Any]:
        """Returns the arguments for further tokens of a sequence whose cache holds the virtual
        ones. Raises UnsupportedError if these tokens may belong to the prompt.
        """
        x = tokens_of(given)
        if config.l_i and x is not None and x.shape[1] > 1:
            raise UnsupportedError(
                f"{x.shape[1]} tokens continue a cache that has virtual tokens behind the prompt, "
                "and they may belong to the prompt or to the answer. Give the prompt whole, then "
                "one token at a time (no prefill_chunk_size, no assistant)."
            )
        mask = plain_mask(given.get("attention_mask"))
        given.pop("cache_position", None)
        if mask is not None:
            given["attention_mask"] = layout.with_length(mask.shape[1]).mask(mask)
        if given.get("position_ids") is not None:
            given["position_ids"] = given["position_ids"] + layout.before + layout.after
        return given

    def shifted_positions(
        self, shifts: Sequence[int], given: Mapping[str, Any], past: int
    ) -> Tensor | None:
        """Returns position ids [1 or rows, tokens] after a prefix, or None if nothing is shifted.

        shifts: one number for the whole batch, or one per row.
        """
        x = tokens_of(given)
        if x is None or not any(shifts) or "position_ids" not in self.names:
            return None
        positions = given.get("position_ids")
        if positions is None:
            positions = self._default_positions(x, given.get("attention_mask"), past)
        self._check_room(past + x.shape[1] + max(shifts))
        if len(shifts) == 1:
            return positions + shifts[0]
        repeats = max(1, x.shape[0] // len(shifts))
        return positions + torch.tensor(shifts, device=x.device)[:, None].repeat_interleave(
            repeats, dim=0
        )

    def _check_room(self, needed: int) -> None:
        """The model's own error would not mention the virtual tokens."""
        if self.limit is not None and needed > self.limit:
            raise UnsupportedError(
                f"input and virtual tokens take {needed} positions, and the model has learned "
                f"{self.limit}. Shorten the input, take fewer virtual tokens, or positions='kept'."
            )

    def _default_positions(self, x: Tensor, mask: Any, past: int) -> Tensor:
        """The position ids that the model would take: columns, or the mask's count of tokens."""
        if isinstance(mask, Tensor) and mask.dim() == 2 and self.counts_tokens:
            return (mask.long().cumsum(dim=1) * mask.long() - 1)[:, past:]
        return torch.arange(past, past + x.shape[1], device=x.device)[None]


def prompt_end(
    config: Any, length: int, mask: Tensor | None, labels: Tensor | None, prompt_length: int | None
) -> int | Tensor:
    """Returns the column after the prompt, a number or [rows, 1]: the length of `generate`'s
    prompt, or the column of the first label, or that after the last token.

    Raises UnsupportedError if only a part of `generate`'s prompt is given.
    """
    if not config.l_i:
        return length
    if prompt_length is not None:
        if length < prompt_length:
            raise UnsupportedError(
                f"the first {length} of the prompt's {prompt_length} tokens came alone, and there "
                "are virtual tokens to put behind all of them. Leave prefill_chunk_size out."
            )
        return prompt_length
    last: int | Tensor = length
    if mask is not None:
        last = length - mask.flip(1).long().argmax(dim=1, keepdim=True)
    if labels is None or labels.dim() != 2 or labels.shape[1] != length:
        return last
    labelled = labels != -100
    first = labelled.long().argmax(dim=1, keepdim=True)
    return torch.where(labelled.any(dim=1, keepdim=True), first, last)


def vectors(config: Any, layer: Any, x: Tensor) -> tuple[Tensor, Tensor]:
    """Returns the embeddings [l_p, width] before and [l_i, width] after the prompt of x [rows,
    tokens, width]. They are zeros if the layer does not train them.
    """
    before = getattr(layer, "before", x.new_zeros(config.l_p, x.shape[2]))
    after = getattr(layer, "after", x.new_zeros(config.l_i, x.shape[2]))
    return before, after


def tokens_of(given: Mapping[str, Any]) -> Tensor | None:
    """Returns the ids [rows, tokens] or embeddings [rows, tokens, width] that a forward reads."""
    ids: Tensor | None = given.get("input_ids")
    return ids if ids is not None else given.get("inputs_embeds")


def plain_mask(mask: Any) -> Tensor | None:
    """Returns a mask [rows, tokens] or None. Raises UnsupportedError for any other mask."""
    if mask is None or (isinstance(mask, Tensor) and mask.dim() == 2):
        return mask
    raise UnsupportedError(
        "virtual tokens need the attention mask as [rows, tokens]; this one was prepared "
        "beforehand (a static cache does that: generate with the default, dynamic one)."
    )


def _check_positions(positions: Any, mask: Tensor | None) -> None:
    if not isinstance(positions, Tensor):
        return
    if positions.dim() != 2:
        raise UnsupportedError(
            "virtual tokens need position ids as [rows, tokens], and these are "
            f"{positions.dim()}-dimensional. Keys and values (weft.Prefix) go with any."
        )
    if mask is None and bool((positions.diff(dim=-1) != 1).any()):
        raise UnsupportedError(
            "the position ids start anew within a row, which packs several sequences into it; "
            "those behind the first would not see the virtual tokens. Give each sequence a row of "
            "its own."
        )


def _learned_positions(base: nn.Module) -> int | None:
    words = base.get_input_embeddings()  # type: ignore[operator]
    tables = [m for m in base.children() if isinstance(m, nn.Embedding) and m is not words]
    return min((int(m.num_embeddings) - int(getattr(m, "offset", 0)) for m in tables), default=None)
