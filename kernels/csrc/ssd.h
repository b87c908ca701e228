// Mamba-2's scan as matrix products over chunks of Q tokens: what forward and backward share, and the forward.
//
// A task is a row, a group of B and C, and up to HEADS of the group's heads, along all chunks. Per chunk B and C are
// packed and C B^T is computed once for its heads; per head the decays turn it into M, and
//   Y = M X + exp(cs) (C S),   S <- exp(cs_Q) S + B^T (w X)
// with the state S (N x P) in L2. Decays are kept as logarithms to base 2. A walk in any order costs nothing more,
// since rows are packed anyway.
#pragma once

#include <vector>

#include "gemm.h"
#include "tile.h"

namespace bestiary {

constexpr int Q = T;
constexpr int64_t HEADS = 8;
constexpr int64_t SUPER = 4;  // chunks between states kept for the backward

inline int64_t padded(int64_t n) { return (n + W - 1) / W * W; }

struct Ssd {
  Array x, dt, A, B, C, D, bias, initial;  // D (H, P), strides may be 0
  Ints order, seq;
  bool softplus, reverse;
  float low, high;
  int64_t batch, L, H, P, G, N, R, Pp, Np, chunks, supers, subs;

  Ssd(const Tensor& x_, const Tensor& dt_, const Tensor& A_, const Tensor& B_, const Tensor& C_, const MaybeTensor& D_,
      const MaybeTensor& bias_, const MaybeTensor& initial_, const MaybeTensor& seq_, const MaybeTensor& order_,
      bool softplus_, double low_, double high_, bool reverse_)
      : x(x_), dt(dt_), A(A_), B(B_), C(C_), D(D_), bias(bias_), initial(initial_), order(order_), seq(seq_),
        softplus(softplus_), reverse(reverse_), low((float)low_), high((float)high_) {
    batch = x.size[0], L = x.size[1], H = x.size[2], P = x.size[3], G = B.size[2], N = B.size[3];
    R = H / G, Pp = padded(P), Np = padded(N);
    chunks = (L + Q - 1) / Q, supers = (chunks + SUPER - 1) / SUPER, subs = (R + HEADS - 1) / HEADS;
  }
  Walk walk(int64_t b) const {
    return {order, seq, b * order.stride[0], b * seq.stride[0], L, reverse};
  }
  int64_t tasks() const { return batch * G * subs; }
};

// rows[t][i] = a[b, pos[t], head, i] as floats, zero beyond n and beyond the chunk's steps.
inline void pack_rows(float* rows, const Array& a, int64_t b, int64_t head, const Steps& steps, int64_t n, int64_t np) {
  const int64_t at = b * a.stride[0] + head * a.stride[2];
  for (int t = 0; t < steps.n; ++t) {
    const int64_t from = at + steps.pos[t] * a.stride[1];
    float* to = rows + t * np;
    if (a.stride[3] != 1)
      for (int64_t i = 0; i < n; ++i) to[i] = a.get(from + i * a.stride[3]);
    else if (a.dtype == F32)
      std::memcpy(to, a.at(from), n * 4);
    else
      halves_to_floats(to, reinterpret_cast<const uint16_t*>(a.at(from)), n, a.dtype);
    for (int64_t i = n; i < np; ++i) to[i] = 0;
  }
  std::memset(rows + steps.n * np, 0, (Q - steps.n) * np * 4);
}
inline void unpack_rows(const Array& a, int64_t b, int64_t head, const Steps& steps, const float* rows, int64_t n,
                        int64_t np) {
  const int64_t at = b * a.stride[0] + head * a.stride[2];
  for (int t = 0; t < steps.n; ++t) {
    const int64_t to = at + steps.pos[t] * a.stride[1];
    const float* from = rows + t * np;
    if (a.stride[3] != 1)
      for (int64_t i = 0; i < n; ++i) a.set(to + i * a.stride[3], from[i]);
    else if (a.dtype == F32)
      std::memcpy(a.at(to), from, n * 4);
    else
      floats_to_halves(reinterpret_cast<uint16_t*>(a.at(to)), from, n, a.dtype);
  }
}

// Step sizes and decays of one head in one chunk.
struct Decays {
  alignas(64) float d[Q], cs[Q];    // step size; log2 of the decay from the chunk's start through step t
  alignas(64) float in[Q], out[Q];  // what step t sees of the first state; what the last state keeps of step t / d_t
  alignas(64) float w[Q];           // out * d
  float last;                       // what the last state keeps of the first
  int run[Q];                       // which run of a packed row a step belongs to

