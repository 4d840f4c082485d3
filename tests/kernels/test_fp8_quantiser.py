"""axattn's fp8 quantiser in Triton's interpreter, bit for bit against plain torch; its launches; its compiled form."""

from __future__ import annotations

import subprocess
import sys
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import axattn
from axattn.kernels.document_statistics import Documents
from tests.fakes import fp8_quantiser as oracle
from tests.fakes.machine import hopper
from tests.interpreter import INTERPRETED
from tests.models import build, positions, tokens

pytestmark = pytest.mark.skipif(
    not INTERPRETED, reason="Triton's interpreter is off (no triton from 3.7 on, or a GPU is there)"
)
CPU = torch.device("cpu")
E4M3 = torch.float8_e4m3fn


@pytest.fixture
def quantiser() -> Any:
    from axattn.kernels import fp8_quantiser

    return fp8_quantiser


def made(lengths: tuple[int, ...], heads: int, dim: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    """Numbers far from zero, of another size in each document and head."""
    generator = torch.Generator().manual_seed(heads)
    x = torch.randn(sum(lengths), heads, dim, generator=generator) + 8 * torch.randn(heads, dim, generator=generator)
    sizes = torch.rand(len(lengths), heads, 1, generator=generator).mul(9).exp()
    return (x * Documents(lengths, CPU).spread(sizes) / 100).to(dtype)


def require_same(found: Any, wanted: Any) -> None:
    for a, b in zip(found, wanted, strict=True):
        assert a.dtype == b.dtype
        assert a.shape == b.shape
        assert torch.equal(a.view(torch.uint8), b.view(torch.uint8))


# ---- numbers --------------------------------------------------------------------------------------------


def every_kind() -> dict[str, torch.Tensor]:
    """Numbers whose largest is 448, so that their scale is 1."""
    bits = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16)
    exact = torch.arange(127, dtype=torch.uint8).view(E4M3).float()
    ties = (exact[1:] + exact[:-1]) / 2
    near = torch.cat([exact, ties, *(torch.nextafter(ties, torch.full_like(ties, to)) for to in (0.0, 1e9))])
    random = torch.randint(-(2**31), 2**31, (20_000,), generator=torch.Generator().manual_seed(0)).to(torch.int32)
    halves = torch.randn(20_000, generator=torch.Generator().manual_seed(1)) * 0.01
    kinds = {
        "every bfloat16": bits.view(torch.bfloat16),
        "every float16": bits.view(torch.float16),
        "float32": torch.cat([near, -near, halves, random.view(torch.float32)]),
    }
    return {name: x[(x.abs() <= 448) & x.isfinite()] for name, x in kinds.items()}


@pytest.mark.parametrize("kind", every_kind())
def test_bits_are_those_of_torchs_own_cast(quantiser: Any, kind: str) -> None:
    x = torch.nn.functional.pad(every_kind()[kind], (0, 1), value=448.0)
    x = torch.nn.functional.pad(x, (0, -len(x) % 256)).view(-1, 1, 256)
    found = quantiser.quantise(x, Documents((len(x),), CPU), 1)
    assert found.undo.item() == 1
    assert torch.equal(found.values.view(torch.uint8), x.float().to(E4M3).view(torch.uint8))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize(("lengths", "heads", "kv_heads", "dim"), [((3, 130, 1), 6, 2, 24), ((9,), 4, 1, 80)])
def test_queries_are_scaled_per_document_and_group_of_heads(
    quantiser: Any, lengths: tuple[int, ...], heads: int, kv_heads: int, dim: int, dtype: torch.dtype
) -> None:
    x, documents = made(lengths, heads, dim, dtype), Documents(lengths, CPU)
    require_same(quantiser.quantise(x, documents, kv_heads), oracle.quantise(x, documents, kv_heads))


