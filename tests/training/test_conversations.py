"""Conversations as people have them: what templates leave out is refused, and the assistant's turns
are found, with what closes them.
"""

import json
from datetime import datetime

import chat_templates
import pytest
import tiny
from chat_templates import GLM4, GPT_OSS, HEADERS, QWEN3

from weft.encoding.conversation import asked
from weft.encoding.labels import encode_labels
from weft.encoding.render import Renderer, marked
from weft.encoding.samples import Samples
from weft.encoding.template import with_call_arguments
from weft.errors import WeftError

CHAT = [
    {"role": "user", "content": "hi"},
    {"role": "assistant", "content": "yo"},
    {"role": "user", "content": "a?"},
    {"role": "assistant", "content": "b!"},
]
TOOLS = [
    {
        "type": "function",
        "function": {
            "name": "weather",
            "description": "The weather of a place",
            "parameters": {"type": "object", "properties": {"city": {"type": "string"}}},
        },
    }
]
CALL = {
    "role": "assistant",
    "tool_calls": [
        {
            "id": "c1",
            "type": "function",
            "function": {"name": "weather", "arguments": {"city": "Ulm", "days": 3}},
        }
    ],
}
CALLED = [
    {"role": "user", "content": "in Ulm?"},
    CALL,
    {"role": "tool", "tool_call_id": "c1", "name": "weather", "content": "sunny"},
    {"role": "assistant", "content": "Sun."},
]
NAMED = QWEN3.replace("m.role in ('user', 'system')", "m.role == 'user'")  # drops system messages


def said(role, content, **more):
    return {"role": role, "content": content, **more}


def answer(**more):
    return [said("user", "hi"), said("assistant", "yo", **more)]


def encoded(row, template=tiny.CHATML, stops=(), **options):
    tokenizer = chat_templates.tokenizer(template)
    ids = [tokenizer.convert_tokens_to_ids(stop) for stop in stops]
    renderer = Renderer(tokenizer, 1024, stops=ids, **options)
    row = row if isinstance(row, dict) else {"messages": row}
    return tokenizer, renderer.encode(Samples("messages", [row], "data.jsonl"), "training")


def shown(row, template=tiny.CHATML, **options):
    tokenizer, found = encoded(row, template, **options)
    return marked(tokenizer, found.rows[0]["input_ids"], found.rows[0]["labels"])


def learnt(text):
    """What is in the loss."""
    return [piece.partition("⟧")[0] for piece in text.split("⟦")[1:]]


# What the template leaves out.


@pytest.mark.parametrize(
    ("template", "row", "named"),
    [
        (tiny.CHATML, answer(reasoning_content="so"), "'reasoning_content' of message 2 "),
        (tiny.CHATML, [CALLED[0], CALL], r"'tool_calls\[0\].function.name' of message 2 "),
        (tiny.CHATML, {"messages": CHAT, "tools": TOOLS}, r"'tools\[0\].function.name'"),
        (QWEN3, {"messages": CHAT, "documents": [{"text": "d"}]}, r"'documents\[0\].text'"),
        (NAMED, [said("system", "Be brief."), *CHAT], "'content' of message 1 .system.: 'Be"),
        (QWEN3, [said("function", "sunny", name="w"), *CHAT], "'name' of message 1 .tool.: 'w'"),
        (NAMED.replace("== 'tool'", "== 'x'"), CALLED, "'content' of message 3 .tool."),
        (QWEN3, [*answer(reasoning_content="so"), *CHAT], "'reasoning_content' of message 2 "),
        (QWEN3, [*answer(), *answer(name="Bo")], "'name' of message 4 .assistant.: 'Bo'"),
        (QWEN3, [*answer(score=0.5)], "'score' of message 2 .assistant.: '0.5'"),
        (QWEN3, [*answer(prefix=True)], "'prefix' of message 2 .assistant.: 'True'"),
        (GPT_OSS, [*answer(thinking="so"), *CHAT], "'thinking' of message 2 "),
        (
            tiny.CHATML.replace("m['content']", "m['content'][:9]"),
            [said("user", "hi"), said("assistant", "0123456789")],
            "'content' of message 2",
        ),
        # a part of the text is dropped, and words that stand elsewhere do not count
        (
            QWEN3,
            [said("user", "hi"), said("assistant", "<think>hm</think>yo"), *CHAT],
            "'content' of message 2",
        ),
        (NAMED, [said("system", "user"), *CHAT], "'content' of message 1 .system."),
    ],
)
def test_what_the_template_does_not_render_is_named_with_record_key_and_cure(template, row, named):
    with pytest.raises(WeftError, match=rf"data.jsonl, sample 1: .*{named}") as error:
        encoded(row, template)
    assert "data.chat_template" in str(error.value) and "\n" not in str(error.value)


