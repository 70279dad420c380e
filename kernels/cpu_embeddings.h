// Bags of embeddings, and Adagrad inside their backward pass.
//
// Bag (f, b) of feature f and row b has the ids values[offsets[f·B + b]] … values[offsets[f·B + b + 1] − 1] of table f, which
// starts at weights[starts[f]]; all tables are of one width W. The gradient of an id is added up over the bags in their order
// and then applied once, whatever the number of threads.
#pragma once

#include "cpu_vector.h"

namespace {

constexpr int64_t kEmbeddingAhead = 8;  // rows of a table that are fetched before they are needed

// The width as a constant, where it is a common one: the compiler then keeps a row in registers.
template <typename F>
void with_width(int64_t width, F&& run) {
  switch (width) {
    case 4: return run(std::integral_constant<int64_t, 4>{});
    case 8: return run(std::integral_constant<int64_t, 8>{});
    case 16: return run(std::integral_constant<int64_t, 16>{});
    case 32: return run(std::integral_constant<int64_t, 32>{});
    default: return run(width);
  }
}

template <typename I>
Tensor embedding_forward(const Tensor& weights, const Tensor& starts, const I* ids, const int32_t* offsets, int64_t rows,
                         int64_t width_, bool mean) {
  const int64_t features = starts.numel();
  const int64_t* start = starts.const_data_ptr<int64_t>();
  const float* table = weights.const_data_ptr<float>();
  Tensor out = at::empty({rows, features * width_}, weights.options());
  float* op = out.data_ptr<float>();
  const int64_t end = offsets[features * rows];
  constexpr int64_t kBlock = 64;
  at::parallel_for(0, (rows + kBlock - 1) / kBlock, 1 + 8192 / (kBlock * features * width_ + 1), [&](int64_t from, int64_t to) {
    with_width(width_, [&](auto width) {
      for (int64_t block = from; block < to; ++block)
        for (int64_t f = 0; f < features; ++f) {
          const float* w = table + start[f];
          for (int64_t b = block * kBlock; b < std::min(rows, (block + 1) * kBlock); ++b) {
            const int64_t first = offsets[f * rows + b], last = offsets[f * rows + b + 1];
            float* y = op + (b * features + f) * width_;
            if (first + kEmbeddingAhead < end) __builtin_prefetch(w + static_cast<int64_t>(ids[first + kEmbeddingAhead]) * width);
            if (last == first + 1) {
              std::memcpy(y, w + static_cast<int64_t>(ids[first]) * width, width * sizeof(float));
              continue;
            }
            std::fill_n(y, static_cast<int64_t>(width), 0.0f);
            for (int64_t i = first; i < last; ++i) {
              const float* row = w + static_cast<int64_t>(ids[i]) * width;
#pragma omp simd
              for (int64_t j = 0; j < width; ++j) y[j] += row[j];
            }
            if (mean && last > first) {
              const float share = 1.0f / static_cast<float>(last - first);
#pragma omp simd
              for (int64_t j = 0; j < width; ++j) y[j] *= share;
            }
          }
        }
    });
  });
  return out;
}

// The ids of a table that a batch has, numbered as they come, and their gradients' sums.
struct Gathered {
  std::vector<int32_t> place;  // by id, or by hash: number + 1; 0 is free
  std::vector<int64_t> ids;    // by number
  std::vector<float> sums;     // by number, W each
};

template <typename I, typename W>
void gather_gradients(Gathered& g, int64_t table_rows, const I* ids, const int32_t* offsets, int64_t rows, const float* grad,
                      int64_t stride, bool mean, int64_t part, int64_t parts, W width) {
  const int64_t count = offsets[rows] - offsets[0];
  // A small table is numbered by id, of a large one only what is there: open addressing, at most half full.
  const bool hashed = table_rows > 4 * count + 64;
  const uint64_t slots = hashed ? std::bit_ceil(static_cast<uint64_t>(2 * count + 2)) : table_rows;
  const int shift = 64 - std::countr_zero(slots);
  g.place.assign(slots, 0);
  g.ids.clear();
  g.sums.clear();
  const auto number_of = [&](int64_t id) {
    uint64_t at = id;
    if (hashed) {
      at = (static_cast<uint64_t>(id) * 0x9E3779B97F4A7C15u) >> shift;
      while (g.place[at] && g.ids[g.place[at] - 1] != id) at = (at + 1) & (slots - 1);
    }
    if (!g.place[at]) {
      g.ids.push_back(id);
      g.sums.resize(g.sums.size() + width, 0.0f);
      g.place[at] = static_cast<int32_t>(g.ids.size());
    }
    return static_cast<int64_t>(g.place[at] - 1);
  };
  for (int64_t b = 0; b < rows; ++b) {
    const int64_t first = offsets[b], last = offsets[b + 1];
    const float share = mean && last > first ? 1.0f / static_cast<float>(last - first) : 1.0f;
    const float* from = grad + b * stride;
    for (int64_t i = first; i < last; ++i) {
      if (parts > 1 && static_cast<int64_t>(ids[i]) % parts != part) continue;
      const int64_t number = number_of(ids[i]);  // before data(): the sums may move
      float* sum = g.sums.data() + number * width;
#pragma omp simd
      for (int64_t j = 0; j < width; ++j) sum[j] += from[j] * share;
    }
  }
}

// S_r += G_r², W_r −= rate·G_r / (√S_r + eps), for the rows r that the batch has; by row, S_r is one number and takes the mean
// of G_r².
template <typename W>
void apply_adagrad(const Gathered& g, float* weights, float* squares, bool by_row, float rate, float eps, W width) {
  const int64_t count = g.ids.size();
  for (int64_t n = 0; n < count; ++n) {
    if (n + kEmbeddingAhead < count) {
      const int64_t ahead = g.ids[n + kEmbeddingAhead];
      __builtin_prefetch(weights + ahead * width, 1);
      __builtin_prefetch(squares + (by_row ? ahead : ahead * width), 1);
    }
    const float* sum = g.sums.data() + n * width;
    float* w = weights + g.ids[n] * width;
    if (by_row) {
      float& s = squares[g.ids[n]];
      float square = 0.0f;
#pragma omp simd reduction(+ : square)
      for (int64_t j = 0; j < width; ++j) square += sum[j] * sum[j];
      s += square / static_cast<float>(width);
      const float step = rate / (std::sqrt(s) + eps);
#pragma omp simd
      for (int64_t j = 0; j < width; ++j) w[j] -= step * sum[j];
      continue;
    }
    float* s = squares + g.ids[n] * width;
#pragma omp simd
    for (int64_t j = 0; j < width; ++j) {
      s[j] += sum[j] * sum[j];
      w[j] -= rate * sum[j] / (std::sqrt(s[j]) + eps);
    }
  }
}

template <typename I>
void embedding_backward(const Tensor& weights, const Tensor& squares, const Tensor& starts, const I* ids, const int32_t* offsets,
                        const Tensor& grad_, int64_t width_, bool mean, float rate, float eps) {
  const Tensor grad = grad_.contiguous();
  const int64_t rows = grad.size(0), features = starts.numel(), threads = at::get_num_threads();
  const bool by_row = squares.numel() != weights.numel();
  const int64_t* start = starts.const_data_ptr<int64_t>();
  float *w = weights.data_ptr<float>(), *s = squares.data_ptr<float>();
  const float* g = grad.const_data_ptr<float>();
  struct Piece { int64_t feature, part, parts; };
  std::vector<Piece> pieces;
  // A table with more than its share of the ids is cut by id, so that no thread is left with all of it.
  const int64_t fair = std::max<int64_t>(1024, offsets[features * rows] / (2 * threads));
  for (int64_t f = 0; f < features; ++f) {
    const int64_t parts = 1 + (offsets[(f + 1) * rows] - offsets[f * rows]) / (fair + 1);
    for (int64_t part = 0; part < parts; ++part) pieces.push_back({f, part, parts});
  }
  at::parallel_for(0, pieces.size(), 1 + 4096 / (rows * width_ + 1), [&](int64_t from, int64_t to) {
    Gathered gathered;
    with_width(width_, [&](auto width) {
      for (int64_t i = from; i < to; ++i) {
        const auto [f, part, parts] = pieces[i];
        const int64_t table_end = f + 1 < features ? start[f + 1] : weights.numel();
        gather_gradients(gathered, (table_end - start[f]) / width_, ids, offsets + f * rows, rows, g + f * width_, features * width_,
                         mean, part, parts, width);
        apply_adagrad(gathered, w + start[f], s + (by_row ? start[f] / width_ : start[f]), by_row, rate, eps, width);
      }
    });
  });
}

template <typename F>
auto with_ids(const Tensor& ids, F&& run) {
  return ids.scalar_type() == at::kInt ? run(ids.const_data_ptr<int32_t>()) : run(ids.const_data_ptr<int64_t>());
}

Tensor embedding_bags(const Tensor& weights, const Tensor& starts, const Tensor& ids, const Tensor& offsets, int64_t width,
                      bool mean) {
  const int64_t rows = (offsets.numel() - 1) / starts.numel();
  return with_ids(ids, [&](auto p) {
    return embedding_forward(weights, starts, p, offsets.const_data_ptr<int32_t>(), rows, width, mean);
  });
}

void embedding_adagrad(const Tensor& weights, const Tensor& squares, const Tensor& starts, const Tensor& ids,
                       const Tensor& offsets, const Tensor& grad, int64_t width, bool mean, double rate, double eps) {
  with_ids(ids, [&](auto p) {
    embedding_backward(weights, squares, starts, p, offsets.const_data_ptr<int32_t>(), grad, width, mean, rate, eps);
  });
}

}  // namespace
