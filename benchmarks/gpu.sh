#!/usr/bin/env bash
# All that needs a GPU, in one go: benchmarks/gpu.sh [part...]; without arguments every part.
# OUT: folder for results and gpu.log (benchmarks/results). PYTHON: the interpreter. PEERS: of the suite (none).
# Each part has a time limit; one that fails is reported and the next runs; the exit status is then 1.
set -uo pipefail
cd "$(dirname "$0")/.." || exit 1

out=${OUT:-benchmarks/results}
mkdir -p "$out"
log=$out/gpu.log
: >"$log"
python=${PYTHON:-}
if [ -z "$python" ]; then
    if [ -x .venv/bin/python ]; then python=.venv/bin/python; else python=python3; fi
fi
export PYTHONPATH="$PWD:$PWD/kernels${PYTHONPATH:+:$PYTHONPATH}" PYTHONUNBUFFERED=1
wanted=" ${*:-imports tests racecheck ops attention suite plan} "
table=()
failed=0

# part NAME SECONDS COMMAND...
part() {
    local name=$1 limit=$2 start=$SECONDS status result
    shift 2
    printf '\n== %s: %s\n' "$name" "$*" | tee -a "$log"
    timeout --kill-after=10 "$limit" "$@" 2>&1 | tee -a "$log"
    status=${PIPESTATUS[0]}
    case $status in
        0) result=ok ;;
        124 | 137) result="stopped after $limit s" ;;
        *) result="failed ($status)" ;;
    esac
    [ "$status" -eq 0 ] || failed=1
    table+=("$(printf '%-32s %-20s %5d s' "$name" "$result" $((SECONDS - start)))")
    return "$status"
}

skip() {
    table+=("$(printf '%-32s %s' "$1" "skipped: $2")")
}

chosen() {
    [[ $wanted == *" $1 "* ]]
}

if chosen imports; then
    part imports 120 "$python" -c '
import torch, triton, vlmr1_kernels
print("torch", torch.__version__, "triton", triton.__version__, torch.cuda.get_device_name())
print("capability", torch.cuda.get_device_capability(), "free, total bytes", torch.cuda.mem_get_info())'
fi

if chosen tests; then
    part tests 420 "$python" -m pytest -q -m gpu -p no:cacheprovider --continue-on-collection-errors --durations=5 tests
fi

if chosen racecheck; then
    if command -v compute-sanitizer >/dev/null; then
        # It sees hazards in shared memory only, and every launch is many times slower: the listed cases, no others.
        cases=${RACECHECK:-triton and grpo_loss and error_is_within_budget and not 1000}
        part racecheck 240 compute-sanitizer --tool racecheck --error-exitcode 3 --target-processes all \
            "$python" -m pytest -q -m gpu -p no:cacheprovider -k "$cases" tests/kernels
    else
        skip racecheck "compute-sanitizer is not installed"
    fi
fi

if chosen ops; then
    for op in linear_grpo_loss linear_logprob grpo_loss group_advantages; do
        part "bench_$op" 240 "$python" -m "benchmarks.bench_$op" --device cuda --out "$out"
    done
    part summary 60 "$python" -m benchmarks.summary "$out"
fi

if chosen attention; then
    for op in shared_prefix_attention varlen_attention shared_prefix_decode; do
        part "bench_$op" 240 "$python" -m "benchmarks.bench_$op" --device cuda --out "$out"
    done
fi

if chosen suite; then
    for section in step update rollout memory; do # each in a part of its own: what is done is kept
        peers=()
        case $section in step | update) peers=(--peers "${PEERS:-none}") ;; esac
        part "suite-$section" 560 "$python" -m benchmarks.suite --only "$section" --shapes 3b --rounds 2 \
            "${peers[@]}" --out "$out"
    done
fi

if chosen plan; then
    for shape in 3b 7b; do # each in a part of its own: one may not fit
        part "plan-$shape" 400 "$python" -m benchmarks.plan --device cuda --shapes "$shape" --within 10 \
            --out "$out/plan-$shape-cuda.json"
    done
fi

{ echo && printf '%s\n' "${table[@]}"; } | tee -a "$log"
exit "$failed"
