#!/usr/bin/env bash
# Measures a GPU within 15 minutes, the most important metrics first.
#
#   bash experiments/benchmarks/gpu_report.sh first  [FOLDER]    up to 560 s
#   bash experiments/benchmarks/gpu_report.sh second [FOLDER]    up to 220 s, in the same 15 minutes
#   bash experiments/benchmarks/gpu_report.sh --try all [FOLDER] all parts, small, on the CPU
#   bash experiments/benchmarks/gpu_report.sh --list             the parts: name, command, seconds, program
#
# It needs the repository, no network, and Python with the packages of pyproject.toml.
# Missing packages are installed from the wheels in .whl/, if there are any. FOLDER is
# $OUT or gpu_report by default. It gets three files, which grow with each part:
#
#   report.md     tables for experiments/RESULTS.md
#   results.json  all numbers
#   log.txt       everything that was printed
#
# A part that fails or uses up its time does not stop the others; it is named at the end, and
# the exit status is 1. ONLY="run inference" runs only these parts. PyTorch takes part if PYTHON
# has it, or PEER_PYTHON, an interpreter of another environment.
set -uo pipefail
cd "$(dirname "$0")/../.."
export PYTHON=${PYTHON:-python3}
peer_python=${PEER_PYTHON:-$PYTHON}
trial= list=
case ${1:-} in
  --try) trial=yes; shift ;;
  --list) list=yes; set -- all ;;
esac
command=${1:-}
case $command in
  first | second | all) ;;
  *) sed -n '2,8s/^# \{0,1\}//p' "$0" >&2; exit 2 ;;
esac
folder=${2:-${OUT:-gpu_report}}

if [[ $trial ]]; then
  export JAX_PLATFORMS=cpu
  steps=16x4,16x2 small_steps=16x3 inferences=16x1,16x2 seconds=0.1
  run=(--images=120 --image_size=16 --epochs=2) spec_batch=8 fast_batch=16
  check=(--image_size=16 --batch_size=4 --rounds=1)
  seeds=(--shapes=16x2 --counts=2 --rounds=2)
  serve=(--side=32 --rounds=1 --seconds=0.3)
  tests=(tests/training/test_loss.py tests/training/test_metrics.py) workers=0
else
  steps=224x256,224x32 small_steps=32x256,64x256 inferences=224x1,224x32,224x256 seconds=4.5
  run=(--images=10000 --image_size=224 --epochs=45) spec_batch=32 fast_batch=256
  check=(--image_size=224 --batch_size=256)
  seeds=(--shapes=32x32,224x32 --counts=8)
  serve=(--side=224 --rounds=1 --seconds=3)
  tests=(
    tests/models tests/training/test_step.py tests/data/test_augment.py tests/data/test_mix.py
    tests/training/test_programs.py tests/explain/test_maps.py tests/training/test_loss.py tests/training/test_metrics.py
  )
  workers=8
fi