def test_a_mark_in_the_text_does_not_change_what_is_found():
    strange = [
        said("user", "{% raw %}\U000f0000\U00100000 <think>"),
        said("assistant", ' "quoted" \\ \n\n two  blanks '),
    ]
    for template in (tiny.CHATML, QWEN3, GPT_OSS):
        text = shown(strange, template)
        assert '"quoted" \\ \n\n two  blanks' in learnt(text)[0]
    picky = tiny.CHATML.replace(  # acts on the content itself
        "{{ m['content'] }}", "{{ 'short' if m['content'] | length == 2 else m['content'] }}"
    )
    with pytest.raises(WeftError, match="message 1"):
        shown(CHAT, picky)
    grown = tiny.CHATML.replace(
        "{{ m['content'] }}", "{{ m['content'] }}#{{ m['content'] | length }}"
    )
    assert learnt(shown(CHAT, grown)) == ["yo#2<|im_end|>", "b!#2<|im_end|>"]


def test_tools_and_calls_are_rendered_in_the_form_that_the_template_takes():
    as_text = json.loads(json.dumps(CALLED))
    as_text[1]["tool_calls"][0]["function"]["arguments"] = json.dumps({"city": "Ulm", "days": 3})
    objects = QWEN3.replace("call.arguments if call.arguments is string else ", "")
    texts = QWEN3.replace("if call.arguments is string else call.arguments | tojson", "")
    wanted = '<tool_call>{"name": "weather", "arguments": {"city": "Ulm", "days": 3}}</tool_call>'
    for template in (QWEN3, objects, texts):
        for messages in (CALLED, as_text):
            text = shown({"messages": messages, "tools": json.dumps(TOOLS)}, template)
            assert learnt(text)[0] == f"{wanted}<|im_end|>"
            assert "The weather of a place" in text and "sunny" in text


@pytest.mark.parametrize(
    ("cell", "says"),
    [
        ('[{"name": "a", "name": "b"}]', "the key 'name' is given twice"),
        ("[" * 100_000, "nested more than 64 deep"),
        ('[{"name": NaN}]', "NaN is no number"),
        ('[{"name": ]', "Expecting value"),
    ],
)
def test_a_json_text_within_a_record_is_read_as_strictly_as_a_file(cell, says):
    for row, place in (
        ({"messages": CHAT, "tools": cell}, "sample 1: tools"),
        ({"messages": CHAT, "documents": cell}, "sample 1: documents"),
        ({"messages": CHAT, "tools": [cell]}, "sample 1: tools, entry 1"),
        ({"messages": cell}, "sample 1: messages"),
        ([CALLED[0], {**CALL, "tool_calls": cell}], "sample 1, message 2: tool_calls"),
    ):
        with pytest.raises(WeftError, match=rf"{place}: it is text, but no JSON: .*{says}"):
            encoded(row)


def test_arguments_that_say_two_things_are_no_object_for_a_template():
    def talk(arguments):
        function = {"name": "weather", "arguments": arguments}
        call = {"id": "c1", "type": "function", "function": function}
        return [CALLED[0], {**CALL, "tool_calls": [call]}, *CALLED[2:]]

    twice = '{"city": "Bonn", "city": "Ulm"}'
    objects = QWEN3.replace("call.arguments if call.arguments is string else ", "")
    with pytest.raises(WeftError, match=r"'tool_calls\[0\].function.arguments' of message 2"):
        encoded(talk(twice), objects)
    for arguments in (twice, "{[" + "[" * 500):  # a text of the record, as it is
        assert arguments in shown(talk(arguments), QWEN3)
    deep = '{"a":' * 20_000 + "1" + "}" * 20_000  # no object that could be read
    assert with_call_arguments(asked(talk(deep)), as_text=False) is None


