"""Base tensors that an adapter trains as copies: which, and where the model reads them."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import Any

from torch import nn

from ..errors import TargetError
from ..methods.facts import TensorFact
from .adapter import Selected
from .roles import blocks, final_norm, last_stack
from .structure import base_modules, base_parameters, expert_modules, head_modules, within


def tensor_facts(root: nn.Module) -> list[TensorFact]:
    """Every parameter once; one that is tied goes by its first name, so a head tied to the
    embedding is no head.
    """
    heads, experts = head_modules(root), list(expert_modules(root))
    places, norm = _places(root, heads)
    facts = []
    for name, p in base_parameters(root):
        # Fused experts stack their bias vectors, one a row.
        vectors = p.ndim == 1 or (p.ndim == 2 and within(name, experts))
        is_bias = vectors and name.rpartition(".")[2].endswith("bias")
        block = next((index for place, index in places.items() if within(name, [place])), None)
        facts.append(
            TensorFact(
                name,
                tuple(p.shape),
                is_bias,
                within(name, heads),
                block,
                len(places),
                norm is not None and within(name, [norm]),
            )
        )
    return facts


def _places(root: nn.Module, heads: list[str]) -> tuple[dict[str, int], str | None]:
    """The blocks before the output by name, and the norm behind them."""
    stack = last_stack(root)
    if stack is not None:
        return {
            block.name: block.index for block in blocks(root) if block.stack == stack
        }, final_norm(root, stack)
    children = [
        name
        for name, child in root.named_children()
        if not within(name, heads) and next(child.parameters(), None) is not None
    ]
    return {name: index for index, name in enumerate(children)}, None


def tensors_of_modules(root: nn.Module, endings: Sequence[str]) -> list[str]:
    """Full names of all parameters of the modules that end in these; every ending must match.

    A tied tensor goes by the name that it has in the module asked for.
    """
    found: list[str] = []
    modules = [name for name, _ in base_modules(root) if name]
    parameters = [name for name, _ in base_parameters(root, repeat_tied=True)]
    for ending in endings:
        names = [n for n in modules if n == ending or n.endswith("." + ending)]
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


def tensors_picked(root: nn.Module, config: Any) -> list[str]:
    """Full names of the tensors that a selection trains; TargetError where there are none."""
    facts = tensor_facts(root)
    names = [fact.name for fact in facts if config.picks(fact)]
    if not names and not config.modules_to_save:
        raise TargetError(
            f"{type(config).__name__} selects none of the {len(facts)} tensors of "
            f"{type(root).__name__}: "
            f"{config.nothing}."
        )
    return names


def select(
    root: nn.Module, names: Sequence[str], modules_to_save: Sequence[str]
) -> dict[str, Selected]:
    """A trained copy of each named base tensor, and every place where the model reads the
    tensor.
    """
    if not names:
        return {}
    readers: dict[int, list[tuple[str, nn.Module, str]]] = {}
    for prefix, module in root.named_modules():
        for tensor, parameter in module._parameters.items():
            if parameter is not None:
                readers.setdefault(id(parameter), []).append(
                    (f"{prefix}.{tensor}".lstrip("."), module, tensor)
                )
    saved = set(tensors_of_modules(root, modules_to_save))
    head = saved | {fact.name for fact in tensor_facts(root) if fact.in_head}
    built: dict[str, Selected] = {}
    done: set[int] = set()
    for name in names:
        parameter = root.get_parameter(name)
        if id(parameter) in done:
            continue
        done.add(id(parameter))
        places = readers[id(parameter)]
        if name in saved:
            _check_tied(name, [full for full, _, _ in places], saved)
        copy = nn.Parameter(parameter.detach().clone(), requires_grad=parameter.is_floating_point())
        built[name] = Selected(parameter, copy, [(m, t) for _, m, t in places], name in head)
    return built


def _check_tied(name: str, readers: Sequence[str], asked: Collection[str]) -> None:
    """Training one reader of a tied tensor trains the others; that must have been asked for."""
    for other in readers:
        if other not in asked:
            raise TargetError(
                f"modules_to_save: {name!r} is tied to {other!r}, so training one trains both. "
                "Name both, "
                f"or give one its own copy first: model.{name} = "
                f"torch.nn.Parameter(model.{name}.detach()"
                ".clone()) and config.tie_word_embeddings = False."
            )
