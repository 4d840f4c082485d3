"""Rewrites axolotl YAML to one ``attn_implementation``. Lines that are not about attention stay byte for byte.

ruamel.yaml reads the file and says where each key stands; the text itself is changed line by line, so that comments,
order, anchors, quoting and line ends are those of the file.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from axattn import names
from axattn.errors import UnknownAttentionError

HYBRID = "gemma4_hybrid_attn_impl"
_TRUE, _FALSE = ("true", "yes", "on", "y"), ("false", "no", "off", "n", "null", "~", "")
_LINE = re.compile(
    r"^(?P<key>(?P<quote>[\"']?)(?P<name>\w+)(?P=quote)\s*:)(?P<space>\s*)(?P<value>.*?)(?P<tail>\s*(?:\s#.*)?)$"
)


@dataclass(frozen=True, slots=True)
class Problem:
    """What stands in the way of rewriting a file.

    Attributes:
        line: 1 for the first.
        text: what is wrong, and what to write.
    """

    line: int
    text: str


@dataclass(frozen=True, slots=True)
class Migration:
    """A file before and after.

    Attributes:
        name: of the file.
        before: its text.
        after: the new text; that of `before` when there are problems.
        problems: why it was left alone.
        notes: what a reader of the diff should know.
    """

    name: str
    before: str
    after: str
    problems: tuple[Problem, ...] = ()
    notes: tuple[str, ...] = ()

    @property
    def changed(self) -> bool:
        """Whether there is anything to write."""
        return self.before != self.after

    def diff(self) -> str:
        """A unified diff, ``""`` when nothing changes."""
        before, after = (text.replace("\r", "").splitlines(keepends=True) for text in (self.before, self.after))
        return "".join(difflib.unified_diff(before, after, self.name, self.name))

    def to_dict(self) -> dict[str, Any]:
        """A JSON-ready description."""
        return {
            "file": self.name,
            "changed": self.changed,
            "diff": self.diff(),
            "problems": [{"line": problem.line, "text": problem.text} for problem in self.problems],
            "notes": list(self.notes),
        }


def migrate(text: str, name: str = "<text>") -> Migration:
    """The new form of a YAML text (one document or several).

    Args:
        text: axolotl YAML.
        name: for messages.
    """
    from ruamel.yaml import YAML
    from ruamel.yaml.error import MarkedYAMLError, YAMLError

    yaml = YAML(typ="rt")
    yaml.preserve_quotes = True
    try:
        documents = list(yaml.load_all(text))
    except MarkedYAMLError as error:
        mark = error.problem_mark
        line = 1 if mark is None else mark.line + 1
        return Migration(name, text, text, (Problem(line, f"can't be read as YAML: {error.problem}"),))
    except YAMLError as error:
        return Migration(name, text, text, (Problem(1, f"can't be read as YAML: {error}"),))
    lines = text.splitlines(keepends=True)
    edits: dict[int, str | None] = {}
    problems: list[Problem] = []
    notes: list[str] = []
    for document in documents:
        if isinstance(document, Mapping):
            _document(document, lines, edits, problems, notes)
    if problems:
        return Migration(name, text, text, tuple(sorted(problems, key=lambda p: p.line)))
    kept = (edits.get(number, line) for number, line in enumerate(lines))
    return Migration(name, text, "".join(line for line in kept if line is not None), notes=tuple(notes))


def migrate_file(path: Path, *, write: bool = False) -> Migration:
    """`migrate` for a file; with `write` the file is rewritten, unless there are problems.

    Files that are not UTF-8 are read byte by byte and keep their bytes; a byte order mark stays.

    Raises:
        OSError: the file can't be read or written.
    """
    raw = path.read_bytes()
    encoding = "utf-16" if raw[:2] in (b"\xff\xfe", b"\xfe\xff") else "utf-8"
    try:
        text = raw.decode(encoding)
    except UnicodeDecodeError:
        encoding, text = "latin-1", raw.decode("latin-1")
    mark = "\ufeff" if text.startswith("\ufeff") else ""
    done = migrate(text.removeprefix(mark), str(path))
    if write and done.changed:
        path.write_bytes((mark + done.after).encode(encoding))
    return done


def _document(
    document: Any, lines: list[str], edits: dict[int, str | None], problems: list[Problem], notes: list[str]
) -> None:
    found = {key: document[key] for key in (*names.LEGACY_FLAGS, HYBRID) if key in document}
    inherited = [key for key in found if key not in document.lc.data]
    for key in inherited:
        text = f"{key} comes through a merge key (<<); write attn_implementation here and take it out there"
        problems.append(Problem(document.lc.line + 1, text))
        del found[key]
    asked = document.get("attn_implementation")
    states = {key: _truth(value) for key, value in found.items()}
    for key, state in states.items():
        if state is None:
            better = names.LEGACY_FLAGS.get(key, "flash_attention_2")
            text = f"{key} is {found[key]!r}, not true or false; write attn_implementation: {better}"
            problems.append(Problem(document.lc.key(key)[0] + 1, text))
    true = [key for key in names.LEGACY_FLAGS if states.get(key)]
    target = names.LEGACY_FLAGS[true[0]] if true else None
    if true and asked is not None:
        text = f"{', '.join(true)} and attn_implementation: {asked} are both given; keep one"
        problems.append(Problem(document.lc.key(true[0])[0] + 1, text))
        return
    if asked is not None:
        _names(document, asked, "attn_implementation", lines, edits, problems)
    hybrid = bool(states.get(HYBRID))
    if hybrid:
        current = target or (names.SHORT_FORMS.get(str(asked), str(asked)) if asked is not None else None)
        if current not in (None, "flash_attention_2"):
            line = document.lc.key(HYBRID)[0] + 1
            problems.append(Problem(line, f"{HYBRID} works with flash_attention_2 only, and {current} is given"))
            return
    if len(true) > 1:
        notes.append(f"{', '.join(true)} were all true; {true[0]} is the one that counted")
    written = asked is not None
    for key in found:
        where = document.lc.key(key)[0]
        if key in true[:1]:
            _replace(where, key, f"attn_implementation: {target}", lines, edits, problems)
            written = True
        elif key != HYBRID:
            _replace(where, key, None, lines, edits, problems)
    if HYBRID in found:
        where = document.lc.key(HYBRID)[0]
        new = None
        if hybrid:
            new = (
                "on_unsupported: route" if written else "attn_implementation: flash_attention_2\non_unsupported: route"
            )
            if "on_unsupported" in document:
                text = f"{HYBRID} and on_unsupported are both given; keep on_unsupported"
                problems.append(Problem(where + 1, text))
        _replace(where, HYBRID, new, lines, edits, problems)


def _truth(value: Any) -> bool | None:
    """True or false as YAML 1.1 has it (axolotl reads that), None for anything else."""
    from ruamel.yaml.scalarbool import ScalarBoolean

    if isinstance(value, ScalarBoolean):  # one with an anchor
        return bool(value)
    text = "" if value is None else str(value).strip().lower()
    return True if text in _TRUE else False if text in _FALSE else None


def _replace(
    where: int, key: str, new: str | None, lines: list[str], edits: dict[int, str | None], problems: list[Problem]
) -> None:
    """Put `new` in the place of a key's line (None: take it out), keeping its comment and line end."""
    body = lines[where].rstrip("\r\n")
    end = lines[where][len(body) :]
    match = _LINE.match(body)
    if match is None or match["name"] != key or match["value"] == "":
        alone = match is not None and match["name"] == key and match["value"] == "" and new is None
        if not alone:
            problems.append(
                Problem(where + 1, f"{key} is not written as `{key}: value` on a line of its own; change it by hand")
            )
            return
    assert match is not None
    tail = match["tail"]
    if new is None:
        edits[where] = tail.lstrip() + end if tail.strip() else None
    else:
        edits[where] = new.replace("\n", end or "\n") + tail + end