def test_a_call_without_content_suits_templates_that_need_one():
    needs = QWEN3.replace("m.content if m.content is string else ''", "'' + m.content")
    assert "weather" in learnt(shown(CALLED, needs))[0]
    with pytest.raises(WeftError, match=r"message 2: .*user message has no content"):
        shown([*answer()[:1], {"role": "user"}, *CHAT])


def test_a_call_of_a_function_is_one_of_a_tool_if_the_template_knows_those_only():
    older = [
        CALLED[0],
        {"role": "assistant", "content": None, "function_call": {"name": "w", "arguments": "{}"}},
        {"role": "function", "name": "w", "content": "sunny"},
        CALLED[3],
    ]
    text = shown(older, QWEN3)
    assert learnt(text)[0] == '<tool_call>{"name": "w", "arguments": {}}</tool_call><|im_end|>'
    assert "<tool_response>sunny</tool_response>" in text
    own = tiny.CHATML.replace(
        "{{ m['content'] }}",
        "{{ m['content'] or '' }}{% if m.function_call %}{{ m.function_call | tojson }}{% endif %}"
        "{% if m.role == 'function' %} from {{ m.name }}{% endif %}",
    )
    assert "<|im_start|>function\nsunny from w<|im_end|>" in shown(older, own)


def test_answers_of_tools_in_another_order_than_their_calls_need_ids_in_the_text():
    calls = [{**CALL["tool_calls"][0], "id": i} for i in ("c1", "c2")]
    answers = [
        {"role": "tool", "tool_call_id": i, "content": f"it is {i[1:]}"} for i in ("c2", "c1")
    ]
    talk = [CALLED[0], {"role": "assistant", "tool_calls": calls}, *answers, CALLED[3]]
    with pytest.raises(WeftError, match=r"'tool_call_id' of message 3|tool_calls.0..id"):
        shown(talk, QWEN3)
    assert "it is 2" in shown([*talk[:2], *reversed(answers), CALLED[3]], QWEN3)


def test_content_in_parts_is_its_text():
    parts = [{"type": "text", "text": "y"}, {"type": "text", "text": "o"}]
    assert learnt(shown([said("user", [parts[0]]), said("assistant", parts)])) == ["yo<|im_end|>"]
    only_parts = tiny.CHATML.replace("m['content']", "m['content'][0]['text']")
    assert learnt(shown(CHAT, only_parts)) == ["yo<|im_end|>", "b!<|im_end|>"]
    for content, named in (
        ([{"type": "image_url", "image_url": "u"}], "part 1: only parts with text.*'image_url'"),
        ([{"type": "text", "text": "a", "cache_control": 1}], "nothing reads its key 'cache_co"),
        ({"a": 1}, "message 1: content=.* is not text"),
        (4, "message 1: content=4 is not text"),
    ):
        with pytest.raises(WeftError, match=named):
            shown([said("user", content), *CHAT])


def test_weight_and_train_take_a_turn_out_of_the_loss():
    for more in ({"weight": 0}, {"train": False}, {"weight": 0.0, "train": False}):
        for template in (tiny.CHATML, QWEN3, GPT_OSS, with_generation()):
            text = shown([*answer(**more), *CHAT[2:]], template)
            assert len(learnt(text)) == 1 and "b!" in learnt(text)[0] and "yo" in text
            assert "weight" not in text and "train" not in text
    assert len(learnt(shown([*answer(weight=1, train=True), *CHAT[2:]]))) == 2
    for more, named in (
        ({"weight": 0.5}, "message 2: weight=0.5: write 0 or 1"),
        ({"train": "no"}, "message 2: train='no': write true or false"),
        ({"weight": 0, "train": True}, "message 2: weight and train contradict"),
    ):
        with pytest.raises(WeftError, match=named):
            shown(answer(**more))
    with pytest.raises(WeftError, match=r"message 2 is taken out of the loss .*data.loss_on=all"):
        shown([*answer(train=False), *CHAT[2:]], loss_on="all")
    with pytest.raises(WeftError, match="message 1: train puts a user message into the loss"):
        shown([said("user", "hi", train=True), *CHAT[1:]])


def with_generation():
    return tiny.CHATML.replace(
        "{{ m['content'] }}<|im_end|>",
        "{% if m['role'] == 'assistant' %}{% generation %}{{ m['content'] }}<|im_end|>\n"
        "{% endgeneration %}{% else %}{{ m['content'] }}<|im_end|>{% endif %}",
    )


# Where the turns are, and what ends them.


