"""What the tests share: a small model off its starting point, the oracle's output for it, and one
tolerance a dtype.

`METHODS` drives the tests: a new method is covered by being listed, once `oracle.py` says what it
computes.
"""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import nullcontext
from dataclasses import dataclass, field, fields
from typing import Any

import torch
from torch import Tensor, nn

import oracle
import weft
from weft.methods import METHODS, LayerConfig
from weft.model import fallback
from weft.model.adapter import Adapter
from weft.ops import plan

# One tolerance a dtype, never one a method: relative to the largest number compared.
TOLERANCE = {torch.float64: 1e-10, torch.float32: 1e-5, torch.bfloat16: 5e-2}

KINDS = ("linear", "conv1d", "embedding")
RULES = [name for name, method in METHODS.items() if issubclass(method, LayerConfig)]
PROMPTS = [
    name for name, method in METHODS.items() if hasattr(method, "where")
]  # virtual positions, which need a transformer
SELECTIONS = [name for name in METHODS if name not in RULES + PROMPTS]


def _variants() -> list[str]:
    """Every method, and every method again with each of its options that changes a formula:
    "DoRA:norm_grad=exact".
    """
    options = {
        "norm_grad": ["exact"],
        "init": ["pissa"],
        "rslora": [True],
        "preset": ["lin", "series", "parallel"],
        "positions": ["kept"],
        "hidden": [5],
    }
    found = list(METHODS)
    for name, method in METHODS.items():
        found += [
            f"{name}:{f.name}={value}"
            for f in fields(method)
            for value in options.get(f.name, [])
            if (name, f.name) != ("DyLoRA", "init")  # which has no such start
        ]
    return found


VARIANTS = _variants()
RULE_VARIANTS = [v for v in VARIANTS if v.partition(":")[0] in RULES]
MERGEABLE = [v for v in VARIANTS if METHODS[v.partition(":")[0]].mergeable]
TURNS_WEIGHTS = [v for v in RULE_VARIANTS if v in MERGEABLE]
PROMPT_VARIANTS = [v for v in VARIANTS if v.partition(":")[0] in PROMPTS]
SAVED_AS_TRAINED = [
    v for v in VARIANTS if ":hidden=" not in v
]  # the others' files hold what their tensors make
STARTS_AT_BASE = [
    v for v in VARIANTS if getattr(METHODS[v.partition(":")[0]], "starts_at_base", True)
]


def config(variant: str, **changes: Any) -> Any:
    """A configuration whose numbers are neither defaults nor equal to each other: alpha / r is 5/3,
    d_init 0.3, s 0.7.
    """
    name, _, option = variant.partition(":")
    known = {f.name for f in fields(METHODS[name])}
    given: dict[str, Any] = {
        "r": 3,
        "alpha": 5.0,
        "d_init": 0.3,
        "seed": 7,
        "targets": ["layer", "mid"],
        "scale": 0.7,
        "skip_layers": 0,
        "k": 1,
        "n": 3,
        "l_p": 2,
        "std": 0.3,
    }
    # With nothing behind the prompt, no token reads the states there of a block but the last, so
    # they would get no gradient.
    given["l_i"] = 1 if getattr(METHODS[name], "where", "") == "embeddings" else 0
    if (
        "r_min" in known
    ):  # so that training computes what evaluation does; smaller ranks have tests of their own
        given["r_min"] = 1 if isinstance(changes.get("targets"), dict) else changes.get("r", 3)
    if "total_steps" in known:
        given["total_steps"] = 9
    if option:
        key, _, value = option.partition("=")
        given[key] = {"True": True}.get(value, int(value) if value.isdigit() else value)
    given = {k: v for k, v in {**given, **changes}.items() if k in known}
    if given.get("init") == "pissa":  # a weight has no more directions than its smaller side
        given["r"] = min(given["r"], 5)
    return METHODS[name](**given)


class Net(nn.Module):
    """A host of each kind, a second adapted layer of another shape, and a head: 7 -> 11 -> 9 -> 5,
    nothing square.

    With a `body`, a GPT-2 of two blocks stands behind the first layer, for methods that need
    attention.
    """

    def __init__(self, kind: str = "linear", bias: bool = True, body: bool = False) -> None:
        super().__init__()
        self.layer = host(kind, 7, 11, bias)
        self.mid = nn.Linear(11, 9, bias=bias)
        self.head = nn.Linear(9, 5, bias=bias)
        if body:
            self.body = gpt2_body()

    def forward(self, x: Tensor) -> Tensor:
        h = torch.tanh(self.layer(x))
        if "body" in self._modules:
            h = self.body(inputs_embeds=h).last_hidden_state
        return self.head(torch.tanh(self.mid(h)))


