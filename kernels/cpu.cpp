// The expert operations on the CPU.
//
// Written with the compiler's vector types and `omp simd`, so that one source serves every width; it is built on the machine
// it runs on, for that machine. Half precision is bf16; all arithmetic is fp32.
//
// Shapes: B rows, S inputs a row, G groups of experts, E experts, D inputs and H outputs of a layer, T tasks a row,
// R = B·T routed rows, K experts a routed row, N = R·K slots.

#include <torch/library.h>

#include <set>

#include "cpu_attention.h"
#include "cpu_decoder.h"
#include "cpu_embeddings.h"
#include "cpu_gated.h"
#include "cpu_gated_tiles.h"
#include "cpu_gemm.h"
#include "cpu_int8.h"
#include "cpu_lanes.h"
#include "cpu_vector.h"

namespace {

int64_t grain(int64_t width) { return std::max<int64_t>(1, 32768 / std::max<int64_t>(width, 1)); }

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

// Mean and biased variance of each column of each segment. Chunk by chunk, in one pass around the chunk's first row, merged in
// the order of the chunks (Chan et al. 1979), so the result does not depend on the number of threads.
template <typename Z>
void moments(const Z* z, const Segments& segments, int64_t columns, float* mean, float* var) {
  const auto owner = segments.chunk_segments(kChunk);
  std::vector<float> part(owner.size() * columns * 2);
  std::vector<int64_t> sizes(owner.size());
  segments.for_chunks(kChunk, columns, [&](int64_t i, int64_t, int64_t begin, int64_t end) {
    float *m = part.data() + i * columns * 2, *m2 = m + columns;
    const Z* first = z + begin * columns;
    for (int64_t r = begin + 1; r < end; ++r) {
      const Z* row = z + r * columns;
      by_vecs(columns, [&](int64_t c, int64_t count) {
        const Vec d = load_first(row + c, count) - load_first(first + c, count);
        store_first(load_first(m + c, count) + d, m + c, count);
        store_first(load_first(m2 + c, count) + d * d, m2 + c, count);
      });
    }
    const float inverse = 1.0f / (end - begin);
    by_vecs(columns, [&](int64_t c, int64_t count) {
      const Vec sum = load_first(m + c, count), shift = sum * inverse;
      store_first(load_first(m2 + c, count) - sum * shift, m2 + c, count);
      store_first(load_first(first + c, count) + shift, m + c, count);
    });
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

// Of one row: calls use(i, count, du, z) with the gradient of u = z·a + c and z itself, vector by vector.
template <typename Z, typename F>
inline void grad_row(const Z* z, const Z* grad_y, int64_t columns, int64_t blocks, const float* a, const float* c,
                     int64_t activation, F&& use) {
  auto affine = [&](Vec v, int64_t i, int64_t count) { return v * load_first(a + i, count) + load_first(c + i, count); };
  if (activation == kSwiglu) {
    const int64_t half = columns / blocks / 2;
    for (int64_t block = 0; block < blocks; ++block) {
      by_vecs(half, [&](int64_t i, auto count) {
        const int64_t gate = block * 2 * half + i, up = gate + half;
        const Vec zg = load_first(z + gate, count), zu = load_first(z + up, count), g = load_first(grad_y + block * half + i, count);
        const Vec ug = affine(zg, gate, count), uu = affine(zu, up, count);
        use(gate, count, g * uu * slope<kSilu, Z>(ug), zg);
        use(up, count, g * activate<kSilu, Z>(ug), zu);
      });
    }
    return;
  }
  with_activation(activation, [&](auto A) {
    by_vecs(columns, [&](int64_t i, auto count) {
      const Vec zi = load_first(z + i, count);
      use(i, count, load_first(grad_y + i, count) * slope<decltype(A)::value, Z>(affine(zi, i, count)), zi);
    });
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
      const int64_t out_columns = activation == kSwiglu ? columns / 2 : columns;
      segments.for_chunks(16, columns, [&](int64_t, int64_t s, int64_t begin, int64_t end) {
        for (int64_t r = begin; r < end; ++r)
          activate_row(data<T>(z) + r * columns, data<T>(y) + r * out_columns, columns, blocks, a.data() + s * columns,
                       c.data() + s * columns, activation);
      });
    });
    if (segments.rows() < rows) y.slice(0, segments.rows()).zero_();
  }
  return {y, mean, var};
}

// The gradient of z where it is left to whoever needs it: a·du + p·(z − mean) + q, du that of u = z·a + c.
struct GradOfZ { std::vector<float> a, c, mean, p, q; };

// Backward of norm_act: gradients of z, bias, scale and shift. Sums are taken chunk by chunk and added in order. With `later`, for the
// rows of one segment, z's own gradient is left.
std::tuple<Tensor, Tensor, Tensor, Tensor> norm_act_gradients(const Tensor& grad_y_, const Tensor& z_, int64_t blocks,
                                                              const OptionalTensor& offsets, const OptionalTensor& bias,
                                                              const OptionalTensor& scale, const OptionalTensor& shift,
                                                              const Tensor& mean, const Tensor& var, bool training,
                                                              double eps, int64_t activation, GradOfZ* later) {
  const Tensor z = z_.contiguous(), grad_y = grad_y_.to(z.scalar_type()).contiguous();
  const int64_t rows = z.size(0), columns = offsets.has_value() ? z.size(1) : z.size(1) * z.size(2);
  const Segments segments = segments_of(offsets, rows);
  const int64_t params = segments.count() * columns;
  auto fp32 = z.options().dtype(at::kFloat);
  Tensor grad_z = later ? at::empty({0}, z.options()) : at::empty_like(z);
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
      const float *as = a.data() + s * columns, *cs = c.data() + s * columns;
      const float *ms = norm ? m + s * columns : nullptr, *rs = s1 + s * columns;
      float *sum = sums.data() + i * columns * 2, *sum_x = sum + columns;
      for (int64_t r = begin; r < end; ++r) {
        grad_row(zp + r * columns, gp + r * out_columns, columns, blocks, as, cs, activation,
                 [&](int64_t k, int64_t count, Vec du, Vec zk) {
                   store_first(load_first(sum + k, count) + du, sum + k, count);
                   if (norm) {
                     const Vec x = (zk - load_first(ms + k, count)) * load_first(rs + k, count);
                     store_first(load_first(sum_x + k, count) + du * x, sum_x + k, count);
                   }
                   if (direct && !later) store_first(du * load_first(as + k, count), out + r * columns + k, count);
                 });
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
    // Second pass: dz = a·(du − mean(du) − x̂·mean(du·x̂)); a segment that kept to its running moments: a·du.
    auto pull = [&](int64_t s, std::vector<float>& p, std::vector<float>& q) {
      const int64_t n = segments.size(s);
      const float share = n < 2 ? 0.0f : 1.0f / n;
      for (int64_t k = 0, i = s * columns; k < columns; ++k, ++i) {
        p[k] = -a[i] * total_x[i] * share * s1[i];
        q[k] = -a[i] * total[i] * share;
      }
    };
    if (later) {
      *later = {a, c, std::vector<float>(columns), std::vector<float>(columns), std::vector<float>(columns)};
      if (direct) return;
      later->mean.assign(m, m + columns);
      return pull(0, later->p, later->q);
    }
    if (direct) return;
    segments.for_chunks(kChunk, columns, [&](int64_t, int64_t s, int64_t begin, int64_t end) {
      std::vector<float> p(columns), q(columns);
      const float *as = a.data() + s * columns, *cs = c.data() + s * columns, *ms = m + s * columns;
      pull(s, p, q);
      for (int64_t r = begin; r < end; ++r) {
        grad_row(zp + r * columns, gp + r * out_columns, columns, blocks, as, cs, activation,
                 [&](int64_t k, int64_t count, Vec du, Vec zk) {
                   const Vec centred = zk - load_first(ms + k, count);
                   const Vec taken = centred * load_first(p.data() + k, count) + load_first(q.data() + k, count);
                   store_first(du * load_first(as + k, count) + taken, out + r * columns + k, count);
                 });
      }
    });
  });
  if (rows && segments.rows() < rows && !later) grad_z.slice(0, segments.rows()).zero_();
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

std::tuple<Tensor, Tensor, Tensor, Tensor> norm_act_backward(const Tensor& grad_y, const Tensor& z, int64_t blocks,
                                                             const OptionalTensor& offsets, const OptionalTensor& bias,
                                                             const OptionalTensor& scale, const OptionalTensor& shift,
                                                             const Tensor& mean, const Tensor& var, bool training,
                                                             double eps, int64_t activation) {
  return norm_act_gradients(grad_y, z, blocks, offsets, bias, scale, shift, mean, var, training, eps, activation, nullptr);
}

// a and c of every layer at inference, where the moments are the running ones.
struct Folded {
  std::vector<float> a, c;
  bool scaled = false, shifted = false;
  const float* scale_of(int64_t unit) const { return scaled ? a.data() + unit : nullptr; }
  const float* shift_of(int64_t unit) const { return shifted ? c.data() + unit : nullptr; }
};

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

// ---- a layer at inference ------------------------------------------------------------------------------------------------
//
// One piece of work: an expert's rows, `stride` apart, and where its outputs go.

template <typename T, typename Y>
struct Piece { int64_t expert; const T* A; int64_t rows, stride; Y* y; int64_t ldy; };

// How a layer's sums are taken depends on the layer alone, never on the batch: long ones lane by lane (weights are read once
// and as they lie), short ones, where adding up the lanes would cost too much, in order of k (weights are packed on the way).
// Dense experts meet hundreds of rows, which packing suits; a sparse expert often meets few. Few units (gates') would leave most of a
// panel empty, and a thread without one. AMX tiles have an order of their own.
constexpr int64_t kDenseLanes = 1024, kSparseLanes = 512, kFewUnits = 48;

// A layer's outputs dealt to the threads in equal shares of cost(piece), cut at multiples of `step`: run(piece, begin, end, after) where
// the thread goes on to piece `after` (−1: to none).
template <typename T, typename Y, typename C, typename F>
void deal_outputs(const std::vector<Piece<T, Y>>& pieces, int64_t outputs, int64_t each, int64_t step, C&& cost, F&& run_piece) {
  const int64_t total = outputs * static_cast<int64_t>(pieces.size());
  int64_t work = 0;
  double all = 0;
  for (const auto& p : pieces) work += (p.rows + 3) * each, all += cost(p);
  auto run = [&](int64_t from, int64_t to) {
    while (from < to) {
      const int64_t i = from / outputs, begin = from % outputs, end = std::min(outputs, begin + to - from);
      from += end - begin;
      run_piece(i, begin, end, from < to ? i + 1 : -1);
    }
  };
  const int64_t threads = work < 200000 ? 1 : at::get_num_threads();
  std::vector<int64_t> cuts{0};
  double done = 0;
  for (size_t i = 0; i < pieces.size(); ++i) {
    const double here = cost(pieces[i]);
    while (static_cast<int64_t>(cuts.size()) < threads && done + here >= all * cuts.size() / threads) {
      const double within = (all * cuts.size() / threads - done) / here;
      cuts.push_back(i * outputs + std::min<int64_t>(outputs, static_cast<int64_t>(within * outputs) / step * step));
    }
    done += here;
  }
  cuts.push_back(total);
  at::parallel_for(0, cuts.size() - 1, 1, [&](int64_t from, int64_t to) { run(cuts[from], cuts[to]); });
}

// A layer lane by lane. `scale`: of int8 weights.
template <typename T, typename Y>
void lanes_layer_all(const std::vector<Piece<T, Y>>& pieces, const Tensor& weight, const Folded& f, int64_t activation,
                     const float* scale) {
  const int64_t units = weight.size(1), depth = weight.size(2);
  const bool pairs = activation == kSwiglu;
  auto cost = [](const auto& p) { return p.rows + 3; };
  deal_outputs(pieces, pairs ? units / 2 : units, units * depth, kLaneUnits, cost, [&](int64_t i, int64_t begin, int64_t end, int64_t) {
    const auto& p = pieces[i];
    for_weights<T>(weight, scale, f, pairs, p.expert, begin, end, [&](const Weights<T>& w) {
      lanes_layer(p.A, p.stride, p.rows, w.rows, w.units, depth, w.begin, w.end, w.a, w.c, activation, p.y + w.at, p.ldy);
    });
  });
}

#if RECSYS_MOE_AMX
// A layer by AMX tiles. Rows that several pieces read are packed once.
template <typename Y>
void tiles_layer_all(const std::vector<Piece<bf16, Y>>& pieces, const Tensor& weight, const Folded& f, int64_t activation,
                     const float* scale) {
  const int64_t units = weight.size(1), depth = weight.size(2), size = batch_panel_words(depth);
  struct Panel { const bf16* A; int64_t stride, rows; };
  std::vector<Panel> batch;
  std::vector<int64_t> first_panel;  // of a piece
  std::map<std::pair<const bf16*, int64_t>, int64_t> known;
  for (const auto& p : pieces) {
    const auto [found, fresh] = known.emplace(std::pair(p.A, p.rows), batch.size());
    first_panel.push_back(found->second);
    for (int64_t r = 0; r < p.rows && fresh; r += kPanel) batch.push_back({p.A + r * p.stride, p.stride, p.rows - r});
  }
  const Tensor packed = at::empty({static_cast<int64_t>(batch.size()) * size}, at::kFloat);
  float* to = packed.data_ptr<float>();
  at::parallel_for(0, batch.size(), grain(size), [&](int64_t from, int64_t end) {
    for (int64_t i = from; i < end; ++i) pack_batch(batch[i].A, batch[i].stride, batch[i].rows, depth, to + i * size);
  });
  const bool pairs = activation == kSwiglu;
  // To read the weights takes as long as 6 panels take to pass.
  auto cost = [](const auto& p) { return panels(p.rows) + 6; };
  deal_outputs(pieces, pairs ? units / 2 : units, units * depth, kSums, cost, [&](int64_t i, int64_t begin, int64_t end, int64_t next) {
    const auto& p = pieces[i];
    const bf16* after = next < 0 || scale ? nullptr : data<bf16>(weight) + pieces[next].expert * units * depth;
    for_weights<bf16>(weight, scale, f, pairs, p.expert, begin, end, [&](const Weights<bf16>& w) {
      tiles_layer(to + first_panel[i] * size, p.rows, w.rows, w.units, depth, w.begin, w.end, w.a, w.c, activation, p.y + w.at, p.ldy,
                  after, w.gate_next, w.up_next);
    });
  });
}
#endif

// A layer in order of k. A task packs one panel of an expert's units and runs the expert's rows past it.
template <typename T, typename Y>
void panels_layer(const std::vector<Piece<T, Y>>& pieces, const Tensor& weight, const Folded& f, int64_t activation) {
  const int64_t units = weight.size(1), depth = weight.size(2);
  const bool pairs = activation == kSwiglu;  // a panel then holds gate units and, behind them, their up units
  const int64_t outputs = pairs ? units / 2 : units, width = pairs ? kPanel / 2 : kPanel;
  const int64_t each = (outputs + width - 1) / width;
  auto run = [&](const Piece<T, Y>& p, int64_t n, float* panel) {
    const int64_t count = std::min(width, outputs - n), first = p.expert * units;
    const bool affine = f.scaled || f.shifted;
    const T* unit[kPanel] = {};
    float a[kPanel], c[kPanel] = {};
    std::fill(a, a + kPanel, 1.0f);
    for (int64_t part = 0; part <= pairs; ++part) {
      for (int64_t j = 0; j < count; ++j) {
        const int64_t row = first + n + j + part * outputs, at = part * width + j;
        unit[at] = data<T>(weight) + row * depth;
        if (f.scaled) a[at] = f.a[row];
        if (f.shifted) c[at] = f.c[row];
      }
    }
    pack_rows(unit, depth, width * depth, panel);
    Y short_row[kPanel];
    with_activation(activation, [&](auto A) {
      multiply(p.A, p.stride, p.rows, panel, words<T>(depth), [&](int64_t m, const float* z) {
        Y *y = p.y + m * p.ldy + n, *to = count == width ? y : short_row;
        if (pairs) {
          activate_row(z, to, kPanel, 1, affine ? a : nullptr, c, kSwiglu);
        } else {
          for (int v = 0; v < kPanel; v += kLanes) {
            Vec u = load(z + v);
            if (affine) u = u * load(a + v) + load(c + v);
            store(activate<decltype(A)::value, Y>(u), to + v);
          }
        }
        if (count < width) std::copy(short_row, short_row + count, y);
      });
    });
  };
  // The panels are dealt to the threads in equal shares of work; packing one costs about as much as 8 rows.
  std::vector<int64_t> before{0};
  for (const auto& p : pieces) before.push_back(before.back() + (p.rows + 8) * each);
  const int64_t total = before.back(), threads = total * width * depth < 200000 ? 1 : at::get_num_threads();
  at::parallel_for(0, threads, 1, [&](int64_t from, int64_t to) {
    std::vector<float> panel(panel_words<T>(depth));
    const int64_t low = total * from / threads, high = total * to / threads;
    for (size_t i = 0; i < pieces.size(); ++i) {
      const int64_t cost = pieces[i].rows + 8;
      auto panel_at = [&](int64_t share) { return std::clamp<int64_t>((share - before[i] + cost - 1) / cost, 0, each); };
      if (before[i + 1] <= low || before[i] >= high) continue;
      for (int64_t p = panel_at(low); p < panel_at(high); ++p) run(pieces[i], p * width, panel.data());
    }
  });
}

template <typename T, typename Y>
void run_layer(const std::vector<Piece<T, Y>>& pieces, const Tensor& weight, const Folded& f, int64_t activation, int64_t lanes_from,
               const float* scale = nullptr) {
  if (pieces.empty()) return;
#if RECSYS_MOE_AMX
  if constexpr (std::is_same_v<T, bf16>)
    if (amx()) return tiles_layer_all(pieces, weight, f, activation, scale);
#endif
  if (scale || weight.size(2) >= lanes_from || weight.size(1) <= kFewUnits) lanes_layer_all(pieces, weight, f, activation, scale);
  else panels_layer(pieces, weight, f, activation);
}

// ---- sparse experts at inference: the whole chain ---------------------------------------------------------------------

Tensor sparse_forward(const Tensor& x_, at::TensorList weights, const c10::List<OptionalTensor>& weight_scales,
                      const c10::List<OptionalTensor>& biases, const c10::List<OptionalTensor>& scales,
                      const c10::List<OptionalTensor>& shifts, const c10::List<OptionalTensor>& means,
                      const c10::List<OptionalTensor>& vars, at::ArrayRef<double> eps, at::IntArrayRef activations,
                      const Tensor& gate_weights, const Tensor& order_, const Tensor& offsets_, bool unit_norm) {
  const Tensor x = x_.contiguous(), order = order_.contiguous(), offsets = offsets_.contiguous();
  const Tensor gates = gate_weights.to(at::kFloat).contiguous();
  const int64_t experts = weights[0].size(0), r = gates.size(0), k = gates.size(1), slots = r * k;
  const int64_t per_row = x.size(0) ? slots / x.size(0) : 1;
  const int32_t *op = order.const_data_ptr<int32_t>(), *off = offsets.const_data_ptr<int32_t>();
  const int64_t used = off[experts];
  int64_t width = x.size(1);
  auto precision = [&](size_t layer) {  // of the products
    const at::ScalarType type = weights[layer].scalar_type();
    return type == at::kChar ? x.scalar_type() : type;
  };
  // The slots' rows side by side, expert by expert, in the products' precision; an odd width of bf16 is padded to whole words.
  auto buffer = [&](int64_t columns, at::ScalarType type) {
    const bool pad = type == at::kBFloat16 && columns % 2;
    return pad ? at::zeros({used, columns + 1}, x.options().dtype(type)) : at::empty({used, columns}, x.options().dtype(type));
  };
  Tensor h = buffer(width, precision(0));
  with_type(x, [&](auto from) {
    with_type(h, [&](auto to) {
      at::parallel_for(0, used, grain(width), [&](int64_t begin, int64_t end) {
        for (int64_t i = begin; i < end; ++i)
          convert(data<decltype(from)>(x) + op[i] / per_row * width, data<decltype(to)>(h) + i * h.size(1), width);
      });
    });
  });
  for (size_t layer = 0; layer < weights.size(); ++layer) {
    const Tensor w = weights[layer].contiguous();
    const int64_t units = w.size(1), out = activations[layer] == kSwiglu ? units / 2 : units;
    const Folded f = fold_layer(experts * units, biases[layer], scales[layer], shifts[layer], means[layer], vars[layer], eps[layer]);
    const bool last = layer + 1 == weights.size();
    const OptionalTensor given = weight_scales[layer];
    const Tensor weight_scale = given.has_value() ? given->to(at::kFloat).contiguous() : Tensor();
    if (h.scalar_type() != precision(layer)) h = h.to(precision(layer));
    Tensor y = buffer(out, last ? at::kFloat : precision(layer + 1));
    with_type(h, [&](auto in) {
      with_type(y, [&](auto to) {
        using T = decltype(in);
        using Y = decltype(to);
        std::vector<Piece<T, Y>> pieces;
        for (int64_t e = 0; e < experts; ++e) {
          const int64_t rows = off[e + 1] - off[e];
          if (rows) pieces.push_back({e, data<T>(h) + off[e] * h.size(1), rows, h.size(1), data<Y>(y) + off[e] * y.size(1), y.size(1)});
        }
        run_layer(pieces, w, f, activations[layer], kSparseLanes, maybe(weight_scale));
      });
    });
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
    at::parallel_for(0, r, grain(k * width), [&](int64_t from, int64_t to) {
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
          float* s = sum.data();
#pragma omp simd
          for (int64_t i = 0; i < width; ++i) s[i] += factor * v[i];
        }
        convert(sum.data(), data<T>(y) + row * width, width);
      }
    });
  });
  return y;
}

