"""The ELBO of a plain model and its gradients, written by hand: of a training step's calls of torch most are saved.

Plain is what models are by default (`is_plain`); others go through their modules (objective.py), one operation after
the other, and back through torch's record of them. Both are one model: tests/test_fused_elbo.py holds losses to 1e-6
and gradients to 1e-5 of the modules in float64. n cells, g genes, h hidden, k latent.
"""

import torch
from torch import Tensor

from cohortvi.inference import ranks
from cohortvi.inference.fused import arrays, counts_gradient, counts_product, head, head_gradients
from cohortvi.inference.hidden import draw, draw_backward, hidden, hidden_backward
from cohortvi.inference.networks import (
    MIN_VARIANCE,
    CountsLinear,
    Covariates,
    Layer,
    Told,
    dropout_bits,
    observed_library,
)
from cohortvi.inference.objective import Elbo
from cohortvi.inference.sparse import SparseCounts
from cohortvi.inference.vae import VAE

PLAIN = {
    "library": "observed",
    "posterior": "diagonal",
    "prior": "standard_normal",
    "n_labels": 0,
    "decoder": "nonlinear",
    "norm": "batch",
    "coding": "one_hot",
}


def is_plain(vae: VAE) -> bool:
    """Whether FusedElbo takes this model: one in training, on the CPU, by one process."""
    bias = vae.decoder.px_scale.bias
    is_here = vae.training and bias.device.type == "cpu" and bias.dtype == torch.float32 and ranks.world() == 1
    return is_here and vae.has_shared_theta and all(vae.settings[name] == value for name, value in PLAIN.items())


class FusedElbo:
    """Gives the ELBO of a model that `is_plain`, and its gradients.

    It holds the memory of parameters, gradients and batch norm's statistics, which may change but must stay where they
    are: no zero_grad, no model.to. A bias before batch norm has no gradient; it stays 0.
    """

    def __init__(self, vae: VAE):
        for parameter in vae.parameters():
            parameter.grad = torch.zeros_like(parameter)
        self.vae = vae
        self.encoder, self.decoder = (
            [_Layer(layer) for layer in part.hidden.layers] for part in (vae.encoder, vae.decoder)
        )

    @torch.no_grad()
    def __call__(self, x: SparseCounts, covariates: Covariates, noise_nk: Tensor, *, kl_weight: float) -> Elbo:
        """Return what `objective.elbo` does, of counts (n, g) and standard normal noise (n, k), in nats.

        The gradients of the mean loss are then the parameters' (docs/inference.md, section 7). Batch norm's running
        statistics move. Errors: ValueError for a single cell, which has no variance; IndexError for a code beyond all
        that the model has.
        """
        n, vae, told = len(noise_nk), self.vae, self.vae.told_decoder(covariates)
        if n < 2:
            raise ValueError("batch norm: found a minibatch of 1 cell; expected 2 or more. Change models.*.batch_size.")
        encoded_nh = x
        for layer in self.encoder:
            encoded_nh = layer.forward(encoded_nh, told)
        loc, log_variance = vae.encoder.loc, vae.encoder.log_variance
        loc_nk = torch.addmm(loc.bias, encoded_nh, loc.weight.T)
        above_nk = torch.addmm(log_variance.bias, encoded_nh, log_variance.weight.T).exp_()  # beyond MIN_VARIANCE
        variance_nk = above_nk + MIN_VARIANCE
        scale_nk, z_nk, kl_n = variance_nk.sqrt(), torch.empty_like(loc_nk), torch.empty(len(loc_nk))
        q, noise = arrays(loc_nk, scale_nk), noise_nk.contiguous().numpy()
        draw((*q, variance_nk.log_().numpy()), noise, *arrays(z_nk, kl_n))
        decoded_nh = z_nk
        for layer in self.decoder:
            decoded_nh = layer.forward(decoded_nh, told)
        nll_n, dh_nh = self._head(x, covariates, decoded_nh, 1 / n)
        for layer in reversed(self.decoder):
            dh_nh = layer.backward(dh_nh)
        dloc_nk, dlog_nk = torch.empty(2, *z_nk.shape)
        draw_backward(dh_nh.numpy(), kl_weight / n, (*q, above_nk.numpy()), noise, arrays(dloc_nk, dlog_nk))
        for linear, gradient_nk in ((loc, dloc_nk), (log_variance, dlog_nk)):
            torch.mm(gradient_nk.T, encoded_nh, out=linear.weight.grad)
            torch.sum(gradient_nk, 0, out=linear.bias.grad)
        dh_nh = torch.addmm(dloc_nk @ loc.weight, dlog_nk, log_variance.weight)
        for layer in reversed(self.encoder):
            dh_nh = layer.backward(dh_nh)
        return Elbo(nll_n + kl_weight * kl_n, nll_n, kl_n)

    def _head(self, x: SparseCounts, covariates: Covariates, h_nh: Tensor, weight: float) -> tuple[Tensor, Tensor]:
        """Return -log p(x | z) and the gradient by the last hidden layer."""
        linears, tensors = self.vae.decoder.heads, self.vae.decoder.head_tensors
        log_theta, rows_n = self.vae.shared_theta(covariates.batch_n)
        given = (h_nh, observed_library(x)[:, 0].log(), log_theta, *tensors)
        nll_n, logits, (_, dtheta) = head(x, rows_n, given, h_nh.new_full((len(h_nh),), weight), is_trained=True)
        dh_nh, dheads = head_gradients(h_nh, tensors[::2], logits, [False] * len(linears))
        for linear, dweight_gh, dbias_g in zip(linears, dheads[::2], dheads[1::2], strict=True):
            linear.weight.grad, linear.bias.grad = dweight_gh, dbias_g
        if dtheta is not None:
            torch.sum(dtheta, 0, out=self.vae.log_theta.grad.view(dtheta.shape[1:]))
        return nll_n, dh_nh


