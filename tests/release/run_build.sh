#!/usr/bin/env bash
# Build the sdist and from it the wheel, check both, and try the wheel in a fresh environment with
# torch and numpy alone, outside of the repository: 1 GB, and some minutes on two cores. Needs
# neither nvcc nor a GPU. PYTHON=python3.12 and TORCH=torch==2.13.0 choose, DIST=folder keeps both.
set -euo pipefail
cd "$(dirname "$0")/../.."
scratch=$(mktemp -d)
trap 'rm -rf "$scratch" rlsd.egg-info' EXIT
DIST=${DIST:-$scratch/dist}
export RLSD_BUILD_CUDA=0 OMP_NUM_THREADS=1 CUDA_VISIBLE_DEVICES=""
"${PYTHON:-python3}" -m venv "$scratch/tools"
"$scratch/tools/bin/python" -m pip install --quiet build twine
"$scratch/tools/bin/python" -m build --outdir "$DIST" . > "$scratch/build.log" 2>&1 ||
    { tail -20 "$scratch/build.log"; exit 1; }
! grep -i 'installing.*torch\|collecting torch' "$scratch/build.log"
"$scratch/tools/bin/twine" check --strict "$DIST"/*
mkdir "$scratch/sdist"
tar xzf "$DIST"/rlsd-*.tar.gz --strip-components=1 -C "$scratch/sdist"
for name in README.md LICENSE pyproject.toml setup.py csrc; do
    diff -r "$name" "$scratch/sdist/$name"
done
[ "$(cd "$DIST" && ls ./*.whl)" = "$(cd "$DIST" && ls ./rlsd-*-py3-none-any.whl)" ]

"${PYTHON:-python3}" -m venv "$scratch/bare"
"$scratch/bare/bin/python" -m pip install --quiet "${TORCH:-torch}" numpy
"$scratch/bare/bin/python" -m pip install --quiet --no-index "$DIST"/rlsd-*-py3-none-any.whl
cp tests/bare_install.py "$scratch/bare_install.py"
cd "$scratch"
"$scratch/bare/bin/rlsd" --help > /dev/null
"$scratch/bare/bin/python" -I bare_install.py sdist/README.md
# What every sentence about a missing package says: it needs no index where rlsd is installed.
"$scratch/bare/bin/python" -m pip install --dry-run 'rlsd[rewards]' 2>&1 | grep -q 'Would install.*math-verify'
"$scratch/bare/bin/python" -c '
from importlib.metadata import version
names = ("rlsd", "torch", "numpy")
print("release: ok,", ", ".join(f"{n} {version(n)}" for n in names))'
