"""Cells mapped onto an earlier model: what was there stands still to the bit, what is new is learnt or a mean."""

import dataclasses
import json
import sys
from pathlib import Path

import anndata as ad
import numpy as np
import pandas as pd
import pytest
import scipy.sparse as sp
import tiny_cohort
import torch
from tiny_cohort import MODEL, manifests
from torch import nn

from cohortvi.atlas.embed import embed
from cohortvi.cohort.references import check_references, reference_files, shape_faults
from cohortvi.cohort.selection import read_list
from cohortvi.config import Embed, Gap, Labels, Limit, Limits, Model, Reference, Store, Validation
from cohortvi.files import read_json
from cohortvi.inference import train as training
from cohortvi.inference.adam import Adam
from cohortvi.inference.checkpoint import load_model, save_model
from cohortvi.inference.covariates import Columns
from cohortvi.inference.gap import gap
from cohortvi.inference.mapping import open_reference
from cohortvi.inference.networks import Covariates
from cohortvi.inference.prepare import build, prepare
from cohortvi.inference.surgery import extend
from cohortvi.inference.train import fit
from cohortvi.store.sharded import ShardedCounts

sys.path.append(str(Path(__file__).parent.parent / "benchmarks"))

KINDS = {
    "plain": {},
    "told": {"encode_covariates": True, "n_layers": 2, "dispersion": "gene-batch", "norm": "layer"},
    "embedded": {"coding": "embedding", "encode_covariates": True, "prior": "vamp", "posterior": "full"},
    "linear": {"decoder": "linear", "likelihood": "zinb", "library": "latent", "posterior": "flow"},
    "weighted": {"draws": 3, "dispersion": "gene-cell", "decoder": "linear", "prior": "mixture", "norm": "none"},
}
SURGERY = {"max_epochs": 16, "kl_warmup": 0.0, "learning_rate": 0.1, "weight_decay": 0.1}


def changed(sample: tuple[sp.csr_matrix, pd.DataFrame], seed: int) -> tuple[sp.csr_matrix, pd.DataFrame]:
    """A sample of a batch that changes its genes several times over, all of whose cells are of an unknown sex."""
    x, obs = sample
    r = np.random.default_rng(seed)
    return sp.csr_matrix(r.poisson(x.toarray() * np.exp(r.normal(0, 1, x.shape[1]))).astype(np.uint32)), obs.assign(
        sex="a"
    )


@pytest.fixture(scope="module")
def samples() -> dict[str, tuple[sp.csr_matrix, pd.DataFrame]]:
    """Two samples that references are trained on, and before them one of a new batch and a new category."""
    old = {f"s{i}": tiny_cohort.simulate(150, seed=i) for i in (1, 2)}
    return {"s0": changed(tiny_cohort.simulate(150, seed=9), seed=3), **old}


@pytest.fixture(scope="module")
def old(tmp_path_factory, samples) -> Path:
    """The cohort of the references: batches run1 and run2."""
    folder = tmp_path_factory.mktemp("old")
    tiny_cohort.write_samples(folder, {name: samples[name] for name in ("s1", "s2")}, first=1)
    return folder


@pytest.fixture(scope="module")
def grown(tmp_path_factory, samples) -> Path:
    """The same cohort with a batch run0 and a sex `a`, which come first by their names."""
    folder = tmp_path_factory.mktemp("grown")
    tiny_cohort.write_samples(folder, samples)
    return folder


def run(cohort: Path, checkpoints: Path, model: Model, sheet: dict | None = None):
    splits = manifests(cohort, "train"), manifests(cohort, "validation")
    return fit(*splits, model, sheet=sheet or {}, seed=0, checkpoints=checkpoints, threads=1)


def train_reference(cohort: Path, folder: Path, **changes) -> Path:
    model = dataclasses.replace(MODEL, **{"max_epochs": 10} | changes)
    vae, _, facts = run(cohort, folder / "checkpoints", model)
    save_model(vae, facts, folder / "model.safetensors", folder / "model.json")
    return folder


