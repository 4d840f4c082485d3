"""Every attention kernel for Hugging Face Transformers behind one argument, and never silently wrong.

Importing axattn loads neither torch nor Transformers; it registers its backends once Transformers is imported.
A name that another package has registered keeps that package's function, and loading a model on it is refused.
``AXATTN_AUTO_REGISTER=0`` in the environment turns this off: `register` or the first load through axattn then registers
the names. Where axattn is installed, ``import torch`` has the backends registered in the same way
(``axattn_autoload.py``); ``AXATTN_AUTOLOAD=0`` turns only that off.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from axattn.attention.registration import register, register_when_imported, registered, unregister

if TYPE_CHECKING:
    from axattn import parallel as parallel
    from axattn.documents.collator import PackingCollator
    from axattn.errors import (
        AxattnError,
        BackendUnavailableError,
        InvalidConfigError,
        InvalidInputError,
        RegistrationError,
        UnknownAttentionError,
        UnsupportedAttentionError,
    )
    from axattn.loading import apply, from_pretrained, plan, restore, status, using
    from axattn.machine.environment import Environment
    from axattn.parallel.model import sequence_parallel
    from axattn.planning.diagnosis import diagnose
    from axattn.tools.axolotl.config import AttentionConfig
    from axattn.tools.axolotl.migration import migrate
    from axattn.tools.bench.kernels import bench
    from axattn.tools.verify.callback import VerifyCallback
    from axattn.tools.verify.whole import verify
    from axattn.training import prepare_for_training

    __version__: str

_LAZY = {
    "AttentionConfig": "tools.axolotl.config",
    "AxattnError": "errors",
    "BackendUnavailableError": "errors",
    "Environment": "machine.environment",
    "InvalidConfigError": "errors",
    "InvalidInputError": "errors",
    "PackingCollator": "documents.collator",
    "RegistrationError": "errors",
    "UnknownAttentionError": "errors",
    "UnsupportedAttentionError": "errors",
    "apply": "loading",
    "from_pretrained": "loading",
    "plan": "loading",
    "prepare_for_training": "training",
    "restore": "loading",
    "status": "loading",
    "sequence_parallel": "parallel.model",
    "using": "loading",
    "verify": "tools.verify.whole",
    "bench": "tools.bench.kernels",
    "diagnose": "planning.diagnosis",
    "migrate": "tools.axolotl.migration",
    "VerifyCallback": "tools.verify.callback",
}

__all__ = [
    "AttentionConfig",
    "AxattnError",
    "BackendUnavailableError",
    "Environment",
    "InvalidConfigError",
    "InvalidInputError",
    "PackingCollator",
    "RegistrationError",
    "UnknownAttentionError",
    "UnsupportedAttentionError",
    "VerifyCallback",
    "apply",
    "bench",
    "diagnose",
    "from_pretrained",
    "migrate",
    "plan",
    "prepare_for_training",
    "register",
    "registered",
    "restore",
    "sequence_parallel",
    "status",
    "unregister",
    "using",
    "verify",
]


def __getattr__(name: str) -> Any:
    if name in _LAZY:
        return getattr(importlib.import_module(f"axattn.{_LAZY[name]}"), name)
    if name == "parallel":
        return importlib.import_module("axattn.parallel")
    if name == "__version__":
        return _installed_version()
    raise AttributeError(f"module 'axattn' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *_LAZY, "__version__", "parallel"})


def _installed_version() -> str:
    """The version that the build took from the git tag; 0+unknown if the package was copied, not installed."""
    from importlib.metadata import PackageNotFoundError, version

    try:
        return version("axattn")
    except PackageNotFoundError:
        return "0+unknown"


register_when_imported()
