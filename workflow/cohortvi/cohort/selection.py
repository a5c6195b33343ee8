"""The genes of the cohort and which of them the models see: join, ranks over batches, lists, a frozen list.

With seurat_v3 or Pearson residuals the ranks and the choice are scanpy's on the same cells.
"""

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

import numpy as np
import pandas as pd

from cohortvi.cohort.genes import batch_variance, merge_moments
from cohortvi.cohort.sections import by_batch
from cohortvi.config import Genes
from cohortvi.files import read_json

SHOWN = 4  # samples listed in a message


def joined(indexes: Iterable[pd.Index], join: str) -> pd.Index:
    """Return the names that all (inner) or any (outer) of the indexes hold, in the order of first appearance."""
    seen, n = Counter(), 0
    for index in indexes:
        seen.update(index)
        n += 1
    return pd.Index([name for name, times in seen.items() if join == "outer" or times == n], dtype=object)


def rank_genes(variances: Sequence[pd.Series], genes: Genes) -> pd.DataFrame:
    """Return variances_norm, highly_variable_rank, highly_variable_nbatches and highly_variable of each gene.

    `variances`: one series a batch, over the same joined genes. Ranks are medians over the batches in which the gene
    is among the first n_top (Seurat's SelectIntegrationFeatures); seurat_v3 sorts by rank and then by number of
    batches, pearson_residuals the other way round, as scanpy does. `always` come first, `never` not at all.
    """
    table = pd.concat(variances, axis=1).to_numpy().T
    ranks = np.argsort(np.argsort(-table, axis=1), axis=1).astype(np.float32)
    n_batches = (ranks < genes.n_top).sum(0)
    masked = np.ma.masked_greater_equal(ranks, genes.n_top)
    ranked = pd.DataFrame(
        {
            "variances_norm": table.mean(0),
            "highly_variable_rank": np.ma.median(masked, axis=0).filled(np.nan),
            "highly_variable_nbatches": n_batches,
        },
        index=variances[0].index,
    )
    columns, ascending = ["highly_variable_rank", "highly_variable_nbatches"], [True, False]
    if genes.flavor == "pearson_residuals":
        columns, ascending = columns[::-1], ascending[::-1]
    ordered = ranked.sort_values(columns, ascending=ascending, na_position="last").index
    chosen = [name for name in genes.always if name in ranked.index]
    free = ordered[~ordered.isin([*chosen, *genes.never])]
    chosen += list(free[: max(genes.n_top - len(chosen), 0)])
    return ranked.assign(highly_variable=ranked.index.isin(chosen))


def select_genes(
    moments: Mapping[str, pd.DataFrame],
    variances: Mapping[str, pd.DataFrame],
    fits: Mapping[str, pd.DataFrame],
    batches: Mapping[str, str],
    genes: Genes,
    join: str,
) -> pd.DataFrame:
    """Return the cohort's genes with symbol, means, variances, their ranks and `highly_variable`, which is the choice.

    `moments`, `variances`: by sample; `fits`: by batch; `batches`: the batch of each sample. Samples without cells
    (quarantined ones) have no say. Memory: one table at a time, and a number for each gene and batch. Errors:
    ValueError if no cell or no gene is shared, or a listed gene is unknown.
    """
    used = [name for name in moments if moments[name].attrs["n_obs"]]
    if not used:
        raise ValueError(
            "no sample has a cell left, all are quarantined; see qc.gate in the config and results/cohort/qc/"
        )
    names = joined((moments[name].index for name in used), join)
    if names.empty:
        raise ValueError(_nothing_shared({name: moments[name].index for name in used[:SHOWN]}, len(used)))
    _check_known("genes.always", genes.always, names)
    merged = merge_moments(moments[name] for name in used).loc[names]
    table = pd.DataFrame({"symbol": _symbols(moments[name]["symbol"] for name in used).loc[names]})
    table = table.assign(means=merged["mean"], variances=merged["variance"])
    per_batch = []
    for batch, samples in sorted(by_batch({name: batches[name] for name in used}).items()):
        parts = (variances[name] for name in samples)
        per_batch.append(batch_variance(parts, fits[batch], genes.flavor).reindex(names, fill_value=0.0))
    table = table.join(rank_genes(per_batch, genes))
    if genes.frozen:
        frozen = read_list(genes.frozen)
        _check_known(f"genes.frozen ({genes.frozen})", frozen, names)
        table["highly_variable"] = table.index.isin(frozen)
    return table


def _symbols(tables: Iterable[pd.Series]) -> pd.Series:
    """Return the symbol of each gene, that of the first sample that has it."""
    found: dict[str, str] = {}
    for symbols in tables:
        found = dict(zip(symbols.index, symbols, strict=True)) | found
    return pd.Series(found, dtype=object)


def read_list(path: str | Path) -> list[str]:
    """Return the genes of a model's facts (a file .json), or of a text file, one a line.

    There, empty lines and lines that begin with # do not count.
    Errors: ValueError for a file of JSON that holds no facts of a model.
    """
    if Path(path).suffix == ".json":
        facts = read_json(path)
        if not isinstance(facts, dict) or "genes" not in facts:
            raise ValueError(
                f"{path}: no list of genes; expected a text file of one a line, or model.json as rule train writes it"
            )
        return facts["genes"]
    lines = (line.strip() for line in Path(path).read_text().splitlines())
    return [line for line in lines if line and not line.startswith("#")]


def _check_known(where: str, wanted: Sequence[str], names: pd.Index) -> None:
    unknown = [name for name in wanted if name not in names]
    if unknown:
        raise ValueError(
            f"{where}: {len(unknown)} of {len(wanted)} genes are not in the cohort ({', '.join(unknown[:5])} ...); "
            f"expected names as in {', '.join(names[:3])} ...; check cohort.gene_key, or take them off the list"
        )


def _nothing_shared(indexes: Mapping[str, pd.Index], n_samples: int) -> str:
    shown = "; ".join(f"{name} has {', '.join(index[:3])} ..." for name, index in indexes.items())
    return (
        f"the {n_samples} samples share no gene: {shown}; expected names that all samples know. Set cohort.gene_key "
        "to a column of var that they have in common, or cohort.join: outer."
    )
