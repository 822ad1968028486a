#!/usr/bin/env bash
# The test suite in two lanes that take about as long: tests that start engines, mostly one thread, beside all the others.
# Speculation runs after those: it imports llvmlite, after which vLLM 0.32 starts no further engine in a process on a
# CPU; and with it, to even the lanes, tests that start engines only in other processes (marked apart).
# Usage: tests/run.sh PYTHON [pytest arguments]
set -uo pipefail
python=$1
shift
log=$(mktemp)
trap 'rm -f "$log"' EXIT
# A thread each, so that two processes do not fight over two cores.
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1}
status() { # what one run of pytest ended with, after others; 5: no test was selected
  [ "$2" -eq 5 ] && echo "$1" && return
  [ "$1" -eq 5 ] || [ "$1" -eq 0 ] && echo "$2" && return
  echo "$1"
}
(
  "$python" -P -m pytest -m "not engine" "$@"
  one=$?
  "$python" -P -m pytest -m "engine and (speculation or apart)" "$@"
  exit "$(status $one $?)"
) >"$log" 2>&1 &
"$python" -P -m pytest -m "engine and not (speculation or apart)" --ignore=tests/spec_decode "$@"
first=$?
wait $!
found=$(status $first $?)
cat "$log"
exit "$found"
