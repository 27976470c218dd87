"""A language model and a classifier of a few thousand numbers, with a byte-level tokenizer, written
to a folder.
"""

from __future__ import annotations

import json

import torch

CHATML = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
WIDTH = {
    "vocab_size": 260,
    "hidden_size": 16,
    "intermediate_size": 28,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "max_position_embeddings": 1024,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}


def tokenizer(template=CHATML):
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    special = ["<pad>", "<s>", "</s>", "<|im_start|>", "<|im_end|>"]
    vocab = {
        token: i
        for i, token in enumerate([*special[:3], *sorted(pre_tokenizers.ByteLevel.alphabet())[:-1]])
    }
    raw = Tokenizer(models.BPE(vocab, []))
    raw.pre_tokenizer, raw.decoder = (
        pre_tokenizers.ByteLevel(add_prefix_space=False),
        decoders.ByteLevel(),
    )
    made = PreTrainedTokenizerFast(
        tokenizer_object=raw,
        pad_token="<pad>",
        bos_token="<s>",
        eos_token="</s>",
        model_max_length=1024,
    )
    made.add_special_tokens({"additional_special_tokens": special[3:]})
    made.chat_template = template
    return made


def language_model(folder, biases=False, dropout=0.0):
    """A Llama with a head of its own; with biases for the methods that train those, and dropout in
    its attention.
    """
    import transformers

    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        **WIDTH,
        tie_word_embeddings=False,
        attention_bias=biases,
        mlp_bias=biases,
        attention_dropout=dropout,
    )
    transformers.AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    tokenizer().save_pretrained(folder)
    return folder


def encoder(folder):
    """A BERT without a classification head."""
    import transformers

    torch.manual_seed(0)
    config = transformers.BertConfig(
        **{k: v for k, v in WIDTH.items() if not k.startswith(("bos", "eos"))}
    )
    transformers.BertModel(config).save_pretrained(folder)
    tokenizer(None).save_pretrained(folder)
    return folder


def pairs(path, n=12):
    """prompt and completion, of different lengths."""
    rows = [{"prompt": f"{i} + {i} =", "completion": f" {'x' * (i % 3)}{2 * i}"} for i in range(n)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def labelled(path, n=16):
    path.write_text(
        "text,label\n"
        + "".join(
            f"{'good' if i % 2 else 'bad'} {i},{'yes' if i % 2 else 'no'}\n" for i in range(n)
        )
    )
    return path
