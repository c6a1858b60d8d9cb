#!/usr/bin/env bash
# Everything that needs a GPU, in one command and under nine minutes:
#   bench/gpu_run.sh                          all parts: environment build tests stages bench
#   bench/gpu_run.sh build tests sanitize     only these, with all of the time
#   GIT_HASH=$(git rev-parse HEAD) bench/gpu_run.sh        in a copy, with or without .git
# Results: $OUT, or bench/results/<device>/. Each part has its own time limit, so a hang loses
# nothing; afterwards `python -m bench.plot FOLDER` draws them anywhere.
#
# SECONDS_TOTAL (540)  time for all parts; BENCH_ARGS  more arguments for bench.bench_loss, such as
# '--full' or '--without "verl Triton" TRL'; PYTHON (python3). Exit status 0 if every part was well.
# WHEELS  folders with wheels of peers, installed without a network for this run alone. A peer whose
# wheel is not there is left out with its reason. For CPython 3.12 on x86-64 Linux, in MB:
#   trl 1.16.0 (0.9, any); its backward imports datasets 5.2.0 (0.6, any), which needs dill 0.4.1
#     (0.1, any), multiprocess 0.70.19 (0.2, py312), xxhash 4.1.0 (0.5, manylinux2014)
#   liger-kernel 0.8.5 (0.9, any)             cut-cross-entropy 25.1.1 (0.02, any)
#   verl 0.9.1 (1.7, any; its kernel only)    quack-kernels 0.6.5 (0.7, any)
#   Liger CuTe and QuACK: nvidia-cutlass-dsl 4.8.1 (0.01, any), -libs-base (3.1, manylinux_2_28),
#     -libs-core (1.6, any), -libs-cu13 (92, manylinux_2_28), apache-tvm-ffi 0.1.15.post2 (3.3,
#     manylinux_2_24), torch-c-dlpack-ext 0.1.5 (0.9, manylinux_2_24), einops 0.8.2 (0.07, any)
#   Liger cuTile: cuda-tile 1.7.0 (0.4, manylinux2014) and its compiler, nvidia-cuda-tileiras (42,
#     manylinux2014) with nvidia-cuda-nvcc and nvidia-nvvm, all of CUDA 13.2 or later
# A wheel too large to transfer may come in parts, `split -b 45M X.whl X.whl.part-`, in any folders.
set -uo pipefail
cd "$(dirname "$0")/.."
PYTHON=${PYTHON:-python3}
total=${SECONDS_TOTAL:-540}
parts=("$@")
[ ${#parts[@]} -gt 0 ] || parts=(environment build tests stages bench)
for name in "${parts[@]}"; do
    case $name in
        environment | build | tests | kernels | sanitize | stages | bench) ;;
        *)
            echo "There is no part $name, only: environment build tests kernels sanitize stages bench."
            exit 2
            ;;
    esac
done
eval "bench_args=(${BENCH_ARGS:-})"  # names in it have spaces
if [ -z "${OUT:-}" ]; then
    device=$("$PYTHON" -c 'import torch; print(torch.cuda.get_device_name().lower())' | tr ' /' '__')
    OUT=bench/results/${device:-unknown}
fi
mkdir -p "$OUT"
# The extension for this GPU alone, where it is built on first use.
RLSD_CUDA_ARCHS=${RLSD_CUDA_ARCHS:-$("$PYTHON" -c 'import torch
major, minor = torch.cuda.get_device_capability()
print(f"{major}{minor}" + ("a" if major >= 9 else ""))' 2>/dev/null)}
[ -z "$RLSD_CUDA_ARCHS" ] || export RLSD_CUDA_ARCHS
export PYTHONUNBUFFERED=1 PYTHONPATH="$PWD${PYTHONPATH:+:$PYTHONPATH}"

if [ -n "${WHEELS:-}" ]; then
    site=$(mktemp -d)
    for first in $(find $WHEELS -name '*.whl.part-aa'); do
        name=$(basename "$first" .part-aa)
        find $WHEELS -name "$name.part-*" | awk -F/ '{print $NF "\t" $0}' | sort | cut -f2 |
            xargs cat > "$site/$name"
    done
    "$PYTHON" -m pip install --quiet --no-index --no-deps --no-compile --target "$site/lib" \
        $(find $WHEELS "$site" -name '*.whl') 2>&1 | tail -3
    # A .pth file of a target folder is not read: cutlass lies one level down.
    export PYTHONPATH="$site/lib:$site/lib/nvidia_cutlass_dsl/dsl_packages:$PYTHONPATH"
fi

workers=()  # of pytest-xdist
if "$PYTHON" -c 'import xdist' 2>/dev/null; then
    workers=(-n "$(($(nproc) < 6 ? $(nproc) : 6))" --dist loadgroup)
fi
failed=0
# part NAME SECONDS COMMAND...: run under a limit of its own, output to $OUT/log.txt.
part() {
    local name=$1 limit=$2 left=$((total - SECONDS)) log=$OUT/log.txt
    shift 2
    [ "$limit" -lt "$left" ] || limit=$left
    if [ "$limit" -lt 10 ]; then
        echo "== $name: no time left"
        failed=1
        return
    fi
    echo "== $name (at most $limit s)" | tee -a "$log"
    local before status
    before=$(wc -l < "$log")
    # INT lets pytest sum up and the benchmark write; a shell in the background would have it ignored.
    timeout --signal=INT --kill-after=15 "$limit" env --default-signal=INT "$@" >> "$log" 2>&1
    status=$?
    [ $status -eq 0 ] || failed=1
    tail -n "+$((before + 1))" "$log" | tail -n "${TAIL:-25}"
    echo "== $name: status $status after $SECONDS s in all" | tee -a "$log"
}

about() {
    nvidia-smi
    nvidia-smi -q -d CLOCK,POWER,ECC | head -60
    "$PYTHON" --version
    nvcc --version | tail -2
    "$PYTHON" -m pip list 2>/dev/null |
        grep -iE '^(torch|triton|transformers|numpy|nvidia-cublas|trl|liger|cut-cross|verl|quack) '
    echo "commit ${GIT_HASH:-$(git rev-parse HEAD 2>/dev/null)}"
    "$PYTHON" -c 'import rlsd_kernels; print(rlsd_kernels.available_impls())'
}
export -f about
export PYTHON

for name in "${parts[@]}"; do
    left=$((total - SECONDS))
    case $name in
        environment) part environment 40 bash -c about ;;
        build) part build 150 "$PYTHON" -m bench.bench_loss --device cuda \
            --probe "RLSD fused, cuda" ;;
        # Most of their time is compilation, which takes a core each.
        tests) part tests 200 "$PYTHON" -m pytest tests/gpu -q -p no:cacheprovider --durations=10 \
            -o faulthandler_timeout=60 "${workers[@]}" ;;  # where a test hangs
        kernels) part kernels 200 "$PYTHON" -m pytest tests/kernels/test_triton_impl.py \
            tests/kernels/test_pipeline.py -q -p no:cacheprovider ;;
        sanitize) SANITIZE_SECONDS=$((left / 2)) part sanitize "$left" tests/gpu/sanitize.sh ;;
        stages) part stages 100 "$PYTHON" -m bench.stages --device cuda --out "$OUT" --seconds 85 ;;
        bench) part bench "$left" "$PYTHON" -m bench.bench_loss --device cuda --out "$OUT" \
            --seconds $((left - 30)) "${bench_args[@]}" ;;
    esac
done
ls -l "$OUT"
exit $failed
