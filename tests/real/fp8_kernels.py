"""axattn's fp8 quantiser as Triton compiles it for chips, no GPU needed: ``python -m tests.real.fp8_kernels [90 ...]``.

A line for each kernel: shared memory, registers, bytes spilled, whether it reads 16 bytes at a time. Exits with 1 where
one spills, does not fit or reads less at a time. In a process of its own: the suite's kernels are interpreted.
"""

from __future__ import annotations

import itertools
import sys
from typing import Any

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from axattn.kernels import fp8_quantiser
from tests.real.cubins import resources

POINTERS = {"CHUNKS": "*i32", "ROUNDED": "*u8", "X": "*bf16", "SMOOTH": "*bf16"}
FLOATS = ("PEAK", "SUM", "LOW", "HIGH", "UNDO")
NUMBERS = ("heads", "group", "size", "stride_t", "stride_h", "smallest")
KERNELS = (
    (fp8_quantiser._statistics_kernel, {"MEAN": False}),
    (fp8_quantiser._statistics_kernel, {"MEAN": True}),
    (fp8_quantiser._round_kernel, {"MEAN": False, "ROUND": True}),
    (fp8_quantiser._round_kernel, {"MEAN": True, "ROUND": True}),
    (fp8_quantiser._round_kernel, {"MEAN": True, "ROUND": False}),
)
LIMIT = {80: 163, 86: 99, 89: 99, 90: 227, 100: 227, 120: 99}
"""KiB of shared memory of a block (CUDA's programming guide, "Compute Capabilities")."""


def compiled(kernel: Any, flags: dict[str, Any], sm: int, size: int) -> Any:
    """As the launcher compiles it for a head dim and bf16."""
    constants = {**flags, **fp8_quantiser.cut(size), "GROUP": 8}
    constants = {name: value for name, value in constants.items() if name in kernel.arg_names}
    signature = {}
    for name in kernel.arg_names:
        kind = POINTERS.get(name, "*fp32" if name in FLOATS else "i32")
        signature[name] = "constexpr" if name in constants else "fp32" if name == "smallest" else kind
    aligned = [
        n
        for n, name in enumerate(kernel.arg_names)
        if name not in constants and name not in ("heads", "group", "smallest")
    ]
    attributes = {(n,): [["tt.divisibility", 16]] for n in aligned}
    source = ASTSource(kernel, signature=signature, constexprs=constants, attrs=attributes)
    return triton.compile(source, target=GPUTarget("cuda", sm, 32), options={"num_warps": fp8_quantiser.WARPS})


def main(chips: list[int], sizes: tuple[int, ...]) -> int:
    bad = 0
    for sm, size, (kernel, flags) in itertools.product(chips, sizes, KERNELS):
        found = compiled(kernel, flags, sm, size)
        registers, stack = resources(found)
        fits = found.metadata.shared <= LIMIT[sm] * 1024
        bad += stack > 0 or not fits
        ptx = found.asm["ptx"]
        wide = "ld.global.v4" in ptx and ("ROUND" not in flags or "st.global.v" in ptx)
        bad += not wide
        verdict = f"{'fits' if fits else 'TOO MUCH'}, registers {registers}, spills {stack}"
        verdict += f", {'wide' if wide else 'NARROW'}"
        print(f"sm{sm} D{size} {kernel.fn.__name__} {flags}: shared {found.metadata.shared} {verdict}", flush=True)
    return int(bad > 0)


if __name__ == "__main__":
    chips = [int(sm) for sm in sys.argv[1:]] or [90]
    sys.exit(main(chips, (64, 128, 256) if len(sys.argv) > 1 else (128,)))
