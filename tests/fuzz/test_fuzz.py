"""Random batches: right or refused with a true reason. ``make nightly`` tries a hundred times as many."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings

from axattn.errors import UnsupportedAttentionError
from tests.faults import Patch, fault
from tests.fuzz.strategies import chats, examples
from tests.fuzz.verdict import Chat, Example, Prompt, Verdict, run

_SETTINGS = settings(deadline=None, derandomize=True, database=None, suppress_health_check=list(HealthCheck))


def _require_fine(example: Example | Chat) -> None:
    verdict = run(example)
    assert verdict.fine, f"{verdict.status}: {verdict.detail}\nTo run it again:\n    {example.script}"


@settings(_SETTINGS, max_examples=60)
@given(examples())
def test_a_batch_is_right_or_refused_for_a_true_reason(example: Example) -> None:
    _require_fine(example)


@settings(_SETTINGS, max_examples=25)
@given(chats())
def test_a_chat_is_right_or_refused_for_a_true_reason(chat: Chat) -> None:
    _require_fine(chat)


def test_a_script_is_the_example() -> None:
    example = Example(family="gemma2", rows=(((1, 3), (0, 2)),), described_by="document ids", steps=("pickle",))
    code = example.script.removeprefix('python -c "').removesuffix('"').replace("print(run(", "same = ((")
    found: dict[str, Any] = {}
    exec(code, found)  # the text of the example
    assert found["same"] == example


# what it found, one of a kind

TWO = (((0, 4), (0, 3)),)


@pytest.mark.parametrize(
    "example",
    [
        # gradient checkpointing turns use_cache off before the masks are made
        *(Example("llama", name, TWO, training="checkpointing") for name in ("eager", "sdpa")),
        Example("gpt2", "sdpa", TWO, training="reentrant checkpointing"),
        # the module that makes these masks makes no cache
        Example("gemma3_vl", "sdpa", TWO),
        # of four planes of positions the first decides the masks
        Example("qwen2_5_vl", "sdpa", TWO, cache="off"),
        # positions and cu_seq_lens that say the same, from the user's code after the input hook
        Example("gpt2", "varlen", TWO, described_by="collator", giver="inner forward", lengths=True),
    ],
    ids=repr,
)
def test_batches_that_were_refused_for_no_reason_are_right(example: Example) -> None:
    verdict = run(example)
    assert verdict.status == "right", verdict.detail


# does it see what is wrong?

PACKED = Example(rows=(((0, 4), (0, 3)),))
FOLLOWED = Chat(turns=(Prompt((6, 6)), Prompt((2, 2))), packed=True)


def test_sound_examples_are_right() -> None:
    assert run(PACKED).status == run(dataclasses.replace(PACKED, training="plain")).status == "right"
    assert run(FOLLOWED).status == "refused"


@fault("a random batch: wrong")
def documents_leak(patch: Patch) -> None:
    patch.setattr("axattn.documents.input_hook.read", lambda *a: (None, tuple(a[2]["input_ids"].shape), False))


def test_documents_that_leak_are_wrong(monkeypatch: Patch) -> None:
    documents_leak(monkeypatch)
    assert run(PACKED).status == "wrong"
    assert run(dataclasses.replace(PACKED, training="plain")).status == "wrong"


@fault("a random chat: wrong")
def a_cache_forgets_its_documents(patch: Patch) -> None:
    patch.setattr("axattn.documents.input_hook.mark_packed", lambda *a: None)


def test_a_cache_that_forgets_its_documents_is_wrong(monkeypatch: Patch) -> None:
    a_cache_forgets_its_documents(monkeypatch)
    assert run(FOLLOWED).status == "wrong"


@fault("a random batch: refused for no reason")
def every_batch_is_refused(patch: Patch) -> None:
    def refuse(*args: Any) -> Any:
        raise UnsupportedAttentionError("no rows", [])

    patch.setattr("axattn.documents.input_hook.InputHook.pre_forward", refuse)


def test_a_needless_refusal_is_untrue(monkeypatch: Patch) -> None:
    every_batch_is_refused(monkeypatch)
    alone = Example(rows=(((0, 4),),), described_by="nothing")
    assert run(alone).status == run(dataclasses.replace(alone, described_by="positions")).status == "untrue refusal"


@fault("a random batch: an error that is not axattn's")
def reading_a_batch_fails(patch: Patch) -> None:
    def fail(*args: Any) -> Any:
        raise KeyError("somewhere")

    patch.setattr("axattn.documents.input_hook.read", fail)


def test_an_error_from_outside_axattn_is_foreign(monkeypatch: Patch) -> None:
    reading_a_batch_fails(monkeypatch)
    assert run(PACKED) == Verdict("foreign error", "KeyError: 'somewhere'")
