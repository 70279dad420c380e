// A decoder's layers at inference, all in one call. At one token an operation takes 5 to 100 µs, and the way from one to the next
// through PyTorch and Python, whose code the streams of weights have swept from the caches, as long again.
#pragma once

#include <torch/custom_class.h>

#include <functional>

namespace {

// One expert that every row has: y `[B, H]`.
Tensor project(const Tensor& x, const Tensor& weight, const OptionalTensor& bias) {
  return dense_forward(x, {}, weight.unsqueeze(0), {0}, bias, {}, {}, {}, {}, 0, kNone).squeeze(1);
}

// A matrix for each head: x `[B, heads, D]`, weight `[heads, H, D]`.
Tensor project_heads(const Tensor& x, const Tensor& weight) {
  std::vector<int64_t> own(weight.size(0));
  std::iota(own.begin(), own.end(), 0);
  return dense_forward(x, {}, weight, own, {}, {}, {}, {}, {}, 0, kNone);
}

// Logits of a gate, the k best of `experts`, and their plan: (ids, weights, order, offsets, logits).
std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> route(const Tensor& x, const Tensor& weight, const OptionalTensor& bias,
                                                         int64_t experts, int64_t k, int64_t scoring, bool renormalize,
                                                         const OptionalTensor& correction, double scale) {
  const Tensor logits = project(x, weight.to(at::kFloat), bias).view({-1, experts});
  auto [ids, weights, scores] = route_topk(logits, k, scoring, renormalize, correction, {});
  if (scale != 1) weights.mul_(scale);
  auto [order, offsets] = sort_by_expert(ids, experts);
  return {ids, weights, order, offsets, logits};
}

// Where a step's tokens lie and how they are rotated: what every layer's attention is given alike.
struct CachedStep {
  const Tensor &turn, &starts, &lengths, &blocks;
  bool interleaved;
  Tensor attend(const Tensor& q, const Tensor& kv, const Tensor& cache, int64_t kv_heads, int64_t value_at, int64_t value_dim, double scale,
                int64_t window) const {
    return paged_attention(q, kv, turn, interleaved, cache, starts, lengths, blocks, kv_heads, value_at, value_dim, scale, window);
  }
};

// y + x, into y.
Tensor add_to(const Tensor& y, const Tensor& x_) {
  const Tensor x = x_.contiguous();
  with_type(y, [&](auto t) {
    auto *to = data<decltype(t)>(y), *from = data<decltype(t)>(x);
    at::parallel_for(0, y.numel(), 65536, [&](int64_t begin, int64_t end) {
      by_vecs(end - begin, [&](int64_t i, int64_t n) {
        store_first(load_first(to + begin + i, n) + load_first(from + begin + i, n), to + begin + i, n);
      });
    });
  });
  return y;
}

// Rows `[R, K]`, behind each the values from `first` on, `step` apart, `count` of them.
template <typename T>
Tensor append(const Tensor& rows, int64_t count, T first, T step) {
  const int64_t k = rows.size(1);
  Tensor y = at::empty({rows.size(0), k + count}, rows.options());
  for (int64_t r = 0; r < rows.size(0); ++r) {
    T* to = std::copy(data<T>(rows) + r * k, data<T>(rows) + (r + 1) * k, data<T>(y) + r * (k + count));
    for (int64_t i = 0; i < count; ++i) to[i] = first + i * step;
  }
  return y;
}

// Halves of layers in turn, each bound to its weights, and to its cache where it is an attention.
struct FusedLayers : torch::CustomClassHolder {
  using Plans = std::vector<Tensor>;  // of each router: ids, weights, order, offsets, logits
  std::vector<std::function<Tensor(const Tensor&, const CachedStep&, Plans&)>> halves;

  std::tuple<Tensor, Plans> run(Tensor x, const Tensor& turn, bool interleaved, const Tensor& starts, const Tensor& lengths,
                                const Tensor& blocks) const {
    const CachedStep step{turn, starts, lengths, blocks, interleaved};
    Plans plans;
    for (const auto& half : halves) x = half(x, step, plans);
    return {x, plans};
  }

