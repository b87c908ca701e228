// The gated RMS norm, forward and backward: a row at a time, its groups one after the other, all sums in float32.
#pragma once

#include "step.h"

namespace bestiary {

struct GatedNorm {
  Array x, weight, z;  // (..., F), (F), (..., F)
  int64_t dims, rows = 1, channels, size;  // leading dimensions and their product; F; channels of a group
  float eps;
  bool norm_first;

  GatedNorm(const Array& x_, const Array& weight_, const Array& z_, int64_t dims_, double eps_, int64_t size_, bool norm_first_)
      : x(x_), weight(weight_), z(z_), dims(dims_), channels(x_.size[dims_]), size(size_), eps((float)eps_),
        norm_first(norm_first_) {
    for (int64_t i = 0; i < dims; ++i) rows *= x.size[i];
  }

  // Where a row of a tensor of x's shape begins.
  int64_t offset(const Array& a, int64_t row) const {
    int64_t at = 0;
    for (int64_t i = dims - 1; i >= 0; --i) at += row % x.size[i] * a.stride[i], row /= x.size[i];
    return at;
  }
  const float* read(const Array& a, int64_t row, float* room) const {
    return read_line(a, offset(a, row), a.stride[dims], channels, room);
  }
  const float* weights(float* room) const { return read_line(weight, 0, weight.stride[0], channels, room); }
  // What to compute a row in: the tensor itself where it holds floats.
  float* target(const Array& a, int64_t row, float* room) const {
    return a.dtype == F32 ? reinterpret_cast<float*>(a.at(offset(a, row))) : room;
  }
  void finish(const Array& a, int64_t row, const float* values) const {
    if (a.dtype != F32) write_line(a, offset(a, row), 1, channels, values);
  }
  float inverse_rms(float squares) const { return 1.0f / std::sqrt(squares / (float)size + eps); }
};

// step(i, get, put) for W elements at a time of n; the last may be fewer, and what is missing reads as 0.
template <class F>
BK_INLINE void each_vector(int64_t n, const F& step) {
  int64_t i = 0;
  for (; i + W <= n; i += W)
    step(i, [](const float* p) { return load(p); }, [](float* p, vf v) { store(p, v); });
  if (const int left = (int)(n - i))
    step(i, [=](const float* p) { return load_n(p, left); }, [=](float* p, vf v) { store_n(p, v, left); });
}

// Normed values of one group; `gated` is room for what is normed where the gate comes first.
template <bool GATE, bool NORM_FIRST>
BK_INLINE void gated_norm_group(const GatedNorm& s, const float* x, const float* w, const float* z, float* gated, float* out) {
  vf sum = {};
  each_vector(s.size, [&](int64_t i, auto get, auto put) {
    vf u = get(x + i);
    if constexpr (GATE && !NORM_FIRST) put(gated + i, u *= silu(get(z + i)));
    sum = fma(u, u, sum);
  });
  const vf inverse = set1(s.inverse_rms(hsum(sum)));
  const float* from = GATE && !NORM_FIRST ? gated : x;
  each_vector(s.size, [&](int64_t i, auto get, auto put) {
    vf y = get(from + i) * inverse * get(w + i);
    if constexpr (GATE && NORM_FIRST) y *= silu(get(z + i));
    put(out + i, y);
  });
}

inline void gated_norm_forward(const GatedNorm& s, const Array& out) {
  const int64_t F = s.channels, grain = 1 + 16384 / F;
  torch::stable::parallel_for(0, s.rows, grain, [&](int64_t begin, int64_t end) {
    const Buffer room(4 * F + s.size);
    const float* w = s.weights(room.p);
    float* gated = room.p + 4 * F;
    for (int64_t row = begin; row < end; ++row) {
      const float *x = s.read(s.x, row, room.p + F), *z = s.z ? s.read(s.z, row, room.p + 2 * F) : nullptr;
      float* y = s.target(out, row, room.p + 3 * F);
      for (int64_t f = 0; f < F; f += s.size) {
        if (!z)
          gated_norm_group<false, false>(s, x + f, w + f, z, gated, y + f);
        else if (s.norm_first)
          gated_norm_group<true, true>(s, x + f, w + f, z + f, gated, y + f);
        else
          gated_norm_group<true, false>(s, x + f, w + f, z + f, gated, y + f);
      }
      s.finish(out, row, y);
    }
  });
}

struct GatedNormGrads {
  Array dout, dx, dweight, dz;
};

// Of one group. With u what is normed, n = u / rms(u) and a the gradient of n, that of u is (a - n mean(a n)) / rms(u).
// `gate` and `slope` are room for silu(z) and its derivative between the two passes.
template <bool GATE, bool NORM_FIRST>
BK_INLINE void gated_norm_group_backward(const GatedNorm& s, const float* x, const float* w, const float* z,
                                         const float* dout, float* gate, float* slope, float* dx, float* dw, float* dz) {
  vf squares = {}, product = {};
  each_vector(s.size, [&](int64_t i, auto get, auto put) {
    vf u = get(x + i), a = get(dout + i) * get(w + i);
    if constexpr (GATE) {
      const Silu g = silu_and_slope(get(z + i));
      put(gate + i, g.value), put(slope + i, g.slope);
      (NORM_FIRST ? a : u) *= g.value;
    }
    squares = fma(u, u, squares);
    product = fma(a, u, product);
  });
  const float r = s.inverse_rms(hsum(squares));
  const vf inverse = set1(r), mean = set1(hsum(product) / (float)s.size * r);
  each_vector(s.size, [&](int64_t i, auto get, auto put) {
    const vf in = get(x + i), weight = get(w + i), d = get(dout + i);
    vf u = in, a = d * weight, scaled = d, g;
    if constexpr (GATE) {
      g = get(gate + i);
      (NORM_FIRST ? a : u) *= g;
      if constexpr (NORM_FIRST) scaled *= g;
    }
    const vf n = u * inverse;
    vf du = inverse * (a - n * mean);
    if (dw) put(dw + i, fma(scaled, n, get(dw + i)));
    if constexpr (GATE) {
      if (dz) put(dz + i, (NORM_FIRST ? d * weight * n : du * in) * get(slope + i));
      if constexpr (!NORM_FIRST) du *= g;
    }
    if (dx) put(dx + i, du);
  });
}

// The rows are cut into parts by their number alone, and the parts of the weight's gradient are summed in order: any
// number of threads gives the same bits.
inline void gated_norm_backward(const GatedNorm& s, const GatedNormGrads& g) {
  const int64_t F = s.channels, most = 64, rows = std::max((s.rows + most - 1) / most, 1 + 4096 / F);
  const int64_t parts = (s.rows + rows - 1) / rows;
  Buffer sums(g.dweight ? parts * F : 0);
  torch::stable::parallel_for(0, parts, 1 + 8192 / (rows * F), [&](int64_t begin, int64_t end) {
    const Buffer room(6 * F + 2 * s.size);
    const float* w = s.weights(room.p);
    float *gate = room.p + 6 * F, *slope = gate + s.size;
    for (int64_t part = begin; part < end; ++part) {
      float* dw = g.dweight ? sums.p + part * F : nullptr;
      if (dw) std::memset(dw, 0, F * sizeof(float));
      for (int64_t row = part * rows; row < std::min(s.rows, (part + 1) * rows); ++row) {
        const float *x = s.read(s.x, row, room.p + F), *dout = s.read(g.dout, row, room.p + 2 * F);
        const float* z = s.z ? s.read(s.z, row, room.p + 3 * F) : nullptr;
        float* dx = g.dx ? s.target(g.dx, row, room.p + 4 * F) : nullptr;
        float* dz = g.dz ? s.target(g.dz, row, room.p + 5 * F) : nullptr;
        for (int64_t f = 0; f < F; f += s.size) {
          auto at = [f](auto* p) { return p ? p + f : nullptr; };
          auto run = [&](auto gated, auto norm_first) {
            gated_norm_group_backward<decltype(gated)::value, decltype(norm_first)::value>(
                s, x + f, w + f, at(z), dout + f, gate, slope, at(dx), at(dw), at(dz));
          };
          if (!z)
            run(std::false_type{}, std::false_type{});
          else if (s.norm_first)
            run(std::true_type{}, std::true_type{});
          else
            run(std::true_type{}, std::false_type{});
        }
        if (dx) s.finish(g.dx, row, dx);
        if (dz) s.finish(g.dz, row, dz);
      }
    }
  });
  if (!g.dweight) return;
  for (int64_t part = 1; part < parts; ++part)
    for (int64_t f = 0; f < F; ++f) sums.p[f] += sums.p[part * F + f];
  for (int64_t f = 0; f < F; ++f) g.dweight.set(f * g.dweight.stride[0], parts ? sums.p[f] : 0.0f);
}

}  // namespace bestiary
