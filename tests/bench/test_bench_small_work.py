"""The rows of small work: extra time of a layer, generated tokens, whole training runs, and the
script for a GPU, all with tiny models.
"""

import io
import json
import subprocess
from contextlib import redirect_stderr, redirect_stdout
from dataclasses import replace

import pytest
import torch

import weft.cli
from benchmarks import __main__ as command
from benchmarks import gpu, peft_train, report, shared, small_work, store
from benchmarks.claims import Claim, evaluate
from benchmarks.contenders import IdleError
from benchmarks.floor import LowRankFloor, VectorFloor
from benchmarks.kinds import deep, generate, kernels, overhead, training
from benchmarks.setup import MODELS, Setup, batch, build
from benchmarks.timing import Rounds, now, threads

STACK = Setup(model="linear-tiny", tokens=4, r=3, flow=False)
LLAMA = Setup(model="llama-tiny", tokens=16, r=3, flow=False)


def once():
    return Rounds.within(0.0, least=1, warm=0)


def contenders(*names, setup=STACK):
    base = build(setup)
    x, g = overhead.inputs(base, setup)
    return [overhead.contender(name, base, setup) for name in ("bare", *names)], x, g


@pytest.mark.parametrize("method", ["LoRA", "DoRA", "VeRA", "DVoRA"])
def test_the_floor_computes_what_the_method_does(method):
    made, x, g = contenders(f"weft.{method}", f"floor.{method}")
    overhead.check(made, x, g, STACK)
    _, ours, floor = made
    assert ours.equation == floor.equation and ours.expected == floor.expected
    kind = VectorFloor if "V" in method else LowRankFloor
    assert [type(m) for m in floor.model] == [kind] * 3
    first = next(p for n, p in floor.trained.items() if n.endswith((".B", ".b")))
    first.data.mul_(1.5)
    with pytest.raises(IdleError, match=rf"floor\.{method} computes something else"):
        overhead.check(made, x, g, STACK)


def test_the_gate_of_a_stack_sees_an_adapter_that_does_nothing():
    made, x, g = contenders("weft.LoRA")
    weft.use(made[1].model, None)
    with pytest.raises((IdleError, RuntimeError)):
        overhead.check(made, x, g, STACK)
    made, x, g = contenders("weft.LoRA")
    made[1].trained.popitem()
    with pytest.raises(IdleError, match="it should be"):
        overhead.check(made, x, g, STACK)
    made, x, g = contenders("peft.LoRA")
    for name, p in made[1].trained.items():
        p.data.mul_(1e-9 if ".lora_B." in name else 1.0)
    with pytest.raises(IdleError, match="leaves the base's output"):
        overhead.check(made, x, g, STACK)


def test_extra_time_is_counted_beyond_the_bare_model_per_layer_and_round(monkeypatch):
    times = iter([0.3, 0.6, 0.9, 1.5] * 2)  # forward and training of two contenders, two rounds
    monkeypatch.setattr(overhead, "_timed", lambda *_: next(times))
    rounds = Rounds.within(0.0, least=2, warm=0)
    found = overhead.measure(STACK, ("bare", "weft.LoRA"), rounds)["samples"]
    assert found["bare"]["forward"] == pytest.approx([0.1] * 2)  # of three layers
    assert found["weft.LoRA"]["forward_extra"] == pytest.approx([0.2] * 2)
    assert found["weft.LoRA"]["train_extra"] == pytest.approx([0.3] * 2)
    assert found["bare"]["train_extra"] == [0.0] * 2
    with pytest.raises(ValueError, match='name "bare"'):
        overhead.measure(STACK, ("weft.LoRA",), rounds)


def test_every_step_of_a_sample_moves_the_numbers_and_the_warm_up_call_is_not_counted():
    made, x, g = contenders("weft.DoRA")
    before = {n: p.detach().clone() for n, p in made[1].trained.items()}
    overhead._work(made[1], x, g, 2, 3, "cpu")()
    assert all(not torch.equal(p, before[n]) for n, p in made[1].trained.items())
    calls = []
    overhead._timed(lambda: calls.append(1), 5, "cpu")
    assert len(calls) == 6


def test_a_row_shows_the_floor_in_the_place_of_a_target():
    samples = {"a": {"s": [4e-6]}, "f": {"s": [2.24e-6]}, "zero": {"s": [0.0]}}
    row = evaluate(Claim("t", "s", "a", floor="f", scale=1e6, digits=1), samples)
    assert row["note"] == "floor 2.2" and row["value"] == pytest.approx(4.0)
    assert report.target(row) == "floor 2.2"
    nothing = evaluate(Claim("t", "s", "a", "zero", 1.0), samples)
    assert nothing["status"] == "missed"  # a ratio to no time at all shows nothing


def test_generation_has_the_same_length_for_all_and_counts_tokens_of_all_rows(monkeypatch):
    monkeypatch.setattr(generate, "NEW", 3)
    names = ("base", "weft.LoRA", "merged.LoRA", "peft.LoRA", "weft.DoRA", "peft.DoRA")
    found = generate.measure(LLAMA, names, once())["samples"]
    for metrics in found.values():
        (one,), (eight,) = metrics["tokens_1"], metrics["tokens_8"]
        assert one == pytest.approx(3 / metrics["seconds_1"][0])
        assert eight == pytest.approx(24 / metrics["seconds_8"][0])


