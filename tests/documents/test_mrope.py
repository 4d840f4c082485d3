"""Positions of several planes: documents in them, and images among packed documents."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import axattn
from axattn.errors import UnsupportedAttentionError
from tests.conformance.cases import image_inputs
from tests.conformance.families import FAMILIES
from tests.models import positions, tokens

FAMILY = FAMILIES["qwen2_5_vl"]
IDS, IMAGE = image_inputs(FAMILY)
PARTS = (tokens(1, 5, seed=5).clamp(max=80), IDS, tokens(1, 7, seed=6).clamp(max=80))  # no images in them
LENGTHS = tuple(part.shape[1] for part in PARTS)
KINDS = torch.cat([torch.zeros_like(PARTS[0]), IMAGE["mm_token_type_ids"], torch.zeros_like(PARTS[2])], 1)
PACKED: dict[str, Any] = {**IMAGE, "input_ids": torch.cat(PARTS, 1), "mm_token_type_ids": KINDS, "use_cache": False}


def model(name: str = "") -> Any:
    made = FAMILY.make()
    made.set_attn_implementation("eager")
    return axattn.apply(made, name) if name else made


def of(part: torch.Tensor) -> dict[str, Any]:
    return IMAGE if part is IDS else {"mm_token_type_ids": torch.zeros_like(part)}


@pytest.fixture(scope="module")
def alone() -> torch.Tensor:
    """Logits of each document by itself; the model counts positions."""
    stock = model()
    with torch.no_grad():
        return torch.cat([stock(part, **of(part), use_cache=False).logits for part in PARTS], 1)


def planes(text: bool) -> torch.Tensor:
    """int64 ``[3, 1, S]``: the model's own count of each document; ``[4, 1, S]`` with a plane of text before it."""
    stock = model().model
    grid = {"image_grid_thw": IMAGE["image_grid_thw"]}
    own = [stock.get_rope_index(p, of(p)["mm_token_type_ids"], **(grid if p is IDS else {}))[0] for p in PARTS]
    found = torch.cat(own, 2)
    return torch.cat([positions(LENGTHS)[None], found]) if text else found


@pytest.mark.parametrize("name", ["auto", "varlen"])
@pytest.mark.parametrize("kind", ["one plane", "[S]", "three planes", "four planes", "lengths"])
@torch.no_grad()
def test_an_image_among_packed_documents_is_where_it_is_alone(kind: str, name: str, alone: torch.Tensor) -> None:
    edges = torch.tensor([0, 5, 5 + LENGTHS[1], sum(LENGTHS)], dtype=torch.int32)
    given: dict[str, Any] = {
        "one plane": {"position_ids": positions(LENGTHS)},
        "[S]": {"position_ids": positions(LENGTHS)[0]},
        "three planes": {"position_ids": planes(text=False)},
        "four planes": {"position_ids": planes(text=True)},
        "lengths": {"cu_seq_lens_q": edges, "cu_seq_lens_k": edges, "max_length_q": 22, "max_length_k": 22},
    }[kind]
    found = model(name)(**PACKED, **given).logits
    assert torch.allclose(found, alone, atol=1e-5)


@torch.no_grad()
def test_positions_given_in_place_are_left_to_the_model_too(alone: torch.Tensor) -> None:
    on_axattn = model("varlen")
    rest = {name: given for name, given in PACKED.items() if name != "input_ids"}
    found = on_axattn(PACKED["input_ids"], torch.ones_like(PACKED["input_ids"]), positions(LENGTHS), **rest).logits
    assert torch.allclose(found, alone, atol=1e-5)


@torch.no_grad()
def test_one_document_keeps_the_positions_that_it_is_given() -> None:
    """The user's own: not axattn's to change."""
    where = {"position_ids": torch.arange(IDS.shape[1])[None], "use_cache": False}
    assert torch.allclose(
        model("varlen")(IDS, **IMAGE, **where).logits, model()(IDS, **IMAGE, **where).logits, atol=1e-5
    )


@pytest.mark.parametrize("name", ["sdpa", "eager"])
def test_names_of_transformers_serve_documents_where_the_text_has_positions_of_its_own(
    name: str, alone: torch.Tensor
) -> None:
    """Transformers makes the masks from the first of four planes; three have none that restarts with each document."""
    with torch.no_grad():
        assert torch.allclose(model(name)(**PACKED, position_ids=planes(text=True)).logits, alone, atol=1e-5)
    with pytest.raises(UnsupportedAttentionError, match=r"3 documents in 1 rows.* would leak"):
        model(name)(**PACKED, position_ids=planes(text=False))


# ---- a second turn over a cache: generate gives one plane for all, [1, B, S] ----------------------------------------


@pytest.mark.parametrize("name", ["auto", "varlen", "sdpa"])
def test_generate_continues_from_its_own_cache(name: str) -> None:
    greedy = {"max_new_tokens": 3, "do_sample": False, "eos_token_id": None, "return_dict_in_generate": True}
    ids, mask = tokens(2, 7).clamp(max=80), torch.ones(2, 7, dtype=torch.long)
    mask[0, :2] = 0

    def chat(on_axattn: Any) -> torch.Tensor:
        one = on_axattn.generate(ids, attention_mask=mask, **greedy)
        more = torch.cat([one.sequences, tokens(2, 4, seed=4).clamp(max=80)], 1)
        wider = torch.cat([mask, torch.ones(2, 7, dtype=torch.long)], 1)
        wider[1, 10:12] = 0
        found: torch.Tensor = on_axattn.generate(
            more, attention_mask=wider, past_key_values=one.past_key_values, **greedy
        ).sequences
        return found

    assert torch.equal(chat(model(name)), chat(model()))


@torch.no_grad()
def test_one_mrope_plane_for_all_describes_documents_as_positions_of_text_do(alone: torch.Tensor) -> None:
    where = positions(LENGTHS)[None]
    assert torch.allclose(model("auto")(**PACKED, position_ids=where).logits, alone, atol=1e-5)
    with pytest.raises(UnsupportedAttentionError, match=r"3 documents in 1 rows.* would leak"):
        model("sdpa")(**PACKED, position_ids=where)


@torch.no_grad()
def test_non_contiguous_padding_ends_no_document_in_mrope_positions_whose_padding_is_zero() -> None:
    ids, mask = tokens(1, 10).clamp(max=80), torch.tensor([[1, 1, 1, 0, 0, 1, 1, 1, 1, 1]])
    where = ((mask.cumsum(-1) - 1) * mask).expand(3, 1, 10)
    found, expected = (m(ids, attention_mask=mask, position_ids=where).logits for m in (model("auto"), model()))
    assert torch.allclose(found[mask.bool()], expected[mask.bool()], atol=1e-5)
