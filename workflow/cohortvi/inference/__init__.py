"""Amortized variational inference: log p(x) = KL(q(z|x) || p(z|x)) + ELBO, maximised by training the ELBO."""
