#!/usr/bin/env bash
# What can be proven of the GPU path on a machine without a GPU; the rest is said at the end.
#   tests/gpu/rehearse.sh                            torch 2.14.1
#   TORCH_VERSION=2.11.0 tests/gpu/rehearse.sh       another one
#   PARTS="memory" tests/gpu/rehearse.sh             some of: headers build kernels memory tests
# Needs nvcc and g++, and once some 5 GB for an environment of its own, a CUDA build of torch:
# $VENV, or build/rehearsal/torch-<version>. Output: bench/results/rehearsal/torch-<version>.txt.
set -uo pipefail
cd "$(dirname "$0")/../.."
version=${TORCH_VERSION:-2.14.1}
oldest=2.10.0
parts=${PARTS:-headers build memory kernels tests}
venv=${VENV:-build/rehearsal/torch-$version}
out=${OUT:-bench/results/rehearsal/torch-$version.txt}
headers=build/rehearsal/headers-$oldest
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1} CUDA_VISIBLE_DEVICES="" PYTHONPATH=.:tests
mkdir -p "$(dirname "$out")" build/rehearsal

if [ ! -x "$venv/bin/python" ]; then  # Triton 3.6's interpreter takes no newer numpy
    "${PYTHON:-python3}" -m venv "$venv" &&
        "$venv/bin/python" -m pip install --quiet "torch==$version" "numpy<2.4" pytest || exit 1
fi
if [[ " $parts " == *" headers "* && ! -d $headers ]]; then
    # The macOS wheel is the smallest that has them; these headers are the same everywhere.
    "$venv/bin/python" -m pip download --quiet --no-deps --only-binary=:all: --python-version 3.12 \
        --platform macosx_11_0_arm64 --dest build/rehearsal "torch==$oldest" &&
        "$venv/bin/python" -m zipfile -e build/rehearsal/torch-"$oldest"-*.whl "$headers" || exit 1
    rm -f build/rehearsal/torch-"$oldest"-*.whl
fi

failed=0
part() {
    local name=$1
    shift
    [[ " $parts " == *" $name "* ]] || return 0
    echo
    echo "== $name"
    "$@" || { failed=1; echo "FAILED: $name"; }
}
says() {
    [[ " $parts " != *" $1 "* ]] || echo "- $2."
}
compile_api() {
    RLSD_TORCH_HEADERS=$headers/torch/include "$venv/bin/python" -m pytest -q -p no:cacheprovider \
        tests/kernels/test_cuda_impl.py -k "oldest_torch or as_for_a_gpu" | tail -1 &&
        echo "api.cpp compiles against the headers of torch $oldest and $version"
}
proven() {
    "$venv/bin/python" -u tests/gpu/rehearse.py "$@"
}
dry_run() {
    PATH="$PWD/$venv/bin:$PATH" "$venv/bin/python" tests/gpu/posing.py -m pytest tests/gpu -q \
        -p no:cacheprovider -p no:warnings --tb=line
}
{
    echo "Rehearsal at $(git rev-parse HEAD)$([ -z "$(git status --porcelain -- csrc rlsd_kernels \
        tests)" ] || echo ' and changes'), $(nvcc --version | grep release | sed 's/.*release/nvcc/')"
    "$venv/bin/python" -c 'import sys, torch, triton
print(f"torch {torch.__version__}, Triton {triton.__version__}, Python {sys.version.split()[0]}")'
    part headers compile_api
    read -ra some <<< "$(for x in build memory kernels; do
        [[ " $parts " == *" $x "* ]] && echo -n "$x "; done)"
    [ ${#some[@]} -eq 0 ] || proven "${some[@]}" || { failed=1; echo "FAILED: ${some[*]}"; }
    part tests dry_run
    echo
    echo "Shown by the parts above that did not fail:"
    says headers "csrc/api.cpp compiles against the oldest and the newest torch"
    says build "csrc compiles, links and loads for every architecture"
    says memory "PyTorch takes every operation of the plans with CUDA's dtypes, shapes and devices, its
  fp32 results of 16-bit GEMMs included; bytes are those of tensors"
    says kernels "Triton binds, specialises and compiles every launch for each architecture"
    says tests "tests/gpu holds on the plans and operand dtypes of a GPU, csrc and Triton's kernels
  emulated"
    cat << 'END'

Only a card can show: that the machine code computes what the emulation does; how tensor cores round
and cuBLAS sums; races, barriers and memory outside of tensors as the hardware sees them; streams,
CUDA graphs, several devices; waits for the host; the caching allocator and cuBLAS's workspace; that
nothing is compiled anew; autograd's engine on a device thread; time.
END
    exit $failed
} 2>&1 | sed -u "s#$PWD/##g; s#$(cd "$venv" && pwd)/##g; s#${TMPDIR:-/tmp}/##g; s# with /[^ ]*/nvcc# with nvcc#" |
    tee "$out"
exit "${PIPESTATUS[0]}"
