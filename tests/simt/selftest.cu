// Kernels that test the shim itself: right ones must agree, planted faults must be noticed.
#include "cuda/mma.cuh"

using torch::stable::Tensor;

namespace {

enum Fault { none, missing_barrier, off_by_one, divergent_barrier };

// Sum of each row of x [rows, 64] by a tree in shared memory.
template <int kFault>
__global__ void row_sum(const float* x, float* out) {
  PSF_SHARED(float, tile, 64);
  const unsigned t = threadIdx.x;
  tile[t + (kFault == off_by_one ? 1 : 0)] = x[blockIdx.x * 64 + t];
  if (kFault != missing_barrier) __syncthreads();
  for (unsigned step = 32; step > 0; step /= 2) {
    if (t < step) tile[t] += tile[t + step];
    if (kFault == divergent_barrier && t >= step) continue;
    __syncthreads();
    if (kFault == divergent_barrier) __syncwarp();
  }
  if (t == 0) out[blockIdx.x] = tile[0];
}

// The same by warp shuffles and one atomic a warp.
__global__ void row_sum_shuffle(const float* x, float* out) {
  float value = x[blockIdx.x * 64 + threadIdx.x];
  for (int bits = 16; bits > 0; bits /= 2) value += __shfl_xor_sync(0xffffffffu, value, bits);
  if (threadIdx.x % 32 == 0) atomicAdd(out + blockIdx.x, value);
}

// x [24, 8]: the first 16 rows times the transpose of the last 8, [16, 8].
__global__ void tile_product(const float* x, float* out) {
  const int row = threadIdx.x / 4, column = threadIdx.x % 4;
  const float a[4] = {x[row * 8 + column], x[(row + 8) * 8 + column], x[row * 8 + column + 4],
                      x[(row + 8) * 8 + column + 4]};
  const float b[2] = {x[(16 + row) * 8 + column], x[(16 + row) * 8 + column + 4]};
  float d[4] = {};
  psf::mma(d, a, b, d);
  for (int i = 0; i < 4; ++i) out[(row + i / 2 * 8) * 8 + column * 2 + i % 2] = d[i];
}

Tensor selftest(const Tensor& x, int64_t kind) {
  Tensor out = torch::stable::new_zeros(x, {kind == 5 ? 128 : x.size(0)});
  const float* in = static_cast<const float*>(x.const_data_ptr());
  float* result = static_cast<float*>(out.mutable_data_ptr());
  psf::Launch launch(x);
  const dim3 grid(static_cast<unsigned>(x.size(0)));
  switch (kind) {
    case 0:
      launch(row_sum<none>, grid, 64, 0, in, result);
      break;
    case 1:
      launch(row_sum<missing_barrier>, grid, 64, 0, in, result);
      break;
    case 2:
      launch(row_sum<off_by_one>, grid, 64, 0, in, result);
      break;
    case 3:
      launch(row_sum<divergent_barrier>, grid, 64, 0, in, result);
      break;
    case 5:
      launch(tile_product, 1, 32, 0, in, result);
      break;
    default:
      launch(row_sum_shuffle, grid, 64, 0, in, result);
      break;
  }
  return out;
}

}  // namespace

PSF_CUDA_LIBRARY(m) { m.impl("selftest", TORCH_BOX(&selftest)); }