// ---- dense experts ----------------------------------------------------------------------------------------------------------

// What the groups read: input source[g] of each row, times the group's gate where there is one.
struct Inputs {
  Tensor x, gate;  // [B, S, D] fp32 or bf16; fp32 [B, G, D] or undefined
  at::IntArrayRef source;
  int64_t inputs, depth, groups;

  Inputs(const Tensor& x_, const OptionalTensor& gate_, at::IntArrayRef source_)
      : x(x_.contiguous()), source(source_), depth(x_.size(-1)), groups(source_.size()) {
    inputs = x.dim() == 2 ? 1 : x.size(1);
    if (gate_.has_value()) gate = gate_->to(at::kFloat).contiguous();
  }
  // Groups that read one input with no gate between are one.
  bool one() const {
    return !gate.defined() && std::all_of(source.begin(), source.end(), [&](int64_t s) { return s == source[0]; });
  }
  bool same(int64_t g, int64_t h) const { return !gate.defined() && source[g] == source[h]; }
  template <typename X>
  const X* row(int64_t b, int64_t g) const { return data<X>(x) + (b * inputs + source[g]) * depth; }
  const float* gate_row(int64_t b, int64_t g) const { return gate.const_data_ptr<float>() + (b * groups + g) * depth; }
  // Row b of group g in the products' precision.
  template <typename X, typename T>
  void copy_row(int64_t b, int64_t g, T* to) const {
    const X* from = row<X>(b, g);
    if (!gate.defined()) return convert(from, to, depth);
    const float* factor = gate_row(b, g);
    by_vecs(depth, [&](int64_t i, int64_t count) {
      store_first(load_first(from + i, count) * load_first(factor + i, count), to + i, count);
    });
  }
  template <typename T>
  int64_t padded() const { return words<T>(depth) * kPerWord<T>; }
  // Rows begin … end of group g as an operand A: as they lie where that will do, else copied to `to`. Returns (A, stride).
  template <typename X, typename T>
  std::pair<const T*, int64_t> rows(int64_t begin, int64_t end, int64_t g, std::vector<T>& to) const {
    if constexpr (std::is_same_v<X, T>)
      if (!gate.defined() && padded<T>() == depth) return {row<X>(begin, g), inputs * depth};
    const int64_t stride = padded<T>();
    to.resize((end - begin) * stride);
    for (int64_t b = begin; b < end; ++b) {
      copy_row<X>(b, g, to.data() + (b - begin) * stride);
      if (stride > depth) to[(b - begin) * stride + depth] = 0;
    }
    return {to.data(), stride};
  }
};

