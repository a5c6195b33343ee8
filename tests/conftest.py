"""What tests share: the package and the workflow's root, the folder of real cohorts, small configs."""

import fcntl
import os
from pathlib import Path

import pytest
import torch
import yaml
from workflows import demo_clone, run

from cohortvi.config import Config, check

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"  # is looked at when Triton is imported, whoever does it first

ROOT = Path(__file__).parent.parent


def pytest_addoption(parser):
    parser.addoption("--kills", type=int, default=3, help="how often test_kill.py kills the demo")


def pytest_collection_modifyitems(items):
    # It waits most: first, so that the other process goes through the rest meanwhile.
    items.sort(key=lambda item: item.get_closest_marker("slurm") is None)


@pytest.fixture(scope="session")
def test_data() -> Path:
    """The folder of real cohorts; tests on them are skipped where it is not."""
    folder = os.environ.get("COHORTVI_TEST_DATA", "")
    if not folder or not Path(folder).is_dir():
        pytest.skip("needs real cohorts: set COHORTVI_TEST_DATA to the folder that holds them")
    return Path(folder)


@pytest.fixture
def demo_values() -> dict:
    """The values of config/config.yaml, as a fresh dict."""
    return yaml.safe_load((ROOT / "config/config.yaml").read_text())


@pytest.fixture(scope="session")
def config_schema() -> dict:
    return yaml.safe_load((ROOT / "workflow/schemas/config.schema.yaml").read_text())


@pytest.fixture(scope="session")
def samples_schema() -> dict:
    return yaml.safe_load((ROOT / "workflow/schemas/samples.schema.yaml").read_text())


@pytest.fixture
def demo_config(demo_values, config_schema) -> Config:
    """The config of the demo cohort."""
    return check(demo_values, config_schema)


@pytest.fixture(scope="session")
def undisturbed_demo(tmp_path_factory) -> Path:
    """A clone in which the demo ran from beginning to end, to compare others with; one for all of xdist's processes."""
    folder = tmp_path_factory.getbasetemp()
    folder = folder.parent if "PYTEST_XDIST_WORKER" in os.environ else folder
    clone, done = folder / "undisturbed", folder / "undisturbed.done"
    with (folder / "undisturbed.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not done.exists():
            run(demo_clone(clone), tiny=False)
            done.touch()
    return clone
