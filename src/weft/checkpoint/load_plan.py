"""Matches a checkpoint with a model before anything in the model is changed."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from .. import methods
from ..errors import ConfigError, TargetError
from ..methods import stacked
from ..model import base_layers, prompts, structure
from ..model.attach import parts_of
from ..model.base_layers.experts import EXCHANGED
from ..model.offload import device_of, offloads
from ..model.state import find_state
from ..model.structure.selection import tensors_of_modules, trained_tensors
from ..model.structure.targets import is_stack
from ..model.structure.tokens import TokenTable
from . import formats, kinds, matching, tokens
from .checkpoint import Checkpoint, CheckpointLayer
from .formats.peft_experts import exchanged
from .problems import fault_of, misfit, nearest, same_values
from .projections import projections_for


class LoadPlan:
    """How a checkpoint fills a model: configurations and values by the model's names, shared
    matrices, and every problem. The base must be active (`base_only`). If `strict`, shared matrices
    are drawn only if there is no problem.

    `config` is the file's, without the entries of modules_to_save that the model does not have.
    """

    def __init__(self, root: nn.Module, checkpoint: Checkpoint, strict: bool = True) -> None:
        self.root, self.checkpoint, self.config = root, checkpoint, checkpoint.config
        self.structure = structure.Structure.of(root)
        self.problems = list(checkpoint.problems)
        self.notes = list(checkpoint.notes)
        self.modules: dict[str, Any] = {
            name: module
            for name, module in self.structure.carriers.items()
            if not matching.is_wrapper(base_layers.holder(module)[0])
        }
        self.parameters = {
            name: p
            for name, p in root.named_parameters(remove_duplicate=False)
            if _parent(name) in self.modules
        }
        tensors = [*checkpoint.selected, *checkpoint.repeated]
        wanted = [*(() if checkpoint.in_order else checkpoint.sites), *map(_parent, tensors)]
        wanted += checkpoint.tokens
        self.names = (checkpoint.naming or matching.match)(
            list(dict.fromkeys(wanted)), self.modules
        )
        if checkpoint.naming is not None:
            self.config = checkpoint.naming.renamed(self.config, self.names, self.problems)
        self.mapped = [*checkpoint.mapped, *self.names.mapped]
        self._prompt_modules: dict[str, Any] | None = None
        if checkpoint.in_order:
            self._name_in_order()
        self.nested = self._nested()
        self.configs: dict[str, Any] = {}
        self.values: dict[str, dict[str, Tensor]] = {}
        self.reached: dict[str, str] = {}  # saved training state, as text
        self.shapes: dict[str, tuple[int, ...]] = {}  # by the file's name
        self.selected: dict[str, Tensor] = {}
        self.tables: list[TokenTable] = []
        self.tokens: dict[str, Tensor] = {}  # rows of new tokens, by the table's first module
        self._check_architecture()
        for module, layer in checkpoint.sites.items():
            self._plan_layer(module, layer)
        self._plan_selected()
        tokens.plan(self)
        self._check_repeated()
        self._check_complete()
        first = next(iter(self.configs), None)
        device = torch.device("cpu")
        if first is not None:
            device = device_of(base_layers.carrier(self.modules[first]))
        # If strict, a load with problems is refused: then nothing is drawn in sizes that only the
        # file names.
        draw = not (strict and self.problems)
        self.shared = projections_for(
            checkpoint, self.shapes, device, find_state(root), self.problems, draw
        )

    # Layers

    def _plan_layer(self, module: str, layer: CheckpointLayer) -> None:
        name = self.names.found.get(module)
        if name is None:
            first = next(iter(layer.keys.values()), module)
            self.problems.append(
                f"{first!r}: the model has no module {module!r}"
                f"{nearest('in the model', module, self.modules, self.problems)}"
            )
            return
        host = self._host(module, name, layer.rule)
        if host is None:
            return
        shape = stacked.known((host.out_features, host.in_features), host.stack)
        if host.kind == EXCHANGED and self.checkpoint.writer == "peft" and len(layer.tensors) == 2:
            layer.tensors = exchanged(layer.tensors)
        fault = kinds.misfit(module, name, layer, host)
        if fault is not None:
            self.problems.append(fault)
            return
        if host.device.type == "meta" and not offloads(base_layers.carrier(self.modules[name])):
            self.problems.append(
                f"{name!r} is on the meta device and has no values; load the base model first"
            )
        self.configs[name], self.shapes[module] = layer.rule, shape
        self.values[name] = {}
        if layer.reached is not None:
            self.reached[name] = layer.reached
        for tensor, wanted in stacked.file_shapes(layer.rule, shape).items():
            if tensor not in layer.tensors:
                continue  # its absence is among the problems already
            fault = fault_of(layer.tensors[tensor], wanted)
            if fault is None:
                self.values[name][tensor] = layer.tensors[tensor]
            else:
                self.problems.append(f"{layer.keys[tensor]!r} ({tensor} of {name!r}): {fault}")

    def _name_in_order(self) -> None:
        """Names the layers of a file that names no modules: those of the model, in order."""
        form = formats.by_name(self.checkpoint.format)
        why = form.why_not_model(self.root) if form is not None else None
        if why is not None:
            self.problems.append(
                f"peft's file means something else in this {type(self.root).__name__}: {why}"
            )
        places, modules = list(self._prompt_hosts(self.config.where)), list(self.checkpoint.sites)
        if len(places) != len(modules):
            self.problems.append(f"the file has {len(modules)} layers, and the model {len(places)}")
        self.names.found |= dict(zip(modules, places, strict=False))

    def _host(self, module: str, name: str, config: Any) -> Any:
        """Returns the view of a module that `config` adapts; None, with a problem, if it cannot."""
        layer = self.modules[name]
        cls = type(base_layers.carrier(layer)).__name__
        if isinstance(config, methods.PromptMethod):
            if name not in self._prompt_hosts(config.where):
                self.problems.append(
                    f"{module!r}: the model's {name!r}, a {cls}, is no place for "
                    f"{type(config).__name__}, which belongs on: "
                    f"{list(self._prompt_hosts(config.where))[:4]}"
                )
            return self._prompt_hosts(config.where).get(name)
        why = base_layers.why_not(layer)
        if why is not None or base_layers.kind_of(layer) is None:
            why = why or "it is no layer of a kind that Weft adapts"
            self.problems.append(
                f"{module!r}: the model's {name!r}, a {cls}, cannot be adapted: {why}"
            )
            return None
        why = stacked.why_not(config) if is_stack(self.structure, name) else None
        if why is not None:
            self.problems.append(f"{module!r}: the model's {name!r} holds fused experts, and {why}")
            return None
        return base_layers.view(layer, name)

    def _prompt_hosts(self, at: str) -> dict[str, Any]:
        """Returns the modules of this model that a prompt attaches to; none, with a problem, if the
        model has none.
        """
        if self._prompt_modules is None:
            try:
                self._prompt_modules = prompts.find_places(self.structure, at)[0]
            except TargetError as error:
                self.problems.append(str(error))
                self._prompt_modules = {}
        return self._prompt_modules

    # Base tensors

    def _plan_selected(self) -> None:
        seen: dict[int, str] = {}
        rounded = set()
        for full, value in self.checkpoint.selected.items():
            live = self.parameters.get(self._model_name(full))
            if live is None:
                self._check_buffer(full, value)
                continue
            fault = misfit(value, live)
            if fault is not None:
                self.problems.append(f"{full!r}: {fault}")
            elif id(live) in seen:  # the other name of a tied tensor
                if not torch.equal(self.selected[seen[id(live)]], value):
                    self.problems.append(
                        f"{full!r} and {seen[id(live)]!r} differ in the file, and are one tied "
                        "tensor in the model"
                    )
            else:
                seen[id(live)] = self._model_name(full)
                self.selected[self._model_name(full)] = value
                if torch.promote_types(value.dtype, live.dtype) != live.dtype:
                    rounded.add(f"{value.dtype} to {live.dtype}".replace("torch.", ""))
        self.notes += [
            f"base tensors trained as copies were rounded from {how}, the model's dtype"
            for how in sorted(rounded)
        ]

    def _check_repeated(self) -> None:
        """Base tensors that the file repeats, as peft does for an adapted embedding, must equal the
        model's.
        """
        for full, value in self.checkpoint.repeated.items():
            live = self.parameters.get(self._model_name(full))
            if live is None:
                self._check_buffer(full, value)
            elif not same_values(live, value) and not tokens.same_table(self, full, live, value):
                self.problems.append(
                    f"{full!r}: the file repeats this tensor of its base, and the model's is "
                    "another (a resized vocabulary, or another base model?)"
                )

    def _check_buffer(self, full: str, value: Tensor) -> None:
        buffer = dict(self.root.named_buffers(remove_duplicate=False)).get(self._model_name(full))
        if buffer is None:
            self.problems.append(
                f"extra: {full!r} {list(value.shape)}: the model has no such tensor"
                f"{nearest('in the model', full, self.parameters, self.problems)}"
            )
        elif not same_values(buffer, value):
            self.problems.append(
                f"{full!r} is a buffer, and the file's is not the model's; Weft trains parameters "
                "only"
            )

    def _model_name(self, full: str) -> str:
        """Returns a tensor's name in the model."""
        parent, _, tensor = full.rpartition(".")
        return f"{self.names.found.get(parent, parent)}.{tensor}".lstrip(".")

    # Is it the right base?

    def _nested(self) -> str | None:
        """Returns the module of this larger model that the adapter was trained on, or None."""
        for wanted, name in self.names.found.items():
            parts = name.split(".")
            if matching.NESTED in parts and matching.NESTED not in wanted.split("."):
                return ".".join(parts[: parts.index(matching.NESTED) + 1])
        return None

    def _check_architecture(self) -> None:
        base = self.checkpoint.base
        if not base:
            return
        model = self.modules[self.nested] if self.nested is not None else self.root
        if matching.architecture(model)["model_type"] is None:
            model = self.root
        inner = base.get("inner")  # a model within the file's base that has all trained tensors
        here = self.modules.get(self.names.found.get(inner["at"], inner["at"])) if inner else None
        if matching.same_architecture(base, model) and (
            not inner or (here is not None and matching.same_architecture(inner, here))
        ):
            return
        if inner and matching.same_architecture(inner, model):
            return
        within = any(matching.NESTED in module.split(".") for module in self.checkpoint.sites)
        if self.checkpoint.writer == "peft" and within and self.mapped:
            self.notes.append(
                f"the file names {base['class']} as its base, and not the architecture of the "
                "model nested in it, so that could not be compared"
            )
            return
        self.problems.append(
            f"the adapter is for {matching.architecture_text(base)}, and this model is "
            f"{matching.architecture_text(matching.architecture(model))}"
        )

    # Is everything there?

    def _check_complete(self) -> None:
        """Everything that the configuration names in this model must be in the file."""
        have = {id(self.parameters[name]) for name in self.selected}
        for name in dict.fromkeys([*self._saved_tensors(), *self._trained_tensors()]):
            if id(self.parameters[name]) not in have:
                self.problems.append(
                    f"missing: the file has no {name!r}, which the adapter trains in this model"
                    f"{nearest('in the file', name, self.checkpoint.selected, self.problems)}"
                )
        self._check_biases(have)
        try:
            alone = replace(self.config, modules_to_save=(), train=())
            layers = parts_of(self.structure, alone).configs
        except TargetError:
            # It names modules that only the file's base has; the problems above say so.
            return
        except ConfigError as error:
            self.problems.append(str(error))
            return
        found = set(self.names.found.values())
        adapted = self.checkpoint.adapted
        more = [] if adapted is None or self.nested else adapted(self.structure, self.selected)
        for name in dict.fromkeys(
            [*kinds.expected(self.checkpoint, self.structure, layers), *more]
        ):
            if name not in found and (self.nested is None or structure.within(name, [self.nested])):
                self.problems.append(
                    f"missing: the file has nothing for {name!r}, which its targets name in this "
                    "model; its base had fewer layers, or tensors were taken out"
                )

    def _check_biases(self, have: set[int]) -> None:
        """A file of peft that trained biases has all that the model has."""
        names = self.names.found
        wanted = {
            "none": [],
            "all": [name for name in self.parameters if _ends(name, "bias")],
            "targets": [
                f"{names[module]}.bias" for module in self.checkpoint.sites if module in names
            ],
        }[self.checkpoint.biases]
        for name in wanted:
            inside = self.nested is None or structure.within(name, [self.nested])
            if inside and name in self.parameters and id(self.parameters[name]) not in have:
                self.problems.append(
                    f"missing: the file has no {name!r}, and its bias field says that it was trained"
                    f"{nearest('in the file', name, self.checkpoint.selected, self.problems)}"
                )

    def _trained_tensors(self) -> list[str]:
        """Returns the base tensors that the configuration trains in this model by `train`."""
        try:
            saved = tensors_of_modules(self.structure, self.config.modules_to_save)
            self._fit_train(saved)
            return self._tensors_of(self.config, saved)
        except TargetError as error:
            self.problems.append(str(error))
            return []

    def _tensors_of(self, config: Any, saved: list[str]) -> list[str]:
        adapted = [
            n for n, config in self.configs.items() if not isinstance(config, methods.PromptMethod)
        ]
        trained = trained_tensors(self.structure, config, adapted, saved)
        inside = [] if self.nested is None else [self.nested]
        return [name for name in trained if not inside or structure.within(name, inside)]

    def _fit_train(self, saved: list[str]) -> None:
        """Writes the biases that peft trained as `train`.

        peft's "all" includes the head's, which "biases" does not, and leaves out biases of other
        names, like in_proj_bias; then the tensors are named one by one.
        """
        beside = [name for name in self.selected if name not in saved]
        if self.checkpoint.biases == "none":
            return
        words: list[str] = ["target-biases"] if beside else []
        if self.checkpoint.biases == "all":
            try:
                usual = self._tensors_of(replace(self.config, train=("biases",)), saved)
            except TargetError:  # no biases outside the head
                usual = []
            known = {id(self.structure.readers[name]) for name in usual}
            have = {id(self.structure.readers[name]) for name in (*beside, *saved)}
            others = [n for n in beside if id(self.structure.readers[n]) not in known]
            words = ["biases", *others] if known and known <= have else beside
        self.config = replace(self.config, train=tuple(words))

    def _saved_tensors(self) -> list[str]:
        """Returns the tensors of modules_to_save. peft lists all names that the head of a task may
        have, and a model has one of them.
        """
        asked = self.config.modules_to_save
        if self.checkpoint.writer == "peft":
            owners = [
                o for name in self.parameters if (o := matching.owner_of(name, asked)) is not None
            ]
            kept = tuple(dict.fromkeys(next((e for e in asked if _ends(o, e)), o) for o in owners))
            self.notes += [
                f"modules_to_save names {e!r}, which this model does not have"
                for e in asked
                if not any(o.endswith(e) for o in owners)
            ]
        else:
            kept = tuple(e for e in asked if any(_ends(name, e) for name in self.modules))
            self.problems += [
                f"modules_to_save names {e!r}, and the model has no such module"
                f"{nearest('in the model', e, self.modules, self.problems)}"
                for e in asked
                if e not in kept
            ]
        self.config = replace(self.config, modules_to_save=kept)
        return tensors_of_modules(self.structure, kept)


def _parent(tensor: str) -> str:
    return tensor.rpartition(".")[0]


def _ends(name: str, ending: str) -> bool:
    return name == ending or name.endswith("." + ending)
