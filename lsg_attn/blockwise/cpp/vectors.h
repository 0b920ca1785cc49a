// Sixteen numbers at a time: a register of AVX-512.
#pragma once

#include <c10/util/BFloat16.h>

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <limits>

namespace lsg {

constexpr int64_t kLanes = 16;
constexpr float kLowest = std::numeric_limits<float>::lowest();
constexpr float kInfinity = std::numeric_limits<float>::infinity();
constexpr float kLog2e = 1.4426950408889634f;

// GCC's and Clang's vector types: operators work lane by lane, a comparison gives 0 or -1 in each.
typedef float Floats __attribute__((vector_size(64)));
typedef int32_t Ints __attribute__((vector_size(64)));
typedef uint16_t Halves __attribute__((vector_size(32)));

constexpr Ints kIota = {0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15};

inline int64_t round_up(int64_t x, int64_t multiple) {
  return (x + multiple - 1) / multiple * multiple;
}

template <typename V, typename E>
inline V load(const E* x) {
  V out;
  std::memcpy(&out, x, sizeof(V));
  return out;
}

template <typename V, typename E>
inline void store(const V& x, E* out) {
  std::memcpy(out, &x, sizeof(V));
}

inline Floats max(Floats a, Floats b) {
  return b > a ? b : a;
}

inline float max_of(Floats x) {
  float out = x[0];
  for (int i = 1; i < kLanes; ++i) out = std::max(out, x[i]);
  return out;
}

inline float sum_of(Floats x) {
  float out = 0;
  for (int i = 0; i < kLanes; ++i) out += x[i];
  return out;
}

// 2^x for x < 128, within one unit in the last place. Below 2^-126 it is 2^-126; of NaN it is NaN.
inline Floats exp2(Floats x) {
  x = x < -126.0f ? Floats{} - 126.0f : x;
  const Floats shifted = x + 12582912.0f;  // 1.5 * 2^23, which leaves the nearest integer in the low bits
  const Floats rest = x - (shifted - 12582912.0f);
  // The polynomial of degree 6, exact at 0, with the least relative error for |rest| <= 1/2: 2e-9.
  Floats power = rest * 1.5353362e-4f + 1.3398874e-3f;
  power = power * rest + 9.6184373e-3f;
  power = power * rest + 5.5503324e-2f;
  power = power * rest + 2.4022648e-1f;
  power = power * rest + 6.9314720e-1f;
  power = power * rest + 1.0f;
  return power * (Floats)(((Ints)shifted + 127) << 23);
}

inline float exp2(float x) {
  return exp2(Floats{} + x)[0];
}

// To bfloat16, to the nearest, ties to even: in the upper half of each word.
inline Ints round_bfloat16(Floats x) {
  const Ints bits = (Ints)x;
  return bits + 0x7fff + ((bits >> 16) & 1);
}

// Write in the type of out.
inline void narrow(Floats x, float* out) {
  store(x, out);
}

inline void narrow(Floats x, at::BFloat16* out) {
  store(__builtin_convertvector(round_bfloat16(x) >> 16, Halves), out);
}

// out = x * factor.
template <typename T>
void write_scaled(const float* x, float factor, int64_t count, T* out) {
  int64_t i = 0;
  for (; i + kLanes <= count; i += kLanes) narrow(load<Floats>(x + i) * factor, out + i);
  for (; i < count; ++i) out[i] = x[i] * factor;
}

}  // namespace lsg