def _names(
    mapping: Any, value: Any, key: str, lines: list[str], edits: dict[int, str | None], problems: list[Problem]
) -> None:
    """Short forms in a name, or in a dict of names, become canonical ones in place."""
    if isinstance(value, Mapping):
        for inner in value:
            _names(value, value[inner], inner, lines, edits, problems)
        return
    row, column = mapping.lc.value(key)
    try:
        names.canonicalise(str(value))
    except UnknownAttentionError as error:
        wanted = _canonical(str(value))
        if wanted is None:
            problems.append(Problem(row + 1, str(error)))
            return
        line = edits.get(row) or lines[row]
        start = line.find(str(value), min(column, len(line)) if row not in edits else 0)
        if start < 0:
            problems.append(Problem(row + 1, f"write {wanted} in the place of {value} by hand"))
            return
        edits[row] = line[:start] + wanted + line[start + len(str(value)) :]


def _canonical(name: str) -> str | None:
    key = name.strip().lower().replace("-", "_").replace(" ", "_")
    return names.SHORT_FORMS.get(key, key if key in names.CANONICAL else None)


def files(paths: list[Path]) -> Iterator[Path]:
    """The files themselves, and the YAML files inside folders."""
    for path in paths:
        if path.is_dir():
            yield from sorted(p for p in path.rglob("*") if p.suffix in (".yml", ".yaml") and p.is_file())
        else:
            yield path
