"""The packages whose versions results depend on, and the versions that are installed."""

from functools import cache
from importlib import metadata

DISTRIBUTION = "sampo-dpo"
TRAINING_PACKAGES = ("torch", "transformers", "trl", "peft", "accelerate")  # can change trained weights by rounding
PACKAGES = (DISTRIBUTION, *TRAINING_PACKAGES, "datasets", "numpy")


def find_version(distribution: str) -> str | None:
    """The installed version; None where the package is not installed, or is run from a folder."""
    try:
        return metadata.version(distribution)
    except metadata.PackageNotFoundError:
        return None


@cache
def versions() -> dict[str, str]:
    """The versions of those of `PACKAGES` that are installed."""
    found = {package: find_version(package) for package in PACKAGES}
    return {package: version for package, version in found.items() if version is not None}
