"""What each field of a configuration means, for the tables that docs_tables.py writes.

A field means the same in every method unless "Method.field" says otherwise. A method with a field
that is named nowhere here has no page yet: docs_tables.py refuses it by name.
"""

from __future__ import annotations

MEANINGS: dict[str, str] = {
    "r": "rank: rows of A, columns of B",
    "alpha": "the update is scaled by s = alpha / r; `None` means alpha = r, so s = 1 whatever r a "
    "layer has",
    "dropout": "share of the inputs of the update's branch that is zeroed in training; the frozen "
    "branch sees all",
    "init": '`"gaussian"`: A has standard deviation 1/r, as in the paper; `"kaiming"`: uniform '
    "within 1/√in, as in the code",
    "rslora": "s = alpha / √r, which keeps large ranks from learning ever more slowly",
    "targets": "which layers: see [targets](../getting-started.md#targets)",
    "modules_to_save": "modules trained in full beside the method, by name ending: a new head",
    "train": "tensors of the base model that train too: see "
    "[train](../getting-started.md#tensors-of-the-base-model)",
    "seed": "from which everything random is drawn; nothing else in the process matters",
    "dtype": "of the trained tensors, whatever the base has; bfloat16 loses small steps",
    "norm_grad": '`"constant"`: no gradient flows through ‖V‖ (section 4.3 of the paper); '
    '`"exact"`: it does',
    "VeRA.r": "rows of the shared A, columns of the shared B; numbers trained grow by 1 a layer "
    "with it, so take it large",
    "d_init": "start of every entry of d; 0 is refused, since with b = 0 nothing would ever move",
    "draw": '`"weft"`: our generator, the same bits everywhere; `"peft"`: redraw peft\'s matrices; '
    '`"stored"`: from a file',
    "precondition": "multiply B's gradient by (1/s)² (A Aᵀ)⁻¹ before each step, as peft's "
    "`LoraFAOptimizer` does",
    "AdaLoRA.r": "triplets of every layer at the start, about 1.5 times `target_r`",
    "target_r": "triplets a layer at the end, on average over the layers; `None`: two thirds of r",
    "total_steps": "optimiser steps of the run; `None`: the trainer says, or you by "
    "`adapter.plan_steps(n)`",
    "warm_up": "steps (or, below 1, share of them) before anything is pruned",
    "final": "steps (or share) at the end in which the choice stands and the survivors settle",
    "interval": "steps between two choices",
    "beta1": "smoothing of the sensitivity |w · gradient|",
    "beta2": "smoothing of its spread",
    "orthogonality": "weight gamma of the loss that keeps the columns of P, and the rows of Q, "
    "orthonormal",
    "DyLoRA.r": "the largest rank",
    "r_min": "the smallest rank that shall work by itself",
    "last_only": "move only the b-th row and column in a step that drew b, the paper's frozen "
    "variant",
    "preset": "one of the six architectures: defaults for the fields below that are `None`",
    "Bottleneck.r": "width of the bottleneck",
    "place": '`"series"`: reads the layer\'s output; `"parallel"`: its input',
    "nonlinearity": "`relu`, `gelu`, `swish` or `tanh`",
    "bias": "have both maps biases",
    "layer_norm": "a trained LayerNorm in front",
    "scale": "factor of the adapter's output; 1 in every preset",
    "skip_layers": "blocks, counted from the input, that get no adapter",
    "Bottleneck.dropout": "share of the bottleneck's activations that is zeroed in training",
    "Bottleneck.targets": "`None`: where the preset puts them; else "
    "[targets](../getting-started.md#targets)",
    "k": "blocks, counted from the output",
    "n": "positions of trained keys and values in every layer",
    "hidden": "width of an MLP through which the prefix is trained and which no file holds; "
    "`None`: trained directly",
    "positions": '`"shifted"`: real tokens count their positions from n on, as in peft; `"kept"`: '
    "from 0",
    "std": "standard deviation of the start",
    "l_p": "trained positions before the prompt",
    "l_i": "trained positions behind it",
}


def meaning(method: str, field: str) -> str:
    """Raises KeyError naming the line to write."""
    base = {"DVoRA": "VeRA"}.get(method, method)
    for key in (f"{method}.{field}", f"{base}.{field}", field):
        if key in MEANINGS:
            return MEANINGS[key]
    raise KeyError(f"scripts/docs_fields.py: say what {field!r} of {method} means")
