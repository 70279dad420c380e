// The expert operations on the CPU: what PyTorch has no fused form for. Large products go to its BLAS.
//
// Written with the compiler's vector types and `omp simd`, so that one source serves every width; it is built on the machine
// it runs on, for that machine. Half precision is bf16; all arithmetic is fp32.
//
// Shapes: B rows, S inputs a row, G groups of experts, E experts, D inputs and H outputs of a layer, T tasks a row,
// R = B·T routed rows, K experts a routed row, N = R·K slots.

#include <ATen/ATen.h>
#include <ATen/Parallel.h>
#include <torch/library.h>

#include <algorithm>
#include <array>
#include <bit>
#include <cmath>
#include <cstring>
#include <numeric>
#include <tuple>
#include <vector>

#if defined(__x86_64__) && defined(__GLIBC__)
// glibc has a vector form of it, which the compiler may use in `omp simd` loops once it is told.
#pragma omp declare simd notinbranch
extern "C" float expf(float) noexcept;
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

inline float wide(float v) { return v; }
inline float wide(bf16 v) { return static_cast<float>(v); }

inline Vec load(const float* p) {
  Vec v;
  std::memcpy(&v, p, sizeof v);
  return v;
}
inline Vec load(const bf16* p) {
  Half half;
  std::memcpy(&half, p, sizeof half);
  return std::bit_cast<Vec>(__builtin_convertvector(half, Bits) << 16);
}
inline void store(Vec v, float* p) { std::memcpy(p, &v, sizeof v); }

// The sum of the lanes, in one fixed tree.
inline float add_lanes(Vec v) {
  const auto halves = std::bit_cast<std::array<V8, 2>>(v);
  const auto quarters = std::bit_cast<std::array<V4, 2>>(halves[0] + halves[1]);
  const V4 s = quarters[0] + quarters[1];
  return (s[0] + s[2]) + (s[1] + s[3]);
}

template <typename T>
inline Vec load_first(const T* p, int64_t count) {  // the first `count` values, zeros behind
  T part[kLanes] = {};
  std::copy(p, p + count, part);
  return load(part);
}

template <typename T>
void widen(const T* from, float* to, int64_t n) {
  if constexpr (std::is_same_v<T, float>) {
    std::memcpy(to, from, n * sizeof(float));
  } else {
    const uint16_t* bits = reinterpret_cast<const uint16_t*>(from);
    uint32_t* out = reinterpret_cast<uint32_t*>(to);
#pragma omp simd
    for (int64_t i = 0; i < n; ++i) out[i] = static_cast<uint32_t>(bits[i]) << 16;
  }
}

template <typename T>
void narrow(const float* from, T* to, int64_t n) {
  if constexpr (std::is_same_v<T, float>) {
    std::memcpy(to, from, n * sizeof(float));
  } else {
    const uint32_t* bits = reinterpret_cast<const uint32_t*>(from);
    uint16_t* out = reinterpret_cast<uint16_t*>(to);
#pragma omp simd
    for (int64_t i = 0; i < n; ++i) {  // to nearest even; a NaN keeps a set bit
      uint32_t v = bits[i];
      uint32_t rounded = (v + 0x7fff + ((v >> 16) & 1)) >> 16;
      out[i] = (v & 0x7fffffff) > 0x7f800000 ? static_cast<uint16_t>((v >> 16) | 0x40) : static_cast<uint16_t>(rounded);
    }
  }
}

// ---- activations: value and derivative, of a pre-activation -----------------------------------------------------------

inline float sigmoid(float v) { return 1.0f / (1.0f + expf(-v)); }

template <int64_t A>
inline float activate(float v) {
  if constexpr (A == kRelu) return v > 0 ? v : 0;
  if constexpr (A == kSilu) return v * sigmoid(v);
  if constexpr (A == kGelu) return 0.5f * v * (1.0f + erff(v * 0.70710678f));
  if constexpr (A == kDoubleSigmoid) return 2.0f * sigmoid(v);
  return v;
}

template <int64_t A>
inline float slope(float v) {
  if constexpr (A == kRelu) return v > 0 ? 1 : 0;
  if constexpr (A == kSilu) {
    float s = sigmoid(v);
    return s * (1.0f + v * (1.0f - s));
  }
  if constexpr (A == kGelu) return 0.5f * (1.0f + erff(v * 0.70710678f)) + v * 0.39894228f * expf(-0.5f * v * v);
  if constexpr (A == kDoubleSigmoid) {
    float s = sigmoid(v);
    return 2.0f * s * (1.0f - s);
  }
  if constexpr (A == kDoubleSigmoidOutput) return v * (1.0f - 0.5f * v);
  return 1;
}

// For a value at a time, where a vector form in some places and not in others would give a unit different bits.
template <int64_t A>
[[gnu::noinline]] float activate_alone(float v) {
  return activate<A>(v);
}

