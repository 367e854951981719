"""`sampo env`: versions, devices and engines of this installation, for issue reports."""

import argparse
import importlib.metadata as metadata
import json
import os
import platform
import shutil
from typing import Any

from ..io.versions import DISTRIBUTION, find_version


def make_parser() -> argparse.ArgumentParser:
    """The command's parser."""
    parser = argparse.ArgumentParser(
        prog="sampo env",
        description="Versions, devices, extras, compiler, cache folder, and the engines that can be used here.",
    )
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    return parser


def main(args: argparse.Namespace) -> None:
    """Print what was found."""
    found = describe_environment()
    if args.json:
        print(json.dumps(found, indent=2))
        return
    for title, values in found.items():
        print(f"{title}:")
        for name, value in values.items():
            print(f"  {name}: {value}")


def describe_environment() -> dict[str, dict[str, Any]]:
    """Section -> name -> value; values are text, except for counts."""
    from ..io.records import commit
    from ..reference_cache.store import cache_folders, cache_root

    root = cache_root(None)
    devices = _devices()
    return {
        "system": {
            "sampo": find_version(DISTRIBUTION) or "not installed (run from a folder)",
            "commit": commit() or "unknown (not a source checkout)",
            "python": platform.python_version(),
            "platform": platform.platform(),
        },
        "packages": {name: find_version(name) or "missing" for name in _requirements(None)},
        "devices": devices,
        "extras": {extra: _missing(extra) or "installed" for extra in _extras()},
        "build tools": {name: shutil.which(name) or "missing" for name in ("g++", "ninja", "nvcc")},
        "cache": {"reference log-probs": str(root), "caches": len(cache_folders(root))},
        "engines": _engines(devices),
    }


def _extras() -> list[str]:
    try:
        return metadata.metadata(DISTRIBUTION).get_all("Provides-Extra") or []
    except metadata.PackageNotFoundError:
        return []


def _requirements(extra: str | None) -> list[str]:
    """Names of the packages that the distribution needs, or that one of its extras adds."""
    from packaging.requirements import Requirement

    try:
        lines = [Requirement(line) for line in metadata.requires(DISTRIBUTION) or ()]
    except metadata.PackageNotFoundError:
        return []
    added = [
        line for line in lines if (line.marker is not None and "extra" in str(line.marker)) == (extra is not None)
    ]
    wanted = [line.name for line in added if line.marker is None or line.marker.evaluate({"extra": extra or ""})]
    return [name for name in dict.fromkeys(wanted) if name != DISTRIBUTION]


def _missing(extra: str) -> str:
    """The packages that an extra lacks, with the command that installs them; the empty text for none."""
    names = [name for name in _requirements(extra) if find_version(name) is None]
    return f"missing {', '.join(names)} (pip install '{DISTRIBUTION}[{extra}]')" if names else ""


def _devices() -> dict[str, Any]:
    import torch

    found: dict[str, Any] = {"cpu cores": os.cpu_count()}
    if not torch.accelerator.is_available():
        return found | {"accelerators": 0}
    kind = torch.accelerator.current_accelerator()
    count = torch.accelerator.device_count()
    found |= {"accelerators": count, "kind": str(kind)}
    if kind is not None and kind.type == "cuda":
        for i in range(count):
            properties = torch.cuda.get_device_properties(i)
            found[f"cuda:{i}"] = f"{properties.name}, {properties.total_memory / 2**30:.0f} GiB"
    return found


def _engines(devices: dict[str, Any]) -> dict[str, str]:
    """For each engine `yes`, or what is missing."""
    import torch

    # DeepSpeed builds its CPU communication the first time that several processes meet
    tools = [name for name in ("g++", "ninja") if not shutil.which(name)] if not devices["accelerators"] else []
    lacking = {
        "one process": "",
        "DDP": "" if torch.distributed.is_available() else "missing torch.distributed in this build of torch",
        "DeepSpeed ZeRO 1, 2, 3": _missing("deepspeed") or (f"missing {', '.join(tools)}" if tools else ""),
        "FSDP2": "" if devices["accelerators"] else "needs a GPU for each process; on the CPU use `cpu_zero3`",
        "4-bit base (QLoRA)": _missing("quantization") or ("" if devices.get("kind") == "cuda" else "needs CUDA"),
    }
    return {name: lack or "yes" for name, lack in lacking.items()}
