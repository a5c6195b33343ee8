"""Two groups of cells compared by replicates: each one's cells of a group are added up, and the sums are tested.

Tests that take cells for replicates find what differs by donor alone (Squair et al. 2021, Nature Communications
12:5692).
"""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pandas as pd
import scipy.sparse as sp
from scipy.stats import false_discovery_control, ttest_ind, ttest_rel

from cohortvi.atlas.cells import count_blocks

MIN_CELLS = 10  # of a group, and of a replicate's part of it


def pseudobulk(
    counts: Sequence[Path],
    genes: pd.Index,
    found: Sequence[tuple[np.ndarray, np.ndarray]],
    replicates: np.ndarray,
    chunk_cells: int,
) -> list[dict[str, np.ndarray]]:
    """Return for each two groups of cells, given by their rows, the columns of pseudobulk; one pass over the counts.

    pseudobulk_lfc: difference of the means over replicates of log2 of counts per million, plus 1; pseudobulk_p: of a
    paired t-test over the replicates that have both groups, or of Welch's if fewer than two do, nan where a group has
    fewer than two; pseudobulk_fdr: Benjamini, Hochberg 1995; replicates: how many the smaller group has. `replicates`:
    each cell's.
    """
    names, codes = np.unique(replicates, return_inverse=True)
    sums = [np.zeros((2, len(names), len(genes))) for _ in found]
    totals, cells = (np.zeros((len(found), 2, len(names))) for _ in range(2))
    start = 0
    for x_ng, total_n in count_blocks(counts, genes, chunk_cells) if found else ():
        stop = start + len(total_n)
        for at, groups in enumerate(found):
            for side, rows in enumerate(groups):
                here = rows[np.searchsorted(rows, start) : np.searchsorted(rows, stop)]
                those, own = np.unique(codes[here], return_inverse=True)  # few: a block is of one sample
                member = sp.csr_matrix((np.ones(len(here)), (own, here - start)), shape=(len(those), stop - start))
                sums[at][side, those] += (member @ x_ng).toarray()
                totals[at, side, those] += member @ total_n
                cells[at, side, those] += np.bincount(own, minlength=len(those))
        start = stop
    return [_compare(*values) for values in zip(sums, totals, cells, strict=True)]


def _compare(sums: np.ndarray, totals: np.ndarray, cells: np.ndarray) -> dict[str, np.ndarray]:
    """Return the columns for sums of counts (2, replicates, g), and totals and numbers of cells (2, replicates)."""
    logs = np.log2(1 + 1e6 * sums / np.maximum(totals, 1)[..., None])
    enough = cells >= MIN_CELLS
    both = enough.all(0)
    sides = [logs[0, both], logs[1, both]] if both.sum() >= 2 else [logs[side, enough[side]] for side in (0, 1)]
    n = [len(side) for side in sides]
    empty = np.full(sums.shape[-1], np.nan)
    lfc = sides[0].mean(0) - sides[1].mean(0) if min(n) else empty
    p = empty
    if min(n) >= 2:
        with np.errstate(all="ignore"):
            test = ttest_rel(*sides) if both.sum() >= 2 else ttest_ind(*sides, equal_var=False)
        p = np.nan_to_num(np.asarray(test.pvalue), nan=1.0)
    fdr = false_discovery_control(p) if min(n) >= 2 else empty
    return {"pseudobulk_lfc": lfc, "pseudobulk_p": p, "pseudobulk_fdr": fdr, "replicates": min(n)}
