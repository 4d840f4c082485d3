"""Contracts on Transformers, checked by running its functions where possible."""

from __future__ import annotations

import importlib.metadata
import inspect
from collections.abc import Mapping
from typing import Any

import torch
from packaging.specifiers import SpecifierSet

from axattn.hf import flash_stand_ins, forward_inputs, mask_functions
from axattn.hf.caches import is_cache
from axattn.hf.contracts import Contract
from axattn.hf.forward_inputs import Role
from axattn.hf.model_internals import CONFIG_NAME, SUPPORT, checkpoints_reentrantly, flash_slot, wants_weights
from axattn.hf.source_inspection import signature_of, source_of
from axattn.machine.environment import Environment
from axattn.spec.names import HUB_FLASH_REPOSITORIES

MASK_KEYWORDS = frozenset(
    {"batch_size", "q_length", "kv_length", "q_offset", "kv_offset", "mask_function", "attention_mask", "device"}
    | {"allow_is_causal_skip", "allow_is_bidirectional_skip", "local_size", "dtype", "config", "use_vmap"}
)
"""The keywords that Transformers passes to a mask function."""
_PROBE = "axattn_contract"


def _registries() -> str:
    from transformers.masking_utils import AttentionMaskInterface
    from transformers.modeling_utils import AttentionInterface

    tables: list[Any] = [AttentionInterface._global_mapping, AttentionMaskInterface._global_mapping]
    return "" if all(isinstance(table, dict) and "sdpa" in table for table in tables) else "they have no sdpa"


def _mask_builders() -> str:
    """Build every kind of mask with a mask function that only records its keywords."""
    from transformers import LlamaConfig
    from transformers import masking_utils as mu

    calls: list[dict[str, Any]] = []

    def record(**given: Any) -> torch.Tensor:
        calls.append(given)
        return torch.zeros(1, 1, 1, 1)

    config: Any = LlamaConfig(hidden_size=8, num_attention_heads=1, sliding_window=2, attention_chunk_size=2)
    setattr(config, CONFIG_NAME, _PROBE)
    embeds = torch.zeros(1, 4, 8)
    packed = torch.tensor([[0, 1, 0, 1]])
    table: Any = mu.AttentionMaskInterface._global_mapping
    table[_PROBE] = record
    try:
        cache = forward_inputs.cache_parameter(inspect.signature(mu.create_causal_mask))
        rest = {"attention_mask": None, cache: None}
        mu.create_causal_mask(config, embeds, **rest)
        mu.create_causal_mask(config, embeds, **rest, position_ids=packed)
        mu.create_sliding_window_causal_mask(config, embeds, **rest)
        mu.create_chunked_causal_mask(config, embeds, **rest)
        mu.create_bidirectional_mask(config, embeds, None)
    finally:
        del table[_PROBE]
    names = ("causal", "packed", "windows", "chunks", "bidirectional")
    if len(calls) != len(names):
        return f"{len(calls)} of {len(names)} mask builders call the registered mask function"
    unknown = {keyword for call in calls for keyword in call} - MASK_KEYWORDS
    if unknown:
        return f"mask functions get unknown keywords: {', '.join(sorted(unknown))}"
    patterns = [mask_functions.recognise(call["mask_function"]) for call in calls]
    lost = [name for name, pattern in zip(names, patterns, strict=True) if pattern is None]
    if lost:
        return f"the mask functions of {', '.join(lost)} masks are not recognised"
    recognised = [(p.causal, p.window, p.chunk, p.document_ids is not None) for p in patterns if p is not None]
    expected = [
        (True, None, None, False),
        (True, None, None, True),
        (True, 2, None, False),
        (True, None, 2, False),
        (False, None, None, False),
    ]
    wrong = [name for name, found, right in zip(names, recognised, expected, strict=True) if found != right]
    return f"the mask functions of {', '.join(wrong)} masks are misread" if wrong else ""


