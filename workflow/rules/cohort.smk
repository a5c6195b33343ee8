# What comes in: raw counts, quality control, gene selection, and the account of every cell.
from cohortvi.cohort.selection import read_list

FROZEN = digest(read_list(CONFIG.genes.frozen)) if CONFIG.genes.frozen else None


rule simulate:
    output:
        store=directory("resources/demo/{sample}.zarr"),
        truth="resources/demo/truth/{sample}.parquet",
        genes="resources/demo/truth/{sample}.genes.parquet",
    log:
        "logs/simulate/{sample}.log",
    benchmark:
        "benchmarks/out/simulate/{sample}.tsv"
    conda:
        "../../envs/cpu.yaml"
    threads: 1
    resources:
        mem_mb=memory(1500),
        runtime=minutes(20),
    params:
        config=config["simulate"],
        seed=config["seed"],
        code=code("simulate"),
    script:
        "../../scripts/simulate.py"


rule fetch_kang:
    output:
        ctrl="resources/kang/pbmc_ctrl.h5ad",
        stim="resources/kang/pbmc_stim.h5ad",
    log:
        "logs/fetch_kang.log",
    benchmark:
        "benchmarks/out/fetch_kang.tsv"
    conda:
        "../../envs/cpu.yaml"
    threads: 1
    resources:
        mem_mb=memory(1000),
        runtime=minutes(20),
    params:
        code=code("fetch_kang"),
    script:
        "../../scripts/fetch_kang.py"


rule qc:
    input:
        raw=raw_store,
    output:
        cells="results/cohort/qc/{sample}.parquet",
        facts="results/cohort/qc/{sample}.json",
    log:
        "logs/qc/{sample}.log",
    benchmark:
        "benchmarks/out/qc/{sample}.tsv"
    conda:
        "../../envs/cpu.yaml"
    threads: 1
    resources:
        mem_mb=memory(1800, 4),
        runtime=minutes(20, 60),
    params:
        source=source,
        cohort={key: config["cohort"][key] for key in ("gene_key", "keep_obs", "chunk_cells")},
        config=lambda wildcards: sections.qc_of(config["qc"], wildcards.sample),
        seed=config["seed"],
        code=code("qc"),
    script:
        "../../scripts/qc.py"


rule gene_moments:
    input:
        counts="results/store/counts/{sample}.json",
    output:
        moments="results/cohort/genes/moments/{sample}.parquet",
    log:
        "logs/gene_moments/{sample}.log",
    benchmark:
        "benchmarks/out/gene_moments/{sample}.tsv"
    conda:
        "../../envs/cpu.yaml"
    threads: 1
    resources:
        mem_mb=memory(1200),
        runtime=minutes(20),
    params:
        chunk_cells=config["cohort"]["chunk_cells"],
        code=code("gene_moments"),
    script:
        "../../scripts/gene_moments.py"


rule gene_fit:
    input:
        moments=in_batch("results/cohort/genes/moments/{sample}.parquet"),
    output:
        fit="results/cohort/genes/fits/{batch}.parquet",
    log:
        "logs/gene_fit/{batch}.log",
    benchmark:
        "benchmarks/out/gene_fit/{batch}.tsv"
    conda:
        "../../envs/cpu.yaml"
    threads: 1
    resources:
        mem_mb=memory(1200, 2),
        runtime=minutes(20),
    params:
        config=config["genes"],
        code=code("gene_fit"),
    script:
        "../../scripts/gene_fit.py"


rule gene_variance:
    input:
        counts="results/store/counts/{sample}.json",
        fit=lambda wildcards: f"results/cohort/genes/fits/{BATCHES[wildcards.sample]}.parquet",
    output:
        variances="results/cohort/genes/variances/{sample}.parquet",
    log:
        "logs/gene_variance/{sample}.log",
    benchmark:
        "benchmarks/out/gene_variance/{sample}.tsv"
    conda:
        "../../envs/cpu.yaml"
    threads: 1
    resources:
        mem_mb=memory(1200),
        runtime=minutes(20),
    params:
        chunk_cells=config["cohort"]["chunk_cells"],
        config={key: config["genes"][key] for key in ("flavor", "theta")},
        code=code("gene_variance"),
    script:
        "../../scripts/gene_variance.py"


rule select_genes:
    input:
        moments=of_samples("results/cohort/genes/moments/{sample}.parquet"),
        variances=of_samples("results/cohort/genes/variances/{sample}.parquet"),
        fits=expand(
            "results/cohort/genes/fits/{batch}.parquet",
            batch=sorted(MEMBERS),
        ),
    output:
        genes="results/cohort/genes.parquet",
    log:
        "logs/select_genes.log",
    benchmark:
        "benchmarks/out/select_genes.tsv"
    conda:
        "../../envs/cpu.yaml"
    threads: 1
    resources:
        mem_mb=memory(1200, 3),
        runtime=minutes(20),
    params:
        config=config["genes"],
        join=config["cohort"]["join"],
        # The list, not its file as an input: a model.json may change otherwise.
        frozen=FROZEN,
        batches=BATCHES,
        code=code("select_genes"),
    script:
        "../../scripts/select_genes.py"


rule ledger:
    input:
        qc=of_samples("results/cohort/qc/{sample}.json"),
        counts=of_samples("results/store/counts/{sample}.json"),
        shards=expand("results/store/shards/{shard}.json", shard=SHARDS),
        latents=expand("results/models/{model}/latent.json", model=MODELS),
        atlases=expand("results/models/{model}/atlas.json", model=MODELS),
    output:
        ledger="results/cohort/ledger.tsv",
    log:
        "logs/ledger.log",
    benchmark:
        "benchmarks/out/ledger.tsv"
    conda:
        "../../envs/cpu.yaml"
    threads: 1
    resources:
        mem_mb=memory(800),
        runtime=minutes(10),
    params:
        models=MODELS,
        code=code("ledger"),
    script:
        "../../scripts/ledger.py"
