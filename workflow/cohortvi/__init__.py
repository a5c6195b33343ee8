"""Amortized variational inference for single-cell cohorts that fit in no memory."""
