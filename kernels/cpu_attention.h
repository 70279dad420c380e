// Attention of new tokens to the keys and values of their own sequence, which lie in blocks of a cache: theirs are written there first.
//
// A column is one query head of one token. Keys pass kPlaces at a time, counted from the sequence's first place, and the softmax
// runs along (its maximum m, its sum l; Milakov & Gimelshein 2018). What a column may not see has weight 0 and changes nothing, so a
// column's bits depend on its own query, its place and what lies before it: not on the tokens beside it or how the work is cut.
#pragma once

#include <atomic>

#include "cpu_decoder.h"
#include "cpu_gemm.h"

namespace {

constexpr int64_t kPlaces = 128;   // keys at a time
constexpr int64_t kColumns = 128;  // columns that share a chunk's packed values
constexpr float kNothing = -1e30f; // a maximum before any key; finite, so that differences are

struct AttentionShape {
  int64_t heads, dim, kv_heads, value_at, value_dim, width, block, max_blocks;
  float scale;
  int64_t window;  // 0: none
  int64_t group() const { return heads / kv_heads; }
  int64_t values() const { return (value_dim + kPanel - 1) / kPanel * kPanel; }  // padded
};

// One sequence's places.
template <typename T>
struct Places {
  const T* cache;
  const int32_t* blocks;
  int64_t length;
  const AttentionShape& shape;
  // Null beyond the sequence's end and where a block was freed.
  const T* row(int64_t place) const {
    if (place >= length) return nullptr;
    const int64_t block = blocks[place / shape.block];
    return block < 0 ? nullptr : cache + (block * shape.block + place % shape.block) * shape.width;
  }
};

// Up to 32 columns: their packed queries, and the state of their softmax.
struct Columns {
  int64_t count, first_place, last_place, first_seen;  // of all columns: the lowest and highest place, the lowest key
  float *queries, *sums;                               // [words][32], [32][values]
  alignas(64) float m[kPanel], l[kPanel], low[kPanel], high[kPanel];  // what a column sees: keys from low to high
};

// Of the scores [places][32], in place: weights e^(s·scale − m), unnormalised. The running maximum, sum and sums move on.
inline void soften(Columns& c, float* scores, int64_t first, int64_t places, const AttentionShape& shape) {
  const bool border = c.first_place < first + places - 1 || first < c.first_seen + (shape.window ? c.last_place - c.first_place : 0);
  for (int64_t at = 0; at < (c.count > kLanes ? kPanel : kLanes); at += kLanes) {
    const Vec low = load(c.low + at), high = load(c.high + at), before = load(c.m + at);
    Vec m = before;
    for (int64_t k = 0; k < places; ++k) {
      float* row = scores + k * kPanel + at;
      Vec s = load(row) * shape.scale;
      if (border) {
        const Vec place = static_cast<float>(first + k) - Vec{};
        s = (low <= place) & (place <= high) ? s : -INFINITY + Vec{};
      }
      store(s, row);
      m = s > m ? s : m;
    }
    Vec sum = {};
    for (int64_t k = 0; k < places; ++k) {
      float* row = scores + k * kPanel + at;
      const Vec p = exp(load(row) - m);
      store(p, row);
      sum += p;
    }
    const Vec factor = exp(before - m);
    store(m, c.m + at);
    store(load(c.l + at) * factor + sum, c.l + at);
    for (int64_t i = 0; i < kLanes; ++i) {
      if (factor[i] == 1.0f) continue;
      float* to = c.sums + (at + i) * shape.values();
      for (int64_t v = 0; v < shape.values(); v += kLanes) store(load(to + v) * factor[i], to + v);
    }
  }
}

// 16 × 16 scores at a time: [places][32] → [32][places].
template <typename P>
inline void turn_weights(const float* scores, int64_t places, int64_t columns, P* to) {
  for (int64_t at = 0; at < columns; at += kLanes) {
    for (int64_t k = 0; k < places; k += kLanes) {
      Vec block[kLanes];
      for (int64_t i = 0; i < kLanes; ++i) block[i] = k + i < places ? load(scores + (k + i) * kPanel + at) : Vec{};
      transpose(block);
      for (int64_t i = 0; i < kLanes; ++i) store(block[i], to + (at + i) * kPlaces + k);
    }
  }
}

// A chunk of places in fp32, whatever the cache's type.
template <typename T>
struct PlainChunk {
  std::vector<float> keys, values, scores, weights;
  const AttentionShape& shape;
  explicit PlainChunk(const AttentionShape& s)
      : keys(kPlaces * s.dim), values(kPlaces * s.values()), scores(kPlaces * kPanel), weights(kPanel * kPlaces), shape(s) {}

