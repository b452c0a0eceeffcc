#!/usr/bin/env bash
# Everything that needs a CUDA device, in one run: build, tests, sanitizers, benchmarks. Writes a report into the folder
# given as argument:
#
#     scripts/gpu_check.sh OUT
#
# OUT/report.md      one section a step with its exit status and the end of its output, and the benchmark tables
# OUT/<step>.log     the whole output of a step
# OUT/*.json *.png   what the benchmark runner wrote
#
# Exits 0 only where every step did. Commit a good report under benchmarks/results/<gpu>/. Needs no network: it uses the
# python on PATH with its torch, and builds in place.
set -uo pipefail
if [ $# -ne 1 ]; then
  echo "usage: scripts/gpu_check.sh OUT" >&2
  exit 2
fi
mkdir -p "$1"
out=$(cd "$1" && pwd)
cd "$(dirname "$0")/.."
report=$out/report.md
failed=0

step() { # step NAME COMMAND...
  local name=$1
  shift
  local begin=$SECONDS status
  "$@" >"$out/$name.log" 2>&1
  status=$?
  [ "$status" -eq 0 ] || failed=1
  {
    echo "## $name: exit $status, $((SECONDS - begin)) s"
    echo
    echo '```'
    tail -n 25 "$out/$name.log"
    echo '```'
    echo
  } >>"$report"
  echo "$name: exit $status"
  return "$status"
}

{
  echo "# pansharp_fast on $(nvidia-smi --query-gpu=name --format=csv,noheader | head -n 1)"
  echo
  echo "Commit $(git rev-parse --short HEAD 2>/dev/null || echo unknown), $(date -u +%Y-%m-%d)."
  echo
} >"$report"

export PANSHARP_FAST_CUDA=1 TORCH_CUDA_ARCH_LIST=${TORCH_CUDA_ARCH_LIST:-9.0} MAX_JOBS=${MAX_JOBS:-$(nproc)}
step build python3 setup.py -q build_ext --inplace || { cat "$out/build.log"; exit 1; }
step info python3 -m pansharp_fast.info
step budget python3 scripts/cuda_budget.py
step tests python3 -m pytest -q -m gpu tests
sanitizer=$(command -v compute-sanitizer || ls /usr/local/cuda/bin/compute-sanitizer 2>/dev/null)
if [ -n "$sanitizer" ]; then
  for tool in memcheck racecheck initcheck; do
    step "sanitizer_$tool" timeout 300 "$sanitizer" --tool "$tool" --error-exitcode 1 python3 scripts/gpu_smoke.py
  done
else
  echo "compute-sanitizer: not found" | tee -a "$report"
  failed=1
fi
step benchmarks timeout 500 python3 -m benchmarks.run --device cuda --out "$out"
for table in "$out"/*.md; do
  [ "$table" = "$report" ] || { echo; cat "$table"; } >>"$report"
done
exit "$failed"
