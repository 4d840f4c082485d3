"""Whether ``import torch`` has axattn's backends registered in every process (``axattn_autoload.py``), or why not."""

from __future__ import annotations

import os
from importlib.metadata import entry_points

from axattn.errors import Reason

_GROUP, _ENTRY = "torch.backends", "axattn_autoload:register"
_OFF = ("0", "false", "no")


def why_off() -> tuple[Reason, ...]:
    """Every reason why processes of this environment do not register axattn's backends by themselves; empty if they do.

    Reads this process's environment variables and the entry points of the installed distributions.
    """
    reasons = []
    if _ENTRY not in {entry.value for entry in entry_points(group=_GROUP)}:
        text = f"no installed distribution has the entry point {_ENTRY} of {_GROUP}"
        reasons.append(Reason("autoload", text, "pip install axattn"))
    for name in ("AXATTN_AUTOLOAD", "AXATTN_AUTO_REGISTER"):
        if os.environ.get(name, "").lower() in _OFF:
            reasons.append(Reason("autoload", f"{name}={os.environ[name]} in the environment", f"unset {name}"))
    if os.environ.get("TORCH_DEVICE_BACKEND_AUTOLOAD", "1") != "1":  # as torch reads it
        name = "TORCH_DEVICE_BACKEND_AUTOLOAD"
        text = f"{name}={os.environ[name]} in the environment turns all of torch's entry points off"
        reasons.append(Reason("autoload", text, f"unset {name}"))
    return tuple(reasons)
