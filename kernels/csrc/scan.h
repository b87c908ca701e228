// The selective scan of Mamba-1: what forward and backward share, and the forward.
//
// Layout: B rows, K orders of a row, G groups of channels with maps of their own, E channels of an order, N states,
// L tokens. A lane is a channel, so nothing is summed across lanes in the forward, any N fits, and a token in
// channel-last storage is one cache line, which is what makes a walk in any order cheap. A task takes 64 channels along
// all tokens, fewer where there would not be enough tasks, T steps at a time:
//   load delta, u, z into tiles -> softplus -> for each step and state: decay, update, output -> gate -> store
// States in float32 stay in registers for a chunk. With few blocks of channels a row is cut into segments: a first
// pass finds each segment's final state from zero, these are combined, and a second pass starts from the result. The
// cut depends on the shape alone, so results never depend on the number of threads.
#pragma once

#include <vector>

#include "tile.h"

namespace bestiary {

constexpr int NB = W == 16 ? 16 : 8;  // states held in registers at once
constexpr int LINE_BLOCKS = 16 / W;   // blocks of channels whose floats share a cache line
constexpr float LOG2E = 1.44269504f;

// B or C as the walk wants them: a row of states for each token, or a vector of channels for each state.
struct Map {
  bool constant = false, walked = false;  // walked: rows are in the order of the walk, not of the tokens
  Array a;             // constant: (K, E, N)
  const float* p = nullptr;
  int64_t sb = 0, sk = 0, sg = 0, sl = 0;
  Buffer copy;

  const float* rows(int64_t b, int64_t k, int64_t g) const { return p + b * sb + k * sk + g * sg; }
};

struct Scan {
  int64_t B, K, E, L, N, Np, G, Eg, blocks_g, blocks, lines_g, lines, chunks, segments;
  Array u, delta, A, D, z, bias, h0;
  Map Bm, Cm;
  Ints order, seq;
  bool softplus, reverse;

  Scan(const Tensor& u_, const Tensor& delta_, const Tensor& A_, const Tensor& B_, const Tensor& C_,
       const MaybeTensor& D_, const MaybeTensor& z_, const MaybeTensor& bias_, const MaybeTensor& h0_,
       const MaybeTensor& seq_, const MaybeTensor& order_, bool softplus_, bool reverse_)
      : u(u_), delta(delta_), A(A_), D(D_), z(z_), bias(bias_), h0(h0_), order(order_), seq(seq_),
        softplus(softplus_), reverse(reverse_) {
    B = u.size[0], K = u.size[1], E = u.size[2], L = u.size[3], N = A.size[2];
    Np = (N + 3) / 4 * 4;
    G = 1;
    if (B_.dim() == 5) G = B_.size(2);
    if (C_.dim() == 5) G = C_.size(2);
    STD_TORCH_CHECK(B_.dim() != 5 || C_.dim() != 5 || B_.size(2) == C_.size(2), "bestiary: B and C differ in groups");
    Eg = E / G;
    blocks_g = (Eg + W - 1) / W, blocks = G * blocks_g;
    lines_g = (blocks_g + LINE_BLOCKS - 1) / LINE_BLOCKS, lines = G * lines_g;
    chunks = (L + T - 1) / T;
    segments = B * K * lines <= 2 && chunks >= 32 ? std::min<int64_t>(16, chunks / 8) : 1;
    fill(Bm, B_);
    fill(Cm, C_);
  }

