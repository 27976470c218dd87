"""torch.compile takes adapted models whole: no graph break, the same numbers, and a switch is
seen.
"""

import pytest
import torch

import weft
from support import KINDS, PROMPT_VARIANTS, VARIANTS, awake, check_close, distance

# Tracing is what can break on our code; compiling the traced graph to machine code is torch's own
# matter.


@pytest.fixture(autouse=True)
def _fresh():
    torch.compiler.reset()
    yield
    torch.compiler.reset()


def gradients(a, run):
    for p in a.adapter.parameters():
        p.grad = None
    run(a.x).pow(2).sum().backward()
    return {k: p.grad.clone() for k, p in a.adapter.named_parameters()}


SLOW = [pytest.param(v, marks=pytest.mark.slow) if v in PROMPT_VARIANTS else v for v in VARIANTS]


@pytest.mark.parametrize("variant", SLOW)
def test_the_whole_model_is_one_graph_with_the_same_outputs_and_gradients(variant):
    for kind in KINDS if variant not in PROMPT_VARIANTS else ("linear",):  # a whole GPT-2 is traced
        a = awake(variant, kind)
        compiled = torch.compile(a.model, fullgraph=True, backend="aot_eager")
        check_close(compiled(a.x), a.run(), torch.float32, kind)
        wanted = gradients(a, a.model)
        for key, gradient in gradients(a, compiled).items():
            check_close(gradient, wanted[key], torch.float32, f"{kind} {key}")


def test_a_switch_is_seen_by_a_compiled_model():
    a = awake("LoRA")
    awake("DVoRA", name="b", model=a.model)
    compiled = torch.compile(a.model, fullgraph=True, backend="eager")
    outputs = []
    for which in (
        None,
        "default",
        "b",
        ["default", None, "b", "b"],
        ["b", None, "default", "b"],
        None,
    ):
        with weft.use(a.model, which), torch.no_grad():
            check_close(compiled(a.x), a.run(), torch.float32, str(which))
            outputs.append(a.run())
    assert all(distance(x, y) > 1e-2 for i, x in enumerate(outputs[:-1]) for y in outputs[:i])


def test_training_a_compiled_model_changes_what_it_computes():
    a = awake("DoRA")
    compiled = torch.compile(a.model, fullgraph=True, backend="eager")
    before = compiled(a.x)
    with torch.no_grad():
        for p in a.adapter.parameters():
            p.mul_(1.5)
    check_close(compiled(a.x), a.run(), torch.float32)
    assert distance(compiled(a.x), before) > 1e-2


def test_a_merge_is_seen_by_a_compiled_model():
    a = awake("VeRA")
    compiled = torch.compile(a.model, fullgraph=True, backend="eager")
    wanted = compiled(a.x)
    weft.merge(a.model)
    check_close(compiled(a.x), wanted, torch.float32)
    weft.unmerge(a.model)
    check_close(compiled(a.x), wanted, torch.float32)


# torch's own code generator still uses torch.jit, which torch itself deprecates.
@pytest.mark.filterwarnings("ignore:`torch.jit:DeprecationWarning")
@pytest.mark.slow
@pytest.mark.parametrize("variant", VARIANTS)
def test_machine_code_gives_the_same(variant):
    a = awake(variant)
    check_close(torch.compile(a.model, fullgraph=True)(a.x), a.run(), torch.float32)