// Gates: groups of few units, of which several read one input. Side by side for each input, [inputs, width, D] with zeros where one has
// fewer, they are one product. `place` says where a unit of the layer lies.
struct ByInput {
  std::vector<int64_t> inputs;
  int64_t width = 0;
  Tensor place;

  ByInput(const Inputs& in, const Tensor& weight) {
    const int64_t columns = weight.size(0) * weight.size(1), each = columns / in.groups;
    if (in.gate.defined() || each > kFewUnits) return;
    std::map<int64_t, int64_t> units;  // of an input
    std::vector<int64_t> before;
    for (int64_t g = 0; g < in.groups; ++g) before.push_back(std::exchange(units[in.source[g]], units[in.source[g]] + each));
    for (const auto& [input, count] : units) inputs.push_back(input), width = std::max(width, count);
    if (units.size() == before.size()) return;
    place = at::empty({columns}, at::kLong);
    for (int64_t i = 0; i < columns; ++i) {
      const int64_t g = i / each, input = std::distance(units.begin(), units.find(in.source[g]));
      place.data_ptr<int64_t>()[i] = input * width + before[g] + i % each;
    }
  }
  bool pays() const { return place.defined(); }
  // What a layer has for each unit, along `dim`, in the places of the units, and back.
  Tensor put(const Tensor& units, int64_t dim) const {
    auto shape = units.sizes().vec();
    shape[dim] = static_cast<int64_t>(inputs.size()) * width;
    return at::zeros(shape, units.options()).index_copy_(dim, place, units).unflatten(dim, {static_cast<int64_t>(inputs.size()), width});
  }
  Tensor put_weight(const Tensor& weight) const { return put(weight.flatten(0, 1), 0); }
  OptionalTensor put_bias(const OptionalTensor& bias) const { return bias.has_value() ? OptionalTensor(put(bias->flatten(), 0)) : bias; }
  Tensor take(const Tensor& units, int64_t dim, at::IntArrayRef sizes) const {
    return units.flatten(dim, dim + 1).index_select(dim, place).view(sizes);
  }
};

