"""`Watched`: whether the attributes and registrations that a check has read are still the same objects."""

from __future__ import annotations

from collections.abc import Iterable
from itertools import chain
from operator import is_
from typing import Any

Entry = tuple[dict[Any, Any], Any]
"""A dictionary (``vars()`` of a module or config, a registry) and a key, which it may lack."""


class Watched:
    """Dictionaries and single entries of others, with the values that they have now. No copies of any value.

    `unchanged` runs in C: a check before every forward that calls a Python function for each of its conditions costs
    more than the attention of a short row.

    Args:
        whole: dictionaries of which every value counts.
        entries: single entries.
    """

    __slots__ = ("_dictionaries", "_held", "_keys", "_values", "_whole")

    def __init__(self, whole: Iterable[dict[Any, Any]], entries: Iterable[Entry]) -> None:
        self._whole = [*whole]
        self._held: list[Any] = [*chain.from_iterable(map(dict.values, self._whole))]
        entries = [*entries]
        self._dictionaries = [dictionary for dictionary, _ in entries]
        self._keys = [key for _, key in entries]
        self._values = [*map(dict.get, self._dictionaries, self._keys)]

    def unchanged(self) -> bool:
        """Whether every value is the object that it was."""
        return [*chain.from_iterable(map(dict.values, self._whole))] == self._held and all(
            map(is_, map(dict.get, self._dictionaries, self._keys), self._values)
        )
