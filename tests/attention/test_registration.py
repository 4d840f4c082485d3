from __future__ import annotations

import contextlib
import functools
import importlib
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as tf
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS, AttentionMaskInterface
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS, AttentionInterface
from transformers.models.llama import modeling_llama

import axattn
from axattn.attention import interface as attention_interface
from axattn.attention import registration, registry_functions
from axattn.errors import RegistrationError
from axattn.hf import registries
from axattn.spec import names
from tests.models import build, positions, tokens
from tests.sampling import SAMPLE

TABLES = (AttentionInterface._global_mapping, AttentionMaskInterface._global_mapping)
INTERFACES = (ALL_ATTENTION_FUNCTIONS, ALL_MASK_ATTENTION_FUNCTIONS)
calls: list[Any] = []


def foreign(module: Any, query: Any, key: Any, value: Any, attention_mask: Any, **given: Any) -> Any:
    calls.append(attention_mask)
    return ALL_ATTENTION_FUNCTIONS["sdpa"](module, query, key, value, None, **{**given, "is_causal": True})


def foreign_mask(**given: Any) -> None:
    return None


FOREIGN: dict[str, Callable[[str], None]] = {
    "both": lambda name: (INTERFACES[0].register(name, foreign), INTERFACES[1].register(name, foreign_mask)),
    "attention": lambda name: INTERFACES[0].register(name, foreign),
    "mask": lambda name: INTERFACES[1].register(name, foreign_mask),
    "a partial": lambda name: INTERFACES[0].register(name, functools.partial(foreign)),
    "a partial of axattn": lambda name: INTERFACES[0].register(
        name, functools.partial(registries.axattn_functions()["s2"][0], x=1)
    ),
    "local attention": lambda name: INTERFACES[0].__setitem__(name, foreign),
    "local mask": lambda name: INTERFACES[1].__setitem__(name, foreign_mask),
}
"""How another package takes a name."""
WHOSE = r"held by (functools\.partial\()?(tests\.attention\.test_registration\.foreign|axattn\.attention\.\w+\.attend)"


@pytest.fixture(autouse=True)
def _registered() -> Iterator[None]:
    calls.clear()
    axattn.register()
    yield
    gone()
    axattn.unregister()
    axattn.register()


def gone() -> None:
    """The other package's functions are taken out again."""
    for interface in INTERFACES:
        interface._local_mapping.clear()
        table = interface._global_mapping
        for name in [
            name for name in names.axattn_backends() if name in table and not registries.of_axattn(table[name])
        ]:
            del table[name]


def packed(model: Any) -> torch.Tensor:
    with torch.no_grad():
        return model(tokens(1, 9), position_ids=positions((4, 5)), use_cache=False).logits


