"""YAML as nodes with their positions in the text, parsed by PyYAML's safe loader, as in axolotl.

Only `build` constructs values. `compose` also records the position of each alias, which nodes lack.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import yaml
from yaml import MappingNode, Node, ScalarNode, SequenceNode

from axattn.errors import InvalidConfigError, Reason

_TAG = "tag:yaml.org,2002:"
_MERGE = _TAG + "merge"
_KINDS = {_TAG + kind: kind for kind in ("bool", "int", "float", "null", "binary")} | {_TAG + "timestamp": "date"}
_BAD_SCALAR = (ValueError, KeyError, IndexError, AttributeError, OverflowError, yaml.YAMLError)  # what PyYAML raises


@dataclass(frozen=True, slots=True)
class Problem:
    """A problem in a text.

    Attributes:
        line: 1 for the first.
        text: what is wrong, and what to write.
    """

    line: int
    text: str


class UnreadableYamlError(InvalidConfigError):
    """The text is not YAML, or has invalid values or keys; `problems` has the lines."""

    def __init__(self, problems: list[Problem]) -> None:
        self.problems = problems
        reasons = [Reason("yaml", f"line {problem.line}: {problem.text}") for problem in problems]
        super().__init__("the text can't be read as YAML", reasons)


@dataclass(frozen=True, slots=True)
class Alias:
    """An alias as written.

    Attributes:
        target: the node that it refers to.
        start: index of its ``*`` in the text.
        end: index after its last character.
    """

    target: Node
    start: int
    end: int


@dataclass(slots=True)
class Tree:
    """The documents of a text.

    Attributes:
        documents: the root node of each YAML document; an empty one is a null scalar.
        aliases: every alias, in text order.
        values: aliases that are the value of a key, by the ids of mapping and key node.
        keys: ids of mapping and key node of each key that is an alias.
    """

    documents: list[Node] = field(default_factory=list)
    aliases: list[Alias] = field(default_factory=list)
    values: dict[tuple[int, int], Alias] = field(default_factory=dict)
    keys: set[tuple[int, int]] = field(default_factory=set)

    def span(self, mapping: Node, key: Node, value: Node) -> tuple[int, int]:
        """Start and end of the value of `key` in the text: of the alias, or of the value with its anchor."""
        alias = self.values.get((id(mapping), id(key)))
        if alias is not None:
            return alias.start, alias.end
        return value.start_mark.index, value.end_mark.index


class _Loader(yaml.SafeLoader):
    """PyYAML's safe loader that also records the positions of aliases."""

    def __init__(self, text: str) -> None:
        super().__init__(text)
        self.tree = Tree()

    def compose_node(self, parent: Node | None, index: Any) -> Node | None:
        aliased = self.check_event(yaml.AliasEvent)
        event: Any = self.peek_event()  # type: ignore[no-untyped-call]
        node = super().compose_node(parent, index)
        if aliased and node is not None:
            alias = Alias(node, event.start_mark.index, event.end_mark.index)
            self.tree.aliases.append(alias)
            if isinstance(parent, MappingNode) and index is None:
                self.tree.keys.add((id(parent), id(node)))
            elif isinstance(parent, MappingNode):
                self.tree.values[id(parent), id(index)] = alias
        return node


def compose(text: str) -> Tree:
    """The nodes of a text with one or several YAML documents.

    Raises:
        UnreadableYamlError: not YAML, nested too deeply, a duplicate key, or an invalid value (such as a date that does
            not exist).
    """
    try:
        loader = _Loader(text)
        while loader.check_node():
            root = loader.get_node()
            if root is not None:  # guaranteed by `check_node`
                loader.tree.documents.append(root)
    except yaml.reader.ReaderError as error:
        line = text.count("\n", 0, error.position) + 1
        problem = f"the character U+{_code(error.character):04X} is not allowed in YAML; save the file as UTF-8 text"
        raise UnreadableYamlError([Problem(line, problem)]) from error
    except yaml.MarkedYAMLError as error:
        raise UnreadableYamlError([_marked(error)]) from error
    except (yaml.YAMLError, ValueError) as error:  # ValueError: an escape such as "\UFFFFFFFF"
        raise UnreadableYamlError([Problem(1, f"can't be read as YAML: {error}")]) from error
    except RecursionError as error:
        problem = "can't be read as YAML: it is nested too deeply; remove levels of brackets or of indentation"
        raise UnreadableYamlError([Problem(1, problem)]) from error
    problems = [problem for root in loader.tree.documents for problem in _faults(root)]
    if problems:
        raise UnreadableYamlError(sorted(problems, key=lambda problem: problem.line))
    return loader.tree


