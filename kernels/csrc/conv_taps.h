// The causal depthwise convolution: what its two ways share.
//
// Where tokens are contiguous and walked in a line, a row of one channel is vectorised along time (conv_lines.h);
// everything else (channel-last, orders, packed rows, mixed strides) goes through tiles of W channels (conv_tiles.h). In
// both a tap is a shifted load, by one float or by one row of a tile. Sums are in float32; the activation's input is
// computed again in the backward. There each pass over the tokens does one thing, because a long chain of operations
// leaves the processor nothing to overlap. Gradients of weights are summed per row and stretch of tokens, and these in order,
// so that bits do not depend on the number of threads.
#pragma once

#include "tile.h"

namespace bestiary {

constexpr int64_t STRETCH = 1024;  // steps of a task over tiles
constexpr int64_t GROUP = 64;      // its channels

struct Conv {
  Array x, weight, bias, initial;  // (B, K, D, L), (D, width), (D), (B, K, D, width - 1)
  Ints order, seq;
  bool silu, reverse;
  int64_t B, K, D, L, width, halo, blocks, groups, stretches;
  bool lines;

  Conv(const Tensor& x_, const Tensor& w, const MaybeTensor& bias_, const MaybeTensor& initial_,
       const MaybeTensor& seq_, const MaybeTensor& order_, bool silu_, bool reverse_)
      : x(x_), weight(w), bias(bias_), initial(initial_), order(order_), seq(seq_), silu(silu_), reverse(reverse_) {
    B = x.size[0], K = x.size[1], D = x.size[2], L = x.size[3], width = weight.size[1], halo = width - 1;
    blocks = (D + W - 1) / W, groups = (D + GROUP - 1) / GROUP;
    lines = x.stride[3] == 1 && (x.stride[2] != 1 || D == 1) && !order && !seq;
    stretches = lines ? 1 : (L + STRETCH - 1) / STRETCH;
  }
  Walk walk(int64_t b, int64_t k) const {
    return {order, seq, b * order.stride[0] + k * order.stride[1], b * seq.stride[0], L, reverse};
  }
  Face face(const Array& a, int64_t b, int64_t k) const {
    return Face(a, b * a.stride[0] + k * a.stride[1], a.stride[2], a.stride[3]);
  }
  // Tap j of a channel: what multiplies the input j steps back.
  float tap(int64_t d, int64_t j) const { return weight.get(d * weight.stride[0] + (halo - j) * weight.stride[1]); }
  float bias_of(int64_t d) const { return bias ? bias.get(d * bias.stride[0]) : 0.0f; }
  // The input at walk step -1 - i, i < halo.
  float before(int64_t b, int64_t k, int64_t d, int64_t i) const {
    if (!initial) return 0.0f;
    const int64_t* s = initial.stride;
    return initial.get(b * s[0] + k * s[1] + d * s[2] + (halo - 1 - i) * s[3]);
  }
};

struct ConvGrads {
  Array dout, dfinal, dx, dweight, dbias, dinitial;
};

// out[i] = bias + sum_j taps[j] x[i - j * step] for i in [0, n), a whole number of vectors; taps are vectors [width][W].
template <bool SILU, int WD>
BK_INLINE void taps_along(const float* x, int64_t n, const float* taps, int64_t width, int64_t step, vf bias, float* out) {
  const int64_t wd = WD ? WD : width;
  for (int64_t i = 0; i < n; i += W) {
    vf sum = bias;
    for (int64_t j = 0; j < wd; ++j) sum = fma(load(taps + j * W), load(x + i - j * step), sum);
    store(out + i, SILU ? silu(sum) : sum);
  }
}
template <bool SILU = false>
inline void taps_along(const float* x, int64_t n, const float* taps, int64_t width, int64_t step, vf bias, float* out) {
  switch (width) {
    case 2: return taps_along<SILU, 2>(x, n, taps, width, step, bias, out);
    case 3: return taps_along<SILU, 3>(x, n, taps, width, step, bias, out);
    case 4: return taps_along<SILU, 4>(x, n, taps, width, step, bias, out);
    default: return taps_along<SILU, 0>(x, n, taps, width, step, bias, out);
  }
}

// Adds to sums [width + 1][W], lane by lane, the sums over v that are the gradients of taps and bias.
template <int WD>
BK_INLINE void sum_taps(const float* x, const float* v, int64_t n, int64_t width, int64_t step, float* sums) {
  vf kept[WD + 1];
  for (int64_t j = 0; j < WD; ++j) kept[j] = load(sums + j * W);
  vf total = load(sums + width * W);
  for (int64_t i = 0; i < n; i += W) {
    const vf own = load(v + i);
    for (int64_t j = 0; j < WD; ++j) kept[j] = fma(own, load(x + i - j * step), kept[j]);
    if (!WD)
      for (int64_t j = 0; j < width; ++j) store(sums + j * W, fma(own, load(x + i - j * step), load(sums + j * W)));
    total += own;
  }
  for (int64_t j = 0; j < WD; ++j) store(sums + j * W, kept[j]);
  store(sums + width * W, total);
}
inline void sum_taps(const float* x, const float* v, int64_t n, int64_t width, int64_t step, float* sums) {
  width == 4 ? sum_taps<4>(x, v, n, width, step, sums) : sum_taps<0>(x, v, n, width, step, sums);
}

}  // namespace bestiary
