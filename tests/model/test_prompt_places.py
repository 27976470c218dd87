"""Where virtual tokens stand and who reads them: last tokens, poolers, positions, labels, and
models around models.
"""

import pytest
import torch
from torch import nn

import weft
from architectures import ARCHITECTURES, GPT2, NO_DROPOUT, transformer
from support import check_close, distance, move

F64 = torch.float64
BOTH = [weft.PreEmbed(l_p=2, l_i=1), weft.PreLayer(l_p=2, l_i=1)]
each = pytest.mark.parametrize("config", BOTH, ids=lambda c: type(c).__name__)
GREEDY = {"max_new_tokens": 4, "do_sample": False, "eos_token_id": None}


def ids(rows=2, length=7, seed=0):
    return torch.randint(3, 61, (rows, length), generator=torch.Generator().manual_seed(seed))


def attached(model, config):
    model = model.to(F64)
    move(weft.attach(model, config))
    return model


def gpt2(head="GPT2LMHeadModel", **changes):
    return transformer(head, "GPT2Config", **GPT2, **changes)()


@each
def test_every_token_of_an_encoder_answers_for_itself_the_last_one_too(config):
    model = attached(transformer("BertForMaskedLM", "BertConfig", **NO_DROPOUT)(), config)
    x, position, order = (
        ids(),
        torch.arange(7)[None].expand(2, -1),
        torch.tensor([6, 0, 1, 2, 3, 4, 5]),
    )
    straight = model(x, position_ids=position).logits
    turned = model(
        x[:, order], position_ids=position[:, order]
    ).logits  # attention knows no order of columns
    check_close(turned, straight[:, order], F64)


@each
@pytest.mark.parametrize(
    ("head", "kind", "changes"),
    [
        ("BeitModel", "BeitConfig", {**NO_DROPOUT, "use_mean_pooling": True}),
        ("SiglipVisionModel", "SiglipVisionConfig", {}),
    ],
)
def test_a_pooler_inside_the_model_reads_real_tokens_only(head, kind, changes, config):
    model = attached(transformer(head, kind, image_size=8, patch_size=2, **changes)(), config)
    pictures = torch.randn(2, 3, 8, 8, dtype=F64, generator=torch.Generator().manual_seed(0))
    out = model(pictures, output_hidden_states=True)
    assert {h.shape[1] for h in out.hidden_states} == {out.last_hidden_state.shape[1]}
    if head == "BeitModel":
        wanted = model.pooler.layernorm(out.last_hidden_state[:, 1:].mean(dim=1))
    else:
        wanted = model.get_submodule(
            "vision_model.head" if hasattr(model, "vision_model") else "head"
        )(out.last_hidden_state)
    check_close(out.pooler_output, wanted, F64)
    with weft.use(model, None):
        assert distance(model(pictures).pooler_output, out.pooler_output) > 1e-3


@each
def test_an_encoder_whose_tokens_look_back_is_refused_and_not_left_without_effect(config):
    model = transformer("CLIPTextModelWithProjection", "CLIPTextConfig", projection_dim=24)()
    with pytest.raises(weft.TargetError, match="whose tokens all see each other"):
        weft.attach(model, config)
    before = model(ids()).text_embeds
    move(weft.attach(model, weft.Prefix(n=2)))
    assert distance(model(ids()).text_embeds, before) > 1e-3


@each
def test_an_embedding_module_that_gives_more_than_embeddings_says_so(config):
    model = transformer("ViTMAEModel", "ViTMAEConfig", image_size=8, patch_size=2)()
    weft.attach(model, config)
    with pytest.raises(weft.UnsupportedError, match="ViTMAEEmbeddings gives more than one tensor"):
        model(torch.randn(2, 3, 8, 8))


@each
def test_the_decoder_of_an_encoder_decoder_made_of_two_models_is_refused(config):
    import transformers

    eye = transformer("ViTModel", "ViTConfig", image_size=8, patch_size=2, **NO_DROPOUT)()
    model = transformers.VisionEncoderDecoderModel(
        encoder=eye, decoder=gpt2(add_cross_attention=True)
    )
    with pytest.raises(weft.TargetError, match="VisionEncoderDecoderModel is an encoder-decoder"):
        weft.attach(model, config)