template <int64_t A>
inline float activate_one(float v) {
  if constexpr (A == kNone || A == kRelu) return activate<A>(v);
  return activate_alone<A>(v);
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

template <typename F>
void with_type(const Tensor& t, F&& run) {
  if (t.scalar_type() == at::kBFloat16) return run(bf16{});
  TORCH_CHECK_VALUE(t.scalar_type() == at::kFloat, "experts run in float32 or bfloat16 on the CPU, not ", t.scalar_type());
  run(float{});
}

template <typename T>
T* data(const Tensor& t) { return reinterpret_cast<T*>(t.data_ptr()); }

const float* maybe(const OptionalTensor& t) { return t.has_value() && t->defined() ? t->const_data_ptr<float>() : nullptr; }

// ---- large products ------------------------------------------------------------------------------------------------------
//
// PyTorch's, but bf16 only where the processor multiplies it: elsewhere it would add up in bf16, slowly and roughly.

#if defined(__AVX512BF16__) || defined(__AMX_BF16__) || defined(__ARM_FEATURE_BF16)
constexpr bool kHalfProducts = true;
#else
constexpr bool kHalfProducts = false;
#endif

Tensor product(const Tensor& a, const Tensor& b) {
  if (kHalfProducts || a.scalar_type() != at::kBFloat16) return at::mm(a, b);
  return at::mm(a.to(at::kFloat), b.to(at::kFloat)).to(at::kBFloat16);
}

void product_into(Tensor out, const Tensor& a, const Tensor& b) {
  if (kHalfProducts || a.scalar_type() != at::kBFloat16) {
    at::mm_out(out, a, b);
  } else {
    out.copy_(product(a, b));
  }
}

// ---- norm and activation over segments of rows ------------------------------------------------------------------------
//
// A matrix z `[rows, columns]` falls into segments: all rows of the dense experts, side by side, are one; the slots of a
// sparse plan are one for each expert. Segment s has parameters of its own (row s of `[segments, columns]`). Per unit:
//   u = z·a + c,  y = act(u)        a, c fold bias, norm and moments into one multiply-add.

struct Segments {
  std::vector<int64_t> bounds;  // segment s: rows bounds[s] … bounds[s + 1] − 1
  int64_t count() const { return static_cast<int64_t>(bounds.size()) - 1; }
  int64_t rows() const { return bounds.back(); }
  int64_t size(int64_t s) const { return bounds[s + 1] - bounds[s]; }
  // Chunks of rows, none of which crosses a segment: the unit of parallel work, whatever the number of threads.
  template <typename F>
  void for_chunks(int64_t chunk_rows, int64_t columns, F&& run) const {
    struct Chunk { int64_t segment, begin, end; };
    std::vector<Chunk> chunks;
    for (int64_t s = 0; s < count(); ++s)
      for (int64_t r = bounds[s]; r < bounds[s + 1]; r += chunk_rows)
        chunks.push_back({s, r, std::min(r + chunk_rows, bounds[s + 1])});
    const int64_t grain = std::max<int64_t>(1, 16384 / (chunk_rows * columns));
    at::parallel_for(0, chunks.size(), grain, [&](int64_t from, int64_t to) {
      for (int64_t i = from; i < to; ++i) run(i, chunks[i].segment, chunks[i].begin, chunks[i].end);
    });
  }
  std::vector<int64_t> chunk_segments(int64_t chunk_rows) const {
    std::vector<int64_t> out;
    for (int64_t s = 0; s < count(); ++s)
      for (int64_t r = bounds[s]; r < bounds[s + 1]; r += chunk_rows) out.push_back(s);
    return out;
  }
};

Segments segments_of(const OptionalTensor& offsets, int64_t rows) {
  if (!offsets.has_value()) return {{0, rows}};
  const int32_t* p = offsets->const_data_ptr<int32_t>();
  return {std::vector<int64_t>(p, p + offsets->numel())};
}

constexpr int64_t kChunk = 64;

// Mean and biased variance of each column of each segment. Chunk by chunk in two passes, merged in the order of the chunks
// (Chan et al. 1979), so the result does not depend on the number of threads.
template <typename Z>
void moments(const Z* z, const Segments& segments, int64_t columns, float* mean, float* var) {
  const auto owner = segments.chunk_segments(kChunk);
  std::vector<float> part(owner.size() * columns * 2);
  std::vector<int64_t> sizes(owner.size());
  segments.for_chunks(kChunk, columns, [&](int64_t i, int64_t, int64_t begin, int64_t end) {
    float* m = part.data() + i * columns * 2;
    float* m2 = m + columns;
    const float inverse = 1.0f / (end - begin);
    for (int64_t r = begin; r < end; ++r) {
      const Z* row = z + r * columns;
#pragma omp simd
      for (int64_t c = 0; c < columns; ++c) m[c] += wide(row[c]);
    }
    for (int64_t c = 0; c < columns; ++c) m[c] *= inverse;
    for (int64_t r = begin; r < end; ++r) {
      const Z* row = z + r * columns;
#pragma omp simd
      for (int64_t c = 0; c < columns; ++c) {
        float d = wide(row[c]) - m[c];
        m2[c] += d * d;
      }
    }
    sizes[i] = end - begin;
  });
  std::fill(mean, mean + segments.count() * columns, 0.0f);
  std::fill(var, var + segments.count() * columns, 0.0f);
  std::vector<int64_t> seen(segments.count());
  for (size_t i = 0; i < owner.size(); ++i) {
    float *m = mean + owner[i] * columns, *v = var + owner[i] * columns;
    const float* pm = part.data() + i * columns * 2;
    const float before = seen[owner[i]], add = sizes[i], all = before + add;
#pragma omp simd
    for (int64_t c = 0; c < columns; ++c) {
      float delta = pm[c] - m[c];
      m[c] += delta * (add / all);
      v[c] += pm[columns + c] + delta * delta * (before * add / all);
    }
    seen[owner[i]] += sizes[i];
  }
  for (int64_t s = 0; s < segments.count(); ++s)
    for (int64_t c = 0; c < columns; ++c) var[s * columns + c] /= std::max<int64_t>(seen[s], 1);
}

// a and c of u = z·a + c, z without its bias.
void fold(int64_t n, const float* bias, const float* scale, const float* shift, const float* mean, const float* rstd, float* a,
          float* c) {
  for (int64_t i = 0; i < n; ++i) {
    a[i] = scale ? scale[i] * rstd[i] : 1.0f;
    c[i] = scale ? shift[i] - mean[i] * a[i] : (bias ? bias[i] : 0.0f);
  }
}

// y = act(z·a + c); with swiglu the columns of z are [gate | up] for each of `experts` blocks.
template <typename Z, typename Y>
void apply(const Z* z, Y* y, const Segments& segments, int64_t columns, int64_t blocks, const float* a, const float* c,
           int64_t activation) {
  const int64_t out_columns = activation == kSwiglu ? columns / 2 : columns;
  segments.for_chunks(16, columns, [&](int64_t, int64_t s, int64_t begin, int64_t end) {
    std::vector<float> u(columns), v(out_columns);
    const float *as = a + s * columns, *cs = c + s * columns;
    for (int64_t r = begin; r < end; ++r) {
      const Z* row = z + r * columns;
      widen(row, u.data(), columns);
#pragma omp simd
      for (int64_t i = 0; i < columns; ++i) u[i] = u[i] * as[i] + cs[i];
      if (activation == kSwiglu) {
        const int64_t half = columns / blocks / 2;
        for (int64_t block = 0; block < blocks; ++block) {
          const float *gate = u.data() + block * 2 * half, *up = gate + half;
          float* out = v.data() + block * half;
#pragma omp simd
          for (int64_t i = 0; i < half; ++i) out[i] = activate<kSilu>(gate[i]) * up[i];
        }
        narrow(v.data(), y + r * out_columns, out_columns);
      } else {
        with_activation(activation, [&](auto A) {
          float* p = u.data();
#pragma omp simd
          for (int64_t i = 0; i < columns; ++i) p[i] = activate<decltype(A)::value>(p[i]);
        });
        narrow(u.data(), y + r * columns, columns);
      }
    }
  });
}

// The gradient of u, for one row.
template <typename Y>
void grad_row(const float* u, const Y* grad_y, float* grad_u, int64_t columns, int64_t blocks, int64_t activation) {
  if (activation == kSwiglu) {
    const int64_t half = columns / blocks / 2;
    for (int64_t block = 0; block < blocks; ++block) {
      const float *gate = u + block * 2 * half, *up = gate + half;
      const Y* g = grad_y + block * half;
      float *d_gate = grad_u + block * 2 * half, *d_up = d_gate + half;
#pragma omp simd
      for (int64_t i = 0; i < half; ++i) {
        float gi = wide(g[i]);
        d_gate[i] = gi * up[i] * slope<kSilu>(gate[i]);
        d_up[i] = gi * activate<kSilu>(gate[i]);
      }
    }
    return;
  }
  with_activation(activation, [&](auto A) {
#pragma omp simd
    for (int64_t i = 0; i < columns; ++i) grad_u[i] = wide(grad_y[i]) * slope<decltype(A)::value>(u[i]);
  });
}

// Forward: y = act(norm(z + bias)). Returns y, and the mean (of z without its bias) and biased variance that were used.
std::tuple<Tensor, Tensor, Tensor> norm_act(const Tensor& z_, int64_t blocks, const OptionalTensor& offsets,
                                            const OptionalTensor& bias, const OptionalTensor& scale, const OptionalTensor& shift,
                                            const OptionalTensor& running_mean, const OptionalTensor& running_var, bool training,
                                            double eps, int64_t activation) {
  const Tensor z = z_.contiguous();
  const int64_t rows = z.size(0), columns = offsets.has_value() ? z.size(1) : z.size(1) * z.size(2);
  const Segments segments = segments_of(offsets, rows);
  const int64_t params = segments.count() * columns;
  auto fp32 = z.options().dtype(at::kFloat);
  const bool norm = scale.has_value();
  Tensor mean = at::empty({norm ? params : 0}, fp32), var = at::empty({norm ? params : 0}, fp32);
  std::vector<float> a(params), c(params), rstd(params);
  if (norm) {
    float *m = mean.data_ptr<float>(), *v = var.data_ptr<float>();
    if (training) with_type(z, [&](auto t) { moments(data<decltype(t)>(z), segments, columns, m, v); });
    const float *rm = maybe(running_mean), *rv = maybe(running_var), *bp = maybe(bias);
    for (int64_t s = 0; s < segments.count(); ++s) {
      const bool own = training && segments.size(s) > 1;
      for (int64_t i = s * columns; i < (s + 1) * columns; ++i) {
        if (!own) m[i] = rm[i] - (bp ? bp[i] : 0.0f), v[i] = rv[i];
        rstd[i] = 1.0f / std::sqrt(v[i] + static_cast<float>(eps));
      }
    }
  }
  fold(params, maybe(bias), maybe(scale), maybe(shift), maybe(mean), rstd.data(), a.data(), c.data());
  auto shape = z.sizes().vec();
  if (activation == kSwiglu) shape.back() /= 2;
  Tensor y = at::empty(shape, z.options());
  if (rows) {
    with_type(z, [&](auto t) {
      using T = decltype(t);
      apply(data<T>(z), data<T>(y), segments, columns, blocks, a.data(), c.data(), activation);
    });
    if (segments.rows() < rows) y.slice(0, segments.rows()).zero_();
  }
  return {y, mean, var};
}

// Backward of norm_act: gradients of z, bias, scale and shift. Sums are taken chunk by chunk and added in order.
std::tuple<Tensor, Tensor, Tensor, Tensor> norm_act_backward(const Tensor& grad_y_, const Tensor& z_, int64_t blocks,
                                                             const OptionalTensor& offsets, const OptionalTensor& bias,
                                                             const OptionalTensor& scale, const OptionalTensor& shift,
                                                             const Tensor& mean, const Tensor& var, bool training,
                                                             double eps, int64_t activation) {
  const Tensor z = z_.contiguous(), grad_y = grad_y_.to(z.scalar_type()).contiguous();
  const int64_t rows = z.size(0), columns = offsets.has_value() ? z.size(1) : z.size(1) * z.size(2);
  const Segments segments = segments_of(offsets, rows);
  const int64_t params = segments.count() * columns;
  auto fp32 = z.options().dtype(at::kFloat);
  Tensor grad_z = at::empty_like(z);
  Tensor grad_shift = at::zeros({params}, fp32), grad_scale = at::zeros({scale.has_value() ? params : 0}, fp32);
  std::vector<float> a(params), c(params);
  const bool norm = scale.has_value();
  const float* m = maybe(mean);
  std::vector<float> rstd(norm ? params : 0);
  for (size_t i = 0; i < rstd.size(); ++i) rstd[i] = 1.0f / std::sqrt(maybe(var)[i] + static_cast<float>(eps));
  const float* s1 = rstd.data();
  fold(params, maybe(bias), maybe(scale), maybe(shift), m, s1, a.data(), c.data());
  with_type(z, [&](auto t) {
    using T = decltype(t);
    const T *zp = data<T>(z), *gp = data<T>(grad_y);
    T* out = data<T>(grad_z);
    const int64_t out_columns = activation == kSwiglu ? columns / 2 : columns;
    const auto owner = segments.chunk_segments(kChunk);
    std::vector<float> sums(owner.size() * columns * 2);
    // First pass: Σ du and Σ du·x̂ for each column. Without a norm in training, dz is known at once.
    const bool direct = !norm || !training;
    segments.for_chunks(kChunk, columns, [&](int64_t i, int64_t s, int64_t begin, int64_t end) {
      std::vector<float> u(columns), du(columns);
      const float *as = a.data() + s * columns, *cs = c.data() + s * columns;
      float *sum = sums.data() + i * columns * 2, *sum_x = sum + columns;
      for (int64_t r = begin; r < end; ++r) {
        const T* row = zp + r * columns;
        widen(row, u.data(), columns);
        const float* ms = m + s * columns;
        const float* rs = s1 + s * columns;
        if (norm) {
#pragma omp simd
          for (int64_t k = 0; k < columns; ++k) u[k] = u[k] * as[k] + cs[k];
        } else {
#pragma omp simd
          for (int64_t k = 0; k < columns; ++k) u[k] += cs[k];
        }
        grad_row(u.data(), gp + r * out_columns, du.data(), columns, blocks, activation);
        if (norm) {
#pragma omp simd
          for (int64_t k = 0; k < columns; ++k) {
            sum[k] += du[k];
            sum_x[k] += du[k] * (wide(row[k]) - ms[k]) * rs[k];
          }
        } else {
#pragma omp simd
          for (int64_t k = 0; k < columns; ++k) sum[k] += du[k];
        }
        if (direct) {
          if (norm) {
#pragma omp simd
            for (int64_t k = 0; k < columns; ++k) du[k] *= as[k];
          }
          narrow(du.data(), out + r * columns, columns);
        }
      }
    });
    float *total = grad_shift.data_ptr<float>(), *total_x = norm ? grad_scale.data_ptr<float>() : nullptr;
    for (size_t i = 0; i < owner.size(); ++i) {
      const float* sum = sums.data() + i * columns * 2;
      for (int64_t k = 0; k < columns; ++k) {
        total[owner[i] * columns + k] += sum[k];
        if (norm) total_x[owner[i] * columns + k] += sum[columns + k];
      }
    }
    if (direct) return;
    // Second pass: dz = a·(du − mean(du) − x̂·mean(du·x̂)); a segment that kept to its running moments: a·du.
    segments.for_chunks(kChunk, columns, [&](int64_t, int64_t s, int64_t begin, int64_t end) {
      std::vector<float> u(columns), du(columns), mean_du(columns), mean_dux(columns);
      const int64_t n = segments.size(s);
      const float share = n < 2 ? 0.0f : 1.0f / n;
      const float *as = a.data() + s * columns, *cs = c.data() + s * columns, *ms = m + s * columns, *rs = s1 + s * columns;
      for (int64_t k = 0; k < columns; ++k) {
        mean_du[k] = total[s * columns + k] * share;
        mean_dux[k] = total_x[s * columns + k] * share * rs[k];
      }
      for (int64_t r = begin; r < end; ++r) {
        const T* row = zp + r * columns;
#pragma omp simd
        for (int64_t k = 0; k < columns; ++k) u[k] = wide(row[k]) * as[k] + cs[k];
        grad_row(u.data(), gp + r * out_columns, du.data(), columns, blocks, activation);
#pragma omp simd
        for (int64_t k = 0; k < columns; ++k) du[k] = as[k] * (du[k] - mean_du[k] - (wide(row[k]) - ms[k]) * mean_dux[k]);
        narrow(du.data(), out + r * columns, columns);
      }
    });
  });
  if (rows && segments.rows() < rows) grad_z.slice(0, segments.rows()).zero_();
  // The bias: du itself without a norm; none in training, where the mean takes it away; a·du with running moments.
  Tensor grad_bias = at::zeros({bias.has_value() ? params : 0}, fp32);
  if (bias.has_value()) {
    float* g = grad_bias.data_ptr<float>();
    const float* total = grad_shift.const_data_ptr<float>();
    for (int64_t s = 0; s < segments.count(); ++s) {
      const bool own = norm && training && segments.size(s) > 1;
      for (int64_t k = s * columns; k < (s + 1) * columns; ++k) g[k] = own ? 0.0f : a[k] * total[k];
    }
  }
  return {grad_z, grad_bias, grad_scale, norm ? grad_shift : at::zeros({0}, fp32)};
}

// ---- products ---------------------------------------------------------------------------------------------------------
//
// rows_kernel: C[m, n] = Σ_d A[m, d]·W[n, d] for MR rows of A (fp32) and NR rows of W, read as they lie. Lane l sums the
// d ≡ l mod 16, then the lanes are added in one fixed tree: the bits of C[m, n] depend on row m and row n alone.

template <int MR, int NR, typename W>
inline void rows_kernel(const float* A, int64_t lda, const W* const* w, int64_t depth, float* C /* [MR][NR] */) {
  Vec sum[MR][NR] = {};
  int64_t d = 0;
  for (; d + kLanes <= depth; d += kLanes) {
    Vec wv[NR];
    for (int n = 0; n < NR; ++n) {
      __builtin_prefetch(w[n] + d + 512 / sizeof(W) * 2);
      wv[n] = load(w[n] + d);
    }
    for (int m = 0; m < MR; ++m) {
      const Vec av = load(A + m * lda + d);
      for (int n = 0; n < NR; ++n) sum[m][n] += av * wv[n];
    }
  }
  if (d < depth) {
    for (int n = 0; n < NR; ++n) {
      const Vec wv = load_first(w[n] + d, depth - d);
      for (int m = 0; m < MR; ++m) sum[m][n] += load_first(A + m * lda + d, depth - d) * wv;
    }
  }
  for (int m = 0; m < MR; ++m)
    for (int n = 0; n < NR; ++n) C[m * NR + n] = add_lanes(sum[m][n]);
}

constexpr int kRowTile = 4, kUnitTile = 6;

// All rows of A against NR weight rows; `store(row, values[NR])`.
template <int NR, typename W, typename F>
void units_kernel(const float* A, int64_t rows, int64_t lda, const W* const* w, int64_t depth, F&& store) {
  float C[kRowTile * NR];
  int64_t m = 0;
  for (; m + kRowTile <= rows; m += kRowTile) {
    rows_kernel<kRowTile, NR>(A + m * lda, lda, w, depth, C);
    for (int i = 0; i < kRowTile; ++i) store(m + i, C + i * NR);
  }
  switch (rows - m) {
    case 3: rows_kernel<3, NR>(A + m * lda, lda, w, depth, C); break;
    case 2: rows_kernel<2, NR>(A + m * lda, lda, w, depth, C); break;
    case 1: rows_kernel<1, NR>(A + m * lda, lda, w, depth, C); break;
    default: return;
  }
  for (int i = 0; m + i < rows; ++i) store(m + i, C + i * NR);
}

// One expert's share of a layer: rows of A against its units from `begin` to `end` (of its outputs), with the epilogue
// u = z·a + c, y = act(u). For swiglu the outputs are the pairs (gate unit n, up unit n + half).
template <typename W>
void layer_rows(const float* A, int64_t rows, int64_t lda, const W* weight, int64_t units, int64_t depth, int64_t begin,
                int64_t end, const float* a, const float* c, int64_t activation, float* Y, int64_t ldy) {
  auto affine = [&](float v, int64_t n) { return a ? v * a[n] + c[n] : (c ? v + c[n] : v); };
  if (activation == kSwiglu) {
    const int64_t half = units / 2;
    for (int64_t n = begin; n < end;) {
      auto step = [&](auto count) {
        constexpr int P = decltype(count)::value;
        const W* w[2 * P];
        for (int i = 0; i < P; ++i) w[i] = weight + (n + i) * depth, w[P + i] = weight + (n + i + half) * depth;
        units_kernel<2 * P>(A, rows, lda, w, depth, [&](int64_t m, const float* v) {
          for (int i = 0; i < P; ++i) Y[m * ldy + n + i] = activate_one<kSilu>(affine(v[i], n + i)) * affine(v[P + i], n + i + half);
        });
        n += P;
      };
      if (n + 3 <= end) step(std::integral_constant<int, 3>{});
      else step(std::integral_constant<int, 1>{});
    }
    return;
  }
  with_activation(activation, [&](auto kind) {
    for (int64_t n = begin; n < end;) {
      auto step = [&](auto count) {
        constexpr int P = decltype(count)::value;
        const W* w[P];
        for (int i = 0; i < P; ++i) w[i] = weight + (n + i) * depth;
        units_kernel<P>(A, rows, lda, w, depth, [&](int64_t m, const float* v) {
          for (int i = 0; i < P; ++i) Y[m * ldy + n + i] = activate_one<decltype(kind)::value>(affine(v[i], n + i));
        });
        n += P;
      };
      if (n + kUnitTile <= end) step(std::integral_constant<int, kUnitTile>{});
      else if (n + 2 <= end) step(std::integral_constant<int, 2>{});
      else step(std::integral_constant<int, 1>{});
    }
  });
}

// One piece of work: an expert's rows. `A` and `Y` are fp32 and lie expert by expert.
struct Piece { int64_t expert; const float* A; int64_t rows, lda; float* Y; int64_t ldy; };

// A layer for all pieces: their output units are dealt to the threads in equal shares of multiply-adds.
template <typename W>
void run_layer(const std::vector<Piece>& pieces, const Tensor& weight, const float* a, const float* c, int64_t activation) {
  const int64_t units = weight.size(1), depth = weight.size(2);
  const int64_t outputs = activation == kSwiglu ? units / 2 : units;
  const W* w = data<W>(weight);
  const int64_t total = outputs * static_cast<int64_t>(pieces.size());
  int64_t work = 0;
  for (const Piece& p : pieces) work += (p.rows + 3) * units * depth;
  auto run = [&](int64_t from, int64_t to) {
    while (from < to) {
      const int64_t i = from / outputs, begin = from % outputs, end = std::min(outputs, begin + to - from);
      const Piece& p = pieces[i];
      layer_rows(p.A, p.rows, p.lda, w + p.expert * units * depth, units, depth, begin, end, a ? a + p.expert * units : nullptr,
                 c ? c + p.expert * units : nullptr, activation, p.Y, p.ldy);
      from += end - begin;
    }
  };
  const int64_t threads = work < 200000 ? 1 : at::get_num_threads();
  if (threads == 1) return run(0, total);
  // Cut points where the weighted work is even; 4 cuts a thread even out what the count of rows hides.
  std::vector<int64_t> cuts{0};
  const int64_t shares = threads * 4;
  double done = 0;
  int64_t share = 1;
  for (size_t i = 0; i < pieces.size(); ++i) {
    const double cost = (pieces[i].rows + 3.0) * units * depth;
    while (share < shares && done + cost >= double(work) * share / shares) {
      const double within = (double(work) * share / shares - done) / cost;
      cuts.push_back(i * outputs + std::min<int64_t>(outputs, static_cast<int64_t>(within * outputs) / 6 * 6));
      ++share;
    }
    done += cost;
  }
  cuts.push_back(total);
  at::parallel_for(0, cuts.size() - 1, 1, [&](int64_t from, int64_t to) {
    for (int64_t i = from; i < to; ++i) run(cuts[i], cuts[i + 1]);
  });
}

// a and c of every layer at inference, where the moments are the running ones.
struct Folded { std::vector<float> a, c; bool scaled = false, shifted = false; };

Folded fold_layer(int64_t params, const OptionalTensor& bias, const OptionalTensor& scale, const OptionalTensor& shift,
                  const OptionalTensor& mean, const OptionalTensor& var, double eps) {
  Folded f;
  const Tensor b = bias.has_value() ? bias->to(at::kFloat).contiguous() : Tensor();
  const float* bp = b.defined() ? b.const_data_ptr<float>() : nullptr;
  if (scale.has_value()) {
    f.a.resize(params), f.c.resize(params);
    f.scaled = f.shifted = true;
    const float *m = maybe(mean), *v = maybe(var), *g = maybe(scale), *h = maybe(shift);
    for (int64_t i = 0; i < params; ++i) {
      f.a[i] = g[i] / std::sqrt(v[i] + static_cast<float>(eps));
      f.c[i] = h[i] + ((bp ? bp[i] : 0.0f) - m[i]) * f.a[i];
    }
  } else if (bp) {
    f.c.assign(bp, bp + params);
    f.shifted = true;
  }
  return f;
}

// Rounds fp32 values to the precision of the products, as a cast to bf16 and back would.
void round_to(const Tensor& like, float* p, int64_t n) {
  if (like.scalar_type() != at::kBFloat16) return;
  std::vector<bf16> half(n);
  narrow(p, half.data(), n);
  widen(half.data(), p, n);
}

void copy_rows(const Tensor& x, int64_t row, float* to, int64_t width) {
  with_type(x, [&](auto t) { widen(data<decltype(t)>(x) + row * width, to, width); });
}

constexpr int64_t kBlasRows = 48;  // from so many rows an expert on, packing pays: BLAS

// ---- sparse experts at inference: the whole chain ---------------------------------------------------------------------

Tensor sparse_forward(const Tensor& x_, at::TensorList weights, const c10::List<OptionalTensor>& biases,
                      const c10::List<OptionalTensor>& scales, const c10::List<OptionalTensor>& shifts,
                      const c10::List<OptionalTensor>& means, const c10::List<OptionalTensor>& vars, at::ArrayRef<double> eps,
                      at::IntArrayRef activations, const Tensor& gate_weights, const Tensor& order_, const Tensor& offsets_,
                      bool unit_norm, bool invariant) {
  const Tensor x = x_.contiguous(), order = order_.contiguous(), offsets = offsets_.contiguous();
  const Tensor gates = gate_weights.to(at::kFloat).contiguous();
  const int64_t experts = weights[0].size(0), r = gates.size(0), k = gates.size(1), slots = r * k;
  const int64_t per_row = x.size(0) ? slots / x.size(0) : 1;
  const int32_t *op = order.const_data_ptr<int32_t>(), *off = offsets.const_data_ptr<int32_t>();
  const int64_t used = off[experts];
  int64_t width = x.size(1);
  Tensor h = at::empty({used, width}, x.options().dtype(at::kFloat));
  at::parallel_for(0, used, std::max<int64_t>(1, 32768 / std::max<int64_t>(width, 1)), [&](int64_t from, int64_t to) {
    for (int64_t i = from; i < to; ++i) copy_rows(x, op[i] / per_row, h.data_ptr<float>() + i * width, width);
    round_to(weights[0], h.data_ptr<float>() + from * width, (to - from) * width);
  });
  for (size_t layer = 0; layer < weights.size(); ++layer) {
    const Tensor w = weights[layer].contiguous();
    const int64_t units = w.size(1), out = activations[layer] == kSwiglu ? units / 2 : units;
    const Folded f = fold_layer(experts * units, biases[layer], scales[layer], shifts[layer], means[layer], vars[layer], eps[layer]);
    Tensor y = at::empty({used, out}, h.options());
    std::vector<Piece> pieces;
    for (int64_t e = 0; e < experts; ++e) {
      const int64_t rows = off[e + 1] - off[e];
      if (!rows) continue;
      if (rows < kBlasRows || invariant) {
        pieces.push_back({e, h.data_ptr<float>() + off[e] * width, rows, width, y.data_ptr<float>() + off[e] * out, out});
        continue;
      }
      const auto precision = kHalfProducts ? w.scalar_type() : at::kFloat;
      const Tensor z = at::mm(h.slice(0, off[e], off[e + 1]).to(precision), w[e].to(precision).t());
      Tensor mine = y.slice(0, off[e], off[e + 1]);
      std::vector<float> ones;
      const float* a = f.scaled ? f.a.data() + e * units : (ones.assign(units, 1.0f), ones.data());
      std::vector<float> zeros;
      const float* c = f.shifted ? f.c.data() + e * units : (zeros.assign(units, 0.0f), zeros.data());
      with_type(z, [&](auto t) {
        apply(data<decltype(t)>(z), mine.data_ptr<float>(), Segments{{0, rows}}, units, 1, a, c, activations[layer]);
      });
    }
    with_type(w, [&](auto t) {
      run_layer<decltype(t)>(pieces, w, f.scaled ? f.a.data() : nullptr, f.shifted ? f.c.data() : nullptr, activations[layer]);
    });
    if (layer + 1 < weights.size()) round_to(w, y.data_ptr<float>(), y.numel());
    h = y;
    width = out;
  }
  // Where each slot's result lies; then the sum over a row's slots in their order.
  std::vector<int64_t> place(slots, -1);
  for (int64_t i = 0; i < used; ++i) place[op[i]] = i;
  Tensor y = at::empty({r, width}, x.options());
  const float *hp = h.const_data_ptr<float>(), *gp = gates.const_data_ptr<float>();
  with_type(x, [&](auto t) {
    using T = decltype(t);
    at::parallel_for(0, r, std::max<int64_t>(1, 32768 / std::max<int64_t>(k * width, 1)), [&](int64_t from, int64_t to) {
      std::vector<float> sum(width);
      for (int64_t row = from; row < to; ++row) {
        std::fill(sum.begin(), sum.end(), 0.0f);
        for (int64_t j = row * k; j < (row + 1) * k; ++j) {
          if (place[j] < 0) continue;
          const float* v = hp + place[j] * width;
          float factor = gp[j];
          if (unit_norm) {
            double square = 0;
            for (int64_t i = 0; i < width; ++i) square += double(v[i]) * v[i];
            factor /= std::max(std::sqrt(square), 1e-12);
          }
#pragma omp simd
          for (int64_t i = 0; i < width; ++i) sum[i] += factor * v[i];
        }
        narrow(sum.data(), data<T>(y) + row * width, width);
      }
    });
  });
  return y;
}

// ---- dense experts at inference, invariant ----------------------------------------------------------------------------

Tensor dense_forward(const Tensor& x_, const OptionalTensor& gate_, const Tensor& weight_, at::IntArrayRef source,
                     const OptionalTensor& bias, const OptionalTensor& scale, const OptionalTensor& shift,
                     const OptionalTensor& mean, const OptionalTensor& var, double eps, int64_t activation) {
  const Tensor x = x_.to(at::kFloat).contiguous(), w = weight_.contiguous();
  const Tensor gate = gate_.has_value() ? gate_->to(at::kFloat).contiguous() : Tensor();
  const int64_t b = x.size(0), d = x.size(-1), inputs = x.numel() / std::max<int64_t>(b * d, 1), groups = source.size();
  const int64_t experts = w.size(0), units = w.size(1), out = activation == kSwiglu ? units / 2 : units;
  const int64_t group_size = experts / groups;
  const Folded f = fold_layer(experts * units, bias, scale, shift, mean, var, eps);
  Tensor y32 = at::empty({b, experts, out}, x.options());
  if (!b) return y32.to(w.scalar_type());
  with_type(w, [&](auto t) {
    using W = decltype(t);
    // Tiles of rows, each with the gated input of one group at a time.
    const int64_t tile = 64, tiles = (b + tile - 1) / tile, threads = at::get_num_threads();
    const bool few = tiles < 2 * threads;
    std::vector<float> all(few ? tiles * tile * d : 0);
    auto gather = [&](int64_t from, int64_t to, int64_t g, float* to_p) {
      const float* xp = x.const_data_ptr<float>();
      for (int64_t r = from; r < to; ++r) {
        const float* in = xp + (r * inputs + source[g]) * d;
        float* row = to_p + (r - from) * d;
        if (gate.defined()) {
          const float* gr = gate.const_data_ptr<float>() + (r * groups + g) * d;
#pragma omp simd
          for (int64_t i = 0; i < d; ++i) row[i] = in[i] * gr[i];
        } else {
          std::memcpy(row, in, d * sizeof(float));
        }
      }
      round_to(w, to_p, (to - from) * d);
    };
    const float *a = f.scaled ? f.a.data() : nullptr, *c = f.shifted ? f.c.data() : nullptr;
    float* yp = y32.data_ptr<float>();
    if (few) {  // threads share the units
      for (int64_t g = 0; g < groups; ++g) {
        gather(0, b, g, all.data());
        std::vector<Piece> pieces;
        for (int64_t e = g * group_size; e < (g + 1) * group_size; ++e)
          pieces.push_back({e, all.data(), b, d, yp + e * out, experts * out});
        run_layer<W>(pieces, w, a, c, activation);
      }
      return;
    }
    at::parallel_for(0, tiles, 1, [&](int64_t from, int64_t to) {  // threads share the rows
      std::vector<float> part(tile * d);
      for (int64_t i = from; i < to; ++i) {
        const int64_t begin = i * tile, end = std::min(b, begin + tile);
        for (int64_t e = 0; e < experts; ++e) {
          if (e % group_size == 0) gather(begin, end, e / group_size, part.data());
          layer_rows(part.data(), end - begin, d, data<W>(w) + e * units * d, units, d, 0, out, a ? a + e * units : nullptr,
                     c ? c + e * units : nullptr, activation, yp + (begin * experts + e) * out, experts * out);
        }
      }
    });
  });
  return y32.to(w.scalar_type());
}

// ---- dense experts: the linear part, for training ---------------------------------------------------------------------

Tensor group_input(const Tensor& x_bsd, const OptionalTensor& gate_bgd, int64_t source, int64_t group, at::ScalarType dtype) {
  Tensor x = x_bsd.select(1, source);
  if (gate_bgd.has_value()) x = x * gate_bgd->select(1, group);
  return x.to(dtype);
}

// Groups that read one input with no gate between are one product.
bool one_product(const OptionalTensor& gate, at::IntArrayRef source) {
  return !gate.has_value() && std::all_of(source.begin(), source.end(), [&](int64_t s) { return s == source[0]; });
}

Tensor expert_linear(const Tensor& x_bsd, const OptionalTensor& gate_bgd, const Tensor& weight_ehd, at::IntArrayRef source) {
  const int64_t e = weight_ehd.size(0), h = weight_ehd.size(1), d = weight_ehd.size(2), b = x_bsd.size(0);
  const Tensor w = weight_ehd.reshape({e * h, d});
  if (one_product(gate_bgd, source))
    return product(group_input(x_bsd, gate_bgd, source[0], 0, w.scalar_type()), w.t()).view({b, e, h});
  const int64_t g = source.size(), width = e / g * h;
  Tensor z = at::empty({b, e * h}, w.options());
  for (int64_t i = 0; i < g; ++i) {
    Tensor out = z.narrow(1, i * width, width);
    product_into(out, group_input(x_bsd, gate_bgd, source[i], i, w.scalar_type()), w.narrow(0, i * width, width).t());
  }
  return z.view({b, e, h});
}

std::tuple<Tensor, Tensor, Tensor> expert_linear_backward(const Tensor& grad_z, const Tensor& x_bsd, const OptionalTensor& gate_bgd,
                                                          const Tensor& weight_ehd, at::IntArrayRef source, bool need_x) {
  const int64_t e = weight_ehd.size(0), h = weight_ehd.size(1), d = weight_ehd.size(2), b = x_bsd.size(0);
  const Tensor w = weight_ehd.reshape({e * h, d}), gz = grad_z.reshape({b, e * h});
  Tensor grad_x = at::empty({0}, x_bsd.options()), grad_gate = at::empty({0}, x_bsd.options());
  if (one_product(gate_bgd, source)) {
    const Tensor grad_w = product(gz.t(), group_input(x_bsd, gate_bgd, source[0], 0, w.scalar_type())).view({e, h, d});
    if (need_x) {
      grad_x = product(gz, w).to(x_bsd.scalar_type()).unsqueeze(1);
      if (x_bsd.size(1) > 1) {
        Tensor all = at::zeros_like(x_bsd);
        all.select(1, source[0]).copy_(grad_x.squeeze(1));
        grad_x = all;
      }
    }
    return {grad_x, grad_gate, grad_w};
  }
  const int64_t g = source.size(), width = e / g * h;
  Tensor grad_w = at::empty({e * h, d}, w.options());
  if (need_x) grad_x = at::zeros(x_bsd.sizes(), x_bsd.options());
  if (gate_bgd.has_value()) grad_gate = at::empty(gate_bgd->sizes(), gate_bgd->options());
  for (int64_t i = 0; i < g; ++i) {
    const Tensor mine = gz.narrow(1, i * width, width);
    Tensor out = grad_w.narrow(0, i * width, width);
    product_into(out, mine.t(), group_input(x_bsd, gate_bgd, source[i], i, w.scalar_type()));
    if (!need_x && !gate_bgd.has_value()) continue;
    const Tensor grad_in = product(mine, w.narrow(0, i * width, width)).to(x_bsd.scalar_type());
    if (gate_bgd.has_value()) {
      Tensor target = grad_gate.select(1, i);
      at::mul_out(target, grad_in, x_bsd.select(1, source[i]));
      if (need_x) grad_x.select(1, source[i]).addcmul_(grad_in, gate_bgd->select(1, i));
    } else {
      grad_x.select(1, source[i]).add_(grad_in);
    }
  }
  return {grad_x, grad_gate, grad_w.view({e, h, d})};
}

// ---- grouped products for training: slots sorted by expert --------------------------------------------------------------

Tensor grouped_linear(const Tensor& h, const Tensor& weight, const Tensor& offsets) {
  const int32_t* off = offsets.const_data_ptr<int32_t>();
  Tensor z = at::empty({h.size(0), weight.size(1)}, weight.options());
  for (int64_t e = 0; e < weight.size(0); ++e) {
    if (off[e] == off[e + 1]) continue;
    Tensor out = z.slice(0, off[e], off[e + 1]);
    product_into(out, h.slice(0, off[e], off[e + 1]), weight[e].t());
  }
  z.slice(0, off[weight.size(0)]).zero_();
  return z;
}

std::tuple<Tensor, Tensor> grouped_linear_backward(const Tensor& grad_z, const Tensor& h, const Tensor& weight,
                                                   const Tensor& offsets) {
  const int32_t* off = offsets.const_data_ptr<int32_t>();
  Tensor grad_h = at::empty_like(h), grad_w = at::empty_like(weight);
  for (int64_t e = 0; e < weight.size(0); ++e) {
    Tensor gw = grad_w[e];
    if (off[e] == off[e + 1]) {
      gw.zero_();
      continue;
    }
    const Tensor gz = grad_z.slice(0, off[e], off[e + 1]);
    Tensor gh = grad_h.slice(0, off[e], off[e + 1]);
    product_into(gh, gz, weight[e]);
    product_into(gw, gz.t(), h.slice(0, off[e], off[e + 1]));
  }
  grad_h.slice(0, off[weight.size(0)]).zero_();
  return {grad_h, grad_w};
}

// ---- gather and combine -------------------------------------------------------------------------------------------------

// Where each slot lies in the order.
std::vector<int64_t> places(const Tensor& order) {
  std::vector<int64_t> place(order.numel());
  const int32_t* p = order.const_data_ptr<int32_t>();
  for (int64_t i = 0; i < order.numel(); ++i) place[p[i]] = i;
  return place;
}

// Slots that have an expert: the first of the order.
int64_t used_slots(const Tensor& offsets) { return offsets.const_data_ptr<int32_t>()[offsets.numel() - 1]; }

int64_t grain(int64_t width) { return std::max<int64_t>(1, 32768 / std::max<int64_t>(width, 1)); }

// h[i] = x[row of slot order[i]], for the slots that have an expert; zeros behind them.
Tensor gather_rows(const Tensor& x_, const Tensor& order, const Tensor& offsets) {
  const int64_t used = used_slots(offsets);
  const Tensor x = x_.contiguous();
  const int64_t slots = order.numel(), width = x.size(1), size = width * x.element_size();
  const int64_t per_row = x.size(0) ? slots / x.size(0) : 1;
  Tensor h = at::empty({slots, width}, x.options());
  const int32_t* op = order.const_data_ptr<int32_t>();
  at::parallel_for(0, used, grain(width), [&](int64_t from, int64_t to) {
    for (int64_t i = from; i < to; ++i) std::memcpy(data<char>(h) + i * size, data<char>(x) + op[i] / per_row * size, size);
  });
  h.slice(0, used).zero_();
  return h;
}

Tensor gather_backward(const Tensor& grad_, const Tensor& order, const Tensor& offsets, int64_t rows) {
  const int64_t used = used_slots(offsets);
  const Tensor grad = grad_.contiguous();
  const int64_t slots = order.numel(), width = grad.size(1), per_row = rows ? slots / rows : 1;
  const std::vector<int64_t> place = places(order);
  Tensor grad_x = at::empty({rows, width}, grad.options());
  with_type(grad, [&](auto t) {
    using T = decltype(t);
    at::parallel_for(0, rows, grain(width * per_row), [&](int64_t from, int64_t to) {
      std::vector<float> sum(width);
      for (int64_t r = from; r < to; ++r) {
        std::fill(sum.begin(), sum.end(), 0.0f);
        for (int64_t j = r * per_row; j < (r + 1) * per_row; ++j) {
          if (place[j] >= used) continue;
          const T* g = data<T>(grad) + place[j] * width;
#pragma omp simd
          for (int64_t i = 0; i < width; ++i) sum[i] += wide(g[i]);
        }
        narrow(sum.data(), data<T>(grad_x) + r * width, width);
      }
    });
  });
  return grad_x;
}

// y[r] = Σ_k weights[r, k]·h[place of slot (r, k)], in the order of k.
Tensor combine(const Tensor& h_, const Tensor& weights_, const Tensor& order, const Tensor& offsets) {
  const int64_t used = used_slots(offsets);
  const Tensor h = h_.contiguous(), weights = weights_.to(at::kFloat).contiguous();
  const int64_t r = weights.size(0), k = weights.size(1), width = h.size(1);
  const std::vector<int64_t> place = places(order);
  Tensor y = at::empty({r, width}, weights.options());
  const float* wp = weights.const_data_ptr<float>();
  with_type(h, [&](auto t) {
    using T = decltype(t);
    at::parallel_for(0, r, grain(k * width), [&](int64_t from, int64_t to) {
      for (int64_t row = from; row < to; ++row) {
        float* out = y.data_ptr<float>() + row * width;
        std::fill(out, out + width, 0.0f);
        for (int64_t j = row * k; j < (row + 1) * k; ++j) {
          if (place[j] >= used) continue;
          const T* v = data<T>(h) + place[j] * width;
          const float w = wp[j];
#pragma omp simd
          for (int64_t i = 0; i < width; ++i) out[i] += w * wide(v[i]);
        }
      }
    });
  });
  return y;
}

std::tuple<Tensor, Tensor> combine_backward(const Tensor& grad_, const Tensor& h_, const Tensor& weights_, const Tensor& order,
                                            const Tensor& offsets) {
  const int64_t used = used_slots(offsets);
  const Tensor grad = grad_.contiguous(), h = h_.contiguous(), weights = weights_.to(at::kFloat).contiguous();
  const int64_t r = weights.size(0), k = weights.size(1), width = h.size(1);
  const std::vector<int64_t> place = places(order);
  Tensor grad_h = at::empty_like(h), grad_w = at::zeros_like(weights);
  with_type(h, [&](auto t) {
    using T = decltype(t);
    at::parallel_for(0, r, grain(k * width), [&](int64_t from, int64_t to) {
      std::vector<float> part(width);
      for (int64_t row = from; row < to; ++row) {
        const float* g = grad.const_data_ptr<float>() + row * width;
        for (int64_t j = row * k; j < (row + 1) * k; ++j) {
          if (place[j] >= used) continue;
          const T* v = data<T>(h) + place[j] * width;
          const float w = weights.const_data_ptr<float>()[j];
          float dot = 0, *p = part.data();
#pragma omp simd reduction(+ : dot)
          for (int64_t i = 0; i < width; ++i) {
            dot += g[i] * wide(v[i]);
            p[i] = w * g[i];
          }
          grad_w.data_ptr<float>()[j] = dot;
          narrow(p, data<T>(grad_h) + place[j] * width, width);
        }
      }
    });
  });
  grad_h.slice(0, used).zero_();
  return {grad_h, grad_w};
}

// ---- gates ----------------------------------------------------------------------------------------------------------------

// Softmax over the allowed experts of one gate; the others get 0. `scratch` holds E rounded up to whole vectors: the
// exponentials of a few experts then cost one vector's, not one each.
inline void softmax_row(const float* logits, const bool* mask, float* w, int64_t e, float* scratch) {
  const int64_t padded = (e + kLanes - 1) / kLanes * kLanes;
  float top = -INFINITY, sum = 0;
  for (int64_t i = 0; i < e; ++i) {
    scratch[i] = !mask || mask[i] ? logits[i] : -INFINITY;
    top = std::max(top, scratch[i]);
  }
  for (int64_t i = e; i < padded; ++i) scratch[i] = -INFINITY;
#pragma omp simd reduction(+ : sum)
  for (int64_t i = 0; i < padded; ++i) {
    scratch[i] = expf(scratch[i] - top);
    sum += scratch[i];
  }
  const float inverse = 1.0f / sum;
  for (int64_t i = 0; i < e; ++i) w[i] = scratch[i] * inverse;
}

int64_t padded(int64_t e) { return (e + kLanes - 1) / kLanes * kLanes; }

// The mixtures and the weights (which the backward needs).
std::tuple<Tensor, Tensor> gate_mix(const Tensor& logits_, const Tensor& experts_, const OptionalTensor& mask_) {
  const Tensor logits = logits_.to(at::kFloat).contiguous(), experts = experts_.contiguous();
  const Tensor mask = mask_.has_value() ? mask_->contiguous() : Tensor();
  const int64_t b = logits.size(0), t = logits.size(1), e = logits.size(2), h = experts.size(2);
  Tensor z = at::empty({b, t, h}, logits.options()), weights = at::empty(logits.sizes(), logits.options());
  const bool* mp = mask.defined() ? mask.const_data_ptr<bool>() : nullptr;
  const float* lp = logits.const_data_ptr<float>();
  float *zp = z.data_ptr<float>(), *wp = weights.data_ptr<float>();
  with_type(experts, [&](auto type) {
    using Y = decltype(type);
    const Y* yp = data<Y>(experts);
    at::parallel_for(0, b, grain(t * e * h), [&](int64_t from, int64_t to) {
      std::vector<float> scratch(padded(e));
      for (int64_t i = from * t; i < to * t; ++i) {
        float *w = wp + i * e, *out = zp + i * h;
        const Y* y = yp + i / t * e * h;
        softmax_row(lp + i * e, mp ? mp + i % t * e : nullptr, w, e, scratch.data());
        int64_t j = 0;
        for (; j + kLanes <= h; j += kLanes) {
          Vec sum = {};
          for (int64_t k = 0; k < e; ++k) sum += w[k] * load(y + k * h + j);
          store(sum, out + j);
        }
        for (; j < h; ++j) {
          out[j] = 0;
          for (int64_t k = 0; k < e; ++k) out[j] += w[k] * wide(y[k * h + j]);
        }
      }
    });
  });
  return {z, weights};
}

std::tuple<Tensor, Tensor> gate_mix_backward(const Tensor& grad_, const Tensor& weights_, const Tensor& experts_) {
  const Tensor grad = grad_.contiguous(), weights = weights_.contiguous(), experts = experts_.contiguous();
  const int64_t b = weights.size(0), t = weights.size(1), e = weights.size(2), h = experts.size(2);
  Tensor grad_logits = at::empty(weights.sizes(), weights.options()), grad_experts = at::empty(experts.sizes(), experts.options());
  const float *gp = grad.const_data_ptr<float>(), *wp = weights.const_data_ptr<float>();
  float* lp = grad_logits.data_ptr<float>();
  with_type(experts, [&](auto type) {
    using Y = decltype(type);
    const Y* yp = data<Y>(experts);
    Y* gy = data<Y>(grad_experts);
    at::parallel_for(0, b, grain(t * e * h), [&](int64_t from, int64_t to) {
      std::vector<float> sum(h);
      for (int64_t row = from; row < to; ++row) {
        const float *gz = gp + row * t * h, *w = wp + row * t * e;
        float *dl = lp + row * t * e, *s = sum.data();
        for (int64_t k = 0; k < e; ++k) {
          const Y* yk = yp + (row * e + k) * h;
          for (int64_t g = 0; g < t; ++g) {  // ∂logit before the softmax: ⟨grad z, y⟩
            const float* gr = gz + g * h;
            Vec dots = {};
            float dot = 0;
            int64_t j = 0;
            for (; j + kLanes <= h; j += kLanes) dots += load(gr + j) * load(yk + j);
            for (; j < h; ++j) dot += gr[j] * wide(yk[j]);
            dl[g * e + k] = dot + add_lanes(dots);
          }
          int64_t j = 0;
          for (; j + kLanes <= h; j += kLanes) {
            Vec total = {};
            for (int64_t g = 0; g < t; ++g) total += w[g * e + k] * load(gz + g * h + j);
            store(total, s + j);
          }
          for (; j < h; ++j) {
            s[j] = 0;
            for (int64_t g = 0; g < t; ++g) s[j] += w[g * e + k] * gz[g * h + j];
          }
          narrow(s, gy + (row * e + k) * h, h);
        }
        for (int64_t g = 0; g < t; ++g) {
          float mean = 0;
          for (int64_t k = 0; k < e; ++k) mean += w[g * e + k] * dl[g * e + k];
          for (int64_t k = 0; k < e; ++k) dl[g * e + k] = w[g * e + k] * (dl[g * e + k] - mean);
        }
      }
    });
  });
  return {grad_logits, grad_experts};
}

// ---- routing ------------------------------------------------------------------------------------------------------------

enum Scoring : int64_t { kSoftmax = 0, kSigmoid = 1, kSoftmaxAfter = 2 };

// Expert ids and weights of the k best, and the scores of all experts (what the backward needs).
std::tuple<Tensor, Tensor, Tensor> route_topk(const Tensor& logits_, int64_t k, int64_t scoring, bool renormalize,
                                              const OptionalTensor& bias_, const OptionalTensor& allowed_) {
  const Tensor logits = logits_.to(at::kFloat).contiguous();
  const Tensor bias = bias_.has_value() ? bias_->to(at::kFloat).contiguous() : Tensor();
  const Tensor allowed = allowed_.has_value() ? allowed_->contiguous() : Tensor();
  const int64_t b = logits.size(0), e = logits.size(1);
  Tensor ids = at::empty({b, k}, logits.options().dtype(at::kInt)), weights = at::empty({b, k}, logits.options());
  Tensor scores = at::empty({b, e}, logits.options());
  const float *lp = logits.const_data_ptr<float>(), *bp = bias.defined() ? bias.const_data_ptr<float>() : nullptr;
  const bool* ap = allowed.defined() ? allowed.const_data_ptr<bool>() : nullptr;
  int32_t* ip = ids.data_ptr<int32_t>();
  float *wp = weights.data_ptr<float>(), *sp = scores.data_ptr<float>();
  at::parallel_for(0, b, std::max<int64_t>(1, 8192 / (e * (k + 1))), [&](int64_t from, int64_t to) {
    std::vector<float> choice(e), scratch(padded(std::max(e, k)));
    for (int64_t row = from; row < to; ++row) {
      const float* l = lp + row * e;
      float *s = sp + row * e, *w = wp + row * k;
      if (scoring == kSoftmax) {
        softmax_row(l, nullptr, s, e, scratch.data());
      } else if (scoring == kSigmoid) {
        // In whole vectors, so that equal logits get equal bits wherever they lie.
        const int64_t whole = padded(e);
        float* p = scratch.data();
        std::fill(std::copy(l, l + e, p), p + whole, 0.0f);
#pragma omp simd
        for (int64_t i = 0; i < whole; ++i) p[i] = sigmoid(p[i]);
        std::copy(p, p + e, s);
      } else {
        std::memcpy(s, l, e * sizeof(float));
      }
      for (int64_t i = 0; i < e; ++i) choice[i] = ap && !ap[row * e + i] ? -INFINITY : (bp ? s[i] + bp[i] : s[i]);
      std::vector<char> taken(e);
      for (int64_t j = 0; j < k; ++j) {
        int64_t best = -1;
        for (int64_t i = 0; i < e; ++i)  // strictly greater: the lowest index among equals
          if (!taken[i] && (best < 0 || choice[i] > choice[best])) best = i;
        taken[best] = 1;
        ip[row * k + j] = static_cast<int32_t>(best);
        w[j] = s[best];
      }
      if (scoring == kSoftmaxAfter) {
        std::vector<float> chosen(w, w + k);
        softmax_row(chosen.data(), nullptr, w, k, scratch.data());
      } else if (renormalize) {
        float sum = 0;
        for (int64_t j = 0; j < k; ++j) sum += w[j];
        for (int64_t j = 0; j < k; ++j) w[j] /= sum + 1e-20f;
      }
    }
  });
  return {ids, weights, scores};
}

std::tuple<Tensor, Tensor> sort_by_expert(const Tensor& ids_, int64_t experts) {
  const Tensor ids = ids_.to(at::kInt).contiguous();
  const int64_t n = ids.numel();
  const int32_t* p = ids.const_data_ptr<int32_t>();
  Tensor order = at::empty({n}, ids.options()), offsets = at::zeros({experts + 1}, ids.options());
  int32_t *op = order.data_ptr<int32_t>(), *off = offsets.data_ptr<int32_t>();
  for (int64_t i = 0; i < n; ++i) {
    TORCH_CHECK_VALUE(p[i] < experts, "expert id ", p[i], " in slot ", i, ", but there are ", experts, " experts");
    if (p[i] >= 0) ++off[p[i] + 1];
  }
  std::partial_sum(off, off + experts + 1, off);
  std::vector<int32_t> next(off, off + experts + 1);
  for (int64_t i = 0; i < n; ++i) op[next[p[i] < 0 ? experts : p[i]]++] = static_cast<int32_t>(i);
  return {order, offsets};
}

}  // namespace

