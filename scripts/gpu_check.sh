#!/usr/bin/env bash
# Everything that needs a CUDA device: build, tests, benchmarks, sanitizers. Writes a report into the folder given:
#
#     scripts/gpu_check.sh OUT [STEP...]
#
# OUT/report.md      a section a step with its exit status and the end of its output, added as the step ends
# OUT/<step>.log     the whole output of a step
# OUT/*.json *.md *.png   what the benchmark runner wrote, case by case
#
# Steps, all by default, in this order; each ends within its limit of seconds, so that a run can be split over several
# calls that add to one report (all but `build` need the build of an earlier call):
#     packages                                     what tests and benchmarks import; wheels from a folder `wheels`, if
#                                                  there is one, are installed first
#     build info smoke budget
#     tests_cuda tests_triton                      pytest, by backend
#     bench_cm3a bench_frequency_attention bench_wavelet bench_pancrafter bench_uknow
#     memcheck racecheck initcheck                 compute-sanitizer on scripts/gpu_smoke.py
# BENCHMARK_CASE in the environment: only benchmark cases whose name contains this text.
#
# Exits 0 only where every step did. Commit a good report under benchmarks/results/<gpu>/. Needs no network: it uses the
# python3 on PATH with its torch, and builds in place.
set -uo pipefail
all="packages build info smoke budget tests_cuda tests_triton bench_cm3a bench_frequency_attention bench_wavelet bench_pancrafter
bench_uknow memcheck racecheck initcheck"
if [ $# -lt 1 ]; then
  echo "usage: scripts/gpu_check.sh OUT [STEP...], steps:" $all >&2
  exit 2
fi
mkdir -p "$1" && out=$(cd "$1" && pwd) || exit 2
shift
for name in "$@"; do
  case " $(echo $all) " in
  *" $name "*) ;;
  *)
    echo "gpu_check: STEP: expected one of" $all", got $name" >&2
    exit 2
    ;;
  esac
done
cd "$(dirname "$0")/.." || exit 2
report=$out/report.md
failed=0

step() { # step NAME SECONDS COMMAND...
  local name=$1 limit=$2
  shift 2
  local begin=$SECONDS status
  timeout -k 10 "$limit" "$@" >"$out/$name.log" 2>&1
  status=$?
  [ "$status" -eq 0 ] || failed=1
  {
    echo "## $name: exit $status, $((SECONDS - begin)) s$([ "$status" -eq 124 ] && echo ", cut off at its limit")"
    echo
    echo '```'
    tail -n 25 "$out/$name.log"
    echo '```'
    echo
  } >>"$report"
  echo "$name: exit $status, $((SECONDS - begin)) s"
  return "$status"
}

tests() { # tests NAME EXPRESSION
  local workers=()
  # Most of the time goes into compiling: several processes share the device.
  python3 -c 'import xdist' 2>/dev/null && workers=(-n "$(($(nproc) < 8 ? $(nproc) : 8))")
  # A file that cannot be imported here fails the step and does not keep the others from running.
  step "$1" 500 python3 -m pytest -q -m gpu -k "$2" --continue-on-collection-errors "${workers[@]}" tests/ops tests/diffusion
}

benchmark() { # benchmark OPERATOR
  step "bench_$1" 540 python3 -m benchmarks.run --device cuda --only "$1" --case "${BENCHMARK_CASE:-}" --out "$out"
  [ ! -f "$out/$1.md" ] || { cat "$out/$1.md"; echo; } >>"$report"
}

sanitizer() { # sanitizer TOOL
  local program
  program=$(command -v compute-sanitizer || ls "${CUDA_HOME:-/usr/local/cuda}/bin/compute-sanitizer" 2>/dev/null)
  step "$1" 300 "${program:-compute-sanitizer}" --tool "$1" --error-exitcode 1 python3 scripts/gpu_smoke.py
}

capability=$(nvidia-smi --query-gpu=compute_cap --format=csv,noheader | head -n 1)
[ -f "$report" ] || {
  echo "# pansharp_fast on $(nvidia-smi --query-gpu=name --format=csv,noheader | head -n 1)"
  echo
  echo "Commit $(git rev-parse --short HEAD 2>/dev/null || echo unknown), $(date -u +%Y-%m-%d)."
  echo
} >"$report"
export PANSHARP_FAST_CUDA=1 TORCH_CUDA_ARCH_LIST=${TORCH_CUDA_ARCH_LIST:-${capability:-9.0}}
export MAX_JOBS=${MAX_JOBS:-$(nproc)} PYTHONUNBUFFERED=1

for name in ${*:-$all}; do
  case $name in
  packages)
    step packages 120 bash -ec '
      [ ! -d wheels ] || python3 -m pip install --no-index --no-deps wheels/*.whl
      python3 -c "import diffusers, h5py, hypothesis, pytest, pywt, safetensors, setuptools, torch, triton
assert int(setuptools.__version__.split(\".\")[0]) >= 77, f\"setuptools: expected 77 or later, got {setuptools.__version__}\""'
    ;;
  build) step build 500 python3 setup.py -q build_ext --inplace || { cat "$out/build.log"; exit 1; } ;;
  info) step info 60 python3 -m pansharp_fast.info ;;
  smoke) step smoke 120 python3 scripts/gpu_smoke.py ;;
  budget) step budget 60 python3 scripts/cuda_budget.py ;;
  tests_cuda) tests tests_cuda "not triton" ;;
  tests_triton) tests tests_triton triton ;;
  bench_*) benchmark "${name#bench_}" ;;
  *) sanitizer "$name" ;;
  esac
done
exit "$failed"
