// Large matrix products: C[m, n] = Σ_k A[m, k]·B[n, k], with room before and behind each tile for what a layer does around its product.
//
// The unit of arithmetic is a word of 32 bits: one fp32 value, or two bf16 values that follow each other along k. A is read as it
// lies, row by row (stride given), one word broadcast at a time. B is packed first, in panels of kPanel columns:
// panel[word][column]. A tile of kTileRows × kPanel sums stays in registers over all of k; whoever asked for the product gets it
// as fp32 and stores it as he likes. k is summed in order, so the bits of C[m, n] depend on row m of A and row n of B alone.
#pragma once

#include "cpu_amx.h"
#include "cpu_vector.h"

namespace {

#if defined(__AVX512F__)
constexpr int kPanelVecs = 2, kTileRows = 12;  // 24 of 32 registers hold sums
#else
constexpr int kPanelVecs = 1, kTileRows = 6;
#endif
constexpr int64_t kPanel = kPanelVecs * kLanes;
constexpr int64_t kBlockRows = 8 * kTileRows;  // rows of A that stay in the second-level cache while all panels pass

template <typename T>
constexpr int64_t kPerWord = sizeof(float) / sizeof(T);
template <typename T>
int64_t words(int64_t depth) { return (depth + kPerWord<T> - 1) / kPerWord<T>; }
inline int64_t panels(int64_t columns) { return (columns + kPanel - 1) / kPanel; }
inline int64_t whole_vecs(int64_t n) { return (n + kLanes - 1) / kLanes * kLanes; }
// Words of a packed operand of one panel.
template <typename T>
int64_t panel_words(int64_t depth) { return words<T>(depth) * kPanel; }

// ---- the tile ------------------------------------------------------------------------------------------------------------

inline Vec low_half(Vec pair) { return std::bit_cast<Vec>(std::bit_cast<Bits>(pair) << 16); }
inline Vec high_half(Vec pair) { return std::bit_cast<Vec>(std::bit_cast<Bits>(pair) & 0xffff0000u); }

template <typename T>
inline void multiply_add(Vec& sum, float a, Vec b) {
  if constexpr (std::is_same_v<T, float>) {
    sum += a * b;
  } else {
    const Vec pair = a - Vec{};
#if defined(__AVX512BF16__)
    sum = std::bit_cast<Vec>(_mm512_dpbf16_ps(std::bit_cast<__m512>(sum), std::bit_cast<__m512bh>(pair), std::bit_cast<__m512bh>(b)));
#else
    sum += low_half(pair) * low_half(b);
    sum += high_half(pair) * high_half(b);
#endif
  }
}

template <typename T, int Rows, typename F>
inline void tile(const char* a, int64_t stride, const float* panel, int64_t next, int64_t depth, int64_t row, F&& done) {
  if constexpr (requires { done.prefetch(row); })
    for (int i = 0; i < Rows; ++i) done.prefetch(row + i);
  Vec sum[Rows][kPanelVecs] = {};
  const char* at[Rows];
  for (int i = 0; i < Rows; ++i) at[i] = a + i * stride;
  for (int64_t k = 0; k < depth; ++k) {
    Vec b[kPanelVecs];
    for (int v = 0; v < kPanelVecs; ++v) b[v] = load(panel + k * next + v * kLanes);
    for (int i = 0; i < Rows; ++i) {
      float word;
      std::memcpy(&word, at[i] + k * sizeof(float), sizeof word);
      for (int v = 0; v < kPanelVecs; ++v) multiply_add<T>(sum[i][v], word, b[v]);
    }
  }
  alignas(64) float out[Rows * kPanel];
  for (int i = 0; i < Rows; ++i)
    for (int v = 0; v < kPanelVecs; ++v) store(sum[i][v], out + i * kPanel + v * kLanes);
  for (int i = 0; i < Rows; ++i) done(row + i, static_cast<const float*>(out + i * kPanel));
}

// `rows` rows of A, `stride` elements apart, times one panel of `depth` words, whose rows lie `next` words behind each other (a
// packed one's: kPanel; bf16 panels are always packed). done(row, sums[kPanel]) for each row in order; done.prefetch(row), where there
// is one, is called for a tile's rows before its sums are taken.
template <typename T, typename F>
void multiply(const T* a, int64_t stride, int64_t rows, const float* panel, int64_t depth, F&& done, int64_t next = kPanel) {
  const char* p = reinterpret_cast<const char*>(a);
  const int64_t bytes = stride * sizeof(T);
#if RECSYS_MOE_AMX
  if constexpr (std::is_same_v<T, bf16>)
    if (amx()) return multiply_tiles(p, bytes, rows, panel, depth, done);
#endif
  int64_t m = 0;
  for (; m + kTileRows <= rows; m += kTileRows) tile<T, kTileRows>(p + m * bytes, bytes, panel, next, depth, m, done);
  auto rest = [&](auto count) {
    constexpr int Rows = decltype(count)::value;
    if (m + Rows > rows) return;
    tile<T, Rows>(p + m * bytes, bytes, panel, next, depth, m, done);
    m += Rows;
  };
  rest(std::integral_constant<int, 8>{});
  rest(std::integral_constant<int, 4>{});
  rest(std::integral_constant<int, 2>{});
  rest(std::integral_constant<int, 1>{});
}

// A row of a panel's sums as the first `count` columns of a result.
template <typename T>
inline void store_panel(const float* sums, T* to, int64_t count) {
  if (count < kPanel) return convert(sums, to, count);
  for (int v = 0; v < kPanelVecs; ++v) store(load(sums + v * kLanes), to + v * kLanes);
}

// over(i, count) for the vectors of a panel's first `columns` columns; a whole panel's have a constant count.
template <typename F>
inline void over_panel(int64_t columns, F&& over) {
  if (columns < kPanel) return by_vecs(columns, over);
  for (int64_t i = 0; i < kPanel; i += kLanes) over(i, std::integral_constant<int64_t, kLanes>{});
}

// Where multiply_into() puts its sums. Those to add to are fetched while a tile's are taken.
struct ToSums {
  float* sums;
  bool add;
  void prefetch(int64_t m) const {
    for (int64_t i = 0; i < kPanel && add; i += kLanes) __builtin_prefetch(sums + m * kPanel + i, 1);
  }
  void operator()(int64_t m, const float* sum) const {
    float* to = sums + m * kPanel;
    for (int64_t i = 0; i < kPanel; i += kLanes) store(add ? load(to + i) + load(sum + i) : load(sum + i), to + i);
  }
};

// multiply() whose sums [row][kPanel] are stored, or added to what is there.
template <typename T>
void multiply_into(const T* a, int64_t stride, int64_t rows, const float* panel, int64_t depth, float* sums, bool add) {
#if RECSYS_MOE_AMX
  if constexpr (std::is_same_v<T, bf16>) {
    if (amx()) {
      return by_tiles(reinterpret_cast<const char*>(a), stride * sizeof(T), rows, panel, depth,
                      [&](const TileProduct& p, int64_t m, int64_t count) { tiles_block(p, count, kSums, sums + m * kSums, kSums, add); });
    }
  }
#endif
  multiply(a, stride, rows, panel, depth, ToSums{sums, add});
}

// ---- packing ---------------------------------------------------------------------------------------------------------------

template <int Distance, size_t... L>
inline void exchange(Vec& a, Vec& b, std::index_sequence<L...>) {
  const Vec low = __builtin_shufflevector(a, b, ((L & Distance) ? kLanes + L - Distance : L)...);
  b = __builtin_shufflevector(a, b, ((L & Distance) ? kLanes + L : L + Distance)...);
  a = low;
}

template <int Distance>
inline void exchange_all(Vec* rows) {
  for (int i = 0; i < kLanes; ++i)
    if (!(i & Distance)) exchange<Distance>(rows[i], rows[i + Distance], std::make_index_sequence<kLanes>{});
}

// 16 × 16 words.
inline void transpose(Vec* rows) {
  exchange_all<1>(rows);
  exchange_all<2>(rows);
  exchange_all<4>(rows);
  exchange_all<8>(rows);
}

// 16 words from `p`, of which `count` elements of T are there; zeros behind them.
template <typename T>
inline Vec load_words(const T* p, int64_t count) {
  Vec v = {};
  if (count >= kLanes * kPerWord<T>) std::memcpy(&v, p, sizeof v);
  else if (count > 0) std::memcpy(&v, p, count * sizeof(T));
  return v;
}

// A panel from rows of B that lie along k (weights as a layer keeps them): unit[n] is row n, null for none. What lies `ahead`
// elements further, the next panel's, is fetched meanwhile. Of its vectors, `vecs` are made.
template <typename T>
void pack_rows(const T* const* unit, int64_t depth, int64_t ahead, float* panel, int vecs = kPanelVecs) {
  const int64_t all = words<T>(depth);
  for (int64_t w = 0; w < all; w += kLanes) {
    const int64_t from = w * kPerWord<T>, here = std::min<int64_t>(kLanes, all - w);
    for (int v = 0; v < vecs; ++v) {
      Vec rows[kLanes];
      for (int i = 0; i < kLanes; ++i) {
        const T* row = unit[v * kLanes + i];
        if (row) __builtin_prefetch(row + from + ahead, 0, 2);
        rows[i] = row ? load_words(row + from, depth - from) : Vec{};
      }
      transpose(rows);
      for (int64_t i = 0; i < here; ++i) store(rows[i], panel + (w + i) * kPanel + v * kLanes);
    }
  }
}

// The words of 16 columns from one row (fp32), or from two that follow each other along k (bf16; null: zeros).
inline Vec words_of(const float* row, const float*, int64_t columns) { return load_words(row, columns); }
inline Vec words_of(const bf16* row, const bf16* next, int64_t columns) {
  auto halves = [&](const bf16* p) {
    if (columns >= kLanes) return load_halves(p);
    bf16 part[kLanes] = {};
    std::memcpy(part, p, columns * sizeof(bf16));
    return load_halves(part);
  };
  return std::bit_cast<Vec>(next ? halves(row) | halves(next) << 16 : halves(row));
}

// All panels of a B whose rows lie along n: their words from `begin` to `end`, row by row (each is read in one go). row(k) is a
// pointer to row k; a panel has `size` words.
template <typename T, typename F>
void pack_columns(int64_t begin, int64_t end, int64_t depth, int64_t columns, int64_t size, float* to, F&& row) {
  for (int64_t w = begin; w < end; ++w) {
    const int64_t k = w * kPerWord<T>;
    const T* first = row(k);
    const T* second = kPerWord<T> == 2 && k + 1 < depth ? row(k + 1) : nullptr;
    for (int64_t n = 0; n < columns; n += kPanel) {
      float* panel = to + n / kPanel * size + w * kPanel;
      for (int v = 0; v < kPanelVecs; ++v) {
        const int64_t at = n + v * kLanes, left = columns - at;
        store(left > 0 ? words_of(first + at, second ? second + at : nullptr, left) : Vec{}, panel + v * kLanes);
      }
    }
  }
}

// A transposed operand A: `columns` columns of a matrix whose rows lie along m, as rows of whole_vecs(words(depth)) words.
template <typename T>
void pack_transposed(const T* from, int64_t stride, int64_t depth, int64_t columns, float* to) {
  const int64_t all = words<T>(depth), row = whole_vecs(all);
  for (int64_t w = 0; w < all; w += kLanes) {
    for (int64_t m = 0; m < columns; m += kLanes) {
      Vec block[kLanes];
      for (int64_t i = 0; i < kLanes; ++i) {
        const int64_t k = (w + i) * kPerWord<T>;
        const T* p = from + k * stride + m;
        block[i] = k < depth ? words_of(p, k + 1 < depth ? p + stride : nullptr, columns - m) : Vec{};
      }
      transpose(block);
      for (int64_t i = 0; i < std::min<int64_t>(kLanes, columns - m); ++i) store(block[i], to + (m + i) * row + w);
    }
  }
}

// How many pieces of `words` each are worth a thread of their own.
inline int64_t pack_grain(int64_t words) { return std::max<int64_t>(1, 8192 / std::max<int64_t>(words, 1)); }

// The panels of `count` matrices [units, depth], as layers keep their weights, for products over the depth. Packed ahead for all
// threads, or, where a thread needs each but once, when it comes to it.
template <typename T>
class Panels {
 public:
  Panels(const Tensor& weight, int64_t count, bool ahead)
      : weight_(weight), units_(weight.numel() / count / weight.size(-1)), depth_(weight.size(-1)), each_(panels(units_)) {
    if (!ahead) return;
    ahead_ = at::empty({count * each_ * size()}, at::kFloat);
    float* to = ahead_.data_ptr<float>();
    at::parallel_for(0, count * each_, pack_grain(size()), [&](int64_t from, int64_t end) {
      for (int64_t i = from; i < end; ++i) pack(i / each_, i % each_ * kPanel, to + i * size());
    });
  }
  int64_t size() const { return panel_words<T>(depth_); }
  // The panel of a matrix from unit n on; `room` for one that is packed now.
  const float* at(int64_t matrix, int64_t n, float* room) const {
    if (ahead_.defined()) return ahead_.const_data_ptr<float>() + (matrix * each_ + n / kPanel) * size();
    pack(matrix, n, room);
    return room;
  }

