"""LoRA files of diffusers: pytorch_lora_weights.safetensors, with the component of the pipeline
before the names, "unet.mid_block.attentions.0.proj_in.lora_A.weight", or without it.

Since diffusers 0.35 the file's metadata hold peft's configuration of every component. A file
without it has alpha = r, unless there is an alpha per layer: that is how diffusers reads it.
Earlier names of A and B: lora.down and lora.up, lora_linear_layer.down and .up, and those of
attention processors; other tools write lora_down and lora_up.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping
from typing import Any

from torch import Tensor

from ...errors import CheckpointError, UnsupportedError
from ...untrusted import json_text
from ..checkpoint import Checkpoint
from ..naming import COMPONENTS, Naming
from . import loose
from .peft_layers import PREFIX, refuse_fields
from .peft_lora import PLAIN_INITS, SUPPORTED
from .peft_patterns import FirstFit

_METADATA = "lora_adapter_metadata"
_PARTS = {
    ".lora_A.weight": "A",
    ".lora_B.weight": "B",
    ".lora_magnitude_vector.weight": "m",
    ".lora_magnitude_vector": "m",
    ".lora.down.weight": "A",
    ".lora.up.weight": "B",
    ".lora_linear_layer.down.weight": "A",
    ".lora_linear_layer.up.weight": "B",
    ".lora_down.weight": "A",
    ".lora_up.weight": "B",
    ".lora_mid.weight": "mid",
    ".dora_scale": "dora_scale",
    ".alpha": "alpha",
}
_PROCESSOR = re.compile(r"\.processor\.to_(q|k|v|out)_lora\.(down|up)\.weight$")
_TARGETS = "target_modules"


class DiffusersFormat:
    """See the module's text."""

    name = "diffusers"

    def recognises(self, keys: Collection[str], metadata: Mapping[str, str]) -> bool:
        # A file of peft without its configuration does not say alpha, and peft's is not the rank.
        if any(key.startswith(PREFIX) for key in keys):
            return False
        endings = tuple(_PARTS)
        return _METADATA in metadata or any(
            key.endswith(endings) or _PROCESSOR.search(key) for key in keys
        )

    def read(self, metadata: Mapping[str, str], tensors: dict[str, Tensor]) -> Checkpoint:
        """Reads A, B and, for DoRA, m of every layer.

        Raises UnsupportedError if a field of peft is not supported, CheckpointError for metadata
        that diffusers does not write.
        """
        tensors = {_PROCESSOR.sub(_modern, key): t for key, t in tensors.items()}
        layers, left = loose.split(tensors, _PARTS)
        configs = _configs(metadata)
        alphas = {name: FirstFit(c, "alpha_pattern") for name, c in configs.items()}

        def alpha_of(module: str) -> float | None:
            component, _, rest = module.partition(".")
            name, inner = (component, rest) if component in configs else ("", module)
            if name not in configs:
                return None
            own = alphas[name].value(inner)
            alpha: float = configs[name].get("lora_alpha", 8) if own is None else own
            return float(alpha)

        fields = {"use_rslora": _one(configs, "use_rslora")}
        checkpoint = loose.read(self.name, tensors, layers, Naming(flat=False), fields, alpha_of)
        checkpoint.problems += [f"extra: {key!r} is no tensor of a LoRA" for key in left]
        if not configs and not any("alpha" in layer.keys for layer in layers.values()):
            checkpoint.notes.append("the file says no alpha; it is the rank, as diffusers reads it")
        return checkpoint


def _modern(match: re.Match[str]) -> str:
    which, side = match.groups()
    return f".to_{'out.0' if which == 'out' else which}.lora.{side}.weight"


def _configs(metadata: Mapping[str, str]) -> dict[str, dict[str, Any]]:
    """peft's configuration of every component; of the whole file under "". Empty if there is none."""
    if _METADATA not in metadata:
        return {}
    try:
        fields = json_text.loads(metadata[_METADATA])
    except ValueError as error:
        raise CheckpointError(f"{_METADATA} is no readable JSON: {error}.") from None
    if not isinstance(fields, dict):
        raise CheckpointError(f"{_METADATA}: an object is expected.")
    found: dict[str, dict[str, Any]] = {}
    for key, value in fields.items():
        component, dot, field = key.partition(".")
        own = (component, field) if dot and component in COMPONENTS else ("", key)
        found.setdefault(own[0], {})[own[1]] = value
    for config in found.values():
        config.pop(_TARGETS, None)  # the tensors say which layers there are
        refuse_fields(config, SUPPORTED, "LoRA")
        init = config.get("init_lora_weights")
        if init not in PLAIN_INITS:
            raise UnsupportedError(
                f"init_lora_weights={init!r}: the adapter belongs to a base that its start has changed, "
                "and the file does not have that base."
            )
    return found


def _one(configs: Mapping[str, Mapping[str, Any]], field: str) -> bool:
    """A field that must be the same for all components."""
    values = {bool(config.get(field)) for config in configs.values()}
    if len(values) > 1:
        raise UnsupportedError(
            f"the components of the file differ in {field}. Load them one by one."
        )
    return values.pop() if values else False