TORCH_LIBRARY(recsys_moe, m) {
  m.def("norm_act(Tensor z, int blocks, Tensor? offsets, Tensor? bias, Tensor? scale, Tensor? shift, Tensor? running_mean, "
        "Tensor? running_var, bool training, float eps, int activation) -> (Tensor, Tensor, Tensor)");
  m.def("norm_act_backward(Tensor grad_y, Tensor z, int blocks, Tensor? offsets, Tensor? bias, Tensor? scale, Tensor? shift, "
        "Tensor mean, Tensor var, bool training, float eps, int activation) -> (Tensor, Tensor, Tensor, Tensor)");
  m.def("expert_linear(Tensor x_bsd, Tensor? gate_bgd, Tensor weight_ehd, int[] source) -> Tensor");
  m.def("expert_linear_backward(Tensor grad_z, Tensor x_bsd, Tensor? gate_bgd, Tensor weight_ehd, int[] source, bool need_x) "
        "-> (Tensor, Tensor, Tensor)");
  m.def("dense_forward(Tensor x, Tensor? gate, Tensor weight, int[] source, Tensor? bias, Tensor? scale, Tensor? shift, "
        "Tensor? mean, Tensor? var, float eps, int activation) -> Tensor");
  m.def("sparse_forward(Tensor x, Tensor[] weights, Tensor?[] biases, Tensor?[] scales, Tensor?[] shifts, Tensor?[] means, "
        "Tensor?[] vars, float[] eps, int[] activations, Tensor gate_weights, Tensor order, Tensor offsets, "
        "bool unit_norm, bool invariant) -> Tensor");
  m.def("grouped_linear(Tensor h, Tensor weight, Tensor offsets) -> Tensor");
  m.def("grouped_linear_backward(Tensor grad_z, Tensor h, Tensor weight, Tensor offsets) -> (Tensor, Tensor)");
  m.def("gather_rows(Tensor x, Tensor order, Tensor offsets) -> Tensor");
  m.def("gather_backward(Tensor grad, Tensor order, Tensor offsets, int rows) -> Tensor");
  m.def("combine(Tensor h, Tensor weights, Tensor order, Tensor offsets) -> Tensor");
  m.def("combine_backward(Tensor grad, Tensor h, Tensor weights, Tensor order, Tensor offsets) -> (Tensor, Tensor)");
  m.def("gate_mix(Tensor logits, Tensor experts, Tensor? mask) -> (Tensor, Tensor)");
  m.def("gate_mix_backward(Tensor grad, Tensor weights, Tensor experts) -> (Tensor, Tensor)");
  m.def("route_topk(Tensor logits, int k, int scoring, bool renormalize, Tensor? bias, Tensor? allowed) -> "
        "(Tensor, Tensor, Tensor)");
  m.def("sort_by_expert(Tensor ids, int experts) -> (Tensor, Tensor)");
}

TORCH_LIBRARY_IMPL(recsys_moe, CPU, m) {
  m.impl("norm_act", norm_act);
  m.impl("norm_act_backward", norm_act_backward);
  m.impl("expert_linear", expert_linear);
  m.impl("expert_linear_backward", expert_linear_backward);
  m.impl("dense_forward", dense_forward);
  m.impl("sparse_forward", sparse_forward);
  m.impl("grouped_linear", grouped_linear);
  m.impl("grouped_linear_backward", grouped_linear_backward);
  m.impl("gather_rows", gather_rows);
  m.impl("gather_backward", gather_backward);
  m.impl("combine", combine);
  m.impl("combine_backward", combine_backward);
  m.impl("gate_mix", gate_mix);
  m.impl("gate_mix_backward", gate_mix_backward);
  m.impl("route_topk", route_topk);
  m.impl("sort_by_expert", sort_by_expert);
}
