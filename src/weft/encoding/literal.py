"""Where a text stands in another, as it is written: case, blanks and line ends count.

Only beside a tag may blanks differ. Templates take `<think>a</think>b` apart and print it with line
ends of their own, in training and in generation alike.
"""

from __future__ import annotations

import html
import json
import re
from collections.abc import Collection, Iterable, Sequence

Span = tuple[int, int]
Halves = tuple[str, str]
_TAG = re.compile(r"\s*(</?[\w|:.-]+>)\s*")
BLANKS = r"\s*"
_SLACK = 8  # blanks beside a tag that templates add


def halves(text: str) -> Halves:
    """Returns a text in two parts of about the same length, of which none ends within a tag."""
    middle = len(text) // 2
    inside = next((m for m in _TAG.finditer(text) if m.start(1) < middle < m.end(1)), None)
    if inside is not None:
        middle = inside.end(1) if inside.end(1) < len(text) else inside.start(1)
    return text[:middle], text[middle:]


def escaped(text: str, forms: str) -> list[Halves]:
    """Returns the halves of a text as they are, and escaped as a part of `forms` ("json html")."""
    parts = halves(text)
    found = [parts]
    if "json" in forms:
        for ascii_only in (False, True):
            first, second = (json.dumps(part, ensure_ascii=ascii_only)[1:-1] for part in parts)
            found.append((first, second))
    if "html" in forms:
        found.append((html.escape(parts[0]), html.escape(parts[1])))
    return list(dict.fromkeys(found))


def around(text: str, places: Sequence[int], forms: Iterable[Halves]) -> list[Span]:
    """Returns where in `text` one of the forms stands whole with its middle at one of the places."""
    found = set()
    for first, second in forms:
        for place in places:
            start, stop = _before(text, place, first), _after(text, place, second)
            if start is not None and stop is not None:
                found.add((start, stop))
    return sorted(found)


def own_words(text: str, forms: Iterable[Halves], taken: Collection[Span]) -> list[Span]:
    """Returns where in `text` one of the forms stands, but not as a part of a text at `taken` or of
    a longer word.
    """
    found = set()
    for first, second in forms:
        whole = _pattern(first + second).removeprefix(BLANKS).removesuffix(BLANKS)
        pattern = rf"(?<!\w){whole}(?!\w)"
        found |= {match.span() for match in re.finditer(pattern, text)}
    return sorted(
        (start, stop)
        for start, stop in found
        if not any(
            low <= start and stop <= high and stop - start < high - low for low, high in taken
        )
    )


def _after(text: str, place: int, piece: str) -> int | None:
    """Where `piece` ends if it stands at `place`."""
    if text.startswith(piece, place):
        return place + len(piece)
    match = re.compile(_pattern(piece).removesuffix(BLANKS)).match(text, place)
    return None if match is None else match.end()


def _before(text: str, place: int, piece: str) -> int | None:
    """Where `piece` begins if it ends at `place`."""
    if text.endswith(piece, 0, place):
        return place - len(piece)
    tags = len(_TAG.findall(piece))
    low = max(0, place - len(piece) - 2 * _SLACK * tags)
    pattern = _pattern(piece).removeprefix(BLANKS)
    match = re.search(rf"{pattern}\Z", text[low:place]) if tags else None
    return None if match is None else low + match.start()


def _pattern(piece: str) -> str:
    """A regular expression of a text with any blanks beside its tags."""
    parts = _TAG.split(piece)  # text, tag, text, ...
    return "".join(
        re.escape(part) if i % 2 == 0 else BLANKS + re.escape(part) + BLANKS
        for i, part in enumerate(parts)
    )
