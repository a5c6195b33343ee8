# What comes out of a model: neighbours, clusters, layout, markers, metrics, and the atlas that holds them all.


rule neighbors:
    input:
        latent="results/models/{model}/latent.json",
    output:
        manifest="results/models/{model}/neighbors.json",
        store=directory("results/models/{model}/neighbors.zarr"),
    log:
        "logs/neighbors/{model}.log",
    benchmark:
        "benchmarks/out/neighbors/{model}.tsv"
    conda:
        "../../envs/cpu.yaml"
    threads: 2
    resources:
        mem_mb=memory(4000),
        runtime=minutes(120),
    params:
        config=config["atlas"]["neighbors"],
        seed=config["seed"],
        code=code("neighbors"),
    script:
        "../../scripts/neighbors.py"


rule cluster:
    input:
        neighbors="results/models/{model}/neighbors.json",
    output:
        clusters="results/models/{model}/clusters.parquet",
    log:
        "logs/cluster/{model}.log",
    benchmark:
        "benchmarks/out/cluster/{model}.tsv"
    conda:
        "../../envs/cpu.yaml"
    threads: 1
    resources:
        mem_mb=memory(4000),
        runtime=minutes(240),
    params:
        config=config["atlas"]["clusters"]["resolutions"],
        seed=config["seed"],
        code=code("cluster"),
    script:
        "../../scripts/cluster.py"


rule layout:
    input:
        latent="results/models/{model}/latent.json",
        neighbors="results/models/{model}/neighbors.json",
    output:
        layout="results/models/{model}/layout.parquet",
    log:
        "logs/layout/{model}.log",
    benchmark:
        "benchmarks/out/layout/{model}.tsv"
    conda:
        "../../envs/cpu.yaml"
    threads: 1
    resources:
        mem_mb=memory(4000),
        runtime=minutes(240),
    params:
        config=config["atlas"]["layout"],
        seed=config["seed"],
        code=code("layout"),
    script:
        "../../scripts/layout.py"


rule markers:
    input:
        counts=of_samples("results/store/counts/{sample}.json"),
        clusters="results/models/{model}/clusters.parquet",
        genes="results/cohort/genes.parquet",
    output:
        markers="results/models/{model}/markers.parquet",
    log:
        "logs/markers/{model}.log",
    benchmark:
        "benchmarks/out/markers/{model}.tsv"
    conda:
        "../../envs/cpu.yaml"
    threads: 1
    resources:
        mem_mb=memory(2000),
        runtime=minutes(120),
    params:
        shown=config["atlas"]["clusters"]["shown"],
        chunk_cells=config["cohort"]["chunk_cells"],
        code=code("markers"),
    script:
        "../../scripts/markers.py"


rule metrics:
    input:
        latent="results/models/{model}/latent.json",
        neighbors="results/models/{model}/neighbors.json",
        clusters="results/models/{model}/clusters.parquet",
        cells="results/models/{model}/cells.parquet",
        model="results/models/{model}/model.safetensors",
        facts="results/models/{model}/model.json",
        genes="results/cohort/genes.parquet",
        qc=truth_input("results/cohort/qc/{sample}.parquet"),
        truth=truth_input(f"{CONFIG.atlas.metrics.truth}/{{sample}}.parquet"),
        effects=truth_input(f"{CONFIG.atlas.metrics.truth}/{{sample}}.genes.parquet"),
    output:
        metrics="results/models/{model}/metrics.json",
    log:
        "logs/metrics/{model}.log",
    benchmark:
        "benchmarks/out/metrics/{model}.tsv"
    conda:
        "../../envs/cpu.yaml"
    threads: 1
    resources:
        mem_mb=memory(4000),
        runtime=minutes(120),
    params:
        labels=config["atlas"]["metrics"]["labels"],
        shown=config["atlas"]["clusters"]["shown"],
        seed=config["seed"],
        code=code("metrics"),
    script:
        "../../scripts/metrics.py"


rule cells:
    input:
        counts=of_samples("results/store/counts/{sample}.json"),
        latent="results/models/{model}/latent.json",
        clusters="results/models/{model}/clusters.parquet",
        layout="results/models/{model}/layout.parquet",
    output:
        cells="results/models/{model}/cells.parquet",
    log:
        "logs/cells/{model}.log",
    benchmark:
        "benchmarks/out/cells/{model}.tsv"
    conda:
        "../../envs/cpu.yaml"
    threads: 1
    resources:
        mem_mb=memory(2000),
        runtime=minutes(60),
    params:
        sheet={name: sample.columns for name, sample in SAMPLES.items()},
        code=code("cells"),
    script:
        "../../scripts/cells.py"


rule differential:
    input:
        model="results/models/{model}/model.safetensors",
        facts="results/models/{model}/model.json",
        counts=of_samples("results/store/counts/{sample}.json"),
        cells="results/models/{model}/cells.parquet",
    output:
        changes="results/models/{model}/differential.parquet",
    log:
        "logs/differential/{model}.log",
    benchmark:
        "benchmarks/out/differential/{model}.tsv"
    conda:
        "../../envs/gpu.yaml"
    threads: 2
    resources:
        mem_mb=memory(4000),
        runtime=minutes(240),
        gpu=1,
    params:
        config=config["differential"],
        chunk_cells=config["cohort"]["chunk_cells"],
        covariates=lambda wildcards: sections.sheet_covariates(CONFIG.models[wildcards.model], sheet),
        seed=config["seed"],
        code=code("differential"),
    script:
        "../../scripts/differential.py"


rule expression:
    input:
        model="results/models/{model}/model.safetensors",
        facts="results/models/{model}/model.json",
        counts=of_samples("results/store/counts/{sample}.json"),
        cells="results/models/{model}/cells.parquet" if CONFIG.expression.groups else [],
    output:
        manifest="results/models/{model}/expression.json",
        store=directory("results/models/{model}/expression.zarr"),
        groups="results/models/{model}/expression.parquet",
    log:
        "logs/expression/{model}.log",
    benchmark:
        "benchmarks/out/expression/{model}.tsv"
    conda:
        "../../envs/gpu.yaml"
    threads: 2
    resources:
        mem_mb=memory(3000),
        runtime=minutes(24 * 60),
        gpu=1,
    params:
        config=config["expression"],
        chunk_cells=config["cohort"]["chunk_cells"],
        covariates=lambda wildcards: sections.sheet_covariates(CONFIG.models[wildcards.model], sheet),
        seed=config["seed"],
        code=code("expression"),
    script:
        "../../scripts/expression.py"


rule atlas:
    input:
        counts=of_samples("results/store/counts/{sample}.json"),
        genes="results/cohort/genes.parquet",
        latent="results/models/{model}/latent.json",
        neighbors="results/models/{model}/neighbors.json",
        cells="results/models/{model}/cells.parquet",
        markers="results/models/{model}/markers.parquet",
        metrics="results/models/{model}/metrics.json",
        facts="results/models/{model}/model.json",
    output:
        manifest="results/models/{model}/atlas.json",
        store=directory("results/models/{model}/atlas.zarr"),
    log:
        "logs/atlas/{model}.log",
    benchmark:
        "benchmarks/out/atlas/{model}.tsv"
    conda:
        "../../envs/cpu.yaml"
    threads: 1
    resources:
        mem_mb=memory(4000),
        runtime=minutes(120),
    params:
        config=lambda wildcards: sections.config_of_atlas(config, wildcards.model),
        chunk_cells=config["cohort"]["chunk_cells"],
        code=code("atlas"),
    script:
        "../../scripts/atlas.py"
