// The convolution where tokens are contiguous: one channel at a time, vectorised along time.
#pragma once

#include "conv_taps.h"

namespace bestiary {

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

// Channel d's taps and bias, each the same in all lanes.
inline vf load_taps(const Conv& c, int64_t d, float* taps) {
  for (int64_t j = 0; j < c.width; ++j) store(taps + j * W, set1(c.tap(d, j)));
  return set1(c.bias_of(d));
}
// The tokens from lo on as they stand in memory, if they are contiguous floats.
inline float* straight(const Array& a, int64_t b, int64_t k, int64_t d, int64_t lo) {
  if (a.dtype != F32 || a.stride[3] != 1) return nullptr;
  return reinterpret_cast<float*>(a.at(b * a.stride[0] + k * a.stride[1] + d * a.stride[2] + lo));
}
// taps_along for any n >= W, writing no more than n.
template <bool SILU = false>
inline void taps_within(const float* x, int64_t n, const float* taps, int64_t width, int64_t step, vf bias, float* out) {
  taps_along<SILU>(x, n / W * W, taps, width, step, bias, out);
  const int64_t last = n - W;  // may lie over the vector before: the same values once more
  if (n % W) taps_along<SILU>(x + last, W, taps, width, step, bias, out + last);
}

inline void conv_line(const Conv& c, const Array& out, int64_t b, int64_t k, int64_t d) {
  const int64_t H = c.halo, step = c.reverse ? -1 : 1, room = LINE + 2 * H + 2 * W;
  Buffer memory(2 * room + c.width * W);
  float *x = memory, *y = x + room, *taps = y + room;
  const vf bias = load_taps(c, d, taps);
  auto some = [&](int64_t lo, int64_t n) {
    std::memset(x + n + H, 0, (H + W) * 4);
    load_line(c, c.x, b, k, d, lo - H, n + 2 * H, x, true);
    c.silu ? taps_along<true>(x + H, n, taps, c.width, step, bias, y) : taps_along(x + H, n, taps, c.width, step, bias, y);
    store_line(c, out, b, k, d, lo, n, y);
  };
  const float* from = straight(c.x, b, k, d, 0);
  float* to = straight(out, b, k, d, 0);
  const int64_t edge = (H + 15) / 16 * 16;  // whole lines of memory
  if (!from || !to || edge > LINE || c.L - edge < W) {
    for (int64_t lo = 0; lo < c.L; lo += LINE) some(lo, std::min(LINE, c.L - lo));
    return;
  }
  // the tokens whose taps reach before the row, then the others without a copy
  if (H) some(c.reverse ? c.L - edge : 0, edge);
  const int64_t lo = c.reverse ? 0 : edge, n = c.L - edge;
  c.silu ? taps_within<true>(from + lo, n, taps, c.width, step, bias, to + lo)
         : taps_within(from + lo, n, taps, c.width, step, bias, to + lo);
}

// Stretches are taken against the walk, since dx needs the gradients of the H steps that follow.
inline void conv_line_backward(const Conv& c, const ConvGrads& g, int64_t b, int64_t k, int64_t d, float* part) {
  const int64_t H = c.halo, step = c.reverse ? -1 : 1, room = LINE + 2 * H + 2 * W, pieces = (c.L + LINE - 1) / LINE;
  Buffer memory(4 * room + (2 * c.width + 1) * W + H);
  float *x = memory, *v = x + room, *dout = v + room, *pre = dout + room, *taps = pre + room;
  float *sums = taps + c.width * W, *dstate = sums + (c.width + 1) * W;
  std::memset(memory, 0, (4 * room + (2 * c.width + 1) * W + H) * 4);
  const vf bias = load_taps(c, d, taps);
  const Array& f = g.dfinal;
  // dfinal[i] belongs to walk step L - H + i
  auto dfinal = [&](int64_t i) { return f.get(b * f.stride[0] + k * f.stride[1] + d * f.stride[2] + i * f.stride[3]); };
  float* own = v + H;  // v: the gradient of what the taps make, and of H tokens more on the side that follows
  for (int64_t i = 0; i < pieces; ++i) {
    const int64_t lo = (c.reverse ? i : pieces - 1 - i) * LINE, n = std::min(LINE, c.L - lo), whole = (n + W - 1) / W * W;
    const bool inside = (c.reverse || lo >= H) && lo + whole + (c.reverse ? H : 0) <= c.L;
    const float *from = inside ? straight(c.x, b, k, d, lo) : nullptr, *grad = straight(g.dout, b, k, d, lo);
    if (!from) load_line(c, c.x, b, k, d, lo - H, n + 2 * H, x, true), from = x + H;
    if (!grad) load_line(c, g.dout, b, k, d, lo, n, dout, false), grad = dout;
    if (c.reverse)
      std::memmove(v, v + LINE, H * 4);  // stretches before the last are whole
    else
      std::memmove(own + n, own, H * 4);
    float after[W];  // a last vector that is not whole writes over what follows
    std::memcpy(after, own + n, (whole - n) * 4);
    if (c.silu) taps_along(from, n, taps, c.width, step, bias, pre);
    for (int64_t t = 0; t < n; t += W) {
      const vf dy = t + W <= n ? load(grad + t) : load_n(grad + t, (int)(n - t));
      store(own + t, c.silu ? dy * dsilu(load(pre + t)) : dy);
    }
    sum_taps(from, own, n, c.width, step, sums);
    std::memcpy(own + n, after, (whole - n) * 4);
    if (float* to = n >= W && g.dx && !f ? straight(g.dx, b, k, d, lo) : nullptr) {
      taps_within(own, n, taps, c.width, -step, vf{}, to);
    } else if (g.dx) {
      float* dx = pre;
      taps_along(own, n, taps, c.width, -step, vf{}, dx);
      if (f)
        for (int64_t m = 0; m < H; ++m) {
          int64_t s = c.L - H + m, t = c.reverse ? c.L - 1 - s : s;
          if (s >= 0 && t >= lo && t < lo + n) dx[t - lo] += dfinal(m);
        }
      store_line(c, g.dx, b, k, d, lo, n, dx);
    }
    if (g.dinitial) {  // walk step -1 - m got tap j from walk step j - 1 - m
      for (int64_t m = 0; m < H; ++m)
        for (int64_t j = m + 1; j < c.width; ++j) {
          int64_t s = j - 1 - m, t = c.reverse ? c.L - 1 - s : s;
          if (s < c.L && t >= lo && t < lo + n) dstate[H - 1 - m] += taps[j * W] * own[t - lo];
        }
    }
  }
  for (int64_t j = 0; j < c.width; ++j) part[H - j] = hsum(load(sums + j * W));
  part[c.width] = hsum(load(sums + c.width * W));
  if (g.dinitial) {
    if (f)
      for (int64_t i = 0; i < H; ++i)
        if (c.L - H + i < 0) dstate[c.L + i] += dfinal(i);
    const int64_t* s = g.dinitial.stride;
    for (int64_t i = 0; i < H; ++i) g.dinitial.set(b * s[0] + k * s[1] + d * s[2] + i * s[3], dstate[i]);
  }
}

}  // namespace bestiary