def test_generation_refuses_an_adapter_that_is_off_and_another_equation(monkeypatch):
    own = generate.model_for

    def off(name, base, setup):
        model = own(name, base, setup)
        if name == "weft.LoRA":
            weft.use(model, None)
        return model

    monkeypatch.setattr(generate, "model_for", off)
    with pytest.raises(IdleError, match=r"weft\.LoRA moves the base's output by 0"):
        generate.measure(LLAMA, ("base", "weft.LoRA"), once())

    def doubled(name, base, setup):
        model = own(name, base, setup)
        for n, p in model.named_parameters():
            if name == "peft.LoRA" and ".lora_B." in n:
                p.data.mul_(2)
        return model

    monkeypatch.setattr(generate, "model_for", doubled)
    with pytest.raises(IdleError, match=r"peft\.LoRA differs from the first of its equation"):
        generate.measure(LLAMA, ("base", "weft.LoRA", "peft.LoRA"), once())


def in_process(words, environment):
    """What the process of a contender would do, without the seconds that importing takes."""
    out, err = io.StringIO(), io.StringIO()
    with redirect_stdout(out), redirect_stderr(err):
        name, *rest = words
        code = weft.cli.main(rest) if name == "weft" else peft_train.main(*rest)
    return subprocess.CompletedProcess(words, code or 0, out.getvalue(), err.getvalue())


@pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing:FutureWarning")  # peft reads it
@pytest.mark.parametrize("method", ["LoRA", "DoRA"])
def test_both_training_runs_see_the_same_tokens_and_train_the_same_numbers(monkeypatch, method):
    monkeypatch.setattr(training, "process", in_process)
    names = (f"weft.{method}:4", f"peft.{method}:4")
    found = training.measure(LLAMA, names, once(), steps=3)
    assert all(len(v["process"]) == 1 for v in found["samples"].values())
    assert "3 steps of 8 rows" in found["notes"][0]


def test_every_training_run_has_a_configuration_of_its_own(tmp_path):
    names = ("weft.LoRA:4", "weft.DoRA:4")
    asked = [(name, steps) for name in names for steps in (3, 60)]
    for name, steps in asked:
        training._work(name, LLAMA, tmp_path / "model", tmp_path, steps, {})
    configs = [json.loads(path.read_text()) for path in tmp_path.glob("*.yaml")]
    found = {(f"weft.{c['method']['name']}:4", c["train"]["steps"]) for c in configs}
    assert found == set(asked) and len({c["out"] for c in configs}) == len(asked)


def test_training_runs_that_differ_are_refused():
    same = {"trained": 8, "tokens": 100, "steps": 2}
    training._check(
        {"weft.LoRA:8": same, "peft.LoRA:8": dict(same), "weft.DoRA:8": {**same, "trained": 9}}
    )
    with pytest.raises(IdleError, match=r"peft\.LoRA:8 trained on .*101.* and weft\.LoRA:8"):
        training._check({"weft.LoRA:8": same, "peft.LoRA:8": {**same, "tokens": 101}})
    with pytest.raises(ValueError, match="cannot be trained"):
        training.measure(LLAMA, ("weft.VeRA:8",), once(), steps=1)


@pytest.mark.slow
def test_a_training_run_is_a_process_of_its_own():
    names = ("weft.LoRA:4", "peft.LoRA:4")
    found = training.measure(replace(LLAMA, threads=1), names, once(), steps=3)["samples"]
    assert all(v["process"][0] > 0.5 for v in found.values())


def test_pairs_and_a_tokenizer_come_without_the_shared_folder(monkeypatch, tmp_path):
    monkeypatch.setattr(shared, "E2E", tmp_path / "missing")
    rows, kind = shared.pairs(600)
    assert kind == "synthetic pairs" and len(rows) == 600
    assert all(row["prompt"].endswith("\n") and row["completion"] for row in rows)
    assert len({json.dumps(row) for row in rows[:400]}) == 400
    shared.write_model(build(LLAMA), tmp_path / "model", rows)
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "model")
    ids = tokenizer(rows[0]["prompt"])["input_ids"]
    assert tokenizer.unk_token_id not in ids and max(ids) < 512


def test_the_random_model_has_the_shape_of_stories15m():
    with torch.device("meta"):
        model = MODELS["stories15m-random"].build()
    assert sum(p.numel() for p in model.parameters()) == 15_191_712


def test_threads_are_set_within_and_as_before_behind():
    before = torch.get_num_threads()
    with threads(2):
        assert torch.get_num_threads() == 2
    with threads(0):
        assert torch.get_num_threads() == before
    assert torch.get_num_threads() == before and now() <= now("cpu")


def checked(text, errors=""):
    """What pytest would have printed of the kernels, in place of a process that takes seconds."""
    return lambda *_: subprocess.CompletedProcess([], 0, text, errors)


