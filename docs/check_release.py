"""What must hold before a release: `python docs/check_release.py v0.1.0`. Needs the standard library alone."""

import re
import sys
import tomllib
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
PLACEHOLDER = "github.com/OWNER/"  # in pyproject.toml until the repository is public


def issues(tag: str, root: Path = ROOT) -> list[str]:
    """What does not hold, a sentence each."""
    code, changes, citation = (
        (root / name).read_text(encoding="utf-8") for name in ("sampo/__init__.py", "CHANGELOG.md", "CITATION.cff")
    )
    (version,) = re.findall(r'^__version__ = "(.*)"$', code, re.MULTILINE)
    address = tomllib.loads((root / "pyproject.toml").read_text(encoding="utf-8"))["project"]["urls"]["Repository"]
    found = []
    if tag != f"v{version}":
        found.append(f"The tag must be v{version}, the version in sampo/__init__.py, got {tag}.")
    if f"\nversion: {version}\n" not in citation:
        found.append(f"`version` in CITATION.cff must be {version}.")
    if not re.search(rf"^## {re.escape(version)} \(\d{{4}}-\d\d-\d\d\)$", changes, re.MULTILINE):
        found.append(f"CHANGELOG.md must have a section `## {version} (YYYY-MM-DD)`.")
    if "\n## Unreleased" in changes:
        found.append("CHANGELOG.md must have no section `## Unreleased`: move its lines into that of the version.")
    if PLACEHOLDER in f"{address}/":
        found.append(f"`Repository` in pyproject.toml must be the address of the repository, got {address}.")
    return found


if __name__ == "__main__":
    if len(sys.argv) != 2:
        sys.exit(__doc__)
    if found := issues(sys.argv[1]):
        sys.exit("\n".join(found))