  void fill(const Ssd& s, const Steps& steps, int64_t b, int64_t h) {
    const int64_t at = b * s.dt.stride[0] + h * s.dt.stride[2];
    for (int t = 0; t < Q; ++t) d[t] = t < steps.n ? s.dt.get(at + steps.pos[t] * s.dt.stride[1]) : 0.0f;
    const vf bias = set1(s.bias ? s.bias.get(h * s.bias.stride[0]) : 0.0f), low = set1(s.low), high = set1(s.high);
    for (int t = 0; t < Q; t += W) {
      vf v = load(d + t) + bias;
      if (s.softplus) v = softplus(v);
      store(d + t, max(low, min(high, v)));
    }
    for (int t = steps.n; t < Q; ++t) d[t] = 0;
    const float a2 = s.A.get(h * s.A.stride[0]) * 1.44269504f;
    float sum = 0;
    int r = 0;
    for (int t = 0; t < Q; ++t) {
      cs[t] = sum += d[t] * a2;
      if (t < steps.n && steps.reset[t]) ++r;
      run[t] = r;
    }
    for (int t = 0; t < Q; t += W) {
      vf c = load(cs + t);
      store(in + t, exp2(c));
      store(out + t, exp2(set1(sum) - c));
    }
    last = r ? 0.0f : in[Q - 1];
    for (int t = 0; t < Q; ++t) {
      if (run[t]) in[t] = 0;
      if (run[t] != r || t >= steps.n) out[t] = 0;
      w[t] = out[t] * d[t];
    }
  }

  // exp2(cs_i - cs_j) for j in [j0, j0 + W), zero where step i does not see step j.
  BK_INLINE vf between(int i, int j0, bool resets) const {
    vf e = exp2(set1(cs[i]) - load(cs + j0));
    if (j0 + W <= i + 1 && !resets) return e;
    float v[W];
    store(v, e);
    for (int l = 0; l < W; ++l)
      if (j0 + l > i || run[j0 + l] != run[i]) v[l] = 0;
    return load(v);
  }
};

// B and C of a group in one chunk, and their products.
struct GroupChunk {
  Buffer memory;
  float *B, *C, *BT, *CB;  // [Q][Np], [Q][Np], [Np][Q], [Q][Q] (lower triangle)

