// Gradients of the operations that a step of a small model calls most: told in Python, each call of one costs more than its kernel.
// The other operations' are in cpu.py. Included behind the operations.

#pragma once

#include <torch/csrc/autograd/custom_function.h>

namespace {

using torch::autograd::AutogradContext;
using torch::autograd::variable_list;

// An operation by its name, called as any other: tracing and what else is on see the call.
template <typename F>
c10::TypedOperatorHandle<F> operation(const char* name) {
  return c10::Dispatcher::singleton().findSchemaOrThrow(name, "").typed<F>();
}

Tensor tensor_or_none(const OptionalTensor& t) { return t.has_value() ? *t : Tensor(); }
OptionalTensor optional(const Tensor& t) { return t.defined() ? OptionalTensor(t) : OptionalTensor(); }
Tensor shaped_as(const Tensor& grad, const Tensor& like) { return like.defined() ? grad.view_as(like) : Tensor(); }

// An activation whose slope its output tells, and what the backward is then told; −1: another one.
int64_t from_output(int64_t activation) {
  switch (activation) {
    case kNone: return kNone;
    case kRelu: return kRelu;
    case kDoubleSigmoid: return kDoubleSigmoidOutput;
    default: return -1;
  }
}

struct NormAct : torch::autograd::Function<NormAct> {
  static variable_list forward(AutogradContext* ctx, const Tensor& z, int64_t blocks, const OptionalTensor& offsets,
                               const OptionalTensor& bias, const OptionalTensor& scale, const OptionalTensor& shift,
                               const OptionalTensor& running_mean, const OptionalTensor& running_var, bool training, double eps,
                               int64_t activation) {
    const at::AutoDispatchBelowADInplaceOrView below;
    static const auto op = operation<decltype(norm_act)>("recsys_moe::norm_act");
    const auto [y, mean, var] = op.call(z, blocks, offsets, bias, scale, shift, running_mean, running_var, training, eps, activation);
    // Without a norm y may say all that the gradient needs, and the next layer keeps it anyway.
    const bool by_output = !scale.has_value() && from_output(activation) >= 0;
    ctx->mark_non_differentiable({mean, var});
    ctx->save_for_backward({by_output ? y : z, tensor_or_none(offsets), tensor_or_none(bias), tensor_or_none(scale), tensor_or_none(shift), mean, var});
    ctx->saved_data["blocks"] = blocks;
    ctx->saved_data["training"] = training;
    ctx->saved_data["eps"] = eps;
    ctx->saved_data["activation"] = by_output ? from_output(activation) : activation;
    ctx->saved_data["by_output"] = by_output;
    return {y, mean, var};
  }
  static variable_list backward(AutogradContext* ctx, const variable_list& grads) {
    static const auto op = operation<decltype(norm_act_backward)>("recsys_moe::norm_act_backward");
    const auto saved = ctx->get_saved_variables();
    const Tensor &z = saved[0], &offsets = saved[1], &bias = saved[2], &scale = saved[3], &shift = saved[4];
    const bool by_output = ctx->saved_data["by_output"].toBool();  // the bias is in it
    const auto [grad_z, grad_bias, grad_scale, grad_shift] =
        op.call(grads[0], z, ctx->saved_data["blocks"].toInt(), optional(offsets),
                optional(by_output && bias.defined() ? at::zeros_like(bias) : bias), optional(scale), optional(shift), saved[5], saved[6],
                ctx->saved_data["training"].toBool(), ctx->saved_data["eps"].toDouble(), ctx->saved_data["activation"].toInt());
    const Tensor none;
    return {grad_z, none, none, shaped_as(grad_bias, bias), shaped_as(grad_scale, scale), shaped_as(grad_shift, shift), none, none, none, none, none};
  }
};

struct ExpertLinear : torch::autograd::Function<ExpertLinear> {
  static Tensor forward(AutogradContext* ctx, const Tensor& x, const OptionalTensor& gate, const Tensor& weight, at::IntArrayRef source,
                        const OptionalTensor& bias, int64_t activation) {
    const at::AutoDispatchBelowADInplaceOrView below;
    static const auto op = operation<decltype(expert_linear)>("recsys_moe::expert_linear");
    const Tensor y = op.call(x, gate, weight, source, bias, activation);
    const bool plain = !bias.has_value() && activation == kNone;
    ctx->save_for_backward({x, tensor_or_none(gate), weight, tensor_or_none(bias), plain ? Tensor() : y});
    ctx->saved_data["source"] = source.vec();
    ctx->saved_data["activation"] = activation;
    return y;
  }
  static variable_list backward(AutogradContext* ctx, const variable_list& grads) {
    static const auto op = operation<decltype(expert_linear_backward)>("recsys_moe::expert_linear_backward");
    static const auto before = operation<decltype(norm_act_backward)>("recsys_moe::norm_act_backward");
    const auto saved = ctx->get_saved_variables();
    const Tensor &x = saved[0], &gate = saved[1], &weight = saved[2], &bias = saved[3], &y = saved[4], none;
    Tensor grad = grads[0], grad_bias;
    if (y.defined()) {  // the bias is in y, which tells the slope
      const int64_t kind = from_output(ctx->saved_data["activation"].toInt());
      TORCH_CHECK_NOT_IMPLEMENTED(kind >= 0, "the output of activation ", ctx->saved_data["activation"].toInt(), " does not tell its slope");
      const Tensor no_moments = at::empty({0}, grad.options().dtype(at::kFloat));
      std::tie(grad, grad_bias, std::ignore, std::ignore) =
          before.call(grad, y, weight.size(0), std::nullopt, optional(bias.defined() ? at::zeros_like(bias) : none), std::nullopt, std::nullopt,
                      no_moments, no_moments, false, 0.0, kind);
    }
    const bool need_x = ctx->needs_input_grad(0);
    const auto [grad_x, grad_gate, grad_w] = op.call(grad, x, optional(gate), weight, ctx->saved_data["source"].toIntVector(), need_x);
    return {need_x ? grad_x : none, gate.defined() ? grad_gate : none, grad_w, none, shaped_as(grad_bias, bias), none};
  }
};

struct GateMix : torch::autograd::Function<GateMix> {
  static variable_list forward(AutogradContext* ctx, const Tensor& logits, const Tensor& experts, const OptionalTensor& mask,
                               const OptionalTensor& residual) {
    const at::AutoDispatchBelowADInplaceOrView below;
    static const auto op = operation<decltype(gate_mix)>("recsys_moe::gate_mix");
    const auto [mixed, softmax] = op.call(logits, experts, mask, residual);
    ctx->mark_non_differentiable({softmax});
    ctx->save_for_backward({softmax, experts, tensor_or_none(mask), tensor_or_none(residual)});
    return {mixed, softmax};
  }
  static variable_list backward(AutogradContext* ctx, const variable_list& grads) {
    static const auto op = operation<decltype(gate_mix_backward)>("recsys_moe::gate_mix_backward");
    const auto saved = ctx->get_saved_variables();
    const auto [on_logits, on_residual, on_experts] = op.call(grads[0], saved[0], saved[1], optional(saved[2]), optional(saved[3]));
    return {on_logits, on_experts, Tensor(), saved[3].defined() ? on_residual : Tensor()};
  }
};

}  // namespace

TORCH_LIBRARY_IMPL(recsys_moe, Autograd, m) {
  m.impl("norm_act", [](const Tensor& z, int64_t blocks, const OptionalTensor& offsets, const OptionalTensor& bias, const OptionalTensor& scale,
                        const OptionalTensor& shift, const OptionalTensor& running_mean, const OptionalTensor& running_var, bool training,
                        double eps, int64_t activation) {
    const auto out = NormAct::apply(z, blocks, offsets, bias, scale, shift, running_mean, running_var, training, eps, activation);
    return std::make_tuple(out[0], out[1], out[2]);
  });
  m.impl("expert_linear", [](const Tensor& x, const OptionalTensor& gate, const Tensor& weight, at::IntArrayRef source,
                             const OptionalTensor& bias, int64_t activation) {
    return ExpertLinear::apply(x, gate, weight, source, bias, activation);
  });
  m.impl("gate_mix", [](const Tensor& logits, const Tensor& experts, const OptionalTensor& mask, const OptionalTensor& residual) {
    const auto out = GateMix::apply(logits, experts, mask, residual);
    return std::make_tuple(out[0], out[1]);
  });
}
