"""The account of every cell: what came in is what was kept plus what was removed by each reason, at every stage."""

from collections.abc import Mapping, Sequence

import pandas as pd


def account(
    qc: Sequence[dict],
    counts: Sequence[dict],
    shards: Sequence[dict],
    models: Mapping[str, tuple[dict, dict]],
) -> pd.DataFrame:
    """Return a row per sample: cells_in, removed_REASON, kept, quarantined, counts, train, validation, and per model
    latent_MODEL and atlas_MODEL.

    `qc`: facts of run_qc; the others: manifests, whose `samples` give the cells per sample; `models`: of the latent
    store and of the atlas. Errors: ValueError that names sample and stage wherever cells are lost or appear.
    """
    reasons = sorted({reason for facts in qc for reason in facts["removed"]})
    rows = []
    for facts in qc:
        name = facts["sample"]
        row = {"sample": name, "cells_in": facts["n_obs"]}
        row |= {f"removed_{reason}": facts["removed"].get(reason, 0) for reason in reasons}
        row |= {"kept": facts["n_kept"], "quarantined": facts["quarantined"] or ""}
        row["counts"] = _cells(counts, name)
        for split in ("train", "validation"):
            row[split] = _cells([shard for shard in shards if shard["split"] == split], name)
        for model, (latent, atlas) in models.items():
            row |= {f"latent_{model}": _cells([latent], name), f"atlas_{model}": _cells([atlas], name)}
        rows.append(row)
    ledger = pd.DataFrame(rows)
    _check(ledger, list(models))
    return ledger


def _cells(manifests: Sequence[dict], sample: str) -> int:
    return sum(manifest["samples"].get(sample, 0) for manifest in manifests)


def _check(ledger: pd.DataFrame, models: Sequence[str]) -> None:
    removed = ledger.filter(regex="^removed_").sum(axis=1)
    stages = {
        "qc": (ledger["cells_in"], ledger["kept"] + removed),
        "extract": (ledger["kept"], ledger["counts"]),
        "shard": (ledger["counts"], ledger["train"] + ledger["validation"]),
    }
    for model in models:
        stages[f"embed of model {model}"] = (ledger["counts"], ledger[f"latent_{model}"])
        stages[f"atlas of model {model}"] = (ledger["counts"], ledger[f"atlas_{model}"])
    faults = [
        f"{stage}: sample {ledger['sample'][i]!r} has {before[i]} cells before and {after[i]} accounted for after"
        for stage, (before, after) in stages.items()
        for i in ledger.index[before != after]
    ]
    if faults:
        raise ValueError(
            "cells are unaccounted for:\n" + "\n".join(f"  - {fault}" for fault in faults) + "\nexpected as many after "
            "each stage as before it. Remove the results of that stage for these samples and run again."
        )
