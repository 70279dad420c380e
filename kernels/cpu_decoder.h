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

// A head's last `turned` values, pairs (a, b), become (a·cos − b·sin, b·cos + a·sin); those before are copied. `turn` has the cosines,
// then the sines; `scratch` has room for `turned` values.
template <typename T>
void turn_head(const T* in, int64_t dim, const float* turn, int64_t turned, bool interleaved, T* scratch, T* out) {
  const int64_t half = turned / 2, plain = dim - turned;
  std::copy(in, in + plain, out);
  in += plain, out += plain;
  if (interleaved) {
    for (int64_t i = 0; i < half; ++i) scratch[i] = in[2 * i], scratch[half + i] = in[2 * i + 1];
    in = scratch;
  }
  by_vecs(half, [&](int64_t i, int64_t count) {
    const Vec a = load_first(in + i, count), b = load_first(in + half + i, count);
    const Vec c = load_first(turn + i, count), s = load_first(turn + half + i, count);
    store_first(a * c - b * s, out + i, count);
    store_first(b * c + a * s, out + half + i, count);
  });
}

// Every head of every row turned by its row's `turn`.
Tensor rotary(const Tensor& x, const Tensor& turn_, bool interleaved) {
  const Tensor turn = turn_.contiguous();
  const int64_t rows = x.size(0), heads = x.size(1), dim = x.size(2), turned = turn.size(1);
  TORCH_CHECK_VALUE(x.stride(2) == 1 || dim < 2, "a head's values must lie side by side");
  Tensor y = at::empty(x.sizes(), x.options());
  with_type(x, [&](auto t) {
    using T = decltype(t);
    at::parallel_for(0, rows, std::max<int64_t>(1, 65536 / std::max<int64_t>(1, heads * dim)), [&](int64_t from, int64_t to) {
      std::vector<T> scratch(turned);
      for (int64_t r = from; r < to; ++r)
        for (int64_t h = 0; h < heads; ++h)
          turn_head(data<T>(x) + r * x.stride(0) + h * x.stride(1), dim, turn.const_data_ptr<float>() + r * turned, turned, interleaved,
                    scratch.data(), data<T>(y) + (r * heads + h) * dim);
    });
  });
  return y;
}

}  // namespace
