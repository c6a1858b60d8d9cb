#!/usr/bin/env bash
# compute-sanitizer over small_step.py: memory accesses, races, uninitialised reads, barriers.
#   tests/gpu/sanitize.sh [TOOL ...]        default: memcheck racecheck
# Exit status 0 if all are clean or the sanitizer is not installed, which it says.
set -uo pipefail
cd "$(dirname "$0")/../.."
sanitizer=$(command -v compute-sanitizer || ls /usr/local/cuda/bin/compute-sanitizer 2>/dev/null)
if [ -z "$sanitizer" ]; then
    echo "compute-sanitizer is not installed; nothing was checked."
    exit 0
fi
# Every allocation on its own: the caching allocator would hide accesses past a tensor's end.
export PYTORCH_NO_CUDA_MEMORY_CACHING=1
status=0
for tool in "${@:-memcheck racecheck}"; do
    for name in $tool; do
        echo "== $name"
        timeout "${SANITIZE_SECONDS:-240}" "$sanitizer" --tool "$name" --error-exitcode 3 \
            --print-limit 20 "${PYTHON:-python3}" tests/gpu/small_step.py || status=$?
    done
done
exit $status
