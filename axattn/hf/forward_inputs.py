"""The table of a forward's keywords by role, and functions that read inputs through it.

The role of an input decides what axattn does with it. A cache is recognised under any keyword. A keyword that is not in
the table is unknown: its tensors are reported (`unknown_tensors`), never assumed to be harmless.
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from dataclasses import dataclass
from enum import Enum
from typing import Any, Literal

import torch

from axattn.hf.caches import caches_in, is_paged


class Role(Enum):
    """The meaning of an input."""

    IDS = "token ids [B, S]"
    EMBEDDINGS = "embeddings of the tokens [B, S, D]"
    POSITIONS = "position ids [B, S], or planes of them (M-RoPE)"
    MASK = "2-D mask [B, T]: 0 for padding; it may number documents"
    CACHE = "keys, values and states of earlier tokens"
    LENGTHS = "cumulative lengths of packed documents [N + 1]"
    MAX_LENGTH = "length of the longest document"
    DOCUMENTS = "the document of each token [B, S]"
    TOKEN_TYPES = "which tokens belong to an image or to a second text [B, S]"
    TOKENS = "another value per token [B, S, ...]"
    LABELS = "targets at the positions of the inputs [B, S]"
    TARGETS = "shifted targets: what each token predicts [B, S]"
    SOURCE = "another sequence (of an encoder or decoder), its mask and positions"
    MEDIA = "images, audio and video, and their sizes"
    SETTING = "how the forward runs and what it returns"


Handling = Literal["cut", "copy", "drop", "refuse"]
"""What an unpadded row (``unpad=True``) or a part of a row (`axattn.sequence_parallel`) gets of an input: the values of
its tokens; all of it; nothing, because the information is passed in another way; or an error."""


@dataclass(frozen=True, slots=True)
class ForwardInput:
    """One keyword of a forward.

    Attributes:
        role: its meaning.
        unpads: what an unpadded row gets.
        splits: what a rank gets.
        why_not: why it can't be split, if there is a reason other than that no way is known.
        at_attention: it may reach the attention function, and has no effect there.
        read: the input hook reads it; a head that changes it before calling the inner model needs its own hook.
    """

    role: Role
    unpads: Handling = "refuse"
    splits: Handling = "refuse"
    why_not: str = ""
    at_attention: bool = False
    read: bool = False


_TOKEN = ForwardInput(Role.TOKENS, "cut", "cut")
_TOKEN_TYPE = ForwardInput(Role.TOKEN_TYPES, "cut", "cut", read=True)
_CACHE = ForwardInput(Role.CACHE, "drop", "drop", at_attention=True, read=True)
_LENGTHS = ForwardInput(Role.LENGTHS, "drop", "drop", at_attention=True, read=True)
_LONGEST = ForwardInput(Role.MAX_LENGTH, "drop", "drop", at_attention=True, read=True)
_COPIED = ForwardInput(Role.SETTING, "copy", "copy", at_attention=True)
_LAYER = ForwardInput(Role.SETTING, at_attention=True)

INPUTS: Mapping[str, ForwardInput] = {
    "input_ids": ForwardInput(Role.IDS, "cut", "cut", read=True),
    "inputs_embeds": ForwardInput(Role.EMBEDDINGS, "cut", "cut", read=True),
    "position_ids": ForwardInput(Role.POSITIONS, "drop", "cut", at_attention=True, read=True),
    "attention_mask": ForwardInput(Role.MASK, "drop", "drop", read=True),
    # the cache: since Transformers 5.24, up to 5.23, in layers, in layers with a state
    **dict.fromkeys(("cache", "past_key_values", "past_key_value", "cache_params"), _CACHE),
    **dict.fromkeys(("cu_seq_lens_q", "cu_seq_lens_k"), _LENGTHS),
    **dict.fromkeys(("max_length_q", "max_length_k"), _LONGEST),
    "seq_idx": ForwardInput(Role.DOCUMENTS, "drop", "drop", at_attention=True),
    **dict.fromkeys(("token_type_ids", "mm_token_type_ids"), _TOKEN_TYPE),
    **dict.fromkeys(("task_type_ids", "langs", "bbox", "input_shape_ids", "input_pronunciation_ids"), _TOKEN),
    **dict.fromkeys(("xpath_tags_seq", "xpath_subs_seq", "per_layer_inputs", "ple_input_ids"), _TOKEN),
    **dict.fromkeys(("moe_mm_token_type_ids", "visual_pos_masks"), _TOKEN),
    "position_embeddings": ForwardInput(Role.TOKENS, at_attention=True),
    # Gemma 4 passes its labels to its layers
    "labels": ForwardInput(Role.LABELS, "cut", "cut", at_attention=True),
    "shift_labels": ForwardInput(Role.TARGETS, "cut", "cut", at_attention=True),
    **dict.fromkeys(("encoder_hidden_states", "encoder_attention_mask", "encoder_outputs"), ForwardInput(Role.SOURCE)),
    **dict.fromkeys(("decoder_input_ids", "decoder_inputs_embeds"), ForwardInput(Role.SOURCE)),
    **dict.fromkeys(("decoder_attention_mask", "decoder_position_ids"), ForwardInput(Role.SOURCE)),
    **dict.fromkeys(("pixel_values", "pixel_values_videos", "pixel_mask", "image_sizes"), ForwardInput(Role.MEDIA)),
    **dict.fromkeys(("image_grid_thw", "video_grid_thw", "input_features", "input_values"), ForwardInput(Role.MEDIA)),
    **dict.fromkeys(("image_embeds", "deepstack_visual_embeds", "mm_encoder_outputs"), ForwardInput(Role.MEDIA)),
    # image sizes, which LFM3-VL's tower passes on; its attention also gets them as lengths
    "grid_thw": ForwardInput(Role.MEDIA, at_attention=True),
    "use_cache": ForwardInput(Role.SETTING, "drop", "drop", at_attention=True, read=True),
    "cache_position": ForwardInput(Role.SETTING, why_not="it numbers the tokens of the whole row", at_attention=True),
    "logits_to_keep": ForwardInput(Role.SETTING, "drop", "copy", at_attention=True),
    "output_attentions": ForwardInput(
        Role.SETTING, "drop", why_not="the weights of a row are on several ranks", read=True
    ),
    "output_router_logits": ForwardInput(
        Role.SETTING,
        "copy",
        why_not="the load-balancing loss would cover one rank's tokens",
        at_attention=True,
    ),
    **dict.fromkeys(("num_items_in_batch", "return_dict", "output_hidden_states"), _COPIED),
    # selects flash attention's backward algorithm, not its result
    **dict.fromkeys(("layer_idx", "deterministic"), _LAYER),
}
"""All known keywords."""


def keywords(*roles: Role) -> tuple[str, ...]:
    """The keywords of these roles, in the table's order."""
    return tuple(name for name, one in INPUTS.items() if one.role in roles)


