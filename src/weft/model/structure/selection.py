"""The base tensors that a configuration trains as copies: the words of `train`, and
`modules_to_save`.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from difflib import get_close_matches

from ...errors import TargetError
from ...methods.config import Config
from ...methods.train_spec import WORDS, is_name, last_blocks, nearest_words
from ..base_layers import dtype_fault, has_map, holder
from ..packings import packing_of
from ..plan_entries import Frozen
from .names import called, ends_in, within
from .structure import Structure


def trained_tensors(
    structure: Structure, config: Config, adapted: Collection[str], saved: Collection[str] = ()
) -> list[str]:
    """Returns the full names of the base tensors that a configuration trains, each once, in the
    model's order: those that its method trains (`selection`) and those of `train`.

    adapted: the layers that the configuration adapts. saved: the tensors of `modules_to_save`.
    Raises TargetError if a word selects nothing, if a tensor named by its ending is tied to one
    that is not named, if the dtype of a tensor named by its ending cannot train, or if a layer is
    both adapted and trained in full.
    """
    chosen: dict[str, str] = {}
    named = set(saved)
    for word in (*config.selection, *config.train):
        found = _tensors_of(structure, config, word, adapted)
        found = _trainable(structure, config, word, found)
        if not found and (word in config.train or not saved):
            raise _nothing(structure, config, word, adapted)
        chosen |= {name: chosen.get(name, word) for name in found}
        named |= set(found) if is_name(word) else set()
    _check_tied_names(structure, config, chosen, named)
    _check_adapted(structure, config, chosen, adapted)
    return [name for name in structure.readers if name in chosen]


def tensors_of_modules(structure: Structure, endings: Sequence[str]) -> list[str]:
    """Returns the full names of all parameters of the modules with these endings.

    A tied tensor goes by the name that it has in that module. Raises TargetError if an ending
    matches no module, none with a parameter, or one whose dtype cannot train.
    """
    found: list[str] = []
    modules = [name for name in structure.modules if name]
    for ending in endings:
        names = [n for n in modules if ends_in(n, ending)]
        tensors = [t for t in structure.readers if within(t, names)]
        if not tensors:
            raise TargetError(
                f"modules_to_save=[{ending!r}] matches "
                f"{'no module' if not names else f'{names}, which hold no parameter'}. "
                f"The model's modules end in: {', '.join(_labels(modules))}."
            )
        for name in tensors:
            fault = _fault(structure, name)
            if fault is not None:
                raise TargetError(f"modules_to_save=[{ending!r}] names {name!r}: it is {fault}.")
        found.extend(tensors)
    return list(dict.fromkeys(found))


def unsupported(structure: Structure, named: Collection[str]) -> list[Frozen]:
    """Returns the tensors whose dtype cannot train, which every method leaves frozen. `named`:
    layers that the plan lists already, frozen or adapted.
    """
    return [
        Frozen(name, "tensor", tuple(p.shape), fault)
        for name, p in structure.parameters.items()
        if (fault := _fault(structure, name)) is not None
        and not (_own(name) != "bias" and _parent(name) in named)
    ]


def _fault(structure: Structure, name: str) -> str | None:
    """Why a tensor cannot train, or None. Whole numbers outside layers (a count of steps) are no
    quantised weights: `train=["all"]` keeps a copy of them.
    """
    parameter, holder = structure.readers[name], structure.root.get_submodule(_parent(name))
    packing = packing_of(holder)
    if packing is not None and not name.endswith("bias"):
        return f"packed ({packing.label(holder)}), and cannot train"
    plain = not parameter.is_floating_point() and not parameter.is_complex()
    if plain and not has_map(holder):
        return None
    return dtype_fault(parameter)


def _trainable(structure: Structure, config: Config, word: str, names: list[str]) -> list[str]:
    """The tensors whose dtype can train. Raises TargetError for one that was named."""
    found = []
    for name in names:
        fault = _fault(structure, name)
        if fault is None:
            found.append(name)
        elif is_name(word):
            raise TargetError(f"{_label(config, word)} names {name!r}: it is {fault}.")
    return found


def _tensors_of(
    structure: Structure, config: Config, word: str, adapted: Collection[str]
) -> list[str]:
    """The tensors of one word. A tied tensor goes by its first name, so a head that is tied to the
    embedding is not a head; named by its ending it goes by that name.
    """
    parameters, head = structure.parameters, structure.head
    last = last_blocks(word)
    if last is not None:
        return _last_blocks(structure, config, word, last)
    match word:
        case "all":
            return _read(structure)
        case "head":
            return [name for name in parameters if within(name, head)]
        case "biases":
            return [n for n in _read(structure) if _is_bias(structure, n) and not within(n, head)]
        case "norms":
            norms = set(structure.norms)
            return [n for n in _read(structure) if _parent(n) in norms and not within(n, head)]
        case "target-biases":
            return [n for n in structure.readers if _own(n) == "bias" and _parent(n) in adapted]
    modules = [
        name for name in structure.modules if any(ends_in(n, word) for n in called(name)) and name
    ]
    return [
        name
        for name in structure.readers
        if any(ends_in(n, word) for n in called(name)) or within(name, modules)
    ]


def _read(structure: Structure) -> list[str]:
    """The tensors on which an output may depend."""
    return [name for name in structure.parameters if structure.why_unread(name) is None]


def unread_tensors(structure: Structure, config: Config) -> list[Frozen]:
    """Returns the tensors that "all", "biases" or "norms" would train and no output depends on."""
    words = {*config.selection, *config.train} & {"all", "biases", "norms"}
    return [
        Frozen(name, "tensor", tuple(p.shape), why, unread=True)
        for name, p in structure.parameters.items()
        if (why := structure.why_unread(name)) is not None
        and (
            "all" in words
            or ("biases" in words and _is_bias(structure, name))
            or ("norms" in words and _parent(name) in structure.norms)
        )
    ]


def _is_bias(structure: Structure, name: str) -> bool:
    """A bias vector or a norm's shift; fused experts stack theirs, one per row."""
    dims = structure.parameters[name].ndim
    vector = dims == 1 or (dims == 2 and within(name, structure.experts))
    return vector and _own(name).endswith("bias")


