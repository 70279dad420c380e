// Products whose weights are read once and as they lie: few rows, and all inference that must not depend on the batch.
//
// C[m, n] = Σ_d A[m, d]·W[n, d]: lane l sums the words ≡ l mod 16 (a word: one fp32 value or two bf16 values), then the lanes are
// added in one fixed tree. The bits of C[m, n] depend on row m and row n alone, whatever the tile, the thread or the company.
#pragma once

#include "cpu_gemm.h"
#include "cpu_vector.h"

namespace {

constexpr int kLaneRows = 4, kLaneUnits = 6;

template <typename T>
inline void multiply_add_lanes(Vec& sum, Vec a, Vec b) {
  if constexpr (std::is_same_v<T, float>) {
    sum += a * b;
  } else {
#if defined(__AVX512BF16__)
    sum = std::bit_cast<Vec>(_mm512_dpbf16_ps(std::bit_cast<__m512>(sum), std::bit_cast<__m512bh>(a), std::bit_cast<__m512bh>(b)));
#else
    sum += low_half(a) * low_half(b);
    sum += high_half(a) * high_half(b);
#endif
  }
}


// One step of the tree for two vectors at once: of each group of 2·N lanes, lane i is added to lane i + N.
template <int N, size_t... L>
inline Vec fold(Vec a, Vec b, std::index_sequence<L...>) {
  return __builtin_shufflevector(a, b, (L / N * 2 * N + L % N)...) + __builtin_shufflevector(a, b, (L / N * 2 * N + L % N + N)...);
}
template <int N>
inline Vec fold(Vec a, Vec b) { return fold<N>(a, b, std::make_index_sequence<kLanes>{}); }

// The sums over the lanes of 8 vectors, each in the tree of add_lanes.
inline void add_lanes_of_8(const Vec* v, float* out) {
  const Vec ab = fold<8>(v[0], v[1]), cd = fold<8>(v[2], v[3]), ef = fold<8>(v[4], v[5]), gh = fold<8>(v[6], v[7]);
  const Vec abcd = fold<4>(ab, cd), efgh = fold<4>(ef, gh), all = fold<2>(abcd, efgh);
  const Vec sums = fold<1>(all, all);
  std::memcpy(out, &sums, 8 * sizeof(float));
}

// Rows × Units sums of products, C[Rows][Units].
template <typename T, int Rows, int Units>
inline void lanes_tile(const T* a, int64_t stride, const T* const* w, int64_t depth, float* C) {
  constexpr int64_t kStep = kLanes * kPerWord<T>;
  constexpr int64_t kAhead = 16 * kStep;
  Vec sum[Rows * Units] = {};
  int64_t d = 0;
  for (; d + kStep <= depth; d += kStep) {
    // Past a row's end the next tile begins, Units rows on: the processor's own prefetching stops at each page's end.
    const int64_t ahead = d + kAhead < depth ? d + kAhead : d + kAhead + (Units - 1) * depth;
    Vec wv[Units];
    for (int n = 0; n < Units; ++n) {
      __builtin_prefetch(w[n] + ahead);
      wv[n] = load_words(w[n] + d, kStep);
    }
    for (int m = 0; m < Rows; ++m) {
      const Vec av = load_words(a + m * stride + d, kStep);
      for (int n = 0; n < Units; ++n) multiply_add_lanes<T>(sum[m * Units + n], av, wv[n]);
    }
  }
  if (d < depth) {
    for (int n = 0; n < Units; ++n) {
      const Vec wv = load_words(w[n] + d, depth - d);
      for (int m = 0; m < Rows; ++m) multiply_add_lanes<T>(sum[m * Units + n], load_words(a + m * stride + d, depth - d), wv);
    }
  }
  int i = 0;
  for (; i + 8 <= Rows * Units; i += 8) add_lanes_of_8(sum + i, C + i);
  for (; i < Rows * Units; ++i) C[i] = add_lanes(sum[i]);
}

// All rows of A against Units weight rows; `done(row, values[Units])`.
template <typename T, int Units, typename F>
void lanes_units(const T* a, int64_t stride, int64_t rows, const T* const* w, int64_t depth, F&& done) {
  float C[kLaneRows * Units];
  int64_t m = 0;
  for (; m + kLaneRows <= rows; m += kLaneRows) {
    lanes_tile<T, kLaneRows, Units>(a + m * stride, stride, w, depth, C);
    for (int i = 0; i < kLaneRows; ++i) done(m + i, C + i * Units);
  }
  switch (rows - m) {
    case 3: lanes_tile<T, 3, Units>(a + m * stride, stride, w, depth, C); break;
    case 2: lanes_tile<T, 2, Units>(a + m * stride, stride, w, depth, C); break;
    case 1: lanes_tile<T, 1, Units>(a + m * stride, stride, w, depth, C); break;
    default: return;
  }
  for (int i = 0; m + i < rows; ++i) done(m + i, C + i * Units);
}

// Rows of A against `units` weight rows: z[m·ldz + n].
template <typename T>
void lanes_product(const T* A, int64_t stride, int64_t rows, const T* weight, int64_t units, int64_t depth, float* z, int64_t ldz) {
  for (int64_t n = 0; n < units;) {
    auto step = [&](auto count) {
      constexpr int P = decltype(count)::value;
      const T* w[P];
      for (int i = 0; i < P; ++i) w[i] = weight + (n + i) * depth;
      lanes_units<T, P>(A, stride, rows, w, depth, [&](int64_t m, const float* v) { std::copy(v, v + P, z + m * ldz + n); });
      n += P;
    };
    if (n + kLaneUnits <= units) step(std::integral_constant<int, kLaneUnits>{});
    else if (n + 2 <= units) step(std::integral_constant<int, 2>{});
    else step(std::integral_constant<int, 1>{});
  }
}

// One expert's share of a layer: y = act(z·a + c) for the outputs from `begin` to `end`. The outputs of swiglu are the pairs
// (gate unit n, up unit n + half).
template <typename T, typename Y>
void lanes_layer(const T* A, int64_t stride, int64_t rows, const T* weight, int64_t units, int64_t depth, int64_t begin,
                 int64_t end, const float* a, const float* c, int64_t activation, Y* y, int64_t ldy) {
  constexpr int64_t kUnits = 8 * kLaneUnits;
  const bool pairs = activation == kSwiglu;
  const int64_t half = units / 2;
  std::vector<float> z(rows * kUnits * (pairs ? 2 : 1)), ac(2 * 2 * kUnits);
  for (int64_t n = begin; n < end; n += kUnits) {
    const int64_t count = std::min(kUnits, end - n), ldz = pairs ? 2 * count : count;
    lanes_product(A, stride, rows, weight + n * depth, count, depth, z.data(), ldz);
    if (pairs) lanes_product(A, stride, rows, weight + (n + half) * depth, count, depth, z.data() + count, ldz);
    float *an = ac.data(), *cn = an + 2 * kUnits;  // of these units side by side
    for (int64_t i = 0; i < ldz; ++i) {
      const int64_t unit = i < count ? n + i : n + half + i - count;
      an[i] = a ? a[unit] : 1.0f;
      cn[i] = c ? c[unit] : 0.0f;
    }
    for (int64_t r = 0; r < rows; ++r)
      activate_row(z.data() + r * ldz, y + r * ldy + n, ldz, 1, a ? an : nullptr, c ? cn : nullptr, activation);
  }
}

}  // namespace
