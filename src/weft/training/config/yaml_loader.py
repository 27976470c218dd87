"""YAML as people mean it: 1e-3 is a number (YAML 1.1 wants 1.0e-3), and 1:30, 010 and 2026-01-01
are text and neither 90, 8 nor a date. What has no meaning here, or would never end, is an error: a
key that is repeated or no text, numbers that no field can hold, aliases that grow, broken text.
What `dumper` writes is read back as it was, here and by YAML 1.1.
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
_MERGE = f"{_TAG}merge"
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
                _check(node, refuse)
            return node

        def flatten_mapping(self, node: Any) -> None:
            # A mapping's own keys count before merged ones, and of those the first. Some releases
            # of PyYAML compare keys by identity, and so let another one win.
            own = {key.value: (key, value) for key, value in node.value if key.tag != _MERGE}
            merged: dict[str, Any] = {}
            for value in (value for key, value in node.value if key.tag == _MERGE):
                for each in value.value if isinstance(value, yaml.SequenceNode) else (value,):
                    if not isinstance(each, yaml.MappingNode):
                        raise refuse(each, "<< merges a mapping or a list of mappings only")
                    self.flatten_mapping(each)
                    for pair in each.value:
                        merged.setdefault(pair[0].value, pair)
            node.value = list((merged | own).values())

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
    _add_numbers(Loader)
    return Loader


def dumper() -> type[Any]:
    """Returns a subclass of yaml.SafeDumper that quotes every text that the loader, or YAML 1.1,
    reads as something else.
    """
    import yaml

    class Dumper(yaml.SafeDumper):  # type: ignore[misc]
        pass

    _add_numbers(Dumper)
    return Dumper


def _add_numbers(cls: Any) -> None:
    for name, pattern in (("float", _FLOAT), ("int", _INT)):
        whole = re.compile(rf"^(?:{pattern.pattern})$")
        cls.add_implicit_resolver(_TAG + name, whole, list("-+0123456789."))


def _check(root: Any, refuse: Any) -> None:
    """Visits every node once, before anything is built: building a mapping replaces its merge keys
    (`<<`) by what they name, which its own keys may repeat.

    Raises ConstructorError for a key that is repeated or no text, for too many values (with every
    alias followed) or too deep ones, and for an alias that is within itself.
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
        _check_keys([child[0] for child in below if isinstance(child, tuple)], refuse)
        total = 1
        for child in below:
            for each in child if isinstance(child, tuple) else (child,):
                total += size(each, depth + 1)
        if total > MOST_VALUES:
            raise refuse(node, f"more than {MOST_VALUES:,} values")
        open_.discard(id(node))
        sizes[id(node)] = total
        return total

    size(root, 0)


def _check_keys(keys: list[Any], refuse: Any) -> None:
    seen = set()
    for key in keys:
        if key.tag not in (f"{_TAG}str", _MERGE) or not isinstance(key.value, str):
            raise refuse(key, "a key must be text; write it in quotes")
        if key.value in seen:
            raise refuse(key, f"{key.value!r} is given twice")
        seen.add(key.value)