def build(node: Node) -> Any:
    """The value of a node, constructed by PyYAML's safe loader.

    Raises:
        UnreadableYamlError: an unsafe tag, an unhashable key, or a node that contains itself.
    """
    try:
        return yaml.SafeLoader("").construct_document(node)
    except yaml.MarkedYAMLError as error:
        raise UnreadableYamlError([_marked(error)]) from error
    except RecursionError as error:
        problem = "can't be read as YAML: it is nested too deeply; remove levels of brackets or of indentation"
        raise UnreadableYamlError([Problem(1, problem)]) from error


def own(mapping: MappingNode) -> dict[str, tuple[Node, Node]]:
    """Key and value nodes of a mapping's own string keys, by name."""
    return {key.value: (key, value) for key, value in mapping.value if key.tag == _TAG + "str"}


def merged(mapping: MappingNode) -> dict[str, Node]:
    """Value nodes of the keys that a mapping gets only through ``<<``; the first source wins."""
    found: dict[str, Node] = {}
    todo, visited = _sources(mapping), {id(mapping)}
    while todo:
        source = todo.pop(0)
        if id(source) not in visited:
            visited.add(id(source))
            for name, (_, value) in own(source).items():
                found.setdefault(name, value)
            todo = _sources(source) + todo
    return {name: value for name, value in found.items() if name not in own(mapping)}


def _sources(mapping: MappingNode) -> list[MappingNode]:
    values = [value for key, value in mapping.value if key.tag == _MERGE]
    flat = [inner for value in values for inner in (value.value if isinstance(value, SequenceNode) else [value])]
    return [value for value in flat if isinstance(value, MappingNode)]


def _faults(root: Node) -> Iterator[Problem]:
    """Duplicate keys and invalid scalars; each node is visited once, however often it is aliased."""
    todo, visited = [root], set()
    constructor = yaml.constructor.SafeConstructor()
    while todo:
        node = todo.pop()
        if id(node) in visited:
            continue
        visited.add(id(node))
        if isinstance(node, MappingNode):
            yield from _duplicates(node)
            todo += [part for pair in node.value for part in pair]
        elif isinstance(node, SequenceNode):
            todo += node.value
        elif node.tag in _KINDS:
            try:
                constructor.construct_object(node)
            except _BAD_SCALAR:
                text = f"{_short(node.value)} is not a valid {_KINDS[node.tag]}; quote it if it is text"
                yield Problem(node.start_mark.line + 1, text)


def _duplicates(mapping: MappingNode) -> Iterator[Problem]:
    first: dict[tuple[str, str], int] = {}
    for key, _ in mapping.value:
        if isinstance(key, ScalarNode) and key.tag != _MERGE:
            line = key.start_mark.line + 1
            if (key.tag, key.value) in first:
                other = first[key.tag, key.value]
                text = f"can't be read as YAML: {_short(key.value)} is given twice, in line {other} and here; keep one"
                yield Problem(line, text)
            first.setdefault((key.tag, key.value), line)


def _marked(error: yaml.MarkedYAMLError) -> Problem:
    mark = error.problem_mark or error.context_mark
    text = " ".join(part for part in (error.context, error.problem) if part)
    if "'\\t'" in text:
        text += "; use spaces instead of tabs"
    return Problem(1 if mark is None else mark.line + 1, f"can't be read as YAML: {text}")


def _short(value: str) -> str:
    return value if len(value) <= 40 else value[:40] + "..."


def _code(character: str | int) -> int:
    return character if isinstance(character, int) else ord(character)
