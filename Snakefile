# cohortvi: from a cohort of raw counts to an atlas. The rules stand in the order of the walk of one count.
from snakemake.utils import min_version

min_version("9.19")


configfile: "config/config.yaml"


include: "workflow/common.smk"
include: "workflow/rules/cohort.smk"
include: "workflow/rules/store.smk"
include: "workflow/rules/inference.smk"
include: "workflow/rules/atlas.smk"
include: "workflow/rules/report.smk"


rule all:
    default_target: True
    input:
        report="results/report/index.html",
        ledger="results/cohort/ledger.tsv",
        atlas=expand("results/models/{model}/atlas.json", model=MODELS),
        changes=expand(
            "results/models/{model}/differential.parquet", model=MODELS if CONFIG.differential.comparisons else []
        ),
        expression=expand("results/models/{model}/expression.json", model=MODELS if CONFIG.expression.genes else []),
    localrule: True