  // x + W_o·attention(W_qkv·norm(x)), the heads' queries and keys normalised and all three bounded where there are the numbers for it.
  void grouped_attention(Tensor cache, Tensor norm, double eps, Tensor qkv, OptionalTensor qkv_bias, OptionalTensor q_norm,
                         OptionalTensor k_norm, double qk_eps, std::optional<double> clip, Tensor out, OptionalTensor out_bias,
                         int64_t heads, int64_t kv_heads, double scale, int64_t window) {
    const int64_t queries = out.size(1), dim = queries / heads, keys = kv_heads * dim;
    halves.push_back([=](const Tensor& x, const CachedStep& step, Plans&) {
      Tensor z = project(rms_norm(x, norm, eps), qkv, qkv_bias);
      if (q_norm.has_value())
        z = at::cat({rms_norm(z.narrow(1, 0, queries), *q_norm, qk_eps), rms_norm(z.narrow(1, queries, keys), *k_norm, qk_eps),
                     z.narrow(1, queries + keys, keys)}, 1);
      if (clip.has_value()) z.clamp_(-*clip, *clip);
      const Tensor q = z.narrow(1, 0, queries).view({x.size(0), heads, dim}), kv = z.narrow(1, queries, 2 * keys);
      return add_to(project(step.attend(q, kv, cache, kv_heads, keys, dim, scale, window).flatten(1), out, out_bias), x);
    });
  }

  // The same of latent attention in its absorbed form: `down` makes queries (or their own latent, which `q_norm` and `q_up` make queries
  // of), the latent and the key's rotary part.
  void latent_attention(Tensor cache, Tensor norm, double eps, Tensor down, OptionalTensor q_norm, OptionalTensor q_up,
                        Tensor latent_norm, double latent_eps, Tensor w_uk, Tensor w_uv, Tensor out, double scale) {
    const int64_t heads = w_uk.size(0), latent = w_uk.size(1), nope = w_uk.size(2), rope = cache.size(2) - latent;
    const int64_t first = down.size(0) - latent - rope;
    halves.push_back([=](const Tensor& x, const CachedStep& step, Plans&) {
      const Tensor z = project(rms_norm(x, norm, eps), down, {});
      Tensor q = z.narrow(1, 0, first);
      if (q_norm.has_value()) q = project(rms_norm(q, *q_norm, latent_eps), *q_up, {});
      q = q.view({x.size(0), heads, nope + rope});
      q = at::cat({project_heads(q.narrow(2, 0, nope), w_uk), q.narrow(2, nope, rope)}, 2);
      const Tensor kv = at::cat({rms_norm(z.narrow(1, first, latent), latent_norm, latent_eps), z.narrow(1, first + latent, rope)}, 1);
      return add_to(project(project_heads(step.attend(q, kv, cache, 1, 0, latent, scale, 0), w_uv).flatten(1), out, {}), x);
    });
  }

  // x + one SwiGLU expert of norm(x), that every row has.
  void dense_expert(Tensor norm, double eps, Tensor gate_up, OptionalTensor gate_up_bias, Tensor down, OptionalTensor down_bias) {
    halves.push_back([=](const Tensor& x, const CachedStep&, Plans&) {
      const Tensor h = dense_forward(rms_norm(x, norm, eps), {}, gate_up, {0}, gate_up_bias, {}, {}, {}, {}, 0, kSwiglu);
      return add_to(dense_forward(h, {}, down, {0}, down_bias, {}, {}, {}, {}, 0, kNone).squeeze(1), x);
    });
  }

  // x + Σ_k w_k·expert_k(norm(x)) over the k best of a router's SwiGLU experts and, behind those, `shared` ones that every row has with
  // weight 1.
  void routed_experts(Tensor norm, double eps, Tensor router, OptionalTensor bias, int64_t k, int64_t scoring, bool renormalize,
                      OptionalTensor correction, double scale, std::vector<Tensor> weights, c10::List<OptionalTensor> weight_scales,
                      int64_t shared) {
    const c10::List<OptionalTensor> none({OptionalTensor(), OptionalTensor()});
    const int64_t routed = weights[0].size(0) - shared;
    halves.push_back([=](const Tensor& x, const CachedStep&, Plans& plans) {
      const Tensor h = rms_norm(x, norm, eps);
      auto [ids, gates, order, offsets, logits] = route(h, router, bias, routed, k, scoring, renormalize, correction, scale);
      plans.insert(plans.end(), {ids, gates, order, offsets, logits});
      if (shared) {
        gates = append<float>(gates, shared, 1, 0);
        std::tie(order, offsets) = sort_by_expert(append<int32_t>(ids, shared, routed, 1), routed + shared);
      }
      return add_to(sparse_forward(h, weights, weight_scales, none, none, none, none, none, {0.0, 0.0}, {kSwiglu, kNone}, gates, order,
                                   offsets, false), x);
    });
  }
};

}  // namespace
