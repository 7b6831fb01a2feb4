#!/usr/bin/env bash
# Compiles the libraries in place (python/moe_ops) for the card of this machine, with g++, nvcc and torch's headers
# alone: what CMakeLists.txt does, for a machine without cmake, ninja or pybind11, and for one architecture.
# Usage: bench/build_here.sh [architecture]     by default torch's device 0, as in 80 or 90a
set -euo pipefail
cd "$(dirname "$0")/.."
root=$PWD out=$PWD/python/moe_ops work=$PWD/build/here python=${PYTHON:-python3}
jobs=${MAX_JOBS:-$(nproc)}

read -r torch version abi include < <($python - << 'PY'
import sysconfig, torch
print(torch.__path__[0], torch.__version__, sysconfig.get_config_var("EXT_SUFFIX"), sysconfig.get_paths()["include"])
PY
)
arch=${1:-$("$python" bench/architecture.py)}
nvcc=${CUDACXX:-${CUDA_HOME:+$CUDA_HOME/bin/}nvcc}
nvcc=$(command -v "$nvcc" || command -v /usr/local/cuda/bin/nvcc)
release=$($nvcc --version | sed -n 's/.*release \([0-9.]*\),.*/\1/p')
toolkit=$($nvcc --dryrun x.cu 2>&1 | sed -n 's/^#\$ TOP=//p')
runtime=libcudart.so.${release%%.*}
cudart=$(find -L "$toolkit/lib64" "$toolkit/lib" "$toolkit/targets" -name "$runtime" 2> /dev/null | head -1)
[ -n "$cudart" ] || { echo "no $runtime was found beside $nvcc" >&2; exit 1; }
headers=$(dirname "$(find -L "$toolkit/include" "$toolkit/targets" -name cuda_runtime.h 2> /dev/null | head -1)")
built="sm_$arch"

mkdir -p "$work"
cxx=(g++ -std=c++20 -O3 -fPIC -fvisibility=hidden -fvisibility-inlines-hidden -w -Wno-psabi -Icsrc)
stable=(-isystem "$torch/include" -DTORCH_TARGET_VERSION=0x020a000000000000)
contract=(-ffp-contract=fast -fno-math-errno -fno-trapping-math)
avx2=(-mavx2 -mfma -mf16c -mbmi2)
avx512=("${avx2[@]}" -mavx512f -mavx512bw -mavx512dq -mavx512vl -mprefer-vector-width=512)
sets=(portable)
[ "$(uname -m)" = x86_64 ] && sets+=(avx2 avx512 avx512_bf16)

# Each line of the list is one object and the command that makes it; they are run side by side.
list=$work/commands
: > "$list"
object() { local name=$1; shift; { printf '%q ' "$@" -c -o "$work/$name.o"; echo; } >> "$list"; }

shopt -s nullglob
launch() {  # source, architecture
  object "launch_$(echo "${1#csrc/cuda/launch/}" | tr / _ | sed 's/\.cu$//')" "$nvcc" -std=c++20 -O3 \
    -gencode "arch=compute_$2,code=sm_$2" -Xcompiler -fPIC,-fvisibility=hidden -Icsrc -Icsrc/cuda "$1"
}
for source in csrc/cuda/launch/*.cu; do launch "$source" "$arch"; done
for source in csrc/cuda/launch/sm90/*.cu; do launch "$source" 90a; done  # what other cards have no instructions for
isa() {
  object "isa_$1" "${cxx[@]}" "${contract[@]}" -DMOE_ISA="$1" -DMOE_VECTOR_BYTES="$2" "${@:3}" csrc/cpu/isa/kernels.cpp
}
isa portable 16
if [ "$(uname -m)" = x86_64 ]; then
  isa avx2 32 "${avx2[@]}"
  isa avx512 64 "${avx512[@]}"
  isa avx512_bf16 64 "${avx512[@]}" -mavx512bf16
fi
object library "${cxx[@]}" "${stable[@]}" csrc/ops/library.cpp
for source in isa roof scratch; do
  object "kernels_$source" "${cxx[@]}" "${stable[@]}" -Icsrc/cpu "${sets[@]/#/-DMOE_HAS_}" \
    '-DMOE_BF16_FEATURE="avx512bf16"' "csrc/cpu/$source.cpp"
done
for source in csrc/cpu/*.cpp; do
  case $(basename "$source" .cpp) in isa | roof | scratch) continue ;; esac
  object "cpu_$(basename "$source" .cpp)" "${cxx[@]}" "${stable[@]}" -Icsrc/cpu "$source"
done
cuda=(-isystem "$headers" -Icsrc/cuda "-DMOE_BUILT_FOR_CUDA=\"$built\"")
for source in csrc/ops/*.cpp; do
  name=$(basename "$source" .cpp)
  [ "$name" = library ] && continue
  object "op_cpu_$name" "${cxx[@]}" "${stable[@]}" -Icsrc/cpu "$source"
  object "op_cuda_$name" "${cxx[@]}" "${stable[@]}" "${cuda[@]}" "$source"
done
object device "${cxx[@]}" "${stable[@]}" "${cuda[@]}" -DUSE_CUDA csrc/cuda/device.cpp
object module "${cxx[@]}" -isystem "$torch/include" -isystem "$include" "-DMOE_BUILT_WITH_TORCH=\"$version\"" \
  '-DMOE_BUILT_FOR_TORCH="2.10"' "-DMOE_BUILT_BY=\"GNU $(g++ -dumpfullversion), bench/build_here.sh\"" \
  "-DMOE_BUILT_FOR_MACHINE=\"$(uname -s) $(uname -m)\"" "-DMOE_BUILT_FOR_CPU=\"${sets[*]}\"" \
  "-DMOE_BUILT_FOR_CUDA=\"$built\"" "-DMOE_BUILT_WITH_CUDA=\"$release\"" '-DMOE_BUILT_WITH_SANITIZERS=""' \
  csrc/python/module.cpp
xargs -P "$jobs" -d '\n' -n 1 bash -c < "$list"

# torch's CUDA library as far as it is used: the one that is there at run time is loaded already.
visible='extern "C" __attribute__((visibility("default")))'
echo "$visible void aoti_torch_get_current_cuda_stream() {}" > "$work/torch_cuda.cpp"
g++ -shared -fPIC "$work/torch_cuda.cpp" -o "$work/libtorch_cuda.so" -Wl,-soname,libtorch_cuda.so
link=(g++ -shared "-Wl,-rpath,\$ORIGIN:\$ORIGIN/../torch/lib:$torch/lib" "-L$out" "-L$work")
cd "$work"
"${link[@]}" library.o "$torch/lib/libtorch_cpu.so" -o "$out/libmoe_ops.so"
"${link[@]}" kernels_*.o isa_*.o "$torch/lib/libtorch_cpu.so" -o "$out/libmoe_ops_cpu_kernels.so"
"${link[@]}" cpu_*.o op_cpu_*.o -lmoe_ops_cpu_kernels "$torch/lib/libtorch_cpu.so" -o "$out/libmoe_ops_cpu.so"
"${link[@]}" module.o -lmoe_ops_cpu_kernels "$torch/lib/libtorch_cpu.so" -o "$out/_C$abi"
"${link[@]}" "-Wl,-rpath,$(dirname "$cudart")" -Wl,-z,defs launch_*.o device.o op_cuda_*.o \
  "$torch/lib/libtorch_cpu.so" -ltorch_cuda "$cudart" -o "$out/libmoe_ops_cuda.so"
echo "built for $built in ${out#"$root"/}"
