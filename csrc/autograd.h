// Helpers of the autograd nodes of the ops. A node gives eager calls the gradient that ltat_fast/ops registers from
// Python, at a fraction of the cost. It calls the kernel of the tensors' device through the dispatcher.
#pragma once

#include <ATen/core/LegacyTypeDispatch.h>
#include <ATen/core/dispatch/Dispatcher.h>
#include <torch/csrc/autograd/custom_function.h>

namespace ltat {

using torch::autograd::AutogradContext;
using torch::autograd::variable_list;

// The dispatcher's handle of the op `name`. `function` has the signature of the op.
template <typename F>
auto find_op(const char* name, F* function) {
  return c10::Dispatcher::singleton().findSchemaOrThrow(name, "").typed<F>();
}

// Calls a backward op without autograd. With create_graph=True it calls the op with autograd: the formula that
// ltat_fast/ops registered for it then raises an error.
template <typename Op, typename... Args>
auto call_backward(const Op& op, const Args&... args) {
  if (at::GradMode::is_enabled()) return op.call(args...);
  const at::AutoDispatchBelowADInplaceOrView below_autograd;
  return op.call(args...);
}

}  // namespace ltat
