// Tiles of bf16 products for processors with AMX: C[m, n] += Σ_k A[m, k]·B[n, k], 32 rows × 32 columns at a time.
//
// A lies row by row, as weights or a batch do; B is a packed panel (cpu_gemm.h: panel[word][column], a word is two values that
// follow each other along k). One tile holds 16 rows of 16 words. Tiles 0–3 are sums, 4 and 5 rows of A, 6 and 7 columns of B.
// k is summed 32 values at a time, in order, so the bits of C[m, n] depend on row m of A and row n of B alone.
//
// With RECSYS_MOE_EMULATE_AMX the instructions are replaced by their definition in plain C++: for tests on other processors.
#pragma once

#include "cpu_vector.h"

#if defined(__AVX512F__) && (defined(__AMX_BF16__) || defined(RECSYS_MOE_EMULATE_AMX))
#define RECSYS_MOE_AMX 1
#include <sys/syscall.h>
#include <unistd.h>

namespace {

constexpr int kTile = 16;         // rows, and words a row, of a tile
constexpr int kSums = 2 * kTile;  // rows and columns of a block of sums

struct alignas(64) TileShapes {  // what LDTILECFG reads
  uint8_t palette = 1, start_row = 0, reserved[14] = {};
  uint16_t bytes[16] = {};
  uint8_t rows[16] = {};
};

#if defined(RECSYS_MOE_EMULATE_AMX)

struct EmulatedTile { uint32_t word[kTile][kTile]; };
thread_local EmulatedTile emulated[8];
thread_local TileShapes emulated_shapes;

inline bool amx() { return true; }
inline void configure(const TileShapes& shapes) {
  emulated_shapes = shapes;
  std::memset(emulated, 0, sizeof emulated);
}
inline void release() { std::memset(emulated, 0xff, sizeof emulated); }
template <int Tile>
inline void tile_zero() { std::memset(&emulated[Tile], 0, sizeof emulated[Tile]); }
template <int Tile>
inline void tile_load(const void* p, int64_t stride) {
  tile_zero<Tile>();
  for (int r = 0; r < emulated_shapes.rows[Tile]; ++r)
    std::memcpy(emulated[Tile].word[r], static_cast<const char*>(p) + r * stride, emulated_shapes.bytes[Tile]);
}
template <int Tile>
inline void tile_store(void* p, int64_t stride) {
  for (int r = 0; r < emulated_shapes.rows[Tile]; ++r)
    std::memcpy(static_cast<char*>(p) + r * stride, emulated[Tile].word[r], emulated_shapes.bytes[Tile]);
}
template <int C, int A, int B>
inline void tile_multiply() {
  auto low = [](uint32_t pair) { return std::bit_cast<float>(pair << 16); };
  auto high = [](uint32_t pair) { return std::bit_cast<float>(pair & 0xffff0000u); };
  for (int m = 0; m < emulated_shapes.rows[C]; ++m) {
    for (int n = 0; n < emulated_shapes.bytes[C] / 4; ++n) {
      float even = 0, odd = 0;
      for (int k = 0; k < emulated_shapes.bytes[A] / 4; ++k) {
        const uint32_t a = emulated[A].word[m][k], b = emulated[B].word[k][n];
        even = std::fma(low(a), low(b), even);
        odd = std::fma(high(a), high(b), odd);
      }
      uint32_t& c = emulated[C].word[m][n];
      c = std::bit_cast<uint32_t>(std::bit_cast<float>(c) + (even + odd));
    }
  }
}

#else

// Linux gives a process the tiles' state on request only; without it the vector products remain.
inline bool amx() {
  constexpr long kRequestPermission = 0x1023, kTileData = 18;
  static const bool granted = syscall(SYS_arch_prctl, kRequestPermission, kTileData) == 0;
  return granted;
}
// In assembler: the compiler's intrinsics take a literal as a tile's number, and do not say that a load reads memory.
inline void configure(const TileShapes& shapes) { asm volatile("ldtilecfg %0" ::"m"(shapes)); }
inline void release() { asm volatile("tilerelease"); }
template <int Tile>
inline void tile_zero() { asm volatile("tilezero %%tmm%c0" ::"i"(Tile)); }
template <int Tile>
inline void tile_load(const void* p, int64_t stride) {
  asm volatile("tileloadd (%0,%1,1), %%tmm%c2" ::"r"(p), "r"(stride), "i"(Tile) : "memory");
}
template <int Tile>
inline void tile_store(void* p, int64_t stride) {
  asm volatile("tilestored %%tmm%c2, (%0,%1,1)" ::"r"(p), "r"(stride), "i"(Tile) : "memory");
}
template <int C, int A, int B>
inline void tile_multiply() { asm volatile("tdpbf16ps %%tmm%c2, %%tmm%c1, %%tmm%c0" ::"i"(C), "i"(A), "i"(B)); }

#endif

// A processor's tiles, shaped for blocks of up to 32 rows and 32 columns; put back at the end.
class Tiles {
 public:
  ~Tiles() { if (rows_) release(); }
  void shape(int64_t rows) {
    if (rows == rows_) return;
    rows_ = rows;
    TileShapes shapes;
    for (int t = 0; t < 8; ++t) shapes.bytes[t] = 4 * kTile, shapes.rows[t] = kTile;
    const uint8_t low = std::min<int64_t>(rows, kTile), high = std::max<int64_t>(1, rows - kTile);
    shapes.rows[0] = shapes.rows[1] = shapes.rows[4] = low;
    shapes.rows[2] = shapes.rows[3] = shapes.rows[5] = high;
    configure(shapes);
  }