work=${TMPDIR:-/tmp}/cnn_jax_gpu_report${trial:+_try}
if [[ ! $list ]]; then
  mkdir -p "$work" "$folder"
  find "$work" -maxdepth 1 -type f ! -name roofline.json -delete
  site=$work/site
  if compgen -G '.whl/*.whl' >/dev/null && [[ ! -e $site ]]; then
    "$PYTHON" -m pip install -q --no-index --no-deps --no-compile --no-cache-dir --upgrade \
      --target "$site" .whl/*.whl || exit
  fi
  [[ -e $site ]] && PYTHONPATH=$site${PYTHONPATH:+:$PYTHONPATH}
  export PYTHONPATH=$PWD${PYTHONPATH:+:$PYTHONPATH}
  # Images and compiled programs are shared by the parts, and by both commands on one host.
  export CNN_JAX_CACHE=$work/cache JAX_COMPILATION_CACHE_DIR=$work/xla
  export PYTHONUNBUFFERED=1 JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS=0.5
  # This command fails and ends the script if JAX finds no GPU.
  "$PYTHON" experiments/benchmarks/gpu_table.py --facts "$work/facts.json" || exit
fi
torch=
{ [[ $list ]] || "$peer_python" -c 'import torch' 2>/dev/null; } && torch=yes

failed=()
# part NAME first|second SECONDS PROGRAM...: runs a part, if it belongs to this command.
part() {
  local name=$1 group=$2 limit=$3 began=$SECONDS
  shift 3
  if [[ $list ]]; then
    printf '%s\t%s\t%s\t%s\n' "$name" "$group" "$limit" "$*"
    return
  fi
  [[ $command == all || $command == "$group" ]] || return
  [[ ! ${ONLY:-} || " $ONLY " == *" $name "* ]] || return
  [[ $trial ]] && limit=900
  printf '\n== %s (at most %s s)\n\n' "$name" "$limit"
  timeout --kill-after=12 "$limit" "$@" 2>&1 | tee "$work/$name.log"
  local status=${PIPESTATUS[0]}
  ((status == 0)) || failed+=("$name (exit $status)")
  printf '{"name": "%s", "exit": %s, "seconds": %s, "limit": %s}\n' \
    "$name" "$status" $((SECONDS - began)) "$limit" >>"$work/parts.jsonl"
  "$PYTHON" experiments/benchmarks/gpu_table.py "$work" "$folder"
}

# bench SCRIPT FLAG: sets the array `bench` to the command of a benchmark that includes PyTorch.
bench() {
  bench=("$PYTHON" "experiments/benchmarks/$1" "$2" --precision=bfloat16 "--seconds=$seconds"
    "--peer_python=$peer_python")
  [[ -e $work/roofline.json ]] && bench+=("--peaks=$work/roofline.json")
}

main() {
  local own='cnn_jax,plain Linen' both=cnn_jax bench
  [[ $torch ]] && own+=,PyTorch both+=,PyTorch

  part roofline first 25 "$PYTHON" experiments/benchmarks/roofline.py --precision=bfloat16 \
    "--shapes=$steps" "--json=$work/roofline.json"
  # The order of float32 operations changes the results more on a GPU than on a CPU.
  bench bench_train.py --tolerance=1e-3
  part train first 100 "${bench[@]}" "--shapes=$steps" "--peers=$own" "--json=$work/train.json"
  [[ $torch ]] && part train_compiled first 65 "${bench[@]}" "--shapes=$steps" \
    --peers=cnn_jax,torch.compile "--json=$work/train_compiled.json"
  part run first 150 "$PYTHON" experiments/benchmarks/bench_run.py --config=spec_224 "${run[@]}" \
    "--batch_sizes=$spec_batch" --steps_per_execution=0 "--json=$work/run.json"
  part check first 80 "$PYTHON" experiments/benchmarks/check_step.py "${check[@]}" "--json=$work/check.json"
  part run_fast first 80 "$PYTHON" experiments/benchmarks/bench_run.py --config=fast "${run[@]}" \
    "--batch_sizes=$fast_batch" --steps_per_execution=0 "--json=$work/run_fast.json"
  bench bench_inference.py --tolerance=1e-4
  part inference first 60 "${bench[@]}" "--shapes=$inferences" "--peers=$both" \
    "--json=$work/inference.json"

  # From here on several processes share the GPU, so no process may preallocate its memory.
  export XLA_PYTHON_CLIENT_PREALLOCATE=false
  part tests second 75 env "JAX_PLATFORMS=${JAX_PLATFORMS:-cuda,cpu}" "$PYTHON" -m pytest -v \
    -p no:cacheprovider -n "$workers" --dist=worksteal "${tests[@]}"
  part serve second 55 "$PYTHON" experiments/benchmarks/bench_serve.py --peers=cnn_jax "${serve[@]}" \
    "--json=$work/serve.json"
  bench bench_train.py --tolerance=1e-3
  part train_small second 50 "${bench[@]}" "--shapes=$small_steps" "--peers=$own" \
    "--json=$work/train_small.json"
  part seeds second 40 "$PYTHON" experiments/benchmarks/bench_seeds.py --precision=bfloat16 "${seeds[@]}" \
    "--json=$work/seeds.json"

  [[ $list ]] && return
  printf '\n'
  cat "$folder/report.md"
  if ((${#failed[@]})); then
    printf '\nfailed or out of time: %s\n' "$(printf '%s; ' "${failed[@]}")"
    return 1
  fi
}

if [[ $list ]]; then
  main
else
  main 2>&1 | tee "$folder/log.txt"
fi
