// The backward of Mamba-2's scan. Groups of SUPER chunks are taken last to first: their states are computed again from
// the one that was kept, then each chunk's products are differentiated. Gradients of B and C gather in the task over
// its heads; tasks of one group are added in order, parameters' parts over rows in order: the same bits for any number
// of threads.
#pragma once

#include "ssd.h"

namespace bestiary {

struct SsdGrads {
  Array dout, dlast, dx, ddt, dA, dB, dC, dD, dbias, dinitial;  // dB, dC (B, L, G, N) float32, dense; dD (H, P)
};

struct SsdParts {
  Buffer b, c;            // parts of dB and dC of all but a group's first task: [subs - 1][B][L][G][N]
  Buffer A, bias, D;      // [B][H], [B][H], [B][H][Pp]
};

// The gradient of one head in one chunk; `dS` holds the gradient of the last state and gets that of the first.
struct HeadBackward {
  const Ssd& s;
  Buffer memory;
  float *x, *dy, *edy, *wx, *u, *dx, *XT, *ST, *dM, *M, *dC_state;
  Decays e;
  double dcs[Q];  // its parts cancel: in float32 gradients of A would lose two digits
  float dd[Q];

  explicit HeadBackward(const Ssd& s_) : s(s_), memory(7 * Q * s_.Pp + s_.Np * s_.Pp + 2 * Q * Q + Q * s_.Np) {
    float* at = memory;
    auto take = [&](int64_t n) { return (at += n) - n; };
    x = take(Q * s.Pp), dy = take(Q * s.Pp), edy = take(Q * s.Pp), wx = take(Q * s.Pp), u = take(Q * s.Pp);
    dx = take(Q * s.Pp), XT = take(Q * s.Pp), ST = take(s.Np * s.Pp), dM = take(Q * Q), M = take(Q * Q);
    dC_state = take(Q * s.Np);
    std::memset(M, 0, Q * Q * 4), std::memset(dM, 0, Q * Q * 4);
  }

  void run(const SsdGrads& g, const Steps& steps, const GroupChunk& group, int64_t b, int64_t h, const float* state,
           float* dS, float* dCB, float* dB, float* dC, float* dD, double& dA, double& dbias) {
    const int64_t Pp = s.Pp, Np = s.Np;
    e.fill(s, steps, b, h);
    pack_rows(x, s.x, b, h, steps, s.P, Pp);
    pack_rows(dy, g.dout, b, h, steps, s.P, Pp);
    transpose_into(XT, Q, x, Pp, Q, Pp);
    for (int64_t i = 0; i < Q; i += 16) product(16, i + 16, Pp, {dy + i * Pp, Pp, 1}, XT, Q, dM + i * Q, Q);
    alignas(64) float columns[Q] = {};  // sum over i of dM * C B^T * decay
    // what decays between steps add to dcs; a step's own has none, and left in would cancel only up to rounding
    alignas(64) float from[Q] = {};
    for (int i = 0; i < Q; ++i) dcs[i] = 0;
    for (int i = 0; i < steps.n; ++i) {
      vf row{};
      for (int j = 0; j <= i; j += W) {
        const vf decay = e.between(i, j, steps.resets), d = load(e.d + j), dm = load(dM + i * Q + j);
        const vf product_ij = load(group.CB + i * Q + j) * decay, m = product_ij * d;
        store(M + i * Q + j, m);
        store(dCB + i * Q + j, fma(dm * decay, d, load(dCB + i * Q + j)));
        store(columns + j, fma(dm, product_ij, load(columns + j)));
        vf share = dm * m;
        if (i < j + W) share = drop(share, i - j);
        store(from + j, load(from + j) + share);
        row += share;
      }
      dcs[i] += hsum(row);
    }
    // dX = M^T dY + w (B dS) + D dY
    product(Q, Pp, s.N, {group.B, Np, 1}, dS, Pp, u, Pp);
    scale_rows(dx, u, e.w, Pp);
    product(Q, Pp, steps.n, {M, 1, Q}, dy, Pp, dx, Pp, 1.0f, Shape::UPPER);
    scale_rows(edy, dy, e.in, Pp);
    scale_rows(wx, x, e.w, Pp);
    // dC += exp(cs) dY S^T, one head's share kept apart for dcs; dB += w X dS^T
    transpose_into(ST, Np, state, Pp, Np, Pp);
    product(Q, Np, s.P, {edy, Pp, 1}, ST, Np, dC_state, Np);
    for (int64_t i = 0; i < Q * Np; i += W) store(dC + i, load(dC + i) + load(dC_state + i));
    transpose_into(ST, Np, dS, Pp, Np, Pp);
    product(Q, Np, s.P, {wx, Pp, 1}, ST, Np, dB, Np, 1.0f);
    double at_end = e.last == 0.0f ? 0.0f : e.last * dot(dS, state, Np * Pp);
    for (int j = 0; j < Q; ++j) {
      const float t = dot(x + j * Pp, u + j * Pp, Pp);
      dd[j] = columns[j] + e.out[j] * t;
      dcs[j] += dot(group.C + j * Np, dC_state + j * Np, Np) - from[j] - e.w[j] * t;
      at_end += e.w[j] * t;
    }
    dcs[Q - 1] += at_end;
    if (e.last == 0.0f) std::memset(dS, 0, Np * Pp * 4);
    product(s.N, Pp, Q, {group.C, 1, Np}, edy, Pp, dS, Pp, e.last);
    const float A = s.A.get(h * s.A.stride[0]);
    double sum = 0;
    for (int j = Q - 1; j >= 0; --j) {
      sum += dcs[j];
      dd[j] = (float)(A * sum + dd[j]);
      dA += e.d[j] * sum;
    }
    finish(g, steps, b, h, dD, dbias);
  }