  void fill(Map& m, const Tensor& t) {
    m.a = Array(t);
    m.constant = t.dim() == 3;
    if (m.constant || !B || !K) return;
    const Array& a = m.a;  // (B, K, G, N, L)
    m.walked = order && lines_g > 1;  // one jump for each row, instead of one for each row and line
    if (!m.walked && a.dtype == F32 && a.stride[3] == 1 && N == Np) {
      m.p = reinterpret_cast<const float*>(a.p);
      m.sb = a.stride[0], m.sk = a.stride[1], m.sg = a.stride[2], m.sl = a.stride[4];
      return;
    }
    const bool rows_differ = a.stride[0] || (m.walked && order.stride[0]), orders_differ = a.stride[1] || m.walked;
    const int64_t nb = rows_differ ? B : 1, nk = orders_differ ? K : 1;
    m.sl = Np, m.sg = L * Np, m.sk = orders_differ ? G * m.sg : 0, m.sb = rows_differ ? nk * G * m.sg : 0;
    m.copy = Buffer(nb * nk * G * L * Np);
    m.p = m.copy;
    parallel_tasks(nb * nk * G * chunks, [&](int64_t task) {
      const int64_t c = task % chunks, g = task / chunks % G, k = task / chunks / G % nk, b = task / chunks / G / nk;
      const int64_t from = b * a.stride[0] + k * a.stride[1] + g * a.stride[2];
      float* to = m.copy.p + b * m.sb + k * m.sk + g * m.sg;
      const int64_t end = std::min(L, (c + 1) * T);
      const Walk steps = walk(b, k);
      if (a.dtype == F32 && a.stride[3] == 1) {
        for (int64_t l = c * T; l < end; ++l) {
          const int64_t at = from + (m.walked ? steps.token(l) : l) * a.stride[4];
          std::memcpy(to + l * Np, a.at(at), N * 4);
          for (int64_t n = N; n < Np; ++n) to[l * Np + n] = 0;
        }
        return;
      }
      for (int64_t n = 0; n < Np; ++n)
        for (int64_t l = c * T; l < end; ++l) {
          const int64_t at = from + n * a.stride[3] + (m.walked ? steps.token(l) : l) * a.stride[4];
          to[l * Np + n] = n < N ? a.get(at) : 0.0f;
        }
    });
  }

  Walk walk(int64_t b, int64_t k) const {
    return {order, seq, b * order.stride[0] + k * order.stride[1], b * seq.stride[0], L, reverse};
  }
  // First channel and number of channels of a block.
  int64_t channel(int64_t block) const { return block / blocks_g * Eg + block % blocks_g * W; }
  int width(int64_t block) const { return (int)std::min<int64_t>(W, Eg - block % blocks_g * W); }
  Face face(const Array& a, int64_t b, int64_t k) const {
    return Face(a, b * a.stride[0] + k * a.stride[1], a.stride[2], a.stride[3]);
  }
  // Where chunk c of a block keeps its first state in the saved tensor.
  int64_t saved(int64_t b, int64_t k, int64_t block, int64_t c) const {
    return (((b * K + k) * blocks + block) * chunks + c) * Np * W;
  }
  int64_t first_chunk(int64_t segment) const { return segment * chunks / segments; }
};

// to[n][lane] = scale * a[k, c + lane, n], zero where there is no such channel or state.
inline void load_channels(float* to, const Array& a, int64_t offset, int64_t s_channel, int64_t s_state, int width,
                          int64_t N, int64_t Np, float scale) {
  for (int64_t n = 0; n < Np; ++n)
    for (int i = 0; i < W; ++i)
      to[n * W + i] = i < width && n < N && a ? scale * a.get(offset + i * s_channel + n * s_state) : 0.0f;
}
inline void store_channels(const Array& a, int64_t offset, int64_t s_channel, int64_t s_state, const float* from,
                           int width, int64_t N) {
  for (int64_t n = 0; n < N; ++n)
    for (int i = 0; i < width; ++i) a.set(offset + i * s_channel + n * s_state, from[n * W + i]);
}

// What a block of channels has for the whole walk.
struct Block {
  float *A2, *Bc, *Cc;  // [Np][W]; A2 = A * log2(e)
  vf D, bias;
  Buffer memory;

  explicit Block(int64_t Np) : memory(3 * Np * W) { A2 = memory, Bc = A2 + Np * W, Cc = Bc + Np * W; }

