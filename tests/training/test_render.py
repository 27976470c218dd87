"""Rendering: which tokens are in the loss, and samples that do not teach the model to stop."""

import csv
import gzip
import json

import pytest
import tiny

from weft.encoding.labels import classes_of, encode_labels
from weft.encoding.render import Renderer, marked
from weft.encoding.rows import IGNORED
from weft.encoding.samples import Samples
from weft.errors import ConfigError, WeftError
from weft.training.config import DataSection
from weft.training.data import load_samples

CHAT = [
    {"role": "user", "content": "hi"},
    {"role": "assistant", "content": "yo"},
    {"role": "user", "content": "a?"},
    {"role": "assistant", "content": "b!"},
]
WITH_MASK = tiny.CHATML.replace(
    "<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n",
    "<|im_start|>{{ m['role'] }}\n{% if m['role'] == 'assistant' %}{% generation %}"
    "{{ m['content'] }}<|im_end|>{% endgeneration %}{% else %}{{ m['content'] }}<|im_end|>"
    "{% endif %}{{ '\\n' }}",
)
END_OUTSIDE = WITH_MASK.replace("<|im_end|>{% endgeneration %}", "{% endgeneration %}<|im_end|>")


@pytest.fixture(scope="module")
def tokenizer():
    return tiny.tokenizer()


def shown(tokenizer, row, kind, limit=128, **options):
    encoded = Renderer(tokenizer, limit, **options).encode(Samples(kind, [row], "here"), "training")
    return marked(tokenizer, encoded.rows[0]["input_ids"], encoded.rows[0]["labels"])


def test_the_loss_is_on_the_completion_and_its_end(tokenizer):
    row = {"prompt": "two plus two is", "completion": " four"}
    assert shown(tokenizer, row, "prompt") == "two plus two is⟦ four</s>⟧"
    assert (
        shown(tokenizer, row, "prompt", loss_on="all") == "t⟦wo plus two is four</s>⟧"
    )  # the first predicts nothing
    assert shown(tokenizer, {"text": "once"}, "text") == "o⟦nce</s>⟧"


def test_a_tokenizers_own_start_and_end_stand_once():
    from tokenizers.processors import TemplateProcessing

    tokenizer = tiny.tokenizer()
    tokenizer._tokenizer.post_processor = TemplateProcessing(
        single="<s> $A </s>", special_tokens=[("<s>", 1), ("</s>", 2)]
    )
    assert shown(tokenizer, {"prompt": "a", "completion": "b"}, "prompt") == "<s>a⟦b</s>⟧"


@pytest.mark.parametrize("template", [tiny.CHATML, WITH_MASK])
def test_assistant_turns_are_in_the_loss_with_what_ends_them(tokenizer, template):
    assert shown(tokenizer, {"messages": CHAT}, "messages", template=template) == (
        "<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\n⟦yo<|im_end|>⟧\n"
        "<|im_start|>user\na?<|im_end|>\n<|im_start|>assistant\n⟦b!<|im_end|>⟧\n"
    )


def test_the_whole_conversation_has_the_tokens_of_the_template(tokenizer):
    ids = Renderer(tokenizer, 500).render({"messages": CHAT}, "messages").ids
    assert ids == tokenizer.apply_chat_template(CHAT, tokenize=True, return_dict=True)["input_ids"]


def test_ends_that_are_cut_off_or_masked_are_counted(tokenizer):
    rows = [{"prompt": "p" * n, "completion": "c" * 4} for n in (2, 6, 9, 30)]
    encoded = Renderer(tokenizer, 12).encode(Samples("prompt", rows, "here"), "training")
    counts = encoded.counts  # lengths 7, 11, 14 and 35; of the last one only the prompt is left
    assert (counts.samples, counts.cut, counts.end_cut, counts.end_masked, counts.empty) == (
        4,
        2,
        2,
        0,
        1,
    )
    assert len(encoded) == 3 and len(encoded.rows[2]["input_ids"]) == 12
    assert "2 of 4 samples whose end-of-turn token was cut off" in " ".join(
        counts.notes("training")
    )


def test_if_that_is_all_of_them_it_is_an_error(tokenizer):
    rows = [{"prompt": "p", "completion": "long"}] * 3
    with pytest.raises(
        WeftError, match=r"in none of the 3 samples .*3 cut off, 0 masked.*Raise data.max_length"
    ):
        Renderer(tokenizer, 4).encode(Samples("prompt", rows, "here"), "training")
    with pytest.raises(WeftError, match="none of the 3 samples has a token in the loss"):
        Renderer(tokenizer, 1).encode(Samples("prompt", rows, "here"), "training")
    with pytest.raises(WeftError, match=r"0 cut off, 1 masked.*generation"):
        shown(tokenizer, {"messages": CHAT}, "messages", template=END_OUTSIDE)
    with pytest.raises(WeftError, match=r"0 cut off, 0 masked, 1 without one"):
        shown(
            tokenizer,
            {"messages": CHAT},
            "messages",
            template=tiny.CHATML.replace("<|im_end|>", ""),
        )


