"""Which modules of a model make its masks and its cache, and from which inputs: read from the source of classes."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from typing import Any

import torch

from axattn.hf.module_walk import modules_of
from axattn.hf.source_inspection import calls_of, code_of, tree_of
from axattn.hf.weak_cache import weak_cache

_MASK_BUILDERS = ("create_causal_mask", "create_sliding_window_causal_mask", "create_chunked_causal_mask")


def passes_positions_to_masks(module: torch.nn.Module, name: str = "position_ids") -> bool:
    """Whether the decoder inside `module` passes its positions to Transformers' mask builders (read from its source).

    False if the source can't be read.

    Args:
        module: the model.
        name: the variable that the builders get: ``"position_ids"``, or ``"text_position_ids"``, the text plane of
            models with M-RoPE.
    """
    classes: set[Any] = {code_of(inner) for inner in modules_of(module)}
    found = [answer for cls in classes if (answer := _positions_of_masks(cls)) is not None]
    return bool(found) and all(answer == name for answer in found)


@weak_cache
def _positions_of_masks(cls: Any) -> str | None:
    """The expression that a class passes to the mask builders as positions, ``""`` for none or several; None for a
    class that builds no masks."""
    forward = getattr(cls, "forward", None)
    if forward is None or not hasattr(cls, "config_class"):
        return None
    tree = tree_of(forward)
    if tree is None:
        return ""
    known = set(_MASK_BUILDERS)
    for node in ast.walk(tree):  # mask_function = create_causal_mask if ... else create_sliding_window_causal_mask
        if isinstance(node, ast.Assign) and not any(isinstance(inner, ast.Call) for inner in ast.walk(node.value)):
            mentioned = {inner.id for inner in ast.walk(node.value) if isinstance(inner, ast.Name)}
            if mentioned & known:
                known |= {target.id for target in node.targets if isinstance(target, ast.Name)}
    calls = [node for node in ast.walk(tree) if isinstance(node, ast.Call)]
    builders = [
        node
        for node in calls
        if isinstance(node.func, ast.Name) and (node.func.id in known or node.func.id.startswith("create_masks_for_"))
    ]
    if not builders:
        return None
    spread = {
        ast.unparse(value)
        for node in ast.walk(tree)
        if isinstance(node, ast.Dict)
        for key, value in zip(node.keys, node.values, strict=True)
        if isinstance(key, ast.Constant) and key.value == "position_ids"
    }
    given = set()
    for call in builders:
        named = [ast.unparse(kw.value) for kw in call.keywords if kw.arg == "position_ids"]
        given |= set(named) or (spread if any(kw.arg is None for kw in call.keywords) else {""}) or {""}
    return given.pop() if len(given) == 1 else ""


def cached_under_mask(module: torch.nn.Module) -> bool:
    """Whether a model called without a cache makes one before its masks, which then ignore document boundaries.

    False if the module that makes the masks passes them to the one that makes the cache (Gemma 3 with images), and
    under gradient checkpointing if Transformers turns ``use_cache`` off (5.17 and 5.24).
    """
    chains = list(_chains_to_mask_makers(module))
    made = [any(_class_makes_cache(code_of(x)) and not _turns_cache_off(x) for x in chain) for chain in chains]
    return any(made) or not made  # True if unknown (no module is found that makes the masks)


def _chains_to_mask_makers(
    module: torch.nn.Module, above: tuple[torch.nn.Module, ...] = ()
) -> Iterator[tuple[torch.nn.Module, ...]]:
    """Each module that makes masks, after the modules around it; not modules inside it, which get its masks."""
    chain = (*above, module)
    if _positions_of_masks(code_of(module)) is not None:
        yield chain
        return
    for child in module.children():
        yield from _chains_to_mask_makers(child, chain)


@weak_cache
def _class_makes_cache(cls: Any) -> bool:
    """Whether the ``forward`` of a class makes a cache (``DynamicCache(...)``)."""
    return any(ast.unparse(call.func).endswith("Cache") for call in calls_of(cls.forward))


@weak_cache
def _class_takes_defaults(cls: Any) -> bool:
    """Whether Transformers' ``merge_with_config_defaults`` decorates the ``forward`` of a class."""
    tree = tree_of(cls.forward)
    return tree is not None and any("merge_with_config_defaults" in ast.unparse(d) for d in tree.decorator_list)


def _turns_cache_off(module: torch.nn.Module) -> bool:
    checkpoints = getattr(module, "gradient_checkpointing", False) and module.training and torch.is_grad_enabled()
    return bool(checkpoints) and _class_takes_defaults(code_of(module))
