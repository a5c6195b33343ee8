"""Training reaches its aim, and however it is interrupted it ends with the same bits."""

import dataclasses
import json
import os
import re
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import scipy.sparse as sp
import tiny_cohort
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file
from tiny_cohort import MODEL, VARIANTS, manifests

from cohortvi.config import EarlyStopping, Model
from cohortvi.inference import checkpoint
from cohortvi.inference import train as training
from cohortvi.inference.checkpoint import Checkpoints, load_model, save_model
from cohortvi.inference.covariates import moments
from cohortvi.inference.launch import Job
from cohortvi.inference.networks import Covariates
from cohortvi.inference.prepare import prepare
from cohortvi.inference.train import fit, validate
from cohortvi.store.sharded import ShardedCounts

SHEET = {"dose": {"s0": "0.5", "s1": "2"}, "site": {"s0": "north", "s1": "south"}}
COLUMNS = [
    *("epoch", "step", "train_loss", "train_reconstruction", "train_kl", "kl_weight", "learning_rate"),
    *("validation_elbo", "validation_reconstruction", "validation_kl"),
    *("cells_per_second", "seconds", "waiting_seconds", "peak_memory_mb"),
]
TIMES = ["cells_per_second", "seconds", "waiting_seconds", "peak_memory_mb"]
ALWAYS = dataclasses.replace(MODEL, checkpoint_minutes=0.0)  # a checkpoint after every step


