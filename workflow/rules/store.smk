# How the counts lie on disk: all genes of the kept cells by sample, and the selected genes shuffled over the cohort.


rule extract:
    input:
        raw=raw_store,
        cells="results/cohort/qc/{sample}.parquet",
    output:
        manifest="results/store/counts/{sample}.json",
        store=directory("results/store/counts/{sample}.zarr"),
    log:
        "logs/extract/{sample}.log",
    benchmark:
        "benchmarks/out/extract/{sample}.tsv"
    conda:
        "../../envs/cpu.yaml"
    threads: 1
    resources:
        mem_mb=memory(1200),
        runtime=minutes(20, 60),
    params:
        source=source,
        cohort={key: config["cohort"][key] for key in ("gene_key", "chunk_cells")},
        symbols=config["qc"]["symbols"],
        columns=lambda wildcards: sections.store_columns(SAMPLES[wildcards.sample], CONFIG.store.validation.by),
        code=code("extract"),
    script:
        "../../scripts/extract.py"


rule shard:
    input:
        counts=lambda wildcards: expand(
            "results/store/counts/{sample}.json",
            sample=up_to(GENERATIONS, wildcards.split, wildcards.shard)[-1].samples,
        ),
        # With a frozen list new samples don't change the genes, and what was shuffled before stays as it is.
        genes=ancient("results/cohort/genes.parquet") if CONFIG.genes.frozen else "results/cohort/genes.parquet",
        earlier=lambda wildcards: [
            f"results/store/shards/{earlier.shards['validation'][0]}.json"
            for earlier in up_to(GENERATIONS, wildcards.split, wildcards.shard)[:-1]
        ],
    output:
        manifest="results/store/shards/{split}-{shard}.json",
        store=directory("results/store/shards/{split}-{shard}.zarr"),
    log:
        "logs/shard/{split}-{shard}.log",
    benchmark:
        "benchmarks/out/shard/{split}-{shard}.tsv"
    conda:
        "../../envs/cpu.yaml"
    threads: 1
    resources:
        mem_mb=memory(1500),
        runtime=minutes(30),
    params:
        config=lambda wildcards: sections.store_of(
            config["store"], up_to(GENERATIONS, wildcards.split, wildcards.shard)[-1].shards
        ),
        number=lambda wildcards: up_to(GENERATIONS, wildcards.split, wildcards.shard)[-1]
        .shards[wildcards.split]
        .index(f"{wildcards.split}-{wildcards.shard}"),
        frozen=FROZEN,
        seed=config["seed"],
        code=code("shard"),
    script:
        "../../scripts/shard.py"
