"""Vision-language models of a few thousand numbers, each with its processor, written to a folder; and
pictures to train them on.
"""

from __future__ import annotations

import json

import tiny
import torch

TEXT = {**tiny.WIDTH, "num_key_value_heads": 1, "vocab_size": 290}
VISION = {
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "image_size": 16,
    "patch_size": 8,
}
# As llava-1.5-hf, Qwen2.5-VL, SmolVLM and Gemma 3 have them, without their system prompts.
LLAVA = (
    "{% for m in messages %}{{ m['role'].upper() + ': ' }}"
    "{% for c in m['content'] | selectattr('type', 'equalto', 'image') %}{{ '<image>\n' }}{% endfor %}"
    "{% for c in m['content'] | selectattr('type', 'equalto', 'text') %}{{ c['text'] }}{% endfor %}"
    "{{ '</s>' if m['role'] == 'assistant' else ' ' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ 'ASSISTANT:' }}{% endif %}"
)
QWEN = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n"
    "{% if m['content'] is string %}{{ m['content'] }}{% else %}{% for c in m['content'] %}"
    "{% if c['type'] == 'image' or 'image' in c %}<|vision_start|><|image_pad|><|vision_end|>"
    "{% elif 'text' in c %}{{ c['text'] }}{% endif %}{% endfor %}{% endif %}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
SMOL = (
    "<|im_start|>{% for m in messages %}{{ m['role'] | capitalize }}"
    "{% if m['content'][0]['type'] == 'image' %}{{ ':' }}{% else %}{{ ': ' }}{% endif %}"
    "{% for line in m['content'] %}{% if line['type'] == 'text' %}{{ line['text'] }}"
    "{% elif line['type'] == 'image' %}{{ '<image>' }}{% endif %}{% endfor %}<end_of_utterance>\n"
    "{% endfor %}{% if add_generation_prompt %}{{ 'Assistant:' }}{% endif %}"
)
GEMMA = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n"
    "{% if m['content'] is string %}{{ m['content'] }}{% else %}{% for c in m['content'] %}"
    "{% if c['type'] == 'image' %}<start_of_image>{% else %}{{ c['text'] }}{% endif %}{% endfor %}"
    "{% endif %}</s>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
ROPE = {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [2, 1, 1]}


def llava(folder):
    import transformers
    from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

    words = _tokenizer("<image>")
    square = {"height": 16, "width": 16}
    images = CLIPImageProcessorPil(size={"shortest_edge": 16}, crop_size=square)
    config = transformers.LlavaConfig(
        text_config={"model_type": "llama", **TEXT},
        vision_config={"model_type": "clip_vision_model", **VISION},
        image_token_index=words.convert_tokens_to_ids("<image>"),
    )
    processor = transformers.LlavaProcessor(
        images,
        words,
        patch_size=8,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
        chat_template=LLAVA,
    )
    return _write(transformers.LlavaForConditionalGeneration, config, processor, folder)


def llava_next(folder):
    import transformers
    from transformers.models.llava_next.image_processing_pil_llava_next import (
        LlavaNextImageProcessorPil,
    )

    words = _tokenizer("<image>")
    square = {"height": 16, "width": 16}
    grid = [[16, 32], [32, 16], [32, 32]]
    images = LlavaNextImageProcessorPil(
        size={"shortest_edge": 16}, crop_size=square, image_grid_pinpoints=grid
    )
    config = transformers.LlavaNextConfig(
        text_config={"model_type": "llama", **TEXT},
        vision_config={"model_type": "clip_vision_model", **VISION},
        image_token_index=words.convert_tokens_to_ids("<image>"),
        image_grid_pinpoints=grid,
    )
    processor = transformers.LlavaNextProcessor(
        images,
        words,
        patch_size=8,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
        chat_template=LLAVA,
    )
    return _write(transformers.LlavaNextForConditionalGeneration, config, processor, folder)


def idefics3(folder):
    import transformers
    from transformers.models.idefics3.image_processing_pil_idefics3 import Idefics3ImageProcessorPil

    words = _tokenizer("<fake_token_around_image>", "<image>", "<end_of_utterance>")
    words.eos_token = "<end_of_utterance>"
    images = Idefics3ImageProcessorPil(
        size={"longest_edge": 64}, max_image_size={"longest_edge": 32}
    )
    processor = transformers.Idefics3Processor(images, words, image_seq_len=4, chat_template=SMOL)
    config = transformers.Idefics3Config(
        text_config={"model_type": "llama", **TEXT, "eos_token_id": words.eos_token_id},
        vision_config={**VISION, "image_size": 32},
        image_token_id=processor.image_token_id,
        scale_factor=2,
        pad_token_id=0,
    )
    return _write(transformers.Idefics3ForConditionalGeneration, config, processor, folder)