  static vf drop(vf v, int lane) {
    float x[W];
    store(x, v);
    x[lane] = 0;
    return load(x);
  }

  // From the step size back to dt; the skip; and what is written.
  void finish(const SsdGrads& g, const Steps& steps, int64_t b, int64_t h, float* dD, double& dbias) {
    const int64_t Pp = s.Pp;
    if (s.D) {
      for (int64_t p = 0; p < Pp; p += W) {
        float D[W];
        for (int l = 0; l < W; ++l) D[l] = p + l < s.P ? s.D.get(h * s.D.stride[0] + (p + l) * s.D.stride[1]) : 0.0f;
        const vf skip = load(D);
        vf sum = load(dD + p);
        for (int t = 0; t < steps.n; ++t) {
          const vf dyt = load(dy + t * Pp + p);
          store(dx + t * Pp + p, fma(skip, dyt, load(dx + t * Pp + p)));
          sum = fma(dyt, load(x + t * Pp + p), sum);
        }
        store(dD + p, sum);
      }
    }
    if (g.dx) unpack_rows(g.dx, b, h, steps, dx, s.P, Pp);
    const float bias = s.bias ? s.bias.get(h * s.bias.stride[0]) : 0.0f;
    const int64_t from = b * s.dt.stride[0] + h * s.dt.stride[2], to = b * g.ddt.stride[0] + h * g.ddt.stride[2];
    alignas(64) float raw[Q];
    for (int t = 0; t < Q; ++t) raw[t] = (t < steps.n ? s.dt.get(from + steps.pos[t] * s.dt.stride[1]) : 0.0f) + bias;
    for (int t = 0; t < Q; t += W) {
      vf v = load(raw + t), d = load(dd + t), size = v;
      if (s.softplus) size = softplus(v), d *= sigmoid(v);
      d = size < s.low ? vf{} : d;
      store(dd + t, size > s.high ? vf{} : d);
    }
    for (int t = 0; t < steps.n; ++t) {
      dbias += dd[t];
      if (g.ddt) g.ddt.set(to + steps.pos[t] * g.ddt.stride[1], dd[t]);
    }
  }
};

inline void ssd_backward_task(const Ssd& s, const SsdGrads& g, const float* saved, SsdParts& parts, int64_t task) {
  const int64_t sub = task % s.subs, group_id = task / s.subs % s.G, b = task / s.subs / s.G;
  const int64_t h0 = group_id * s.R + sub * s.R / s.subs, h1 = group_id * s.R + (sub + 1) * s.R / s.subs;
  const int64_t heads = h1 - h0, size = s.Np * s.Pp;
  GroupChunk group(s);
  HeadBackward head(s);
  Buffer memory(heads * size * (1 + SUPER) + Q * Q + 2 * Q * s.Np + heads * s.Pp);
  float *dS = memory, *states = dS + heads * size, *dCB = states + heads * size * SUPER, *dB = dCB + Q * Q;
  float *dC = dB + Q * s.Np, *dD = dC + Q * s.Np;
  std::memset(dD, 0, heads * s.Pp * 4);
  std::vector<double> dA(heads, 0.0), dbias(heads, 0.0);
  for (int64_t i = 0; i < heads; ++i) load_state(dS + i * size, g.dlast, b, h0 + i, s);
  const Walk walk = s.walk(b);
  Steps steps;
  const int64_t part = s.batch * s.L * s.G * s.N;
  for (int64_t super = s.supers - 1; super >= 0; --super) {
    const int64_t first = super * SUPER, end = std::min(s.chunks, first + SUPER);
    for (int64_t i = 0; i < heads; ++i)
      std::memcpy(states + i * SUPER * size, saved + ((b * s.H + h0 + i) * s.supers + super) * size, size * 4);
    for (int64_t c = first; c + 1 < end; ++c) {
      steps.fill(walk, c * Q, (int)std::min<int64_t>(Q, s.L - c * Q));
      group.pack_b(s, steps, b, group_id);
      for (int64_t i = 0; i < heads; ++i) {
        float* state = states + (i * SUPER + c - first) * size;
        std::memcpy(state + size, state, size * 4);
        head.e.fill(s, steps, b, h0 + i);
        pack_rows(head.x, s.x, b, h0 + i, steps, s.P, s.Pp);
        advance_state(s, state + size, group.B, head.x, head.e, head.wx);
      }
    }
    for (int64_t c = end - 1; c >= first; --c) {
      steps.fill(walk, c * Q, (int)std::min<int64_t>(Q, s.L - c * Q));
      group.fill(s, steps, b, group_id);
      std::memset(dCB, 0, (Q * Q + 2 * Q * s.Np) * 4);
      for (int64_t i = 0; i < heads; ++i)
        head.run(g, steps, group, b, h0 + i, states + (i * SUPER + c - first) * size, dS + i * size, dCB, dB, dC,
                 dD + i * s.Pp, dA[i], dbias[i]);
      product(Q, s.Np, Q, {dCB, Q, 1}, group.B, s.Np, dC, s.Np, 1.0f, Shape::LOWER);
      product(Q, s.Np, Q, {dCB, 1, Q}, group.C, s.Np, dB, s.Np, 1.0f, Shape::UPPER);
      auto write = [&](const Array& into, const Buffer& others, const float* rows) {
        if (!into) return;
        float* to = sub == 0 ? reinterpret_cast<float*>(into.p) : others + (sub - 1) * part;
        for (int t = 0; t < steps.n; ++t)
          std::memcpy(to + ((b * s.L + steps.pos[t]) * s.G + group_id) * s.N, rows + t * s.Np, s.N * 4);
      };
      write(g.dB, parts.b, dB);
      write(g.dC, parts.c, dC);
    }
  }
  for (int64_t i = 0; i < heads; ++i) {
    store_state(g.dinitial, b, h0 + i, s, dS + i * size);
    parts.A[b * s.H + h0 + i] = (float)dA[i], parts.bias[b * s.H + h0 + i] = (float)dbias[i];
    std::memcpy(parts.D + (b * s.H + h0 + i) * s.Pp, dD + i * s.Pp, s.Pp * 4);
  }
}

inline void ssd_backward(const Ssd& s, const SsdGrads& g, const float* saved) {
  SsdParts parts;
  const int64_t part = s.batch * s.L * s.G * s.N;
  if (s.subs > 1 && g.dB) parts.b = Buffer((s.subs - 1) * part);
  if (s.subs > 1 && g.dC) parts.c = Buffer((s.subs - 1) * part);
  parts.A = Buffer(s.batch * s.H), parts.bias = Buffer(s.batch * s.H), parts.D = Buffer(s.batch * s.H * s.Pp);
  parallel_tasks(s.tasks(), [&](int64_t task) { ssd_backward_task(s, g, saved, parts, task); });
  auto add = [&](const Array& into, const Buffer& others) {
    if (!others.p) return;
    const int64_t piece = 4096, pieces = (part + piece - 1) / piece;
    parallel_tasks(pieces, [&](int64_t task) {
      float* to = reinterpret_cast<float*>(into.p);
      for (int64_t sub = 0; sub < s.subs - 1; ++sub)
        for (int64_t i = task * piece; i < std::min(part, (task + 1) * piece); ++i) to[i] += others[sub * part + i];
    });
  };
  add(g.dB, parts.b);
  add(g.dC, parts.c);
  for (int64_t h = 0; h < s.H; ++h) {
    float A = 0, bias = 0;
    for (int64_t b = 0; b < s.batch; ++b) A += parts.A[b * s.H + h], bias += parts.bias[b * s.H + h];
    if (g.dA) g.dA.set(h * g.dA.stride[0], A);
    if (g.dbias) g.dbias.set(h * g.dbias.stride[0], bias);
    for (int64_t p = 0; g.dD && p < s.P; ++p) {
      float D = 0;
      for (int64_t b = 0; b < s.batch; ++b) D += parts.D[(b * s.H + h) * s.Pp + p];
      g.dD.set(h * g.dD.stride[0] + p * g.dD.stride[1], D);
    }
  }
}

}  // namespace bestiary