def python(code: str, **environment: str) -> str:
    done = subprocess.run(
        [sys.executable, "-c", code], env={**os.environ, **environment}, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert "axattn" not in done.stderr, done.stderr
    return done.stdout.strip()


def test_all_axattn_backends_are_in_both_registries_and_none_of_transformers_is_replaced() -> None:
    for table in TABLES:
        assert set(names.AXATTN_BACKENDS) <= set(table)
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
        assert not set(names.AXATTN_BACKENDS) & set(table)
    axattn.unregister()
    axattn.register()
    assert axattn.registered()


@pytest.mark.parametrize("how", FOREIGN)
@pytest.mark.parametrize("when", ["before", "after"])
def test_a_name_that_another_package_holds_stays_its_as_a_whole_and_all_others_are_axattns(how: str, when: str) -> None:
    if when == "before":
        axattn.unregister()
    FOREIGN[how]("sage")
    with pytest.raises(RegistrationError, match=rf"'sage' is {WHOSE}") as raised:
        axattn.register()
    assert {reason.text.split()[1] for reason in raised.value.reasons} == {"'sage'"}
    found = [registries.registered_function(interface, "sage") for interface in INTERFACES]
    assert not any(registries.of_axattn(function) for function in found)
    assert all(set(names.AXATTN_BACKENDS) - {"sage"} <= set(table) for table in TABLES)
    assert axattn.registered()
    axattn.unregister()
    assert [registries.registered_function(interface, "sage") for interface in INTERFACES] == found
    assert all(set(names.AXATTN_BACKENDS) & set(table) <= {"sage"} for table in TABLES)
    gone()
    axattn.register()
    assert registries.holds_axattn("sage")


@pytest.mark.parametrize("how", FOREIGN)
def test_a_name_taken_by_another_package_is_refused_at_load_and_every_other_one_runs(how: str, tmp_path: Path) -> None:
    build("llama").save_pretrained(tmp_path)
    model = axattn.apply(build("llama"), "auto")
    expected = packed(model)
    FOREIGN[how]("varlen")
    refused = pytest.raises(RegistrationError, match=rf"'varlen' is {WHOSE}.*Use .*=\"auto\"")
    with refused:
        axattn.apply(model, "varlen")
    with refused:
        axattn.from_pretrained(tmp_path, attn_implementation="varlen")
    with refused:
        axattn.plan(model, {"": "varlen"})
    with refused, axattn.using(model, "varlen"):
        pass
    assert torch.equal(packed(model), expected)
    assert torch.equal(packed(axattn.from_pretrained(tmp_path)), expected)
    assert not calls
    gone()
    assert axattn.apply(model, "varlen") is model


@pytest.mark.parametrize("on_unsupported", ["raise", "route"])
def test_a_taken_name_that_this_machine_cant_run_anyway_says_whose_it_is(on_unsupported: Any) -> None:
    with held("sage", "both"), pytest.raises(RegistrationError, match=rf"axattn's sage can't serve .*{WHOSE}"):
        axattn.plan(build("llama"), "sage", on_unsupported=on_unsupported)


def test_a_taken_name_that_a_plan_falls_back_to_is_refused() -> None:
    model = build("llama")
    with pytest.raises(RegistrationError, match=r"axattn's auto can't serve .*=\"varlen\""), held("auto", "both"):
        axattn.apply(model, "sage", on_unsupported="route")
    assert axattn.status(model).patches == 0


@contextlib.contextmanager
def held(name: str, how: str) -> Iterator[None]:
    FOREIGN[how](name)
    yield
    gone()


@pytest.mark.parametrize("how", FOREIGN)
def test_a_model_on_a_name_that_is_taken_later_raises_at_its_next_forward_and_status_says_whose_it_is(how: str) -> None:
    model = axattn.apply(build("llama"), "varlen")
    expected = packed(model)
    FOREIGN[how]("varlen")
    refused = pytest.raises(RegistrationError, match=rf"varlen can't serve LlamaModel: .*{WHOSE}")
    with refused:
        packed(model)
    with refused:
        model.generate(tokens(1, 5), max_new_tokens=2)
    assert "model: varlen, replaced by another package: " in str(axattn.status(model))
    assert not calls
    gone()
    axattn.register()
    assert torch.equal(packed(model), expected)
    assert not axattn.status(model).held


def test_a_compiled_model_is_traced_anew_and_refused() -> None:
    """That the look at the registries breaks no graph is held by `test_compiled.py`."""
    torch._dynamo.reset()
    model = axattn.apply(build("llama", num_hidden_layers=1), "varlen")
    compiled = torch.compile(model, backend="eager")
    expected = packed(compiled)
    for how in ("mask", "a partial of axattn") if SAMPLE == "nightly" else ("mask",):
        FOREIGN[how]("varlen")
        with pytest.raises(RegistrationError, match="held by"):
            packed(compiled)
        assert not calls
        gone()
        axattn.register()
        assert torch.equal(packed(compiled), expected)


def test_a_model_on_a_name_that_was_unregistered_is_refused() -> None:
    model = axattn.apply(build("llama"), "varlen")
    axattn.unregister()
    with pytest.raises(
        RegistrationError, match=r"varlen can't serve LlamaModel: .*no longer hold.*axattn\.register\(\)"
    ):
        packed(model)
    axattn.register()
    packed(model)


def test_by_name_alone_another_packages_function_gets_no_mask_of_axattns() -> None:
    """Nor does axattn look into a model that it has not loaded."""
    model = tf.AutoModelForCausalLM.from_config(build("llama").config, attn_implementation="varlen").eval()
    FOREIGN["attention"]("varlen")
    with torch.no_grad():
        model(tokens(1, 9), use_cache=False)
    assert calls == [None, None]
    assert "held by tests.attention.test_registration.foreign" in axattn.status(model).held[""]


def test_by_name_alone_another_packages_mask_is_not_taken_for_axattns() -> None:
    model = tf.AutoModelForCausalLM.from_config(build("llama").config, attn_implementation="varlen").eval()
    packed(model)
    FOREIGN["mask"]("varlen")
    with pytest.raises(RegistrationError, match=r"mask 'varlen' is held by .*foreign_mask"):
        packed(model)


def test_a_registry_of_a_models_own_file_counts(monkeypatch: pytest.MonkeyPatch) -> None:
    """DOGE's file has one in Transformers."""
    own = AttentionInterface()
    monkeypatch.setattr(modeling_llama, "ALL_ATTENTION_FUNCTIONS", own)
    model = axattn.apply(build("llama"), "varlen")
    axattn.restore(model)
    own["varlen"] = foreign
    with pytest.raises(RegistrationError, match=r"in transformers\.models\.llama\.modeling_llama, attention 'varlen'"):
        axattn.apply(model, "varlen")
    assert axattn.status(model).patches == 0
    packed(axattn.apply(model, "auto"))
    assert not calls


def test_what_an_earlier_import_of_axattn_has_left_is_no_other_packages() -> None:
    def attend() -> None: ...

    attend.__module__ = "axattn.attention.interface"
    model = axattn.apply(build("llama"), "varlen")
    TABLES[0]["varlen"] = functools.partial(attend, "varlen")
    with pytest.raises(RegistrationError, match="Transformers' registries no longer hold the"):
        packed(model)
    axattn.register()
    assert registries.holds_axattn("varlen")


@pytest.mark.parametrize("value", ["0", "false"])
def test_automatic_registration_can_be_turned_off(monkeypatch: pytest.MonkeyPatch, value: str) -> None:
    axattn.unregister()
    monkeypatch.setenv("AXATTN_AUTO_REGISTER", value)
    axattn.attention.registration.register_when_imported()
    assert not axattn.registered()
    axattn.apply(build("llama"), "varlen")
    assert axattn.registered()
    axattn.unregister()
    monkeypatch.setenv("AXATTN_AUTO_REGISTER", "1")
    axattn.attention.registration.register_when_imported()
    assert axattn.registered()


def test_unregister_before_transformers_is_imported_holds(monkeypatch: pytest.MonkeyPatch) -> None:
    waiting: dict[str, Callable[[], None]] = {}
    monkeypatch.setattr(registration, "after_import", waiting.__setitem__)
    axattn.unregister()
    registration.register_when_imported()
    assert set(waiting) == {module for module, _ in registries.INTERFACES.values()}
    registered = dict(waiting)
    waiting.clear()
    registration.register_when_imported()
    assert not waiting
    axattn.unregister()
    for function in registered.values():
        function()
    assert not axattn.registered()


def test_importing_axattn_loads_nothing_heavy() -> None:
    heavy = "('torch', 'transformers', 'pydantic', 'typer', 'rich', 'yaml', 'sageattention', 'xformers', 'flash_attn')"
    assert python(f"import sys, axattn; print([m for m in {heavy} if m in sys.modules])") == "[]"


@pytest.mark.nightly
def test_axattn_first_waits_for_transformers_modeling_code() -> None:
    """`make test` runs another process that imports axattn first, in ``tests/test_robustness.py``."""
    code = """
import axattn, importlib, transformers
print(axattn.registered())
importlib.reload(axattn)
transformers.LlamaForCausalLM
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS as A
print(axattn.registered(), 'varlen' in A)
"""
    assert python(code).split() == ["False", "True", "True"]


def test_an_import_after_transformers_registers_all_free_names(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("AXATTN_AUTO_REGISTER", raising=False)
    axattn.unregister()
    FOREIGN["attention"]("sage")
    importlib.reload(axattn)
    assert axattn.registered()
    assert [table.get("sage") for table in TABLES] == [foreign, None]


@pytest.mark.nightly
def test_transformers_first_with_a_name_taken() -> None:
    """`make test` does the same in its own process."""
    code = """
from transformers.modeling_utils import AttentionInterface as A
mine = lambda *given: None
A.register('sage', mine)
import axattn
from transformers import LlamaModel
print(axattn.registered(), 'varlen' in A._global_mapping, A._global_mapping['sage'] is mine)
"""
    assert python(code, AXATTN_AUTOLOAD="0") == "True True True"


@pytest.mark.parametrize("first", range(2), ids=registries.INTERFACES)
def test_each_registry_is_filled_when_its_module_is_imported(monkeypatch: pytest.MonkeyPatch, first: int) -> None:
    kinds = list(registries.INTERFACES)
    imported = {kinds[first]: INTERFACES[first]}
    waiting: dict[str, Callable[[], None]] = {}
    monkeypatch.setattr(registration, "after_import", waiting.__setitem__)
    monkeypatch.setattr(registries, "imported_interfaces", lambda: dict(imported))
    axattn.unregister()
    registration.register_when_imported()
    one, two = (waiting[registries.INTERFACES[kind][0]] for kind in (kinds[first], kinds[1 - first]))
    one()
    assert ["varlen" in table for table in TABLES] == [first == 0, first == 1]
    FOREIGN[("attention", "mask")[1 - first]]("sage")  # beside the other half, as soon as its module is there
    imported[kinds[1 - first]] = INTERFACES[1 - first]
    two()
    assert axattn.registered()
    assert "sage" not in TABLES[first]
    axattn.unregister()
    one()
    two()
    assert not axattn.registered()


@pytest.mark.nightly
def test_the_first_call_of_all_may_be_in_a_graph() -> None:
    """The registered functions import the rest of axattn while `torch.compile` traces them."""
    code = """
import sys, torch, axattn
from tests.models import build, tokens
model = axattn.apply(build('llama'), 'varlen')
assert 'axattn.attention.interface' not in sys.modules
torch._dynamo.config.error_on_recompile = True
compiled = torch.compile(model, backend='eager', fullgraph=True)
with torch.no_grad():
    first = compiled(tokens(1, 9), use_cache=False).logits
    second = compiled(tokens(1, 9), use_cache=False).logits
    print(torch.equal(first, second), torch.allclose(first, model(tokens(1, 9), use_cache=False).logits))
print(torch._dynamo.utils.counters['stats']['unique_graphs'])
"""
    assert python(code).split() == ["True", "True", "1"]


@pytest.mark.nightly
def test_an_entry_point_in_the_middle_of_importing_torch_and_transformers(tmp_path: Path) -> None:
    """`make test` has axattn's own entry point there, in ``tests/test_autoload.py``."""
    (tmp_path / "autoload-0.dist-info").mkdir()
    (tmp_path / "autoload-0.dist-info" / "METADATA").write_text("Metadata-Version: 2.1\nName: autoload\nVersion: 0\n")
    entry = "[torch.backends]\nautoload = axattn:register_when_imported\n"
    (tmp_path / "autoload-0.dist-info" / "entry_points.txt").write_text(entry)
    code = """
import sys, builtins
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS as A
print('axattn' in sys.modules, 'varlen' in A)
"""
    path = os.pathsep.join([str(Path(axattn.__file__).parents[1]), str(tmp_path)])
    assert python(code, PYTHONPATH=path) == "True True"


def test_a_registered_function_stays_the_same_object_in_its_first_call_and_costs_nothing_after() -> None:
    registered = AttentionInterface._global_mapping["varlen"]
    registered.__setstate__((registry_functions.attend, registered.args, {}, None))  # as in a fresh process
    model = tf.AutoModelForCausalLM.from_config(build("llama").config, attn_implementation="varlen").eval()
    with torch.no_grad():
        model(tokens(1, 5))
    assert AttentionInterface._global_mapping["varlen"] is registered
    assert registered.func is attention_interface.attend
    assert registries.holds_axattn("varlen")
