"""The layers that `within`, `layers`, `skip_layers` and `exclude` take away from those that
`targets` names.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from difflib import get_close_matches

from ...errors import TargetError
from ...methods.config import LayerConfig
from ...methods.target_spec import KEYWORDS, ROLES, is_ending
from .names import called, canonical, ends_in, matches, within
from .structure import Structure


def taken_away(
    structure: Structure, config: LayerConfig, chosen: Collection[str]
) -> dict[str, str]:
    """Returns the layers of `chosen` that the configuration leaves out, with the reason.

    Raises TargetError if a name or a number fits nothing in the model, or if no layer is left.
    """
    taken: dict[str, str] = {}
    if config.within:
        inside: set[str] = set()
        for ending in config.within:
            places = _modules(structure, ending)
            found = {name for name in chosen if within(name, places)}
            if not found:
                raise TargetError(
                    f"within: none of the {len(chosen)} layers that targets names is inside "
                    f"{ending!r} ({places[0]!r}, ...). Take it out, or name layers in it."
                )
            inside |= found
        reason = f"outside of within={list(config.within)}"
        taken |= {name: reason for name in chosen if name not in inside}
    if config.layers:
        taken |= _other_blocks(structure, config, [n for n in chosen if n not in taken])
    if config.blocks_left_out:
        taken |= _lowest_blocks(structure, config.blocks_left_out, chosen)
    for pattern in config.exclude:
        reason = f"left out by exclude=[{pattern!r}]"
        names = set(_excluded(structure, pattern))
        taken |= {name: reason for name in chosen if name in names}
    if config.exclude:
        _check_left(config, chosen, taken)
    return taken


def _other_blocks(
    structure: Structure, config: LayerConfig, chosen: Sequence[str]
) -> dict[str, str]:
    """The chosen layers in blocks with other numbers, or in no block."""
    method, wanted = type(config).__name__, list(config.layers)
    count = max((block.index + 1 for block in structure.blocks), default=0)
    if not count:
        raise TargetError(
            f"{method}(layers={wanted}): this {type(structure.root).__name__} has no repeated "
            "blocks to number. Name the layers in targets."
        )
    inside: dict[int, list[str]] = {number: [] for number in wanted}
    for block in structure.blocks:
        if block.index in inside:
            inside[block.index] += [name for name in chosen if within(name, [block.name])]
    for number, names in inside.items():
        if number >= count:
            raise TargetError(
                f"{method}(layers={wanted}): there is no block {number}; the model's blocks have "
                f"the numbers 0 to {count - 1}."
            )
        if not names:
            raise TargetError(
                f"{method}(layers={wanted}): block {number} has none of the layers that targets "
                f"names. Take {number} out, or name layers of it."
            )
    kept = {name for names in inside.values() for name in names}
    return {name: f"in none of the blocks layers={wanted}" for name in chosen if name not in kept}


def _lowest_blocks(structure: Structure, count: int, chosen: Collection[str]) -> dict[str, str]:
    """The chosen layers in the lowest blocks of every stack."""
    low = [block.name for block in structure.blocks if block.index < count]
    skipped = [name for name in chosen if within(name, low)]
    if len(skipped) == len(chosen) or not structure.blocks:
        raise TargetError(
            f"skip_layers={count} leaves nothing to adapt: the model has "
            f"{max((block.index + 1 for block in structure.blocks), default=0)} blocks. Skip fewer."
        )
    return dict.fromkeys(skipped, f"left out by skip_layers={count}")


def _excluded(structure: Structure, pattern: str) -> list[str]:
    """The layers that one pattern of `exclude` names, adaptable or not, chosen or not. Norms are
    among them, since a block's output may be one.
    """
    layers = [*structure.layers, *structure.norms]
    if pattern == "experts":
        names = [n for n in layers if within(n, structure.experts)]
    elif pattern in ROLES:
        names = [name for block in structure.blocks for name in block.of(pattern)]
    elif pattern in KEYWORDS:
        modules = _called(structure, pattern) if pattern == "conv" else []
        names = [n for n in layers if structure.is_part(n, pattern) or within(n, modules)]
    elif is_ending(pattern):
        modules = _called(structure, pattern)
        names = [name for name in [*layers, *structure.held] if within(name, modules)]
    else:
        names = [n for n in layers if any(matches("exclude", pattern, c) for c in called(n))]
    if not names:
        have = sorted({canonical(name).rpartition(".")[2] for name in structure.layers})
        near = get_close_matches(pattern.rpartition(".")[2], have, n=3) or have[:8]
        raise TargetError(
            f"exclude: {pattern!r} matches none of the model's {len(structure.layers)} layers"
            f"{'' if is_ending(pattern) else ' (as a regular expression over the whole name)'}. "
            f"Nearest endings: {near}."
        )
    return names


def _called(structure: Structure, ending: str) -> list[str]:
    return [n for n in structure.carriers if any(ends_in(c, ending) for c in called(n))]


def _modules(structure: Structure, ending: str) -> list[str]:
    """The modules of one ending of `within`, adapted layers or modules that contain some."""
    found = [n for n in structure.modules if n and any(ends_in(c, ending) for c in called(n))]
    if not found:
        labels = {canonical(name).rpartition(".")[2] for name in structure.modules}
        have = sorted(label for label in labels if label and not label.isdigit())
        near = get_close_matches(ending.rpartition(".")[2], have, n=3) or have[:8]
        raise TargetError(f"within: no module's name ends in {ending!r}. Nearest: {near}.")
    return found


def _check_left(config: LayerConfig, chosen: Collection[str], taken: Collection[str]) -> None:
    if len(taken) == len(chosen):
        raise TargetError(
            f"{type(config).__name__}(exclude={list(config.exclude)}) leaves nothing to adapt: targets "
            f"names {len(chosen)} layers, and none of them is left. Change exclude or targets."
        )
