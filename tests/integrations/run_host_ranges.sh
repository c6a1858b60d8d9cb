#!/usr/bin/env bash
# Test both ends of the releases that pyproject.toml allows, each in an environment of its own:
# `oldest` pins the first of transformers, TRL, peft and accelerate, `newest` pins nothing at all.
# The TRL hook against TRL, models, sampling and the trainer, then `rlsd train` with all weights and
# with LoRA, from the installed package. Of each end a line is printed; without GPUs 20 minutes on
# two cores and 1 GB, but 6 GB where the newest torch is one for CUDA.
# ENDS=newest tries one, VENVS=folder keeps them, PYTHON=python3.12 and TORCH=torch==2.13.0 choose.
set -euo pipefail
cd "$(dirname "$0")/../.."
repository=$PWD
scratch=$(mktemp -d)
trap 'rm -rf "$scratch"' EXIT
mkdir -p "${VENVS:=$scratch}"
VENVS=$(cd "$VENVS" && pwd)
export OMP_NUM_THREADS=1 CUDA_VISIBLE_DEVICES="" RLSD_BUILD_CUDA=0
pinned=(transformers==5.17.0 trl==1.14.0 peft==0.21.0 accelerate==1.15.0)
for end in ${ENDS:-oldest newest}; do
    venv=$VENVS/$end
    if [ ! -e "$venv/.ready" ]; then
        "${PYTHON:-python3}" -m venv "$venv"
        "$venv/bin/python" -m pip install --quiet "${TORCH:-torch}" setuptools
        packages=('.[train,rewards,data,log,trl]' pytest)
        [ "$end" = newest ] || packages+=("${pinned[@]}")
        "$venv/bin/python" -m pip install --quiet "${packages[@]}"
        touch "$venv/.ready"
    fi
    "$venv/bin/python" -m pip install --quiet --no-deps --force-reinstall .
    PYTHONPATH=. "$venv/bin/python" -m pytest -q -p no:cacheprovider \
        tests/parity/test_parity_trl.py tests/integrations/test_integrations_trl.py \
        tests/policy/test_models.py tests/sampling tests/test_trainer*.py
    for use_peft in false true; do  # outside of the repository: what was installed runs
        (cd "$scratch" && "$venv/bin/rlsd" train --config "$repository/examples/reasoning_gym.yaml" \
            --scratch_steps 50 --dataset_size 200 --eval_size 8 --max_steps 2 --device cpu \
            --log_completions_steps 1 --validate_every 1 --use_peft "$use_peft" \
            --output_dir "$end-$use_peft" > log.txt 2>&1) || { tail "$scratch/log.txt"; exit 1; }
        (cd "$scratch" && "$venv/bin/rlsd" eval "$end-$use_peft" > /dev/null)
    done
    "$venv/bin/python" - "$end" <<'END'
import platform, sys
from importlib.metadata import version

names = ("trl", "transformers", "peft", "accelerate", "datasets", "torch")
print(f"{sys.argv[1]}: ok with Python {platform.python_version()},",
      ", ".join(f"{name} {version(name)}" for name in names))
END
done
