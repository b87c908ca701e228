// Small matrix products in registers: C[M][cols] = beta * C + A B, with A read as scalars and B as vectors.
//
// A BLAS is no part of the stable ABI, and these matrices (64 x 128 and the like) live in L1 and L2, where a block of
// ROWS x PANEL vectors of accumulators keeps both multipliers busy.
#pragma once

#include <algorithm>

#include "simd.h"

namespace bestiary {

constexpr int ROWS = W == 4 ? 4 : 6;
constexpr int PANEL = W == 16 ? 4 : 2;

// Which products count, for a triangular A: all, those with k <= row, or those with k >= row.
enum class Shape { FULL, LOWER, UPPER };

struct Left {  // A[r][k] = p[r * row + k * col]
  const float* p;
  int64_t row, col;
};

template <int R, int V>
BK_INLINE void product_block(Left a, const float* b, int64_t b_row, float* c, int64_t c_row, int64_t k0, int64_t k1,
                             float beta) {
  vf acc[R][V] = {};
  for (int64_t k = k0; k < k1; ++k) {
    vf bv[V];
#pragma GCC unroll 4
    for (int v = 0; v < V; ++v) bv[v] = load(b + k * b_row + v * W);
#pragma GCC unroll 6
    for (int r = 0; r < R; ++r) {
      const vf av = set1(a.p[r * a.row + k * a.col]);
#pragma GCC unroll 4
      for (int v = 0; v < V; ++v) acc[r][v] = fma(av, bv[v], acc[r][v]);
    }
  }
#pragma GCC unroll 6
  for (int r = 0; r < R; ++r)
#pragma GCC unroll 4
    for (int v = 0; v < V; ++v) {
      float* to = c + r * c_row + v * W;
      store(to, beta == 0.0f ? acc[r][v] : fma(set1(beta), load(to), acc[r][v]));
    }
}

template <int R>
inline void product_rows(Left a, const float* b, int64_t b_row, float* c, int64_t c_row, int64_t cols, int64_t k0,
                         int64_t k1, float beta) {
  int64_t j = 0;
  for (; j + PANEL * W <= cols; j += PANEL * W) product_block<R, PANEL>(a, b + j, b_row, c + j, c_row, k0, k1, beta);
  for (; j < cols; j += W) product_block<R, 1>(a, b + j, b_row, c + j, c_row, k0, k1, beta);
}

// C[M][cols] (rows c_row apart) = beta * C + A[M][K] B[K][cols]; cols is a multiple of W.
inline void product(int64_t M, int64_t cols, int64_t K, Left a, const float* b, int64_t b_row, float* c, int64_t c_row,
                    float beta = 0.0f, Shape shape = Shape::FULL) {
  for (int64_t r = 0; r < M;) {
    const int64_t left = M - r;
    const int64_t rows = left >= ROWS ? ROWS : left >= 4 ? 4 : left >= 2 ? 2 : 1;
    const int64_t k0 = shape == Shape::UPPER ? std::min(r, K) : 0;
    const int64_t k1 = shape == Shape::LOWER ? std::min(r + rows, K) : K;
    const Left own{a.p + r * a.row, a.row, a.col};
    float* to = c + r * c_row;
    if (rows == ROWS)
      product_rows<ROWS>(own, b, b_row, to, c_row, cols, k0, k1, beta);
    else if (rows == 4)
      product_rows<4>(own, b, b_row, to, c_row, cols, k0, k1, beta);
    else if (rows == 2)
      product_rows<2>(own, b, b_row, to, c_row, cols, k0, k1, beta);
    else
      product_rows<1>(own, b, b_row, to, c_row, cols, k0, k1, beta);
    r += rows;
  }
}

// to[col][row] = from[row][col]; both sizes are multiples of W.
inline void transpose_into(float* to, int64_t to_row, const float* from, int64_t from_row, int64_t rows, int64_t cols) {
  for (int64_t i = 0; i < rows; i += W)
    for (int64_t j = 0; j < cols; j += W) {
      vf r[W];
      for (int n = 0; n < W; ++n) r[n] = load(from + (i + n) * from_row + j);
      transpose(r);
      for (int n = 0; n < W; ++n) store(to + (j + n) * to_row + i, r[n]);
    }
}

inline float dot(const float* a, const float* b, int64_t n) {  // n is a multiple of W
  vf sum{}, sum2{};
  int64_t i = 0;
  for (; i + 2 * W <= n; i += 2 * W) {
    sum = fma(load(a + i), load(b + i), sum);
    sum2 = fma(load(a + i + W), load(b + i + W), sum2);
  }
  for (; i < n; i += W) sum = fma(load(a + i), load(b + i), sum);
  return hsum(sum + sum2);
}

}  // namespace bestiary
