#!/usr/bin/env bash
# The tests that need a GPU, then benchmarks/gpu.py, on a machine that has a python3 with torch and Triton but no package
# index: what else is needed lies as wheels in .whl/, put there before by tests/gpu/wheels.sh. In the root of a checkout:
#   [PARTS="setup tests kernels steps elbo"] [OUT=folder] tests/gpu/run.sh      about nine minutes on one GPU
set -u
cd "$(dirname "$0")/../.."
OUT=${OUT:-$(mktemp -d)}
PARTS=${PARTS:-setup tests kernels steps elbo}
site=${TMPDIR:-/tmp}/cohortvi-site
export PYTHONPATH=$site:$PWD/workflow PYTHONUNBUFFERED=1 TRITON_CACHE_DIR=$site-triton NUMBA_CACHE_DIR=$site-numba
began=$SECONDS
say() { echo "[$((SECONDS - began)) s] $*"; }
has() { case " $PARTS " in *" $1 "*) true ;; *) false ;; esac }

if has setup; then
  python3 -m pip install -q --no-index --no-deps --no-compile --no-cache-dir --upgrade --target "$site" .whl/*.whl
  version=$(sed -n 's/^version = "\(.*\)"/\1/p' pyproject.toml) # which is asked of the package's metadata
  mkdir -p "$site/cohortvi-$version.dist-info"
  printf 'Metadata-Version: 2.1\nName: cohortvi\nVersion: %s\n' "$version" >"$site/cohortvi-$version.dist-info/METADATA"
  python3 -c "import numba" || # it is particular about its numpy
    python3 -m pip install -q --no-index --no-deps --no-compile --upgrade --target "$site" .whl/numpy/*.whl
  python3 -c "import torch; print(torch.__version__, torch.cuda.get_device_name())"
  say "set up"
fi

# Warnings of other versions of libraries than the lock's are not what is tested here.
pytest="python3 -m pytest -q -p no:cacheprovider -o filterwarnings=default --timeout 120 --maxfail 12 --tb short"
if has tests; then
  timeout 130 $pytest -n 6 tests/test_gpu.py --durations 5 >"$OUT/tests.txt" 2>&1
  say "test_gpu: $?"
  tail -n 15 "$OUT/tests.txt"
  timeout 140 $pytest -n 4 tests/test_graph.py "tests/test_train.py::test_a_gpu_trains_the_same_model_up_to_rounding" \
    -k "gpu or replayed" --durations 5 >"$OUT/graph.txt" 2>&1
  say "test_graph: $?"
  tail -n 15 "$OUT/graph.txt"
fi

measure() { # seconds that it may take, and its options
  timeout "$1" python3 -W ignore benchmarks/gpu.py --cells 60000 --threads 8 "${@:2}" >>"$OUT/bench.jsonl" 2>>"$OUT/bench.err"
  say "${*:2}: $?"
}
has kernels && measure 50 --parts kernels
has steps && measure 130 --parts steps --rounds 2 --batch-sizes 1024 8192 128
has elbo && measure 110 --parts elbo --epochs 8
tail -n 5 "$OUT/bench.err" 2>/dev/null
cut -c1-240 "$OUT/bench.jsonl" 2>/dev/null | tail -n 70
say "all of it is in $OUT"
