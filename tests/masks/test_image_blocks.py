"""Image blocks among packed documents (Gemma 3): each image sees itself both ways, in its own document alone."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from transformers import masking_utils as mu

import axattn
from axattn.documents.traced import TracedSegments
from axattn.errors import UnsupportedAttentionError
from axattn.hf.mask_functions import known
from axattn.masks.image_blocks import blocks_in_place, require_one_document
from tests.conformance.families import FAMILIES, IMAGE
from tests.models import positions

FAMILY = FAMILIES["gemma3_vl"]
FIRST = torch.tensor([[1, 5, 6, *[IMAGE] * 4]])
SECOND = torch.tensor([[*[IMAGE] * 4, 7, 8, 9, 10, 11, 12, 13]])


def model(name: str = "") -> Any:
    made = FAMILY.make()
    made.set_attn_implementation("eager")
    return axattn.apply(made, name) if name else made


def packed(images: torch.Tensor) -> dict[str, Any]:
    ids = torch.cat([FIRST, SECOND], 1)
    where = positions((FIRST.shape[1], SECOND.shape[1]))
    kinds = (ids == IMAGE).long()
    return {"input_ids": ids, "position_ids": where, "token_type_ids": kinds, "pixel_values": images}


@torch.no_grad()
def test_images_on_both_sides_of_a_boundary_do_not_see_each_other() -> None:
    """Side by side they are one block to Transformers, which counts where images begin."""
    torch.manual_seed(0)
    images = torch.randn(2, 3, 16, 16)
    stock = model()
    parts = [
        stock(ids, pixel_values=images[at : at + 1], token_type_ids=(ids == IMAGE).long(), use_cache=False).logits
        for at, ids in enumerate((FIRST, SECOND))
    ]
    found = model("auto")(**packed(images), use_cache=False).logits
    assert torch.allclose(found, torch.cat(parts, 1), atol=1e-5)


@pytest.mark.parametrize("name", ["eager", "sdpa"])
def test_names_of_transformers_refuse_images_in_packed_rows(name: str) -> None:
    with pytest.raises(UnsupportedAttentionError, match="image blocks"):
        model(name)(**packed(torch.zeros(2, 3, 16, 16)), use_cache=False)


@pytest.mark.skipif(known().remap is None, reason="this Transformers passes mask functions positions in the row")
def test_only_the_look_up_of_blocks_changes() -> None:
    where = positions((3, 5))
    blocks = torch.tensor([[-1, 0, 0, -1, 1, 1, -1, -1]])
    rule = mu.and_masks(
        mu.or_masks(mu.causal_mask_function, mu.blockwise_overlay(blocks)), mu.sliding_window_overlay(3)
    )
    given = mu.remap_positions_for_packed_sequence(rule, where)
    put = blocks_in_place(given)
    for query in range(8):
        for key in range(8):
            if (query < 3) != (key < 3):
                continue  # another document
            near = bool(where[0, key] > where[0, query] - 3)
            same = bool(blocks[0, query] == blocks[0, key] >= 0)
            at = torch.tensor([0, 0, query, key])  # batch, head, query, key
            assert bool(put(*at)) == ((key <= query or same) and near), (query, key)
    plain = mu.remap_positions_for_packed_sequence(mu.sliding_window_overlay(3), where)
    assert blocks_in_place(plain) is plain


@pytest.mark.skipif(known().remap is None, reason="nothing to assert before transformers 5.18")
def test_a_compiled_graph_asserts_that_rows_under_an_overlay_are_not_packed() -> None:
    def run(documents: torch.Tensor) -> torch.Tensor:
        require_one_document(TracedSegments(documents, 1, 4))
        return documents.sum()

    compiled = torch.compile(run, backend="aot_eager", fullgraph=True)
    assert compiled(torch.zeros(1, 4, dtype=torch.long)) == 0
    with pytest.raises(RuntimeError, match="can't be compiled"):
        compiled(torch.tensor([[0, 0, 1, 1]]))
