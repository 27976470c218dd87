"""The base tensors that a configuration trains as copies."""

from __future__ import annotations

from collections.abc import Sequence

from ...errors import TargetError
from ...methods.base import Selection
from ...methods.facts import TensorFact
from .modules import base_parameters
from .names import ends_in, within
from .structure import Structure


def tensor_facts(structure: Structure) -> list[TensorFact]:
    """Returns the facts of every parameter. A tied one goes by its first name, so a head tied to
    the embedding is not a head.
    """
    blocks, norm = _blocks_before_output(structure)
    facts = []
    for name, p in structure.parameters.items():
        # Fused experts stack their bias vectors, one per row.
        vectors = p.ndim == 1 or (p.ndim == 2 and within(name, structure.experts))
        facts.append(
            TensorFact(
                name,
                tuple(p.shape),
                vectors and name.rpartition(".")[2].endswith("bias"),
                within(name, structure.head),
                next((index for block, index in blocks.items() if within(name, [block])), None),
                len(blocks),
                norm is not None and within(name, [norm]),
            )
        )
    return facts


def _blocks_before_output(structure: Structure) -> tuple[dict[str, int], str | None]:
    """The blocks before the output with their indices, and the norm behind them."""
    stack = structure.last_stack
    if stack is not None:
        blocks = {block.name: block.index for block in structure.blocks_of(stack)}
        return blocks, structure.final_norm(stack)
    children = [
        name
        for name, child in structure.root.named_children()
        if not within(name, structure.head) and next(child.parameters(), None) is not None
    ]
    return {name: index for index, name in enumerate(children)}, None


def tensors_of_modules(structure: Structure, endings: Sequence[str]) -> list[str]:
    """Returns the full names of all parameters of the modules with these endings.

    A tied tensor goes by the name that it has in that module. Raises TargetError if an ending
    matches no module, or none with a parameter.
    """
    if not endings:
        return []
    found: list[str] = []
    modules = [name for name in structure.modules if name]
    parameters = [name for name, _ in base_parameters(structure.root, repeat_tied=True)]
    for ending in endings:
        names = [n for n in modules if ends_in(n, ending)]
        tensors = [t for t in parameters if within(t, names)]
        if not tensors:
            have = sorted(
                {n.rpartition(".")[2] for n in modules if not n.rpartition(".")[2].isdigit()}
            )
            raise TargetError(
                f"modules_to_save=[{ending!r}] matches "
                f"{'no module' if not names else f'{names}, which hold no parameter'}. "
                f"The model's modules end in: {', '.join(have)}."
            )
        found.extend(tensors)
    return list(dict.fromkeys(found))


def tensors_picked(structure: Structure, config: Selection) -> list[str]:
    """Returns the full names of the tensors that a selection trains. Raises TargetError if there
    are none.
    """
    facts = tensor_facts(structure)
    names = [fact.name for fact in facts if config.picks(fact)]
    if not names and not config.modules_to_save:
        raise TargetError(
            f"{type(config).__name__} selects none of the {len(facts)} tensors of "
            f"{type(structure.root).__name__}: {config.nothing}."
        )
    return names