def _dense_masks() -> str:
    from transformers.masking_utils import causal_mask_function, sdpa_mask

    found = sdpa_mask(
        batch_size=1,
        q_length=3,
        kv_length=3,
        q_offset=0,
        kv_offset=0,
        mask_function=causal_mask_function,
        attention_mask=None,
        allow_is_causal_skip=False,
        allow_is_bidirectional_skip=False,
        use_vmap=False,
        device=torch.device("cpu"),
    )
    right = isinstance(found, torch.Tensor) and torch.equal(found[0, 0], torch.ones(3, 3, dtype=torch.bool).tril())
    return "" if right else "sdpa_mask returns no causal mask"


def _lengths() -> str:
    from transformers.modeling_flash_attention_utils import FlashAttentionKwargs

    absent = set(forward_inputs.LENGTHS) - set(FlashAttentionKwargs.__annotations__)
    return f"the flash path takes no {', '.join(sorted(absent))}" if absent else ""


def _names() -> str:
    from transformers import LlamaConfig, PreTrainedModel

    config = LlamaConfig()
    setattr(config, CONFIG_NAME, "varlen")
    if config._attn_implementation != "varlen":
        return "configs store the name elsewhere"
    needed = ("set_attn_implementation", "_can_set_attn_implementation", "loss_function", *SUPPORT.values())
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


def _input_keywords() -> str:
    """Whether `axattn.hf.forward_inputs` knows the keywords of Llama's forward."""
    from transformers.models.llama.modeling_llama import LlamaForCausalLM, LlamaModel

    for cls in (LlamaForCausalLM, LlamaModel):
        kinds = (inspect.Parameter.VAR_KEYWORD, inspect.Parameter.VAR_POSITIONAL)
        every = [p.name for p in inspect.signature(cls.forward).parameters.values() if p.kind not in kinds][1:]
        unknown = [name for name in every if name not in forward_inputs.INPUTS]
        if unknown:
            return f"{cls.__name__} takes unknown keywords: {', '.join(unknown)}"
        roles = {forward_inputs.INPUTS[name].role for name in every}
        lacking = {Role.IDS, Role.EMBEDDINGS, Role.POSITIONS, Role.MASK, Role.CACHE} - roles
        if lacking:
            return f"{cls.__name__} takes no {', '.join(sorted(role.value for role in lacking))}"
    return ""


def _caches() -> str:
    from transformers import DynamicCache, EncoderDecoderCache

    cache = DynamicCache()
    every = [cache, EncoderDecoderCache(DynamicCache(), DynamicCache())]
    if not all(map(is_cache, every)):
        return "its caches are not recognised"
    cache.update(torch.zeros(1, 1, 3, 2), torch.zeros(1, 1, 3, 2), 0)
    return "" if int(cache.get_seq_length()) == 3 else "get_seq_length() is not the number of cached tokens"


def _outputs() -> str:
    from transformers.modeling_outputs import BaseModelOutput

    found = BaseModelOutput(last_hidden_state=torch.zeros(1, 1, 1))
    return "" if isinstance(found, Mapping) and list(found) == ["last_hidden_state"] else "outputs are no mappings"


def _flash_slot() -> str:
    slot = flash_slot()
    absent = [name for name in ("_loaded_implementation", "lazy_import_flash_attention") if not hasattr(slot, name)]
    return f"it has no {', '.join(absent)}" if absent else ""


def _stand_ins() -> str:
    """The hub kernel that replaces a missing flash library, its version, and the accepted ``kernels`` versions."""
    from transformers.integrations.hub_kernels import get_attn_kernel_version
    from transformers.utils import is_rocm_platform
    from transformers.utils.import_utils import KERNELS_MAX_VERSION, KERNELS_MIN_VERSION

    table: dict[str, str] = flash_slot().FLASH_ATTN_KERNEL_FALLBACK
    libraries = {name: importlib.metadata.version(name) for name in ("torch", "transformers")}
    machine = Environment("rocm" if is_rocm_platform() else "cuda", libraries=libraries)
    for name, repository in table.items():
        found = flash_stand_ins.stand_in(name, machine)
        if found is None or found.repository != repository:
            return f"{name} runs {repository} if its library is missing"
    for repository in HUB_FLASH_REPOSITORIES:
        number = get_attn_kernel_version(repository)
        if flash_stand_ins.version(repository, machine) != f"v{number}":
            return f"it loads version {number} of {repository}"
    window = flash_stand_ins.kernels_window(machine)
    edges = {KERNELS_MIN_VERSION: True, KERNELS_MAX_VERSION: False}
    wrong = [text for text, inside in edges.items() if (text in SpecifierSet(window, prereleases=True)) is not inside]
    return f"it accepts kernels from {KERNELS_MIN_VERSION} to before {KERNELS_MAX_VERSION}" if wrong else ""


