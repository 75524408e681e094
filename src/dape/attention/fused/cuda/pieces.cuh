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
  float v[FEATURES], c[FEATURES], end[FEATURES], edge[PIECES + 1];
  int from[FEATURES], to[FEATURES];
};
DEVICE void find_spans(Spans& spans, const float* weight, const float* bias) {
  const int k = threadIdx.x;
  if (k < FEATURES) {
    const float v = k < F ? weight[k] : 0.f, c = k < F ? bias[k] : 0.f;
    spans.v[k] = v;
    spans.c[k] = c;
    spans.end[k] = (v > 0.f && c <= 0.f) || (v < 0.f && c > 0.f) ? -c / v : -NEVER;
  }
  if (k <= PIECES) spans.edge[k] = k ? -NEVER : -1.f;
  __syncthreads();
  if (k < FEATURES) {
    const float v = spans.v[k], c = spans.c[k], end = spans.end[k];
    int rank = 0;
#pragma unroll 8
    for (int j = 0; j < FEATURES; j++) rank += spans.end[j] < end || (spans.end[j] == end && j < k);
    const bool ends = end < -NEVER, never = !ends && v <= 0.f && c <= 0.f;
    spans.from[k] = ends && v > 0.f ? rank + 1 : 0;
    spans.to[k] = never ? 0 : ends && v < 0.f ? rank + 1 : PIECES;
    if (ends) spans.edge[rank + 1] = end;
  }
  __syncthreads();
}
// The entries of a channel, a head or a unit, in the tables; the first is that of the feature 1.
struct Entries {
  const float* from;
  int step;
  bool real;
  __device__ Entries(const float* hidden_table, const float* static_table, int channel)
      : from(channel < HEADS ? static_table + channel * (F + 1) : hidden_table + channel - HEADS),
        step(channel < HEADS ? 1 : D),
        real(channel < HEADS ? channel < H : channel - HEADS < D) {}
  DEVICE float at(int k) const { return real ? from[k * step] : 0.f; }
};
