"""The methods of quality.py: each gives all cells of a cohort a place, and, if it is a model, held-out cells log p(x).

Models see the cells that are not held out: nine tenths of them to train on, one to validate on, the same for ours and
for scvi-tools'. PCA and Harmony see all cells. log p(x) of ours and of scvi-tools' models comes from the same lines:
DRAWS importance samples from the encoder's posterior, of the same JUDGED held-out cells, in nats per cell.
"""

import logging
import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, fields, replace
from functools import cached_property, partial
from importlib.metadata import version
from pathlib import Path
from typing import Any, NamedTuple

import anndata as ad
import numpy as np
import pandas as pd
import scanpy as sc
import torch
import yaml
from cohorts import write_shards
from torch import Tensor
from torch.distributions import Normal

from cohortvi.config import Model
from cohortvi.files import digest, replacing
from cohortvi.inference.bounds import LogJoint, importance, log_weights
from cohortvi.inference.networks import Covariates
from cohortvi.inference.posteriors import DiagonalGaussian, Posterior, standard_normal_log_prob
from cohortvi.inference.prepare import PASSING
from cohortvi.inference.sparse import sparse_counts
from cohortvi.inference.train import fit
from cohortvi.inference.vae import VAE
from cohortvi.store.opening import open_counts
from cohortvi.typed import build

ROOT = Path(__file__).parent.parent
HELD_OUT = 0.15  # share of the cells
JUDGED, DRAWS = 500, 500  # held-out cells whose log p(x) is estimated, and draws for each
MOMENT_DRAWS = 128  # of which a flow has its posterior means
TOGETHER = 2048  # cells encoded together
UNKNOWN = "unknown"  # type of a cell that semi-supervised models are not told

# Settings other than those of the model `nb` in config/config.yaml.
OURS: dict[str, dict[str, Any]] = {
    "cohortvi NB": {},
    "cohortvi ZINB": {"likelihood": "zinb"},
    "cohortvi VampPrior": {"prior": "vamp"},
    "cohortvi flow": {"posterior": "flow"},
    "cohortvi semi-supervised": {
        "prior": "mixture",
        "prior_shrinkage": 0.0,  # the most accurate with labels (docs/inference.md, section 10)
        "labels": {"column": "cell_type", "unknown": [UNKNOWN], "weight": 30.0},
    },
}


class Found(NamedTuple):
    """What a method makes of a cohort: a place for each cell (n, k), mean held-out log p(x), processor seconds."""

    latent_nk: np.ndarray
    log_p: float | None
    seconds: float


@dataclass(frozen=True)
class Task:
    """A cohort and a seed: what is held out, and what several methods need. `kept`: a folder for models to be kept."""

    cells: ad.AnnData
    seed: int
    scratch: Path
    kept: Path
    epochs: int | None  # instead of each model's own

    @cached_property
    def is_held_out(self) -> np.ndarray:
        """Cells that no model sees, (n,)."""
        return np.random.default_rng(self.seed).random(self.cells.n_obs) < HELD_OUT

    @cached_property
    def judged(self) -> np.ndarray:
        """Rows of the held-out cells whose log p(x) is estimated."""
        rows = np.flatnonzero(self.is_held_out)
        return np.sort(np.random.default_rng(self.seed).permutation(rows)[:JUDGED])

    @cached_property
    def told(self) -> pd.Series:
        """Types that semi-supervised models are told, by cell."""
        types = self.cells.obs["cell_type"].astype(object)
        return types.where(types.notna() & ~self.is_held_out, UNKNOWN).astype(str)

    @cached_property
    def shards(self) -> tuple[list[Path], list[Path]]:
        """Manifests of the shards to train on and to validate on."""
        seen = self.cells[~self.is_held_out].copy()
        seen.obs["cell_type"] = self.told[~self.is_held_out]
        return write_shards(seen, self.scratch / "shards")

    @cached_property
    def split(self) -> list[np.ndarray]:
        """Rows to train on, to validate on, and held out, as scvi-tools takes them."""
        names = [np.concatenate([open_counts(path).obs.index for path in paths]) for paths in self.shards]
        rows = [np.flatnonzero(self.cells.obs_names.isin(found)) for found in names]
        return [*rows, np.flatnonzero(self.is_held_out)]

    @cached_property
    def pca_nk(self) -> np.ndarray:
        """50 principal components of standardised log1p of counts per 10,000, the total being that over all genes."""
        total_n1 = self.cells.obs["total_counts"].to_numpy()[:, None]
        normal = ad.AnnData(self.cells.X.multiply(1e4 / total_n1).tocsr().astype(np.float32))
        sc.pp.log1p(normal)
        sc.pp.scale(normal, max_value=10)
        sc.pp.pca(normal, n_comps=50, random_state=self.seed)
        return normal.obsm["X_pca"]