@pytest.fixture(scope="module")
def references(old, tmp_path_factory):
    """Return the folder of a reference of a kind, trained once."""
    made = {}

    def of(kind: str) -> Path:
        if kind not in made:
            made[kind] = train_reference(old, tmp_path_factory.mktemp(kind), **KINDS[kind])
        return made[kind]

    return of


def mapped(reference: Path, *, surgery: bool, **changes) -> Model:
    """The settings of a model that is mapped onto this one."""
    settings = read_json(reference / "model.json")["settings"] | SURGERY | changes
    kept = {name: value for name, value in settings.items() if name not in ("early_stopping", "reference")}
    known = Reference(str(reference), surgery=surgery)
    return dataclasses.replace(MODEL, **kept, reference=known)


def rows_of(vae: nn.Module, name: str) -> set[bytes]:
    """The rows of a tensor, of a linear decoder's heads the columns."""
    value = vae.state_dict()[name]
    is_head = name.startswith("decoder.") and "hidden" not in name
    return {row.contiguous().numpy().tobytes() for row in (value.T if is_head else value)}


@pytest.mark.parametrize("kind", KINDS)
def test_surgery_leaves_all_that_was_there_to_the_bit_and_learns_the_rest(references, grown, tmp_path, kind):
    known, facts = load_model(references(kind) / "model.safetensors")
    model = mapped(references(kind), surgery=True)
    vae, history, found = run(grown, tmp_path / "ck", model)
    assert found["batches"] == ["run1", "run2", "run0"]
    assert found["categories"] == {"sex": ["f", "m", "a"]}
    assert found["continuous"] == facts["continuous"]
    before, after = known.state_dict(), vae.state_dict()
    for name, value in after.items():
        if name in before and before[name].shape == value.shape:
            assert torch.equal(before[name], value), name
        else:
            assert rows_of(known, name) < rows_of(vae, name), name
    x_ng = torch.tensor(np.random.default_rng(0).poisson(3, (40, tiny_cohort.N_VARS))).float()
    told = Covariates(torch.arange(40) % 2, (torch.arange(40) % 2,), torch.linspace(-1, 1, 40)[:, None])
    with torch.inference_mode():
        noise_snk = torch.randn(5, 40, known.n_dimensions)
        moments = [vae.encode(x_ng, told).moments(noise_snk) for vae in (known, vae)]
        terms = [vae.reconstruction(x_ng, moments[0][0], told) for vae in (known, vae)]
        priors = [vae.log_prior(moments[0][0]) for vae in (known, vae)]
    for one, two in zip(*moments, strict=True):
        assert torch.equal(one, two)
    assert torch.equal(*priors)
    # A linear decoder's sum over more columns, all zero but one, may be rounded elsewhere.
    torch.testing.assert_close(*terms, rtol=1e-6 if model.decoder == "linear" else 0, atol=0)
    assert found["best_validation_elbo"] > found["reference"]["elbo_before"] + 0.5
    assert history["epoch"].tolist() == list(range(1, found["n_epochs"] + 1))


def test_a_category_has_a_row_in_each_layer_that_begins_at_the_mean_of_the_known(references, grown, tmp_path):
    reference = references("told")
    known, facts = load_model(reference / "model.safetensors")
    vae, history, found = run(grown, tmp_path, mapped(reference, surgery=False))
    for network in ("encoder", "decoder"):
        for layer, first in ((0, 1), (1, 0)):  # the first layer has the age before them
            name = f"{network}.hidden.layers.{layer}.others.weight_oh"
            was, now = known.state_dict()[name][first:], vae.state_dict()[name][first:]
            expected = torch.stack([was[0], was[1], was[:2].mean(0), was[2], was[3], was[2:].mean(0)])
            torch.testing.assert_close(now, expected)
    torch.testing.assert_close(vae.log_theta, torch.cat([known.log_theta, known.log_theta.mean(0, keepdim=True)]))
    assert found["reference"] == {
        "path": str(reference),
        "digest": open_reference(mapped(reference, surgery=False)).digest,
        "surgery": False,
        "new": {"batch": ["run0"], "sex": ["a"]},
        "n_trained": 0,
        "validation_elbo": facts["best_validation_elbo"],
        "elbo_before": found["best_validation_elbo"],
    }
    assert (found["n_epochs"], found["n_steps"], found["n_obs"], found["best_epoch"]) == (0, 0, 0, 0)
    assert history["epoch"].tolist() == [0]
    assert history["validation_elbo"].tolist() == [found["best_validation_elbo"]]
    assert history["train_loss"].isna().all()


