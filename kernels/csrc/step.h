// Single steps of a scan and of a convolution, in place on their states: what decoding a token costs. Bound by memory.
#pragma once

#include <vector>

#include "tile.h"

namespace bestiary {

struct StateUpdate {
  Array state, x, dt, A, B, C, D, z, bias, out;  // (B', H, P, N), (B, H, P), (H, P, N), (B, G, N), (H, P)
  Ints slots;
  bool softplus;
};

// Reads n floats; a pointer into the tensor where it holds them as such.
inline const float* read_line(const Array& a, int64_t at, int64_t stride, int64_t n, float* room) {
  if (a.dtype == F32 && stride == 1) return reinterpret_cast<const float*>(a.at(at));
  if (stride == 1)
    halves_to_floats(room, reinterpret_cast<const uint16_t*>(a.at(at)), n, a.dtype);
  else
    for (int64_t i = 0; i < n; ++i) room[i] = a.get(at + i * stride);
  return room;
}

// W rows of one head. `a` is the decay where a head has a single one.
template <bool SCALAR>
BK_INLINE vf update_row(float* state, const float* B, const float* C, const float* A, float dt, float a, float dtx,
                        int64_t N) {
  vf sum{};
  const vf x = set1(dtx), decay = set1(a), d = set1(dt * 1.44269504f);
  int64_t n = 0;
  for (; n + W <= N; n += W) {
    vf h = fma(SCALAR ? decay : exp2(d * load(A + n)), load(state + n), x * load(B + n));
    store(state + n, h);
    sum = fma(h, load(C + n), sum);
  }
  if (n < N) {
    const int left = (int)(N - n);
    vf h = fma(SCALAR ? decay : exp2(d * load_n(A + n, left)), load_n(state + n, left), x * load_n(B + n, left));
    store_n(state + n, h, left);
    sum = fma(h, load_n(C + n, left), sum);
  }
  return sum;
}

inline void state_update_task(const StateUpdate& s, int64_t b, int64_t h, int64_t p0, int64_t p1) {
  const int64_t N = s.state.size[3], G = s.B.size[1], g = h / (s.state.size[1] / G);
  const int64_t slot = s.slots ? s.slots.get(b * s.slots.stride[0]) : b;
  const int64_t to = b * s.out.stride[0] + h * s.out.stride[1];
  if (slot < 0) {  // padding
    for (int64_t p = p0; p < p1; ++p) s.out.set(to + p * s.out.stride[2], 0.0f);
    return;
  }
  const Buffer room(4 * N);
  const float* B = read_line(s.B, b * s.B.stride[0] + g * s.B.stride[1], s.B.stride[2], N, room.p);
  const float* C = read_line(s.C, b * s.C.stride[0] + g * s.C.stride[1], s.C.stride[2], N, room.p + N);
  const bool scalar = !s.A.stride[1] && !s.A.stride[2];
  const bool direct = s.state.dtype == F32 && s.state.stride[3] == 1;
  // to[i] = a[offset + (p + i) * stride]; heads often have one value for all channels
  auto values = [](float* to, const Array& a, int64_t offset, int64_t stride, int rows) {
    if (!a) return store(to, vf{});
    if (!stride) return store(to, set1(a.get(offset)));
    if (a.dtype == F32 && stride == 1) return store(to, load_n(reinterpret_cast<const float*>(a.at(offset)), rows));
    store(to, vf{});
    for (int i = 0; i < rows; ++i) to[i] = a.get(offset + i * stride);
  };
  for (int64_t p = p0; p < p1; p += W) {
    const int rows = (int)std::min<int64_t>(W, p1 - p);
    alignas(64) float x[W], dt[W], decay[W], D[W], z[W], bias[W];
    values(x, s.x, b * s.x.stride[0] + h * s.x.stride[1] + p * s.x.stride[2], s.x.stride[2], rows);
    values(dt, s.dt, b * s.dt.stride[0] + h * s.dt.stride[1] + p * s.dt.stride[2], s.dt.stride[2], rows);
    values(bias, s.bias, h * s.bias.stride[0] + p * s.bias.stride[1], s.bias.stride[1], rows);
    values(D, s.D, h * s.D.stride[0] + p * s.D.stride[1], s.D.stride[1], rows);
    values(z, s.z, b * s.z.stride[0] + h * s.z.stride[1] + p * s.z.stride[2], s.z.stride[2], rows);
    store(dt, load(dt) + load(bias));
    if (s.softplus) store(dt, softplus(load(dt)));
    if (scalar) store(decay, exp2(load(dt) * set1(s.A.get(h * s.A.stride[0]) * 1.44269504f)));
    else
      store(decay, vf{});
    vf sums[W] = {};
    for (int i = 0; i < rows; ++i) {
      const int64_t at = slot * s.state.stride[0] + h * s.state.stride[1] + (p + i) * s.state.stride[2];
      float* own = direct ? reinterpret_cast<float*>(s.state.at(at)) : room.p + 2 * N;
      if (!direct) {
        const float* in = read_line(s.state, at, s.state.stride[3], N, own);
        if (in != own) std::memcpy(own, in, N * 4);
      }
      if (scalar) {
        sums[i] = update_row<true>(own, B, C, nullptr, dt[i], decay[i], dt[i] * x[i], N);
      } else {
        const int64_t row = h * s.A.stride[0] + (p + i) * s.A.stride[1];
        const float* A = read_line(s.A, row, s.A.stride[2], N, room.p + 3 * N);
        sums[i] = update_row<false>(own, B, C, A, dt[i], 0.0f, dt[i] * x[i], N);
      }
      if (!direct)
        for (int64_t n = 0; n < N; ++n) s.state.set(at + n * s.state.stride[3], own[n]);
    }
    vf y = fma(load(D), load(x), sum_rows(sums));
    if (s.z) y *= silu(load(z));
    float result[W];
    store(result, y);
    for (int i = 0; i < rows; ++i) s.out.set(to + (p + i) * s.out.stride[2], result[i]);
  }
}

inline void state_update(const StateUpdate& s) {
  const int64_t B = s.x.size[0], H = s.x.size[1], P = s.x.size[2], block = 4 * W, blocks = (P + block - 1) / block;
  torch::stable::parallel_for(0, B * H * blocks, 8, [&](int64_t begin, int64_t end) {
    FlushToZero flush;
    for (int64_t task = begin; task < end; ++task) {
      const int64_t p = task % blocks * block, row = task / blocks;
      state_update_task(s, row / H, row % H, p, std::min(P, p + block));
    }
  });
}

struct ConvUpdate {
  Array x, state, weight, bias, out;  // (B, D, S), (B', D, room), (D, width), (D), (B, D, S)
  Ints lengths, slots;
  bool silu;
};

inline void conv_update_row(const ConvUpdate& c, int64_t b, int64_t d, std::vector<float>& line) {
  const int64_t S = c.x.size[2], room = c.state.size[2], width = c.weight.size[1];
  const int64_t from = b * c.x.stride[0] + d * c.x.stride[1], to = b * c.out.stride[0] + d * c.out.stride[1];
  const int64_t slot = c.slots ? c.slots.get(b * c.slots.stride[0]) : b;
  if (slot < 0) {
    for (int64_t s = 0; s < S; ++s) c.out.set(to + s * c.out.stride[2], 0.0f);
    return;
  }
  // the state's inputs, oldest first, then the new ones
  const int64_t at = slot * c.state.stride[0] + d * c.state.stride[1];
  const int64_t seen = c.lengths ? c.lengths.get(b * c.lengths.stride[0]) : 0;
  auto place = [&](int64_t i) { return c.lengths ? (seen + i) % room : i; };  // a ring's oldest entry is written next
  for (int64_t i = 0; i < room; ++i) line[i] = c.state.get(at + place(i) * c.state.stride[2]);
  for (int64_t s = 0; s < S; ++s) line[room + s] = c.x.get(from + s * c.x.stride[2]);
  for (int64_t s = 0; s < S; ++s) {
    float y = c.bias ? c.bias.get(d * c.bias.stride[0]) : 0.0f;
    for (int64_t k = 0; k < width; ++k)
      y += c.weight.get(d * c.weight.stride[0] + k * c.weight.stride[1]) * line[room + s - (width - 1) + k];
    if (c.silu) y = y / (1.0f + std::exp(-y));
    c.out.set(to + s * c.out.stride[2], y);
  }
  if (!c.lengths)
    for (int64_t i = 0; i < room; ++i) c.state.set(at + i * c.state.stride[2], line[S + i]);
  else
    for (int64_t s = std::max<int64_t>(0, S - room); s < S; ++s)
      c.state.set(at + (seen + s) % room * c.state.stride[2], line[room + s]);
}

inline void conv_update(const ConvUpdate& c) {
  const int64_t B = c.x.size[0], D = c.x.size[1];
  torch::stable::parallel_for(0, B * D, 1024, [&](int64_t begin, int64_t end) {
    std::vector<float> line(c.state.size[2] + c.x.size[2]);
    for (int64_t task = begin; task < end; ++task) conv_update_row(c, task / D, task % D, line);
  });
}

}  // namespace bestiary
