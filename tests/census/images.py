"""An image for any vision-language model of the census: pixels in the form it takes, and as many tokens as it wants."""

from __future__ import annotations

import contextlib
import inspect
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch

from tests.models import positions

SIZE, PATCH = 32, 8
MARKS = {"image_token_id": 90, "image_token_index": 90, "vision_start_token_id": 91, "vision_end_token_id": 92}
MARKS |= {"video_token_id": 89, "audio_token_id": 88}
"""Tokens of a tiny vocabulary that stand for images."""
_SIZES = {"image_size": SIZE, "patch_size": PATCH, "projection_dim": 32, "mm_tokens_per_image": 4}
_SIZES |= {"image_grid_pinpoints": [[SIZE, SIZE]], "vision_feature_layers": [-2, -1]}
KINDS = ("mm_token_type_ids", "token_type_ids")
TEXT = torch.tensor([[11, 12, 13, 14, 15, 16, 17]])
"""A document without an image."""


def shrink(config: Any) -> None:
    """Give a tiny config small images, and tokens for them within its vocabulary."""
    for part in (config, getattr(config, "vision_config", None)):
        for name, value in _SIZES.items():
            if isinstance(getattr(part, name, None), int if isinstance(value, int) else list | tuple):
                setattr(part, name, value)
    for name, value in MARKS.items():
        if isinstance(getattr(config, name, None), int):
            with contextlib.suppress(AttributeError):  # a property of some configs
                setattr(config, name, value)


@dataclass(frozen=True)
class Image:
    """A document with an image in it.

    Attributes:
        ids: int64 ``[1, S]``.
        seen: pixels, and what describes them.
        kind: the name of the input that says which tokens are of an image, ``""`` for none.
    """

    ids: torch.Tensor
    seen: dict[str, torch.Tensor]
    kind: str

    def row(self, *parts: torch.Tensor) -> dict[str, torch.Tensor]:
        """The inputs of one row made of this document and others."""
        kinds = [self._kinds(part) for part in parts]
        inputs = {"input_ids": torch.cat(parts, 1), **({self.kind: torch.cat(kinds, 1)} if self.kind else {})}
        return inputs | (self.seen if any(part is self.ids for part in parts) else {})

    def packed(self, *parts: torch.Tensor) -> dict[str, torch.Tensor]:
        """The same, packed."""
        return self.row(*parts) | {"position_ids": positions(tuple(part.shape[1] for part in parts))}

    def padded(self) -> dict[str, torch.Tensor]:
        """A batch of this document and `TEXT`, padded on the left."""
        missing = torch.zeros(1, self.ids.shape[1] - TEXT.shape[1], dtype=torch.long)
        rows = [self.row(self.ids), self.row(torch.cat([missing, TEXT], 1))]
        inputs = {name: torch.cat([row[name] for row in rows]) for name in ("input_ids", self.kind) if name}
        real = torch.cat([torch.ones_like(self.ids), torch.cat([missing, torch.ones_like(TEXT)], 1)])
        return inputs | self.seen | {"attention_mask": real}

    def _kinds(self, part: torch.Tensor) -> torch.Tensor:
        return (part == MARKS["image_token_id"]).long()


def image_of(model: Any) -> Image | None:
    """An image that a model takes on eager attention, None if no form of those below is one."""
    inner = getattr(model, "model", model)
    features = getattr(inner, "get_image_features", None) or getattr(model, "get_image_features", None)
    if features is None:
        return None
    takes = {*inspect.signature(model.forward).parameters, *inspect.signature(inner.forward).parameters}
    kind = next((name for name in KINDS if name in takes), "")
    for seen in _forms(model.config):
        try:
            marks = [MARKS["image_token_id"]] * _tokens(features(**seen))
            ids = torch.tensor([[5, 6, MARKS["vision_start_token_id"], *marks, MARKS["vision_end_token_id"], 7, 8, 9]])
            image = Image(ids, seen, kind)
            last = model(**image.row(ids), use_cache=False).logits[:, -1]
        except Exception:  # another form, whatever it raises
            continue
        # eager takes what comes after the image for another document (Cosmos3 Edge, transformers 5.17): no reference
        others = [model(**row, use_cache=False).logits[:, -1] for row in _others(image)]
        seen_behind = any(not torch.equal(last, other) for other in others)
        return image if seen_behind and ids.shape[1] > TEXT.shape[1] else None
    return None


def _others(image: Image) -> Iterator[dict[str, torch.Tensor]]:
    """Documents that differ from this one before its end: in the image, in the first token."""
    row = image.row(image.ids)
    yield row | {"pixel_values": -row["pixel_values"]}
    yield row | {"input_ids": torch.cat([TEXT[:, :1], image.ids[:, 1:]], 1)}


def _tokens(features: Any) -> int:
    """How many tokens the features of an image take."""
    if isinstance(features, torch.Tensor):
        return features.numel() // features.shape[-1]
    if isinstance(features, list | tuple):
        return sum(map(_tokens, features))
    found = features.get("pooler_output")
    return _tokens(features["last_hidden_state"] if found is None else found)


def _forms(config: Any) -> Iterator[dict[str, torch.Tensor]]:
    """Pixels as Transformers' processors pass them to models."""
    generator = torch.Generator().manual_seed(1)
    vision = getattr(config, "vision_config", config)
    channels = getattr(vision, "num_channels", None) or getattr(vision, "in_channels", 3) or 3
    frames = getattr(vision, "temporal_patch_size", 1) or 1
    side = 2 * (getattr(vision, "spatial_merge_size", 2) or 2)
    patches, pixels = side * side, (channels, SIZE, SIZE)
    grid = {"image_grid_thw": torch.tensor([[1, side, side]])}
    sizes = {"image_sizes": torch.tensor([[SIZE, SIZE]])}

    def random(*shape: int) -> dict[str, torch.Tensor]:
        return {"pixel_values": torch.randn(*shape, generator=generator)}

    yield random(1, *pixels)
    yield random(patches, channels * frames * PATCH * PATCH) | grid
    yield random(patches, channels, PATCH, PATCH) | grid
    yield random(1, 1, *pixels)
    yield random(1, 1, *pixels) | {"pixel_attention_mask": torch.ones(1, 1, SIZE, SIZE, dtype=torch.bool)}
    yield random(1, *pixels) | sizes
    yield random(1, 3, *pixels) | sizes
    yield random(1, 2, *pixels) | sizes
    places = torch.cartesian_prod(torch.arange(side), torch.arange(side)).flip(-1)[None]
    yield random(1, patches, channels * PATCH * PATCH) | {"image_position_ids": places}
    shapes = {"spatial_shapes": torch.tensor([[side, side]])}
    yield (
        random(1, patches, channels * PATCH * PATCH) | shapes | {"pixel_attention_mask": torch.ones(1, patches).long()}
    )
