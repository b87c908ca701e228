// The backward of the selective scan. Chunks are taken last to first: decays and states of a chunk are computed again
// from its saved first state, then the walk is reversed with g_t = C_t dy_t + a_{t+1} g_{t+1} carried in registers.
//
// Gradients of B and C are sums over channels. A task adds them up lane by lane over its blocks of channels and across
// lanes once a chunk; a group's blocks are split over a fixed number of tasks, whose parts are added in order. So no
// atomics, and the same bits for any number of threads.
#pragma once

#include <algorithm>
#include <type_traits>
#include <vector>

#include "scan.h"

namespace bestiary {

struct ScanGrads {
  Array dout, dlast, du, ddelta, dz, dA, dD, dbias, dh0, dB, dC;  // dB, dC variable: (B, K, G, L, N) float32, dense
};

// Where a task puts its part of dB and dC: parts of one (row, order, group), each [L][N].
struct Parts {
  int64_t splits, size;
  Buffer b, c;  // all but the first part, which is the result itself
};

constexpr int NR = 4;  // states of the reverse walk held at once

// Arrays of one block of channels that live through the whole reverse walk.
struct Carried {
  float *g, *dA, *dB, *dC;  // [Np][W]; dB and dC for constant maps
  vf dD{}, dbias{};
};

struct ChunkTiles {
  float *dt, *x, *u, *dy, *s, *p, *sp;  // [T][W]
};

// Adds to s_t = sum_n g B and p_t = sum_n A q, q = g_t a_t h_{t-1}, and to everything that is summed over steps.
template <bool CB, bool CC>
inline void reverse_states(const Steps& steps, const ChunkTiles& f, const MapRows& rows, const Block& block,
                           Carried& carry, const float* first_h, const float* keep_a, const float* keep_h, float* sum_b,
                           float* sum_c, bool fresh, int64_t Np) {
  for (int64_t n0 = 0; n0 < Np; n0 += NR) {
    vf g[NR], dA[NR], dB[NR] = {}, dC[NR] = {};
#pragma GCC unroll 8
    for (int n = 0; n < NR; ++n) {
      g[n] = load(carry.g + (n0 + n) * W), dA[n] = load(carry.dA + (n0 + n) * W);
      if (CB) dB[n] = load(carry.dB + (n0 + n) * W);
      if (CC) dC[n] = load(carry.dC + (n0 + n) * W);
    }
    for (int t = steps.n - 1; t >= 0; --t) {
      vf dy = load(f.dy + t * W), x = load(f.x + t * W), dt = load(f.dt + t * W);
      vf s = n0 ? load(f.s + t * W) : vf{}, p = n0 ? load(f.p + t * W) : vf{};
      const float* before = t ? keep_h + ((t - 1) * Np + n0) * W : first_h + n0 * W;
      const float *a = keep_a + (t * Np + n0) * W, *h = keep_h + (t * Np + n0) * W;
      float *to_b = sum_b + (t * Np + n0) * W, *to_c = sum_c + (t * Np + n0) * W;
#pragma GCC unroll 8
      for (int n = 0; n < NR; ++n) {
        const vf B = CB ? load(block.Bc + (n0 + n) * W) : set1(rows.b[t][n0 + n]);
        const vf C = CC ? load(block.Cc + (n0 + n) * W) : set1(rows.c[t][n0 + n]);
        g[n] = fma(C, dy, g[n]);
        if (CC)
          dC[n] = fma(dy, load(h + n * W), dC[n]);
        else
          store(to_c + n * W, fresh ? dy * load(h + n * W) : fma(dy, load(h + n * W), load(to_c + n * W)));
        if (CB)
          dB[n] = fma(g[n], x, dB[n]);
        else
          store(to_b + n * W, fresh ? g[n] * x : fma(g[n], x, load(to_b + n * W)));
        s = fma(g[n], B, s);
        g[n] *= load(a + n * W);
        const vf q = g[n] * load(before + n * W);
        dA[n] = fma(dt, q, dA[n]);
        p = fma(load(block.A2 + (n0 + n) * W), q, p);
      }
      store(f.s + t * W, s);
      store(f.p + t * W, p);
    }
#pragma GCC unroll 8
    for (int n = 0; n < NR; ++n) {
      store(carry.g + (n0 + n) * W, g[n]), store(carry.dA + (n0 + n) * W, dA[n]);
      if (CB) store(carry.dB + (n0 + n) * W, dB[n]);
      if (CC) store(carry.dC + (n0 + n) * W, dC[n]);
    }
  }
}

// to[pos[t]][n] = sum over lanes of from[t][n].
inline void sum_lanes(float* to, int64_t row, const float* from, const Steps& steps, int64_t N, int64_t Np) {
  for (int t = 0; t < steps.n; ++t) {
    float* out = to + steps.pos[t] * row;
    const float* in = from + t * Np * W;
    int64_t n = 0;
    for (; n + W <= N; n += W) {
      vf r[W];
      for (int i = 0; i < W; ++i) r[i] = load(in + (n + i) * W);
      store(out + n, sum_rows(r));
    }
    if (n < N) {
      vf r[W] = {};
      for (int i = 0; n + i < N; ++i) r[i] = load(in + (n + i) * W);
      store_n(out + n, sum_rows(r), (int)(N - n));
    }
  }
}

// Loads one chunk: dt, dt * u, u, dy (and dz is stored); `y` is needed where there is a gate.
struct Chunk {
  const Scan& s;
  const ScanGrads& grads;
  int64_t b, k, c0;
  int width;
  Face u, delta, z, dout;