def test_what_is_trained_is_what_belongs_to_the_new(references, grown, tmp_path):
    facts = run(grown, tmp_path, mapped(references("told"), surgery=True))[2]
    # a batch and a sex, in two layers of two networks, of 16 units each; and dispersions of the batch
    assert facts["reference"]["n_trained"] == 2 * 2 * 2 * 16 + tiny_cohort.N_VARS
    counts = [read_json(path) for path in manifests(grown, "train")]
    assert facts["n_obs"] == sum(manifest["samples"]["s0"] for manifest in counts)


def test_training_and_the_held_out_elbo_look_at_cells_with_something_new_alone(references, grown):
    splits = manifests(grown, "train"), manifests(grown, "validation")
    model = mapped(references("plain"), surgery=True)
    setup, state = prepare(*splits, model, sheet={}, seed=0, threads=1)
    for split, loader in (("train", state.loader), ("validation", setup.validation)):
        rows, codes = [], []
        for minibatch in loader:
            rows += minibatch.rows.tolist()
            covariates = setup.covariates(minibatch.obs)
            codes += covariates.batch_n.tolist()
            assert set(covariates.categories[0].tolist()) == {2}
        assert codes == [2] * sum(read_json(path)["samples"]["s0"] for path in manifests(grown, split))
        assert len(set(rows)) == len(rows)


def test_covariates_of_the_sheet_may_be_new_too(old, grown, tmp_path):
    site = {"s0": "north", "s1": "south", "s2": "west"}
    changes = {"categorical_covariates": ("site",), "continuous_covariates": ("dose",), "max_epochs": 2}
    sheet = {"site": site, "dose": {"s0": "3", "s1": "1", "s2": "2"}}
    model = dataclasses.replace(MODEL, **changes)
    vae, _, facts = run(old, tmp_path / "old", model, sheet)
    save_model(vae, facts, tmp_path / "model.safetensors", tmp_path / "model.json")
    found = run(grown, tmp_path / "new", mapped(tmp_path, surgery=True), sheet)[2]
    assert found["categories"] == {"site": ["south", "west", "north"]}
    assert found["continuous"] == {"dose": [pytest.approx(1.5, abs=0.1), pytest.approx(0.5, abs=0.1)]}
    assert found["reference"]["new"] == {"batch": ["run0"], "site": ["north"]}


@pytest.mark.parametrize("coding", ["one_hot", "embedding"])
def test_a_reference_of_one_batch_learns_others_and_keeps_its_own(samples, grown, tmp_path, coding):
    settings = {"categorical_covariates": (), "continuous_covariates": ()}
    tiny_cohort.write_samples(tmp_path / "one", {"s1": samples["s1"]}, first=1)
    reference = train_reference(tmp_path / "one", tmp_path, **settings, coding=coding)
    known, _ = load_model(reference / "model.safetensors")
    vae, _, facts = run(grown, tmp_path / "ck", mapped(reference, surgery=True))
    assert facts["batches"] == ["run1", "run0", "run2"]
    z_nk, x_ng = torch.randn(20, 3), torch.ones(20, tiny_cohort.N_VARS)
    told = Covariates(torch.zeros(20, dtype=torch.int64))
    with torch.inference_mode():
        assert torch.equal(vae.reconstruction(x_ng, z_nk, told), known.reconstruction(x_ng, z_nk, told))
    assert facts["best_validation_elbo"] > facts["reference"]["elbo_before"] + 1


