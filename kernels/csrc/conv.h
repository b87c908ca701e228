// The causal depthwise convolution, forward and backward.
//
// Two ways: where tokens are contiguous and walked in a line, a row of one channel is vectorised along time; everything
// else (channel-last, orders, packed rows, mixed strides) goes through tiles of W channels. Sums are in float32; the
// activation's input is computed again in the backward. Gradients of weights are summed per row and stretch of tokens,
// and these in order, so that bits do not depend on the number of threads.
#pragma once

#include <vector>

#include "tile.h"

namespace bestiary {

constexpr int64_t STRETCH = 2048;  // tokens of a task

struct Conv {
  Array x, weight, bias, initial;  // (B, K, D, L), (D, width), (D), (B, K, D, width - 1)
  Ints order, seq;
  bool silu, reverse;
  int64_t B, K, D, L, width, halo, blocks, stretches;
  bool lines;

  Conv(const Tensor& x_, const Tensor& w, const MaybeTensor& bias_, const MaybeTensor& initial_,
       const MaybeTensor& seq_, const MaybeTensor& order_, bool silu_, bool reverse_)
      : x(x_), weight(w), bias(bias_), initial(initial_), order(order_), seq(seq_), silu(silu_), reverse(reverse_) {
    B = x.size[0], K = x.size[1], D = x.size[2], L = x.size[3], width = weight.size[1], halo = width - 1;
    blocks = (D + W - 1) / W;
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

// --- lines: one channel, vectorised along time -------------------------------------------------------------------

// to[i] = from[lo + i] as floats for lo + i in [0, L), the states before step 0 on the causal side, zero elsewhere.
inline void load_line(const Conv& c, const Array& a, int64_t b, int64_t k, int64_t d, int64_t lo, int64_t n, float* to,
                      bool with_states) {
  const int64_t first = std::max<int64_t>(lo, 0), last = std::min(lo + n, c.L);
  const int64_t at = b * a.stride[0] + k * a.stride[1] + d * a.stride[2];
  for (int64_t t = lo; t < std::min(first, lo + n); ++t)
    to[t - lo] = with_states && !c.reverse && -1 - t < c.halo ? c.before(b, k, d, -1 - t) : 0.0f;
  if (last > first) {
    if (a.stride[3] != 1)
      for (int64_t t = first; t < last; ++t) to[t - lo] = a.get(at + t * a.stride[3]);
    else if (a.dtype == F32)
      std::memcpy(to + first - lo, a.at(at + first), (last - first) * 4);
    else
      halves_to_floats(to + first - lo, reinterpret_cast<const uint16_t*>(a.at(at + first)), last - first, a.dtype);
  }
  for (int64_t t = std::max(last, lo); t < lo + n; ++t)
    to[t - lo] = with_states && c.reverse && t - c.L < c.halo ? c.before(b, k, d, t - c.L) : 0.0f;
}
inline void store_line(const Conv& c, const Array& a, int64_t b, int64_t k, int64_t d, int64_t lo, int64_t n,
                       const float* from) {
  const int64_t at = b * a.stride[0] + k * a.stride[1] + d * a.stride[2] + lo * a.stride[3];
  if (a.stride[3] != 1)
    for (int64_t t = 0; t < n; ++t) a.set(at + t * a.stride[3], from[t]);
  else if (a.dtype == F32)
    std::memcpy(a.at(at), from, n * 4);
  else
    floats_to_halves(reinterpret_cast<uint16_t*>(a.at(at)), from, n, a.dtype);
}

constexpr int64_t LINE = 1024;

// pre[i] = bias + sum_j tap_j x[i - j], for i in [0, n) and n rounded up to whole vectors.
template <int WD>
BK_INLINE void taps_along(const float* x, int64_t n, const float* tap, int64_t width, int64_t step, float bias,
                          float* pre) {
  const int64_t wd = WD ? WD : width;
  for (int64_t i = 0; i < n; i += W) {
    vf sum = set1(bias);
    for (int64_t j = 0; j < wd; ++j) sum = fma(set1(tap[j]), load(x + i - j * step), sum);
    store(pre + i, sum);
  }
}
inline void taps_along(const float* x, int64_t n, const float* tap, int64_t width, int64_t step, float bias,
                       float* pre) {
  switch (width) {
    case 2: return taps_along<2>(x, n, tap, width, step, bias, pre);
    case 3: return taps_along<3>(x, n, tap, width, step, bias, pre);
    case 4: return taps_along<4>(x, n, tap, width, step, bias, pre);
    default: return taps_along<0>(x, n, tap, width, step, bias, pre);
  }
}

// The same for tokens [lo, lo + n) that have all their taps in the row, straight from one tensor to the other; n >= W.
template <int WD>
BK_INLINE void conv_straight(const float* x, int64_t n, const float* tap, int64_t width, int64_t step, float bias,
                             bool with_silu, float* out) {
  const int64_t wd = WD ? WD : width;
  for (int64_t i = 0; i < n; i += W) {
    i = std::min(i, n - W);  // the last vector may lie over the one before: the same values once more
    vf sum = set1(bias);
    for (int64_t j = 0; j < wd; ++j) sum = fma(set1(tap[j]), load(x + i - j * step), sum);
    store(out + i, with_silu ? silu(sum) : sum);
  }
}

inline void conv_line(const Conv& c, const Array& out, int64_t b, int64_t k, int64_t d) {
  const int64_t H = c.halo, step = c.reverse ? -1 : 1;
  Buffer memory(2 * (LINE + 2 * H + 2 * W) + c.width);
  float *x = memory, *y = x + LINE + 2 * H + 2 * W, *tap = y + LINE + 2 * H + 2 * W;
  for (int64_t j = 0; j < c.width; ++j) tap[j] = c.tap(d, j);
  const float bias = c.bias_of(d);
  auto some = [&](int64_t lo, int64_t n) {
    std::memset(x, 0, (n + 2 * H + 2 * W) * 4);
    load_line(c, c.x, b, k, d, lo - H, n + 2 * H, x, true);
    taps_along(x + H, n, tap, c.width, step, bias, y);
    if (c.silu)
      for (int64_t i = 0; i < n; i += W) store(y + i, silu(load(y + i)));
    store_line(c, out, b, k, d, lo, n, y);
  };
  if (c.x.dtype == F32 && out.dtype == F32 && out.stride[3] == 1 && H <= LINE && c.L - H >= W) {
    const int64_t lo = c.reverse ? 0 : H;
    some(c.reverse ? c.L - H : 0, H);
    auto* from = reinterpret_cast<const float*>(c.x.at(b * c.x.stride[0] + k * c.x.stride[1] + d * c.x.stride[2] + lo));
    auto* to = reinterpret_cast<float*>(out.at(b * out.stride[0] + k * out.stride[1] + d * out.stride[2] + lo));
    if (c.width == 4) return conv_straight<4>(from, c.L - H, tap, 4, step, bias, c.silu, to);
    return conv_straight<0>(from, c.L - H, tap, c.width, step, bias, c.silu, to);
  }
  for (int64_t lo = 0; lo < c.L; lo += LINE) some(lo, std::min(LINE, c.L - lo));
}

inline void conv_line_backward(const Conv& c, const ConvGrads& g, int64_t b, int64_t k, int64_t d, float* part) {
  const int64_t H = c.halo, step = c.reverse ? -1 : 1, room = LINE + 4 * H + 2 * W;
  Buffer memory(3 * room + 3 * c.width + (c.width + 1) * W + H);
  float *x = memory, *dpre = x + room, *y = dpre + room, *tap = y + room, *ahead = tap + c.width;
  float *dw = ahead + c.width, *dstate = dw + (c.width + 1) * W;
  for (int64_t j = 0; j < c.width; ++j) tap[j] = c.tap(d, j);
  std::memset(dw, 0, (c.width + 1) * W * 4);
  std::memset(dstate, 0, H * 4);
  std::memset(x, 0, room * 4), std::memset(dpre, 0, room * 4);
  const Array& f = g.dfinal;
  // dfinal[i] belongs to walk step L - H + i
  auto dfinal = [&](int64_t i) { return f.get(b * f.stride[0] + k * f.stride[1] + d * f.stride[2] + i * f.stride[3]); };
  for (int64_t lo = 0; lo < c.L; lo += LINE) {
    const int64_t n = std::min(LINE, c.L - lo);
    // dpre on [lo - H, hi + H), which dx of these tokens needs on one side; x reaches H further
    load_line(c, c.x, b, k, d, lo - 2 * H, n + 4 * H, x, true);
    load_line(c, g.dout, b, k, d, lo - H, n + 2 * H, dpre, false);
    if (c.silu) {
      taps_along(x + H, n + 2 * H, tap, c.width, step, c.bias_of(d), y);
      for (int64_t i = 0; i < n + 2 * H; i += W) store(dpre + i, load(dpre + i) * dsilu(load(y + i)));
    }
    std::memset(dpre + n + 2 * H, 0, W * 4);
    const float* own = dpre + H;
    taps_along(own, n, tap, c.width, -step, 0.0f, y);
    if (f)
      for (int64_t i = 0; i < H; ++i) {
        int64_t s = c.L - H + i, t = c.reverse ? c.L - 1 - s : s;
        if (s >= 0 && t >= lo && t < lo + n) y[t - lo] += dfinal(i);
      }
    if (g.dx) store_line(c, g.dx, b, k, d, lo, n, y);
    int64_t i = 0;
    vf total = load(dw + c.width * W);
    auto add = [&](int64_t at, vf v) {
      for (int64_t j = 0; j < c.width; ++j)
        store(dw + j * W, fma(v, load(x + 2 * H + at - j * step), load(dw + j * W)));
      total += v;
    };
    if (c.width == 4) {  // the sums stay in registers
      vf s0 = load(dw), s1 = load(dw + W), s2 = load(dw + 2 * W), s3 = load(dw + 3 * W);
      for (; i + W <= n; i += W) {
        const vf v = load(own + i);
        const float* at = x + 2 * H + i;
        s0 = fma(v, load(at), s0), s1 = fma(v, load(at - step), s1), s2 = fma(v, load(at - 2 * step), s2);
        s3 = fma(v, load(at - 3 * step), s3);
        total += v;
      }
      store(dw, s0), store(dw + W, s1), store(dw + 2 * W, s2), store(dw + 3 * W, s3);
    }
    for (; i < n; i += W) add(i, i + W <= n ? load(own + i) : load_n(own + i, (int)(n - i)));
    store(dw + c.width * W, total);
    if (g.dinitial) {  // walk step -1 - m got tap j from walk step j - 1 - m
      for (int64_t m = 0; m < H; ++m)
        for (int64_t j = m + 1; j < c.width; ++j) {
          int64_t s = j - 1 - m, t = c.reverse ? c.L - 1 - s : s;
          if (s < c.L && t >= lo && t < lo + n) dstate[H - 1 - m] += tap[j] * own[t - lo];
        }
    }
  }
  for (int64_t j = 0; j < c.width; ++j) part[c.halo - j] = hsum(load(dw + j * W));
  part[c.width] = hsum(load(dw + c.width * W));
  if (g.dinitial) {
    if (f)
      for (int64_t i = 0; i < H; ++i)
        if (c.L - H + i < 0) dstate[c.L + i] += dfinal(i);
    const int64_t* s = g.dinitial.stride;
    for (int64_t i = 0; i < H; ++i) g.dinitial.set(b * s[0] + k * s[1] + d * s[2] + i * s[3], dstate[i]);
  }
}

// --- tiles: W channels, step by step -----------------------------------------------------------------------------

struct ConvTile {
  const Conv& c;
  int64_t b, k, c0;
  int lanes;
  Walk walk;
  Buffer memory;
  float *taps, *x;  // [width][W]; rows of inputs, `halo` before the chunk's own
  vf bias;
  std::vector<int64_t> ids;  // the sequence of each row of x; empty where rows are not packed

  ConvTile(const Conv& c_, int64_t b_, int64_t k_, int64_t block)
      : c(c_), b(b_), k(k_), c0(block * W), lanes((int)std::min<int64_t>(W, c_.D - block * W)), walk(c_.walk(b_, k_)),
        memory((c_.width + c_.halo + T) * W) {
    taps = memory, x = taps + c.width * W;
    float v[W] = {};
    for (int i = 0; i < lanes; ++i) v[i] = c.bias_of(c0 + i);
    bias = load(v);
    for (int64_t j = 0; j < c.width; ++j)
      for (int i = 0; i < W; ++i) taps[j * W + i] = i < lanes ? c.tap(c0 + i, j) : 0.0f;
  }

  // The rows before step `begin`.
  void start(int64_t begin) {
    for (int64_t h = 0; h < c.halo; ++h) {
      const int64_t s = begin - c.halo + h;
      for (int i = 0; i < W; ++i) {
        float v = 0;
        if (i < lanes && s < 0) v = c.before(b, k, c0 + i, -1 - s);
        if (i < lanes && s >= 0)
          v = c.x.get(b * c.x.stride[0] + k * c.x.stride[1] + (c0 + i) * c.x.stride[2] + walk.token(s) * c.x.stride[3]);
        x[h * W + i] = v;
      }
    }
    if (!walk.seq) return;
    ids.resize(c.halo + T);
    for (int64_t h = 0; h < c.halo; ++h) ids[h] = id(std::max<int64_t>(begin - c.halo + h, 0));
  }
  int64_t id(int64_t step) const { return walk.seq.get(walk.seq_row + walk.token(step) * walk.seq.stride[1]); }
  void enter(int64_t lo, int n) {
    if (walk.seq)
      for (int t = 0; t < n; ++t) ids[c.halo + t] = id(lo + t);
  }
  void shift(int n) {
    std::memmove(x, x + n * W, c.halo * W * 4);
    if (walk.seq) std::memmove(ids.data(), ids.data() + n, c.halo * sizeof ids[0]);
  }

  // Whether tap j of step t looks into the same sequence.
  BK_INLINE bool same(int t, int64_t j) const { return ids.empty() || ids[c.halo + t - j] == ids[c.halo + t]; }
  BK_INLINE bool whole(int t) const {
    for (int64_t j = 1; j < c.width; ++j)
      if (!same(t, j)) return false;
    return true;
  }
  BK_INLINE vf pre(const float* row, int t) const {
    vf sum = fma(load(taps), load(row), bias);
    if (c.width == 4 && ids.empty()) {
      sum = fma(load(taps + W), load(row - W), sum);
      sum = fma(load(taps + 2 * W), load(row - 2 * W), sum);
      return fma(load(taps + 3 * W), load(row - 3 * W), sum);
    }
    for (int64_t j = 1; j < c.width; ++j)
      if (same(t, j)) sum = fma(load(taps + j * W), load(row - j * W), sum);
    return sum;
  }
};

inline void conv_tile(const Conv& c, const Array& out, int64_t b, int64_t k, int64_t block, int64_t stretch) {
  ConvTile tile(c, b, k, block);
  const Face from = c.face(c.x, b, k), to = c.face(out, b, k);
  const int64_t begin = stretch * STRETCH, end = std::min(c.L, begin + STRETCH);
  Buffer y(T * W);
  Steps steps;
  tile.start(begin);
  for (int64_t lo = begin; lo < end; lo += T) {
    steps.fill(tile.walk, lo, (int)std::min<int64_t>(T, end - lo));
    float* rows = tile.x + c.halo * W;
    load_tile(rows, from, steps, tile.c0, tile.lanes);
    prefetch_tile(from, tile.walk, lo + T, tile.c0, tile.lanes);
    tile.enter(lo, steps.n);
    for (int t = 0; t < steps.n; ++t) {
      vf v = tile.pre(rows + t * W, t);
      store(y + t * W, c.silu ? silu(v) : v);
    }
    store_tile(to, y, steps, tile.c0, tile.lanes);
    tile.shift(steps.n);
  }
}

inline void conv_tile_backward(const Conv& c, const ConvGrads& g, int64_t b, int64_t k, int64_t block, int64_t stretch,
                               float* part) {
  ConvTile tile(c, b, k, block);
  const int64_t H = c.halo;
  const Face from = c.face(c.x, b, k), dout = c.face(g.dout, b, k), dx = c.face(g.dx, b, k);
  const int64_t begin = stretch * STRETCH, end = std::min(c.L, begin + STRETCH), ahead = std::min(c.L, end + H);
  Buffer memory((T + H + T + c.width + 1) * W);
  float *d = memory, *dy = d + (T + H) * W, *dw = dy + T * W;
  std::memset(d, 0, (T + H) * W * 4);
  std::memset(dw, 0, (c.width + 1) * W * 4);
  const Array &f = g.dfinal, &di = g.dinitial;
  Steps steps, done;
  tile.start(begin);

  // Rows [0, n) of d belong to walk steps from `first`; those of this stretch are complete and are written.
  auto flush = [&](int64_t first, int64_t n) {
    for (int64_t i = 0; i < n; ++i) {
      const int64_t s = first + i;
      if (f && s >= c.L - H)
        for (int l = 0; l < tile.lanes; ++l)
          d[i * W + l] += f.get(b * f.stride[0] + k * f.stride[1] + (tile.c0 + l) * f.stride[2] + (s - c.L + H) * f.stride[3]);
      if (s < 0 && di && stretch == 0)
        for (int l = 0; l < tile.lanes; ++l)
          di.set(b * di.stride[0] + k * di.stride[1] + (tile.c0 + l) * di.stride[2] + (s + H) * di.stride[3], d[i * W + l]);
    }
    const int64_t a = std::max(first, begin), z = std::min(first + n, end);
    if (dx && z > a) {
      done.fill(tile.walk, a, (int)(z - a));
      store_tile(dx, d + (a - first) * W, done, tile.c0, tile.lanes);
    }
  };

  int64_t lo = begin;
  for (; lo < ahead; lo += steps.n) {
    // a chunk does not straddle `end`, after which steps count for dx only
    steps.fill(tile.walk, lo, (int)std::min<int64_t>(T, (lo < end ? end : ahead) - lo));
    float *rows = tile.x + H * W, *drows = d + H * W;
    load_tile(rows, from, steps, tile.c0, tile.lanes);
    load_tile(dy, dout, steps, tile.c0, tile.lanes);
    prefetch_tile(from, tile.walk, lo + T, tile.c0, tile.lanes);
    prefetch_tile(dout, tile.walk, lo + T, tile.c0, tile.lanes);
    tile.enter(lo, steps.n);
    const bool own = lo < end;
    for (int t = 0; t < steps.n; ++t) {
      const float* row = rows + t * W;
      const bool whole = tile.whole(t);
      vf v = load(dy + t * W);
      if (c.silu) v *= dsilu(tile.pre(row, t));
      float* to = drows + t * W;
      for (int64_t j = 0; j < c.width; ++j)
        if (whole || tile.same(t, j)) store(to - j * W, fma(load(tile.taps + j * W), v, load(to - j * W)));
      store(dy + t * W, v);
      if (own && !whole) {
        for (int64_t j = 0; j < c.width; ++j)
          if (tile.same(t, j)) store(dw + j * W, fma(v, load(row - j * W), load(dw + j * W)));
        store(dw + c.width * W, load(dw + c.width * W) + v);
        store(dy + t * W, vf{});  // counted
      }
    }
    if (own)
      for (int64_t j = 0; j <= c.width; ++j) {
        vf sum = load(dw + j * W);
        for (int t = 0; t < steps.n; ++t)
          sum = j < c.width ? fma(load(dy + t * W), load(rows + (t - j) * W), sum) : sum + load(dy + t * W);
        store(dw + j * W, sum);
      }
    flush(lo - H, steps.n);
    std::memmove(d, d + steps.n * W, H * W * 4);
    std::memset(d + H * W, 0, T * W * 4);
    tile.shift(steps.n);
  }
  for (int64_t i = 0; i < H; i += T) {
    flush(lo - H + i, std::min<int64_t>(T, H - i));
    if (i + T < H) std::memmove(d, d + T * W, (H - i - T) * W * 4);
  }
  for (int i = 0; i < tile.lanes; ++i) {
    float* to = part + (tile.c0 + i) * (c.width + 1);
    for (int64_t j = 0; j < c.width; ++j) to[H - j] = dw[j * W + i];
    to[c.width] = dw[c.width * W + i];
  }
}

inline void conv_forward(const Conv& c, const Array& out) {
  if (c.lines)
    return parallel_tasks(c.B * c.K * c.D, [&](int64_t task) {
      conv_line(c, out, task / c.D / c.K, task / c.D % c.K, task % c.D);
    });
  parallel_tasks(c.B * c.K * c.blocks * c.stretches, [&](int64_t task) {
    const int64_t stretch = task % c.stretches, block = task / c.stretches % c.blocks, row = task / c.stretches / c.blocks;
    conv_tile(c, out, row / c.K, row % c.K, block, stretch);
  });
}

inline void conv_backward(const Conv& c, const ConvGrads& g) {
  const int64_t rows = c.B * c.K, size = c.D * (c.width + 1);
  Buffer parts(rows * c.stretches * size);
  if (c.lines)
    parallel_tasks(rows * c.D, [&](int64_t task) {
      const int64_t d = task % c.D, row = task / c.D;
      conv_line_backward(c, g, row / c.K, row % c.K, d, parts + row * size + d * (c.width + 1));
    });
  else
    parallel_tasks(rows * c.blocks * c.stretches, [&](int64_t task) {
      const int64_t stretch = task % c.stretches, block = task / c.stretches % c.blocks, row = task / c.stretches / c.blocks;
      conv_tile_backward(c, g, row / c.K, row % c.K, block, stretch, parts + (row * c.stretches + stretch) * size);
    });
  for (int64_t d = 0; d < c.D; ++d)
    for (int64_t j = 0; j <= c.width; ++j) {
      float sum = 0;
      for (int64_t r = 0; r < rows * c.stretches; ++r) sum += parts[r * size + d * (c.width + 1) + j];
      if (j < c.width && g.dweight) g.dweight.set(d * g.dweight.stride[0] + j * g.dweight.stride[1], sum);
      if (j == c.width && g.dbias) g.dbias.set(d * g.dbias.stride[0], sum);
    }
}

}  // namespace bestiary
