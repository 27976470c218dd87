"""Tokens of a text in which some places must be between two tokens: where a prompt ends and its
answer begins.

In generation the prompt is tokenized alone. In training its tokens must be the same, nothing may
come between it and the answer, and all of the answer must be in the loss. Tokenizing the whole text
usually does that. If a token would reach over the border, the answer is tokenized as a continuation;
if the tokenizer has no tokens for that, the whole of that token counts as answer: the border moves.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import Any

ANCHORS = ("\n", ".", "a", "<")  # before a text, so that it is not tokenized as a beginning
Offsets = list[tuple[int, int]]


def decode(tokenizer: Any, ids: Sequence[int]) -> str:
    """Returns the text of tokens, special ones included."""
    return str(
        tokenizer.decode(list(ids), skip_special_tokens=False, clean_up_tokenization_spaces=False)
    )


def plain_ids(tokenizer: Any, text: str) -> list[int]:
    """Returns the tokens of a text, without those that a tokenizer puts around it."""
    return list(tokenizer(text, add_special_tokens=False)["input_ids"]) if text else []


def continued(tokenizer: Any, prompt: str, answer: str) -> tuple[list[int], list[int], list[str]]:
    """Returns the tokens of a prompt, as in generation, those of the answer after it, and remarks.
    Together they are the tokens of exactly this text.
    """
    alone, whole = plain_ids(tokenizer, prompt), plain_ids(tokenizer, prompt + answer)
    if whole[: len(alone)] == alone:
        return alone, whole[len(alone) :], []
    after = _continuation(tokenizer, alone, answer, decode(tokenizer, whole))
    if after is not None:
        return alone, [token for token, _ in after], []
    same = _common(whole, alone)
    return whole[:same], whole[same:], [_moved(decode(tokenizer, whole[same : same + 1]))]


def with_borders(
    tokenizer: Any, text: str, borders: Collection[int], special: Collection[int]
) -> tuple[list[int], Offsets, list[str]]:
    """Returns the tokens of a text, their places in it, and remarks. Before every border the tokens
    are those of the text up to there.

    `special`: tokens over which the tokenizer never merges. Needs a tokenizer with offsets.
    """
    ids, offsets = _encode(tokenizer, text)
    cuts = [b for b in sorted(set(borders)) if 0 < b < len(text)]
    cuts = [b for b in cuts if not _is_border(tokenizer, text, ids, offsets, b, special)]
    if not cuts:
        return ids, offsets, []
    made, places = _encode(tokenizer, text[: cuts[0]])
    for start, stop in zip(cuts, [*cuts[1:], len(text)], strict=True):
        wanted = decode(tokenizer, plain_ids(tokenizer, text[:stop]))
        after = _continuation(tokenizer, made, text[start:stop], wanted)
        if after is None:
            return ids, *_over(tokenizer, text, ids, offsets, cuts, special)
        made += [token for token, _ in after]
        places += [(start + low, start + high) for _, (low, high) in after]
    return made, places, []


def _over(
    tokenizer: Any,
    text: str,
    ids: Sequence[int],
    offsets: Offsets,
    cuts: Sequence[int],
    special: Collection[int],
) -> tuple[Offsets, list[str]]:
    """The places of the tokens, those over a border reaching beyond it, and a remark on each."""
    placed, remarks = list(offsets), []
    for cut in cuts:
        first = _same_until(tokenizer, text, ids, offsets, cut, special)[0]
        over = [t for t in range(first, len(ids)) if offsets[t][0] < cut]  # one letter, many bytes
        for token in over:
            placed[token] = (placed[token][0], max(placed[token][1], cut + 1))
        remarks.append(_moved(decode(tokenizer, [ids[token] for token in over])))
    return placed, remarks


def _is_border(
    tokenizer: Any,
    text: str,
    ids: Sequence[int],
    offsets: Offsets,
    border: int,
    special: Collection[int],
) -> bool:
    """Whether the tokens before the border are those of the text before it, alone."""
    return _same_until(tokenizer, text, ids, offsets, border, special)[1]


def _same_until(
    tokenizer: Any,
    text: str,
    ids: Sequence[int],
    offsets: Offsets,
    border: int,
    special: Collection[int],
) -> tuple[int, bool]:
    """The first token that is not one of the text before the border, alone, and whether that is
    after all of those. Tokens before a special one are not affected by what comes after it.
    """
    start = max(
        (t for t, (_, stop) in enumerate(offsets) if stop <= border and ids[t] in special),
        default=0,
    )
    alone = plain_ids(tokenizer, text[offsets[start][0] if start else 0 : border])
    same = _common(ids[start:], alone)
    return start + same, same == len(alone)


def _continuation(
    tokenizer: Any, before: Sequence[int], text: str, wanted: str
) -> list[tuple[int, tuple[int, int]]] | None:
    """The tokens of `text` with their places in it, such that they and those `before` are the text
    `wanted`; None if there are none.
    """
    for anchor in ("", *ANCHORS):
        ids, offsets = _encode(tokenizer, anchor + text)
        skip = len(plain_ids(tokenizer, anchor))
        if ids[:skip] != plain_ids(tokenizer, anchor):
            continue
        if decode(tokenizer, [*before, *ids[skip:]]) == wanted:
            places = [
                (max(0, low - len(anchor)), high - len(anchor)) for low, high in offsets[skip:]
            ]
            return list(zip(ids[skip:], places, strict=True))
    return None


def _encode(tokenizer: Any, text: str) -> tuple[list[int], Offsets]:
    if not tokenizer.is_fast:
        ids = plain_ids(tokenizer, text)
        return ids, [(0, 0)] * len(ids)
    coded = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
    return list(coded["input_ids"]), [tuple(place) for place in coded["offset_mapping"]]


def _common(first: Sequence[int], second: Sequence[int]) -> int:
    shorter = min(len(first), len(second))
    return next((i for i in range(shorter) if first[i] != second[i]), shorter)


def _moved(token: str) -> str:
    return (
        f"the border before the answer was moved: the end of the prompt and the beginning of the "
        f"answer are one token, {token!r}, and all of it is in the loss"
    )
