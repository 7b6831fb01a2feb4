// Which cards a list of compiled architectures serves, as in "sm_80 compute_80 sm_90a".
#pragma once

#include <charconv>
#include <sstream>
#include <string>

namespace moe {

// sm_N is machine code: for its own generation, from N on. compute_N is PTX, which the driver compiles for any later
// card. An `a` binds either to N alone, an `f` to the generation.
inline bool has_kernels(const std::string& architectures, int arch) {
  std::istringstream words(architectures);
  for (std::string word; words >> word;) {
    const size_t digits = word.find_first_of("0123456789");
    if (digits == std::string::npos) continue;
    int built = 0;
    std::from_chars(word.data() + digits, word.data() + word.size(), built);
    const bool same_generation = arch / 10 == built / 10, portable = word.starts_with("compute_") && word.back() != 'f';
    if (word.back() == 'a' ? arch == built : arch >= built && (portable || same_generation)) return true;
  }
  return false;
}

}  // namespace moe
