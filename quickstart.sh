#!/usr/bin/env bash
# Sets itself up in .venv, trains the quickstart model on Shakespeare, and prints samples.
set -euo pipefail
cd "$(dirname "$0")"
python=${PYTHON:-python3.11}
command -v "$python" >/dev/null || python=python3
"$python" -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { echo "jaxllm needs Python 3.11 or newer; set PYTHON=/path/to/python" >&2; exit 1; }

if [ ! -x .venv/bin/jaxllm ]; then
  "$python" -m venv .venv
  .venv/bin/python -m pip install -q --disable-pip-version-check -e ".[plot,tensorboard]"
fi
exec .venv/bin/python train.py configs/quickstart.py "$@"
