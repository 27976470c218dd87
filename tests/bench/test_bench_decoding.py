"""The table of one token at a time, and the contender that takes a kept norm without a check."""

import torch
from torch import nn

import weft
from benchmarks import decoding
from support import move


def test_the_table_has_every_contender(capsys, monkeypatch):
    monkeypatch.setattr(decoding, "STORIES", "llama-tiny")
    threads = torch.get_num_threads()
    decoding.main(["1"])
    torch.set_num_threads(threads)
    head, *lines = capsys.readouterr().out.splitlines()
    assert head.startswith("llama-tiny, one row")
    assert [line.split(" ms")[0].rsplit(maxsplit=1)[0].strip() for line in lines] == list(
        decoding.CONTENDERS
    )


def test_only_within_the_block_a_stale_norm_is_taken():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(300, 300)).eval()
    adapter = weft.attach(model, weft.DoRA(r=2, targets=["0"]))
    move(adapter)
    x = torch.randn(1, 300)
    with torch.no_grad():
        model(x)
        for p in adapter.parameters():
            p.data.mul_(1.5)
        with decoding.trusting():
            stale = model(x)
        assert not torch.allclose(model(x), stale)
