"""`adapter.start`: a run that begins with another run's adapter, and what does not fit is refused
by its name.
"""

import gc
import json
import shutil
from io import StringIO

import pytest
import tiny
import torch

from weft.checkpoint import files
from weft.errors import ConfigError, WeftError
from weft.training import from_dict, train


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    folder = tmp_path_factory.mktemp("start")
    tiny.language_model(folder / "lm")
    tiny.encoder(folder / "bert")
    tiny.pairs(folder / "pairs.jsonl", 8)
    tiny.labelled(folder / "two.csv", 8)
    (folder / "three.csv").write_text(
        "text,label\n" + "".join(f"t {i},{'abc'[i % 3]}\n" for i in range(9))
    )
    gc.collect()
    gc.freeze()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("weft.training.curves.draw", lambda *a: False)
        train(config(folder, folder / "first"), stream=StringIO())
        yield folder
    gc.unfreeze()


def config(place, out, data="three.csv", **changes):
    plain = {
        "out": str(out),
        "model": {"path": str(place / ("lm" if data.endswith("jsonl") else "bert"))},
        "method": {"name": "LoRA", "r": 2, "targets": ["query", "value"]},
        "data": {"train": str(place / data)},
        "optim": {"lr": 1e-2, "warm_up": 0},
        "train": {"steps": 3, "batch": 4, "device": "cpu"},
    }
    for key, value in changes.items():
        section, _, name = key.partition("__")
        plain[section] = {**plain.get(section, {}), name: value} if name else value
    return from_dict(plain)


def run(place, out, data="three.csv", **changes):
    said = StringIO()
    start = changes.pop("adapter__start", str(place / "first" / "adapter"))
    return train(
        config(place, out, data, adapter__start=start, **changes), stream=said
    ), said.getvalue()


def tensors(folder):
    return files.read_tensors(folder / "adapter_model.safetensors")[0]


def before_the_first_step(monkeypatch):
    """The tensors with which training begins, by name."""
    from weft.training.callbacks import Audit

    seen = {}
    kept = Audit.on_train_begin

    def look(self, args, state, control, **more):
        seen.update({name: p.detach().clone() for name, p in self.adapter.named_parameters()})
        return kept(self, args, state, control, **more)

    monkeypatch.setattr(Audit, "on_train_begin", look)
    return seen


@pytest.mark.parametrize(("data", "head"), [("three.csv", "taken over"), ("two.csv", "new")])
def test_the_run_begins_with_its_tensors_and_with_its_head_where_that_fits(
    place, tmp_path, monkeypatch, data, head
):
    seen = before_the_first_step(monkeypatch)
    done, said = run(place, tmp_path / "o", data)
    begun = tensors(place / "first" / "adapter")
    layers = {key for key in begun if "lora_" in key}
    assert len(layers) == 8
    for key in layers:
        name = (
            key.removeprefix("base_model.model.")
            .replace(".lora_A.weight", ".A")
            .replace(".lora_B.weight", ".B")
        )
        assert torch.equal(seen[name], begun[key]) and bool(begun[key].any())
        assert not torch.equal(
            dict(done.adapter.named_parameters())[name], begun[key]
        )  # and goes on from there
    old = begun["base_model.model.classifier.weight"]
    assert (
        seen["classifier.weight"].shape == old.shape and torch.equal(seen["classifier.weight"], old)
    ) == (head == "taken over")
    record = json.loads((tmp_path / "o" / "run.json").read_text())
    assert (
        record["started_from"]["head"] == head
        and record["identity"]["start"] == record["started_from"]["fingerprint"]
    )
    assert f"Begins with the adapter {place / 'first' / 'adapter'}" in said
    assert ("the head is new" in said) == (head == "new")
    assert "Begins with the adapter" in (tmp_path / "o" / "README.md").read_text()


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        (
            {"method": {"name": "DoRA", "r": 2, "targets": ["query", "value"]}},
            r"adapter of LoRA, and method.name is DoRA",
        ),
        ({"method__r": 3}, r"trained with method.r=2, and this run has 3. Give method.r=2"),
        ({"method__alpha": 8.0}, r"method.alpha=2.0, and this run has 8.0"),
        (
            {"method__targets": ["query"]},
            r"value' is adapted there and not in this run; name it in method.targets",
        ),
        (
            {"method__targets": ["query", "value", "key"]},
            r"key' is adapted in this run and not there; leave it out",
        ),
        ({"adapter__start": "nothing"}, r"adapter.start='nothing': 'nothing' does not exist"),
        (
            {"data": "pairs.jsonl"},
            r"adapter.start=.* (does not fit this run|on a base whose weights)|trained on a base",
        ),
    ],
)
def test_an_adapter_that_does_not_fit_is_refused_and_nothing_is_begun(
    place, tmp_path, changes, said
):
    with pytest.raises(WeftError, match=said):
        run(place, tmp_path / "o", **{"method__r": 2, **changes})
    assert not (tmp_path / "o").exists()


