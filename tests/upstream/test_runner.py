"""The runner of Transformers' own tests: what it makes of outcomes, where the tests come from, what runs on `auto`."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import transformers as tf

import axattn
from axattn.errors import InvalidInputError
from tests.models import CONFIGS
from tests.upstream import judged, outcomes, plugin, sources
from tests.upstream.outcomes import Judgement, Outcome, compare

PASSED = Outcome("A::test_x", "passed", placed=2)
FAILED = Outcome("A::test_x", "failed", text="AssertionError: 0.2 != 0")
REFUSED = Outcome("A::test_x", "failed", refused=True, text="InvalidInputError: varlen can't")
SKIPPED = Outcome("A::test_x", "skipped", text="no")
JUDGED = (Judgement("test_x", "0.2|can't", "it asks for what nobody has"),)


@pytest.mark.parametrize(
    ("auto", "stock", "refusals", "by_design", "verdict"),
    [
        (PASSED, None, (), (), "passed"),
        (FAILED, FAILED, (), (), "not compared"),
        (SKIPPED, SKIPPED, (), (), "not compared"),
        (FAILED, PASSED, (), (), "wrong"),
        (FAILED, None, (), (), "wrong"),
        (SKIPPED, PASSED, (), (), "wrong"),
        (FAILED, PASSED, (), JUDGED, "by design"),
        (FAILED, PASSED, JUDGED, (), "wrong"),
        (REFUSED, PASSED, (), (), "unjudged refusal"),
        (REFUSED, PASSED, JUDGED, (), "refused"),
        (REFUSED, PASSED, (), JUDGED, "unjudged refusal"),
    ],
)
def test_what_passes_on_transformers_attention_passes_or_is_judged(
    auto: Outcome, stock: Outcome | None, refusals: Any, by_design: Any, verdict: str
) -> None:
    before = {} if stock is None else {stock.test: stock}
    (found,) = compare({auto.test: auto}, before, refusals, by_design)
    assert found.verdict == verdict
    counts, bad = outcomes.summary({PASSED.test: PASSED}, [found, outcomes.Comparison("y", "passed")])
    assert f"1 {verdict}" in counts or verdict == "passed"
    assert bool(bad) == (verdict in outcomes.BAD)


def test_a_judgement_covers_the_test_and_the_text_it_names() -> None:
    other = Judgement("test_x", "another error", "why"), Judgement("test_y", "0.2", "why")
    (found,) = compare({FAILED.test: FAILED}, {PASSED.test: PASSED}, (), other)
    assert found.verdict == "wrong"
    assert "0.2 != 0" in found.why


def test_a_family_that_shows_nothing_fails_the_run() -> None:
    skipped = outcomes.Comparison(SKIPPED.test, "not compared")
    for auto, compared in (({}, []), ({"x": SKIPPED}, [skipped]), ({"x": Outcome("x", "passed")}, [skipped])):
        assert outcomes.summary(auto, compared)[1]


def test_outcomes_survive_their_file() -> None:
    all_of_them = [PASSED, Outcome("B", "failed", True, "ü\n", 1)]
    assert list(outcomes.read(outcomes.write(all_of_them)).values()) == all_of_them
    assert outcomes.not_passed(outcomes.read(outcomes.write(all_of_them))) == ["B"]


def test_judgements_are_patterns_with_reasons() -> None:
    for judgement in (*judged.REFUSALS, *judged.BY_DESIGN):
        assert re.compile(judgement.test).pattern != ""
        assert re.compile(judgement.text)
        assert len(judgement.why) > 20


def test_a_refusal_is_recognised_as_the_cause_of_another_error() -> None:
    for error, expected in ((InvalidInputError("no"), True), (ValueError("no"), False)):
        try:
            try:
                raise error
            except Exception as inner:
                raise AssertionError("the forward failed") from inner
        except AssertionError as outer:
            refused, text = plugin.described(pytest.ExceptionInfo.from_exception(outer))
        assert refused is expected
        assert "the forward failed" in text
        assert "no" in text


# ---- where the tests come from ---------------------------------------------------------------------------------------


def _checkout(folder: Path, *, whole: bool) -> Path:
    tests = folder / "tests"
    (tests / "generation").mkdir(parents=True)
    (tests / sources.MIXINS).write_text("from .generation.test_utils import GenerationTesterMixin\n")
    if whole:
        (tests / "generation" / "test_utils.py").write_text("class GenerationTesterMixin:\n    real = True\n")
    return folder


@pytest.fixture
def build(tmp_path: Path) -> Path:
    (tmp_path / "build" / "packages" / "parameterized").mkdir(parents=True)
    return tmp_path / "build"


@pytest.mark.parametrize("whole", [True, False])
def test_mixins_that_a_source_lacks_are_stood_in_for_and_named(tmp_path: Path, build: Path, whole: bool) -> None:
    checkout = _checkout(tmp_path / "transformers", whole=whole)
    for _ in range(2):
        found = sources.prepare("1.0", checkout, build)
        assert found.absent == (() if whole else ("generation.test_utils.GenerationTesterMixin",))
    text = (found.path[0] / sources.PACKAGE / "generation" / "test_utils.py").read_text()
    assert ("real" in text) == whole
    assert "class GenerationTesterMixin" in text


def test_stand_ins_are_named_in_later_runs_too(build: Path) -> None:
    home = build / "transformers-1.0" / sources.PACKAGE
    home.mkdir(parents=True)
    (home / sources.MIXINS).write_text("from .generation.test_utils import GenerationTesterMixin\n")
    first, second = (sources.prepare("1.0", None, build) for _ in range(2))
    assert first == second
    assert first.absent


def test_without_a_network_or_a_checkout_one_clear_error(
    tmp_path: Path, build: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    with pytest.raises(sources.SourcesError, match=r"transformers==1\.0.* which failed: .*\n.*--source"):
        sources.prepare("1.0", None, build)
    with pytest.raises(sources.SourcesError, match="no checkout of Transformers"):
        sources.prepare("1.0", tmp_path, build)


# ---- what runs on auto -----------------------------------------------------------------------------------------------


def test_models_that_are_built_or_loaded_are_on_auto_those_that_are_named_are_not(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("__init__", "post_init", "from_pretrained"):
        monkeypatch.setattr(tf.PreTrainedModel, name, vars(tf.PreTrainedModel)[name])  # put back at the end
    plugin.put_models_on_auto()
    config = CONFIGS["llama"]()
    built = tf.LlamaForCausalLM(config)
    built.save_pretrained(tmp_path)
    again = tf.LlamaModel(config)  # the config has a name by now
    loaded, _ = tf.LlamaForCausalLM.from_pretrained(tmp_path, output_loading_info=True)
    named = tf.LlamaForCausalLM.from_pretrained(tmp_path, attn_implementation="eager")
    chosen = tf.LlamaModel._from_config(CONFIGS["llama"](), attn_implementation="eager")
    sdpa = tf.LlamaModel._from_config(CONFIGS["llama"](), attn_implementation="sdpa")
    placed = (built, again, loaded, sdpa, tf.LlamaForCausalLM.from_pretrained(tmp_path, attn_implementation="sdpa"))
    for model in placed:
        assert {layer.asked for layer in axattn.status(model).layers} == {"auto"}
    assert not any(hasattr(model, "_axattn_state") for model in (named, chosen, built.model, loaded.model))
    assert {model.config._attn_implementation for model in (named, chosen)} == {"eager"}
