"""Base tensors that an adapter trains as copies."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass

from torch import nn

from ..errors import TargetError
from .structure import Structure, within
from .structure.selection import tensors_of_modules


@dataclass(eq=False)
class Selected:
    """A base tensor that an adapter trains as a copy. `holders` are all (module, name) pairs under
    which the model reads it. `head`: it counts as part of the head.
    """

    original: nn.Parameter
    trained: nn.Parameter
    holders: list[tuple[nn.Module, str]]
    head: bool

    def layers(self) -> list[nn.Module]:
        """Returns the modules that read this tensor as their weight."""
        return [module for module, name in self.holders if name == "weight"]

    def install(self, parameter: nn.Parameter) -> None:
        """Puts the original or the trained tensor into the model, in the device and dtype that the
        model has now.

        `model.to(...)` reaches only the one of the two that is installed.
        """
        for module, name in self.holders:
            live = module._parameters[name]
            if live is not None and live is not parameter and not live.is_meta:
                carrier = nn.Module()
                carrier.register_parameter("tensor", parameter)
                carrier.to(
                    live.device, live.dtype if live.is_floating_point() else None
                )  # moves the gradient too
            module._parameters[name] = parameter


def taken(root: nn.Module, selected: Iterable[Selected]) -> dict[str, tuple[nn.Module, Selected]]:
    """Returns the modules that have taken a trained copy as a tensor of their own since attach, by
    the tensor's full name.
    """
    copies = {id(s.trained): s for s in selected}
    return {
        f"{name}.{tensor}".lstrip("."): (module, found)
        for name, module in (root.named_modules() if copies else ())
        for tensor, p in module._parameters.items()
        if (found := copies.get(id(p))) is not None and (module, tensor) not in found.holders
    }


def give_back(root: nn.Module, selected: Iterable[Selected]) -> None:
    """Gives the modules that have taken a trained copy the original, as if they had taken that."""
    for name, (module, found) in taken(root, selected).items():
        module._parameters[name.rpartition(".")[2]] = found.original


def select(
    structure: Structure, names: Sequence[str], modules_to_save: Sequence[str]
) -> dict[str, Selected]:
    """Returns a trained copy of each named base tensor, by its name.

    A tensor that is tied is copied once. Raises TargetError if a tensor of `modules_to_save` is
    tied to one outside them.
    """
    if not names:
        return {}
    root = structure.root
    readers: dict[int, list[tuple[str, nn.Module, str]]] = {}
    for prefix, module in root.named_modules():
        for tensor, parameter in module._parameters.items():
            if parameter is not None:
                readers.setdefault(id(parameter), []).append(
                    (f"{prefix}.{tensor}".lstrip("."), module, tensor)
                )
    saved = set(tensors_of_modules(structure, modules_to_save))
    built: dict[str, Selected] = {}
    done: set[int] = set()
    for name in names:
        parameter = root.get_parameter(name)
        if id(parameter) in done:
            continue
        done.add(id(parameter))
        holders = readers[id(parameter)]
        if name in saved:
            _check_readers(name, [full for full, _, _ in holders], saved)
        # A tied tensor goes by its first name, so a head tied to the embedding is not a head.
        head = name in saved or within(holders[0][0], structure.head)
        copy = nn.Parameter(parameter.detach().clone(), requires_grad=parameter.is_floating_point())
        built[name] = Selected(parameter, copy, [(m, t) for _, m, t in holders], head)
    return built


def _check_readers(name: str, readers: Sequence[str], asked: Collection[str]) -> None:
    """Training one reader of a tied tensor trains the others; that must have been asked for."""
    for other in readers:
        if other not in asked:
            raise TargetError(
                f"modules_to_save: {name!r} is tied to {other!r}, so training one trains both. "
                f"Name both, or give one its own copy first: model.{name} = "
                f"torch.nn.Parameter(model.{name}.detach().clone()) and "
                "config.tie_word_embeddings = False."
            )