@each
@pytest.mark.parametrize("name", ["gpt2", "llama"])
@pytest.mark.parametrize("at_pads", [0, 1])
def test_left_padding_moves_no_virtual_token_where_the_whole_row_is_labelled(name, config, at_pads):
    model = attached(ARCHITECTURES[name].build(), config)
    row = ids(1, 4)
    x, mask = nn.functional.pad(row, (3, 0)), nn.functional.pad(torch.ones_like(row), (3, 0))
    position = (mask.cumsum(1) - 1).masked_fill(mask == 0, at_pads)
    for first in (0, 2):
        labels = row.masked_fill(torch.arange(4) < first, -100)
        found = model(
            x,
            attention_mask=mask,
            position_ids=position,
            labels=nn.functional.pad(labels, (3, 0), value=-100),
        )
        check_close(found.logits[:, 3:], model(row, labels=labels).logits, F64)


@each
def test_one_row_of_position_ids_serves_prompts_of_several_lengths(config):
    model = attached(gpt2(), config)
    x, labels = ids(), ids()
    labels[0, :2], labels[1, :5] = -100, -100
    check_close(
        model(x, position_ids=torch.arange(7)[None], labels=labels).logits,
        model(x, labels=labels).logits,
        F64,
    )
    with pytest.raises(weft.UnsupportedError, match="position ids as"):
        model(x, position_ids=torch.arange(7).expand(3, 2, 7))


@each
def test_labels_of_a_head_that_labels_tokens_do_not_move_the_end_of_the_prompt(config):
    model = attached(gpt2("GPT2ForTokenClassification"), config)
    labels = torch.zeros(2, 7, dtype=torch.long)
    labels[:, :3] = -100
    check_close(model(ids(), labels=labels).logits, model(ids()).logits, F64)


class Task(nn.Module):
    """A model in a model, whose forward says nothing of labels."""

    def __init__(self, inner):
        super().__init__()
        self.inner = inner

    def forward(self, batch):
        return self.inner(**batch)


@each
def test_a_model_inside_the_users_own_module_sees_its_labels_and_its_generate(config):
    plain = attached(gpt2(), config)
    task = Task(gpt2()).to(F64)
    adapter = weft.attach(task, config)
    with torch.no_grad():
        for mine, other in zip(
            adapter.parameters(), weft.adapters(plain)["default"].parameters(), strict=True
        ):
            mine.copy_(other)
    labels = ids().masked_fill(torch.arange(7) < 4, -100)
    check_close(
        task({"input_ids": ids(), "labels": labels}).logits, plain(ids(), labels=labels).logits, F64
    )
    check_close(task({"input_ids": ids()}).logits, plain(ids()).logits, F64)
    for cached in (False, True):
        assert torch.equal(
            task.inner.generate(ids(), use_cache=cached, **GREEDY),
            plain.generate(ids(), use_cache=cached, **GREEDY),
        )
    weft.detach(task)
    assert "generate" not in task.inner.__dict__ and not task.inner._forward_pre_hooks


@each
def test_a_prompt_that_comes_in_chunks_is_refused_by_name(config):
    model = attached(ARCHITECTURES["llama"].build(), config)
    with pytest.raises(weft.UnsupportedError, match="Leave prefill_chunk_size out"):
        model.generate(ids(), prefill_chunk_size=3, **GREEDY)


@each
def test_generating_from_embeddings_is_generating_from_their_ids(config):
    model = attached(ARCHITECTURES["llama"].build(), config)
    given = model.get_input_embeddings()(ids())
    wanted = model.generate(ids(), **GREEDY)[:, 7:]
    assert torch.equal(model.generate(inputs_embeds=given, **GREEDY), wanted)
    assert torch.equal(model.generate(inputs_embeds=given, use_cache=False, **GREEDY), wanted)


@pytest.mark.parametrize("config", [*BOTH, weft.PreEmbed(l_p=2), weft.PreLayer(l_p=2)], ids=str)
def test_generate_does_not_go_on_from_a_cache_whose_virtual_tokens_it_would_count(config):
    model = attached(ARCHITECTURES["llama"].build(), config)
    first = model.generate(ids(), return_dict_in_generate=True, **GREEDY)
    key = "cache" if "cache" in first else "past_key_values"
    text = torch.cat([first.sequences, ids(length=3, seed=1)], dim=1)
    with pytest.raises(weft.UnsupportedError, match="holds virtual tokens"):
        model.generate(text, **{key: first[key]}, **GREEDY)
    move(weft.attach(model, weft.Prefix(n=2), name="prefix"))  # of which nothing is in the cache
    first = model.generate(ids(), return_dict_in_generate=True, **GREEDY)
    text = torch.cat([first.sequences, ids(length=3, seed=1)], dim=1)
    assert torch.equal(
        model.generate(text, **{key: first[key]}, **GREEDY), model.generate(text, **GREEDY)
    )
