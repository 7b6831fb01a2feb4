// What is no tensor operator: the processor's instruction sets and the one in use, how the libraries were compiled, and
// the machine's measured roofs.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include "cpu/isa.h"
#include "cpu/roof.h"
#include "cuda/architectures.h"

namespace py = pybind11;

namespace {

// FLOP/s by dtype, bytes/s of reading and copying. A dtype without arithmetic of its own has 0.
py::dict roofs(int64_t bytes, double seconds) {
  double float32, float64, bfloat16;
  moe::Bandwidth bandwidth;
  {
    py::gil_scoped_release release;
    float32 = moe::peak_arithmetic(moe::Dtype::float32, seconds);
    float64 = moe::peak_arithmetic(moe::Dtype::float64, seconds);
    bfloat16 = moe::peak_arithmetic(moe::Dtype::bfloat16, seconds);
    bandwidth = moe::peak_bandwidth(bytes, seconds);
  }
  using namespace py::literals;
  return py::dict("float32"_a = float32, "float64"_a = float64, "bfloat16"_a = bfloat16, "read"_a = bandwidth.read,
                  "copy"_a = bandwidth.copy);
}

py::dict build_facts() {
  py::dict facts;
  facts["compiler"] = MOE_BUILT_BY;
  facts["machine"] = MOE_BUILT_FOR_MACHINE;
  facts["torch headers"] = MOE_BUILT_WITH_TORCH;
  facts["oldest torch"] = MOE_BUILT_FOR_TORCH;
  facts["cpu architectures"] = MOE_BUILT_FOR_CPU;
  facts["cuda architectures"] = MOE_BUILT_FOR_CUDA;
  facts["cuda"] = MOE_BUILT_WITH_CUDA;
  facts["sanitizers"] = *MOE_BUILT_WITH_SANITIZERS ? MOE_BUILT_WITH_SANITIZERS : "none";
  return facts;
}

}  // namespace

PYBIND11_MODULE(_C, m) {
  m.doc() = "Build facts and processor features of moe_ops";
  m.def("instruction_sets", &moe::instruction_sets,
        "Instruction sets compiled in that this processor has, worst first");
  m.def("instruction_set", [] { return moe::kernels().name; }, "The instruction set in use");
  m.def("use_instruction_set", &moe::use_instruction_set, py::arg("name"),
        "Use another instruction set; for tests, while no operator runs");
  m.def(
      "roofs", &roofs, py::arg("bytes"), py::arg("seconds") = 0.2,
      "Measure this machine's roofs on torch's threads: FLOP/s of multiply-adds by dtype, bytes/s read and copied over "
      "buffers of `bytes`");
  m.def("has_cuda_kernels", &moe::has_kernels, py::arg("architectures"), py::arg("arch"),
        "Whether a card of compute capability `arch` (80, 90) is served by architectures such as 'sm_80 compute_80'");
  m.def("build_facts", &build_facts, "How the libraries were compiled: name and value, in the order of a report");
}
