"""`weft analyze` on what `weft train` leaves: the checkpoints, and the base that the run had."""

import tiny
from safetensors.torch import load_file, save_file

from weft.cli import main
from weft.training import from_dict, train


def run(capsys, *words):
    status = main(["analyze", *map(str, words)])
    shown = capsys.readouterr()
    return status, shown.out, shown.err


def test_a_run_of_weft_train_is_held_against_the_weights_that_it_had(capsys, tmp_path):
    tiny.language_model(tmp_path / "lm")
    tiny.pairs(tmp_path / "pairs.jsonl")
    train(
        from_dict(
            {
                "out": str(tmp_path / "run"),
                "model": {"path": str(tmp_path / "lm")},
                "method": {"name": "LoRA", "r": 2},
                "data": {"train": str(tmp_path / "pairs.jsonl")},
                "optim": {"lr": 1e-2, "warm_up": 0},
                "train": {"steps": 6, "batch": 4, "device": "cpu"},
                "save": {"every": 2, "keep": 3},
            }
        )
    )
    capsys.readouterr()
    status, out, err = run(capsys, "--model", tmp_path / "lm", "--adapters", tmp_path / "run")
    assert (
        status == 0 and "run (LoRA), 3 checkpoints" in out and "step 2" in out and "step 6" in out
    ), err
    weights = load_file(tmp_path / "lm" / "model.safetensors")
    weights["model.norm.weight"] = weights["model.norm.weight"] + 1e-3
    save_file(weights, tmp_path / "lm" / "model.safetensors", metadata={"format": "pt"})
    for place in (
        tmp_path / "run",
        tmp_path / "run" / "adapter",
        tmp_path / "run" / "checkpoints" / "checkpoint-4",
    ):
        status, _, err = run(capsys, "--model", tmp_path / "lm", "--adapters", place)
        assert status == 1 and "was trained on a base whose weights have checksum" in err, place
