"""Small test inputs for a model of transformers, from its configuration and its forward's
arguments.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import ConfigError

ROWS, LENGTH = 2, 16
_ANY_SIZE = (224, 224)  # convolutions take images of any
# The configuration's fields for the number of a region's features, by the argument that holds them.
_REGIONS = {
    "visual_feats": "visual_feat_dim",
    "visual_pos": "visual_pos_dim",
    "visual_embeds": "visual_embedding_dim",
}


def dummy_inputs(model: nn.Module, tokens: Sequence[int] = ()) -> dict[str, Tensor]:
    """Returns a small batch of two rows with fixed values: whatever the model reads of a text (its
    input_ids [2, length] begin with `tokens`), an image a row, a sound and the beginning of an
    answer.

    Raises ConfigError if nothing is known that the model reads.
    """
    return _Batch(model).inputs(tokens)


class _Batch:
    """The parts of a test input for one model."""

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self.config: Any = getattr(model, "config", None)
        self.names = tuple(inspect.signature(type(model).forward).parameters)
        self.main = str(getattr(model, "main_input_name", "input_ids"))
        self.generator = torch.Generator().manual_seed(0)
        floats = (p.dtype for p in model.parameters() if p.is_floating_point())
        self.dtype = next(floats, torch.float32)

    def inputs(self, tokens: Sequence[int]) -> dict[str, Tensor]:
        """Returns all arguments, tensors [2, ...]."""
        images = self._images() if "pixel_values" in self.names else {}
        found = {**images, **self._sound(), **self._regions()}
        if "input_ids" in self.names and self._words(self._text()):
            found |= self._texts(tokens, self._places(images), bool(found))
        if self.main not in found:
            raise ConfigError(
                f"no test input is known for {type(self.model).__name__} (it reads {self.main!r}); "
                "use --no-verify."
            )
        found |= self._answer(found.get("input_ids"))
        return {
            key: value.to(self.dtype) if value.is_floating_point() else value
            for key, value in found.items()
        }

    def _text(self) -> Any:
        get = getattr(self.config, "get_text_config", None)
        return get() if callable(get) else self.config

    @staticmethod
    def _words(config: Any) -> int:
        return int(getattr(config, "vocab_size", None) or 0)

    def _ids(self, config: Any, length: int, mixed: bool) -> Tensor:
        """Token ids [2, length]; beside an image none that stands for one."""
        ids = torch.randint(0, self._words(config), (ROWS, length), generator=self.generator)
        marks = set(_marks(self.config)) if mixed else set()
        usable = next((i for i in range(self._words(config)) if i not in marks), 0)
        for mark in marks:
            ids[ids == mark] = usable
        return ids

    def _texts(
        self, tokens: Sequence[int], places: tuple[int, int], mixed: bool
    ) -> dict[str, Tensor]:
        """The text, with `places` (an id and how often) in the middle, and what belongs to it."""
        config = self._text()
        ids = self._ids(config, min(LENGTH, _positions(config)), mixed)
        first = torch.tensor(tokens[: ids.shape[1]], dtype=ids.dtype)
        ids[0, : len(first)] = first
        mark, count = places
        if count:
            room = min(len(first) + 2, ids.shape[1])
            ids = torch.cat([ids[:, :room], torch.full((ROWS, count), mark), ids[:, room:]], 1)
        found = {"input_ids": ids}
        if "qformer_input_ids" in self.names:
            found["qformer_input_ids"] = self._ids(self.config.qformer_config, 8, False)
        if "visual_attention_mask" in self.names:
            found["attention_mask"] = torch.ones_like(ids)
        if "mm_token_type_ids" in self.names and count:
            found["mm_token_type_ids"] = (ids == mark).int()
        if "image_embeds_position_mask" in self.names:
            mask = torch.zeros_like(ids)
            mask[:, 1 : 1 + int(self.config.latent_query_num)] = 1
            found["image_embeds_position_mask"] = mask
        return found

    def _images(self) -> dict[str, Tensor]:
        """One image a row, as this model's processor would give it."""
        vision = next(
            (c for n in ("vision_config", "encoder") if (c := getattr(self.config, n, None))),
            self.config,
        )
        channels = int(getattr(vision, "num_channels", getattr(vision, "in_channels", 3)))
        if "image_grid_thw" in self.names:
            return self._patches(vision, channels)
        height, width = _size(vision)
        if not height:
            return {}
        one = (channels, height, width)
        if "aspect_ratio_ids" in self.names:
            tiles = int(vision.max_num_tiles)
            mask = torch.zeros(ROWS, 1, tiles, dtype=torch.long)
            mask[..., 0] = 1
            return {
                "pixel_values": self._noise(ROWS, 1, tiles, *one),
                "aspect_ratio_ids": torch.ones(ROWS, 1, dtype=torch.long),
                "aspect_ratio_mask": mask,
                "cross_attention_mask": mask[:, None].expand(ROWS, LENGTH + 1, 1, tiles),
            }
        if getattr(self.config, "image_grid_pinpoints", None):
            sizes = torch.tensor([[height, width]] * ROWS)
            return {"pixel_values": self._noise(ROWS, 2, *one), "image_sizes": sizes}
        several = "pixel_attention_mask" in self.names and hasattr(self.config, "scale_factor")
        return {"pixel_values": self._noise(ROWS, *((1, *one) if several else one))}

    def _patches(self, vision: Any, channels: int) -> dict[str, Tensor]:
        side = 2 * int(vision.spatial_merge_size)
        each = channels * int(vision.temporal_patch_size) * int(vision.patch_size) ** 2
        grid = torch.tensor([[1, side, side]] * ROWS)
        return {"pixel_values": self._noise(ROWS * side**2, each), "image_grid_thw": grid}

    @torch.no_grad()
    def _places(self, images: dict[str, Tensor]) -> tuple[int, int]:
        """The id that stands for a part of an image, and how many of them an image has: as many as
        there are features of it.
        """
        mark = _first(self.config, "image_token_id", "image_token_index")
        if mark is None or not images:
            return 0, 0
        if "cross_attention_mask" in images:
            return mark, 1
        count = getattr(self.config, "num_query_tokens", None)
        if count is None:
            model: Any = self.model
            reads = inspect.signature(model.get_image_features).parameters
            known = {key: value for key, value in images.items() if key in reads}
            known["pixel_values"] = known["pixel_values"].to(self.dtype)
            features = model.get_image_features(**known)
            features = getattr(features, "pooler_output", features)
            several = isinstance(features, list | tuple)
            every = torch.cat([*features]) if several else features
            count = every.flatten(0, -2).shape[0] // ROWS
        return mark, int(count)

    def _sound(self) -> dict[str, Tensor]:
        bins, places = (
            getattr(self.config, name, None) for name in ("num_mel_bins", "max_source_positions")
        )
        if "input_features" not in self.names or not bins or not places:
            return {}
        return {"input_features": self._noise(ROWS, int(bins), 2 * int(places))}

    def _regions(self) -> dict[str, Tensor]:
        """Features of three regions of an image."""
        found = {
            name: self._noise(ROWS, 3, int(getattr(self.config, field)))
            for name, field in _REGIONS.items()
            if name in self.names and getattr(self.config, field, None)
        }
        if "vis_feats" in self.names:
            found["vis_feats"] = self._noise(ROWS, 1, 3, int(self.config.feat_dim))
            found["vis_boxes"] = torch.rand(ROWS, 1, 3, 4, generator=self.generator)
        if "visual_attention_mask" in self.names and found:
            found["visual_attention_mask"] = torch.ones(ROWS, 3)
        return found

    def _answer(self, ids: Tensor | None) -> dict[str, Tensor]:
        """The first tokens of the answer of an encoder-decoder."""
        if not getattr(self.config, "is_encoder_decoder", False):
            return {}
        if "decoder_input_ids" not in self.names:
            return {}
        config = getattr(self.config, "decoder", None) or self._text()
        if ids is not None and ids.shape[1] <= _positions(config):
            return {"decoder_input_ids": ids}
        return {"decoder_input_ids": self._ids(config, min(LENGTH, _positions(config)), True)}

    def _noise(self, *shape: int) -> Tensor:
        return torch.randn(shape, generator=self.generator)


def _size(vision: Any) -> tuple[int, int]:
    """Height and width of an image; (0, 0) if unknown."""
    from ..tasks.images import image_size

    if getattr(vision, "image_size", None):
        height, width = image_size(vision)
        return int(height), int(width)
    strides = getattr(vision, "patch_stride", None)
    if isinstance(strides, list | tuple):  # any size goes; the last map has 4 x 4 places
        side = 4
        for stride in strides:
            side *= int(stride)
        return side, side
    return _ANY_SIZE if getattr(vision, "num_channels", None) else (0, 0)


def _marks(config: Any) -> Iterator[int]:
    """The ids that stand for images and videos, or mark them."""
    for name, value in vars(config).items():
        ends = name.endswith(("_token_id", "_token_index")) and isinstance(value, int)
        if ends and any(part in name for part in ("image", "video", "vision", "boi", "eoi")):
            yield value


def _first(config: Any, *names: str) -> int | None:
    found = (getattr(config, name, None) for name in names)
    return next((int(value) for value in found if value is not None), None)


def _positions(config: Any) -> int:
    fields = ("max_position_embeddings", "max_target_positions", "n_positions")
    return next((int(v) for f in fields if (v := getattr(config, f, None))), LENGTH)