  explicit GroupChunk(const Ssd& s) : memory(3 * Q * s.Np + Q * Q) {
    B = memory, C = B + Q * s.Np, BT = C + Q * s.Np, CB = BT + Q * s.Np;
  }
  void pack_b(const Ssd& s, const Steps& steps, int64_t b, int64_t g) { pack_rows(B, s.B, b, g, steps, s.N, s.Np); }
  void fill(const Ssd& s, const Steps& steps, int64_t b, int64_t g) {
    pack_b(s, steps, b, g);
    pack_rows(C, s.C, b, g, steps, s.N, s.Np);
    transpose_into(BT, Q, B, s.Np, Q, s.Np);
    for (int64_t i = 0; i < Q; i += 16) product(16, i + 16, s.Np, {C + i * s.Np, s.Np, 1}, BT, Q, CB + i * Q, Q);
  }
};

// state[n][p] from and to a (B, H, P, N) tensor.
inline void load_state(float* state, const Array& a, int64_t b, int64_t h, const Ssd& s) {
  std::memset(state, 0, s.Np * s.Pp * 4);
  if (!a) return;
  const int64_t at = b * a.stride[0] + h * a.stride[1];
  for (int64_t p = 0; p < s.P; ++p)
    for (int64_t n = 0; n < s.N; ++n) state[n * s.Pp + p] = a.get(at + p * a.stride[2] + n * a.stride[3]);
}
inline void store_state(const Array& a, int64_t b, int64_t h, const Ssd& s, const float* state) {
  if (!a) return;
  const int64_t at = b * a.stride[0] + h * a.stride[1];
  for (int64_t p = 0; p < s.P; ++p)
    for (int64_t n = 0; n < s.N; ++n) a.set(at + p * a.stride[2] + n * a.stride[3], state[n * s.Pp + p]);
}

// rows[t] = scale[t] * from[t]
inline void scale_rows(float* rows, const float* from, const float* scale, int64_t np) {
  for (int t = 0; t < Q; ++t) {
    const vf f = set1(scale[t]);
    for (int64_t i = 0; i < np; i += W) store(rows + t * np + i, f * load(from + t * np + i));
  }
}

inline void advance_state(const Ssd& s, float* state, const float* B, const float* x, const Decays& e, float* wx) {
  scale_rows(wx, x, e.w, s.Pp);
  if (e.last == 0.0f) std::memset(state, 0, s.Np * s.Pp * 4);
  product(s.N, s.Pp, Q, {B, 1, s.Np}, wx, s.Pp, state, s.Pp, e.last);
}

inline void ssd_forward_task(const Ssd& s, const Array& out, const Array& last, float* saved, int64_t task) {
  const int64_t sub = task % s.subs, g = task / s.subs % s.G, b = task / s.subs / s.G;
  const int64_t h0 = g * s.R + sub * s.R / s.subs, h1 = g * s.R + (sub + 1) * s.R / s.subs, size = s.Np * s.Pp;
  GroupChunk group(s);
  Buffer memory((h1 - h0) * size + 3 * Q * s.Pp + Q * Q + s.Pp);
  float *states = memory, *x = states + (h1 - h0) * size, *y = x + Q * s.Pp, *wx = y + Q * s.Pp, *M = wx + Q * s.Pp;
  float* D = M + Q * Q;
  std::memset(M, 0, Q * Q * 4);
  for (int64_t h = h0; h < h1; ++h) load_state(states + (h - h0) * size, s.initial, b, h, s);
  const Walk walk = s.walk(b);
  Steps steps;
  Decays e;
  for (int64_t c = 0; c < s.chunks; ++c) {
    steps.fill(walk, c * Q, (int)std::min<int64_t>(Q, s.L - c * Q));
    group.fill(s, steps, b, g);
    for (int64_t h = h0; h < h1; ++h) {
      float* state = states + (h - h0) * size;
      if (saved && c % SUPER == 0) std::memcpy(saved + ((b * s.H + h) * s.supers + c / SUPER) * size, state, size * 4);
      e.fill(s, steps, b, h);
      pack_rows(x, s.x, b, h, steps, s.P, s.Pp);
      for (int i = 0; i < steps.n; ++i)
        for (int j = 0; j <= i; j += W)
          store(M + i * Q + j, load(group.CB + i * Q + j) * e.between(i, j, steps.resets) * load(e.d + j));
      product(steps.n, s.Pp, s.N, {group.C, s.Np, 1}, state, s.Pp, y, s.Pp);
      scale_rows(y, y, e.in, s.Pp);
      product(steps.n, s.Pp, Q, {M, Q, 1}, x, s.Pp, y, s.Pp, 1.0f, Shape::LOWER);
      if (s.D) {
        for (int64_t p = 0; p < s.Pp; ++p) D[p] = p < s.P ? s.D.get(h * s.D.stride[0] + p * s.D.stride[1]) : 0.0f;
        for (int t = 0; t < steps.n; ++t)
          for (int64_t p = 0; p < s.Pp; p += W)
            store(y + t * s.Pp + p, fma(load(D + p), load(x + t * s.Pp + p), load(y + t * s.Pp + p)));
      }
      unpack_rows(out, b, h, steps, y, s.P, s.Pp);
      advance_state(s, state, group.B, x, e, wx);
    }
  }
  for (int64_t h = h0; h < h1; ++h) store_state(last, b, h, s, states + (h - h0) * size);
}

inline void ssd_forward(const Ssd& s, const Array& out, const Array& last, float* saved) {
  parallel_tasks(s.tasks(), [&](int64_t task) { ssd_forward_task(s, out, last, saved, task); });
}

}  // namespace bestiary