# the interpreter truncates where float32 becomes bfloat16, a chip rounds
@pytest.mark.parametrize(("dtype", "off"), [(torch.float32, 1e-6), (torch.float16, 2**-10), (torch.bfloat16, 2**-7)])
@pytest.mark.parametrize(("lengths", "heads", "dim"), [((3, 130, 1), 2, 24), ((9,), 1, 256)])
def test_keys_are_scaled_after_their_mean_is_gone(
    quantiser: Any, lengths: tuple[int, ...], heads: int, dim: int, dtype: torch.dtype, off: float
) -> None:
    x, documents = made(lengths, heads, dim, dtype), Documents(lengths, CPU)
    found, smooth = quantiser.quantise_smoothed(x, documents)
    wanted = oracle.smoothed(x, documents)
    assert smooth.dtype == dtype
    for a, b, part in zip(smooth.split(lengths), wanted.split(lengths), x.split(lengths), strict=True):
        assert torch.allclose(a.float(), b.float(), rtol=off, atol=1e-6 * part.abs().max().item())
    require_same(found, oracle.quantise(smooth, documents, heads))  # so the peak was known before the numbers were
    assert torch.equal(quantiser.smoothed(x, documents), smooth)


def test_a_long_document_is_many_chunks(quantiser: Any) -> None:
    lengths = (2, 8200, 3)
    x, documents = made(lengths, 1, 8), Documents(lengths, CPU)
    assert len(documents.chunks) == 35
    found, smooth = quantiser.quantise_smoothed(x, documents)
    assert torch.allclose(smooth, oracle.smoothed(x, documents), atol=1e-5 * x.abs().max().item())
    require_same(found, oracle.quantise(smooth, documents, 1))
    x, documents = x[2:2102], Documents((2100,), CPU)  # 17 chunks: one more than are read at a time
    x[700] *= 9  # the largest is in none of those that a step begins with
    require_same(quantiser.quantise(x, documents, 1), oracle.quantise(x, documents, 1))


def test_documents_do_not_see_each_other_bit_for_bit(quantiser: Any) -> None:
    lengths = (30, 140, 20)
    x, documents = made(lengths, 2, 16), Documents(lengths, CPU)
    other = x.clone()
    other[40:60] = 1e4
    other[50] = float("nan")
    other[51] = float("inf")
    for run in (lambda x: quantiser.quantise(x, documents, 1), lambda x: quantiser.quantise_smoothed(x, documents)[0]):
        before, after = run(x), run(other)
        for part in (slice(0, 30), slice(170, 190)):
            require_same([before.values[part]], [after.values[part]])
        assert torch.equal(before.undo[[0, 2]], after.undo[[0, 2]])


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_nan_and_infinity_are_not_rounded_to_a_finite_value(quantiser: Any, value: float) -> None:
    x, documents = made((20,), 2, 16), Documents((20,), CPU)
    x[7, 1, 5] = value
    keys, smooth = quantiser.quantise_smoothed(x, documents)
    for found in (quantiser.quantise(x, documents, 2), keys):
        assert not (found.values.float()[7, 1, 5] * found.undo[0, 1]).isfinite()
        assert (found.values.float()[:, 0] * found.undo[0, 0]).isfinite().all()
    assert not smooth[:, 1, 5].isfinite().any()


@pytest.mark.parametrize("value", [0.0, 1e-38, 1e-42])
def test_tiny_values_become_zero(quantiser: Any, value: float) -> None:
    x, documents = torch.zeros(8, 2, 16), Documents((3, 5), CPU)
    x[1] = value
    for found in (quantiser.quantise(x, documents, 1), quantiser.quantise_smoothed(x, documents)[0]):
        assert (found.values.float() == 0).all()
        assert (found.undo == 1).all()


# ---- views ----------------------------------------------------------------------------------------------


