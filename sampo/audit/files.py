"""Write an audit: the complete audit as JSON, each number as a record, and the numbers of each pair as Parquet."""

import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np

from ..data.issues import Issue
from ..io import records as results
from ..io.files import replacing, write_atomic
from .audit import Audit
from .report import list_records, write_conclusion, write_verdict
from .scan import SplitScan


def write_audit(audit: Audit, folder: Path, *, command: str = "") -> list[Path]:
    """Write `audit.json`, `records.jsonl` and `pairs.parquet`, and replace an older audit in the folder."""
    paths = [folder / name for name in ("audit.json", "records.jsonl", "pairs.parquet")]
    folder.mkdir(parents=True, exist_ok=True)
    _write_pairs(audit, paths[2])
    made = "".join(
        json.dumps(asdict(r), sort_keys=True, allow_nan=False) + "\n" for r in list_records(audit, command=command)
    )
    write_atomic(paths[1], made)
    write_atomic(paths[0], json.dumps(as_dict(audit), indent=2, allow_nan=False) + "\n")
    return paths


def as_dict(audit: Audit) -> dict[str, Any]:
    """Convert an audit to plain values, without the numbers of single pairs."""
    scans = [
        {
            "split": scan.name,
            "rows": scan.rows,
            "pairs": len(scan.pairs),
            "layout": scan.layout,
            "faults": [_issue_as_dict(issue) for issue in scan.issues],
            "notes": scan.notes,
        }
        for scan in audit.scans
    ]
    return {
        "data": audit.label,
        "fingerprint": audit.fingerprint,
        "unit": audit.unit,
        "settings": audit.about,
        "splits": scans,
        "overall": asdict(audit.overall),
        "by_split": {name: asdict(bias) for name, bias in audit.splits.items()},
        "by_group": {name: asdict(bias) for name, bias in audit.groups.items()},
        "truncations": [asdict(cut) for cut in audit.truncations],
        "repeats": {name: asdict(found) for name, found in audit.repeats.items()},
        "overlaps": [asdict(both) for both in audit.overlaps],
        "verdict": write_verdict(audit),
        "conclusion": write_conclusion(audit),
        "provenance": results.provenance(),
    }


def _issue_as_dict(issue: Issue) -> dict[str, Any]:
    """Convert an issue to the keys of audit.json, which are an interface."""
    return {"kind": issue.kind, "column": issue.column, "rows": issue.rows, "count": issue.count, "cure": issue.fix}


PARQUET_COLUMNS = {  # of pairs.parquet
    "split": "name of the split",
    "row": "row of the pair in the split, from 0; bad rows are left out",
    "group": "value of the column `by`; null without one",
    "prompt": "length of the prompt",
    "chosen": "length T_w of the chosen response",
    "rejected": "length T_l of the rejected response",
    "chosen_end": "position of the last end token in the chosen response, from 0; -1 for none and for words",
    "rejected_end": "the same of the rejected response",
    "shared_start": "tokens that both responses begin with; 0 where lengths are words",
    "shared_end": "tokens that both responses end with",
    "prompt_hash": "64-bit hash of the prompt",
    "pair_hash": "64-bit hash of the pair",
    "swapped_hash": "64-bit hash of the pair with its responses swapped",
}


def _write_pairs(audit: Audit, path: Path) -> None:
    """Write one row per good pair, split by split, to avoid a second copy of all pairs."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    def encoded(codes: np.ndarray, names: list[str]) -> Any:
        return pa.DictionaryArray.from_arrays(pa.array(codes, pa.int32()), pa.array(names, pa.string()))

    group_names = audit.group_names

    def table(scan: SplitScan) -> Any:
        columns = {"split": encoded(np.zeros(len(scan.pairs), np.int32), [scan.name])}
        for name in PARQUET_COLUMNS:
            if name == "group":
                names = encoded(scan.pairs.group, group_names).cast(pa.string()) if group_names else None
                columns[name] = names if group_names else pa.nulls(len(scan.pairs), pa.string())
            elif name != "split":
                columns[name] = pa.array(getattr(scan.pairs, name))
        columns["split"] = columns["split"].cast(pa.string())
        return pa.table(columns).replace_schema_metadata({"unit": audit.unit, "data": audit.label})

    first = table(audit.scans[0])  # an audit has at least one split
    with replacing(path) as file, pq.ParquetWriter(file, first.schema, compression="zstd") as writer:
        writer.write_table(first)
        for scan in audit.scans[1:]:
            writer.write_table(table(scan))
