// Aligned accesses of several bytes at once, checked.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>
#include <cstring>

#include "machine/schedule.h"

namespace moe::arch {

template <class T, int n>
struct alignas(sizeof(T) * n) Pack {
  T values[n];

  T& operator[](int i) { return values[i]; }
  const T& operator[](int i) const { return values[i]; }
};

template <class P, class T>
P load(const T* from, simt::Where where = simt::Where::current()) {
  simt::check_access("a load", from, sizeof(P), alignof(P), where);
  P out;
  std::memcpy(&out, from, sizeof(P));
  return out;
}

template <class P, class T>
P load_streamed(const T* from, simt::Where where = simt::Where::current()) {
  return load<P>(from, where);
}

template <class P, class T>
void store(T* to, const P& pack, simt::Where where = simt::Where::current()) {
  simt::check_access("a store", to, sizeof(P), alignof(P), where);
  std::memcpy(static_cast<void*>(to), &pack, sizeof(P));
}

template <class P, class T>
void store_global(T* to, const P& pack, simt::Where where = simt::Where::current()) {
  store(to, pack, where);
}

}  // namespace moe::arch
