"""VL-BART: its numbers, its generation, and one adapter as the papers train it."""

import pytest
import torch

import weft
from weft import ConfigError
from weft.models import register

transformers = pytest.importorskip("transformers")

from weft.models.vl_bart import (  # noqa: E402
    EXTRA_TOKENS,
    VLBartConfig,
    VLBartForConditionalGeneration,
    from_bart,
)
from weft.papers.architectures import ARCHITECTURES  # noqa: E402

REGIONS, WIDTH = 5, 16


def config(**changes):
    small = {
        "vocab_size": 120,
        "d_model": 32,
        "encoder_layers": 2,
        "decoder_layers": 2,
        "encoder_attention_heads": 4,
        "decoder_attention_heads": 4,
        "encoder_ffn_dim": 64,
        "decoder_ffn_dim": 64,
        "max_position_embeddings": 64,
        "feat_dim": WIDTH,
        "init_std": 0.2,
        "dropout": 0.0,
        "forced_eos_token_id": None,
    }
    return VLBartConfig(**{**small, **changes})


def model(seed=0, **changes):
    torch.manual_seed(seed)
    return VLBartForConditionalGeneration(config(**changes)).eval()


def inputs(rows=3, images=2, tokens=7):
    torch.manual_seed(1)
    return {
        "input_ids": torch.randint(4, 20, (rows, tokens)),
        "vis_feats": torch.randn(rows, images, REGIONS, WIDTH),
    }


def test_it_has_the_papers_numbers_with_tied_embeddings():
    with torch.device("meta"):
        for name, numbers in (("VL-BART image", 141_156_864), ("VL-BART video", 139_977_216)):
            found = ARCHITECTURES[name].build()
            assert sum(p.numel() for p in found.parameters()) == numbers
            assert found.lm_head.weight is found.model.encoder.embed_tokens.weight


@pytest.mark.parametrize("images", [1, 2])
def test_generation_is_the_loop_of_the_likeliest_tokens(images):
    vl, given = model(), inputs(images=images)
    found = vl.generate(**given, max_new_tokens=6, do_sample=False, num_beams=1)
    tokens = torch.full((3, 1), vl.config.decoder_start_token_id)
    for _ in range(6):
        logits = vl(**given, decoder_input_ids=tokens).logits[:, -1]
        tokens = torch.cat([tokens, logits.argmax(-1, keepdim=True)], 1)
    for row, wanted in zip(found.tolist(), tokens.tolist(), strict=True):
        end = next((i for i, t in enumerate(row) if i and t == vl.config.eos_token_id), len(row))
        assert row[:end] == wanted[:end]
    assert vl.generate(**given, max_new_tokens=6, num_beams=3).shape[0] == 3


def test_padding_changes_nothing_and_the_image_matters():
    vl, given = model(), inputs()
    start = torch.full((3, 1), vl.config.decoder_start_token_id)
    wanted = vl(**given, decoder_input_ids=start).logits
    pad = torch.full((3, 2), vl.config.pad_token_id)
    ids = torch.cat([given["input_ids"], pad], 1)
    padded = {**given, "input_ids": ids, "attention_mask": ids.ne(vl.config.pad_token_id).long()}
    torch.testing.assert_close(vl(**padded, decoder_input_ids=start).logits, wanted)
    told = {"max_new_tokens": 5, "do_sample": False, "num_beams": 1}
    assert torch.equal(vl.generate(**padded, **told), vl.generate(**given, **told))
    for changed in (
        {**given, "vis_feats": given["vis_feats"].flip(1)},  # the other image first
        {**given, "vis_feats": given["vis_feats"].flip(2)},  # other places
        {**given, "vis_boxes": torch.rand(3, 2, REGIONS, 4)},
    ):
        assert (vl(**changed, decoder_input_ids=start).logits - wanted).abs().max() > 1e-3


def test_without_an_image_it_is_bart():
    vl = model()
    plain = transformers.BartForConditionalGeneration(config())
    plain.load_state_dict(vl.state_dict(), strict=False)
    ids = inputs()["input_ids"]
    assert torch.equal(vl(input_ids=ids).logits, plain.eval()(input_ids=ids).logits)


@pytest.mark.parametrize(
    ("feats", "boxes", "said"),
    [
        ((3, 2, 5, 8), None, r"vis_feats must be \[batch, images <= 2, regions <= 100, 16\]"),
        ((3, 3, 5, 16), None, r"they are \[3, 3, 5, 16\]"),
        ((3, 5, 16), None, r"they are \[3, 5, 16\]"),
        ((3, 1, 5, 16), (3, 1, 4, 4), r"vis_boxes must be \[3, 1, 5, 4\]"),
    ],
)
def test_features_of_another_shape_are_an_error(feats, boxes, said):
    given = {"input_ids": inputs()["input_ids"], "vis_feats": torch.zeros(feats)}
    if boxes is not None:
        given["vis_boxes"] = torch.zeros(boxes)
    with pytest.raises(ValueError, match=said):
        model()(**given)


