"""Refuses inputs whose documents Transformers would leak on native names. Pure checks over a call's inputs.

On these names Transformers builds the masks and separates documents only under the conditions below, measured on
transformers 5.17 and 5.23. If a condition fails, the documents would silently attend to each other.
"""

from __future__ import annotations

from typing import Any

import torch

from axattn.documents import native_flash_guard
from axattn.documents.boundaries import Segments, documents_in
from axattn.errors import Reason, UnsupportedAttentionError
from axattn.hf.caches import cache_length
from axattn.hf.forward_inputs import TOKEN_TYPES, caches_of, tokens_of
from axattn.hf.model_internals import checkpoints_reentrantly, checkpoints_without_cache
from axattn.hf.torch_internals import in_context_parallel
from axattn.spec import names
from axattn.traits.mask_makers import cached_under_mask, passes_positions_to_masks
from axattn.traits.native_names import never_packs_reasons

_DOCUMENT_INPUTS = ("cu_seq_lens_q", "cu_seq_lens_k", "seq_idx")
"""Inputs besides positions that describe documents."""


def require_no_leak(
    native: str,
    module: torch.nn.Module,
    inputs: dict[str, Any],
    segments: Segments,
    mask: torch.Tensor | None,
    *,
    lengths_follow: bool = False,
    image_blocks: bool = False,
) -> None:
    """Raise unless Transformers separates the documents of this call on `native`.

    Args:
        native: the native name.
        module: the model.
        inputs: of its forward.
        segments: the documents.
        mask: the 2-D mask, or None.
        lengths_follow: on a flash name: the input hook adds the lengths of the documents to the inputs.
        image_blocks: see `axattn.traits.native_names.image_blocks`.

    Raises:
        UnsupportedAttentionError: with every reason, and the names to use instead.
    """
    reasons = (
        native_flash_guard.packed_reasons(native, inputs, segments, lengths_follow=lengths_follow)
        if names.is_flash(native)
        else _mask_reasons(module, inputs, segments, mask, image_blocks)
    )
    if reasons:
        raise UnsupportedAttentionError(
            f"packed rows ({documents_in(segments, mask)} documents in {segments.rows} rows) would leak on {native}",
            reasons,
            'Use attn_implementation="varlen" or "auto", which separate documents.',
        )


def require_mask_is_read(native: str, module: torch.nn.Module, mask: torch.Tensor) -> None:
    """Raise for a 4-D mask that Transformers would misread on `native`.

    Its eager functions add the mask to the logits, where True and False become 1 and 0 and mask nothing. flex_attention
    reads the mask in blocks of 128, past its end (torch 2.13's CPU kernel aborts the process). Flash names read only
    padding (``[B, T]``).

    Raises:
        UnsupportedAttentionError: a bool mask on ``eager``, any on ``flex_attention`` and the flash names.
    """
    if native == "flex_attention" or names.is_flash(native):
        raise UnsupportedAttentionError(
            f"{native} can't serve {type(module).__name__}",
            [Reason("attention_mask", f"a 4-D mask, which Transformers does not pass to {native} completely")],
            'Use attn_implementation="auto" or "sdpa".',
        )
    if native.endswith("eager") and mask.dtype == torch.bool:
        raise UnsupportedAttentionError(
            f"eager can't serve {type(module).__name__}",
            [Reason("attention_mask", "a 4-D bool mask: Transformers' eager attention adds it to the logits")],
            'Pass it as floats (0 and torch.finfo(dtype).min), or use attn_implementation="auto".',
        )


def require_flex_on_cpu(module: torch.nn.Module, inputs: dict[str, Any], cached: int) -> None:
    """Raise for inputs that torch's CPU kernel of flex_attention can't run (see `axattn.backends.flex.ON_CPU`).

    Raises:
        UnsupportedAttentionError: a gradient, or decoding from a cache.
    """
    given = tokens_of(inputs)
    if given is None or given.device.type != "cpu":
        return
    reasons = []
    if torch.is_grad_enabled() and any(parameter.requires_grad for parameter in module.parameters()):
        reasons.append(Reason("gradient", "torch's CPU kernel has no backward", "torch.no_grad()"))
    if cached > 0:
        reasons.append(Reason("cross_lengths", "torch's CPU kernel does not compile for fewer queries than keys"))
    if reasons:
        raise UnsupportedAttentionError(
            f"flex_attention can't serve {type(module).__name__} on a CPU",
            reasons,
            'Use attn_implementation="auto" or "varlen".',
        )


def require_gradients_of_shared_keys(module: torch.nn.Module) -> None:
    """Raise if reentrant checkpointing would drop gradients: shared keys are not inputs of the checkpointed layers.

    Gemma 3n's and Gemma 4's last layers read the keys and values of an earlier one; a reentrant checkpoint returns
    gradients of its direct inputs only (error 0.6 on a tiny Gemma 4 with any kernel; transformers 5.23).

    Raises:
        UnsupportedAttentionError: the model trains with reentrant checkpointing.
    """
    if module.training and torch.is_grad_enabled() and checkpoints_reentrantly(module):
        raise UnsupportedAttentionError(
            f"reentrant gradient checkpointing can't serve {type(module).__name__}",
            [Reason("gradient", "layers share keys and values, whose gradients it drops")],
            'Use gradient_checkpointing_kwargs={"use_reentrant": False}.',
        )


