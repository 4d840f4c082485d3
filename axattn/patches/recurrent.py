"""Patch: layers that carry a state along a row run packed rows document by document (see `axattn.traits.recurrent`).

The documents come to such a layer as its mask does: a hook on the layer around it hands them on inside a
`DocumentMask`. What gradient checkpointing keeps for the layer's second run then holds them too.
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
from axattn.patches.forward_wrapper import Forward, add_entrance
from axattn.patches.patchset import PatchSet
from axattn.traits.recurrent import recurrent
from axattn.traits.token_mixers import text_model

_ALONE = "Give it one document a row, padded."


class DocumentMask:
    """What a layer is given in the place of its 2-D mask.

    Attributes:
        mask: the mask, ``[B, S]`` or None.
        segments: the documents of the rows, None when every row is one.
    """

    __slots__ = ("mask", "segments")

    def __init__(self, mask: torch.Tensor | None, segments: Segments | None) -> None:
        self.mask = mask
        self.segments = segments


def add_document_runs(patches: PatchSet, model: torch.nn.Module) -> None:
    """Let every layer of a model that carries a state run document by document."""
    for layer in recurrent(text_model(model)):
        add_entrance(patches, layer.module, _ByDocument(layer.name))
        hook = _HandOn(layer.mask)
        patches.add_handle(layer.parent.register_forward_pre_hook(hook, with_kwargs=True))


class _HandOn:
    """Forward pre-hook of the module around such a layer.

    A checkpoint may run the hook again in backward, when no input hook has run (torch's ``checkpoint_wrapper``;
    Transformers' own up to 5.17): the tensors that it is given besides hidden states are then those of its first run.
    """

    def __init__(self, parameter: str) -> None:
        self.parameter = parameter
        self.known: Any = WeakIdKeyDictionary()

    def __reduce__(self) -> Any:
        return _HandOn, (self.parameter,)  # a copy has seen nothing yet

    def _documents(self, module: torch.nn.Module, kwargs: dict[str, Any]) -> list[Segments | None]:
        """What is known of the rows, in a list; empty if nothing is."""
        context = current()
        if context is not None:
            found = context.segments
            if isinstance(found, TracedSegments):  # refused where documents are read in a graph
                raise AssertionError("layers that run document by document are not traced")
            if module.training:
                for x in _tensors(kwargs):
                    self.known[x] = [found] if self.known.get(x, [found]) == [found] else []
            return [found]
        said = [self.known[x] for x in _tensors(kwargs) if self.known.get(x)]
        return said[0] if said and all(one == said[0] for one in said) else []

    def __call__(self, module: torch.nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Put what the input hook found into the mask."""
        context = current()
        if is_tracing():
            if context is not None and isinstance(context.segments, Segments):  # the graph would be for these alone
                _refuse("packed rows", "the layer is compiled by itself, and documents are read outside of its graph")
            return None
        if context is not None and isinstance(context.segments, TracedSegments):
            return None
        documents = self._documents(module, kwargs)
        if not documents:
            return None
        given = dict(kwargs)
        if args:
            names = list(signature_of(module).parameters)[1:]
            if self.parameter in names[: len(args)]:
                at = names.index(self.parameter)
                mask = DocumentMask(_plain(args[at]), documents[0])
                return (*args[:at], mask, *args[at + 1 :]), kwargs
        given[self.parameter] = DocumentMask(_plain(kwargs.get(self.parameter)), documents[0])
        return args, given


def _tensors(kwargs: dict[str, Any]) -> list[torch.Tensor]:
    """Tensors among keywords, and in tuples there (``position_embeddings``); not those inside of a cache."""
    some = [x if isinstance(x, tuple) else (x,) for x in kwargs.values()]
    return [x for several in some for x in several if isinstance(x, torch.Tensor)]


def _plain(mask: Any) -> Any:
    return mask.mask if isinstance(mask, DocumentMask) else mask


class _ByDocument:
    """The change around the ``forward`` of a layer that carries a state.

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
                self._require_nothing_lost()
            return forward(inputs)
        hidden = inputs["hidden_states"]
        plain = mask.mask
        if isinstance(plain, torch.Tensor):
            # the layer may lie on another device, and nobody moves what a `DocumentMask` holds
            plain = plain.to(hidden.device)
        if mask.segments is None or hidden.shape[1] == 1:
            return forward({**inputs, "attention_mask": plain})
        self.packed = True
        return _run(forward, hidden, plain, mask.segments)

    def _require_nothing_lost(self) -> None:
        """Raise where packed rows may run here without their documents.

        Raises:
            UnsupportedAttentionError: the model's input hook found documents that did not come, or no input hook has
                run (a layer runs again in backward) and it has seen packed rows.
        """
        context = current()
        if context is None:
            if self.packed and torch.is_grad_enabled():
                text = (
                    "it runs outside of its model's forward (again, in a checkpoint), and its documents are not known"
                )
                _refuse(self.name, text)
        elif isinstance(context.segments, Segments):
            _refuse(self.name, "the documents of its rows did not reach it")


def _run(forward: Forward, hidden: torch.Tensor, mask: torch.Tensor | None, segments: Segments) -> Any:
    """The documents as rows through a layer, its outputs back in their places. Nothing else it is given holds there:
    a cache would be that of rows, keywords speak of lengths in them."""
    rows, length, _ = hidden.shape
    if (rows, length) != (segments.rows, segments.length):
        _refuse("this batch", f"the layer has {rows} x {length} tokens, its rows {segments.rows} x {segments.length}")
    documents = as_rows(segments, hidden.device)
    flat = hidden.flatten(0, 1)
    parts = [_group(forward, flat, mask, group) for group in documents.groups]

    def back(outputs: list[Any]) -> Any:
        if not isinstance(outputs[0], torch.Tensor):
            return outputs[0]
        return documents.in_packed_order(outputs).view(rows, length, *outputs[0].shape[1:])

    if isinstance(parts[0], tuple):
        return tuple(back(list(each)) for each in zip(*parts, strict=True))
    return back(parts)


def _group(forward: Forward, flat: torch.Tensor, mask: torch.Tensor | None, group: Group) -> Any:
    """One group through the layer; of what it returns the real tokens, ``[N, ...]``."""
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
    raise UnsupportedAttentionError(f"{what} can't run document by document", [Reason("segments", text)], _ALONE)
