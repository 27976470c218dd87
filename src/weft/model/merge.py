"""Merges an adapter into the weights, measures the error, and restores the base bit for bit."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import MergeError, UnsupportedError, WeftError
from ..methods.base import effective_weight as effective_weight_of
from ..ops.digest import digest
from ..ops.norm import full_precision
from . import packed_merge
from .adapter import STALE_NORM, Adapter
from .carried import active_of, is_adapted, module_dict
from .layer import AdapterLayer
from .merge_report import TOLERANCE, MergeReport
from .offload import loaded, offloads
from .packed_merge import PackedMerge, digest_of
from .row_inputs import tensors
from .state import Backup, Merged, State, state_of
from .statistics import in_eval
from .uncalled import Reads, weighted_layers
from .use import check_alone
from .wiring import message, problems


def merge(
    model: nn.Module,
    name: str = "default",
    verify: Any = None,
    tolerance: float | None = None,
    dtype: torch.dtype | None = None,
    requantise: bool = False,
) -> MergeReport:
    """W <- W' for every weight of the adapter: computed in float32 (or float64), cast once to the
    weight's dtype.

    verify: inputs for the model (a tensor, a tuple of arguments, or a dict of keyword arguments).
    The outputs with the adapter attached and merged are compared in eval mode; if they differ by
    more than `tolerance` (relative; by dtype if None) the base is put back and MergeError is
    raised. An adapter that does not change these outputs at all is refused, too. The base's bits
    are kept, so `unmerge` is exact; that costs one copy of the merged weights.

    A layer of a quantised base becomes a dense one with W' in `dtype` (None: that of the model's
    other weights), from its dequantised weight; `unmerge` gives the packed layer back.
    requantise=True packs W' as the layer was packed instead, and refuses if less than half of the
    change is left.

    Raises WeftError (no such adapter), MergeError (another adapter is merged, outputs changed, too
    little would survive, the model reads a weight past the adapter, as far as `verify` or a forward
    before has shown), UnsupportedError (the method, or packing again, is not possible).
    """
    state = state_of(model)
    adapter = state.adapter(name)
    with state.gate.alone(f"merge adapter {name!r}"):
        _check_mergeable(state, adapter)
        how = packed_merge.plan(adapter, dtype, requantise)
        check_alone(state, f"merge adapter {name!r}")
        state.uncalled.paused = True  # it looks in forwards, and raises no MergeError
        try:
            before = _outputs(state, name, verify)
            _check_called(state, adapter, verify, tolerance)
        finally:
            state.uncalled.paused = False
        base = _outputs(state, None, verify)
        report = _merge(state, adapter, how)
        if verify is None:
            return report
        try:
            after = _outputs(state, None, verify)
        except BaseException:
            unmerge(model)
            raise
        return _verified(state, report, base, before, after, tolerance, how)


def unmerge(model: nn.Module) -> None:
    """Puts the base's weights back bit for bit and restores the selection from before `merge`.

    Raises MergeError if nothing is merged, or another caller is inside `with weft.use(...)`.
    """
    state = state_of(model)
    with state.gate.alone("unmerge"):
        if state.merged is None:
            raise MergeError("nothing is merged, so there is nothing to unmerge.")
        check_alone(state, "unmerge")
        _check_untouched(state, state.merged)
        _put_back(state.merged)
        state.end_merge()
        state.install_for_caller()


def _merge(state: State, adapter: Adapter, how: PackedMerge) -> MergeReport:
    """Writes W' and switches all adapters off. A failure puts the base back."""
    record = Merged(adapter.name)
    state.install(None)
    try:
        rounding, change = _write(adapter, record, how)
        survived = how.check_survived()
    except BaseException:
        _put_back(record)
        state.install_for_caller()
        raise
    state.begin_merge(record)
    found = MergeReport(adapter.name, len(record.backups), rounding, change)
    return replace(found, **how.facts(), survived=survived)


def effective_weight(layer: nn.Module, name: str = "default", tensor: str | None = None) -> Tensor:
    """Returns W' [out, in] of one adapted layer, detached, in float32 (float64 if the weight is).
    `tensor`: which weight, of a module that reads several itself, such as "in_proj_weight".

    A module of fused experts has several layers: `tensor` names the parameter, and W' is [E, out,
    in]. Raises WeftError (the layer has no such adapter), UnsupportedError (the method changes no
    weight).
    """
    active = active_of(layer)
    found = _layer_in(layer, name, tensor) if active is not None else None
    if active is None or not isinstance(found, AdapterLayer):
        have = list(module_dict(layer)) if is_adapted(layer) else []
        raise WeftError(
            f"this {type(layer).__name__} carries no adapter {name!r} (it has: {have})."
        )
    if not found.method.mergeable:
        method = type(found.method)
        raise UnsupportedError(
            f"{method.__name__} has no effective weight: {method.not_mergeable}."
        )
    own = active.base_weights.get(found.base.key)
    if own is None:
        with loaded(layer):
            return _effective(found, found.base.weight())
    return _effective(found, found.base.matrix(own))


