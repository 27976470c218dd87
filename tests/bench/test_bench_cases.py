"""Every case runs, its rows have numbers, and what is written can be read, resumed and printed in
80 columns.
"""

import json
import sys
import types
from collections import Counter
from dataclasses import replace
from functools import partial
from importlib.util import cache_from_source
from pathlib import Path

import pytest
import torch

import weft
from benchmarks import __main__ as command
from benchmarks import cases, internals, report, shared, store
from benchmarks.case import select
from benchmarks.claims import Claim, evaluate
from benchmarks.contenders import Contender
from benchmarks.kinds import generate, handling, mixed, overhead, step
from benchmarks.setup import llama

QUICK = {case.name: case for case in cases.QUICK}
# No tiny model, processes of their own, or the same as another case once its model is tiny
APART = ("large", "peak-1024", "import", "train", "overhead-64-1", "overhead-1024")
TINY = {"overhead": "linear-tiny"}  # by kind; else llama-tiny


def small(case):
    names = tuple(n.replace(":256", ":8") for n in case.contenders)
    claims = tuple(
        replace(
            c,
            over=c.over.replace(":256", ":8"),
            under=c.under and c.under.replace(":256", ":8"),
            peer=c.peer and tuple(p and p.replace(":256", ":8") for p in c.peer),
        )
        for c in case.claims
    )
    names = case.contenders if case.kind == "mixed" else names
    setup = replace(case.setup, model=TINY.get(case.kind, "llama-tiny"), tokens=32, r=4)
    return replace(case, setup=setup, contenders=names, claims=claims)


@pytest.fixture(scope="module")
def results():
    """The quick set on a tiny model, as the file holds it."""
    data = store.fresh("python -m benchmarks quick")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(mixed, "RESIDENT", (2, 16))
        patch.setattr(generate, "NEW", 2)
        patch.setattr(overhead, "MOST_CALLS", 1)
        for name, case in QUICK.items():
            if name not in APART:
                store.put(data, command.measure(small(case), 0.0, least=2))
    return data


def test_every_row_gets_a_number(results):
    store.check(results, "results")
    assert len(results["cases"]) == len(QUICK) - len(APART)
    for case in results["cases"]:
        for row in case["rows"]:
            counted = row["metric"] != "norms" or internals.norm_counter() is not None
            assert (row["status"] != "unmeasured") == counted, row
            extra = "_extra" in row["metric"]  # a difference of times, which noise may turn
            assert row["value"] is None or extra or row["value"] >= 0
        assert case["rounds"] == (1 if case["kind"] == "kept" else 2)


def test_the_details_of_a_case_hold_every_contender_it_names(results):
    for case in results["cases"]:
        wanted = small(QUICK[case["name"]])
        assert set(wanted.contenders) <= set(case["contenders"])
        text = report.details(case)
        for name in wanted.contenders:
            assert name in text
    kept = next(c for c in results["cases"] if c["kind"] == "kept")
    lora_fa = kept["contenders"]["weft.LoRAFA"]["activations"]["median"]
    assert lora_fa == pytest.approx(1.0), (
        "LoRA-FA keeps x A' of every adapted layer and nothing else"
    )
    for name, groups in kept["kept"].items():
        assert sum(g["bytes"] for g in groups) == kept["contenders"][name]["saved"]["median"]


def test_everything_fits_into_80_columns_and_losses_are_shown(results):
    assert max(map(len, report.table(results).splitlines())) <= report.WIDTH
    row = results["cases"][0]["rows"][0] | {"status": "missed", "value": 9.87}
    assert len(report._rows([row | {"quartiles": [9.86, 9.88]}]).splitlines()) == 3
    assert len(report._rows([row | {"quartiles": [9.86, 9.88]}]).splitlines()[-1]) <= report.WIDTH
    changed = {**results, "cases": [{**results["cases"][0], "rows": [row]}]}
    assert "9.87" in report.table(changed) and "missed" in report.table(changed)
    one = {**results["cases"][0], "rows": [row, row | {"status": "ok", "headline": False}]}
    short = report.short_form({**results, "cases": [one]})
    assert "9.87" in short and "1 of 2 targets are reached." in short
    busy = {**changed, "machine": {**changed["machine"], "load": 1.5}}
    assert "NOT IDLE" in report.table(busy) and "NOT IDLE" in report.short_form(busy)
    assert "NOT IDLE" not in report.table({**busy, "machine": {**busy["machine"], "load": 0.1}})


