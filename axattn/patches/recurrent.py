"""Patch: recurrent layers run packed rows document by document (see `axattn.traits.recurrent`).

A hook on the parent module passes the documents to such a layer in place of its mask, as a `DocumentMask`. The inputs
that gradient checkpointing saves for the second run then hold them too.
"""

from __future__ import annotations

from typing import Any

import torch
from torch.utils.weak import WeakIdKeyDictionary

from axattn.documents.boundaries import Segments
from axattn.documents.document_rows import Group, as_rows
from axattn.documents.forward_context import current
from axattn.documents.traced import TracedSegments
from axattn.errors import Reason, UnsupportedAttentionError
from axattn.hf.source_inspection import signature_of
from axattn.hf.torch_internals import is_tracing
from axattn.patches.forward_wrapper import Forward, add_wrapper
from axattn.patches.patchset import PatchSet
from axattn.traits.recurrent import recurrent
from axattn.traits.token_mixers import text_model

_ADVICE = "Give it one document per row, padded."


class DocumentMask:
    """What a recurrent layer gets in place of its 2-D mask.

    Attributes:
        mask: the mask, ``[B, S]`` or None.
        segments: the documents of the rows, None if every row is one document.
        travel: brings documents whole to one rank each if tokens are placed on ranks (`SequenceShard.travel`).
    """

    __slots__ = ("mask", "segments", "travel")

    def __init__(self, mask: torch.Tensor | None, documents: Any) -> None:
        self.mask = mask
        self.segments = documents if isinstance(documents, Segments) else None
        self.travel = None if isinstance(documents, Segments) else documents


def add_document_runs(patches: PatchSet, model: torch.nn.Module) -> None:
    """Let every recurrent layer of a model run document by document."""
    for layer in recurrent(text_model(model)):
        add_wrapper(patches, layer.module, _RunByDocument(layer.name))
        hook = _DocumentMaskHook(layer.mask)
        patches.add_handle(layer.parent.register_forward_pre_hook(hook, with_kwargs=True))


