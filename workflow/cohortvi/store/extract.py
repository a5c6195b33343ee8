"""What the stores say of each cell: its name, its sample and batch, its row in the raw store, its QC metrics."""

import pandas as pd


def cell_table(cells: pd.DataFrame, sample: str, columns: dict[str, str | float]) -> pd.DataFrame:
    """Return the obs of a sample's kept cells: the QC table's columns, sample, and what all its cells share.

    `cells`: the QC table; `columns`: the shared values. Index: sample_barcode.
    """
    kept = cells[cells["reason"] == ""].drop(columns=["reason", "predicted_doublet"])
    kept.index = pd.Index([f"{sample}_{barcode}" for barcode in kept.index], dtype=object)
    return kept.assign(sample=sample, **columns)
