// Weights as int8 with a scale for each output: W[n, d] = scale[n]·q[n, d]. They are widened some outputs at a time into the products'
// precision, which holds every q exactly, and the scale is a factor of what follows the sums: the product is that of any other layer.
#pragma once

#include <memory>

#include "cpu_vector.h"

namespace {

// What a product is taken of: the weights of `units` outputs, of which those from `begin` to `end` are wanted; sums are multiplied by a
// and c is added (null: 1 and 0). The first output is number `at` of those that were asked for. What is widened next (null: nothing).
template <typename T>
struct Weights {
  const T* rows;
  int64_t units, begin, end;
  const float *a, *c;
  int64_t at;
  const int8_t *gate_next = nullptr, *up_next = nullptr;
};

inline Vec load(const int8_t* p) {
#if defined(__AVX512F__)
  return std::bit_cast<Vec>(_mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)))));
#else
  typedef int8_t Bytes __attribute__((vector_size(kLanes)));
  Bytes bytes;
  std::memcpy(&bytes, p, sizeof bytes);
  return __builtin_convertvector(bytes, Vec);
#endif
}

template <typename T>
void widen(const int8_t* from, int64_t count, T* to) {
  constexpr int64_t kLine = 64, kAhead = 32 * kLine;  // the processor's own prefetching stops at each page's end
  int64_t i = 0;
  for (; i + kLine <= count; i += kLine) {
    __builtin_prefetch(from + i + kAhead);
    for (int64_t v = 0; v < kLine; v += kLanes) store(load(from + i + v), to + i + v);
  }
  for (; i < count; ++i) to[i] = static_cast<T>(static_cast<float>(from[i]));
}

// Calls use(Weights) for the outputs from `begin` to `end` of expert `e`, whose weights lie in `weight` `[E, units, depth]`: for all of
// them at once where T is their type, some at a time where they are int8 (with `scale` `[E, units]`). Outputs of `pairs` are the gate
// unit n with the up unit n + units/2; `f` has the factors and shifts that follow.
template <typename T, typename Folded, typename F>
void for_weights(const Tensor& weight, const float* scale, const Folded& f, bool pairs, int64_t e, int64_t begin, int64_t end, F&& use) {
  const int64_t units = weight.size(1), depth = weight.size(2), first = e * units;
  const float *a = f.scale_of(first), *c = f.shift_of(first);
  if (!scale) return use(Weights<T>{data<T>(weight) + first * depth, units, begin, end, a, c, 0});
  constexpr int64_t kUnits = 32;
  const int8_t* q = data<int8_t>(weight) + first * depth;
  const auto rows = std::make_unique_for_overwrite<T[]>((1 + pairs) * kUnits * depth);
  float a_here[2 * kUnits], c_here[2 * kUnits];
  for (int64_t n = begin; n < end; n += kUnits) {
    const int64_t count = std::min(kUnits, end - n);
    for (int64_t part = 0; part <= pairs; ++part) {
      const int64_t unit = n + part * units / 2, to = part * count;
      widen(q + unit * depth, count * depth, rows.get() + to * depth);
      for (int64_t i = 0; i < count; ++i) {
        a_here[to + i] = scale[first + unit + i] * (a ? a[unit + i] : 1.0f);
        c_here[to + i] = c ? c[unit + i] : 0.0f;
      }
    }
    const int8_t* next = n + kUnits < end ? q + (n + kUnits) * depth : nullptr;
    const int8_t* up_next = next ? next + units / 2 * depth : nullptr;
    use(Weights<T>{rows.get(), (1 + pairs) * count, 0, count, a_here, c ? c_here : nullptr, n, next, up_next});
  }
}

}  // namespace
