"""flash-attn-4's own code, asked on a CPU what it refuses of what axattn's record serves.

    make real-fa4                                        # fetches the library; then its checks for every pair of needs
    python -m tests.real.fa4 --compile                   # before a release: and compiles each, 10-60 s a call
    python -m tests.real.fa4 --on sm120 --thin 1 --compile

A call goes through axattn's adapter (`flash_4`) over fake tensors. Without ``--compile`` the library's host code is
traced up to each launch and nothing is compiled (under a second a call): its assertions are there, and what shared
memory a launch names (all of sm120's; sm90's forward and backward, and sm100's forward, allocate theirs in the kernel).
The architecture is chosen by environment variables that the library reads once: one process a machine.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple

ROOT = Path(__file__).parents[2]
SITE = ROOT / "build" / "fa4"
"""Where ``make real-fa4`` puts the library; git ignores it."""
FETCH = "make real-fa4"
ARCHITECTURES = {"sm90": "sm_90a", "sm100": "sm_100a", "sm120": "sm_120a"}
SEQUENCES, LENGTH, SHORT = 2, 384, 64
PLAIN: dict[str, Any] = {"heads": 8, "kv_heads": 8, "dtype": "bfloat16", "device": "cuda"}


def site_paths() -> list[str]:
    """What goes on PYTHONPATH: the DSL keeps its modules one level down."""
    found = os.environ.get("AXATTN_FA4_SITE", str(SITE))
    return [found, str(Path(found) / "nvidia_cutlass_dsl" / "dsl_packages")]


def there() -> bool:
    """Whether the library has been fetched."""
    return all(Path(path).is_dir() for path in site_paths())


class Asked(NamedTuple):
    """A call that was asked for.

    Attributes:
        need: of `tests.real.needs`, as text.
        refusal: what the library says, ``""`` where it takes the call.
        seconds: it took.
    """

    need: str
    refusal: str
    seconds: float


def ask(machine: str, *, thin: int | None = 2, whole: bool = False, needs: str = "served") -> Iterator[Asked]:
    """Ask the library about every need that the record of a machine serves, in a process of its own.

    Args:
        machine: a key of `ARCHITECTURES`.
        thin: as for `tests.real.needs.served`.
        whole: compile each kernel, too.
        needs: ``"served"``, or needs as JSON: ``[{"head_dim": 256, "window": 96, "gradient": true}]``.
    """
    if machine not in ARCHITECTURES:
        raise ValueError(f"{machine} is none of {', '.join(ARCHITECTURES)}")
    environment = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join([str(ROOT), *site_paths(), os.environ.get("PYTHONPATH", "")]),
        "FLASH_ATTENTION_ARCH": ARCHITECTURES[machine],
        "CUTE_DSL_ARCH": ARCHITECTURES[machine],
        "FLASH_ATTENTION_NUM_SMS": "132",
        "OMP_NUM_THREADS": "1",
    }
    command = [sys.executable, "-W", "ignore", "-m", "tests.real.fa4", "--child", "--on", machine, "--needs", needs]
    command += ["--thin", str(len("whole grid") if thin is None else thin), *(["--compile"] if whole else [])]
    with subprocess.Popen(command, cwd=ROOT, env=environment, stdout=subprocess.PIPE, text=True) as child:
        assert child.stdout is not None
        for line in child.stdout:
            if line.startswith("{"):
                yield Asked(**json.loads(line))
    if child.returncode:
        raise RuntimeError(f"{' '.join(command)} ended with {child.returncode}")


# ---- in the child --------------------------------------------------------------------------------------------------


class _Launched(BaseException):
    """The host code of a kernel has come to its launch."""


class _Answered(BaseException):
    """The library has taken the call. What axattn does with its output needs a GPU: torch slices no fake one."""


def _child(machine: str, thin: int, whole: bool, needs: str) -> None:
    from axattn.spec.capability import Need
    from tests.real.needs import served

    asked = list(served("flash_attention_4", machine, thin))
    if needs != "served":
        asked = [Need(**{**PLAIN, **fields}) for fields in json.loads(needs)]
    library = _Library(whole)
    answers: dict[Any, str] = {}
    for need in asked:
        start, call = time.perf_counter(), _fields(need)
        if call not in answers:
            answers[call] = library.refusal(need)
        entry = Asked(_shown(need), answers[call], round(time.perf_counter() - start, 1))
        print(json.dumps(entry._asdict()), flush=True)


def _fields(need: Any) -> tuple[Any, ...]:
    """What of a need reaches the library."""
    size = max(need.head_dim, need.value_dim or need.head_dim)
    flags = (need.causal, need.window, need.softcap, need.sinks, need.cross_lengths, need.gradient)
    return (size, need.dtype, need.kv_heads, *flags)


def _shown(need: Any) -> str:
    from axattn.spec.capability import Need

    plain = Need(**PLAIN)
    names = [name for name in Need.__dataclass_fields__ if getattr(need, name) != getattr(plain, name)]
    return ", ".join(f"{name}={getattr(need, name)}" for name in names)


class _Library:
    """flash-attn-4 on a machine without a GPU."""

    def __init__(self, whole: bool) -> None:
        import torch
        from cutlass.base_dsl.dsl import BaseDSL
        from cutlass.cutlass_dsl import cutlass as dsl
        from cutlass.utils import SmemAllocator, hardware_info
        from flash_attn.cute import interface

        from axattn.backends import flash_calls

        self.shared: list[int] = []
        self.capacity = SmemAllocator.capacity_in_bytes("_".join(("sm", os.environ["CUTE_DSL_ARCH"][3:-1])))
        self.contexts: list[Any] = []
        self.gradient = False
        hardware: Any = hardware_info.HardwareInfo  # asks the driver
        hardware.__init__ = lambda self, *_, **__: None
        hardware.get_max_active_clusters = hardware.get_device_multiprocessor_count = lambda self, *_, **__: 132
        dsl.cuda_helpers.get_device_attribute = lambda *_, **__: 233472
        compiled = interface.cute.compile

        def compile_(*args: Any, **kwargs: Any) -> Any:
            with contextlib.suppress(_Launched):
                return compiled(*args, **kwargs)
            return None

        config: Any = BaseDSL.LaunchConfig
        made, allocate = config.__post_init__, SmemAllocator.allocate

        def launched(this: Any) -> None:
            made(this)
            if isinstance(this.smem, int):
                self.shared.append(this.smem)
            if not whole:
                raise _Launched

        def allocated(this: Any, what: Any, *args: Any, **kwargs: Any) -> Any:
            if hasattr(what, "size_in_bytes"):
                self.shared.append(what.size_in_bytes())
            return allocate(this, what, *args, **kwargs)

        def applied(*args: Any) -> Any:
            context = SimpleNamespace(set_materialize_grads=lambda _: None)
            context.save_for_backward = lambda *saved: setattr(context, "saved_tensors", saved)
            self.contexts.append(context)
            return self.function.forward(context, *args)

        interface.cute.compile = compile_
        config.__post_init__ = launched
        SmemAllocator.allocate = allocated
        self.function: Any = interface.FlashAttnVarlenFunc
        self.function.apply = applied  # torch's autograd makes no graph of fake tensors on a GPU that is not there
        self.outputs: list[Any] = []
        library = flash_calls.varlen_function(4)

        def answered(*args: Any, **kwargs: Any) -> None:
            for tensor in args:
                if isinstance(tensor, torch.Tensor) and tensor.is_floating_point():
                    tensor.requires_grad_(self.gradient)  # lost in packing, without a graph
            self.outputs.append(library(*args, **kwargs)[0])
            raise _Answered

        flash_calls.varlen_function = lambda version: {4: answered}[version]  # type: ignore[assignment]

    def refusal(self, need: Any) -> str:
        """What the library says to a need, ``""`` where it takes it, forward and, if asked for, backward."""
        import torch
        from torch._subclasses.fake_tensor import FakeTensorMode

        from axattn.backends.flash_calls import flash_4

        for noted in (self.shared, self.contexts, self.outputs):
            noted.clear()
        self.gradient = need.gradient
        try:
            with torch.no_grad(), FakeTensorMode():
                with contextlib.suppress(_Answered):
                    flash_4(_call(need))
                if need.gradient:
                    self.function.backward(self.contexts[0], torch.empty_like(self.outputs[0]), None)
        except Exception as error:  # whatever it says is the answer
            lines = str(error).strip().splitlines() or [""]
            return f"{type(error).__name__}: {lines[0]}"
        most = max(self.shared, default=0)
        return f"{most} bytes of shared memory, the chip has {self.capacity}" if most > self.capacity else ""


def _call(need: Any) -> Any:
    import torch

    from axattn.backends.call import AttentionCall

    dtype = getattr(torch, need.dtype)
    queries = LENGTH if not need.cross_lengths else SHORT if need.gradient else 1

    def tensor(*shape: int) -> torch.Tensor:
        return torch.empty(*shape, dtype=dtype, device="cuda", requires_grad=need.gradient)

    return AttentionCall(
        module=torch.nn.Identity(),
        query=tensor(SEQUENCES, need.heads, queries, need.head_dim),
        key=tensor(SEQUENCES, need.kv_heads, LENGTH, need.head_dim),
        value=tensor(SEQUENCES, need.kv_heads, LENGTH, need.value_dim or need.head_dim),
        mask=None,
        causal=need.causal,
        window=need.window,
        scale=need.head_dim**-0.5,
        dropout=0.0,
        softcap=need.softcap,
        sinks=tensor(need.heads) if need.sinks else None,
        bias=None,
        extras={},
    )


def main() -> int:
    """Print every call that the library refuses although the record serves it; the exit status says if there is one."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--on", choices=ARCHITECTURES, action="append", help="a machine; all of them if none is given")
    parser.add_argument("--thin", type=int, default=2, help="at most so many features together (tests.real.needs)")
    parser.add_argument("--compile", action="store_true", help="compile every kernel, 10-60 s a call")
    parser.add_argument("--needs", default="served", help='as JSON, such as [{"head_dim": 256, "gradient": true}]')
    parser.add_argument("--child", action="store_true", help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.child:
        _child(given.on[0], given.thin, given.compile, given.needs)
        return 0
    if not there():
        print(f"flash-attn-4 has not been fetched: {FETCH}")
        return 1
    refused = 0
    for machine in given.on or ARCHITECTURES:
        start, count = time.perf_counter(), 0
        for asked in ask(machine, thin=given.thin, whole=given.compile, needs=given.needs):
            count += 1
            refused += bool(asked.refusal)
            if asked.refusal or given.compile:
                print(f"{machine}  {asked.seconds:5.1f} s  {asked.need}: {asked.refusal or 'served'}", flush=True)
        print(f"{machine}: {count} calls, {time.perf_counter() - start:.0f} s", flush=True)
    whose = "that axattn's record serves" if given.needs == "served" else "that were asked for"
    print(f"{refused} calls {whose} are refused by the library")
    return int(refused > 0)


if __name__ == "__main__":
    sys.exit(main())
