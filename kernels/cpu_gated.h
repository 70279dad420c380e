// HoME's experts behind their feature gates. Of a block of rows, all that lies between x and the experts' products stays in a
// core's cache; h and s are kept for the backward, which computes the rest again. For a group that reads x, with L heads of rank R
// and U units of its experts together:
//
//   h_l = down_l·x,  s_l = 2σ(up_l·h_l),  w = softmax(logits),  g = x ⊙ Σ_l w_l·s_l,  z = W·g
//
// D is the depth of x, S the inputs a row, G the groups.
#pragma once

#include "cpu_gemm.h"

namespace {

// Memory of a thread's own, at a cache line's start.
template <typename T>
class Room {
 public:
  explicit Room(int64_t n) : bytes_(at::empty({n * static_cast<int64_t>(sizeof(T))}, at::kByte)), at_(data<T>(bytes_)) {}
  operator T*() const { return at_; }

 private:
  Tensor bytes_;
  T* at_;
};

// A row of a panel's sums to a row that has room for all of them, and the same added to what is there.
inline void copy_panel(const float* sums, float* to) { std::memcpy(to, sums, kPanel * sizeof(float)); }
inline void add_panel(const float* sums, float* to) {
  for (int64_t i = 0; i < kPanel; i += kLanes) store(load(to + i) + load(sums + i), to + i);
}

constexpr int64_t kLine = 64;
// From row to row of n elements: whole lines, and one more, so that rows of a power of two do not share the cache's sets.
template <typename T>
int64_t row_stride(int64_t n) { return ((n * sizeof(T) + kLine - 1) / kLine + 1) * kLine / sizeof(T); }

// The rest of a row's last word.
template <typename T>
void zero_tail(T* rows, int64_t stride, int64_t count, int64_t n) {
  if (n % kPerWord<T>)
    for (int64_t r = 0; r < count; ++r) rows[r * stride + n] = T(0);
}

// Rows of a block: what a thread holds of it is of the order of its second-level cache.
template <typename T>
constexpr int64_t kGatedRows = 10 * kTileRows * kPerWord<T>;
template <typename T>
constexpr int64_t kRowStep = kPerWord<T> == 1 ? kTileRows : 16;  // rows of a tile

// run(begin, end) for equal blocks of the rows from `low` to `high`.
template <typename T, typename F>
void in_blocks(int64_t low, int64_t high, F&& run) {
  const int64_t rows = high - low, count = std::max<int64_t>(1, (rows + kGatedRows<T> - 1) / kGatedRows<T>);
  const int64_t share = (rows + count - 1) / count, block = (share + kRowStep<T> - 1) / kRowStep<T> * kRowStep<T>;
  for (int64_t begin = low; begin < high; begin += block) run(begin, std::min(high, begin + block));
}

// Of a kept h, from row to row, its values being of `size` bytes: an odd rank's last head ends with a whole word.
inline int64_t kept_width(int64_t heads, int64_t rank, int64_t size) { return heads * rank + rank % (4 / size); }

template <typename X, typename T>
class GatedExperts {
 public:
  // `packed`: the panels of all weights, for all threads; else a thread packs each when it comes to it. `h` [G][B][L·R], whole words
  // at each row's end, and `s` [G][B][L][D] are kept for the backward; undefined at inference.
  GatedExperts(const Tensor& x, const Tensor& logits, const Tensor& down, const Tensor& up, const Tensor& weight,
               at::IntArrayRef source, bool packed, const Tensor& h, const Tensor& s)
      : B(x.size(0)), S(x.size(1)), D(x.size(2)), G(logits.size(1)), L(logits.size(2)), R(down.size(1)),
        U(weight.size(0) / G * weight.size(1)), x_(x), logits_(logits), h_(h), s_(s), source_(source), down_(down, G, packed),
        up_(up, G * L, packed), weight_(weight, G, packed) {}
  const int64_t B, S, D, G, L, R, U;
  // From row to row of x and h, and of what a block has for each: D and U of them in fp32, D, L·R and U in the products' precision.
  const int64_t ldx = S * D, ldh = kept_width(L, R, sizeof(T));
  const int64_t ldf = row_stride<float>(panels(D) * kPanel), ldz = row_stride<float>(panels(U) * kPanel);
  const int64_t ldd = row_stride<T>(D), ldr = row_stride<T>(L * R), ldu = row_stride<T>(U);
  int64_t offset(int64_t row, int64_t g) const { return row * ldx + source_[g] * D; }
  const X* x(int64_t row, int64_t g) const { return data<X>(x_) + offset(row, g); }
  T* h(int64_t row, int64_t g) const { return data<T>(h_) + (g * B + row) * ldh; }
  T* s(int64_t row, int64_t g) const { return data<T>(s_) + (g * B + row) * L * D; }