  static int64_t query_words(int64_t dim) { return dim; }
  static void pack_queries(const T* const* rows, int64_t dim, float* panel) {
    std::vector<float> wide(kPanel * dim);
    const float* wide_rows[kPanel] = {};
    for (int64_t i = 0; i < kPanel; ++i) {
      if (!rows[i]) continue;
      convert(rows[i], wide.data() + i * dim, dim);
      wide_rows[i] = wide.data() + i * dim;
    }
    pack_rows(wide_rows, dim, 0, panel);
  }
  void take(const Places<T>& in, int64_t head, int64_t first, int64_t places) {
    for (int64_t k = 0; k < places; ++k) {
      const T* row = in.row(first + k);
      float *key = keys.data() + k * shape.dim, *value = values.data() + k * shape.values();
      if (!row) {
        std::fill(key, key + shape.dim, 0.0f);
        std::fill(value, value + shape.values(), 0.0f);
      } else {
        convert(row + head * shape.dim, key, shape.dim);
        convert(row + shape.value_at + head * shape.value_dim, value, shape.value_dim);
      }
    }
  }
  void attend(Columns& c, int64_t first, int64_t places) {
    multiply(keys.data(), shape.dim, places, c.queries, shape.dim,
             [&](int64_t k, const float* sums) { std::copy(sums, sums + kPanel, scores.data() + k * kPanel); });
    soften(c, scores.data(), first, places, shape);
    turn_weights(scores.data(), places, c.count > kLanes ? kPanel : kLanes, weights.data());
    const int64_t ld = shape.values();
    for (int64_t v = 0; v < ld; v += kPanel) {
      multiply(weights.data(), kPlaces, c.count, values.data() + v, places, [&](int64_t row, const float* sums) {
        float* to = c.sums + row * ld + v;
        for (int64_t i = 0; i < kPanel; i += kLanes) store(load(to + i) + load(sums + i), to + i);
      }, ld);
    }
  }
};

#if RECSYS_MOE_AMX

// The same by AMX tiles: 16 keys are rows of A, as they lie in the cache; the queries are columns of B. Then the weights are rows of A
// and the values, two places to a word, columns of B.
struct TiledChunk {
  bf16 *keys, *weights;
  float *values, *scores;
  std::vector<bf16> nothing;
  struct Keys { const char* rows; int64_t stride; } group[kPlaces / kTile];
  const AttentionShape& shape;
  Tiles tiles;
  explicit TiledChunk(const AttentionShape& s)
      : keys(kept<struct Keys, bf16>(kPlaces * query_words(s.dim) * 2)), weights(kept<struct Weights, bf16>(kPanel * kPlaces)),
        values(kept<struct Values, float>(kPlaces / 2 * s.values())), scores(kept<struct Scores, float>(kPlaces * kPanel)),
        nothing(std::max(s.width, s.values())), shape(s) {
    tiles.shape(kSums);
  }

