#!/usr/bin/env bash
# Run the checks and benchmarks that need a GPU, in at most eight minutes:
#     benchmarks/gpu/run.sh [--tiny] [--parts NAME…] [--out DIR] [--seconds N]
# Wheels in .whl/, if it exists, are installed first, without network. See benchmarks/gpu/README.md.
set -euo pipefail
cd "$(dirname "$0")/../.."
python=${PYTHON:-python3}
path=$PWD
if compgen -G '.whl/*.whl' >/dev/null; then
  site=$(mktemp -d)
  "$python" -m pip install -q --no-index --no-deps --no-compile --no-cache-dir --target "$site" .whl/*.whl
  path=$path:$site
fi
export PYTHONPATH=$path${PYTHONPATH:+:$PYTHONPATH} PYTHONUNBUFFERED=1 HF_HUB_OFFLINE=1 HF_DATASETS_OFFLINE=1
export HF_HUB_DISABLE_TELEMETRY=1 TOKENIZERS_PARALLELISM=false
exec "$python" benchmarks/gpu/run.py "$@"