def test_a_mapped_model_may_be_mapped_onto(references, grown, samples, tmp_path):
    vae, _, facts = run(grown, tmp_path / "first", mapped(references("plain"), surgery=True))
    save_model(vae, facts, tmp_path / "model.safetensors", tmp_path / "model.json")
    later = {"s3": changed(tiny_cohort.simulate(100, seed=5), seed=6)}
    tiny_cohort.write_samples(tmp_path / "later", later, first=3)
    found = run(tmp_path / "later", tmp_path / "second", mapped(tmp_path, surgery=True))[2]
    assert found["batches"] == ["run1", "run2", "run0", "run3"]
    assert found["reference"]["new"] == {"batch": ["run3"]}


def test_with_nothing_new_nothing_is_trained(references, old, tmp_path):
    reference = references("plain")
    vae, history, facts = run(old, tmp_path, mapped(reference, surgery=True))
    assert facts["reference"]["n_trained"] == facts["n_epochs"] == 0
    # the cells and the noise are those of its own validation
    assert history["validation_elbo"].tolist() == [facts["reference"]["validation_elbo"]]
    known = load_model(reference / "model.safetensors")[0].state_dict()
    assert all(torch.equal(value, known[name]) for name, value in vae.state_dict().items())


def test_a_mapping_that_was_interrupted_ends_with_the_same_bits(references, grown, tmp_path, monkeypatch):
    model = mapped(references("told"), surgery=True, checkpoint_minutes=0.0)
    whole = run(grown, tmp_path / "whole", model)
    real = training.take_step

    def take_step(setup, state, minibatch):
        if state.step == 9:
            raise KeyboardInterrupt
        return real(setup, state, minibatch)

    with monkeypatch.context() as patched:
        patched.setattr(training, "take_step", take_step)
        with pytest.raises(KeyboardInterrupt):
            run(grown, tmp_path / "parts", model)
    parts = run(grown, tmp_path / "parts", model)
    assert parts[2] == whole[2]
    weights = [result[0].state_dict() for result in (parts, whole)]
    assert all(torch.equal(weights[0][name], weights[1][name]) for name in weights[1])


def test_a_changed_reference_is_another_run(references, old, grown, tmp_path):
    folder = tmp_path / "reference"
    folder.mkdir()
    for kind, other in (("first", references("plain")), ("second", train_reference(old, tmp_path, max_epochs=2))):
        for path in other.glob("model.*"):
            (folder / path.name).write_bytes(path.read_bytes())
        if kind == "first":
            run(grown, tmp_path / "ck", mapped(folder, surgery=False))
    with pytest.raises(ValueError, match="its checkpoints are of other shards, settings or seed"):
        run(grown, tmp_path / "ck", mapped(folder, surgery=False))


def test_genes_are_found_by_name_in_whatever_order_and_among_others(references, samples, grown, tmp_path):
    reference = references("plain")
    expected = run(grown, tmp_path / "a", mapped(reference, surgery=False))[2]["best_validation_elbo"]
    order = np.random.default_rng(1).permutation(tiny_cohort.N_VARS)
    shuffled = {}
    for name, (x, obs) in samples.items():
        # names are those of the places: the counts of gene i stand under another one
        shuffled[name] = (sp.csr_matrix(np.hstack([x.toarray()[:, order], x[:, :2].toarray()])), obs)
    tiny_cohort.write_samples(tmp_path / "shuffled", shuffled)
    folder = tmp_path / "renamed"
    folder.mkdir()
    (folder / "model.safetensors").write_bytes((reference / "model.safetensors").read_bytes())
    facts = read_json(reference / "model.json")
    facts["genes"] = [f"gene{place}" for place in np.argsort(order)]
    (folder / "model.json").write_text(json.dumps(facts))
    found = run(tmp_path / "shuffled", tmp_path / "b", mapped(folder, surgery=False))[2]
    assert found["best_validation_elbo"] == pytest.approx(expected, rel=1e-6)
    assert found["genes"] == facts["genes"]


