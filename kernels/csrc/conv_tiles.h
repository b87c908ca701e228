// The convolution over tiles: channel-last, in any order, packed, of any strides. A task takes GROUP channels, so that it
// reads whole lines of memory, along a stretch of steps.
#pragma once

#include <vector>

#include "conv_taps.h"

namespace bestiary {

// W channels: their taps, and what they carry from chunk to chunk.
struct ConvBlock {
  int64_t c0;
  int lanes;
  float *taps, *xs, *vs, *sums;  // [width][W]; inputs and gradients of the last `halo` steps [halo][W]; [width + 1][W]
  vf bias;
};

struct ConvTiles {
  const Conv& c;
  int64_t b, k, H;
  Walk walk;
  Buffer memory;
  std::vector<ConvBlock> blocks;
  std::vector<int64_t> ids;  // the sequence of each step from `halo` before the chunk on; empty where rows are not packed

  ConvTiles(const Conv& c_, int64_t b_, int64_t k_, int64_t group)
      : c(c_), b(b_), k(k_), H(c_.halo), walk(c_.walk(b_, k_)) {
    const int64_t first = group * (GROUP / W), end = std::min(c.blocks, first + GROUP / W), each = (4 * H + 3) * W;
    memory = Buffer((end - first) * each);
    std::memset(memory.p, 0, (end - first) * each * 4);
    for (int64_t block = first; block < end; ++block) {
      float* at = memory + (block - first) * each;
      ConvBlock own{block * W, (int)std::min<int64_t>(W, c.D - block * W), at, at + (H + 1) * W, at + (2 * H + 1) * W,
                    at + (3 * H + 1) * W, {}};
      float bias[W] = {};
      for (int i = 0; i < own.lanes; ++i) {
        bias[i] = c.bias_of(own.c0 + i);
        for (int64_t j = 0; j < c.width; ++j) own.taps[j * W + i] = c.tap(own.c0 + i, j);
      }
      own.bias = load(bias);
      blocks.push_back(own);
    }
  }

  int64_t id(int64_t step) const { return walk.seq.get(walk.seq_row + walk.token(step) * walk.seq.stride[1]); }

  // The steps before `begin`.
  void start(int64_t begin) {
    for (const ConvBlock& own : blocks)
      for (int64_t h = 0; h < H; ++h)
        for (int i = 0; i < own.lanes; ++i) {
          const int64_t s = begin - H + h, d = own.c0 + i;
          own.xs[h * W + i] = s < 0 ? c.before(b, k, d, -1 - s)
                                    : c.x.get(b * c.x.stride[0] + k * c.x.stride[1] + d * c.x.stride[2] +
                                              walk.token(s) * c.x.stride[3]);
        }
    if (!walk.seq) return;
    ids.resize(2 * H + T);
    for (int64_t h = 0; h < H; ++h) ids[h] = id(std::max<int64_t>(begin - H + h, 0));
  }
  void enter(int64_t lo, int n) {
    if (walk.seq)
      for (int t = 0; t < n; ++t) ids[H + t] = id(lo + t);
  }
  void leave(int n) {
    if (walk.seq) std::memmove(ids.data(), ids.data() + n, H * sizeof ids[0]);
  }

  // Rows of a tile with the H rows before it, which are kept for the next.
  void load_rows(float* rows, float* before, const Face& from, const Steps& steps, const ConvBlock& own) const {
    std::memcpy(rows, before, H * W * 4);
    load_tile(rows + H * W, from, steps, own.c0, own.lanes);
  }
  void keep_rows(const float* rows, float* before, int n) const { std::memcpy(before, rows + n * W, H * W * 4); }