def test_the_gpu_script_runs_on_a_cpu_with_tiny_shapes(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(kernels, "process", checked("...\n2 failed, 18 passed in 3.2s\n"))
    monkeypatch.setattr(overhead, "MOST_CALLS", 1)
    out = tmp_path / "gpu.json"
    words = ["--device", "cpu", "--tiny", "--least", "2", "--budget-minutes", "0.001"]
    assert command.main(["gpu", *words, "--out", str(out)]) == 0
    data = store.read(out)
    printed = capsys.readouterr().out
    assert max(map(len, report.table(data).splitlines())) <= report.WIDTH
    assert [c["name"] for c in data["cases"]] == [
        "gpu-kernels",
        "overhead-tiny",
        "gpu-7b-r4",
        "gpu-7b-vera",
    ]
    assert data["cases"][0]["rows"][0]["value"] == 2 and "18 passed" in printed
    assert data["cases"][0]["rows"][0]["status"] == "missed"
    assert all(row["status"] != "unmeasured" for c in data["cases"] for row in c["rows"])
    assert "4 of 32 layers, step_32 is extrapolated" in " ".join(printed.split())
    ranked = data["cases"][2]["contenders"]
    assert {"limit", "weft.DoRA:4", "peft.DoRA:4", "dense.DoRA:4", deep.HEAD} == set(ranked) - {
        "weft.LoRA:4",
        "peft.LoRA:4",
    }
    for found in ranked.values():
        pairs = zip(
            ranked[deep.HEAD]["step"]["samples"],
            found["step"]["samples"],
            found["step_32"]["samples"],
            strict=True,
        )
        assert all(whole == pytest.approx(h + 8 * (s - h)) for h, s, whole in pairs)


def test_fewer_layers_are_measured_if_the_gpu_has_no_room(monkeypatch):
    asked = []

    def measured(setup, contenders, rounds):
        asked.append(setup.model)
        if len(asked) < 3:
            raise torch.OutOfMemoryError("no room")
        return {deep.HEAD: {"step": [1.0]}, "limit": {"step": [3.0]}}

    monkeypatch.setattr(deep, "_measured", measured)
    found = deep.measure(Setup(model="llama-7b/32"), ("limit",), once())
    assert asked == ["llama-7b/32", "llama-7b/16", "llama-7b/8"]
    assert found["samples"]["limit"]["step_32"] == [1 + 2 * 4]
    assert found["notes"][:2] == [f"out of memory with {n} layers" for n in (32, 16)]
    monkeypatch.setattr(deep, "_measured", lambda *_: {deep.HEAD: {"step": [1.0]}})
    assert (
        "32 of 32 layers, measured" in deep.measure(Setup(model="llama-7b/32"), (), once())["notes"]
    )


def test_the_layers_follow_from_the_memory_and_a_missing_gpu_is_an_error(capsys):
    fits = gpu.layers_that_fit
    assert (
        fits(141e9, 16) == 32
        and fits(141e9, 384) == 16
        and fits(24e9, 16) == 4
        and fits(0, 64) == 2
    )
    assert all(fits(m, r) >= fits(m, 384) for m in (24e9, 80e9) for r in gpu.RANKS)
    if not torch.cuda.is_available():
        assert command.main(["gpu"]) == 2
        assert "sees no CUDA device" in capsys.readouterr().err
    goals = {
        c.text: c.at_most for r in gpu.RANKS for c in gpu._ranked(r, Setup(r=r)).claims if c.main
    }
    assert goals == {
        "7B, DoRA r=16 / LoRA": 1.05,
        "7B, DoRA r=64 / LoRA": 1.05,
        "7B, DoRA r=384 / LoRA": None,
    }


@pytest.mark.parametrize("text", ["", "3 skipped in 1s", "5 passed, 1 skipped in 1s"])
def test_kernels_that_were_not_checked_are_an_error(monkeypatch, text):
    monkeypatch.setattr(kernels, "process", checked(text, "no GPU"))
    with pytest.raises(RuntimeError, match="the kernels were not checked"):
        kernels.measure(Setup(), (kernels.ALL,), once())


@pytest.mark.slow
def test_the_checks_of_the_kernels_run_in_tritons_interpreter():
    pytest.importorskip("triton")
    found = kernels.measure(Setup(), ("compose_grad",), once())["samples"]["compose_grad"]
    assert found["passed"][0] >= 10 and found["failed"] == [0.0]


def test_the_7b_model_has_its_shape():
    with torch.device("meta"):
        model = MODELS["llama-7b/32"].build()
        empty = MODELS["llama-7b/0"].build()
    assert sum(p.numel() for p in model.parameters()) == 6_738_415_616
    assert len(empty.model.layers) == 0
    found = build(replace(LLAMA, model="llama-7b-tiny/0"))(**batch(LLAMA)).loss
    assert bool(found.isfinite())


def test_the_case_of_the_layer_has_names_that_can_be_asked_for():
    names = [case.name for case in (*small_work.QUICK, *small_work.FULL)]
    assert names[0] == "overhead-64" and len(set(names)) == len(names)
