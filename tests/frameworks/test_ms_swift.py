"""``examples/ms_swift.py`` in the real ms-swift: its packing check allows axattn's names, and still refuses others."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests import installed

pytestmark = pytest.mark.nightly
pytest.importorskip("swift", reason="not in the project's environment; `make frameworks` installs it")


def test_the_packing_check_allows_axattns_names(environment: dict[str, str], tmp_path: Path) -> None:
    code = f"""
import runpy
from swift.arguments import SftArguments
before = SftArguments._check_padding_free
runpy.run_path({str(installed.ROOT / "examples/ms_swift.py")!r})
def ask(name, packing=True):
    one = SftArguments.__new__(SftArguments)
    one.attn_impl, one.packing, one.padding_free = name, packing, False
    try:
        one._check_padding_free()
    except ValueError:
        return 'refused'
    return one.padding_free
said = (ask('varlen'), ask('flash_attention_2'), ask('sdpa'), ask('varlen', False))
print(*said, SftArguments._check_padding_free is before)
"""
    done = installed.run(environment, "-c", code, cwd=tmp_path)
    assert done.stdout.split()[-5:] == ["True", "True", "refused", "False", "False"]
