// P and dA of a band; the sums of U and C go to the slot of the block, [step][32 distances][COLUMNS], and those of W1
// and W2 are added to another. Grid: (rows and spans, the last rows first, elements).
extern "C" __global__ void __launch_bounds__(THREADS, 1)
    backward(const __half* q, const __half* k, const Value* grad, const Value* v, __half* x, __half* y,
             const float* lse, const float* delta, const float* w1, const float* w2, const __half* hidden,
             const float* fixed, const uint8* mask, const float* unit, const int* gate, int gated, float* sums,
             float* weights, int rows, int keys, int row_tiles, int span, int shift, int low, double scale, int q_b,
             int q_h, int q_t, int k_b, int k_h, int grad_b, int grad_h, int grad_t, int v_b, int v_h, int x_b, int x_t,
             int stat_b, int stat_h, int stat_t, int mask_b) {
  static_assert(sizeof(Shared) == SHARED, "what the launch asks for");
  if (gated >= 0 && *gate != gated) return;
  extern __shared__ __align__(128) char memory[];
  Shared& s = *(Shared*)memory;
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, h = min(warp, H - 1);
  const long long b = blockIdx.y;
  const int row_tile = row_tiles - 1 - blockIdx.x % row_tiles, part = blockIdx.x / row_tiles, row0 = row_tile * ROWS;
  const int end = CAUSAL ? min(keys, min(rows, row0 + ROWS) + shift) : keys;
  const int first = part * span, last = min(first + span, (max(0, end) + KEYS - 1) / KEYS);
  if (first >= last) return;
  const long long block = (b * row_tiles + row_tile) * (gridDim.x / row_tiles) + part;
  const Arguments a = {q + b * q_b + (long long)h * q_h,
                       k + b * k_b + (long long)(h / GROUP) * k_h,
                       grad + b * grad_b + (long long)h * grad_h,
                       v + b * v_b + (long long)(h / GROUP) * v_h,
                       x + b * x_b + h * BLOCK,
                       y + b * x_b + h * BLOCK,
                       delta + b * stat_b + (long long)h * stat_h,
                       w1,
                       w2,
                       hidden,
                       fixed,
                       mask + b * mask_b,
                       sums + block * (span + 1) * KEYS * COLUMNS,
                       weights + block * 2 * HEADS * UNITS,
                       rows,
                       keys,
                       row0,
                       first,
                       last,
                       row0 + shift - (KEYS - 1) - low,
                       stat_t,
                       x_t,
                       (float)scale,
                       1.f / *unit};
  for (int i = threadIdx.x; i < ROWS * HEADS; i += THREADS) {
    const int row = row0 + i / HEADS, head = 8 * (i / 2 % 2) + 2 * (i / 4 % 4) + i % 2;
    const float sum =
        row < rows && head < H ? lse[b * stat_b + (long long)head * stat_h + (long long)row * stat_t] * LOG2E : NEVER;
    s.lse[i] = sum == NEVER ? -sum : sum;  // rows that see nothing have no weight
  }
  if (threadIdx.x < 2 * PAIRS * HEADS) s.never[threadIdx.x] = -NEVER;
  if (threadIdx.x < 8) s.zero[threadIdx.x] = __float2half_rn(0.f);
  __syncthreads();
  if (warp < HEAD_WARPS) {
    set_registers<HEAD_REGISTERS, THREADS>();
    if (warp < H) attend(s, a, q_t, grad_t, warp, lane);
  } else {
    set_registers<MIXER_REGISTERS, THREADS>();
    Mixer(s, a, warp - HEAD_WARPS, lane).run();
  }
}
