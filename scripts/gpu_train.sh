#!/usr/bin/env bash
# Trains variants of `universal` side by side on one GPU, with all processor cores simulating scenes meanwhile:
#
#     scripts/gpu_train.sh OUT MINUTES IMAGES.npz [VARIANT...]
#
# IMAGES.npz is made by `recipes/universal/simulate.py OPEN_IMAGERY --pack IMAGES.npz`. VARIANT: base (default),
# no-attention, pan-mode, deep, l1, shanghai. OUT/train.tar holds, renewed every half minute, each variant's weights and
# log, and the first one's state: unpacked into a folder RUNS (in the environment), its training goes on from there.
set -uo pipefail
out=$1 minutes=$2 images=$3
shift 3
cd "$(dirname "$0")/.." || exit 2
export PYTHONPATH=$PWD${PYTHONPATH:+:$PYTHONPATH} PYTHONUNBUFFERED=1 OMP_NUM_THREADS=1
device=${DEVICE:-cuda} scenes=${SCENES:-6000} runs=${RUNS:-/tmp/universal_runs}
packed=$(mktemp -d -p /dev/shm)
trap 'kill $(jobs -p) 2>/dev/null; rm -rf "$packed"' EXIT
[ $# -gt 0 ] || set -- base
first=$1
mkdir -p "$runs" "$out"
simulate() { nice python3 recipes/universal/simulate.py "$images" "$@" >>"$runs/simulate.log" 2>&1; }
jobs=$(($(nproc) > 2 + $# ? $(nproc) - 2 - $# : 1))
case " $* " in *" shanghai "*) simulate "$packed/pair" --shanghai 1 --scenes $((scenes / 7 + 1)) --seed 7 --jobs 2 & ;; esac
simulate "$packed" --scenes "$scenes" --jobs "$jobs" &
pids=()
for variant in "$@"; do
  case $variant in
  base) options=() ;;
  no-attention) options=(--no-attention) ;;
  pan-mode) options=(--pan-mode 0.2) ;;
  deep) options=(--band-depth 1) ;;
  l1) options=(--epsilon 0.1) ;;
  shanghai) options=(--also "$packed/pair") ;;
  *) echo "gpu_train: VARIANT: expected base, no-attention, pan-mode, deep, l1 or shanghai, got $variant" >&2; exit 2 ;;
  esac
  mkdir -p "$runs/$variant"
  # shellcheck disable=SC2086
  python3 recipes/universal/train.py "$packed" "$runs/$variant" --minutes "$minutes" --device "$device" \
    --maps "${MAPS:-512}" --rate "${RATE:-3e-3}" --every 25 --wait "${WAIT:-200}" "${options[@]}" ${OPTIONS:-} \
    >>"$runs/$variant/log" 2>&1 &
  pids+=($!)
done
save() { (cd "$runs" && tar -cf "$out/train.part" -- */log */universal.safetensors "$first/last.pt") 2>/dev/null
  mv "$out/train.part" "$out/train.tar"; }
(while sleep 30; do save; done) &
status=0
for pid in "${pids[@]}"; do wait "$pid" || status=1; done
save
for variant in "$@"; do
  echo "== $variant"
  tail -n 7 "$runs/$variant/log"
done
exit "$status"
