#!/usr/bin/env bash
# All figures of a GPU, from one command that needs the repository and its packages alone:
#
#   experiments/gpu_report.sh [FOLDER]
#
# The folder, by default gpu_report, gets what is printed (report.txt) and each benchmark's
# JSON. PyTorch takes part where it is installed, the server where FastAPI is. About ten minutes on one large GPU.
set -uo pipefail
cd "$(dirname "$0")/.."
folder=${1:-gpu_report}
mkdir -p "$folder"
export PYTHONPATH="$PWD:${PYTHONPATH:-}"
# Where float32 results are compared; products of bfloat16 are the same with it.
export JAX_DEFAULT_MATMUL_PRECISION=highest
peers=cnn_jax,plain\ Linen
python3 -c 'import torch' 2>/dev/null && peers+=,PyTorch,torch.compile

section() {
  printf '\n== %s\n\n' "$*"
  "$@" || printf 'failed: exit %s\n' "$?"
}

{
  nvidia-smi --query-gpu=name,driver_version,memory.total --format=csv,noheader
  python3 -c 'import jax; print("JAX", jax.__version__, jax.devices())'
  section python3 experiments/roofline.py --image_size=224 --batch_size=256 --precision=bfloat16
  section python3 experiments/bench_train.py --precision=bfloat16 \
    --shapes=32x256,64x256,224x32,224x256 --seconds=6 --peers="$peers" \
    --json="$folder/train.json"
  section python3 experiments/bench_inference.py --precision=bfloat16 \
    --shapes=224x1,224x32,224x256 --seconds=4 --peers="$peers" \
    --json="$folder/inference.json"
  section python3 experiments/bench_run.py --json="$folder/run.json"
  section python3 experiments/bench_startup.py --rounds=3 --json="$folder/startup.json"
  python3 -c 'import fastapi' 2>/dev/null && for side in 128 224; do
    section python3 experiments/bench_serve.py --peers=cnn_jax --side=$side \
      --json="$folder/serve_$side.json"
  done
} 2>&1 | tee "$folder/report.txt"
