"""`ModelTraits`: how one model treats tokens, positions and documents, read once when it is patched (`read_traits`).

To add a rule for a model class, add a function to the matching file of `axattn.traits` and a field here.
"""

from __future__ import annotations

import inspect
from dataclasses import dataclass
from typing import Any

import torch

from axattn.errors import Reason
from axattn.hf import contracts
from axattn.hf.model_internals import window_of
from axattn.hf.module_walk import attribute, modules_of
from axattn.hf.source_inspection import code_of, file_source, signature_of
from axattn.spec import names
from axattn.traits.dynamic_rope import rope_scaling_threshold
from axattn.traits.native_names import image_blocks, never_packs_reasons, takes_lengths
from axattn.traits.picked_tokens import Pick
from axattn.traits.pooling import picked, read_at
from axattn.traits.position_ids import counts_mask, first_position
from axattn.traits.recurrent import recurrent
from axattn.traits.row_forms import reasons_against
from axattn.traits.token_mixers import scaled_by_share, text_model


@dataclass(frozen=True, slots=True)
class ModelTraits:
    """The properties of one ``PreTrainedModel`` on its name.

    Attributes:
        parameters: names of the positional parameters of its ``forward``, in order.
        native: its native name, None for axattn backends.
        encoder_decoder: it is an encoder-decoder, whose rows can't be packed.
        mrope_planes: how many leading planes ``position_ids`` may have (Qwen-VL: 1, 3 or 4), () for none.
        shares_keys: some layers reuse the keys and values of another one.
        on_flash: its native name is a flash name.
        nondeterministic: why its kernel has no deterministic gradient, () if it has one.
        windowed: some layers have a sliding window.
        never_packs: packed rows always leak on this native name (`axattn.traits.native_names.never_packs_reasons`).
        by_document: some of its layers run document by document (`axattn.traits.recurrent`,
            `axattn.traits.token_mixers.scaled_by_share`).
        max_row_length: above this row length some layer depends on positions in the row (Llama 4), None for no limit.
        rope_scaling_threshold: positions below this one have the original rotary frequencies
            (`axattn.traits.dynamic_rope`), None for no limit.
        packing_blockers: why its rows can't hold several documents (`axattn.traits.row_forms`).
        packing_blockers_in_graph: further reasons inside a compiled graph.
        first_position: the position of a row's first token (`axattn.traits.position_ids.first_position`).
        counts_mask: without positions it counts them from the mask (`axattn.traits.position_ids.counts_mask`).
        first_must_be_real: why rows can't be padded on the left (sparse layers that count blocks), "" if they can.
        takes_lengths: its forward takes ``cu_seq_lens_*`` and ``max_length_*``, so the input hook can add them.
        image_blocks: it adds image blocks to its masks (`axattn.traits.native_names.image_blocks`).
        reads: the places its outputs are read from even if they are padding (`axattn.traits.pooling.read_at`).
        picks: how it finds, by token id, the tokens that outputs are read from (`axattn.traits.picked_tokens`).
    """

    parameters: tuple[str, ...] = ()
    native: str | None = None
    encoder_decoder: bool = False
    mrope_planes: tuple[int, ...] = ()
    shares_keys: bool = False
    on_flash: bool = False
    nondeterministic: tuple[Reason, ...] = ()
    windowed: bool = False
    never_packs: bool = False
    by_document: bool = False
    max_row_length: int | None = None
    rope_scaling_threshold: int | None = None
    packing_blockers: tuple[Reason, ...] = ()
    packing_blockers_in_graph: tuple[Reason, ...] = ()
    first_position: int = 0
    counts_mask: bool = False
    first_must_be_real: str = ""
    takes_lengths: bool = False
    image_blocks: bool = False
    reads: frozenset[str] = frozenset()
    picks: tuple[Pick, ...] = ()


def read_traits(model: torch.nn.Module, native: str | None, nondeterministic: tuple[Reason, ...] = ()) -> ModelTraits:
    """The traits of a model.

    Args:
        model: a ``PreTrainedModel``; inner models have their own traits.
        native: see `ModelTraits`.
        nondeterministic: see `ModelTraits`.
    """
    config: Any = model.config
    text = text_model(model)
    return ModelTraits(
        parameters=_positional(signature_of(model)),
        native=native,
        encoder_decoder=bool(getattr(config, "is_encoder_decoder", False)),
        mrope_planes=_mrope_planes(model),
        shares_keys=bool(getattr(config, "num_kv_shared_layers", 0)),
        on_flash=native is not None and names.is_flash(native),
        nondeterministic=nondeterministic,
        windowed=window_of(model) is not None,
        never_packs=native is not None and bool(never_packs_reasons(model)),
        by_document=bool(scaled_by_share(text) or next(recurrent(text), None)),
        max_row_length=_max_row_length(model),
        rope_scaling_threshold=rope_scaling_threshold(model),
        packing_blockers=tuple(reasons_against(model, "packed")),
        packing_blockers_in_graph=tuple(contracts.reasons("compiled packed rows")),
        first_position=first_position(model),
        counts_mask=counts_mask(model),
        first_must_be_real=_first_must_be_real(model, native),
        takes_lengths=takes_lengths(model),
        image_blocks=image_blocks(model),
        reads=read_at(model),
        picks=picked(model),
    )


def _positional(signature: inspect.Signature) -> tuple[str, ...]:
    """Names of the positional parameters of a ``forward``, without ``self``."""
    kinds = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
    return tuple(name for name, parameter in signature.parameters.items() if parameter.kind in kinds)[1:]


def _max_row_length(model: torch.nn.Module) -> int | None:
    """The first position at which Llama 4's layers without RoPE scale queries (``floor_scale`` - 1), None otherwise.

    They count positions from the row's start, independently of ``position_ids`` (transformers 5.23).
    """
    scaled = [m for m in modules_of(model) if attribute(m, "attn_temperature_tuning") and not getattr(m, "use_rope", 1)]
    return min((int(getattr(m, "floor_scale", 0)) - 1 for m in scaled), default=None)


def _first_must_be_real(module: torch.nn.Module, native: str | None) -> str:
    """Why rows can't be padded on the left, ``""`` if they can: padding would change what real tokens attend to."""
    config: Any = module.config
    if native != "eager" and "minimax_m3_sparse" in (getattr(config.get_text_config(), "layer_types", None) or ()):
        name = type(module).__name__
        return f"{name} selects blocks of keys counted from the row's start, and may select padding alone"
    return ""


def _mrope_planes(module: torch.nn.Module) -> tuple[int, ...]:
    """Leading planes of position_ids in models with M-RoPE: 3, 4 with text first, or 1, which ``generate`` passes when
    it continues from a cache (transformers 5.17 and 5.24)."""
    config: Any = module.config
    text = config.get_text_config()
    parameters = getattr(text, "rope_parameters", None) or getattr(text, "rope_scaling", None) or {}
    if isinstance(parameters, dict) and "mrope_section" in parameters:
        return (1, 3, 4)
    files = {code_of(inner).__module__ for inner in modules_of(module) if hasattr(type(inner), "config_class")}
    return (1, 3, 4) if any("mrope_section" in file_source(name) for name in files) else ()
