"""Faults put in on purpose: each must turn a cell of the matrix wrong, or the matrix could not have found it."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import pytest
import torch

from axattn.attention import interface
from axattn.backends import by_document, fp8, int8_operator, sdpa
from axattn.backends.call import AttentionCall
from axattn.backends.varlen_engine import packed
from axattn.documents import input_hook, inputs, mrope, native_flash_guard, native_guard, read_inputs, traced
from axattn.documents.boundaries import Segments
from axattn.hf.mask_functions import known
from axattn.masks import lazy_mask, mask_interface, varlen_layout
from axattn.patches import recurrent
from tests import faults
from tests.conformance.cells import run
from tests.faults import Inject, Patch

Key = tuple[str, str, str]
CELLS: dict[Inject, Key] = {}


def fault(backend: str, family: str, scenario: str) -> Callable[[Inject], Inject]:
    """Register a fault and the cell that must turn wrong."""

    def add(inject: Inject) -> Inject:
        CELLS[inject] = (backend, family, scenario)
        return faults.fault(f"{backend} / {family} / {scenario}")(inject)

    return add


def _pattern(patch: Patch, **changes: Any) -> None:
    real = mask_interface.recognise

    def changed(function: Any) -> Any:
        found = real(function)
        return None if found is None else dataclasses.replace(found, **changes)

    patch.setattr(mask_interface, "recognise", changed)


def _call(patch: Patch, **changes: Any) -> None:
    patch.setattr(interface, "AttentionCall", lambda **given: AttentionCall(**{**given, **changes}))


@fault("auto", "mistral", "longer than window and chunk")
def the_window_is_dropped(patch: Patch) -> None:
    _pattern(patch, window=None)


@fault("auto", "llama4", "longer than window and chunk")
def the_chunks_are_dropped(patch: Patch) -> None:
    _pattern(patch, chunk=None)


@fault("auto", "llama4", "packed, cache on by default")
def chunks_do_not_restart_with_a_document(patch: Patch) -> None:
    def from_the_row(length: int, documents: Any, padding: Any, device: torch.device) -> torch.Tensor:
        return torch.arange(length, device=device)[None]

    patch.setattr(mask_interface, "chunk_positions", from_the_row)
    patch.setattr(lazy_mask, "build_layout", lambda mask: None)


@fault("auto", "bert", "dense")
def an_encoder_runs_causal(patch: Patch) -> None:
    _pattern(patch, causal=True)


@fault("auto", "gpt_oss", "dense")
def sinks_are_ignored(patch: Patch) -> None:
    _call(patch, sinks=None)


@fault("auto", "gemma2", "dense")
def softcap_is_ignored(patch: Patch) -> None:
    _call(patch, softcap=None)


@fault("auto", "granite", "dense")
def scale_is_ignored(patch: Patch) -> None:
    _call(patch, scale=8**-0.5)


@fault("auto", "t5", "cross-attention over a padded encoder")
def position_bias_is_ignored(patch: Patch) -> None:
    _call(patch, bias=None)


@fault("auto", "deepseek_v32", "longer than window and chunk")
def sparse_indices_are_ignored(patch: Patch) -> None:
    patch.setattr(sdpa, "selected", lambda call: None)


@fault("auto", "llama", "dropout")
def dropout_is_ignored(patch: Patch) -> None:
    _call(patch, dropout=0.0)


@fault("auto", "llama", "output_attentions")
def attention_weights_are_forgotten(patch: Patch) -> None:
    _call(patch, want_weights=False)


@fault("auto", "llama", "left padding")
def padding_is_ignored(patch: Patch) -> None:
    patch.setattr(mask_interface, "_padding", lambda *given: None)


@fault("auto", "llama", "own 4-D float mask")
def a_users_mask_is_ignored(patch: Patch) -> None:
    patch.setattr(interface, "read_mask", lambda *given: None)


@fault("auto", "gemma3_vl", "an image in the text")
def image_blocks_are_taken_for_causal(patch: Patch) -> None:
    patch.setattr(mask_interface, "recognise", lambda function: lazy_mask.Pattern(causal=True))


@fault("auto", "qwen2_5_vl", "images in packed documents")
def an_image_in_packed_rows_keeps_positions_of_one_plane(patch: Patch) -> None:
    patch.setattr(mrope, "lacks_mrope_planes", lambda inputs: False)


if known().remap is not None:  # else Transformers looks them up in place

    @fault("auto", "gemma3_vl", "images in packed documents")
    def image_blocks_are_looked_up_within_documents(patch: Patch) -> None:
        patch.setattr(mask_interface, "blocks_in_place", lambda function: function)


@fault("auto", "qwen3_next", "packed, document ids in the mask")
def the_model_gets_the_ids_of_its_documents(patch: Patch) -> None:
    patch.setattr(input_hook, "zero_one_mask", lambda mask: mask)


@fault("auto", "qwen3_next", "packed, many rows")
def a_state_runs_on_into_the_next_document(patch: Patch) -> None:
    patch.setattr(recurrent._DocumentMaskHook, "_documents", lambda *given: [None])


@fault("auto", "qwen3_next", "packed gradients")
def tokens_of_a_document_come_back_in_another_place(patch: Patch) -> None:
    real = recurrent.as_rows

    def moved(*given: Any) -> Any:
        found = real(*given)
        return found._replace(back=found.back.roll(1))

    patch.setattr(recurrent, "as_rows", moved)


@fault("auto", "gemma2", "packed gradients")
def outputs_of_a_document_come_back_in_another_place(patch: Patch) -> None:
    real = by_document.as_rows

    def moved(*given: Any) -> Any:
        found = real(*given)
        return found._replace(back=found.back.roll(1))

    patch.setattr(by_document, "as_rows", moved)


@fault("auto", "gemma2", "packed, cache off")
def documents_that_run_as_rows_lose_their_window(patch: Patch) -> None:
    real = by_document.as_rows

    def without(*given: Any) -> Any:
        rows = real(*given)
        return rows._replace(groups=tuple(group._replace(mask=None, window=None) for group in rows.groups))

    patch.setattr(by_document, "as_rows", without)


@fault("auto", "llama", "packed, many rows")
def only_the_first_row_has_documents(patch: Patch) -> None:
    real = read_inputs.from_positions

    def first(*given: Any) -> Segments | None:
        found = real(*given)
        if found is None:
            return None
        whole = (0, found.length)
        return Segments((found.boundaries[0], *[whole] * (found.rows - 1)), found.device)

    patch.setattr(read_inputs, "from_positions", first)


@fault("auto", "llama", "no leak between documents")
def a_boundary_is_off_by_one(patch: Patch) -> None:
    real = read_inputs.from_positions

    def late(*given: Any) -> Segments | None:
        found = real(*given)
        if found is None:
            return None
        rows = [(0, *(edge + 1 for edge in row[1:-1]), row[-1]) for row in found.boundaries]
        return Segments(tuple(rows), found.device)

    patch.setattr(read_inputs, "from_positions", late)


@fault("auto", "llama", "packed, cu_seq_lens")
def cumulative_lengths_are_ignored(patch: Patch) -> None:
    def one(cu_q: Any, cu_k: Any, rows: int, length: int) -> Segments:
        return Segments(((0, length),) * rows, torch.device("cpu"))

    patch.setattr(inputs, "documents_of_lengths", one)


@fault("auto", "llama4", "packed, cache on by default")
def the_input_hook_reads_nothing(patch: Patch) -> None:
    patch.setattr(input_hook.InputHook, "pre_forward", lambda self, module, args, kwargs: None)


@fault("auto", "llama", "left padding")
def no_mask_is_made(patch: Patch) -> None:
    patch.setattr(mask_interface, "lazy_mask", lambda **given: None)


@fault("auto", "llama", "prefill, then two chunks over the cache")
def queries_over_a_cache_are_aligned_top_left(patch: Patch) -> None:
    real = mask_interface.LazyMask
    patch.setattr(mask_interface, "LazyMask", lambda **given: real(**{**given, "q_offset": 0}))


@fault("auto", "llama", "generate, static cache")
def an_empty_static_cache_is_taken_for_bottom_right(patch: Patch) -> None:
    real = varlen_layout.Span

    def moved(row0: int, row1: int, q0: int, q1: int, k0: int, k1: int) -> Any:
        return real(row0, row1, q0, q1, k0, k1)

    patch.setattr(varlen_layout, "Span", moved)
    real_mask = mask_interface.LazyMask

    def last(**given: Any) -> Any:
        _, _, q_length, kv_length = given["shape"]
        offset = kv_length - q_length if given["q_offset"] == 0 else given["q_offset"]
        return real_mask(**{**given, "q_offset": offset})

    patch.setattr(mask_interface, "LazyMask", last)


@fault("auto", "llama", "packed gradients")
def the_gradient_is_dropped(patch: Patch) -> None:
    real = packed.attention_over_tiles
    patch.setattr(packed, "attention_over_tiles", lambda *given: real(*given).detach())


@fault("auto", "llama", "compiled, fullgraph")
def documents_are_forgotten_in_compiled_graphs(patch: Patch) -> None:
    patch.setattr(traced, "from_positions", lambda *given: None)


@fault("sdpa", "llama", "packed, cache on by default")
def the_guard_of_native_names_is_off(patch: Patch) -> None:
    patch.setattr(native_guard, "require_no_leak", lambda *given: None)


@fault("flash_attention_2", "llama", "packed, many rows")
def the_flash_path_gets_no_lengths(patch: Patch) -> None:
    patch.setattr(native_flash_guard, "lengths_of", lambda segments: {})
    patch.setattr(native_flash_guard, "require_reached", lambda *given: None)


@fault("eager", "llama", "own 4-D bool mask")
def bool_masks_pass_to_eager(patch: Patch) -> None:
    patch.setattr(native_guard, "require_mask_is_read", lambda *given: None)


@fault("auto", "gemma4", "packed gradients, reentrant checkpointing")
def lost_gradients_of_shared_keys_pass(patch: Patch) -> None:
    patch.setattr(native_guard, "require_gradients_of_shared_keys", lambda module: None)


@pytest.fixture(autouse=True)
def no_masks_of_earlier_forwards() -> Any:
    mask_interface._causal_masks.clear()
    yield
    mask_interface._causal_masks.clear()
    torch._dynamo.reset()


@fault("fp8", "llama", "packed gradients")
def the_gradient_of_keys_is_dropped(patch: Patch) -> None:
    real = fp8.flash_backward

    def dropped(*inputs: Any) -> Any:
        dq, dk, dv = real(*inputs)
        return dq, torch.zeros_like(dk), dv

    patch.setattr(fp8, "flash_backward", dropped)


@fault("sage", "llama", "packed gradients")
def the_gradient_of_queries_is_dropped(patch: Patch) -> None:
    real = int8_operator.flash_backward

    def dropped(*inputs: Any) -> Any:
        dq, dk, dv = real(*inputs)
        return torch.zeros_like(dq), dk, dv

    patch.setattr(int8_operator, "flash_backward", dropped)


@fault("fp8", "llama", "packed, cache on by default")
def scales_are_those_of_another_document(patch: Patch) -> None:
    real = fp8._attention
    patch.setattr(fp8, "_attention", lambda parts, *rest: real((*parts[:5], parts[5].roll(1, 0)), *rest))


@pytest.mark.parametrize("inject", CELLS, ids=lambda inject: inject.__name__.replace("_", " "))
def test_a_fault_turns_its_cell_wrong(inject: Inject, monkeypatch: Patch) -> None:
    inject(monkeypatch)
    cell = run(*CELLS[inject])
    assert cell.status == "wrong", cell
    assert not cell.detail.startswith("EAGER"), cell.detail  # the reference itself must stand
