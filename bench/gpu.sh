#!/usr/bin/env bash
# What a GPU host has to settle, most important first, in less than nine minutes: bench/gpu.sh [--quick] OUTDIR
# Each part leaves OUTDIR/NAME.txt and a line in parts.txt when it ends, its figures in results.jsonl as it goes, and is
# stopped where its time is over. WHEELS=folder installs from a folder first, offline. --quick: small, for any machine.
set -u
quick=()
[ "${1:-}" = "--quick" ] && { quick=(--quick); shift; }
out=${1:?usage: bench/gpu.sh [--quick] OUTDIR}
mkdir -p "$out" && out=$(cd "$out" && pwd) || exit 2
cd "$(dirname "$0")/.." || exit 2
export PYTHONPATH="$PWD:$PWD/kernels${PYTHONPATH:+:$PYTHONPATH}"
if [ -n "${WHEELS:-}" ]; then python -m pip install -q --no-index --no-deps "$WHEELS"/*.whl; fi
failed=0

part() { # part NAME SECONDS COMMAND...
    local name=$1 limit=$2 code=0 started=$SECONDS
    shift 2
    timeout "$limit" "$@" >"$out/$name.txt" 2>&1 || code=$?
    echo "$name: exit code $code after $((SECONDS - started)) of $limit s" | tee -a "$out/parts.txt"
    [ "$code" -eq 0 ] || failed=1
}

measure() { # measure NAME SECONDS PART [WORDS...]
    local name=$1 limit=$2 what=$3
    shift 3
    part "$name" "$limit" python -m bench "$what" ${quick[@]+"${quick[@]}"} --out "$out" "$@"
}

measure ceilings 30 ceilings
part doctor 20 python -m fastdino.cli doctor
part tests 100 python -m pytest -m gpu tests
measure ops 70 ops
measure attention 40 attention
measure step 190 step -k "not profile"
measure jpeg 40 pipeline -k "training or kernels"
measure profile 35 step -k profile
part report 10 python -m bench report "$out"
exit $failed