// Runs f with the types of x and of the products.
template <typename F>
void with_types(const Tensor& x, const Tensor& w, F&& f) {
  with_type(x, [&](auto from) { with_type(w, [&](auto to) { f(from, to); }); });
}

// At inference, invariant: y `[B, E, H]` = act(norm(linear)).
Tensor dense_forward(const Tensor& x, const OptionalTensor& gate, const Tensor& weight, at::IntArrayRef source,
                     const OptionalTensor& bias, const OptionalTensor& scale, const OptionalTensor& shift,
                     const OptionalTensor& mean, const OptionalTensor& var, double eps, int64_t activation) {
  const Inputs in(x, gate, source);
  const Tensor w = weight.contiguous();
  const int64_t b = x.size(0), d = in.depth, experts = w.size(0), units = w.size(1);
  const int64_t out = activation == kSwiglu ? units / 2 : units, group = experts / in.groups;
  if (const ByInput by(in, w); by.pays() && !scale.has_value() && activation != kSwiglu) {
    const OptionalTensor none;
    const Tensor y = dense_forward(x, none, by.put_weight(w), by.inputs, by.put_bias(bias), none, none, none, none, 0.0, activation);
    return by.take(y, 1, {b, experts, units});
  }
  const Folded f = fold_layer(experts * units, bias, scale, shift, mean, var, eps);
  Tensor y = at::empty({b, experts, out}, w.options());
  if (!b) return y;
  with_types(in.x, w, [&](auto from, auto to) {
    using X = decltype(from);
    using T = decltype(to);
    // In blocks of rows: what the groups read is copied for one at a time.
    constexpr int64_t kBlock = 1024;
    for (int64_t begin = 0; begin < b; begin += kBlock) {
      const int64_t rows = std::min(kBlock, b - begin);
      std::vector<std::vector<T>> copies(in.groups);
      std::vector<std::pair<const T*, int64_t>> A(in.groups);
      std::vector<int64_t> first(in.groups);  // group that reads the same
      for (int64_t g = 0; g < in.groups; ++g)
        while (first[g] < g && !in.same(g, first[g])) ++first[g];
      at::parallel_for(0, in.groups, grain(rows * d), [&](int64_t from, int64_t to) {
        for (int64_t g = from; g < to; ++g)
          if (first[g] == g) A[g] = in.template rows<X, T>(begin, begin + rows, g, copies[g]);
      });
      for (int64_t g = 0; g < in.groups; ++g) A[g] = A[first[g]];
      std::vector<Piece<T, T>> pieces;
      for (int64_t e = 0; e < experts; ++e) {
        const auto [a, stride] = A[e / group];
        pieces.push_back({e, a, rows, stride, data<T>(y) + (begin * experts + e) * out, experts * out});
      }
      run_layer(pieces, w, f, activation, kDenseLanes);
    }
  });
  return y;
}

// A row of a panel's sums through bias (may be null) and activation.
template <int64_t A, typename T>
inline void finish(const float* sums, const float* bias, T* to, int64_t count) {
  auto value = [&](int64_t i, Vec b) { return activate<A, T>(bias ? load(sums + i) + b : load(sums + i)); };
  if (count < kPanel)
    return by_vecs(count, [&](int64_t i, int64_t n) { store_first(value(i, bias ? load_first(bias + i, n) : Vec{}), to + i, n); });
  for (int64_t i = 0; i < kPanel; i += kLanes) store(value(i, bias ? load(bias + i) : Vec{}), to + i);
}

// In training: the linear part and, where no norm comes between, bias and activation: y `[B, E, H]`.
Tensor expert_linear(const Tensor& x, const OptionalTensor& gate, const Tensor& weight, at::IntArrayRef source,
                     const OptionalTensor& bias, int64_t activation) {
  const float* c = maybe(bias);
  const Tensor w = weight.contiguous();
  Inputs in(x, gate, source);
  if (in.one()) in.groups = 1;
  if (const ByInput by(in, w); by.pays()) {
    const Tensor z = expert_linear(x, OptionalTensor(), by.put_weight(w), by.inputs, by.put_bias(bias), activation);
    return by.take(z, 1, {x.size(0), w.size(0), w.size(1)});
  }
  const int64_t b = x.size(0), d = in.depth, columns = w.size(0) * w.size(1), width = columns / in.groups;
  Tensor z = at::empty({b, w.size(0), w.size(1)}, w.options());
  const int64_t each = panels(width);
  with_types(in.x, w, [&](auto from, auto to) {
    using X = decltype(from);
    using T = decltype(to);
    const Panels<T> packed(w, in.groups, true);
    for_blocks(b, each, [&](int64_t begin, int64_t end, int64_t from_panel, int64_t to_panel) {
      std::vector<T> copy;
      std::pair<const T*, int64_t> A_rows;
      for (int64_t g = 0; g < in.groups; ++g) {
        if (g == 0 || !in.same(g, g - 1)) A_rows = in.template rows<X, T>(begin, end, g, copy);
        for (int64_t p = from_panel; p < to_panel; ++p) {
          const int64_t n = p * kPanel, count = std::min(kPanel, width - n);
          T* out = data<T>(z) + begin * columns + g * width + n;
          const float* bias_here = c ? c + g * width + n : nullptr;
          with_activation(activation, [&](auto A) {
            multiply(A_rows.first, A_rows.second, end - begin, packed.at(g, n, nullptr), words<T>(d),
                     [&](int64_t m, const float* sums) { finish<decltype(A)::value>(sums, bias_here, out + m * columns, count); });
          });
        }
      }
    });
  });
  return z;
}

// grad_w[m, n] = Σ_b z[b, m]·x[b, n] for the columns m of some segments of rows, each with its own x: the sums over the rows are
// taken in parts of kDepthRows, which are added in order. x_row(segment, b, to) is row b as a pointer, copied to `to` where it has to
// be made. Rows that lie a power of two apart fall into few of the cache's sets, so x is packed always.
constexpr int64_t kDepthRows = 512, kPackWords = 32, kPartFloats = 1 << 18;

struct Segment { int64_t begin, end, z_column; };  // rows of the sum; first column of z

template <typename T, typename F>
void grad_weight(const T* z, int64_t ldz, const std::vector<Segment>& segments, int64_t width, int64_t depth, float* grad, F&& x_row) {
  const int64_t count = segments.size(), each = panels(depth), threads = at::get_num_threads();
  int64_t longest = 0;
  for (const auto& s : segments) longest = std::max(longest, s.end - s.begin);
  const int64_t rows = std::min(longest, kDepthRows), size = panel_words<T>(rows), row_words = whole_vecs(words<T>(rows));
  const int64_t parts = (longest + kDepthRows - 1) / kDepthRows;
  auto rows_of = [&](int64_t s, int64_t part) { return std::min(kDepthRows, segments[s].end - segments[s].begin - part * kDepthRows); };
  // Words `begin` to `end` of a part's x.
  auto pack = [&](int64_t s, int64_t part, int64_t begin, int64_t end, float* to) {
    std::vector<T> copy(2 * depth);
    const int64_t first = segments[s].begin + part * kDepthRows;
    pack_columns<T>(begin, end, rows_of(s, part), depth, size, to,
                    [&](int64_t r) { return x_row(s, first + r, copy.data() + r % 2 * depth); });
  };
  // A part's sums for some units, stored or added to what is there. `a` is room for units · row_words.
  auto multiply_part = [&](int64_t s, int64_t part, int64_t unit, int64_t units, const float* x, float* a, float* out, bool add) {
    const int64_t here = rows_of(s, part), stride = whole_vecs(words<T>(here)) * kPerWord<T>;
    pack_transposed(z + (segments[s].begin + part * kDepthRows) * ldz + segments[s].z_column + unit, ldz, here, units, a);
    for (int64_t p = 0; p < each; ++p) {
      const int64_t columns = std::min(kPanel, depth - p * kPanel);
      multiply(reinterpret_cast<const T*>(a), stride, units, x + p * size, words<T>(here), [&](int64_t m, const float* sums) {
        float* g = out + m * depth + p * kPanel;
        if (!add) return store_panel(sums, g, columns);
        by_vecs(columns, [&](int64_t c, int64_t n) { store_first(load_first(g + c, n) + load_first(sums + c, n), g + c, n); });
      });
    }
  };

  // Small matrices: a thread takes whole parts and meets the others once, not twice a part; the parts' sums are added behind.
  const int64_t numel = width * depth;
  if (parts > 1 && count * parts >= threads && count * parts * numel <= kPartFloats) {
    const Tensor sums = at::empty({count * parts * numel}, at::kFloat);
    float* each_part = sums.data_ptr<float>();
    at::parallel_for(0, count * parts, 1, [&](int64_t from, int64_t to) {
      const auto x = std::make_unique_for_overwrite<float[]>(each * size), a = std::make_unique_for_overwrite<float[]>(width * row_words);
      for (int64_t i = from; i < to; ++i) {
        if (rows_of(i / parts, i % parts) <= 0) continue;
        pack(i / parts, i % parts, 0, words<T>(rows_of(i / parts, i % parts)), x.get());
        multiply_part(i / parts, i % parts, 0, width, x.get(), a.get(), each_part + i * numel, false);
      }
    });
    for (int64_t s = 0; s < count; ++s) {
      for (int64_t part = 0; part < parts && rows_of(s, part) > 0; ++part) {
        const float* from = each_part + (s * parts + part) * numel;
        float* to = grad + s * numel;
#pragma omp simd
        for (int64_t i = 0; i < numel; ++i) to[i] = part ? to[i] + from[i] : from[i];
      }
    }
    return;
  }

  // Blocks of whole tiles; where there are few, of about equal size and as many for each thread.
  int64_t blocks = (width + kBlockRows - 1) / kBlockRows, block = kBlockRows;
  if (count < 4 * threads) {
    blocks = (blocks + threads - 1) / threads * threads;
    block = (width + 4 * blocks - 1) / (4 * blocks) * 4;
  }
  const int64_t chunks = (words<T>(rows) + kPackWords - 1) / kPackWords;
  const Tensor packed = at::empty({count * each * size}, at::kFloat);
  float* x = packed.data_ptr<float>();
  for (int64_t part = 0; part < parts; ++part) {
    at::parallel_for(0, count * chunks, 1, [&](int64_t from, int64_t to) {
      for (int64_t i = from; i < to; ++i) {
        const int64_t s = i / chunks, begin = i % chunks * kPackWords, all = words<T>(std::max<int64_t>(0, rows_of(s, part)));
        if (begin < all) pack(s, part, begin, std::min(all, begin + kPackWords), x + s * each * size);
      }
    });
    at::parallel_for(0, count * blocks, 1, [&](int64_t from, int64_t to) {
      std::vector<float> a(block * row_words);
      for (int64_t i = from; i < to; ++i) {
        const int64_t s = i / blocks, unit = i % blocks * block, units = std::min(block, width - unit);
        if (rows_of(s, part) <= 0 || units <= 0) continue;
        multiply_part(s, part, unit, units, x + s * each * size, a.data(), grad + (s * width + unit) * depth, part > 0);
      }
    });
  }
}

