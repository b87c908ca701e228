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

// W elements that stand side by side, from any dtype and to any; halves in one go, which simd.h's loops over them are not.
typedef uint16_t vh __attribute__((vector_size(W * 2)));
typedef uint32_t vu __attribute__((vector_size(W * 4)));
BK_INLINE vf load_row(const Array& a, int64_t at) {
  if (a.dtype == F32) return load(reinterpret_cast<const float*>(a.at(at)));
  vh h;
  std::memcpy(&h, a.at(at), sizeof h);
  if (a.dtype == BF16) return (vf)(__builtin_convertvector(h, vu) << 16);
#if BK_AVX2
  return (vf)_mm256_cvtph_ps((__m128i)h);
#else
  float x[W];
  halves_to_floats(x, reinterpret_cast<const uint16_t*>(&h), W, F16);
  return load(x);
#endif
}
BK_INLINE void store_row(const Array& a, int64_t at, vf v) {
  if (a.dtype == F32) return store(reinterpret_cast<float*>(a.at(at)), v);
  vh h;
  if (a.dtype == BF16) {  // to_bf16
    const vu u = (vu)v, rounded = (u + 0x7fff + ((u >> 16) & 1)) >> 16;
    h = __builtin_convertvector((u & 0x7fffffff) > 0x7f800000 ? vu{} + 0x7fc0 : rounded, vh);
  } else {
#if BK_AVX2
    h = (vh)_mm256_cvtps_ph((__m256)v, 0);
#else
    float x[W];
    store(x, v);
    floats_to_halves(reinterpret_cast<uint16_t*>(&h), x, W, F16);
#endif
  }
  std::memcpy(a.at(at), &h, sizeof h);
}

