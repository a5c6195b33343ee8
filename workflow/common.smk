# Included first: config and sheet are checked here, before any job starts, and the names that the rules share are made.
import shlex
import sys
from pathlib import Path

import yaml
from cohortvi.cohort import preflight, sections
from cohortvi.cohort.references import reference_files
from cohortvi.cohort.sheet import file_name, read_sheet
from cohortvi.cohort.simulate import sample_names
from cohortvi.config import check
from cohortvi.digest import code as code_digest
from cohortvi.files import digest
from cohortvi.store.names import SPLITS, generations, up_to
from snakemake.exceptions import WorkflowError

# Snakemake puts the interpreter's path into shell commands as it is, which fails in a clone whose path holds a space.
if not sys.executable.startswith("'"):
    sys.executable = shlex.quote(sys.executable)

ROOT = Path(workflow.basedir)
DEMO = "resources/demo"
KANG = "resources/kang"


def schema(name):
    """Return one of the schemas as a dict."""
    return yaml.safe_load((ROOT / "workflow/schemas" / f"{name}.schema.yaml").read_text())


try:
    CONFIG = check(config, schema("config"))
    sheet = read_sheet(CONFIG.cohort.sheet, CONFIG.cohort.batch_key, schema("samples"))
    made = {f"{DEMO}/{name}.zarr" for name in sample_names(CONFIG.simulate)}
    made |= {f"{KANG}/pbmc_{condition}.h5ad" for condition in ("ctrl", "stim")}
    if workflow.is_main_process:
        preflight.check(CONFIG, sheet, made, Path(".snakemake/cohortvi/inputs.json"))
except ValueError as error:
    raise WorkflowError(str(error)) from None

SAMPLES = {sample.name: sample for sample in sheet}
BATCHES = {name: file_name(sample.batch) for name, sample in SAMPLES.items()}
MEMBERS = sections.by_batch(BATCHES)
MODELS = sorted(CONFIG.models)
GENERATIONS = generations(CONFIG.store, {sample.name: sample.generation for sample in sheet})
SHARDS = [name for split in SPLITS for generation in GENERATIONS for name in generation.shards[split]]


wildcard_constraints:
    sample="[A-Za-z0-9][A-Za-z0-9._-]*",
    batch="[A-Za-z0-9._-]+",
    model="[A-Za-z0-9_]+",
    split="train|validation",
    shard="[0-9]{4}",


def code(rule_name):
    """Return the digest of what a rule runs, without comments and docstrings."""
    return code_digest(ROOT / "scripts" / f"{rule_name}.py")


def text_digest(*names):
    """Return the digest of files of the package that are no Python."""
    return digest(*((ROOT / "workflow/cohortvi" / name).read_text() for name in names))


def source(wildcards):
    """Return what names the raw counts of a sample."""
    return SAMPLES[wildcards.sample].source()


def raw_store(wildcards):
    """Return the sample's file as an input, so that a changed file reruns what reads it; a URL has no file."""
    path = SAMPLES[wildcards.sample].path
    return [] if "://" in path else path


def in_batch(pattern):
    """Return an input function: `pattern` for every sample of the batch."""
    return lambda wildcards: expand(pattern, sample=MEMBERS[wildcards.batch])


def of_samples(pattern):
    """Return `pattern` for every sample, in the order of their names."""
    return expand(pattern, sample=list(SAMPLES))


def memory(base_mb, per_mb=0.0):
    """Return a resource: `base_mb` plus `per_mb` for each MB of input, half as much again at each new attempt."""
    return lambda wildcards, input, attempt: int((base_mb + per_mb * input.size_mb) * 1.5 ** (attempt - 1))


def minutes(base, per_gb=0.0):
    """Return a resource: minutes for the job, and for each GB of input, twice as many at each new attempt."""
    return lambda wildcards, input, attempt: int((base + per_gb * input.size_mb / 1024) * 2 ** (attempt - 1))


def truth_input(pattern):
    """Return `pattern` for every sample if the cohort is a simulated one, whose truth is known."""
    return of_samples(pattern) if CONFIG.atlas.metrics.truth else []