@pytest.fixture(scope="module")
def cohort(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("cohort")
    tiny_cohort.write_cohort(folder)
    return folder


def run(cohort: Path, checkpoints: Path, model: Model = MODEL, **changes):
    splits = manifests(cohort, "train"), manifests(cohort, "validation")
    return fit(*splits, model, checkpoints=checkpoints, **{"sheet": {}, "seed": 0, "threads": 1} | changes)


@pytest.fixture(scope="module")
def undisturbed(cohort, tmp_path_factory):
    return run(cohort, tmp_path_factory.mktemp("undisturbed"))


def assert_same(found, expected) -> None:
    """Weights, facts and history are equal to the bit, the history's times aside."""
    weights = [result[0].state_dict() for result in (found, expected)]
    assert weights[0].keys() == weights[1].keys()
    assert all(torch.equal(weights[0][name], weights[1][name]) for name in weights[0])
    facts = [{k: v for k, v in result[2].items() if k != "settings"} for result in (found, expected)]
    assert facts[0] == facts[1]
    pd.testing.assert_frame_equal(*(result[1].drop(columns=TIMES) for result in (found, expected)), check_exact=True)


class Interruption(BaseException):
    """What a test throws into a training run."""


def interrupt(monkeypatch, step: int, act) -> None:
    """Call `act` once, right after the optimiser step number `step` (from 1) and before anything else."""
    real = training.take_step

    def take_step(setup, state, minibatch):
        line = real(setup, state, minibatch)
        if state.step == step:
            monkeypatch.setattr(training, "take_step", real)
            act()
        return line

    monkeypatch.setattr(training, "take_step", take_step)


def interrupt_validation(monkeypatch, epoch: int, act) -> None:
    """Call `act` once, in the validation of this epoch (from 1)."""
    real = training.held_out_terms

    def held_out_terms(setup, state, minibatch, step):
        if len(state.history) == epoch - 1:
            monkeypatch.setattr(training, "held_out_terms", real)
            act()
        return real(setup, state, minibatch, step)

    monkeypatch.setattr(training, "held_out_terms", held_out_terms)


def throw() -> None:
    raise Interruption


def send(number: signal.Signals):
    return lambda: os.kill(os.getpid(), number)


# what training gives


def test_training_raises_the_held_out_elbo_and_ends_at_kl_weight_one(undisturbed):
    vae, history, facts = undisturbed
    assert list(history) == COLUMNS
    assert history["epoch"].tolist() == list(range(1, MODEL.max_epochs + 1))
    assert history["validation_elbo"].iloc[-1] > history["validation_elbo"].iloc[0] + 1
    assert history["kl_weight"].is_monotonic_increasing
    assert history["waiting_seconds"].between(0, history["seconds"]).all()
    assert history["peak_memory_mb"].between(50, 20_000).all()
    assert history["kl_weight"].iloc[-1] == facts["kl_weight"] == 1
    elbo = -history["validation_reconstruction"] - history["validation_kl"]
    np.testing.assert_allclose(history["validation_elbo"], elbo)
    assert not vae.training


def test_facts_say_what_was_trained_on_what(undisturbed, cohort):
    vae, history, facts = undisturbed
    obs = [json.loads(path.read_text())["n_obs"] for path in manifests(cohort, "train")]
    assert facts["n_obs"] == sum(obs)
    assert facts["n_steps"] == history["step"].iloc[-1]
    assert facts["genes"] == [f"gene{i}" for i in range(tiny_cohort.N_VARS)]
    assert facts["batches"] == ["run0", "run1"]
    assert facts["categories"] == {"sex": ["f", "m"]}
    assert facts["n_parameters"] == sum(parameter.numel() for parameter in vae.parameters())
    assert facts["best_validation_elbo"] == history["validation_elbo"].max()
    assert json.loads(json.dumps(facts))["vae"]["n_genes"] == tiny_cohort.N_VARS


def test_equal_seeds_give_equal_bits_and_other_seeds_other_weights(undisturbed, cohort, tmp_path):
    assert_same(run(cohort, tmp_path / "again"), undisturbed)
    other = run(cohort, tmp_path / "other", seed=1)[0]
    assert not torch.equal(other.encoder.loc.weight, undisturbed[0].encoder.loc.weight)


def test_the_model_returned_is_the_one_of_the_best_validation_elbo(cohort, tmp_path):
    # so large a step that the ELBO goes up and down: here epoch 13 is the best
    model = dataclasses.replace(MODEL, learning_rate=0.8, max_epochs=16, kl_warmup=0.25)
    vae, history, facts = run(cohort, tmp_path, model)
    judged = history[history["kl_weight"] == 1]["validation_elbo"]
    assert facts["best_epoch"] == history["epoch"][judged.idxmax()]
    setup, state = prepare(
        manifests(cohort, "train"), manifests(cohort, "validation"), model, sheet={}, seed=0, threads=1
    )
    state.vae.load_state_dict(vae.state_dict())
    assert validate(setup, state, lambda: None)["elbo"] == judged.max()


def test_early_stopping_counts_epochs_after_the_warm_up_alone(cohort, tmp_path):
    model = dataclasses.replace(MODEL, max_epochs=8, early_stopping=EarlyStopping(patience=0.25, min_delta=1e9))
    history = run(cohort, tmp_path, model)[1]
    # weight 1 is reached with the last step of epoch 4, which sets the mark; 5 and 6 do not better it
    assert history["kl_weight"].eq(1).sum() == 3
    assert len(history) == 6


def test_small_cohorts_are_planned_for_more_epochs_but_not_without_end(cohort):
    splits = manifests(cohort, "train"), manifests(cohort, "validation")

    def planned(**changes: object) -> tuple[int, int, int]:
        model = dataclasses.replace(MODEL, **changes)
        setup, state = prepare(*splits, model, sheet={}, seed=0, threads=1)
        return setup.epochs, setup.planned, state.loader.n_steps(0)

    _, _, steps = planned()
    assert planned(max_epochs=6, min_steps=6 * steps)[:2] == (6, 6 * steps)
    assert planned(max_epochs=6, min_steps=6 * steps + 1)[:2] == (7, 7 * steps)
    assert planned(max_epochs=6, min_steps=1_000_000)[0] == 400
    assert planned(max_epochs=500, min_steps=1_000_000)[0] == 500


@pytest.mark.parametrize("likelihood", ["zinb", "poisson"])
def test_every_likelihood_trains(cohort, tmp_path, likelihood):
    model = dataclasses.replace(
        MODEL, likelihood=likelihood, dispersion="gene-batch", encode_covariates=True, n_layers=2
    )
    history = run(cohort, tmp_path, model)[1]
    assert history["validation_elbo"].iloc[-1] > history["validation_elbo"].iloc[0]


@pytest.mark.parametrize("changes", VARIANTS.values(), ids=VARIANTS)
def test_every_variant_trains_and_goes_on_to_the_same_bits(cohort, tmp_path, monkeypatch, changes):
    model = dataclasses.replace(ALWAYS, **changes)
    whole = run(cohort, tmp_path / "whole", model)
    elbo = whole[1]["validation_elbo"]
    assert elbo.iloc[-1] > elbo.iloc[0]
    with monkeypatch.context() as patched:
        interrupt(patched, 20, throw)
        with pytest.raises(Interruption):
            run(cohort, tmp_path / "parts", model)
    assert_same(run(cohort, tmp_path / "parts", model), whole)


@pytest.mark.parametrize("changes", [{"prior": "mixture"}, {"prior": "vamp"}, {"prior": "mixture", "draws": 2}])
def test_shrinkage_draws_the_prior_to_the_standard_normal_and_counts_in_the_loss(cohort, tmp_path, changes):
    divergences, losses = [], []
    for weight in (0.0, 100.0):
        model = dataclasses.replace(MODEL, max_epochs=10, learning_rate=4e-2, prior_shrinkage=weight, **changes)
        vae, history, _ = run(cohort, tmp_path / str(weight), model)
        divergences.append(float(vae.prior_divergence(torch.zeros(1, 3)).detach()))
        losses.append(history["train_loss"].iloc[-1])
    assert divergences[1] < 0.8 * divergences[0]
    assert losses[1] - losses[0] > 50 * divergences[1]


def test_without_components_there_is_nothing_to_shrink(cohort, undisturbed, tmp_path):
    weights = run(cohort, tmp_path, dataclasses.replace(MODEL, prior_shrinkage=5.0))[0].state_dict()
    assert all(torch.equal(value, weights[name]) for name, value in undisturbed[0].state_dict().items())


def test_a_latent_library_begins_with_the_moments_of_each_batch(cohort, tmp_path):
    vae = run(cohort, tmp_path, dataclasses.replace(MODEL, library="latent", max_epochs=1))[0]
    for batch, sample in enumerate(("s0", "s1")):
        stores = ShardedCounts(manifests(cohort, "train")).stores
        logs = [np.log(max(1, store.read(i, i + 1).data.sum())) for store in stores for i in range(store.n_obs)
                if store.obs["sample"].iloc[i] == sample]  # fmt: skip
        assert float(vae.library_loc_b[batch]) == pytest.approx(np.mean(logs), rel=1e-5)
        assert float(vae.library_scale_b[batch]) == pytest.approx(np.std(logs), rel=1e-4)


def test_more_pseudo_inputs_than_cells_are_refused(cohort, tmp_path):
    model = dataclasses.replace(MODEL, prior="vamp", n_components=10_000)
    with pytest.raises(ValueError, match=r"n_components: found 10000; expected at most the 2\d\d training cells"):
        run(cohort, tmp_path, model)


# interruptions


@pytest.mark.parametrize("step", [1, 5, 8, 9, 47, 48])  # of 6 epochs with 8 steps each
def test_a_run_interrupted_after_any_step_ends_with_the_same_bits(cohort, undisturbed, tmp_path, monkeypatch, step):
    interrupt(monkeypatch, step, throw)
    with pytest.raises(Interruption):
        run(cohort, tmp_path, ALWAYS)
    assert_same(run(cohort, tmp_path, ALWAYS), undisturbed)


def test_a_run_interrupted_in_validation_ends_with_the_same_bits(cohort, undisturbed, tmp_path, monkeypatch):
    interrupt_validation(monkeypatch, 4, throw)
    with pytest.raises(Interruption):
        run(cohort, tmp_path, ALWAYS)
    assert_same(run(cohort, tmp_path, ALWAYS), undisturbed)


@pytest.mark.parametrize("where", ["step", "last step", "validation"])
def test_sigterm_saves_and_ends_with_status_143(cohort, undisturbed, tmp_path, monkeypatch, where):
    if where == "validation":
        interrupt_validation(monkeypatch, 2, send(signal.SIGTERM))
    else:
        interrupt(monkeypatch, 13 if where == "step" else 16, send(signal.SIGTERM))
    before = signal.getsignal(signal.SIGTERM)
    with pytest.raises(SystemExit) as end:
        run(cohort, tmp_path)
    assert end.value.code == 143
    assert signal.getsignal(signal.SIGTERM) == before
    (saved,) = tmp_path.glob("step-*.json")
    assert saved.stem == ("step-00000013" if where == "step" else "step-00000016")
    assert_same(run(cohort, tmp_path), undisturbed)


def test_sigusr1_saves_and_goes_on(cohort, undisturbed, tmp_path, monkeypatch):
    interrupt(monkeypatch, 13, send(signal.SIGUSR1))
    assert_same(run(cohort, tmp_path), undisturbed)
    assert sorted(path.stem for path in tmp_path.glob("*.json")) == ["step-00000013", "step-00000048"]


def test_a_finished_run_is_given_out_again_without_a_step(cohort, undisturbed, tmp_path, monkeypatch):
    first = run(cohort, tmp_path)
    monkeypatch.setattr(training, "take_step", throw)
    again = run(cohort, tmp_path)
    assert_same(again, first)
    pd.testing.assert_frame_equal(again[1], first[1])


def test_training_goes_on_with_other_clocks_but_not_with_other_settings_or_seeds(cohort, tmp_path, monkeypatch):
    interrupt(monkeypatch, 5, throw)
    with pytest.raises(Interruption):
        run(cohort, tmp_path, ALWAYS)
    for changes in ({"seed": 1}, {"model": dataclasses.replace(MODEL, learning_rate=0.01)}):
        with pytest.raises(ValueError, match="its checkpoints are of other shards, settings or seed"):
            run(cohort, tmp_path, **changes)
    run(cohort, tmp_path, MODEL)


def test_settings_that_do_not_decide_the_model_leave_the_checkpoints_where_they_are(cohort, tmp_path):
    def folder(**changes) -> Path:
        config = json.loads(json.dumps(dataclasses.asdict(dataclasses.replace(MODEL, **changes))))
        splits = ([str(path) for path in manifests(cohort, split)] for split in ("train", "validation"))
        others = {"outputs": {}, "sheet": {}, "seed": 0, "code": "a", "events": "", "log": "", "threads": 1}
        return Job(*splits, config=config, checkpoints=str(tmp_path / "nb"), **others).folder

    assert folder(checkpoint_minutes=1.0, tensorboard=True) == folder()
    assert folder(device="cuda", graph=False) == folder()
    assert folder(learning_rate=0.01) != folder()
    assert folder(precision="bf16") != folder()


def kill_children(cohort: Path, out: Path, kills: int, number: str) -> int:
    """Train in child processes killed at random moments; return how many kills found training under way."""
    command = [sys.executable, tiny_cohort.__file__, str(cohort), str(out), "--kills", str(kills), "--signal", number]
    paths = os.pathsep.join([str(Path(training.__file__).parents[2]), os.environ.get("PYTHONPATH", "")])
    environment = os.environ | {"PYTHONPATH": paths, "OMP_NUM_THREADS": "1"}
    found = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert found.returncode == 0, found.stderr
    return int(re.match(r"\d+", found.stdout.splitlines()[-1])[0])


@pytest.mark.parametrize(
    ("kills", "number"),
    [(3, "KILL"), *(pytest.param(30, number, marks=pytest.mark.slow) for number in ("KILL", "TERM"))],
)
def test_a_process_killed_at_random_moments_ends_with_the_same_files(cohort, tmp_path, kills, number):
    assert kill_children(cohort, tmp_path, kills, number) > 0
    for name in ("model.safetensors", "model.json"):
        written = [path.read_bytes() for path in tmp_path.glob(f"*/{name}")]
        assert len(written) == 1 + (kills + 2) // 3
        assert len(set(written)) == 1


def write_half(tensors: checkpoint.Tensors, path: Path) -> None:
    whole = checkpoint.save({name: value.contiguous() for name, value in tensors.items()})
    path.with_name(f"{path.name}.partial").write_bytes(whole[: len(whole) // 2])


KILLS = {  # what checkpoint.py calls, the file of the call instead of which the process dies, what it leaves
    "tensors": ("_save_tensors", "step-00000020.safetensors", "step-00000020.safetensors.partial"),
    "facts": ("write_json", "step-00000020.json", "step-00000020.safetensors"),
    "old": ("remove", "step-00000018.safetensors", "step-00000018.safetensors"),
}


def killed_run(cohort: str, checkpoints: str, kill: str) -> None:
    """Train in this process, which dies inside the writing of the checkpoint of step 20."""
    name, file, _ = KILLS[kill]
    real = getattr(checkpoint, name)

    def killed(*given: Any) -> Any:
        if given[-1].name == file:
            if kill == "tensors":
                write_half(*given)
            os.kill(os.getpid(), signal.SIGKILL)
        return real(*given)

    setattr(checkpoint, name, killed)
    run(Path(cohort), Path(checkpoints), ALWAYS)


@pytest.mark.parametrize("kill", KILLS)
def test_a_process_killed_while_it_writes_a_checkpoint_ends_with_the_same_bits(cohort, undisturbed, tmp_path, kill):
    script = "import sys, test_train; test_train.killed_run(*sys.argv[1:])"
    command = [sys.executable, "-c", script, str(cohort), str(tmp_path), kill]
    assert subprocess.run(command, cwd=Path(__file__).parent, check=False).returncode == -signal.SIGKILL
    assert (tmp_path / KILLS[kill][2]).exists()
    assert_same(run(cohort, tmp_path, ALWAYS), undisturbed)


# checkpoints


def test_checkpoints_are_tensors_and_json_and_the_last_two_are_kept(cohort, tmp_path):
    run(cohort, tmp_path, ALWAYS)
    stems = ["step-00000047", "step-00000048"]
    files = {f"{stem}.{kind}" for stem in stems for kind in ("json", "safetensors")}
    assert {path.name for path in tmp_path.iterdir()} == files | {"lock"}
    names = load_file(tmp_path / "step-00000048.safetensors").keys()
    assert {name.split(".")[0] for name in names} == {"model", "best", "adam"}


def test_short_epochs_do_not_each_write_a_checkpoint(cohort, tmp_path, monkeypatch):
    steps = []
    real = Checkpoints.save
    monkeypatch.setattr(Checkpoints, "save", lambda self, step, *rest: (steps.append(step), real(self, step, *rest)))
    monkeypatch.setattr("time.monotonic", lambda: 0.0)
    run(cohort, tmp_path)
    assert steps == [48]


def damage_half(path: Path) -> None:
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def damage_bit(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1 << 7  # of JSON, no longer text
    path.write_bytes(content)


@pytest.mark.parametrize("kind", ["json", "safetensors"])
@pytest.mark.parametrize("damage", [damage_half, damage_bit, Path.unlink])
def test_a_damaged_checkpoint_gives_way_to_the_one_before(cohort, undisturbed, tmp_path, monkeypatch, kind, damage):
    interrupt(monkeypatch, 20, throw)
    with pytest.raises(Interruption):
        run(cohort, tmp_path, ALWAYS)
    damage(tmp_path / f"step-00000019.{kind}")
    (tmp_path / "step-00000020.safetensors.partial").touch()
    with Checkpoints(tmp_path, 10) as saved:
        assert saved.newest()[1]["step"] == 18
        assert {path.name.split(".")[0] for path in tmp_path.glob("step-*")} == {"step-00000018"}
    assert_same(run(cohort, tmp_path, ALWAYS), undisturbed)


def test_a_folder_takes_one_trainer_at_a_time(cohort, tmp_path):
    with Checkpoints(tmp_path, 10), pytest.raises(ValueError, match="another process is training into this folder"):
        run(cohort, tmp_path)
    run(cohort, tmp_path)


def test_a_saved_model_is_loaded_as_it_was(undisturbed, tmp_path):
    vae, _, facts = undisturbed
    save_model(vae, facts, tmp_path / "m.safetensors", tmp_path / "m.json")
    again, found = load_model(tmp_path / "m.safetensors")
    assert found == json.loads(json.dumps(facts))
    assert not again.training
    covariates = Covariates(torch.tensor([0, 1]), (torch.tensor([1, 0]),), torch.tensor([[0.3], [-1.0]]))
    x_ng = torch.arange(2.0 * tiny_cohort.N_VARS).reshape(2, -1)
    assert torch.equal(again.encode(x_ng, covariates).loc_nk, vae.encode(x_ng, covariates).loc_nk)
    save_model(again, found, tmp_path / "n.safetensors", tmp_path / "n.json")
    for kind in ("safetensors", "json"):
        assert (tmp_path / f"m.{kind}").read_bytes() == (tmp_path / f"n.{kind}").read_bytes()


# covariates


def test_covariates_of_the_sheet_are_those_of_the_sample(cohort, tmp_path):
    settings = {"categorical_covariates": ("site", "sex"), "continuous_covariates": ("dose", "age")}
    model = dataclasses.replace(MODEL, **settings)
    facts = run(cohort, tmp_path, model, sheet=SHEET)[2]
    assert facts["categories"] == {"sex": ["f", "m"], "site": ["north", "south"]}
    setup, state = prepare(
        manifests(cohort, "train"), manifests(cohort, "validation"), model, sheet=SHEET, seed=0, threads=1
    )
    minibatch = next(iter(state.loader))
    found, sample = setup.covariates(minibatch.obs), minibatch.obs["sample"]
    assert torch.equal(found.categories[1], sample)
    mean, std = facts["continuous"]["dose"]
    doses = torch.where(sample == 0, 0.5, 2.0)
    torch.testing.assert_close(found.continuous_nc[:, 1], (doses - mean) / std)


def test_standardised_covariates_have_mean_0_and_deviation_1_over_the_training_cells(cohort):
    setup, state = prepare(
        manifests(cohort, "train"), manifests(cohort, "validation"), MODEL, sheet={}, seed=0, threads=1
    )
    values = torch.cat([setup.covariates(minibatch.obs).continuous_nc for minibatch in state.loader]).double()
    assert float(values.mean()) == pytest.approx(0, abs=1e-6)
    assert float(values.std(correction=0)) == pytest.approx(1, abs=1e-6)


@given(st.lists(st.lists(st.integers(-1000, 1000), max_size=5), min_size=1, max_size=5), st.floats(0, 1e6))
def test_moments_of_parts_are_those_of_the_whole(parts, shift):
    arrays = [np.array(part, dtype=np.float64) + shift for part in parts]
    whole = np.concatenate(arrays)
    if len(set(whole)) < 2:
        with pytest.raises(ValueError, match="expected values that differ"):
            moments("age", arrays)
    else:
        np.testing.assert_allclose(moments("age", arrays), (whole.mean(), whole.std()), rtol=1e-8)


# errors at the door, and in the middle


@pytest.mark.parametrize(
    ("changes", "sheet", "message"),
    [
        ({"categorical_covariates": ("donor",)}, {}, "categorical_covariates: 'donor' is no such column"),
        ({"categorical_covariates": ("age",)}, {}, "categorical_covariates: 'age' is no such column"),
        ({"continuous_covariates": ("sex",)}, {}, "continuous_covariates: 'sex' is no such column"),
        ({"continuous_covariates": ("site",)}, SHEET, "sheet: site of sample 's0' is 'north'; expected a number"),
        ({"continuous_covariates": ("dose",)}, {"dose": {"s0": "1", "s1": "1"}}, "'dose' is 1.0 in all"),
        ({"likelihood": "normal"}, {}, "likelihood: found 'normal'; expected one of nb, zinb, poisson"),
        ({"batch_size": 2}, {}, "batch_size: found 2; expected at least 3"),
    ],
)
def test_settings_that_cannot_be_are_refused_before_anything_is_written(cohort, tmp_path, changes, sheet, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        run(cohort, tmp_path / "checkpoints", dataclasses.replace(MODEL, **changes), sheet=sheet)
    assert not (tmp_path / "checkpoints").exists()


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_a_device_that_is_not_there_is_refused(cohort, tmp_path):
    with pytest.raises(ValueError, match="device: found cuda, but this process sees no GPU"):
        run(cohort, tmp_path, dataclasses.replace(MODEL, device="cuda"))


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_a_gpu_trains_the_same_model_up_to_rounding(cohort, undisturbed, tmp_path):
    history = run(cohort, tmp_path, dataclasses.replace(MODEL, device="cuda", dropout=0.0))[1]
    assert history["validation_elbo"].iloc[-1] == pytest.approx(undisturbed[1]["validation_elbo"].iloc[-1], rel=0.05)


def test_a_cohort_without_held_out_cells_is_refused(tmp_path):
    x, obs = tiny_cohort.simulate(3, seed=0)
    tiny_cohort.write_samples(tmp_path, {"s0": (x, obs)})
    with pytest.raises(ValueError, match=r"the (training|validation) shards hold [01] cells; expected at least 2"):
        run(tmp_path, tmp_path / "checkpoints")


def test_a_loss_that_is_not_finite_stops_and_says_where(cohort, tmp_path):
    with pytest.raises(ValueError, match=r"the loss is not finite at step 0: loss inf, reconstruction \d"):
        run(cohort, tmp_path / "shrunk", dataclasses.replace(MODEL, prior="mixture", prior_shrinkage=1e39))
    with pytest.raises(ValueError, match="the loss is not finite at step") as error:
        run(cohort, tmp_path, dataclasses.replace(MODEL, learning_rate=1e30))
    for part in (
        r"reconstruction \S+, kl \S+ nats per cell",
        r"kl_weight 0\.\d",
        r"rows \[\d+(, \d+)+\] of the shards",
    ):
        assert re.search(part, str(error.value))


# recovery


@pytest.mark.slow
def test_dispersions_and_cell_types_of_a_simulation_are_recovered(tmp_path):
    r = np.random.default_rng(0)
    n_obs, n_vars = 3000, 100
    theta = np.exp(r.normal(0.5, 1.0, n_vars))
    types = r.integers(0, 4, n_obs)
    fractions = r.dirichlet(np.full(n_vars, 2.0), 4)[types]
    mu = r.lognormal(np.log(2000), 0.3, (n_obs, 1)) * fractions
    x = sp.csr_matrix(r.poisson(r.gamma(theta, mu / theta)).astype(np.uint32))
    obs = pd.DataFrame({"row": np.arange(n_obs)}, index=[f"cell{i}" for i in range(n_obs)])
    tiny_cohort.write_samples(tmp_path, {"s0": (x, obs)})
    settings = {"categorical_covariates": (), "continuous_covariates": (), "max_epochs": 60, "learning_rate": 5e-3}
    model = dataclasses.replace(MODEL, **settings, batch_size=128, n_hidden=64)
    vae, _, _ = run(tmp_path, tmp_path / "checkpoints", model)
    assert np.corrcoef(vae.log_theta.detach(), np.log(theta))[0, 1] > 0.9
    with torch.inference_mode():
        loc_nk = vae.encode(torch.from_numpy(x.toarray()).float(), Covariates(torch.zeros(n_obs).long())).loc_nk
    centres = torch.stack([loc_nk[types == kind].mean(0) for kind in range(4)])
    assert (torch.cdist(loc_nk, centres).argmin(1).numpy() == types).mean() > 0.95


def test_the_history_is_written_for_tensorboard_too(cohort, tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    common = {"sheet": {}, "seed": 0, "checkpoints": tmp_path / "checkpoints", "threads": 1}
    splits = manifests(cohort, "train"), manifests(cohort, "validation")
    for folder in ("events", "events", "asked for later"):  # the second and the third of a run that has ended
        _, history, _ = fit(*splits, MODEL, events=tmp_path / folder, **common)
        found = EventAccumulator(str(tmp_path / folder)).Reload()
        for name in set(history.columns) - {"epoch", "step"}:
            scalars = found.Scalars(name)
            assert [scalar.step for scalar in scalars] == list(history["step"])
            np.testing.assert_allclose([scalar.value for scalar in scalars], history[name], rtol=1e-6)
