"""`weft.export`: an adapter directory written anew in another form, without a model, and the error
that it measured.

Every conversion here is exact in mathematics; what is measured is the rounding of the numbers
written. What would only be an approximation is refused.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

from .. import methods
from ..errors import CheckpointError, ConfigError, UnsupportedError
from ..methods.config import DTYPES
from ..methods.projections import Projections
from ..methods.rng import Rng
from . import files, header, peft_lora, peft_vera
from .content import Stored, StoredSite, refuse
from .load import read
from .peft_common import PREFIX, bare_config

FORMS = ("lora", "peft")


@dataclass(frozen=True)
class Exported:
    """What was written. `error`: largest ‖delta written - delta read‖ / ‖delta read‖ of a layer, in
    float64.
    """

    path: str
    method: str
    to: str
    layers: int
    nbytes: int
    error: float
    notes: tuple[str, ...] = ()

    def __str__(self) -> str:
        head = (
            f"{self.method} of {self.layers} layers, now {self.to}: {self.nbytes:,} bytes; updates "
            "differ by "
            f"{self.error:.1e} (relative, measured)"
        )
        return "\n".join([head, *(f"note: {note}" for note in self.notes)])


def export(path: str | Path, to: str, out: str | Path) -> Exported:
    """Write the adapter in the directory `path` into the directory `out` in the form `to`.

    to="lora": plain LoRA, for LoRA, LoRA-FA, AdaLoRA (the triplets in force), DyLoRA and VeRA.
    to="peft": what peft reads: the same LoRA for LoRA-FA and DyLoRA, VeRA with its matrices, and
    LoRA, DoRA and AdaLoRA as they are. What was written is read again and its updates are compared,
    layer by layer, with those read first.

    Raises ConfigError (an unknown form), UnsupportedError (no such form of this method, with the
    reason), and CheckpointError (the file does not hold together, `out` holds something else or
    cannot be written).
    """
    if to not in FORMS:
        raise ConfigError(f"export(to={to!r}): to must be one of {list(FORMS)}.")
    source, target = Path(path).expanduser(), Path(out).expanduser()
    if target.exists() and (not target.is_dir() or any(target.iterdir())):
        raise CheckpointError(f"{str(out)!r} exists and is not empty; give a new directory.")
    stored = read(source)
    refuse(source, stored.problems)
    _check_fixed(stored)
    made, layout, notes = _converted(stored, to)
    if made is None:  # the file has the form already
        tensors, metadata = files.read_tensors(files.find(source)[0])
        config = files.read_config(source / files.CONFIG)
    else:
        tensors, metadata, config = _composed(made, layout)
    try:
        files.write(target, tensors, metadata, config)
    except OSError as error:
        raise CheckpointError(f"{str(out)!r} could not be written ({error}).") from error
    again = read(target)
    refuse(target, again.problems)
    size = files.find(target)[0].stat().st_size
    return Exported(
        str(out),
        type(stored.config).__name__,
        type(again.config).__name__,
        len(again.sites),
        size,
        _error(stored, again),
        tuple(notes),
    )


def _converted(stored: Stored, to: str) -> tuple[Stored | None, str, list[str]]:
    """The content in its new form and the layout for it; None where it is in that form already."""
    config = stored.config
    if not isinstance(config, methods.TensorConfig):
        raise UnsupportedError(
            f"{type(config).__name__} trains copies of base tensors and has no form {to!r}; use "
            "weft "
            "merge, which writes a plain model."
        )
    if to == "peft" and stored.peft_reads_it and type(config) is not methods.VeRA:
        return None, "", []
    if type(config) is methods.LoRA:
        return None, "", []
    if type(config) is methods.VeRA and to == "peft":
        return _vera_for_peft(stored), peft_vera.PEFT_TYPE, []
    convert = _TO_LORA.get(type(config))
    if convert is None and not config.mergeable:
        why = config.not_mergeable if to == "lora" else "peft has no form for it as it is"
        raise UnsupportedError(
            f"{type(config).__name__} cannot be exported to {to!r}: it is no change of weights; "
            f"{why}."
        )
    if convert is None:
        why = (
            "its magnitudes rescale the rows of the base weight itself, which no product of two "
            "thin matrices can do; "
            "weft merge writes it into the weights"
            if to == "lora"
            else "peft has no such method; weft merge writes it into the weights of a plain model"
        )
        raise UnsupportedError(f"{type(config).__name__} cannot be exported to {to!r}: {why}.")
    return _as_lora(stored, convert), peft_lora.PEFT_TYPE, _notes(stored)


def _as_lora(stored: Stored, convert: Callable[[Any, Any], tuple[Tensor, Tensor, float]]) -> Stored:
    """LoRA with the rank and scale that each layer needs; layers whose update is 0 are left out."""
    sites: dict[str, StoredSite] = {}
    for module, site in stored.sites.items():
        A, B, scale = convert(site.rule, params(stored, module))
        if len(A):
            rule = methods.LoRA(
                r=len(A),
                alpha=scale * len(A),
                init="kaiming",
                dropout=site.rule.dropout,
                dtype=site.rule.dtype,
            )
            dtype = DTYPES[site.rule.dtype]
            sites[module] = StoredSite(
                rule, {"A": A.to(dtype), "B": B.to(dtype)}, kind=site.kind, shape=site.shape
            )
    if not sites:
        raise UnsupportedError(
            "no triplet of any layer is in force, so there is nothing to export."
        )
    first = next(iter(sites.values())).rule
    config = replace(first, targets=list(sites), modules_to_save=stored.config.modules_to_save)
    return replace(stored, config=config, sites=sites, checksums={}, peft_reads_it=True)


def _notes(stored: Stored) -> list[str]:
    empty = [
        module
        for module, site in stored.sites.items()
        if "lam" in site.tensors and not site.tensors["lam"].any()
    ]
    notes = (
        [f"{len(empty)} layers keep no triplet and are left out, {empty[0]!r} first"]
        if empty
        else []
    )
    return notes + (
        ["the head or other modules trained in full go along"] if stored.selected else []
    )


def _from_low_rank(rule: Any, p: Any) -> tuple[Tensor, Tensor, float]:
    return p.A, p.B, rule.scale


def _from_adalora(rule: Any, p: Any) -> tuple[Tensor, Tensor, float]:
    """lam goes into B; triplets that are not in force are left out."""
    kept = p.lam[:, 0] != 0
    B = p.P.double() * p.lam[:, 0].double()
    return p.Q[kept], B[:, kept], rule.scale


def _from_vera(rule: Any, p: Any) -> tuple[Tensor, Tensor, float]:
    A, B = rule._frozen(p)
    return p.d.double()[:, None] * A.double(), p.b.double()[:, None] * B.double(), 1.0


_TO_LORA: Mapping[type[Any], Callable[[Any, Any], tuple[Tensor, Tensor, float]]] = {
    methods.LoRAFA: _from_low_rank,
    methods.DyLoRA: _from_low_rank,
    methods.AdaLoRA: _from_adalora,
    methods.VeRA: _from_vera,
}


def _vera_for_peft(stored: Stored) -> Stored:
    for module, site in stored.sites.items():
        if site.kind == "embedding":
            raise UnsupportedError(
                f"peft's VeRA has no form for the embedding {module!r}; export to 'lora'."
            )
        if site.rule.share_key() != stored.config.share_key():
            raise UnsupportedError(
                f"peft's VeRA has one rank and one seed for all layers, and {module!r} has others; "
                "export to 'lora'."
            )
    first = params(stored, next(iter(stored.sites))).shared
    return replace(stored, matrices=(first.A, first.B), peft_reads_it=True)


def params(stored: Stored, module: str) -> Any:
    """One layer's tensors as a rule reads them, with the frozen ones drawn again."""
    site = stored.sites[module]
    held: dict[str, Any] = dict(site.tensors)
    shape = _shape(site)
    held |= _fixed(site, module)
    if site.rule.share_key() is not None:
        held["shared"] = _shared(stored, site.rule)
    return SimpleNamespace(shape=shape, training=False, **held)


