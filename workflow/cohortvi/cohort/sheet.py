"""The sample sheet: one row a sample, checked as a whole before any job starts.

Samples come in the order of their names, whatever the order of the rows, so that sorting the sheet changes nothing.
"""

import csv
import re
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import jsonschema

REQUIRED = ("sample", "path")
OPTIONAL = ("format", "layer", "select", "generation")


@dataclass(frozen=True)
class Sample:
    """A row of the sheet: where the raw counts of one sample lie, and what is known of it."""

    name: str
    path: str
    format: str | None
    layer: str | None
    select: tuple[tuple[str, str], ...]
    batch: str
    columns: dict[str, str]
    generation: int = 0

    def source(self) -> dict[str, object]:
        """Return what names the counts of this sample, JSON-able: what a rule that reads them depends on."""
        return {
            "name": self.name,
            "path": self.path,
            "format": self.format,
            "layer": self.layer,
            "select": [list(pair) for pair in self.select],
        }


def from_source(source: dict, batch: str = "", columns: dict[str, str] | None = None) -> Sample:
    """Return the sample that `Sample.source` described."""
    select = tuple((key, value) for key, value in source["select"])
    return Sample(source["name"], source["path"], source["format"], source["layer"], select, batch, columns or {})


def read_sheet(path: str | Path, batch_key: Sequence[str], schema: dict) -> list[Sample]:
    """Return the samples of a tab-separated sheet, ordered by name.

    `batch_key`: the columns whose values, joined by `-`, name a sample's batch. `schema`: what a row must hold.
    Errors: ValueError that lists every fault of the sheet with its line.
    """
    path = Path(path)
    if not path.is_file():
        raise ValueError(f"{path}: no such sample sheet; write one, or set cohort.sheet in the config to where it lies")
    with path.open(encoding="utf-8-sig", newline="") as file:
        lines = [(n, row) for n, row in enumerate(csv.reader(file, delimiter="\t"), 1) if any(c.strip() for c in row)]
    if not lines:
        raise ValueError(f"{path}: the sheet is empty; expected a header with at least sample and path")
    header = [name.strip() for name in lines[0][1]]
    faults = [*_header_faults(header, batch_key)]
    if not faults:
        rows = [(n, dict(zip(header, (c.strip() for c in row), strict=False))) for n, row in lines[1:]]
        faults = [fault for n, row in rows for fault in _row_faults(n, row, batch_key, schema)]
        faults = faults or [*_cohort_faults([row for _, row in rows], batch_key)]
    if faults:
        raise ValueError(f"{path}: the sample sheet has faults:\n" + "\n".join(f"  - {fault}" for fault in faults))
    return sorted((_sample(row, batch_key) for _, row in rows), key=lambda sample: sample.name)


def _header_faults(header: list[str], batch_key: Sequence[str]) -> Iterator[str]:
    hint = "; is the sheet separated by tabs?" if len(header) == 1 else ""
    for name in REQUIRED:
        if name not in header:
            yield f"line 1: no column {name!r}; found {', '.join(header)}{hint}"
    for name in batch_key:
        if name not in header:
            yield f"line 1: no column {name!r}, which cohort.batch_key names; found {', '.join(header)}"
    for name, count in Counter(header).items():
        if count > 1:
            yield f"line 1: column {name!r} stands {count} times; expected every column once"


def _row_faults(line: int, row: dict[str, str], batch_key: Sequence[str], schema: dict) -> Iterator[str]:
    where = f"line {line}: sample {row.get('sample', '')!r}"
    for error in jsonschema.Draft202012Validator(schema).iter_errors(row):
        column = error.absolute_path[0]
        yield f"{where}: column {column!r}: found {error.instance!r}; expected {error.schema['description']}"
    for name in batch_key:
        if not row.get(name):
            yield f"{where}: column {name!r} is empty; cohort.batch_key names it, so every sample needs a value"


def _cohort_faults(rows: list[dict[str, str]], batch_key: Sequence[str]) -> Iterator[str]:
    if not rows:
        yield "no sample; expected at least one row under the header"
    for name, count in Counter(row["sample"] for row in rows).items():
        if count > 1:
            yield f"sample {name!r} stands in {count} rows; expected every name once"
    batches: dict[str, str] = {}
    for row in rows:
        batch = _batch(row, batch_key)
        other = batches.setdefault(file_name(batch), batch)
        if other != batch:
            yield f"batches {other!r} and {batch!r} differ in special characters only; rename one of them"


def file_name(batch: str) -> str:
    """Return the name of a batch as it stands in file names."""
    return re.sub(r"[^A-Za-z0-9.-]+", "_", batch)


def _batch(row: dict[str, str], batch_key: Sequence[str]) -> str:
    return "-".join(row[name] for name in batch_key) if batch_key else "all"


def _sample(row: dict[str, str], batch_key: Sequence[str]) -> Sample:
    select = [part.split("=", 1) for part in row.get("select", "").split(",") if part]
    return Sample(
        name=row["sample"],
        path=row["path"],
        format=row.get("format") or None,
        layer=row.get("layer") or None,
        select=tuple((key.strip(), value.strip()) for key, value in select),
        batch=_batch(row, batch_key),
        columns={key: value for key, value in row.items() if key not in REQUIRED + OPTIONAL},
        generation=int(row.get("generation") or 0),
    )
