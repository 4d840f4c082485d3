from __future__ import annotations

import copy
import pickle
from types import SimpleNamespace

import pytest
import torch

from axattn.patches.patchset import PatchSet


class Thing:
    """An attribute of the class must not be mistaken for one of the object."""

    shared = 1


def test_undo_restores_exact_prior_values_last_first() -> None:
    thing, patches = SimpleNamespace(a=1), PatchSet()
    patches.set_attribute(thing, "a", 2)
    patches.set_attribute(thing, "a", 3)
    patches.set_attribute(thing, "b", 4)
    assert (thing.a, thing.b, len(patches)) == (3, 4, 3)
    patches.undo()
    assert vars(thing) == {"a": 1}
    patches.undo()
    assert vars(thing) == {"a": 1}


def test_an_attribute_of_the_class_is_not_copied_onto_the_object() -> None:
    thing, patches = Thing(), PatchSet()
    patches.set_attribute(thing, "shared", 2)
    patches.undo()
    assert vars(thing) == {}
    assert thing.shared == 1


def test_none_and_absent_are_distinguished() -> None:
    thing, patches = SimpleNamespace(a=None), PatchSet()
    patches.set_attribute(thing, "a", 1)
    patches.undo()
    assert vars(thing) == {"a": None}


def test_a_missing_attribute_can_be_an_error() -> None:
    with pytest.raises(AttributeError, match="no attribute 'b' to patch"):
        PatchSet().set_attribute(SimpleNamespace(), "b", 1, must_exist=True)


def test_handles_and_calls_are_undone_too() -> None:
    module, patches, seen = torch.nn.Linear(1, 1), PatchSet(), []
    patches.add_handle(module.register_forward_hook(lambda *_: None))
    patches.add_undo(seen.append, 1)
    patches.undo()
    assert not module._forward_hooks
    assert seen == [1]


def test_a_block_that_raises_rolls_back_and_one_that_does_not_keeps() -> None:
    thing, patches = SimpleNamespace(a=1), PatchSet()

    def fail() -> None:
        with patches:
            patches.set_attribute(thing, "a", 2)
            raise RuntimeError

    with pytest.raises(RuntimeError):
        fail()
    assert thing.a == 1
    with patches:
        patches.set_attribute(thing, "a", 2)
    assert thing.a == 2


def test_one_failing_undo_does_not_keep_the_others_from_running() -> None:
    thing, patches = SimpleNamespace(a=1), PatchSet()
    patches.set_attribute(thing, "a", 2)
    patches.add_undo(lambda: 1 / 0)
    with pytest.raises(ExceptionGroup) as caught:
        patches.undo()
    assert isinstance(caught.value.exceptions[0], ZeroDivisionError)
    assert thing.a == 1


@pytest.mark.parametrize("clone", [copy.deepcopy, lambda x: pickle.loads(pickle.dumps(x))])
def test_a_copy_undoes_the_copy_only(clone: object) -> None:
    thing, patches = SimpleNamespace(a=1), PatchSet()
    patches.set_attribute(thing, "a", 2)
    patches.set_attribute(thing, "b", 2)
    other, others = clone((thing, patches))  # type: ignore[operator]
    others.undo()
    assert vars(other) == {"a": 1}
    assert vars(thing) == {"a": 2, "b": 2}
