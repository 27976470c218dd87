"""YAML as people mean it: 1e-3 is a number (YAML 1.1 wants 1.0e-3), and 1:30, 010 and 2026-01-01 are
text and neither 90, 8 nor a date. What has no meaning here, or would never end, is an error: a key
that is repeated or no text, numbers that no field can hold, aliases that grow, broken text.
"""

from __future__ import annotations

import re
from typing import Any

_FLOAT = re.compile(
    r"[-+]?(?:\d[\d_]*\.?\d*|\.\d+)[eE][-+]?\d+|[-+]?\d[\d_]*\.\d*|[-+]?\.\d+|[-+]?\.(?:inf|Inf|INF)|"
    r"\.(?:nan|NaN|NAN)"
)
_INT = re.compile(r"[-+]?(?:0b[01_]+|0x[\da-fA-F_]+|0|[1-9][\d_]*)")
_REPLACED = ("float", "int", "timestamp")  # resolvers of YAML 1.1
_TAG = "tag:yaml.org,2002:"
DEEPEST, MOST_VALUES, LONGEST_NUMBER = 32, 100_000, 40


def loader() -> type[Any]:
    """Returns a subclass of yaml.SafeLoader that raises ConstructorError for what the module's text
    refuses.

    Weft's core works without yaml, so it is imported here.
    """
    import yaml

    def refuse(node: Any, what: str) -> Any:
        return yaml.constructor.ConstructorError(None, None, what, node.start_mark)

    class Loader(yaml.SafeLoader):  # type: ignore[misc]
        def get_single_node(self) -> Any:
            node = super().get_single_node()
            if node is not None:
                _count(node, refuse)
            return node

        def construct_mapping(self, node: Any, deep: bool = False) -> Any:
            seen = set()
            for key, _ in node.value if isinstance(node, yaml.MappingNode) else ():
                if key.tag not in (f"{_TAG}str", f"{_TAG}merge"):
                    raise refuse(key, "a key must be text; write it in quotes")
                if key.value in seen:
                    raise refuse(key, f"{key.value!r} is given twice")
                seen.add(key.value)
            return super().construct_mapping(node, deep)

        def construct_scalar(self, node: Any) -> Any:
            value = super().construct_scalar(node)
            if node.tag in (f"{_TAG}int", f"{_TAG}float") and len(value) > LONGEST_NUMBER:
                raise refuse(node, f"a number of {len(value)} characters")
            if "\0" in value or any("\ud800" <= c <= "\udfff" for c in value):
                raise refuse(node, "text with a NUL or half of a surrogate pair")
            return value

    Loader.yaml_implicit_resolvers = {
        first: [(tag, pattern) for tag, pattern in pairs if tag.removeprefix(_TAG) not in _REPLACED]
        for first, pairs in yaml.SafeLoader.yaml_implicit_resolvers.items()
    }
    for name, pattern in (("float", _FLOAT), ("int", _INT)):
        Loader.add_implicit_resolver(
            _TAG + name, re.compile(rf"^(?:{pattern.pattern})$"), list("-+0123456789.")
        )
    return Loader


def _count(root: Any, refuse: Any) -> int:
    """Returns the number of values below a node with every alias followed.

    Raises ConstructorError if they are too many or too deep, or if an alias is within itself.
    """
    sizes: dict[int, int] = {}
    open_: set[int] = set()

    def size(node: Any, depth: int) -> int:
        if id(node) in sizes:
            return sizes[id(node)]
        if id(node) in open_:
            raise refuse(node, "an alias stands within what it names")
        if depth > DEEPEST:
            raise refuse(node, f"nested more than {DEEPEST} deep")
        open_.add(id(node))
        below = node.value if isinstance(node.value, list) else []
        total = 1
        for child in below:
            for each in child if isinstance(child, tuple) else (child,):
                total += size(each, depth + 1)
        if total > MOST_VALUES:
            raise refuse(node, f"more than {MOST_VALUES:,} values")
        open_.discard(id(node))
        sizes[id(node)] = total
        return total

    return size(root, 0)
