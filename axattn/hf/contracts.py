"""`Contract`: an assumption about another package, with a check against the installed version.

Contracts are checked once, at the first load of a model (never during an import), and by ``axattn doctor``. The checks
are in `axattn.hf.transformers_contracts` and `axattn.hf.library_contracts`.
"""

from __future__ import annotations

import contextlib
import functools
import importlib.metadata
import importlib.util
import sys
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Literal

from axattn.errors import Reason

OLDEST_TESTED = {"transformers": "5.17.0", "torch": "2.11.0"}
NEWEST_TESTED = {"transformers": "5.24.0", "torch": "2.13.0"}
"""The versions that the tests run on; `axattn.hf.canary` checks newer ones."""

Refused = Literal[
    "models", "packed rows", "unpadded rows", "compiled packed rows", "flash names", "adapters by row", "fp8", ""
]
"""What is refused if a contract does not hold: models on axattn backends; packed and unpadded rows; unpadded rows only;
packed rows in a compiled graph; native flash names; packed rows while a PEFT adapter runs; fp8; nothing (only a message
or a shortcut is lost)."""


@contextlib.contextmanager
def on_a_cpu_in_float32() -> Iterator[None]:
    """A context for checks on the CPU in float32, isolated from the user's default device and dtype, random state,
    autocast and inference mode."""
    import torch

    dtype, threads = torch.get_default_dtype(), torch.get_num_threads()
    torch.set_default_dtype(torch.float32)
    torch.set_num_threads(1)  # for tensors this small more threads only wait for each other
    try:
        with (
            torch.random.fork_rng(devices=()),
            torch.device("cpu"),
            torch.inference_mode(False),
            torch.enable_grad(),
            torch.autocast("cpu", enabled=False),
        ):
            yield
    finally:
        torch.set_default_dtype(dtype)
        torch.set_num_threads(threads)


@dataclass(frozen=True, slots=True)
class Contract:
    """One assumption about another package without which axattn would be wrong.

    Attributes:
        name: what is assumed.
        package: the distribution that must satisfy it.
        users: modules of axattn that depend on it.
        check: returns the difference, ``""`` if the contract holds; an exception counts as a difference.
        refused: what is refused if it does not hold.
    """

    name: str
    package: str
    users: tuple[str, ...]
    check: Callable[[], str]
    refused: Refused

    def difference(self) -> str:
        """How the installed package differs, ``""`` if the contract holds."""
        try:
            with on_a_cpu_in_float32():
                return self.check()
        except Exception as error:  # checks use private parts of other packages and may raise anything
            return f"{type(error).__name__}: {error}"


@dataclass(frozen=True, slots=True)
class Finding:
    """The result of a contract's check.

    Attributes:
        contract: the contract.
        different: how the installed version differs, ``""`` if the contract holds.
        version: of the package.
    """

    contract: Contract
    different: str
    version: str

    @property
    def text(self) -> str:
        """One readable clause."""
        what = f"{self.contract.name} of {self.contract.package} {self.version}"
        return f"{what}: {self.different}" if self.different else f"{what}: as expected"


def every_contract() -> tuple[Contract, ...]:
    """All contracts, ordered by package."""
    from axattn.hf import library_contracts, transformers_contracts

    return (*transformers_contracts.CONTRACTS, *library_contracts.CONTRACTS)


def version_of(package: str) -> str:
    """The version of an installed package; "unknown" if it is on the path without metadata."""
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return str(getattr(sys.modules.get(package), "__version__", "unknown"))


def findings(*, imported_only: bool = False) -> list[Finding]:
    """Check every contract of the installed packages.

    Args:
        imported_only: skip packages that this process has not imported (a check would import them).
    """
    found = []
    for contract in every_contract():
        module = contract.package.replace("-", "_")
        available = module in sys.modules if imported_only else importlib.util.find_spec(module) is not None
        if available:
            found.append(Finding(contract, contract.difference(), version_of(contract.package)))
    return found


def broken() -> tuple[Finding, ...]:
    """The broken contracts of the packages that this process has imported. Each is checked once."""
    return _broken(frozenset(package for package in _PACKAGES if package in sys.modules))


@functools.cache
def _broken(imported: frozenset[str]) -> tuple[Finding, ...]:
    return tuple(finding for finding in findings(imported_only=True) if finding.different)


_PACKAGES = ("transformers", "torch", "peft", "accelerate", "torchao")
_found_wrong: list[tuple[Refused, Reason]] = []


def refuse(refused: Refused, text: str) -> None:
    """Refuse something in this process from now on, because the canary found it wrong (`axattn.hf.canary`)."""
    _found_wrong.append((refused, Reason("version", text)))


def reasons(*refused: Refused) -> list[Reason]:
    """Why these things are refused in this process: broken contracts, and findings of the canary."""
    found = [Reason("version", finding.text) for finding in broken() if finding.contract.refused in refused]
    return found + [reason for what, reason in _found_wrong if what in refused]


def untested(versions: Iterable[tuple[str, str]]) -> dict[tuple[str, str], str]:
    """The packages, with their versions, that are newer than the newest tested or older than the oldest, and which.

    Patch releases (5.24.1) don't count as newer. pip keeps versions in range (pyproject.toml), unless asked not to
    (``--no-deps``).
    """
    from packaging.version import Version

    found = {}
    for package, version in versions:
        oldest, newest = OLDEST_TESTED[package], NEWEST_TESTED[package]
        if Version(version).release[:2] > Version(newest).release[:2]:
            found[package, version] = f"newer than the newest tested ({newest})"
        elif Version(version).release[:2] < Version(oldest).release[:2]:
            found[package, version] = f"older than the oldest tested ({oldest})"
    return found