PAGED = ("read_index", "write_index", "block_table")
"""What Transformers' continuous batching passes to every layer."""
AT_ATTENTION = frozenset(name for name, one in INPUTS.items() if one.at_attention)
"""What may reach the attention function without effect: documents are read through the mask, or by
`axattn.masks.user_masks`; labels, positions and settings are for other modules."""
HOOK_INPUTS = frozenset(name for name, one in INPUTS.items() if one.read)
"""What the input hook reads."""
CACHES = keywords(Role.CACHE)
_TOKENS = {"input_ids": 2, "inputs_embeds": 3}
"""Their number of dimensions."""
_BESIDE_TOKENS = frozenset(keywords(Role.SETTING, Role.LABELS, Role.TARGETS, Role.MASK)) - {"output_attentions"}
TOKEN_TYPES = keywords(Role.TOKEN_TYPES)
TARGETS = keywords(Role.LABELS, Role.TARGETS)
LENGTHS = (*keywords(Role.LENGTHS), *keywords(Role.MAX_LENGTH))
"""How Transformers' flash path is given documents."""
COMPARED = keywords(Role.IDS, Role.POSITIONS, Role.LABELS, Role.TARGETS, Role.MASK, Role.LENGTHS, Role.DOCUMENTS)
"""What must be equal on all ranks that share a row."""