def test_it_saves_and_loads_through_the_auto_classes(tmp_path):
    register()
    vl, given = model(), inputs()
    vl.save_pretrained(tmp_path)
    again = transformers.AutoModelForSeq2SeqLM.from_pretrained(tmp_path).eval()
    assert type(again) is VLBartForConditionalGeneration
    assert torch.equal(vl(**given).logits, again(**given).logits)


def tiny_bart(folder):
    from tokenizers import Tokenizer, models, pre_tokenizers

    marks = ["<s>", "<pad>", "</s>", "<unk>", "<mask>"]
    words = {word: i for i, word in enumerate([*marks, "what", "colour", "is", "it"])}
    raw = Tokenizer(models.WordLevel(words, unk_token="<unk>"))
    raw.pre_tokenizer = pre_tokenizers.Whitespace()
    names = dict(
        zip(("bos_token", "pad_token", "eos_token", "unk_token", "mask_token"), marks, strict=True)
    )
    tokenizer = transformers.PreTrainedTokenizerFast(tokenizer_object=raw, **names)
    tokenizer.save_pretrained(folder)
    torch.manual_seed(2)
    plain = config(vocab_size=len(tokenizer)).to_dict()
    for name in ("model_type", "feat_dim", "n_images"):
        plain.pop(name)
    bart = transformers.BartForConditionalGeneration(transformers.BartConfig(**plain))
    bart.save_pretrained(folder)
    return bart.eval()


def test_from_a_bart_directory(tmp_path):
    bart = tiny_bart(tmp_path / "bart")
    vl, tokenizer = from_bart(tmp_path / "bart", feat_dim=WIDTH)
    assert len(tokenizer) == len(bart.model.shared.weight) + 200 == len(vl.model.shared.weight)
    assert tokenizer.convert_tokens_to_ids("<vis_extra_id_0>") == len(tokenizer) - 1
    assert [*EXTRA_TOKENS[:1], *EXTRA_TOKENS[-1:]] == ["<extra_id_99>", "<vis_extra_id_0>"]
    ids = tokenizer("what colour is it", return_tensors="pt")["input_ids"]
    old = len(bart.model.shared.weight)
    torch.testing.assert_close(vl.eval()(ids).logits[..., :old], bart(ids).logits)
    tokenizer.save_pretrained(tmp_path / "vl")
    vl.save_pretrained(tmp_path / "vl")
    register()
    again = transformers.AutoTokenizer.from_pretrained(tmp_path / "vl")
    assert again.convert_tokens_to_ids("<vis_extra_id_0>") == len(tokenizer) - 1
    with pytest.raises(ConfigError, match="is a vl_bart model; VL-BART begins with BART"):
        from_bart(tmp_path / "vl")


BOXES = "model.encoder.visual_embedding.absolute_vis_pos_embedding.0.weight"


def as_the_papers(method, train, r=4):
    return method(
        r=r, targets=["q_proj", "v_proj"], train=train, modules_to_save=["visual_embedding"]
    )


@pytest.mark.parametrize(
    ("method", "train", "percent"),
    [(weft.LoRA, ("biases",), 5.9275), (weft.DoRA, ("biases", "norms"), 5.9617)],
)
def test_one_adapter_trains_what_the_papers_train(tmp_path, method, train, percent):
    with torch.device("meta"):
        whole = ARCHITECTURES["VL-BART image"].build()
        found = weft.attach(whole, as_the_papers(method, train, r=128)).num_parameters
        everything = sum(p.numel() for p in whole.parameters())  # the papers count the adapter too
    assert 100 * found / everything == pytest.approx(percent, abs=5e-5)

    vl, given = model(), inputs()
    base = vl(**given).logits
    adapter = weft.attach(vl, as_the_papers(method, train))
    torch.testing.assert_close(vl(**given).logits, base)
    optimizer = torch.optim.AdamW(adapter.parameters(), 1e-2)
    before = weft.snapshot(vl)
    for _ in range(3):
        vl(**given, labels=torch.randint(4, 20, (3, 4))).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    # The boxes are zero, as with CLIP's features: their weight can get no gradient.
    (named,) = weft.audit(vl, before, weft.snapshot(vl))
    assert BOXES in named
    wanted = vl(**given).logits
    assert (wanted - base).abs().max() > 1e-2
    weft.save(vl, tmp_path / "a")
    other = model()
    weft.load(other, tmp_path / "a")
    torch.testing.assert_close(other(**given).logits, wanted)
    weft.merge(other, verify=given)
    torch.testing.assert_close(other(**given).logits, wanted, rtol=1e-4, atol=1e-4)


def test_boxes_that_are_not_zero_train():
    vl, given = model(), inputs() | {"vis_boxes": torch.rand(3, 2, REGIONS, 4)}
    adapter = weft.attach(vl, as_the_papers(weft.LoRA, ("biases",)))
    optimizer = torch.optim.AdamW(adapter.parameters(), 1e-2)
    before = weft.snapshot(vl)
    for _ in range(3):
        vl(**given, labels=torch.randint(4, 20, (3, 4))).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    assert weft.audit(vl, before, weft.snapshot(vl)) == []