def test_the_large_model_attaches_on_meta_and_loads_where_its_weights_take_no_memory():
    found = handling.measure_large(
        QUICK["large"].setup,
        ("weft.LoRA",),
        command.Rounds.within(0.0, least=1),
        partial(llama, 64, 2, 96),
    )["samples"]
    assert all(
        evaluate(c, found)["value"] is not None
        for c in QUICK["large"].claims
        if "DVoRA" not in c.text
    )
    assert found["load:32"]["bytes"][0] > 1.5 * found["load:16"]["bytes"][0]
    with torch.device("meta"):
        model = llama(64, 2, 96)
    thin = handling.thinned(model)
    assert all(
        p.device.type == "cpu" and p.untyped_storage().nbytes() == 4 for p in thin.parameters()
    )


def test_importing_is_measured_in_a_fresh_interpreter_with_bytecode_as_in_an_installed_package():
    stored = Path(cache_from_source(weft.__file__))
    stored.unlink(missing_ok=True)
    made = command.measure(replace(QUICK["import"], contenders=("weft",)), 0.0, least=1)
    assert 0 < made["rows"][0]["value"] < made["contenders"]["weft"]["process"]["median"]
    assert stored.is_file()


@pytest.mark.slow
def test_the_peak_of_a_process_is_at_least_what_it_holds():
    case = small(QUICK["peak-1024"])
    made = command.measure(replace(case, contenders=("limit", "weft.LoRA")), 0.0, least=1)
    for found in made["contenders"].values():
        assert found["process_peak"]["median"] >= found["before_steps"]["median"] > 2**27


def test_the_table_of_the_quick_set_has_the_rows_that_were_asked_for():
    main = [c for case in cases.QUICK for c in case.claims if c.main and c.at_most is not None]
    targets = {c.text: c.at_most for c in main}
    assert len(targets) == len(main)
    for text, at_most in {
        "LoRA, 1024 tokens / limit": 1.05,
        "DoRA, 1024 tokens / LoRA": 1.05,
        "DoRA, 4096 tokens / LoRA": 1.04,
        "DoRA, 128 tokens / LoRA": 1.12,
        "DVoRA r=256, 1024 tokens / VeRA": 1.04,
        "VeRA r=256, 1024 tokens / limit": 1.25,
        "VeRA r=256, 4096 tokens / limit": 1.15,
        "DoRA, bytes kept / LoRA": 1.0,
    }.items():
        assert targets[text] == at_most
    names = [case.name for case in cases.FULL]
    assert len(set(names)) == len(names)
    for case in cases.FULL:
        made = {
            *case.contenders,
            *(f"mixed:{k}" for k in (2, 4, 16, 64)),
            "flat",
            "growth",
            "load:16",
        }
        for claim in case.claims:
            named = {claim.over, *(claim.peer or ()), claim.under, claim.floor}
            assert named <= {*made, None}, claim


def test_the_rows_of_small_work_have_their_goals():
    goals = {c.text: c.at_most for case in cases.QUICK for c in case.claims if c.main}
    model = "stories15M" if shared.has_stories() else "15M random"
    for text, at_most in {
        "extra: LoRA forward / peft": 0.35,
        "extra: VeRA forward / peft": 0.6,
        "extra: DoRA forward / peft": 0.2,
        "extra: DVoRA forward / peft's DoRA": 0.2,
        "extra: LoRA training / peft": 0.65,
        "extra: VeRA training / peft": 0.9,
        "extra: DoRA training / peft": 0.5,
        "extra: DVoRA training / own DoRA": 1.3,
        f"{model} x 1: LoRA / bare": 1.15,
        f"{model} x 1: DoRA / bare": 1.2,
        f"{model} x 1: merged LoRA / bare": 1.01,
        f"weft train {model}, LoRA / peft": 0.95,
        f"weft train {model}, DoRA / peft": 0.85,
        "LoRA, 704 wide, 128 tokens / limit": 1.1,
        "VeRA, 704 wide, 128 tokens / limit": 1.4,
        "DoRA, 704 wide, 128 tokens / LoRA": 1.1,
        "DVoRA, 704 wide, 128 tokens / VeRA": 1.1,
    }.items():
        assert goals[text] == at_most, text
    shapes = {(c.setup.model, c.setup.tokens) for c in cases.FULL if c.kind == "overhead"}
    assert shapes == {(f"linear-{w}", t) for w in (64, 1024) for t in (1, 8, 128)}
    assert all(c.setup.threads == 1 for c in cases.FULL if c.kind in ("overhead", "generate"))


