"""Names of models and data for a reader: no folder of this machine, and no hash in place of a name."""

import re
from pathlib import PurePath

_HASH = re.compile(r"[0-9a-f]{16,}")
_HUB = re.compile(r"(?:models|datasets)--(.+)")
DIGITS = 7  # shown of a hash


def readable_name(name: str) -> str:
    """A hub id or a relative path as it is, of an absolute path the last part.

    A folder that is called by a hash gets the name of the folder around it, with the hash behind an `@`: the cache of
    the hub keeps `acme/tiny` in `models--acme--tiny/snapshots/0123456789ab…`, which is named `acme/tiny@0123456`.
    """
    path = PurePath(name)
    if not _HASH.fullmatch(path.name):
        return path.name if path.is_absolute() else name
    around = next((part for part in reversed(path.parts[:-1]) if part != "snapshots" and part != path.anchor), "")
    if not around:
        return path.name
    hub = _HUB.fullmatch(around)
    return f"{hub[1].replace('--', '/') if hub else around}@{path.name[:DIGITS]}"
