"""`weft doctor`: versions, devices, and which code runs."""

from __future__ import annotations

import argparse
import platform
import textwrap
from importlib import metadata
from typing import Any

from ..untrusted.printable import WIDTH
from .common import add_json_option, write_json

HELP = "versions, devices, which kernels run and why not"
PACKAGES = (
    "torch",
    "safetensors",
    "transformers",
    "accelerate",
    "peft",
    "numpy",
    "scipy",
    "scikit-learn",
    "statsmodels",
    "matplotlib",
    "pillow",
    "tqdm",
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_json_option(parser, "write it there too")


def run(args: argparse.Namespace) -> int:
    """Returns 0 if the self-test passes (adapt, train, merge and restore small models), else 1."""
    found = examine()
    for section, entries in found.items():
        if isinstance(entries, dict):
            print(f"{section}:")
            for name, value in entries.items():
                print(textwrap.fill(f"  {name:<14}{value}", WIDTH, subsequent_indent=" " * 16))
    write_json(args.json, {"schema": 1, **found})
    return (
        1 if any(str(result).startswith("failed") for result in found["self-test"].values()) else 0
    )


def examine() -> dict[str, Any]:
    """Returns versions, devices, kernels and the results of the self-test."""
    import torch

    from .. import __version__

    versions = {
        "weft": __version__,
        "python": platform.python_version(),
        **{name: _version(name) for name in PACKAGES},
    }
    devices = {"cpu": f"{platform.machine()}, {torch.get_num_threads()} threads", "cuda": _cuda()}
    return {
        "versions": versions,
        "devices": devices,
        "kernels": _kernels(),
        "self-test": _self_test(),
    }


def _kernels() -> dict[str, str]:
    import torch

    from ..model import fallback
    from ..ops import kernels

    x, device = torch.zeros(1, 1), torch.device("cuda" if torch.cuda.is_available() else "cpu")
    plain = fallback.of_the_tensors(x, x, None) or fallback.of_the_moment(x)
    plain = f"{fallback.VARIABLE}=1 asks for it" if fallback.reference_asked() else plain
    torch_form = kernels.why_not(device, torch.float32)
    return {
        "layers": "one fused function each (LoRA, VeRA and their kin)"
        if plain is None
        else f"plain definitions: {plain}",
        "Triton": f"runs on {device.type}"
        if torch_form is None
        else f"its torch forms run: {torch_form}",
        "torch.compile": "supported, without graph breaks; it compiles the plain definitions",
    }


def _version(package: str) -> str:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return "not installed" + (
            "" if package in ("torch", "safetensors") else ": pip install 'weft[all]'"
        )


def _cuda() -> str:
    import torch

    if torch.version.cuda is None:
        return "not available: this torch is built without CUDA"
    if not torch.cuda.is_available():
        return f"not available: torch is built for CUDA {torch.version.cuda} and sees no device"
    return ", ".join(torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count()))


def _self_test() -> dict[str, str]:
    """Runs every method on a small model: attach, backward, merge and unmerge (or a refusal),
    detach, and a check that the base is restored.
    """
    from .. import methods

    return {name: _run_method(method) for name, method in methods.METHODS.items()}


def _run_method(method: Any) -> str:
    import torch

    from ..errors import UnsupportedError, WeftError
    from ..methods.base import PromptMethod
    from ..model.attach import attach
    from ..model.detach import detach
    from ..model.merge import merge, unmerge

    config = method()
    if isinstance(config, PromptMethod) and _version("transformers").startswith("not installed"):
        return "not tested: it needs a model of transformers, which is not installed"
    model, x = _tiny_transformer() if isinstance(config, PromptMethod) else _two_blocks()
    before = {key: value.clone() for key, value in model.state_dict().items()}
    try:
        adapter = attach(model, config)
        with torch.no_grad():
            for parameter in adapter.parameters():
                parameter.add_(0.1)
        model(x).sum().backward()
        try:
            merge(model, verify=x)
            unmerge(model)
        except UnsupportedError:
            if method.mergeable:
                raise
        detach(model)
    except WeftError as error:
        return f"failed: {' '.join(str(error).split())}"
    same = all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    return "ok" if same else "failed: the base was not restored"


def _two_blocks() -> tuple[Any, Any]:
    """Returns a model with the parts of a transformer's block that methods look for, and an input
    [2, 5].
    """
    import torch

    linear = torch.nn.Linear

    class Block(torch.nn.ModuleDict):
        def __init__(self) -> None:
            super().__init__(
                {
                    "attention": torch.nn.ModuleDict({"output": linear(5, 5)}),
                    "up": linear(5, 7),
                    "down": linear(7, 5),
                }
            )

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            """Returns the block's output [..., width] for x [..., width]."""
            own: Any = self
            out: torch.Tensor = x + own["down"](own["up"](x + own["attention"]["output"](x)))
            return out

    class Model(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.blocks, self.head = torch.nn.ModuleList([Block(), Block()]), linear(5, 3)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            """Returns the head's output [..., classes] for x [..., width]."""
            out: torch.Tensor = self.head(self.blocks[1](self.blocks[0](x)))
            return out

    return Model(), torch.linspace(-1, 1, 10).reshape(2, 5)


def _tiny_transformer() -> tuple[Any, Any]:
    """Returns a GPT-2 of two blocks of width 6 that reads embeddings, and an input [2, 5, 6]."""
    import torch
    import transformers

    class Model(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            config = transformers.GPT2Config(
                vocab_size=7,
                n_embd=6,
                n_layer=2,
                n_head=2,
                n_positions=64,
                bos_token_id=None,
                eos_token_id=None,
            )
            self.body = transformers.GPT2Model(config)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            """Returns the last hidden state [batch, tokens, width] for embeddings x of that shape."""
            out: torch.Tensor = self.body(inputs_embeds=x).last_hidden_state
            return out

    return Model().eval(), torch.linspace(-1, 1, 60).reshape(2, 5, 6)
