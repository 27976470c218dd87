"""The API reference: what mkdocstrings is told about Weft beyond the docstrings.

mkdocs.yml names this file as an extension of griffe, which reads the sources without importing
them, so that `make docs` needs neither torch nor Weft.

* A method's configuration is documented by its module, where the equation is: the module's
  docstring comes before the class's own, and a table of the fields after it. Of several methods in
  one module the first has the module's docstring.
* `weft.save` is a function of a module of the same name, which griffe finds first; it is pointed
  to the function.
* `weft.training` imports its public names when they are asked for; they are made visible here.
"""

from __future__ import annotations

import ast
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import griffe

sys.path.insert(0, str(Path(__file__).resolve().parent))

from docs_fields import meaning, order

SEE = "See the module's equation."


class Reference(griffe.Extension):
    """Changes the docstrings after the sources have been read."""

    def on_object(self, *, obj: griffe.Object, **kwargs: Any) -> None:
        if obj.docstring is not None:
            obj.docstring.value = escaped(obj.docstring.value)

    def on_package(self, *, pkg: griffe.Module, **kwargs: Any) -> None:
        if pkg.name != "weft":
            return
        for name in map(str, pkg.exports or ()):
            member = pkg[name]
            if member.is_module and name in member.members:
                pkg.set_member(
                    name, griffe.Alias(name, f"{member.canonical_path}.{name}", parent=pkg)
                )
        first: dict[str, griffe.Class] = {}  # of each module, which has the module's text
        for cls in sorted(configurations(pkg), key=lambda cls: cls.lineno or 0):
            text = "" if cls.docstring is None else cls.docstring.value.replace(SEE, "").strip()
            one = first.setdefault(cls.module.path, cls)
            about = cls.module.docstring.value if cls.module.docstring else ""
            if one is not cls:
                about = f"The equation is with [`{one.name}`](#weft.{one.name})."
            parts = [about, text, table(cls)]
            cls.docstring = griffe.Docstring("\n\n".join(filter(None, parts)), parent=cls)
        for cls in configurations(pkg):  # what remains is for who writes methods
            cls.members.clear()
        for name, target in lazy(pkg["training"]).items():
            pkg["training"].set_member(name, griffe.Alias(name, target, parent=pkg["training"]))


def escaped(text: str) -> str:
    """`text` with placeholders as in <module>.<tensor>, which Markdown would take for HTML, made
    visible. Code is left alone.
    """
    lines = []
    for line in text.splitlines():
        parts = re.split(r"(`[^`]*`)", line)
        plain = [re.sub(r"<(?=\w)", "&lt;", part) for part in parts[::2]]
        parts[::2] = parts[::2] if line.startswith("    ") else plain
        lines.append("".join(parts))
    return "\n".join(lines)


def configurations(pkg: griffe.Module) -> Iterator[griffe.Class]:
    """The methods: the classes in `weft.methods` that `weft` exports."""
    for name in pkg.exports or ():
        member = pkg[str(name)]
        target = member.final_target if member.is_alias else member
        if target.is_class and target.canonical_path.startswith("weft.methods."):
            yield target


def table(cls: griffe.Class) -> str:
    """The fields of a dataclass, bases first, as a Markdown table."""
    rows: dict[str, griffe.Attribute] = {}
    for base in filter(dataclass, [*reversed(cls.mro()), cls]):
        rows |= {name: member for name, member in base.members.items() if field(member)}
    lines = ["| field | default | meaning |", "| --- | --- | --- |"]
    for name in sorted(rows, key=order):
        attribute = rows[name]
        text = attribute.docstring.value if attribute.docstring else None
        told = meaning(cls.name, name, text).replace("|", "\\|").replace(".md#", ".html#")
        default = f"`{attribute.value}`" if attribute.value is not None else ""
        lines.append(f"| `{name}` | {default} | {told} |")
    return "\n".join(lines)


def dataclass(cls: griffe.Class) -> bool:
    """Whether a class is a dataclass: annotations of other bases are no fields."""
    return any("dataclass" in str(decorator.value) for decorator in cls.decorators)


def field(member: Any) -> bool:
    """Whether a member of the class is a field of the dataclass that the user sets."""
    if not member.is_attribute:
        return False
    annotation = str(member.annotation or "ClassVar")
    own = "instance-attribute" in member.labels
    return own and not annotation.startswith("ClassVar") and not member.name.startswith("_")


def lazy(module: griffe.Module) -> dict[str, str]:
    """The names that a module's `__getattr__` imports, from its table `_PUBLIC` -> full path."""
    places = ast.literal_eval(str(module["_PUBLIC"].value))
    return {name: f"{module.path}.{place}.{name}" for name, place in places.items()}
