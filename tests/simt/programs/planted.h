// The main of a program of planted faults: `PROGRAM NAME [mended]` runs one, or its twin without the fault.
#pragma once

#include <cstdio>
#include <exception>
#include <string>

namespace faults {

// run(name, mended); what it throws is printed.
template <class F>
int run_planted(int argc, char** argv, const F& run) {
  try {
    run(std::string(argc > 1 ? argv[1] : ""), argc > 2 && std::string(argv[2]) == "mended");
    return 0;
  } catch (const std::exception& error) {
    std::puts(error.what());
    return 1;
  }
}

}  // namespace faults
