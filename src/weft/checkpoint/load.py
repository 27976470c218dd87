"""`weft.load`: every tensor of the file lands, every tensor of the adapter is filled, or an error names both sides."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from .. import methods
from ..errors import CheckpointError, TargetError, UnsupportedError
from ..methods.projections import Projections
from ..model import hosts, targets
from ..model.adapter import Adapter
from ..model.attach import Parts, attach_resolved
from ..model.selection import tensors_of_modules, tensors_picked
from ..model.state import find_state, unwrapped
from ..model.switch import base_only
from . import files, header, matching, native, peft_lora, peft_vera
from .content import LoadReport, Stored, StoredSite, fault_of, refuse

FROM_PEFT = {peft_lora.PEFT_TYPE: peft_lora, peft_vera.PEFT_TYPE: peft_vera}


def load(model: nn.Module, path: str | Path, name: str = "default", strict: bool = True) -> Adapter | LoadReport:
    """Attach the adapter saved in the directory `path`, by Weft or by peft, fill it and make it active.

    strict: anything that does not fit raises CheckpointError and leaves the model as it was; the handle is returned
    (its `load_report` says which names were mapped). strict=False: what fits is filled, the rest keeps its starting
    values, and the LoadReport (with `.adapter` and `.problems`) is returned.

    Raises CheckpointError, UnsupportedError (a peft field or method that Weft does not carry), and what attach raises.
    """
    stored = read(path)
    root = unwrapped(model)
    with base_only(find_state(root)):
        plan = _Placement(root, stored)
    if strict:
        refuse(path, plan.problems)
    elif not plan.rules and not plan.selected:
        raise CheckpointError(f"{path} has nothing that fits this {type(root).__name__}:\n  " + "\n  ".join(plan.problems))
    frozen, routed = targets.leftovers(root, plan.rules) if plan.rules else ([], [])
    adapter = attach_resolved(model, stored.config, Parts(plan.rules, list(plan.selected), frozen, routed), name,
                              plan.shared)
    _fill(adapter, plan)
    adapter.load_report = LoadReport(adapter, plan.problems, plan.mapped, stored.notes)
    return adapter if strict else adapter.load_report


def read(path: str | Path) -> Stored:
    """Read a checkpoint without a model. Faults within the file are `problems`; an unreadable one raises."""
    tensors_file, config_file = files.find(path)
    tensors, metadata = files.read_tensors(tensors_file)
    numbers = sum(t.numel() for t in tensors.values())
    if "weft" in metadata:
        stored = _read_own(tensors_file, config_file, tensors, metadata)
    else:
        stored = _read_peft(tensors_file, config_file, tensors)
    stored.numbers = numbers
    return stored


def _read_own(tensors_file: Path, config_file: Path | None, tensors: dict[str, Tensor],
              metadata: Mapping[str, str]) -> Stored:
    stored, layout, manifest, kept = header.read(tensors_file, metadata)
    header.check_sums(stored, tensors, metadata.get("weft_checksums", ""), manifest["keys"])
    if config_file is None:
        stored.notes.append(f"{files.CONFIG} is missing; the configuration in the tensors' file was used")
    else:
        header.check_config(config_file, files.read_config(config_file), kept, stored)
    if layout == "native":
        native.read(stored, manifest, tensors)
    elif layout == peft_lora.PEFT_TYPE:
        peft_lora.read_tensors(stored, peft_lora.bare_keys(tensors, stored.notes))
    elif layout == peft_vera.PEFT_TYPE:
        peft_vera.read_tensors(stored, peft_vera.read_own(stored, tensors))
    else:
        raise CheckpointError(f"{tensors_file} has the layout {layout!r}, which this Weft does not know. Update weft.")
    return stored


def _read_peft(tensors_file: Path, config_file: Path | None, tensors: dict[str, Tensor]) -> Stored:
    if config_file is None:
        raise CheckpointError(f"{tensors_file.parent} has no {files.CONFIG}, which says what the tensors are.")
    config = files.read_config(config_file)
    kind = config.get("peft_type")
    if isinstance(kind, str) and kind.startswith("WEFT_"):
        raise CheckpointError(f"{tensors_file} has lost the header that Weft wrote into it; some tool has written the file "
                              "anew without its metadata. Use the original.")
    if kind not in FROM_PEFT:
        raise UnsupportedError(f"{config_file} says peft_type={kind!r}; Weft reads {list(FROM_PEFT)}.")
    return FROM_PEFT[kind].read(config, tensors)


class _Placement:
    """A checkpoint matched against a model, before anything is touched."""

    def __init__(self, root: nn.Module, stored: Stored) -> None:
        self.root, self.stored = root, stored
        self.problems = list(stored.problems)
        self.modules = dict(root.named_modules())
        parents = {name.rpartition(".")[0] for name in stored.selected}
        found = matching.match([*stored.sites, *parents], self.modules)
        self.names, self.mapped = found.names, found.mapped
        self.rules: dict[str, Any] = {}
        self.values: dict[str, dict[str, Tensor]] = {}
        self.selected: dict[str, Tensor] = {}
        self.shared: dict[Any, Any] = {}
        self._check_architecture()
        for module, site in stored.sites.items():
            self._place_site(module, site)
        self._place_selected()
        self._check_copies()
        self._check_complete()
        self._place_shared()

    def _place_site(self, module: str, site: StoredSite) -> None:
        if module not in self.names:
            keys = sorted(set(site.keys.values()))
            self.problems.append(f"{keys[0]!r}: the model has no module {module!r}; nearest in the model: "
                                 f"{matching.nearest(module, self.modules) or 'none'}")
            return
        name = self.names[module]
        layer = self.modules[name]
        if hosts.host_kind(layer) is None:
            why = hosts.why_not(layer) or "it is no linear layer"
            self.problems.append(f"{module!r}: the model's {name!r} is a {type(layer).__name__} and cannot be adapted ({why})")
            return
        host = hosts.view(layer)
        shape = (host.out_features, host.in_features)
        if (site.kind == "embedding") != (host.kind == "embedding") or (site.shape or shape) != shape:
            self.problems.append(f"{module!r} is a {site.kind or 'linear'} layer {list(site.shape or ())} (out, in) in the "
                                 f"file, and the model's {name!r} a {host.kind} layer {list(shape)}")
            return
        self.rules[name] = site.rule
        self.values[name] = {}
        for tensor, wanted in site.rule.trained(*shape).items():
            if tensor not in site.tensors:
                continue  # its absence is among the problems already
            fault = fault_of(site.tensors[tensor], wanted)
            if fault is None:
                self.values[name][tensor] = site.tensors[tensor]
            else:
                self.problems.append(f"{site.keys[tensor]!r} ({tensor} of {name!r}): {fault}")

    def _place_selected(self) -> None:
        parameters = dict(self.root.named_parameters(remove_duplicate=False))
        placed: dict[int, str] = {}
        for full, value in self.stored.selected.items():
            parent, _, tensor = full.rpartition(".")
            name = f"{self.names[parent]}.{tensor}".lstrip(".") if parent in self.names else full
            live = parameters.get(name)
            if live is None:
                self._place_buffer(full, name, value)
            elif tuple(live.shape) != tuple(value.shape):
                self.problems.append(f"{full!r}: shape {list(value.shape)} in the file, {list(live.shape)} in the model")
            elif id(live) in placed:  # the other name of a tied tensor
                if not torch.equal(self.selected[placed[id(live)]], value):
                    self.problems.append(f"{full!r} and {placed[id(live)]!r} differ in the file, and are one tied tensor "
                                         "in the model")
            else:
                placed[id(live)] = name
                self.selected[name] = value

    def _place_buffer(self, full: str, name: str, value: Tensor) -> None:
        buffer = dict(self.root.named_buffers()).get(name)
        if buffer is None:
            self.problems.append(f"extra: {full!r} {list(value.shape)}: the model has no such tensor; nearest in the model: "
                                 f"{matching.nearest(full, dict(self.root.named_parameters())) or 'none'}")
        elif not torch.equal(buffer.cpu(), value):
            self.problems.append(f"{full!r} is a buffer, and the file's differs from the model's; Weft trains parameters only")

    def _check_copies(self) -> None:
        """An embedding that the file repeats (peft does when it is adapted) must be the model's own."""
        parameters = dict(self.root.named_parameters(remove_duplicate=False))
        for full, value in self.stored.copies.items():
            parent, _, tensor = full.rpartition(".")
            live = parameters.get(f"{self.names.get(parent, parent)}.{tensor}")
            if live is None or tuple(live.shape) != tuple(value.shape) or not torch.equal(live.detach().cpu(), value.to(live.dtype)):
                self.problems.append(f"{full!r}: the file repeats this tensor of its base, and the model's is another (a "
                                     "resized vocabulary, or another base model?)")

    def _check_architecture(self) -> None:
        base = self.stored.base
        here = header.base_of(self._nested_root())
        if not base or base == here:
            return
        if base["model_type"] != here["model_type"] or base["model_type"] is None:
            self.problems.append(f"the adapter is for {base['class']} (model type {base['model_type']}), and this model is "
                                 f"{here['class']} (model type {here['model_type']})")

    def _nested_root(self) -> nn.Module:
        """The model that the adapter was made for, where it now sits inside a larger one (`language_model.`)."""
        for wanted, name in self.names.items():
            parts = name.split(".")
            if matching._NESTED in parts and matching._NESTED not in wanted.split("."):
                inner = self.modules[".".join(parts[: parts.index(matching._NESTED) + 1])]
                return inner if getattr(inner, "config", None) is not None else self.root
        return self.root

    def _check_complete(self) -> None:
        """Layers and tensors that the configuration names in this model, and the file lacks."""
        config = self.stored.config
        if isinstance(config, methods.Selection):
            wanted = [*tensors_picked(self.root, config), *tensors_of_modules(self.root, config.modules_to_save)]
            parameters = dict(self.root.named_parameters(remove_duplicate=False))
            have = {id(parameters[n]) for n in self.selected}
            self.problems += [f"missing: the file has no {name!r}, which {type(config).__name__} trains in this model"
                              for name in dict.fromkeys(wanted) if id(parameters[name]) not in have]
            return
        if self.stored.picks_layers or self.mapped:
            return
        try:
            wanted_sites = targets.resolve(self.root, config.targets).sites
        except TargetError:
            return  # a layer that cannot be adapted, or no match: the names above have told
        placed = {self.names[m] for m in self.stored.sites if m in self.names}
        self.problems += [f"missing: the file has nothing for {name!r}, which its targets name in this model; its base had "
                          "fewer layers, or tensors were taken out" for name in wanted_sites if name not in placed]

    def _place_shared(self) -> None:
        """VeRA's matrices: those of the file, or redrawn and held against their checksum."""
        stored = self.stored
        groups: dict[Any, list[tuple[int, int]]] = {}
        first: dict[Any, Any] = {}
        for name, rule in self.rules.items():
            host = hosts.view(self.modules[name])
            if rule.share_key() is not None:
                groups.setdefault(rule.share_key(), []).append((host.out_features, host.in_features))
                first.setdefault(rule.share_key(), (rule, host.weight().device))
        for key, shapes in groups.items():
            rule, device = first[key]
            if stored.matrices is not None:
                shared: Any = self._stored_matrices(rule, shapes)
            else:
                shared = rule.share(shapes, torch.device("cpu"))
            if shared is None:
                continue
            known = stored.shared_checksums.get(header.shared_key(rule))
            complete = len(self.rules) == len(stored.sites)
            if known is not None and complete and shared.checksum() != known:
                self.problems.append(f"VeRA's A and B (seed {rule.seed}, r={rule.r}) have checksum {shared.checksum()}, and "
                                     f"{known} was saved: these are other matrices, so the vectors mean nothing with them")
            self.shared[key] = shared.to(device)

    def _stored_matrices(self, rule: Any, shapes: list[tuple[int, int]]) -> Projections | None:
        A, B = self.stored.matrices or (torch.empty(0, 0), torch.empty(0, 0))
        out, in_ = max(o for o, _ in shapes), max(i for _, i in shapes)
        if A.ndim != 2 or B.ndim != 2 or A.shape[0] != rule.r or B.shape[1] != rule.r or A.shape[1] < in_ or B.shape[0] < out:
            self.problems.append(f"'base_model.vera_A' {list(A.shape)} and 'base_model.vera_B' {list(B.shape)} in the file, "
                                 f"at least [{rule.r}, {in_}] and [{out}, {rule.r}] expected")
            return None
        return Projections(rule.r, A.shape[1], B.shape[0], rule.seed, rule.draw, stored=(A, B))


@torch.no_grad()
def _fill(adapter: Adapter, plan: _Placement) -> None:
    for name, site in adapter.sites.items():
        live = site.trainable()
        for tensor, value in plan.values[name].items():
            live[tensor].copy_(value)
    for name, selected in adapter.selected_tensors.items():
        selected.trained.copy_(plan.selected[name])


__all__ = ["load", "read"]
