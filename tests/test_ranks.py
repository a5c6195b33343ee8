"""Training by several processes: the same steps as by one, up to rounding, and going on with another number of them."""

import json
import os
import shlex
import signal
import subprocess
import sys
import time
from dataclasses import asdict, replace
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import tiny_cohort
from safetensors.numpy import load_file

PACKAGES = Path(__file__).parent.parent / "workflow"
LAUNCH = """import json, sys
from cohortvi import log
from cohortvi.inference.launch import Job, train
job = Job(**json.load(open(sys.argv[1])))
log.start(job.log)
train(job, ranks=int(sys.argv[2]), nodes=int(sys.argv[3]))"""
TERMS = ["train_loss", "train_reconstruction", "train_kl"]
TERMS += ["validation_elbo", "validation_reconstruction", "validation_kl"]
VARIANTS = {
    "default": {},
    "vamp": {
        "prior": "vamp",
        "posterior": "full",
        "likelihood": "zinb",
        "encode_covariates": True,
        "library": "latent",
    },
    "weighted": {"draws": 3, "norm": "layer", "library": "latent", "dispersion": "gene-batch", "posterior": "flow"},
}

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]


@pytest.fixture(scope="module")
def cohort(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("cohort")
    tiny_cohort.write_cohort(folder)
    return folder


def write_job(cohort: Path, out: Path, changes: dict) -> Path:
    """Write the job of a training run into the folder `out`."""
    out.mkdir(parents=True)
    settings = asdict(replace(tiny_cohort.MODEL, **changes))
    job = {
        "train": [str(path) for path in tiny_cohort.manifests(cohort, "train")],
        "validation": [str(path) for path in tiny_cohort.manifests(cohort, "validation")],
        "outputs": {
            "model": str(out / "model.safetensors"),
            "facts": str(out / "model.json"),
            "history": str(out / "history.parquet"),
        },
        "config": settings,
        "sheet": {},
        "seed": 0,
        "code": "",
        "checkpoints": str(out / "checkpoints"),
        "events": str(out / "tensorboard"),
        "log": str(out / "train.log"),
        "threads": 2,
    }
    path = out / "job.json"
    path.write_text(json.dumps(job))
    return path


def start(job: Path, ranks: int) -> subprocess.Popen:
    """Start the processes of rule train."""
    return subprocess.Popen(
        [sys.executable, "-c", LAUNCH, str(job), str(ranks), "1"], cwd=PACKAGES, stderr=subprocess.DEVNULL
    )


def finish(process: subprocess.Popen, job: Path) -> pd.DataFrame:
    """Return the history of a run that must end well."""
    assert process.wait() == 0, (job.parent / "train.log").read_text()[-4000:]
    return pd.read_parquet(job.parent / "history.parquet")


@pytest.mark.parametrize("changes", VARIANTS.values(), ids=VARIANTS)
def test_two_ranks_take_the_steps_of_one(cohort, tmp_path, changes):
    jobs = [write_job(cohort, tmp_path / str(ranks), changes) for ranks in (1, 2)]
    one, two = (finish(start(job, ranks), job) for ranks, job in enumerate(jobs, 1))
    np.testing.assert_allclose(two[TERMS], one[TERMS], rtol=1e-5)
    weights = [load_file(job.parent / "model.safetensors") for job in jobs]
    for name, value in weights[0].items():
        np.testing.assert_allclose(weights[1][name], value, rtol=1e-3, atol=1e-4, err_msg=name)


def test_torchrun_starts_ranks_too(cohort, tmp_path):
    jobs = [write_job(cohort, tmp_path / str(ranks), {}) for ranks in (1, 2)]
    one = finish(start(jobs[0], 1), jobs[0])
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    launched = subprocess.Popen([*torchrun, "-m", "cohortvi.inference.launch", str(jobs[1])], cwd=PACKAGES)
    np.testing.assert_allclose(finish(launched, jobs[1])[TERMS], one[TERMS], rtol=1e-5)


@pytest.mark.parametrize(("before", "after"), [(2, 1), (2, 3)])
def test_a_terminated_run_goes_on_with_another_number_of_ranks(cohort, tmp_path, before, after):
    whole, parts = (
        write_job(cohort, tmp_path / name, {"checkpoint_minutes": 0.0, "max_epochs": 12}) for name in ("whole", "parts")
    )
    expected = finish(start(whole, 1), whole)
    first = start(parts, before)
    while not list(parts.parent.glob("checkpoints-*/step-*.json")):
        assert first.poll() is None, (parts.parent / "train.log").read_text()[-4000:]
        time.sleep(0.01)
    first.send_signal(signal.SIGTERM)
    assert first.wait() == 143
    assert not (parts.parent / "history.parquet").exists()
    found = finish(start(parts, after), parts)
    assert "going on from step" in (parts.parent / "train.log").read_text()
    np.testing.assert_allclose(found[TERMS], expected[TERMS], rtol=1e-5)


def test_a_signal_to_save_reaches_the_ranks(cohort, tmp_path):
    job = write_job(cohort, tmp_path / "out", {"max_epochs": 40})
    process = start(job, 2)
    log = job.parent / "train.log"
    while not log.exists() or "training" not in log.read_text():
        time.sleep(0.01)
    process.send_signal(signal.SIGUSR1)
    while not list(job.parent.glob("checkpoints-*/step-*.json")):
        assert process.poll() is None, "ended without a checkpoint"
        time.sleep(0.01)
    finish(process, job)


def test_what_a_rank_has_to_say_is_in_the_log(cohort, tmp_path):
    job = write_job(cohort, tmp_path / "out", {"batch_size": 3})
    process = start(job, 2)
    assert process.wait() == 1
    text = (job.parent / "train.log").read_text()
    assert "batch_size: found 3; expected at least 4" in text
    assert "Traceback" not in text


@pytest.mark.slurm
@pytest.mark.skipif(
    not os.environ.get("COHORTVI_SLURM"), reason="needs the Slurm of tests/slurm/start.sh: make test-slurm"
)
def test_two_machines_of_a_slurm_job_take_the_steps_of_one(cohort, tmp_path):
    jobs = [write_job(cohort, tmp_path / name, {}) for name in ("one", "four")]
    expected = finish(start(jobs[0], 1), jobs[0])
    program = shlex.join([sys.executable, "-c", LAUNCH, str(jobs[1]), "4", "2"])
    options = ["--partition=all", "--nodes=2", "--ntasks-per-node=1", "--cpus-per-task=2", "--mem=4000", "--wait"]
    output = tmp_path / "slurm.log"
    batch = subprocess.run(
        ["sbatch", *options, f"--output={output}", f"--wrap=srun -n1 --cpu-bind=q {program}"], cwd=PACKAGES, check=False
    )
    assert batch.returncode == 0, output.read_text()[-4000:]
    found = pd.read_parquet(jobs[1].parent / "history.parquet")
    np.testing.assert_allclose(found[TERMS], expected[TERMS], rtol=1e-5)
