// Tiles of a warp, with explicit layouts, for an fp16 scratch: the common part of the kernels of DAPE V1 and of FIRE.
//
// A warp owns 32 neighbouring keys of a row and walks down a diagonal of tiles (ROWS rows, a row for every warp,
// times KEYS keys). The distances of a warp never change. Lane
// (g, t) = (lane / 4, lane % 4) loads 16 bytes, keys 8 t .. 8 t + 7, for heads g, g + 8, ... Pair p of
// the keys is column pair (2 t, 2 t + 1) of key tile p, an 8 x 8 block [head, key], an operand of mma.sync, which
// movmatrix turns into [key, head]. Meanwhile cp.async copies the next tiles into the ring of the warp, because
// latency costs most with few warps on a multiprocessor. A block has WARPS of the rows of a tile, on a segment of the
// diagonal.
//
// Macros: H heads padded to HEADS (16 or 32), D hidden units padded to UNITS (16, 32 or 64), CAUSAL, MASKED, ROWS, KEYS
// of a tile, WARPS, STAGES of the ring, BLOCK keys of a head side by side in the scratch, SHARED bytes of shared
// memory.
constexpr int SHARES = ROWS / WARPS, LINES = WARPS + KEYS;
constexpr int UT = UNITS / 8, STEPS = UNITS / 16, HT = HEADS / 8, PARTS = HEADS / 16;  // tiles of 8, and of 16
static_assert(ROWS == KEYS && BLOCK % KEYS == 0, "a line of a tile lies within a block of the scratch");

// The place of a line of a tile in a row of the scratch, by the first key.
DEVICE int along(int key) { return (key & -BLOCK) * H + (key & (BLOCK - 1)); }
// The key, among 32 of a warp, in column c of key tile p.
DEVICE int key_of(int p, int c) { return 8 * (c >> 1) + 2 * p + (c & 1); }

// The diagonal of a block, counted from the first, its elements, and its share and segment of the diagonal, on a grid
// (diagonals, groups of elements, SHARES segments). Blocks start in the order of their number, and the first diagonals
// are the longest. All blocks of CHUNK diagonals come before the next diagonals, since long blocks that start late
// would leave most of the GPU idle. Neighbouring diagonals share lines of memory, and start together.
constexpr int CHUNK = 8;
struct Block {
  int diagonal, group, share, segment;
  __device__ Block() {
    const uint32 n = blockIdx.x + gridDim.x * (blockIdx.y + gridDim.y * blockIdx.z), all = gridDim.y * gridDim.z,
                 begin = n / (CHUNK * all) * CHUNK, width = min((uint32)CHUNK, gridDim.x - begin),
                 left = n - begin * all, part = left / width;
    diagonal = begin + left % width;
    group = part / gridDim.z;
    share = part % gridDim.z % SHARES;
    segment = part % gridDim.z / SHARES;
  }
};
struct Place {  // the tiles of a block: a segment of the diagonal, and the first row in a tile
  int first, last, start, row;
  __device__ Place(const Block& block, int q, int band_tile, int rows, int keys)
      : start((band_tile - q) * KEYS), row(block.share * WARPS) {
    int low = 1 - start - KEYS, high = keys - start;
    first = low > 0 ? (low + ROWS - 1) / ROWS : 0;
    last = high > 0 ? (min(rows, high) + ROWS - 1) / ROWS : 0;
    int segments = gridDim.z / SHARES, share = (max(0, last - first) + segments - 1) / segments;
    first += block.segment * share;
    last = min(last, first + share);
  }
};

// The weights as fragments of 16 heads, 16 bytes a lane: W1 [unit, head] and W2^T [unit, head] as B operands of
// two unit tiles, W2 [head, unit] and W1^T [head, unit] as A operands of 16 units.
typedef uint4 Matrix[PARTS][STEPS][32];
struct Weights {
  Matrix in, out;
#ifdef BACKWARD
  Matrix out_turned, in_turned;
#endif
};
DEVICE void load_weights(Weights& w, const float* w1, const float* w2) {
  const int part = threadIdx.x / 32, lane = threadIdx.x % 32, g = lane / 4, t = lane % 4;
  if (part >= PARTS) return;
  auto in = [&](int unit, int head) { return unit < D && head < H ? w1[unit * H + head] : 0.f; };
  auto out = [&](int head, int unit) { return unit < D && head < H ? w2[head * D + unit] : 0.f; };
#pragma unroll
  for (int s = 0; s < STEPS; s++) {
    int unit = 16 * s + g, head = 16 * part + 2 * t, line = 16 * part + g, column = 16 * s + 2 * t;
    w.in[part][s][lane] = make_uint4(
        pack(in(unit, head), in(unit, head + 1)), pack(in(unit, head + 8), in(unit, head + 9)),
        pack(in(unit + 8, head), in(unit + 8, head + 1)), pack(in(unit + 8, head + 8), in(unit + 8, head + 9)));
    w.out[part][s][lane] = make_uint4(
        pack(out(line, column), out(line, column + 1)), pack(out(line + 8, column), out(line + 8, column + 1)),
        pack(out(line, column + 8), out(line, column + 9)), pack(out(line + 8, column + 8), out(line + 8, column + 9)));
#ifdef BACKWARD
    w.out_turned[part][s][lane] = make_uint4(
        pack(out(head, unit), out(head + 1, unit)), pack(out(head + 8, unit), out(head + 9, unit)),
        pack(out(head, unit + 8), out(head + 1, unit + 8)), pack(out(head + 8, unit + 8), out(head + 9, unit + 8)));
    w.in_turned[part][s][lane] = make_uint4(
        pack(in(column, line), in(column + 1, line)), pack(in(column, line + 8), in(column + 1, line + 8)),
        pack(in(column + 8, line), in(column + 9, line)), pack(in(column + 8, line + 8), in(column + 9, line + 8)));
#endif
  }
}
// A lane's part of a matrix: in registers, or in shared memory where sums fill the registers.
struct Held {
#if HEADS == 16 && UNITS <= 32
  uint4 own[STEPS];
  __device__ Held(const Matrix& from, int lane) {
#pragma unroll
    for (int s = 0; s < STEPS; s++) own[s] = from[0][s][lane];
  }
  DEVICE uint4 at(int, int s) const { return own[s]; }
#else
  const Matrix& from;
  int lane;
  __device__ Held(const Matrix& from, int lane) : from(from), lane(lane) {}
  DEVICE uint4 at(int part, int s) const { return from[part][s][lane]; }
#endif
};