// Reads n floats; a pointer into the tensor where it holds them as such.
inline const float* read_line(const Array& a, int64_t at, int64_t stride, int64_t n, float* room) {
  if (a.dtype == F32 && stride == 1) return reinterpret_cast<const float*>(a.at(at));
  int64_t i = 0;
  if (stride == 1)
    for (; i + W <= n; i += W) store(room + i, load_row(a, at + i));
  for (; i < n; ++i) room[i] = a.get(at + i * stride);
  return room;
}
inline void write_line(const Array& a, int64_t at, int64_t stride, int64_t n, const float* line) {
  int64_t i = 0;
  if (stride == 1)
    for (; i + W <= n; i += W) store_row(a, at + i, load(line + i));
  for (; i < n; ++i) a.set(at + i * stride, line[i]);
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
        write_line(s.state, at, s.state.stride[3], N, own[0]);
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
  Array x, state, weight, bias, out;  // (B, D, S) or (B, D), (B', D, room), (D, width), (D), as x
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

// R lines of W channels from memory that holds the R inputs of each channel side by side, and back. Each vector is put
// together from one source after the other: (i * R + LINE) is where an element stands in that memory, M the source.
template <int M, int R, int LINE, int... I>
BK_INLINE vf pick_line(vf sum, vf next, std::integer_sequence<int, I...>) {
  return __builtin_shufflevector(sum, next,
                                 ((I * R + LINE) / W == M ? W + (I * R + LINE) % W
                                  : M > 1                 ? I
                                                          : (I * R + LINE) % W)...);
}
template <int R, int LINE = 0>
BK_INLINE void split_lines(vf* line, const vf* flat) {
  using Lanes = std::make_integer_sequence<int, W>;
  if constexpr (LINE < R) {
    line[LINE] = flat[0];
    if constexpr (R > 1) line[LINE] = pick_line<1, R, LINE>(line[LINE], flat[1], Lanes{});
    if constexpr (R > 2) line[LINE] = pick_line<2, R, LINE>(line[LINE], flat[2], Lanes{});
    if constexpr (R > 3) line[LINE] = pick_line<3, R, LINE>(line[LINE], flat[3], Lanes{});
    split_lines<R, LINE + 1>(line, flat);
  }
}
// M: the vector that is made; K: the line that its elements are taken from.
template <int K, int R, int M, int... I>
BK_INLINE vf pick_flat(vf sum, vf next, std::integer_sequence<int, I...>) {
  return __builtin_shufflevector(
      sum, next, ((M * W + I) % R == K ? W + (M * W + I) / R : K > 1 ? I : (M * W + I) / R)...);
}
template <int R, int M = 0>
BK_INLINE void join_lines(vf* flat, const vf* line) {
  using Lanes = std::make_integer_sequence<int, W>;
  if constexpr (M < R) {
    flat[M] = line[0];
    if constexpr (R > 1) flat[M] = pick_flat<1, R, M>(flat[M], line[1], Lanes{});
    if constexpr (R > 2) flat[M] = pick_flat<2, R, M>(flat[M], line[2], Lanes{});
    join_lines<R, M + 1>(flat, line);
  }
}

// The steps 0 to n - 1, as tiles are told which lines to read.
inline Steps first_lines(int n) {
  Steps steps;
  for (steps.n = 0; steps.n < n; ++steps.n) steps.pos[steps.n] = steps.n;
  steps.along = 1;
  return steps;
}

// Weights and bias of the channels d0 to d1: for each W of them `width` lines of weights and one of the bias.
inline Buffer conv_update_weights(const ConvUpdate& c, int64_t d0, int64_t d1) {
  const int width = (int)c.weight.size[1];
  const bool flat = width == 4 && c.weight.dtype == F32 && c.weight.stride[0] == 4 && c.weight.stride[1] == 1;
  const Steps lines = first_lines(width), one = first_lines(1);
  Buffer room((d1 - d0 + W - 1) / W * (width + 1) * W);
  float* own = room.p;
  for (int64_t d = d0; d < d1; d += W, own += (width + 1) * W) {
    const int lanes = (int)std::min<int64_t>(W, d1 - d);
    if (flat && lanes == W) {
      vf line[4], in[4];
      for (int i = 0; i < 4; ++i) in[i] = load_row(c.weight, d * 4 + i * W);
      split_lines<4>(line, in);
      for (int i = 0; i < 4; ++i) store(own + i * W, line[i]);
    } else {
      load_tile(own, Face(c.weight, 0, c.weight.stride[0], c.weight.stride[1]), lines, d, lanes);
    }
    store(own + width * W, vf{});
    if (c.bias) load_tile(own + width * W, Face(c.bias, 0, c.bias.stride[0], 0), one, d, lanes);
  }
  return room;
}

// Steps of the channels d0 to d1 of the rows b0 to b1, W channels at a time. A line of the tile holds one input of each,
// oldest first: the state's, then the new ones. The new state is the last lines.
inline void conv_update_tiles(const ConvUpdate& c, int64_t b0, int64_t b1, int64_t d0, int64_t d1) {
  const int S = (int)c.x.size[2], room = (int)c.state.size[2], width = (int)c.weight.size[1];
  const Steps past = first_lines(room), now = first_lines(S);
  const Buffer weights = conv_update_weights(c, d0, d1), memory((room + 2 * S) * W);
  float *const tile = memory.p, *const result = tile + (room + S) * W;
  for (int64_t b = b0; b < b1; ++b) {
    const int64_t slot = c.slots ? c.slots.get(b * c.slots.stride[0]) : b;
    const Face x(c.x, b * c.x.stride[0], c.x.stride[1], c.x.stride[2]);
    const Face out(c.out, b * c.out.stride[0], c.out.stride[1], c.out.stride[2]);
    const Face state(c.state, std::max<int64_t>(0, slot) * c.state.stride[0], c.state.stride[1], c.state.stride[2]);
    const float* own = weights.p;
    for (int64_t d = d0; d < d1; d += W, own += (width + 1) * W) {
      const int lanes = (int)std::min<int64_t>(W, d1 - d);
      if (slot < 0) {  // padding
        for (int s = 0; s < S; ++s) store(result + s * W, vf{});
      } else {
        load_tile(tile, state, past, d, lanes);
        load_tile(tile + room * W, x, now, d, lanes);
        for (int s = 0; s < S; ++s) {
          const float* line = tile + (room + s - (width - 1)) * W;
          vf y = load(own + width * W);
          for (int k = 0; k < width; ++k) y = fma(load(own + k * W), load(line + k * W), y);
          store(result + s * W, c.silu ? silu(y) : y);
        }
        store_tile(state, tile + S * W, past, d, lanes);
      }
      store_tile(out, result, now, d, lanes);
    }
  }
}

// What decoding does: one new input and a state of R = width - 1 inputs, in registers. FLAT: the inputs of a channel
// stand side by side; else the channels do.
template <int R, bool FLAT>
inline void conv_update_one(const ConvUpdate& c, int64_t b0, int64_t b1, int64_t d0, int64_t d1) {
  const int64_t whole = d0 + (d1 - d0) / W * W, next = FLAT ? W : c.state.stride[2];
  if (whole < d1) conv_update_tiles(c, b0, b1, whole, d1);
  if (whole == d0) return;
  const Buffer weights = conv_update_weights(c, d0, whole);
  for (int64_t b = b0; b < b1; ++b) {
    const int64_t slot = c.slots ? c.slots.get(b * c.slots.stride[0]) : b;
    const int64_t from = b * c.x.stride[0], to = b * c.out.stride[0], state = slot * c.state.stride[0];
    const float* own = weights.p;
    for (int64_t d = d0; d < whole; d += W, own += (R + 2) * W) {
      if (slot < 0) {  // padding
        store_row(c.out, to + d, vf{});
        continue;
      }
      const int64_t at = state + (FLAT ? d * R : d);
      vf line[R + 1], flat[R];
      for (int r = 0; r < R; ++r) flat[r] = load_row(c.state, at + r * next);
      if constexpr (FLAT)
        split_lines<R>(line, flat);
      else
        for (int r = 0; r < R; ++r) line[r] = flat[r];
      line[R] = load_row(c.x, from + d);
      vf y = load(own + (R + 1) * W);
      for (int k = 0; k <= R; ++k) y = fma(load(own + k * W), line[k], y);
      store_row(c.out, to + d, c.silu ? silu(y) : y);
      if constexpr (FLAT) join_lines<R>(flat, line + 1);
      for (int r = 0; r < R; ++r) store_row(c.state, at + r * next, FLAT ? flat[r] : line[r + 1]);
    }
  }
}

using ConvUpdateTask = void (*)(const ConvUpdate&, int64_t b0, int64_t b1, int64_t d0, int64_t d1);

template <int R>
inline ConvUpdateTask conv_update_of_room(const ConvUpdate& c) {
  if (c.state.stride[1] == 1) return conv_update_one<R, false>;
  return c.state.stride[1] == R && c.state.stride[2] == 1 ? conv_update_one<R, true> : conv_update_tiles;
}
// The function for a call without a ring.
inline ConvUpdateTask conv_update_task(const ConvUpdate& c) {
  const int64_t room = c.state.size[2];
  if (c.x.size[2] == 1 && c.x.stride[1] == 1 && c.out.stride[1] == 1 && room == c.weight.size[1] - 1) {
    if (room == 1) return conv_update_of_room<1>(c);
    if (room == 2) return conv_update_of_room<2>(c);
    if (room == 3) return conv_update_of_room<3>(c);
  }
  return conv_update_tiles;
}

inline void conv_update(const ConvUpdate& c) {
  const int64_t B = c.x.size[0], D = c.x.size[1], S = c.x.size[2], room = c.state.size[2], width = c.weight.size[1];
  if (!c.lengths && S <= T && room <= T && width <= T) {
    const ConvUpdateTask run = conv_update_task(c);
    const int64_t rows = 16, channels = 64, across = (D + channels - 1) / channels;
    const int64_t grain = 1 + 16384 / (std::min(B, rows) * channels * S + 1);
    return torch::stable::parallel_for(0, (B + rows - 1) / rows * across, grain, [&](int64_t begin, int64_t end) {
      for (int64_t task = begin; task < end; ++task) {
        const int64_t b = task / across * rows, d = task % across * channels;
        run(c, b, std::min(B, b + rows), d, std::min(D, d + channels));
      }
    });
  }
  torch::stable::parallel_for(0, B * D, 1024, [&](int64_t begin, int64_t end) {
    std::vector<float> line(room + S);
    for (int64_t task = begin; task < end; ++task) conv_update_row(c, task / D, task % D, line);
  });
}

}  // namespace bestiary