def _fixed(site: StoredSite, module: str) -> dict[str, Tensor]:
    if not isinstance(site.rule, methods.LayerConfig):
        return {}
    rng = Rng(site.rule.seed, module, torch.device("cpu"))
    drawn = site.rule.frozen(*_shape(site), site.kind == "embedding", rng)
    return {name: t.to(DTYPES[site.rule.dtype]) for name, t in drawn.items()}


def _check_fixed(stored: Stored) -> None:
    drawn = (t for module, site in stored.sites.items() for t in _fixed(site, module).values())
    known = stored.checksums.get(header.FIXED)
    if known is not None and known != (found := header.digest_of(drawn)):
        raise CheckpointError(
            f"the frozen tensors drawn from the seed have checksum {found}, and {known} was saved; "
            "these "
            "are other tensors."
        )


def _shared(stored: Stored, rule: Any) -> Projections:
    shapes = [
        _shape(site) for site in stored.sites.values() if site.rule.share_key() == rule.share_key()
    ]
    max_out, max_in = max(o for o, _ in shapes), max(i for _, i in shapes)
    if stored.matrices is not None:
        A, B = stored.matrices
        return Projections(rule.r, A.shape[1], B.shape[0], rule.seed, "stored", stored=(A, B))
    shared = Projections(rule.r, max_in, max_out, rule.seed, rule.draw)
    known = stored.checksums.get(header.shared_key(rule))
    if known is not None and known != header.shared_checksum(shared):
        raise CheckpointError(
            f"A and B drawn from seed {rule.seed} are not those that were saved (checksum {known})."
        )
    return shared