def test_old_cells_keep_their_places_and_all_that_follows_takes_the_codes_right(references, old, grown, tmp_path):
    reference = references("told")
    vae, _, facts = run(grown, tmp_path / "ck", mapped(reference, surgery=True))
    save_model(vae, facts, tmp_path / "model.safetensors", tmp_path / "model.json")
    options = {"settings": Embed(None, 10, 0), "sheet": {}, "seed": 0, "chunk_cells": 64, "threads": 1}
    latents = []
    for folder, cohort, names in ((reference, old, ("s1", "s2")), (tmp_path, grown, ("s1", "s2"))):
        counts = [cohort / "counts" / f"{name}.json" for name in names]
        embed(folder / "model.safetensors", counts, tmp_path / "latent.zarr", **options)
        latents.append(ad.read_zarr(tmp_path / "latent.zarr"))
    for name in ("X_latent", "X_latent_std"):
        np.testing.assert_array_equal(latents[0].obsm[name], latents[1].obsm[name])
    splits = {split: manifests(grown, split) for split in ("train", "validation")}
    few = Gap(cells=60, steps=10, draws=100, limits=Limits(*[Limit(None, None)] * 5))
    counts = sorted((grown / "counts").glob("*.json"))
    table, found = gap(tmp_path / "model.safetensors", splits, counts, few, sheet={}, seed=0, threads=1)
    held_out = table[table["split"] == "validation"]
    means = {row["batch"]: row["observed"] for row in found["predictive"] if row["statistic"] == "library_mean"}
    assert means == pytest.approx(held_out.groupby("batch", observed=True)["n_counts"].mean().to_dict())


def test_only_the_entries_that_are_to_move_do_and_as_if_they_were_alone():
    generator = torch.Generator().manual_seed(0)
    whole = nn.Parameter(torch.randn(6, 4, generator=generator))
    alone = nn.Parameter(whole.detach()[4:].clone())
    moves = torch.zeros(6, 4, dtype=torch.bool)
    moves[4:] = True
    before = whole.detach().clone()
    ours = Adam([("w", whole)], weight_decay=0.1, eps=0.01, only={"w": moves})
    theirs = torch.optim.Adam([alone], lr=0.1, weight_decay=0.1, eps=0.01)
    for _ in range(5):
        whole.grad = torch.randn(6, 4, generator=generator)
        alone.grad = whole.grad[4:].clone()
        ours.step(0.1, clip=1.0)
        nn.utils.clip_grad_norm_([alone], 1.0)
        theirs.step()
    assert torch.equal(whole[:4], before[:4])
    torch.testing.assert_close(whole[4:], alone)


