"""Every column of a record is used or refused by name; the border between prompt and answer."""

import csv
import json

import chat_templates
import pytest
import tiny

from weft.encoding.render import Renderer
from weft.encoding.rows import IGNORED
from weft.encoding.samples import Samples
from weft.errors import ConfigError, WeftError
from weft.training.config import DataSection
from weft.training.data import load_samples

CHAT = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "yo"}]


def load(tmp_path, rows, **fields):
    path = tmp_path / "d.jsonl"
    path.write_text("\n".join(map(json.dumps, rows)))
    return load_samples(DataSection(train=str(path), **fields), None, 0)[0]


@pytest.mark.parametrize(
    ("row", "column"),
    [
        ({"prompt": "a", "completion": "b", "id": 3}, "id"),
        ({"prompt": "a", "completion": "b", "label": True}, "label"),
        ({"prompt": "a", "completion": "b", "messages": [], "text": "c"}, "text"),
        ({"messages": CHAT, "source": "web"}, "source"),
        ({"messages": CHAT, "history": [["a", "b"]]}, "history"),
        ({"instruction": "a", "output": "b", "context": "c"}, "context"),
        ({"text": "a", "meta": {"url": "u"}}, "meta"),
        ({"text": "a", "label": 0, "idx": 0}, "idx"),
    ],
)
def test_a_column_that_nothing_reads_is_an_error_with_the_cure(tmp_path, row, column):
    empty = {**row, column: None}  # as tables fill it in
    with pytest.raises(
        WeftError, match=rf"sample 2: .* the column '{column}'.*data.ignore: \[{column}\]"
    ) as error:
        load(tmp_path, [empty, row])
    assert "\n" not in str(error.value)
    assert len(load(tmp_path, [empty, empty])) == 2
    assert column not in load(tmp_path, [row, row], ignore=(column,)).rows[0]


def test_all_unread_columns_are_named_at_once_and_a_table_has_them_too(tmp_path):
    path = tmp_path / "d.csv"
    with path.open("w", newline="") as file:
        csv.writer(file).writerows([["id", "text", "label", "lang"], ["7", "a", "x", "en"]])
    with pytest.raises(WeftError, match=r"columns 'id', 'lang'.*data.ignore: \[id, lang\]"):
        load_samples(DataSection(train=str(path)), None, 0)
    samples = load_samples(DataSection(train=str(path), ignore=("id", "lang")), None, 0)[0]
    assert samples.rows == [{"texts": ("a",), "label": "x"}]


TALK = [
    {"role": "user", "content": [{"type": "text", "text": "hi", "cache": 1}], "id": 1},
    {
        "role": "assistant",
        "tool_calls": [{"id": "c", "function": {"name": "f", "arguments": {"id": 5}}}],
        "id": 2,
    },
    {"role": "tool", "content": "4", "tool_call_id": "c"},
    {"role": "assistant", "content": "yo", "weight": 0},
    {"role": "assistant", "content": "yo"},
]


def test_data_ignore_names_a_column_or_with_a_prefix_a_key_of_messages(tmp_path):
    row = {"messages": TALK, "id": 9}
    for held in (TALK, json.dumps(TALK)):  # as in a table's cell
        row = {"messages": held, "id": 9}
        kept = load(tmp_path, [row], ignore=("id", "cache")).rows[0]["messages"]
        assert [m.get("id") for m in kept] == [1, 2, None, None, None]  # the column only
        assert kept[0]["content"] == [{"type": "text", "text": "hi"}]  # no column has this name
        kept = load(tmp_path, [row], ignore=("id", "messages.id", "messages.cache")).rows[0]
        assert kept.keys() == {"messages"}
        kept = kept["messages"]
        assert not any("id" in message for message in kept)
        assert kept[1:] == [{k: v for k, v in m.items() if k != "id"} for m in TALK[1:]]
    for wrong, near in (("idd", "id"), ("messages.idd", "messages.id"), ("nope", "id, messages")):
        with pytest.raises(ConfigError, match=rf"no record has .*'{wrong}'. Nearest: {near}"):
            load(tmp_path, [row], ignore=("id", wrong))


