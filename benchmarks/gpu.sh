#!/usr/bin/env bash
# Everything that needs a GPU, in the order in which it is worth most: build, tests on CUDA, compute-sanitizer on small
# shapes, benchmarks, one training run. No network: packages beyond torch, numpy, pybind11, cmake, ninja come as wheels.
#   benchmarks/gpu.sh OUT_FOLDER [WHEEL_FOLDER] [DATA_FOLDER]
# Each step has a time limit and leaves its log in OUT_FOLDER; a step that fails does not stop the next.
set -u
out=${1:?folder for the results}
wheels=${2:-}
data=${3:-}
mkdir -p "$out"
cd "$(dirname "$0")/.."
export PYTHONUNBUFFERED=1 OMP_WAIT_POLICY=passive
step() {  # name, seconds, command...
  local name=$1 limit=$2 start=$SECONDS status
  shift 2
  timeout "$limit" "$@" > "$out/$name.log" 2>&1
  status=$?
  echo "$name: exit $status, $((SECONDS - start)) s" | tee -a "$out/summary.txt"
  [ $status -eq 0 ] || tail -n 15 "$out/$name.log"
  return $status
}
nvidia-smi --query-gpu=name,driver_version,memory.total --format=csv > "$out/gpu.csv" 2>&1
git rev-parse HEAD > "$out/commit.txt" 2> /dev/null
site=$(mktemp -d)
export PYTHONPATH=$site
[ -z "$wheels" ] || step wheels 120 python3 -m pip install -q --no-index --no-deps --target "$site" "$wheels"/*.whl
export CMAKE_ARGS="-DPYACCEL_CUDA_ARCHITECTURES=90-real"
step build 400 env PYACCEL_CUDA=on python3 -m pip install --no-build-isolation --no-deps --upgrade --target "$site" . || exit 1
step doctor 60 python3 -m pyaccel doctor
step tests_cuda 400 python3 -m pytest python_tests/cuda python_tests/ops -p no:cacheprovider
step sanitizer_memory 240 compute-sanitizer --tool memcheck --error-exitcode 9 python3 -m pytest python_tests/cuda -k small
step sanitizer_race 240 compute-sanitizer --tool racecheck --error-exitcode 9 python3 -m pytest python_tests/cuda -k small
step bench_neuron 400 python3 -m pytest benchmarks/test_neuron.py -m benchmark --bench-device cuda --results "$out"
step bench_training 300 python3 -m pytest benchmarks/test_training.py -m benchmark --bench-device cuda --results "$out"
imagenet=(--preset paper --image_size 224 --crop_padding 0 --steps 25 --batch_size 32 --norms "[bntt]" --amp bf16 --device cuda)
for model in resnet34 vgg16; do  # memory, seconds and images/s of a step at 224x224: the input of benchmarks/scaling.py
  step "imagenet_$model" 300 python3 -m pyaccel plan bntt --model "$model" "${imagenet[@]}"
  step "imagenet_${model}_recompute" 300 python3 -m pyaccel plan bntt --model "$model" "${imagenet[@]}" --recompute_layers true
done
if [ -n "$data" ]; then
  step train_bntt 500 python3 -m pyaccel run bntt --preset paper --data "$data" --epochs 2 --device cuda --out "$out/bntt"
fi
cat "$out/summary.txt"
