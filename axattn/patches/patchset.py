"""`PatchSet`: a list of changes to objects, undone last in, first out, to the exact prior values."""

from __future__ import annotations

import enum
from collections.abc import Callable, Mapping, Sequence
from typing import Any


class _Absent(enum.Enum):
    """Marks a missing attribute; an enum member keeps its identity in copies and pickles."""

    ABSENT = 0


class PatchSet:
    """Changes made through this object are undone by `undo`, in reverse order. Copyable and picklable with a model.

    Only `set_attribute`, `put_method` and `add_handle` change anything; nothing else in axattn sets attributes on
    foreign objects.
    """

    def __init__(self) -> None:
        self._undo: list[tuple[str, Any, Any, Any]] = []

    def __len__(self) -> int:
        return len(self._undo)

    def set_attribute(self, target: object, name: str, value: Any, *, must_exist: bool = False) -> None:
        """Set an attribute of `target` itself and record the old value.

        Args:
            target: the object.
            name: attribute.
            value: new value.
            must_exist: raise if `target` does not have the attribute.

        Raises:
            AttributeError: `must_exist`, and `target` has no such attribute.
        """
        if must_exist and not hasattr(target, name):
            raise AttributeError(f"{type(target).__name__} has no attribute {name!r} to patch")
        old = vars(target).get(name, _Absent.ABSENT)
        self._undo.append(("attribute", target, name, old))
        setattr(target, name, value)

    def put_method(self, target: object, name: str, value: Any) -> None:
        """As `set_attribute`, but undo keeps a value that another library has set since, as it may call `value`."""
        old = vars(target).get(name, _Absent.ABSENT)
        self._undo.append(("method", target, name, (value, old)))
        setattr(target, name, value)

    def add_handle(self, handle: Any) -> None:
        """Record a handle (of a hook): `undo` calls its ``remove()``."""
        self._undo.append(("handle", handle, None, None))

    def add_undo(self, function: Callable[..., None], *arguments: Any) -> None:
        """Record a change made elsewhere: `undo` calls ``function(*arguments)`` (module-level, so it pickles)."""
        self._undo.append(("call", function, arguments, None))

    def targets(self) -> list[object]:
        """The objects whose attributes were set."""
        return [target for kind, target, _, _ in self._undo if kind == "attribute"]

    def undo(self, copies: Mapping[int, Sequence[object]] | None = None) -> None:
        """Undo everything, last first. Idempotent. If one undo fails, the others still run.

        Args:
            copies: copies of a target that were made since, by its ``id``: an attribute is restored on them too if it
                still equals that of the target.

        Raises:
            ExceptionGroup: with every error.
        """
        errors: list[Exception] = []
        while self._undo:
            kind, target, name, old = self._undo.pop()
            try:
                if kind == "method":
                    value, old = old
                    if vars(target).get(name) is not value:
                        continue
                if kind == "handle":
                    target.remove()
                elif kind == "call":
                    target(*name)
                else:
                    changed = vars(target).get(name, _Absent.ABSENT)
                    alike = [one for one in (copies or {}).get(id(target), ()) if _has(one, name, changed)]
                    for one in (target, *alike):
                        _put_back(one, name, old)
            except Exception as error:  # collected and raised below
                errors.append(error)
        if errors:
            raise ExceptionGroup("some patches could not be undone", errors)

    def __enter__(self) -> PatchSet:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: Any) -> None:
        """Roll back if the block raised; keep the changes otherwise."""
        if kind is not None:
            self.undo()


def _has(target: object, name: str, value: Any) -> bool:
    return bool(vars(target).get(name, _Absent.ABSENT) == value)


def _put_back(target: object, name: str, old: Any) -> None:
    if old is not _Absent.ABSENT:
        setattr(target, name, old)
    elif name in vars(target):
        delattr(target, name)
