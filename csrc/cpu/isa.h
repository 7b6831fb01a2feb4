// The instruction sets of this processor, and the one in use.
#pragma once

#include <string>
#include <vector>

#include "cpu/isa/table.h"

#define MOE_EXPORT __attribute__((visibility("default")))

namespace moe {

MOE_EXPORT std::vector<std::string> instruction_sets();        // what was compiled and this processor has, worst first
MOE_EXPORT const Kernels& find(const std::string& name);       // throws std::invalid_argument
MOE_EXPORT void use_instruction_set(const std::string& name);  // for tests; not to be called while an operator runs
MOE_EXPORT const Kernels& kernels();

}  // namespace moe
