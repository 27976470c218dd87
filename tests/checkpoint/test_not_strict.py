"""`load(..., strict=False)` fills what fits and reports the rest."""

from __future__ import annotations

import pytest
import torch
from checkpoint_support import (
    LAYERED,
    attached,
    copied,
    key_of,
    llama,
    read,
    refused,
    rewrite,
    saved,
    untouched,
)

import weft
from support import awake, config, net
from weft.methods import METHODS


@pytest.mark.parametrize(("writer", "method"), LAYERED)
def test_not_strict_fills_what_fits_and_reports_the_rest(writer, method, tmp_path):
    directory, x = saved(tmp_path / "a", writer, method)
    key = key_of(directory)
    rewrite(directory, lambda tensors: (tensors.pop(key), tensors.update({"odd": torch.ones(2)})))
    model = net()
    report = weft.load(model, directory, strict=False)
    assert not report.ok
    assert len(report.problems) == 2
    assert any("missing" in p and "mid" in p for p in report.problems)
    assert any("'odd'" in p for p in report.problems)
    assert "2 problems" in str(report)
    assert report is report.adapter.load_report
    tensors = read(directory)[0]
    whole = [k for k in tensors if ".layer." in k]
    live = [p for n, p in report.adapter.named_parameters() if n.startswith("layer.")]
    assert all(any(torch.equal(p, tensors[k]) for k in whole) for p in live)
    model(x)


def test_not_strict_with_nothing_wrong_reports_nothing(tmp_path):
    a = awake("DVoRA")
    weft.save(a.model, tmp_path)
    report = weft.load(net(), tmp_path, strict=False)
    assert report.ok
    assert "0 problems" in str(report)


@pytest.mark.parametrize("method", ["VeRA", "DVoRA"])
def test_not_strict_keeps_the_matrices_of_the_whole_adapter(method, tmp_path):
    """The largest layer decides every number of A and B, so they must not be drawn for the layers
    that are left.
    """
    a = awake(method)
    weft.save(a.model, tmp_path)
    model = net()
    model.mid = torch.nn.Linear(11, 9)
    model.layer = torch.nn.Linear(6, 11)
    with torch.no_grad():
        model.mid.weight.copy_(a.model.mid.weight)
        model.mid.bias.copy_(a.model.mid.bias)
        model.layer.bias.copy_(a.model.layer.bias)
    report = weft.load(model, tmp_path, strict=False)
    assert list(report.adapter.sites) == ["mid"]
    assert len(report.problems) == 1
    with torch.no_grad():
        x = torch.randn(3, 11)
        assert torch.equal(model.mid(x), a.model.mid(x))


@pytest.mark.parametrize("method", METHODS)
def test_not_strict_with_nothing_that_fits_raises(method, tmp_path):
    a = awake(method)
    weft.save(a.model, tmp_path)
    model = torch.nn.Sequential(torch.nn.Linear(3, 2), torch.nn.Linear(2, 3))
    with (
        untouched(model),
        pytest.raises(weft.CheckpointError, match="nothing that fits this Sequential"),
    ):
        weft.load(model, tmp_path, strict=False)


def test_not_strict_never_fills_nan(tmp_path):
    a = awake("LoRA")
    weft.save(a.model, tmp_path)
    rewrite(
        tmp_path,
        lambda t: t.update({k: v * float("nan") for k, v in t.items() if "mid.lora_B" in k}),
    )
    report = weft.load(net(), tmp_path, strict=False)
    assert not report.adapter.sites["mid"].B.any()


def test_many_problems_are_counted_and_found_quickly(tmp_path):
    model = llama(8)
    attached(model, config("LoRA", targets="all-linear"))
    weft.save(model, tmp_path)
    message = refused(llama(2), tmp_path, "... and 31 more", "strict=False")
    assert len(message.splitlines()) < 20


def test_both_hands_of_a_copy_are_independent(tmp_path):
    """The helper that tampers with files must not touch the original."""
    weft.save(awake("LoRA").model, tmp_path / "a")
    other = copied(tmp_path / "a")
    rewrite(other, lambda tensors: tensors.clear())
    weft.load(net(), tmp_path / "a")