def test_qwen3_with_several_turns():
    text = shown(CHAT, QWEN3)
    assert learnt(text) == ["yo<|im_end|>", "<think>\n\n</think>\n\nb!<|im_end|>"]
    thought = [*CHAT[:2], CHAT[2], said("assistant", "b!", reasoning_content="so")]
    assert learnt(shown(thought, QWEN3))[1] == "<think>\nso\n</think>\n\nb!<|im_end|>"


def test_gpt_oss_and_templates_that_print_the_time():
    stops = ("<|return|>",)
    text = shown(CHAT, GPT_OSS, stops=stops)
    final = "<|channel|>final<|message|>"
    assert learnt(text) == [f"{final}yo<|end|>", f"{final}b!<|return|>"]
    assert text.startswith(
        f"<|start|>system<|message|>Current date: {datetime.now().astimezone():%Y-%m-}"
    )
    thought = learnt(shown(answer(reasoning_content="so"), GPT_OSS, stops=stops))
    assert thought == [
        f"<|channel|>analysis<|message|>so<|end|><|start|>assistant{final}yo<|return|>"
    ]


def test_glm4_turns_end_with_the_next_header_if_generation_stops_at_it():
    stops = ("<|user|>", "<|observation|>")
    for messages in (CHAT, CHAT[:2]):
        text = shown(messages, GLM4, stops=stops)
        wanted = ["\nyo<|user|>", "\nb!<|user|>"][: len(messages) // 2]
        assert learnt(text) == wanted and text.endswith("<|user|>⟧")
    with pytest.raises(WeftError, match="0 masked, 1 without one"):  # stops at none of its tokens
        shown(CHAT, GLM4)


def test_a_header_never_ends_a_turn():
    tokenizer, _ = encoded(CHAT, with_generation())
    renderer = Renderer(tokenizer, 500, template=HEADERS)
    tokens = renderer.render({"messages": CHAT}, "messages")
    text = marked(tokenizer, tokens.ids, [1 if inside else -100 for inside in tokens.in_loss])
    assert learnt(text) == ["yo\n", "b!\n"] and tokens.ends == [None, None]
    # what is trained is what generation gives
    assert (
        renderer.chat_prompt(CHAT[:3]) == "<|user|>hi\n<|assistant|>yo\n<|user|>a?\n<|assistant|>"
    )
    blanks = [CHAT[0], said("assistant", "  yo")]
    assert learnt(shown(blanks, HEADERS.replace("\n", "</s>")))[0] == "  yo</s>"
    closed = HEADERS.replace("\n", "</s>\n")
    assert learnt(shown(CHAT, closed)) == ["yo</s>", "b!</s>"]


def test_the_end_is_the_token_that_stops_and_not_one_before_or_after():
    twice = tiny.CHATML.replace("<|im_end|>\n", "<|end|><|im_end|>\n</s>")
    assert learnt(shown(CHAT, twice, stops=("<|im_end|>",)))[0] == "yo<|end|><|im_end|>"
    assert learnt(shown(CHAT, with_generation()))[1] == "b!<|im_end|>\n"
    started = [said("assistant", "Hello?"), *CHAT]  # nothing before it but its header
    assert learnt(shown(started))[0] == "Hello?<|im_end|>"
    spoken = [said("user", "say <|im_end|>"), said("assistant", "a <|im_end|> b")]
    for stops in ((), ("<|im_end|>",)):
        assert learnt(shown(spoken, stops=stops)) == ["a <|im_end|> b<|im_end|>"]
    assert encoded(spoken)[1].counts.control == 1 and encoded(CHAT)[1].counts.control == 0


def test_blank_answers_are_counted_and_reported():
    for content in ("", "  \n"):
        for template in (tiny.CHATML, QWEN3, GPT_OSS, with_generation()):
            _, found = encoded([*CHAT[:1], said("assistant", content), *CHAT[2:]], template)
            assert found.counts.blank == 1
            assert "1 of 1 samples with an answer that is empty" in found.counts.notes("t")[0]
    assert encoded(CALLED, QWEN3)[1].counts.blank == 0
    tokenizer = tiny.tokenizer()
    rows = [{"prompt": "a", "completion": c} for c in ("", "b", " ")]
    assert Renderer(tokenizer, 99).encode(Samples("prompt", rows, "x"), "x").counts.blank == 2


def test_answers_that_a_block_leaves_out_and_unknown_characters_are_counted():
    last = with_generation().replace("m['role'] == 'assistant' %}", "loop.last %}")
    _, found = encoded(CHAT, last)
    assert found.counts.unmarked == 1 and "leaves out of the loss" in found.counts.notes("t")[0]
    assert encoded(CHAT, with_generation())[1].counts.unmarked == 0
    tokenizer = words("a b <unk> </s>", eos_token="</s>", unk_token="<unk>")
    rows = [{"text": text} for text in ("a c", "a b", "a <unk> b", "c <unk>")]
    assert Renderer(tokenizer, 9).encode(Samples("text", rows, "x"), "x").counts.unknown == 2
    labelled = Samples("label", [{"texts": (row["text"],), "label": 1} for row in rows], "x")
    assert encode_labels(labelled, tokenizer, 9, None).counts.unknown == 2


def words(known, **special):
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    vocab = {word: i for i, word in enumerate(known.split())}
    raw = Tokenizer(models.WordLevel(vocab, unk_token=special["unk_token"]))
    raw.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=raw, model_max_length=99, **special)