def _layer_in(layer: nn.Module, name: str, tensor: str | None) -> Any:
    held: Any = module_dict(layer)
    several = [slot for slot, each in held.items() if isinstance(each, nn.ModuleDict)]
    if several and tensor not in several:
        raise WeftError(f"effective_weight: write which weight, tensor= one of {several}.")
    return (held[tensor] if several else held)._modules.get(name)


@torch.no_grad()
def _effective(layer: AdapterLayer, W: Tensor) -> Tensor:
    with full_precision(W.device):  # autocast would compute it in bfloat16
        return effective_weight_of(layer.method, W, layer).detach()


def _check_mergeable(state: State, adapter: Adapter) -> None:
    if state.merged is not None:
        raise MergeError(
            f"adapter {state.merged.name!r} is already merged; call weft.unmerge(model) before "
            "merging "
            f"{adapter.name!r}."
        )
    if not adapter.config.mergeable:
        why = adapter.config.not_mergeable
        raise UnsupportedError(
            f"{type(adapter.config).__name__} is not a change of weights, so it cannot be merged"
            f"{': ' + why if why else ''}."
        )
    changed = problems(state, adapter, whole=True)
    if changed:
        raise MergeError(message(changed))
    for name, layer in adapter.every_layer().items():
        why = layer.base.not_mergeable
        if why is not None:
            raise MergeError(f"{name!r}: {why}. Nothing was merged.")
        if offloads(layer.base.module) or layer.base.device.type == "meta":
            raise MergeError(
                f"{name!r} has no weight between forwards (it is offloaded by accelerate, or on the meta "
                "device), so nothing can be merged into it. Load the model whole."
            )
    for name, parameter in adapter.named_parameters():
        if parameter.is_meta:
            raise MergeError(f"{name!r} is on the meta device and has no values to merge.")
        if not bool(torch.isfinite(parameter).all()):
            raise MergeError(f"{name!r} holds NaN or infinity; nothing was merged.")
    for name in adapter.stale_layers():
        raise MergeError(f"{name!r}: {STALE_NORM} Nothing was merged.")


@torch.no_grad()
def _write(adapter: Adapter, record: Merged, how: PackedMerge) -> tuple[float, float]:
    rounding = change = 0.0
    for name, selected in adapter.selected_tensors.items():
        change = max(change, _relative(selected.trained - selected.original, selected.original))
        _replace(selected.original, selected.trained, record, name)
        record.base_weights |= dict.fromkeys(selected.layers(), record.backups[-1].bits)
    tokens = {name: adapter.token_layers[name] for name in adapter.token_rows}  # tied ones once
    for name, layer in {**adapter.layers, **tokens}.items():
        packed, W = layer.base.codes() is not None, layer.base.weight()
        wanted = _effective(layer, W)
        dtype = how.dtype if packed else layer.base.parameter.dtype
        cast = wanted.to(dtype)
        if not bool(torch.isfinite(cast).all()):
            raise MergeError(f"{name!r}: W' is not finite in {dtype}; nothing was merged.")
        change = max(change, _relative(wanted - W, W))
        if packed:
            record.backups.append(how.write(name, layer.base, W, wanted))
            cast = how.written(layer.base, cast)
        rounding = max(rounding, _relative(cast - wanted, wanted))
        if packed:
            continue
        stored: Any = layer.base.parameter
        _replace(stored, layer.base.stored(cast), record, layer.base.full_name(name))
        tied = [o.base.module for o in adapter.token_layers.values()]
        readers = [layer.base.key, *(m for m in tied if m.weight is stored)]
        record.base_weights |= dict.fromkeys(readers, record.backups[-1].bits)
    return rounding, change


def _replace(parameter: nn.Parameter, value: Tensor, record: Merged, name: str) -> None:
    bits = parameter.detach().clone()
    parameter.copy_(value)
    record.backups.append(Backup(name, parameter, bits, parameter._version, digest(parameter)))


@torch.no_grad()
def _put_back(record: Merged) -> None:
    for backup in reversed(record.backups):  # two of them may be one memory
        if backup.packed is not None:
            packed_merge.put_back(backup.packed)
        else:
            backup.parameter.copy_(backup.bits)


