// Vectors of 16 lanes, conversions and activations, in the compiler's own vector types: one source serves every width.
//
// Half precision is bf16; all arithmetic is fp32.
#pragma once

#include <ATen/ATen.h>
#include <ATen/Parallel.h>

#include <algorithm>
#include <array>
#include <bit>
#include <cmath>
#include <cstring>
#include <map>
#include <numeric>
#include <tuple>
#include <vector>

#if defined(__AVX512F__)
#include <immintrin.h>
#endif

namespace {

using at::Tensor;
using OptionalTensor = std::optional<Tensor>;
using bf16 = at::BFloat16;

enum Activation : int64_t { kNone = 0, kRelu = 1, kSilu = 2, kGelu = 3, kSwiglu = 4, kDoubleSigmoid = 5,
                           kDoubleSigmoidOutput = 6 };  // the last: its slope, from its output

constexpr int64_t kLanes = 16;
typedef float Vec __attribute__((vector_size(4 * kLanes)));
typedef float V8 __attribute__((vector_size(32)));
typedef float V4 __attribute__((vector_size(16)));
typedef uint32_t Bits __attribute__((vector_size(4 * kLanes)));
typedef uint16_t Half __attribute__((vector_size(2 * kLanes)));

inline Vec load(const float* p) {
  Vec v;
  std::memcpy(&v, p, sizeof v);
  return v;
}
inline Bits load_halves(const bf16* p) {  // 16 bf16 values, each in the low half of a lane
  Half half;
  std::memcpy(&half, p, sizeof half);
#if defined(__AVX512F__)
  return std::bit_cast<Bits>(_mm512_cvtepu16_epi32(std::bit_cast<__m256i>(half)));  // the generic form takes four instructions
#else
  return __builtin_convertvector(half, Bits);
#endif
}
inline Vec load(const bf16* p) {
  return std::bit_cast<Vec>(load_halves(p) << 16);
}
inline void store(Vec v, float* p) { std::memcpy(p, &v, sizeof v); }

// The sum of the lanes, in one fixed tree.
inline float add_lanes(Vec v) {
  const auto halves = std::bit_cast<std::array<V8, 2>>(v);
  const auto quarters = std::bit_cast<std::array<V4, 2>>(halves[0] + halves[1]);
  const V4 s = quarters[0] + quarters[1];
  return (s[0] + s[2]) + (s[1] + s[3]);
}

// The largest of the lanes.
inline float max_lanes(Vec v) {
  const auto halves = std::bit_cast<std::array<V8, 2>>(v);
  const auto quarters = std::bit_cast<std::array<V4, 2>>(halves[0] > halves[1] ? halves[0] : halves[1]);
  const V4 m = quarters[0] > quarters[1] ? quarters[0] : quarters[1];
  return std::max(std::max(m[0], m[2]), std::max(m[1], m[3]));
}

// bf16 to nearest even; a NaN keeps a set bit.
inline void store(Vec v, bf16* p) {
#if defined(__AVX512BF16__)
  const __m256bh half = _mm512_cvtneps_pbh(std::bit_cast<__m512>(v));
#else
  const Bits bits = std::bit_cast<Bits>(v);
  const Bits rounded = (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;
  const Half half = __builtin_convertvector((bits & 0x7fffffff) > 0x7f800000 ? (bits >> 16) | 0x40 : rounded, Half);
#endif
  std::memcpy(p, &half, sizeof half);
}

template <typename T>
inline Vec load_first(const T* p, int64_t count, float rest = 0.0f) {  // the first `count` values, `rest` behind
  if (count >= kLanes) return load(p);
#if defined(__AVX512F__)
  if constexpr (std::is_same_v<T, float>)
    return std::bit_cast<Vec>(_mm512_mask_loadu_ps(_mm512_set1_ps(rest), (1u << count) - 1, p));
#endif
  T part[kLanes];
  std::fill(part, part + kLanes, static_cast<T>(rest));
  std::memcpy(part, p, count * sizeof(T));
  return load(part);
}

template <typename T>
inline void store_first(Vec v, T* p, int64_t count) {
  if (count >= kLanes) return store(v, p);
#if defined(__AVX512F__)
  if constexpr (std::is_same_v<T, float>) return _mm512_mask_storeu_ps(p, (1u << count) - 1, std::bit_cast<__m512>(v));
#endif
  T part[kLanes];
  store(v, part);
  std::memcpy(p, part, count * sizeof(T));
}

// run(i, count) for each vector of n values, the last of which may be short.
template <typename F>
inline void by_vecs(int64_t n, F&& run) {
  int64_t i = 0;
  for (; i + kLanes <= n; i += kLanes) run(i, std::integral_constant<int64_t, kLanes>{});
  if (i < n) run(i, n - i);
}

template <typename From, typename To>
inline void convert(const From* from, To* to, int64_t n) {
  if constexpr (std::is_same_v<From, To>) std::memcpy(to, from, n * sizeof(From));
  else by_vecs(n, [&](int64_t i, int64_t count) { store_first(load_first(from + i, count), to + i, count); });
}

// ---- activations: value and slope, of a pre-activation, for a result of type Y ------------------------------------------
//
// Lane by lane and without a library, so that a value's bits do not depend on where in a vector it lies. Inlined always: a call would
// spill the caller's vectors and load a dozen constants.
#define RECSYS_MOE_INLINE inline __attribute__((always_inline))

RECSYS_MOE_INLINE Vec exp(Vec x) {  // Cephes' polynomial; within 2 ulp, 0 below −87.3
  const Vec shifted = x * 1.44269504f + 12582912.0f;  // adding 1.5·2²³ rounds to an integer, in the low bits
  const Vec n = shifted - 12582912.0f;
  const Vec r = x - n * 0.693359375f + n * 2.12194440e-4f;
  Vec p = r * 1.9875691500e-4f + 1.3981999507e-3f;
  p = p * r + 8.3334519073e-3f;
  p = p * r + 4.1665795894e-2f;
  p = p * r + 1.6666665459e-1f;
  p = p * r + 5.0000001201e-1f;
  p = p * r * r + r + 1.0f;
  const Bits power = (std::bit_cast<Bits>(shifted) - 0x4b400000u + 127u) << 23;
  const Vec y = p * std::bit_cast<Vec>(power);
  return x < -87.3f ? Vec{} : (x > 88.3f ? INFINITY + Vec{} : y);
}

// 1/x within an ulp, for normal x up to 2¹²⁶: a division of 16 lanes takes as long as the whole of exp().
RECSYS_MOE_INLINE Vec reciprocal(Vec x) {
#if defined(__AVX512F__)
  const Vec y = std::bit_cast<Vec>(_mm512_rcp14_ps(std::bit_cast<__m512>(x)));
  return y + y * (1.0f - x * y);  // one step of Newton's
#else
  return 1.0f / x;
#endif
}

// Of a result that will be rounded to bf16 (`Y`), within 2e-4, a tenth of what rounding may change, for half the operations.
template <typename Y = float>
RECSYS_MOE_INLINE Vec sigmoid(Vec v) {
#if defined(__AVX512DQ__)
  if constexpr (std::is_same_v<Y, bf16>) {
    const __m512 t = std::bit_cast<__m512>(v * -1.44269504f);  // e^−v = 2^t = 2^⌊t⌋·2^r
    const Vec r = std::bit_cast<Vec>(_mm512_reduce_ps(t, _MM_FROUND_TO_NEG_INF | _MM_FROUND_NO_EXC));
    const Vec p = ((r * 0.0782679702f + 0.226307682f) * r + 0.695424348f) * r + 1.0f;  // 1 and 2 at the ends, within 1.1e-4 between
    const Vec e = std::bit_cast<Vec>(_mm512_scalef_ps(std::bit_cast<__m512>(p), t));
    return std::bit_cast<Vec>(_mm512_rcp14_ps(std::bit_cast<__m512>(1.0f + e)));
  }
#endif
  return v < -87.0f ? Vec{} : reciprocal(1.0f + exp(-v));  // below, exp may be infinite, which reciprocal() does not take
}

inline Vec erf(Vec v) {
  for (int i = 0; i < kLanes; ++i) v[i] = erff(v[i]);
  return v;
}

template <int64_t A, typename Y = float>
RECSYS_MOE_INLINE Vec activate(Vec v) {
  if constexpr (A == kRelu) return v < 0 ? Vec{} : v;  // NaN stays
  if constexpr (A == kSilu) return v * sigmoid<Y>(v);
  if constexpr (A == kGelu) return 0.5f * v * (1.0f + erf(v * 0.70710678f));
  if constexpr (A == kDoubleSigmoid) return 2.0f * sigmoid<Y>(v);
  return v;
}

template <int64_t A, typename Y = float>
RECSYS_MOE_INLINE Vec slope(Vec v) {
  const Vec one = 1.0f - Vec{};
  if constexpr (A == kRelu) return v > 0 ? one : Vec{};
  if constexpr (A == kSilu) {
    const Vec s = sigmoid<Y>(v);
    return s * (1.0f + v * (1.0f - s));
  }
  if constexpr (A == kGelu) return 0.5f * (1.0f + erf(v * 0.70710678f)) + v * 0.39894228f * exp(-0.5f * v * v);
  if constexpr (A == kDoubleSigmoid) {
    const Vec s = sigmoid<Y>(v);
    return 2.0f * s * (1.0f - s);
  }
  if constexpr (A == kDoubleSigmoidOutput) return v * (1.0f - 0.5f * v);
  return one;
}

template <typename F>
void with_activation(int64_t activation, F&& run) {
  switch (activation) {
    case kRelu: return run(std::integral_constant<int64_t, kRelu>{});
    case kSilu: return run(std::integral_constant<int64_t, kSilu>{});
    case kGelu: return run(std::integral_constant<int64_t, kGelu>{});
    case kDoubleSigmoid: return run(std::integral_constant<int64_t, kDoubleSigmoid>{});
    case kDoubleSigmoidOutput: return run(std::integral_constant<int64_t, kDoubleSigmoidOutput>{});
    default: return run(std::integral_constant<int64_t, kNone>{});
  }
}

// Softmax of one row. `w` has room for whole vectors: stored and loaded whole, its values stay in the store buffer's reach.
inline void softmax_row(const float* logits, float* w, int64_t e) {
  Vec top = -INFINITY - Vec{};
  by_vecs(e, [&](int64_t i, int64_t n) {
    const Vec v = load_first(logits + i, n, -INFINITY);
    store(v, w + i);
    top = v > top ? v : top;
  });
  top = max_lanes(top) - Vec{};
  Vec sums = {};
  by_vecs(e, [&](int64_t i, int64_t) {
    const Vec v = exp(load(w + i) - top);  // 0 behind the end
    store(v, w + i);
    sums += v;
  });
  const float inverse = 1.0f / add_lanes(sums);
  by_vecs(e, [&](int64_t i, int64_t) { store(load(w + i) * inverse, w + i); });
}

// y = act(z·a + c) of one row (a, c null: 1, 0); with swiglu its columns are [gate | up] for each of `blocks` blocks.
template <typename Z, typename Y>
void activate_row(const Z* z, Y* y, int64_t columns, int64_t blocks, const float* a, const float* c, int64_t activation) {
  auto u = [&](int64_t i, int64_t count) {
    Vec v = load_first(z + i, count);
    if (a) v = v * load_first(a + i, count);
    return c ? v + load_first(c + i, count) : v;
  };
  if (activation == kSwiglu) {
    const int64_t half = columns / blocks / 2;
    for (int64_t block = 0; block < blocks; ++block) {
      const int64_t gate = block * 2 * half, up = gate + half;
      by_vecs(half, [&](int64_t i, int64_t count) {
        store_first(activate<kSilu, Y>(u(gate + i, count)) * u(up + i, count), y + block * half + i, count);
      });
    }
    return;
  }
  with_activation(activation, [&](auto A) {
    by_vecs(columns, [&](int64_t i, int64_t count) { store_first(activate<decltype(A)::value, Y>(u(i, count)), y + i, count); });
  });
}

// Memory that a thread keeps for the next call: fresh pages cost more than what is done in them. `Use` tells its users apart.
template <typename Use, typename T>
T* kept(size_t count) {
  thread_local std::vector<T> memory;
  if (memory.size() < count) memory.resize(count);
  return memory.data();
}

template <typename F>
void with_type(const Tensor& t, F&& run) {
  if (t.scalar_type() == at::kBFloat16) return run(bf16{});
  TORCH_CHECK_VALUE(t.scalar_type() == at::kFloat, "experts run in float32 or bfloat16 on the CPU, not ", t.scalar_type());
  run(float{});
}

template <typename T>
T* data(const Tensor& t) { return reinterpret_cast<T*>(t.data_ptr()); }

const float* maybe(const OptionalTensor& t) { return t.has_value() && t->defined() ? t->const_data_ptr<float>() : nullptr; }

}  // namespace