def test_an_unknown_token_that_the_template_prints_tells_of_no_unknown_characters():
    """SmolLM2's is <|endoftext|>, an ordinary special token."""
    tokenizer = chat_templates.tokenizer("<|start|>" + tiny.CHATML)
    tokenizer.unk_token = "<|start|>"
    found = Renderer(tokenizer, 900).encode(Samples("messages", [{"messages": CHAT}], "x"), "x")
    assert tokenizer.unk_token_id in found.rows[0]["input_ids"]
    assert found.counts.unknown == 0 and not found.counts.notes("x")


@pytest.mark.parametrize("key", ["weight", "train"])
def test_records_that_leave_out_all_their_turns_are_named_as_the_reason(key):
    talk = [{**m, key: 0} if m["role"] == "assistant" else m for m in CHAT]
    talk = [{**m, key: bool(m[key])} if key == "train" and key in m else m for m in talk]
    with pytest.raises(WeftError, match=r"1 of them take all turns .* weight: 0 or train: false"):
        encoded(talk)


def test_a_turn_that_nothing_closes_is_neither_cut_nor_masked():
    open_end = tiny.CHATML.replace("<|im_end|>", "")
    renderer = Renderer(chat_templates.tokenizer(open_end), 900)
    with pytest.raises(WeftError, match=r"0 cut off, 0 masked, 2 without one.*must close"):
        renderer.encode(Samples("messages", [{"messages": CHAT}] * 2, "x"), "x")
    closes = "{% if m.content != 'b!' %}<|im_end|>{% endif %}"
    some = tiny.CHATML.replace("<|im_end|>", closes)
    renderer = Renderer(chat_templates.tokenizer(some), 900)
    rows = [{"messages": talk} for talk in (CHAT[:2], CHAT)]
    counts = renderer.encode(Samples("messages", rows, "x"), "x").counts
    assert (counts.end_cut, counts.end_masked, counts.end_missing) == (0, 0, 1)
    assert "1 of 2 samples with a turn that no special token closes" in counts.notes("x")[0]


def test_what_the_template_adds_to_the_loss_is_remarked():
    _, found = encoded(CHAT, QWEN3)
    assert found.rows[0]["remarks"] == (
        "in the loss, but added by the chat template itself: '<think>\\n\\n</think>\\n\\n'",
    )
    assert "remarks" not in encoded(CHAT)[1].rows[0]
    added = with_generation().replace("{% generation %}", "{% generation %}<think></think>")
    assert "'<think></think>'" in encoded(CHAT, added)[1].rows[0]["remarks"][0]


def test_a_turn_that_generation_would_not_see_so_is_refused_with_the_reason():
    opened = QWEN3.replace(
        "'<|im_start|>assistant\\n' }}{% endif", "'<|im_start|>assistant\\n<t>' }}{% endif"
    )
    with pytest.raises(WeftError, match=r"sample 1: .*up to message 2 differently.*'<t>' for gen"):
        shown(CHAT, opened)
    with pytest.raises(WeftError, match="train: false"):
        shown(CHAT, opened)


REWRITES = ("lower", "upper", "capitalize", "escape", "replace('u', 'v')", "replace(' ', '')")


