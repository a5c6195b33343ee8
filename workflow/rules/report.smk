# What people look at: one page that holds everything, to be sent by mail and opened anywhere.


rule report:
    input:
        qc=of_samples("results/cohort/qc/{sample}.json"),
        cells=of_samples("results/cohort/qc/{sample}.parquet"),
        genes="results/cohort/genes.parquet",
        fits=expand(
            "results/cohort/genes/fits/{batch}.parquet",
            batch=sorted(MEMBERS),
        ),
        ledger="results/cohort/ledger.tsv",
        models=expand(
            "results/models/{model}/{file}",
            model=MODELS,
            file=[
                "history.parquet",
                "model.json",
                "gap.json",
                "gap.parquet",
                "clusters.parquet",
                "layout.parquet",
                "cells.parquet",
                "markers.parquet",
                "metrics.json",
                *(["differential.parquet"] if CONFIG.differential.comparisons else []),
                *(["likelihood.json"] if CONFIG.likelihood.draws else []),
            ],
        ),
    output:
        page=report(
            "results/report/index.html",
            caption="../report/page.rst",
            category="Report",
        ),
    log:
        "logs/report.log",
    benchmark:
        "benchmarks/out/report.tsv"
    conda:
        "../../envs/cpu.yaml"
    threads: 1
    resources:
        mem_mb=memory(3000),
        runtime=minutes(60),
    params:
        config=config,
        sheet={name: {**sample.columns, "batch": sample.batch} for name, sample in SAMPLES.items()},
        benchmarks="benchmarks/out",
        template=text_digest("report/template.html", "report/style.css"),
        code=code("report"),
    script:
        "../../scripts/report.py"
