"""README and docs, and the code blocks in them."""

from __future__ import annotations

import re
import shlex
import sys
from pathlib import Path

import docs_tables

ROOT = Path(__file__).resolve().parents[2]
DOCS = ROOT / "docs"
PAGES = sorted(DOCS.rglob("*.md"))
ALL = [ROOT / "README.md", *PAGES]
COMING = {DOCS / "methods" / f"{name.lower()}.md" for name in docs_tables.COMING}


def named(path: Path) -> str:
    return str(path.relative_to(ROOT))


def text_of(path: Path) -> str:
    """The page; where it is another file with something before it, that file too."""
    text = path.read_text(encoding="utf-8")
    return re.sub(
        r'^--8<-- "(.+)"$',
        lambda m: (ROOT / m[1]).read_text(encoding="utf-8"),
        text,
        flags=re.MULTILINE,
    )


def blocks(path: Path, language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", text_of(path), re.DOTALL | re.MULTILINE)


def commands(path: Path) -> list[list[str]]:
    """The words behind `$ weft` in console blocks."""
    lines = [
        line[2:]
        for block in blocks(path, "console")
        for line in block.splitlines()
        if line.startswith("$ ")
    ]
    words = [shlex.split(line, comments=True) for line in lines]
    return [w[1:] for w in words if w[0] == "weft"]


VISION_MODEL = "llava-hf/llava-1.5-7b-hf"
HUB_MODEL = "HuggingFaceTB/SmolLM2-135M-Instruct"


def small_llama(folder: Path) -> Path:
    """A Llama of two blocks with a tokenizer of single bytes, saved into `folder`. In the current
    directory under a hub model's name, `from_pretrained` finds it in place of the hub's.
    """
    import torch
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    byte = pre_tokenizers.ByteLevel
    vocabulary = ["<pad>", "</s>", *sorted(byte.alphabet())]
    tokenizer = Tokenizer(models.BPE(vocab={c: i for i, c in enumerate(vocabulary)}, merges=[]))
    tokenizer.pre_tokenizer = byte(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", eos_token="</s>"
    ).save_pretrained(folder)
    torch.manual_seed(0)
    LlamaForCausalLM(
        LlamaConfig(
            vocab_size=len(vocabulary),
            hidden_size=64,
            intermediate_size=96,
            num_hidden_layers=2,
            num_attention_heads=4,
            bos_token_id=None,
            eos_token_id=1,
            pad_token_id=0,
        )
    ).save_pretrained(folder)
    return folder


def prose(path: Path) -> str:
    """The page without its code blocks."""
    return re.sub(r"^```.*?^```", "", text_of(path), flags=re.DOTALL | re.MULTILINE)


def small_llava(folder: Path) -> Path:
    """A LLaVA of two blocks with its processor, saved into `folder`."""
    sys.path.insert(0, str(ROOT / "tests" / "training"))
    try:
        import tiny_vision
    finally:
        sys.path.pop(0)
    folder.mkdir(parents=True)
    return tiny_vision.llava(folder)