def tokens_of(given: Mapping[str, Any]) -> torch.Tensor | None:
    """The token ids ``[B, S]`` or embeddings ``[B, S, D]`` of a forward, None if it has none."""
    found = given.get("input_ids")
    found = given.get("inputs_embeds") if found is None else found
    return found if isinstance(found, torch.Tensor) else None


def token_shape(given: Mapping[str, Any]) -> tuple[int, int] | None:
    """(B, S) of the tokens, None when there are none.

    If they are passed under an unknown keyword, its tensor must have the shape of the positions or of the mask.
    """
    ids = given.get("input_ids")
    if isinstance(ids, torch.Tensor):
        return (ids.shape[0], ids.shape[1]) if ids.ndim == 2 else None
    embeds = given.get("inputs_embeds")
    if isinstance(embeds, torch.Tensor):
        return (embeds.shape[0], embeds.shape[1]) if embeds.ndim == 3 else None
    if given.keys() <= INPUTS.keys():
        return None
    known = [x for x in (given.get("position_ids"), given.get("attention_mask")) if isinstance(x, torch.Tensor)]
    for name, x in given.items():
        if name not in INPUTS and isinstance(x, torch.Tensor) and x.ndim in (2, 3):
            rows, length = x.shape[:2]
            if any(one.ndim == 2 and length == one.shape[1] and one.shape[0] in (1, rows) for one in known):
                return rows, length
    return None


def tokens_alone(given: Mapping[str, Any]) -> tuple[int, int] | None:
    """(B, S) of the tokens if a forward is given nothing else but their 2-D mask ``[B, S]``, labels and settings, and
    there is a token; else None.

    Runs before most forwards: one loop, no calls.
    """
    tokens: Any = None
    dimensions = 0
    for name, value in given.items():
        if value is None or value is False or name in _BESIDE_TOKENS:
            continue
        if tokens is not None or name not in _TOKENS:
            return None
        tokens, dimensions = value, _TOKENS[name]
    if not isinstance(tokens, torch.Tensor) or tokens.ndim != dimensions:
        return None
    shape = tokens.shape[:2]
    mask = given.get("attention_mask")
    if mask is not None and not (isinstance(mask, torch.Tensor) and mask.shape == shape):
        return None
    rows, length = shape
    return (rows, length) if rows and length else None


def is_given(value: Any) -> bool:
    """Whether an input is set: None and False are not."""
    return isinstance(value, torch.Tensor) or bool(value)


def unpadded_as(given: Mapping[str, Any], handling: Handling) -> dict[str, Any]:
    """The inputs with this handling in an unpadded row."""
    return {key: x for key, x in given.items() if x is not None and key in INPUTS and INPUTS[key].unpads == handling}


def split_as(given: Mapping[str, Any], handling: Handling) -> dict[str, Any]:
    """The inputs with this handling on a rank."""
    return {key: x for key, x in given.items() if x is not None and key in INPUTS and INPUTS[key].splits == handling}


def caches_of(given: Mapping[str, Any]) -> list[Any]:
    """The caches among a forward's inputs: under the cache keywords, and inside values of unknown keywords."""
    found = [given[name] for name in CACHES if given.get(name) is not None]
    if not given.keys() <= INPUTS.keys():
        found += [cache for name, value in given.items() if name not in INPUTS for cache in caches_in(value)]
    return found


def is_paged_step(given: Mapping[str, Any]) -> bool:
    """Whether a forward is a step of Transformers' continuous batching, which separates its requests itself."""
    return "write_index" in given and any(is_paged(given.get(name)) for name in CACHES)


def unknown_tensors(given: Mapping[str, Any], rows: int, length: int) -> dict[str, list[torch.Tensor]]:
    """Tensors under unknown keywords that may describe tokens, by keyword.

    A tensor may describe tokens if its shape fits one value per token (``[B or 1, S, ...]``, planes of such, ``[S]``, a
    flat row ``[B * S, ...]``) or per pair of tokens (``[..., S, S]``).

    Args:
        given: the inputs of a forward, by name.
        rows: B.
        length: S.
    """
    if given.keys() <= INPUTS.keys():
        return {}
    found = {}
    for name, value in given.items():
        if name in INPUTS or value is None:
            continue
        parts = value if isinstance(value, tuple | list) else (value,)
        if isinstance(value, Mapping):
            parts = tuple(value.values())
        fitting = [x for x in parts if isinstance(x, torch.Tensor) and _is_for_tokens(x, rows, length)]
        if fitting:
            found[name] = fitting
    return found


