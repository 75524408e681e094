// The gradients of C, U, v and c from the sums of dS and dz over the pairs of every piece, and those of the same times
// x - m. A block has an entry, and a thread a channel; `pieces.cuh` has the legend.
extern "C" __global__ void pieces_backward(const float* total, const float* hidden_table, const float* static_table,
                                           const float* weight, const float* bias, const int* gate, int gated,
                                           float* grad_hidden, float* grad_static, float* grad_weight,
                                           float* grad_bias) {
  follow();
  struct Memory {
    Spans spans;
    float of_v[CHANNELS], of_c[CHANNELS];
  };
  static_assert(sizeof(Memory) <= SHARED, "what the launch asks for");
  if (gated >= 0 && *gate != gated) return;
  extern __shared__ __align__(128) char memory[];
  Memory& shared = *(Memory*)memory;
  const int k = blockIdx.x, channel = threadIdx.x, unit = channel - HEADS;
  const Spans& spans = shared.spans;
  find_spans(shared.spans, weight, bias);
  if (channel < CHANNELS) {
    const float v = k ? spans.v[k - 1] : 0.f, c = k ? spans.c[k - 1] : 1.f;
    const int from = k ? spans.from[k - 1] : 0, to = k ? spans.to[k - 1] : PIECES;
    float sum = 0.f, of_v = 0.f, of_c = 0.f;
#pragma unroll 8
    for (int p = 0; p < PIECES; p++) {
      const bool here = p >= from && p < to;
      const float m = lower_end(spans.edge[p]), once = total[2 * p * CHANNELS + channel],
                  risen = total[(2 * p + 1) * CHANNELS + channel];
      sum = here ? sum + (fmaf(v, m, c) * once + v * risen) : sum;
      of_c = here ? of_c + once : of_c;
      of_v = here ? of_v + fmaf(m, once, risen) : of_v;
    }
    if (channel < H) grad_static[channel * (F + 1) + k] = sum;
    if (unit >= 0 && unit < D) grad_hidden[k * D + unit] = sum;
    const float own = Entries(hidden_table, static_table, channel).at(k);
    shared.of_v[channel] = own * of_v;
    shared.of_c[channel] = own * of_c;
  }
  __syncthreads();
  if (k == 0 || channel > 1) return;
  const float* const from = channel ? shared.of_c : shared.of_v;
  float sum = 0.f;
  for (int i = 0; i < CHANNELS; i++) sum += from[i];
  (channel ? grad_bias : grad_weight)[k - 1] = sum;
}
