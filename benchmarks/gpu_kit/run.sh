#!/usr/bin/env bash
# Proves and times cmaclip_fast on this machine's GPU; needs no network, only a python3 with PyTorch and Triton.
#   bash run.sh [OUT] [--only NAME] [--list] [--dry-run]
kit="$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)"
export PYTHONPATH="$kit" PYTHONUNBUFFERED=1 PYTHONDONTWRITEBYTECODE=1
exec "${PYTHON:-python3}" -m benchmarks.gpu_kit.run "$@"