def test_a_column_that_is_called_as_a_key_of_messages_leaves_the_key(tmp_path):
    """One namespace for both took turns into the loss that the record leaves out of it."""
    talk = [{"role": "user", "content": "hi"}, *TALK[1:]]
    extra = {"weight": 0.7, "train": "part 3", "name": "web", "tool_call_id": 1, "role": "x"}
    row = {"messages": talk, **extra}
    assert load(tmp_path, [row], ignore=tuple(extra)).rows == [{"messages": talk}]
    (found,) = load(tmp_path, [{"messages": talk}], ignore=("messages.weight",)).rows
    assert "weight" not in found["messages"][3]
    for key in ("weight", "role", "content"):
        with pytest.raises(ConfigError, match=rf"no record has a column .*Write messages.{key} if"):
            load(tmp_path, [{"messages": talk}], ignore=(key,))


def test_data_ignore_is_for_the_file_and_not_for_what_weft_writes(tmp_path):
    asked = [{"role": "user", "content": "1"}, {"role": "assistant", "content": "2"}]
    row = {"prompt": [*asked, asked[0]], "completion": [asked[1]], "train": True, "id": 3}
    ours = load(tmp_path, [{**row, "train": None, "id": None}]).rows
    assert ours[0]["messages"][1] == {**asked[1], "train": False}
    assert load(tmp_path, [row], ignore=("train", "id")).rows == ours
    lists = {"prompt": [{**asked[0], "id": 1}], "completion": [{**asked[1], "id": 1}]}
    assert load(tmp_path, [lists], ignore=("messages.id",)).rows == [{"messages": asked}]


def test_keys_of_messages_in_a_column_of_any_name_are_left_out(tmp_path):
    talk = [{**message, "id": i} for i, message in enumerate(CHAT)]
    for ignore in ("id", "messages.id"):
        for held in (talk, json.dumps(talk)):
            found = load(tmp_path, [{"c": held}], columns={"messages": "c"}, ignore=(ignore,))
            assert found.rows == [{"messages": CHAT}]
            found = load(tmp_path, [{"conversations": held}], ignore=(ignore,))
            assert found.rows == [{"messages": CHAT}]
        said = [{"from": "human", "value": "hi", "id": 1}, {"from": "gpt", "value": "yo", "id": 2}]
        found = load(tmp_path, [{"c": said}], columns={"messages": "c"}, ignore=(ignore,))
        assert found.rows == [{"messages": CHAT}]
        row = {"instruction": "a", "output": "b", "before": talk}
        found = load(tmp_path, [row], columns={"history": "before"}, ignore=(ignore,))
        assert found.rows[0]["messages"][:2] == CHAT


def test_an_unread_column_is_named_as_in_the_file(tmp_path):
    row = {"prompt": "a", "completion": "b", "c": "d", "conversations": CHAT}
    fields = {"format": "prompt", "columns": {"text": "c"}}
    with pytest.raises(WeftError, match=r"columns 'conversations', 'c'|columns 'c', 'conversatio"):
        load(tmp_path, [row], **fields)
    fields = {"format": "prompt", "ignore": ("c", "conversations")}
    assert load(tmp_path, [row], **fields).rows == [{"prompt": "a", "completion": "b"}]


def test_the_named_record_is_the_one_of_the_file_after_a_share_is_held_out(tmp_path):
    rows = [{"messages": CHAT}] * 9 + [{"messages": [*CHAT, {**CHAT[1], "mood": "bad"}]}]
    for seed in range(4):
        path = tmp_path / "d.jsonl"
        path.write_text("\n".join(map(json.dumps, rows)))
        parts = load_samples(DataSection(train=str(path), eval_share=0.3), None, seed)
        renderer = Renderer(tiny.tokenizer(), 500)
        part = parts[any("mood" in row["messages"][-1] for row in parts[1].rows)]
        with pytest.raises(WeftError, match=r"d.jsonl, sample 10: .*'mood' of message 3"):
            renderer.encode(part, "training")


def test_columns_renamed_onto_one_that_exists_are_refused(tmp_path):
    row = {"q": "a", "prompt": "other", "completion": "b"}
    with pytest.raises(WeftError, match=r"in the place of the column 'prompt', which exists too"):
        load(tmp_path, [row], columns={"prompt": "q"})
    samples = load(tmp_path, [row], columns={"prompt": "q"}, ignore=("prompt",))
    assert samples.rows == [{"prompt": "a", "completion": "b"}]
    swapped = load(
        tmp_path,
        [{"prompt": "b", "completion": "a"}],
        columns={"prompt": "completion", "completion": "prompt"},
    )
    assert swapped.rows == [{"prompt": "a", "completion": "b"}]