  struct Block {
    const int64_t most;  // rows
    const Room<T> x, h, g;  // [row][D], [row][L·R] where it is not kept, [row][D]
    const Room<float> w, u, gate, panel;  // u, gate: [row][D]
    Block(const GatedExperts& e, int64_t most)
        : most(most), x(most * e.ldd), h(e.h_.defined() ? 0 : most * e.ldh), g(most * e.ldd), w(most * whole_vecs(e.L)), u(most * e.ldf),
          gate(most * e.ldf), panel(std::max(e.down_.size(), std::max(e.up_.size(), e.weight_.size()))) {}
  };

  // w, h, s and g of some rows of group g.
  void make(const Block& b, int64_t begin, int64_t rows, int64_t g) const {
    read(b, begin, rows, g);
    T* to_h = h_.defined() ? h(begin, g) : b.h;
    for (int64_t n = 0; n < L * R; n += kPanel) {
      multiply<T>(b.x, ldd, rows, down_.at(g, n, b.panel), words<T>(D),
                  [&](int64_t m, const float* sums) { store_panel(sums, to_h + m * ldh + n, std::min(kPanel, L * R - n)); });
    }
    for (int64_t r = 0; r < rows && ldh > L * R; ++r) to_h[r * ldh + L * R] = T(0);
    for (int64_t l = 0; l < L; ++l) {
      for (int64_t n = 0; n < D; n += kPanel) {
        multiply<T>(to_h + l * R, ldh, rows, up_.at(g * L + l, n, b.panel), words<T>(R),
                    [to = b.u + n, ld = ldf](int64_t m, const float* sums) { copy_panel(sums, to + m * ld); });
      }
      for (int64_t r = 0; r < rows; ++r) {
        const float w = b.w[r * whole_vecs(L) + l];
        const float* u = b.u + r * ldf;
        float* gate = b.gate + r * ldf;
        T* to = s_.defined() ? s(begin + r, g) + l * D : nullptr;
        by_vecs(D, [&](int64_t i, auto count) {
          const Vec value = activate<kDoubleSigmoid, T>(load_first(u + i, count));
          if (to) store_first(value, to + i, count);
          store_first(l ? load_first(gate + i, count) + w * value : w * value, gate + i, count);
        });
      }
    }
    apply(b, begin, rows, g);
  }

  // w, the gate and g from what was kept.
  void make_again(const Block& b, int64_t begin, int64_t rows, int64_t g) const {
    read(b, begin, rows, g);
    for (int64_t r = 0; r < rows; ++r) {
      const float* w = b.w + r * whole_vecs(L);
      const T* from = s(begin + r, g);
      float* gate = b.gate + r * ldf;
      by_vecs(D, [&](int64_t i, auto count) {
        Vec sum = w[0] * load_first(from + i, count);
        for (int64_t l = 1; l < L; ++l) sum += w[l] * load_first(from + l * D + i, count);
        store_first(sum, gate + i, count);
      });
    }
    apply(b, begin, rows, g);
  }

  // z of the rows that were made: [row][U].
  void experts(const Block& b, int64_t rows, int64_t g, float* z) const {
    for (int64_t n = 0; n < U; n += kPanel) {
      multiply<T>(b.g, ldd, rows, weight_.at(g, n, b.panel), words<T>(D),
                  [to = z + n, ld = ldz](int64_t m, const float* sums) { copy_panel(sums, to + m * ld); });
    }
  }

