#!/usr/bin/env bash
# Run TRL's own tests of its GRPOTrainer twice, with TRL's classes and with ours in their place (at
# lambda 0), and compare test for test. Of TRL only the tests are taken, from a checkout; they
# run against an installed TRL, and where that is another release some fail with both.
#     tests/integrations/run_trl_suite.sh ../trl [arguments of pytest]
# REVISION=v1.16.0 picks one of the checkout, TESTS=test_rloo_trainer.py other files, TRL=trl==1.16.0
# the installed release; VENV=folder keeps the environment, PYTHON=python3.12 chooses one. Models and
# data of the hub are replaced by tiny local ones; tests of what has none (images) fail with both.
set -euo pipefail
checkout=$(cd "${1:?say where a checkout of TRL is}" && pwd)
shift
cd "$(dirname "$0")/../.."
repository=$PWD
scratch=$(mktemp -d)
trap 'rm -rf "$scratch"' EXIT
VENV=${VENV:-$scratch/venv}
if [ ! -e "$VENV/.ready" ]; then
    "${PYTHON:-python3}" -m venv "$VENV"
    "$VENV/bin/python" -m pip install --quiet "${TORCH:-torch==2.13.0}" setuptools
    "$VENV/bin/python" -m pip install --quiet '.[train,trl]' "${TRL:-trl==1.16.0}" psutil pytest
    touch "$VENV/.ready"
fi
python=$(cd "$VENV/bin" && pwd)/python
if "$python" -c 'import liger_kernel' 2> /dev/null; then
    echo "$VENV has liger-kernel, whose patches of layers outlive their test; name another VENV."
    exit 2
fi
git -C "$checkout" archive "${REVISION:-HEAD}" tests pyproject.toml | tar -x -C "$scratch"
cd "$scratch"
export OMP_NUM_THREADS=1 CUDA_VISIBLE_DEVICES="" HF_HUB_OFFLINE=1 TRL_EXPERIMENTAL_SILENCE=1
export PYTHONPATH="$repository:$repository/tests/integrations" HF_HOME="$scratch/hf"
"$python" -m trl_suite make "$scratch" > make.txt 2>&1 || { cat make.txt; exit 1; }
for side in theirs ours; do
    RLSD_SUITE=$side "$python" -m pytest -q -p trl_suite -p no:cacheprovider --tb=line \
        --junitxml="$side.xml" "tests/${TESTS:-test_grpo_trainer.py}" "$@" > "$side.txt" 2>&1 || true
    tail -n 1 "$side.txt"
done
[ -z "${KEEP:-}" ] || cp ./*.txt ./*.xml "$KEEP"
"$python" -c 'import torch, transformers, trl; print("TRL", trl.__version__, "with transformers",
transformers.__version__, "and torch", torch.__version__)'
"$python" -m trl_suite compare theirs.xml ours.xml