def test_the_directory_of_a_run_counts_as_its_adapter(place, tmp_path):
    run(place, tmp_path / "a")
    run(place, tmp_path / "b", adapter__start=str(place / "first"))
    begun, again = (json.loads((tmp_path / out / "run.json").read_text()) for out in "ab")
    assert begun["identity"]["start"] == again["identity"]["start"] is not None
    one, other = (tensors(tmp_path / out / "adapter") for out in "ab")
    assert all(torch.equal(one[key], other[key]) for key in one)


def test_alpha_and_dropout_that_mean_the_same_are_the_same(place, tmp_path):
    run(place, tmp_path / "o", method__alpha=2.0, method__dropout=0.1)  # alpha=None is r


def test_another_base_is_refused(place, tmp_path):
    other = shutil.copytree(place / "bert", tmp_path / "other")
    held, metadata = files.read_tensors(other / "model.safetensors")
    held["embeddings.LayerNorm.weight"][0] += 1
    from safetensors.torch import save_file

    save_file(held, other / "model.safetensors", metadata)
    with pytest.raises(WeftError, match="trained on a base whose weights have checksum"):
        run(place, tmp_path / "o", model__path=str(other))


def test_the_same_base_in_another_dtype_is_no_other_base(place, tmp_path):
    """The checksum of all weights is another one, so the numbers in the adapter's file decide."""
    run(place, tmp_path / "o", model__dtype="bfloat16")


def test_another_base_is_refused_by_its_weights_and_allowed_by_a_switch(place, tmp_path):
    """An adapter that lies in no run's directory has only the numbers in its own file."""
    other = shutil.copytree(place / "bert", tmp_path / "other")
    held, metadata = files.read_tensors(other / "model.safetensors")
    from safetensors.torch import save_file

    for name, t in held.items():
        held[name] = t + 0.1 * torch.randn_like(t) if t.is_floating_point() else t
    save_file(held, other / "model.safetensors", metadata)
    found = files.find(place / "first").tensors.parent
    alone = {
        "adapter__start": str(shutil.copytree(found, tmp_path / "alone")),
        "model__path": str(other),
    }
    with pytest.raises(WeftError, match=r"other weights[\s\S]*adapter.other_base: true"):
        run(place, tmp_path / "o", **alone)
    run(place, tmp_path / "p", **alone, adapter__other_base=True)
    with pytest.raises(ConfigError, match=r"does nothing without adapter\.start"):
        config(place, tmp_path / "q", adapter__other_base=True)


def test_frozen_matrices_of_another_seed_are_refused(place, tmp_path):
    method = {"name": "VeRA", "r": 4, "targets": ["query"], "seed": 5}
    train(config(place, tmp_path / "a", method=method), stream=StringIO())
    with pytest.raises(ConfigError, match=r"method.seed=5, and this run has 6"):
        run(
            place,
            tmp_path / "b",
            method={**method, "seed": 6},
            adapter__start=str(tmp_path / "a" / "adapter"),
        )
    run(place, tmp_path / "c", method=method, adapter__start=str(tmp_path / "a" / "adapter"))


def test_to_go_on_the_same_start_is_wanted_wherever_it_lies(place, tmp_path):
    out = tmp_path / "o"
    run(place, out, save__every=1)
    whole = tensors(out / "adapter")

    def killed():
        shutil.rmtree(out / "checkpoints" / "checkpoint-3")
        shutil.rmtree(out / "adapter")

    killed()
    moved = shutil.copytree(place / "first" / "adapter", tmp_path / "moved")
    train(
        config(place, out, adapter__start=str(moved), save__every=1), go_on=True, stream=StringIO()
    )
    again = tensors(out / "adapter")
    assert all(torch.equal(whole[key], again[key]) for key in whole)
    killed()
    other = tmp_path / "other"
    train(config(place, other, train__seed=3), stream=StringIO())
    with pytest.raises(ConfigError, match=r"the tensors of adapter\.start differ"):
        train(
            config(place, out, adapter__start=str(other / "adapter"), save__every=1),
            go_on=True,
            stream=StringIO(),
        )
    with pytest.raises(ConfigError, match=r"the tensors of adapter\.start differ"):
        train(config(place, out, save__every=1), go_on=True, stream=StringIO())
