"""Legacy booleans are input only: nothing but the config, the names and the migration knows them."""

from __future__ import annotations

import ast
from pathlib import Path

from axattn.spec import names

PACKAGE = Path(__file__).resolve().parents[2] / "axattn"
READERS = {"tools/axolotl/config.py", "spec/names.py", "tools/axolotl/migration.py"}
ONLY_LEGACY = set(names.LEGACY_FLAGS) - set(names.CANONICAL)


def test_no_other_code_reads_a_legacy_boolean() -> None:
    for path in PACKAGE.rglob("*.py"):
        if path.relative_to(PACKAGE).as_posix() in READERS:
            continue
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Attribute):
                assert node.attr not in names.LEGACY_FLAGS, (path.name, node.lineno)
            if isinstance(node, ast.Constant) and isinstance(node.value, str):
                assert node.value not in ONLY_LEGACY, (path.name, node.lineno)