 private:
  void read(const Block& b, int64_t begin, int64_t rows, int64_t g) const {
    for (int64_t r = 0; r < rows; ++r) {
      convert(x(begin + r, g), b.x + r * ldd, D);
      softmax_row(logits_.const_data_ptr<float>() + ((begin + r) * G + g) * L, b.w + r * whole_vecs(L), L);
    }
    zero_tail<T>(b.x, ldd, rows, D);
  }
  void apply(const Block& b, int64_t begin, int64_t rows, int64_t g) const {
    for (int64_t r = 0; r < rows; ++r) {
      const float* gate = b.gate + r * ldf;
      const X* from = x(begin + r, g);
      T* to = b.g + r * ldd;
      by_vecs(D, [&](int64_t i, auto count) { store_first(load_first(from + i, count) * load_first(gate + i, count), to + i, count); });
    }
    zero_tail<T>(b.g, ldd, rows, D);
  }
  const Tensor x_, logits_, h_, s_;
  const at::IntArrayRef source_;
  const Panels<T> down_, up_, weight_;
};

// y of every row: what follows the product is done to a row at a time, finish(z, row, group).
template <typename X, typename T, typename F>
void gated_forward_rows(const Tensor& x, const Tensor& logits, const Tensor& down, const Tensor& up, const Tensor& weight,
                        at::IntArrayRef source, const Tensor& h, const Tensor& s, F&& finish) {
  const int64_t rows = x.size(0), threads = at::get_num_threads();
  const GatedExperts<X, T> e(x, logits, down, up, weight, source, rows > threads * kGatedRows<T>, h, s);
  at::parallel_for(0, threads, 1, [&](int64_t from, int64_t to) {
    const int64_t step = kRowStep<T>, steps = (rows + step - 1) / step;
    const int64_t low = steps * from / threads * step, high = std::min(rows, steps * to / threads * step);
    if (low >= high) return;
    const typename GatedExperts<X, T>::Block b(e, std::min(high - low, kGatedRows<T>));
    const Room<float> z(b.most * e.ldz);
    in_blocks<T>(low, high, [&](int64_t begin, int64_t end) {
      for (int64_t g = 0; g < e.G; ++g) {
        e.make(b, begin, end - begin, g);
        e.experts(b, end - begin, g, z);
        for (int64_t r = begin; r < end; ++r) finish(z + (r - begin) * e.ldz, r, g);
      }
    });
  });
}

// Sums over rows that come block by block, of the outer products of an a [m] and a b [n]: [panel of b][a][kPanel].
inline int64_t outer_size(int64_t m, int64_t n) { return panels(n) * m * kPanel; }

// b's rows as panels.
template <typename T>
void pack_block(const T* b, int64_t ldb, int64_t n, int64_t rows, float* packed) {
  pack_columns<T>(0, words<T>(rows), rows, n, panel_words<T>(rows), packed, [&](int64_t r) { return b + r * ldb; });
}

template <typename T>
void add_outer(const T* a, int64_t lda, int64_t m, const float* packed_b, int64_t n, int64_t rows, bool add, float* transposed,
               float* sums) {
  pack_transposed(a, lda, rows, m, transposed);
  for (int64_t p = 0; p < panels(n); ++p)
    multiply_into(reinterpret_cast<const T*>(transposed), whole_vecs(words<T>(rows)) * kPerWord<T>, m, packed_b + p * panel_words<T>(rows),
                  words<T>(rows), sums + p * m * kPanel, add);
}

// The gradients of x (fp32, added to), logits and, part of the rows by part, the weights.
template <typename X, typename T, typename F>
struct GatedBackward {
  const GatedExperts<X, T>& e;
  const F& grad_z;  // grad_z(row, g, to): z's own, [U]
  float* grad_x;    // may be null
  float* grad_logits;
  const Tensor down, up, weight;  // packed over their units, a group's heads of `down` as one

  int64_t group_size() const { return outer_size(e.U, e.D) + outer_size(e.L * e.R, e.D) + e.L * outer_size(e.D, e.R); }

