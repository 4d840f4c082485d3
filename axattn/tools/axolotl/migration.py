"""Rewrites axolotl YAML to one ``attn_implementation``. What is not about attention stays byte for byte.

`yaml_nodes` says where keys, values, anchors and aliases stand; the text is changed there and nowhere else. What comes
out is read again: a text whose meaning is not the one intended is never handed back.
"""

from __future__ import annotations

import difflib
import os
import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

from yaml import MappingNode

from axattn.tools.axolotl.migration_rules import ATTENTION, Work, rewrite
from axattn.tools.axolotl.setting_names import AXOLOTL_KEYS, meant
from axattn.tools.axolotl.text_edits import Edits
from axattn.tools.axolotl.yaml_nodes import Problem, UnreadableYamlError, compose

_UNDECODED = re.compile("[\ud800-\udfff]")  # bytes that are no UTF-8, as `surrogateescape` reads them


@dataclass(frozen=True, slots=True)
class Migration:
    """A file before and after.

    Attributes:
        name: of the file.
        before: its text.
        after: the new text; that of `before` when there are problems.
        problems: why it was left alone.
        notes: what a reader of the diff should know.
        encoding: of the file.
    """

    name: str
    before: str
    after: str
    problems: tuple[Problem, ...] = ()
    notes: tuple[str, ...] = ()
    encoding: str = "utf-8"

    @property
    def changed(self) -> bool:
        """Whether there is anything to write."""
        return self.before != self.after

    @property
    def shown(self) -> str:
        """`name` as it can be printed."""
        return _printable(self.name)

    def diff(self) -> str:
        """A unified diff, ``""`` when nothing changes."""
        before, after = (_printable(re.sub(r"\r\n?", "\n", text)) for text in (self.before, self.after))
        lines = difflib.unified_diff(_lines(before), _lines(after), self.shown, self.shown)
        return "".join(line if line.endswith("\n") else f"{line}\n\\ No newline at end of file\n" for line in lines)

    def to_dict(self) -> dict[str, Any]:
        """A JSON-ready description."""
        return {
            "file": self.shown,
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
    mark = "\ufeff" if text.startswith("\ufeff") else ""
    body = text.removeprefix(mark)
    readable = _UNDECODED.sub("\ufffd", body)  # character for character
    try:
        tree = compose(readable)
        work = Work(tree, Edits(readable, tree))
        for root in tree.documents:
            if isinstance(root, MappingNode):
                rewrite(root, work)
        if not work.problems and work.edits.spans:
            work.check()
    except UnreadableYamlError as error:
        return Migration(name, text, text, tuple(error.problems))
    if work.problems:
        return Migration(name, text, text, tuple(sorted(work.problems, key=lambda problem: problem.line)))
    return Migration(name, text, mark + work.edits.applied(body), notes=tuple(dict.fromkeys(work.notes)))


def migrate_file(path: Path, *, write: bool = False) -> Migration:
    """`migrate` for a file; with `write` the file is rewritten, unless there are problems.

    Bytes that are not UTF-8 stay as they are, and so does a byte order mark.

    Raises:
        OSError: the file can't be read or written.
    """
    done = _migrated(path, *_decoded(path))
    if write:
        write_file(done)
    return done


def look_at(found: Found) -> Migration | None:
    """`migrate_file` without writing; None for a file in a folder that says nothing of attention.

    A file that can't be opened is a `Migration` with that problem.
    """
    try:
        text, encoding = _decoded(found.path)
    except OSError as error:
        problem = Problem(1, f"can't be read: {error.strerror or error}")
        return Migration(str(found.path), "", "", (problem,))
    if not found.named and not _speaks_of_attention(text):
        return None
    return _migrated(found.path, text, encoding)


def _migrated(path: Path, text: str, encoding: str) -> Migration:
    done = replace(migrate(text, str(path)), encoding=encoding)
    if done.changed and _UNDECODED.search(text):
        done = replace(done, notes=(*done.notes, "is not UTF-8 throughout; those bytes stay as they are"))
    return done


def _decoded(path: Path) -> tuple[str, str]:
    """The text of a file, its byte order mark included, and its encoding; bytes that are no text become surrogates."""
    raw = path.read_bytes()
    encoding = next((name for mark, name in _MARKS if raw.startswith(mark)), "utf-8")
    try:
        return raw.decode(encoding), encoding
    except UnicodeDecodeError:
        return raw.decode("utf-8", "surrogateescape"), "utf-8"


_MARKS = (  # the longer ones first
    (b"\xff\xfe\x00\x00", "utf-32-le"),
    (b"\x00\x00\xfe\xff", "utf-32-be"),
    (b"\xff\xfe", "utf-16-le"),
    (b"\xfe\xff", "utf-16-be"),
)


def write_file(done: Migration) -> None:
    """Write what `migrate_file` made of a file back to it, if that is another text.

    Raises:
        OSError: the file can't be written.
    """
    if done.changed:
        Path(done.name).write_bytes(done.after.encode(done.encoding, "surrogateescape"))


def _lines(text: str) -> list[str]:
    return re.findall(r"[^\n]*\n|[^\n]+", text)


def _printable(text: str) -> str:
    return _UNDECODED.sub("\ufffd", text)


# ---- which files -----------------------------------------------------------------------------------------------------

_KEYS = re.compile(r"""([\w-]+)["']?[ \t]*:(?:\s|$)""")
_NOT_OURS = ("node_modules", "site-packages")


@dataclass(frozen=True, slots=True)
class Found:
    """A file to look at.

    Attributes:
        path: of it.
        named: whether it was named itself, not found in a folder.
    """

    path: Path
    named: bool


def find(paths: Sequence[Path], exclude: Sequence[str] = ()) -> list[Found]:
    """The files themselves, and the YAML files inside folders, each once.

    Folders whose name starts with a dot, ``node_modules`` and ``site-packages`` are passed over.

    Args:
        paths: files and folders.
        exclude: shell patterns (``*.gen.yml``, ``old``, ``configs/old``) of names of files and folders, or of paths, as
            given or within a folder that is given.
    """
    found: dict[Path, Found] = {}
    for path in paths:
        inside = _yaml_files(path) if path.is_dir() else [path]
        for file in inside:
            within = file.relative_to(path) if path.is_dir() else file
            if not _excluded(file, within, exclude):
                found.setdefault(file.resolve(), Found(file, file is path))
    return list(found.values())


def _yaml_files(folder: Path) -> list[Path]:
    files: list[Path] = []
    for here, folders, names in os.walk(folder):
        folders[:] = [name for name in folders if not name.startswith(".") and name not in _NOT_OURS]
        files += [Path(here, name) for name in names if name.lower().endswith((".yml", ".yaml"))]
    return sorted(files)


def _excluded(file: Path, within: Path, patterns: Sequence[str]) -> bool:
    paths = (file, *file.parents, within, *within.parents)
    candidates = {*within.parts, *(path.as_posix() for path in paths)}
    wanted = [pattern.removeprefix("./").rstrip("/") for pattern in patterns]
    return any(fnmatchcase(one, pattern) for pattern in wanted for one in candidates)


def _speaks_of_attention(text: str) -> bool:
    """Whether any key, at whatever depth, is about attention or misspells one that is."""
    known = {*ATTENTION, *AXOLOTL_KEYS}
    keys = set(_KEYS.findall(text))
    return not known.isdisjoint(keys) or any(meant(key, ATTENTION) for key in keys)