def pca(task: Task) -> Found:
    """Principal components, without any correction."""
    began = time.process_time()
    return Found(task.pca_nk, None, time.process_time() - began)


def harmony(task: Task) -> Found:
    """Harmony on the principal components, with its defaults."""
    from harmonypy import run_harmony

    components, began = task.pca_nk, time.process_time()
    common = {"random_state": task.seed, "ncores": 1, "verbose": False}
    corrected = np.asarray(run_harmony(components, task.cells.obs, "sample", **common).Z_corr)
    return Found(corrected if len(corrected) == len(components) else corrected.T, None, time.process_time() - began)


def settings(changes: dict[str, Any]) -> Model:
    """Return the settings of config.yaml but for `changes`."""
    values = yaml.safe_load((ROOT / "config/config.yaml").read_text())["models"]["nb"]
    return replace(build(Model, values | changes), device="cpu")


def ours(changes: dict[str, Any], task: Task) -> Found:
    """Our model with the settings of config.yaml but for `changes`, on one thread."""
    model = settings(changes)
    if task.epochs is not None:
        model = replace(model, max_epochs=min(task.epochs, model.max_epochs), min_steps=0)
    began = time.process_time()
    with tempfile.TemporaryDirectory(dir=task.scratch) as folder:
        vae, _, facts = fit(*task.shards, model, sheet={}, seed=task.seed, checkpoints=Path(folder), threads=1)
    seconds = time.process_time() - began
    torch.manual_seed(task.seed)
    latent_nk = our_latent(vae, facts, task.cells)
    log_p_n = log_likelihood(*our_joint(vae, facts, task.cells[task.judged]), len(task.judged), vae.n_dimensions)
    return Found(latent_nk, float(log_p_n.mean()), seconds)


@torch.no_grad()
def our_latent(vae: VAE, facts: dict[str, Any], cells: ad.AnnData) -> np.ndarray:
    """Return the posterior mean of each cell, (n, k)."""
    noise_snk, parts = torch.randn(MOMENT_DRAWS, 1, vae.n_dimensions), []
    for start in range(0, cells.n_obs, TOGETHER):
        x, covariates = as_ours(facts, cells[start : start + TOGETHER])
        parts.append(vae.encode(x, covariates).moments(noise_snk)[0].numpy())
    return np.concatenate(parts)


def our_joint(vae: VAE, facts: dict[str, Any], cells: ad.AnnData) -> tuple[LogJoint, Posterior]:
    """Return z -> log p(x, z) of these cells, and the encoder's posterior."""
    x, covariates = as_ours(facts, cells)
    with torch.no_grad():
        return vae.log_joint(x, covariates), vae.encode(x, covariates)


def as_ours(facts: dict[str, Any], cells: ad.AnnData) -> tuple[Any, Covariates]:
    """Return counts and batch as our models take them."""
    x = cells[:, facts["genes"]].X.tocsr()
    x.sort_indices()
    tensors = torch.from_numpy(x.indptr.astype(np.int64)), torch.from_numpy(x.indices.astype(np.int32))
    batch_n = pd.Index(facts["batches"]).get_indexer(cells.obs["sample"].astype(str))
    counts = sparse_counts(*tensors, torch.from_numpy(x.data.astype(np.float32)), x.shape[1])
    return counts, Covariates(torch.from_numpy(batch_n.astype(np.int64)))


def scvi_trained(task: Task) -> tuple[Any, float]:
    """Return scvi-tools' SCVI with its defaults, and the seconds it took: trained now, or kept from before."""
    import scvi

    scvi.settings.verbosity = logging.ERROR
    scvi.settings.seed = task.seed
    scvi.model.SCVI.setup_anndata(task.cells, batch_key="sample")
    if not task.kept.exists():
        model, began = scvi.model.SCVI(task.cells), time.process_time()
        train_theirs(model, task, task.epochs)
        with replacing(task.kept) as partial_folder:
            model.save(partial_folder)
            (partial_folder / "seconds").write_text(f"{time.process_time() - began}")
    return scvi.model.SCVI.load(task.kept, task.cells, accelerator="cpu"), float((task.kept / "seconds").read_text())


def train_theirs(model: Any, task: Task, epochs: int | None) -> None:
    """Train a model of scvi-tools on the cells that ours are trained on; None: as many epochs as it thinks right."""
    options = {"accelerator": "cpu", "enable_progress_bar": False}
    model.train(epochs, datasplitter_kwargs={"external_indexing": task.split}, **options)


