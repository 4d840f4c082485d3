"""Rewrites axolotl YAML to one ``attn_implementation``. Everything else stays byte for byte.

`yaml_nodes` gives the positions of keys, values, anchors and aliases; only these places of the text are edited. The
result is parsed again, and rejected if its meaning is not the intended one.
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
from axattn.tools.axolotl.setting_names import AXOLOTL_KEYS, misspelled_setting
from axattn.tools.axolotl.text_edits import Edits
from axattn.tools.axolotl.yaml_nodes import Problem, UnreadableYamlError, compose

_UNDECODED = re.compile("[\ud800-\udfff]")  # bytes that are not UTF-8, as `surrogateescape` decodes them


@dataclass(frozen=True, slots=True)
class Migration:
    """A file before and after.

    Attributes:
        name: of the file.
        before: its text.
        after: the new text; equal to `before` if there are problems.
        problems: why it was left unchanged.
        notes: remarks for the reader of the diff.
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
        """`name` in printable form."""
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
    """Migrate a YAML text (one document or several).

    Args:
        text: axolotl YAML.
        name: for messages.
    """
    mark = "\ufeff" if text.startswith("\ufeff") else ""
    body = text.removeprefix(mark)
    readable = _UNDECODED.sub("\ufffd", body)  # one character for one, so positions stay valid
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
    """`migrate` for a file; `write` rewrites it unless there are problems.

    Bytes that are not UTF-8 and a byte order mark are kept.

    Raises:
        OSError: the file can't be read or written.
    """
    done = _migrated(path, *_decoded(path))
    if write:
        write_file(done)
    return done


def migrate_found(found: Found) -> Migration | None:
    """`migrate_file` without writing; None for a file from a folder that has no attention settings.

    A file that can't be opened gives a `Migration` with that problem.
    """
    try:
        text, encoding = _decoded(found.path)
    except OSError as error:
        problem = Problem(1, f"can't be read: {error.strerror or error}")
        return Migration(str(found.path), "", "", (problem,))
    if not found.named and not _mentions_attention(text):
        return None
    return _migrated(found.path, text, encoding)


def _migrated(path: Path, text: str, encoding: str) -> Migration:
    done = replace(migrate(text, str(path)), encoding=encoding)
    if done.changed and _UNDECODED.search(text):
        done = replace(done, notes=(*done.notes, "has bytes that are not UTF-8; they are kept"))
    return done


def _decoded(path: Path) -> tuple[str, str]:
    """The text of a file, with its byte order mark, and its encoding; undecodable bytes become surrogates."""
    raw = path.read_bytes()
    encoding = next((name for mark, name in _MARKS if raw.startswith(mark)), "utf-8")
    try:
        return raw.decode(encoding), encoding
    except UnicodeDecodeError:
        return raw.decode("utf-8", "surrogateescape"), "utf-8"


_MARKS = (  # longest first
    (b"\xff\xfe\x00\x00", "utf-32-le"),
    (b"\x00\x00\xfe\xff", "utf-32-be"),
    (b"\xff\xfe", "utf-16-le"),
    (b"\xfe\xff", "utf-16-be"),
)


def write_file(done: Migration) -> None:
    """Write a migrated file back if it has changed.

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
_SKIPPED_FOLDERS = ("node_modules", "site-packages")


@dataclass(frozen=True, slots=True)
class Found:
    """A file to migrate.

    Attributes:
        path: its path.
        named: whether the user named the file, not only its folder.
    """

    path: Path
    named: bool


def find(paths: Sequence[Path], exclude: Sequence[str] = ()) -> list[Found]:
    """The given files, and the YAML files inside the given folders, without repeats.

    Folders whose name starts with a dot, ``node_modules`` and ``site-packages`` are skipped.

    Args:
        paths: files and folders.
        exclude: shell patterns (``*.gen.yml``, ``old``, ``configs/old``) that match names of files and folders, or
            paths as given or relative to a given folder.
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
        folders[:] = [name for name in folders if not name.startswith(".") and name not in _SKIPPED_FOLDERS]
        files += [Path(here, name) for name in names if name.lower().endswith((".yml", ".yaml"))]
    return sorted(files)


def _excluded(file: Path, within: Path, patterns: Sequence[str]) -> bool:
    paths = (file, *file.parents, within, *within.parents)
    candidates = {*within.parts, *(path.as_posix() for path in paths)}
    wanted = [pattern.removeprefix("./").rstrip("/") for pattern in patterns]
    return any(fnmatchcase(one, pattern) for pattern in wanted for one in candidates)


def _mentions_attention(text: str) -> bool:
    """Whether any key, at any depth, is an attention setting or a misspelling of one."""
    known = {*ATTENTION, *AXOLOTL_KEYS}
    keys = set(_KEYS.findall(text))
    return not known.isdisjoint(keys) or any(misspelled_setting(key, ATTENTION) for key in keys)
