"""axattn's INT8 kernels as Triton compiles them, no GPU needed: ``python -m tests.real.int8_kernels [--all]``.

A line for each: shared memory, registers, bytes spilled. Exits with 1 where one has more shared memory than the chip,
or spills. In a process of its own: the suite's kernels are interpreted. ``--all`` is every chip, head dim and mask,
seconds each; else a few.

What is compiled is what `int8_attention` launches: the launches are taken down, with the arguments specialised as
Triton's launcher would (a pointer or number that 16 divides; 1). Token counts and strides are such that nothing more is
known of them than the kernels are promised.
"""

from __future__ import annotations

import argparse
import itertools
import os
import sys
import tempfile
import time
from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from axattn.kernels import int8_attention
from tests.real.cubins import resources

CHIPS = (80, 86, 89, 90, 100, 120)
HEAD_DIMS = (24, 32, 40, 64, 120, 128, 200, 256)
TYPES = {
    torch.int8: "*i8",
    torch.int32: "*i32",
    torch.float32: "*fp32",
    torch.bfloat16: "*bf16",
    torch.float16: "*fp16",
}


class Case(NamedTuple):
    """One kernel: the forward under a mask, or the quantiser (``mean``: it takes one away)."""

    sm: int
    head_dim: int
    causal: bool = True
    window: bool = False
    softcap: bool = False
    quantiser: bool = False
    mean: bool = False
    dtype: torch.dtype = torch.bfloat16


FEW = (
    Case(86, 256),
    Case(120, 120, causal=False, window=True, mean=True, quantiser=True),
)


def every() -> Iterator[Case]:
    """All of them."""
    for sm, head_dim in itertools.product(CHIPS, HEAD_DIMS):
        for causal, window, softcap in itertools.product((True, False), repeat=3):
            yield Case(sm, head_dim, causal, window, softcap)
        for mean in (False, True):
            yield Case(sm, head_dim, quantiser=True, mean=mean)
        yield Case(sm, head_dim, dtype=torch.float16)


class Launch(NamedTuple):
    """What a kernel is launched with."""

    arguments: tuple[Any, ...]
    options: dict[str, Any]


def launch(case: Case) -> Launch:
    """The launch of `int8_attention` for a case, which runs nothing."""
    taken: list[Launch] = []

    class Taken:
        def __getitem__(self, grid: Any) -> Any:
            return lambda *arguments, **options: taken.append(Launch(arguments, options))

    heads, kv_heads, tokens = 6, 3, 1001
    size = int8_attention.padded_size(case.head_dim)
    cut = int8_attention.tuning(size, case.sm)
    x = torch.empty(tokens, heads, case.head_dim, dtype=case.dtype)
    value = x[:, :kv_heads].contiguous()
    lengths = torch.tensor([0, tokens], dtype=torch.int32)
    name = "_quantise_kernel" if case.quantiser else "_forward_kernel"
    real = getattr(int8_attention, name)
    setattr(int8_attention, name, Taken())
    try:
        if case.quantiser:
            mean = torch.empty(1, heads, case.head_dim) if case.mean else None
            int8_attention.quantise(x, mean, torch.zeros(tokens, dtype=torch.int32) if case.mean else None)
        else:
            q, k = (
                int8_attention.Rounded(torch.empty(tokens, n, size, dtype=torch.int8), torch.empty(n, tokens), x)
                for n in (heads, kv_heads)
            )
            blocks = int8_attention.query_blocks((tokens,), cut.block_m, x.device)
            mask: dict[str, Any] = {"causal": case.causal, "window": 100 if case.window else None}
            softcap = 30.0 if case.softcap else 0.0
            int8_attention.forward(q, k, value, lengths, lengths, blocks, cut=cut, softcap=softcap, scale=0.1, **mask)
    finally:
        setattr(int8_attention, name, real)
    return taken[0]


def compiled(case: Case) -> Any:
    """The kernel, for the case's chip."""
    kernel = int8_attention._quantise_kernel if case.quantiser else int8_attention._forward_kernel
    arguments, options = launch(case)
    signature: dict[str, str] = {}
    constants: dict[str, Any] = {}
    divisible = {}
    for at, (name, given) in enumerate(zip(kernel.arg_names, arguments, strict=False)):
        if isinstance(given, torch.Tensor):
            signature[name] = TYPES[given.dtype]
            divisible[(at,)] = [["tt.divisibility", 16]]
        elif isinstance(given, float):
            signature[name] = "fp32"
        elif given == 1:
            constants[name] = given
        else:
            signature[name] = "i32"
            if given % 16 == 0:
                divisible[(at,)] = [["tt.divisibility", 16]]
    constants |= {name: value for name, value in options.items() if name in kernel.arg_names}
    signature |= dict.fromkeys(constants, "constexpr")
    signature = {name: signature[name] for name in kernel.arg_names}
    source = ASTSource(kernel, signature=signature, constexprs=constants, attrs=divisible)
    rest = {name: value for name, value in options.items() if name not in kernel.arg_names}
    return triton.compile(source, target=GPUTarget("cuda", case.sm, 32), options=rest)


def shown(case: Case) -> str:
    """A case in words."""
    words = [f"sm{case.sm} D{case.head_dim} {str(case.dtype).removeprefix('torch.')}"]
    if case.quantiser:
        return " ".join([*words, "quantiser", f"mean={case.mean}"])
    words += [name for name in ("causal", "window", "softcap") if getattr(case, name)]
    return " ".join([*words, str(tuple(int8_attention.tuning(int8_attention.padded_size(case.head_dim), case.sm)))])


def main(cases: list[Case]) -> int:
    """1 if a kernel does not fit its chip."""
    bad = 0
    for case in cases:
        begun = time.perf_counter()
        found = compiled(case)
        registers, spilled = resources(found)
        limit = int8_attention.shared_memory(case.sm) * 1024
        wrong = "TOO MUCH " * (found.metadata.shared > limit) + "SPILLS " * (spilled > 0)
        bad += bool(wrong)
        print(
            f"{shown(case)}: shared {found.metadata.shared / 1024:.1f} of {limit // 1024} KiB, registers {registers},",
            f"spilled {spilled} {wrong}{time.perf_counter() - begun:.0f} s",
            flush=True,
        )
    return int(bad > 0)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--all", action="store_true")
    parser.add_argument("--sm", type=int, action="append", choices=CHIPS)
    parser.add_argument("--head-dim", type=int, action="append", choices=HEAD_DIMS)
    asked = parser.parse_args()
    chosen = list(every()) if asked.all or asked.sm or asked.head_dim else list(FEW)
    chosen = [c for c in chosen if c.sm in (asked.sm or CHIPS) and c.head_dim in (asked.head_dim or HEAD_DIMS)]
    with tempfile.TemporaryDirectory(prefix="kernels-") as folder:
        os.environ["TRITON_CACHE_DIR"] = folder  # nothing compiled before is taken for the answer
        sys.exit(main(chosen))
