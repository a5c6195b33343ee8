"""Where every cell of the cohort lies in a model's latent space: latent.zarr.

A store of cells (atlas/cell_store.py) without genes: obsm `X_latent` holds the posterior means, `X_latent_std` the
posterior standard deviations, `X_latent_samples`, if the config asks for any, draws from the posterior, (n, s, k), and
`X_label`, of a model with labels, their probabilities, in the order of uns/labels.
"""

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pandas as pd
import torch
import zarr

from cohortvi.atlas.cell_store import Block, write_cells
from cohortvi.config import Embed
from cohortvi.files import digest, read_json
from cohortvi.inference.covariates import Sheet
from cohortvi.inference.labels import label_probabilities
from cohortvi.inference.posteriors import DiagonalGaussian, Gaussian, Posterior
from cohortvi.inference.prepare import EMBED, seed_torch
from cohortvi.inference.reading import Chunk, Source
from cohortvi.inference.refinement import Refined, refined
from cohortvi.store.counts import CountsReader
from cohortvi.store.layout import quiet

LABEL = "obsm/X_label"
MOMENT_DRAWS = 128  # of which a posterior without closed moments has them, the same draws for all cells


class Latent(NamedTuple):
    """A latent store in memory: the cells' names, posterior means and standard deviations (n, k) float32."""

    manifest: dict[str, Any]
    names: pd.Index
    mean_nk: np.ndarray
    std_nk: np.ndarray


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
    seed: int,
    chunk_cells: int,
    threads: int,
) -> dict[str, Any]:
    """Write the store `out` for the cells of the counts stores with these manifests, in order; return its manifest.

    `sheet`: as `fit` takes it; `seed`: of samples and refinement; `chunk_cells`: cells encoded together. The manifest
    holds n_obs, n_latent, cells by sample, how many were refined and what that changed, and a digest of all that is
    written. Errors: ValueError if a store has other genes than the model, or, for a model that encodes covariates or
    refines, a value that it was not trained on.
    """
    source = Source(model, counts, sheet=sheet, threads=threads)
    encoder, n_latent = _Encoder(source, settings, seed), source.vae.n_latent
    shapes = {"obsm/X_latent": (n_latent,), "obsm/X_latent_std": (n_latent,)}
    shapes |= {"obsm/X_latent_samples": (settings.samples, n_latent)} if settings.samples else {}
    labels = source.columns.labels
    shapes |= {LABEL: (len(labels),)} if labels else {}
    stores = enumerate(source.stores())
    cells = (block for code, reader in stores for block in encoder.encode(reader, code, chunk_cells))

    def facts() -> dict[str, Any]:
        return {"n_latent": n_latent, "refined": encoder.changes.facts()}

    uns = {"labels": np.array(labels, dtype=object)} if labels else None
    return write_cells(out, source.samples, shapes, cells, facts, uns=uns)


def open_latent(manifest: str | Path) -> Latent:
    """Read the latent store beside its manifest. Errors: ValueError if the two do not belong together."""
    path, facts = Path(manifest).with_suffix(".zarr"), read_json(manifest)
    with quiet():
        root = zarr.open_group(path, mode="r")
        if root.attrs.get("manifest") != facts:
            raise ValueError(f"{path}: not the store of its manifest {manifest}; expected both of one run. Embed again")
        obsm = root["obsm"]
        return Latent(facts, pd.Index(root["obs/_index"][:]), obsm["X_latent"][:], obsm["X_latent_std"][:])


def predicted_labels(manifest: str | Path) -> pd.DataFrame:
    """Return the likeliest label of every cell and its probability, a chunk at a time; no column without labels.

    Columns: predicted_label (categorical), label_probability; index: the cells' names.
    """
    root = zarr.open_group(Path(manifest).with_suffix(".zarr"), mode="r")
    cells = pd.DataFrame(index=pd.Index(root["obs/_index"][:]))
    if LABEL not in root:
        return cells
    labels, array = list(root["uns/labels"][:]), root[LABEL]
    code_n, probability_n = np.empty(len(cells), np.int64), np.empty(len(cells), np.float32)
    for start in range(0, len(cells), array.shards[0]):
        here = slice(start, start + array.shards[0])
        part_nl = array[here]
        code_n[here], probability_n[here] = part_nl.argmax(1), part_nl.max(1)
    return cells.assign(predicted_label=pd.Categorical.from_codes(code_n, labels), label_probability=probability_n)


class _Encoder:
    """A model that encodes the cells of counts stores, told their covariates if it asks for them."""

    def __init__(self, source: Source, settings: Embed, seed: int):
        self.source, self.vae, self.settings, self.seed = source, source.vae, settings, seed
        self.changes = Changes()
        noise_snk = torch.randn(MOMENT_DRAWS, 1, self.vae.n_dimensions, generator=torch.Generator().manual_seed(0))
        self.noise_snk = noise_snk.to(source.device)

    @torch.no_grad()
    def encode(self, reader: CountsReader, code: int, chunk_cells: int) -> Iterator[Block]:
        """Yield the cells of a store, in order, as those of the sample with this code."""
        names = reader.obs.index.to_numpy(dtype=object)
        # An encoder that is not told the covariates gives new batches a place, too: their code is not looked at.
        is_told = self.vae.encode_covariates or self.settings.refine_above is not None
        for chunk in self.source.chunks(reader, chunk_cells, is_told=is_told):
            qz = self.vae.encode(chunk.x, chunk.covariates)
            start = DiagonalGaussian(*qz.moments(self.noise_snk))
            rows_m, own = self._refine(chunk, qz, start, *reader.manifest["samples"])
            moments = zip(start, own.moments(self.noise_snk), strict=True)
            values = [whole.index_copy(0, rows_m, part) for whole, part in moments]
            if self.settings.samples:
                noise_snk = self.source.noise(reader, chunk, self.settings.samples, (self.seed, EMBED))
                z_snk = qz.draw(noise_snk)[0].index_copy(1, rows_m, own.sample(noise_snk[:, rows_m]))
                values.append(z_snk.transpose(0, 1))
            values = [value[..., : self.vae.n_latent] for value in values]
            if self.vae.n_labels:
                probabilities_nl = label_probabilities(self.vae, qz)
                values.append(probabilities_nl.index_copy(0, rows_m, label_probabilities(self.vae, own)))
            found = tuple(value.cpu().numpy() for value in values)
            yield Block(names[chunk.start : chunk.stop], np.full(chunk.stop - chunk.start, code), found)

    def _refine(
        self, chunk: Chunk, qz: Posterior, start: DiagonalGaussian, sample: str
    ) -> tuple[torch.Tensor, Gaussian]:
        """Return the numbers of the chunk's cells that have a posterior of their own, and these posteriors.

        Random numbers are those of seed, sample and chunk: samples that come later change nothing.
        """
        above = self.settings.refine_above
        if above is None:
            none = torch.empty(0, dtype=torch.int64, device=self.vae.device)
            return none, DiagonalGaussian(*(values[none] for values in start))
        seed_torch(self.seed, EMBED, int(digest(sample, chunk.start), 16))
        found = refined(self.vae, chunk.x, chunk.covariates, qz, start, above=above, steps=self.settings.steps)
        self.changes.add(found)
        return found.rows_m, found.own
