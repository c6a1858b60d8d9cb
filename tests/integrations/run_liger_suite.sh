#!/usr/bin/env bash
# Run liger-kernel's own tests of its GRPO loss with our class in place of Liger's (at lambda 0), in an
# environment of its own, 2 GB. On two cores -k "not 1024" leaves out what takes most of an hour.
# VENV=folder keeps the environment, PYTHON=python3.12 chooses one; arguments go to pytest.
set -euo pipefail
cd "$(dirname "$0")/../.."
repository=$PWD
scratch=$(mktemp -d)
trap 'rm -rf "$scratch"' EXIT
VENV=${VENV:-$scratch/venv}
if [ ! -e "$VENV/.ready" ]; then
    "${PYTHON:-python3}" -m venv "$VENV"
    "$VENV/bin/python" -m pip install --quiet torch==2.13.0 numpy==2.2.6 setuptools
    "$VENV/bin/python" -m pip install --quiet liger-kernel==0.8.5 transformers==5.23.0 pytest==9.2.0
    touch "$VENV/.ready"
fi
python=$(cd "$VENV/bin" && pwd)/python
cd "$scratch"
"$python" -m pip download --quiet --no-deps --no-build-isolation --no-binary :all: liger-kernel==0.8.5
tar -xzf liger_kernel-0.8.5.tar.gz
mv liger_kernel-0.8.5/test .
cat > in_its_place.py <<'END_OF_PLUGIN'
import liger_kernel.chunked_loss

from rlsd.integrations.liger import LigerFusedLinearRLSDLoss


class InItsPlace(LigerFusedLinearRLSDLoss):
    def __init__(self, *args, **named):
        super().__init__(*args, rlsd_lambda=0.0, **named)


liger_kernel.chunked_loss.LigerFusedLinearGRPOLoss = InItsPlace
END_OF_PLUGIN
export OMP_NUM_THREADS=1 CUDA_VISIBLE_DEVICES="" TORCHDYNAMO_DISABLE=1 PYTHONPATH="$repository:$scratch"
"$python" -m pytest -q -rf -p in_its_place -p no:cacheprovider \
    test/chunked_loss/test_grpo_loss.py "$@"
