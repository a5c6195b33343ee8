"""The config as typed, immutable values; the values themselves live in config/config.yaml alone.

`check` refuses a config that breaks its schema; faults.py finds and words what is wrong. The dataclasses below carry
the checked sections into the package, so their fields are the schema's keys. They hold no defaults.
"""

from dataclasses import dataclass
from typing import Any

from cohortvi.faults import faults_of
from cohortvi.typed import build


@dataclass(frozen=True)
class Cohort:
    sheet: str
    gene_key: str
    join: str
    batch_key: tuple[str, ...]
    keep_obs: tuple[str, ...]
    chunk_cells: int


@dataclass(frozen=True)
class Threshold:
    above: float | None
    below: float | None
    mads_low: float | None
    mads_high: float | None
    log1p: bool


@dataclass(frozen=True)
class Doublets:
    enabled: bool
    expected_rate: float
    remove: bool
    min_cells: int


@dataclass(frozen=True)
class Gate:
    min_cells: int
    min_median_genes: float
    keep: tuple[str, ...]


@dataclass(frozen=True)
class Qc:
    symbols: str | None
    gene_sets: dict[str, str | list[str]]
    thresholds: dict[str, Threshold]
    overrides: dict[str, dict[str, dict[str, float | bool | None]]]
    doublets: Doublets
    gate: Gate


@dataclass(frozen=True)
class Genes:
    flavor: str
    n_top: int
    span: float
    theta: float
    always: tuple[str, ...]
    never: tuple[str, ...]
    frozen: str | None


@dataclass(frozen=True)
class Validation:
    fraction: float
    by: str


@dataclass(frozen=True)
class Store:
    shards: int
    validation: Validation
    reshuffle: float


@dataclass(frozen=True)
class EarlyStopping:
    patience: float
    min_delta: float


@dataclass(frozen=True)
class Labels:
    column: str
    unknown: tuple[str, ...]
    weight: float


@dataclass(frozen=True)
class Reference:
    path: str
    surgery: bool


@dataclass(frozen=True)
class Model:
    likelihood: str
    dispersion: str
    n_latent: int
    n_hidden: int
    n_layers: int
    dropout: float
    categorical_covariates: tuple[str, ...]
    continuous_covariates: tuple[str, ...]
    encode_covariates: bool
    coding: str
    n_embedding: int
    library: str
    posterior: str
    prior: str
    n_components: int
    prior_shrinkage: float
    labels: Labels | None
    decoder: str
    norm: str
    draws: int
    batch_size: int
    learning_rate: float
    learning_rate_warmup: float
    learning_rate_decay: float
    clip: float | None
    weight_decay: float
    max_epochs: int
    min_steps: int
    kl_warmup: float
    early_stopping: EarlyStopping
    checkpoint_minutes: float
    tensorboard: bool
    device: str
    precision: str
    graph: bool
    reference: Reference | None


@dataclass(frozen=True)
class Limit:
    warn: float | None
    fail: float | None


@dataclass(frozen=True)
class Limits:
    amortization_gap: Limit
    amortization_gap_p99: Limit
    encoder_overfit: Limit
    unreliable_share: Limit
    group_excess: Limit


@dataclass(frozen=True)
class Gap:
    cells: int
    steps: int
    draws: int
    limits: Limits


@dataclass(frozen=True)
class Likelihood:
    draws: int | None


@dataclass(frozen=True)
class Comparison:
    column: str
    group: str
    reference: str | None
    within: str | None


@dataclass(frozen=True)
class Differential:
    comparisons: dict[str, Comparison]
    replicate: str
    cells: int
    pairs: int
    delta: float
    fdr: float


@dataclass(frozen=True)
class Expression:
    genes: tuple[str, ...]
    batches: tuple[str, ...]
    groups: tuple[str, ...]
    draws: int
    library: float


@dataclass(frozen=True)
class Neighbors:
    n_neighbors: int


@dataclass(frozen=True)
class Clusters:
    resolutions: tuple[float, ...]
    shown: float


@dataclass(frozen=True)
class Layout:
    min_dist: float
    spread: float


@dataclass(frozen=True)
class Metrics:
    labels: tuple[str, ...]
    truth: str | None


@dataclass(frozen=True)
class Embed:
    refine_above: float | None
    steps: int
    samples: int


@dataclass(frozen=True)
class Atlas:
    embed: Embed
    neighbors: Neighbors
    clusters: Clusters
    layout: Layout
    genes: str
    metrics: Metrics


@dataclass(frozen=True)
class Report:
    title: str
    color_by: tuple[str, ...]
    max_cells: int
    n_markers: int


@dataclass(frozen=True)
class Simulate:
    samples: int
    donors: int
    runs: int
    cells: int
    genes: int
    types: int
    mt_genes: int
    median_counts: float
    doublet_rate: float
    dying_rate: float
    failed_samples: int
    type_effect: float
    donor_effect: float
    run_effect: float
    dispersion: float


@dataclass(frozen=True)
class Config:
    seed: int
    cohort: Cohort
    qc: Qc
    genes: Genes
    store: Store
    models: dict[str, Model]
    gap: Gap
    likelihood: Likelihood
    atlas: Atlas
    differential: Differential
    expression: Expression
    report: Report
    simulate: Simulate


def cluster_column(resolution: float) -> str:
    """Return the name of the clusters at a resolution: leiden_0.5."""
    return f"leiden_{resolution:g}"


def check(config: dict[str, Any], schema: dict[str, Any]) -> Config:
    """Return the config as dataclasses.

    Errors: ValueError that lists every fault (where, what was found, what was expected, the nearest known key for
    an unknown one), so that one run shows them all.
    """
    faults = faults_of(config, schema)
    if faults:
        raise ValueError("the config has faults:\n" + "\n".join(f"  - {fault}" for fault in faults))
    return build(Config, config)
