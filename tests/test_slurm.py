"""The demo by `snakemake --profile slurm` on a real Slurm (tests/slurm/start.sh), with a requeue in the middle."""

import os
import re
import subprocess
import sys
import time

import pytest
from workflows import assert_same_results, copy_repository, environment

pytestmark = [
    pytest.mark.slow,
    pytest.mark.slurm,
    pytest.mark.timeout(3600),
    pytest.mark.skipif(
        not os.environ.get("COHORTVI_SLURM"), reason="needs the Slurm of tests/slurm/start.sh: make test-slurm"
    ),
]

# The training job waits for a GPU node; the test's Slurm has no accounting, so states come from squeue.
COMMAND = [
    sys.executable, "-m", "snakemake", "--profile", "slurm", "--slurm-init-seconds-before-status-checks", "5",
    "--slurm-status-command", "squeue", "--latency-wait", "10", "--jobs", "4",
    "--set-resources", "train:slurm_partition=gpu", "gap:slurm_partition=gpu", "embed:slurm_partition=gpu",
]  # fmt: skip


def slurm(*arguments: str) -> str:
    return subprocess.run(arguments, check=True, text=True, capture_output=True).stdout


def training_job() -> str | None:
    """Return the id of the running training job."""
    for line in slurm("squeue", "--noheader", "--states=RUNNING", "--format=%i %k").splitlines():
        if "rule_train" in line:
            return line.split()[0]
    return None


def requeue_training(clone, process) -> str:
    """Wait until the training job has left a checkpoint, requeue it, and have it start at once; return its id."""
    while process.poll() is None:
        job = training_job()
        if job and list((clone / "results/checkpoints").glob("nb-*/step-*.json")):
            slurm("scontrol", "requeue", job)
            for _ in range(100):
                time.sleep(0.5)
                state = slurm("scontrol", "show", "job", job)
                if "JobState=PENDING" in state:
                    slurm("scontrol", "update", f"jobid={job}", "StartTime=now")
                    return job
        time.sleep(0.2)
    pytest.fail("the run ended before its training job had left a checkpoint")


def test_the_demo_on_slurm_with_a_requeue_equals_the_local_run(undisturbed_demo, tmp_path):
    remote = copy_repository(tmp_path / "remote", undisturbed_demo)
    log = tmp_path / "slurm.log"
    with log.open("w") as out:
        process = subprocess.Popen(COMMAND, cwd=remote, env=environment(remote), stdout=out, stderr=out)
        try:
            job = requeue_training(remote, process)
            assert process.wait() == 0, log.read_text()[-8000:]
        finally:
            process.kill()
    text = log.read_text()
    assert len(set(re.findall(r"SLURM jobid '?(\d+)'?", text))) > 50, "not every job went through Slurm"
    training = (remote / "logs/train/nb.log").read_text()
    assert "going on from step" in training, f"job {job} began anew:\n{training}"
    assert_same_results(undisturbed_demo, remote)
