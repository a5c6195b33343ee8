"""The numbers of loader_speed.py as Markdown: medians over rounds, and medians of ratios taken within rounds."""

from collections.abc import Callable, Sequence
from pathlib import Path
from statistics import median
from typing import Any

BEGIN, END = "<!-- bench-loader -->", "<!-- /bench-loader -->"
AT = 1_024  # batch size of the details
Record = dict[str, Any]


def label(loader: str, setting: str) -> str:
    """Return what a loader with a setting is called."""
    if loader == "cohortvi":
        return f"cohortvi, {'integers' if 'counts' in setting else 'float32'}"
    names = {"scDataset": "scDataset, block 16, window 16,384", "scvi-tools": "scvi-tools' AnnDataLoader, in memory"}
    return names.get(loader) or f"{loader}{',' if loader == 'scipy' else ''} {setting}"


def select(records: Sequence[Record], **where: Any) -> list[Record]:
    """Return the records that have these values."""
    return [record for record in records if all(record[name] == value for name, value in where.items())]


def ratio(ours: Sequence[Record], others: Sequence[Record], field: str = "cells_per_s") -> float | None:
    """Return the median over rounds of ours over the largest of the others in the same round; None if none has both."""
    found = []
    for record in ours:
        rivals = [other[field] for other in select(others, round=record["round"])]
        if rivals:
            found.append(record[field] / max(rivals))
    return median(found) if found else None


def middle(records: Sequence[Record], field: str) -> float | None:
    """Return the median of a field; None if there is no record."""
    return median(record[field] for record in records) if records else None


def number(value: float | None, digits: int = 3) -> str:
    """Return a number with so many significant digits, but all those before the point; nothing for None."""
    if value is None:
        return ""
    magnitude = int(f"{value:.{digits - 1}e}".split("e")[1])  # of the rounded value
    return f"{value:,.{max(0, digits - 1 - magnitude)}f}"


