"""Rows that are padding throughout, where rows are packed: zeros, gradients too, and no kernel over no sequence."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch

from axattn import backends
from axattn.backends import sage
from axattn.backends.call import AttentionCall
from axattn.masks.lazy_mask import LazyMask
from axattn.masks.mask_interface import lazy_mask
from tests.fakes import sageattention
from tests.fakes.machine import hopper
from tests.pretend import matrix
from tests.pretend.machine import two_gpus
from tests.pretend.tensors import kernel

NAMES = ("varlen", "flash_attention_2", "flash_attention_3", "flash_attention_4", "xformers", "fp8", "sage")
MASKS = {
    "every row": ([[0] * 6, [0] * 6], 6, True),
    "the first row": ([[0] * 6, [0, 0, 1, 1, 1, 1]], 6, True),
    "the last row": ([[1, 1, 1, 1, 0, 0], [0] * 6], 6, True),
    "every row, bidirectional": ([[0] * 6, [0] * 6], 6, False),
    "a row of decoding": ([[0] * 6, [0, 0, 1, 1, 1, 1]], 1, True),
    "every row of decoding": ([[0] * 6, [0] * 6], 1, True),
}


@pytest.fixture(autouse=True)
def gpus() -> Iterator[None]:
    with two_gpus(), matrix.kernels():
        yield


def inputs(queries: int, dim: int) -> list[torch.Tensor]:
    torch.manual_seed(0)
    shapes = ((2, 4, queries, dim), (2, 2, 6, dim), (2, 2, 6, dim))
    return [torch.randn(shape).to("cuda").requires_grad_() for shape in shapes]


def call_of(here: list[torch.Tensor], mask: LazyMask, causal: bool) -> AttentionCall:
    given: tuple[Any, ...] = (mask, causal, None, 0.3, 0.0, None, None, None, {})
    return AttentionCall(torch.nn.Identity(), *here, *given)


def mask_of(real: torch.Tensor, queries: int, causal: bool) -> LazyMask:
    from transformers import masking_utils as mu

    rule = mu.causal_mask_function if causal else mu.bidirectional_mask_function
    mask = lazy_mask(2, queries, 6, 6 - queries, 0, rule, real.to("cuda"), device="cuda")
    mask.crosses = False
    return mask


def expected_of(here: list[torch.Tensor], real: torch.Tensor, causal: bool, target: torch.Tensor) -> Any:
    """Output and gradients by plain attention, zero at queries of padding."""
    q, k, v = (x.detach().cpu().requires_grad_() for x in here)
    queries, index = q.shape[2], torch.arange(6)
    far = index[-queries:, None] - index
    seen = real[:, None, None, :] & ((far >= 0) if causal else torch.ones_like(far, dtype=torch.bool))
    seen = seen & real[:, None, 6 - queries :, None]
    keys, values = (x.repeat_interleave(2, 1) for x in (k, v))
    weights = (q @ keys.transpose(-1, -2) * 0.3).masked_fill(~seen, -1e9).softmax(-1) * seen
    out = (weights @ values).transpose(1, 2)
    return out, torch.autograd.grad((out * target).sum(), (q, k, v))


def require_close(found: Any, wanted: Any, real: torch.Tensor, exact: bool) -> None:
    """Equal, and zero to the bit at padding."""
    for number, (got, right) in enumerate(zip(found, wanted, strict=True)):
        here = got.detach().cpu()
        assert torch.allclose(here, right, atol=1e-5 if exact else 0.05)
        tokens = here if number == 0 else here.transpose(1, 2)  # the output is [B, S, H, D]
        assert not tokens[~real[:, 6 - tokens.shape[1] :]].any()


@pytest.mark.parametrize("which", MASKS)
@pytest.mark.parametrize("name", [*NAMES, "sage:library"])
def test_padding_gives_zeros(name: str, which: str, monkeypatch: pytest.MonkeyPatch) -> None:
    rows, queries, causal = MASKS[which]
    if name == "sage:library" and not causal:
        pytest.skip("causal only")
    real = torch.tensor(rows, dtype=torch.bool)
    here = inputs(queries, 64 if name == "sage:library" else 16)
    target = torch.randn(2, queries, 4, here[0].shape[-1])
    if name == "sage:library":
        fakes = {n: staticmethod(kernel(getattr(sageattention, n))) for n in ("sageattn", "sageattn_varlen")}
        monkeypatch.setattr(sage, "sage_module", lambda source: type("library", (), fakes))
    with hopper(name):
        backend = backends.get(name)
        assert backend.forward is not None
        out = backend.forward(call_of(here, mask_of(real, queries, causal), causal))
        found = out, *torch.autograd.grad((out * target.to("cuda")).sum(), here)
        wanted = expected_of(here, real, causal, target)
        require_close(found, (wanted[0], *wanted[1]), real, exact=name not in ("fp8", "sage:library"))
        if backend.forward_backward is None or queries == 1:
            return
        with torch.no_grad():  # the same inside of a compiled graph's operator
            call = call_of(here, mask_of(real, queries, causal), causal)
            passes = backend.forward_backward(call)
            layout = call.mask.layout() if isinstance(call.mask, LazyMask) else None
            if passes is None or layout is None:
                return
            out, logsumexp = passes.forward(call, layout)
            gradients = passes.backward(target.to("cuda"), call, layout, out, logsumexp)
        require_close((out, *gradients), (wanted[0], *wanted[1]), real, exact=name != "fp8")
