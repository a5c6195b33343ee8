"""Rule report: all small tables and the models' figures -> one self-contained page."""

from pathlib import Path

from cohortvi import log
from cohortvi.report.inputs import ReportInputs
from cohortvi.report.page import write_report

log.start(snakemake.log[0])
params, page = snakemake.params, Path(snakemake.output.page)
inputs = ReportInputs.within(page.parent.parent, params.sheet, params.config["models"], Path(params.benchmarks))
write_report(inputs, params.config, page)
log.logger.info("%s: %.1f MB", page, page.stat().st_size / 1e6)
