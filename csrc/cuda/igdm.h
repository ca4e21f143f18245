// The CUDA kernels of igdm, as seen by the glue (igdm_cuda.cpp).
#pragma once

#include <cuda_runtime_api.h>

#include "../args.h"

namespace ltat {

// Row losses to args.loss.
cudaError_t igdm_forward_rows_cuda(const Igdm& args, cudaStream_t stream);
// args.grad_plus and args.grad_minus from args.grad_loss.
cudaError_t igdm_backward_rows_cuda(const Igdm& args, cudaStream_t stream);
// *result = scale * sum(row_losses), the same whenever it is run.
cudaError_t sum_rows_cuda(const float* row_losses, int64_t rows, float scale, float* result, cudaStream_t stream);

}  // namespace ltat