 private:
  int64_t rows_ = 0;
};

// One step along k for a block of (Low ? 16 : 32) rows × (Narrow ? 16 : 32) columns.
template <bool Low, bool Narrow>
inline void tiles_step(const char* a, int64_t stride, const float* b) {
  constexpr int64_t kRow = kSums * sizeof(float);
  tile_load<6>(b, kRow);
  tile_load<4>(a, stride);
  tile_multiply<0, 4, 6>();
  if constexpr (!Narrow) {
    tile_load<7>(b + kTile, kRow);
    tile_multiply<1, 4, 7>();
  }
  if constexpr (!Low) {
    tile_load<5>(a + kTile * stride, stride);
    tile_multiply<2, 5, 6>();
    if constexpr (!Narrow) tile_multiply<3, 5, 7>();
  }
}

// What a block of sums is taken of: rows of A, `stride` bytes apart, `bytes` of each, and as much of a panel. Where the last step is
// short, `tail` holds the panel's last words with zeros behind.
struct TileProduct {
  const char* a;
  int64_t stride, bytes;
  const float* panel;
  const float* tail;  // [16][32]
  const char* ahead = nullptr;  // rows, `stride` bytes apart too, to fetch into the second-level cache meanwhile:
  int64_t ahead_from = 0, ahead_to = 0;  // these of them
};

// Sums [32][ldc] = A·B, or += where `add`.
template <bool Low, bool Narrow>
void tiles_block(const TileProduct& p, int64_t rows, float* sums, int64_t ldc, bool add) {
  constexpr int64_t kStep = 4 * kTile;
  const int64_t ld = ldc * sizeof(float);
  if (add) {
    tile_load<0>(sums, ld);
    if constexpr (!Narrow) tile_load<1>(sums + kTile, ld);
    if constexpr (!Low) tile_load<2>(sums + kTile * ldc, ld);
    if constexpr (!Low && !Narrow) tile_load<3>(sums + kTile * ldc + kTile, ld);
  } else {
    tile_zero<0>();
    tile_zero<1>();
    tile_zero<2>();
    tile_zero<3>();
  }
  const auto [a, stride, bytes, panel, tail, ahead, ahead_from, ahead_to] = p;
  int64_t k = 0;
  for (; k + kStep <= bytes; k += kStep) {
    for (int64_t r = ahead_from; r < ahead_to; ++r) __builtin_prefetch(ahead + k + r * stride, 0, 2);
    tiles_step<Low, Narrow>(a + k, stride, panel + k / 4 * kSums);
  }
  if (k < bytes) {
    alignas(64) char last[kSums][kStep] = {};
    for (int64_t r = 0; r < rows; ++r) std::memcpy(last[r], a + r * stride + k, bytes - k);
    tiles_step<Low, Narrow>(last[0], kStep, tail);
  }
  tile_store<0>(sums, ld);
  if constexpr (!Narrow) tile_store<1>(sums + kTile, ld);
  if constexpr (!Low) tile_store<2>(sums + kTile * ldc, ld);
  if constexpr (!Low && !Narrow) tile_store<3>(sums + kTile * ldc + kTile, ld);
}

inline void tiles_block(const TileProduct& p, int64_t rows, int64_t columns, float* sums, int64_t ldc, bool add) {
  if (rows > kTile && columns > kTile) tiles_block<false, false>(p, rows, sums, ldc, add);
  else if (rows > kTile) tiles_block<false, true>(p, rows, sums, ldc, add);
  else if (columns > kTile) tiles_block<true, false>(p, rows, sums, ldc, add);
  else tiles_block<true, true>(p, rows, sums, ldc, add);
}

// run(product, m, count) for each block of rows of A, `stride` bytes apart, that meets one panel of `depth` words.
template <typename F>
void by_tiles(const char* a, int64_t stride, int64_t rows, const float* panel, int64_t depth, F&& run) {
  alignas(64) float tail[kTile * kSums];
  const int64_t rest = depth % kTile;
  if (rest) {
    std::memset(tail, 0, sizeof tail);
    for (int64_t w = 0; w < rest; ++w) std::memcpy(tail + w * kSums, panel + (depth - rest + w) * kSums, kSums * sizeof(float));
  }
  Tiles tiles;
  for (int64_t m = 0; m < rows; m += kSums) {
    const int64_t count = std::min<int64_t>(kSums, rows - m);
    tiles.shape(count);
    run(TileProduct{a + m * stride, stride, depth * 4, panel, tail}, m, count);
  }
}

// multiply() of cpu_gemm.h by tiles: done(row, sums[32]).
template <typename F>
void multiply_tiles(const char* a, int64_t stride, int64_t rows, const float* panel, int64_t depth, F&& done) {
  alignas(64) float sums[kSums * kSums];
  by_tiles(a, stride, rows, panel, depth, [&](const TileProduct& p, int64_t m, int64_t count) {
    if constexpr (requires { done.prefetch(m); })
      for (int64_t i = 0; i < count; ++i) done.prefetch(m + i);
    tiles_block(p, count, kSums, sums, kSums, false);
    for (int64_t i = 0; i < count; ++i) done(m + i, static_cast<const float*>(sums + i * kSums));
  });
}

}  // namespace

#else

#define RECSYS_MOE_AMX 0

#endif
