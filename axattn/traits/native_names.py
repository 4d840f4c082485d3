"""Model classes for which Transformers' masks or flash path lose documents on native names, with any inputs. Checks
that depend on inputs are in `axattn.documents.native_guard`.

Measured on transformers 5.17 and 5.23.
"""

from __future__ import annotations

import inspect
import sys
from typing import Any

import torch

from axattn.errors import Reason
from axattn.hf.forward_inputs import LENGTHS, TOKEN_TYPES
from axattn.hf.module_walk import modules_of
from axattn.hf.source_inspection import calls_interface, calls_of, code_of, file_source, signature_of, source_of
from axattn.traits.mask_makers import passes_positions_to_masks


def image_blocks(module: torch.nn.Module) -> bool:
    """Whether a model adds image blocks to its mask where ``token_type_ids`` mark them."""
    source = sys.modules.get(code_of(module).__module__)
    mentions = source is not None and "block_sequence_ids" in file_source(source.__name__)
    return mentions and bool(set(signature_of(module).parameters) & set(TOKEN_TYPES))


def takes_lengths(module: torch.nn.Module) -> bool:
    """Whether the forward of a model takes ``cu_seq_lens_*`` and ``max_length_*``."""
    parameters = signature_of(module).parameters
    spread = any(parameter.kind is inspect.Parameter.VAR_KEYWORD for parameter in parameters.values())
    return spread or set(LENGTHS) <= set(parameters)


def contradictions(model: torch.nn.Module) -> list[Reason]:
    """Why Transformers' flash path would compute other attention than its masks describe, with any inputs.

    It reads ``is_causal`` and ``sliding_window`` of attention modules. Those of PaliGemma and of Pegasus-X's decoder
    claim not to be causal; T5Gemma's encoder passes a window one token smaller than its mask's, as every model with
    windows does once ``config.is_causal`` is False; PhiMoE and Qwen2-MoE pass none (transformers 5.23).

    Args:
        model: a ``PreTrainedModel``; called for each one inside the whole model.
    """
    inner = [module for module in modules_of(model) if _calls_interface(module)]
    silent = [type(module) for module in inner if not hasattr(module, "is_causal") and not _passes(module, "is_causal")]
    if silent:
        return [Reason("causal", f"{silent[0].__name__} has no is_causal, which Transformers' flash path reads")]
    source = source_of(code_of(model).forward)
    config: Any = model.config
    text = config.get_text_config()
    causal = "create_causal_mask" in source and getattr(text, "is_causal", True)
    causal = causal and ("is_decoder" not in source or getattr(config, "is_decoder", False))
    if causal and inner and not any(getattr(module, "is_causal", True) for module in inner):
        name = type(inner[0]).__name__
        return [Reason("causal", f"{name}.is_causal is False: Transformers' flash path would attend to later tokens")]
    window = getattr(text, "sliding_window", None)
    if isinstance(window, int) and window > 0:
        return _window_contradictions(source, text, window, inner)
    return []


def _window_contradictions(source: str, config: Any, window: int, inner: list[torch.nn.Module]) -> list[Reason]:
    """Windows that masks have and the kernel doesn't get, or gets with another size."""
    kinds = getattr(config, "layer_types", None)
    if "create_sliding_window" in source and inner and (not kinds or any("sliding" in str(kind) for kind in kinds)):
        giving = [module for module in inner if _passes(module, "sliding_window")]
        if not giving:
            name = type(inner[0]).__name__
            return [Reason("window", f"{name} does not pass its window of {window} tokens to Transformers' flash path")]
    both_ways = "create_sliding_window_causal_mask" in source and not getattr(config, "is_causal", True)
    if both_ways or "create_bidirectional_sliding_window_mask" in source:  # |q - k| <= window (`masking_utils`)
        windows = {getattr(module, "sliding_window", window) for module in inner}
        others = {size for size in windows if isinstance(size, int)} - {window + 1}
        if others:
            text = f"its mask reaches {window} tokens to each side, Transformers' flash path {min(others) - 1}"
            return [Reason("window", text)]
    return []


def _calls_interface(module: torch.nn.Module) -> bool:
    cls: Any = type(module)
    return calls_interface(cls)


def _passes(module: torch.nn.Module, name: str) -> bool:
    """Whether an attention module passes a keyword to its attention function."""
    calls = calls_of(code_of(module).forward, "attention_interface")
    return bool(calls) and all(any(keyword.arg == name for keyword in call.keywords) for call in calls)


def never_packs_reasons(module: torch.nn.Module, *, of_text: bool = False) -> list[Reason]:
    """Why packed rows leak in this model on names whose masks Transformers builds, with any inputs.

    Args:
        module: the model.
        of_text: it got positions of 4 planes (Qwen-VL) and makes its masks from the first, the text plane.
    """
    reasons = []
    if not is_causal(module):
        text = "config.is_causal is False: Transformers' masks are then bidirectional, and made without the documents"
        reasons.append(Reason("segments", text))
    if _has_chunks(module) and not _chunks_restart():
        reasons.append(Reason("chunk", "this version of Transformers counts chunks from the row's start"))
    if not of_text and not passes_positions_to_masks(module):
        reasons.append(
            Reason("segments", f"{type(module).__name__} does not pass position_ids to Transformers' mask builder")
        )
    return reasons


def is_causal(module: torch.nn.Module) -> bool:
    """``config.is_causal``; False turns a decoder into an encoder (transformers 5.17 and 5.23)."""
    config: Any = module.config
    return bool(getattr(config.get_text_config(), "is_causal", True))


def _has_chunks(module: torch.nn.Module) -> bool:
    config = getattr(module, "config", None)
    text = config.get_text_config() if config is not None else None
    return "chunked_attention" in (getattr(text, "layer_types", None) or ())


def _chunks_restart() -> bool:
    """Whether Transformers counts positions from each document's start (5.18 and newer)."""
    from transformers import masking_utils

    return hasattr(masking_utils, "remap_positions_for_packed_sequence")