// Rows of the gradient of z as an operand A: as they lie, or copied where a word would reach past its row's end.
template <typename T>
std::pair<const T*, int64_t> grad_rows(const T* z, int64_t ldz, int64_t rows, int64_t width, std::vector<T>& to) {
  if (width % kPerWord<T> == 0) return {z, ldz};
  to.assign(rows * (width + 1), T(0));
  for (int64_t r = 0; r < rows; ++r) std::copy(z + r * ldz, z + r * ldz + width, to.data() + r * (width + 1));
  return {to.data(), width + 1};
}

// What becomes of the gradient of a group's gated input x ⊙ gate, row m and some columns of it: it is split between the two.
template <typename X>
struct ToInputs {
  const X* x;
  int64_t ldx;
  const float* gate;  // null: none
  float* grad_gate;
  int64_t ldg;
  float* sum;  // of the groups that read this input
  int64_t lds, count;
  bool first;  // of these groups
  void prefetch(int64_t m) const {
    if (!gate) return;
    __builtin_prefetch(x + m * ldx);
    for (int64_t i = 0; i < kPanel; i += kLanes) {
      __builtin_prefetch(gate + m * ldg + i);
      __builtin_prefetch(grad_gate + m * ldg + i, 1);
    }
  }
  void operator()(int64_t m, const float* grad) const {
    auto vec = [&](int64_t i, auto n) {
      Vec v = load_first(grad + i, n);
      if (gate) {
        store_first(v * load_first(x + m * ldx + i, n), grad_gate + m * ldg + i, n);
        v = v * load_first(gate + m * ldg + i, n);
      }
      float* total = sum + m * lds + i;
      store_first(first ? v : load_first(total, n) + v, total, n);
    };
    over_panel(count, vec);
  }
};

std::tuple<Tensor, Tensor, Tensor> expert_linear_backward(const Tensor& grad_z_, const Tensor& x, const OptionalTensor& gate,
                                                          const Tensor& weight, at::IntArrayRef source, bool need_x) {
  const Tensor w = weight.contiguous(), grad_z = grad_z_.to(w.scalar_type()).contiguous();
  Inputs in(x, gate, source);
  const bool gated = in.gate.defined();
  if (in.one()) in.groups = 1;
  if (const ByInput by(in, w); by.pays()) {
    const Tensor grad = by.put(grad_z.flatten(1), 1);
    const auto [grad_x, grad_gate, grad_w] = expert_linear_backward(grad, x, gate, by.put_weight(w), by.inputs, need_x);
    return {grad_x, grad_gate, by.take(grad_w, 0, w.sizes())};
  }
  const int64_t b = x.size(0), d = in.depth, columns = w.size(0) * w.size(1), width = columns / in.groups;
  Tensor grad_x = at::empty(need_x ? x.sizes() : at::IntArrayRef{0}, x.options());
  Tensor grad_gate = at::empty(gated ? in.gate.sizes() : at::IntArrayRef{0}, x.options().dtype(at::kFloat));
  Tensor grad_w = b ? at::empty(w.sizes(), w.options().dtype(at::kFloat)) : at::zeros(w.sizes(), w.options().dtype(at::kFloat));
  with_types(in.x, w, [&](auto from, auto to) {
    using X = decltype(from);
    using T = decltype(to);
    const T *gz = data<T>(grad_z), *wp = data<T>(w);
    std::vector<Segment> segments;
    for (int64_t g = 0; g < in.groups; ++g) segments.push_back({0, b, g * width});
    grad_weight(gz, columns, segments, width, d, grad_w.data_ptr<float>(), [&](int64_t g, int64_t r, T* copy) -> const T* {
      if constexpr (std::is_same_v<X, T>)
        if (!gated) return in.template row<X>(r, g);
      in.template copy_row<X>(r, g, copy);
      return copy;
    });
    if (!need_x && !gated) return;
    const int64_t each = panels(d), size = panel_words<T>(width);
    const Tensor packed = pack_over_units<T>(w, in.groups);
    const float* pp = packed.const_data_ptr<float>();
    // The groups of one input after one another: their sum is rounded once.
    std::vector<int64_t> order(in.groups);
    std::iota(order.begin(), order.end(), 0);
    std::stable_sort(order.begin(), order.end(), [&](int64_t g, int64_t h) { return in.source[g] < in.source[h]; });
    if (need_x && static_cast<int64_t>(std::set<int64_t>(in.source.begin(), in.source.end()).size()) < in.inputs) grad_x.zero_();
    for_blocks(b, each, [&](int64_t begin, int64_t end, int64_t from_panel, int64_t to_panel) {
      std::vector<T> copy;
      const int64_t low = from_panel * kPanel, high = std::min(d, to_panel * kPanel);
      std::vector<float> sum((end - begin) * d);
      for (size_t i = 0; i < order.size(); ++i) {
        const int64_t g = order[i];
        const bool first = i == 0 || in.source[order[i - 1]] != in.source[g];
        const bool last = i + 1 == order.size() || in.source[order[i + 1]] != in.source[g];
        const auto [A, stride] = grad_rows(gz + begin * columns + g * width, columns, end - begin, width, copy);
        for (int64_t p = from_panel; p < to_panel; ++p) {
          const int64_t n = p * kPanel, count = std::min(kPanel, d - n);
          ToInputs<X> done{in.template row<X>(begin, g) + n, in.inputs * d, gated ? in.gate_row(begin, g) + n : nullptr,
                           gated ? grad_gate.data_ptr<float>() + (begin * in.groups + g) * d + n : nullptr, in.groups * d,
                           sum.data() + n, d, count, first};
          multiply(A, stride, end - begin, pp + (g * each + p) * size, words<T>(width), done);
        }
        if (need_x && last)
          for (int64_t r = begin; r < end; ++r)
            convert(sum.data() + (r - begin) * d + low, data<X>(grad_x) + (r * in.inputs + in.source[g]) * d + low, high - low);
      }
    });
  });
  return {grad_x, gated ? grad_gate.to(gate->scalar_type()) : grad_gate, grad_w.to(w.scalar_type())};
}

// ---- experts behind their feature gates: cpu_gated.h -----------------------------------------------------------------------

