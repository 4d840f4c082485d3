"""`diagnose`: what a machine can run, what it can't, every reason, and the command that fixes it."""

from __future__ import annotations

import dataclasses
import importlib.util
from dataclasses import dataclass
from typing import Any

from axattn import backends
from axattn.errors import Reason
from axattn.hf import contracts
from axattn.hf.contracts import Finding
from axattn.machine import autoload
from axattn.machine.environment import Environment
from axattn.machine.presets import as_environment
from axattn.spec.names import Packs


@dataclass(frozen=True, slots=True)
class KernelDiagnosis:
    """One kernel on one machine.

    Attributes:
        name: canonical name.
        summary: one line.
        exact: False for int8, fp8 and sparse kernels.
        packs: the flag ``attn_supports_packing``.
        packing: whether documents of a row stay apart, and on what condition (`axattn.backends.packs`).
        reasons: why it can't run here; empty if it can. On this machine, also which function of another package holds
            its name in this process.
        hub: the hub kernel, with its revision, that Transformers runs instead of its library; ``""`` for none.
        notice: a warning about it on this machine, ``""`` for none.
    """

    name: str
    summary: str
    exact: bool
    packs: bool
    packing: Packs
    reasons: tuple[Reason, ...]
    hub: str = ""
    notice: str = ""

    @property
    def usable(self) -> bool:
        """Whether it runs here."""
        return not self.reasons


@dataclass(frozen=True, slots=True)
class Diagnosis:
    """Every kernel on one machine.

    Attributes:
        environment: the machine.
        kernels: of axattn and of Transformers.
        contracts: axattn's checked assumptions about the installed packages; none for a machine that is not this
            one.
        not_autoloaded: why processes that import torch don't register axattn's backends by themselves; empty if they
            do, and for a machine that is not this one.
    """

    environment: Environment
    kernels: tuple[KernelDiagnosis, ...]
    contracts: tuple[Finding, ...] = ()
    not_autoloaded: tuple[Reason, ...] = ()

    def to_dict(self) -> dict[str, Any]:
        """A JSON-ready description."""
        return {
            "environment": self.environment.to_dict(),
            "kernels": [
                {
                    "name": kernel.name,
                    "usable": kernel.usable,
                    "exact": kernel.exact,
                    "packs": kernel.packs,
                    "packing": kernel.packing,
                    "hub": kernel.hub,
                    "notice": kernel.notice,
                    "reasons": _listed(kernel.reasons),
                }
                for kernel in self.kernels
            ],
            "not_autoloaded": _listed(self.not_autoloaded),
            "contracts": [
                {
                    "name": one.contract.name,
                    "package": one.contract.package,
                    "version": one.version,
                    "different": one.different,
                    "refused": one.contract.refused if one.different else "",
                }
                for one in self.contracts
            ],
        }


def _listed(reasons: tuple[Reason, ...]) -> list[dict[str, str]]:
    return [{"feature": reason.feature, "text": reason.text, "fix": reason.fix} for reason in reasons]


def diagnose(environment: Environment | str | None = None) -> Diagnosis:
    """Probe every built-in kernel against a machine, which may be a name (``"sm90"``); None is this one.

    Raises:
        InvalidConfigError: no machine has that name.
    """
    machine = as_environment(environment) or Environment.current()
    not_autoloaded = autoload.why_off() if environment is None else ()
    if not importlib.util.find_spec("torch"):  # the backends' files import it
        why = (Reason("library", "torch is not installed", "pip install torch"),)
        return Diagnosis(
            machine, tuple(_kernel(n, "", True, why) for n in backends.builtin_names()), (), not_autoloaded
        )
    from axattn.backends.sdpa import native_note
    from axattn.hf.flash_stand_ins import stand_in
    from axattn.planning import planner  # needs torch

    transformers = environment is None and importlib.util.find_spec("transformers") is not None
    found = []
    for name in backends.builtin_names():
        backend = backends.get(name)
        kernel = stand_in(name, machine)
        reasons = list(backend.probe(machine)) if kernel is None else planner.why_not(name, machine)
        device = machine.torch_device
        if kernel is None and not reasons and device not in backend.capability_on(machine).devices:
            reasons.append(Reason("gpu", f"{name} does not run on {device}"))
        if transformers:
            reasons += _held(name)
        exact = backend.capability.exactness == "exact"
        notice = backend.notice(machine) if backend.notice is not None and not reasons else ""
        if name == "sdpa":  # by name, Transformers runs its own
            notice = notice or native_note(machine)
        hub = "" if kernel is None or reasons else str(kernel)
        found.append(dataclasses.replace(_kernel(name, backend.summary, exact, tuple(reasons), notice), hub=hub))
    checked = contracts.findings() if transformers else []
    return Diagnosis(machine, tuple(found), tuple(checked), not_autoloaded)


def _held(name: str) -> list[Reason]:
    """Which functions of another package are registered under an axattn backend's name in this process."""
    from axattn.hf import registries

    return registries.foreign(name) if name in registries.axattn_functions() else []


def _kernel(name: str, summary: str, exact: bool, reasons: tuple[Reason, ...], notice: str = "") -> KernelDiagnosis:
    packs = backends.packs(name)
    return KernelDiagnosis(name, summary, exact, backends.supports_packing(name), packs, reasons, notice=notice)
