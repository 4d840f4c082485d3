"""The addresses of the site and of the repository, and the file of the repository that each of them shows.

README.md has absolute links: it is also the page of the package index, where a relative link leads nowhere. The site
and the tests turn them back into files, so that a dead one is found here.
"""

from __future__ import annotations

import re
import tomllib
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
FROM_ROOT = {"README.md": "index.md", "CONTRIBUTING.md": "contributing.md", "CHANGELOG.md": "changelog.md"}
"""Files of the repository's root that are pages of the site."""
BRANCH = "main"


def project_urls() -> dict[str, str]:
    """``[project.urls]`` of pyproject.toml; its names in lower case, its addresses without a slash at the end."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    return {name.lower(): url.rstrip("/") for name, url in project.get("urls", {}).items()}


def repository() -> str | None:
    """The address of the repository, None if pyproject.toml has none."""
    urls = project_urls()
    return urls.get("repository") or urls.get("source")


def file_of(address: str) -> str | None:
    """The path of the file in the repository that an address shows, None if it shows none of the project.

    The path of such an address need not exist: a page of the site is ``docs/NAME.md`` (or a file of the root), and
    what is under ``blob``, ``raw`` or ``tree`` of the branch is the path that follows. Other pages of the forge
    (issues, advisories) show no file.

    Args:
        address: with or without an anchor.
    """
    plain = re.split(r"[#?]", address)[0]
    site = project_urls().get("documentation")
    if site and (plain == site or plain.startswith(f"{site}/")):
        return _source_of_page(plain[len(site) :].strip("/"))
    for kind in ("blob", "raw", "tree"):
        start = f"{repository()}/{kind}/{BRANCH}/"
        if plain.startswith(start):
            return plain[len(start) :]
    return None


def _source_of_page(path: str) -> str:
    """The file of a page's path on the site (``why``), or of another file there (``leak-light.svg``)."""
    if Path(path).suffix:
        return f"docs/{path}"
    page = f"{path or 'index'}.md"
    return next((root for root, made in FROM_ROOT.items() if made == page), f"docs/{page}")
