"""Kill -9 at any moment: a run that is started again ends with the same files as one that was left alone.

The demo is run undisturbed once. Another clone is killed, whole process group, each time during another rule; after
each kill it is unlocked and started again, as Snakemake's message says. `make test-kill` kills it during every rule.
"""

import os
import random
import re
import signal
import subprocess
import time
from pathlib import Path

import pandas as pd
import pytest
from workflows import assert_same_results, command, copy_repository, demo_clone, environment, run

pytestmark = [pytest.mark.slow, pytest.mark.timeout(3600)]

# The rules in the order in which they run, so that every restart gets further than the one before, and the same rules
# in the order in which they are chosen: those first that have most to lose.
WALK = ["simulate", "qc", "extract", "gene_moments", "gene_fit", "gene_variance", "select_genes", "shard",
        "train", "gap", "embed", "neighbors", "cluster", "layout", "cells", "markers", "metrics", "atlas", "ledger",
        "report"]  # fmt: skip
RULES = ["train", "shard", "atlas", *(rule for rule in WALK if rule not in ("train", "shard", "atlas"))]


def running_rules(log: Path) -> set[str]:
    """Return the rules of which a job had started and not ended when the log was written."""
    text = log.read_text()
    jobs = re.findall(r"^(?:local)?rule (\w+):\n(?:    .*\n)*?    jobid: (\d+)$", text, re.MULTILINE)
    ended = set(re.findall(r"^Finished jobid: (\d+)", text, re.MULTILINE))
    return {rule for rule, job in jobs if job not in ended}


def seconds_of(done: Path, rule: str) -> float:
    """Return how long the shortest job of a rule took in a run that was left alone."""
    files = [*(done / "benchmarks/out" / rule).glob("*.tsv"), *(done / "benchmarks/out").glob(f"{rule}.tsv")]
    return min(float(pd.read_csv(file, sep="\t")["s"].iloc[0]) for file in files)


def kill_during(clone: Path, rule: str, delay: float, log: Path, *arguments: str) -> set[str]:
    """Start the run, wait until `rule` runs and `delay` seconds more, kill it; return the rules that it hit."""
    with log.open("w") as out:
        process = subprocess.Popen(
            command(*arguments, tiny=False),
            cwd=clone,
            env=environment(clone),
            stdout=out,
            stderr=out,
            start_new_session=True,
        )
        while rule not in running_rules(log) and process.poll() is None:
            time.sleep(0.05)
        time.sleep(delay)
        if process.poll() is None:  # else a killed run before this one had done the rule already
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()
    return running_rules(log)


def test_a_run_killed_again_and_again_ends_like_one_left_alone(undisturbed_demo, tmp_path, request):
    clone = copy_repository(tmp_path / "clone", undisturbed_demo)
    chosen = sorted(RULES[: request.config.getoption("--kills")], key=WALK.index)
    rng = random.Random(0)
    for rule in chosen:
        delay, log = rng.uniform(0, 0.5 * seconds_of(undisturbed_demo, rule)), tmp_path / f"{rule}.log"
        hit = kill_during(clone, rule, delay, log)
        run(clone, "--unlock", tiny=False)
        for _ in range(4):  # a job that was quicker this time, or done already, is run and killed again
            if rule not in hit:
                delay /= 4
                hit = kill_during(clone, rule, delay, log, "--forcerun", rule)
                run(clone, "--unlock", tiny=False)
        print(f"killed {delay:.1f} s into {rule}, while {', '.join(sorted(hit)) or 'nothing'} ran")
        assert rule in hit
    run(clone, tiny=False)
    assert_same_results(undisturbed_demo, clone)


def test_a_killed_run_tells_how_to_take_its_lock_away(tmp_path):
    clone = demo_clone(tmp_path / "clone")
    kill_during(clone, "simulate", 0.5, tmp_path / "run.log")
    refused = run(clone, tiny=False, check=False)
    assert refused.returncode != 0
    assert "--unlock" in refused.stdout
