"""The package's imports run one way, and it never imports the workflow engine."""

import ast
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parent.parent / "workflow/cohortvi"
# Later rooms may import earlier ones.
ROOMS = [
    "faults",
    "typed",
    "config",
    "files",
    "log",
    "progress",
    "digest",
    "cohort",
    "store",
    "inference",
    "atlas",
    "report",
]
BASE = {"faults", "typed", "config", "files", "log", "progress", "digest"}
# The two rooms that meet: where inference and files come together.
COMPILED = {"arithmetic", "first_layer", "fused", "gpu", "gpu_kernels", "heads", "hidden", "products", "sparse"}
MATHEMATICS = {
    "likelihoods",
    "priors",
    "posteriors",
    "networks",
    "vae",
    "objective",
    "fused_elbo",
    "adam",
    "bounds",
    "expression",
    "criticism",
    "ranks",
    "surgery",
    "labels",
} | COMPILED
MODULES = sorted(PACKAGE.rglob("*.py"))


def imported_names(path: Path) -> set[str]:
    names = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            is_package = (PACKAGE.parent / node.module.replace(".", "/")).is_dir()
            names |= {f"{node.module}.{alias.name}" for alias in node.names} if is_package else {node.module}
    return names


def room(name: str) -> str:
    return name.split(".")[1]


@pytest.mark.parametrize("path", MODULES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_imports_point_to_earlier_rooms(path):
    own = path.relative_to(PACKAGE).parts[0].removesuffix(".py")
    names = {name for name in imported_names(path) if name.startswith("cohortvi.")}
    if own in BASE or own == "__init__":
        assert {room(name) for name in names} <= BASE
    else:
        late = {name for name in names if ROOMS.index(room(name)) > ROOMS.index(own)}
        assert not late, f"{path} imports a room that comes after its own: {late}"


@pytest.mark.parametrize("name", sorted(MATHEMATICS))
def test_mathematics_imports_torch_and_numpy_only(name):
    found = imported_names(PACKAGE / "inference" / f"{name}.py")
    outside = {module.split(".")[0] for module in found if not module.startswith("cohortvi")}
    inside = {module.split(".")[2] for module in found if module.startswith("cohortvi.")}
    compilers = {"numba", "llvmlite", "triton"} if name in COMPILED else set()
    assert (
        outside
        <= {
            "torch",
            "numpy",
            "math",
            "typing",
            "collections",
            "abc",
            "dataclasses",
            "threading",
            "functools",
            "os",
            "contextlib",
            "contextvars",
        }
        | compilers
    )
    assert inside <= MATHEMATICS


def test_triton_is_imported_by_kernels_alone_and_these_where_they_are_called():
    for path in MODULES:
        names, roots = imported_names(path), {name.split(".")[0] for name in imported_names(path) if name}
        assert ("triton" in roots) == (path.stem == "gpu_kernels"), path
        at_once = {alias.name for node in ast.parse(path.read_text()).body if isinstance(node, ast.ImportFrom)
                   for alias in node.names}  # fmt: skip
        assert not at_once & {"gpu", "gpu_kernels"} or path.stem == "gpu", path
        assert "cohortvi.inference.gpu_kernels" not in names or path.stem == "gpu", path


def test_no_module_imports_snakemake_or_pytest():
    for path in MODULES:
        roots = {name.split(".")[0] for name in imported_names(path) if name}
        assert not roots & {"snakemake", "pytest", "workflow"}, path


def test_every_script_bears_the_name_of_a_rule_and_is_short():
    rules = "\n".join(path.read_text() for path in (PACKAGE.parent / "rules").glob("*.smk"))
    for script in (PACKAGE.parent.parent / "scripts").glob("*.py"):
        assert f"rule {script.stem}:" in rules
        assert len(script.read_text().splitlines()) <= 25
