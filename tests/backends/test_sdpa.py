"""What ``F.scaled_dot_product_attention`` is asked for on a CPU and in a graph; on GPUs: tests/pretend/test_sdpa.py."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F

import axattn
from axattn.backends import sdpa
from tests.models import build, tokens

Call = tuple[int, int, bool]
attention: Any = sdpa.attention
switches: Any = torch.backends.cuda  # no types


def tensors(S: int, T: int = 6) -> list[torch.Tensor]:
    torch.manual_seed(0)
    return [torch.randn(2, heads, n, 8, requires_grad=True) for heads, n in ((4, S), (2, T), (2, T))]


def mask(S: int, T: int = 6) -> torch.Tensor:
    return torch.ones(1, 1, S, T, dtype=torch.bool).tril(T - S)


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize(("S", "wanted"), [(6, (4, 2, True)), (1, (2, 2, False))])
def test_a_cpu_keeps_fewer_kv_heads(S: int, wanted: Call, masked: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its flash kernel takes them, masked too; a single query's heads become its rows, which is faster still."""
    found: list[Call] = []
    real: Any = F.scaled_dot_product_attention

    def spy(query: torch.Tensor, key: torch.Tensor, *rest: Any, **options: Any) -> Any:
        found.append((query.shape[1], key.shape[1], options["enable_gqa"]))
        return real(query, key, *rest, **options)

    monkeypatch.setattr(F, "scaled_dot_product_attention", spy)
    given = tensors(S)
    causal = not masked and S > 1
    out = attention(*given, mask(S) if masked else None, 0.0, causal, None)
    assert found == [wanted]
    expected = real(*given, mask(S) if masked else None, is_causal=causal, enable_gqa=True)
    assert torch.allclose(out, expected, atol=1e-6)


@pytest.mark.parametrize("S", [1, 6])
def test_a_graph_is_recorded_without_cudnn_and_leaves_it_on(S: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """A graph's kernels are chosen while it is recorded, so the switch has to be in it, before the call and after."""
    code: list[str] = []

    def backend(graph: torch.fx.GraphModule, inputs: Any) -> Any:
        code.append(graph.code)
        return graph

    monkeypatch.setattr(sdpa, "avoids_cudnn", lambda *given, **named: True)
    given = tensors(S)

    def run(*given: torch.Tensor) -> Any:
        return attention(*given, 0.0, False, None)

    found = torch.compile(run, backend=backend, fullgraph=True)(*given, mask(S))
    assert torch.allclose(found, run(*given, mask(S)), atol=1e-6)
    before, after = code[0].split("scaled_dot_product_attention")
    assert "EFFICIENT_ATTENTION" in before
    assert "CUDNN_ATTENTION" not in before
    assert "CUDNN_ATTENTION" in after
    assert switches.cudnn_sdp_enabled()


@torch.no_grad()
def test_a_padded_step_of_decoding_is_one_call(monkeypatch: pytest.MonkeyPatch) -> None:
    """Rows that see other keys: no gather, no call a row; the result is that of each row alone."""
    model = axattn.apply(build("llama"), "varlen")
    ids, real = tokens(2, 9), torch.ones(2, 9, dtype=torch.long)
    real[0, :3] = 0
    cache = model(input_ids=ids[:, :8], attention_mask=real[:, :8], use_cache=True).past_key_values
    calls = []
    monkeypatch.setattr(sdpa, "attention", lambda *a: calls.append(a[0].shape) or attention(*a))
    found = model(input_ids=ids[:, 8:], attention_mask=real, past_key_values=cache).logits[:, -1]
    assert len(calls) == model.config.num_hidden_layers
    axattn.restore(model)
    alone = torch.cat([model(input_ids=ids[:1, 3:]).logits[:, -1], model(input_ids=ids[1:]).logits[:, -1]])
    assert torch.allclose(found, alone, atol=1e-5)
