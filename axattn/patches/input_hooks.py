"""Patch: an input hook (see `axattn.documents.input_hook`) on every `PreTrainedModel` inside a model whose inputs no
inner input hook sees."""

from __future__ import annotations

import ast
import functools
import inspect
from collections.abc import Iterable
from typing import Any

import torch

from axattn import backends
from axattn.documents import native_flash_guard
from axattn.documents.input_hook import InputHook
from axattn.documents.native_guard import never_packs_reasons
from axattn.errors import Reason, UnsupportedAttentionError
from axattn.hf import contracts
from axattn.hf.forward_inputs import READ
from axattn.hf.integrations import ORIGINAL
from axattn.hf.source_inspection import code_of, file_source, signature_of, tree_of
from axattn.hf.trial import shared_skeletons
from axattn.hf.weak_cache import weak_cache
from axattn.machine.environment import Environment
from axattn.patches.double_backward import require_first_of_module
from axattn.patches.patchset import PatchSet
from axattn.spec import names
from axattn.spec.capability import Need, missing
from axattn.traits.attention_configs import is_attention
from axattn.traits.dynamic_rope import rope_scaling_threshold
from axattn.traits.model_traits import ModelTraits
from axattn.traits.pooling import classifies_rows, picked, read_at
from axattn.traits.position_ids import counts_mask, first_position, unread_positions
from axattn.traits.recurrent import recurrent
from axattn.traits.token_mixers import mixers, scaled_by_share, text_model


@shared_skeletons()
def add_input_hooks(
    patches: PatchSet, model: torch.nn.Module, modules: Iterable[torch.nn.Module], native: dict[int, str | None]
) -> None:
    """Put an input hook on the model and on every ``PreTrainedModel`` inside it.

    A head that hands its inputs unchanged to the one model inside it (``LlamaForCausalLM``) needs none of its own: two
    hooks cost as much as the attention of a layer of a tiny model.

    Args:
        patches: takes the hooks over.
        model: the model.
        modules: every module inside it, itself included.
        native: by ``id(config)``, the native name that Transformers serves there, None for our names.

    Raises:
        UnsupportedAttentionError: Transformers' flash path would compute something else than the model's masks say.
    """
    from transformers import PreTrainedModel

    for module in [m for m in modules if isinstance(m, PreTrainedModel)]:
        inside = [name for name, child in module.named_children() if isinstance(child, PreTrainedModel)]
        text, rows = text_model(module), classifies_rows(module)
        reads, picks = read_at(module), picked(module)
        if len(inside) == 1 and not rows and not reads and not picks and hands_on(code_of(module).forward, inside[0]):
            continue
        name = native.get(id(module.config), native.get(id(model.config)))
        flash = name is not None and names.is_flash(name)
        reasons = native_flash_guard.contradictions(module) if flash else []
        if reasons:
            advice = 'Use attn_implementation="varlen" or "auto".'
            raise UnsupportedAttentionError(f"{name} can't serve {type(module).__name__}", reasons, advice)
        traits = ModelTraits(
            _positional(signature_of(module)),
            native=name,
            never_packs=name is not None and bool(never_packs_reasons(module)),
            max_row_length=_max_row_length(module),
            rope_scaling_threshold=rope_scaling_threshold(module),
            mixers=tuple(mixers(module, by_document=True)),
            by_document=bool(scaled_by_share(text) or next(recurrent(text), None)),
            packing_blockers=(*unread_positions(module), *rows, *contracts.reasons("packed rows")),
            packing_blockers_in_graph=tuple(contracts.reasons("compiled packed rows")),
            first_must_be_real=_first_must_be_real(module, name),
            takes_lengths=native_flash_guard.takes_lengths(module),
            image_blocks=native_flash_guard.image_blocks(module),
            reads=reads,
            picks=picks,
            first_position=first_position(module),
            counts_mask=counts_mask(module),
            on_flash=flash,
            nondeterministic=_nondeterministic(name) if name in names.FLASH else (),
            windowed=native_flash_guard.windowed(module),
            encoder_decoder=bool(getattr(module.config, "is_encoder_decoder", False)),
            mrope_planes=_mrope_planes(module),
            shares_keys=bool(getattr(module.config, "num_kv_shared_layers", 0)),
        )
        hook = InputHook(traits)
        hook.names.look(module)
        patches.add_undo(hook.remove_watchers)
        patches.add_handle(module.register_forward_pre_hook(hook.pre_forward, with_kwargs=True, prepend=True))
        patches.add_handle(module.register_forward_hook(hook.post_forward, always_call=True))
        for first in _first_attention(module) if flash else ():
            patches.add_handle(first.register_forward_pre_hook(hook.check_delivery, with_kwargs=True))


def _first_attention(model: torch.nn.Module) -> list[torch.nn.Module]:
    """The first attention module of a model; with its copies, one of which PEFT's ``modules_to_save`` runs instead."""
    found = {name: module for name, module in model.named_modules() if is_attention(module)}
    first = next(iter(found), "")
    if not first.endswith(ORIGINAL):
        return [found[first]] if first else []
    wrapper = first.removesuffix(ORIGINAL) + "."
    return [one for name, one in found.items() if name.startswith(wrapper)]


