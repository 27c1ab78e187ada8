#!/usr/bin/env bash
# Runs the readers' and the chat's tests on the oldest Python and the oldest packages that
# pyproject.toml allows, in an environment of their own: scripts/dev/oldest.sh [FOLDER]
# Tests that compare with transformers are skipped: its oldest version needs newer packages.
set -euo pipefail
cd "$(dirname "$0")/../.."

venv=${1:-$(mktemp -d)/venv}
python3.11 -m venv "$venv"
"$venv/bin/pip" install -q -c constraints-oldest.txt \
    -e ".[chat]" pytest pytest-xdist jsonschema mistral-common
"$venv/bin/python" -m pytest -n 2 --dist loadfile \
    tests/checkpoints tests/chat tests/quantization tests/test_tokenizer.py tests/test_config.py
