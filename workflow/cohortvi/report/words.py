"""Numbers and names as the page shows them: thousands separated, units said, a dash for what is not known."""

import math
import re

DASH = "\N{EN DASH}"
MINUS = "\N{MINUS SIGN}"
METRICS = {
    "n_genes_by_counts": "genes",
    "total_counts": "counts",
    "doublet_score": "doublet score",
}
SIDES = {"_mad_low": "low (MAD)", "_mad_high": "high (MAD)", "_low": "low", "_high": "high"}


def number(value: float | None, digits: int = 0) -> str:
    """Return 1234.5 as 1,234.50 with `digits` decimals."""
    if value is None or not math.isfinite(value):
        return DASH
    return f"{value:,.{digits}f}".replace("-", MINUS)


def percent(part: float, whole: float = 1.0) -> str:
    """Return the share as 76.0 %."""
    return f"{100 * part / whole:.1f} %" if whole else DASH


def short(value: float) -> str:
    """Return 12000 as 12k, 0.25 as 0.25, 1e7 as 10M: for axes."""
    for factor, unit in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if abs(value) >= factor:
            return f"{value / factor:g}{unit}".replace("-", MINUS)
    return f"{value:g}".replace("-", MINUS)


def p_value(value: float) -> str:
    """Return 1.2e-20 as 1.2e−20, and 0 (below what a float holds) as < 1e−300."""
    if not math.isfinite(value):
        return DASH
    return f"< 1e{MINUS}300" if value < 1e-300 else f"{value:.1e}".replace("e-0", "e-").replace("-", MINUS)


def duration(seconds: float) -> str:
    """Return seconds as 4.2 s, 3 min 20 s or 2 h 05 min."""
    if not math.isfinite(seconds):
        return DASH
    if round(seconds, 1) < 60:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes} min {rest:02d} s" if minutes < 60 else f"{minutes // 60} h {minutes % 60:02d} min"


def megabytes(value: float) -> str:
    """Return MB as 512 MB or 1.25 GB."""
    if not math.isfinite(value):
        return DASH
    return f"{value:,.0f} MB" if value < 1024 else f"{value / 1024:,.2f} GB"


def plural(n: int, word: str) -> str:
    """Return `1 cell`, `2,000 cells`."""
    return f"{n:,} {word}" if n == 1 else f"{n:,} {word}{'es' if word.endswith('ch') else 's'}"


def metric(name: str) -> str:
    """Return the word for a QC metric: pct_counts_mt is `% mt`."""
    return METRICS.get(name, name.replace("pct_counts_", "% "))


def reason(name: str) -> str:
    """Return the words for a reason of removal: n_genes_by_counts_mad_low is `genes low (MAD)`."""
    for suffix, words in SIDES.items():
        if name.endswith(suffix):
            return f"{metric(name.removesuffix(suffix))} {words}"
    return name


def natural(name: str) -> list[tuple[int, str]]:
    """Return a key that sorts run2 before run10."""
    return [(int(part), "") if part.isdecimal() else (-1, part) for part in re.split(r"(\d+)", name)]


def listed(names: list[str], most: int = 5) -> str:
    """Return `a, b and c`, or the first few `and 12 more`."""
    if len(names) > most:
        return f"{', '.join(names[:most])} and {len(names) - most:,} more"
    return " and ".join(filter(None, [", ".join(names[:-1]), *names[-1:]]))
