"""The one or two commands that would gain most on a machine. Pure; needs no torch if torch is missing."""

from __future__ import annotations

from dataclasses import dataclass

from axattn.errors import Reason
from axattn.machine.environment import Environment

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


def advice(environment: Environment, *, nvidia_driver: bool = False) -> tuple[Advice, ...]:
    """One or two commands, the one that gains most first: what is missing altogether; then the fastest exact kernel
    that only lacks packages, if it ranks before all that run; last, how to measure what runs.

    Args:
        environment: the machine.
        nvidia_driver: it has an NVIDIA driver, whether or not torch sees a GPU.
    """
    for name in ("torch", "transformers"):
        if not environment.has(name):
            return (Advice(f"pip install {name}", f"no kernel runs without {name}"),)
    given = []
    if nvidia_driver and environment.device == "cpu" and environment.libraries["torch"].endswith("+cpu"):
        gain = "this machine has an NVIDIA driver, and this torch is built without CUDA: every GPU kernel waits for it"
        given.append(Advice("pip install --force-reinstall torch", gain))
    elif (kernel := _missing_kernel(environment)) is not None:
        given.append(kernel)
    return (*given, Advice(MEASURE, _measured(environment)))


def _missing_kernel(environment: Environment) -> Advice | None:
    from axattn import backends
    from axattn.hf.flash_stand_ins import stand_in
    from axattn.planning.planner import why_not
    from axattn.planning.ranking import ranking, usable

    best = next(iter(usable(environment)), "")
    for name, source in ranking(environment):
        if name == best:
            break
        if commands := _commands(backends.get(name).probe(environment)):
            gain = f'attn_implementation="auto" would run {name} before {best or "all others"} ({source})'
            return Advice(" && ".join(commands), gain)
        kernel = stand_in(name, environment)  # `auto` takes libraries only; by name, Transformers runs a hub kernel
        if kernel is not None and (commands := _commands(why_not(str(kernel), environment))):
            gain = f'attn_implementation="{name}" would run the hub kernel {kernel} ({source})'
            return Advice(" && ".join(commands), gain)
    return None


def _commands(reasons: list[Reason]) -> list[str]:
    """The commands that remove every reason; none if commands alone can't."""
    commands = [_command(reason) for reason in reasons]
    return list(dict.fromkeys(commands)) if all(commands) else []


def _command(reason: Reason) -> str:
    """The command of a fix without its remarks, ``""`` if it has none."""
    return reason.fix.split(" (", maxsplit=1)[0] if reason.fix.startswith("pip install ") else ""


def _measured(environment: Environment) -> str:
    from axattn.planning.ranking import usable

    first = next(iter(usable(environment)), "eager")
    return f'shows what attn_implementation="auto" ({first} first) gains over sdpa on your model'
