// Launches of the CUDA kernels of igdm (igdm.cu), for igdm_cuda.cpp.
#pragma once

#include <cuda_runtime_api.h>

#include "../cpu/igdm.h"  // struct Igdm: the CPU and the CUDA kernels take the same arguments

namespace ltat {

// Writes the loss of each row to args.loss.
cudaError_t igdm_forward_rows_cuda(const Igdm& args, cudaStream_t stream);
// Writes args.grad_plus and args.grad_minus.
cudaError_t igdm_backward_rows_cuda(const Igdm& args, cudaStream_t stream);
// *result = scale * sum(row_losses), summed in a fixed order.
cudaError_t sum_rows_cuda(const float* row_losses, int64_t rows, float scale, float* result, cudaStream_t stream);

}  // namespace ltat
