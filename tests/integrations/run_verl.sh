#!/usr/bin/env bash
# Test the verl hook against the real verl on the CPU, in an environment of its own: about 2 GB, and
# three minutes on two cores. VENV=folder keeps it for the next run, PYTHON=python3.12 chooses one.
set -euo pipefail
cd "$(dirname "$0")/../.."
scratch=$(mktemp -d)
trap 'rm -rf "$scratch"' EXIT
VENV=${VENV:-$scratch/venv}
if [ ! -e "$VENV/.ready" ]; then
    "${PYTHON:-python3}" -m venv "$VENV"
    "$VENV/bin/python" -m pip install --quiet torch==2.13.0 numpy==2.2.6
    # uvicorn to msgspec: what verl's workers import and its extra verl-core asks for.
    "$VENV/bin/python" -m pip install --quiet torch==2.13.0 numpy==2.2.6 verl==0.9.1 \
        transformers==5.10.4 tensordict==0.10.0 ray==2.60.0 peft==0.21.2 accelerate==1.15.0 \
        TransferQueue==0.1.11 uvicorn==0.54.0 fastapi==0.165.0 cachetools==8.0.1 pyzmq==27.3.0 \
        msgspec==0.22.0 pytest==9.2.0
    touch "$VENV/.ready"
fi
export OMP_NUM_THREADS=1 CUDA_VISIBLE_DEVICES="" PYTHONPATH=. TMPDIR="$scratch"
"$VENV/bin/python" -m pytest -q -p no:cacheprovider tests/integrations/test_verl.py "$@"
"$VENV/bin/python" -c '
from importlib.metadata import version
names = ("verl", "transformers", "tensordict", "torch")
print("verl integration: ok with", ", ".join(f"{n} {version(n)}" for n in names))'
