"""Where every cell of the cohort lies in a model's latent space: latent.zarr.

A valid AnnData without genes: obs holds the cells' names and samples in the order of the counts stores, obsm
`X_latent` the posterior means and `X_latent_std` the posterior standard deviations, float32. Cells are taken in the
order of the stores and written a shard of cells at a time, so memory does not grow with the cohort.
"""

import hashlib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import anndata as ad
import numpy as np
import pandas as pd
import torch
import zarr
from zarr.codecs import BloscCodec
from zarr.core.dtype import VariableLengthUTF8

from cohortvi.config import Embed
from cohortvi.files import read_json, replacing
from cohortvi.inference.checkpoint import load_model
from cohortvi.inference.covariates import Columns, Sheet
from cohortvi.inference.networks import Covariates
from cohortvi.inference.posteriors import DiagonalGaussian
from cohortvi.inference.prepare import choose_device, on_device, output_for, seed_torch
from cohortvi.inference.reading import check_genes, covariates_of
from cohortvi.inference.refinement import Refined, refined
from cohortvi.inference.sparse import Counts
from cohortvi.inference.vae import VAE
from cohortvi.store.counts import CountsReader
from cohortvi.store.layout import quiet
from cohortvi.store.loader import Loader
from cohortvi.store.opening import open_counts
from cohortvi.store.sharded import ShardedCounts

SHARD_CELLS = 131_072  # cells a file
CHUNK_CELLS = 8_192  # cells decoded together
MOMENT_DRAWS = 128  # of which a posterior without closed moments has them, the same draws for all cells


class Latent(NamedTuple):
    """A latent store in memory: the cells' names, posterior means and standard deviations (n, k) float32."""

    manifest: dict[str, Any]
    names: pd.Index
    mean_nk: np.ndarray
    std_nk: np.ndarray


class Cells(NamedTuple):
    """Consecutive cells: names (n,), the code of their sample (n,), posterior mean and standard deviation (n, k)."""

    names: np.ndarray
    samples: np.ndarray
    loc_nk: np.ndarray
    scale_nk: np.ndarray


class Changes:
    """What refinement changed, over all cells."""

    def __init__(self) -> None:
        self.cells, self.gain, self.shift = 0, 0.0, 0.0

    def add(self, found: Refined) -> None:
        """Take in what became of some cells."""
        self.cells += len(found.gain_m)
        self.gain += float(found.gain_m.double().sum())
        self.shift += float(found.shift_m.double().sum())

    def facts(self) -> dict[str, float]:
        """Return the cells refined, their mean gain in ELBO (nats) and mean shift of the posterior mean (in sd)."""
        n = max(1, self.cells)
        return {"cells": self.cells, "elbo_gain": self.gain / n, "shift": self.shift / n}


def embed(
    model: str | Path,
    counts: Sequence[str | Path],
    out: str | Path,
    settings: Embed,
    *,
    sheet: Sheet,
    chunk_cells: int,
    threads: int,
) -> dict[str, Any]:
    """Write the store `out` for the cells of the counts stores with these manifests, in order; return its manifest.

    `sheet`: as `fit` takes it; `chunk_cells`: cells encoded together. The manifest holds n_obs, n_latent, cells by
    sample, how many were refined and what that changed, and a digest of names, means and standard deviations.
    Errors: ValueError if a store has other genes than the model, or, for a model that encodes covariates or refines, a
    value that it was not trained on.
    """
    torch.set_num_threads(threads)
    vae, facts = load_model(model)
    encoder = _Encoder(vae, Columns.from_facts(facts), sheet, choose_device(facts["settings"]["device"]), settings)
    readers = [open_counts(path, facts["genes"]) for path in counts]
    for reader in readers:
        check_genes(reader, facts["genes"])
    samples = {sample: n for reader in readers for sample, n in reader.manifest["samples"].items()}
    manifest = {"n_obs": sum(samples.values()), "n_latent": vae.n_latent, "samples": samples}
    with replacing(out) as partial, quiet(), ad.settings.override(auto_shard_zarr_v3=True):
        root = _create(partial, list(samples), manifest["n_obs"], vae.n_latent)
        cells = (block for code, reader in enumerate(readers) for block in encoder.encode(reader, code, chunk_cells))
        manifest["content"] = _write(root, cells)
        manifest["refined"] = encoder.changes.facts()
        root.attrs["manifest"] = manifest
        zarr.consolidate_metadata(partial)
    return manifest


def open_latent(manifest: str | Path) -> Latent:
    """Read the latent store beside its manifest. Errors: ValueError if the two do not belong together."""
    path, facts = Path(manifest).with_suffix(".zarr"), read_json(manifest)
    with quiet():
        root = zarr.open_group(path, mode="r")
        if root.attrs.get("manifest") != facts:
            raise ValueError(f"{path}: not the store of its manifest {manifest}; expected both of one run. Embed again")
        obsm = root["obsm"]
        return Latent(facts, pd.Index(root["obs/_index"][:]), obsm["X_latent"][:], obsm["X_latent_std"][:])


