#!/usr/bin/env bash
# Everything that needs a CUDA device, the most valuable facts first. Needs no network: the python3 on PATH with its torch
# and what scripts/gpu_luggage.sh packed; without that, what is missing is built in place.
#
#     scripts/gpu_check.sh [--rehearse] [--seconds N] OUT [STEP[:SECONDS]...]
#
# OUT/report.md        a section a step, added as it ends: exit status, failures, the end of its output
# OUT/results.tar.gz   every log, the numbers as JSON, tables of the benchmarks; renewed every few seconds
# and whatever `train` leaves there.
#
# Every call first unpacks gpu_luggage/ and loads the libraries; where they do not load, it builds them. Steps, by default
# all but bench_* and train, in this order; no step stops another, each has a limit of seconds (STEP:SECONDS sets another):
#     info                                versions, backends
#     values speed network samples selfcheck             scripts/gpu_facts.py
#     tests_cm3a tests_wavelet tests_frequency_attention tests_conformance tests_triton tests_rest
#                                         pytest; skipping everything is a failure
#     memcheck racecheck initcheck        compute-sanitizer on the smallest values
#     bench_cm3a bench_wavelet bench_frequency_attention bench_pancrafter bench_uknow
#                                         BENCHMARK_CASE: only cases whose name contains this text
#     train                               scripts/gpu_train.sh OUT SECONDS
# --seconds: what starts later than that does not run, and no step outlasts it.
# --rehearse: the CPU in place of the device, tiny sizes, no sanitizers around the programs (REHEARSE=1 for `train`).
#
# Exits 0 only where every step did. Commit a good report under benchmarks/results/<gpu>/.
set -uo pipefail
default="info values speed network samples selfcheck tests_cm3a tests_wavelet tests_frequency_attention
tests_conformance tests_triton tests_rest memcheck racecheck initcheck"
all="$default bench_cm3a bench_wavelet bench_frequency_attention bench_pancrafter bench_uknow train"
rehearse='' total=100000
while [ $# -gt 0 ]; do
  case $1 in
  --rehearse) rehearse=1 && shift ;;
  --seconds) total=$2 && shift 2 ;;
  *) break ;;
  esac
done
if [ $# -lt 1 ]; then
  echo "usage: scripts/gpu_check.sh [--rehearse] [--seconds N] OUT [STEP[:SECONDS]...], steps:" $all >&2
  exit 2
fi
mkdir -p "$1" && out=$(cd "$1" && pwd) || exit 2
shift
for name in "$@"; do
  case " $(echo $all) " in
  *" ${name%%:*} "*) ;;
  *)
    echo "gpu_check: STEP: expected one of" $all", got $name" >&2
    exit 2
    ;;
  esac
done
cd "$(dirname "$0")/.." || exit 2

report=$out/report.md failed=0 summary='' stop=$((SECONDS + total))
work=$(mktemp -d)
results=$work/results
mkdir -p "$results/logs"
export PYTHONPATH=$work/packed/site:$PWD PYTHONUNBUFFERED=1 PYTHONDONTWRITEBYTECODE=1 MAX_JOBS=${MAX_JOBS:-$(nproc)}
export TRITON_CACHE_DIR=${TRITON_CACHE_DIR:-/tmp/triton} HYPOTHESIS_STORAGE_DIRECTORY=$work/hypothesis
device=cuda tiny=()
if [ "$rehearse" ]; then
  export REHEARSE=1
  device=cpu tiny=(--tiny)
fi

save() { # logs and numbers into OUT, whole or not at all
  tar -czf "$out/.$1.tar.gz" -C "$results" . 2>/dev/null
  mv "$out/.$1.tar.gz" "$out/results.tar.gz"
}
(while sleep 10; do save saver; done) >/dev/null 2>&1 &
saver=$!
trap 'kill "$saver" 2>/dev/null; rm -rf "$work"' EXIT

step() { # step NAME SECONDS COMMAND...: LINES in the environment, how much of the end of the output is shown
  local name=$1 limit=$2 begin=$SECONDS status log=$results/logs/$1.log note=''
  shift 2
  [ "$((stop - SECONDS))" -ge "$limit" ] || limit=$((stop - SECONDS))
  if [ "$limit" -ge 3 ]; then
    timeout -k 5 "$limit" "$@" >"$log" 2>&1 </dev/null
    status=$?
    case $status in 124 | 137) note=", cut off at its limit of $limit s" ;; esac
  else
    status=1 note=', not run: no time left'
    : >"$log"
  fi
  [ "$status" -eq 0 ] || failed=1
  summary+="$name: exit $status, $((SECONDS - begin)) s$note"$'\n'
  {
    echo "## $name: exit $status, $((SECONDS - begin)) s$note"
    echo
    echo '```'
    grep -E "^FAIL|^FAILED|^ERROR|ERROR SUMMARY|^E  " "$log" | sort | uniq | head -n 20 | cut -c1-300
    echo ...
    tail -n "${lines:-4}" "$log" | cut -c1-400
    echo '```'
    echo
  } | tee -a "$report"
  save step
  return "$status"
}

facts() { # facts NAME SECONDS OPTION...
  local name=$1 limit=$2 given=$(($2 < stop - SECONDS ? $2 : stop - SECONDS))
  shift 2
  step "$name" "$limit" python3 scripts/gpu_facts.py "$name" --device "$device" --out "$results" \
    --seconds "$((given - 6))" "${tiny[@]}" "$@"
}

