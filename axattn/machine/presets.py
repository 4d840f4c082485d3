"""Machines by name, to plan for another machine: ``sm90`` is a Hopper GPU with every library of the table."""

from __future__ import annotations

import json
from pathlib import Path

from axattn.errors import InvalidConfigError, Reason
from axattn.machine.environment import Environment

EVERY_LIBRARY: dict[str, str] = {
    "torch": "2.13.0",
    "transformers": "5.24.0",
    "flash_attn": "2.8.3",
    "flash_attn_3": "3.0.0",
    "fa3_fwd": "0.0.3",
    "flash_attn_4": "4.0.0b36",
    "nvidia_cutlass_dsl": "4.7.1",
    "quack_kernels": "0.6.5",
    "xformers": "0.0.35",
    "cuda_runtime_12": "12.8.90",
    "cuda_runtime_13": "13.0.96",
    "sageattention": "1.0.6",
    "torchao": "0.18.0",
    "kernels": "0.18.3",
    "triton": "3.7.1",
}
"""The versions that axattn was last checked against."""

_NVIDIA = {
    "sm75": ("Turing, such as a T4", (7, 5)),
    "sm80": ("Ampere, such as an A100", (8, 0)),
    "sm86": ("Ampere, such as an RTX 3090", (8, 6)),
    "sm89": ("Ada, such as an L40S or RTX 4090", (8, 9)),
    "sm90": ("Hopper, such as an H100", (9, 0)),
    "sm100": ("Blackwell, such as a B200", (10, 0)),
    "sm120": ("Blackwell, such as an RTX 5090", (12, 0)),
}
NAMES = (*_NVIDIA, "rocm6", "cpu")


def machine(name: str) -> Environment:
    """A machine by name (`NAMES`), or from a file that ``axattn doctor --json`` wrote on it.

    Raises:
        InvalidConfigError: neither a known name nor a readable file.
    """
    if name in _NVIDIA:
        gpu, architecture = _NVIDIA[name]
        return Environment("cuda", architecture, gpu, 1, cuda="13.0", libraries=EVERY_LIBRARY)
    if name == "rocm6":
        return Environment("rocm", gpu="an AMD GPU", gpus=1, rocm="6.4", libraries=EVERY_LIBRARY)
    if name == "cpu":
        return Environment("cpu", libraries=EVERY_LIBRARY)
    path = Path(name)
    advice = f"Machines: {', '.join(NAMES)}, or a file that `axattn doctor --json` wrote."
    if not path.is_file():
        raise InvalidConfigError(f"{name!r} is not a known machine", advice=advice)
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
        return Environment.from_dict(found.get("environment", found))
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        reason = Reason("environment", f"{type(error).__name__}: {error}")
        raise InvalidConfigError(f"{path.name} does not describe a machine", [reason], advice) from error


def as_environment(value: Environment | str | None) -> Environment | None:
    """An `Environment` from a name (see `machine`); None, for this machine, stays None.

    Raises:
        InvalidConfigError: as for `machine`, or `value` has another type.
    """
    if value is None or isinstance(value, Environment):
        return value
    if isinstance(value, str):
        return machine(value)
    advice = f"Give an axattn.Environment, or a name: {', '.join(NAMES)}."
    raise InvalidConfigError(f"environment is a {type(value).__name__}, not a machine", advice=advice)
