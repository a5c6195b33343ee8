"""Write scvi-MODEL.npz: what scvi-tools 1.4.2 makes of fixed weights, counts and noise, in float64; and
use-MODEL.npz: what users of the same model are told of the same cells, in float32.

    python -m venv peers && peers/bin/pip install torch==2.13.0 scvi-tools==1.4.2
    peers/bin/python tests/golden/make_scvi_golden.py

The numbers come out of scvi-tools' own VAE.forward (inference, generative, loss), changed in two places from outside:
the noise of its reparametrised sample is given, and `.float()` keeps float64 (it is applied to one-hot codes only).
Weights and inputs are rounded to float32 before they are used, so that they are stored exactly. Names are
scvi-tools'. Each file holds: settings (JSON), versions (JSON), x, batch, category, continuous, noise, kl_weight,
weight/NAME, and for the training mode: loss, reconstruction, kl, grad/NAME, after/NAME (running batch statistics);
for the evaluation mode: eval_loss, eval_reconstruction, eval_kl; and scvi_names, the names of its whole state_dict.

The second kind holds noise, (draws, cells, k), of which z is made, and of SCVI.get_normalized_expression each draw's
fractions, (draws, cells, genes), as of the cells' own batches, `own`, of batch 1, `one`, and on average over batches 0
and 2, `mean`; and of SCVI.get_marginal_ll the cells' values, `marginal`.
"""

import json
import sys
import warnings
from pathlib import Path
from unittest import mock

import anndata as ad
import numpy as np
import pandas as pd
import torch

warnings.filterwarnings("ignore")  # of scvi-tools' own imports

import scvi  # noqa: E402
from scvi.module import VAE  # noqa: E402

CELLS, GENES, BATCHES, CATEGORIES, HIDDEN, LATENT = 24, 30, 3, 4, 8, 4
KL_WEIGHT, DRAWS = 0.37, 3
MODELS = {
    "nb-gene": {"likelihood": "nb", "dispersion": "gene", "n_layers": 1, "encode_covariates": False},
    "nb-gene-batch": {"likelihood": "nb", "dispersion": "gene-batch", "n_layers": 2, "encode_covariates": False},
    "zinb-gene": {"likelihood": "zinb", "dispersion": "gene", "n_layers": 2, "encode_covariates": True},
    "zinb-gene-batch": {"likelihood": "zinb", "dispersion": "gene-batch", "n_layers": 1, "encode_covariates": False},
    "poisson": {"likelihood": "poisson", "dispersion": "gene", "n_layers": 1, "encode_covariates": True},
}


def draw_inputs(r: np.random.Generator) -> dict[str, np.ndarray]:
    """Counts of unequal depth with three empty genes, codes, a continuous covariate and the noise of z."""
    depth = np.exp(r.normal(0, 1, (CELLS, 1)))
    x = r.poisson(r.gamma(0.7, 3.0 * depth, (CELLS, GENES)))
    x[:, [4, 5, 17]] = 0
    x[:, 0] += 1  # no empty cell: scvi-tools takes the logarithm of its library size
    return {
        "x": x.astype(np.float32),
        "batch": r.integers(0, BATCHES, CELLS),
        "category": r.integers(0, CATEGORIES, CELLS),
        "continuous": r.normal(size=CELLS).astype(np.float32),
        "noise": r.normal(size=(CELLS, LATENT)).astype(np.float32),
    }


def make_module(settings: dict, r: np.random.Generator) -> VAE:
    """An scvi-tools module with weights away from their initial values, batch norm's included."""
    module = VAE(
        n_input=GENES,
        n_batch=BATCHES,
        n_hidden=HIDDEN,
        n_latent=LATENT,
        n_layers=settings["n_layers"],
        n_continuous_cov=1,
        n_cats_per_cov=[CATEGORIES],
        dropout_rate=0.0,
        dispersion=settings["dispersion"],
        gene_likelihood=settings["likelihood"],
        encode_covariates=settings["encode_covariates"],
    )
    with torch.no_grad():
        for name, value in module.state_dict().items():
            if value.is_floating_point():
                drawn = torch.from_numpy(r.normal(0, 0.3, value.shape)).float()
                value.copy_(drawn.abs() + 0.5 if name.endswith("running_var") else drawn)
    return module.double()


def forward(module: VAE, inputs: dict[str, np.ndarray]):
    tensors = {
        "X": torch.from_numpy(inputs["x"]).double(),
        "batch": torch.from_numpy(inputs["batch"])[:, None],
        "labels": torch.zeros(CELLS, 1, dtype=torch.int64),
        "extra_categorical_covs": torch.from_numpy(inputs["category"])[:, None],
        "extra_continuous_covs": torch.from_numpy(inputs["continuous"])[:, None].double(),
    }
    noise = torch.from_numpy(inputs["noise"]).double()
    given = mock.patch("torch.distributions.normal._standard_normal", return_value=noise)
    with given, mock.patch.object(torch.Tensor, "float", torch.Tensor.double):
        return module(tensors, loss_kwargs={"kl_weight": KL_WEIGHT})[2]