@pytest.mark.parametrize("rewrite", [*REWRITES, "replace('\n', ' ')", "indent(2)"])
@pytest.mark.parametrize("role", ["user", "assistant"])
def test_a_text_that_the_template_rewrites_is_refused(rewrite, role):
    template = tiny.CHATML.replace(
        "{{ m['content'] }}",
        f"{{% if m.role == '{role}' %}}{{{{ m.content | {rewrite} }}}}"
        "{% else %}{{ m.content }}{% endif %}",
    )
    said = {"user": "Shall <U> & us\ncome?", "assistant": "Up & <us>,\nYou"}
    talk = [{"role": who, "content": text} for who, text in said.items()]
    number = list(said).index(role) + 1
    with pytest.raises(WeftError, match=rf"not render as written.* 'content' of message {number} "):
        encoded(talk, template)
    calm = [{"role": who, "content": "0"} for who in said]
    assert "0" in shown(calm, template)  # nothing to rewrite


def test_blanks_beside_tags_are_the_templates_own():
    thought = {"role": "assistant", "content": "<think>a\n b</think>\nYes <b>x</b>  y"}
    assert "<think>\na\n b\n</think>\n\nYes <b>x</b>  y" in shown([CHAT[0], thought], QWEN3)


def test_a_word_of_another_text_does_not_stand_for_a_key():
    """`name` steers the template, so that its marks fail, and it is not printed."""
    chosen = "{% for m in messages if m.name is not string or m.name == 'is' %}"
    template = tiny.CHATML.replace("{% for m in messages %}", chosen)
    talk = [{"role": "user", "content": "this is it", "name": "is"}, CHAT[1]]
    with pytest.raises(WeftError, match="'name' of message 1"):
        encoded(talk, template)


def test_all_samples_and_messages_with_an_unread_text_are_named():
    renderer = Renderer(chat_templates.tokenizer(tiny.CHATML), 900)
    odd = [{**message, "mood": "bad"} for message in [*CHAT, *CHAT, *CHAT]]
    rows = [{"messages": odd if i % 3 == 1 else CHAT} for i in range(12)]
    with pytest.raises(WeftError) as error:
        renderer.encode(Samples("messages", rows, "f.jsonl"), "training")
    listed = ", ".join(str(i) for i in range(4, len(odd) + 1))
    for part in (
        "f.jsonl, sample 2: ",
        f"'mood' of message {listed}",
        "So it is in 3 more: sample 5, sample 8, sample 11.",
    ):
        assert part in str(error.value)
    with pytest.raises(WeftError, match="So it is in at least 20 more: sample 2, sample 3, "):
        renderer.encode(Samples("messages", [{"messages": odd}] * 50, "f.jsonl"), "training")


@pytest.mark.parametrize("role", ["tool", "function"])
@pytest.mark.parametrize("legacy", [False, True])
def test_a_name_on_an_answer_is_that_of_its_call_or_refused(role, legacy):
    function = {"name": "weather", "arguments": "{}"}
    made = {"function_call": function} if legacy else {"tool_calls": [{"function": function}]}
    talk = [said("user", "q"), {"role": "assistant", **made}, said(role, "4"), CHAT[1]]
    for name in ("weather", None):  # the call says it
        talk[2] = said(role, "4", name=name)
        assert "<tool_response>4" in shown(talk, QWEN3)
    for before, name in ((talk[:2], "wether"), (talk[:1], "weather")):
        with pytest.raises(WeftError, match=rf"'name' of message {len(before) + 1} .*'{name}'"):
            encoded([*before, said(role, "4", name=name), CHAT[1]], QWEN3)
    shows = QWEN3.replace(
        "<tool_response>' + content", "<tool_response>' + (m.name or '') + content"
    )
    assert "<tool_response>wether4" in shown(
        [*talk[:2], said(role, "4", name="wether"), CHAT[1]], shows
    )


@pytest.mark.parametrize("how", ["", "{{ m['content'] | upper }}"])
def test_a_prompt_that_the_template_drops_or_rewrites_is_an_error(how):
    """For `weft generate --chat` and `weft judge`, as for the samples of training."""
    template = "{% for m in messages %}<|{{ m['role'] }}|>" + how + "\n{% endfor %}"
    renderer = Renderer(chat_templates.tokenizer(template), 500)
    with pytest.raises(WeftError, match="does not render 'what is it' as it is written"):
        renderer.chat_prompt([{"role": "user", "content": "what is it"}])
