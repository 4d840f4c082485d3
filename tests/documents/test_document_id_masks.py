"""Document ids in a 2-D mask: documents are kept apart, and nothing in a model multiplies by the ids."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
import transformers

import axattn
from axattn.errors import AxattnError, InvalidInputError, UnsupportedAttentionError
from tests.census import examine
from tests.conformance.cases import Batch, packed
from tests.models import HYBRIDS, build, positions, tokens
from tests.sampling import part_of

ROWS = packed((7, 11, 3), (5, 9), pad=2)
FAMILIES = ("llama", "qwen3_next", "bamba", "falcon_h1", "jamba", "kimi_linear")


def made(family: str) -> Any:
    return build(family) if family == "llama" or family in HYBRIDS else examine.build(family, "causal")


def document_ids(batch: Batch, first: int = 1) -> torch.Tensor:
    """int64 ``[B, S]``: documents from `first` on in each row, 0 for padding."""
    found = torch.zeros_like(batch.ids)
    for row, a, b in batch.documents:
        found[row, a:b] = found[row].max().clamp(min=first - 1) + 1
    return found


def alone(model: Any, batch: Batch) -> torch.Tensor:
    return torch.cat([model(batch.ids[row : row + 1, a:b], use_cache=False).logits[0] for row, a, b in batch.documents])


def cut(batch: Batch, logits: torch.Tensor) -> torch.Tensor:
    return torch.cat([logits[row, a:b] for row, a, b in batch.documents])


@pytest.mark.parametrize(
    ("family", "rows", "unpad"),
    part_of(
        itertools.product(FAMILIES, ("packed", "one document a row"), (False, True)),
        kept=itertools.chain(*(((one, "packed", False), (one, "one document a row", True)) for one in FAMILIES[:-1])),
    ),
)
@torch.no_grad()
def test_documents_equal_those_alone_whatever_their_ids(family: str, rows: str, unpad: bool) -> None:
    """Layers with a state multiply by the mask: a second document would be scaled by two."""
    batch = ROWS if rows == "packed" else packed((12,), (7,))
    expected = alone(made(family), batch)
    model = axattn.apply(made(family), "auto", unpad=unpad)
    found = cut(batch, model(batch.ids, attention_mask=document_ids(batch, 2), use_cache=False).logits)
    assert torch.allclose(found, expected, atol=1e-4)


@pytest.mark.parametrize("dtype", [torch.int32, torch.uint8, torch.float32, torch.bfloat16])
@torch.no_grad()
def test_document_ids_of_any_dtype_separate_documents(dtype: torch.dtype) -> None:
    model = axattn.apply(build("llama"), "auto")
    found = model(ROWS.ids, document_ids(ROWS).to(dtype), use_cache=False).logits  # by place, not by name
    assert torch.allclose(cut(ROWS, found), alone(build("llama"), ROWS), atol=1e-4)


@pytest.mark.parametrize("compiled", [False, pytest.param(True, marks=pytest.mark.nightly)], ids=["", "compiled"])
@torch.no_grad()
def test_the_loss_that_balances_experts_does_not_weigh_documents_by_their_ids(compiled: bool) -> None:
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "vocab_size": 97}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "num_local_experts": 4}
    config = transformers.MixtralConfig(**sizes, **heads, output_router_logits=True, router_aux_loss_coef=1.0)
    model = axattn.apply(transformers.MixtralForCausalLM(config).eval(), "auto")
    batch = packed((4, 6))
    expected = model(batch.ids, position_ids=batch.positions, labels=batch.ids, use_cache=False)
    run = torch.compile(model, backend="eager") if compiled else model
    found = run(batch.ids, attention_mask=document_ids(batch), labels=batch.ids, use_cache=False)
    assert torch.allclose(found.aux_loss, expected.aux_loss, atol=1e-6)
    assert torch.allclose(found.loss, expected.loss, atol=1e-5)


class Masked(transformers.LlamaForCausalLM):
    """A model that makes a mask of its own of the one that it is given."""

    def forward(self, input_ids: Any, attention_mask: Any = None, **inputs: Any) -> Any:
        return super().forward(input_ids, attention_mask=attention_mask * 1, **inputs)


@pytest.mark.parametrize("compiled", part_of([False, True], kept=[False]))
@torch.no_grad()
def test_an_inner_model_that_gets_another_mask_still_knows_the_documents(compiled: bool) -> None:
    model = build("llama")
    expected = alone(model, ROWS)
    model.__class__ = Masked
    axattn.apply(model, "auto")
    run = torch.compile(model, backend="eager") if compiled else model
    found = run(ROWS.ids, attention_mask=document_ids(ROWS), use_cache=False).logits
    assert torch.allclose(cut(ROWS, found), expected, atol=1e-4)


@pytest.mark.parametrize(
    "where", [positions((4, 2, 4)), pytest.param(torch.arange(10)[None] * 2, marks=pytest.mark.nightly)]
)
@torch.no_grad()
def test_positions_that_jump_inside_a_document_of_the_mask_are_refused(where: torch.Tensor) -> None:
    torch._dynamo.reset()
    model, batch = axattn.apply(build("llama", num_hidden_layers=1), "auto"), packed((4, 6))
    with pytest.raises(InvalidInputError, match=r"inside document \d"):
        model(batch.ids, attention_mask=document_ids(batch, 2), position_ids=where)
    compiled = torch.compile(model, backend="eager")
    with pytest.raises((AxattnError, RuntimeError), match="the document ids"):
        compiled(batch.ids, attention_mask=document_ids(batch, 2), position_ids=where)
    agreed = {"attention_mask": document_ids(batch, 2), "position_ids": batch.positions, "use_cache": False}
    assert torch.allclose(
        compiled(batch.ids, **agreed).logits[0], alone(build("llama", num_hidden_layers=1), batch), atol=1e-4
    )


def test_generate_counts_positions_from_a_mask_and_is_refused_with_document_ids_in_it() -> None:
    model, ids = axattn.apply(build("llama"), "auto"), tokens(1, 8)
    with pytest.raises(InvalidInputError, match="the document ids"):
        model.generate(ids, attention_mask=torch.full_like(ids, 2), max_new_tokens=1)


@torch.no_grad()
def test_a_prompt_before_documents_with_ids_in_the_mask_is_refused() -> None:
    """It would be the first document's alone."""
    import peft

    config = peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3)
    model = peft.get_peft_model(axattn.apply(build("llama"), "auto"), config)
    batch = packed((4, 6))
    with pytest.raises(UnsupportedAttentionError, match="turned them into rows of 13"):
        model(batch.ids, attention_mask=document_ids(batch))
    model(batch.ids, attention_mask=torch.ones_like(batch.ids))