tests() { # tests NAME SECONDS EXPRESSION FILE...
  local name=$1 limit=$2 expression=$3 options=()
  shift 3
  # Most of the time goes into compiling and starting: several processes share the device.
  [ "$rehearse" ] || ! python3 -c 'import xdist' 2>/dev/null || options+=(-n "$(($(nproc) < 8 ? $(nproc) : 8))")
  # A call that hangs is not to be interrupted from Python: the process ends and xdist starts another one.
  ! python3 -c 'import pytest_timeout' 2>/dev/null || options+=(--timeout 60 --timeout-method thread)
  # A file that cannot be imported here fails the step and does not keep the others from running.
  lines=12 step "$name" "$limit" python3 -m pytest -q -p tests.support.gpu_run -p no:cacheprovider "${options[@]}" \
    --continue-on-collection-errors -m "${rehearse:+not slow and not }gpu" -k "$expression" "$@"
}

gpu_files() { # files with tests for a GPU, but for those that have a step of their own
  grep -rlE 'mark\.gpu|support\.backends|support import backends' tests --include='test_*.py' |
    grep -vE 'ops/test_(cm3a|wavelet|frequency_attention|conformance)\.py' | sort
}

sanitizer() { # sanitizer TOOL SECONDS
  local watched=()
  [ "$rehearse" ] || watched=("$(command -v compute-sanitizer || echo /usr/local/cuda/bin/compute-sanitizer)" --tool "$1"
    --error-exitcode 9 --print-limit 20)
  # Without torch's cache every tensor is an allocation of its own, whose ends the tool sees.
  lines=8 step "$1" "$2" env PYTORCH_NO_CUDA_MEMORY_CACHING=1 "${watched[@]}" \
    python3 scripts/gpu_facts.py values --device "$device" --tiny --alone
}

benchmark() { # benchmark OPERATOR SECONDS
  lines=30 step "bench_$1" "$2" bash -c 'python3 -m benchmarks.run --device "$1" --only "$2" --case "$3" --out "$4" &&
    cat "$4/$2.md"' - "$device" "$1" "${BENCHMARK_CASE:-}" "$results"
}

loads='from pansharp_fast._extension import load_error as e
import sys; found = [name for name in sys.argv[1:] if e(name)]; print(*map(e, sys.argv[1:])); sys.exit(bool(found))'
libraries=(_C)
[ "$rehearse" ] || libraries+=(_C_cuda)
prepare() {
  local packed
  packed=gpu_luggage/packed-$(python3 -c 'import sys; print(f"{sys.version_info[0]}.{sys.version_info[1]}")').tar.xz
  if [ -f "$packed" ]; then
    step unpack 60 bash -ec 'mkdir -p "$2" && { tar -xJf "$1" -C "$2" || python3 -m tarfile -e "$1" "$2"; }
      cp "$2"/libraries/_build_info*.so pansharp_fast/; cat gpu_luggage/commit.txt' - "$packed" "$work/packed" &&
      export PANSHARP_FAST_LIBRARIES=$work/packed/libraries
  fi
  step load 60 python3 -c "$loads" "${libraries[@]}" && return
  unset PANSHARP_FAST_LIBRARIES
  [ ! "$rehearse" ] || return
  export PANSHARP_FAST_CUDA=1 TORCH_CUDA_ARCH_LIST=${TORCH_CUDA_ARCH_LIST:-9.0}
  step build 240 python3 setup.py -q build_ext --inplace
  step load_built 60 python3 -c "$loads" "${libraries[@]}"
}

[ -f "$report" ] || {
  echo "# pansharp_fast on $([ "$rehearse" ] && echo "this CPU, rehearsed" || nvidia-smi --query-gpu=name,driver_version --format=csv,noheader)"
  echo
  echo "Commit $(git rev-parse --short HEAD 2>/dev/null || echo unknown), $(date -u '+%Y-%m-%d %H:%M')."
  echo
} >"$report"
prepare
for each in ${*:-$default}; do
  name=${each%%:*} limit=''
  [ "$name" = "$each" ] || limit=${each#*:}
  case $name in
  info) lines=40 step info "${limit:-30}" python3 -m pansharp_fast.info ;;
  values) lines=2 facts values "${limit:-80}" ;;
  speed) lines=100 facts speed "${limit:-60}" ;;
  network) lines=80 facts network "${limit:-80}" ;;
  samples) lines=2 facts samples "${limit:-80}" ;;
  selfcheck) lines=8 facts selfcheck "${limit:-40}" ;;
  tests_rest) tests tests_rest "${limit:-120}" "not triton" $(gpu_files) ;;
  tests_triton) tests tests_triton "${limit:-150}" triton tests/ops $(gpu_files | grep -v ^tests/ops) ;;
  tests_*) tests "$name" "${limit:-100}" "not triton" "tests/ops/test_${name#tests_}.py" ;;
  bench_*) benchmark "${name#bench_}" "${limit:-150}" ;;
  train)
    limit=$((${limit:-240} < stop - SECONDS ? ${limit:-240} : stop - SECONDS))
    lines=20 step train "$limit" bash scripts/gpu_train.sh "$out" "$((limit - 5))"
    ;;
  *) sanitizer "$name" "${limit:-90}" ;;
  esac
done
echo "$summary" | tee -a "$report"
save step
exit "$failed"
