// What a decoder does to each row between its products: RMS norm and rotary embedding.
#pragma once

#include "cpu_vector.h"

namespace {

// y = w·T(x/√(mean(x²) + eps)) for each row; the sum of squares lane by lane, then the lanes in one tree.
Tensor rms_norm(const Tensor& x_, const Tensor& weight_, double eps) {
  const Tensor x = x_.contiguous(), weight = weight_.to(x.scalar_type()).contiguous();
  const int64_t width = x.size(-1), rows = width ? x.numel() / width : 0;
  Tensor y = at::empty_like(x);
  with_type(x, [&](auto t) {
    using T = decltype(t);
    const T* w = data<T>(weight);
    at::parallel_for(0, rows, std::max<int64_t>(1, 65536 / width), [&](int64_t from, int64_t to) {
      for (int64_t r = from; r < to; ++r) {
        const T* in = data<T>(x) + r * width;
        T* out = data<T>(y) + r * width;
        Vec squares = {};
        by_vecs(width, [&](int64_t i, int64_t count) {
          const Vec v = load_first(in + i, count);
          squares += v * v;
        });
        const float factor = 1.0f / std::sqrt(add_lanes(squares) / width + static_cast<float>(eps));
        by_vecs(width, [&](int64_t i, int64_t count) {
          T normed[kLanes];
          store(load_first(in + i, count) * factor, normed);
          store_first(load(normed) * load_first(w + i, count), out + i, count);
        });
      }
    });
  });
  return y;
}

// Pairs (a, b) of each head turned: (a·cos − b·sin, b·cos + a·sin); `turn` has a row's cosines, then its sines.
Tensor rotary(const Tensor& x, const Tensor& turn_, bool interleaved) {
  const Tensor turn = turn_.contiguous();
  const int64_t rows = x.size(0), heads = x.size(1), half = x.size(2) / 2;
  TORCH_CHECK_VALUE(x.stride(2) == 1 || half == 0, "a head's values must lie side by side");
  Tensor y = at::empty(x.sizes(), x.options());
  with_type(x, [&](auto t) {
    using T = decltype(t);
    at::parallel_for(0, rows, std::max<int64_t>(1, 32768 / std::max<int64_t>(1, heads * half)), [&](int64_t from, int64_t to) {
      std::vector<T> pairs(2 * half);
      for (int64_t r = from; r < to; ++r) {
        const float *cos = turn.const_data_ptr<float>() + r * 2 * half, *sin = cos + half;
        for (int64_t h = 0; h < heads; ++h) {
          const T* in = data<T>(x) + r * x.stride(0) + h * x.stride(1);
          T* out = data<T>(y) + (r * heads + h) * 2 * half;
          if (interleaved) {
            for (int64_t i = 0; i < half; ++i) pairs[i] = in[2 * i], pairs[half + i] = in[2 * i + 1];
            in = pairs.data();
          }
          by_vecs(half, [&](int64_t i, int64_t count) {
            const Vec a = load_first(in + i, count), b = load_first(in + half + i, count);
            const Vec c = load_first(cos + i, count), s = load_first(sin + i, count);
            store_first(a * c - b * s, out + i, count);
            store_first(b * c + a * s, out + half + i, count);
          });
        }
      }
    });
  });
  return y;
}

}  // namespace
