#!/usr/bin/env bash
# The test suite in processes of its own: tests that start engines, mostly one thread, beside all the others.
# Speculation has its own too: it imports llvmlite, after which vLLM 0.32 starts no further engine in a process on a CPU.
# Usage: tests/run.sh PYTHON [pytest arguments]
set -uo pipefail
python=$1
shift
log=$(mktemp)
trap 'rm -f "$log"' EXIT
# A thread each, so that two processes do not fight over two cores.
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1}
others=()
for folder in tests/*/; do
  [ "$folder" = tests/spec_decode/ ] || others+=("--ignore=${folder%/}")
done
"$python" -P -m pytest -m "not engine" "$@" >"$log" 2>&1 &
"$python" -P -m pytest -m engine --ignore=tests/spec_decode --ignore=tests/kernels "$@"
codes=($?)
"$python" -P -m pytest -m engine "${others[@]}" "$@"
codes+=($?)
wait $!
codes+=($?)
cat "$log"
none=5 # pytest: no test was selected
found=$none
for code in "${codes[@]}"; do
  [ "$code" -eq $none ] && continue
  [ $found -eq $none ] || [ $found -eq 0 ] && found=$code
done
exit $found