class _Encoder:
    """A model that encodes the cells of counts stores, told their covariates if it asks for them."""

    def __init__(self, vae: VAE, columns: Columns, sheet: Sheet, device: torch.device, settings: Embed):
        self.vae, self.columns, self.sheet, self.device = vae.to(device), columns, sheet, device
        self.settings, self.changes = settings, Changes()
        vae.requires_grad_(requires_grad=False)
        noise_snk = torch.randn(MOMENT_DRAWS, 1, vae.n_dimensions, generator=torch.Generator().manual_seed(0))
        self.noise_snk = noise_snk.to(device)

    @torch.no_grad()
    def encode(self, reader: CountsReader, code: int, chunk_cells: int) -> Iterator[Cells]:
        """Yield the cells of a store, in order, as those of the sample with this code."""
        names = reader.obs.index.to_numpy(dtype=object)
        is_told = self.vae.encode_covariates or self.settings.refine_above is not None
        values = covariates_of(reader, self.columns, self.sheet) if is_told and reader.n_obs else {}
        store = ShardedCounts([reader])
        for x, _, rows in Loader(store, batch_size=chunk_cells, seed=0, shuffle=False, output=output_for(self.device)):
            start, stop = rows[0], rows[-1] + 1
            here = {name: torch.from_numpy(column[start:stop]) for name, column in values.items()}
            # An encoder that is not told the covariates gives new batches a place, too: their code is not looked at.
            unknown = Covariates(torch.zeros(len(rows), dtype=torch.int64, device=self.device))
            known = self.columns.covariates(here, self.device) if here else unknown
            counts = on_device(x, self.device)
            moments = self.vae.encode(counts, known).moments(self.noise_snk)
            if self.settings.refine_above is not None:
                moments = self._refine(counts, known, DiagonalGaussian(*moments), (code, start))
            loc_nk, scale_nk = (value[:, : self.vae.n_latent].cpu().numpy() for value in moments)
            yield Cells(names[start:stop], np.full(stop - start, code), loc_nk, scale_nk)

    def _refine(
        self, x: Counts, known: Covariates, start: DiagonalGaussian, where: tuple[int, int]
    ) -> tuple[torch.Tensor, torch.Tensor]:
        seed_torch(0, *where)
        found = refined(self.vae, x, known, start, self.settings.refine_above, self.settings.steps)
        self.changes.add(found)
        return found.loc_nk, found.scale_nk


def _create(path: Path, samples: list[str], n_obs: int, n_latent: int) -> zarr.Group:
    """Create the store with room for all cells."""
    root = zarr.open_group(path, mode="w", zarr_format=3)
    root.attrs.update({"encoding-type": "anndata", "encoding-version": "0.1.0"})
    ad.io.write_elem(root, "var", pd.DataFrame(index=pd.Index([], dtype=object)))
    frame = {"encoding-type": "dataframe", "encoding-version": "0.2.0", "_index": "_index", "column-order": ["sample"]}
    obs = root.create_group("obs", attributes=frame)
    _create_array(obs, "_index", (n_obs,), VariableLengthUTF8())
    column = {"encoding-type": "categorical", "encoding-version": "0.2.0", "ordered": False}
    sample = obs.create_group("sample", attributes=column)
    ad.io.write_elem(sample, "categories", np.array(samples, dtype=object))
    _create_array(sample, "codes", (n_obs,), np.dtype("int32"))
    obsm = root.create_group("obsm", attributes={"encoding-type": "dict", "encoding-version": "0.1.0"})
    for name in ("X_latent", "X_latent_std"):
        _create_array(obsm, name, (n_obs, n_latent), np.dtype("float32"))
    return root


def _create_array(group: zarr.Group, name: str, shape: tuple[int, ...], dtype: np.dtype | VariableLengthUTF8) -> None:
    is_text = isinstance(dtype, VariableLengthUTF8)
    chunk = min(max(shape[0], 1), CHUNK_CELLS)
    whole = min(-(-max(shape[0], 1) // chunk) * chunk, SHARD_CELLS)
    group.create_array(
        name,
        shape=shape,
        dtype=dtype,
        chunks=(chunk, *shape[1:]),
        shards=(whole, *shape[1:]),
        compressors=[BloscCodec(cname="zstd", clevel=3, shuffle="noshuffle" if is_text else "shuffle")],
        attributes={"encoding-type": "string-array" if is_text else "array", "encoding-version": "0.2.0"},
    )


def _write(root: zarr.Group, cells: Iterator[Cells]) -> str:
    """Write cells in order and return their digest; whole shards, for a part of one would be read and written again."""
    arrays = Cells(root["obs/_index"], root["obs/sample/codes"], root["obsm/X_latent"], root["obsm/X_latent_std"])
    sha, start = hashlib.sha256(), 0
    for part in _in_shards(cells):
        for array, values in zip(arrays, part, strict=True):
            array[start : start + len(values)] = values
        start += len(part.names)
        sha.update("\0".join([*part.names, ""]).encode())
        for values in (part.loc_nk, part.scale_nk):
            sha.update(np.ascontiguousarray(values, dtype="<f4"))
    return sha.hexdigest()[:16]


def _in_shards(cells: Iterator[Cells]) -> Iterator[Cells]:
    """Yield the same cells, SHARD_CELLS at a time; the last are as many as are left."""
    waiting: list[Cells] = []
    for block in cells:
        waiting.append(block)
        while sum(len(part.names) for part in waiting) >= SHARD_CELLS:
            joined = _join(waiting)
            yield Cells(*(values[:SHARD_CELLS] for values in joined))
            waiting = [Cells(*(values[SHARD_CELLS:] for values in joined))]
    if sum(len(part.names) for part in waiting):
        yield _join(waiting)


def _join(parts: list[Cells]) -> Cells:
    return Cells(*(np.concatenate(values) for values in zip(*parts, strict=True)))