// y `[B, E, H]` = act(norm(W·g)); h and s are filled where they are kept.
Tensor gated_layer(const Tensor& x_, const Tensor& logits_, const Tensor& down_, const Tensor& up_, const Tensor& weight_,
                   at::IntArrayRef source, const OptionalTensor& bias, const OptionalTensor& scale, const OptionalTensor& shift,
                   const OptionalTensor& mean, const OptionalTensor& var, double eps, int64_t activation, const Tensor& h,
                   const Tensor& s) {
  const Tensor x = x_.contiguous(), logits = logits_.to(at::kFloat).contiguous();
  const Tensor down = down_.contiguous(), up = up_.contiguous(), weight = weight_.contiguous();
  const int64_t experts = weight.size(0), units = weight.size(1), n = experts / static_cast<int64_t>(source.size());
  const int64_t out = activation == kSwiglu ? units / 2 : units;
  const Folded f = fold_layer(experts * units, bias, scale, shift, mean, var, eps);
  Tensor y = at::empty({x.size(0), experts, out}, weight.options());
  with_types(x, weight, [&](auto from, auto to) {
    using T = decltype(to);
#if RECSYS_MOE_AMX
    if constexpr (std::is_same_v<T, bf16>) {
      if (!h.defined() && amx()) {
        return gated_tiles<decltype(from)>(x, logits, down, up, weight, source, f.scale_of(0), f.shift_of(0), activation, data<T>(y));
      }
    }
#endif
    gated_forward_rows<decltype(from), T>(x, logits, down, up, weight, source, h, s, [&](const float* z, int64_t row, int64_t g) {
      const int64_t first = g * n * units;
      activate_row(z, data<T>(y) + (row * experts + g * n) * out, n * units, n, f.scale_of(first), f.shift_of(first), activation);
    });
  });
  return y;
}

// At inference.
Tensor gated_forward(const Tensor& x, const Tensor& logits, const Tensor& down, const Tensor& up, const Tensor& weight,
                     at::IntArrayRef source, const OptionalTensor& bias, const OptionalTensor& scale, const OptionalTensor& shift,
                     const OptionalTensor& mean, const OptionalTensor& var, double eps, int64_t activation) {
  return gated_layer(x, logits, down, up, weight, source, bias, scale, shift, mean, var, eps, activation, Tensor(), Tensor());
}

// In training: y, and for the backward z = W·g, the moments that were used, h and s.
std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> gated_norm_act(
    const Tensor& x, const Tensor& logits, const Tensor& down, const Tensor& up, const Tensor& weight, at::IntArrayRef source,
    const OptionalTensor& bias, const OptionalTensor& scale, const OptionalTensor& shift, const OptionalTensor& running_mean,
    const OptionalTensor& running_var, bool training, double eps, int64_t activation) {
  const OptionalTensor none;
  const int64_t b = x.size(0), groups = logits.size(1), heads = logits.size(2), rank = down.size(1);
  const Tensor h = at::empty({groups, b, kept_width(heads, rank, down.element_size())}, down.options());
  const Tensor s = at::empty({groups, b, heads, x.size(2)}, up.options());
  const Tensor z = gated_layer(x, logits, down, up, weight, source, none, none, none, none, none, 0.0, kNone, h, s);
  const auto [y, mean, var] =
      norm_act(z, weight.size(0), none, bias, scale, shift, running_mean, running_var, training, eps, activation);
  return {y, z, mean, var, h, s};
}

// Gradients of x, logits, down, up, weight, bias, scale and shift. That of z is made where a block of rows needs it.
std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> gated_norm_act_backward(
    const Tensor& grad_y_, const Tensor& z, const Tensor& h, const Tensor& s, const Tensor& x_, const Tensor& logits_,
    const Tensor& down_, const Tensor& up_, const Tensor& weight_, at::IntArrayRef source, const OptionalTensor& bias,
    const OptionalTensor& scale, const OptionalTensor& shift,
    const Tensor& mean, const Tensor& var, bool training, double eps, int64_t activation, bool need_x) {
  const Tensor x = x_.contiguous(), logits = logits_.to(at::kFloat).contiguous();
  const Tensor down = down_.contiguous(), up = up_.contiguous(), weight = weight_.contiguous();
  const Tensor grad_y = grad_y_.to(z.scalar_type()).contiguous();
  const int64_t experts = weight.size(0), columns = experts * weight.size(1);
  const int64_t out_columns = activation == kSwiglu ? columns / 2 : columns;
  GradOfZ of_z;
  const auto [_, grad_bias, grad_scale, grad_shift] = norm_act_gradients(grad_y, z, experts, OptionalTensor(), bias, scale, shift, mean,
                                                                         var, training, eps, activation, &of_z);
  Tensor grad_x = at::zeros(need_x ? x.sizes() : at::IntArrayRef{0}, x.options().dtype(at::kFloat));
  Tensor grad_logits = at::empty_like(logits);
  Tensor grad_down = at::empty_like(down), grad_up = at::empty_like(up), grad_weight = at::empty_like(weight);
  with_types(x, weight, [&](auto from, auto to) {
    using X = decltype(from);
    using T = decltype(to);
    const GatedExperts<X, T> e(x, logits, down, up, weight, source, false, h, s);
    const T *zp = data<T>(z), *gp = data<T>(grad_y);
    auto grad_z = [&](int64_t row, int64_t g, T* to) {
      const int64_t at = g * e.U, of_y = at * out_columns / columns;
      const float *a = of_z.a.data() + at, *m = of_z.mean.data() + at, *p = of_z.p.data() + at, *q = of_z.q.data() + at;
      grad_row(zp + row * columns + at, gp + row * out_columns + of_y, e.U, experts / e.G, a, of_z.c.data() + at, activation,
               [&](int64_t k, auto count, Vec du, Vec zk) {
                 const Vec pull = (zk - load_first(m + k, count)) * load_first(p + k, count) + load_first(q + k, count);
                 store_first(du * load_first(a + k, count) + pull, to + k, count);
               });
    };
    const GatedBackward<X, T, decltype(grad_z)> backward{e, grad_z, need_x ? grad_x.data_ptr<float>() : nullptr,
                                                         grad_logits.data_ptr<float>(), pack_over_units<T>(down, e.G),
                                                         pack_over_units<T>(up, e.G * e.L), pack_over_units<T>(weight, e.G)};
    const int64_t parts = std::clamp<int64_t>(e.B / kGatedRows<T>, 1, at::get_num_threads());
    const std::vector<int64_t> size{parts, e.G * backward.group_size()};
    const Tensor sums = e.B ? at::empty(size, at::kFloat) : at::zeros(size, at::kFloat);
    at::parallel_for(0, parts, 1, [&](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; ++i) backward.run(e.B * i / parts, e.B * (i + 1) / parts, sums.data_ptr<float>() + i * sums.size(1));
    });
    std::vector<int64_t> of_weight, of_up, of_down;
    for (int64_t g = 0; g < e.G; ++g) {
      int64_t at = g * backward.group_size();
      of_weight.push_back(at);
      of_down.push_back(at += outer_size(e.U, e.D));
      at += outer_size(e.L * e.R, e.D);
      for (int64_t l = 0; l < e.L; ++l) of_up.push_back(at + l * outer_size(e.D, e.R));
    }
    gather_outer(sums, of_weight, e.U, e.D, data<T>(grad_weight));
    gather_outer(sums, of_up, e.D, e.R, data<T>(grad_up));
    gather_outer(sums, of_down, e.L * e.R, e.D, data<T>(grad_down));
  });
  return {grad_x.to(x.scalar_type()), grad_logits, grad_down, grad_up, grad_weight, grad_bias, grad_scale, grad_shift};
}

// ---- grouped products for training: slots sorted by expert --------------------------------------------------------------

Tensor grouped_linear(const Tensor& h_, const Tensor& weight, const Tensor& offsets) {
  const Tensor h = h_.contiguous(), w = weight.contiguous();
  const int32_t* off = offsets.const_data_ptr<int32_t>();
  const int64_t experts = w.size(0), units = w.size(1), depth = w.size(2), each = panels(units);
  Tensor z = at::empty({h.size(0), units}, w.options());
  with_type(w, [&](auto t) {
    using T = decltype(t);
    at::parallel_for(0, experts * each, 1, [&](int64_t from, int64_t to) {
      std::vector<float> panel(panel_words<T>(depth));
      std::vector<T> copy;
      for (int64_t i = from; i < to; ++i) {
        const int64_t e = i / each, n = i % each * kPanel, count = std::min(kPanel, units - n), rows = off[e + 1] - off[e];
        if (!rows) continue;
        const T* unit[kPanel] = {};
        for (int64_t j = 0; j < count; ++j) unit[j] = data<T>(w) + (e * units + n + j) * depth;
        pack_rows(unit, depth, kPanel * depth, panel.data());
        const auto [A, stride] = grad_rows(data<T>(h) + off[e] * depth, depth, rows, depth, copy);
        T* out = data<T>(z) + off[e] * units + n;
        multiply(A, stride, rows, panel.data(), words<T>(depth), [&](int64_t m, const float* sums) { store_panel(sums, out + m * units, count); });
      }
    });
  });
  z.slice(0, off[experts]).zero_();
  return z;
}