class _Layer:
    """A hidden layer, whose `backward` is that of its last `forward`."""

    def __init__(self, layer: Layer):
        linear, norm, self.others = layer.linear, layer.norm, layer.others
        self.weight = linear.weight_gh if isinstance(linear, CountsLinear) else linear.weight
        self.bias, self.dropout, self.momentum_eps = linear.bias, layer.dropout, (norm.momentum, norm.eps)
        self.norm = arrays(norm.weight, norm.bias, norm.running_mean, norm.running_var, norm.num_batches_tracked)
        weight_oh = self.others.weight_oh
        nothing = torch.empty(0, len(self.bias))
        told, of_told = (nothing, nothing) if weight_oh is None else (weight_oh, weight_oh.grad)
        self.told, *gradients = arrays(told, norm.weight.grad, norm.bias.grad, of_told)
        self.gradients = tuple(gradients)

    def forward(self, x: SparseCounts | Tensor, told: Told) -> Tensor:
        """Return (n, h)."""
        is_sparse, n_values = isinstance(x, SparseCounts), self.others.n_values
        units_nh = counts_product(x, self.weight, self.bias) if is_sparse else torch.addmm(self.bias, x, self.weight.T)
        if n_values:
            units_nh.addmm_(told.first_nv, self.others.weight_oh[:n_values])
        rows_rn = torch.empty(0, len(units_nh), dtype=torch.int64)
        if self.others.offsets:
            pairs = zip(told.codes, self.others.offsets, strict=True)
            rows_rn = torch.stack([code_n + offset for code_n, offset in pairs])
        bits_nh, least, kept = dropout_bits(*units_nh.shape, self.dropout, units_nh.device)
        out_nh, inverse_h = torch.empty_like(units_nh), torch.empty_like(self.bias)
        out, units, inverse, rows, bits = arrays(out_nh, units_nh, inverse_h, rows_rn, bits_nh)
        hidden(units, (rows, self.told), self.norm, self.momentum_eps, (bits, least, kept), (out, inverse))
        self.given = x, told.first_nv
        self.saved = (out, units, inverse, self.norm[0]), kept, rows
        return out_nh

    def backward(self, dout_nh: Tensor) -> Tensor | None:
        """Note the gradients by the parameters; return that by x, if it is no counts."""
        (x, values_nv), n_values, dunits_nh = self.given, self.others.n_values, torch.empty_like(dout_nh)
        hidden_backward(dout_nh.numpy(), *self.saved, (dunits_nh.numpy(), *self.gradients))
        if n_values:
            torch.mm(values_nv.T, dunits_nh, out=self.others.weight_oh.grad[:n_values])
        if isinstance(x, SparseCounts):
            self.weight.grad = counts_gradient(x, dunits_nh, len(self.weight))
            return None
        torch.mm(dunits_nh.T, x, out=self.weight.grad)
        return dunits_nh @ self.weight