def _last_blocks(structure: Structure, config: Config, word: str, count: int) -> list[str]:
    """The tensors of the last blocks before the output, and of the norm after them. A model without
    blocks counts its own children that hold parameters, except the head.
    """
    stack = structure.last_stack
    if stack is not None:
        blocks = [block.name for block in structure.blocks_of(stack)]
        norm = structure.final_norm(stack)
    else:
        blocks = [
            name
            for name, child in structure.root.named_children()
            if not within(name, structure.head) and next(child.parameters(), None) is not None
        ]
        norm = None
    if blocks and count > len(blocks):
        named, every = _label(config, word), "train=['all']"
        if word not in config.train:
            named, every = f"{named}(k={count})", "weft.Full()"
        raise TargetError(f"{named}: the model has {len(blocks)} blocks. Take fewer, or {every}.")
    chosen = [*blocks[len(blocks) - count :], *([] if norm is None else [norm])]
    return [name for name in structure.parameters if within(name, chosen)] if blocks else []


def _check_tied_names(
    structure: Structure, config: Config, chosen: dict[str, str], named: Collection[str]
) -> None:
    """Training one reader of a tied tensor trains the others; if it was named, they must be too."""
    names: dict[int, list[str]] = {}
    for name, parameter in structure.readers.items():
        names.setdefault(id(parameter), []).append(name)
    for name, word in chosen.items():
        if not is_name(word):
            continue
        for other in names[id(structure.readers[name])]:
            if other not in named and other not in chosen:
                raise TargetError(
                    f"{_label(config, word)}: {name!r} is tied to {other!r}, so training one "
                    f"trains both. Name both, or give one its own copy first: model.{name} = "
                    f"torch.nn.Parameter(model.{name}.detach().clone()) and "
                    "config.tie_word_embeddings = False."
                )


def _check_adapted(
    structure: Structure, config: Config, chosen: dict[str, str], adapted: Collection[str]
) -> None:
    """An adapted layer may train its bias, and a norm its gain, but no weight matrix."""
    words = {id(structure.readers[name]): word for name, word in chosen.items()}
    for name in adapted:
        module, tensor = holder(structure.carriers[name], name)
        word = words.get(id(module._parameters.get(tensor)))
        if word is not None and (
            name not in structure.modules or has_map(structure.carriers[name])
        ):
            raise TargetError(
                f"{name!r} is named by targets and by {_label(config, word)}: a layer is adapted "
                "or trained in full. Take it out of one of the two."
            )


def _nothing(
    structure: Structure, config: Config, word: str, adapted: Collection[str]
) -> TargetError:
    """The error for a word that selects no tensor, with the cure."""
    reasons = {
        "all": "it holds no parameter",
        "biases": "it has no bias vectors",
        "norms": "it has no layer norm or RMS norm with a gain outside its head",
        "head": "no output head of its own was found (a head tied to the embedding is not one)",
        "target-biases": f"none of the {len(adapted)} adapted layers has a bias",
    }
    reason = reasons.get(word)
    frozen = _tensors_of(structure, config, word, adapted)
    if frozen:
        reason = f"{frozen[0]!r} is {_fault(structure, frozen[0])}"
    elif last_blocks(word) is not None:
        reason = "it has neither repeated blocks nor children with parameters beside its head"
    if reason is None:
        have = _labels([*structure.modules, *structure.readers])
        near = [*nearest_words(word), *get_close_matches(word.rpartition(".")[2], have, n=3)]
        reason = (
            f"{word!r} is the ending of no module or tensor with a parameter. Nearest: "
            f"{list(dict.fromkeys(near)) or [*WORDS, *have[:8]]}"
        )
    cure = f" Take {word!r} out of train." if word in config.train and word in WORDS else ""
    return TargetError(
        f"{_label(config, word)} selects none of the {len(structure.parameters)} tensors of "
        f"{type(structure.root).__name__}: {reason}.{cure}"
    )


def _label(config: Config, word: str) -> str:
    """The part of a configuration that a word comes from, for messages."""
    method = type(config).__name__
    return f"{method}(train=[{word!r}])" if word in config.train else method


def _labels(names: Sequence[str]) -> list[str]:
    """The last parts of names, without numbers."""
    labels = {name.rpartition(".")[2] for name in names if name}
    return sorted(label for label in labels if not label.isdigit())


def _own(tensor: str) -> str:
    """A tensor's name within its module."""
    return tensor.rpartition(".")[2]


def _parent(tensor: str) -> str:
    return tensor.rpartition(".")[0]
