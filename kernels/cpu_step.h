// Parts of a decoder's layer at inference, each in one call. At one token an operation takes 5 to 100 µs, and the way from one to the next
// through PyTorch and Python, whose code the streams of weights have swept from the caches, as long again.
#pragma once

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

// Where a step's tokens lie and how they are rotated: what every layer's attention is given alike.
struct CachedStep {
  const Tensor &turn, &cache, &starts, &lengths, &blocks;
  bool interleaved;
  Tensor attend(const Tensor& q, const Tensor& kv, int64_t kv_heads, int64_t value_at, int64_t value_dim, double scale, int64_t window) const {
    return paged_attention(q, kv, turn, interleaved, cache, starts, lengths, blocks, kv_heads, value_at, value_dim, scale, window);
  }
};

// x + W_o·attention(W_qkv·norm(x)), the heads' queries and keys normalised and all three bounded where there are the numbers for it.
Tensor grouped_attention(const Tensor& x, const Tensor& norm, double eps, const Tensor& qkv, const OptionalTensor& qkv_bias,
                         const OptionalTensor& q_norm, const OptionalTensor& k_norm, double qk_eps, std::optional<double> clip,
                         const Tensor& out, const OptionalTensor& out_bias, int64_t heads, int64_t kv_heads, double scale, int64_t window,
                         const Tensor& turn, bool interleaved, const Tensor& cache, const Tensor& starts, const Tensor& lengths,
                         const Tensor& blocks) {
  const int64_t queries = out.size(1), dim = queries / heads, keys = kv_heads * dim;
  Tensor z = project(rms_norm(x, norm, eps), qkv, qkv_bias);
  if (q_norm.has_value())
    z = at::cat({rms_norm(z.narrow(1, 0, queries), *q_norm, qk_eps), rms_norm(z.narrow(1, queries, keys), *k_norm, qk_eps),
                 z.narrow(1, queries + keys, keys)}, 1);
  if (clip.has_value()) z.clamp_(-*clip, *clip);
  const CachedStep step{turn, cache, starts, lengths, blocks, interleaved};
  const Tensor q = z.narrow(1, 0, queries).view({x.size(0), heads, dim}), kv = z.narrow(1, queries, 2 * keys);
  return project(step.attend(q, kv, kv_heads, keys, dim, scale, window).flatten(1), out, out_bias).add_(x);
}

// The same of latent attention in its absorbed form: `down` makes queries (or their own latent, which `q_norm` and `q_up` make queries of),
// the latent and the key's rotary part.
Tensor latent_attention(const Tensor& x, const Tensor& norm, double eps, const Tensor& down, const OptionalTensor& q_norm,
                        const OptionalTensor& q_up, const Tensor& latent_norm, double latent_eps, const Tensor& w_uk, const Tensor& w_uv,
                        const Tensor& out, double scale, const Tensor& turn, bool interleaved, const Tensor& cache, const Tensor& starts,
                        const Tensor& lengths, const Tensor& blocks) {
  const int64_t heads = w_uk.size(0), latent = w_uk.size(1), nope = w_uk.size(2), rope = turn.size(1);
  const int64_t first = down.size(0) - latent - rope;
  const Tensor z = project(rms_norm(x, norm, eps), down, {});
  Tensor q = z.narrow(1, 0, first);
  if (q_norm.has_value()) q = project(rms_norm(q, *q_norm, latent_eps), *q_up, {});
  q = q.view({x.size(0), heads, nope + rope});
  q = at::cat({project_heads(q.narrow(2, 0, nope), w_uk), q.narrow(2, nope, rope)}, 2);
  const Tensor kv = at::cat({rms_norm(z.narrow(1, first, latent), latent_norm, latent_eps), z.narrow(1, first + latent, rope)}, 1);
  const CachedStep step{turn, cache, starts, lengths, blocks, interleaved};
  return project(project_heads(step.attend(q, kv, 1, 0, latent, scale, 0), w_uv).flatten(1), out, {}).add_(x);
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

// y = x + Σ_k w_k·expert_k(norm(x)) over the k best of a router's SwiGLU experts and, behind those, `shared` ones that every row has with
// weight 1; and the routing without these.
std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> routed_experts(
    const Tensor& x, const Tensor& norm, double eps, const Tensor& router, const OptionalTensor& bias, int64_t k, int64_t scoring,
    bool renormalize, const OptionalTensor& correction, double scale, at::TensorList weights,
    const c10::List<OptionalTensor>& weight_scales, int64_t shared) {
  const Tensor h = rms_norm(x, norm, eps);
  const int64_t routed = weights[0].size(0) - shared;
  auto [ids, gates, order, offsets, logits] = route(h, router, bias, routed, k, scoring, renormalize, correction, scale);
  Tensor all_gates = gates, all_order = order, all_offsets = offsets;
  if (shared) {
    const Tensor behind = at::arange(routed, routed + shared, ids.options()).expand({x.size(0), shared});
    all_gates = at::cat({gates, at::ones({x.size(0), shared}, gates.options())}, 1);
    std::tie(all_order, all_offsets) = sort_by_expert(at::cat({ids, behind}, 1), routed + shared);
  }
  const c10::List<OptionalTensor> none({OptionalTensor(), OptionalTensor()});
  const Tensor y = sparse_forward(h, weights, weight_scales, none, none, none, none, none, {0.0, 0.0}, {kSwiglu, kNone}, all_gates,
                                  all_order, all_offsets, false);
  return {y.add_(x), ids, gates, order, offsets, logits};
}

}  // namespace
