"""Our weights as those of an scvi-tools VAE module of the same settings, for parity tests and for its evaluators.

| ours                                  | scvi-tools 1.4 (`scvi.module.VAE`)                        |
|---------------------------------------|-----------------------------------------------------------|
| encoder.hidden.layers.I.linear, .others | z_encoder.encoder.fc_layers.Layer I.0: one matrix      |
| encoder.hidden.layers.I.norm          | z_encoder.encoder.fc_layers.Layer I.1                     |
| encoder.loc, encoder.log_variance     | z_encoder.mean_encoder, z_encoder.var_encoder             |
| decoder.hidden.layers.I, as above     | decoder.px_decoder.fc_layers.Layer I.0, .1                |
| decoder.px_scale                      | decoder.px_scale_decoder.0 (softmax behind both)          |
| decoder.zi_logits (zinb alone)        | decoder.px_dropout_decoder                                |
| log_theta, (g,) or (batches, g)       | px_r, (g,) or (g, batches): transposed                    |

The columns of scvi-tools' Linear are what comes from below, continuous covariates, the one-hot batch and the one-hot
categories; ours are the first in `linear`, the others, in the same order, in the rows of `others`. scvi-tools has more
tensors (l_encoder, px_r_decoder, px_dropout_decoder of nb and poisson, px_r of poisson) that its loss does not use with
observed library sizes; they are left as they are.
"""

from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

STACKS = {"encoder.hidden.layers.": "z_encoder.encoder", "decoder.hidden.layers.": "decoder.px_decoder"}
HEADS = {
    "encoder.loc": "z_encoder.mean_encoder",
    "encoder.log_variance": "z_encoder.var_encoder",
    "decoder.px_scale": "decoder.px_scale_decoder.0",
    "decoder.zi_logits": "decoder.px_dropout_decoder",
}
PARTS = ("linear.weight_gh", "linear.weight", "others.weight_oh")  # of the one matrix of a layer


# Settings of ours in which scvi-tools' default module has the same weights and dropout.
SAME = {"encode_covariates": False, "dropout": 0.1}


def elbo_by_scvi(model: Any, cells: np.ndarray) -> float:
    """Return the mean ELBO of the cells of these numbers by scvi-tools' evaluator, nats per cell: of three draws."""
    model.module.eval()
    model.is_trained_ = True
    return float(np.mean([float(model.get_elbo(indices=cells, batch_size=1024)) for _ in range(3)]))


def scvi_name(name: str) -> str:
    """Return scvi-tools' name of our parameter or buffer `name`, or of what it is a part of."""
    if name == "log_theta":
        return "px_r"
    for ours, theirs in STACKS.items():
        if name.startswith(ours):
            layer, rest = name.removeprefix(ours).split(".", 1)
            kind, last = ("0", "weight") if rest in PARTS else ("1" if "norm" in rest else "0", rest.split(".")[-1])
            return f"{theirs}.fc_layers.Layer {layer}.{kind}.{last}"
    module, rest = name.rsplit(".", 1)
    return f"{HEADS[module]}.{rest}"


def to_scvi_state(vae: nn.Module) -> dict[str, Tensor]:
    """Return our weights and batch statistics under scvi-tools' names and shapes, as copies.

    Load them by `module.load_state_dict(state, strict=False)`; its `missing_keys` are the unused tensors named above.
    """
    found: dict[str, Tensor] = {}
    for name, value in vae.state_dict().items():
        theirs = scvi_name(name)
        value = value.T if _is_transposed(name, value) else value
        found[theirs] = torch.cat([found[theirs], value], dim=1) if theirs in found else value.clone()
    return found


def from_scvi_state(vae: nn.Module, scvi: dict[str, Tensor]) -> dict[str, Tensor]:
    """Return scvi-tools' weights (or gradients) under the names and shapes of our state_dict, as copies.

    Errors: KeyError for a name that scvi-tools' side lacks, i.e. for models of other settings.
    """
    found, taken = {}, {}
    for name, value in vae.state_dict().items():
        theirs = torch.as_tensor(scvi[scvi_name(name)])
        shape = value.T.shape if _is_transposed(name, value) else value.shape
        if name.endswith(PARTS):
            start = taken.get(scvi_name(name), 0)
            taken[scvi_name(name)] = start + shape[1]
            theirs = theirs[:, start : start + shape[1]]
        found[name] = (theirs.T if _is_transposed(name, value) else theirs).clone()
    return found


def _is_transposed(name: str, value: Tensor) -> bool:
    return name.endswith(("weight_gh", "weight_oh")) or (name == "log_theta" and value.ndim == 2)
