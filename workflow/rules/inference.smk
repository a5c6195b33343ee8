# The mathematics: amortized variational inference over the shuffled shards.
SHARDS_OF = {
    split: [f"results/store/shards/{name}.json" for name in SHARDS if name.startswith(split)] for split in SPLITS
}


rule train:
    input:
        train=SHARDS_OF["train"],
        validation=SHARDS_OF["validation"],
        reference=lambda wildcards: reference_files(CONFIG.models[wildcards.model]),
    output:
        model="results/models/{model}/model.safetensors",
        facts="results/models/{model}/model.json",
        history="results/models/{model}/history.parquet",
    log:
        "logs/train/{model}.log",
    benchmark:
        "benchmarks/out/train/{model}.tsv"
    conda:
        "../../envs/gpu.yaml"
    threads: 2
    resources:
        mem_mb=memory(4000),
        runtime=minutes(24 * 60),
        gpu=1,
    params:
        config=lambda wildcards: config["models"][wildcards.model],
        covariates=lambda wildcards: sections.sheet_covariates(CONFIG.models[wildcards.model], sheet),
        seed=config["seed"],
        # Undeclared on purpose: Snakemake removes declared outputs of a job that failed, and checkpoints must outlive it.
        checkpoints=lambda wildcards: f"results/checkpoints/{wildcards.model}",
        events=lambda wildcards: f"results/tensorboard/{wildcards.model}",
        code=code("train"),
    script:
        "../../scripts/train.py"


rule gap:
    input:
        model="results/models/{model}/model.safetensors",
        facts="results/models/{model}/model.json",
        train=SHARDS_OF["train"],
        validation=SHARDS_OF["validation"],
        counts=of_samples("results/store/counts/{sample}.json"),
    output:
        cells="results/models/{model}/gap.parquet",
        facts="results/models/{model}/gap.json",
    log:
        "logs/gap/{model}.log",
    benchmark:
        "benchmarks/out/gap/{model}.tsv"
    conda:
        "../../envs/gpu.yaml"
    threads: 2
    resources:
        mem_mb=memory(3000),
        runtime=minutes(4 * 60),
        gpu=1,
    params:
        config=config["gap"],
        covariates=lambda wildcards: sections.sheet_covariates(CONFIG.models[wildcards.model], sheet),
        seed=config["seed"],
        code=code("gap"),
    script:
        "../../scripts/gap.py"


rule embed:
    input:
        model="results/models/{model}/model.safetensors",
        facts="results/models/{model}/model.json",
        counts=of_samples("results/store/counts/{sample}.json"),
    output:
        manifest="results/models/{model}/latent.json",
        store=directory("results/models/{model}/latent.zarr"),
    log:
        "logs/embed/{model}.log",
    benchmark:
        "benchmarks/out/embed/{model}.tsv"
    conda:
        "../../envs/gpu.yaml"
    threads: 2
    resources:
        mem_mb=memory(3000),
        runtime=minutes(4 * 60),
        gpu=1,
    params:
        config=config["atlas"]["embed"],
        seed=config["seed"],
        chunk_cells=config["cohort"]["chunk_cells"],
        covariates=lambda wildcards: sections.sheet_covariates(CONFIG.models[wildcards.model], sheet),
        code=code("embed"),
    script:
        "../../scripts/embed.py"


rule likelihood:
    input:
        model="results/models/{model}/model.safetensors",
        facts="results/models/{model}/model.json",
        counts=of_samples("results/store/counts/{sample}.json"),
    output:
        cells="results/models/{model}/likelihood.parquet",
        facts="results/models/{model}/likelihood.json",
    log:
        "logs/likelihood/{model}.log",
    benchmark:
        "benchmarks/out/likelihood/{model}.tsv"
    conda:
        "../../envs/gpu.yaml"
    threads: 2
    resources:
        mem_mb=memory(3000),
        runtime=minutes(24 * 60),
        gpu=1,
    params:
        config=config["likelihood"],
        chunk_cells=config["cohort"]["chunk_cells"],
        covariates=lambda wildcards: sections.sheet_covariates(CONFIG.models[wildcards.model], sheet),
        seed=config["seed"],
        code=code("likelihood"),
    script:
        "../../scripts/likelihood.py"
