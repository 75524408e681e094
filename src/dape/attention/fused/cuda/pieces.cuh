// FIRE in pieces. A feature relu(v x + c) of x >= 0 ends, or begins, at x = -c / v. Between the ordered ends of all
// features C f and U f are linear in x: a + b (x - m), where m is the lower end of a piece.
//
// Macros: F features padded to FEATURES (16 or 32), and those of `tile.cuh`.
constexpr int PIECES = FEATURES + 1, CHANNELS = HEADS + UNITS;
// A line of slopes, in words; lanes of different g meet different banks.
constexpr int SLOPES = CHANNELS / 2 + 4;

struct Pieces {
  // edge[p] < x <= edge[p + 1] in piece p. The first edge is below 0, and those of missing pieces are infinite.
  float edge[PIECES + 1];
  float unit, unused;  // a power of two
  float4 u[PIECES][UT][4];  // a and b of two units
  float2 c[PIECES][HEADS];  // a and b
  uint32 slope[PIECES][SLOPES];  // b / unit in fp16, of heads and of units
};
static_assert(sizeof(Pieces) % 16 == 0, "copied by 16 bytes");

// The lower end m of a piece.
DEVICE float lower_end(float edge) { return edge > 0.f && edge < -NEVER ? edge : 0.f; }

// The edges of the pieces, and the pieces [from, to) in which a feature is not zero.
struct Spans {
  float v[FEATURES], c[FEATURES], edge[PIECES + 1];
  int from[FEATURES], to[FEATURES];
};
DEVICE float end_of(float v, float c) { return (v > 0.f && c <= 0.f) || (v < 0.f && c > 0.f) ? -c / v : -NEVER; }
DEVICE void find_spans(Spans& spans, const float* weight, const float* bias) {
  const int k = threadIdx.x;
  if (k < FEATURES) {
    spans.v[k] = k < F ? weight[k] : 0.f;
    spans.c[k] = k < F ? bias[k] : 0.f;
  }
  if (k <= PIECES) spans.edge[k] = k ? -NEVER : -1.f;
  __syncthreads();
  if (k < FEATURES) {
    const float v = spans.v[k], c = spans.c[k], end = end_of(v, c);
    int rank = 0;
    for (int j = 0; j < FEATURES; j++) {
      const float other = end_of(spans.v[j], spans.c[j]);
      rank += other < end || (other == end && j < k);
    }
    const bool ends = end < -NEVER, never = !ends && v <= 0.f && c <= 0.f;
    spans.from[k] = ends && v > 0.f ? rank + 1 : 0;
    spans.to[k] = never ? 0 : ends && v < 0.f ? rank + 1 : PIECES;
    if (ends) spans.edge[rank + 1] = end;
  }
  __syncthreads();
}
// Entry k of the table of a channel, a head or a unit; entry 0 is that of the feature 1.
DEVICE float entry(const float* hidden_table, const float* static_table, int channel, int k) {
  const int unit = channel - HEADS;
  if (channel < HEADS) return channel < H ? static_table[channel * (F + 1) + k] : 0.f;
  return unit < D ? hidden_table[k * D + unit] : 0.f;
}
