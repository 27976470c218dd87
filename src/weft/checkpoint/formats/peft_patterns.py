"""peft's `rank_pattern` and `alpha_pattern`: expressions over the endings of names, each with a
number.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ...errors import ConfigError
from ...untrusted import patterns
from ...untrusted.json_text import shortened

MOST_EXPRESSIONS = 64  # that are no plain names, of which there may be any number


class FirstFit:
    """A field such as rank_pattern. The first expression that fits a name counts, as in peft.

    Raises ConfigError if the field is no object of expressions and numbers.
    """

    def __init__(self, config: Mapping[str, Any], field: str) -> None:
        self.field, self.values = field, config.get(field) or {}
        if not isinstance(self.values, Mapping):
            raise ConfigError(
                f"{field}={shortened(self.values)}: an object of name patterns and numbers is "
                "expected."
            )
        self.whole: dict[
            str, int
        ] = {}  # the place in the order by a name, by an ending, and the rest
        self.endings: dict[str, int] = {}
        self.rest: list[tuple[int, str]] = []
        for place, pattern in enumerate(self.values):
            self._add(place, pattern)
        if len(self.rest) > MOST_EXPRESSIONS:
            raise ConfigError(
                f"{field} has {len(self.rest)} expressions that are no plain names; at most "
                f"{MOST_EXPRESSIONS} are read."
            )
        self.in_order = list(self.values.values())

    def value(self, module: str) -> Any:
        """Returns the number for a module, or None. Raises ConfigError if there is no number, or an
        expression cannot be matched.
        """
        parts = module.split(".")
        ends = (".".join(parts[i:]) for i in range(len(parts)))
        places = [self.endings[end] for end in ends if end in self.endings]
        places += [self.whole[module]] if module in self.whole else []
        first = min(places, default=len(self.in_order))
        for place, pattern in self.rest:
            if place < first and self._fits(pattern, module):
                first = place
        if first == len(self.in_order):
            return None
        value = self.in_order[first]
        if isinstance(value, bool) or not isinstance(value, int | float):
            raise ConfigError(f"{self.field}: {shortened(value)} for {module!r} is no number.")
        return value if self.field == "rank_pattern" else float(value)

    def _add(self, place: int, pattern: str) -> None:
        bare = pattern.removeprefix("^").removesuffix("$")
        names = patterns.plain_names(bare)
        if names is None or (len(names) > 1 and bare != pattern):  # ^a|b means (^a)|b
            self.rest.append((place, pattern))
            return
        known = self.whole if pattern.startswith("^") else self.endings
        for name in names:
            known.setdefault(name, place)

    def _fits(self, pattern: str, module: str) -> bool:
        try:
            return patterns.fullmatch(rf"(.*\.)?({pattern})$", module)
        except ValueError as error:
            raise ConfigError(
                f"{self.field}: {shortened(pattern)} cannot be matched: {error}."
            ) from None


__all__ = ["FirstFit"]
