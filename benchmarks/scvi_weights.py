"""Our weights as those of an scvi-tools VAE module of the same settings, for parity tests and for its evaluators.

| ours                                  | scvi-tools 1.4 (`scvi.module.VAE`)                        |
|---------------------------------------|-----------------------------------------------------------|
| encoder.hidden.linears.I, .norms.I    | z_encoder.encoder.fc_layers.Layer I.0, .1                 |
| encoder.loc, encoder.log_variance     | z_encoder.mean_encoder, z_encoder.var_encoder             |
| decoder.hidden.linears.I, .norms.I    | decoder.px_decoder.fc_layers.Layer I.0, .1                |
| decoder.px_scale                      | decoder.px_scale_decoder.0 (softmax behind both)          |
| decoder.zi_logits (zinb alone)        | decoder.px_dropout_decoder                                |
| log_theta, (g,) or (batches, g)       | px_r, (g,) or (g, batches): transposed                    |

The columns of every Linear stand in the same order on both sides: what comes from below, continuous covariates, the
one-hot batch, the one-hot categories. scvi-tools has more tensors (l_encoder, px_r_decoder, px_dropout_decoder of nb
and poisson, px_r of poisson) that its loss does not use with observed library sizes; they are left as they are.
"""

import torch
from torch import Tensor, nn

PREFIXES = (
    ("encoder.hidden.linears.", "z_encoder.encoder.fc_layers.Layer {}.0"),
    ("encoder.hidden.norms.", "z_encoder.encoder.fc_layers.Layer {}.1"),
    ("decoder.hidden.linears.", "decoder.px_decoder.fc_layers.Layer {}.0"),
    ("decoder.hidden.norms.", "decoder.px_decoder.fc_layers.Layer {}.1"),
)
HEADS = {
    "encoder.loc": "z_encoder.mean_encoder",
    "encoder.log_variance": "z_encoder.var_encoder",
    "decoder.px_scale": "decoder.px_scale_decoder.0",
    "decoder.zi_logits": "decoder.px_dropout_decoder",
}


def scvi_name(name: str) -> str:
    """Return scvi-tools' name of our parameter or buffer `name`."""
    if name == "log_theta":
        return "px_r"
    for ours, theirs in PREFIXES:
        if name.startswith(ours):
            layer, rest = name.removeprefix(ours).split(".", 1)
            return f"{theirs.format(layer)}.{rest}"
    module, rest = name.rsplit(".", 1)
    return f"{HEADS[module]}.{rest}"


def to_scvi_state(vae: nn.Module) -> dict[str, Tensor]:
    """Return our weights and batch statistics under scvi-tools' names and shapes, as copies.

    Load them by `module.load_state_dict(state, strict=False)`; its `missing_keys` are the unused tensors named above.
    """
    state = {name: value.detach().clone() for name, value in vae.state_dict().items()}
    if "log_theta" in state and state["log_theta"].ndim == 2:
        state["log_theta"] = state["log_theta"].T.contiguous()
    return {scvi_name(name): value for name, value in state.items()}


def from_scvi_state(vae: nn.Module, scvi: dict[str, Tensor]) -> dict[str, Tensor]:
    """Return scvi-tools' weights (or gradients) under the names and shapes of our state_dict, as copies.

    Errors: KeyError for a name that scvi-tools' side lacks, i.e. for models of other settings.
    """
    found = {}
    for name, value in vae.state_dict().items():
        theirs = torch.as_tensor(scvi[scvi_name(name)])
        found[name] = (theirs.T if name == "log_theta" and value.ndim == 2 else theirs).clone()
    return found