def test_a_template_that_renders_turns_otherwise_later_is_refused(tokenizer):
    template = (
        "{% for m in messages %}{{ messages|length }}{{ m['content'] }}<|im_end|>{% endfor %}"
    )
    with pytest.raises(WeftError, match="renders the conversation up to message 2 differently"):
        shown(tokenizer, {"messages": CHAT}, "messages", template=template)
    with pytest.raises(WeftError, match="the tokenizer has none"):
        shown(tiny.tokenizer(None), {"messages": CHAT}, "messages")


def files(tmp_path):
    from pyarrow import Table, parquet

    rows = [{"prompt": "a, b", "completion": 'c "d"'}, {"prompt": "e\nf", "completion": "ä"}]
    (tmp_path / "a.jsonl").write_text("\n".join(map(json.dumps, rows)))
    (tmp_path / "a.json").write_text(json.dumps(rows))
    with (tmp_path / "a.csv").open("w", newline="") as file:
        table = csv.DictWriter(file, rows[0])
        table.writeheader()
        table.writerows(rows)
    parquet.write_table(Table.from_pylist(rows), tmp_path / "a.parquet")
    with gzip.open(tmp_path / "b.jsonl.gz", "wt") as packed:
        packed.write("\n".join(map(json.dumps, rows)))
    return rows, sorted(tmp_path.iterdir())


def test_every_file_format_gives_the_same_rows(tmp_path):
    rows, paths = files(tmp_path)
    assert len(paths) == 5
    for path in paths:
        samples, held = load_samples(DataSection(train=str(path)), None, 0)
        assert (samples.format, samples.rows, held) == ("prompt", rows, None), path.name


def load(tmp_path, rows, **fields):
    path = tmp_path / "d.jsonl"
    path.write_text("\n".join(map(json.dumps, rows)))
    return load_samples(DataSection(train=str(path), **fields), None, 0)


def test_formats_are_told_by_their_columns(tmp_path):
    for row, wanted in (
        ({"text": "a"}, "text"),
        ({"text": "a", "label": 1}, "label"),
        ({"messages": CHAT}, "messages"),
        ({"question": "q", "sentence": "s", "label": "x"}, "label"),
    ):
        assert load(tmp_path, [row])[0].format == wanted
    named = load(tmp_path, [{"q": "a", "a": "b"}], columns={"prompt": "q", "completion": "a"})[0]
    assert named.rows == [{"prompt": "a", "completion": "b"}]


@pytest.mark.parametrize(
    ("row", "fields", "said"),
    [
        ({"x": 1}, {}, "fit no format"),
        ({"prompt": "a", "completion": None}, {}, r"sample 1: completion=None is not text"),
        ({"prompt": "a"}, {"format": "prompt"}, "needs the columns prompt, completion"),
        (
            {"q": "a", "answer": "b"},
            {"columns": {"prompt": "q", "completion": "anser"}},
            r"Nearest: answer",
        ),
        ({"messages": [{"role": "asistant", "content": "x"}]}, {}, "Nearest: assistant"),
        ({"messages": CHAT[:1]}, {}, "no message has the role assistant"),
        (
            {"text": "a", "label": None},
            {},
            "line 1, column 'label': the label is None, a missing value",
        ),
    ],
)
def test_wrong_rows_are_named(tmp_path, row, fields, said):
    with pytest.raises(WeftError, match=said):
        load(tmp_path, [row], **fields)
    with pytest.raises(ConfigError, match=r"no format has this column. Nearest: prompt"):
        load(tmp_path, [{"a": "b"}], columns={"promt": "a"})


def test_a_held_out_share_is_apart_and_the_same_every_time(tmp_path):
    rows = [{"text": f"t{i}"} for i in range(20)]
    train, held = load(tmp_path, rows, eval_share=0.25)
    texts = [row["text"] for part in (train, held) for row in part.rows]
    assert len(held) == 5 and sorted(texts) == sorted(row["text"] for row in rows)
    assert load(tmp_path, rows, eval_share=0.25)[1] == held


def test_labels_become_places_among_the_classes(tokenizer):
    samples = Samples(
        "label", [{"texts": ("a",), "label": "10"}, {"texts": ("b", "c"), "label": 9}], "here"
    )
    assert classes_of(samples) == ("9", "10")
    assert [row["labels"] for row in encode_labels(samples, tokenizer, 9, ("9", "10")).rows] == [
        1,
        0,
    ]
    assert [row["labels"] for row in encode_labels(samples, tokenizer, 9, None).rows] == [10.0, 9.0]
    assert tokenizer.backend_tokenizer.truncation is None  # it is saved with the adapter
    with pytest.raises(WeftError, match="sample 1: label '10' is none of the 1 classes"):
        encode_labels(samples, tokenizer, 9, ("9",))
    assert IGNORED == -100
