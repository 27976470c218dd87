"""YAML and plain values to a `RunConfig`, and back."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ... import methods
from ...errors import ConfigError
from ...untrusted.printable import one_line
from ...untrusted.regular_files import read_text
from .build import build
from .sections import RunConfig
from .yaml_loader import dumper, loader

LARGEST = 2**18  # bytes of a file


def read_config(path: str | Path, settings: Sequence[str] = ()) -> RunConfig:
    """Reads a YAML file and applies the overrides `settings` ("optim.lr=1e-3").

    Raises ConfigError, in one line, naming the file or the key and the nearest name: for unknown
    or duplicate keys, values of another type, and combinations that make no sense.
    """
    file = Path(path).expanduser()
    try:
        text = read_text(file, LARGEST)
    except (OSError, ValueError) as error:
        raise ConfigError(f"{str(path)!r} cannot be read: {error}") from None
    data = _parse(text, str(path))
    if not isinstance(data, dict):
        known = [f.name for f in dataclasses.fields(RunConfig)]
        raise ConfigError(f"{path}: a configuration is a mapping with the keys {', '.join(known)}.")
    for setting in settings:
        _override(data, setting)
    return from_dict(data)


def from_dict(data: Mapping[str, Any]) -> RunConfig:
    """Returns the configuration from plain values, as YAML has them. Raises ConfigError."""
    data = dict(data)
    method = data.pop("method", None)
    if not isinstance(method, Mapping) or not isinstance(method.get("name"), str):
        raise ConfigError(
            "method: write a mapping with a name, for example method: {name: LoRA, r: 8}."
        )
    fields = {k: v for k, v in method.items() if k != "name"}
    if "method" in fields:
        raise ConfigError(f"method.method={fields['method']!r} is not known. Write method.name.")
    try:
        config = methods.from_json({**fields, "method": method["name"]})
    except (TypeError, ConfigError) as error:  # TypeError: a type that a method does not expect
        raise ConfigError(f"method: {error}") from None
    return build(RunConfig, {**data, "method": config}, "")  # type: ignore[no-any-return]


def to_dict(config: RunConfig) -> dict[str, Any]:
    """Returns plain values of every field, defaults included, for `from_dict`."""
    plain: dict[str, Any] = _plain(config)
    method = methods.to_json(config.method)
    plain["method"] = {"name": method.pop("method"), **method}
    return plain


def dump(config: RunConfig) -> str:
    """Returns the resolved configuration as YAML."""
    import yaml

    text: str = yaml.dump(
        to_dict(config), Dumper=dumper(), sort_keys=False, allow_unicode=True, width=100
    )
    return text


def _plain(value: Any) -> Any:
    if (
        dataclasses.is_dataclass(value)
        and not isinstance(value, type)
        and type(value) not in methods.METHODS.values()
    ):
        return {f.name: _plain(getattr(value, f.name)) for f in dataclasses.fields(value)}
    if isinstance(value, Mapping):
        return {k: _plain(v) for k, v in value.items()}
    return list(value) if isinstance(value, tuple) else value


def _parse(text: str, where: str) -> Any:
    import yaml

    try:
        return yaml.load(text, Loader=loader())  # a subclass of SafeLoader
    except RecursionError:
        raise ConfigError(f"{where} is not readable YAML: it is nested too deeply") from None
    except (yaml.YAMLError, ValueError, LookupError, TypeError, AttributeError) as error:
        # All but the first for explicit tags that do not fit their value, such as !!int x.
        raise ConfigError(f"{where} is not readable YAML: {one_line(str(error), 500)}") from None


def _override(data: dict[str, Any], setting: str) -> None:
    key, equals, text = setting.partition("=")
    path = key.split(".")
    if not equals or not all(path):
        raise ConfigError(f"--set {setting!r}: write KEY=VALUE, for example --set optim.lr=1e-3.")
    section = data
    for name in path[:-1]:
        inner = section.setdefault(name, {})
        if inner is None:
            inner = section[name] = {}
        if not isinstance(inner, dict):
            raise ConfigError(f"--set {setting!r}: {name!r} is a value and has no keys below it.")
        section = inner
    section[path[-1]] = _parse(text, f"--set {setting!r}")
