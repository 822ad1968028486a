#!/usr/bin/env bash
# The test suite in two processes: tests that start engines, which are mostly one thread, beside all the others.
# Usage: tests/run.sh PYTHON [pytest arguments]
set -uo pipefail
python=$1
shift
log=$(mktemp)
trap 'rm -f "$log"' EXIT
# A thread each, so that two processes do not fight over two cores.
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1}
"$python" -P -m pytest -m "not engine" "$@" >"$log" 2>&1 &
"$python" -P -m pytest -m engine "$@"
engine=$?
wait $!
rest=$?
cat "$log"
none=5 # pytest: no test was selected
[ $engine -eq $none ] && [ $rest -ne $none ] && engine=0
[ $rest -eq $none ] && [ $engine -ne $none ] && rest=0
exit $((engine ? engine : rest))
