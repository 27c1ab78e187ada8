#!/usr/bin/env bash
# Runs the readers' and the chat's tests on the oldest Python and the oldest packages that
# pyproject.toml allows, in an environment of their own: scripts/dev/oldest.sh [FOLDER]
# Tests that compare with transformers are skipped: its oldest version needs newer packages.
set -euo pipefail
cd "$(dirname "$0")/../.."

if [ $# -eq 0 ]; then
    folder=$(mktemp -d)
    trap 'rm -rf "$folder"' EXIT
fi
venv=${1:-$folder/venv}
python3.11 -m venv "$venv"
pip() { "$venv/bin/python" -m pip --disable-pip-version-check "$@" -q -c constraints-oldest.txt; }
packages=$("$venv/bin/python" -c 'import sysconfig; print(sysconfig.get_path("platlib"))')

# 1. PyTorch. For Linux PyPI has a build with CUDA alone, and that needs 3 GB of NVIDIA's libraries,
#    of which a CPU calls two small ones. The others are replaced by empty libraries here, and
#    Python binds the functions of a library when they are called, not when it is loaded.
pip install --no-deps torch
about=$(echo "$packages"/torch-*.dist-info/METADATA)
if grep -q '^Requires-Dist: nvidia-' "$about"; then
    called=$(grep -oE 'nvidia-cuda-(runtime|cupti)-[a-z0-9]+==[0-9.]+' "$about" | sort -u)
    sed -i -E '/^Requires-Dist: (nvidia|cuda|triton)/d' "$about"
    pip install --no-deps $called
    needed='s/.*NEEDED.*\[(lib(cu|nccl|nvshmem)[^]]*)\]/\1/p'
    for name in $(readelf -d "$packages"/torch/lib/*.so | sed -nE "$needed" | sort -u); do
        case $name in
        libcuda* | libcupti*) ;;
        *) gcc -shared -x c /dev/null -Wl,-soname,"$name" -o "$packages/torch/lib/$name" ;;
        esac
    done
    echo 'import os, sys; sys.setdlopenflags(os.RTLD_LAZY)' > "$packages/bind_when_called.pth"
fi

# 2. The other packages, and the tests.
pip install -e ".[chat]" pytest pytest-xdist hypothesis jsonschema mistral-common
"$venv/bin/python" -m pip check --disable-pip-version-check
"$venv/bin/python" -m pytest -n 2 --dist loadfile \
    tests/checkpoints tests/chat tests/quantization tests/test_tokenizer.py tests/test_config.py
