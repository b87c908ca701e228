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

// R rows of one head, which share B and C; sums[r] are per lane. `decay` holds the decay of each row where a head has
// a single A, else A gives them.
template <bool SCALAR, int R>
BK_INLINE void update_rows(float* const* state, const float* B, const float* C, const float* const* A, const float* dt,
                           const float* decay, const float* x, int64_t N, vf* sums) {
  vf sum[R] = {}, first[R], entry[R];  // read before the loop, since its stores might change them
  for (int r = 0; r < R; ++r) first[r] = set1(SCALAR ? decay[r] : dt[r] * 1.44269504f), entry[r] = set1(dt[r] * x[r]);
  auto step = [&](int64_t n, auto get, auto put) {
    const vf b = get(B + n), c = get(C + n);
#pragma GCC unroll 4
    for (int r = 0; r < R; ++r) {
      const vf a = SCALAR ? first[r] : exp2(first[r] * get(A[r] + n));
      const vf h = fma(a, get(state[r] + n), entry[r] * b);
      put(state[r] + n, h);
      sum[r] = fma(h, c, sum[r]);
    }
  };
  int64_t n = 0;
  for (; n + W <= N; n += W)
    step(n, [](const float* p) { return load(p); }, [](float* p, vf v) { store(p, v); });
  if (const int left = (int)(N - n))
    step(n, [=](const float* p) { return load_n(p, left); }, [=](float* p, vf v) { store_n(p, v, left); });
  for (int r = 0; r < R; ++r) sums[r] = sum[r];
}

inline void state_update_task(const StateUpdate& s, int64_t b, int64_t h, int64_t p0, int64_t p1) {
  const int64_t N = s.state.size[3], H = s.state.size[1];
  const int64_t gb = h / (H / s.B.size[1]), gc = h / (H / s.C.size[1]);
  const int64_t slot = s.slots ? s.slots.get(b * s.slots.stride[0]) : b;
  const int64_t to = b * s.out.stride[0] + h * s.out.stride[1];
  if (slot < 0) {  // padding
    for (int64_t p = p0; p < p1; ++p) s.out.set(to + p * s.out.stride[2], 0.0f);
    return;
  }
  const Buffer room(7 * N);
  const float* B = read_line(s.B, b * s.B.stride[0] + gb * s.B.stride[1], s.B.stride[2], N, room.p);
  const float* C = read_line(s.C, b * s.C.stride[0] + gc * s.C.stride[1], s.C.stride[2], N, room.p + N);
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
  alignas(64) float x[W], dt[W], decay[W], D[W], z[W], bias[W];
  const bool one_step = scalar && !s.dt.stride[2] && !s.bias.stride[1];
  for (int64_t p = p0; p < p1; p += W) {
    const int rows = (int)std::min<int64_t>(W, p1 - p);
    values(x, s.x, b * s.x.stride[0] + h * s.x.stride[1] + p * s.x.stride[2], s.x.stride[2], rows);
    values(D, s.D, h * s.D.stride[0] + p * s.D.stride[1], s.D.stride[1], rows);
    values(z, s.z, b * s.z.stride[0] + h * s.z.stride[1] + p * s.z.stride[2], s.z.stride[2], rows);
    if (p == p0 || !one_step) {
      values(dt, s.dt, b * s.dt.stride[0] + h * s.dt.stride[1] + p * s.dt.stride[2], s.dt.stride[2], rows);
      values(bias, s.bias, h * s.bias.stride[0] + p * s.bias.stride[1], s.bias.stride[1], rows);
      store(dt, load(dt) + load(bias));
      if (s.softplus) store(dt, softplus(load(dt)));
      store(decay, scalar ? exp2(load(dt) * set1(s.A.get(h * s.A.stride[0]) * 1.44269504f)) : vf{});
    }
    vf sums[W];
    for (int i = rows; i < W; ++i) sums[i] = vf{};
    for (int i = 0; i < rows;) {
      const int count = direct && rows - i >= 4 ? 4 : 1;
      float* own[4];
      const float* A[4] = {};
      for (int r = 0; r < count; ++r) {
        const int64_t at = slot * s.state.stride[0] + h * s.state.stride[1] + (p + i + r) * s.state.stride[2];
        own[r] = direct ? reinterpret_cast<float*>(s.state.at(at)) : room.p + 2 * N;
        if (!direct) {
          const float* in = read_line(s.state, at, s.state.stride[3], N, own[r]);
          if (in != own[r]) std::memcpy(own[r], in, N * 4);
        }
        if (!scalar) A[r] = read_line(s.A, h * s.A.stride[0] + (p + i + r) * s.A.stride[1], s.A.stride[2], N, room.p + (3 + r) * N);
      }
      auto run = [&](auto one_decay, auto R) {
        update_rows<decltype(one_decay)::value, decltype(R)::value>(own, B, C, A, dt + i, decay + i, x + i, N, sums + i);
      };
      using One = std::integral_constant<int, 1>;
      using Four = std::integral_constant<int, 4>;
      if (scalar)
        count == 4 ? run(std::true_type{}, Four{}) : run(std::true_type{}, One{});
      else
        count == 4 ? run(std::false_type{}, Four{}) : run(std::false_type{}, One{});
      if (!direct) {
        const int64_t at = slot * s.state.stride[0] + h * s.state.stride[1] + (p + i) * s.state.stride[2];
        for (int64_t n = 0; n < N; ++n) s.state.set(at + n * s.state.stride[3], own[0][n]);
      }
      i += count;
    }
    vf y = fma(load(D), load(x), sum_rows(sums));
    if (s.z) y *= silu(load(z));
    float result[W];
    store(result, y);
    for (int i = 0; i < rows; ++i) s.out.set(to + (p + i) * s.out.stride[2], result[i]);
  }
}

inline void state_update(const StateUpdate& s) {
  const int64_t B = s.x.size[0], H = s.x.size[1], P = s.x.size[2], block = 64, blocks = (P + block - 1) / block;
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