def require_first_gradients(
    patches: PatchSet, model: torch.nn.Module, modules: Iterable[torch.nn.Module], native: dict[int, str | None]
) -> None:
    """Refuse second derivatives of kernels that Transformers calls and that have none; arguments as for
    `add_input_hooks`.

    Of a name that somebody else has registered nothing is known, and nothing is said.
    """
    default = native.get(id(model.config))
    for module in modules:
        name = (native.get(id(getattr(module, "config", None)), default) or "").removeprefix("paged|")
        known = names.is_native(name) and is_attention(module)
        if known and not backends.get(name).capability.second_gradient:
            hook = functools.partial(require_first_of_module, name)
            patches.add_handle(module.register_forward_hook(hook))


def native_name(name: str | None, default: str | None) -> str | None:
    """The native name that serves a config, None when one of our names does."""
    running = name or default
    return running if running is not None and running not in names.axattn_backends() else None


def _nondeterministic(native: str) -> tuple[Reason, ...]:
    """Why a flash kernel has no deterministic gradient on this machine, () where it has one."""
    served = backends.get(native).capability_on(Environment.current())
    lacking = missing(Need(gradient=True, deterministic=True), served, native)
    return tuple(reason for reason in lacking if reason.feature == "deterministic")


def _positional(signature: inspect.Signature) -> tuple[str, ...]:
    """Names of the positional parameters of a ``forward``, without ``self``."""
    kinds = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
    return tuple(name for name, parameter in signature.parameters.items() if parameter.kind in kinds)[1:]


@weak_cache
def hands_on(forward: Any, child: str) -> bool:
    """Whether a ``forward`` method hands every input that an input hook reads on to ``self.<child>``, as it got them.

    Read in its source: one call of the child, each such parameter passed by its own name, ``**kwargs`` passed on, none
    of these names assigned anywhere, and the mask used for nothing else (a loss that balances experts multiplies by it,
    and must not get numbers of documents). Unreadable source counts as no.
    """
    function = tree_of(forward)
    if function is None:
        return False
    parameters = inspect.signature(inspect.unwrap(forward)).parameters
    spread = [name for name, parameter in parameters.items() if parameter.kind is inspect.Parameter.VAR_KEYWORD]
    read = [name for name in parameters if name in READ]
    nodes = list(ast.walk(function))
    stored = {node.id for node in nodes if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store)}
    calls = [node for node in nodes if isinstance(node, ast.Call) and ast.unparse(node.func) == f"self.{child}"]
    masked = [node for node in nodes if isinstance(node, ast.Name) and node.id == "attention_mask"]
    if not spread or len(calls) != 1 or calls[0].args or stored & {*read, *spread} or len(masked) > 1:
        return False
    given = {kw.arg: kw.value.id for kw in calls[0].keywords if isinstance(kw.value, ast.Name)}
    changed = any(f"{spread[0]}{how}" in ast.unparse(function) for how in (".pop(", ".update(", "[", ".setdefault("))
    return not changed and given.get(None) == spread[0] and all(given.get(name) == name for name in read)


def _max_row_length(model: torch.nn.Module) -> int | None:
    """The first position at which Llama 4's layers without RoPE scale queries (``floor_scale`` - 1), None elsewhere.

    They count positions from the row's start, whatever ``position_ids`` say (transformers 5.23).
    """
    scaled = [
        m for m in model.modules() if getattr(m, "attn_temperature_tuning", False) and not getattr(m, "use_rope", 1)
    ]
    return min((int(getattr(m, "floor_scale", 0)) - 1 for m in scaled), default=None)


def _first_must_be_real(module: torch.nn.Module, native: str | None) -> str:
    """Why rows can't be padded on the left, ``""`` where they can: padding changes what real tokens attend to."""
    config: Any = module.config
    if native != "eager" and "minimax_m3_sparse" in (getattr(config.get_text_config(), "layer_types", None) or ()):
        name = type(module).__name__
        return f"{name} selects blocks of keys counted from the row's start, and may select padding alone"
    return ""


def _mrope_planes(module: torch.nn.Module) -> tuple[int, ...]:
    """Leading planes of position_ids in models with multimodal rotary embeddings: 3, 4 with text first, or 1 for all,
    which ``generate`` gives where it goes on from a cache (transformers 5.17 and 5.24)."""
    config: Any = module.config
    text = config.get_text_config()
    parameters = getattr(text, "rope_parameters", None) or getattr(text, "rope_scaling", None) or {}
    if isinstance(parameters, dict) and "mrope_section" in parameters:
        return (1, 3, 4)
    files = {code_of(inner).__module__ for inner in module.modules() if hasattr(inner, "config_class")}
    return (1, 3, 4) if any("mrope_section" in file_source(name) for name in files) else ()
