"""Compare today's speed with the baselines that are kept, one file for each configuration in `benchmarks/baselines`.

    python benchmarks/check.py tiny            # seconds
    python benchmarks/check.py                 # all; minutes
    python benchmarks/check.py tiny --update   # measure and keep

A baseline has the ratios of `class_swap.py` against TRL, each the median of three runs with its spread, the peak
memory, the machine and the versions. The check measures again and fails when a ratio falls below the baseline's by
more than the noise of both, or the memory rises by a quarter. On another machine it only reports.
"""

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path

import tables

from sampo.io import records as results
from sampo.io.versions import versions

HERE = Path(__file__).resolve().parent
BASELINES = HERE / "baselines"
REPEATS = 3
SIDES = ["TRL", "SamPO", "SamPO, reference cached"]  # the first is the measure of the others
CONFIGURATIONS = {
    "tiny": ["--tiny"],
    "smollm2-135m-equal": ["--steps", "2", "--batch", "4", "--shape", "128:128:128"],
}
LEAST_NOISE = 0.05  # of a ratio; three runs can agree by chance


def measure(name: str) -> dict:
    """A configuration's baseline, as of now."""
    with tempfile.TemporaryDirectory() as scratch:
        out = Path(scratch) / "records.jsonl"
        command = [sys.executable, str(HERE / "class_swap.py"), *CONFIGURATIONS[name], "--repeats", str(REPEATS)]
        subprocess.run([*command, "--sides", *SIDES, "--out", str(out)], check=True)
        (swap,) = tables.swaps(results.read(out))
    sides = {}
    for side in SIDES[1:]:
        middle, lowest, highest = swap.ratio(side, "TRL")
        noise = max((highest - lowest) / 2 / middle, LEAST_NOISE)
        sides[side] = {
            "ratio": round(middle, 3),
            "noise": round(noise, 3),
            "peak_memory_gib": round(max(swap.memory[side].values()), 3),
        }
    return {
        "configuration": CONFIGURATIONS[name],
        "machine": swap.setting["device"],
        "threads": swap.setting["threads"],
        "versions": versions(),
        "commit": swap.last.commit,
        "date": swap.last.created[:10],
        "sides": sides,
    }


def compare(kept: dict, now: dict) -> list[str]:
    """What is worse than the baseline, one sentence each."""
    issues = []
    for side, before in kept["sides"].items():
        after = now["sides"][side]
        lowest = before["ratio"] * (1 - before["noise"] - after["noise"])
        if after["ratio"] < lowest:
            issues.append(
                f"{side} must be at least {lowest:.2f} × TRL (baseline {before['ratio']:.2f} × with its noise), got "
                f"{after['ratio']:.2f} ×"
            )
        if after["peak_memory_gib"] > 1.25 * before["peak_memory_gib"]:
            issues.append(
                f"{side} must need at most a quarter more than {before['peak_memory_gib']:.2f} GiB, got "
                f"{after['peak_memory_gib']:.2f} GiB"
            )
    return issues


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", help=f"some of {', '.join(CONFIGURATIONS)}; all if none is given")
    parser.add_argument("--update", action="store_true", help="keep what is measured as the new baseline")
    args = parser.parse_args()
    if unknown := set(args.names) - CONFIGURATIONS.keys():
        parser.error(f"names must be among {list(CONFIGURATIONS)}, got {sorted(unknown)}.")
    worse = []
    for name in args.names or CONFIGURATIONS:
        path, now = BASELINES / f"{name}.json", measure(name)
        for side, numbers in now["sides"].items():
            print(f"{name}: {side}: {numbers['ratio']:.2f} × TRL, noise {numbers['noise']:.0%}")
        if args.update:
            path.parent.mkdir(exist_ok=True)
            path.write_text(json.dumps(now, indent=2) + "\n")
            continue
        kept = json.loads(path.read_text())
        found = compare(kept, now)
        same = (kept["machine"], kept["threads"]) == (now["machine"], now["threads"])
        print("\n".join(f"{name}: {each}{'' if same else ' (on another machine: not a failure)'}" for each in found))
        worse += found if same else []
    sys.exit(bool(worse))


if __name__ == "__main__":
    main()