# ---- seq_idx, Transformers' own document ids -------------------------------------------------------------------------


def indexed(batch: Batch) -> torch.Tensor:
    """int32 ``[B, S]`` from 0, as ``DataCollatorWithFlattening(return_seq_idx=True)`` gives it."""
    return (document_ids(batch) - 1).int()


@pytest.mark.parametrize("name", ["auto", "varlen"])
@pytest.mark.parametrize("family", ["llama", "bamba"])
@torch.no_grad()
def test_documents_known_by_their_index_alone_equal_those_alone(family: str, name: str) -> None:
    """Transformers passes it to kernels of layers with a state, and its attention does not read it."""
    batch = packed((7, 11, 3), (5, 16))
    model, expected = axattn.apply(made(family), name), alone(made(family), batch)
    for given in ({}, {"attention_mask": torch.ones_like(batch.ids)}, {"position_ids": batch.positions}):
        found = cut(batch, model(batch.ids, seq_idx=indexed(batch), use_cache=False, **given).logits)
        assert torch.allclose(found, expected, atol=1e-4)
    padding = packed((7, 11), pad=3)
    index = torch.tensor([[0] * 7 + [1] * 14], dtype=torch.int32)
    found = cut(padding, model(padding.ids, seq_idx=index, attention_mask=padding.mask, use_cache=False).logits)
    assert torch.allclose(found, alone(made(family), padding), atol=1e-4)


@torch.no_grad()
def test_an_index_in_a_compiled_graph() -> None:
    torch._dynamo.reset()
    model, batch = build("llama"), packed((7, 11, 3))
    expected = alone(model, batch)
    run = torch.compile(axattn.apply(model, "auto"), backend="eager", fullgraph=True)
    assert torch.allclose(run(batch.ids, seq_idx=indexed(batch), use_cache=False).logits[0], expected, atol=1e-4)
    whole = run(batch.ids, seq_idx=torch.zeros_like(indexed(batch)), use_cache=False).logits
    assert torch.allclose(whole, build("llama")(batch.ids).logits, atol=1e-4)


@pytest.mark.parametrize("name", ["sdpa", "eager"])
@torch.no_grad()
def test_names_that_read_positions_alone_refuse_another_index(name: str) -> None:
    model, batch = axattn.apply(build("llama"), name), packed((7, 11, 3))
    given = {"seq_idx": indexed(batch), "use_cache": False}
    found = model(batch.ids, position_ids=batch.positions, **given).logits[0]
    assert torch.allclose(found, alone(build("llama"), batch), atol=1e-4)
    for where in ({}, {"position_ids": torch.arange(21)[None]}):
        with pytest.raises(UnsupportedAttentionError, match=r"none were given|seq_idx describe different documents"):
            model(batch.ids, **where, **given)


@pytest.mark.parametrize("index", [torch.zeros(1, 9, dtype=torch.int32), torch.zeros(1, 10), "0"])
def test_an_index_that_can_not_be_read_is_refused(index: Any) -> None:
    model = axattn.apply(build("llama"), "auto")
    with pytest.raises(InvalidInputError, match="1 rows of 10 tokens"):
        model(tokens(1, 10), seq_idx=index)
