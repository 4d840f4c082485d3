"""The axolotl plugin over a stand-in for its base class; ``tests/frameworks/test_axolotl.py`` runs the real one."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Iterator
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest

import axattn
from axattn.errors import UnsupportedAttentionError
from tests.models import build


class BasePlugin:
    """The hooks of axolotl 0.21 that the plugin overrides; a method of another name is an error."""

    def get_input_args(self) -> str | None: ...

    def post_model_build(self, cfg: Any, model: Any) -> None: ...

    def add_callbacks_post_trainer(self, cfg: Any, trainer: Any) -> list[Any]: ...

    def __init_subclass__(cls) -> None:
        unknown = [name for name in vars(cls) if not name.startswith("__") and not hasattr(BasePlugin, name)]
        assert not unknown, unknown


@pytest.fixture
def plugin(monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    for name in ("axolotl", "axolotl.integrations", "axolotl.integrations.base"):
        monkeypatch.setitem(sys.modules, name, ModuleType(name))
    sys.modules["axolotl.integrations.base"].BasePlugin = BasePlugin  # type: ignore[attr-defined]
    monkeypatch.delitem(sys.modules, "axattn.integrations.axolotl", raising=False)
    yield importlib.import_module("axattn.integrations.axolotl")
    sys.modules.pop("axattn.integrations.axolotl", None)


def config(**given: Any) -> SimpleNamespace:
    keys = ("axattn", "axattn_on_unsupported", "axattn_kernel_options", "axattn_verify")
    return SimpleNamespace(**{**dict.fromkeys(keys), **given})


def test_without_its_key_nothing_changes(plugin: Any) -> None:
    data = {"attn_implementation": "xformers", "sdpa_varlen": True, "context_parallel_size": 2}
    assert plugin.AxattnArgs._check(dict(data)) == data
    model = build("llama")
    plugin.AxattnPlugin().post_model_build(config(), model)
    assert not axattn.status(model).patches
    assert plugin.AxattnPlugin().add_callbacks_post_trainer(config(), None) == []


def test_its_key_sets_what_axolotl_needs(plugin: Any) -> None:
    found = plugin.AxattnArgs._check({"axattn": "varlen", "context_parallel_size": 1})
    assert (found["attn_implementation"], found["sdpa_varlen"]) == ("eager", False)
    module, _, name = plugin.AxattnPlugin().get_input_args().rpartition(".")
    assert getattr(importlib.import_module(module), name) is plugin.AxattnArgs


@pytest.mark.parametrize(
    ("data", "message"),
    [
        ({"axattn": "varlen", "attn_implementation": "sdpa"}, "both name the attention"),
        ({"axattn": "varlen", "sdpa_varlen": True}, "patches the attention"),
        ({"axattn": "varlen", "context_parallel_size": 2}, "its own ring attention"),
        ({"axattn_on_unsupported": "route"}, "is set without `axattn:`"),
        ({"axattn_kernel_options": {"a": 1}}, "is set without `axattn:`"),
    ],
)
def test_contradictions_are_refused_with_the_config(plugin: Any, data: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        plugin.AxattnArgs(**data)


def test_the_built_model_runs_on_the_kernel_and_is_verified(plugin: Any, caplog: pytest.LogCaptureFixture) -> None:
    model = build("llama")
    one = config(axattn="s2", axattn_kernel_options={"group_size": 8})
    with caplog.at_level("INFO", "axolotl.axattn"):
        plugin.AxattnPlugin().post_model_build(one, model)
    layers = len(axattn.status(model).layers)
    assert layers
    assert f"axattn: s2: s2 runs {layers} attention modules" in caplog.text
    assert model.config._attn_implementation == "s2"
    trainer = SimpleNamespace(model=model)
    [callback] = plugin.AxattnPlugin().add_callbacks_post_trainer(one, trainer)
    assert isinstance(callback, axattn.VerifyCallback)
    one.axattn_verify = False
    assert plugin.AxattnPlugin().add_callbacks_post_trainer(one, trainer) == []
    axattn.restore(model)


def test_what_no_kernel_of_axattn_runs_is_not_verified(plugin: Any) -> None:
    """`VerifyCallback` would refuse it, and a config can't remove the callback."""
    model = build("llama")
    plugin.AxattnPlugin().post_model_build(config(axattn="eager"), model)
    assert plugin.AxattnPlugin().add_callbacks_post_trainer(config(axattn="eager"), SimpleNamespace(model=model)) == []
    axattn.restore(model)


def test_a_refusal_is_axattns(plugin: Any) -> None:
    with pytest.raises((UnsupportedAttentionError, axattn.BackendUnavailableError), match="fp8 can't"):
        plugin.AxattnPlugin().post_model_build(config(axattn="fp8"), build("llama"))
    with pytest.raises(axattn.InvalidConfigError, match="nonsense"):
        plugin.AxattnPlugin().post_model_build(
            config(axattn="varlen", axattn_kernel_options={"nonsense": 1}), build("llama")
        )