def _settings() -> str:
    """How a model and its config store gradient checkpointing and ``output_attentions``."""
    from transformers import LlamaConfig, LlamaModel

    sizes = {
        "hidden_size": 4,
        "intermediate_size": 4,
        "num_attention_heads": 1,
        "num_hidden_layers": 1,
        "vocab_size": 4,
    }
    model = LlamaModel(LlamaConfig(**sizes, output_attentions=True))
    if not wants_weights(model.config):
        return "configs store output_attentions elsewhere"
    enable = getattr(model, "activation_checkpointing_enable", None) or model.gradient_checkpointing_enable
    found = []
    for reentrant in (True, False):
        enable({"use_reentrant": reentrant})
        found.append(checkpoints_reentrantly(model))
    return "" if found == [True, False] else "models do not show how they checkpoint"


def _sources() -> str:
    from transformers.models.llama.modeling_llama import LlamaForCausalLM

    if "self.model(" not in source_of(LlamaForCausalLM.forward):
        return "the source of models can't be read"
    named = "input_ids" in signature_of(LlamaForCausalLM.__new__(LlamaForCausalLM)).parameters
    return "" if named else "decorators hide the parameters of forwards"


def _layers() -> str:
    from transformers.modeling_layers import GradientCheckpointingLayer
    from transformers.models.llama.modeling_llama import LlamaDecoderLayer

    return "" if issubclass(LlamaDecoderLayer, GradientCheckpointingLayer) else "decoder layers have another base class"


CONTRACTS = (
    Contract(
        "registries of attention and mask functions",
        "transformers",
        ("hf.registries", "attention.registration"),
        _registries,
        "models",
    ),
    Contract(
        "calls of mask functions",
        "transformers",
        ("masks.mask_interface", "hf.mask_functions", "masks.image_blocks", "masks.user_masks"),
        _mask_builders,
        "packed rows",
    ),
    Contract("dense masks", "transformers", ("masks.mask_interface",), _dense_masks, "models"),
    Contract("names in configs", "transformers", ("patches.routes", "loading"), _names, "models"),
    Contract("calls of attention functions", "transformers", ("attention.interface",), _attention_call, "models"),
    Contract("eager functions of models", "transformers", ("backends.eager",), _eager, ""),
    Contract("keywords of forwards", "transformers", ("hf.forward_inputs",), _input_keywords, ""),
    Contract("caches", "transformers", ("hf.caches", "documents.input_hook"), _caches, "packed rows"),
    Contract(
        "outputs of models",
        "transformers",
        ("documents.input_hook", "unpadding.unpadded_forward", "parallel.split_inputs"),
        _outputs,
        "packed rows",
    ),
    Contract(
        "lengths of packed rows on the flash path",
        "transformers",
        ("documents.native_flash_guard",),
        _lengths,
        "flash names",
    ),
    Contract("the slot of flash functions", "transformers", ("patches.flash_slot",), _flash_slot, "flash names"),
    Contract("stand-ins from the hub", "transformers", ("hf.flash_stand_ins", "planning.planner"), _stand_ins, ""),
    Contract(
        "settings of models",
        "transformers",
        ("documents.native_guard", "documents.input_hook"),
        _settings,
        "packed rows",
    ),
    Contract("sources of models", "transformers", ("hf.source_inspection",), _sources, "packed rows"),
    Contract("decoder layers", "transformers", ("traits.recurrent",), _layers, "packed rows"),
)
"""In the order in which a load needs them. If models have no eager function, the `eager` backend refuses; unknown
keywords are refused when they are passed (`axattn.documents.inputs`)."""
