// Chooses the instruction set at run time.
#include <cstdlib>
#include <stdexcept>
#include <string>
#include <vector>

#include "cpu/isa.h"

namespace moe {

namespace portable {
extern const Kernels kTable;
}
#ifdef MOE_HAS_avx2
namespace avx2 {
extern const Kernels kTable;
}
namespace avx512 {
extern const Kernels kTable;
}
namespace avx512_bf16 {
extern const Kernels kTable;
}
#endif

namespace {

std::vector<const Kernels*> find_supported() {
  std::vector<const Kernels*> found{&portable::kTable};
#ifdef MOE_HAS_avx2
  __builtin_cpu_init();
  auto has = [](auto... flags) { return (... && flags); };
  if (has(__builtin_cpu_supports("avx2"), __builtin_cpu_supports("fma"), __builtin_cpu_supports("f16c"),
          __builtin_cpu_supports("bmi2"))) {
    found.push_back(&avx2::kTable);
    if (has(__builtin_cpu_supports("avx512f"), __builtin_cpu_supports("avx512bw"), __builtin_cpu_supports("avx512dq"),
            __builtin_cpu_supports("avx512vl"))) {
      found.push_back(&avx512::kTable);
      if (__builtin_cpu_supports(MOE_BF16_FEATURE)) found.push_back(&avx512_bf16::kTable);
    }
  }
#endif
  return found;
}

const std::vector<const Kernels*>& supported() {
  static const std::vector<const Kernels*> found = find_supported();
  return found;
}

const Kernels* from_environment() {
  const char* name = std::getenv("MOE_OPS_CPU_ISA");
  return name && *name ? &find(name) : supported().back();
}

const Kernels*& chosen() {
  static const Kernels* table = from_environment();
  return table;
}

}  // namespace

std::vector<std::string> instruction_sets() {
  std::vector<std::string> names;
  for (const Kernels* table : supported()) names.push_back(table->name);
  return names;
}

const Kernels& find(const std::string& name) {
  std::string known;
  for (const Kernels* table : supported()) {
    if (name == table->name) return *table;
    known += known.empty() ? table->name : std::string(", ") + table->name;
  }
  throw std::invalid_argument("moe_ops: instruction set '" + name + "' is not one that this processor has: " + known);
}

void use_instruction_set(const std::string& name) { chosen() = &find(name); }

const Kernels& kernels() { return *chosen(); }

}  // namespace moe