def test_system_and_history_come_before_prompt_and_instruction(tmp_path):
    history = [["q", "r"]]
    wanted = [
        {"role": "system", "content": "S"},
        {"role": "user", "content": "q"},
        {"role": "assistant", "content": "r"},
        {"role": "user", "content": "a"},
        {"role": "assistant", "content": "b"},
    ]
    for row in (
        {"prompt": "a", "completion": "b", "system": "S", "history": history},
        {"instruction": "a", "output": "b", "system": "S", "history": json.dumps(history)},
        {"instruction": "a", "output": "b", "system": "S", "history": wanted[1:3], "input": " "},
        {"messages": wanted[1:], "system": "S"},
    ):
        samples = load(tmp_path, [row])
        assert (samples.format, samples.rows) == ("messages", [{"messages": wanted}])
    plain = {"prompt": "a", "completion": "b", "system": "", "history": []}
    assert load(tmp_path, [plain]).format == "prompt"
    for row, named in (
        ({"messages": wanted, "system": "T"}, "a column system and a message"),
        ({"instruction": "a", "output": "b", "history": [["q"]]}, "history, entry 1"),
        ({"instruction": "a", "output": "b", "system": 4}, "system=4 is not text"),
        ({"instruction": "a", "output": "b", "input": ["c"]}, "input=.* is not text"),
    ):
        with pytest.raises(WeftError, match=rf"sample 1: .*{named}"):
            load(tmp_path, [row])


def test_tools_and_documents_reach_the_template(tmp_path):
    tools = [{"type": "function", "function": {"name": "weather", "description": "of a place"}}]
    tokenizer = chat_templates.tokenizer(chat_templates.QWEN3)
    for held in (tools, json.dumps(tools)):
        row = {"instruction": "a", "output": "b", "tools": held}
        found = Renderer(tokenizer, 900).encode(load(tmp_path, [row]), "training")
        assert '"name": "weather"' in tokenizer.decode(found.rows[0]["input_ids"])
    with pytest.raises(WeftError, match=r"tools=.* is not a list of mappings"):
        load(tmp_path, [{"messages": CHAT, "tools": {"name": "w"}}])
    documents = "{% for d in documents or [] %}{{ d.title }}: {{ d.text }}\n{% endfor %}"
    tokenizer.chat_template = documents + tiny.CHATML
    row = {"messages": CHAT, "documents": [{"title": "T", "text": "long ago", "id": 4}]}
    with pytest.raises(WeftError, match=r"'documents\[0\].id'.*data.ignore"):
        Renderer(tokenizer, 900).encode(load(tmp_path, [row]), "training")
    found = Renderer(tokenizer, 900).encode(load(tmp_path, [row], ignore=("id",)), "training")
    assert "T: long ago\n" in tokenizer.decode(found.rows[0]["input_ids"])


@pytest.mark.parametrize("fields", [{}, {"columns": {"completion": "chosen"}}])
def test_preference_pairs_are_refused_and_never_halved(tmp_path, fields):
    row = {"prompt": "a", "chosen": "b", "rejected": "c"}
    for ignore in ((), ("rejected",)):
        with pytest.raises(WeftError, match=r"sample 1: .*preference pair.*TRL's DPOTrainer"):
            load(tmp_path, [row], ignore=ignore, **fields)
    with pytest.raises(WeftError, match="preference pair"):
        load(tmp_path, [{"chosen": CHAT, "rejected": CHAT}])
    whole = {"messages": CHAT, **row, "prompt": None}
    samples = load(tmp_path, [whole], ignore=("chosen", "rejected"))  # beside the pair
    assert samples.rows == [{"messages": CHAT}]


# The border between prompt and answer.


def in_loss(tokenizer, row):
    ids, labels = row["input_ids"], row["labels"]
    learnt = [token for token, label in zip(ids, labels, strict=True) if label != IGNORED]
    return tokenizer.decode(learnt), tokenizer.decode(list(ids))


def encoded(tokenizer, prompt, completion, kind="prompt"):
    row = {"prompt": prompt, "completion": completion}
    if kind == "messages":
        row = {
            "messages": [
                {"role": "user", "content": prompt},
                {"role": "assistant", "content": completion},
            ]
        }
    return Renderer(tokenizer, 200).encode(Samples(kind, [row], "x"), "training").rows[0]


