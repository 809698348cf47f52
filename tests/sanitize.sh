#!/usr/bin/env bash
# SPDX-License-Identifier: Apache-2.0
# The C++ checks, all or those named:
#   gcc clang        the tests as built for release
#   neon             the same for AArch64, under emulation
#   address thread   the tests under ASan + UBSan and under TSan (GCC)
#   simt             the CUDA kernels, emulated: as built for release, under ASan + UBSan and under clang's TSan
#   fuzz             every fuzz target under clang's libFuzzer with ASan + UBSan, HISAC_FUZZ_SECONDS (300) in all, as
#                    many at a time as there are processors; each runs every instruction set on the same bytes
# HISAC_JOBS: how many compilers or tests at a time, all processors unless given.
# usage: tests/sanitize.sh [CHECK..]    needs g++, clang++ with its sanitizer runtime, doctest, CMake, and for neon
# aarch64-linux-gnu-g++ and qemu-aarch64-static
set -euo pipefail
seconds=${HISAC_FUZZ_SECONDS:-300}
top=$(cd "$(dirname "$0")/.." && pwd)
build=$(mktemp -d /tmp/hisac-sanitize.XXXXXX)
trap 'kill $(jobs -p) 2>/dev/null || true; rm -rf "$build"' EXIT
jobs=${HISAC_JOBS:-$(nproc)}
# without detect_stack_use_after_return: GCC's fake stack misaligns 64-byte vectors (GCC bug 110027)
export ASAN_OPTIONS=detect_leaks=1:strict_string_checks=1:detect_stack_use_after_return=0
export UBSAN_OPTIONS=print_stacktrace=1 TSAN_OPTIONS=halt_on_error=1:second_deadlock_stack=1

step() { printf -- '---- %s (%ss)\n' "$*" "$SECONDS"; }

# build NAME COMPILER [cmake options]; any warning is an error
compile() {
  local name=$1 compiler=$2
  shift 2
  cmake -S "$top" -B "$build/$name" -DCMAKE_CXX_COMPILER="$compiler" -DCMAKE_CXX_FLAGS=-Werror -DHISAC_TESTS=ON \
    -DHISAC_SIMT=OFF -DHISAC_CUDA=OFF "$@" \
    >"$build/$name.log" 2>&1 || { cat "$build/$name.log"; return 1; }
  cmake --build "$build/$name" -j "$jobs" >"$build/$name.log" 2>&1 || { tail -60 "$build/$name.log"; return 1; }
}

check() {
  ctest --test-dir "$build/$1" -j "$jobs" --output-on-failure --no-tests=error --timeout 900
}

gcc() {
  step "g++: release"
  compile gcc g++
  check gcc
  "$build/gcc/tests/fuzz/fuzz_kernels" 1
}

clang() {
  step "clang++: release"
  compile clang clang++
  check clang
}

neon() {
  step "aarch64-linux-gnu-g++: release, emulated"
  local emulator=(qemu-aarch64-static -L /usr/aarch64-linux-gnu)
  compile neon aarch64-linux-gnu-g++ -DCMAKE_SYSTEM_NAME=Linux -DCMAKE_SYSTEM_PROCESSOR=aarch64 \
    -DCMAKE_CROSSCOMPILING_EMULATOR="$(IFS=';' && echo "${emulator[*]}")"
  check neon
  "${emulator[@]}" "$build/neon/tests/fuzz/fuzz_kernels" 1
}

address() {
  step "g++: AddressSanitizer and UndefinedBehaviorSanitizer"
  compile address g++ -DCMAKE_BUILD_TYPE=RelWithDebInfo -DHISAC_SANITIZE=address,undefined
  check address
}

thread() {
  step "g++: ThreadSanitizer"
  compile thread g++ -DCMAKE_BUILD_TYPE=RelWithDebInfo -DHISAC_SANITIZE=thread
  check thread
}

simt() {
  step "g++: emulated CUDA kernels, release"
  compile simt g++ -DHISAC_TESTS=OFF -DHISAC_SIMT=ON
  check simt
  step "g++: emulated CUDA kernels, AddressSanitizer and UndefinedBehaviorSanitizer"
  compile simt_address g++ -DHISAC_TESTS=OFF -DHISAC_SIMT=ON -DCMAKE_BUILD_TYPE=RelWithDebInfo \
    -DHISAC_SANITIZE=address,undefined
  check simt_address
  step "clang++: emulated CUDA kernels, ThreadSanitizer"
  compile simt_thread clang++ -DHISAC_TESTS=OFF -DHISAC_SIMT=ON -DCMAKE_BUILD_TYPE=RelWithDebInfo -DHISAC_SANITIZE=thread
  check simt_thread
}

# target TARGET SECONDS LONGEST_INPUT
target() {
  mkdir -p "$build/corpus/$1"
  "$build/fuzz/tests/fuzz/fuzz_$1" -max_total_time="$2" -max_len="$3" -timeout=20 -rss_limit_mb=3000 -seed=1 \
    -print_final_stats=1 -verbosity=0 -artifact_prefix="${HISAC_ARTIFACTS:-$build/}" "$build/corpus/$1" \
    >"$build/fuzz_$1.log" 2>&1 || { tail -80 "$build/fuzz_$1.log"; return 1; }
  echo "fuzz_$1: $(sed -n 's/^stat::number_of_executed_units: *//p' "$build/fuzz_$1.log") inputs in $2 s, no finding"
}

fuzz() {
  step "clang++: fuzzers, $seconds s in all"
  compile fuzz clang++ -DCMAKE_BUILD_TYPE=RelWithDebInfo -DHISAC_SANITIZE=address,undefined -DHISAC_FUZZ=ON
  target verbs $((seconds / 2)) 1000 &
  local verbs=$!
  if [ "$jobs" = 1 ]; then wait "$verbs"; fi
  target kernels $((seconds / 5)) 2000
  target state $((seconds / 5)) 600
  target codebook $((seconds / 10)) 600
  if [ "$jobs" != 1 ]; then wait "$verbs"; fi
}

if [ $# = 0 ]; then set -- gcc clang neon address thread simt fuzz; fi
for name; do
  case $name in
    gcc | clang | neon | address | thread | simt | fuzz) "$name" ;;
    *) echo "no check $name" >&2 && exit 2 ;;
  esac
done
step "no finding"
