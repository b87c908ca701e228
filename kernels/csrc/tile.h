// Tensors as the kernels see them, walks along the tokens, and tiles of [steps][W channels] floats in cache.
#pragma once

#include <algorithm>
#include <cstdlib>
#include <memory>
#include <optional>

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include "simd.h"

namespace bestiary {

using torch::stable::Tensor;
using MaybeTensor = std::optional<Tensor>;
using torch::headeronly::ScalarType;

inline int dtype_of(const Tensor& t) {
  switch (t.scalar_type()) {
    case ScalarType::Float: return F32;
    case ScalarType::BFloat16: return BF16;
    case ScalarType::Half: return F16;
    default: STD_TORCH_CHECK(false, "bestiary: the C++ kernels take float32, bfloat16 and float16"); return F32;
  }
}

// A tensor of floats of any strides, or nothing. Strides count elements.
struct Array {
  char* p = nullptr;
  int dtype = F32;
  int64_t stride[5] = {0, 0, 0, 0, 0};
  int64_t size[5] = {1, 1, 1, 1, 1};

  Array() = default;
  explicit Array(const Tensor& t) : p(static_cast<char*>(t.data_ptr())), dtype(dtype_of(t)) {
    for (int64_t i = 0; i < t.dim(); ++i) stride[i] = t.stride(i), size[i] = t.size(i);
  }
  explicit Array(const MaybeTensor& t) {
    if (t.has_value()) *this = Array(*t);
  }
  explicit operator bool() const { return p != nullptr; }
  char* at(int64_t offset) const { return p + offset * (dtype == F32 ? 4 : 2); }
  float get(int64_t offset) const {
    return dtype == F32 ? reinterpret_cast<const float*>(p)[offset] : from_half(p, offset, dtype);
  }
  void set(int64_t offset, float x) const {
    if (dtype == F32)
      reinterpret_cast<float*>(p)[offset] = x;
    else
      to_half(p, offset, dtype, x);
  }
};

// A (rows, L) tensor of int32 or int64, or nothing.
struct Ints {
  const void* p = nullptr;
  bool wide = false;
  int64_t stride[3] = {0, 0, 0};

  explicit Ints(const MaybeTensor& t) {
    if (!t.has_value()) return;
    p = t->data_ptr();
    wide = t->scalar_type() == ScalarType::Long;
    STD_TORCH_CHECK(wide || t->scalar_type() == ScalarType::Int, "bestiary: indices must be int32 or int64");
    for (int64_t i = 0; i < t->dim(); ++i) stride[i] = t->stride(i);
  }
  explicit operator bool() const { return p != nullptr; }
  int64_t get(int64_t offset) const {
    return wide ? static_cast<const int64_t*>(p)[offset] : static_cast<const int32_t*>(p)[offset];
  }
};

// Memory of a task, aligned to cache lines.
struct Buffer {
  float* p = nullptr;
  Buffer() = default;
  explicit Buffer(int64_t floats) { p = static_cast<float*>(std::aligned_alloc(64, (floats * 4 + 63 + 64) / 64 * 64)); }
  Buffer(Buffer&& o) noexcept : p(o.p) { o.p = nullptr; }
  Buffer& operator=(Buffer&& o) noexcept {
    std::swap(p, o.p);
    return *this;
  }
  ~Buffer() { std::free(p); }
  operator float*() const { return p; }
};

template <class F>
void parallel_tasks(int64_t n, const F& task) {
  torch::stable::parallel_for(0, n, 1, [&](int64_t begin, int64_t end) {
    FlushToZero flush;
    for (int64_t i = begin; i < end; ++i) task(i);
  });
}

constexpr int T = 64;  // steps of a chunk: a tile of 16 channels is 4 KiB, and states are kept once a chunk

// Which token stands at each step of one row: identity, reversed, or by an order.
struct Walk {
  Ints order, seq;
  int64_t order_row = 0, seq_row = 0, L;
  bool reverse;

  int64_t token(int64_t step) const {
    if (reverse) step = L - 1 - step;
    return order ? order.get(order_row + step * order.stride[2]) : step;
  }
};

// The tokens of one chunk.
struct Steps {
  int64_t pos[T];
  bool reset[T];  // the state is cleared before this step
  int64_t begin;
  int n;
  int along;  // +1 or -1 if tokens are consecutive in memory, 0 if not
  bool resets;

  void fill(const Walk& walk, int64_t first, int count) {
    begin = first, n = count;
    along = walk.order ? 0 : (walk.reverse ? -1 : 1);
    for (int t = 0; t < n; ++t) pos[t] = walk.token(begin + t);
    resets = false;
    if (!walk.seq) {
      std::memset(reset, 0, sizeof reset);
      return;
    }
    const int64_t s = walk.seq.stride[1];
    int64_t before = begin ? walk.seq.get(walk.seq_row + walk.token(begin - 1) * s) : 0;
    for (int t = 0; t < n; ++t) {
      int64_t now = walk.seq.get(walk.seq_row + pos[t] * s);
      reset[t] = now != before && begin + t > 0;
      resets |= reset[t];
      before = now;
    }
  }
};

// The [L][channels] face of one row of a tensor.
struct Face {
  char* p = nullptr;
  int dtype = F32;
  int64_t channel = 0, token = 0;  // strides in elements

