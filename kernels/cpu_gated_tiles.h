// cpu_gated.h's layer at inference by AMX tiles, where the rows of the batch are columns: the weights are read as they lie, each once
// while all rows pass, and what one product leaves, unit by unit, is the panel that the next one reads. Only x is packed.
#pragma once

#include "cpu_gated.h"
#include "cpu_lanes.h"

#if RECSYS_MOE_AMX

namespace {

constexpr int64_t kPassing = 8;  // panels: what a thread holds of them is of the order of its second-level cache

// Units for all of a panel's columns, as words of two: value(at, word, half), where a unit's vector lies in [unit][kPanel], where its
// words lie in `to`, and which half of them it is.
template <typename F>
inline void as_pairs(int64_t units, float* to, F&& value) {
  constexpr std::integral_constant<int, 0> low;
  constexpr std::integral_constant<int, 1> high;
  for (int64_t i = 0; i < (units + 1) / 2 * kPanel; i += kLanes) {
    const int64_t at = i / kPanel * 2 * kPanel + i % kPanel;
    bf16 first[kLanes], second[kLanes] = {};
    store(value(at, i, low), first);
    if (at + kPanel < units * kPanel) store(value(at + kPanel, i, high), second);
    store(std::bit_cast<Vec>(load_halves(first) | load_halves(second) << 16), to + i);
  }
}

// y `[B, E, out]` = act(z·a + c); a, c null: 1, 0.
template <typename X>
void gated_tiles(const Tensor& x, const Tensor& logits, const Tensor& down, const Tensor& up, const Tensor& weight,
                 at::IntArrayRef source, const float* a, const float* c, int64_t activation, bf16* y) {
  const int64_t B = x.size(0), S = x.size(1), D = x.size(2), G = logits.size(1), L = logits.size(2), R = down.size(1);
  const int64_t experts = weight.size(0), units = weight.size(1), out = activation == kSwiglu ? units / 2 : units;
  const int64_t each = panels(B), size_x = batch_panel_words(D), size_h = batch_panel_words(R), threads = at::get_num_threads();
  // Dealt are the panels of all groups, one group's after the other's.
  at::parallel_for(0, threads, 1, [&](int64_t from, int64_t to) {
    const int64_t first = G * each * from / threads, last = G * each * to / threads, most = std::min(each, kPassing);
    const Room<bf16> rows(kPanel * D);
    const Room<float> g(most * size_x), h(L * most * size_h), w(L * most * kPanel);
    // Zeros behind the last unit and the last row, as pack_batch leaves them in g: what lies there is multiplied too, and denormal
    // numbers are slow.
    std::fill<float*>(h, h + L * most * size_h, 0.0f);
    std::fill<float*>(w, w + L * most * kPanel, 0.0f);
    std::vector<float> soft(whole_vecs(L));
    alignas(64) float sums[kSums * kPanel] = {}, gate[kSums * kPanel] = {};
    for (int64_t at = first, next; at < last; at = next) {
      const int64_t group = at / each, begin = at % each * kPanel;
      next = std::min({last, (group + 1) * each, at + most});
      const int64_t across = next - at, count = std::min(B - begin, across * kPanel);
      for (int64_t r = 0; r < count; ++r) {
        convert(data<X>(x) + ((begin + r) * S + source[group]) * D, rows + r % kPanel * D, D);
        softmax_row(logits.const_data_ptr<float>() + ((begin + r) * G + group) * L, soft.data(), L);
        for (int64_t l = 0; l < L; ++l) w[(r / kPanel * L + l) * kPanel + r % kPanel] = soft[l];
        if (r % kPanel == kPanel - 1 || r == count - 1) pack_batch(rows, D, r % kPanel + 1, D, g + r / kPanel * size_x);
      }
      Tiles tiles;
      // Sums [row][kPanel] of `here` rows of a weight times panel q; a share of as many rows behind them is fetched meanwhile. What lies
      // behind a weight's last row is another tensor: fetching it is of no use, and does no harm.
      auto product = [&](const bf16* own, int64_t here, int64_t depth, const float* panel, int64_t q) {
        const int64_t bytes = depth * sizeof(bf16);
        const char* p = reinterpret_cast<const char*>(own);
        tiles.shape(here);
        tiles_block({p, bytes, bytes, panel, panel + bytes / 64 * kTile * kPanel, p + here * bytes, here * q / across,
                     here * (q + 1) / across}, here, std::min(kPanel, count - q * kPanel), sums, kPanel, false);
      };
      for (int64_t l = 0; l < L; ++l) {
        for (int64_t n = 0; n < R; n += kSums) {
          const int64_t here = std::min<int64_t>(kSums, R - n);
          for (int64_t q = 0; q < across; ++q) {
            product(data<bf16>(down) + ((group * L + l) * R + n) * D, here, D, g + q * size_x, q);
            as_pairs(here, h + (l * most + q) * size_h + n / 2 * kPanel, [&](int64_t i, int64_t, auto) { return load(sums + i); });
          }
        }
      }
      for (int64_t n = 0; n < D; n += kSums) {  // x becomes g
        const int64_t here = std::min<int64_t>(kSums, D - n);
        for (int64_t q = 0; q < across; ++q) {
          for (int64_t l = 0; l < L; ++l) {
            product(data<bf16>(up) + ((group * L + l) * D + n) * R, here, R, h + (l * most + q) * size_h, q);
            const float* share = w + (q * L + l) * kPanel;
            for (int64_t i = 0; i < here * kPanel; i += kLanes) {
              const Vec value = load(share + i % kPanel) * activate<kDoubleSigmoid, bf16>(load(sums + i));
              store(l ? load(gate + i) + value : value, gate + i);
            }
          }
          float* pairs = g + q * size_x + n / 2 * kPanel;
          as_pairs(here, pairs, [&](int64_t i, int64_t word, auto half) {
            const Vec pair = load(pairs + word);
            return load(gate + i) * (half ? high_half(pair) : low_half(pair));
          });
        }
      }
      for (int64_t e = group * (experts / G), last = e + experts / G - 1; e <= last; ++e) {
        const bf16* own = data<bf16>(weight) + e * units * D;
        tiles_layer(g, count, own, units, D, 0, out, a ? a + e * units : nullptr, c ? c + e * units : nullptr, activation,
                    y + (begin * experts + e) * out, experts * out, e < last ? own + units * D : nullptr);
      }
    }
  });
}

}  // namespace

#endif
