"""A pickle that would run code, for tests that files of users run none."""

import os
from pathlib import Path


class Payload:
    """Runs code when it is unpickled."""

    def __init__(self, marker: Path):
        self.marker = str(marker)

    def __reduce__(self):
        return os.mkdir, (self.marker,)