def _is_for_tokens(x: torch.Tensor, rows: int, length: int) -> bool:
    shape = tuple(x.shape)
    if not shape:
        return False
    by_token = len(shape) > 1 and shape[0] in (1, rows) and shape[1] == length
    planes = len(shape) == 3 and shape[1] in (1, rows) and shape[2] == length
    pairs = len(shape) > 2 and shape[-2:] == (length, length)
    return by_token or planes or pairs or shape[0] == rows * length or shape == (length,)


def may_describe_documents(x: torch.Tensor, mask: torch.Tensor | None, rows: int, length: int) -> torch.Tensor | None:
    """Whether a tensor of unknown meaning may describe several documents in a row: positions that restart, document
    ids, or cu_seqlens.

    Args:
        x: the value of an unknown keyword.
        mask: ``[B, S]``, nonzero for real tokens, or None.
        rows: B.
        length: S.

    Returns:
        A bool scalar (a tensor, so that a graph can hold it), None for other shapes.
    """
    if x.is_complex() or x.dtype == torch.bool or (x.is_floating_point() and x.ndim != 2):
        return None
    if x.ndim == 1 and x.shape[0] > 2 and x.shape[0] != length:
        return (x[0] == 0) & (x[-1] == rows * length) & (x[1:] >= x[:-1]).all()
    rows_of = x[None] if x.ndim == 1 else x[0] if x.ndim == 3 and x.shape[-1] == length else x
    if rows_of.ndim != 2 or rows_of.shape[1] != length or length < 2:
        return None
    integers = rows_of.to(torch.int64)
    real, values = torch.ones_like(integers, dtype=torch.bool), integers
    if mask is not None and mask.shape[1] == length and integers.shape[0] in (1, mask.shape[0]):
        real = (mask != 0).to(integers.device)
        values = integers.expand(real.shape)
    both = real[:, 1:] & real[:, :-1]
    step = values[:, 1:] - values[:, :-1]
    # positions: each token counts up or returns to the row's first value, the latter only after counting up
    first = values.gather(1, real.to(torch.int8).argmax(1, keepdim=True))
    counts_up = both & (step == 1)
    back = both & (step != 1) & (values[:, 1:] == first)
    starts_anew = (back & (counts_up.cumsum(1) > 0)).any(1) & (~both | counts_up | back).all(1)
    # document ids: runs of equal ids that grow by one, with padding (0) at the ends only
    in_documents = both & (values[:, 1:] > 0) & (values[:, :-1] > 0)
    begins = (values > 0) & (torch.nn.functional.pad(values[:, :-1], (1, 0)) <= 0)
    runs = (~in_documents | (step == 0) | (step == 1)).all(1) & (begins.sum(1) == 1)
    many = (in_documents & (step == 0)).any(1) & (in_documents & (step == 1)).any(1)
    whole = (integers == rows_of).all()  # a float mask may hold document ids, fractional values don't
    return whole & (starts_anew | (runs & many)).any()


def takes_cache(signature: inspect.Signature) -> bool:
    """Whether a forward accepts a cache: by a cache keyword, or by an unknown one that is annotated as a cache or not
    at all."""
    return any(
        name in CACHES or (name not in INPUTS and (one.annotation is one.empty or "Cache" in str(one.annotation)))
        for name, one in list(signature.parameters.items())[1:]
        if one.kind in (one.POSITIONAL_OR_KEYWORD, one.KEYWORD_ONLY)
    )


def cache_parameter(signature: inspect.Signature) -> str:
    """The keyword of a function's cache; Transformers' newest if it has none by name."""
    return next((name for name in CACHES if name in signature.parameters), CACHES[0])


def cache_keyword(model: torch.nn.Module) -> str:
    """`cache_parameter` of a model's ``forward``."""
    return cache_parameter(inspect.signature(inspect.unwrap(type(model).forward)))
