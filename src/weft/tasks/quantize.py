"""How a base is loaded: the names that a configuration and the command line have for its dtype, for
its device, and for how transformers quantises it while it loads.
"""

from __future__ import annotations

import importlib.util
import math
from collections.abc import Callable, Iterable
from importlib import import_module
from typing import Any

from ..errors import ConfigError

DTYPES = ("auto", "float32", "bfloat16", "float16")  # "auto": as stored
DEVICES = ("auto", "cpu", "cuda")
_BLOCK = 64  # numbers that share a scale in 4 bits
# The name -> the package that it needs.
QUANTIZE = {
    "nf4": "bitsandbytes",
    "fp4": "bitsandbytes",
    "int8": "bitsandbytes",
    "int8-weight": "torchao",
    "float8-weight": "torchao",
}


def check_package(name: str, option: str = "model.quantize") -> None:
    """Raises ConfigError if the package that a kind of quantisation needs is not installed."""
    package = QUANTIZE[name]
    if importlib.util.find_spec(package) is None:
        raise ConfigError(
            f"{option}={name}: needs the package {package}, which is not installed: pip install "
            "'weft[bases]'."
        )


def loading_options(
    name: str | None,
    dtype: str,
    model_config: Any,
    make: Callable[[Any], Any],
    trained: Iterable[str] = (),
) -> dict[str, Any]:
    """Returns the arguments of `from_pretrained` for a base with weights in `dtype` ("auto": as
    stored).

    They are quantised unless name is None, but for the heads and the modules in `trained`, which
    are trained in full. `make` returns a model for a configuration.
    """
    import torch

    if name is None:
        return {"dtype": "auto" if dtype == "auto" else getattr(torch, dtype)}
    stored = getattr(model_config, "dtype", None) or torch.float32
    found = stored if dtype == "auto" else getattr(torch, dtype)
    with torch.device("meta"):
        model = make(model_config)
    return {
        "dtype": found,
        "quantization_config": _quantization_config(name, found, _whole(model, trained)),
    }


def _whole(model: Any, trained: Iterable[str] = ()) -> list[str] | None:
    """The parts that stay as they are; None: those that transformers finds."""
    parts = [part for part, _ in model.named_children()]
    heads = [p for p in parts if p != model.base_model_prefix]
    # If no part is the body, transformers finds the heads.
    return None if len(heads) == len(parts) else [*heads, *trained]


def packed_layers(name: str, model: Any) -> dict[str, Any]:
    """Returns the layers of a model that a kind of quantisation packs, by name."""
    from torch import nn
    from transformers.pytorch_utils import Conv1D
    from transformers.quantizers.base import get_keys_to_not_convert
    from transformers.quantizers.quantizers_utils import should_convert_module

    whole = _whole(model)
    left = get_keys_to_not_convert(model) if whole is None else whole
    left = [*left, *(getattr(model, "_keep_in_fp32_modules", None) or ())]
    turned = (Conv1D,) if QUANTIZE[name] == "bitsandbytes" else ()
    return {
        n: m
        for n, m in model.named_modules()
        if (type(m) is nn.Linear or isinstance(m, turned)) and should_convert_module(n, left)
    }


def packed_size(name: str, out: int, in_: int) -> tuple[int, int]:
    """Returns the bytes of codes and of scales that W [out, in] has, packed with a name of
    `QUANTIZE`.
    """
    numbers = out * in_
    match name:
        case "nf4" | "fp4":
            return math.ceil(numbers / 2), 4 * math.ceil(numbers / _BLOCK)
        case "int8-weight":
            return numbers, 5 * out  # a scale and a zero point
        case _:
            return numbers, 4 * out


def kind_of_files(found: Any) -> tuple[str | None, list[str]]:
    """Returns the name of `QUANTIZE` of a model's own `quantization_config`, or None and why a plan
    does not count with it.
    """
    own: dict[str, Any] = found if isinstance(found, dict) else found.to_dict()
    method = str(getattr(own.get("quant_method"), "value", own.get("quant_method")))
    if own.get("load_in_8bit"):
        return "int8", []
    if own.get("load_in_4bit") and not own.get("bnb_4bit_use_double_quant"):
        return str(own.get("bnb_4bit_quant_type", "fp4")), []
    said = f"the model's own files are quantised by {method}, and its weights are counted as if they were not"
    if method not in ("bitsandbytes", "torchao", "quanto", "hqq"):
        said += "; Weft cannot unpack them, so attaching to the model as it loads is refused"
    return None, [f"{said}."]


def code(name: str, dtype: str) -> str:
    """Returns the Python text of `loading_options` for the model card."""
    products = "torch.float32" if dtype == "auto" else f"torch.{dtype}"
    if name in ("nf4", "fp4"):
        return (
            f'BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="{name}", '
            f"bnb_4bit_compute_dtype={products})"
        )
    if name == "int8":
        return "BitsAndBytesConfig(load_in_8bit=True)"
    kind = {"int8-weight": "Int8WeightOnlyConfig", "float8-weight": "Float8WeightOnlyConfig"}[name]
    return f"TorchAoConfig(torchao.quantization.{kind}())"


def _quantization_config(name: str, dtype: Any, whole: list[str] | None) -> Any:
    import transformers

    if name in ("nf4", "fp4"):
        return transformers.BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type=name,
            bnb_4bit_compute_dtype=dtype,
            llm_int8_skip_modules=whole,  # of 4 bits, too
        )
    if name == "int8":
        return transformers.BitsAndBytesConfig(load_in_8bit=True, llm_int8_skip_modules=whole)
    torchao = import_module("torchao.quantization")
    makes = {
        "int8-weight": torchao.Int8WeightOnlyConfig,
        "float8-weight": torchao.Float8WeightOnlyConfig,
    }
    return transformers.TorchAoConfig(makes[name](), modules_to_not_convert=whole)
