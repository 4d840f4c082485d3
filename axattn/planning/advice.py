"""The one or two commands that would gain most on a machine. Pure; needs no torch if torch is missing."""

from __future__ import annotations

from dataclasses import dataclass

from axattn.errors import Reason
from axattn.planning.diagnosis import Diagnosis

MEASURE = "axattn bench MODEL --model-step"


@dataclass(frozen=True, slots=True)
class Advice:
    """A command, and what it gains.

    Attributes:
        command: to type in a shell.
        gain: a sentence.
    """

    command: str
    gain: str


def advice(found: Diagnosis, *, nvidia_driver: bool = False) -> tuple[Advice, ...]:
    """One or two commands, the one that gains most first: what is missing altogether; then the fastest exact kernel
    that only lacks packages, if it ranks before all that run; last, how to measure what runs.

    Args:
        found: the machine.
        nvidia_driver: it has an NVIDIA driver, whether or not torch sees a GPU.
    """
    environment = found.environment
    for name in ("torch", "transformers"):
        if not environment.has(name):
            return (Advice(f"pip install {name}", f"no kernel runs without {name}"),)
    given = []
    if nvidia_driver and environment.device == "cpu" and environment.libraries["torch"].endswith("+cpu"):
        gain = "this machine has an NVIDIA driver, and this torch is built without CUDA: every GPU kernel waits for it"
        given.append(Advice("pip install --force-reinstall torch", gain))
    elif (kernel := _missing_kernel(found)) is not None:
        given.append(kernel)
    return (*given, Advice(MEASURE, _measured(found)))


def _missing_kernel(found: Diagnosis) -> Advice | None:
    from axattn.planning.ranking import ranking

    runs = {kernel.name for kernel in found.kernels if kernel.usable}
    order = ranking(found.environment)
    best = next((rank.name for rank in order if rank.name in runs), "")
    for rank in order:
        if rank.name == best:
            break
        commands = _commands(rank.name, found)
        if commands:
            gain = f'attn_implementation="auto" would run {rank.name} before {best or "all others"} ({rank.source})'
            return Advice(" && ".join(commands), gain)
    return None


def _commands(name: str, found: Diagnosis) -> list[str]:
    """The commands that make a kernel run; none if commands alone don't."""
    from axattn.hf.flash_stand_ins import stand_in
    from axattn.planning.planner import why_not

    kernel = stand_in(name, found.environment)
    if kernel is not None:  # Transformers runs a hub kernel in place of the library
        reasons = why_not(str(kernel), found.environment)
    else:
        reasons = next((list(one.reasons) for one in found.kernels if one.name == name), [])
    commands = [_command(reason) for reason in reasons]
    return list(dict.fromkeys(commands)) if all(commands) else []


def _command(reason: Reason) -> str:
    """The command of a fix without its remarks, ``""`` if it has none."""
    return reason.fix.split(" (", maxsplit=1)[0] if reason.fix.startswith("pip install ") else ""


def _measured(found: Diagnosis) -> str:
    from axattn.planning.ranking import usable

    first = next(iter(usable(found.environment)), "eager")
    return f'shows what attn_implementation="auto" ({first} first) gains over sdpa on your model'