def gpt2_body() -> nn.Module:
    """Two blocks of width 11 with one head, no number of theirs small or at a round value."""
    import transformers

    made = transformers.GPT2Model(
        transformers.GPT2Config(
            vocab_size=3,
            n_embd=11,
            n_layer=2,
            n_head=1,
            n_inner=13,
            n_positions=16,
            resid_pdrop=0,
            embd_pdrop=0,
            attn_pdrop=0,
            bos_token_id=None,
            eos_token_id=None,
            use_cache=False,
        )
    )
    for p in made.parameters():
        nn.init.normal_(p, std=0.2) if p.ndim > 1 else p.data.add_(0.2 * torch.randn_like(p))
    return made


def host(kind: str, in_: int, out: int, bias: bool = True) -> nn.Module:
    if kind == "embedding":
        return nn.Embedding(in_, out)
    if kind == "conv1d":
        from transformers.pytorch_utils import Conv1D

        layer = Conv1D(out, in_)
        nn.init.normal_(layer.weight, std=0.4)
        nn.init.normal_(layer.bias, std=0.4)
        if not bias:
            layer.bias.data.zero_()
        return layer
    return nn.Linear(in_, out, bias=bias)


def inputs(kind: str, rows: int = 4, dtype: torch.dtype = torch.float32, seed: int = 1) -> Tensor:
    """[rows, 6, 7], or ids [rows, 6] below 7."""
    generator = torch.Generator().manual_seed(seed)
    if kind == "embedding":
        return torch.randint(0, 7, (rows, 6), generator=generator)
    return torch.randn(rows, 6, 7, generator=generator).to(dtype)


def net(
    kind: str = "linear",
    dtype: torch.dtype = torch.float32,
    bias: bool = True,
    seed: int = 0,
    variant: str = "",
) -> Net:
    """The small model, with what this variant of a method needs in it."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return Net(kind, bias, variant.partition(":")[0] in PROMPTS).to(dtype)


def move(adapter: Adapter, seed: int = 2) -> None:
    """Move every trained number off its start, by about half its size or, where it is small, by
    about 0.3.
    """
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, p in adapter.named_parameters():
            noise = torch.randn(p.shape, generator=generator)
            noise += 0.1 * noise.sign()
            start = p.clone()
            p.add_((noise * max(0.3, 0.5 * float(p.float().abs().mean()))).to(p.dtype))
            assert (p != start).all(), name


@dataclass
class Awake:
    """A model with a moved adapter, active; `base` holds the pretrained tensors in float64."""

    model: Net
    adapter: Adapter
    config: Any
    x: Tensor
    kind: str
    base: dict[str, Tensor] = field(default_factory=dict)

    def run(self) -> Tensor:
        return self.model(self.x)

    def declared(self) -> dict[str, Tensor]:
        """The trained tensors as float64 leaves."""
        return {
            name: p.detach().double().requires_grad_()
            for name, p in self.adapter.named_parameters()
        }

    def frozen(self) -> dict[str, Tensor]:
        """What layers share, "layer.shared.A", and what a layer has that is frozen, "layer.A", in
        float64.
        """
        return {
            f"{module}.{name}": b.double()
            for module, site in self.adapter.sites.items()
            for name, b in site.named_buffers()
            if name not in site.buffer_names
        }


def awake(
    variant: str,
    kind: str = "linear",
    dtype: torch.dtype = torch.float32,
    bias: bool = True,
    name: str = "default",
    model: Net | None = None,
    held: str = "float32",
    **changes: Any,
) -> Awake:
    """Attach a method, its tensors `held` in a dtype, and leave the starting point, where every
    update is zero and every test would pass.

    Checks that the adapter then changes the output at all.
    """
    model = net(kind, dtype, bias, variant=variant) if model is None else model
    made = config(variant, dtype=held, **changes)
    base = base_tensors(model)
    adapter = weft.attach(model, made, name=name)
    move(adapter)
    found = Awake(model, adapter, made, inputs(kind, dtype=dtype), kind, base)
    with torch.no_grad(), weft.use(model, None):
        without = found.run()
    with torch.no_grad(), weft.use(model, name):
        change = distance(found.run(), without)
    assert change > max(0.05, 3 * TOLERANCE[dtype]), (
        f"the adapter changes nothing to speak of: {change}"
    )
    return found


def base_tensors(model: nn.Module) -> dict[str, Tensor]:
    """The pretrained tensors in float64, whatever is attached."""
    with weft.use(model, None) if weft.adapters(model) else nullcontext():
        return {
            key: value.clone().double()
            for key, value in model.state_dict().items()
            if ".weft." not in key
        }


def base_weight(a: Awake, module: str, declared: Mapping[str, Tensor]) -> Tensor:
    """W [out, in] of a layer, trained where the adapter trains it as a copy."""
    stored = declared.get(f"{module}.weight", a.base[f"{module}.weight"])
    return stored.t() if module == "layer" and a.kind != "linear" else stored


def oracle_weight(
    a: Awake, module: str, declared: Mapping[str, Tensor], norms: Mapping[str, Tensor] | None = None
) -> Tensor:
    """W' [out, in] of a layer."""
    W = base_weight(a, module, declared)
    if module not in a.adapter.sites:
        return W
    own = _own(a, module, declared)
    if norms is not None:
        own["norms"] = norms[module]
    return oracle.ORACLES[type(a.config).__name__](W, own, a.config)


