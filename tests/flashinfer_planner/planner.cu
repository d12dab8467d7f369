// FlashInfer's own host planner, from its installed headers, as a library that runs without a GPU.
// The device is what set_device said; copies to it are copies in host memory (runtime.cpp).
#include <flashinfer/attention/scheduler.cuh>

#include <cstdint>
#include <iostream>
#include <stdexcept>

namespace flashinfer {
// Only its address is taken, for the occupancy.
template <PosEncodingMode, uint32_t, uint32_t, uint32_t, uint32_t, uint32_t, uint32_t, typename, typename Params>
__global__ void BatchDecodeWithPagedKVCacheKernel(const __grid_constant__ Params params) {}
}  // namespace flashinfer

using namespace flashinfer;

struct Params {
  using DTypeKV = half;
  using IdType = int32_t;
};
struct Variant {};

template <uint32_t HEAD_DIM>
static void decode_plan(DecodePlanInfo& info, uint32_t group, int32_t* indptr, uint32_t batch, uint32_t heads,
                        void* floats, size_t float_bytes, void* ints, void* pinned, size_t bytes) {
  cudaError_t status = cudaSuccess;
  DISPATCH_GQA_GROUP_SIZE(group, GROUP_SIZE, {
    auto estimate =
        BatchDecodeWithPagedKVCacheWorkEstimationDispatched<GROUP_SIZE, HEAD_DIM, PosEncodingMode::kNone, Variant, Params>;
    status = DecodePlan<HEAD_DIM, PosEncodingMode::kNone, Variant, Params>(
        floats, float_bytes, ints, pinned, bytes, info, indptr, batch, heads, /*page_size=*/1,
        /*enable_cuda_graph=*/true, nullptr, estimate);
  });
  if (status != cudaSuccess) throw std::runtime_error("DecodePlan");
}

static int64_t done(const std::vector<int64_t>& info, int64_t* out) {
  std::copy(info.begin(), info.end(), out);
  return info.size();
}

// Both return the length of plan_info, or -1 where FlashInfer threw.
extern "C" int64_t cuda_core_plan(int32_t* indptr, int64_t batch, int64_t q_heads, int64_t kv_heads, int64_t head_dim,
                                  void* floats, int64_t float_bytes, void* ints, void* pinned, int64_t bytes,
                                  int64_t* out) try {
  DecodePlanInfo info;
  uint32_t group = q_heads / kv_heads;
  if (head_dim == 64)
    decode_plan<64>(info, group, indptr, batch, q_heads, floats, float_bytes, ints, pinned, bytes);
  else if (head_dim == 128)
    decode_plan<128>(info, group, indptr, batch, q_heads, floats, float_bytes, ints, pinned, bytes);
  else
    return -1;
  return done(info.ToVector(), out);
} catch (const std::exception& e) {
  std::cerr << e.what() << std::endl;
  return -1;
}

extern "C" int64_t tensor_core_plan(int32_t* indptr, int64_t batch, int64_t q_heads, int64_t kv_heads, int64_t head_dim,
                                    int64_t kv_bytes, void* floats, int64_t float_bytes, void* ints, void* pinned,
                                    int64_t bytes, int64_t* out) try {
  PrefillPlanInfo info;
  std::vector<int32_t> qo_indptr(batch + 1);
  for (int i = 0; i <= batch; ++i) qo_indptr[i] = i;
  auto status = PrefillPlan<int32_t>(floats, float_bytes, ints, pinned, bytes, info, qo_indptr.data(), indptr,
                                     /*total_num_rows=*/batch, batch, q_heads, kv_heads, head_dim, head_dim,
                                     /*page_size=*/1, /*enable_cuda_graph=*/true, /*sizeof_dtype_o=*/2,
                                     /*window_left=*/-1, /*fixed_split_size=*/-1, /*disable_split_kv=*/false,
                                     /*num_colocated_ctas=*/0, /*uniform_q_len=*/0, nullptr, kv_bytes);
  if (status != cudaSuccess) return -1;
  return done(info.ToVector(), out);
} catch (const std::exception& e) {
  std::cerr << e.what() << std::endl;
  return -1;
}