def views() -> dict[str, torch.Tensor]:
    """``[9, 2, 16]``, none of them contiguous."""
    return {
        "heads first": made((2, 9), 9, 16)[:2].transpose(0, 1),
        "inside of more tokens and heads": made((30,), 5, 16)[4:22:2, 1:3],
        "channels not beside each other": made((9,), 2, 32)[..., ::2],
        "channels first": made((16,), 9, 2).permute(1, 2, 0),
        "one row for all": made((1,), 2, 16).expand(9, 2, 16),
    }


@pytest.mark.parametrize("kind", views())
def test_a_view_is_quantised_as_its_copy_is(quantiser: Any, kind: str) -> None:
    x, documents = views()[kind], Documents((4, 5), CPU)
    assert not x.is_contiguous()
    require_same(quantiser.quantise(x, documents, 1), quantiser.quantise(x.contiguous(), documents, 1))
    require_same(
        quantiser.quantise_smoothed(x, documents)[0], quantiser.quantise_smoothed(x.contiguous(), documents)[0]
    )
    assert quantiser.quantise(x, documents, 1).values.is_contiguous()  # as FlashAttention 3 wants its last dimension


# ---- launches -------------------------------------------------------------------------------------------


class Launches:
    """Stands in for a kernel: notes its launches."""

    def __init__(self, name: str, seen: list[str]) -> None:
        self.name, self.seen = name, seen

    def __getitem__(self, grid: Any) -> Any:
        return lambda *_, **__: self.seen.append(self.name)


class Passes(TorchDispatchMode):
    """Operators of torch that read or write this many elements or more."""

    def __init__(self, elements: int) -> None:
        super().__init__()
        self.elements, self.seen = elements, []  # type: ignore[var-annotated]

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        moved = [x.numel() for x in tree_leaves((args, kwargs, out)) if isinstance(x, torch.Tensor)]
        if max(moved, default=0) >= self.elements and not func.is_view and "empty" not in str(func):
            self.seen.append(str(func))
        return out


def test_each_tensor_is_two_launches_and_no_pass_of_torch(quantiser: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[str] = []
    for name in ("_statistics_kernel", "_round_kernel"):
        monkeypatch.setattr(quantiser, name, Launches(name, seen))
    documents, x = Documents((600, 400), CPU), made((1000,), 4, 16).to(torch.bfloat16)
    _ = documents.chunks
    with Passes(x.shape[0]) as passes:
        for run in (lambda: quantiser.quantise(x, documents, 2), lambda: quantiser.quantise_smoothed(x, documents)):
            seen.clear()
            run()
            assert seen == ["_statistics_kernel", "_round_kernel"]
    assert passes.seen == []
    with Passes(x.shape[0]) as passes:
        oracle.quantise(x, documents, 2)
    assert len(passes.seen) >= 5  # it does see them


# ---- in a model -----------------------------------------------------------------------------------------


def test_a_packed_step_of_a_model_runs_through_the_kernels(quantiser: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    found = []
    for kernels in (oracle, quantiser):
        with hopper("fp8"):
            monkeypatch.setattr("tests.fakes.torchao.STORAGE", E4M3)
            monkeypatch.setattr(axattn.kernels, "fp8_quantiser", kernels)
            model = axattn.apply(build("llama", head_dim=16, num_hidden_layers=1).train(), "fp8")
            embeds = model.get_input_embeddings()(tokens(1, 18)).detach().requires_grad_()
            out = model(inputs_embeds=embeds, position_ids=positions((5, 13)), use_cache=False).logits
            (grad,) = torch.autograd.grad(out.square().sum(), embeds)
            found.append((out.detach(), grad))
            monkeypatch.undo()
    for a, b in zip(*found, strict=True):
        assert (a - b).norm() < 1e-3 * b.norm()


# ---- compiled -------------------------------------------------------------------------------------------


@pytest.mark.nightly
def test_compiled_for_hopper_it_fits_and_spills_nothing() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "tests.real.fp8_kernels"],
        capture_output=True,
        text=True,
        timeout=240,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    lines = done.stdout.splitlines()
    assert len(lines) == 5, lines
    for line in lines:
        assert "spills 0" in line, line
