#!/usr/bin/env bash
# Trains variants of `universal` side by side on one GPU, scenes simulated there too:
#
#     scripts/gpu_train.sh OUT SECONDS
#
# In the environment:
#     IMAGES      gpu_luggage/images.npz, made by `recipes/universal/simulate.py OPEN_IMAGERY --pack FILE`
#     VARIANTS    base (alone by default), no-attention, pan-mode, deep, l1, shanghai, or several of them joined by +
#     RUNS        a folder of earlier runs, from which training goes on
#     OPTIONS     more options of train.py
# OUT/train.tar holds, renewed every half minute, each variant's weights and log, and the first one's state to go on from.
# SECONDS include the start; REHEARSE=1 does all of it on the CPU with very little, on noise if there are no images.
set -uo pipefail
out=$(mkdir -p "$1" && cd "$1" && pwd) || exit 2
end=$((SECONDS + $2))
cd "$(dirname "$0")/.." || exit 2
export PYTHONPATH=${PYTHONPATH:+$PYTHONPATH:}$PWD PYTHONUNBUFFERED=1 OMP_NUM_THREADS=1
images=${IMAGES:-gpu_luggage/images.npz} runs=${RUNS:-/tmp/universal_runs}
work=$(mktemp -d -p /dev/shm)
trap 'kill $(jobs -p) 2>/dev/null; rm -rf "$work"' EXIT
device=cuda size=(--maps "${MAPS:-512}" --rate "${RATE:-3e-3}" --every 25 --wait "${WAIT:-60}")
if [ "${REHEARSE:-}" ]; then
  device=cpu size=(--maps 4 --every 5 --wait 2)
  runs=$work/runs
  [ -f "$images" ] || { images=$work/noise.npz && python3 recipes/universal/simulate.py noise --pack "$images" || exit 1; }
fi
read -ra variants <<<"${VARIANTS:-base}"
mkdir -p "$runs"
# So that starting to learn does not count against the time: the last checkpoint and its validation come before the end.
minutes=$(awk -v s=$((end - SECONDS)) -v spare="${SPARE:-50}" 'BEGIN { m = (s - spare) / 60; print (m > 0.05 ? m : 0.05) }')
pids=()
for variant in "${variants[@]}"; do
  options=()
  for part in ${variant//+/ }; do
    case $part in
    base) ;;
    no-attention) options+=(--no-attention) ;;
    pan-mode) options+=(--pan-mode 0.2) ;;
    deep) options+=(--band-depth 1) ;;
    l1) options+=(--epsilon 0.1) ;;
    shanghai) options+=(--shanghai 0.15) ;;
    *)
      echo "gpu_train: VARIANTS: expected base, no-attention, pan-mode, deep, l1 or shanghai, joined by +, got $variant" >&2
      exit 2
      ;;
    esac
  done
  mkdir -p "$runs/$variant"
  # shellcheck disable=SC2086
  python3 recipes/universal/train.py "$images" "$runs/$variant" --minutes "$minutes" --device "$device" "${size[@]}" \
    "${options[@]}" ${OPTIONS:-} >>"$runs/$variant/log" 2>&1 &
  pids+=($!)
done
save() {
  # Until the first checkpoint some of these are missing.
  (cd "$runs" && tar -cf "$out/.train" */log */universal.safetensors "${variants[0]}/last.pt" 2>/dev/null)
  mv "$out/.train" "$out/train.tar"
}
(while sleep 30; do save; done) &
status=0
for pid in "${pids[@]}"; do wait "$pid" || status=1; done
save
for variant in "${variants[@]}"; do
  echo "== $variant"
  tail -n 7 "$runs/$variant/log"
done
exit "$status"
