#!/usr/bin/env bash
# Set-up and launch: ./launch.sh [Hydra overrides], such as ./launch.sh +recipe=full
#                    ./launch.sh --setup   makes the environment, and no more
#
#   NUM_PROCESSES  processes on this machine (default: its GPUs, or 1)
#   NUM_MACHINES, MACHINE_RANK, MAIN_ADDRESS, MAIN_PORT  several machines (default: this one alone)
#   PYTHON         interpreter that makes the environment (default: python3)
#   OMNITUNE_VENV  folder of the environment (default: .venv)
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")"

venv="${OMNITUNE_VENV:-.venv}"
stamp="$venv/.installed"
if [ ! -e "$stamp" ] || [ pyproject.toml -nt "$stamp" ] || [ constraints.txt -nt "$stamp" ]; then
  echo "Setting up $venv (once; a few minutes)" >&2
  [ -x "$venv/bin/python" ] || "${PYTHON:-python3}" -m venv "$venv"
  pip() { "$venv/bin/python" -m pip --disable-pip-version-check --quiet "$@"; }
  pip install -c constraints.txt torch numpy setuptools wheel ninja
  extras=train,demo,test,audio
  if "$venv/bin/python" -c 'import sys, torch; sys.exit(not torch.cuda.is_available())'; then extras="$extras,gpu"; fi
  # DeepSpeed is a source package that looks at the torch already installed.
  DS_BUILD_OPS=0 pip install --no-build-isolation -c constraints.txt -e ".[$extras]"
  # torchaudio's compiled libraries need CUDA's: beside a torch without them, its Python code alone can be imported.
  if "$venv/bin/python" -c 'import sys, torch; sys.exit(bool(torch.version.cuda or torch.version.hip))'; then
    rm -f "$venv"/lib/python*/site-packages/torchaudio/lib/*.so
  fi
  touch "$stamp"
fi
[ "${1:-}" != --setup ] || exit 0
export PATH="$(cd "$venv" && pwd)/bin:$PATH"

if [ -z "${NUM_PROCESSES:-}" ]; then
  NUM_PROCESSES=$(python -c 'import torch; print(max(1, torch.cuda.device_count()))')
fi
NUM_MACHINES="${NUM_MACHINES:-1}"

launcher=(python)
if [ "$NUM_MACHINES" != 1 ]; then
  launcher=(python -m train.launcher --nnodes "$NUM_MACHINES" --node-rank "${MACHINE_RANK:?set MACHINE_RANK, from 0 on}" \
    --nproc-per-node "$NUM_PROCESSES" --master-addr "${MAIN_ADDRESS:?set MAIN_ADDRESS, the address of machine 0}" \
    --master-port "${MAIN_PORT:-29500}")
elif [ "$NUM_PROCESSES" != 1 ]; then
  launcher=(python -m train.launcher --standalone --nproc-per-node "$NUM_PROCESSES")
fi
if [[ " $* " =~ " -m "|" --multirun " ]]; then # a sweep launches its runs itself
  export OMNITUNE_LAUNCHER="${launcher[*]}"
  launcher=(python)
fi
exec "${launcher[@]}" train/main.py "$@"
