#!/usr/bin/env bash
# What a GPU host has to settle, most important first: bench/gpu.sh [--quick] OUTDIR
# Each part writes its own file and its own exit code as soon as it ends. WHEELS=dir installs from a folder, offline.
set -u
quick=""
[ "${1:-}" = "--quick" ] && { quick="--quick"; shift; }
out=${1:?usage: bench/gpu.sh [--quick] OUTDIR}
mkdir -p "$out" && out=$(cd "$out" && pwd) || exit 2
cd "$(dirname "$0")/.." || exit 2
export PYTHONPATH="$PWD:$PWD/kernels${PYTHONPATH:+:$PYTHONPATH}"
if [ -n "${WHEELS:-}" ]; then python -m pip install --no-index --no-deps --find-links "$WHEELS" "$WHEELS"/*.whl; fi
failed=0

part() { # part NAME SECONDS COMMAND...
    local name=$1 limit=$2 code=0
    shift 2
    timeout "$limit" "$@" >"$out/$name.txt" 2>&1 || code=$?
    echo "$name $code ${SECONDS}s" | tee -a "$out/parts.txt"
    [ "$code" -eq 0 ] || failed=1
}

part doctor 60 python -m fastdino.cli doctor
if [ -z "$quick" ]; then part tests 150 python -m pytest -m gpu; fi
if [ -z "$quick" ]; then part ops 120 python -m pytest bench/test_ops.py -s; fi
part step 200 python -m bench step $quick --out "$out"
part report 10 python -m bench report "$out"
exit $failed
