// The kernel of `forward.cuh`: a block has head warps and mixer warps.
extern "C" __global__ void __launch_bounds__(THREADS, 1)
    forward(const Element* q, const Element* k, const Element* v, Element* out, Element* rest, float* lse,
            const float* w1, const float* w2, const __half* hidden, const float* fixed, const float* linear,
            const uint8* mask, int* flag, int rows, int keys, int distances, int low, int offset, double scale,
            double largest_score, double largest_sum, int q_b, int q_h, int k_b, int k_h, int v_b, int v_h, int out_b,
            int out_h, int out_t, int lse_b, int lse_h, int mask_b) {
  follow();
  extern __shared__ __align__(128) char memory[];
  Shared& s = *(Shared*)memory;
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, h = min(warp, H - 1);
  // The tiles of all elements come in turn, the longest first. With an element after the other, the long tiles of the
  // last element would start late, and most of the GPU would wait for them.
  const int tiles = (rows + ROWS - 1) / ROWS, batch = gridDim.x / tiles;
  const long long b = blockIdx.x % batch;
  const int row0 = (tiles - 1 - (int)blockIdx.x / batch) * ROWS,
            last = CAUSAL ? min(keys, min(rows, row0 + ROWS) + offset) : keys;
  const Arguments a = {q + b * q_b + (long long)h * q_h,
                       k + b * k_b + (long long)(h / GROUP) * k_h,
                       v + b * v_b + (long long)(h / GROUP) * v_h,
                       out + b * out_b + (long long)h * out_h,
                       rest + b * out_b + (long long)h * out_h,
                       lse + b * lse_b + (long long)h * lse_h,
                       w1,
                       w2,
                       hidden,
                       fixed,
                       linear,
                       mask + b * mask_b,
                       flag,
                       (float)(largest_score / fabs(scale)),
                       (float)largest_sum,
                       rows,
                       keys,
                       distances,
                       low,
                       offset,
                       (float)scale,
                       out_t,
                       row0,
                       (last + KEYS - 1) / KEYS};
  for (int line = H; line < HEADS; line++)
    for (int i = threadIdx.x; i < 2 * SLOTS; i += THREADS) s.x[i / SLOTS][line][i % SLOTS] = __float2half(0.f);
  __syncthreads();
  if (warp < HEAD_WARPS) {
    set_registers<HEAD_REGISTERS>();
    if (warp < H) attend(s, a, warp, lane);
  } else {
    set_registers<MIXER_REGISTERS>();
    mix(s, a, warp - HEAD_WARPS, lane);
  }
}
