"""The names that tools for diffusion models give to layers, and those of a model's modules.

A *component* of a pipeline (its denoiser, a text encoder) goes first: "unet.mid_block...", or,
where every dot has become an underscore, "lora_unet_mid_block_...". The model may be a component,
or contain it as a child. Names are never guessed: what fits no module, or several, is missing.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Collection, Mapping
from dataclasses import dataclass, replace
from typing import Any

from .matching import Names, match

# In names with dots, and what the flat names call them.
COMPONENTS = (
    "unet",
    "transformer",
    "transformer_2",
    "text_encoder",
    "text_encoder_2",
    "text_encoder_3",
    "prior",
    "decoder",
    "diffusion_model",
)
FLAT: Mapping[str, str] = {
    "lora_unet_": "unet",
    "lora_transformer_": "transformer",
    "lora_te_": "text_encoder",
    "lora_te1_": "text_encoder",
    "lora_te2_": "text_encoder_2",
    "lora_te3_": "text_encoder_3",
    "lora_prior_unet_": "prior",
    "lora_prior_te_": "text_encoder",
    "lycoris_": "",
}


class _Renamed(Names):
    """Names with one sentence on how they differ."""

    said = ""

    @property
    def mapped(self) -> list[str]:
        return [self.said] if self.said and any(a != b for a, b in self.found.items()) else []


@dataclass(frozen=True)
class Naming:
    """How a file names its layers. `flat`: with underscores for dots."""

    flat: bool

    def __call__(self, wanted: Collection[str], have: Collection[str]) -> Names:
        """Returns the model's name for every name of the file that means one module of `have`."""
        names = _flat(wanted, have) if self.flat else _dotted(wanted, have)
        counts = Counter(names.found.values())
        for name in [n for n, module in names.found.items() if counts[module] > 1]:
            del names.found[name]
            names.missing.append(name)
        return names

    def renamed(self, config: Any, names: Names, problems: list[str]) -> Any:
        """Returns the configuration with the model's names as targets, and adds a problem if names
        of the file have none.
        """
        if names.missing:
            problems.append(self._hint(names))
        exact = [f"({re.escape(name)})" for name in names.found.values()]
        return replace(config, targets=exact) if exact else config

    def _hint(self, names: Names) -> str:
        """What to do about names that mean no module of the model, or several."""
        several = [c for c in _components([*names.found, *names.missing]) if c]
        if len(several) > 1:
            return (
                f"the file is for {' and '.join(several)}: load it onto one module that has them under "
                "these names, or with strict=False onto one of them"
            )
        how = "with underscores for dots" if self.flat else "of the model's modules"
        return f"{len(names.missing)} names of the file, {how}, mean no module of this model, or several"


def _components(wanted: Collection[str]) -> list[str]:
    """Returns the components that names of a file begin with, "" for names without one."""
    return list(dict.fromkeys(_component(name)[0] for name in wanted))


def _component(name: str) -> tuple[str, str]:
    """The component of a name, and the rest."""
    prefix = next((p for p in FLAT if name.startswith(p)), None)
    if prefix is not None:
        return FLAT[prefix], name.removeprefix(prefix)
    first, dot, rest = name.partition(".")
    return (first, rest) if dot and first in COMPONENTS else ("", name)


def _dotted(wanted: Collection[str], have: Collection[str]) -> Names:
    names = match(wanted, have)
    if not names.missing:
        return names
    inner = {name: _component(name)[1] for name in wanted}
    again = match(list(dict.fromkeys(inner.values())), have)
    found = _Renamed()
    found.said = (
        f"{' and '.join(c for c in _components(wanted) if c)}.* in the file is * in the model"
    )
    for name in wanted:
        module = names.found.get(name) or again.found.get(inner[name])
        if module is None:
            found.missing.append(name)
        else:
            found.found[name] = module
    return found


def _flat(wanted: Collection[str], have: Collection[str]) -> Names:
    flat: dict[str, list[str]] = {}
    for module in have:
        flat.setdefault(module.replace(".", "_"), []).append(module)
    found = _Renamed()
    found.said = "the names in the file are those of the model's modules with underscores for dots"
    for name in wanted:
        component, rest = _component(name)
        inside = [m for m in flat.get(f"{component}_{rest}", ()) if m.startswith(f"{component}.")]
        modules = [*inside, *flat.get(rest, ())] if component else flat.get(rest, [])
        if len(modules) == 1:
            found.found[name] = modules[0]
        else:
            found.missing.append(name)
    return found