std::tuple<Tensor, Tensor> grouped_linear_backward(const Tensor& grad_z_, const Tensor& h_, const Tensor& weight,
                                                   const Tensor& offsets) {
  const Tensor w = weight.contiguous(), grad_z = grad_z_.to(w.scalar_type()).contiguous(), h = h_.contiguous();
  const int32_t* off = offsets.const_data_ptr<int32_t>();
  const int64_t experts = w.size(0), units = w.size(1), depth = w.size(2), each = panels(depth);
  Tensor grad_h = at::empty_like(h), grad_w = at::zeros(w.sizes(), w.options().dtype(at::kFloat));
  with_type(w, [&](auto t) {
    using T = decltype(t);
    std::vector<Segment> segments;
    for (int64_t e = 0; e < experts; ++e) segments.push_back({off[e], off[e + 1], 0});
    grad_weight(data<T>(grad_z), units, segments, units, depth, grad_w.data_ptr<float>(),
                [&](int64_t, int64_t r, T*) -> const T* { return data<T>(h) + r * depth; });
    at::parallel_for(0, experts * each, 1, [&](int64_t from, int64_t to) {
      std::vector<float> panel(panel_words<T>(units));
      std::vector<T> copy;
      for (int64_t i = from; i < to; ++i) {
        const int64_t e = i / each, n = i % each * kPanel, count = std::min(kPanel, depth - n), rows = off[e + 1] - off[e];
        if (!rows) continue;
        const T* from_w = data<T>(w) + e * units * depth + n;
        pack_columns<T>(0, words<T>(units), units, count, 0, panel.data(), [&](int64_t k) { return from_w + k * depth; });
        const auto [A, stride] = grad_rows(data<T>(grad_z) + off[e] * units, units, rows, units, copy);
        T* out = data<T>(grad_h) + off[e] * depth + n;
        multiply(A, stride, rows, panel.data(), words<T>(units), [&](int64_t m, const float* sums) { store_panel(sums, out + m * depth, count); });
      }
    });
  });
  grad_h.slice(0, off[experts]).zero_();
  return {grad_h, grad_w.to(w.scalar_type())};
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
          by_vecs(width, [&](int64_t i, int64_t n) {
            store_first(load_first(sum.data() + i, n) + load_first(g + i, n), sum.data() + i, n);
          });
        }
        convert(sum.data(), data<T>(grad_x) + r * width, width);
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
          by_vecs(width, [&](int64_t i, int64_t n) { store_first(load_first(out + i, n) + w * load_first(v + i, n), out + i, n); });
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
      for (int64_t row = from; row < to; ++row) {
        const float* g = grad.const_data_ptr<float>() + row * width;
        for (int64_t j = row * k; j < (row + 1) * k; ++j) {
          if (place[j] >= used) continue;
          const T* v = data<T>(h) + place[j] * width;
          const float w = weights.const_data_ptr<float>()[j];
          Vec dots = {};
          T* to = data<T>(grad_h) + place[j] * width;
          by_vecs(width, [&](int64_t i, int64_t n) {
            const Vec gi = load_first(g + i, n);
            dots += gi * load_first(v + i, n);
            store_first(w * gi, to + i, n);
          });
          grad_w.data_ptr<float>()[j] = add_lanes(dots);
        }
      }
    });
  });
  grad_h.slice(0, used).zero_();
  return {grad_h, grad_w};
}

// ---- gates ----------------------------------------------------------------------------------------------------------------

// Which experts each task's gate may see, and which tasks see each expert.
struct Sight {
  std::vector<std::vector<int64_t>> experts, tasks;
  Sight(const OptionalTensor& mask_, int64_t t, int64_t e) : experts(t), tasks(e) {
    const Tensor mask = mask_.has_value() ? mask_->contiguous() : Tensor();
    for (int64_t i = 0; i < t; ++i) {
      for (int64_t k = 0; k < e; ++k) {
        if (mask.defined() && !mask.const_data_ptr<bool>()[i * e + k]) continue;
        experts[i].push_back(k);
        tasks[k].push_back(i);
      }
    }
  }
};

// z[b, t] = Σ_e (softmax_e(logits[b, t]) + residual[b, t, e])·y[b, e] over the experts in sight, and the softmax, which the
// backward needs.
std::tuple<Tensor, Tensor> gate_mix(const Tensor& logits_, const Tensor& experts_, const OptionalTensor& mask,
                                    const OptionalTensor& residual_) {
  const Tensor logits = logits_.to(at::kFloat).contiguous(), experts = experts_.contiguous();
  const Tensor residual = residual_.has_value() ? residual_->to(at::kFloat).contiguous() : Tensor();
  const int64_t b = logits.size(0), t = logits.size(1), e = logits.size(2), h = experts.size(2);
  const Sight sight(mask, t, e);
  Tensor z = at::empty({b, t, h}, logits.options()), softmax = at::zeros(logits.sizes(), logits.options());
  const float *lp = logits.const_data_ptr<float>(), *rp = residual.defined() ? residual.const_data_ptr<float>() : nullptr;
  float *zp = z.data_ptr<float>(), *sp = softmax.data_ptr<float>();
  with_type(experts, [&](auto type) {
    using Y = decltype(type);
    const Y* yp = data<Y>(experts);
    at::parallel_for(0, b, grain(t * e * h), [&](int64_t from, int64_t to) {
      std::vector<float> some(e), w(whole_vecs(e));
      for (int64_t i = from * t; i < to * t; ++i) {
        const std::vector<int64_t>& seen = sight.experts[i % t];
        const int64_t count = seen.size();
        const float* logit = lp + i * e;
        if (count < e) {
          for (int64_t k = 0; k < count; ++k) some[k] = logit[seen[k]];
          logit = some.data();
        }
        softmax_row(logit, w.data(), count);
        for (int64_t k = 0; k < count; ++k) {
          sp[i * e + seen[k]] = w[k];
          if (rp) w[k] += rp[i * e + seen[k]];
        }
        const Y* y = yp + i / t * e * h;
        constexpr int kAtOnce = 4;  // vectors of a row: a gate of two experts would spend its time on the loop over them
        int64_t j = 0;
        for (; j + kAtOnce * kLanes <= h; j += kAtOnce * kLanes) {
          Vec sum[kAtOnce] = {};
          for (int64_t k = 0; k < count; ++k)
            for (int v = 0; v < kAtOnce; ++v) sum[v] += w[k] * load(y + seen[k] * h + j + v * kLanes);
          for (int v = 0; v < kAtOnce; ++v) store(sum[v], zp + i * h + j + v * kLanes);
        }
        by_vecs(h - j, [&](int64_t at, int64_t n) {
          Vec sum = {};
          for (int64_t k = 0; k < count; ++k) sum += w[k] * load_first(y + seen[k] * h + j + at, n);
          store_first(sum, zp + i * h + j + at, n);
        });
      }
    });
  });
  return {z, softmax};
}

