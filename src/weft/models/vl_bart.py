"""VL-BART: BART with visual tokens behind the text, as VL-T5 and VL-Adapter train it.

The encoder reads text tokens, then one token per region of an image (or frame of a clip): its
features and box, each mapped to the model's width and normalised, plus embeddings of which image it
belongs to and of its place. Visual tokens have no position embedding and do not pass the
embedding's norm. The decoder is BART's.

Source: arXiv:2102.02779 and arXiv:2112.06825; tensor names are those of ylsung/VL_adapter, 545fcbb.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor, nn
from transformers.masking_utils import create_bidirectional_mask
from transformers.modeling_outputs import BaseModelOutput
from transformers.models.bart.modeling_bart import BartEncoder, BartForConditionalGeneration
from transformers.utils.output_capturing import capture_outputs

from ..errors import ConfigError

PLACES = (
    100  # special tokens <vis_extra_id_99> ... <vis_extra_id_0>, the last rows of the embedding
)
EXTRA_TOKENS = tuple(
    f"<{kind}extra_id_{i}>" for kind in ("", "vis_") for i in reversed(range(PLACES))
)
_RECORDED = ("output_attentions", "output_hidden_states")  # what the encoder is told as well
_BOX = 5  # x1, x2, y1, y2 and the area


class VLBartConfig(transformers.BartConfig):  # type: ignore[misc]
    """BART's configuration with two more fields.

    `feat_dim`: width of the features, 2048 for CLIP's RN101 and 512 for VALUE's clips. `n_images`:
    how many images one input can have.
    """

    model_type = "vl_bart"
    feat_dim: int = 2048
    n_images: int = 2


class VisualEmbedding(nn.Module):
    """Features and boxes of regions as vectors of the model's width."""

    def __init__(self, config: VLBartConfig) -> None:
        super().__init__()
        width = config.d_model
        self.feat_embedding = nn.Sequential(nn.Linear(config.feat_dim, width), nn.LayerNorm(width))
        self.absolute_vis_pos_embedding = nn.Sequential(nn.Linear(_BOX, width), nn.LayerNorm(width))
        self.img_order_embedding = nn.Embedding(config.n_images, width)

    def forward(self, feats: Tensor, boxes: Tensor, places: Tensor) -> Tensor:
        """Returns tokens [batch, images · regions, width] for features [batch, images, regions,
        feat] and boxes [batch, images, regions, 4] (x1, x2, y1, y2). `places` [regions, width] are
        the embeddings of the regions' places.
        """
        x1, x2, y1, y2 = boxes.unbind(-1)
        area = (y2 - y1) * (x2 - x1)
        box = self.absolute_vis_pos_embedding(torch.cat([boxes, area.unsqueeze(-1)], dim=-1))
        order = self.img_order_embedding.weight[: feats.shape[1], None]
        found: Tensor = self.feat_embedding(feats) + box + order + places
        return found.flatten(1, 2)


class VLBartEncoder(BartEncoder):  # type: ignore[misc]
    """BART's encoder over text and visual tokens."""

    def __init__(self, config: VLBartConfig) -> None:
        super().__init__(config)
        self.visual_embedding = VisualEmbedding(config)
        self.post_init()

    @capture_outputs  # type: ignore[untyped-decorator]
    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        vis_feats: Tensor | None = None,
        vis_boxes: Tensor | None = None,
        **kwargs: Any,
    ) -> BaseModelOutput:
        """Returns states [batch, tokens + images · regions, width]. `attention_mask` is the text's,
        [batch, tokens].
        """
        text = self.embed_tokens(input_ids) if inputs_embeds is None else inputs_embeds
        states = self.layernorm_embedding(text + self.embed_positions(text[:, :, -1]))
        if vis_feats is not None:
            states = torch.cat([states, self._visual(vis_feats, vis_boxes)], dim=1)
            attention_mask = _widened(attention_mask, states.shape[1])
        states = nn.functional.dropout(states, p=self.dropout, training=self.training)
        mask = create_bidirectional_mask(
            config=self.config, inputs_embeds=states, attention_mask=attention_mask
        )
        for layer in self.layers:
            if not (self.training and self.layerdrop > 0 and torch.rand([]) < self.layerdrop):
                states = layer(states, mask, **kwargs)
        return BaseModelOutput(last_hidden_state=states)

    def _visual(self, feats: Tensor, boxes: Tensor | None) -> Tensor:
        _check_features(self.config, feats, boxes)
        if boxes is None:
            boxes = feats.new_zeros(*feats.shape[:3], 4)
        table = self.embed_tokens.weight
        rows = table.shape[0] - 1 - torch.arange(feats.shape[2], device=table.device)
        tokens: Tensor = self.visual_embedding(feats, boxes, table[rows])
        return tokens


