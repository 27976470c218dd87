"""Base tensors that an adapter trains as copies: which, and where the model reads them."""

from __future__ import annotations

from collections.abc import Collection, Sequence

from torch import nn

from ..errors import TargetError
from ..methods.base import Selection
from .adapter import Selected
from .structure import base_modules, base_parameters, tensor_facts, within


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
            have = sorted({n.rpartition(".")[2] for n in modules if not n.rpartition(".")[2].isdigit()})
            raise TargetError(f"modules_to_save=[{ending!r}] matches "
                              f"{'no module' if not names else f'{names}, which hold no parameter'}. "
                              f"The model's modules end in: {', '.join(have)}.")
        found.extend(tensors)
    return list(dict.fromkeys(found))


def tensors_picked(root: nn.Module, config: Selection) -> list[str]:
    """Full names of the tensors that a selection trains; TargetError where there are none."""
    facts = tensor_facts(root)
    names = [fact.name for fact in facts if config.picks(fact)]
    if not names and not config.modules_to_save:
        raise TargetError(f"{type(config).__name__} selects none of the {len(facts)} tensors of {type(root).__name__}: "
                          f"{config.nothing}.")
    return names


def select(root: nn.Module, names: Sequence[str], modules_to_save: Sequence[str]) -> dict[str, Selected]:
    """A trained copy of each named base tensor, and every place where the model reads the tensor."""
    if not names:
        return {}
    readers: dict[int, list[tuple[str, nn.Module, str]]] = {}
    for prefix, module in root.named_modules():
        for tensor, parameter in module._parameters.items():
            if parameter is not None:
                readers.setdefault(id(parameter), []).append((f"{prefix}.{tensor}".lstrip("."), module, tensor))
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
            raise TargetError(f"modules_to_save: {name!r} is tied to {other!r}, so training one trains both. Name both, "
                              f"or give one its own copy first: model.{name} = torch.nn.Parameter(model.{name}.detach()"
                              ".clone()) and config.tie_word_embeddings = False.")