@pytest.mark.filterwarnings("ignore")  # of scvi-tools and what it imports
@pytest.mark.parametrize("encode_covariates", [False, True])
def test_the_weights_that_are_trained_are_those_of_scvi_tools(old, encode_covariates):
    scvi = pytest.importorskip("scvi", reason="needs scvi-tools: pip install scvi-tools")
    from scvi_weights import from_scvi_state

    x = np.random.default_rng(0).poisson(3, (60, tiny_cohort.N_VARS)).astype(np.float32)
    cells = [f"cell{i}" for i in range(60)]
    first, second = (
        ad.AnnData(x, obs=pd.DataFrame({"batch": names * 30}, index=cells)) for names in (["a", "b"], ["c", "d"])
    )
    scvi.model.SCVI.setup_anndata(first, batch_key="batch")
    shape = {"n_hidden": 16, "n_latent": 3, "n_layers": 2, "gene_likelihood": "nb"}
    theirs = scvi.model.SCVI(first, **shape, encode_covariates=encode_covariates)
    query = scvi.model.SCVI.load_query_data(second, theirs, accelerator="cpu", freeze_batchnorm_decoder=True)
    (minibatch,) = query._make_data_loader(second, batch_size=60)
    query.module(minibatch)[2].loss.backward()
    state = query.module.state_dict()
    parameters = dict(query.module.named_parameters())
    grads = {name: torch.zeros_like(value) for name, value in state.items()}
    grads |= {name: p.grad for name, p in parameters.items() if p.requires_grad and p.grad is not None}
    settings = {"n_layers": 2, "encode_covariates": encode_covariates}
    ours = dataclasses.replace(MODEL, categorical_covariates=(), continuous_covariates=(), **settings)
    store = ShardedCounts(manifests(old, "train"))
    known, vae = (build(store, ours, Columns(batches, {}, {})) for batches in (("a", "b"), ("a", "b", "c", "d")))
    only = extend(vae, known)
    found = {name: grad != 0 for name, grad in from_scvi_state(vae, grads).items()}
    assert {name for name, is_moved in found.items() if is_moved.any()} == set(only)
    for name, moves in only.items():
        assert not (found[name] & ~moves).any()
        assert (found[name] & moves).any(1).sum() == moves.any(1).sum()


@pytest.fixture
def folder(references, tmp_path, monkeypatch) -> Path:
    """A copy of a reference, in the folder of the workflow."""
    monkeypatch.chdir(tmp_path)
    target = tmp_path / "references/nb"
    target.mkdir(parents=True)
    for path in references("plain").glob("model.*"):
        (target / path.name).write_bytes(path.read_bytes())
    return target


def settings_of(config, folder: Path, frozen: str | None = "references/nb/model.json", **changes):
    """The config of the workflow with a model that fits the reference in this folder, but for `changes`."""
    model = dataclasses.replace(mapped(Path("references/nb"), surgery=True), **changes)
    return dataclasses.replace(config, models={"new": model}, genes=dataclasses.replace(config.genes, frozen=frozen))


def test_a_reference_that_fits_is_let_through(demo_config, folder):
    config = settings_of(demo_config, folder)
    check_references(config)
    assert reference_files(config.models["new"]) == ["references/nb/model.safetensors", "references/nb/model.json"]
    assert reference_files(demo_config.models["nb"]) == []


def test_the_genes_of_a_model_are_a_list_of_genes_and_other_json_is_none(folder):
    assert read_list(folder / "model.json") == [f"gene{i}" for i in range(tiny_cohort.N_VARS)]
    (folder / "other.json").write_text('["gene0"]')
    with pytest.raises(
        ValueError, match=r"other\.json: no list of genes; expected a text file of one a line, or model"
    ):
        read_list(folder / "other.json")


@pytest.mark.parametrize(
    ("changes", "frozen", "damage", "message"),
    [
        ({"n_latent": 5}, "references/nb/model.json", None, "models.new.n_latent is 5; expected 3, as the reference"),
        ({"likelihood": "zinb"}, "references/nb/model.json", None, "likelihood is 'zinb'; expected 'nb'"),
        (
            {},
            None,
            None,
            "genes.frozen is null; expected the 30 genes of the reference. Set genes.frozen: references/nb",
        ),
        ({}, "none.txt", None, "genes.frozen: no file 'none.txt'. Set genes.frozen"),
        ({}, "few.txt", None, "genes.frozen (few.txt) lacks 29 genes of the reference, gene1, gene2"),
        ({}, None, lambda folder: (folder / "model.safetensors").unlink(), "references/nb: no model.safetensors"),
        ({}, None, lambda folder: (folder / "model.json").write_text("{"), "model.json: no JSON"),
        ({}, None, lambda folder: (folder / "model.json").write_text('{"genes": []}'), "model.json: it lacks settings"),
        (
            {"reference": Reference("results/models/new", surgery=True)},
            None,
            None,
            "results/models/new is where rule train writes a model of this config, which would be trained again; copy",
        ),
    ],
)
def test_a_reference_that_does_not_fit_is_refused_before_any_job(demo_config, folder, changes, frozen, damage, message):
    (folder.parents[1] / "few.txt").write_text("gene0\nother\n")
    config = settings_of(demo_config, folder, frozen, **changes)
    if damage:
        damage(folder)
    with pytest.raises(ValueError, match="the references of models have faults") as error:
        check_references(config)
    assert message in str(error.value)


