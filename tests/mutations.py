"""``python -m tests.mutations``: put every fault in, see that each turns its test red, write `tests/mutations.md`."""

from __future__ import annotations

import sys
from importlib import import_module
from pathlib import Path

import pytest

from tests.faults import FAULTS

PAGE = Path(__file__).with_suffix(".md")
WHERE = (
    "tests.backends.test_sinks",
    "tests.parallel.test_fetch",
    "tests.conformance.test_mutations",
    "tests.documents.test_model_state",
    "tests.backends.test_sage",
    "tests.backends.test_softcap_tiles",
    "tests.fuzz.test_fuzz",
    "tests.tools.test_verify",
    "tests.unpadding.test_shared_prefixes",
)
"""Modules that put faults in."""


def page() -> str:
    """The page, from the registry."""
    for module in WHERE:
        import_module(module)
    lines = [
        "# Faults put in on purpose",
        "",
        "Made by `python -m tests.mutations`; do not edit.",
        "",
        "Each is put into axattn by a test, and the cell of the matrix or the checks beside it must then be wrong: if "
        "one is not, the tests could not have found it. `make test` puts all of them in.",
    ]
    for module in WHERE:
        path = module.replace(".", "/") + ".py"
        lines += ["", f"## {path}", "", "| fault | replaces | turns red |", "|---|---|---|"]
        for fault in FAULTS.values():
            if fault.test == path:
                changes = ", ".join(f"`{name}`" for name in fault.changes())
                lines.append(f"| {fault.name} | {changes} | {fault.red} |")
    return "\n".join(lines) + "\n"


def main() -> int:
    """Run; 1 if a fault was not found."""
    files = [str(Path(__file__).parents[1] / (module.replace(".", "/") + ".py")) for module in WHERE]
    code = int(pytest.main(["-q", *files]))
    if code == 0:
        PAGE.write_text(page())
    return code


if __name__ == "__main__":
    sys.exit(main())
