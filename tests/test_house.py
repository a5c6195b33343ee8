"""The files around the code agree with each other: pins, dependencies, profiles, rules."""

import re
import tomllib
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).parent.parent
CONDA_NAMES = {"pytorch": "torch", "dask-core": "dask", "python-igraph": "igraph", "matplotlib-base": "matplotlib",
               "snakemake-minimal": "snakemake"}  # fmt: skip


def normal(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()


@pytest.fixture(scope="module")
def lock() -> dict[str, str]:
    lines = (ROOT / "requirements.lock").read_text().splitlines()
    return {normal(name): version for name, _, version in (line.partition("==") for line in lines if "==" in line)}


@pytest.mark.parametrize("name", ["workflow", "cpu", "gpu"])
def test_conda_pins_are_those_of_the_lock(name, lock):
    environment = yaml.safe_load((ROOT / f"envs/{name}.yaml").read_text())
    assert "defaults" not in environment["channels"]
    pinned = [entry.split("=") for entry in environment["dependencies"] if "=" in entry]
    for package, version in pinned:
        if package != "python":
            assert lock[normal(CONDA_NAMES.get(package, package))] == version


def test_the_lock_holds_every_dependency(lock):
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    wanted = project["dependencies"] + project["optional-dependencies"]["test"]
    assert {normal(re.split(r"[\[<>=;]", entry)[0]) for entry in wanted} <= lock.keys()


def test_profiles_hold_what_they_must_and_not_what_they_must_not():
    default = yaml.safe_load((ROOT / "profiles/default/profile.yaml").read_text())
    slurm = yaml.safe_load((ROOT / "slurm/profile.yaml").read_text())
    # The default profile is merged over --profile and replaces whole keys.
    assert not default.keys() & {"executor", "default-resources", "jobs", "cores"}
    assert default["rerun-incomplete"] is True
    assert slurm["executor"] == "slurm"
    assert {"default-resources", "jobs", "latency-wait"} <= slurm.keys()


def test_every_rule_says_what_it_needs():
    text = "\n".join(path.read_text() for path in sorted((ROOT / "workflow/rules").glob("*.smk")))
    rules = re.split(r"^rule (\w+):$", text, flags=re.MULTILINE)[1:]
    for name, body in zip(rules[::2], rules[1::2], strict=True):
        for directive in ("log:", "benchmark:", "conda:", "threads:", "mem_mb=", "runtime=", "code=code("):
            assert directive in body, f"rule {name} lacks {directive}"
        assert (ROOT / f"scripts/{name}.py").is_file()
        assert ("gpu=1" in body) == (name in ("train", "gap", "embed", "likelihood", "differential", "expression"))
        assert "retries:" not in body, "retries of a rule nest on a cluster; they belong into the profile"


def test_every_target_of_make_that_runs_python_makes_its_environment():
    makefile = (ROOT / "Makefile").read_text()
    for target, needs, recipe in re.findall(r"^([a-z-]+):([^\n]*)\n((?:\t.*\n)+)", makefile, re.MULTILINE):
        if "$(BIN)" in recipe or "$(SNAKEMAKE)" in recipe:
            assert "setup" in needs or "$(VENV)/." in needs, target
