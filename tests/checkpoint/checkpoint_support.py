"""What the tests of the checkpoint room share: files to tamper with, models that must stay as they
are, small bases.
"""

from __future__ import annotations

import json
import shutil
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

import weft
from support import awake, net

TENSORS, CONFIG = "adapter_model.safetensors", "adapter_config.json"
# Neither square nor powers of two; head counts must divide the width.
TINY = {
    "vocab_size": 61,
    "hidden_size": 24,
    "intermediate_size": 44,
    "num_hidden_layers": 2,
    "num_attention_heads": 3,
    "num_key_value_heads": 3,
    "max_position_embeddings": 32,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
GPT2 = {"n_embd": 24, "n_layer": 2, "n_head": 3, "n_positions": 32}


def tiny(model: str, config: str, **changes: Any) -> Any:
    """A small seeded transformers model with every bias moved off zero, in eval mode."""
    import transformers

    transformers.logging.set_verbosity_error()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        made = getattr(transformers, model)(
            getattr(transformers, config)(**{**TINY, **changes})
        ).eval()
        for name, p in made.named_parameters():
            if name.endswith("bias"):
                nn.init.normal_(p, std=0.3)
    return made


def llama(layers: int = 2, name: str = "Llama", **changes: Any) -> Any:
    """Or Mistral, whose tensors have the same names and shapes."""
    return tiny(f"{name}ForCausalLM", f"{name}Config", num_hidden_layers=layers, **changes)


def untied_gpt2() -> Any:
    return tiny("GPT2LMHeadModel", "GPT2Config", tie_word_embeddings=False, **GPT2)


CLASSIFIERS = {
    "bert": ("BertForSequenceClassification", "BertConfig", ["query", "value"], ["classifier"]),
    "roberta": (
        "RobertaForSequenceClassification",
        "RobertaConfig",
        ["query", "dense"],
        ["classifier"],
    ),
    "distilbert": (
        "DistilBertForSequenceClassification",
        "DistilBertConfig",
        ["q_lin", "lin1"],
        ["classifier"],
    ),
    "llama": ("LlamaForSequenceClassification", "LlamaConfig", ["q_proj", "up_proj"], ["score"]),
}
DISTIL = {"dim": 24, "hidden_dim": 44, "n_layers": 2, "n_heads": 3}


def classifier(which: str) -> Any:
    model, made, *_ = CLASSIFIERS[which]
    return tiny(model, made, num_labels=3, **(DISTIL if which == "distilbert" else {}))


def ids(rows: int = 2) -> Tensor:
    return torch.randint(3, 61, (rows, 7), generator=torch.Generator().manual_seed(5))


def logits(model: nn.Module, x: Tensor | None = None) -> Tensor:
    with torch.no_grad():
        out = model(ids() if x is None else x)
    return out if isinstance(out, Tensor) else out.logits


def read(directory: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Tensors and metadata, by the library alone."""
    with safe_open(str(directory / TENSORS), framework="pt") as file:
        return {key: file.get_tensor(key) for key in file.keys()}, dict(file.metadata() or {})  # noqa: SIM118


def rewrite(
    directory: Path, change: Callable[[dict[str, Tensor]], Any], metadata: bool = True
) -> None:
    """Change the tensors of a file and leave all else, or take the header away too."""
    tensors, head = read(directory)
    change(tensors)
    save_file(tensors, str(directory / TENSORS), metadata=head if metadata else {"format": "pt"})


def edit_config(directory: Path, **changes: Any) -> None:
    path = directory / CONFIG
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def config_of(directory: Path) -> dict[str, Any]:
    return json.loads((directory / CONFIG).read_text())


def copied(directory: Path, name: str = "copy") -> Path:
    target = directory.with_name(name)
    shutil.rmtree(target, ignore_errors=True)
    shutil.copytree(directory, target)
    return target


def photograph(model: nn.Module) -> dict[str, Any]:
    """Everything that a failed load could have changed."""
    return {
        "keys": list(model.state_dict()),
        "values": {k: v.clone() for k, v in model.state_dict().items()},
        "classes": [type(m) for m in model.modules()],
        "grad": [p.requires_grad for p in model.parameters()],
        "identity": [id(p) for p in model.parameters()],
        "adapters": list(weft.adapters(model)),
        "attributes": {k: id(v) for k, v in vars(model).items() if not k.startswith("_weft_memo")},
    }


@contextmanager
def untouched(model: nn.Module, x: Tensor | None = None) -> Iterator[None]:
    """The model is the same after the block as before: keys, bits, classes, flags, attributes,
    outputs.
    """
    before, out = photograph(model), None if x is None else logits(model, x)
    yield
    after = photograph(model)
    values = before.pop("values"), after.pop("values")
    assert before == after
    assert all(torch.equal(values[0][k], values[1][k]) for k in values[0])
    assert out is None or torch.equal(out, logits(model, x))


def refused(
    model: nn.Module,
    directory: Path,
    *texts: str,
    error: type[Exception] = weft.CheckpointError,
    x: Tensor | None = None,
) -> str:
    """`load` refuses, its message holds all these texts, and the model is untouched."""
    with untouched(model, x), pytest.raises(error) as caught:
        weft.load(model, directory)
    message = str(caught.value)
    for text in texts:
        assert text in message, f"{text!r} is not in:\n{message}"
    return message


@contextmanager
def quiet(*allowed: str) -> Iterator[list[str]]:
    """Let peft and transformers warn; what they said is in the list, less what is allowed."""
    said: list[str] = []
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        yield said
    known = (*allowed, "is_gradient_checkpointing", "torch_dtype")
    said += [str(w.message) for w in caught if not any(text in str(w.message) for text in known)]


def peft_of(base: nn.Module, config: Any, seed: int = 3, name: str = "default") -> Any:
    """The base under peft with every trained number moved, in eval mode."""
    import peft

    with quiet():
        model = peft.get_peft_model(base, config, adapter_name=name)
    wake(model, seed)
    return model.eval()


def wake(model: nn.Module, seed: int = 3) -> None:
    """Move everything that peft trains."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in model.parameters():
            if p.requires_grad:
                p.add_((0.3 * torch.randn(p.shape, generator=generator)).to(p.dtype))


def peft_reads(base: nn.Module, directory: Path, *allowed: str) -> Any:
    """`PeftModel.from_pretrained` without a warning, but for those allowed."""
    import peft

    with quiet(*allowed) as said:
        model = peft.PeftModel.from_pretrained(base, str(directory)).eval()
    assert not said, said
    return model


def peft_saves(model: Any, directory: Path) -> Path:
    with quiet():
        model.save_pretrained(str(directory))
    return directory


def close(found: Tensor, wanted: Tensor, base: Tensor, tolerance: float = 1e-5) -> None:
    """Equal up to the tolerance, relative, and far from the base, so that something was
    compared.
    """
    scale = float(wanted.abs().max())
    gap, effect = (
        float((found - wanted).abs().max()) / scale,
        float((wanted - base).abs().max()) / scale,
    )
    assert effect > 0.01, f"the adapter changes nothing to speak of: {effect}"
    assert gap <= tolerance, (
        f"{gap:.2e} apart (relative; allowed {tolerance:.0e}), effect {effect:.2e}"
    )


def move(parameters: Mapping[str, Tensor], seed: int = 2) -> None:
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in parameters.values():
            p.add_((0.3 * torch.randn(p.shape, generator=generator)).to(p.dtype))


def attached(model: nn.Module, config: Any, name: str = "default", seed: int = 2) -> Any:
    """A Weft adapter off its starting point."""
    adapter = weft.attach(model, config, name=name)
    move(dict(adapter.named_parameters()), seed)
    return adapter


def peft_file(folder: Path, method: str = "LoRA", **changes: Any) -> Path:
    """What peft writes for the base of `support.net`."""
    import peft

    known = {"r": 3, "target_modules": ["layer", "mid"], **changes}
    with quiet():
        made = (
            peft.VeraConfig(**known)
            if method == "VeRA"
            else peft.LoraConfig(lora_alpha=5, use_dora=method == "DoRA", **known)
        )
    return peft_saves(peft_of(net(), made), folder)


# Who wrote a file in which every layer has keys of its own, and by which method
LAYERED = [
    ("weft", "LoRA"),
    ("weft", "DoRA"),
    ("weft", "VeRA"),
    ("peft", "LoRA"),
    ("peft", "DoRA"),
    ("peft", "VeRA"),
]


def saved(folder: Path, writer: str, method: str) -> tuple[Path, Tensor]:
    """Such a file, and an input for its base."""
    a = awake(method)
    if writer == "peft":
        return peft_file(folder, method), a.x
    return weft.save(a.model, folder, projections=method == "VeRA"), a.x


def key_of(directory: Path, part: str = "") -> str:
    """One of the keys of the layer `mid`."""
    return next(k for k in read(directory)[0] if ".mid." in k and part in k)