def test_the_readme_has_five_rows_and_counts_all_targets(results):
    headlines = [c.text for case in cases.QUICK for c in case.claims if c.headline]
    assert len(headlines) == 5
    text = report.short_form(results)
    found = [line for line in text.splitlines() if line.startswith("| ")][1:]
    shown = [line.split(" | ")[0].removeprefix("| ") for line in found]
    measured = [r["text"] for c in results["cases"] for r in c["rows"]]
    assert shown == [text for text in measured if text in headlines] and len(shown) == 4
    targets = [r for c in results["cases"] for r in c["rows"] if r["main"] and r["target"]]
    assert f"of {len(targets)} targets are reached" in text


def test_cases_are_selected_by_name():
    assert [c.name for c in select(cases.QUICK, "vera-4096, dora-1024")] == [
        "vera-4096",
        "dora-1024",
    ]
    assert select(cases.QUICK, None) == list(cases.QUICK)
    with pytest.raises(ValueError, match="no case nothing; there are overhead-64"):
        select(cases.QUICK, "dora-1024,nothing")


def claim(**changes):
    return Claim(
        **{"text": "t", "metric": "s", "over": "a", "under": "b", "at_most": 1.05, **changes}
    )


def test_a_row_is_ok_missed_shown_or_unmeasured():
    samples = {"a": {"s": [1.0540, 1.0540]}, "b": {"s": [1.0, 1.0]}, "c": {"s": [3.0, 3.0]}}
    assert evaluate(claim(), samples)["status"] == "ok"  # at the digits that are printed
    assert evaluate(claim(digits=3), samples)["status"] == "missed"
    assert evaluate(claim(at_most=None), samples)["status"] == "shown"
    found = evaluate(claim(peer=("c", "b")), samples)
    assert (found["value"], found["peers"]) == (pytest.approx(1.054), 3.0)
    assert evaluate(claim(under=None), samples)["value"] == pytest.approx(1.054)
    lacking = evaluate(claim(over="d"), samples)
    assert (lacking["status"], lacking["value"], lacking["why"]) == (
        "unmeasured",
        None,
        "d has no s",
    )
    assert evaluate(claim(metric="norms", under=None), samples)["why"] == "no counter"
    assert evaluate(claim(), {**samples, "a": {"s": [float("nan")] * 2}})["status"] == "missed"


def test_a_results_file_is_read_back_and_a_wrong_one_is_refused(results, tmp_path):
    path = tmp_path / "r" / "quick.json"
    store.write(path, results)
    assert store.read(path) == json.loads(json.dumps(results))
    assert [p.name for p in path.parent.iterdir()] == ["quick.json"]
    wrong = (
        ({"schema": 2}, "has schema 2"),
        ({"cases": {}}, "'cases' is"),
        ({"machine": None}, "'machine'"),
    )
    for change, message in wrong:
        store.write(path, {**results, **change})
        with pytest.raises(ValueError, match=message):
            store.read(path)
    row = {**results["cases"][0]["rows"][0], "status": "fine"}
    store.write(path, {**results, "cases": [{**results["cases"][0], "rows": [row]}]})
    with pytest.raises(ValueError, match="has status 'fine'"):
        store.read(path)
    path.write_text("{", encoding="utf-8")
    with pytest.raises(ValueError, match="is no JSON"):
        store.read(path)