def scvi(task: Task) -> Found:
    """SCVI of scvi-tools with its defaults: ZINB, 400 epochs for cohorts of less than 20,000 cells."""
    model, seconds = scvi_trained(task)
    return judged(model, task, seconds)


def scanvi(task: Task) -> Found:
    """SCANVI of scvi-tools with its defaults, from the SCVI of the same seed; told the types of the cells it sees."""
    from scvi.model import SCANVI

    trained, seconds = scvi_trained(task)
    task.cells.obs["told_type"] = task.told
    model, began = SCANVI.from_scvi_model(trained, UNKNOWN, labels_key="told_type"), time.process_time()
    train_theirs(model, task, task.epochs)
    return judged(model, task, seconds + time.process_time() - began)


def judged(model: Any, task: Task, seconds: float) -> Found:
    """Return what a model of scvi-tools makes of the cells."""
    model.module.eval()
    torch.manual_seed(task.seed)
    loader = model._make_data_loader(adata=model.adata, indices=task.judged, batch_size=JUDGED)
    log_p_n = log_likelihood(*their_joint(model.module, next(iter(loader))), len(task.judged), model.module.n_latent)
    return Found(model.get_latent_representation(batch_size=TOGETHER), float(log_p_n.mean()), seconds)


@torch.no_grad()
def their_joint(module: Any, tensors: dict[str, Tensor]) -> tuple[LogJoint, Posterior]:
    """Return z -> log p(x, z) of these cells, and the encoder's posterior, of a module of scvi-tools."""
    x_ng, batch_n1 = tensors["X"].float(), tensors["batch"]
    found = module.inference(x_ng, batch_n1)
    log_prior = partial(scanvi_log_prior, module) if hasattr(module, "encoder_z2_z1") else standard_normal_log_prob

    def log_joint(z_nk: Tensor) -> Tensor:
        px = module.generative(z_nk, found["library"], batch_n1)["px"]
        return px.log_prob(x_ng).sum(1) + log_prior(z_nk)

    return log_joint, DiagonalGaussian(found["qz"].loc, found["qz"].scale)


@torch.no_grad()
def scanvi_log_prior(module: Any, z_nk: Tensor) -> Tensor:
    """Return the log of an estimate of SCANVI's p(z1) = sum_y p(y) int p(z1 | z2, y) p(z2) dz2, (n, k) -> (n,).

    One draw of q(z2 | z1, y) for every type y: unbiased, and so are importance weights made with it.
    """
    from scvi.module._utils import broadcast_labels

    y_my, z1_mk = broadcast_labels(z_nk, n_broadcast=module.n_labels)
    qz2, z2_mk = module.encoder_z2_z1(z1_mk, y_my)
    loc_mk, variance_mk = module.decoder_z1_z2(z2_mk, y_my)
    log_p_mk = Normal(loc_mk, variance_mk.sqrt()).log_prob(z1_mk) + Normal(0.0, 1.0).log_prob(z2_mk)
    log_p_yn = (log_p_mk - qz2.log_prob(z2_mk)).sum(1).reshape(module.n_labels, -1)
    return (log_p_yn + module.y_prior.detach().log().T).logsumexp(0)


@torch.no_grad()
def log_likelihood(log_joint: LogJoint, q: Posterior, n: int, n_dimensions: int) -> Tensor:
    """Return log p(x) of each cell by importance sampling, (n,), in nats; random numbers are torch's."""
    noise_snk = torch.randn(DRAWS, n, n_dimensions)
    return importance(log_weights(log_joint, q, noise_snk).double(), DRAWS).bound_n


METHODS: dict[str, Callable[[Task], Found]] = {
    "PCA": pca,
    "Harmony": harmony,
    **{name: partial(ours, changes) for name, changes in OURS.items()},
    "scVI": scvi,
    "scANVI": scanvi,
}


PACKAGES = {"PCA": "scanpy", "Harmony": "harmonypy", "scVI": "scvi-tools", "scANVI": "scvi-tools"}


def made_by(method: str) -> str:
    """Return what a method's results follow from, beside cohort and seed: a package's version, or our settings."""
    if method in PACKAGES:
        return f"{PACKAGES[method]} {version(PACKAGES[method])}"
    model, idle = settings(OURS[method]), {*PASSING, "precision"}  # all is float32 here
    if model.prior == "standard_normal":
        idle.add("prior_shrinkage")
    chosen = {name: value for name, value in asdict(model).items() if name not in idle}
    return f"cohortvi {digest(chosen)[:8]}"


def why_not(method: str) -> str | None:
    """Return why a method cannot run, or None if it can."""
    unknown = set(OURS.get(method, {})) - {field.name for field in fields(Model)}
    return f"models have no setting {', '.join(sorted(unknown))}" if unknown else None