def _shape(site: StoredSite) -> tuple[int, int]:
    """(out, in); peft's files tell it by their tensors only, and VeRA's not at all."""
    if site.shape is not None:
        return site.shape
    for left, right in (("B", "A"), ("P", "Q")):
        if left in site.tensors:
            return site.tensors[left].shape[0], site.tensors[right].shape[1]
    raise UnsupportedError(
        "peft's VeRA files do not say the width of a layer. Load it with weft.load and save it; "
        "that "
        "file can be exported."
    )


def _composed(
    made: Stored, layout: str
) -> tuple[dict[str, Tensor], dict[str, str], dict[str, Any]]:
    """Tensors, header and adapter_config.json in a layout of peft."""
    codec: Any = {peft_lora.PEFT_TYPE: peft_lora, peft_vera.PEFT_TYPE: peft_vera}[layout]
    tensors = {
        codec.key(module, name, site.kind): t
        for module, site in made.sites.items()
        for name, t in site.tensors.items()
    }
    tensors |= {PREFIX + name: t for name, t in {**made.repeated, **made.selected}.items()}
    if layout == peft_vera.PEFT_TYPE and made.matrices is not None:
        tensors |= {"base_model.vera_A": made.matrices[0], "base_model.vera_B": made.matrices[1]}
    kinds = {site.kind for site in made.sites.values()} - {"embedding"}
    exact = "|".join(re.escape(name) for name in sorted(made.sites))
    config = {
        **bare_config(made.config, exact, kinds == {"conv1d"}),
        **codec.fields(made.config, {module: site.rule for module, site in made.sites.items()}),
    }
    head = {
        "schema": header.SCHEMA,
        "layout": layout,
        "config": methods.to_json(made.config),
        "shared": made.checksums,
    }
    manifest = {
        "base": made.base,
        "selected": list(made.selected),
        "sites": [
            [
                module,
                site.kind or "linear",
                list(_shape(site)),
                header.differences(site.rule, made.config),
            ]
            for module, site in made.sites.items()
        ],
    }
    return tensors, header.sealed(head, manifest, tensors, config), config


def _error(before: Stored, after: Stored) -> float:
    """Largest relative difference of a layer's update. DoRA is no update; its tensors are compared
    bit for bit.
    """
    worst = 0.0
    for module, site in before.sites.items():
        if not _is_update(site.rule):
            same = all(
                torch.equal(t, after.sites[module].tensors[name])
                for name, t in site.tensors.items()
            )
            worst = max(worst, 0.0 if same else float("inf"))
            continue
        wanted = _update(before, module)
        size = float(wanted.norm())
        found = _update(after, module) if module in after.sites else 0 * wanted
        worst = max(worst, float((found - wanted).norm()) / (size or 1.0))
    return worst


def _is_update(rule: Any) -> bool:
    """Whether a method's W' is W + ΔW, without a scale of the rows."""
    return isinstance(rule, methods.LowRankMethod) and "m" not in rule.shapes(2, 2)


def _update(stored: Stored, module: str) -> Tensor:
    """ΔW [out, in] in float64."""
    found: Tensor = stored.sites[module].rule.factors(params(stored, module)).delta(torch.float64)
    return found
