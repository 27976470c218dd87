"""Write tests/golden/adapters_*.safetensors: what the package `adapters` computes, for tests that
run without it.

`adapters` wants an older transformers, so it lives in an environment of its own:

    python3 -m venv /somewhere/adapters-venv
    /somewhere/adapters-venv/bin/pip install torch==2.13.0 adapters
    /somewhere/adapters-venv/bin/python scripts/golden_adapters.py

One file a model (tiny BERT, RoBERTa, GPT-2, Llama; random weights, float32):
    input_ids, base/<name of the tensor in transformers>, output of the base as base_output, and for every setting
    <setting>/output and <setting>/<block>.<attention|mlp>.<down|b_down|up|b_up|gain|shift>
The settings are those of `settings` below; README.md beside the files says which versions made
them.
"""

from __future__ import annotations

import platform
import re
from pathlib import Path

import adapters
import torch
import transformers
from adapters import DoubleSeqBnConfig, ParBnConfig, SeqBnConfig
from safetensors.torch import save_file

FOLDER = Path(__file__).resolve().parents[1] / "tests" / "golden"
COMMON = {"vocab_size": 61, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
ENCODER = {
    **COMMON,
    "hidden_size": 24,
    "intermediate_size": 44,
    "num_hidden_layers": 2,
    "num_attention_heads": 3,
    "max_position_embeddings": 32,
}
MODELS = {
    "bert": lambda: transformers.BertModel(transformers.BertConfig(**ENCODER)),
    "roberta": lambda: transformers.RobertaModel(transformers.RobertaConfig(**ENCODER)),
    "gpt2": lambda: transformers.GPT2Model(
        transformers.GPT2Config(n_embd=24, n_layer=2, n_head=3, n_positions=32, **COMMON)
    ),
    "llama": lambda: transformers.LlamaModel(
        transformers.LlamaConfig(num_key_value_heads=1, **ENCODER)
    ),
}


def settings(post_norm: bool) -> dict[str, object]:
    """A bottleneck of 24 // 5 = 4. In a pre-norm model Pfeiffer's adapter reads the MLP's output
    alone, as in its paper's text; the package's own default there, original_ln_before=True, would
    read the sum of residual and MLP output.
    """
    r = {"reduction_factor": 5}
    return {
        "houlsby": DoubleSeqBnConfig(**r),
        "pfeiffer": SeqBnConfig(original_ln_before=post_norm, **r),
        "drop": SeqBnConfig(original_ln_before=post_norm, leave_out=[0], **r),
        "lin": SeqBnConfig(original_ln_before=False, ln_before=True, **r),
        "parallel": ParBnConfig(**r),
    }


def named(key: str, name: str) -> str | None:
    """<block>.<place>.<tensor> of a parameter, or None where it is none of the adapter `name`."""
    part = "adapter_norm_before|adapter_down|adapter_up"
    found = re.search(rf"\.(\d+)\..*adapters\.{name}\.({part})(?:\.\d)?\.(weight|bias)$", key)
    if found is None:
        return None
    block, part, tensor = found.groups()
    where = "attention" if "attention" in key else "mlp"
    names = {
        "adapter_norm_before": ("gain", "shift"),
        "adapter_down": ("down", "b_down"),
        "adapter_up": ("up", "b_up"),
    }
    return f"{block}.{where}.{names[part][tensor == 'bias']}"


@torch.no_grad()
def record(name: str) -> dict[str, torch.Tensor]:
    """Everything that goes into the file of one model."""
    torch.manual_seed(sum(map(ord, name)))
    model = MODELS[name]().eval()
    for p in model.parameters():
        torch.nn.init.normal_(p, std=0.2) if p.ndim > 1 else p.add_(0.1 * torch.randn_like(p))
    ids = torch.randint(3, 61, (2, 7))
    tensors = {"input_ids": ids, "base_output": model(input_ids=ids).last_hidden_state}
    tensors |= {f"base/{key}": p.clone() for key, p in model.state_dict().items()}
    adapters.init(model)
    for setting, config in settings(post_norm=name in ("bert", "roberta")).items():
        model.add_adapter(setting, config=config)
        ours = {}
        for key, p in model.named_parameters():
            short = named(key, setting)
            if (
                short is not None
            ):  # a norm is there twice, and named_parameters gives its first name alone
                p.copy_((1.0 if short.endswith("gain") else 0.0) + 0.3 * torch.randn_like(p))
                ours[short] = p.clone()
        model.set_active_adapters(setting)
        tensors[f"{setting}/output"] = model(input_ids=ids).last_hidden_state
        tensors |= {f"{setting}/{short}": p for short, p in ours.items()}
        model.set_active_adapters(None)
        model.delete_adapter(setting)
    assert torch.equal(model(input_ids=ids).last_hidden_state, tensors["base_output"])
    return {key: t.contiguous() for key, t in tensors.items()}


def main() -> None:
    FOLDER.mkdir(exist_ok=True)
    for name in MODELS:
        path = FOLDER / f"adapters_{name}.safetensors"
        save_file(record(name), str(path))
        path.chmod(0o644)
    (FOLDER / "README.md").write_text(
        "# Golden files\n\n`adapters_*.safetensors` hold what the package `adapters` computes on "
        "tiny models with random "
        "weights.\nMade by `scripts/golden_adapters.py`, which says how and what they hold, "
        "with\n\n"
        f"    adapters {adapters.__version__}\n    transformers {transformers.__version__}\n    "
        f"torch {torch.__version__}\n"
        f"    Python {platform.python_version()}, {platform.machine()}\n",
        encoding="utf-8",
    )


if __name__ == "__main__":
    main()
