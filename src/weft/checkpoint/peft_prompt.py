"""Prefix and prompt tuning in peft's layout, both ways: one tensor, which names no module.

prompt_embeddings [n, layers * 2 * width]   PREFIX_TUNING: keys and values of the layers in order, heads side by side
prompt_embeddings [n, width]                PROMPT_TUNING: the embeddings before the prompt
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import CheckpointError, UnsupportedError
from ..methods import PreEmbed, Prefix
from ..model import prompts
from ..model.adapter import Adapter
from .content import Stored, StoredSite, take
from .header import finished, trained_tensors
from .matching import bare
from .peft_common import dtype_of, refuse_fields

KEY = "prompt_embeddings"
_CARRIED = (
    "num_virtual_tokens",
    "token_dim",
    "num_layers",
    "num_attention_heads",
    "num_transformer_submodules",
    # how peft started or made the tensor that the file holds
    "encoder_hidden_size",
    "prefix_projection",
    "init_weights",
    "prompt_tuning_init",
    "prompt_tuning_init_text",
    "tokenizer_name_or_path",
    "tokenizer_kwargs",
)


def unlike_peft(root: nn.Module) -> str | None:
    """Why this model would compute something else under peft than under Weft with the same tensors,
    or None.
    """
    model = bare(root)
    config = getattr(model, "config", None)
    entry = prompts.entry_of(model)
    if getattr(config, "is_encoder_decoder", False) or entry is None or not entry.decoder:
        return "it is no decoder, and there peft puts virtual tokens elsewhere"
    if not entry.name or not callable(getattr(model, "generate", None)):
        return "it is no causal language model, for which alone peft's file is defined here"
    inner: Any = entry.module.config
    if getattr(inner, "sliding_window", None) and getattr(inner, "use_sliding_window", True):
        return "its attention has a sliding window, which peft lets pass over the prefix"
    return None


class Codec:
    """One of the two layouts."""

    def __init__(self, peft_type: str, method: type[Any]) -> None:
        self.PEFT_TYPE, self.method = peft_type, method

    def why_not(self, adapter: Adapter) -> str | None:
        """Why peft has no form for this adapter, or None."""
        config, shapes = adapter.config, {site.shape for site in adapter.layers.values()}
        if adapter.selected_tensors:
            return "it trains base tensors beside it"
        if getattr(config, "l_i", 0):
            return "peft knows no tokens behind the prompt"
        if getattr(config, "positions", "shifted") != "shifted":
            return "in peft real tokens count their positions behind the prefix"
        if len(shapes) > 1 or any(out != in_ for out, in_ in shapes):
            return "its layers have keys and values of several widths"
        return unlike_peft(adapter.model)

    def write(self, adapter: Adapter) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """The tensor, and adapter_config.json."""
        parts = [t for site in adapter.layers.values() for t in trained_tensors(site).values()]
        tensor = torch.cat(parts, dim=1)
        root: Any = bare(adapter.model)
        site = next(iter(adapter.layers.values()))
        heads = self._heads(site)
        return {KEY: tensor.contiguous()}, {
            "peft_type": self.PEFT_TYPE,
            "task_type": "CAUSAL_LM",
            "inference_mode": True,
            "num_virtual_tokens": tensor.shape[0],
            "token_dim": site.shape[0],
            "num_transformer_submodules": 1,
            "num_attention_heads": heads,
            "num_layers": len(adapter.layers) if self.method is Prefix else 1,
            "base_model_name_or_path": getattr(root.config, "name_or_path", None) or None,
        }

    @staticmethod
    def _heads(site: Any) -> int:
        """Key-value heads, into which peft cuts the width."""
        config: Any = site.base.module.config
        heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
        return int(heads)

    def fill(self, stored: Stored, tensors: dict[str, Tensor]) -> None:
        """Cut the tensor of a file of ours into its layers, which the manifest names."""
        names = [
            (site, name, shape)
            for site in stored.sites.values()
            for name, shape in site.rule.shapes(*(site.shape or (0, 0))).items()
        ]
        wanted = (names[0][2][0], sum(shape[1] for _, _, shape in names))
        self._cut(take(tensors, KEY, wanted, f"{len(stored.sites)} layers", stored.problems), names)

    def read(
        self, config: Mapping[str, Any], tensors: dict[str, Tensor]
    ) -> tuple[Stored, dict[str, Tensor]]:
        """What peft saved. The model tells which modules its layers are, in order."""
        kind = self.PEFT_TYPE
        refuse_fields(config, _CARRIED, kind)
        task, parts = config.get("task_type"), config.get("num_transformer_submodules")
        if task not in ("CAUSAL_LM", None) or parts not in (1, None):
            raise UnsupportedError(
                f"peft's {kind} for task_type={task!r} with num_transformer_submodules={parts!r} "
                "gives a "
                "model other inputs than Weft does; Weft reads that of CAUSAL_LM."
            )
        n, width, layers = (
            config.get(key) for key in ("num_virtual_tokens", "token_dim", "num_layers")
        )
        if self.method is PreEmbed:
            layers = 1
        if not all(type(value) is int and value > 0 for value in (n, width, layers)):
            raise CheckpointError(
                f"peft's {kind} configuration must say num_virtual_tokens, token_dim and "
                "num_layers as "
                f"whole numbers; it says {n!r}, {width!r} and {layers!r}."
            )
        fields = {"n": n} if self.method is Prefix else {"l_p": n, "l_i": 0}
        rule = self.method(
            **fields, dtype=dtype_of(tensors), modules_to_save=config.get("modules_to_save") or ()
        )
        stored = Stored(rule, "peft", in_order=True)
        shape = (int(width or 0), int(width or 0))
        for i in range(int(layers or 0)):
            place = f"layer {i}" if self.method is Prefix else "the input"
            stored.sites[place] = StoredSite(rule, kind=rule.at, shape=shape)
        rest = dict(tensors)
        self.fill(stored, rest)
        return stored, rest

    @staticmethod
    def _cut(tensor: Tensor | None, names: list[tuple[StoredSite, str, tuple[int, ...]]]) -> None:
        start = 0
        for site, name, shape in names:
            site.keys[name] = KEY
            if tensor is not None:
                site.tensors[name] = tensor[:, start : start + shape[1]].contiguous()
            start += shape[1]


PREFIX, PROMPT = Codec("PREFIX_TUNING", Prefix), Codec("PROMPT_TUNING", PreEmbed)


def codec_of(adapter: Adapter) -> Codec | None:
    """The layout that peft reads this adapter in; None where there is none."""
    codec = next((c for c in (PREFIX, PROMPT) if type(finished(adapter.config)) is c.method), None)
    return codec if codec is not None and codec.why_not(adapter) is None else None
