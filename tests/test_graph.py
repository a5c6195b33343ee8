"""Steps that a GPU replays are the steps that are taken without; what is not looked at at once is not lost."""

import dataclasses
import re
from pathlib import Path

import numpy as np
import pytest
import tiny_cohort
import torch
from test_train import COLUMNS, TIMES, Interruption, assert_same, interrupt, run, throw
from tiny_cohort import MODEL, VARIANTS, manifests
from torch.utils._python_dispatch import TorchDispatchMode

from cohortvi.inference import fused, prepare, step, terms
from cohortvi.inference import train as training
from cohortvi.inference.graph import can_capture, graphed_step

NEEDS_GPU = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
ON_GPU = dataclasses.replace(MODEL, device="cuda", precision="float32")
MODELS = {
    "plain": {},
    "zinb": {"likelihood": "zinb", "dispersion": "gene-batch", "library": "latent", "clip": None},
    "told": {"likelihood": "poisson", "encode_covariates": True, "prior": "vamp", "posterior": "full"},
}


@pytest.fixture(scope="module")
def cohort(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("cohort")
    tiny_cohort.write_cohort(folder)
    return folder


@pytest.mark.parametrize("changes", MODELS.values(), ids=MODELS)
def test_steps_out_of_static_memory_are_the_same_to_the_bit(cohort, tmp_path, monkeypatch, changes):
    monkeypatch.setattr(prepare, "is_plain", lambda _: False)  # as on a GPU
    model, made = dataclasses.replace(MODEL, max_epochs=2, **changes), []
    plain = run(cohort, tmp_path / "plain", model)
    real = training.graphed_step
    monkeypatch.setattr(training, "can_capture", lambda *_: True)
    monkeypatch.setattr(training, "graphed_step", lambda *given: made.append(real(*given)) or made[-1])
    assert_same(run(cohort, tmp_path / "static", model), plain)
    (graphed,) = made
    assert graphed.taken > 0


class Blind(TorchDispatchMode):
    """Refuses what would have to look at the device: a graph could not be made of it."""

    LOOKS = ("_local_scalar_dense", "nonzero", "equal", "is_nonzero", "masked_select", "unique_dim", "_unique2")

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        assert func.overloadpacket.__name__ not in self.LOOKS, func
        return func(*args, **(kwargs or {}))


CAPTURED = MODELS | {name: VARIANTS[name] for name in ("full", "flow", "told")}
CAPTURED |= {"poisson": {"likelihood": "poisson", "dispersion": "gene-cell"}}
CAPTURED |= {"labelled": VARIANTS["labelled"] | {"dispersion": "gene"}, "zinb-flow": {"likelihood": "zinb"}}


@pytest.mark.skipif(torch.cuda.is_available(), reason="Triton's interpreter is for where there is no GPU")
@pytest.mark.filterwarnings("ignore:.* encountered in:RuntimeWarning")  # of lanes that are not used (test_gpu.py)
@pytest.mark.parametrize("changes", CAPTURED.values(), ids=CAPTURED)
def test_a_captured_step_looks_at_nothing_on_the_device(cohort, monkeypatch, changes):
    gpu = pytest.importorskip("cohortvi.inference.gpu", reason="needs Triton, which is for Linux")
    # As on a GPU.
    monkeypatch.setattr(prepare, "is_plain", lambda _: False)
    monkeypatch.setattr(step, "counts_of", lambda x, _: gpu.densify(*x, torch.float32))
    monkeypatch.setattr(fused, "_is_even", lambda dnll_n: dnll_n.stride(0) == 0)
    model, splits = dataclasses.replace(MODEL, **changes), (manifests(cohort, "train"), manifests(cohort, "validation"))
    assert can_capture(model, torch.device("cuda"))
    setup, state = prepare.prepare(*splits, model, sheet={}, seed=0, threads=1)
    inputs = step.inputs_of(setup, next(iter(state.loader)), 0.5, 1e-3)
    graphed, before = graphed_step(setup, state), state.vae.decoder.px_scale.weight.clone()
    graphed(inputs)  # makes its memory
    with Blind():
        sums = graphed.step(graphed.static)
    assert torch.isfinite(sums).all()
    assert not torch.equal(state.vae.decoder.px_scale.weight, before)


def test_terms_that_are_looked_at_later_are_the_same(cohort, tmp_path, monkeypatch):
    plain = run(cohort, tmp_path / "plain")
    monkeypatch.setitem(prepare.TOGETHER, "cpu", 5)
    interrupt(monkeypatch, 7, throw)
    with pytest.raises(Interruption):
        run(cohort, tmp_path / "later", dataclasses.replace(MODEL, checkpoint_minutes=0.0))
    assert_same(run(cohort, tmp_path / "later", dataclasses.replace(MODEL, checkpoint_minutes=0.0)), plain)


def test_a_loss_that_is_not_finite_is_told_of_the_step_where_it_arose(cohort, tmp_path, monkeypatch):
    faults = []
    for together in (1, 4):
        monkeypatch.setitem(prepare.TOGETHER, "cpu", together)
        with pytest.raises(ValueError, match="the loss is not finite at step") as error:
            run(cohort, tmp_path / str(together), dataclasses.replace(MODEL, learning_rate=1e30))
        faults.append(str(error.value))
        assert not list((tmp_path / str(together)).glob("*.safetensors"))
    assert faults[0] == faults[1]


def test_sums_are_those_of_every_step():
    found, sums = terms.Terms(3), dict.fromkeys(("cells", *terms.NAMES), 0.0)
    assert found.line() == ""
    for at in range(5):
        found.add(terms.Noted(at, np.arange(2), 2, 1.0), torch.tensor([4.0, 3.0, 1.0], dtype=torch.float64), sums)
    assert (sums["cells"], len(found.waiting)) == (6, 2)
    found.settle(sums)
    assert sums == {"cells": 10, "loss": 20.0, "reconstruction": 15.0, "kl": 5.0}
    assert found.line() == "loss 2.00  reconstruction 1.50  kl 0.50"


# on a GPU


def exact_rates(monkeypatch) -> None:
    """Let learning rates be numbers in single precision: so a graph has them."""
    real = training.learning_rate
    monkeypatch.setattr(training, "learning_rate", lambda *given: float(np.float32(real(*given))))


def assert_close(found, expected, rtol: float) -> None:
    for (name, value), other in zip(found[0].state_dict().items(), expected[0].state_dict().values(), strict=True):
        torch.testing.assert_close(value, other, rtol=rtol, atol=rtol, msg=lambda text, name=name: f"{name}: {text}")
    columns = [name for name in COLUMNS if name not in TIMES]
    np.testing.assert_allclose(found[1][columns].astype(float), expected[1][columns].astype(float), rtol=rtol)


@NEEDS_GPU
@pytest.mark.parametrize("changes", MODELS.values(), ids=MODELS)
def test_replayed_steps_are_those_without_a_graph(cohort, tmp_path, monkeypatch, changes):
    exact_rates(monkeypatch)
    model = dataclasses.replace(ON_GPU, max_epochs=3, **changes)
    plain = run(cohort, tmp_path / "plain", dataclasses.replace(model, graph=False))
    assert_close(run(cohort, tmp_path / "graph", model), plain, 1e-4)


@NEEDS_GPU
@pytest.mark.parametrize("at", [2, 9, 20])
def test_a_run_on_a_gpu_goes_on_as_if_it_had_not_been_interrupted(cohort, tmp_path, monkeypatch, at):
    undisturbed = run(cohort, tmp_path / "undisturbed", ON_GPU)
    interrupt(monkeypatch, at, throw)
    model = dataclasses.replace(ON_GPU, checkpoint_minutes=0.0)
    with pytest.raises(Interruption):
        run(cohort, tmp_path / "interrupted", model)
    assert_close(run(cohort, tmp_path / "interrupted", model), undisturbed, 1e-4)


@NEEDS_GPU
@pytest.mark.parametrize("precision", ["float32", "tf32", "bf16"])
@pytest.mark.parametrize("likelihood", ["nb", "zinb"])
def test_training_on_a_gpu_is_as_good_as_on_a_cpu(cohort, tmp_path, likelihood, precision):
    model = dataclasses.replace(MODEL, likelihood=likelihood, dropout=0.0)
    elbos = [
        run(cohort, tmp_path / device, dataclasses.replace(model, device=device, precision=precision))[1]
        for device in ("cpu", "cuda")
    ]
    on_cpu, on_gpu = (history["validation_elbo"].iloc[-1] for history in elbos)
    assert on_gpu == pytest.approx(on_cpu, rel=0.05)  # of other random numbers


@NEEDS_GPU
def test_a_loss_that_is_not_finite_stops_a_gpu_too(cohort, tmp_path):
    with pytest.raises(ValueError, match="the loss is not finite at step") as error:
        run(cohort, tmp_path, dataclasses.replace(ON_GPU, learning_rate=1e30))
    assert re.search(r"rows \[\d+(, \d+)+\] of the shards", str(error.value))
