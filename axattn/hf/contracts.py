"""What axattn takes for granted about Transformers, as checks: run where its version is newer than the tested ones."""

from __future__ import annotations

import ast
import inspect
import logging
from collections.abc import Callable
from typing import Any

logger = logging.getLogger("axattn")

TESTED = ("5.17.0", "5.23.0")
"""Oldest and newest version of Transformers that the tests run on."""

MASK_KEYWORDS = frozenset(
    {"batch_size", "q_length", "kv_length", "q_offset", "kv_offset", "mask_function", "attention_mask", "device"}
    | {"allow_is_causal_skip", "allow_is_bidirectional_skip", "local_size", "dtype", "config", "use_vmap"}
)
"""What Transformers passes to a mask function (5.17 and 5.23)."""


def changed() -> list[str]:
    """What is no longer as axattn takes it to be; empty when all holds."""
    found = []
    for name, check in FACTS.items():
        try:
            text = check()
        except (AttributeError, ImportError, KeyError, TypeError, OSError, IndexError) as error:
            text = f"{type(error).__name__}: {error}"
        if text:
            found.append(f"{name} ({text})")
    return found


def warn_if_newer(version: str) -> None:
    """Say so, once at registration, when this Transformers is newer than any tested, and what has changed in it."""
    from packaging.version import Version

    if Version(version).release[:2] <= Version(TESTED[1]).release[:2]:
        return
    different = changed()
    text = "; ".join(different) if different else "nothing that axattn relies on has changed in form"
    logger.warning(
        "axattn: transformers %s is newer than the newest tested (%s): %s. axattn.verify(model) proves a model.",
        version,
        TESTED[1],
        text,
    )


def _registries() -> str:
    from transformers.masking_utils import AttentionMaskInterface
    from transformers.modeling_utils import AttentionInterface

    tables: list[Any] = [AttentionInterface._global_mapping, AttentionMaskInterface._global_mapping]
    return "" if all(isinstance(table, dict) and "sdpa" in table for table in tables) else "they hold no sdpa"


def _mask_functions() -> str:
    import torch
    from transformers import masking_utils as mu

    zero = torch.zeros(1, 1, dtype=torch.long)
    wanted = {
        mu.and_masks(mu.causal_mask_function): {"mask_functions"},
        mu.sliding_window_overlay(1): {"sliding_window"},
        mu.sliding_window_bidirectional_overlay(1): {"sliding_window"},
        mu.chunked_overlay(1, zero[0]): {"chunk_size", "left_padding"},
        mu.packed_sequence_mask_function(zero): {"packed_sequence_mask"},
    }
    wrong = [function.__qualname__ for function, names in wanted.items() if set(function.__code__.co_freevars) != names]
    return f"other closures: {', '.join(wrong)}" if wrong else ""


def _mask_calls() -> str:
    from transformers import masking_utils as mu

    calls = [node for node in ast.walk(ast.parse(inspect.getsource(mu))) if isinstance(node, ast.Call)]
    calls = [call for call in calls if ast.unparse(call.func) == "mask_interface"]
    unknown = {keyword.arg or "**" for call in calls for keyword in call.keywords} - MASK_KEYWORDS
    if not calls or any(call.args for call in calls):
        return "mask functions are called in another way"
    return f"new keywords: {', '.join(sorted(unknown))}" if unknown else ""


def _dense_masks() -> str:
    from transformers.masking_utils import sdpa_mask

    absent = MASK_KEYWORDS - {"local_size", "config", "dtype"} - set(inspect.signature(sdpa_mask).parameters)
    return f"sdpa_mask takes no {', '.join(sorted(absent))}" if absent else ""


def _lengths() -> str:
    from transformers.modeling_flash_attention_utils import FlashAttentionKwargs

    absent = {"cu_seq_lens_q", "cu_seq_lens_k", "max_length_q", "max_length_k"} - set(
        FlashAttentionKwargs.__annotations__
    )
    return f"no {', '.join(sorted(absent))}" if absent else ""


def _names() -> str:
    from transformers import LlamaConfig, PreTrainedModel

    config = LlamaConfig()
    config._attn_implementation_internal = "varlen"
    if config._attn_implementation != "varlen":
        return "the name of a config is kept elsewhere"
    needed = ("set_attn_implementation", "_can_set_attn_implementation", "loss_function")
    absent = [name for name in needed if not hasattr(PreTrainedModel, name)]
    return f"PreTrainedModel has no {', '.join(absent)}" if absent else ""


def _attention_call() -> str:
    from transformers.integrations.sdpa_attention import sdpa_attention_forward

    first = list(inspect.signature(sdpa_attention_forward).parameters)[:5]
    wanted = ["module", "query", "key", "value", "attention_mask"]
    return "" if first == wanted else f"attention functions take {', '.join(first)}"


def _eager() -> str:
    from transformers.models.llama import modeling_llama

    return "" if hasattr(modeling_llama, "eager_attention_forward") else "models have no eager_attention_forward"


FACTS: dict[str, Callable[[], str]] = {
    "registries of attention and mask functions": _registries,
    "closures of mask functions": _mask_functions,
    "keywords of mask functions": _mask_calls,
    "dense masks": _dense_masks,
    "keywords of packed rows": _lengths,
    "names in configs": _names,
    "attention functions": _attention_call,
    "eager functions of models": _eager,
}
"""Each returns what is different, ``""`` when it is as it was."""
