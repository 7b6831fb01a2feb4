// What the checks of single instructions share: they run where nvcc's code runs, and on the emulator in tests/simt.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <cstdio>
#include <cstring>
#include <random>
#include <string>
#include <vector>

#include "cuda/arch/launch.cuh"
#include "device.h"

namespace moe {

// Small whole numbers: every sum of products is exact, whatever its order.
template <class T>
std::vector<T> whole_numbers(int count) {
  static std::mt19937 generator(7);
  std::vector<T> values;
  for (int i = 0; i < count; ++i) values.push_back(T(float(int(generator() % 9) - 4)));
  return values;
}

// A copy in the card's memory, for as long as the device lives.
template <class T>
T* put(const Device& device, const std::vector<T>& values) {
  const size_t bytes = values.size() * sizeof(T);
  auto* memory = static_cast<T*>(device.scratch(int64_t(bytes)));
  check(cudaMemcpy(memory, values.data(), bytes, cudaMemcpyDefault));
  return memory;
}

template <class T>
std::vector<T> fetch(const Device& device, const T* memory, int count) {
  check(cudaStreamSynchronize(device.stream()));
  std::vector<T> values(static_cast<size_t>(count));
  check(cudaMemcpy(values.data(), memory, values.size() * sizeof(T), cudaMemcpyDefault));
  return values;
}

// Prints a line of its own: "right", or where it is wrong.
inline bool report(const std::string& what, const std::string& wrong) {
  std::printf("%s: %s\n", what.c_str(), wrong.empty() ? "right" : wrong.c_str());
  return wrong.empty();
}

template <class T>
bool expect_equal(const std::string& what, const std::vector<T>& got, const std::vector<T>& expected) {
  for (size_t i = 0; i < expected.size(); ++i)
    if (!(float(got[i]) == float(expected[i])))
      return report(what, "element " + std::to_string(i) + " is " + std::to_string(float(got[i])) + ", not " +
                              std::to_string(float(expected[i])));
  return report(what, "");
}

}  // namespace moe