def qwen(folder):
    """Qwen2.5-VL, whose processor has one for videos that needs torchvision."""
    import transformers
    from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

    marks = ("<|vision_start|>", "<|image_pad|>", "<|vision_end|>", "<|video_pad|>")
    words = _tokenizer(*marks)
    ids = dict(
        zip(("start", "image", "end", "video"), words.convert_tokens_to_ids(marks), strict=True)
    )
    images = Qwen2VLImageProcessorPil(
        min_pixels=8 * 8, max_pixels=32 * 32, patch_size=4, merge_size=2, temporal_patch_size=2
    )
    config = transformers.Qwen2_5_VLConfig(
        text_config={**TEXT, "rope_parameters": ROPE},
        vision_config={
            "depth": 2,
            "hidden_size": 16,
            "intermediate_size": 24,
            "num_heads": 2,
            "patch_size": 4,
            "temporal_patch_size": 2,
            "spatial_merge_size": 2,
            "window_size": 16,
            "fullatt_block_indexes": [1],
            "out_hidden_size": 16,
        },
        image_token_id=ids["image"],
        video_token_id=ids["video"],
        vision_start_token_id=ids["start"],
        vision_end_token_id=ids["end"],
    )
    torch.manual_seed(0)
    transformers.Qwen2_5_VLForConditionalGeneration(config).save_pretrained(folder)
    words.chat_template = QWEN
    words.save_pretrained(folder)
    images.save_pretrained(folder)
    where = folder / "preprocessor_config.json"
    said = {**json.loads(where.read_text()), "processor_class": "Qwen2_5_VLProcessor"}
    where.write_text(json.dumps(said))
    return folder


def gemma(folder):
    import transformers
    from transformers.models.gemma3.image_processing_pil_gemma3 import Gemma3ImageProcessorPil

    marks = {
        "image_token": "<image_soft_token>",
        "boi_token": "<start_of_image>",
        "eoi_token": "<end_of_image>",
    }
    words = _tokenizer(*marks.values(), named=marks)
    images = Gemma3ImageProcessorPil(size={"height": 16, "width": 16})
    text = {**TEXT, "head_dim": 8, "sliding_window": 64}
    config = transformers.Gemma3Config(
        text_config=text,
        vision_config={"model_type": "siglip_vision_model", **VISION},
        image_token_index=words.convert_tokens_to_ids("<image_soft_token>"),
        boi_token_index=words.convert_tokens_to_ids("<start_of_image>"),
        eoi_token_index=words.convert_tokens_to_ids("<end_of_image>"),
        mm_tokens_per_image=4,
    )
    processor = transformers.Gemma3Processor(images, words, chat_template=GEMMA, image_seq_length=4)
    return _write(transformers.Gemma3ForConditionalGeneration, config, processor, folder)


def _tokenizer(*marks, named=None):
    words = tiny.tokenizer(None)
    turns = ["<|im_start|>", "<|im_end|>"]
    words.add_special_tokens({"additional_special_tokens": [*turns, *marks]})
    if not named:
        return words
    import transformers

    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=words.backend_tokenizer,
        pad_token="<pad>",
        bos_token="<s>",
        eos_token="</s>",
        model_max_length=1024,
        extra_special_tokens=named,
        additional_special_tokens=turns,
    )


def _write(cls, config, processor, folder):
    torch.manual_seed(0)
    cls(config).save_pretrained(folder)
    processor.save_pretrained(folder)
    return folder


def picture(path, size=(20, 14), seed=0):
    from PIL import Image

    noise = torch.randint(
        0, 256, (size[1], size[0], 3), generator=torch.Generator().manual_seed(seed)
    )
    Image.fromarray(noise.byte().numpy()).save(path)
    return path


def conversations(folder, n=8):
    """Records with no, one or two pictures of different sizes beside the file."""
    rows = []
    for i in range(n):
        names = [f"{i}-{k}.png" for k in range((1, 2, 0, 1)[i % 4])]
        for k, name in enumerate(names):
            picture(folder / name, (20 + 4 * i, 14 + 6 * k), seed=10 * i + k)
        asked = [
            *({"type": "image", "path": name} for name in names),
            {"type": "text", "text": f"What is in {len(names)} pictures{'?' * i}"},
        ]
        said = {"role": "assistant", "content": f"It is number {i}."}
        rows.append({"messages": [{"role": "user", "content": asked}, said]})
    path = folder / "data.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path