 private:
  void pack(int64_t matrix, int64_t n, float* to) const {
    const T* unit[kPanel] = {};
    for (int64_t j = 0; j < std::min(kPanel, units_ - n); ++j) unit[j] = data<T>(weight_) + (matrix * units_ + n + j) * depth_;
    pack_rows(unit, depth_, kPanel * depth_, to);
  }
  const Tensor weight_;
  const int64_t units_, depth_, each_;
  Tensor ahead_;
};

// The panels of the same matrices for products over their units: [matrix][panel of the depth].
template <typename T>
Tensor pack_over_units(const Tensor& weight, int64_t count) {
  constexpr int64_t kPackWords = 32;
  const int64_t depth = weight.size(-1), units = weight.numel() / count / depth, all = words<T>(units), size = panel_words<T>(units);
  const int64_t chunks = (all + kPackWords - 1) / kPackWords;
  const Tensor packed = at::empty({count * panels(depth) * size}, at::kFloat);
  at::parallel_for(0, count * chunks, pack_grain(kPackWords * depth), [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      const int64_t matrix = i / chunks, from = i % chunks * kPackWords, to = std::min(all, from + kPackWords);
      pack_columns<T>(from, to, units, depth, size, packed.data_ptr<float>() + matrix * panels(depth) * size,
                      [&](int64_t k) { return data<T>(weight) + (matrix * units + k) * depth; });
    }
  });
  return packed;
}

// ---- the work of a product, cut for the threads ----------------------------------------------------------------------------

// run(row_begin, row_end, panel_begin, panel_end): blocks of rows; where there are fewer of them than threads, the panels are
// dealt too.
template <typename F>
void for_blocks(int64_t rows, int64_t panels, F&& run) {
  const int64_t threads = at::get_num_threads();
  const int64_t share = ((rows + threads - 1) / threads + kTileRows - 1) / kTileRows * kTileRows;
  const int64_t block = std::max<int64_t>(kTileRows, std::min(share, kBlockRows));
  const int64_t blocks = (rows + block - 1) / block, splits = blocks >= threads ? 1 : std::min(threads, panels);
  at::parallel_for(0, blocks * splits, 1, [&](int64_t from, int64_t to) {
    for (int64_t i = from; i < to; ++i) {
      const int64_t row = i / splits * block, split = i % splits;
      run(row, std::min(rows, row + block), panels * split / splits, panels * (split + 1) / splits);
    }
  });
}

}  // namespace