class VLBartForConditionalGeneration(BartForConditionalGeneration):  # type: ignore[misc]
    """VL-BART with its language model head. Without `vis_feats` it is BART.

    `vis_feats` [batch, images, regions, feat_dim]; `vis_boxes` [batch, images, regions, 4] or None
    for boxes of zeros, as with CLIP's features. All other arguments are BART's.
    """

    config_class = VLBartConfig

    def __init__(self, config: VLBartConfig) -> None:
        super().__init__(config)
        self.model.encoder = VLBartEncoder(config)
        self.post_init()

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        vis_feats: Tensor | None = None,
        vis_boxes: Tensor | None = None,
        encoder_outputs: Any = None,
        **kwargs: Any,
    ) -> Any:
        """Returns BART's output. Raises ValueError if features or boxes have another shape."""
        if encoder_outputs is None and vis_feats is not None:
            encoder_outputs = self.model.encoder(
                input_ids=input_ids,
                attention_mask=attention_mask,
                inputs_embeds=kwargs.pop("inputs_embeds", None),
                vis_feats=vis_feats,
                vis_boxes=vis_boxes,
                **{name: kwargs[name] for name in _RECORDED if name in kwargs},
            )
        if encoder_outputs is not None:  # made here, or once by `generate`
            attention_mask = _widened(attention_mask, encoder_outputs[0].shape[1])
        return super().forward(
            input_ids=input_ids,
            attention_mask=attention_mask,
            encoder_outputs=encoder_outputs,
            **kwargs,
        )


def _widened(mask: Tensor | None, length: int) -> Tensor | None:
    """The mask of a text [batch, tokens] with ones for visual tokens, [batch, length]."""
    if mask is None or mask.shape[1] == length:
        return mask
    return torch.cat([mask, mask.new_ones(len(mask), length - mask.shape[1])], dim=1)


def _check_features(config: VLBartConfig, feats: Tensor, boxes: Tensor | None) -> None:
    most = (config.n_images, PLACES, config.feat_dim)
    sizes = tuple(feats.shape[1:])
    if feats.ndim != 4 or sizes[2] != most[2] or sizes[0] > most[0] or sizes[1] > most[1]:
        raise ValueError(
            f"vis_feats must be [batch, images <= {most[0]}, regions <= {most[1]}, {most[2]}]; they "
            f"are {list(feats.shape)}"
        )
    if boxes is not None and boxes.shape != (*feats.shape[:3], 4):
        raise ValueError(
            f"vis_boxes must be {[*feats.shape[:3], 4]}, x1, x2, y1, y2 per region; they are "
            f"{list(boxes.shape)}"
        )


def from_bart(
    path: str | Path, feat_dim: int = 2048, n_images: int = 2
) -> tuple[VLBartForConditionalGeneration, Any]:
    """Returns VL-BART with the weights of a BART directory (or hub name), and its tokenizer.

    The tokenizer gets `EXTRA_TOKENS`, the embedding as many rows. They and the visual embedding
    have new values from torch's generator. Raises ConfigError if the model is no BART, OSError if
    there is none.
    """
    config = transformers.AutoConfig.from_pretrained(path, trust_remote_code=False)
    if config.model_type != "bart":
        raise ConfigError(
            f"{str(path)!r} is a {config.model_type} model; VL-BART begins with BART."
        )
    bart = BartForConditionalGeneration.from_pretrained(path, trust_remote_code=False)
    tokenizer = transformers.AutoTokenizer.from_pretrained(path, trust_remote_code=False)
    tokenizer.add_special_tokens({"additional_special_tokens": list(EXTRA_TOKENS)})
    bart.resize_token_embeddings(len(tokenizer), mean_resizing=False)
    fields = {**bart.config.to_dict(), "feat_dim": feat_dim, "n_images": n_images}
    fields.pop("model_type", None)
    model = VLBartForConditionalGeneration(VLBartConfig(**fields))
    left = model.load_state_dict(bart.state_dict(), strict=False)
    new = [name for name in left.missing_keys if ".visual_embedding." not in name]
    if new or left.unexpected_keys:
        raise ConfigError(f"{str(path)!r} does not fit BART: {[*new, *left.unexpected_keys][0]!r}.")
    return model, tokenizer


def register() -> None:
    """Makes the classes known to AutoConfig, AutoTokenizer and AutoModelForSeq2SeqLM."""
    transformers.AutoConfig.register("vl_bart", VLBartConfig, exist_ok=True)
    transformers.AutoModelForSeq2SeqLM.register(
        VLBartConfig, VLBartForConditionalGeneration, exist_ok=True
    )
