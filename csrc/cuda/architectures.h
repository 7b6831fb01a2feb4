// Which cards a list of compiled architectures serves, as in "sm_80 compute_80 sm_90a", and with what.
#pragma once

#include <algorithm>
#include <charconv>
#include <sstream>
#include <string>

namespace moe {

// What a card of compute capability `arch` loads: the number of an architecture, the latest that serves it, machine
// code before PTX; 0 where none does. sm_N is machine code: for its own generation, from N on. compute_N is PTX, which
// the driver compiles for any later card. An `a` binds either to N alone, an `f` to the generation.
inline int loaded_code(const std::string& architectures, int arch) {
  int machine_code = 0, ptx = 0;
  std::istringstream words(architectures);
  for (std::string word; words >> word;) {
    const size_t digits = word.find_first_of("0123456789");
    if (digits == std::string::npos) continue;
    int built = 0;
    std::from_chars(word.data() + digits, word.data() + word.size(), built);
    const bool is_ptx = word.starts_with("compute_"), portable = is_ptx && word.back() != 'f';
    if (word.back() == 'a' ? arch != built : arch < built || !(portable || arch / 10 == built / 10)) continue;
    int& latest = is_ptx ? ptx : machine_code;
    latest = std::max(latest, built);
  }
  return machine_code ? machine_code : ptx;
}

inline bool has_kernels(const std::string& architectures, int arch) { return loaded_code(architectures, arch) > 0; }

// Whether that code waits for the grids ahead (arch/grid.cuh), so that Launch::early is right. It does not where a
// later card compiles the PTX of sm_80.
inline bool may_start_early(const std::string& architectures, int arch) {
  return loaded_code(architectures, arch) >= 90;
}

}  // namespace moe