def numbers(prefix: str, found) -> dict[str, np.ndarray]:
    return {
        f"{prefix}loss": found.loss.detach().numpy(),
        f"{prefix}reconstruction": found.dict_sum(found.reconstruction_loss).detach().numpy(),
        f"{prefix}kl": found.kl_local["kl_divergence_z"].detach().numpy(),
    }


def golden(settings: dict, seed: int) -> dict[str, np.ndarray]:
    r = np.random.default_rng(seed)
    inputs = draw_inputs(r)
    module = make_module(settings, r)
    names = list(module.state_dict())
    used = [n for n in names if not n.startswith(("l_encoder", "decoder.px_r_decoder")) and "num_batches" not in n]
    out = inputs | {f"weight/{n}": module.state_dict()[n].numpy().astype(np.float32).copy() for n in used}
    out |= numbers("eval_", forward(module.eval(), inputs))
    found = forward(module.train(), inputs)
    found.loss.backward()
    out |= numbers("", found)
    grads = {n: p.grad for n, p in module.named_parameters() if p.grad is not None and n in used}
    out |= {f"grad/{n}": grad.numpy() for n, grad in grads.items()}
    out |= {f"after/{n}": value.numpy() for n, value in module.state_dict().items() if "running" in n and n in used}
    facts = settings | {"n_batches": BATCHES, "n_categories": [CATEGORIES], "n_continuous": 1}
    facts |= {"n_genes": GENES, "n_hidden": HIDDEN, "n_latent": LATENT, "dropout": 0.0}
    versions = {"scvi-tools": scvi.__version__, "torch": torch.__version__, "python": sys.version.split()[0]}
    text = {"settings": json.dumps(facts), "versions": json.dumps(versions), "scvi_names": json.dumps(names)}
    return out | {name: np.array(value) for name, value in text.items()} | {"kl_weight": np.array(KL_WEIGHT)}


def make_model(settings: dict, given: dict[str, np.ndarray]) -> scvi.model.SCVI:
    """An scvi-tools model of these cells with these weights."""
    text = {name: [str(code) for code in given[name]] for name in ("batch", "category")}
    obs = pd.DataFrame(text | {"continuous": given["continuous"]}, index=[f"cell{i}" for i in range(CELLS)])
    adata = ad.AnnData(given["x"], obs=obs)
    covariates = {"categorical_covariate_keys": ["category"], "continuous_covariate_keys": ["continuous"]}
    scvi.model.SCVI.setup_anndata(adata, batch_key="batch", **covariates)
    model = scvi.model.SCVI(
        adata,
        n_hidden=HIDDEN,
        n_latent=LATENT,
        n_layers=settings["n_layers"],
        dispersion=settings["dispersion"],
        gene_likelihood=settings["likelihood"],
        encode_covariates=settings["encode_covariates"],
    )
    weights = {k.removeprefix("weight/"): torch.from_numpy(v) for k, v in given.items() if k.startswith("weight/")}
    left = model.module.load_state_dict(weights, strict=False)
    assert not left.unexpected_keys
    model.module.eval()
    model.is_trained_ = True
    return model


def use(settings: dict, given: dict[str, np.ndarray], seed: int) -> dict[str, np.ndarray]:
    model = make_model(settings, given)
    noise = np.random.default_rng([seed, 1]).normal(size=(DRAWS, CELLS, LATENT)).astype(np.float32)

    def draw(loc: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
        return loc + scale * torch.from_numpy(noise)

    found = {"noise": noise}
    with mock.patch("torch.normal", draw):
        for name, batches in (("own", None), ("one", ["1"]), ("mean", ["0", "2"])):
            wanted = {"transform_batch": batches, "n_samples": DRAWS, "return_mean": False}
            found[name] = model.get_normalized_expression(**wanted)
        marginal = model.get_marginal_ll(n_mc_samples=DRAWS, n_mc_samples_per_pass=DRAWS, return_mean=False)
    return found | {"marginal": np.asarray(marginal)}


if __name__ == "__main__":
    for seed, (name, settings) in enumerate(MODELS.items()):
        found = golden(settings, seed)
        np.savez_compressed(Path(__file__).with_name(f"scvi-{name}.npz"), **found)
        np.savez_compressed(Path(__file__).with_name(f"use-{name}.npz"), **use(settings, found, seed))
