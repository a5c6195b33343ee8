"""The optimiser beside torch's, and what changes with the steps of a run."""

import dataclasses

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tiny_cohort import MODEL
from torch import nn

from cohortvi.inference.adam import Adam
from cohortvi.inference.schedule import kl_weight, learning_rate


@pytest.mark.parametrize("clip", [None, 1.0, 1e6])
def test_steps_equal_those_of_torch_with_its_clipping(clip):
    generator = torch.Generator().manual_seed(0)
    first = [nn.Parameter(torch.randn(shape, generator=generator)) for shape in ((20, 5), (5,))]
    other = [nn.Parameter(parameter.detach().clone()) for parameter in first]
    ours = Adam([("a", first[0]), ("b", first[1])], weight_decay=1e-3, eps=0.01)
    theirs = torch.optim.Adam(other, lr=0.1, weight_decay=1e-3, eps=0.01)
    for _ in range(5):
        for one, two in zip(first, other, strict=True):
            one.grad = torch.randn(one.shape, generator=generator)
            two.grad = one.grad.clone()
        ours.step(0.1, clip)
        if clip is not None:
            nn.utils.clip_grad_norm_(other, clip)
        theirs.step()
    for one, two in zip(first, other, strict=True):
        torch.testing.assert_close(one, two)


@given(planned=st.integers(1, 5000), warmup=st.floats(0, 1), decay=st.floats(0, 1))
def test_every_step_has_a_rate_and_no_rate_is_above_that_of_the_batch_size(planned, warmup, decay):
    model = dataclasses.replace(MODEL, batch_size=512, learning_rate_warmup=warmup, learning_rate_decay=decay)
    rates = [learning_rate(step, planned, model) for step in range(planned)]
    assert min(rates) > 0
    assert max(rates) <= 4 * model.learning_rate
    if warmup + decay <= 1 and planned >= 2:
        assert max(rates) == 4 * model.learning_rate


@given(planned=st.integers(1, 5000), warmup=st.floats(0, 1))
def test_the_kl_weight_climbs_to_one(planned, warmup):
    weights = [kl_weight(step, planned, warmup) for step in range(planned)]
    assert weights == sorted(weights)
    assert weights[0] > 0
    assert weights[-1] == 1