// A tile under way, 32 scores of every eighth head, 16 bytes a lane; the scores of a lane; and half of a lane's scores,
// for 16 keys.
typedef uint4 Ring[HT][32];
typedef uint32 Own[HT][4];
typedef uint32 Half[HT][2];
DEVICE void fetch_tile(Ring& ring, const __half* from, bool inside, int g, int lane) {
#pragma unroll
  for (int r = 0; r < HT; r++) copy16(address(&ring[r][lane]), from + r * 8 * BLOCK, inside && 8 * r + g < H);
}
DEVICE void take_tile(Own& x, const Ring& ring, int lane) {
#pragma unroll
  for (int r = 0; r < HT; r++) *(uint4*)x[r] = ring[r][lane];
}
DEVICE void take_half(Half& half, const Own& x, int f) {
#pragma unroll
  for (int r = 0; r < HT; r++)
#pragma unroll
    for (int e = 0; e < 2; e++) half[r][e] = x[r][2 * f + e];
}
DEVICE void store_tile(const Own& x, __half* to, bool inside, int g) {
#pragma unroll
  for (int r = 0; r < HT; r++)
    if (inside && 8 * r + g < H) *(uint4*)(to + r * 8 * BLOCK) = *(const uint4*)x[r];
}

// The keys of half f of a tile that a warp's row sees, as masks of halves.
DEVICE void look(uint32 (&seen)[2], int f, bool real_row, int delta0, int first_key, int t, int keys,
                 const uint8* mask) {
#pragma unroll
  for (int e = 0; e < 2; e++) {
    const int place = 8 * t + 4 * f + 2 * e, low = first_key + place, high = low + 1, delta = delta0 - place;
    const bool sees_low = real_row && low >= 0 && low < keys && (!CAUSAL || delta >= 0) && (!MASKED || mask[low]);
    const bool sees_high = real_row && high >= 0 && high < keys && (!CAUSAL || delta >= 1) && (!MASKED || mask[high]);
    seen[e] = (sees_low ? 0xffffu : 0u) | (sees_high ? 0xffff0000u : 0u);
  }
}
// Whether a row at a distance from the first key of a warp may see all keys of the warp.
DEVICE bool sees_all(int delta0) { return !MASKED && (!CAUSAL || delta0 >= KEYS - 1); }
DEVICE void hide(Half& x, const uint32 (&seen)[2]) {
#pragma unroll
  for (int r = 0; r < HT; r++)
#pragma unroll
    for (int e = 0; e < 2; e++) x[r][e] &= seen[e];
}

// c += x[head, key] b[key, column] for the heads of a part and 16 keys.
DEVICE void add_product(float (&c)[4], const Half& x, int part, uint32 b0, uint32 b1) {
  mma(c, x[2 * part][0], x[2 * part + 1][0], x[2 * part][1], x[2 * part + 1][1], b0, b1);
}
// z + x[key, head] W[head, unit] for 16 keys: fragments [unit tile] of [key, unit].
DEVICE void across_heads(uint2 (&z)[UT], const Half& x, const Held& w) {
#pragma unroll
  for (int part = 0; part < PARTS; part++) {
    // [head, key] of two key tiles, turned into the A operand [key, head].
    const uint4 turned =
        make_uint4(turn(x[2 * part][0]), turn(x[2 * part][1]), turn(x[2 * part + 1][0]), turn(x[2 * part + 1][1]));
#pragma unroll
    for (int s = 0; s < STEPS; s++) {
      const uint4 b = w.at(part, s);
      z[2 * s] = mma_half(turned, b.x, b.y, z[2 * s].x, z[2 * s].y);
      z[2 * s + 1] = mma_half(turned, b.z, b.w, z[2 * s + 1].x, z[2 * s + 1].y);
    }
  }
}
// start + W[head, unit] v[unit, key] for a part's heads and key tile e of the pair whose fragments [key, unit] are v.
DEVICE uint2 across_units(uint2 start, const Held& w, int part, const uint2 (&v)[UT], int e) {
#pragma unroll
  for (int s = 0; s < STEPS; s++)
    start = mma_half(w.at(part, s), e ? v[2 * s].y : v[2 * s].x, e ? v[2 * s + 1].y : v[2 * s + 1].x, start.x, start.y);
  return start;
}
