// What stands between the projections of a Mamba-2 layer, for one token: the step of the convolution, the step sizes, the
// step of the scan, the gated norm. Each is the function of its own op, on parts of the projection and of one buffer.
#pragma once

#include <initializer_list>

#include "norm.h"
#include "step.h"

namespace bestiary {

struct Mamba2Step {
  Array zxbcdt, conv_state, ssm_state;  // (B, I + C + H) with I = H P and C = I + 2 G N, (B', W - 1, C), (B', H, P, N)
  Array conv_weight, conv_bias, dt_bias, A, D, norm_weight, out;  // (C, W), (C), (H), (H), (H), (I), (B, I)
  Ints rows;
  int64_t groups;
  float eps, low, high;
};

// A part of a tensor under other dimensions.
inline Array part(const Array& a, int64_t offset, std::initializer_list<int64_t> size,
                  std::initializer_list<int64_t> stride) {
  Array found;
  found.p = a ? a.at(offset) : nullptr, found.dtype = a.dtype;
  std::copy(size.begin(), size.end(), found.size);
  std::copy(stride.begin(), stride.end(), found.stride);
  return found;
}

// d (B, H) = softplus(dt + bias) within the bounds.
inline void step_sizes(const Mamba2Step& s, const Array& dt, float* d) {
  const int64_t B = dt.size[0], H = dt.size[1];
  const Buffer room(2 * H);
  const float* bias = read_line(s.dt_bias, 0, s.dt_bias.stride[0], H, room.p);
  for (int64_t b = 0; b < B; ++b) {
    const float* line = read_line(dt, b * dt.stride[0], dt.stride[1], H, room.p + H);
    each_vector(H, [&](int64_t h, auto get, auto put) {
      put(d + b * H + h, max(set1(s.low), min(set1(s.high), softplus(get(line + h) + get(bias + h)))));
    });
  }
}

inline void mamba2_step(const Mamba2Step& s) {
  const int64_t B = s.zxbcdt.size[0], H = s.ssm_state.size[1], P = s.ssm_state.size[2], N = s.ssm_state.size[3];
  const int64_t I = H * P, G = s.groups, C = I + 2 * G * N, row = s.zxbcdt.stride[0], one = s.zxbcdt.stride[1];
  const Buffer room(B * (C + I + H));
  Array floats;
  floats.p = reinterpret_cast<char*>(room.p);
  const int64_t y_at = B * C, d_at = y_at + B * I;
  const Array& past = s.conv_state;

  conv_update({part(s.zxbcdt, I * one, {B, C}, {row, one}),
               part(past, 0, {past.size[0], C, past.size[1]}, {past.stride[0], past.stride[2], past.stride[1]}),
               s.conv_weight, s.conv_bias, part(floats, 0, {B, C}, {C, 1}), Ints(std::nullopt), s.rows, true});
  step_sizes(s, part(s.zxbcdt, (I + C) * one, {B, H}, {row, one}), room.p + d_at);
  state_update({s.ssm_state, part(floats, 0, {B, H, P}, {C, P, 1}), part(floats, d_at, {B, H, P}, {H, 1, 0}),
                part(s.A, 0, {H, P, N}, {s.A.stride[0], 0, 0}), part(floats, I, {B, G, N}, {C, N, 1}),
                part(floats, I + G * N, {B, G, N}, {C, N, 1}), part(s.D, 0, {H, P}, {s.D.stride[0], 0}), Array(), Array(),
                part(floats, y_at, {B, H, P}, {I, P, 1}), s.rows, false});
  gated_norm_forward(GatedNorm(part(floats, y_at, {B, I}, {I, 1}), s.norm_weight, part(s.zxbcdt, 0, {B, I}, {row, one}), 1,
                               s.eps, I / G, false),
                     s.out);
  for (int64_t b = 0; s.rows && b < B; ++b)  // a gate that is not a number would show in the zeros of padding
    if (s.rows.get(b * s.rows.stride[0]) < 0)
      for (int64_t i = 0; i < I; ++i) s.out.set(b * s.out.stride[0] + i, 0.0f);
}

}  // namespace bestiary