  Face() = default;
  Face(const Array& a, int64_t offset, int64_t channel_stride, int64_t token_stride)
      : p(a ? a.at(offset) : nullptr), dtype(a.dtype), channel(channel_stride), token(token_stride) {}
  explicit operator bool() const { return p != nullptr; }
};

// tile[t][lane] = face[steps.pos[t]][c + lane] for `width` channels; other lanes are 0.
inline void load_tile(float* tile, const Face& f, const Steps& s, int64_t c, int width) {
  if (f.dtype != F32) {
    const uint16_t* base = reinterpret_cast<const uint16_t*>(f.p) + c * f.channel;
    for (int t = 0; t < s.n; ++t) {
      const uint16_t* row = base + s.pos[t] * f.token;
      float* out = tile + t * W;
      if (f.channel == 1 && width == W) {
        halves_to_floats(out, row, W, f.dtype);
      } else {
        for (int i = 0; i < width; ++i) out[i] = from_half(row, i * f.channel, f.dtype);
        for (int i = width; i < W; ++i) out[i] = 0;
      }
    }
    return;
  }
  const float* base = reinterpret_cast<const float*>(f.p) + c * f.channel;
  if (f.channel == 1) {
    if (width == W)
      for (int t = 0; t < s.n; ++t) store(tile + t * W, load(base + s.pos[t] * f.token));
    else
      for (int t = 0; t < s.n; ++t) store(tile + t * W, load_n(base + s.pos[t] * f.token, width));
    return;
  }
  int t = 0;
  if (f.token == 1 && s.along && width == W)
    for (; t + W <= s.n; t += W) {
      vf r[W];
      const float* first = base + (s.along > 0 ? s.pos[t] : s.pos[t + W - 1]);
      for (int i = 0; i < W; ++i) r[i] = load(first + i * f.channel);
      transpose(r);
      for (int i = 0; i < W; ++i) store(tile + (t + (s.along > 0 ? i : W - 1 - i)) * W, r[i]);
    }
  for (; t < s.n; ++t) {
    const float* row = base + s.pos[t] * f.token;
    float* out = tile + t * W;
    for (int i = 0; i < width; ++i) out[i] = row[i * f.channel];
    for (int i = width; i < W; ++i) out[i] = 0;
  }
}

// Asks for what load_tile will read of the chunk at `begin`. A chunk's work hides the wait; the hardware alone follows
// neither an order nor as many streams as a tile has.
template <int WRITE = 0>
inline void prefetch_tile(const Face& f, const Walk& walk, int64_t begin, int64_t c, int width) {
  if (!f || begin < 0 || begin >= walk.L) return;
  const int64_t bytes = f.dtype == F32 ? 4 : 2;
  const char* base = f.p + c * f.channel * bytes;
  const int n = (int)std::min<int64_t>(T, walk.L - begin);
  if (f.token == 1 && !walk.order) {
    const int64_t first = walk.reverse ? walk.token(begin + n - 1) : begin;
    for (int i = 0; i < width; ++i)
      for (int64_t at = 0; at < n * bytes; at += 64) __builtin_prefetch(base + i * f.channel * bytes + first * bytes + at, WRITE, 2);
  } else if (f.channel == 1) {
    const int64_t last = (width - 1) * bytes;  // often in the next line
    for (int t = 0; t < n; ++t) {
      const char* row = base + walk.token(begin + t) * f.token * bytes;
      __builtin_prefetch(row, WRITE), __builtin_prefetch(row + last, WRITE);
    }
  }
}

// The inverse of load_tile.
inline void store_tile(const Face& f, const float* tile, const Steps& s, int64_t c, int width) {
  if (f.dtype != F32) {
    uint16_t* base = reinterpret_cast<uint16_t*>(f.p) + c * f.channel;
    for (int t = 0; t < s.n; ++t) {
      uint16_t* row = base + s.pos[t] * f.token;
      if (f.channel == 1 && width == W)
        floats_to_halves(row, tile + t * W, W, f.dtype);
      else
        for (int i = 0; i < width; ++i) to_half(row, i * f.channel, f.dtype, tile[t * W + i]);
    }
    return;
  }
  float* base = reinterpret_cast<float*>(f.p) + c * f.channel;
  if (f.channel == 1) {
    if (width == W)
      for (int t = 0; t < s.n; ++t) store(base + s.pos[t] * f.token, load(tile + t * W));
    else
      for (int t = 0; t < s.n; ++t) store_n(base + s.pos[t] * f.token, load(tile + t * W), width);
    return;
  }
  int t = 0;
  if (f.token == 1 && s.along && width == W)
    for (; t + W <= s.n; t += W) {
      vf r[W];
      for (int i = 0; i < W; ++i) r[i] = load(tile + (t + (s.along > 0 ? i : W - 1 - i)) * W);
      transpose(r);
      float* first = base + (s.along > 0 ? s.pos[t] : s.pos[t + W - 1]);
      for (int i = 0; i < W; ++i) store(first + i * f.channel, r[i]);
    }
  for (; t < s.n; ++t) {
    float* row = base + s.pos[t] * f.token;
    for (int i = 0; i < width; ++i) row[i * f.channel] = tile[t * W + i];
  }
}

}  // namespace bestiary