  Chunk(const Scan& s_, const ScanGrads& grads_, int64_t b_, int64_t k_, int64_t block)
      : s(s_), grads(grads_), b(b_), k(k_), c0(s_.channel(block)), width(s_.width(block)),
        u(s_.face(s_.u, b_, k_)), delta(s_.face(s_.delta, b_, k_)), z(s_.face(s_.z, b_, k_)),
        dout(s_.face(grads_.dout, b_, k_)) {}

  // `begin` is the chunk's first step; the chunk before it is next.
  void load_steps(const Steps& steps, const ChunkTiles& f, vf bias, const Walk& walk, int64_t begin) const {
    load_tile(f.dt, delta, steps, c0, width);
    load_tile(f.u, u, steps, c0, width);
    load_tile(f.dy, dout, steps, c0, width);
    for (const Face* face : {&u, &delta, &dout, &z}) prefetch_tile(*face, walk, begin - T, c0, width);
    for (int t = 0; t < steps.n; ++t) {
      vf d = load(f.dt + t * W) + bias;
      if (s.softplus) {
        Sigmoid g = sigmoid_e(d);
        store(f.sp + t * W, g.value);
        d = softplus_e(d, g.e);
      }
      store(f.dt + t * W, d);
      store(f.x + t * W, d * load(f.u + t * W));
    }
  }
};

inline void scan_backward_task(const Scan& s, const ScanGrads& grads, const float* saved, const float* starts,
                               const Parts& parts, float* dA_part, float* dD_part, int64_t b, int64_t k, int64_t g,
                               int64_t split, int64_t segment) {
  const int64_t size = s.Np * W, tile = T * W, kept = T * size;
  const int64_t first = split * s.blocks_g / parts.splits, end = (split + 1) * s.blocks_g / parts.splits;
  const int64_t count = end - first;
  const bool vb = !s.Bm.constant, vc = !s.Cm.constant;
  Buffer memory(9 * tile + 2 * kept + (vb + vc) * kept + count * 4 * size + size);
  float* at = memory;
  auto take = [&](int64_t n) { return (at += n) - n; };
  ChunkTiles f{take(tile), take(tile), take(tile), take(tile), take(tile), take(tile), take(tile)};
  float *y = take(tile), *gate = take(tile), *keep_a = take(kept), *keep_h = take(kept), *h = take(size);
  float *sum_b = vb ? take(kept) : nullptr, *sum_c = vc ? take(kept) : nullptr;
  std::vector<Block> constants;
  std::vector<Carried> carried;
  for (int64_t i = 0; i < count; ++i) {
    const int64_t block = g * s.blocks_g + first + i;
    constants.emplace_back(s.Np);
    constants.back().fill(s, k, block);
    carried.push_back({take(size), take(size), take(size), take(size)});
    Carried& c = carried.back();
    for (float* sum : {c.dA, c.dB, c.dC}) std::memset(sum, 0, size * 4);
    const Array& dl = grads.dlast;
    if (starts)
      std::memcpy(c.g, starts + (((b * s.K + k) * s.blocks + block) * s.segments + segment) * size, size * 4);
    else
      load_channels(c.g, dl, b * dl.stride[0] + k * dl.stride[1] + s.channel(block) * dl.stride[2], dl.stride[2],
                    dl.stride[3], s.width(block), s.N, s.Np, 1.0f);
  }
  const Walk walk = s.walk(b, k);
  Steps steps;
  MapRows rows;
  for (int64_t c = s.first_chunk(segment + 1) - 1; c >= s.first_chunk(segment); --c) {
    steps.fill(walk, c * T, (int)std::min<int64_t>(T, s.L - c * T));
    rows.fill(s, steps, b, k, g);
    for (int64_t i = 0; i < count; ++i) {
      const int64_t block = g * s.blocks_g + first + i;
      const Block& own = constants[i];
      Carried& carry = carried[i];
      Chunk chunk(s, grads, b, k, block);
      chunk.load_steps(steps, f, own.bias, walk, c * T);
      const float* first_h = saved + s.saved(b, k, block, c);
      std::memcpy(h, first_h, size * 4);
      if (chunk.z) {
        for (int t = 0; t < steps.n; ++t) store(y + t * W, own.D * load(f.u + t * W));
        walk_chunk<true, true>(s, steps, f.dt, f.x, rows, own, h, y, keep_a, keep_h);
        load_tile(gate, chunk.z, steps, chunk.c0, chunk.width);
        for (int t = 0; t < steps.n; ++t) {
          const Silu own_gate = silu_and_slope(load(gate + t * W));
          const vf dout = load(f.dy + t * W);
          store(f.dy + t * W, dout * own_gate.value);
          store(gate + t * W, dout * load(y + t * W) * own_gate.slope);
        }
        if (grads.dz) store_tile(s.face(grads.dz, b, k), gate, steps, chunk.c0, chunk.width);
      } else {
        walk_chunk<false, true>(s, steps, f.dt, f.x, rows, own, h, nullptr, keep_a, keep_h);
      }
      auto reverse = [&](auto cb, auto cc) {
        reverse_states<decltype(cb)::value, decltype(cc)::value>(steps, f, rows, own, carry, first_h, keep_a, keep_h,
                                                                 sum_b, sum_c, i == 0, s.Np);
      };
      if (vb && vc)
        reverse(std::false_type{}, std::false_type{});
      else if (vb)
        reverse(std::false_type{}, std::true_type{});
      else if (vc)
        reverse(std::true_type{}, std::false_type{});
      else
        reverse(std::true_type{}, std::true_type{});
      if (!s.N) std::memset(f.s, 0, tile * 4), std::memset(f.p, 0, tile * 4);  // nobody has written them
      const vf ln2 = set1(0.69314718f);  // p was summed with A * log2(e)
      for (int t = 0; t < steps.n; ++t) {
        vf u = load(f.u + t * W), dy = load(f.dy + t * W), st = load(f.s + t * W);
        vf ddt = fma(u, st, load(f.p + t * W) * ln2);
        if (s.softplus) ddt *= load(f.sp + t * W);
        store(y + t * W, fma(own.D, dy, load(f.dt + t * W) * st));
        store(gate + t * W, ddt);
        carry.dbias += ddt;
        carry.dD = fma(dy, u, carry.dD);
      }
      if (grads.du) store_tile(s.face(grads.du, b, k), y, steps, chunk.c0, chunk.width);
      if (grads.ddelta) store_tile(s.face(grads.ddelta, b, k), gate, steps, chunk.c0, chunk.width);
    }
    const int64_t group = (b * s.K + k) * s.G + g;
    auto reduce = [&](const float* sum, const Array& into, const Buffer& others) {
      if (!into) return;
      float* to = split == 0 ? reinterpret_cast<float*>(into.p) + group * s.L * s.N
                             : others + (group * (parts.splits - 1) + split - 1) * s.L * s.N;
      sum_lanes(to, s.N, sum, steps, s.N, s.Np);
    };
    if (vb) reduce(sum_b, grads.dB, parts.b);
    if (vc) reduce(sum_c, grads.dC, parts.c);
  }
  for (int64_t i = 0; i < count; ++i) {
    const int64_t block = g * s.blocks_g + first + i, c0 = s.channel(block);
    const int width = s.width(block);
    // parts of rows and segments: [B][segments][K][blocks], each dA, dB, dC [3][Np][W] and dD, dbias [2][W]
    float* part = dA_part + (((b * s.segments + segment) * s.K + k) * s.blocks + block) * (3 * size);
    for (const float* sum : {carried[i].dA, carried[i].dB, carried[i].dC}) std::memcpy(part, sum, size * 4), part += size;
    float* sums = dD_part + (((b * s.segments + segment) * s.K + k) * s.blocks + block) * 2 * W;
    store(sums, carried[i].dD), store(sums + W, carried[i].dbias);
    if (grads.dh0 && segment == 0) {
      const Array& d = grads.dh0;
      store_channels(d, b * d.stride[0] + k * d.stride[1] + c0 * d.stride[2], d.stride[2], d.stride[3], carried[i].g,
                     width, s.N);
    }
  }
}

// What a segment adds to the gradient of the state before it, if none comes in from behind.
inline void scan_backward_local(const Scan& s, const ScanGrads& grads, int64_t row, int64_t segment, float* g,
                                float* total) {
  const int64_t block = row % s.blocks, k = row / s.blocks % s.K, b = row / s.blocks / s.K;
  Block own(s.Np);
  own.fill(s, k, block);
  Buffer memory(8 * T * W);
  float* at = memory;
  auto take = [&](int64_t n) { return (at += n) - n; };
  ChunkTiles f{take(T * W), take(T * W), take(T * W), take(T * W), nullptr, nullptr, take(T * W)};
  float* gate = take(T * W);
  const Walk walk = s.walk(b, k);
  Chunk chunk(s, grads, b, k, block);
  Steps steps;
  MapRows rows;
  vf sum{};
  for (int64_t c = s.first_chunk(segment + 1) - 1; c >= s.first_chunk(segment); --c) {
    steps.fill(walk, c * T, (int)std::min<int64_t>(T, s.L - c * T));
    rows.fill(s, steps, b, k, block / s.blocks_g);
    chunk.load_steps(steps, f, own.bias, walk, c * T);
    if (chunk.z) {
      load_tile(gate, chunk.z, steps, chunk.c0, chunk.width);
      for (int t = 0; t < steps.n; ++t) store(f.dy + t * W, load(f.dy + t * W) * silu(load(gate + t * W)));
    }
    for (int t = steps.n - 1; t >= 0; --t) {
      vf d = load(f.dt + t * W), dy = load(f.dy + t * W);
      for (int64_t n = 0; n < s.Np; ++n) {
        const vf C = s.Cm.constant ? load(own.Cc + n * W) : set1(rows.c[t][n]);
        vf a = exp2(d * load(own.A2 + n * W));
        store(g + n * W, steps.reset[t] ? vf{} : a * fma(C, dy, load(g + n * W)));
      }
      sum = steps.reset[t] ? set1(INFINITY) : sum + d;
    }
  }
  store(total, sum);
}

inline void scan_backward(const Scan& s, const ScanGrads& grads, const float* saved) {
  const int64_t size = s.Np * W, groups = s.B * s.K * s.G;
  Buffer starts;
  if (s.segments > 1) {
    starts = Buffer(s.B * s.K * s.blocks * s.segments * size);
    combine_segments(
        s, true,
        [&](int64_t row, int64_t seg, float* g, float* total) { scan_backward_local(s, grads, row, seg, g, total); },
        grads.dlast, starts);
  }
  Parts parts;
  parts.splits = std::min<int64_t>({s.blocks_g, 4, std::max<int64_t>(1, (6 + groups - 1) / std::max<int64_t>(groups, 1))});
  parts.size = s.L * s.N;
  if (parts.splits > 1 && grads.dB && !s.Bm.constant) parts.b = Buffer(groups * (parts.splits - 1) * parts.size);
  if (parts.splits > 1 && grads.dC && !s.Cm.constant) parts.c = Buffer(groups * (parts.splits - 1) * parts.size);
  const int64_t rows = s.B * s.segments, all = s.K * s.blocks;
  Buffer dA_part(rows * all * 3 * size), dD_part(rows * all * 2 * W);
  parallel_tasks(groups * parts.splits * s.segments, [&](int64_t task) {
    int64_t seg = task % s.segments, split = task / s.segments % parts.splits;
    int64_t group = task / s.segments / parts.splits, g = group % s.G, k = group / s.G % s.K, b = group / s.G / s.K;
    scan_backward_task(s, grads, saved, starts, parts, dA_part, dD_part, b, k, g, split, seg);
  });
  auto add_parts = [&](const Array& into, const Buffer& others) {
    if (!others.p) return;
    const int64_t piece = 4096, pieces = (parts.size + piece - 1) / piece;
    parallel_tasks(groups * pieces, [&](int64_t task) {
      int64_t group = task / pieces, from = task % pieces * piece, to = std::min(parts.size, from + piece);
      float* out = reinterpret_cast<float*>(into.p) + group * parts.size;
      for (int64_t split = 0; split < parts.splits - 1; ++split) {
        const float* in = others + (group * (parts.splits - 1) + split) * parts.size;
        for (int64_t i = from; i < to; ++i) out[i] += in[i];
      }
    });
  };
  add_parts(grads.dB, parts.b);
  add_parts(grads.dC, parts.c);
  // parameters: over rows and segments, in order
  parallel_tasks(all, [&](int64_t task) {
    const int64_t k = task / s.blocks, block = task % s.blocks, c0 = s.channel(block);
    const int width = s.width(block);
    Buffer memory(3 * size + 2 * W);
    float *sum = memory, *vectors = sum + 3 * size;
    std::memset(sum, 0, (3 * size + 2 * W) * 4);
    for (int64_t r = 0; r < rows; ++r) {
      const float *a = dA_part + (r * all + task) * 3 * size, *v = dD_part + (r * all + task) * 2 * W;
      for (int64_t i = 0; i < 3 * size; ++i) sum[i] += a[i];
      for (int64_t i = 0; i < 2 * W; ++i) vectors[i] += v[i];
    }
    auto matrix = [&](const Array& d, const float* from) {
      if (d) store_channels(d, k * d.stride[0] + c0 * d.stride[1], d.stride[1], d.stride[2], from, width, s.N);
    };
    matrix(grads.dA, sum);
    if (s.Bm.constant) matrix(grads.dB, sum + size);
    if (s.Cm.constant) matrix(grads.dC, sum + 2 * size);
    for (int i = 0; i < width; ++i) {
      if (grads.dD) grads.dD.set(k * grads.dD.stride[0] + (c0 + i) * grads.dD.stride[1], vectors[i]);
      if (grads.dbias) grads.dbias.set(k * grads.dbias.stride[0] + (c0 + i) * grads.dbias.stride[1], vectors[W + i]);
    }
  });
}

}  // namespace bestiary
