#!/usr/bin/env bash
# What a GPU host has to settle, most important first, within BUDGET seconds [540]:
#   [BUDGET=SECONDS] [WHEELS=FOLDER] bench/gpu.sh [--quick] OUTDIR
# The same call again goes on where the last one stopped: parts that ended well are skipped, single figures are not
# measured twice, compiled kernels are kept in OUTDIR/cache. A part leaves NAME.txt, a line in parts.txt when it ends,
# and its figures in results.jsonl as it goes. WHEELS installs from a folder first, offline. --quick: any machine.
# Exit code 0: all parts are done; 1: one failed or hung; 2: the host lacks something; 3: the budget was over before all
# was done, call again; 130: interrupted.
set -u
quick=()
[ "${1:-}" = "--quick" ] && { quick=(--quick); shift; }
out=${1:?usage: bench/gpu.sh [--quick] OUTDIR}
mkdir -p "$out" && out=$(cd "$out" && pwd) || { echo "bench/gpu.sh: cannot make $out" >&2; exit 2; }
cd "$(dirname "$0")/.." || exit 2
export PYTHONPATH="$PWD:$PWD/kernels${PYTHONPATH:+:$PYTHONPATH}"
export TORCHINDUCTOR_CACHE_DIR="$out/cache/inductor" TRITON_CACHE_DIR="$out/cache/triton"
budget=${BUDGET:-540} failed=0 left_out=0 running=

# Seconds, from which the limits below are made. How long a host compiles is a guess: it takes 40 s of CPU time.
compile=50 # both networks and the loss, without a cache; a third of it with two blocks
choose=10  # a guess: before a first step attention's and the MLP's kernels are compiled and timed
start=12   # Python, torch, CUDA, and the ceilings that each process measures
report=10  # kept back for the report
worth=60   # a longer part may begin with this much left: each of its figures is kept
fine=0     # the exit code of a part that is done
[ -z "${quick[*]-}" ] || start=40 fine="[05]" # on a busy CPU; 5 where only a GPU has a part's cases

stop() {
    [ -z "$running" ] || { kill "$running"; wait "$running"; } 2>/dev/null
    echo "interrupted; the same call goes on from here" >&2
    exit 130
}
trap stop INT TERM HUP

run() { # run NAME SECONDS COMMAND...: its output in NAME.txt, its exit code, a line
    local name=$1 limit=$2 code=0 began=$SECONDS words
    shift 2
    # In this process group, so that what ends the script ends the part; KILL where a driver does not let go.
    timeout --foreground -k 5 "$limit" "$@" >"$out/$name.txt" 2>&1 &
    running=$!
    wait "$running" || code=$?
    running=
    words="exit code $code after $((SECONDS - began)) of $limit s"
    case $code in 124 | 137) words="stopped, its time was over: $words" ;; esac
    echo "$name: $words, $host" | tee -a "$out/parts.txt" | sed "s/, device .*//"
    return "$code"
}

part() { # part NAME SECONDS COMMAND...: unless it is done, or has no time
    local name=$1 limit=$2 left=$((budget - SECONDS - report)) code=0
    shift 2
    if [ -f "$out/parts.txt" ] && grep -F ", $host" "$out/parts.txt" | grep -q "^$name: exit code $fine "; then return; fi
    if [ "$left" -lt "$limit" ] && [ "$left" -lt "$worth" ]; then
        echo "$name: no time for it, $left of $limit s left"
        left_out=1
        return
    fi
    run "$name" "$((left < limit ? left : limit))" "$@" || code=$?
    # shellcheck disable=SC2254 # a pattern
    case $code in $fine) return ;; esac
    if [ "$code" -eq 124 ] && [ "$left" -lt "$limit" ]; then left_out=1; else failed=1; fi
}

measure() { # measure NAME SECONDS PART [WORDS...]
    local name=$1 limit=$2 what=$3
    shift 3
    part "$name" "$limit" python -m bench "$what" ${quick[@]+"${quick[@]}"} --continue --out "$out" "$@"
}

host="no device yet"
if [ -n "${WHEELS:-}" ]; then
    run wheels 60 python -m pip install -q --no-index --no-deps "$WHEELS"/*.whl || { cat "$out/wheels.txt" >&2; failed=1; }
fi
# It takes 4 s, and a minute where torch comes from a slow disk for the first time.
timeout --foreground -k 5 60 python -m bench.preflight "$out" ${quick[@]+"${quick[@]}"} | tee "$out/preflight.txt"
[ "${PIPESTATUS[0]}" -eq 0 ] || { echo "bench/gpu.sh: this host is not ready, see above" >&2; exit 2; }
host=$(tail -n 1 "$out/preflight.txt")
proof="graph_equals_eager"
mapfile -t proofs < <(grep -rl --include='test_*.py' "$proof" tests)
mapfile -t gpu_tests < <(grep -rl --include='test_*.py' 'mark\.gpu' tests) # no others: they may need what is not here

part proof $((start + 2 * compile / 3 + 5)) python -m pytest -v -m gpu -k "$proof" "${proofs[@]}"
measure main $((start + compile + choose + 17)) step -k "graph and vit_small and 2+8 and B64" # and its profile
part tests 60 python -m pytest -v -m gpu -k "not $proof" --continue-on-collection-errors "${gpu_tests[@]}"
measure ops $((start + 8 * 5 + 10)) ops -k "not (clip and compiled or patch or sinkhorn)" # 8 small functions to compile
measure attention $((start + choose + 15)) attention
measure base $((start + compile + 8)) step -k "graph and vit_base and B64"
measure batch $((start + compile + 8)) step -k "graph and vit_small and B256"
measure plain $((start + 20)) step -k "plain and 2+8 and B64"
measure compiled $((start + 5 * compile / 2 + 20)) step -k "compiled and B64"
measure fused $((start + 20)) step -k "fused and B64"
measure jpeg $((start + compile / 2 + 30)) pipeline -k "training or kernels"
measure features $((start + 20)) pipeline -k features
measure patches $((start + 2 * 5 + 20)) ops -k "patch or sinkhorn" # of DINOv2's recipe
measure recipes $((2 * (start + compile + 10))) step -k "dinov2 or dinov3"
part doctor 20 python -m fastdino.cli doctor
measure tuned $((start + 6 * compile)) step -k tuned # a guess, too
measure step $((8 * compile + 200)) step # other batches and crops, eager: as many as there is time for
measure adamw 300 ops # compiled over 158 tensors: minutes
run report "$report" python -m bench report "$out" || failed=1
[ "$failed" -eq 0 ] || exit 1
[ "$left_out" -eq 0 ] || exit 3