  void fill(const Scan& s, int64_t k, int64_t block) {
    const int64_t c = s.channel(block);
    const int width = s.width(block);
    auto matrix = [&](float* to, const Array& a, float scale) {
      load_channels(to, a, k * a.stride[0] + c * a.stride[1], a.stride[1], a.stride[2], width, s.N, s.Np, scale);
    };
    auto vector = [&](const Array& a) {
      float x[W];
      for (int i = 0; i < W; ++i) x[i] = a && i < width ? a.get(k * a.stride[0] + (c + i) * a.stride[1]) : 0.0f;
      return load(x);
    };
    matrix(A2, s.A, LOG2E);
    if (s.Bm.constant) matrix(Bc, s.Bm.a, 1.0f);
    if (s.Cm.constant) matrix(Cc, s.Cm.a, 1.0f);
    D = vector(s.D), bias = vector(s.bias);
  }
};

// The rows of B and C of one chunk's tokens.
struct MapRows {
  const float *b[T], *c[T];
  void fill(const Scan& s, const Steps& steps, int64_t row, int64_t k, int64_t g) {
    const float* pb = s.Bm.constant ? nullptr : s.Bm.rows(row, k, g);
    const float* pc = s.Cm.constant ? nullptr : s.Cm.rows(row, k, g);
    for (int t = 0; t < steps.n; ++t) {
      b[t] = pb ? pb + (s.Bm.walked ? steps.begin + t : steps.pos[t]) * s.Bm.sl : nullptr;
      c[t] = pc ? pc + (s.Cm.walked ? steps.begin + t : steps.pos[t]) * s.Cm.sl : nullptr;
    }
  }
};

// M states along one chunk: h is carried, y accumulates C * h where OUT, states and decays are kept where KEEP.
template <int M, bool CB, bool CC, bool OUT, bool KEEP>
BK_INLINE void walk_states(const Steps& steps, const float* dt, const float* dtu, const MapRows& rows, int64_t n0,
                           const Block& block, float* h, float* y, float* keep_a, float* keep_h, int64_t Np) {
  vf state[M];
  const float *A2 = block.A2 + n0 * W, *Bc = block.Bc + n0 * W, *Cc = block.Cc + n0 * W;
#pragma GCC unroll 16
  for (int n = 0; n < M; ++n) state[n] = load(h + (n0 + n) * W);
  for (int t = 0; t < steps.n; ++t) {
    vf d = load(dt + t * W), x = load(dtu + t * W), sum{}, sum2{};
    const float *b = CB ? nullptr : rows.b[t] + n0, *c = CC || !OUT ? nullptr : rows.c[t] + n0;
    const bool cleared = steps.reset[t];
    if (cleared) {
#pragma GCC unroll 16
      for (int n = 0; n < M; ++n) state[n] = vf{};
    }
#pragma GCC unroll 16
    for (int n = 0; n < M; ++n) {
      vf a = exp2(d * load(A2 + n * W));
      state[n] = fma(a, state[n], x * (CB ? load(Bc + n * W) : set1(b[n])));
      if (OUT) {
        vf& s = n % 2 ? sum2 : sum;
        s = fma(state[n], CC ? load(Cc + n * W) : set1(c[n]), s);
      }
      if (KEEP) {
        store(keep_a + (t * Np + n0 + n) * W, cleared ? vf{} : a);
        store(keep_h + (t * Np + n0 + n) * W, state[n]);
      }
    }
    if (OUT) store(y + t * W, load(y + t * W) + (sum + sum2));
  }
#pragma GCC unroll 16
  for (int n = 0; n < M; ++n) store(h + (n0 + n) * W, state[n]);
}

template <bool CB, bool CC, bool OUT, bool KEEP>
inline void walk_all(const Steps& steps, const float* dt, const float* dtu, const MapRows& rows, const Block& block,
                     float* h, float* y, float* keep_a, float* keep_h, int64_t Np) {
  int64_t n = 0;
  for (; n + NB <= Np; n += NB)
    walk_states<NB, CB, CC, OUT, KEEP>(steps, dt, dtu, rows, n, block, h, y, keep_a, keep_h, Np);
  for (; n < Np; n += 4)
    walk_states<4, CB, CC, OUT, KEEP>(steps, dt, dtu, rows, n, block, h, y, keep_a, keep_h, Np);
}

template <bool OUT, bool KEEP>
inline void walk_chunk(const Scan& s, const Steps& steps, const float* dt, const float* dtu, const MapRows& rows,
                       const Block& block, float* h, float* y, float* keep_a = nullptr, float* keep_h = nullptr) {
  if (!s.Bm.constant && !s.Cm.constant)
    walk_all<false, false, OUT, KEEP>(steps, dt, dtu, rows, block, h, y, keep_a, keep_h, s.Np);
  else if (!s.Bm.constant)
    walk_all<false, true, OUT, KEEP>(steps, dt, dtu, rows, block, h, y, keep_a, keep_h, s.Np);
  else if (!s.Cm.constant)
    walk_all<true, false, OUT, KEEP>(steps, dt, dtu, rows, block, h, y, keep_a, keep_h, s.Np);
  else
    walk_all<true, true, OUT, KEEP>(steps, dt, dtu, rows, block, h, y, keep_a, keep_h, s.Np);
}

// delta to the step size, in place.
inline void step_sizes(float* dt, int n, vf bias, bool softplus_too) {
  for (int t = 0; t < n; ++t) {
    vf x = load(dt + t * W) + bias;
    store(dt + t * W, softplus_too ? softplus(x) : x);
  }
}

// State after each segment from zero, and what multiplies the state before it; combined into the true first states.
// `backward` says which way segments follow each other; `local(row, segment, state, total_dt)` runs one.
template <class Local>
void combine_segments(const Scan& s, bool backward, const Local& local, const Array& outer, float* starts) {
  const int64_t size = s.Np * W, rows = s.B * s.K * s.blocks;
  Buffer ends(rows * s.segments * size), factors(rows * s.segments * W);
  parallel_tasks(rows * (s.segments - 1), [&](int64_t task) {
    int64_t row = task / (s.segments - 1), seg = task % (s.segments - 1) + (backward ? 1 : 0);
    float* end = ends + (row * s.segments + seg) * size;
    std::memset(end, 0, size * 4);
    local(row, seg, end, factors + (row * s.segments + seg) * W);
  });
  for (int64_t row = 0; row < rows; ++row) {
    const int64_t block = row % s.blocks, k = row / s.blocks % s.K, b = row / s.blocks / s.K;
    Block constants(s.Np);
    constants.fill(s, k, block);
    const int64_t first = backward ? s.segments - 1 : 0, step = backward ? -1 : 1;
    float* start = starts + (row * s.segments + first) * size;
    load_channels(start, outer, b * outer.stride[0] + k * outer.stride[1] + s.channel(block) * outer.stride[2],
                  outer.stride[2], outer.stride[3], s.width(block), s.N, s.Np, 1.0f);
    for (int64_t i = 0, seg = first; i + 1 < s.segments; ++i, seg += step) {
      const float *end = ends + (row * s.segments + seg) * size, *now = starts + (row * s.segments + seg) * size;
      float* next = starts + (row * s.segments + seg + step) * size;
      vf total = load(factors + (row * s.segments + seg) * W);
      for (int64_t n = 0; n < s.Np; ++n) {
        // a reset anywhere in the segment is a total of infinity: nothing passes
        vf a = exp2(total * load(constants.A2 + n * W));
        a = total == INFINITY ? vf{} : a;
        store(next + n * W, fma(a, load(now + n * W), load(end + n * W)));
      }
    }
  }
}

inline void scan_forward_task(const Scan& s, const Array& out, const Array& last, float* saved, const float* starts,
                              int64_t b, int64_t k, int64_t g, int64_t first, int64_t count, int64_t segment) {
  const int64_t size = s.Np * W, block0 = g * s.blocks_g + first;
  Buffer memory(count * size + 4 * T * W);
  float *states = memory, *dt = states + count * size, *x = dt + T * W, *y = x + T * W, *gate = y + T * W;
  std::vector<Block> constants;
  const Array& h0 = s.h0;
  for (int64_t i = 0; i < count; ++i) {
    const int64_t block = block0 + i, c0 = s.channel(block);
    constants.emplace_back(s.Np);
    constants.back().fill(s, k, block);
    if (starts)
      std::memcpy(states + i * size, starts + (((b * s.K + k) * s.blocks + block) * s.segments + segment) * size, size * 4);
    else
      load_channels(states + i * size, h0, b * h0.stride[0] + k * h0.stride[1] + c0 * h0.stride[2], h0.stride[2],
                    h0.stride[3], s.width(block), s.N, s.Np, 1.0f);
  }
  const Face u = s.face(s.u, b, k), delta = s.face(s.delta, b, k), z = s.face(s.z, b, k), to = s.face(out, b, k);
  const Walk walk = s.walk(b, k);
  Steps steps;
  MapRows rows;
  for (int64_t c = s.first_chunk(segment); c < s.first_chunk(segment + 1); ++c) {
    steps.fill(walk, c * T, (int)std::min<int64_t>(T, s.L - c * T));
    rows.fill(s, steps, b, k, g);
    for (int64_t i = 0; i < count; ++i) {
      const int64_t block = block0 + i, c0 = s.channel(block);
      const int width = s.width(block);
      const Block& own = constants[i];
      float* h = states + i * size;
      if (saved) std::memcpy(saved + s.saved(b, k, block, c), h, size * 4);
      load_tile(dt, delta, steps, c0, width);
      load_tile(x, u, steps, c0, width);
      if (z) load_tile(gate, z, steps, c0, width);
      for (const Face* f : {&u, &delta, &z}) prefetch_tile(*f, walk, (c + 1) * T, c0, width);
      prefetch_tile<1>(to, walk, c * T, c0, width);
      step_sizes(dt, steps.n, own.bias, s.softplus);
      for (int t = 0; t < steps.n; ++t) {
        vf v = load(x + t * W);
        store(y + t * W, own.D * v);
        store(x + t * W, load(dt + t * W) * v);
      }
      walk_chunk<true, false>(s, steps, dt, x, rows, own, h, y);
      if (z) {
        for (int t = 0; t < steps.n; ++t) store(y + t * W, load(y + t * W) * silu(load(gate + t * W)));
      }
      store_tile(to, y, steps, c0, width);
    }
  }
  if (!last || segment + 1 < s.segments) return;
  for (int64_t i = 0; i < count; ++i)
    store_channels(last, b * last.stride[0] + k * last.stride[1] + s.channel(block0 + i) * last.stride[2], last.stride[2],
                   last.stride[3], states + i * size, s.width(block0 + i), s.N);
}

// The state after one segment that starts from zero.
inline void scan_forward_local(const Scan& s, int64_t row, int64_t segment, float* h, float* total) {
  const int64_t block = row % s.blocks, k = row / s.blocks % s.K, b = row / s.blocks / s.K, c0 = s.channel(block);
  Block constants(s.Np);
  constants.fill(s, k, block);
  Buffer memory(2 * T * W);
  float *dt = memory, *x = dt + T * W;
  const Face u = s.face(s.u, b, k), delta = s.face(s.delta, b, k);
  const Walk walk = s.walk(b, k);
  Steps steps;
  MapRows rows;
  vf sum{};
  for (int64_t c = s.first_chunk(segment); c < s.first_chunk(segment + 1); ++c) {
    steps.fill(walk, c * T, (int)std::min<int64_t>(T, s.L - c * T));
    rows.fill(s, steps, b, k, block / s.blocks_g);
    load_tile(dt, delta, steps, c0, s.width(block));
    load_tile(x, u, steps, c0, s.width(block));
    step_sizes(dt, steps.n, constants.bias, s.softplus);
    for (int t = 0; t < steps.n; ++t) {
      vf d = load(dt + t * W);
      store(x + t * W, d * load(x + t * W));
      sum = steps.reset[t] ? set1(INFINITY) : sum + d;
    }
    walk_chunk<false, false>(s, steps, dt, x, rows, constants, h, nullptr);
  }
  store(total, sum);
}

inline void scan_forward(const Scan& s, const Array& out, const Array& last, float* saved) {
  Buffer starts;
  if (s.segments > 1) {
    starts = Buffer(s.B * s.K * s.blocks * s.segments * s.Np * W);
    combine_segments(
        s, false, [&](int64_t row, int64_t seg, float* h, float* total) { scan_forward_local(s, row, seg, h, total); },
        s.h0, starts);
  }
  // A channel's result is the same in whatever task it is, so this may depend on the number of threads.
  const int64_t enough = 4 * torch::stable::get_num_threads();
  int64_t most = 64 / W;
  auto tasks = [&] { return s.B * s.K * s.G * ((s.blocks_g + most - 1) / most) * s.segments; };
  while (most > LINE_BLOCKS && tasks() < enough) most /= 2;
  const int64_t parts = (s.blocks_g + most - 1) / most;
  parallel_tasks(tasks(), [&](int64_t task) {
    const int64_t seg = task % s.segments, part = task / s.segments % parts, row = task / s.segments / parts;
    const int64_t g = row % s.G, k = row / s.G % s.K, b = row / s.G / s.K, first = part * most;
    scan_forward_task(s, out, last, saved, starts, b, k, g, first, std::min(most, s.blocks_g - first), seg);
  });
}

}  // namespace bestiary
