// The tables of FIRE in pieces, a piece for a block and a channel for a thread; `pieces.cuh` has the legend.
extern "C" __global__ void pieces(Pieces* found, const float* hidden_table, const float* static_table,
                                  const float* weight, const float* bias) {
  follow();
  struct Memory {
    Spans spans;
    float bound[CHANNELS], slope[CHANNELS];
  };
  static_assert(sizeof(Memory) <= SHARED, "what the launch asks for");
  extern __shared__ __align__(128) char memory[];
  Memory& shared = *(Memory*)memory;
  const int p = blockIdx.x, channel = threadIdx.x, unit = channel - HEADS;
  const Spans& spans = shared.spans;
  find_spans(shared.spans, weight, bias);
  const float m = lower_end(spans.edge[p]);
  float a = 0.f, b = 0.f, bound = 0.f;
  if (channel < CHANNELS) {
    const Entries entries(hidden_table, static_table, channel);
    a = entries.at(0);
#pragma unroll 8
    for (int k = 0; k < F; k++) {
      const float own = entries.at(k + 1), rise = spans.v[k] * own;
      bound += fabsf(rise);
      const bool here = p >= spans.from[k] && p < spans.to[k];
      a = here ? fmaf(fmaf(spans.v[k], m, spans.c[k]), own, a) : a;
      b = here ? b + rise : b;
    }
    shared.bound[channel] = bound;
    shared.slope[channel] = b;
  }
  __syncthreads();
  for (int i = 0; i < CHANNELS; i++) bound = fmaxf(bound, shared.bound[i]);
  const float size = bound > 0.f && bound < -NEVER ? ldexpf(1.f, max(ilogbf(bound), -90) - 9) : 1.f;
  if (p == 0 && channel <= PIECES) found->edge[channel] = spans.edge[channel];
  if (p == 0 && channel == 0) found->unit = size;
  if (channel < HEADS) {
    found->c[p][channel] = make_float2(channel < H ? a : NEVER, b);  // heads that are padding have no weight
  } else if (channel < CHANNELS) {
    float* const at = (float*)&found->u[p][unit / 8][unit % 8 / 2] + unit % 2;
    at[0] = a;
    at[2] = b;
  }
  if (channel < SLOPES) {
    const bool real = 2 * channel < CHANNELS;
    found->slope[p][channel] = real ? pack(shared.slope[2 * channel] / size, shared.slope[2 * channel + 1] / size) : 0u;
  }
}