def markdown(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Return a table; all columns but the first are aligned to the right."""
    lines = [header, ["---", *["---:"] * (len(header) - 1)], *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def labels(records: Sequence[Record]) -> list[str]:
    """Return what was measured, in the order of the settings."""
    return list(dict.fromkeys(label(record["loader"], record["setting"]) for record in sorted(records, key=_order)))


def _order(record: Record) -> tuple[int, bool]:
    loaders = ("cohortvi", "annbatch", "scDataset", "scvi-tools", "scipy")
    return loaders.index(record["loader"]), "counts" in record["setting"]


def of(records: Sequence[Record], name: str) -> list[Record]:
    """Return the records of one label."""
    return [record for record in records if label(record["loader"], record["setting"]) == name]


def speeds(records: Sequence[Record], sizes: Sequence[int], outputs: Sequence[str]) -> str:
    """Return the table of one data set: thousand cells a second; below, what ours is to others."""
    cells = [(output, size) for output in outputs for size in sizes]
    parts = [select(records, output=output, batch_size=size) for output, size in cells]
    rows = []
    for name in labels(records):
        found = [middle(of(part, name), "cells_per_s") for part in parts]
        rows.append([name, *(number(value and value / 1e3) for value in found)])
    ours, integers = "cohortvi, float32", "cohortvi, integers"
    pairs: list[tuple[str, str, Callable[[Record], bool]]] = [
        ("**float32 / annbatch's best of the round**", ours, lambda record: record["loader"] == "annbatch"),
        ("integers / annbatch's best of the round", integers, lambda record: record["loader"] == "annbatch"),
        ("float32 / annbatch 32x256", ours, lambda record: record["setting"] == "32x256"),
        ("float32 / scDataset", ours, lambda record: record["loader"] == "scDataset"),
        ("float32 / AnnDataLoader in memory", ours, lambda record: record["loader"] == "scvi-tools"),
        ("float32 / scipy in memory", ours, lambda record: record["loader"] == "scipy"),
    ]
    for title, name, is_other in pairs:
        found = [ratio(of(part, name), list(filter(is_other, part))) for part in parts]
        if any(found):
            rows.append([title, *(number(value) for value in found)])
    return markdown(["thousand cells/s", *(f"{output} {size:,}" for output, size in cells)], rows)


def details(records: Sequence[Record], outputs: Sequence[str]) -> str:
    """Return the table of one data set and batch size: cores, memory, gaps, seconds to the first minibatch."""
    columns = {"cores": "cores", "peak MB": "peak_mb", "p99 gap, ms": "p99_gap_ms", "first, s": "first_batch_s"}
    rows = []
    for name in labels(records):
        found = [of(select(records, output=output), name) for output in outputs]
        rows.append([name, *(number(middle(part, field), 2) for part in found for field in columns.values())])
    return markdown(["", *(f"{output}: {column}" for output in outputs for column in columns)], rows)


def cold(records: Sequence[Record]) -> str:
    """Return the table of epochs with a cold cache."""
    rows = []
    for data, output in dict.fromkeys((record["data"], record["output"]) for record in records):
        part = select(records, data=data, output=output)
        ours, other = select(part, loader="cohortvi"), select(part, loader="annbatch")
        found = [value and value / 1e3 for value in (middle(ours, "cells_per_s"), middle(other, "cells_per_s"))]
        read = [middle(ours, "read_mb"), middle(other, "read_mb")]
        rows.append([f"{data}, {output}", *map(number, [*found, ratio(ours, other), *read])])
    header = ["cold cache", "cohortvi, thousand cells/s", "annbatch 32x256", "ratio", "cohortvi, MB read", "annbatch"]
    return markdown(header, rows)


def disk(written: Sequence[Record], data: dict[str, Record]) -> str:
    """Return the table of what stores cost: bytes, seconds and memory to write; and ours over annbatch's."""
    rows = []
    fields = ("counts_mb", "mb", "seconds", "cpu_s", "peak_mb")
    for name, facts in data.items():
        found = {record["loader"]: record for record in select(written, data=name)}
        for loader, record in found.items():
            per_cell = record["counts_mb"] * 1e6 / facts["n_obs"]
            rows.append([f"{name}, {loader}", number(per_cell), *(number(record[field]) for field in fields)])
        if {"cohortvi", "annbatch"} <= found.keys():
            ratios = [found["cohortvi"][field] / found["annbatch"][field] for field in fields]
            rows.append([f"**{name}, ratio**", *(number(value, 2) for value in (ratios[0], *ratios))])
    header = ["on disk", "counts, B/cell", "counts, MB", "all, MB", "to write, s", "CPU s", "peak MB"]
    return markdown(header, rows)


def tables(results: Record) -> str:
    """Return all tables of a run, each with what it shows."""
    settings, data = results["settings"], results["data"]
    machine, versions = results["machine"], results["versions"]
    named = {"cohortvi": "cohortvi", "annbatch": "annbatch", "scDataset": "scDataset", "scvi-tools": "scvi-tools"}
    packages = [f"{name} {versions[name][package]}" for name, package in named.items() if name in versions]
    text = [
        f"{machine['cpu']}, {machine['cores_used']} of {machine['cores']} cores, {machine['memory_gib']} GiB, "
        f"{machine['system']}; {', '.join(packages)}; {machine['date']}. Medians of {settings['rounds']} rounds of "
        f"{settings['seconds']:g} s, page cache warm unless it says cold."
    ]
    for name, facts in data.items():
        records = select(results["warm"], data=name)
        density = facts["nnz"] / facts["n_obs"] / facts["n_vars"]
        text.append(f"{name}: {facts['n_obs']:,} cells x {facts['n_vars']:,} genes, {density:.1%} above zero:")
        text.append(speeds(records, settings["batch_sizes"], settings["outputs"]))
        if AT in settings["batch_sizes"]:
            text.append(f"{name}, minibatches of {AT:,} (memory is that above imports):")
            text.append(details(select(records, batch_size=AT), settings["outputs"]))
    if results["cold"]:
        text += [f"One epoch with a cold page cache, minibatches of {AT:,}:", cold(results["cold"])]
    if results["written"]:
        text += ["Written from an h5ad; ours as counts first, then shuffled:", disk(results["written"], data)]
    for record in results["mixing"]:
        text.append(
            f"Mixing, {record['data']}, minibatches of {record['batch_size']:,}: entropy of batches in a minibatch "
            f"{record['entropy_ratio']:.4f} of a true shuffle's; mates met again in the next epoch "
            f"{record['repeated_mates']:.2f} times as often; {record['coverage']:.0%} of the cells once an epoch."
        )
    text += [f"Skipped: {name}: {reason}." for name, reason in results["skipped"].items()]
    return "\n\n".join(text)


def put_between_markers(path: Path, text: str) -> None:
    """Replace what stands between the two markers of a file; ValueError if it does not hold each once, in order."""
    whole = path.read_text()
    if whole.count(BEGIN) != 1 or whole.count(END) != 1 or whole.index(BEGIN) > whole.index(END):
        raise ValueError(f"{path}: expected {BEGIN} and, after it, {END}, each once; the tables go between them")
    before, rest = whole.split(BEGIN)
    path.write_text(f"{before}{BEGIN}\n\n{text}\n\n{END}{rest.split(END)[1]}")
