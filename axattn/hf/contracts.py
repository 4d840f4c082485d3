"""`Contract`: what axattn takes for granted about other packages, with a check on the installed version of each.

Checked once, at the first load of a model (never while a package is being imported), and by ``axattn doctor``. The
checks themselves are in `axattn.hf.transformers_contracts` and `axattn.hf.library_contracts`.
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
"""The versions that the tests run on; `axattn.hf.canary` looks at newer ones."""

Refused = Literal[
    "models", "packed rows", "unpadded rows", "compiled packed rows", "flash names", "adapters by row", "fp8", ""
]
"""What is refused where a contract does not hold: models on axattn's backends at all; packed and unpadded rows;
unpadded rows alone; packed rows inside of a compiled graph; the flash names that Transformers serves; packed rows while
an adapter of PEFT runs; fp8; nothing (a message or a shortcut is missing)."""


@contextlib.contextmanager
def on_a_cpu_in_float32() -> Iterator[None]:
    """The user's default device and dtype, random state, autocast and inference mode stay out of it."""
    import torch

    dtype, threads = torch.get_default_dtype(), torch.get_num_threads()
    torch.set_default_dtype(torch.float32)
    torch.set_num_threads(1)  # for tensors this small several threads only wait for each other
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
    """One thing that is so in another package, and that axattn would be wrong without.

    Attributes:
        name: what it is.
        package: the distribution that keeps it.
        users: modules of axattn that lean on it.
        check: returns how it is different, ``""`` where it holds; what it raises counts as different.
        refused: what is refused where it does not hold.
    """

    name: str
    package: str
    users: tuple[str, ...]
    check: Callable[[], str]
    refused: Refused

    def difference(self) -> str:
        """How the installed package is different, ``""`` where the contract holds."""
        try:
            with on_a_cpu_in_float32():
                return self.check()
        except Exception as error:  # a check touches the private parts of another package: it may raise anything
            return f"{type(error).__name__}: {error}"


@dataclass(frozen=True, slots=True)
class Finding:
    """A contract and what its check said.

    Attributes:
        contract: the contract.
        different: how the installed version is different, ``""`` where it holds.
        version: of the package.
    """

    contract: Contract
    different: str
    version: str

    @property
    def text(self) -> str:
        """One clause for people."""
        what = f"{self.contract.name} of {self.contract.package} {self.version}"
        return f"{what}: {self.different}" if self.different else f"{what}: as it should be"


def every_contract() -> tuple[Contract, ...]:
    """All of them, in the order of packages."""
    from axattn.hf import library_contracts, transformers_contracts

    return (*transformers_contracts.CONTRACTS, *library_contracts.CONTRACTS)


def version_of(package: str) -> str:
    """The version of an installed package; "unknown" for one that is only on the path."""
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return str(getattr(sys.modules.get(package), "__version__", "unknown"))


def findings(*, imported_only: bool = False) -> list[Finding]:
    """Every contract of the packages that are installed, checked.

    Args:
        imported_only: leave out packages that this process has not imported (a check would import them).
    """
    found = []
    for contract in every_contract():
        module = contract.package.replace("-", "_")
        there = module in sys.modules if imported_only else importlib.util.find_spec(module) is not None
        if there:
            found.append(Finding(contract, contract.difference(), version_of(contract.package)))
    return found


def broken() -> tuple[Finding, ...]:
    """The contracts that do not hold in this process, of the packages that it has imported. Each is checked once."""
    return _broken(frozenset(package for package in _PACKAGES if package in sys.modules))


@functools.cache
def _broken(imported: frozenset[str]) -> tuple[Finding, ...]:
    return tuple(finding for finding in findings(imported_only=True) if finding.different)


_PACKAGES = ("transformers", "torch", "peft", "accelerate", "torchao")
_seen_wrong: list[tuple[Refused, Reason]] = []


def refuse(refused: Refused, text: str) -> None:
    """Refuse something in this process from now on, because it was seen to be wrong (`axattn.hf.canary`)."""
    _seen_wrong.append((refused, Reason("version", text)))


def reasons(*refused: Refused) -> list[Reason]:
    """Why some things are refused in this process: contracts that do not hold, and what was seen to be wrong."""
    found = [Reason("version", finding.text) for finding in broken() if finding.contract.refused in refused]
    return found + [reason for what, reason in _seen_wrong if what in refused]


def untested(versions: Iterable[tuple[str, str]]) -> list[tuple[str, str]]:
    """The packages, with their versions, that are newer than any that the tests run on.

    A patch release (5.24.1) is not: it changes what a release does as little as axattn leans on it.
    """
    from packaging.version import Version

    return [
        (package, version)
        for package, version in versions
        if Version(version).release[:2] > Version(NEWEST_TESTED[package]).release[:2]
    ]
