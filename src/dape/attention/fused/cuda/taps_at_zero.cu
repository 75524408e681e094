// C of DAPE V2, the logits at scores of zero, over the distance: C + sum_t W2_t leaky(U) of the columns of the taps.
//
// Tables [3, H, size]: of keys from the third on, of the first of all keys, and of the second. A tap of the first key's
// column has nothing in U, and the column before has no hidden units.
//
// Macros: as in `taps.cuh`, and a block makes DISTANCES entries.
constexpr int TAPS = 3, HEADS = 16, THREADS = 256, COLUMNS = DISTANCES + 2;
extern "C" __global__ void taps_at_zero(float* found, const float* w2, const float* hidden_table, const float* bias,
                                        const float* static_table, int size) {
  follow();
  struct Memory {
    float w2[HEADS][TAPS][UNITS], hidden[COLUMNS][UNITS + 1], begin[COLUMNS][UNITS + 1];
  };
  static_assert(sizeof(Memory) == SHARED, "what the launch asks for");
  extern __shared__ __align__(128) char memory[];
  Memory& shared = *(Memory*)memory;
  const int start = blockIdx.x * DISTANCES;
  auto leaky = [](float z) { return fmaxf(z, 0.01f * z); };
  for (int i = threadIdx.x; i < HEADS * TAPS * UNITS; i += THREADS) {
    const int unit = i % UNITS, tap = i / UNITS % TAPS, head = i / UNITS / TAPS;
    shared.w2[head][tap][unit] = unit < D && head < H ? w2[(head * TAPS + tap) * D + unit] : 0.f;
  }
  // Column n of the taps has the distance start - 1 + n. A tap of a column has its key at one further, or one nearer.
  for (int i = threadIdx.x; i < COLUMNS * UNITS; i += THREADS) {
    const int unit = i % UNITS, n = i / UNITS;
    float u[TAPS] = {}, sum = 0.f;
    if (unit < D) {
      sum = bias[unit];
#pragma unroll
      for (int tap = 0; tap < TAPS; tap++) {
        const int d = start + n - tap;
        if (d >= 0 && d < size) u[tap] = hidden_table[((long long)d * TAPS + tap) * D + unit];
        sum += u[tap];
      }
    }
    shared.hidden[n][unit] = leaky(sum);
    shared.begin[n][unit] = leaky(sum - u[0]);
  }
  __syncthreads();
  for (int i = threadIdx.x; i < DISTANCES * H; i += THREADS) {
    const int n = i % DISTANCES, head = i / DISTANCES, d = start + n;
    if (d >= size) continue;
    const long long at = (long long)head * size + d;
    float near = 0.f, far = 0.f, far_begins = 0.f, own = 0.f, own_begins = 0.f;
    for (int unit = 0; unit < D; unit++) {
      const float* const w = &shared.w2[head][0][unit];
      far = fmaf(w[0], shared.hidden[n + 2][unit], far);
      far_begins = fmaf(w[0], shared.begin[n + 2][unit], far_begins);
      own = fmaf(w[UNITS], shared.hidden[n + 1][unit], own);
      own_begins = fmaf(w[UNITS], shared.begin[n + 1][unit], own_begins);
      near = fmaf(w[2 * UNITS], shared.hidden[n][unit], near);
    }
    near += static_table[at];
    found[at] = near + own + far;
    found[(long long)H * size + at] = near + own_begins;
    found[2LL * H * size + at] = near + own + far_begins;
  }
}
