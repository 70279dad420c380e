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

// Rows × Units sums of products, C[Rows][Units]. The first to read the weights fetches ahead for all.
template <typename T, int Rows, int Units, bool First>
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
      if constexpr (First) __builtin_prefetch(w[n] + ahead);
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
  auto tile = [&](auto count, auto first) {
    constexpr int Rows = decltype(count)::value;
    lanes_tile<T, Rows, Units, decltype(first)::value>(a + m * stride, stride, w, depth, C);
    for (int i = 0; i < Rows; ++i) done(m + i, C + i * Units);
    m += Rows;
  };
  constexpr std::integral_constant<int, kLaneRows> all;
  if (rows >= kLaneRows) tile(all, std::true_type{});
  while (m + kLaneRows <= rows) tile(all, std::false_type{});
  switch (rows - m) {
    case 3: return tile(std::integral_constant<int, 3>{}, std::true_type{});
    case 2: return tile(std::integral_constant<int, 2>{}, std::true_type{});
    case 1: return tile(std::integral_constant<int, 1>{}, std::true_type{});
  }
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

#if RECSYS_MOE_AMX

// ---- the same by AMX tiles: the weights, as they lie, are rows of A; the batch is packed as columns of B -------------------

// Words of one panel of 32 rows of the batch: whole steps, zeros behind.
inline int64_t batch_panel_words(int64_t depth) { return whole_vecs(words<bf16>(depth)) * kPanel; }

inline void pack_batch(const bf16* A, int64_t stride, int64_t rows, int64_t depth, float* panel) {
  const bf16* row[kPanel] = {};
  for (int64_t i = 0; i < std::min(kPanel, rows); ++i) row[i] = A + i * stride;
  pack_rows(row, depth, 0, panel, rows > kLanes ? kPanelVecs : 1);  // of a narrow block, no more is read
  std::fill(panel + panel_words<bf16>(depth), panel + batch_panel_words(depth), 0.0f);
}

// lanes_layer for a packed batch. Panel after panel passes a block of 32 units; where there are several, a part of the units' rows at
// a time that fits the first-level cache (an fp32 sum that waits in memory keeps its bits). What follows the sums is done to a unit's
// at once, in the lanes that the rows have; then 16 × 16 of them change places. Meanwhile the next units' weights are fetched, in the end
// those at `after` (null: none). Where the weights were widened from int8, `gate_ahead` and `up_ahead` are what will be widened next, to be
// fetched instead: as many values of a byte.
template <typename Y>
void tiles_layer(const float* batch, int64_t rows, const bf16* weight, int64_t units, int64_t depth, int64_t begin, int64_t end,
                 const float* a, const float* c, int64_t activation, Y* y, int64_t ldy, const bf16* after,
                 const int8_t* gate_ahead = nullptr, const int8_t* up_ahead = nullptr) {
  const bool pairs = activation == kSwiglu;
  const int64_t half = units / 2, bytes = depth * sizeof(bf16), across = panels(rows), ldt = across * kPanel;
  const int64_t part = across > 1 ? 2048 : bytes, size = batch_panel_words(depth);
  std::vector<float> gate_sums(kSums * ldt), up_sums(pairs ? kSums * ldt : 0);
  Tiles tiles;
  // Sums of the units from `first` on. While a part passes, each panel fetches its share of the next: the part behind or, from the last
  // on, `next_units`.
  auto sum = [&](int64_t first, const bf16* next_units, int64_t count, float* sums, const int8_t* int8_ahead) {
    const char *w = reinterpret_cast<const char*>(weight + first * depth), *next = reinterpret_cast<const char*>(next_units);
    for (int64_t k = 0; k < bytes; k += part) {
      const int64_t here = std::min(part, bytes - k);
      const char* ahead = int8_ahead ? reinterpret_cast<const char*>(int8_ahead) + k : k + part < bytes ? w + k + part : next;
      const int64_t fetched = !ahead ? 0 : int8_ahead ? count / 2 : count;  // two rows of bytes are as long as one of bf16
      for (int64_t q = 0; q < across; ++q) {
        const float* panel = batch + q * size + k / 4 * kPanel;
        const TileProduct p{w + k, bytes, here, panel, panel + here / 64 * kTile * kPanel,
                            ahead, fetched * q / across, fetched * (q + 1) / across};
        tiles_block(p, count, std::min(kPanel, rows - q * kPanel), sums + q * kPanel, ldt, k > 0);
      }
    }
  };
  for (int64_t n = begin; n < end; n += kSums) {
    const int64_t count = std::min<int64_t>(kSums, end - n);
    const bf16* behind = n + kSums < end ? weight + (n + kSums) * depth : after;
    tiles.shape(count);
    sum(n, pairs ? weight + (n + half) * depth : behind, count, gate_sums.data(), gate_ahead);
    if (pairs) sum(n + half, behind, count, up_sums.data(), up_ahead);
    auto affine = [&](const float* sums, int64_t unit) {
      Vec v = load(sums);
      if (a) v = v * a[unit];
      return c ? v + c[unit] : v;
    };
    // All units of a row leave together: rows lie pages apart, and each visit of one costs a translation of its address.
    auto finish = [&](auto&& value) {
      alignas(64) Y together[kLanes][kSums];
      for (int64_t r = 0; r < rows; r += kLanes) {
        by_vecs(count, [&](int64_t u, auto here) {
          Vec block[kLanes] = {};
          for (int64_t i = 0; i < here; ++i) block[i] = value((u + i) * ldt + r, n + u + i);
          transpose(block);
          for (int64_t i = 0; i < kLanes; ++i) store(block[i], together[i] + u);
        });
        for (int64_t i = 0; i < std::min<int64_t>(kLanes, rows - r); ++i) {
          Y* to = y + (r + i) * ldy + n;
          if (count == kSums) std::memcpy(to, together[i], sizeof together[i]);
          else std::copy(together[i], together[i] + count, to);
        }
      }
    };
    if (pairs) {
      finish([&](int64_t at, int64_t unit) {
        const Vec gate = activate<kSilu, Y>(affine(gate_sums.data() + at, unit));
        return gate * affine(up_sums.data() + at, unit + half);
      });
    } else {
      with_activation(activation, [&](auto A) {
        finish([&](int64_t at, int64_t unit) { return activate<decltype(A)::value, Y>(affine(gate_sums.data() + at, unit)); });
      });
    }
  }
}

#endif

}  // namespace
