from __future__ import annotations

import subprocess
import sys
import types
from collections.abc import Iterator

import pytest
from transformers.masking_utils import AttentionMaskInterface
from transformers.modeling_utils import AttentionInterface

import axattn
from axattn import names
from axattn.errors import RegistrationError
from axattn.hf import post_import

TABLES = (AttentionInterface._global_mapping, AttentionMaskInterface._global_mapping)


@pytest.fixture(autouse=True)
def _registered() -> Iterator[None]:
    axattn.register()
    yield
    axattn.unregister()
    axattn.register()


def python(code: str) -> str:
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def test_all_our_names_are_in_both_registries_and_none_of_transformers_is_replaced() -> None:
    for table in TABLES:
        assert set(names.OURS) <= set(table)
    natives = {name: TABLES[0][name] for name in names.NATIVE if name in TABLES[0]}
    assert all(function.__module__.startswith("transformers.") for function in natives.values())


def test_registering_twice_changes_nothing() -> None:
    before = [dict(table) for table in TABLES]
    axattn.register()
    assert [dict(table) for table in TABLES] == before


def test_unregister_restores_exactly() -> None:
    axattn.unregister()
    assert not axattn.registered()
    for table in TABLES:
        assert not set(names.OURS) & set(table)
    axattn.unregister()
    axattn.register()
    assert axattn.registered()


def test_a_foreign_function_under_our_name_is_never_overwritten_and_nothing_is_half_done() -> None:
    axattn.unregister()

    def foreign() -> None: ...

    TABLES[1]["sage"] = foreign
    try:
        with pytest.raises(RegistrationError, match=r"mask 'sage' is held by .*foreign"):
            axattn.register()
        assert TABLES[1]["sage"] is foreign
        assert not (set(names.OURS) & set(TABLES[0]))
        assert set(names.OURS) & set(TABLES[1]) == {"sage"}
        axattn.unregister()
        assert TABLES[1]["sage"] is foreign
    finally:
        del TABLES[1]["sage"]


def test_importing_axattn_loads_nothing_heavy() -> None:
    heavy = "('torch', 'transformers', 'pydantic', 'typer', 'rich', 'yaml', 'sageattention', 'xformers', 'flash_attn')"
    assert python(f"import sys, axattn; print([m for m in {heavy} if m in sys.modules])") == "[]"


@pytest.mark.parametrize(
    "code",
    [
        "import axattn; import transformers.modeling_utils",
        "import axattn; from transformers import LlamaModel",
        "import transformers.modeling_utils; import axattn",
        "import torch, axattn, transformers; transformers.LlamaForCausalLM",
        "import axattn, importlib; importlib.reload(axattn); from transformers import LlamaModel",
    ],
)
def test_names_are_registered_whatever_is_imported_first(code: str) -> None:
    check = "from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS as A"
    check += "; print(axattn.registered(), 'varlen' in A)"
    assert python(f"{code}; {check}") == "True True"


def test_transformers_alone_waits_for_its_modeling_code() -> None:
    assert python("import axattn, transformers; print(axattn.registered())") == "False"


def test_an_import_that_fails_is_reported_as_its_own_error_and_can_be_repeated(tmp_path: object) -> None:
    code = """
import sys, pathlib
sys.path.insert(0, sys.argv[1] if len(sys.argv) > 1 else '.')
from axattn.hf.post_import import after_import
folder = pathlib.Path(sys.path[0])
(folder / 'late.py').write_text('1 / 0')
seen = []
after_import('late', lambda: seen.append(1))
try:
    import late
except ZeroDivisionError:
    print('raised', seen)
(folder / 'late.py').write_text('value = 22  # another size, so the cached byte code is stale')
import late
print(late.value, seen, any(type(f).__name__ == '_Watcher' and f.name == 'late' for f in sys.meta_path))
"""
    done = subprocess.run([sys.executable, "-c", code, str(tmp_path)], capture_output=True, text=True, check=False)
    assert done.stdout.split("\n")[:2] == ["raised []", "22 [1] False"], done.stderr


def test_after_import_of_a_module_that_is_there_runs_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[int] = []
    monkeypatch.setitem(sys.modules, "axattn_fake", types.ModuleType("axattn_fake"))
    post_import.after_import("axattn_fake", lambda: seen.append(1))
    assert seen == [1]
