// The whole forward pass of an attention that mixes heads, in a single kernel, for Hopper (see docs/kernels.md).
//
// A score too large for X, or a log-sum-exp, sets a flag, and a kernel in Triton then takes the call.
//
// A block takes ROWS query rows of all heads. Every head has a warp (scores, softmax, values), and mixer
// warps take the scores of a tile across heads. Warps exchange numbers in shared memory, in X[head][slot] of fp16. The
// order of slots is the order of the accumulators of q k^T: a lane moves 16 bytes, the mixers read fragments
// [slot, head] by ldmatrix.trans and put logits back by stmatrix.trans. Tiles alternate between two buffers. Heads
// compute the scores of the next tile while the mixers are busy.
//
// More than 16 heads go to a cluster of blocks. A block has PART heads, and mixes SHARE slots of all heads. Head warps
// write scores into the memory of the block that mixes them, and read logits from there.
//
//   x = q k^T      w = scale W1 x      y = x + W2 (leaky(w + U) - leaky(U)) / scale
//   P = exp(scale y + C), masked by C = -inf
//
// leaky(z) = s z + (1 - s) relu(z). The linear part costs a further product with x, by s W2 W1. The remaining part is
// relu(w + U) - relu(U) = max(w, -U) - max(-U, 0), no larger than w, however large U is. Beyond 16 heads, the linear
// part is added to the hidden units.
//
// Slot s of a chunk of 256 (16 rows, 16 keys) has lane s / 8 = 4 r + c / 2 and row r + 8 (s / 2 % 2), key
// c + s % 2 + 8 (s / 4 % 2). Therefore 16 slots belong to two lanes and to close distances.
//
// Macros: H heads, D hidden units padded to UNITS, E head_dim, GROUP heads to a key head, Q_T, K_T and
// V_T strides of rows, CAUSAL, MASKED, BF16, RESTED: the rounding error of the output is stored too, ROWS and KEYS of a
// tile, MIXERS warps, QUERIES_SHARED: queries in shared memory, not registers, HEAD_REGISTERS and MIXER_REGISTERS (0:
// as launched), CLUSTER blocks that share the heads of some rows.
#if BF16
typedef __nv_bfloat16 Element;
#else
typedef __half Element;
#endif
constexpr int HEADS = (H + 15) / 16 * 16, PART = (H + CLUSTER - 1) / CLUSTER;  // of all blocks, of a block
constexpr int HEAD_WARPS = (PART + 3) / 4 * 4, MEMBERS = 32 * (H + MIXERS),
              THREADS = 32 * (HEAD_WARPS + (MIXERS + 3) / 4 * 4);
constexpr int MT = ROWS / 16, NT = KEYS / 8, ET = E / 16, UT = UNITS / 8, HT = HEADS / 16;
constexpr int SHARE = ROWS * KEYS / CLUSTER, SLOTS = SHARE + 8, SPAN = 64, COPY = SPAN + 16, C_LINE = 2 * SPAN + 16;
constexpr int GROUPS = SHARE / 16 / MIXERS;  // of 16 slots, for a mixer warp
constexpr float SLOPE = 0.01f, LOG2E = 1.4426950408889634f, LN2 = 0.6931471805599453f, LARGEST = 65504.f;
// The linear part of leaky, s W2 W1, as a product: for 16 heads 2 products, for 32 heads 8 more registers and products.
constexpr bool STRAIGHT = HT == 1;
// A running maximum is updated only for a difference beyond SLACK (base 2): P stays below 2^8.
constexpr float SLACK = 8.f;
struct Shared {
  Element k[PART][KEYS * E], v[PART][KEYS * E];
#if QUERIES_SHARED
  Element q[PART][ROWS * E];
#endif
  __half x[2][HEADS][SLOTS];
  __half u[2][SPAN][UNITS];
  float c[PART][C_LINE];
#if CLUSTER > 1
  unsigned long long scores[2], logits[2];  // barriers
#endif
};

DEVICE void mma(float (&c)[4], const uint32 (&a)[4], uint32 b0, uint32 b1) {
#if BF16
  mma_bf16(c, a[0], a[1], a[2], a[3], b0, b1);
#else
  mma(c, a[0], a[1], a[2], a[3], b0, b1);
#endif
}
// d = a b + c in fp16, with d in the layout of an operand of the next product.
DEVICE void mma_half(uint32 (&d)[2], const uint32 (&a)[4], const uint32 (&b)[2], uint32 c0, uint32 c1) {
  const uint2 sum = mma_half(make_uint4(a[0], a[1], a[2], a[3]), b[0], b[1], c0, c1);
  d[0] = sum.x;
  d[1] = sum.y;
}
DEVICE uint32 pack_half(float a, float b) {
  __half2 h = __floats2half2_rn(a, b);
  return *(uint32*)&h;
}
DEVICE uint32 pack(float a, float b) {
#if BF16
  __nv_bfloat162 h = __floats2bfloat162_rn(a, b);
  return *(uint32*)&h;
#else
  return pack_half(a, b);
#endif
}
DEVICE float2 unpack(uint32 v) {
#if BF16
  return __bfloat1622float2(*(__nv_bfloat162*)&v);
#else
  return __half22float2(*(__half2*)&v);
#endif
}
// max(w, -U) - max(-U, 0), and the linear part, w s / (1 - s), if the part has no product of its own.
DEVICE uint32 rise(uint32 w, uint32 minus_u) {
  const __half2 x = *(__half2*)&w, y = *(__half2*)&minus_u,
                risen = __hsub2(__hmax2(x, y), __hmax2(y, __float2half2_rn(0.f))),
                whole = STRAIGHT ? risen : __hfma2(x, __float2half2_rn(SLOPE / (1.f - SLOPE)), risen);
  return *(uint32*)&whole;
}
constexpr int LAUNCHED = 65536 / THREADS / 8 * 8;  // registers of a thread at the start
template <int N>
DEVICE void set_registers() {
  if constexpr (N > LAUNCHED)
    more_registers<N>();
  else if constexpr (N > 0)
    fewer_registers<N>();
}

struct Arguments {
  const Element *q, *k, *v;
  Element *out, *rest;
  float* lse;
  const float *w1, *w2;
  const __half* hidden;
  const float *fixed, *linear;
  const uint8* mask;
  int* flag;
  float largest_score, largest_sum;
  int rows, keys, distances, low, offset;
  float scale;
  int out_t, row0, tiles;
};
