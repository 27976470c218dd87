"""Text from files and servers on its way to a terminal, which would obey its control characters."""

from __future__ import annotations

import unicodedata

WIDTH = 80  # columns of what is printed
# Controls, marks that reorder text, halves of surrogate pairs, line and paragraph separators.
_HIDDEN = ("Cc", "Cf", "Cs", "Zl", "Zp")
_KEPT = "\n\t\u200c\u200d"  # the last two join letters of many scripts and emoji


def printable(text: str) -> str:
    """Returns the text with every control character written as an escape, as in repr; line ends and
    tabs stay.
    """
    if text.isascii() and text.replace("\n", "").replace("\t", "").isprintable():
        return text
    return "".join(_escaped(c) for c in text)


def one_line(text: str, most: int) -> str:
    """Returns the text on one line of at most `most` characters, without control characters."""
    return " ".join(printable(" ".join(text.split())).split())[:most]


def _escaped(c: str) -> str:
    if c in _KEPT or unicodedata.category(c) not in _HIDDEN:
        return c
    return c.encode("unicode_escape").decode("ascii")
