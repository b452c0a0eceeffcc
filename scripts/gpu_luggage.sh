#!/usr/bin/env bash
# Prepares what scripts/gpu_check.sh needs on a machine with a GPU that cannot download anything: everything goes into the
# folder gpu_luggage/ of the checkout, which git ignores and which travels with the tree.
#
#     scripts/gpu_luggage.sh [PYTHON]
#
# PYTHON (python3 by default) has the minor version of the Python there and any torch >= 2.10, cmake, ninja and pybind11.
#
#     gpu_luggage/packed-3.N.tar.xz   libraries/: _C.so, _C_cuda.so (sm_90 alone) and _build_info for that Python
#                                     site/: packages that are missing there
#     anything else in the folder (training data, say) stays as it is
#
# Ends with the size of tree and folder together; more than LIMIT MiB (64) is a failure.
set -euo pipefail
cd "$(dirname "$0")/.."
python=${1:-python3} limit=${LIMIT:-64}
luggage=gpu_luggage
packages=(PyWavelets diffusers importlib-metadata)
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
mkdir -p "$luggage" "$work/packed/site"

PANSHARP_FAST_CUDA=1 TORCH_CUDA_ARCH_LIST=9.0 PANSHARP_FAST_BUILD_DIR=${BUILD_DIR:-build/luggage} \
  nice -n 5 "$python" setup.py -q build_ext --build-lib "$work/build"
mv "$work/build/pansharp_fast" "$work/packed/libraries"
strip --strip-unneeded "$work"/packed/libraries/*.so
# The oldest C library and C++ library that these load with.
objdump -T "$work"/packed/libraries/*.so | grep -oE "(GLIBC|GLIBCXX|CXXABI)_[0-9.]+" | sort -Vu |
  awk -F_ '{ newest[$1] = $0 } END { for (name in newest) printf "needs %s\n", newest[name] }'

# Wheels for the machine there: Linux x86-64 and the Python that compiled.
version=$("$python" -c 'import sys; print(f"{sys.version_info[0]}.{sys.version_info[1]}")')
"$python" -m pip install -q --no-deps --no-compile --only-binary=:all: --python-version "$version" --implementation cp \
  --platform manylinux_2_28_x86_64 --platform manylinux_2_27_x86_64 --platform manylinux_2_17_x86_64 \
  --platform manylinux2014_x86_64 --target "$work/packed/site" "${packages[@]}"
rm -rf "$work"/packed/site/{bin,pywt/tests}

tar -C "$work/packed" -cf - . | xz -T0 -6 >"$luggage/packed-$version.tar.xz"
git rev-parse HEAD >"$luggage/commit.txt"
git diff --quiet HEAD || echo "with changes that are not committed" >>"$luggage/commit.txt"

bytes() { xargs -0 -r du -cb -- | awk 'END { print $1 }'; }
tree=$(git ls-files -coz --exclude-standard | while IFS= read -r -d '' name; do [ ! -f "$name" ] || printf '%s\0' "$name"; done | bytes)
carried=$(find "$luggage" -type f -print0 | bytes)
du -h --apparent-size "$luggage"/*
awk -v tree="$tree" -v carried="$carried" -v limit="$limit" 'BEGIN {
  mib = 1048576
  printf "tree %.1f MiB + %s %.1f MiB = %.1f of %d MiB\n", tree / mib, "'"$luggage"'", carried / mib, (tree + carried) / mib, limit
  exit (tree + carried) / mib > limit
}'
