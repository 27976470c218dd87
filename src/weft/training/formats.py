"""The formats of samples and the columns of each: the one list from which all others follow."""

from __future__ import annotations

NEEDED = {
    "messages": ("messages",),
    "prompt": ("prompt", "completion"),
    "instruction": ("instruction", "output"),
    "text": ("text",),
}
LABELLED = (  # the texts beside a label
    ("sentence1", "sentence2"),
    ("text", "text2"),
    ("question", "sentence"),
    ("text",),
    ("sentence",),
)
TEMPLATE_INPUTS = ("tools", "documents")  # passed to the chat template
TURNS = ("system", "history")  # before a prompt or an instruction
CHAT = (*TURNS, *TEMPLATE_INPUTS)
IMAGES = ("image", "images")  # paths of pictures
OPTIONAL = {
    "messages": ("system", *TEMPLATE_INPUTS, *IMAGES),
    "prompt": (*CHAT, *IMAGES),
    "instruction": ("input", *CHAT, *IMAGES),
}
COLUMNS = tuple(
    dict.fromkeys(
        [
            *(column for group in (*NEEDED.values(), *LABELLED) for column in group),
            "label",
            *(column for group in OPTIONAL.values() for column in group),
        ]
    )
)
# The columns that hold one text, in which a number counts as JSON writes it.
TEXTS = tuple(column for column in COLUMNS if column not in ("messages", "label", *CHAT, *IMAGES))
