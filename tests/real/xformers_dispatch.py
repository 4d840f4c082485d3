"""xformers' own dispatch, asked for every call that axattn's record serves: ``python -m tests.real.xformers_dispatch``.

Nothing is computed: the adapter packs tensors without data, the library sees them on a GPU that is not here. A
process of its own, because the library looks for its operators when it is imported.
"""

from __future__ import annotations

import argparse
import functools
import itertools
import sys
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from axattn import backends
from axattn.backends.call import AttentionCall
from axattn.machine.presets import machine
from axattn.masks.varlen_layout import Layout, Span
from axattn.spec.capability import Need, missing
from tests.real.needs import CHUNK, served

_NO_DATA = FakeTensorMode()
MACHINES = ("sm75", "sm80", "sm86", "sm89", "sm90", "sm100", "sm120")
LENGTH, CACHED, SCALE = 128, 40, 0.125


def pretend_cuda() -> None:
    """Have torch and xformers believe in a GPU, before xformers is imported."""
    assert "xformers" not in sys.modules
    torch.version.cuda = "12.8"
    torch.backends.cuda.is_flash_attention_available = lambda: True
    from xformers.ops.fmha import attn_bias, common

    common._built_with_cuda = True
    attn_bias._to_device_tensor = lambda seq, dtype, device: on_gpu(torch.empty(len(seq), dtype=dtype))


def on_gpu(x: torch.Tensor) -> torch.Tensor:
    """A tensor on a GPU of the shape, strides and dtype of `x`, without data and without autograd."""
    return _on_gpu(tuple(x.shape), x.stride(), x.dtype)


@functools.cache
def _on_gpu(shape: tuple[int, ...], strides: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
    with _NO_DATA:
        return torch.empty_strided(shape, strides, dtype=dtype, device="cuda")


def refusals(need: Need, capability: tuple[int, int], layout: Layout) -> list[str]:
    """Why no operator of the library takes a call, forward and, with a gradient, backward."""
    from xformers.ops import fmha

    from axattn.backends import xformers

    found: list[str] = []

    def asked(query: Any, key: Any, value: Any, attn_bias: Any, p: float, scale: float) -> torch.Tensor:
        q, k, v = on_gpu(query), on_gpu(key), on_gpu(value)
        inputs = fmha.Inputs(query=q, key=k, value=v, attn_bias=attn_bias, p=p, scale=scale)
        inputs.validate_inputs()
        try:
            forward = fmha._dispatch_fw(inputs, need.gradient or need.sinks)
            if need.sinks and not forward.VARLEN_LSE_PACKED:
                found.append(f"{forward.NAME} returns a logsumexp that is not packed")
            if need.gradient and need.dropout:  # the random numbers are the forward's: its own backward runs, unasked
                backward = sys.modules[forward.__module__].BwOp
                found.extend(f"{backward.NAME}: {reason}" for reason in backward.not_supported_reasons(inputs))
            elif need.gradient:
                fmha._dispatch_bw(inputs, varlen_lse_packed=forward.VARLEN_LSE_PACKED)
        except NotImplementedError as error:
            found.append(str(error))
        return query.new_empty(query.shape)

    torch.cuda.get_device_capability = lambda device=None: capability  # type: ignore[assignment]

    def with_logsumexp(*given: Any, attn_bias: Any, scale: float) -> tuple[torch.Tensor, torch.Tensor]:
        out = asked(*given, attn_bias, 0.0, scale)
        return out, out.new_empty(1, out.shape[2], out.shape[1], dtype=torch.float32)

    functions = {
        "memory_efficient_attention": staticmethod(asked),
        "memory_efficient_attention_forward_requires_grad": staticmethod(with_logsumexp),
    }
    xformers._library = lambda: type("Library", (), functions)
    xformers.layout_of = lambda call: layout  # type: ignore[attr-defined,assignment]
    call = _call(need, layout)
    out = xformers.xformers(call)
    assert out.shape == (layout.rows, layout.q_length, need.heads, call.value.shape[-1])
    return found


def _call(need: Need, layout: Layout) -> AttentionCall:
    assert need.head_dim is not None
    value_dim = need.value_dim or need.head_dim

    def tensor(heads: int | None, length: int, size: int) -> torch.Tensor:
        shape = (layout.rows, heads or 1, length, size)
        dtype = getattr(torch, need.dtype or "float32")
        return torch.empty(shape, dtype=dtype, device="meta", requires_grad=need.gradient)

    query = tensor(need.heads, layout.q_length, need.head_dim)
    key = tensor(need.kv_heads, layout.kv_length, need.head_dim)
    value = tensor(need.kv_heads, layout.kv_length, value_dim)
    sinks = torch.empty(need.heads or 1, device="meta") if need.sinks else None
    options = {"softcap": None, "sinks": sinks, "bias": None, "extras": {}}
    return AttentionCall(
        torch.nn.Identity(), query, key, value, None, need.causal, need.window, SCALE, need.dropout, **options
    )


def layouts(need: Need) -> Iterator[Layout]:
    """One document, and padded rows; of a query that follows cached keys, and of chunks."""
    cached = CACHED if need.cross_lengths else 0
    for rows, padding in ((1, 0), (2, 20)):
        spans = []
        for row in range(rows):
            start = padding if row else 0
            step = CHUNK if need.chunk and not cached else LENGTH
            spans += [
                Span(row, row + 1, max(a, start), a + step, max(a, start), a + step + cached)
                for a in range(0, LENGTH, step)
            ]
        yield Layout(tuple(spans), need.causal, need.window, rows, LENGTH, LENGTH + cached)


def main() -> int:
    """Print every refusal of what the record serves; the number of those is the exit status."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--thin", type=int, help="see tests.real.needs.served; the whole grid by default")
    parser.add_argument("--machines", nargs="*", default=MACHINES)
    given = parser.parse_args()
    pretend_cuda()
    asked = wrong = 0
    for name in given.machines:
        capability = machine(name).architecture
        record = backends.get("xformers").called_capability_on(machine(name))
        assert capability is not None
        for need in served("xformers", name, given.thin):
            if need.window is not None and not need.causal and need.cross_lengths:
                continue  # no layout: such a call asks for a dense mask
            again = replace(need, deterministic=True)
            for one in (need, again) if need.gradient and not missing(again, record) else (need,):
                asked += 1
                torch.use_deterministic_algorithms(one.deterministic)
                found = list(itertools.chain(*(refusals(one, capability, layout) for layout in layouts(one))))
                if found:
                    wrong += 1
                    print(f"{name}: {one}\n{found[0]}")
    print(f"{asked} calls that the record serves, {wrong} of them refused by the library", flush=True)
    return min(wrong, 100)


if __name__ == "__main__":
    sys.exit(main())
