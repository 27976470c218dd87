"""The value of a field as it is written on a command line."""

from __future__ import annotations

import ast
import re
from typing import Any

_WORDS = re.compile(r"\[\s*[A-Za-z_][\w.-]+(\s*,\s*[A-Za-z_][\w.-]+)*\s*,?\s*\]")


def value_of(text: str) -> Any:
    """Returns a Python literal, a list of bare words (`[q_proj, v_proj]`), or the text itself."""
    try:
        return ast.literal_eval(text)
    except (ValueError, SyntaxError):
        if _WORDS.fullmatch(text):
            return [word.strip() for word in text.strip("[], ").split(",")]
        return text
