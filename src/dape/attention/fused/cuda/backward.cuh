// The backward pass across heads in one kernel, for Hopper (`backward.cu`): scores and dO V^T are made where they are
// mixed, and P and dA alone go to the scratch (see docs/kernels.md). dQ, dK and dV are left to the kernels of one head.
//
// A block takes ROWS query rows of all heads and a span of tiles of KEYS keys. Each head has a warp, which makes X and
// Y of a tile and later copies P and dA to the scratch. Four mixer warps turn X and Y into P and dA. They meet in
// shared memory, where tiles alternate between two buffers.
//
//   x = scale q k^T        y = dO v^T / unit - delta
//   w = W1 x               r = leaky(w + U) - leaky(U)       P = exp(x + W2 r + C - lse)
//   dS = P y               dz = leaky'(w + U) W2^T dS        dA = dS + W1^T dz
//
// X and Y lie as [head][row][8 keys], pieces of 16 bytes that change places within two rows, so that eight rows of
// eight keys, and eight heads of one piece, are in different banks. ldmatrix.trans makes fragments [slot, head] of 16
// slots: eight keys of two rows.
//
// A tile has blocks of 8 rows and 8 keys. A diagonal of blocks has 15 distances, and the sums of dS and dz over its
// slots are products with a matrix of zeros and ones [distance, slot]. A mixer warp has every fourth diagonal. The
// diagonal that began in one tile ends in the next, and its sums go to the shared memory of the mixers, where
// neighbouring diagonals meet. After each tile 32 distances are done and go to the block's slot; the last of a span
// come with one more step.
//
// Macros: H heads, D hidden units padded to UNITS, E head_dim, GROUP heads to a key head, K_T and V_T strides of rows,
// CAUSAL, MASKED, BF16 (dO and V; Q and K are fp16), ROWS of a tile, ONE_STAGE: K and V of a head take turns in one
// place, MIXERS warps, BLOCK keys of a head side by side in the scratch, HEAD_REGISTERS and MIXER_REGISTERS (0: as
// launched), SHARED bytes of shared memory.
typedef __half Element;  // of Q and K, and in lines of shared memory
#if BF16
typedef __nv_bfloat16 Value;
#else
typedef __half Value;
#endif
constexpr int KEYS = 32, HEADS = 16;
constexpr int HEAD_WARPS = (H + 3) / 4 * 4, MEMBERS = 32 * (H + MIXERS), THREADS = 32 * (HEAD_WARPS + MIXERS);
constexpr int MT = ROWS / 16, RB = ROWS / 8, KB = KEYS / 8, ET = E / 16, UT = UNITS / 8;
constexpr int LINE = ROWS * KEYS + 8, SPAN = ROWS + KEYS, COLUMNS = UNITS + HEADS, PART = 16 * COLUMNS;
constexpr int SHARERS = MIXERS / KB;  // of a diagonal, each with some of the rows of its blocks
constexpr int PAIRS = UNITS <= 32 && SHARERS == 1 ? 2 : 1;  // of rows that a mixer warp has in work
static_assert(MIXERS % KB == 0, "a diagonal of each tile that ends, and one that begins, is for so many mixer warps");
constexpr float SLOPE = 0.01f, LOG2E = 1.4426950408889634f, LARGEST = 65504.f;
#define NEVER (-1.f / 0.f)
struct Shared {
  Element k[H][KEYS * E];
#if !ONE_STAGE
  Element v[H][KEYS * E];
#endif
  __half x[2][H][LINE], y[2][H][LINE];
  __half u[2][SPAN * UNITS];
  float c[2][SPAN * HEADS];
  float lse[ROWS * HEADS];
  float parts[SHARERS][KB + 1][PART];
  float never[2 * PAIRS * HEADS];  // log-sum-exps of rows for keys that may not be seen: infinite
  __half zero[8], sink[64];  // what heads that are padding read, and where they write
};
constexpr int TO_Y = 2 * H * LINE * 2, TO_OTHER = H * LINE * 2;  // bytes from X to Y, and to the other buffer

// Scores of buffer `b` are there for the mixers; its P and dA are there for the heads.
DEVICE void scores_there(int b) {
  if (b)
    arrive<2>(MEMBERS);
  else
    arrive<1>(MEMBERS);
}
DEVICE void await_scores(int b) {
  if (b)
    meet<2>(MEMBERS);
  else
    meet<1>(MEMBERS);
}
DEVICE void gradients_there(int b) {
  if (b)
    arrive<4>(MEMBERS);
  else
    arrive<3>(MEMBERS);
}
DEVICE void await_gradients(int b) {
  if (b)
    meet<4>(MEMBERS);
  else
    meet<3>(MEMBERS);
}
// Where a piece of 8 keys of a row lies in a line of X or Y, in bytes.
DEVICE constexpr int piece_at(int row, int block) { return (row * KB + (block ^ (row >> 1 & KB - 1))) * 16; }

struct Arguments {
  const __half *q, *k;
  const Value *grad, *v;
  __half *x, *y;
  const float *delta, *w1, *w2;
  const __half *hidden;
  const float *fixed;
  const uint8 *mask;
  float *sums, *weights;
  int rows, keys, row0, first, last;  // the tiles of keys from `first` to `last`
  int distance0, delta_t, x_t;  // entry of the tables for the first row and key; strides
  float scale, part;
};
