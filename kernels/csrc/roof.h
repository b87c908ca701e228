// What this machine's arithmetic can do, for the benchmarks: seconds for `n` repetitions of a loop that stays in
// registers. kind 0: multiply-adds (2 * 24 * W floating-point operations a repetition); kind 1: a state step of the
// selective scan with its exponential (16 * W state steps a repetition).
#pragma once

#include <chrono>

#include "simd.h"

namespace bestiary {

inline double roof(int64_t kind, int64_t n) {
  alignas(64) float start[24 * W];
  for (int i = 0; i < 24 * W; ++i) start[i] = (float)(i + 1) * -1e-3f;
  volatile float seed = 0.999f;  // the compiler must not know the values
  const vf a = set1(seed), b = set1(seed * 1e-3f);
  vf acc[24];
#pragma GCC unroll 24
  for (int i = 0; i < 24; ++i) acc[i] = load(start + i * W);
  const auto begin = std::chrono::steady_clock::now();
  if (kind == 0) {
    for (int64_t i = 0; i < n; ++i) {
#pragma GCC unroll 24
      for (int j = 0; j < 24; ++j) acc[j] = fma(acc[j], a, b);
    }
  } else {
    vf y{}, d = b;
    for (int64_t i = 0; i < n; ++i) {
#pragma GCC unroll 16
      for (int j = 0; j < 16; ++j) {
        acc[j] = fma(exp2(d * load(start + j * W)), acc[j], d * set1(start[j]));
        y = fma(acc[j], set1(start[16 + j]), y);
      }
      d = d + b * b;
    }
    acc[0] += y;
  }
  const auto end = std::chrono::steady_clock::now();
  vf sum{};
#pragma GCC unroll 24
  for (int i = 0; i < 24; ++i) sum += acc[i];
  seed = hsum(sum);
  return std::chrono::duration<double>(end - begin).count();
}

}  // namespace bestiary