def test_a_run_goes_on_where_it_stopped_and_only_with_the_same_versions(results, tmp_path):
    path = tmp_path / "quick.json"
    assert store.resume(path, "c")["cases"] == []
    store.write(path, results)
    assert store.resume(path, "c")["cases"] == json.loads(json.dumps(results["cases"]))
    case = small(QUICK["dora-1024"])
    assert store.finished(results, case)
    assert not store.finished(results, replace(case, setup=replace(case.setup, tokens=64)))
    assert not store.finished(results, replace(case, contenders=(*case.contenders, "full")))
    store.write(path, {**results, "versions": {**results["versions"], "torch": "1.0"}})
    with pytest.raises(ValueError, match=r"torch was '1\.0' and is"):
        store.resume(path, "c")


def test_the_command_measures_writes_prints_and_resumes(tmp_path, capsys, monkeypatch):
    tiny = [small(QUICK["dora-128"]), replace(small(QUICK["dvora-1024"]), weight=1)]
    monkeypatch.setitem(command.SETS, "quick", tiny)
    out = tmp_path / "out.json"
    common = ["--out", str(out), "--threads", "1", "--budget-minutes", "0.001", "--least", "1"]
    assert command.main(["quick", "--cases", "dora-128", *common]) == 0
    assert "DoRA, 128 tokens / LoRA" in capsys.readouterr().out
    assert command.main(["quick", *common, "--resume"]) == 0
    assert "dora-128: in the file already" in capsys.readouterr().out
    assert [c["name"] for c in store.read(out)["cases"]] == ["dora-128", "dvora-1024"]
    assert command.main(["table", str(out), "--readme"]) == 0
    assert " of 2 targets are reached." in capsys.readouterr().out
    monkeypatch.setitem(
        command.SETS, "quick", [replace(tiny[0], contenders=("limit", "weft.Nothing")), tiny[1]]
    )
    assert command.main(["quick", *common]) == 1
    printed = capsys.readouterr()
    assert (
        "dora-128 FAILED" in printed.err
        and "dora-128: FAILED. ValueError: 'weft.Nothing'" in printed.out
    )
    broken, good = store.read(out)["cases"]
    assert (
        [r["status"] for r in broken["rows"]] == ["unmeasured"]
        and "Nothing" in broken["error"]
        and not good["error"]
    )
    assert "weft.DoRA has no st" in report.table(store.read(out))
    assert not store.finished(store.read(out), tiny[0])


@pytest.mark.parametrize(
    "wrong",
    [
        ["quick", "--cases", "x"],
        ["quick", "--budget-minutes", "0"],
        ["table", "missing.json"],
        ["quick", "--threads", "0"],
    ],
)
def test_bad_arguments_are_told_in_one_line(wrong, capsys):
    assert command.main(wrong) == 2
    assert capsys.readouterr().err.count("\n") == 1


def test_norms_are_read_where_weft_counts_them(monkeypatch):
    module = types.ModuleType("weft.ops.cache")
    monkeypatch.setitem(sys.modules, "weft.ops.cache", module)
    assert internals.norm_counter() is None
    module.counts = Counter(norm=7)
    assert internals.norm_counter()() == 7
    monkeypatch.setitem(sys.modules, "weft.ops.cache", None)
    assert internals.norm_counter() is None


def test_the_norms_of_one_whole_step_are_counted_a_layer(monkeypatch):
    """A method that computes its norm in every forward has as many as there are micro-batches."""
    count = Counter()
    monkeypatch.setattr(step, "norm_counter", lambda: lambda: count["norm"])
    own = Contender.loss

    def counted(self, data):
        count["norm"] += 2 * 7  # one in each of the model's layers
        return own(self, data)

    monkeypatch.setattr(Contender, "loss", counted)
    setup = replace(small(QUICK["dora-accumulated"]).setup, accumulate=2, checkpointing=False)
    found = step.measure(setup, ("weft.DoRA", "weft.LoRA"), command.Rounds.within(0.0, least=1))[
        "samples"
    ]
    assert found["weft.DoRA"]["norms"] == [2.0] and "norms" not in found["weft.LoRA"]