// Gradients of the logits, the residual weights and the experts' outputs.
std::tuple<Tensor, Tensor, Tensor> gate_mix_backward(const Tensor& grad_, const Tensor& softmax_, const Tensor& experts_,
                                                     const OptionalTensor& mask, const OptionalTensor& residual_) {
  const Tensor grad = grad_.contiguous(), softmax = softmax_.contiguous(), experts = experts_.contiguous();
  const Tensor residual = residual_.has_value() ? residual_->to(at::kFloat).contiguous() : Tensor();
  const int64_t b = softmax.size(0), t = softmax.size(1), e = softmax.size(2), h = experts.size(2);
  const Sight sight(mask, t, e);
  Tensor grad_logits = at::zeros(softmax.sizes(), softmax.options()), grad_experts = at::empty(experts.sizes(), experts.options());
  Tensor grad_residual = at::zeros(residual.defined() ? softmax.sizes() : at::IntArrayRef{0}, softmax.options());
  const float *gp = grad.const_data_ptr<float>(), *sp = softmax.const_data_ptr<float>();
  const float* rp = residual.defined() ? residual.const_data_ptr<float>() : nullptr;
  float *lp = grad_logits.data_ptr<float>(), *grp = grad_residual.data_ptr<float>();
  with_type(experts, [&](auto type) {
    using Y = decltype(type);
    const Y* yp = data<Y>(experts);
    Y* gy = data<Y>(grad_experts);
    at::parallel_for(0, b, grain(t * e * h), [&](int64_t from, int64_t to) {
      for (int64_t row = from; row < to; ++row) {
        const float *gz = gp + row * t * h, *s = sp + row * t * e, *r = rp ? rp + row * t * e : nullptr;
        float* dl = lp + row * t * e;
        for (int64_t g = 0; g < t; ++g) {  // of a weight: ⟨grad z, y⟩, for eight experts at once
          const std::vector<int64_t>& seen = sight.experts[g];
          for (size_t first = 0; first < seen.size(); first += 8) {
            const int64_t count = std::min<int64_t>(8, seen.size() - first);
            const Y* y[8];  // of fewer than eight the last is taken again: a fixed number stays in registers
            for (int64_t k = 0; k < 8; ++k) y[k] = yp + (row * e + seen[first + std::min(k, count - 1)]) * h;
            Vec dots[8] = {};
            by_vecs(h, [&](int64_t j, int64_t n) {
              const Vec of_z = load_first(gz + g * h + j, n);
              for (int k = 0; k < 8; ++k) dots[k] += of_z * load_first(y[k] + j, n);
            });
            float sums[8];
            add_lanes_of_8(dots, sums);
            for (int64_t k = 0; k < count; ++k) dl[g * e + seen[first + k]] = sums[k];
          }
        }
        for (int64_t k = 0; k < e; ++k) {
          by_vecs(h, [&](int64_t j, int64_t n) {
            Vec total = {};
            for (int64_t g : sight.tasks[k])
              total += (r ? s[g * e + k] + r[g * e + k] : s[g * e + k]) * load_first(gz + g * h + j, n);
            store_first(total, gy + (row * e + k) * h + j, n);
          });
        }
        if (r) std::copy(dl, dl + t * e, grp + row * t * e);
        for (int64_t g = 0; g < t; ++g) {
          float mean = 0;
          for (int64_t k : sight.experts[g]) mean += s[g * e + k] * dl[g * e + k];
          for (int64_t k : sight.experts[g]) dl[g * e + k] = s[g * e + k] * (dl[g * e + k] - mean);
        }
      }
    });
  });
  return {grad_logits, grad_residual, grad_experts};
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
    std::vector<float> choice(e), soft(whole_vecs(e));
    for (int64_t row = from; row < to; ++row) {
      const float* l = lp + row * e;
      TORCH_CHECK_VALUE(std::all_of(l, l + e, [](float x) { return std::isfinite(x); }), "the router's logits of row ", row,
                        " are not finite (", at::ArrayRef<float>(l, std::min<int64_t>(e, 8)), " …); look at its input");
      const int64_t open = ap ? std::count(ap + row * e, ap + (row + 1) * e, true) : e;
      TORCH_CHECK_VALUE(open >= k, "k is ", k, ", but allowed_be allows row ", row, " ", open, " experts: allow each row at least k");
      float *s = sp + row * e, *w = wp + row * k;
      if (scoring == kSoftmax) {
        softmax_row(l, soft.data(), e);
        std::copy(soft.data(), soft.data() + e, s);
      } else if (scoring == kSigmoid) {
        by_vecs(e, [&](int64_t i, int64_t n) { store_first(sigmoid(load_first(l + i, n)), s + i, n); });
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
        softmax_row(w, soft.data(), k);
        std::copy(soft.data(), soft.data() + k, w);
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

// What bf16 products run on.
std::string bf16_products() {
#if RECSYS_MOE_AMX
  if (amx()) return "AMX";
#endif
#if defined(__AVX512BF16__)
  return "AVX512-BF16";
#else
  return "fp32";
#endif
}

}  // namespace

#include "cpu_autograd.h"
#include "cpu_step.h"

TORCH_LIBRARY(recsys_moe, m) {
  m.def("bf16_products() -> str", bf16_products);
  m.def("norm_act(Tensor z, int blocks, Tensor? offsets, Tensor? bias, Tensor? scale, Tensor? shift, Tensor? running_mean, "
        "Tensor? running_var, bool training, float eps, int activation) -> (Tensor, Tensor, Tensor)");
  m.def("norm_act_backward(Tensor grad_y, Tensor z, int blocks, Tensor? offsets, Tensor? bias, Tensor? scale, Tensor? shift, "
        "Tensor mean, Tensor var, bool training, float eps, int activation) -> (Tensor, Tensor, Tensor, Tensor)");
  m.def("expert_linear(Tensor x_bsd, Tensor? gate_bgd, Tensor weight_ehd, int[] source, Tensor? bias, int activation) -> Tensor");
  m.def("expert_linear_backward(Tensor grad_z, Tensor x_bsd, Tensor? gate_bgd, Tensor weight_ehd, int[] source, bool need_x) "
        "-> (Tensor, Tensor, Tensor)");
  m.def("dense_forward(Tensor x, Tensor? gate, Tensor weight, int[] source, Tensor? bias, Tensor? scale, Tensor? shift, "
        "Tensor? mean, Tensor? var, float eps, int activation) -> Tensor");
  m.def("linear(Tensor x, Tensor weight, Tensor? bias) -> Tensor");
  m.def("gated_forward(Tensor x_bsd, Tensor logits_bgl, Tensor down, Tensor up, Tensor weight, int[] source, Tensor? bias, "
        "Tensor? scale, Tensor? shift, Tensor? mean, Tensor? var, float eps, int activation) -> Tensor");
  m.def("gated_norm_act(Tensor x_bsd, Tensor logits_bgl, Tensor down, Tensor up, Tensor weight, int[] source, Tensor? bias, "
        "Tensor? scale, Tensor? shift, Tensor? running_mean, Tensor? running_var, bool training, float eps, int activation) "
        "-> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)");
  m.def("gated_norm_act_backward(Tensor grad_y, Tensor z, Tensor h, Tensor s, Tensor x_bsd, Tensor logits_bgl, Tensor down, Tensor up, Tensor weight, "
        "int[] source, Tensor? bias, Tensor? scale, Tensor? shift, Tensor mean, Tensor var, bool training, float eps, "
        "int activation, bool need_x) -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)");
  m.def("sparse_forward(Tensor x, Tensor[] weights, Tensor?[] weight_scales, Tensor?[] biases, Tensor?[] scales, "
        "Tensor?[] shifts, Tensor?[] means, Tensor?[] vars, float[] eps, int[] activations, Tensor gate_weights, Tensor order, Tensor offsets, "
        "bool unit_norm) -> Tensor");
  m.def("grouped_linear(Tensor h, Tensor weight, Tensor offsets) -> Tensor");
  m.def("grouped_linear_backward(Tensor grad_z, Tensor h, Tensor weight, Tensor offsets) -> (Tensor, Tensor)");
  m.def("gather_rows(Tensor x, Tensor order, Tensor offsets) -> Tensor");
  m.def("gather_backward(Tensor grad, Tensor order, Tensor offsets, int rows) -> Tensor");
  m.def("combine(Tensor h, Tensor weights, Tensor order, Tensor offsets) -> Tensor");
  m.def("combine_backward(Tensor grad, Tensor h, Tensor weights, Tensor order, Tensor offsets) -> (Tensor, Tensor)");
  m.def("gate_mix(Tensor logits, Tensor experts, Tensor? mask, Tensor? residual) -> (Tensor, Tensor)");
  m.def("gate_mix_backward(Tensor grad, Tensor softmax, Tensor experts, Tensor? mask, Tensor? residual) -> "
        "(Tensor, Tensor, Tensor)");
  m.def("route_topk(Tensor logits, int k, int scoring, bool renormalize, Tensor? bias, Tensor? allowed) -> "
        "(Tensor, Tensor, Tensor)");
  m.def("sort_by_expert(Tensor ids, int experts) -> (Tensor, Tensor)");
  m.def("paged_attention(Tensor q, Tensor kv, Tensor turn, bool interleaved, Tensor(a!) cache, Tensor starts, Tensor lengths, "
        "Tensor blocks, int kv_heads, int value_at, int value_dim, float scale, int window) -> Tensor");
  m.def("route(Tensor x, Tensor weight, Tensor? bias, int experts, int k, int scoring, bool renormalize, Tensor? correction, "
        "float scale) -> (Tensor, Tensor, Tensor, Tensor, Tensor)");
  m.def("rms_norm(Tensor x, Tensor weight, float eps) -> Tensor");
  m.def("rotary(Tensor x, Tensor turn, bool interleaved) -> Tensor");
  m.def("embedding_bags(Tensor weights, Tensor starts, Tensor ids, Tensor offsets, int width, bool mean) -> Tensor");
  m.def("embedding_adagrad(Tensor(a!) weights, Tensor(b!) squares, Tensor starts, Tensor ids, Tensor offsets, Tensor grad, "
        "int width, bool mean, float rate, float eps) -> ()");
  m.class_<FusedLayers>("FusedLayers")
      .def(torch::init<>())
      .def("run", &FusedLayers::run)
      .def("grouped_attention", &FusedLayers::grouped_attention)
      .def("latent_attention", &FusedLayers::latent_attention)
      .def("dense_expert", &FusedLayers::dense_expert)
      .def("routed_experts", &FusedLayers::routed_experts);
}

TORCH_LIBRARY_IMPL(recsys_moe, CPU, m) {
  m.impl("norm_act", norm_act);
  m.impl("norm_act_backward", norm_act_backward);
  m.impl("expert_linear", expert_linear);
  m.impl("expert_linear_backward", expert_linear_backward);
  m.impl("dense_forward", dense_forward);
  m.impl("linear", project);
  m.impl("gated_forward", gated_forward);
  m.impl("gated_norm_act", gated_norm_act);
  m.impl("gated_norm_act_backward", gated_norm_act_backward);
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
  m.impl("paged_attention", paged_attention);
  m.impl("route", route);
  m.impl("rms_norm", rms_norm);
  m.impl("rotary", rotary);
  m.impl("embedding_bags", embedding_bags);
  m.impl("embedding_adagrad", embedding_adagrad);
}