BORDERS = [
    *[("2+2=", "4"), ("2+2=", " 4"), ("once", "upon"), ("a", "b"), ("un", "happy"), ("", "4")],
    *[("x\n", "\ny"), ("he said “", "yes”"), ("ü", "ß"), ("a ", " b"), ("a ", "b"), ("a", " ")],
]


def test_nothing_comes_between_prompt_and_answer_with_sentencepiece(shared):
    from transformers import AutoTokenizer

    folder = shared / "data" / "models" / "stories15m"
    if not folder.is_dir():
        pytest.skip("the real models of `shared` are not here")
    tokenizer = AutoTokenizer.from_pretrained(folder)
    renderer = Renderer(tokenizer, 99)
    for prompt, completion in BORDERS:
        row = encoded(tokenizer, prompt, completion)
        alone = renderer.prompt_ids(prompt)
        ids, answer = list(row["input_ids"]), list(row["labels"][len(alone) :])
        assert ids[: len(alone)] == alone and answer == ids[len(alone) :]
        assert set(row["labels"][: len(alone)]) <= {IGNORED}
        decoded = tokenizer.decode(ids, skip_special_tokens=True)
        whole = tokenizer.decode(
            tokenizer(prompt + completion)["input_ids"], skip_special_tokens=True
        )
        assert decoded == whole, (prompt, completion)


def merging(add_prefix=False):
    """A byte-level tokenizer with merges over the border."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    special = ["<pad>", "<s>", "</s>", "<|im_start|>", "<|im_end|>"]
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    merges = [("Ċ", "Ċ"), ("=", "4"), ("a", "b")]
    words = [*special, *letters, *("".join(pair) for pair in merges)]
    raw = Tokenizer(models.BPE({word: i for i, word in enumerate(words)}, merges))
    raw.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=add_prefix, use_regex=False)
    raw.decoder = decoders.ByteLevel()
    made = PreTrainedTokenizerFast(
        tokenizer_object=raw, pad_token="<pad>", eos_token="</s>", model_max_length=500
    )
    made.add_special_tokens({"additional_special_tokens": special[3:]})
    made.chat_template = tiny.CHATML
    return made


def test_an_answer_that_would_merge_with_its_prompt_stays_whole_and_alone():
    tokenizer = merging()
    row = encoded(tokenizer, "2+2=", "4")
    assert in_loss(tokenizer, row) == ("4</s>", "2+2=4</s>")
    row = encoded(tokenizer, "hi", "\nyo", "messages")  # after the header's line end
    assert in_loss(tokenizer, row)[0] == "\nyo<|im_end|>"
    asked = (
        Renderer(tokenizer, 99)
        .bare()
        .prompt_ids("<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\n")
    )
    assert list(row["input_ids"][: len(asked)]) == asked
    assert "remarks" not in row
    tokenizer.chat_template = tiny.CHATML.replace(
        "{{ m['content'] }}<|im_end|>\n",
        "{% if m.role == 'user' %}{{ m.content }}<|im_end|>{% else %}{% generation %}"
        "{{ m.content }}<|im_end|>{% endgeneration %}{% endif %}{{ '\n' }}",
    )
    again = encoded(tokenizer, "hi", "\nyo", "messages")
    assert list(again["input_ids"]) == list(row["input_ids"])
    assert in_loss(tokenizer, again)[0] == "\nyo<|im_end|>"


def test_a_border_that_cannot_be_kept_moves_before_the_answer_and_is_remarked():
    from tokenizers import normalizers

    tokenizer = merging()
    tokenizer._tokenizer.normalizer = normalizers.NFC()  # an accent joins the letter before it
    row = encoded(tokenizer, "2+2=e", "\u0301s")
    assert in_loss(tokenizer, row) == ("\u00e9s</s>", "2+2=\u00e9s</s>")
    assert row["remarks"] and "the border before the answer was moved" in row["remarks"][0]
    tokenizer.chat_template = (
        "{% for m in messages %}<|im_start|>{{ 'u' if m.role == 'user' else 'me' }}"
        "{{ m.content }}<|im_end|>{% endfor %}{% if add_generation_prompt %}<|im_start|>me{% endif %}"
    )
    row = encoded(tokenizer, "hi", "\u0301s", "messages")
    assert in_loss(tokenizer, row)[0] == "\u00e9s<|im_end|>"
    assert "the border before the answer was moved" in row["remarks"][0]
