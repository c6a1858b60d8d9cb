#!/usr/bin/env bash
# Test the ms-swift plugin against the real ms-swift, in an environment of its own: about 2 GB, and
# five minutes on two cores. VENV=folder keeps it for the next run, PYTHON=python3.12 chooses one.
set -euo pipefail
cd "$(dirname "$0")/../.."
scratch=$(mktemp -d)
trap 'rm -rf "$scratch"' EXIT
VENV=${VENV:-$scratch/venv}
if [ ! -e "$VENV/.ready" ]; then
    "${PYTHON:-python3}" -m venv "$VENV"
    "$VENV/bin/python" -m pip install --quiet torch==2.13.0 numpy==2.2.6
    # ms-swift imports msgspec without asking for it.
    "$VENV/bin/python" -m pip install --quiet torch==2.13.0 numpy==2.2.6 ms-swift==4.6.0 \
        trl==0.29.1 transformers==5.19.0 accelerate==1.15.0 peft==0.20.0 datasets==4.8.4 \
        msgspec==0.19.0 pytest==9.2.0
    touch "$VENV/.ready"
fi
export OMP_NUM_THREADS=1 CUDA_VISIBLE_DEVICES="" PYTHONPATH=. TMPDIR="$scratch"
"$VENV/bin/python" -m pytest -q -p no:cacheprovider tests/integrations/test_ms_swift.py "$@"
"$VENV/bin/python" -c '
from importlib.metadata import version
names = ("ms-swift", "trl", "transformers", "peft", "torch")
print("ms-swift integration: ok with", ", ".join(f"{n} {version(n)}" for n in names))'
