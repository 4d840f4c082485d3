"""What the site adds to docs/*.md: pages of the repository's root, tables with a search box, links, checks.

Run by MkDocs (``hooks`` in mkdocs.yml). Imports no axattn: the site is built in an environment without torch.
"""

from __future__ import annotations

import json
import logging
import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import griffe
from mkdocs.structure.files import File

from website import addresses, tables
from website.addresses import FROM_ROOT, ROOT

DOCS = ROOT / "docs"
LOG = logging.getLogger("mkdocs.hooks.axattn")


def on_config(config: Any) -> Any:
    """Take the address of the repository from pyproject.toml; report public names without a docstring."""
    config.repo_url = addresses.repository()
    for name in undocumented():
        LOG.warning("%s has no docstring", name)
    return config


def on_files(files: Any, config: Any) -> Any:
    """Add the pages of the root, the data of the tables, and their script and style."""
    for name, page in FROM_ROOT.items():
        files.append(File.generated(config, page, abs_src_path=str(ROOT / name)))
    for name in ("tables.js", "site.css"):
        files.append(File.generated(config, f"assets/{name}", abs_src_path=str(ROOT / "website" / name)))
    for name, made in (("models", tables.models), ("conformance", tables.conformance)):
        files.append(File.generated(config, f"assets/{name}.json", content=json.dumps(made(DOCS))))
        files.remove(files.get_file_from_path(f"{name}.json"))  # the records, which only the tables are made of
    return files


def on_page_markdown(markdown: str, page: Any, config: Any, files: Any) -> str:
    """Put a table with a search box in the place of Markdown tables, and lead links to pages or to the repository."""
    name = page.file.src_uri
    if name in {"models.md", "conformance.md"}:
        markdown = tables.page(name.removesuffix(".md"), markdown)
    source = next((root for root, made in FROM_ROOT.items() if made == name), f"docs/{name}")
    return linked(pictured(markdown), source, config.repo_url)


def undocumented() -> Iterator[str]:
    """Public names of axattn, and their public functions and attributes, that have no docstring."""
    package: Any = griffe.load("axattn", search_paths=[str(ROOT)])
    for name in (expression.strip("'\"") for expression in package.exports):
        found = package[name]
        found = found.final_target if found.is_alias else found
        if not found.docstring:
            yield f"axattn.{name}"
        elif found.is_class:
            for member in found.members.values():
                if member.is_function and not member.name.startswith("_") and not member.docstring:
                    yield f"axattn.{name}.{member.name}"


_LINK = re.compile(r"(!?)\[((?:[^\[\]]|\[[^\]]*\])*)\]\(([^)\s]+)\)")
_CODE = re.compile(r"(^```.*?^```|`[^`\n]+`)", re.M | re.S)


def linked(markdown: str, source: str, repository: str | None) -> str:
    """Links of a file of the repository as the site needs them: to its pages, else to the file in the repository.

    Absolute links to such files (README's) are turned likewise, so that ``--strict`` checks them. Without an address
    of the repository the text of a link to it stays, without a link.
    """

    def target(match: re.Match[str]) -> str:
        image, text, to = match.groups()
        path, _, anchor = to.partition("#")
        shown = addresses.file_of(to)
        if shown is None and re.match(r"[a-z]+:|#", to):
            return match[0]
        found = shown or os.path.normpath(Path(source).parent / path)
        anchor = f"#{anchor}" if anchor else ""
        if found in FROM_ROOT:
            return f"{image}[{text}]({FROM_ROOT[found]}{anchor})"
        if Path(found).parent == Path("docs"):
            return f"{image}[{text}]({Path(found).name}{anchor})"
        if not (ROOT / found).exists():
            LOG.warning("%s links to %s, which does not exist", source, to)
        return f"[{text}]({repository.rstrip('/')}/blob/main/{found}{anchor})" if repository else text

    prose = re.compile(f"{_CODE.pattern}|{_LINK.pattern}", re.M | re.S)
    return prose.sub(lambda match: match[0] if match[1] else _LINK.sub(target, match[0]), markdown)


def pictured(markdown: str) -> str:
    """A ``<picture>`` with a source for dark pages as the theme writes it: two images, of which it shows one."""
    whole = (
        r'<picture>\s*<source[^>]*srcset="([^"]+)"[^>]*>\s*<img[^>]*alt="([^"]*)"[^>]*src="([^"]+)"[^>]*>\s*</picture>'
    )
    return re.sub(whole, r"![\2](\3#only-light) ![\2](\1#only-dark)", markdown)