def _own(a: Awake, module: str, declared: Mapping[str, Tensor]) -> dict[str, Tensor]:
    prefix = f"{module}."
    return {
        k.removeprefix(prefix): v
        for k, v in {**a.frozen(), **declared}.items()
        if k.startswith(prefix)
    }


def oracle_output(
    a: Awake,
    declared: Mapping[str, Tensor],
    x: Tensor | None = None,
    norms: Mapping[str, Tensor] | None = None,
) -> Tensor:
    """The model's output in float64 from its weights alone: no layer of torch, no code of Weft."""
    x = a.x if x is None else x
    h = torch.eye(7, dtype=torch.float64)[x] if a.kind == "embedding" else x.double()
    forward = oracle.FORWARDS.get(type(a.config).__name__)
    for module in ("layer", "mid", "head"):
        adapted = forward is not None and module in a.adapter.sites
        W = (
            base_weight(a, module, declared)
            if adapted
            else oracle_weight(a, module, declared, norms)
        )
        bias = declared.get(f"{module}.bias", a.base.get(f"{module}.bias"))
        y = h @ W.t() if bias is None else h @ W.t() + bias
        h = (
            forward(h, y, _own(a, module, declared), a.config)
            if adapted and forward is not None
            else y
        )
        h = h if module == "head" else torch.tanh(h)
        if module == "layer" and "body" in a.model._modules:
            of_body = {
                k.removeprefix("body."): v
                for k, v in {**a.base, **declared}.items()
                if not k.startswith("shared.")
            }
            shared = {k: v for k, v in declared.items() if k.startswith("shared.")}
            h = oracle.gpt2(
                h, {**of_body, **shared}, a.config if hasattr(a.config, "where") else None
            )
    return h


def distance(found: Tensor, wanted: Tensor) -> float:
    """Largest difference, relative to the largest number wanted; infinity where a number is not
    finite.
    """
    assert found.shape == wanted.shape, (found.shape, wanted.shape)
    a, b = found.detach().double(), wanted.detach().double()
    if not a.numel():
        return 0.0
    gap, scale = float((a - b).abs().max()), float(b.abs().max())
    if gap != gap:
        return float("inf")
    return gap / scale if scale else gap


def check_close(found: Tensor, wanted: Tensor, dtype: torch.dtype, what: str = "") -> None:
    gap = distance(found, wanted)
    assert gap <= TOLERANCE[dtype], (
        f"{what or 'values'} differ by {gap:.2e} (relative; allowed {TOLERANCE[dtype]:.0e})"
    )


def set_way(monkeypatch: Any, way: str) -> None:
    """Make layers attached from here on compute by one way of ops/plan.py: tiny, native or fused."""
    monkeypatch.setattr(plan, "TINY", plan.TINY if way == "tiny" else 0)
    monkeypatch.setattr(plan, "CALLS_OF_FUSED", 0 if way == "fused" else plan.CALLS_OF_FUSED)


def reference_paths(monkeypatch: Any, value: str = "1") -> None:
    """Compute everything by the plain definitions from here on."""
    monkeypatch.setenv("WEFT_REFERENCE", value)
    fallback.refresh()


def same_bits(a: Tensor, b: Tensor) -> bool:
    """Equal to the last bit, -0.0 and NaN included."""
    return (
        a.dtype == b.dtype
        and a.shape == b.shape
        and torch.equal(
            a.detach().reshape(-1).contiguous().view(torch.uint8),
            b.detach().reshape(-1).contiguous().view(torch.uint8),
        )
    )