def test_of_labels_the_column_alone_shapes_a_model():
    labels = {"column": "kind", "unknown": ["NA"], "weight": 10.0}
    known = json.loads(json.dumps(dataclasses.asdict(MODEL) | {"prior": "mixture", "labels": labels}))
    model = dataclasses.replace(MODEL, prior="mixture", labels=Labels("kind", ("NA", ""), 50.0))
    assert list(shape_faults(known, model)) == []
    other = dataclasses.replace(model, labels=Labels("type", ("NA",), 10.0))
    assert list(shape_faults(known, other)) == ["labels is 'type'; expected 'kind', as the reference has it"]
    assert list(shape_faults(known, dataclasses.replace(model, labels=None)))


def test_a_model_of_another_shape_is_refused_by_the_rule_too(references, grown, tmp_path):
    model = mapped(references("plain"), surgery=True, n_hidden=8)
    with pytest.raises(ValueError, match="this reference is of another shape: n_hidden is 8; expected 16"):
        run(grown, tmp_path, model)


def test_a_split_without_a_cell_of_the_new_is_refused(references, samples, tmp_path):
    x, obs = samples["s0"]
    tiny_cohort.write_samples(tmp_path, samples | {"s0": (x[:1], obs.iloc[:1])})
    with pytest.raises(ValueError, match="shards hold no cell of batch run0"):
        run(tmp_path, tmp_path / "ck", mapped(references("plain"), surgery=True))


def test_a_new_batch_that_is_held_out_as_a_whole_is_refused(references, samples, tmp_path):
    more = samples | {f"s{i}": tiny_cohort.simulate(60, seed=i) for i in (3, 4, 5)}
    by_sample = Store(shards=2, validation=Validation(fraction=0.3, by="sample"), reshuffle=0)
    tiny_cohort.write_samples(tmp_path, more, store=by_sample)
    store = ShardedCounts(manifests(tmp_path, "validation"))
    codes = np.concatenate([shard.column("batch", 0, shard.n_obs) for shard in store.stores])
    whole = sorted({store.categories["batch"][code] for code in codes} - {"run1", "run2"})
    assert whole
    with pytest.raises(ValueError, match=f"the training shards hold no cell of batch {', '.join(whole)}, which"):
        run(tmp_path, tmp_path / "ck", mapped(references("plain"), surgery=True))
    run(tmp_path, tmp_path / "ck", mapped(references("told"), surgery=False))  # which learns nothing of it anyway


def test_a_mapped_model_takes_no_label_that_its_own_config_calls_unknown(old, samples, tmp_path):
    labels = {"prior": "mixture", "labels": Labels("kind", ("NA",), 20.0)}
    reference = train_reference(old, tmp_path / "reference", **labels)
    tiny_cohort.write_samples(tmp_path / "grown", samples)
    model = mapped(reference, surgery=True, labels=Labels("kind", ("NA", "b"), 20.0))
    splits = manifests(tmp_path / "grown", "train"), manifests(tmp_path / "grown", "validation")
    setup, run_ = prepare(*splits, model, sheet={}, seed=0, threads=1)
    kinds = setup.train.categories["kind"]
    for minibatch in run_.loader:
        label_n = setup.covariates(minibatch.obs).label_n
        expected = [setup.columns.labels.index(kinds[k]) if kinds[k] != "b" else -1 for k in minibatch.obs["kind"]]
        assert label_n.tolist() == expected