def _check_untouched(state: State, record: Merged) -> None:
    """Raises MergeError if a merged weight is no longer the tensor, or the value, that was
    written.
    """
    live = dict(state.root.named_parameters(remove_duplicate=False))
    for backup in record.backups:
        now = live.get(backup.name)
        if now is not backup.parameter:
            why = "was replaced by another tensor"
        elif now._version != backup.version:
            why = "was written to"
        elif now.dtype == (backup.dtype or backup.bits.dtype) and digest_of(now) != backup.digest:
            why = "was edited through `.data` or a pointer"
        else:
            continue
        raise MergeError(
            f"{backup.name!r} {why} while adapter {record.name!r} was merged into it, so unmerge would "
            "not give the base back. Load the base model again, or keep the weights as they are with "
            f"weft.detach(model, {record.name!r}, keep_merged=True)."
        )


def _relative(difference: Tensor, of: Tensor) -> float:
    size = float(torch.linalg.vector_norm(of.double()))
    return float(torch.linalg.vector_norm(difference.double())) / size if size else 0.0


def _verified(
    state: State,
    report: MergeReport,
    base: list[Tensor],
    before: list[Tensor],
    after: list[Tensor],
    tolerance: float | None,
    how: PackedMerge,
) -> MergeReport:
    given = tolerance is not None
    if tolerance is None:
        dtypes = {b.parameter.dtype for b in state.merged.backups} if state.merged else set()
        tolerance = max(TOLERANCE.get(d, 1e-1) for d in dtypes | how.rounds)
    error, effect = _distance(after, before), _distance(before, base)
    if report.survived is not None and not given:  # another rounding than the base's, as asked for
        tolerance = max(tolerance, effect)
    if effect == 0:
        unmerge(state.root)
        raise MergeError(
            f"adapter {report.name!r} does not change the outputs for these inputs at all, so the base was "
            "put back: it is untrained, or its layers are not called. Merge without verify (--no-verify) if that is meant."
        )
    if not error <= tolerance:  # written so that NaN is refused too
        unmerge(state.root)
        raise MergeError(
            f"merging {report.name!r} changed the outputs by {error:.2e} (relative; allowed "
            f"{tolerance:.0e}), "
            "so the base was put back. Pass tolerance= to allow more, or merge in a wider dtype."
        )
    return replace(report, output_error=error, effect=effect, tolerance=tolerance)


def _distance(a: list[Tensor], b: list[Tensor]) -> float:
    worst = 0.0
    for x, y in zip(a, b, strict=True):
        scale = float(y.abs().max()) if y.numel() else 0.0
        gap = float((x - y).abs().max()) if y.numel() else 0.0
        worst = max(worst, gap / scale if scale else gap) if not math.isnan(gap) else math.nan
    return worst


def _outputs(state: State, name: str | None, inputs: Any) -> list[Tensor]:
    """Returns all floating outputs of the model for `inputs` in eval mode, as float64; empty
    without inputs.
    """
    if inputs is None:
        return []
    if state.merged is None:
        before = state.active.chosen()
        state.choose(name)
        try:
            return _run(state.root, inputs)
        finally:
            state.active.restore(before)
            state.install_for_caller()
    return _run(state.root, inputs)


def _check_called(state: State, adapter: Adapter, inputs: Any, tolerance: float | None) -> None:
    """Raises MergeError if the model reads the weight of a layer past the adapter, with these
    inputs or in a forward before. A layer that it calls as well is let through if its effect is
    measured and a tolerance for it was given.
    """
    if inputs is not None and not state.active.was_traced:
        with Reads(weighted_layers(adapter).values()) as reads:
            _outputs(state, adapter.name, inputs)
        state.uncalled.note(adapter, reads)
    problem = state.uncalled.problem(adapter)
    if problem is None and (inputs is None or tolerance is None):
        problem = state.uncalled.reread(adapter)
        if problem is not None:
            problem += " If the read does not matter, give verify= inputs and a tolerance=."
    if problem is not None:
        raise MergeError(f"nothing was merged: {problem}")


def _run(model: nn.Module, inputs: Any) -> list[Tensor]:
    with in_eval(model), torch.no_grad():
        if isinstance(inputs, Mapping):
            out = model(**inputs)
        else:
            out = model(*inputs) if isinstance(inputs, tuple) else model(inputs)
    found = [t.detach().double() for _, t in tensors(out) if t.is_floating_point()]
    if not found:
        raise MergeError("verify: the model returned no floating-point tensor to compare.")
    return found
