"""How a base is loaded: the names that a configuration and the command line have for its dtype, for
its device, and for how transformers quantises it while it loads.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Iterable
from importlib import import_module
from typing import Any

from ..errors import ConfigError

DTYPES = ("auto", "float32", "bfloat16", "float16")  # "auto": as stored
DEVICES = ("auto", "cpu", "cuda")
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
    """Returns the arguments of `from_pretrained` for a base with weights in `dtype` ("auto": as stored).

    They are quantised unless name is None, but for the heads and the modules in `trained`, which are
    trained in full. `make` returns a model for a configuration.
    """
    import torch

    if name is None:
        return {"dtype": "auto" if dtype == "auto" else getattr(torch, dtype)}
    stored = getattr(model_config, "dtype", None) or torch.float32
    found = stored if dtype == "auto" else getattr(torch, dtype)
    with torch.device("meta"):
        model = make(model_config)
    parts = [part for part, _ in model.named_children()]
    heads = [p for p in parts if p != model.base_model_prefix]
    if len(heads) == len(parts):  # no part is the body, so transformers finds the heads
        whole = None
    else:
        whole = [*heads, *trained]
    return {"dtype": found, "quantization_config": _quantization_config(name, found, whole)}


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
