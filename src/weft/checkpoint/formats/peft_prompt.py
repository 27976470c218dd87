"""Prefix and prompt tuning in peft's formats: one tensor, which names no module.

prompt_embeddings [n, layers * 2 * width]   PREFIX_TUNING: keys and values of the layers in order, heads side by side
prompt_embeddings [n, width]                PROMPT_TUNING: the embeddings before the prompt
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from ...errors import CheckpointError, UnsupportedError
from ...methods import PreEmbed, Prefix
from ...model import prompts
from ...model.structure import Structure
from ..checkpoint import Checkpoint, CheckpointLayer, Written
from ..matching import bare
from ..problems import report_extra, take
from .peft_layers import dtype_of, refuse_fields, take_base_tensors
from .peft_tokens import why_none

_TENSOR = "prompt_embeddings"
_SUPPORTED = {
    "num_virtual_tokens": int,
    "token_dim": int,
    "num_layers": int,
    "num_attention_heads": int | None,
    "num_transformer_submodules": int | None,
    # how peft initialised or computed the tensor in the file
    "encoder_hidden_size": Any,
    "prefix_projection": Any,
    "init_weights": Any,
    "prompt_tuning_init": Any,
    "prompt_tuning_init_text": Any,
    "tokenizer_name_or_path": Any,
    "tokenizer_kwargs": Any,
}


class PrefixFormat:
    """Keys and values of every layer. See the module's text."""

    name = "PREFIX_TUNING"
    peft_reads_it = True
    stores_projections = False
    methods: ClassVar[tuple[type[Any], ...]] = (Prefix,)

    def count_layers(self, config: Mapping[str, Any]) -> Any:
        """Returns the number of layers in the file."""
        return config.get("num_layers")

    def config(self, n: int, **common: Any) -> Any:
        """Returns the configuration with n virtual tokens."""
        return Prefix(n=n, **common)

    def why_not(self, checkpoint: Checkpoint, model: nn.Module | None = None) -> str | None:
        config: Any = checkpoint.config
        if checkpoint.selected:
            return "it trains base tensors beside it"
        if checkpoint.tokens:
            return why_none(checkpoint)
        if getattr(config, "l_i", 0):
            return "peft has no tokens behind the prompt"
        if getattr(config, "positions", "shifted") != "shifted":
            return "in peft real tokens count their positions behind the prefix"
        shapes = {layer.shape for layer in checkpoint.sites.values()}
        if len(shapes) > 1 or any(out != in_ for out, in_ in filter(None, shapes)):
            return "its layers have keys and values of several widths"
        return "its model is not known" if model is None else self.why_not_model(model)

    def write(self, checkpoint: Checkpoint, model: nn.Module | None = None) -> Written:
        root: Any = bare(model) if model is not None else None
        layers = list(checkpoint.sites.values())
        tensor = torch.cat([t for layer in layers for t in layer.tensors.values()], dim=1)
        # peft splits the width into key-value heads.
        shape: Any = prompts.injection_point(Structure.of(root)).module.config  # type: ignore[union-attr]
        heads = getattr(shape, "num_key_value_heads", None) or shape.num_attention_heads
        config = {
            "peft_type": self.name,
            "task_type": "CAUSAL_LM",
            "inference_mode": True,
            "num_virtual_tokens": tensor.shape[0],
            "token_dim": layers[0].known_shape()[0],
            "num_transformer_submodules": 1,
            "num_attention_heads": int(heads),
            "num_layers": len(layers),
            "base_model_name_or_path": getattr(root.config, "name_or_path", None) or None,
        }
        return Written({_TENSOR: tensor.contiguous()}, config, [])

    def recognises(self, config: Mapping[str, Any]) -> bool:
        return config.get("peft_type") == self.name

    def read(self, config: Mapping[str, Any], tensors: dict[str, Tensor]) -> Checkpoint:
        """Splits prompt_embeddings [n, sum of the layers' widths] into one tensor per layer.

        Raises UnsupportedError if a field or the task type is not supported, and CheckpointError if
        a size is not a whole number.
        """
        refuse_fields(config, _SUPPORTED, self.name)
        task, parts = config.get("task_type"), config.get("num_transformer_submodules")
        if task not in ("CAUSAL_LM", None) or parts not in (1, None):
            raise UnsupportedError(
                f"peft's {self.name} for task_type={task!r} with num_transformer_submodules="
                f"{parts!r} gives a model other inputs than Weft does; Weft reads that of "
                "CAUSAL_LM."
            )
        n, width = config.get("num_virtual_tokens"), config.get("token_dim")
        count = self.count_layers(config)
        if not all(type(value) is int and value > 0 for value in (n, width, count)):
            raise CheckpointError(
                f"peft's {self.name} configuration must have num_virtual_tokens, token_dim and "
                f"num_layers as whole numbers; it has {n!r}, {width!r} and {count!r}."
            )
        saved = config.get("modules_to_save") or ()
        built = self.config(int(n or 0), dtype=dtype_of(tensors), modules_to_save=saved)
        checkpoint = Checkpoint(built, "peft", self.name, in_order=True)
        shape = (int(width or 0), int(width or 0))
        rest = dict(tensors)
        widths = [wanted[1] for wanted in built.shapes(*shape).values()]
        sizes, given = (int(n or 0), int(count) * sum(widths)), tensors.get(_TENSOR)
        if given is None or tuple(given.shape) == sizes:
            for i in range(int(count) if given is not None else 1):
                checkpoint.sites[f"layer {i}"] = CheckpointLayer(
                    built, kind=built.where, shape=shape
                )
            _split_layers(checkpoint, rest)
        else:  # the layers that a file claims are made only if its tensor has them
            take(rest, _TENSOR, sizes, f"{count} layers", checkpoint.problems)
        take_base_tensors(checkpoint, rest)
        report_extra(checkpoint.problems, rest, [_TENSOR])
        return checkpoint

    def restore(
        self, checkpoint: Checkpoint, tensors: dict[str, Tensor], manifest: Mapping[str, Any]
    ) -> None:
        """Fills the layers from prompt_embeddings [n, sum of the layers' widths]."""
        _split_layers(checkpoint, tensors)
        report_extra(checkpoint.problems, tensors, [_TENSOR])

    def why_not_model(self, root: nn.Module) -> str | None:
        """Returns why peft computes something else in this model from the same tensors, or None."""
        model = bare(root)
        entry = prompts.injection_point(Structure.of(model))
        encoder_decoder = getattr(getattr(model, "config", None), "is_encoder_decoder", False)
        if encoder_decoder or entry is None or not entry.decoder:
            return "it is no decoder, and there peft puts virtual tokens elsewhere"
        if not entry.name or not callable(getattr(model, "generate", None)):
            return "it is no causal language model, for which alone peft's file is defined here"
        inner: Any = entry.module.config
        if getattr(inner, "sliding_window", None) and getattr(inner, "use_sliding_window", True):
            return "its attention has a sliding window, which peft lets pass over the prefix"
        return None


class PromptFormat(PrefixFormat):
    """Embeddings before the prompt. See the module's text."""

    name = "PROMPT_TUNING"
    methods = (PreEmbed,)

    def count_layers(self, config: Mapping[str, Any]) -> Any:
        return 1

    def config(self, n: int, **common: Any) -> Any:
        return PreEmbed(l_p=n, l_i=0, **common)


def _split_layers(checkpoint: Checkpoint, tensors: dict[str, Tensor]) -> None:
    """Takes the tensor and splits it into the layers."""
    parts = [
        (layer, name, shape)
        for layer in checkpoint.sites.values()
        for name, shape in layer.rule.shapes(*layer.known_shape()).items()
    ]
    wanted = (parts[0][2][0], sum(shape[1] for _, _, shape in parts))
    what = f"{len(checkpoint.sites)} layers"
    tensor = take(tensors, _TENSOR, wanted, what, checkpoint.problems)
    start = 0
    for layer, name, shape in parts:
        layer.keys[name] = _TENSOR
        if tensor is not None:
            layer.tensors[name] = tensor[:, start : start + shape[1]].contiguous()
        start += shape[1]