class _DocumentMaskHook:
    """Forward pre-hook of the parent of a recurrent layer.

    A checkpoint may run the hook again in backward, when no input hook has run (torch's ``checkpoint_wrapper``;
    Transformers' own up to 5.17): apart from hidden states, its tensors are then those of the first run.
    """

    def __init__(self, parameter: str) -> None:
        self.parameter = parameter
        self.documents_by_tensor: Any = WeakIdKeyDictionary()

    def __reduce__(self) -> Any:
        return _DocumentMaskHook, (self.parameter,)  # a copy starts empty

    def _documents(self, module: torch.nn.Module, kwargs: dict[str, Any]) -> list[Any]:
        """The documents of the rows in a list, ``[None]`` for one document per row; empty if unknown. For tokens that
        are placed on ranks their `SequenceShard.travel`."""
        context = current()
        if context is not None:
            found: Any = context.segments if context.shard is None else context.shard.travel
            if isinstance(found, TracedSegments):  # refused earlier, when a graph reads documents
                raise AssertionError("layers that run document by document are not traced")
            if module.training:
                for x in _tensors(kwargs):
                    known = self.documents_by_tensor.get(x, [found])
                    self.documents_by_tensor[x] = [found] if known == [found] else []
            return [found]
        known = self.documents_by_tensor
        seen = [known[x] for x in _tensors(kwargs) if known.get(x)]
        return seen[0] if seen and all(one == seen[0] for one in seen) else []

    def __call__(self, module: torch.nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Replace the mask by a `DocumentMask` with the input hook's documents."""
        context = current()
        if is_tracing():
            if context is not None and isinstance(context.segments, Segments):  # they would be constants of the graph
                _refuse("packed rows", "the layer is compiled by itself, and documents are read outside its graph")
            return None
        if context is not None and isinstance(context.segments, TracedSegments):
            return None
        documents = self._documents(module, kwargs)
        if not documents:
            return None
        changed = dict(kwargs)
        if args:
            names = list(signature_of(module).parameters)[1:]
            if self.parameter in names[: len(args)]:
                at = names.index(self.parameter)
                mask = DocumentMask(_mask_tensor(args[at]), documents[0])
                return (*args[:at], mask, *args[at + 1 :]), kwargs
        changed[self.parameter] = DocumentMask(_mask_tensor(kwargs.get(self.parameter)), documents[0])
        return args, changed


def _tensors(kwargs: dict[str, Any]) -> list[torch.Tensor]:
    """Tensors among keywords and in tuples there (``position_embeddings``), not those of a cache."""
    some = [x if isinstance(x, tuple) else (x,) for x in kwargs.values()]
    return [x for several in some for x in several if isinstance(x, torch.Tensor)]


def _mask_tensor(mask: Any) -> Any:
    return mask.mask if isinstance(mask, DocumentMask) else mask


class _RunByDocument:
    """The change around the ``forward`` of a recurrent layer.

    Args:
        name: for errors.
    """

    def __init__(self, name: str) -> None:
        self.name = name
        self.packed = False

    def __call__(self, module: torch.nn.Module, forward: Forward, inputs: dict[str, Any]) -> Any:
        """Run one forward; returns what the layer returns."""
        mask = inputs.get("attention_mask")
        if not isinstance(mask, DocumentMask):
            if not is_tracing():
                self._require_documents()
            return forward(inputs)
        hidden = inputs["hidden_states"]
        tensor = mask.mask
        if isinstance(tensor, torch.Tensor):
            # the layer may be on another device; accelerate does not move a tensor inside a `DocumentMask`
            tensor = tensor.to(hidden.device)
        if mask.travel is not None:
            self.packed = True
            found = _run(forward, mask.travel.collect(hidden), None, mask.travel.segments)
            parts = found if isinstance(found, tuple) else (found,)
            back = tuple(mask.travel.put_back(x) if isinstance(x, torch.Tensor) else x for x in parts)
            return back if isinstance(found, tuple) else back[0]
        if mask.segments is None or hidden.shape[1] == 1:
            return forward({**inputs, "attention_mask": tensor})
        self.packed = True
        return _run(forward, hidden, tensor, mask.segments)

    def _require_documents(self) -> None:
        """Raise if packed rows may run here without their documents.

        Raises:
            UnsupportedAttentionError: the model's input hook found documents that did not reach the layer, or no input
                hook has run (a second run in backward) and the layer has run packed rows before.
        """
        context = current()
        if context is None:
            if self.packed and torch.is_grad_enabled():
                text = "it runs outside its model's forward (again, in a checkpoint), and its documents are unknown"
                _refuse(self.name, text)
        elif isinstance(context.segments, Segments) or context.shard is not None:
            _refuse(self.name, "the documents of its rows did not reach it")


def _run(forward: Forward, hidden: torch.Tensor, mask: torch.Tensor | None, segments: Segments) -> Any:
    """Run a layer on the documents as rows, and put its outputs back in place. Other inputs are dropped, because they
    describe the packed rows (a cache, keywords with lengths)."""
    rows, length, _ = hidden.shape
    if (rows, length) != (segments.rows, segments.length):
        _refuse(
            "this batch", f"the layer has {rows} x {length} tokens, its documents {segments.rows} x {segments.length}"
        )
    documents = as_rows(segments, hidden.device)
    flat = hidden.flatten(0, 1)
    parts = [_group(forward, flat, mask, group) for group in documents.groups]

    def in_place(outputs: list[Any]) -> Any:
        if not isinstance(outputs[0], torch.Tensor):
            return outputs[0]
        return documents.in_packed_order(outputs).view(rows, length, *outputs[0].shape[1:])

    if isinstance(parts[0], tuple):
        return tuple(in_place(list(each)) for each in zip(*parts, strict=True))
    return in_place(parts)


def _group(forward: Forward, flat: torch.Tensor, mask: torch.Tensor | None, group: Group) -> Any:
    """Run the layer on one group; returns its outputs for real tokens, ``[N, ...]``."""
    n, longest = group.tokens.shape
    index = group.tokens.flatten()
    given: dict[str, Any] = {"hidden_states": flat.index_select(0, index).view(n, longest, -1)}
    if mask is not None:
        real = mask.flatten().index_select(0, index).view(n, longest)
        given["attention_mask"] = real * group.real

    def real_tokens(x: Any) -> Any:
        return group.select_real(x) if isinstance(x, torch.Tensor) else x

    found = forward(given)
    return tuple(map(real_tokens, found)) if isinstance(found, tuple) else real_tokens(found)


def _refuse(what: str, text: str) -> None:
    raise UnsupportedAttentionError(f"{what} can't run document by document", [Reason("segments", text)], _ADVICE)
