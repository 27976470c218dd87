"""YAML in which 1e-3 is a number (YAML 1.1 wants 1.0e-3) and a duplicate key is an error."""

from __future__ import annotations

import re
from typing import Any

_FLOAT = re.compile(
    r"[-+]?(?:\d[\d_]*\.?\d*|\.\d+)[eE][-+]?\d+|[-+]?\d[\d_]*\.\d*|[-+]?\.\d+|[-+]?\.(?:inf|Inf|INF)|"
    r"\.(?:nan|NaN|NAN)"
)


def loader() -> type[Any]:
    """Returns a subclass of yaml.SafeLoader, whose mappings raise ConstructorError if a key is
    repeated.

    Weft's core works without yaml, so it is imported here.
    """
    import yaml

    class Loader(yaml.SafeLoader):  # type: ignore[misc]
        def construct_mapping(self, node: Any, deep: bool = False) -> Any:
            seen = set()
            for key, _ in node.value:
                if key.value in seen:
                    raise yaml.constructor.ConstructorError(
                        None, None, f"{key.value!r} is given twice", key.start_mark
                    )
                seen.add(key.value)
            return super().construct_mapping(node, deep)

    Loader.yaml_implicit_resolvers = {
        first: [(tag, pattern) for tag, pattern in pairs if tag != "tag:yaml.org,2002:float"]
        for first, pairs in yaml.SafeLoader.yaml_implicit_resolvers.items()
    }
    Loader.add_implicit_resolver(
        "tag:yaml.org,2002:float", re.compile(rf"^(?:{_FLOAT.pattern})$"), list("-+0123456789.")
    )
    return Loader
