"""What each field of a configuration means, for the tables that docs_tables.py writes and for the
API reference (docs_reference.py).

A string literal on the line below a field of the dataclass documents it. Fields without one are
looked up in MEANINGS: a field means the same in every method unless "Method.field" says otherwise.
A field with neither is an error that names it.
"""

from __future__ import annotations

import ast
import inspect
import textwrap
from itertools import pairwise

MEANINGS: dict[str, str] = {
    "r": "rank: rows of A, columns of B",
    "alpha": "the update is scaled by s = alpha / r; `None` means alpha = r, so s = 1 at any rank",
    "dropout": "share of the update branch's inputs that is zeroed in training; the frozen branch "
    "sees all of them",
    "init": '`"gaussian"`: A has standard deviation 1/r, as in the paper; `"kaiming"`: uniform '
    "within 1/√in, as in the code",
    "LoRA.init": '`"gaussian"`: A has standard deviation 1/r, as in the paper; `"kaiming"`: uniform '
    'within 1/√in, as in the code; `"pissa"`, `"olora"`: A and B start at a part of the weight',
    "DoRA.init": '`"gaussian"`: A has standard deviation 1/r, as in the paper; `"kaiming"`: uniform '
    'within 1/√in, as in the code; `"pissa"`, `"olora"`: A and B start at a part of the weight, see '
    "[LoRA](lora.md#starts-at-the-weight-pissa-and-olora)",
    "rslora": "s = alpha / √r, so that large ranks do not learn more slowly",
    "targets": "which layers: see [targets](../getting-started.md#targets)",
    "exclude": "layers taken away from `targets`, by the same names; the name of a module stands for "
    "all layers in it",
    "within": "only layers inside modules with these name endings; empty: everywhere",
    "layers": "only layers in blocks with these numbers, counted from 0 in every stack; empty: all",
    "modules_to_save": "modules trained in full in addition, by name ending: for example a new head",
    "train": "tensors of the base model to train in addition: see "
    "[tensors of the base model](../getting-started.md#tensors-of-the-base-model)",
    "freeze_batch_norm": "keep the running statistics of batch norms as they are: these layers stay "
    "in evaluation mode while the adapter is attached",
    "new_tokens": "token ids whose rows of the embeddings train in addition: see "
    "[new tokens](../getting-started.md#new-tokens)",
    "seed": "seed of everything random; the state of other generators does not matter",
    "dtype": "dtype of the trained tensors, independent of the base's; bfloat16 loses small steps",
    "norm_grad": '`"constant"`: no gradient flows through ‖V‖ (section 4.3 of the paper); '
    '`"exact"`: it does',
    "VeRA.r": "rows of the shared A, columns of the shared B; each adds only one trained number per "
    "layer, so choose it large",
    "d_init": "initial value of every entry of d; 0 is an error, because with b = 0 nothing would "
    "ever train",
    "draw": '`"weft"`: our generator, the same bits everywhere; `"peft"`: generate peft\'s matrices; '
    '`"stored"`: from a file',
    "precondition": "multiply B's gradient by (1/s)² (A Aᵀ)⁻¹ before each step, as peft's "
    "`LoraFAOptimizer` does",
    "AdaLoRA.r": "triplets per layer at the start, about 1.5 times `target_r`",
    "target_r": "triplets per layer at the end, on average over the layers; `None`: two thirds of r",
    "total_steps": "optimiser steps of the run; `None`: set by the trainer, or by you with "
    "`adapter.plan_steps(n)`",
    "warm_up": "steps (or, if below 1, share of them) before anything is pruned",
    "final": "steps (or share) at the end in which nothing more is pruned",
    "interval": "steps between two prunings",
    "beta1": "smoothing of the sensitivity |w · gradient|",
    "beta2": "smoothing of its spread",
    "orthogonality": "weight gamma of the loss that keeps the columns of P, and the rows of Q, "
    "orthonormal",
    "DyLoRA.r": "the largest rank",
    "r_min": "the smallest rank that has to work by itself",
    "last_only": "train only row and column b in a step that drew b, the paper's frozen variant",
    "preset": "one of the six architectures: defaults for the fields below that are `None`",
    "Bottleneck.r": "width of the bottleneck",
    "place": '`"series"`: reads the layer\'s output; `"parallel"`: its input',
    "nonlinearity": "`relu`, `gelu`, `swish` or `tanh`",
    "bias": "whether both maps have biases",
    "layer_norm": "a trained LayerNorm in front",
    "scale": "factor of the adapter's output; 1 in every preset",
    "skip_layers": "blocks, counted from the input, that get no adapter",
    "Bottleneck.dropout": "share of the bottleneck's activations that is zeroed in training",
    "Bottleneck.targets": "`None`: the preset's; otherwise "
    "[targets](../getting-started.md#targets)",
    "k": "number of blocks, counted from the output",
    "n": "positions of trained keys and values in every layer",
    "hidden": "width of an MLP through which the prefix is trained and which is not saved; "
    "`None`: trained directly",
    "positions": '`"shifted"`: positions of real tokens start at n, as in peft; `"kept"`: at 0',
    "std": "standard deviation of the initial values",
    "l_p": "trained positions before the prompt",
    "l_i": "trained positions after it",
}


# The fields of every method, after its own.
COMMON = ("targets", "exclude", "within", "layers", "modules_to_save", "train", "seed", "dtype")


def order(field: str) -> int:
    """The key by which a method's fields are sorted; sorting keeps the order of its own."""
    return COMMON.index(field) if field in COMMON else -1


def meaning(method: str, field: str, written: str | None = None) -> str:
    """The meaning of a field; `written` is the string below it in the class, if there is one.
    Raises KeyError, naming what to write.
    """
    if written is not None:
        return " ".join(written.split())
    base = {"DVoRA": "VeRA"}.get(method, method)
    for key in (f"{method}.{field}", f"{base}.{field}", field):
        if key in MEANINGS:
            return MEANINGS[key]
    raise KeyError(f"{method}.{field}: write what it means as a string below the field")


def written(cls: type) -> dict[str, str]:
    """The strings below the fields of a class and of its bases -> by field."""
    found: dict[str, str] = {}
    for base in reversed(cls.__mro__[:-1]):
        body = ast.parse(textwrap.dedent(inspect.getsource(base))).body[0].body
        for node, below in pairwise(body):
            text = below.value if isinstance(below, ast.Expr) else None
            if isinstance(node, ast.AnnAssign) and isinstance(text, ast.Constant):
                found[ast.unparse(node.target)] = str(text.value)
    return found
