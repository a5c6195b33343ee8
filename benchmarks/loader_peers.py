"""The loaders that are measured, ours and others', behind one interface.

`open` takes the store's path, batch size, output (dense or csr) and setting of a loader; it returns a function that
begins an epoch, i.e. gives an iterator over minibatches in random order: arrays on the CPU, dense float32 or sparse.
`write`, if a loader has a format of its own, makes its store out of an h5ad in a folder and returns the store's path;
others read the h5ad. No loader delivers columns of obs. Imports wait: every loader has an environment of its own.
"""

from collections.abc import Callable, Iterator
from itertools import count
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

Begin = Callable[[], Iterator[Any]]


class Peer(NamedTuple):
    """A loader: see above. `modules` are imported before its memory counts; `packages` are named in the results."""

    environment: str  # own, or NAME of requirements-NAME.txt
    modules: tuple[str, ...]
    packages: tuple[str, ...]
    settings: dict[str, tuple[str, ...]]  # by output
    open: Callable[[str, int, str, str], Begin]
    write: Callable[[str, str], str] | None = None


def _open_cohortvi(path: str, batch_size: int, output: str, setting: str) -> Begin:
    """`setting`: the loader's own name of the output."""
    import os

    from cohortvi.store.loader import Loader
    from cohortvi.store.sharded import ShardedCounts

    store, threads = ShardedCounts(sorted(Path(path).glob("*.json"))), len(os.sched_getaffinity(0))
    loader = Loader(store, batch_size=batch_size, seed=0, output=setting, threads=threads)
    epochs = count()

    def begin() -> Iterator[Any]:
        loader.epoch, loader.step = next(epochs), 0  # it would go on where it was left
        return (minibatch.x_ng for minibatch in loader)

    return begin


def _write_cohortvi(h5ad: str, folder: str) -> str:
    from loaders import prepare

    return prepare(h5ad, folder)


def _use_zarrs() -> None:
    import zarr

    zarr.config.set({"codec_pipeline.path": "zarrs.ZarrsCodecPipeline"})


def _open_annbatch(path: str, batch_size: int, output: str, setting: str) -> Begin:
    """`setting`: cells read together x how many of these are mixed. Made dense by scipy: torch takes far longer."""
    import anndata as ad
    from annbatch import DatasetCollection, Loader

    _use_zarrs()
    chunk_size, preload_nchunks = map(int, setting.split("x"))
    loader = Loader(
        batch_size=batch_size,
        chunk_size=chunk_size,
        preload_nchunks=preload_nchunks,
        shuffle=True,
        preload_to_gpu=False,
        rng=np.random.default_rng(0),
    )
    loader.use_collection(
        DatasetCollection(path, mode="r"), load_adata=lambda group: ad.AnnData(ad.io.sparse_dataset(group["X"]))
    )

    def begin() -> Iterator[Any]:
        for minibatch in loader:
            yield minibatch["X"].toarray() if output == "dense" else minibatch["X"]

    return begin


def _write_annbatch(h5ad: str, folder: str) -> str:
    from annbatch import DatasetCollection

    _use_zarrs()
    path = str(Path(folder) / "collection.zarr")
    DatasetCollection(path).add_adatas([h5ad], shuffle=True)
    return path


class _Rows:
    """A CSR matrix on disk as scDataset wants it."""

    def __init__(self, x: Any):
        self.x = x

    def __len__(self) -> int:
        return self.x.shape[0]

    def __getitem__(self, rows: np.ndarray) -> Any:
        return self.x[rows]


def _open_scdataset(path: str, batch_size: int, output: str, setting: str) -> Begin:
    """`setting`: consecutive cells read together / cells mixed."""
    import anndata as ad
    import h5py
    from scdataset import BlockShuffling, scDataset

    block, window = map(int, setting.split("/"))
    rows = _Rows(ad.io.sparse_dataset(h5py.File(path)["X"]))
    strategy = BlockShuffling(block_size=block)
    dataset = scDataset(rows, strategy, batch_size=batch_size, fetch_factor=max(1, window // batch_size), seed=0)

    def begin() -> Iterator[Any]:
        for x in dataset:
            yield x.toarray() if output == "dense" else x

    return begin


def _open_scvi(path: str, batch_size: int, output: str, setting: str) -> Begin:
    import anndata as ad
    from scvi.data import AnnDataManager
    from scvi.data.fields import LayerField
    from scvi.dataloaders import AnnDataLoader

    manager = AnnDataManager([LayerField("X", layer=None, is_count_data=True)])
    manager.register_fields(ad.read_h5ad(path))
    loader = AnnDataLoader(manager, batch_size=batch_size, shuffle=True, load_sparse_tensor=output == "csr")
    return lambda: (tensors["X"] for tensors in loader)


def _open_scipy(path: str, batch_size: int, output: str, setting: str) -> Begin:
    import anndata as ad

    x, rng = ad.read_h5ad(path).X, np.random.default_rng(0)

    def begin() -> Iterator[Any]:
        order = rng.permutation(x.shape[0])
        for start in range(0, len(order), batch_size):
            rows = x[order[start : start + batch_size]]
            yield rows.toarray() if output == "dense" else rows

    return begin


def _both(*settings: str) -> dict[str, tuple[str, ...]]:
    return {"dense": settings, "csr": settings}


COMMON = ("numpy", "scipy", "anndata")
PEERS = {
    "cohortvi": Peer(
        "own",
        ("cohortvi.store.loader", "loaders"),
        ("cohortvi", "numpy", "numba", "numcodecs", "torch", "zarr"),
        {"dense": ("dense", "counts"), "csr": ("csr", "csr_counts")},
        _open_cohortvi,
        _write_cohortvi,
    ),
    "annbatch": Peer(
        "annbatch",
        ("annbatch", "zarrs", "anndata"),
        ("annbatch", "zarr", "zarrs", *COMMON),
        _both("32x256", "512x32", "512x64", "2048x16"),
        _open_annbatch,
        _write_annbatch,
    ),
    "scDataset": Peer(
        "peers",
        ("scdataset", "anndata", "h5py"),
        ("scDataset", "h5py", "torch", *COMMON),
        _both("16/16384"),
        _open_scdataset,
    ),
    "scvi-tools": Peer(
        "peers", ("scvi.dataloaders", "anndata"), ("scvi-tools", "torch", *COMMON), _both("in memory"), _open_scvi
    ),
    "scipy": Peer("peers", ("anndata", "scipy.sparse"), COMMON, _both("in memory"), _open_scipy),
}