  static int64_t query_words(int64_t dim) { return whole_vecs(words<bf16>(dim)); }
  static void pack_queries(const bf16* const* rows, int64_t dim, float* panel) {
    pack_rows(rows, dim, 0, panel);
    std::fill(panel + panel_words<bf16>(dim), panel + query_words(dim) * kPanel, 0.0f);
  }
  void take(const Places<bf16>& in, int64_t head, int64_t first, int64_t places) {
    const int64_t depth = query_words(shape.dim) * 2;
    for (int64_t k = 0; k < places; k += kTile) {
      const bf16* row = in.row(first + k);
      if (row && shape.block % kTile == 0 && depth == shape.dim) {
        group[k / kTile] = {reinterpret_cast<const char*>(row + head * shape.dim), shape.width * 2};
        continue;
      }
      bf16* to = keys + k * depth;
      std::fill(to, to + kTile * depth, bf16(0.0f));
      for (int64_t i = 0; i < kTile; ++i)
        if (const bf16* key = in.row(first + k + i)) std::copy(key + head * shape.dim, key + (head + 1) * shape.dim, to + i * depth);
      group[k / kTile] = {reinterpret_cast<const char*>(to), depth * 2};
    }
    for (int64_t k = 0; k < places; k += 2) {
      auto value = [&](int64_t place) {
        const bf16* row = in.row(place);
        return row ? row + shape.value_at + head * shape.value_dim : nothing.data();
      };
      const bf16 *even = value(first + k), *odd = value(first + k + 1);
      float* to = values + k / 2 * shape.values();
      by_vecs(shape.value_dim, [&](int64_t v, int64_t count) { store(words_of(even + v, odd + v, count), to + v); });
    }
  }
  void attend(Columns& c, int64_t first, int64_t places) {
    if (c.count > kLanes) attend<false>(c, first, places);
    else attend<true>(c, first, places);
  }
  template <bool Narrow>
  void attend(Columns& c, int64_t first, int64_t places) {
    constexpr int64_t kRow = kPanel * sizeof(float);
    for (int64_t k = 0; k < places; k += kSums) {
      zero<Narrow>();
      const Keys low = group[k / kTile], high = group[k / kTile + 1];
      for (int64_t w = 0; w < query_words(shape.dim); w += kTile) {
        const float* q = c.queries + w * kPanel;
        tile_load<6>(q, kRow);
        tile_load<4>(low.rows + w * 4, low.stride);
        tile_load<5>(high.rows + w * 4, high.stride);
        tile_multiply<0, 4, 6>();
        tile_multiply<2, 5, 6>();
        if constexpr (!Narrow) {
          tile_load<7>(q + kTile, kRow);
          tile_multiply<1, 4, 7>();
          tile_multiply<3, 5, 7>();
        }
      }
      float* to = scores + k * kPanel;
      tile_store<0>(to, kRow);
      tile_store<2>(to + kTile * kPanel, kRow);
      if constexpr (!Narrow) {
        tile_store<1>(to + kTile, kRow);
        tile_store<3>(to + kTile * kPanel + kTile, kRow);
      }
    }
    soften(c, scores, first, places, shape);
    turn_weights(scores, places, Narrow ? kLanes : kPanel, weights);
    const int64_t values_row = shape.values() * sizeof(float), ld = shape.values();
    constexpr int64_t kWeights = kPlaces * sizeof(bf16);
    for (int64_t v = 0; v < shape.values(); v += kPanel) {
      float* to = c.sums + v;
      tile_load<0>(to, values_row);
      tile_load<1>(to + kTile, values_row);
      if constexpr (!Narrow) {
        tile_load<2>(to + kTile * ld, values_row);
        tile_load<3>(to + kTile * ld + kTile, values_row);
      }
      for (int64_t k = 0; k < places; k += kSums) {
        const float* b = values + k / 2 * ld + v;
        tile_load<6>(b, values_row);
        tile_load<7>(b + kTile, values_row);
        tile_load<4>(weights + k, kWeights);
        tile_multiply<0, 4, 6>();
        tile_multiply<1, 4, 7>();
        if constexpr (!Narrow) {
          tile_load<5>(weights + kTile * kPlaces + k, kWeights);
          tile_multiply<2, 5, 6>();
          tile_multiply<3, 5, 7>();
        }
      }
      tile_store<0>(to, values_row);
      tile_store<1>(to + kTile, values_row);
      if constexpr (!Narrow) {
        tile_store<2>(to + kTile * ld, values_row);
        tile_store<3>(to + kTile * ld + kTile, values_row);
      }
    }
  }
  template <bool Narrow>
  static void zero() {
    tile_zero<0>();
    tile_zero<2>();
    if constexpr (!Narrow) {
      tile_zero<1>();
      tile_zero<3>();
    }
  }
};

#endif

// The columns from `begin` to `end` of the `tokens` queries that sequence `in` ends with, for one key/value head. q and y are those of
// the sequence's first query.
template <typename Chunk, typename T>
void attend_columns(Chunk& chunk, const Places<T>& in, const AttentionShape& shape, int64_t head, int64_t tokens, int64_t begin,
                    int64_t end, const T* q, T* y) {
  const int64_t group = shape.group(), across = panels(end - begin), size = Chunk::query_words(shape.dim) * kPanel, ld = shape.values();
  std::vector<Columns> columns(across);
  float *queries = kept<struct Queries, float>(across * size), *sums = kept<struct Sums, float>(across * kPanel * ld);
  std::fill(sums, sums + across * kPanel * ld, 0.0f);
  auto place_of = [&](int64_t column) { return in.length - tokens + column / group; };
  auto first_of = [&](int64_t place) { return shape.window ? std::max<int64_t>(0, place + 1 - shape.window) : 0; };
  auto query_of = [&](int64_t column) { return (column / group) * shape.heads + head * group + column % group; };
  for (int64_t t = 0; t < across; ++t) {
    Columns& c = columns[t];
    const int64_t at = begin + t * kPanel;
    c.count = std::min(kPanel, end - at);
    c.queries = queries + t * size;
    c.sums = sums + t * kPanel * ld;
    c.first_place = place_of(at), c.last_place = place_of(at + c.count - 1), c.first_seen = first_of(c.first_place);
    const T* rows[kPanel] = {};
    for (int64_t i = 0; i < kPanel; ++i) {
      const bool there = i < c.count;
      const int64_t place = place_of(at + i);
      c.m[i] = kNothing, c.l[i] = 0;
      c.low[i] = there ? first_of(place) : INFINITY;
      c.high[i] = there ? place : -INFINITY;
      if (there) rows[i] = q + query_of(at + i) * shape.dim;
    }
    Chunk::pack_queries(rows, shape.dim, c.queries);
  }
  const int64_t stop = place_of(end - 1) + 1;
  for (int64_t first = columns[0].first_seen / kPlaces * kPlaces; first < stop; first += kPlaces) {
    const int64_t here = (std::min(kPlaces, stop - first) + kPanel - 1) / kPanel * kPanel;
    chunk.take(in, head, first, here);
    for (Columns& c : columns) {
      if (c.last_place < first || c.first_seen >= first + here) continue;
      chunk.attend(c, first, std::min(here, (c.last_place - first) / kPanel * kPanel + kPanel));
    }
  }
  for (const Columns& c : columns) {
    for (int64_t i = 0; i < c.count; ++i) {
      T* to = y + query_of(begin + (&c - columns.data()) * kPanel + i) * shape.value_dim;
      const float share = 1.0f / c.l[i];
      by_vecs(shape.value_dim, [&](int64_t v, int64_t n) { store_first(load(c.sums + i * ld + v) * share, to + v, n); });
    }
  }
}

// Queries and keys of the new tokens, rotated (cpu_decoder.h): the keys, and the values, into their places in the cache.
Tensor enter(const Tensor& q, const Tensor& kv, const Tensor& turn_, bool interleaved, const Tensor& cache, const Tensor& starts,
             const Tensor& lengths, const Tensor& blocks, int64_t kv_heads) {
  const Tensor turn = turn_.contiguous();
  const int64_t heads = q.size(1), dim = q.size(2), turned = turn.size(1), size = cache.size(1), width = cache.size(2);
  const int32_t *from = starts.const_data_ptr<int32_t>(), *length = lengths.const_data_ptr<int32_t>();
  std::vector<int64_t> slots(q.size(0));
  for (int64_t r = 0; r < lengths.numel(); ++r) {
    const int32_t* table = blocks.const_data_ptr<int32_t>() + r * blocks.size(1);
    for (int64_t n = from[r]; n < from[r + 1]; ++n) {
      const int64_t place = length[r] - from[r + 1] + n;
      slots[n] = table[place / size] * size + place % size;
    }
  }
  Tensor queries = at::empty({q.size(0), heads, dim}, q.options());
  with_type(q, [&](auto t) {
    using T = decltype(t);
    at::parallel_for(0, q.size(0), std::max<int64_t>(1, 65536 / (heads * dim)), [&](int64_t begin, int64_t end) {
      std::vector<T> scratch(turned);
      for (int64_t n = begin; n < end; ++n) {
        auto enter_head = [&](const T* in, T* out) {
          turn_head(in, dim, turn.const_data_ptr<float>() + n * turned, turned, interleaved, scratch.data(), out);
        };
        for (int64_t h = 0; h < heads; ++h)
          enter_head(data<T>(q) + n * q.stride(0) + h * q.stride(1), data<T>(queries) + (n * heads + h) * dim);
        const T* row = data<T>(kv) + n * kv.stride(0);
        T* slot = data<T>(cache) + slots[n] * width;
        for (int64_t g = 0; g < kv_heads; ++g) enter_head(row + g * dim, slot + g * dim);
        std::copy(row + kv_heads * dim, row + width, slot + kv_heads * dim);
      }
    });
  });
  return queries;
}

Tensor paged_attention(const Tensor& q_, const Tensor& kv, const Tensor& turn, bool interleaved, const Tensor& cache,
                       const Tensor& starts_, const Tensor& lengths_, const Tensor& blocks_, int64_t kv_heads, int64_t value_at,
                       int64_t value_dim, double scale, int64_t window) {
  TORCH_CHECK_VALUE(q_.stride(2) == 1 && kv.stride(1) == 1 && cache.is_contiguous(), "a token's values must lie side by side");
  const Tensor blocks = blocks_.to(at::kInt).contiguous();
  const Tensor starts = starts_.to(at::kInt).contiguous(), lengths = lengths_.to(at::kInt).contiguous();
  const AttentionShape shape{q_.size(1), q_.size(2), kv_heads, value_at, value_dim, cache.size(2), cache.size(1), blocks.size(1),
                             static_cast<float>(scale), window};
  const int32_t *from = starts.const_data_ptr<int32_t>(), *length = lengths.const_data_ptr<int32_t>(),
                *table = blocks.const_data_ptr<int32_t>();
  struct Piece { int64_t sequence, head, begin, end; };
  std::vector<Piece> pieces;
  int64_t products = 0;
  for (int64_t r = 0; r < lengths.numel(); ++r) {
    const int64_t tokens = from[r + 1] - from[r], columns = tokens * shape.group();
    TORCH_CHECK_VALUE(tokens >= 0 && tokens <= length[r] && length[r] <= shape.max_blocks * shape.block, "sequence ", r, " has ",
                      tokens, " new tokens and ", length[r], " in all, with ", shape.max_blocks, " blocks of ", shape.block);
    const int64_t lowest = tokens && window ? std::max<int64_t>(0, length[r] - tokens + 1 - window) : 0;
    for (int64_t p = lowest / shape.block; tokens && p < (length[r] + shape.block - 1) / shape.block; ++p) {
      const int64_t block = table[r * shape.max_blocks + p];
      TORCH_CHECK_VALUE(block >= 0 && block < cache.size(0), "sequence ", r, " needs block ", block, " of ", cache.size(0));
    }
    products += tokens * shape.heads * length[r] * (shape.dim + value_dim);
    for (int64_t head = 0; head < kv_heads; ++head)
      for (int64_t c = 0; c < columns; c += kColumns) pieces.push_back({r, head, c, std::min(columns, c + kColumns)});
  }
  const Tensor q = enter(q_, kv, turn, interleaved, cache, starts, lengths, blocks, kv_heads);
  Tensor y = at::empty({q.size(0), shape.heads, value_dim}, q.options());
  with_type(q, [&](auto t) {
    using T = decltype(t);
    std::atomic<size_t> next{0};
    auto work = [&](auto make_chunk) {
      auto chunk = make_chunk();
      for (size_t i = next++; i < pieces.size(); i = next++) {
        const auto [r, head, begin, end] = pieces[i];
        const Places<T> in{data<T>(cache), table + r * shape.max_blocks, length[r], shape};
        attend_columns(chunk, in, shape, head, from[r + 1] - from[r], begin, end, data<T>(q) + from[r] * shape.heads * shape.dim,
                       data<T>(y) + from[r] * shape.heads * value_dim);
      }
    };
    const int64_t threads = products < 500000 ? 1 : std::min<int64_t>(pieces.size(), at::get_num_threads());
    at::parallel_for(0, threads, 1, [&](int64_t, int64_t) {
#if RECSYS_MOE_AMX
      if constexpr (std::is_same_v<T, bf16>)
        if (amx()) return work([&] { return TiledChunk(shape); });
#endif
      work([&] { return PlainChunk<T>(shape); });
    });
  });
  return y;
}

}  // namespace
