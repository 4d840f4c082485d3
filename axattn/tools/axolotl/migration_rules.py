"""Rules for the attention settings of a YAML document: legacy booleans, short forms, axolotl's own settings."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from yaml import MappingNode, Node, ScalarNode

from axattn.errors import UnknownAttentionError
from axattn.spec import names
from axattn.tools.axolotl.setting_names import AXOLOTL_KEYS, COMPUTED, HYBRID, misspelled_setting
from axattn.tools.axolotl.text_edits import Edits, meaning
from axattn.tools.axolotl.yaml_nodes import Problem, Tree, UnreadableYamlError, compose, merged, own

KEY = "attn_implementation"
ATTENTION = (KEY, *names.LEGACY_FLAGS, HYBRID)
_TRUE, _FALSE = ("true", "yes", "on", "y"), ("false", "no", "off", "n", "null", "~", "")


@dataclass(slots=True)
class Work:
    """The state of a text while it is rewritten.

    Attributes:
        wanted: the intended meaning of each edited document, by the id of its root node.
    """

    tree: Tree
    edits: Edits
    problems: list[Problem] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    wanted: dict[int, Any] = field(default_factory=dict)

    def problem(self, node: Node, text: str) -> None:
        """Add a problem at the line of `node`."""
        self.problems.append(Problem(node.start_mark.line + 1, text))

    def check(self) -> None:
        """Parse the new text and compare its meaning with the intended one."""
        wanted = [self.wanted.get(id(root), meaning(root)) for root in self.tree.documents]
        try:
            found: list[Any] | None = [meaning(root) for root in compose(self.edits.applied()).documents]
        except UnreadableYamlError:
            found = None
        if found != wanted and (found, wanted) != ([], [meaning(None)]):
            line = min(self.edits.spans)[0]
            text = "anchors and aliases (&, *) or the layout prevent a rewrite here; change it by hand"
            self.problems.append(Problem(self.edits.text.count("\n", 0, line) + 1, text))


def rewrite(root: MappingNode, work: Work) -> None:
    """Collect the edits, notes and problems of a document.

    Args:
        root: of the document.
        work: of its text; receives the results.
    """
    mine, through = own(root), merged(root)
    for name, (key, value) in mine.items():
        intended = misspelled_setting(name, ATTENTION)
        if intended is not None and _fits(intended, value):
            work.problem(key, f"{name} is not a setting; did you mean {intended}?")
    for name in names.LEGACY_FLAGS:
        if name in through or (name in mine and _merged_too(root, name)):
            key = next(key for key, _ in root.value if key.tag.endswith(":merge"))
            text = f"{name} comes from a merge key (<<); write attn_implementation here and remove it there"
            work.problem(key, text)
            mine.pop(name, None)
    states = {}
    for name in names.LEGACY_FLAGS:
        if name in mine:
            key, value = mine[name]
            states[name] = _truth(value)
            if states[name] is None:
                better = names.LEGACY_FLAGS[name]
                work.problem(
                    key, f"{name} is {_as_text(value)}, not true or false; write attn_implementation: {better}"
                )
    true = [name for name in names.LEGACY_FLAGS if states.get(name)]
    asked = mine[KEY][1] if KEY in mine else through.get(KEY)
    if asked is not None and _empty(asked, bool(true)):
        asked = None
    if true and asked is not None:
        both = f"{', '.join(true)} and attn_implementation: {_as_text(asked)} are both given; keep one"
        work.problem(mine[true[0]][0], both)
        return
    target = names.LEGACY_FLAGS[true[0]] if true else None
    renamed: dict[tuple[int, int], str] = {}
    if asked is not None:
        _rename(root, KEY, mine.get(KEY), asked, work, renamed)
    _add_notes(mine, through, target, asked, work)
    if len(true) > 1:
        work.notes.append(f"{', '.join(true)} were all true; {true[0]} took precedence")
    if work.problems:
        return
    dropped = set(states)
    place = KEY if KEY in mine else true[0] if true else None
    for name in states:
        if name != place or target is None:
            work.edits.drop(root, *mine[name])
    if target is not None and place is not None:
        work.edits.put(root, *mine[place], f"{KEY}: {target}")
        dropped.add(KEY)
    work.problems += work.edits.refused
    if dropped or renamed:
        work.wanted[id(root)] = meaning(root, KEY, dropped, renamed, target)


def _rename(
    mapping: MappingNode,
    name: str,
    pair: tuple[Node, Node] | None,
    value: Node,
    work: Work,
    renamed: dict[tuple[int, int], str],
) -> None:
    """Replace short forms in a name, or in a dict of names, by canonical ones."""
    if isinstance(value, MappingNode):
        for key, inner in value.value:
            _rename(value, key.value, (key, inner), inner, work, renamed)
        return
    where = value if pair is None else pair[0]
    if not isinstance(value, ScalarNode):
        work.problem(where, f"{name} is a list; write one name, or a mapping of names")
        return
    try:
        names.canonicalise(value.value)
    except UnknownAttentionError as error:
        wanted = _canonical(value.value)
        if wanted is None:
            work.problem(where, str(error))
        elif pair is None:
            work.problem(where, f"{name} comes from a merge key (<<); write {name}: {wanted} there by hand")
        else:
            work.edits.value(mapping, *pair, wanted)
            renamed[id(mapping), id(pair[0])] = wanted


def _add_notes(
    mine: Mapping[str, tuple[Node, Node]],
    through: Mapping[str, Node],
    target: str | None,
    asked: Node | None,
    work: Work,
) -> None:
    """Add notes on settings that stay, and problems with those that contradict the name."""
    present = {name: value for name, (_, value) in mine.items()} | dict(through)
    live = [name for name in AXOLOTL_KEYS if name in present and not _empty(present[name], True)]
    if live:
        work.notes.append(f"left unchanged, because axolotl reads them: {', '.join(live)}")
    for name in COMPUTED:
        if name in present:
            work.notes.append(f"{name} is computed from {KEY}, and axattn.AttentionConfig refuses it; remove it")
    if HYBRID not in live or _truth(present[HYBRID]) is False:
        return
    current = target
    if isinstance(asked, ScalarNode):
        current = _canonical(asked.value) or asked.value
    elif asked is not None:
        current = "a mapping of names"
    if current not in (None, "flash_attention_2"):
        node = mine[HYBRID][0] if HYBRID in mine else present[HYBRID]
        work.problem(node, f"{HYBRID} works with flash_attention_2 only, and {current} is given; keep one of the two")
    else:
        work.notes.append(f"axattn's form of {HYBRID} is {KEY}: flash_attention_2 with on_unsupported: route")


def _merged_too(root: MappingNode, name: str) -> bool:
    """Whether `name` would come through ``<<`` if it were not a key of the mapping."""
    others = [(key, value) for key, value in root.value if key.value != name]
    return name in merged(MappingNode(root.tag, others))


def _fits(wanted: str, value: Node) -> bool:
    """Whether a value has the type of a setting, so that another program's key does not count as a misspelling."""
    return wanted == KEY or _truth(value) is not None


def _truth(value: Node) -> bool | None:
    """True or false in YAML 1.1 (as axolotl reads it), None for anything else."""
    text = value.value.strip().lower() if isinstance(value, ScalarNode) else "?"
    return True if text in _TRUE else False if text in _FALSE else None


def _empty(value: Node, or_text: bool) -> bool:
    """Whether a value is null, or with `or_text` the empty string (not a name for axolotl either)."""
    return isinstance(value, ScalarNode) and (value.tag.endswith(":null") or (or_text and value.value == ""))


def _as_text(value: Node) -> str:
    if isinstance(value, ScalarNode):
        return str(value.value)
    return "a mapping" if isinstance(value, MappingNode) else "a list"


def _canonical(name: str) -> str | None:
    key = name.strip().lower().replace("-", "_").replace(" ", "_")
    return names.SHORT_FORMS.get(key, key if key in names.CANONICAL else None)
