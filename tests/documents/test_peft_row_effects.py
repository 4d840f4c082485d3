"""What PEFT does to tokens by row, after its inputs."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import peft
import pytest
import torch

import axattn
from axattn.documents.peft_row_effects import reasons_by_document, reasons_by_row
from axattn.errors import InvalidInputError, UnsupportedAttentionError
from tests.models import build, positions, tokens

INVOCATION = [7, 8]
LORA: dict[str, Any] = {"r": 4, "target_modules": ["q_proj", "k_proj", "v_proj"], "init_lora_weights": False}


def activated() -> Any:
    """A LLaMA with activated LoRA (arXiv:2504.12397): its adapter works from the invocation on."""
    torch.manual_seed(3)
    config = peft.LoraConfig(task_type="CAUSAL_LM", alora_invocation_tokens=INVOCATION, **LORA)
    return peft.get_peft_model(build("llama"), config).eval()


def invoked(length: int, at: int) -> torch.Tensor:
    ids = tokens(1, length).clamp(min=10)
    ids[0, at : at + 2] = torch.tensor(INVOCATION)
    return ids


class ReasonsByRow:
    """What is found to be done by row while a model runs."""

    def __init__(self, model: Any) -> None:
        self.reasons: list[str] = []
        self.stay: list[str] = []
        model.get_base_model().model.register_forward_pre_hook(self._note)

    def _note(self, module: Any, args: Any) -> None:
        self.reasons = [reason.text for reason in reasons_by_row(module)]
        self.stay = [reason.text for reason in reasons_by_row(module, rows_stay=True)]


@torch.no_grad()
@pytest.mark.parametrize("name", ["auto", "eager", "sdpa"])
def test_activated_lora_takes_no_packed_rows(name: str) -> None:
    """It looks for the last invocation in a row, and the first document would run without the adapter."""
    model = axattn.apply(activated(), name)
    first, second = invoked(9, 3), invoked(7, 2)
    row, where = torch.cat([first, second], 1), positions((9, 7))
    for ids in (first, second):
        assert torch.allclose(model(input_ids=ids).logits, activated()(input_ids=ids).logits, atol=1e-5)
    plain = model(input_ids=row.clamp(min=10), position_ids=where, use_cache=False)  # nobody invokes it
    expected = model(input_ids=first.clamp(min=10)).logits
    assert name != "auto" or torch.allclose(plain.logits[:, :9], expected, atol=1e-4)
    with model.disable_adapter():
        assert model(input_ids=row.clamp(min=10), position_ids=where, use_cache=False).logits.isfinite().all()
    with pytest.raises(UnsupportedAttentionError, match="aLoRA adapts the tokens after the last invocation"):
        model(input_ids=row, position_ids=where, use_cache=False)  # after an error PEFT leaves its hooks (0.21)


@torch.no_grad()
def test_activated_lora_runs_in_padded_rows_but_not_unpadded() -> None:
    """Counted from the end of a padded row, the adapter would work on other tokens of the flat one."""
    ids = invoked(10, 3)
    mask = torch.ones_like(ids)
    mask[:, 8:] = 0
    expected = activated()(input_ids=ids, attention_mask=mask, use_cache=False).logits[:, :8]
    for unpad in (False, True):
        model = axattn.apply(activated(), "varlen", unpad=unpad)
        if unpad:
            with pytest.raises(InvalidInputError, match="can't run this batch unpadded: aLoRA"):
                model(input_ids=ids, attention_mask=mask, use_cache=False)
        else:
            found = model(input_ids=ids, attention_mask=mask, use_cache=False).logits[:, :8]
            assert torch.allclose(found, expected, atol=1e-5)


@torch.no_grad()
def test_adapters_chosen_by_row_are_refused_unpadded() -> None:
    model = peft.get_peft_model(build("llama"), peft.LoraConfig(task_type="CAUSAL_LM", **LORA)).eval()
    reference = copy.deepcopy(model)
    axattn.apply(model, "varlen", unpad=True)
    found = ReasonsByRow(model)
    ids, mask = tokens(2, 10), torch.ones(2, 10, dtype=torch.long)
    given: dict[str, Any] = {"input_ids": ids, "adapter_names": ["default", "__base__"], "use_cache": False}
    assert torch.allclose(model(**given).logits, reference(**given).logits, atol=1e-5)
    assert found.reasons == ["adapter_names chooses an adapter for each row"]
    assert found.stay == []
    mask[0, 6:] = 0
    one = {"input_ids": ids, "attention_mask": mask, "use_cache": False}
    assert torch.allclose(model(**one).logits[mask.bool()], reference(**one).logits[mask.bool()], atol=1e-5)
    assert found.reasons == []
    with pytest.raises(InvalidInputError, match="adapter_names chooses an adapter for each row"):
        model(**given, attention_mask=mask)


@torch.no_grad()
def test_scalings_and_tasks_by_row_are_refused_unpadded(tmp_path: Path) -> None:
    poly = peft.PolyConfig(task_type="CAUSAL_LM", r=4, n_tasks=2, n_skills=2, target_modules=["q_proj"])
    torch.manual_seed(0)
    peft.get_peft_model(build("llama"), peft.LoraConfig(task_type="CAUSAL_LM", **LORA)).save_pretrained(tmp_path)
    base = build("llama")
    base.config.use_cache = False
    experts = {"0": str(tmp_path), "1": str(tmp_path)}
    mixed = peft.XLoraConfig(task_type="CAUSAL_LM", hidden_size=base.config.hidden_size, adapters=experts)
    ids, mask = tokens(2, 10), torch.ones(2, 10, dtype=torch.long)
    mask[0, 6:] = 0
    for model, more, text in (
        (
            peft.get_peft_model(build("llama"), poly),
            {"task_ids": torch.tensor([0, 1])},
            "Poly mixes its adapters by row",
        ),
        (peft.get_peft_model(base, mixed), {}, "X-LoRA has a scaling for each token"),
    ):
        axattn.apply(model.eval(), "varlen", unpad=True)
        with pytest.raises(InvalidInputError, match=text):
            model(input_ids=ids, attention_mask=mask, use_cache=False, **more)
        assert model(input_ids=ids, use_cache=False, **more).logits.isfinite().all()
    found = model(input_ids=ids[:1], position_ids=positions((4, 6)), use_cache=False).logits
    apart = [model(input_ids=part, use_cache=False).logits for part in ids[:1].split((4, 6), 1)]
    assert torch.allclose(found, torch.cat(apart, 1), atol=1e-4)


@torch.no_grad()
def test_rows_that_are_cut_keep_their_adapters_but_not_those_of_their_tokens() -> None:
    model = activated()
    found = ReasonsByRow(model)
    model(input_ids=invoked(9, 3))
    assert found.reasons == found.stay == ["aLoRA adapts the tokens after the last invocation in each row"]
    assert not reasons_by_row(model)
    assert not reasons_by_document(model)
