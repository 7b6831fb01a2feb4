#!/usr/bin/env bash
# One call for a card: builds, tests, runs compute-sanitizer on a part, times against what else is there, and writes
# bench/results/<gpu>.md and .json with predicted times beside the measured ones. Needs a GPU, nvcc and torch; no
# network, and nothing prepared. What is missing is said and passed over. Ends within ten minutes: every step has a
# share of them.
# Usage: bench/gpu_check.sh        GPU_CHECK_SECONDS=600, PYTHON=python3, GPU_CHECK_RESULTS=bench/results
set -uo pipefail
cd "$(dirname "$0")/.." || exit 1

python=${PYTHON:-python3}
results=${GPU_CHECK_RESULTS:-bench/results}
budget=${GPU_CHECK_SECONDS:-600}
logs=$(mktemp -d)
export PYTHONPATH=$PWD/python${PYTHONPATH:+:$PYTHONPATH} PYTHON=$python PYTHONDONTWRITEBYTECODE=1

say() { printf '\n=== %s (%d s)\n' "$*" "$SECONDS"; }
left() { echo $((budget - SECONDS > 0 ? budget - SECONDS : 0)); }
note() { printf '%s\t%s\t%s\n' "$1" "$2" "$3" >> "$logs/steps.tsv"; } # step, outcome, detail
pass_over() {
  say "$1: passed over: $2"
  note "$1" "not run" "$2"
}
has_module() {
  "$python" -c "import importlib.util, sys; sys.exit(importlib.util.find_spec('$1') is None)" 2> /dev/null
}

# step NAME SECONDS COMMAND...: at most so long, and never beyond the budget. A failure is noted; the next step runs.
step() {
  local name=$1 most=$2 limit begun=$SECONDS log status outcome
  shift 2
  log=$logs/${name//[^a-zA-Z0-9]/_}.log
  limit=$(left)
  limit=$((limit < most ? limit : most))
  if [ "$limit" -lt 3 ]; then
    pass_over "$name" "no time is left of $budget s"
    return 1
  fi
  say "$name (at most $limit s)"
  timeout --kill-after=5 "$limit" "$@" > "$log" 2>&1
  status=$?
  tail -n "${LINES_SHOWN:-12}" "$log"
  case $status in
    0) outcome=passed ;;
    124 | 137) outcome="stopped after $limit s" ;;
    *) outcome="failed ($status)" ;;
  esac
  note "$name" "$outcome" "$((SECONDS - begun)) s; $(grep -v '^\s*$' "$log" | tail -n 1 | cut -c 1-150)"
  echo "--- $name: $outcome"
  [ "$status" -eq 0 ]
}

report() {
  say "results"
  "$python" bench/gpu_report.py "$logs" "$results" || echo "no results were written; the logs are in $logs"
}

say "what is here"
gpu=""
if command -v nvidia-smi > /dev/null; then
  gpu=$(nvidia-smi --query-gpu=name,driver_version,clocks.max.sm,power.limit --format=csv,noheader 2>&1 | head -n 1)
fi
echo "${gpu:-nvidia-smi tells of no GPU}"
note "nvidia-smi" "${gpu:-none}" ""
if ! command -v "$python" > /dev/null; then
  echo "there is no $python: nothing can be run. PYTHON names one that has torch"
  exit 1
fi
about='import torch; print("torch", torch.__version__, "CUDA", torch.version.cuda, torch.cuda.is_available())'
if ! torch=$("$python" -c "$about" 2> "$logs/torch"); then
  echo "torch cannot be imported: $(tail -n 1 "$logs/torch"). PYTHON names the interpreter that has it"
  exit 1
fi
echo "$torch"
note "torch" "$torch" ""
nvcc=${CUDACXX:-$(command -v nvcc || command -v /usr/local/cuda/bin/nvcc || true)}
echo "nvcc: ${nvcc:-none}"
note "nvcc" "$([ -n "$nvcc" ] && "$nvcc" --version | sed -n 's/.*\(V[0-9.]*\)$/\1/p' || echo none)" ""

case $torch in
  *True) sees_gpu=1 ;;
  *) sees_gpu= ;;
esac

arch=""
if [ -n "$sees_gpu" ]; then
  arch=$("$python" bench/architecture.py)
fi
if [ -z "$nvcc" ]; then
  pass_over build "there is no nvcc (CUDACXX names one)"
elif [ -z "$sees_gpu" ]; then
  pass_over build "torch sees no GPU, so that there is nothing to build for"
elif [ "$(command -v cmake)" ] && [ "$(command -v ninja)" ] && has_module pybind11 &&
  step configure 40 cmake -G Ninja -S . -B build/gpu_check -DMOE_OPS_CUDA=ON -DCMAKE_CUDA_COMPILER="$nvcc" \
    -DCMAKE_CUDA_ARCHITECTURES="$arch-real" -DPython_EXECUTABLE="$(command -v "$python")" \
    -DCMAKE_INSTALL_PREFIX="$PWD/python"; then
  step build 240 ninja -C build/gpu_check install
else
  step build 240 bench/build_here.sh "$arch"
fi

if ! "$python" -c 'import moe_ops' 2> "$logs/import"; then
  pass_over "all that needs moe_ops" "$(tail -n 1 "$logs/import")"
elif [ -z "$sees_gpu" ]; then
  pass_over "all that needs a GPU" "torch sees none"
else
  step diagnosis 60 "$python" -m moe_ops
  if has_module pytest && has_module hypothesis; then
    pytest=("$python" -m pytest -q -p no:cacheprovider)
    step "tests on the device" $((($(left) - 200) / 2)) "${pytest[@]}" --maxfail 20 --device cuda \
      tests/test_{route,plan,permute,combine,grouped_gemm,moe_mlp}.py
    [ -d tests/gpu ] && step "tests of the stages" $(($(left) > 260 ? 90 : 30)) "${pytest[@]}" tests/gpu
  else
    pass_over tests "pytest or hypothesis is not installed; the diagnosis has checked every operator"
  fi
  if sanitizer=$(command -v compute-sanitizer || command -v /usr/local/cuda/bin/compute-sanitizer); then
    for tool in memcheck racecheck; do
      step "compute-sanitizer $tool" 40 "$sanitizer" --tool "$tool" --error-exitcode 9 "$python" -m moe_ops
    done
  else
    pass_over compute-sanitizer "it is not installed"
  fi
  # What is left, shared out by how much there is to tell; each bench writes its rows as it goes.
  LINES_SHOWN=60
  benches=(moe grouped_gemm permute combine route plan)
  shares=(45 40 35 50 60 100)
  for i in "${!benches[@]}"; do
    verb=${benches[i]}
    step "bench $verb" $((($(left) - 15) * shares[i] / 100)) "$python" bench/bench_"$verb".py --device cuda \
      --dtype bfloat16 --seconds 0.8 --json "$logs/bench_$verb.json"
  done
fi
report
say "done"