  // out[i] = bias + sum_j taps[j] x[i - j], for rows i of the chunk.
  template <bool SILU = false>
  void pre(const ConvBlock& own, const float* x, int n, float* out) const {
    if (ids.empty()) return taps_along<SILU>(x + H * W, n * W, own.taps, c.width, W, own.bias, out);
    for (int t = 0; t < n; ++t) {
      vf sum = own.bias;
      for (int64_t j = 0; j < c.width; ++j)
        if (ids[H + t - j] == ids[H + t]) sum = fma(load(own.taps + j * W), load(x + (H + t - j) * W), sum);
      store(out + t * W, SILU ? silu(sum) : sum);
    }
  }
  // dx[i] = sum_j taps[j] v[i + j], for rows i from the first of the H before the chunk.
  void back(const ConvBlock& own, const float* v, int64_t n, float* dx) const {
    if (ids.empty()) return taps_along(v, n * W, own.taps, c.width, -W, vf{}, dx);
    for (int64_t i = 0; i < n; ++i) {
      vf sum{};
      for (int64_t j = 0; j < c.width; ++j)
        if (ids[i + j] == ids[i]) sum = fma(load(own.taps + j * W), load(v + (i + j) * W), sum);
      store(dx + i * W, sum);
    }
  }
  void sum(const ConvBlock& own, const float* x, const float* v, int n) const {
    if (ids.empty()) return sum_taps(x + H * W, v + H * W, n * W, c.width, W, own.sums);
    for (int64_t j = 0; j <= c.width; ++j) {
      vf sum = load(own.sums + j * W);
      for (int t = 0; t < n; ++t) {
        if (j == c.width) sum += load(v + (H + t) * W);
        else if (ids[H + t - j] == ids[H + t]) sum = fma(load(v + (H + t) * W), load(x + (H + t - j) * W), sum);
      }
      store(own.sums + j * W, sum);
    }
  }
};

inline void conv_tiles(const Conv& c, const Array& out, int64_t b, int64_t k, int64_t group, int64_t stretch) {
  ConvTiles tiles(c, b, k, group);
  const Face from = c.face(c.x, b, k), to = c.face(out, b, k);
  const int64_t begin = stretch * STRETCH, end = std::min(c.L, begin + STRETCH);
  Buffer memory((c.halo + 2 * T) * W);
  float *x = memory, *y = x + (c.halo + T) * W;
  Steps steps;
  tiles.start(begin);
  for (int64_t lo = begin; lo < end; lo += T) {
    steps.fill(tiles.walk, lo, (int)std::min<int64_t>(T, end - lo));
    tiles.enter(lo, steps.n);
    for (const ConvBlock& own : tiles.blocks) {
      tiles.load_rows(x, own.xs, from, steps, own);
      prefetch_tile(from, tiles.walk, lo + T, own.c0, own.lanes);
      c.silu ? tiles.pre<true>(own, x, steps.n, y) : tiles.pre(own, x, steps.n, y);
      store_tile(to, y, steps, own.c0, own.lanes);
      tiles.keep_rows(x, own.xs, steps.n);
    }
    tiles.leave(steps.n);
  }
}

inline void conv_tiles_backward(const Conv& c, const ConvGrads& g, int64_t b, int64_t k, int64_t group, int64_t stretch,
                                float* part) {
  ConvTiles tiles(c, b, k, group);
  const int64_t H = c.halo, rows = 2 * H + T;
  const Face from = c.face(c.x, b, k), dout = c.face(g.dout, b, k), dx = c.face(g.dx, b, k);
  const int64_t begin = stretch * STRETCH, end = std::min(c.L, begin + STRETCH), ahead = std::min(c.L, end + H);
  Buffer memory((3 * rows + T) * W);
  float *x = memory, *v = x + rows * W, *d = v + rows * W, *y = d + rows * W;
  const Array &f = g.dfinal, &di = g.dinitial;
  Steps steps, done;
  tiles.start(begin);

  // Rows [0, n) of d belong to walk steps from `first`; those of this stretch are complete and are written.
  auto flush = [&](const ConvBlock& own, int64_t first, int64_t n) {
    for (int64_t i = 0; i < n; ++i) {
      const int64_t s = first + i;
      if (f && s >= c.L - H)
        for (int l = 0; l < own.lanes; ++l)
          d[i * W + l] += f.get(b * f.stride[0] + k * f.stride[1] + (own.c0 + l) * f.stride[2] + (s - c.L + H) * f.stride[3]);
      if (s < 0 && di && stretch == 0)
        for (int l = 0; l < own.lanes; ++l)
          di.set(b * di.stride[0] + k * di.stride[1] + (own.c0 + l) * di.stride[2] + (s + H) * di.stride[3], d[i * W + l]);
    }
    const int64_t last = std::min(first + n, end);
    for (int64_t a = std::max(first, begin); dx && a < last; a += T) {
      done.fill(tiles.walk, a, (int)std::min<int64_t>(T, last - a));
      store_tile(dx, d + (a - first) * W, done, own.c0, own.lanes);
    }
  };

  int64_t lo = begin;
  for (; lo < ahead; lo += steps.n) {
    // a chunk does not straddle `end`, after which steps count for dx only
    steps.fill(tiles.walk, lo, (int)std::min<int64_t>(T, (lo < end ? end : ahead) - lo));
    tiles.enter(lo, steps.n);
    for (const ConvBlock& own : tiles.blocks) {
      tiles.load_rows(x, own.xs, from, steps, own);
      tiles.load_rows(v, own.vs, dout, steps, own);
      for (const Face* face : {&from, &dout}) prefetch_tile(*face, tiles.walk, lo + T, own.c0, own.lanes);
      if (c.silu) {
        tiles.pre(own, x, steps.n, y);
        for (int t = 0; t < steps.n; ++t) {
          float* at = v + (H + t) * W;
          store(at, load(at) * dsilu(load(y + t * W)));
        }
      }
      if (lo < end) tiles.sum(own, x, v, steps.n);
      tiles.back(own, v, steps.n, d);
      flush(own, lo - H, steps.n);
      tiles.keep_rows(x, own.xs, steps.n);
      tiles.keep_rows(v, own.vs, steps.n);
    }
    tiles.leave(steps.n);
  }
  for (const ConvBlock& own : tiles.blocks) {
    std::memcpy(v, own.vs, H * W * 4);
    std::memset(v + H * W, 0, H * W * 4);
    tiles.back(own, v, H, d);
    flush(own, lo - H, H);
    for (int i = 0; i < own.lanes; ++i) {
      float* to = part + (own.c0 + i) * (c.width + 1);
      for (int64_t j = 0; j < c.width; ++j) to[H - j] = own.sums[j * W + i];
      to[c.width] = own.sums[c.width * W + i];
    }
  }
}

}  // namespace bestiary
