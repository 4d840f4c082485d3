"""What a layer more costs beside its attention: no read of values on the host, no metadata made anew, no planning."""

from __future__ import annotations

from collections import Counter
from typing import Any

import pytest
import torch
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

import axattn
from axattn.attention import interface
from axattn.planning.routes import Route
from tests.models import build, positions, tokens

READS = {
    torch.Tensor.item,
    torch.Tensor.tolist,
    torch.Tensor.nonzero,
    torch.Tensor.__bool__,
    torch.Tensor.__int__,
    torch.Tensor.__float__,
    torch.Tensor.__index__,
    torch.Tensor.cpu,
    torch.Tensor.numpy,
    torch.nonzero,
    torch.equal,
    torch.unique,
}


class Reads(TorchFunctionMode):
    """Counts what waits for a device when tensors live there."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: Counter[str] = Counter()

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in READS:
            self.seen[func.__name__] += 1
        return func(*args, **(kwargs or {}))


class Metadata(TorchDispatchMode):
    """Counts tensors of whole numbers or bools that come into being: lengths, indices, masks."""

    def __init__(self) -> None:
        super().__init__()
        self.made: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        if isinstance(out, torch.Tensor) and not out.is_floating_point():
            self.made[str(func)] += 1
        return out


def batches() -> dict[str, dict[str, Any]]:
    mask = torch.ones(2, 12, dtype=torch.long)
    mask[0, :5] = 0
    right = mask.flip(1)
    lengths = torch.tensor([0, 5, 9, 12, 24], dtype=torch.int32)
    return {
        "dense": {"input_ids": tokens(2, 12)},
        "packed": {"input_ids": tokens(1, 12), "position_ids": positions((5, 4, 3))},
        "packed rows": {"input_ids": tokens(2, 12), "position_ids": positions((5, 4, 3), (12,))},
        "lengths": {"input_ids": tokens(2, 12), "cu_seq_lens_q": lengths, "cu_seq_lens_k": lengths},
        "padded left": {"input_ids": tokens(2, 12), "attention_mask": mask},
        "padded right": {"input_ids": tokens(2, 12), "attention_mask": right},
    }


def count(name: str, family: str, layers: int, batch: dict[str, Any], unpad: bool) -> tuple[Any, Any]:
    kinds = {"layer_types": ["sliding_attention", "full_attention"] * (layers // 2)} if family == "gemma3" else {}
    model = axattn.apply(build(family, num_hidden_layers=layers, **kinds), name, unpad=unpad)
    with torch.no_grad():
        model(**batch, use_cache=False)  # the first call decides
        with Reads() as reads:
            model(**batch, use_cache=False)
        with Metadata() as metadata:
            model(**batch, use_cache=False)
    return reads.seen, metadata.made


@pytest.mark.parametrize("unpad", [False, True], ids=["", "unpad"])
@pytest.mark.parametrize("family", ["llama", "gemma3"])
@pytest.mark.parametrize("kind", batches())
def test_one_more_layer_reads_nothing_on_the_host_and_makes_no_metadata(kind: str, family: str, unpad: bool) -> None:
    few, many = (count("varlen", family, layers, batches()[kind], unpad) for layers in (2, 8))
    assert few[0] == many[0]
    assert few[1] == many[1]
    assert sum(few[0].values()) <= 12  # in a whole forward, the input hook's checks included


def test_dense_batches_read_no_more_than_transformers_itself() -> None:
    reads, _ = count("auto", "llama", 4, batches()["dense"], False)
    model = build("llama", num_hidden_layers=4)
    with torch.no_grad(), Reads() as theirs:
        model(**batches()["dense"], use_cache=False)
    assert reads == theirs.seen  # create_causal_mask looks for documents in the positions


@pytest.mark.parametrize("kind", ["dense", "packed", "padded left"])
def test_a_call_like_an_earlier_one_is_not_planned_again(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model = axattn.apply(build("llama"), "auto")
    with torch.no_grad():
        model(**batches()[kind], use_cache=False)
        chosen: list[Any] = []
        real = Route.choose
        monkeypatch.setattr(Route, "choose", lambda self, need: chosen.append(need) or real(self, need))
        for _ in range(3):
            model(**batches()[kind], use_cache=False)
    assert not chosen


@pytest.mark.parametrize("gradients", [False, True])
def test_each_model_of_a_process_takes_the_short_path(gradients: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Masks of whole rows are shared: a policy beside its reference, on any names, whatever ran before."""
    models = [axattn.apply(build("llama"), name) for name in ("auto", "varlen", "auto")]
    models.append(axattn.apply(build("llama", num_attention_heads=2, num_key_value_heads=1), "auto"))  # a smaller one
    with torch.set_grad_enabled(gradients):
        for model in models:
            model(**batches()["dense"], use_cache=False)
        calls: list[Any] = []
        real = interface.AttentionCall
        monkeypatch.setattr(interface, "AttentionCall", lambda **given: calls.append(given) or real(**given))
        for model in models * 2:
            model(**batches()["dense"], use_cache=False)
    assert not calls
