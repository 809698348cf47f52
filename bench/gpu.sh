#!/usr/bin/env bash
# SPDX-License-Identifier: Apache-2.0
# All that a machine with a GPU can tell, without a network, meant for ten minutes: the build, the wrappers' meaning
# against the emulator's, the tests, compute-sanitizer, and timings beside peers.
# usage: bench/gpu.sh [FOLDER [PART..]]    FOLDER (build/gpu-run) gets a log of each part and <date>-<gpu>.json; parts:
# build conform test memcheck racecheck bench. A part needs the build; one that fails does not stop the next.
# needs: CUDA 12.8 or later, a C++17 compiler, CMake, Ninja, Python with torch 2.10 or later, nanobind, pytest, hypothesis
set -uo pipefail
cd "$(dirname "$0")/.."
out=${1:-build/gpu-run}
[ $# -gt 0 ] && shift
[ $# = 0 ] && set -- build conform test memcheck racecheck bench
mkdir -p "$out"
out=$(cd "$out" && pwd)
site=$PWD/build/gpu-site
python=${PYTHON:-python3}
export PYTHONPATH=$site${PYTHONPATH:+:$PYTHONPATH} PYTHONUNBUFFERED=1
failed=()

part_build() {
  cmake -S . -B build/gpu -G Ninja -DHISAC_PYTHON=ON -DHISAC_SIMT=ON -DHISAC_CUDA=ON \
    -DPython_EXECUTABLE="$(command -v "$python")" -DCMAKE_CUDA_ARCHITECTURES="${HISAC_ARCHITECTURES:-native}" &&
    cmake --build build/gpu && cmake --build build/gpu --target conform_gpu &&
    mkdir -p "$site" && rm -rf "$site/hisac" && cp -r python/hisac "$site/hisac" &&
    cmake --install build/gpu --prefix "$site/hisac" >/dev/null &&
    (cd "$out" && "$python" -c 'import hisac, torch; print(hisac.__file__, hisac.backends(), torch.__version__)
assert hisac.backends()["cuda"] is True')
}

part_conform() { build/gpu/tests/cuda/conform_gpu "$out/gpu.bin" && build/gpu/tests/cuda/conform_simt "$out/gpu.bin"; }

part_test() {
  HISAC_PROFILE=deep HISAC_EMULATED=$(echo "$PWD"/build/gpu/tests/cuda/_cuda*.so) "$python" -m pytest -q -rs \
    -p no:cacheprovider tests/cuda/test_cuda.py tests/cuda/test_cuda_parity.py -k "not (parity and emulated)"
}

# every tensor its own allocation, so that its end is an end
small="test_codes or (test_route and not tables) or test_gradients or test_leaf_sums or test_match"
part_memcheck() {
  PYTORCH_NO_CUDA_MEMORY_CACHING=1 compute-sanitizer --tool memcheck --error-exitcode 9 --target-processes all \
    "$python" -m pytest -q -x -p no:cacheprovider tests/cuda/test_cuda.py -k "($small) and not emulated"
}
part_racecheck() {
  compute-sanitizer --tool racecheck --error-exitcode 9 --target-processes all \
    "$python" -m pytest -q -x -p no:cacheprovider tests/cuda/test_cuda.py -k "($small) and not emulated"
}

part_bench() {
  local name
  name=$(date +%F)-$(nvidia-smi --query-gpu=name --format=csv,noheader | head -1 | tr ' A-Z' '-a-z')
  "$python" bench/gpu.py --json "$out/$name.json" --seconds "${HISAC_BENCH_SECONDS:-240}"
}

for part; do
  case $part in build | conform | test | memcheck | racecheck | bench) ;; *) echo "no part $part" >&2 && exit 2 ;; esac
  echo "==== $part (${SECONDS}s)"
  "part_$part" 2>&1 | tee "$out/$part.log" | tail -${HISAC_LINES:-60} || failed+=("$part")
done
echo "==== ${SECONDS} s; failed: ${failed[*]:-none}"
[ ${#failed[@]} = 0 ]
