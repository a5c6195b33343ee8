#!/usr/bin/env bash
# Put what tests/gpu/run.sh needs into .whl/, some 50 MB, on a machine with a package index: versions of the lock, for
# Python 3.12 on Linux, beside torch, Triton, numpy, numba and pytest that the other machine has.
set -euo pipefail
cd "$(dirname "$0")/../.."
names="zarr donfig google-crc32c numcodecs anndata array-api-compat legacy-api-wrap natsort scverse-misc session-info2
  pandas pytz tzdata arviz-stats jsonschema jsonschema-specifications referencing rpds-py scanpy pynndescent umap-learn"
peers="scvi-tools==1.4.2 ml-collections==1.1.0 mudata==0.3.10 pyro-ppl==1.9.2 pyro-api==0.1.2 sparse==0.19.3"
platforms=$(printf -- '--platform manylinux%s_x86_64 ' _2_28 _2_27 _2_24 _2_17 2014 1)
get() { python3 -m pip download -q --no-deps --only-binary=:all: --python-version 3.12 --implementation cp $platforms -d "$@"; }
mkdir -p .whl/numpy
for name in $names; do get .whl "$(grep -E "^$name==" requirements.lock)"; done
get .whl $peers
python3 -m pip wheel -q --no-deps -w .whl docrep # has no wheel of its own
get .whl/numpy "$(grep -E '^numpy==' requirements.lock)"
du -sh .whl
