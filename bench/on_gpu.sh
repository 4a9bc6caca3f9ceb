#!/usr/bin/env bash
# Everything that needs a GPU, unattended and in under nine minutes: tests of the kernels and of the
# captured steps, times of both, the engine end to end. Needs torch 2.11 or newer with CUDA, Triton 3.6 or newer, pytest.
#
#   bench/on_gpu.sh [FOLDER]      results into FOLDER (default bench/results/gpu); each part has a
#                                 time limit, and what a part wrote before it stays
#   PYTHON=... MODEL=... STREAMS="256 2048 16 1" SHAPE=default bench/on_gpu.sh
#
# steps.json has whole steps with and without CUDA graphs, for 1, 16, 256 and 2048 streams: random
# weights of the default SHAPE. MODEL is what the engine runs: random:tiny, or a model's folder.
set -uo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

out=${1:-bench/results/gpu}
python=${PYTHON:-python3}
model=${MODEL:-random:tiny}
shape=${SHAPE:-default}
read -r -a streams <<<"${STREAMS:-256 2048 16 1 8 32}"
export PYTHONPATH="$PWD:$PWD/kernels${PYTHONPATH:+:$PYTHONPATH}"

"$python" - <<'CHECK' || exit 2
import re, sys
def fail(what, hint):
    sys.exit(f"error: {what}\nhint: {hint}")
def version(module):
    return tuple(map(int, re.findall(r"\d+", module.__version__)[:2]))
try:
    import torch
except ImportError:
    fail("torch is not installed", "pip install torch from the index of its CUDA builds")
if not torch.cuda.is_available():
    fail("no CUDA device here", "python -m sparqle_kernels.report compiles the kernels without one")
try:
    import triton
except ImportError:
    fail("Triton is not installed", "pip install 'triton>=3.6'")
if version(torch) < (2, 11) or version(triton) < (3, 6):
    fail(f"torch {torch.__version__} and Triton {triton.__version__}", "2.11 and 3.6, or newer")
CHECK

mkdir -p "$out"
status=0
part() { # NAME LIMIT_S COMMAND...: its stdout into NAME.json, its stderr into NAME.log
  local name=$1 limit=$2
  shift 2
  echo "== $name" >&2
  timeout "$limit" "$@" >"$out/$name.json" 2>"$out/$name.log" || {
    echo "$name: exit $? (see $out/$name.log)" >&2
    status=1
  }
}

# pytest's lines are no JSON; its summary is what counts
timeout 130 "$python" -m pytest -q -m gpu tests/kernels tests/test_cuda_graphs.py \
  >"$out/tests.log" 2>&1 || status=1
tail -n 1 "$out/tests.log" >&2
part steps 120 "$python" -m bench.steps --force --model "$shape" --limit-s 80 --seconds 5
part kernels 180 "$python" -m bench.kernels --force --limit-s 140 --streams "${streams[@]}"
part latency 50 "$python" -m bench.latency --virtual --compute cuda --model "$model" --force
part throughput 50 "$python" -m bench.throughput --compute cuda --model "$model" --most 64 \
  --seconds 5 --force
tail -qn 1 "$out"/{steps,kernels,latency,throughput}.json
exit "$status"