  // Rows low … high; sums [G][group_size()]: of a group W's, down's, then for each head up's.
  void run(int64_t low, int64_t high, float* sums) const {
    const int64_t D = e.D, R = e.R, U = e.U, L = e.L, most = std::min(high - low, kGatedRows<T>), ldw = whole_vecs(L);
    const int64_t across = std::max(D, std::max(L * R, U)), deep = whole_vecs(words<T>(most));
    const typename GatedExperts<X, T>::Block b(e, most);
    const Room<T> dz(most * e.ldu), du(L * most * e.ldd), dh(most * e.ldr);
    const Room<float> transposed(whole_vecs(across) * deep), packed(panels(across) * kPanel * deep);
    for (int64_t g = 0; g < e.G; ++g) {
      in_blocks<T>(low, high, [&](int64_t begin, int64_t end) {
        const int64_t rows = end - begin;
        const bool add = begin > low;
        float* sum = sums + g * group_size();
        e.make_again(b, begin, rows, g);
        for (int64_t r = 0; r < rows; ++r) grad_z(begin + r, g, dz + r * e.ldu);
        zero_tail<T>(dz, e.ldu, rows, U);
        pack_block<T>(b.g, e.ldd, D, rows, packed);
        add_outer<T>(dz, e.ldu, U, packed, D, rows, add, transposed, sum);
        sum += outer_size(U, D);

        // Of g, split between x and the gate, and on to what stands before each head's sigmoid.
        for (int64_t n = 0; n < D; n += kPanel) {
          multiply<T>(dz, e.ldu, rows, panel_of(weight, g, n, D, U), words<T>(U),
                      [to = b.u + n, ld = e.ldf](int64_t m, const float* sums) { copy_panel(sums, to + m * ld); });
        }
        for (int64_t r = 0; r < rows; ++r) {
          const X* x = e.x(begin + r, g);
          const float *of_g = b.u + r * e.ldf, *w = b.w + r * ldw;
          float *of_logits = grad_logits + ((begin + r) * e.G + g) * L, mean = 0;
          for (int64_t l = 0; l < L; ++l) {
            const T* s = e.s(begin + r, g) + l * D;
            T* of_u = du + (l * most + r) * e.ldd;
            Vec dot = {};
            by_vecs(D, [&](int64_t i, auto count) {
              const Vec value = load_first(s + i, count), of_gate = load_first(of_g + i, count) * load_first(x + i, count);
              dot += of_gate * value;
              store_first(w[l] * of_gate * slope<kDoubleSigmoidOutput>(value), of_u + i, count);
            });
            of_logits[l] = add_lanes(dot);
            mean += w[l] * of_logits[l];
          }
          for (int64_t l = 0; l < L; ++l) of_logits[l] = w[l] * (of_logits[l] - mean);
          if (!grad_x) continue;
          float* dx = b.gate + r * e.ldf;
          by_vecs(D, [&](int64_t i, auto count) { store_first(load_first(dx + i, count) * load_first(of_g + i, count), dx + i, count); });
        }

        float* of_up = sum + outer_size(L * R, D);
        for (int64_t l = 0; l < L; ++l, of_up += outer_size(D, R)) {
          T* of_u = du + l * most * e.ldd;
          zero_tail(of_u, e.ldd, rows, D);
          pack_block<T>(e.h(begin, g) + l * R, e.ldh, R, rows, packed);
          add_outer<T>(of_u, e.ldd, D, packed, R, rows, add, transposed, of_up);
          for (int64_t n = 0; n < R; n += kPanel) {
            multiply<T>(of_u, e.ldd, rows, panel_of(up, g * L + l, n, R, D), words<T>(D), [&](int64_t m, const float* grad) {
              store_panel(grad, dh + m * e.ldr + l * R + n, std::min(kPanel, R - n));
            });
          }
        }
        zero_tail<T>(dh, e.ldr, rows, L * R);
        pack_block<T>(b.x, e.ldd, D, rows, packed);
        add_outer<T>(dh, e.ldr, L * R, packed, D, rows, add, transposed, sum);
        if (!grad_x) return;
        for (int64_t n = 0; n < D; n += kPanel) {
          multiply<T>(dh, e.ldr, rows, panel_of(down, g, n, D, L * R), words<T>(L * R),
                      [to = b.gate + n, ld = e.ldf](int64_t m, const float* sums) { add_panel(sums, to + m * ld); });
        }
        for (int64_t r = 0; r < rows; ++r) {
          const float* from = b.gate + r * e.ldf;
          float* to = grad_x + e.offset(begin + r, g);
          by_vecs(D, [&](int64_t i, auto count) { store_first(load_first(to + i, count) + load_first(from + i, count), to + i, count); });
        }
      });
    }
  }

 private:
  // The panel from column n on of a matrix of `columns` columns that was packed over its `depth` units.
  static const float* panel_of(const Tensor& packed, int64_t matrix, int64_t n, int64_t columns, int64_t depth) {
    return packed.const_data_ptr<float>() + (matrix * panels(columns) + n / kPanel) * panel_words<T>(depth);
  }
};

// The sums of all parts as gradients of a stack of matrices [m, n] whose first sums lie at `from`, `step` apart.
template <typename T>
void gather_outer(const Tensor& parts, const std::vector<int64_t>& at, int64_t m, int64_t n, T* grad) {
  const float* sums = parts.const_data_ptr<float>();
  const int64_t total = parts.size(1);
  at::parallel_for(0, at.size() * m, std::max<int64_t>(1, 16384 / n), [&](int64_t from, int64_t to) {
    for (int64_t i = from; i < to; ++i) {
      for (int64_t p = 0; p < panels(n); ++p) {
        const float* first = sums + at[i / m] + (p * m + i % m) * kPanel;
        over_panel(std::min(kPanel, n - p * kPanel), [&](int64_t c, auto count) {
          Vec sum = load(first + c);
          for (int64_t part = 1; part < parts.size(0); ++part) sum += load(first + part * total + c);
          store_first(sum, grad + i * n + p * kPanel + c, count);
        });
      }
    }
  });
}

}  // namespace
