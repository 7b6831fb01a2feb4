// What is no tensor operator: the processor's instruction sets and the one in use, how the libraries were compiled, the
// machine's measured roofs, and how a GEMM on CUDA is cut.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <memory>
#include <string>

#include "cpu/isa.h"
#include "cpu/pages.h"
#include "cpu/roof.h"
#include "cuda/architectures.h"
#include "cuda/launch/gemm_clusters_sm90.h"
#include "cuda/launch/gemm_config.h"
#include "cuda/launch/weight_grad_tiles.h"

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

std::unique_ptr<moe::InOrder> in_order(int64_t read, int64_t written) {
  for (int64_t bytes : {read, written})
    if (bytes < 0)
      throw py::value_error("InOrder: read and written must not be negative, got " + std::to_string(bytes));
  return std::make_unique<moe::InOrder>(read, written);
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

moe::Dtype dtype_named(const std::string& function, const std::string& name, bool allow_float64 = false) {
  if (name == "float32") return moe::Dtype::float32;
  if (name == "bfloat16") return moe::Dtype::bfloat16;
  if (name == "float16") return moe::Dtype::float16;
  if (allow_float64 && name == "float64") return moe::Dtype::float64;
  throw py::value_error(function + ": dtype must be " + (allow_float64 ? "float64, " : "") +
                        "float32, bfloat16 or float16, got " + name);
}

void multiply_adds(const std::string& dtype, double flops) {
  constexpr double kMost = 1e15;  // an hour of a core
  if (!(flops >= 0 && flops <= kMost))
    throw py::value_error("multiply_adds: flops must lie within 0..1e15, got " + std::to_string(flops));
  const moe::Dtype type = dtype_named("multiply_adds", dtype, true);
  py::gil_scoped_release release;
  moe::multiply_adds(type, flops);
}

moe::Epilogue epilogue_named(const std::string& name) {
  if (name == "store") return moe::Epilogue::store;
  if (name == "activate") return moe::Epilogue::activate;
  if (name == "activate_backward") return moe::Epilogue::activate_backward;
  throw py::value_error("gemm_tiles: epilogue must be store, activate or activate_backward, got " + name);
}

// The kernels of sm_90a have shapes of their own, and take two-byte operands that are copied as they lie.
py::dict gemm_tiles(int processors, const std::string& dtype, int64_t rows, int64_t experts, int64_t n, bool direct,
                    bool allow_tf32, int arch, int64_t k, const std::string& epilogue, bool gathers, int clusters) {
  using namespace py::literals;
  const moe::Epilogue finish = epilogue_named(epilogue);
  const moe::Dtype type = dtype_named("gemm_tiles", dtype);
  if (arch == 90 && direct && type != moe::Dtype::float32) {
    const moe::HopperGemmProblem problem{rows, experts, n, k, finish};
    const moe::HopperTiles tiles = moe::pick_hopper_tiles(processors, problem);
    return py::dict(
        "rows"_a = tiles.rows, "cols"_a = tiles.cols, "depth"_a = tiles.kDepth, "stages"_a = tiles.stages,
        "threads"_a = tiles.kThreads, "blocks"_a = 1, "tensor_cores"_a = true,
        "cluster"_a = moe::pick_hopper_cluster(processors, clusters < 0 ? processors / 2 : clusters, problem, gathers));
  }
  const moe::GemmConfig config = moe::pick_config(
      processors,
      {.dtype = type, .rows = rows, .experts = experts, .n = n, .direct = direct, .allow_tf32 = allow_tf32});
  return py::dict("rows"_a = config.rows, "cols"_a = config.cols, "depth"_a = config.depth, "stages"_a = config.stages,
                  "threads"_a = config.threads(), "blocks"_a = config.blocks, "tensor_cores"_a = config.tensor_cores,
                  "cluster"_a = 1);
}

py::dict weight_grad_tiles(int processors, int64_t experts, int64_t n, int64_t k, bool gathers_a) {
  const moe::WeightGradTiles tiles = moe::pick_weight_grad_tiles(processors, {experts, n, k, gathers_a});
  using namespace py::literals;
  return py::dict("n"_a = tiles.n, "k"_a = tiles.k, "depth"_a = tiles.depth, "stages"_a = tiles.stages,
                  "threads"_a = tiles.kThreads);
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
      "ask_for_huge_pages",
      [](uintptr_t address, int64_t bytes) { moe::ask_for_huge_pages(reinterpret_cast<void*>(address), bytes); },
      py::arg("address"), py::arg("bytes"), "Ask for huge pages under memory that is not yet written");
  m.def(
      "roofs", &roofs, py::arg("bytes"), py::arg("seconds") = 0.2,
      "Measure this machine's roofs on torch's threads: FLOP/s of multiply-adds by dtype, bytes/s read and copied over "
      "buffers of `bytes`");
  m.def("multiply_adds", &multiply_adds, py::arg("dtype"), py::arg("flops"),
        "So many FLOPs on torch's threads, in registers alone");
  py::class_<moe::InOrder>(m, "InOrder", "As many bytes read and written as a stage's, in order, and nothing computed")
      .def(py::init(&in_order), py::arg("read"), py::arg("written"))
      .def("run", &moe::InOrder::run, py::call_guard<py::gil_scoped_release>(), "One pass, into fresh memory");
  m.def("has_cuda_kernels", &moe::has_kernels, py::arg("architectures"), py::arg("arch"),
        "Whether a card of compute capability `arch` (80, 90) is served by architectures such as 'sm_80 compute_80'");
  m.def(
      "cuda_kernels_start_early", &moe::may_start_early, py::arg("architectures"), py::arg("arch"),
      "Whether what such a card loads of them waits for the grids ahead, so that it may start before those have ended");
  m.def(
      "gemm_tiles", &gemm_tiles, py::arg("processors"), py::arg("dtype"), py::arg("rows"), py::arg("experts"),
      py::arg("n"), py::kw_only(), py::arg("direct") = true, py::arg("allow_tf32") = false, py::arg("arch") = 80,
      py::arg("k") = 0, py::arg("epilogue") = "store", py::arg("gathers") = false, py::arg("clusters") = -1,
      "How a grouped GEMM of more than 64 rows is cut on a card of so many processors; direct: the operands are "
      "copied as they lie; arch: the card's compute capability. From sm_90 on these count: k: the reduction; epilogue: "
      "store, activate or activate_backward; gathers: rows are gathered; clusters: how many of two blocks the card "
      "holds (by default one on every pair of processors). cluster: the blocks that fetch weights for one another");
  m.def("weight_grad_tiles", &weight_grad_tiles, py::arg("processors"), py::arg("experts"), py::arg("n"), py::arg("k"),
        py::kw_only(), py::arg("gathers_a") = false,
        "How a weight gradient [experts, n, k] in 16 bits is cut on an sm_90a card of so many processors");
  m.def("build_facts", &build_facts, "How the libraries were compiled: name and value, in the order of a report");
}
