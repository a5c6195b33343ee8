"""What scvi-tools 1.4 notes of its data, its registry, written for the cells of a store; without importing it."""

from collections.abc import Sequence
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import numpy as np

from cohortvi.store.sharded import ShardedCounts


def registry(
    store: ShardedCounts, batch_key: str, categorical: Sequence[str], numeric: Sequence[str]
) -> dict[str, Any]:
    """Return what `SCVI.setup_anndata` notes of an AnnData with the store's cells and these covariates.

    It names `setup_anndata`, too, so that a saved model can be loaded with an AnnData, or without any by adata=False.
    For a registry that names setup_datamodule, as scvi-tools' own data modules do, loading builds another network:
    without the arguments that SCVI passes on, and with one covariate in place of several.
    Errors: ImportError without scvi-tools.
    """
    categories = {name: np.array(store.categories[name], dtype=object) for name in (batch_key, *categorical)}
    genes = np.array(store.var_names, dtype=object)
    shape = {"n_obs": store.n_obs, "n_vars": store.n_vars, "column_names": genes}
    batch = {"categorical_mapping": categories[batch_key], "original_key": batch_key}
    labels = {"categorical_mapping": np.zeros(1, int), "original_key": "_scvi_labels"}
    mappings = {name: categories[name] for name in categorical}
    sizes = [len(mappings[name]) for name in categorical]
    joint = {"field_keys": list(categorical), "mappings": mappings, "n_cats_per_key": sizes} if categorical else {}
    columns = {"columns": np.array(numeric, dtype=object)} if numeric else {}
    covariates = {
        "categorical_covariate_keys": list(categorical) or None,
        "continuous_covariate_keys": list(numeric) or None,
    }
    return {
        "scvi_version": _scvi_version(),
        "model_name": "SCVI",
        "setup_method_name": "setup_anndata",
        "setup_args": {"layer": None, "batch_key": batch_key, "labels_key": None, "size_factor_key": None} | covariates,
        "field_registries": {
            "X": _field("X", None, shape, {"n_vars": store.n_vars, "n_cells": store.n_obs}),
            "batch": _field("obs", "_scvi_batch", batch, {"n_batch": len(categories[batch_key])}),
            "labels": _field("obs", "_scvi_labels", labels, {"n_labels": 1}),
            "size_factor": _field("obs", None, {}, {}),
            "extra_categorical_covs": _covariates("extra_categorical_covs", joint, len(categorical)),
            "extra_continuous_covs": _covariates("extra_continuous_covs", columns, len(numeric)),
        },
    }


def _covariates(name: str, state: dict[str, Any], number: int) -> dict[str, Any]:
    return _field("obsm", f"_scvi_{name}", state, {f"n_{name}": number})


def _field(attribute: str, key: str | None, state: dict[str, Any], counts: dict[str, int]) -> dict[str, Any]:
    """Return where in an AnnData a field is, what is known of it, and its numbers; one without state is nowhere."""
    where = {"attr_name": attribute, "attr_key": key} if state else {}
    return {"data_registry": where, "state_registry": state, "summary_stats": counts}


def _scvi_version() -> str:
    try:
        return version("scvi-tools")
    except PackageNotFoundError as error:
        raise ImportError("ScviDataModule needs scvi-tools: pip install scvi-tools") from error
