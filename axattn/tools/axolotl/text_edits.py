"""Changes to YAML text at the places of its nodes, and what a text means, to compare before and after."""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping
from typing import Any, cast

from yaml import MappingNode, Node, ScalarNode, SequenceNode

from axattn.tools.axolotl.yaml_nodes import Problem, Tree

_BREAKS = "\n\r\x85\u2028\u2029"  # line ends, as PyYAML has them
_LINE_END = re.compile(f"\r\n|[{_BREAKS}]")
_TAIL = re.compile(rf"[ \t]*(?P<comment>#[^{_BREAKS}]*)?(?=[{_BREAKS}]|\Z)")
_TEXT = "tag:yaml.org,2002:str"


class Edits:
    """Changes to one text. Comments and line ends stay; so does what an anchor means to aliases elsewhere.

    Args:
        text: of the file.
        tree: its nodes.

    Attributes:
        spans: start and end in the text, and what comes there.
        refused: keys that are written in a way that only a person can change.
    """

    def __init__(self, text: str, tree: Tree) -> None:
        self.text = text
        self.tree = tree
        self.spans: list[tuple[int, int, str]] = []
        self.refused: list[Problem] = []

    def put(self, mapping: MappingNode, key: Node, value: Node, new: str) -> None:
        """Put `new` in the place of a key and its value, which stand on a line of their own."""
        if self._alone(mapping, key, value):
            self.spans.append((key.start_mark.index, self.tree.span(mapping, key, value)[1], new))

    def drop(self, mapping: MappingNode, key: Node, value: Node) -> None:
        """Take out a key's line; its comment stays."""
        if not self._alone(mapping, key, value):
            return
        start = self._line_start(key.start_mark.index)
        tail = cast("re.Match[str]", _TAIL.match(self.text, self.tree.span(mapping, key, value)[1]))  # as in `_alone`
        if tail["comment"]:
            self.spans.append((start, tail.start("comment"), ""))
        else:
            end = _LINE_END.match(self.text, tail.end())
            self.spans.append((start, tail.end() if end is None else end.end(), ""))

    def value(self, mapping: MappingNode, key: Node, value: Node, new: str) -> None:
        """Put `new` in the place of a scalar value, in the same quotes."""
        start, end = self.tree.span(mapping, key, value)
        quote = value.style if isinstance(value, ScalarNode) and self.text[start] != "*" else None
        if quote in ("|", ">"):
            self._refuse(key, "a name in block form")
        else:
            self.spans.append((start, end, f"{quote or ''}{new}{quote or ''}"))

    def applied(self, text: str | None = None) -> str:
        """The new text.

        Args:
            text: what to change in the place of the text itself; of the same length.
        """
        text = self.text if text is None else text
        parts, at = [], 0
        for start, end, new in sorted([*self.spans, *self._moved(text)]):
            parts += [text[at:start], new]
            at = end
        return "".join([*parts, text[at:]])

    def _moved(self, text: str) -> list[tuple[int, int, str]]:
        """Anchors that are edited away and still used: the first alias that stays becomes the anchored value."""
        moved: dict[int, tuple[int, int, str]] = {}
        for alias in self.tree.aliases:
            start, end = alias.target.start_mark.index, alias.target.end_mark.index
            if self._edited(start) and not self._edited(alias.start):
                moved.setdefault(id(alias.target), (alias.start, alias.end, text[start:end]))
        return list(moved.values())

    def _edited(self, index: int) -> bool:
        return any(start <= index < end for start, end, _ in self.spans)

    def _alone(self, mapping: MappingNode, key: Node, value: Node) -> bool:
        """Whether a key and its value have one line to themselves; noted where not."""
        start, end = key.start_mark.index, self.tree.span(mapping, key, value)[1]
        alone = (
            not mapping.flow_style
            and (id(mapping), id(key)) not in self.tree.keys
            and isinstance(value, ScalarNode)
            and not self.text[self._line_start(start) : start].strip(" ")
            and not any(character in _BREAKS for character in self.text[start:end])
            and _TAIL.match(self.text, end) is not None
        )
        if not alone:
            self._refuse(key, f"{key.value} is not written as `{key.value}: value` on a line of its own")
        return alone

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
    """What a document means, comparable within one process, whatever its anchors, its layout and the order of its keys.

    Args:
        root: of the document.
        key: the key that is edited.
        dropped: keys to leave out.
        renamed: texts in the place of scalars below `key`, by the ids of mapping and key node.
        name: the value that `key` is given.
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
    """A number for what a node means; each node is read once, also one that contains itself."""
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
