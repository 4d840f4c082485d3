"""Edits YAML text at the positions of its nodes, and computes its meaning, to compare before and after."""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping
from typing import Any, cast

from yaml import MappingNode, Node, ScalarNode, SequenceNode

from axattn.tools.axolotl.yaml_nodes import Problem, Tree

_BREAKS = "\n\r\x85\u2028\u2029"  # PyYAML's line ends
_LINE_END = re.compile(f"\r\n|[{_BREAKS}]")
_TAIL = re.compile(rf"[ \t]*(?P<comment>#[^{_BREAKS}]*)?(?=[{_BREAKS}]|\Z)")
_TEXT = "tag:yaml.org,2002:str"


class Edits:
    """Edits of one text. Comments and line ends are kept, and aliases keep the value of an edited anchor.

    Args:
        text: of the file.
        tree: its nodes.

    Attributes:
        spans: start, end and replacement of each edit.
        refused: keys whose layout must be changed by hand.
    """

    def __init__(self, text: str, tree: Tree) -> None:
        self.text = text
        self.tree = tree
        self.spans: list[tuple[int, int, str]] = []
        self.refused: list[Problem] = []

    def put(self, mapping: MappingNode, key: Node, value: Node, new: str) -> None:
        """Replace a key and its value, which must be on their own line."""
        if self._on_own_line(mapping, key, value):
            self.spans.append((key.start_mark.index, self.tree.span(mapping, key, value)[1], new))

    def drop(self, mapping: MappingNode, key: Node, value: Node) -> None:
        """Remove a key's line but keep its comment."""
        if not self._on_own_line(mapping, key, value):
            return
        start = self._line_start(key.start_mark.index)
        tail = cast(
            "re.Match[str]", _TAIL.match(self.text, self.tree.span(mapping, key, value)[1])
        )  # as in `_on_own_line`
        if tail["comment"]:
            self.spans.append((start, tail.start("comment"), ""))
        else:
            end = _LINE_END.match(self.text, tail.end())
            self.spans.append((start, tail.end() if end is None else end.end(), ""))

    def value(self, mapping: MappingNode, key: Node, value: Node, new: str) -> None:
        """Replace a scalar value, keeping its quotes."""
        start, end = self.tree.span(mapping, key, value)
        quote = value.style if isinstance(value, ScalarNode) and self.text[start] != "*" else None
        if quote in ("|", ">"):
            self._refuse(key, "the name is a block scalar")
        else:
            self.spans.append((start, end, f"{quote or ''}{new}{quote or ''}"))

    def applied(self, text: str | None = None) -> str:
        """The new text.

        Args:
            text: a text of the same length to edit instead.
        """
        text = self.text if text is None else text
        parts, at = [], 0
        for start, end, new in sorted([*self.spans, *self._moved(text)]):
            parts += [text[at:start], new]
            at = end
        return "".join([*parts, text[at:]])

    def _moved(self, text: str) -> list[tuple[int, int, str]]:
        """Edits for removed anchors that are still used: the first remaining alias becomes the anchored value."""
        moved: dict[int, tuple[int, int, str]] = {}
        for alias in self.tree.aliases:
            start, end = alias.target.start_mark.index, alias.target.end_mark.index
            if self._edited(start) and not self._edited(alias.start):
                moved.setdefault(id(alias.target), (alias.start, alias.end, text[start:end]))
        return list(moved.values())

    def _edited(self, index: int) -> bool:
        return any(start <= index < end for start, end, _ in self.spans)

    def _on_own_line(self, mapping: MappingNode, key: Node, value: Node) -> bool:
        """Whether a key and its value are on one line of their own; if not, it is refused."""
        start, end = key.start_mark.index, self.tree.span(mapping, key, value)[1]
        own_line = (
            not mapping.flow_style
            and (id(mapping), id(key)) not in self.tree.keys
            and isinstance(value, ScalarNode)
            and not self.text[self._line_start(start) : start].strip(" ")
            and not any(character in _BREAKS for character in self.text[start:end])
            and _TAIL.match(self.text, end) is not None
        )
        if not own_line:
            self._refuse(key, f"{key.value} is not written as `{key.value}: value` on its own line")
        return own_line

    def _refuse(self, node: Node, text: str) -> None:
        self.refused.append(Problem(node.start_mark.line + 1, f"{text}; change it by hand"))

    def _line_start(self, index: int) -> int:
        while index and self.text[index - 1] not in _BREAKS:
            index -= 1
        return index


def meaning(
    root: Node | None,
    key: str = "",
    dropped: Collection[str] = (),
    renamed: Mapping[tuple[int, int], str] | None = None,
    name: str | None = None,
) -> Any:
    """The meaning of a document, independent of anchors, layout and key order; comparable within one process.

    Args:
        root: of the document.
        key: the edited key.
        dropped: keys to omit.
        renamed: replacements of scalars below `key`, by the ids of mapping and key node.
        name: the new value of `key`.
    """
    if root is None or (isinstance(root, ScalarNode) and root.tag.endswith(":null")):
        return ()
    memo: dict[int, int] = {}
    if not isinstance(root, MappingNode):
        return (_digest(root, memo, {}),)
    pairs = [] if name is None else [(hash((_TEXT, key)), hash((_TEXT, name)))]
    for inner, value in root.value:
        if inner.value == key and renamed:
            found = renamed.get((id(root), id(inner)))
            digest = _digest(value, {}, renamed) if found is None else hash((_TEXT, found))
            pairs.append((_digest(inner, memo, {}), digest))
        elif not isinstance(inner, ScalarNode) or inner.value not in dropped:
            pairs.append((_digest(inner, memo, {}), _digest(value, memo, {})))
    return tuple(sorted(pairs))


def _digest(node: Node, memo: dict[int, int], renamed: Mapping[tuple[int, int], str]) -> int:
    """A hash of a node's meaning; each node is visited once, even if it contains itself."""
    if id(node) in memo:
        return memo[id(node)]
    memo[id(node)] = 0
    parts: list[Any]
    if isinstance(node, MappingNode):
        parts = []
        for key, value in node.value:
            new = renamed.get((id(node), id(key)))
            parts.append(
                (_digest(key, memo, renamed), _digest(value, memo, renamed) if new is None else hash((_TEXT, new)))
            )
    else:
        parts = (
            [_digest(inner, memo, renamed) for inner in node.value] if isinstance(node, SequenceNode) else [node.value]
        )
    memo[id(node)] = hash((node.tag, *parts))
    return memo[id(node)]
