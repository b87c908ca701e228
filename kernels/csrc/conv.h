// The causal depthwise convolution, forward and backward: which way a call goes, and how its work is cut.
#pragma once

#include "conv_lines.h"
#include "conv_tiles.h"

namespace bestiary {

inline void conv_forward(const Conv& c, const Array& out) {
  if (c.lines)
    return parallel_tasks(c.B * c.K * c.D, [&](int64_t task) {
      conv_line(c, out, task / c.D / c.K, task / c.D % c.K, task % c.D);
    });
  parallel_tasks(c.B * c.K * c.groups * c.stretches, [&](int64_t task) {
    const int64_t stretch = task % c.stretches, group = task / c.stretches % c.groups, row = task / c.stretches / c.groups;
    conv_tiles(c, out, row / c.K, row % c.K, group, stretch);
  });
}

inline void conv_backward(const Conv& c, const ConvGrads& g) {
  const int64_t rows = c.B * c.K, size = c.D * (c.width + 1);
  Buffer parts(rows * c.stretches * size);
  if (c.lines)
    parallel_tasks(rows * c.D, [&](int64_t task) {
      const int64_t d = task % c.D, row = task / c.D;
      conv_line_backward(c, g, row / c.K, row % c.K, d, parts + row * size + d * (c.width + 1));
    });
  else
    parallel_tasks(rows * c.groups * c.stretches, [&](int64_t task) {
      const int64_t stretch = task % c.stretches, group = task / c.stretches % c.groups, row = task / c.stretches / c.groups;
      conv_tiles_backward(c, g, row / c.K, row % c.K, group, stretch, parts + (row * c.stretches + stretch) * size);
    });
  for (int64_t d = 0; d < c.D; ++d)
    for (int64_t j = 0; j <= c.width; ++j) {
      float sum = 0;
      for (int64_t r = 0; r < rows * c.stretches; ++r) sum += parts[r * size + d * (c.width + 1) + j];
      if (j < c.width && g.dweight) g.dweight.set(d * g.dweight.stride[0] + j * g.dweight.stride[1], sum);
      if (j == c.width && g.dbias) g.dbias.set(d * g.dbias.stride[0], sum);
    }
}

}  // namespace bestiary
