"""`model.quantize`: a base that transformers quantises while it loads, by name."""

from __future__ import annotations

import importlib.util
from importlib import import_module
from typing import Any

from ..errors import ConfigError

# The name -> the package that it needs.
QUANTIZE = {
    "nf4": "bitsandbytes",
    "fp4": "bitsandbytes",
    "int8": "bitsandbytes",
    "int8-weight": "torchao",
    "float8-weight": "torchao",
}


def check_package(name: str) -> None:
    """Raises ConfigError if the package of `model.quantize` is not installed."""
    package = QUANTIZE[name]
    if importlib.util.find_spec(package) is None:
        raise ConfigError(
            f"model.quantize={name}: needs the package {package}, which is not installed: pip install "
            "'weft[bases]'."
        )


def quantization_config(name: str, dtype: Any) -> Any:
    """Returns transformers' configuration for `from_pretrained`, with products in `dtype`."""
    import transformers

    if name in ("nf4", "fp4"):
        return transformers.BitsAndBytesConfig(
            load_in_4bit=True, bnb_4bit_quant_type=name, bnb_4bit_compute_dtype=dtype
        )
    if name == "int8":
        return transformers.BitsAndBytesConfig(load_in_8bit=True)
    torchao = import_module("torchao.quantization")
    makes = {
        "int8-weight": torchao.Int8WeightOnlyConfig,
        "float8-weight": torchao.Float8WeightOnlyConfig,
    }
    return transformers.TorchAoConfig(makes[name]())
