"""The README of the distribution: its links and figures lead to the repository, since PyPI has no other files."""

import re
from pathlib import Path
from typing import Any

from hatchling.metadata.plugin.interface import MetadataHookInterface

PICTURES = re.compile(r"(!\[[^\]]*\]\()(?![a-z]+:|#|/)([^)\s]+)")
LINKS = re.compile(r"(\]\()(?![a-z]+:|#|/)([^)\s]+)")  # those of a badge follow a picture
ATTRIBUTES = re.compile(r"((?:src|srcset)=\")(?![a-z]+:|/)([^\"\s]+)")


class ReadmeHook(MetadataHookInterface):
    """Fills the dynamic field `readme`."""

    def update(self, metadata: dict[str, Any]) -> None:
        """Put the text into the metadata of the project."""
        text = (Path(self.root) / "README.md").read_text(encoding="utf-8")
        readme = absolute_links(text, metadata["urls"]["Repository"])
        metadata["readme"] = {"content-type": "text/markdown", "text": readme}


def absolute_links(markdown: str, repository: str) -> str:
    """Relative links as links to the files of the repository, and those of pictures as links to their bytes."""
    for part, kind in ((ATTRIBUTES, "raw"), (PICTURES, "raw"), (LINKS, "blob")):
        markdown = part.sub(rf"\g<1>{repository}/{kind}/main/\g<2>", markdown)
    return markdown