def require_prefix_survives(module: torch.nn.Module, inputs: dict[str, Any]) -> None:
    """Raise if gradient checkpointing would drop the tokens of a cache: Transformers' layers remove the cache from a
    checkpointed call, while the mask still covers its tokens (transformers 5.17 and 5.24).

    PEFT's prefix tuning passes its prefix in a cache.

    Raises:
        UnsupportedAttentionError: it would.
    """
    held = 0
    for cache in caches_of(inputs):  # Dynamo traces no max() over a map
        held = max(held, cache_length(cache))
    if held and torch.is_grad_enabled() and checkpoints_without_cache(module):
        text = f"it removes the cache from the layers, and with it {held} tokens (a prefix, in PEFT's prefix tuning)"
        raise UnsupportedAttentionError(
            f"gradient checkpointing can't serve {type(module).__name__} over a filled cache",
            [Reason("cache", text)],
            "Call model.gradient_checkpointing_disable(), or train LoRA or prompt tuning, which need no cache.",
        )


def require_no_context_parallel(module: torch.nn.Module) -> None:
    """Raise inside torch's ``context_parallel``: it shards rows, and replaces only ``F.scaled_dot_product_attention``.
    Other kernels get one shard (torch 2.13; accelerate's ``cp_size`` uses it).

    Raises:
        UnsupportedAttentionError: it is active.
    """
    replaced = torch.nn.functional.scaled_dot_product_attention
    if in_context_parallel(replaced):
        raise UnsupportedAttentionError(
            f"{type(module).__name__} can't run inside torch's context_parallel",
            [Reason("segments", "a rank would attend to its own part of each row only")],
            'Use axattn.sequence_parallel, or attn_implementation="sdpa".',
        )


def _mask_reasons(
    module: torch.nn.Module, inputs: dict[str, Any], segments: Segments, mask: torch.Tensor | None, image_blocks: bool
) -> list[Reason]:
    """eager, sdpa, flex_attention: correct only if Transformers itself finds the documents in position_ids."""
    reasons = []
    if mask is not None:
        reasons.append(Reason("segments", "with a 2-D attention_mask Transformers ignores document boundaries"))
    if _uses_cache(module, inputs) and (caches_of(inputs) or cached_under_mask(module)):
        reasons.append(Reason("segments", "with use_cache on (the default) Transformers ignores document boundaries"))
    positions, of_text = inputs.get("position_ids"), False
    if isinstance(positions, torch.Tensor) and positions.ndim == 3 and positions.shape[0] == 4:
        positions, of_text = positions[0], passes_positions_to_masks(module, "text_position_ids")
    if not isinstance(positions, torch.Tensor) or positions.ndim != 2:
        reasons.append(Reason("segments", "the mask is built from position_ids, and none were given"))
    elif any(inputs.get(name) is not None for name in _DOCUMENT_INPUTS):
        # both descriptions must agree: Transformers reads only the positions here
        starts = torch.nn.functional.pad(positions[:, 1:] != positions[:, :-1] + 1, (1, 0), value=True)
        if not torch.equal(starts.expand(segments.rows, -1), (segments.positions == 0).to(starts.device)):
            given = " and ".join(name for name in _DOCUMENT_INPUTS if inputs.get(name) is not None)
            reasons.append(Reason("segments", f"position_ids and {given} describe different documents"))
    if image_blocks and native_flash_guard.has_image_tokens(inputs):
        reasons.append(Reason("dense_mask", "Transformers lays image blocks over a packed row's mask in wrong places"))
    return [*reasons, *never_packs_reasons(module, of_text=of_text)]


def may_leak(
    native: str, module: torch.nn.Module, inputs: dict[str, Any], never_packs: bool, image_blocks: bool
) -> bool:
    """`require_no_leak` while ``torch.compile`` traces: whether a packed call would leak; True if unknown.

    Args:
        native: the native name.
        module: the model.
        inputs: of its forward.
        never_packs: whether there are `never_packs_reasons`.
        image_blocks: see `axattn.traits.native_names.image_blocks`.
    """
    if names.is_flash(native) or any(inputs.get(name) is not None for name in _DOCUMENT_INPUTS):
        return True
    positions = inputs.get("position_ids")
    separated = isinstance(positions, torch.Tensor) and positions.ndim == 2 and inputs.get("attention_mask") is None
    separated = separated and not (image_blocks and any(inputs.get(name) is not None for name in TOKEN_TYPES))
    return never_packs or not separated or _uses_cache(module, inputs)


def _uses_cache(module: torch.nn.Module, inputs: dict[str, Any]) -> bool:
    if caches_of(inputs):
        return True
    requested = inputs.get("use_cache")
    if requested is not None:
        return bool(requested)
    config = getattr(module, "config", None)
    text = config.get_text_config() if config is not None else None
    return bool(getattr(config, "use_cache", False) or getattr(text, "use_cache", False))
