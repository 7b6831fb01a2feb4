// The activations of results with 16 bits against float64, of every number of both types; and the processor's
// approximations that they are made of, over floats of all sizes.
#include <algorithm>
#include <cmath>

#include "check.h"
#include "cuda/kernels/activation_math.cuh"

namespace moe {
namespace {

constexpr int kValues = 1 << 16, kThreads = 256, kBlocks = 4;

// f(z) and f'(z), as an epilogue computes and rounds them.
template <class T>
__global__ void activate(const T* z, Activation activation, T* values, T* slopes) {
  using Math = ActivationMath<MathFor<T>>;
  for (int i = int(blockIdx.x * blockDim.x + threadIdx.x); i < kValues; i += int(gridDim.x * blockDim.x)) {
    values[i] = from_float<T>(Math::forward(activation, to_float(z[i]), 0));
    slopes[i] = from_float<T>(Math::backward(activation, to_float(z[i]), 0, 1).gate);
  }
}

double sigmoid(double x) { return 1 / (1 + std::exp(-x)); }
double normal_cdf(double x) { return 0.5 * std::erfc(-x * std::sqrt(0.5)); }

struct Exact {
  double value, slope;
};

Exact exactly(const Activation& activation, double z) {
  switch (activation.act) {
    case Act::silu: {
      const double sigma = sigmoid(activation.alpha * z);
      return {z * sigma, sigma + activation.alpha * z * (sigma * (1 - sigma))};
    }
    case Act::gelu: {
      const double density = std::exp(-0.5 * z * z) / std::sqrt(2 * std::acos(-1.0));
      return {z * normal_cdf(z), normal_cdf(z) + z * density};
    }
    case Act::gelu_tanh: {
      const double root = std::sqrt(2 / std::acos(-1.0)), t = sigmoid(2 * root * (z + 0.044715 * z * z * z));
      return {z * t, t + z * t * (1 - t) * 2 * root * (1 + 3 * 0.044715 * z * z)};
    }
    case Act::relu: return {z <= 0 ? 0 : z, z <= 0 ? 0.0 : 1.0};
    case Act::relu2: return {z <= 0 ? 0 : z * z, z <= 0 ? 0 : 2 * z};
  }
  return {};
}

template <class T>
struct Format;
template <>
struct Format<__nv_bfloat16> {
  static constexpr const char* name = "bfloat16";
  static constexpr int digits = 8, least = -133;
  static constexpr double largest = 0xff.0p120;
};
template <>
struct Format<__half> {
  static constexpr const char* name = "float16";
  static constexpr int digits = 11, least = -24;
  static constexpr double largest = 65504;
};

// Whether the result is the rounded exact one, but for a sixteenth of a unit in the last place and `more`.
template <class T>
bool is_right(double ours, double exact, double more) {
  if (std::isnan(exact)) return std::isnan(ours);
  if (std::isinf(ours)) return (ours > 0) == (exact > 0) && std::abs(exact) >= Format<T>::largest;
  const int exponent = exact == 0 ? Format<T>::least : std::ilogb(exact) - Format<T>::digits + 1;
  return std::abs(ours - exact) <= (0.5 + 1.0 / 16) * std::ldexp(1.0, std::max(exponent, Format<T>::least)) + more;
}

template <class T>
bool compare(const std::string& what, const std::vector<T>& z, const std::vector<T>& got, auto exact, auto more) {
  for (size_t i = 0; i < z.size(); ++i) {
    const double x = double(float(z[i])), ours = double(float(got[i]));
    if (!is_right<T>(ours, exact(x), more(x))) {
      char text[128];
      std::snprintf(text, sizeof(text), "of %.9g it is %.9g, not %.9g", x, ours, exact(x));
      return report(what, text);
    }
  }
  return report(what, "");
}

template <class T>
bool check_activation(const std::string& name, const Activation& activation) {
  const Device device;
  std::vector<T> z(kValues);
  for (int i = 0; i < kValues; ++i) {
    const auto bits = uint16_t(i);
    std::memcpy(&z[size_t(i)], &bits, 2);
  }
  T *values = put(device, std::vector<T>(kValues)), *slopes = put(device, std::vector<T>(kValues));
  launch({.grid = dim3(kBlocks), .block = dim3(kThreads), .stream = device.stream()}, activate<T>, put(device, z),
         activation, values, slopes);
  // exp(-z^2 / 2) counts as zero below 2^-126. A slope is the sum of two terms, which cancel at one z below zero; of
  // gelu_tanh the second is 0 * inf, as in torch, where a float does not hold z^2.
  const auto tiny = [&](double) { return activation.act == Act::gelu ? 0x1p-122 : 0; };
  const auto value = [&](double x) { return exactly(activation, x).value; };
  const auto slope = [&](double x) {
    const bool overflows = activation.act == Act::gelu_tanh && std::abs(x) >= 0x1p64;
    return overflows ? std::nan("") : exactly(activation, x).slope;
  };
  const auto canceled = [&](double x) {
    return tiny(x) + (x < 0 && std::isfinite(x) ? 0x1p-16 * std::abs(value(x) / x) * (1 + std::abs(x)) : 0);
  };
  const std::string what = std::string(Format<T>::name) + ", " + name;
  const bool right = compare(what, z, fetch(device, values, kValues), value, tiny);
  return compare(what + ", slope", z, fetch(device, slopes, kValues), slope, canceled) && right;
}

bool check_activations(const std::string& name, const Activation& activation) {
  const bool right = check_activation<__nv_bfloat16>(name, activation);
  return check_activation<__half>(name, activation) && right;
}

enum class Function { exp2, reciprocal, sigmoid, normal };

__global__ void evaluate(Function function, const float* x, float* out, int count) {
  for (int i = int(blockIdx.x * blockDim.x + threadIdx.x); i < count; i += int(gridDim.x * blockDim.x)) {
    switch (function) {
      case Function::exp2: out[i] = arch::approximate_exp2(x[i]); break;
      case Function::reciprocal: out[i] = arch::approximate_reciprocal(x[i]); break;
      case Function::sigmoid: out[i] = ApproximateMath::sigmoid(x[i]); break;
      case Function::normal: out[i] = ApproximateMath::normal(x[i]).cdf; break;
    }
  }
}

// The relative error, and what is allowed of numbers near zero, over every 4099th float.
bool check_function(const std::string& name, Function function, double (*exact)(double), double most,
                    double near_zero) {
  const Device device;
  std::vector<float> x;
  for (uint64_t bits = 0; bits < 1ull << 32; bits += 4099) {
    const auto word = uint32_t(bits);
    float value;
    std::memcpy(&value, &word, 4);
    if (!std::isnan(value)) x.push_back(value);
  }
  const int count = int(x.size());
  float* out = put(device, std::vector<float>(x.size()));
  launch({.grid = dim3(kBlocks), .block = dim3(kThreads), .stream = device.stream()}, evaluate, function,
         put(device, x), out, count);
  const auto got = fetch(device, out, count);
  for (size_t i = 0; i < x.size(); ++i) {
    // What counts as zero does so as an argument too.
    const double of = std::abs(x[i]) < 0x1p-126f ? std::copysign(0.0, x[i]) : double(x[i]);
    const double wanted = exact(of), ours = double(got[i]);
    if (std::abs(wanted) >= 0x1.ffffp127 ? ours == wanted || std::abs(ours) >= 0x1.ffffp127
                                         : std::abs(ours - wanted) <= most * std::abs(wanted) + near_zero)
      continue;
    char text[128];
    std::snprintf(text, sizeof(text), "of %.9g it is %.9g, not %.9g", double(x[i]), ours, wanted);
    return report(name, text);
  }
  return report(name, "");
}

}  // namespace
}  // namespace moe

int main() {
  using moe::Act, moe::Function;
  bool right = moe::check_function("2^x", Function::exp2, [](double x) { return std::exp2(x); }, 0x1p-22, 0x1p-126);
  right &= moe::check_function("1 / x", Function::reciprocal, [](double x) { return 1 / x; }, 0x1p-23, 0x1p-126);
  right &= moe::check_function("sigmoid", Function::sigmoid, moe::sigmoid, 0x1p-16, 0x1p-149);
  right &= moe::check_function("normal distribution", Function::normal, moe::normal_cdf, 0x1p-16, 0x1p-122);
  right &= moe::check_activations("silu", {.act = Act::silu, .gated = false});
  right &= moe::check_activations("silu, alpha 1.702", {.act = Act::silu, .gated = false, .alpha = 1.702});
  right &= moe::check_activations("gelu", {.act = Act::gelu, .gated = false});
  right &= moe::check_activations("gelu_tanh", {.act = Act::gelu_tanh, .gated = false});
  right &= moe::check_activations("relu", {.act = Act::relu, .gated = false});
  right &= moe::check_activations("relu2", {.act = Act::relu2, .gated = false});
  return right ? 0 : 1;
}
