#!/usr/bin/env bash
# SPDX-License-Identifier: Apache-2.0
# The C++ tests as built for release, under ASan + UBSan and under TSan (GCC), then every fuzz target under clang's
# libFuzzer with ASan + UBSan for SECONDS each, the verbs once for every instruction set that the processor has.
# usage: tests/cpp/sanitize.sh [SECONDS]        needs g++, clang++ with its sanitizer runtime, doctest, CMake
set -euo pipefail
seconds=${1:-60}
top=$(cd "$(dirname "$0")/../.." && pwd)
build=$(mktemp -d /tmp/hisac-sanitize.XXXXXX)
trap 'rm -rf "$build"' EXIT
jobs=$(nproc)
# without detect_stack_use_after_return: GCC's fake stack misaligns 64-byte vectors (GCC bug 110027)
export ASAN_OPTIONS=detect_leaks=1:strict_string_checks=1:detect_stack_use_after_return=0
export UBSAN_OPTIONS=print_stacktrace=1 TSAN_OPTIONS=halt_on_error=1:second_deadlock_stack=1

step() { printf -- '---- %s (%ss)\n' "$*" "$SECONDS"; }

# build NAME COMPILER [cmake options]; any warning is an error
compile() {
  local name=$1 compiler=$2
  shift 2
  cmake -S "$top" -B "$build/$name" -DCMAKE_CXX_COMPILER="$compiler" -DCMAKE_CXX_FLAGS=-Werror -DHISAC_TESTS=ON "$@" \
    >"$build/$name.log" 2>&1 || { cat "$build/$name.log"; return 1; }
  cmake --build "$build/$name" -j "$jobs" >"$build/$name.log" 2>&1 || { tail -60 "$build/$name.log"; return 1; }
}

check() {
  ctest --test-dir "$build/$1" -j "$jobs" --output-on-failure --no-tests=error --timeout 900
}

step "g++: release"
compile release g++
check release

step "clang++: release"
compile clang clang++
check clang

step "g++: AddressSanitizer and UndefinedBehaviorSanitizer"
compile address g++ -DCMAKE_BUILD_TYPE=RelWithDebInfo -DHISAC_SANITIZE=address,undefined
check address

step "g++: ThreadSanitizer"
compile thread g++ -DCMAKE_BUILD_TYPE=RelWithDebInfo -DHISAC_SANITIZE=thread
check thread

step "clang++: fuzzers, $seconds s each"
compile fuzz clang++ -DCMAKE_BUILD_TYPE=RelWithDebInfo -DHISAC_SANITIZE=address,undefined -DHISAC_FUZZ=ON
# fuzz TARGET SECONDS LONGEST_INPUT
fuzz() {
  mkdir -p "$build/corpus/$1"
  "$build/fuzz/tests/cpp/fuzz_$1" -max_total_time="$2" -max_len="$3" -timeout=20 -rss_limit_mb=3000 -seed=1 \
    -print_final_stats=1 -verbosity=0 -artifact_prefix="${HISAC_ARTIFACTS:-$build/}" "$build/corpus/$1" \
    >"$build/fuzz.log" 2>&1 || { tail -80 "$build/fuzz.log"; return 1; }
  echo "fuzz_$1: $(sed -n 's/^stat::number_of_executed_units: *//p' "$build/fuzz.log") inputs, no finding"
}
fuzz codebook "$seconds" 600
fuzz kernels "$seconds" 2000
isas=baseline
case $(uname -m) in x86_64)
  if grep -qw avx2 /proc/cpuinfo; then isas+=" avx2"; fi
  if grep -qw avx512vl /proc/cpuinfo; then isas+=" avx512"; fi
  if grep -qw avx512_bf16 /proc/cpuinfo; then isas+=" avx512bf16"; fi
  if grep -qw amx_bf16 /proc/cpuinfo; then isas+=" amx"; fi ;;
esac
for isa in $isas; do
  step "verbs with HISAC_ISA=$isa"
  HISAC_ISA=$isa fuzz verbs "$seconds" 1000
done
step "no finding"
