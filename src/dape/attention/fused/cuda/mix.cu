// The two kernels across heads with explicit layouts, for fp16 scratch: see kernels.py for their place.
//
// A warp owns 32 neighbouring keys of one row and walks down a diagonal of tiles (ROWS rows, one a warp,
// times KEYS keys), so that its distances, and with them its entries of U and C, never change. Lane
// (g, t) = (lane / 4, lane % 4) loads 16 bytes for each of heads g, g + 8, ...: keys 8 t .. 8 t + 7. Pair p of
// them is column pair (2 t, 2 t + 1) of key tile p, an 8 x 8 block [head, key] that mma.sync takes as it is
// and movmatrix turns into [key, head]. The next tiles are on their way meanwhile, by cp.async into a ring
// that is each warp's own: with few warps on a multiprocessor, latency is what costs. A block has WARPS of the
// rows of a tile, on a segment of the diagonal.
//
//   w[key, unit] = x[key, head] W1^T         z = w + U              r = leaky(z) - leaky(U)
//   y[head, key] = x + W2 r^T                P = exp(y + C - lse)   dS = P (dP - delta)
//   dz = leaky'(z) dS W2                     dA[head, key] = dS + W1^T dz^T
//
// However large U is, r is no larger than w: relu(w + U) - relu(U) = max(w, -U) - max(-U, 0).
// Products of layers are summed in fp16, since that is what the next one reads; sums over pairs in float32,
// on the tensor cores too: dU and dC are products with the unit matrix.
//
// Macros: H heads padded to HEADS (16 or 32), D hidden units padded to UNITS (16, 32 or 64), CAUSAL, MASKED, ROWS, KEYS of a
// tile, WARPS, STAGES of the ring, BLOCK keys of a head side by side in the scratch, SHARED bytes of shared memory.
constexpr int SHARES = ROWS / WARPS, LINES = WARPS + KEYS;
constexpr int UT = UNITS / 8, STEPS = UNITS / 16, HT = HEADS / 8, PARTS = HEADS / 16;  // tiles of 8, and of 16
static_assert(ROWS == KEYS && BLOCK % KEYS == 0, "a line of a tile lies within a block of the scratch");
constexpr float LOG2E = 1.4426950408889634f;
#define NEVER (-1.f / 0.f)

DEVICE __half2 half2_of(uint32 x) { return *(__half2*)&x; }
DEVICE uint32 bits(__half2 x) { return *(uint32*)&x; }
DEVICE uint32 pack(float a, float b) { return bits(__floats2half2_rn(a, b)); }
constexpr float LARGEST = 65504.f;
// leaky(w + U) - leaky(U), and in `z` w + U, for a pair of -U.
DEVICE uint32 rise(uint32 w, uint32 minus_u, uint32& z) {
  const __half2 x = half2_of(w), y = half2_of(minus_u), risen = __hsub2(__hmax2(x, y), __hmax2(y, __float2half2_rn(0.f)));
  z = bits(__hsub2(x, y));
  return bits(__hfma2(risen, __float2half2_rn(0.99f), __hmul2(x, __float2half2_rn(0.01f))));
}
// d leaky'(z): half of d (1 + slope) and half of d (1 - slope) with the sign of z.
DEVICE uint32 leaky_backward(uint32 d, uint32 z) {
  __half2 signed_d = half2_of(d ^ (z & 0x80008000u));
  return bits(__hfma2(half2_of(d), __float2half2_rn(0.505f), __hmul2(signed_d, __float2half2_rn(0.495f))));
}
// Where a line of a tile lies in a row of the scratch, by its first key.
DEVICE int along(int key) { return (key & -BLOCK) * H + (key & (BLOCK - 1)); }
// The key of a warp's 32 that is column c of key tile p.
DEVICE int key_of(int p, int c) { return 8 * (c >> 1) + 2 * p + (c & 1); }

struct Place {  // the tiles of a block: a segment of its diagonal, and its first row of each
  int first, last, start, row;
  __device__ Place(int q, int band_tile, int rows, int keys) : start((band_tile - q) * KEYS), row(blockIdx.z % SHARES * WARPS) {
    int low = 1 - start - KEYS, high = keys - start;
    first = low > 0 ? (low + ROWS - 1) / ROWS : 0;
    last = high > 0 ? (min(rows, high) + ROWS - 1) / ROWS : 0;
    int segments = gridDim.z / SHARES, share = (max(0, last - first) + segments - 1) / segments;
    first += blockIdx.z / SHARES * share;
    last = min(last, first + share);
  }
};

// The weights as fragments of 16 heads each, 16 bytes a lane: W1 [unit, head] and W2^T [unit, head] as B operands of two
// unit tiles each, W2 [head, unit] and W1^T [head, unit] as A operands of 16 units each.
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
    w.in[part][s][lane] = make_uint4(pack(in(unit, head), in(unit, head + 1)), pack(in(unit, head + 8), in(unit, head + 9)),
                                     pack(in(unit + 8, head), in(unit + 8, head + 1)), pack(in(unit + 8, head + 8), in(unit + 8, head + 9)));
    w.out[part][s][lane] = make_uint4(pack(out(line, column), out(line, column + 1)), pack(out(line + 8, column), out(line + 8, column + 1)),
                                      pack(out(line, column + 8), out(line, column + 9)), pack(out(line + 8, column + 8), out(line + 8, column + 9)));
#ifdef BACKWARD
    w.out_turned[part][s][lane] = make_uint4(pack(out(head, unit), out(head + 1, unit)), pack(out(head + 8, unit), out(head + 9, unit)),
                                             pack(out(head, unit + 8), out(head + 1, unit + 8)), pack(out(head + 8, unit + 8), out(head + 9, unit + 8)));
    w.in_turned[part][s][lane] = make_uint4(pack(in(column, line), in(column + 1, line)), pack(in(column, line + 8), in(column + 1, line + 8)),
                                            pack(in(column + 8, line), in(column + 9, line)), pack(in(column + 8, line + 8), in(column + 9, line + 8)));
#endif
  }
}
// A lane's part of a matrix: in registers, unless there are so many that the sums fill them.
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

// -U and C at a warp's keys, constant along the diagonal: -U as accumulators [key tile pair][unit tile], C, in base 2,
// as scores lie.
struct Tables {
  uint2 minus_u[2][UT][32];
#ifdef BACKWARD
  float2 c[HT][4][32];
#endif
};
DEVICE void load_tables(Tables& tables, const float* hidden_table, const float* static_table, int size, int delta0, int lane) {
  const int g = lane / 4, t = lane % 4;
#pragma unroll
  for (int f = 0; f < 2; f++)
#pragma unroll
    for (int n = 0; n < UT; n++) {
      auto at = [&](int e) {
        const int delta = abs(delta0 - key_of(2 * f + e, g)), unit = 8 * n + 2 * t;
        const float* row = hidden_table + (long long)delta * D + unit;
        auto minus = [&](int i) { return delta < size && unit + i < D ? fminf(fmaxf(-row[i], -LARGEST), LARGEST) : 0.f; };
        return pack(minus(0), minus(1));
      };
      tables.minus_u[f][n][lane] = make_uint2(at(0), at(1));
    }
#ifdef BACKWARD
#pragma unroll
  for (int r = 0; r < HT; r++) {
    const int head = 8 * r + g;
    const float* line = static_table + head * size;
    // Heads that are padding have no weight.
    auto at = [&](int delta) { return head < H ? delta < size ? LOG2E * line[delta] : 0.f : NEVER; };
#pragma unroll
    for (int p = 0; p < 4; p++) tables.c[r][p][lane] = make_float2(at(abs(delta0 - 8 * t - 2 * p)), at(abs(delta0 - 8 * t - 2 * p - 1)));
  }
#endif
}

// A tile on its way, 32 scores of every eighth head, 16 bytes a lane; the lane's own; and the half of them for 16 keys.
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

// Which keys of half f of a tile a warp's row sees, as masks of halves.
DEVICE void look(uint32 (&seen)[2], int f, bool real_row, int delta0, int first_key, int t, int keys, const uint8* mask) {
#pragma unroll
  for (int e = 0; e < 2; e++) {
    const int place = 8 * t + 4 * f + 2 * e, low = first_key + place, high = low + 1, delta = delta0 - place;
    const bool sees_low = real_row && low >= 0 && low < keys && (!CAUSAL || delta >= 0) && (!MASKED || mask[low]);
    const bool sees_high = real_row && high >= 0 && high < keys && (!CAUSAL || delta >= 1) && (!MASKED || mask[high]);
    seen[e] = (sees_low ? 0xffffu : 0u) | (sees_high ? 0xffff0000u : 0u);
  }
}
// Whether a row at that distance from the first of its keys may see them all.
DEVICE bool sees_all(int delta0) { return !MASKED && (!CAUSAL || delta0 >= KEYS - 1); }
DEVICE void hide(Half& x, const uint32 (&seen)[2]) {
#pragma unroll
  for (int r = 0; r < HT; r++)
#pragma unroll
    for (int e = 0; e < 2; e++) x[r][e] &= seen[e];
}

// c += x[head, key] b[key, column] for the heads of a part and 16 keys.
DEVICE void add_product(float (&c)[4], const Half& x, int part, uint32 b0, uint32 b1) { mma(c, x[2 * part][0], x[2 * part + 1][0], x[2 * part][1], x[2 * part + 1][1], b0, b1); }
// z + x[key, head] W[head, unit] for 16 keys: fragments [unit tile] of [key, unit].
DEVICE void across_heads(uint2 (&z)[UT], const Half& x, const Held& w) {
#pragma unroll
  for (int part = 0; part < PARTS; part++) {
    // [head, key] of two key tiles, turned into the A operand [key, head].
    const uint4 turned = make_uint4(turn(x[2 * part][0]), turn(x[2 * part][1]), turn(x[2 * part + 1][0]), turn(x[2 * part + 1][1]));
#pragma unroll
    for (int s = 0; s < STEPS; s++) {
      const uint4 b = w.at(part, s);
      z[2 * s] = mma_half(turned, b.x, b.y, z[2 * s].x, z[2 * s].y);
      z[2 * s + 1] = mma_half(turned, b.z, b.w, z[2 * s + 1].x, z[2 * s + 1].y);
    }
  }
}
// The hidden units z of 16 keys, and how far leaky(z) is above leaky(U).
DEVICE void first_layer(uint2 (&risen)[UT], uint2 (&z)[UT], const Half& x, int f, const Tables& tables, const Held& w, int lane) {
#pragma unroll
  for (int n = 0; n < UT; n++) risen[n] = make_uint2(0, 0);
  across_heads(risen, x, w);
#pragma unroll
  for (int n = 0; n < UT; n++) {
    const uint2 minus_u = tables.minus_u[f][n][lane];
    risen[n] = make_uint2(rise(risen[n].x, minus_u.x, z[n].x), rise(risen[n].y, minus_u.y, z[n].y));
  }
}
// start + W[head, unit] v[unit, key] for a part's heads and key tile e of the pair whose fragments [key, unit] are v.
DEVICE uint2 across_units(uint2 start, const Held& w, int part, const uint2 (&v)[UT], int e) {
#pragma unroll
  for (int s = 0; s < STEPS; s++) start = mma_half(w.at(part, s), e ? v[2 * s].y : v[2 * s].x, e ? v[2 * s + 1].y : v[2 * s + 1].x, start.x, start.y);
  return start;
}

#ifndef BACKWARD
extern "C" __global__ void __launch_bounds__(32 * WARPS) mix(
    __half* x, const float* w1, const float* w2, const float* hidden_table, const uint8* mask,
    int rows, int keys, int table_size, int first_diagonal, int band_tile, int offset, int x_b, int x_t, int mask_b) {
  struct Memory { Weights w; Tables tables[WARPS]; Ring ring[WARPS][STAGES]; };
  static_assert(sizeof(Memory) == SHARED, "what the launch asks for");
  extern __shared__ __align__(128) char memory[];
  Memory& shared = *(Memory*)memory;
  const int q = blockIdx.x + first_diagonal, warp = threadIdx.x / 32, lane = threadIdx.x % 32, g = lane / 4, t = lane % 4;
  const Place place(q, band_tile, rows, keys);
  const int m = place.row + warp, delta0 = q * KEYS + offset + m;
  if (place.first >= place.last) return;
  const Tables& tables = shared.tables[warp];
  load_weights(shared.w, w1, w2);
  load_tables(shared.tables[warp], hidden_table, nullptr, table_size, delta0, lane);
  __syncthreads();
  const Held w_in(shared.w.in, lane), w_out(shared.w.out, lane);
  x += (long long)blockIdx.y * x_b + g * BLOCK + 8 * t;
  mask += blockIdx.y * mask_b;
  Ring* const ring = shared.ring[warp];
  auto fetch = [&](int tile) {
    const int row = tile * ROWS + m, key = place.start + tile * ROWS;
    const bool inside = tile < place.last && row < rows;
    fetch_tile(ring[tile % STAGES], x + (inside ? row * x_t + along(key) : 0), inside, g, lane);
    commit();
  };
#pragma unroll
  for (int ahead = 0; ahead < STAGES - 1; ahead++) fetch(place.first + ahead);
  for (int tile = place.first; tile < place.last; tile++) {
    fetch(tile + STAGES - 1);
    const int row = tile * ROWS + m, key = place.start + tile * ROWS;
    const bool real_row = row < rows, whole = sees_all(delta0) && real_row && key + KEYS <= keys;
    wait<STAGES - 1>();
    __syncwarp();
    Own xs;
    take_tile(xs, ring[tile % STAGES], lane);
#pragma unroll
    for (int f = 0; f < 2; f++) {
      Half xf;
      uint32 seen[2];
      uint2 risen[UT], z[UT];
      take_half(xf, xs, f);
      if (!whole) {
        look(seen, f, real_row, delta0, key, t, keys, mask);
        hide(xf, seen);
      }
      first_layer(risen, z, xf, f, tables, w_in, lane);
#pragma unroll
      for (int part = 0; part < PARTS; part++)
#pragma unroll
        for (int e = 0; e < 2; e++) {
          const uint2 y = across_units(make_uint2(xf[2 * part][e], xf[2 * part + 1][e]), w_out, part, risen, e);
#pragma unroll
          for (int i = 0; i < 2; i++) {
            const int r = 2 * part + i;
            xs[r][2 * f + e] = i ? y.y : y.x;
            if (!whole) xs[r][2 * f + e] = (xs[r][2 * f + e] & seen[e]) | (0xfc00fc00u & ~seen[e]);  // -inf
          }
        }
    }
    store_tile(xs, x + row * x_t + along(key), real_row, g);
    __syncwarp();
  }
}
#else
// A tile of a walk: those that are left of its element, whether its row exists, its first key, and where its row lies.
struct Cursor {
  int tiles, left, key;
  uint32 at, stat, mask;
};
// Where a float2 of row g goes within a line of sums, so that the lanes of a store meet different banks.
DEVICE int unit_place(int unit, int g) { return unit ^ 8 * (UNITS == 16 ? g >> 1 & 1 : g & 3); }
DEVICE int key_place(int key, int g) { return key ^ 2 * (g & 3); }
DEVICE int row_of(int key) { return 2 * (key >> 3) + (key & 1); }  // g of `key_of`

// X <- P, Y <- dA; the sums of U, C, W1 and W2 go to the block's slot, or are added to what is there. A block walks
// over the same diagonal of some elements, one after the other.
extern "C" __global__ void __launch_bounds__(32 * WARPS, BLOCKS) mix_backward(
    __half* x, __half* y, const float* w1, const float* w2, const float* hidden_table, const float* static_table,
    const float* lse, const float* delta, const uint8* mask, const int* gate, int gated, float* slot, int batch, int elements, int rows, int keys,
    int table_size, int first_diagonal, int band_tile, int offset, int slots, int slot_size, int add,
    int x_b, int x_t, int stat_b, int stat_h, int stat_t, int mask_b) {
  struct Stage { Ring x, y; float stats[2 * HEADS]; };
  struct Sums { float u[WARPS][KEYS * UNITS], c[WARPS][HEADS * KEYS], w1[WARPS][HEADS * UNITS], w2[WARPS][HEADS * UNITS]; };
  struct Walk { Tables tables[WARPS]; Stage ring[WARPS][STAGES]; };
  struct Memory { Weights w; union { Walk walk; Sums sums; }; };
  static_assert(sizeof(Memory) == SHARED, "what the launch asks for");
  if (gated >= 0 && *gate != gated) return;
  extern __shared__ __align__(128) char memory[];
  Memory& shared = *(Memory*)memory;
  const int q = blockIdx.x + first_diagonal, warp = threadIdx.x / 32, lane = threadIdx.x % 32, g = lane / 4, t = lane % 4;
  const Place place(q, band_tile, rows, keys);
  const int m = place.row + warp, delta0 = q * KEYS + offset + m;
  const int tiles = max(0, place.last - place.first), first_element = blockIdx.y * elements;
  const int total = tiles * max(0, min(elements, batch - first_element));
  if (add && total == 0) return;
  const Tables& tables = shared.walk.tables[warp];
  load_weights(shared.w, w1, w2);
  load_tables(shared.walk.tables[warp], hidden_table, static_table, table_size, delta0, lane);
  __syncthreads();
  const Held w_in(shared.w.in, lane), w_out(shared.w.out, lane), w_out_turned(shared.w.out_turned, lane), w_in_turned(shared.w.in_turned, lane);
  float acc_u[2][UT][4] = {}, acc_c[PARTS][4][4] = {}, acc_w1[PARTS][UT][4] = {}, acc_w2[PARTS][UT][4] = {};
  // The unit matrix as an A operand, and as a B operand of the lower and the upper 8 of 16 keys.
  const uint32 ones = 2 * t == g ? 0x3c00u : 2 * t + 1 == g ? 0x3c000000u : 0u;
  const int row0 = place.first * ROWS + m, key0 = place.start + place.first * ROWS, left0 = min(ROWS * tiles, rows - row0);
  const int step = ROWS * x_t, stat_step = ROWS * stat_t;
  Cursor here = {
      tiles, left0, key0, (uint32)(first_element * x_b + row0 * x_t + g * BLOCK + 8 * t),
      (uint32)(first_element * stat_b + row0 * stat_t), (uint32)(first_element * mask_b)};
  Cursor next = here;
  auto advance = [&](Cursor& c) {
    c.left -= ROWS; c.key += ROWS; c.at += step; c.stat += stat_step;
    if (--c.tiles == 0) {
      c.tiles = tiles; c.left = left0; c.key = key0;
      c.at += x_b - tiles * step; c.stat += stat_b - tiles * stat_step; c.mask += mask_b;
    }
  };
  Stage* const ring = shared.walk.ring[warp];
  int fetched = 0;
  auto fetch = [&](int into) {
    const bool real = fetched++ < total && next.left > 0;
    const uint32 from = real ? next.at + along(next.key) : 0;
    fetch_tile(ring[into].x, x + from, real, g, lane);
    fetch_tile(ring[into].y, y + from, real, g, lane);
#pragma unroll
    for (int i = lane; i < 2 * HEADS; i += 32) copy4(address(&ring[into].stats[i]), (i < HEADS ? lse : delta) + (real ? next.stat + min(i % HEADS, H - 1) * stat_h : 0), real);
    commit();
    advance(next);
  };
#pragma unroll
  for (int ahead = 0; ahead < STAGES - 1; ahead++) fetch(ahead);
  // Rows past the last are no work, but the walk of a warp is as long as that of its block.
  for (int n = 0, stage_of = 0; n < total; n++, advance(here), stage_of = stage_of == STAGES - 1 ? 0 : stage_of + 1) {
    fetch(stage_of == 0 ? STAGES - 1 : stage_of - 1);
    const bool whole = sees_all(delta0) && here.left > 0 && here.key + KEYS <= keys;
    wait<STAGES - 1>();
    __syncwarp();
    const Stage& stage = ring[stage_of];
    Own xs, ys;
    take_tile(xs, stage.x, lane);
    take_tile(ys, stage.y, lane);
#pragma unroll
    for (int f = 0; f < 2; f++) {
      Half xf, yf;
      uint32 seen[2];
      uint2 risen[UT], z[UT];
      take_half(xf, xs, f);
      take_half(yf, ys, f);
      if (!whole) {
        look(seen, f, here.left > 0, delta0, here.key, t, keys, mask + here.mask);
        hide(xf, seen);
        hide(yf, seen);
      }
      first_layer(risen, z, xf, f, tables, w_in, lane);
#pragma unroll
      for (int part = 0; part < PARTS; part++)
#pragma unroll
        for (int e = 0; e < 2; e++) {
          const uint2 logits = across_units(make_uint2(xf[2 * part][e], xf[2 * part + 1][e]), w_out, part, risen, e);
#pragma unroll
          for (int i = 0; i < 2; i++) {
            const int r = 2 * part + i;
            const float log_sum = stage.stats[8 * r + g], mean = stage.stats[HEADS + 8 * r + g];
            const float2 c = tables.c[r][2 * f + e][lane], v = __half22float2(half2_of(i ? logits.y : logits.x)), dp = __half22float2(half2_of(yf[r][e]));
            float p0 = exp2_fast(fmaf(v.x - log_sum, LOG2E, c.x)), p1 = exp2_fast(fmaf(v.y - log_sum, LOG2E, c.y));
            if (!whole) {
              p0 = seen[e] & 0xffffu ? p0 : 0.f;
              p1 = seen[e] >> 16 ? p1 : 0.f;
            }
            xs[r][2 * f + e] = pack(p0, p1);
            yf[r][e] = pack(p0 * (dp.x - mean), p1 * (dp.y - mean));  // Y is dS from here on
          }
        }
#pragma unroll
      for (int part = 0; part < PARTS; part++) {
        add_product(acc_c[part][2 * f], yf, part, ones, 0);
        add_product(acc_c[part][2 * f + 1], yf, part, 0, ones);
      }
      uint2 dz[UT] = {};
      across_heads(dz, yf, w_out_turned);
#pragma unroll
      for (int n = 0; n < UT; n++) {
        dz[n] = make_uint2(leaky_backward(dz[n].x, z[n].x), leaky_backward(dz[n].y, z[n].y));
        const uint32 risen_low = turn(risen[n].x), risen_high = turn(risen[n].y), low = turn(dz[n].x), high = turn(dz[n].y);
#pragma unroll
        for (int part = 0; part < PARTS; part++) {
          add_product(acc_w2[part][n], yf, part, risen_low, risen_high);
          add_product(acc_w1[part][n], xf, part, low, high);
        }
        mma(acc_u[f][n], ones, 0, 0, ones, low, high);
      }
#pragma unroll
      for (int part = 0; part < PARTS; part++)
#pragma unroll
        for (int e = 0; e < 2; e++) {
          const uint2 da = across_units(make_uint2(yf[2 * part][e], yf[2 * part + 1][e]), w_in_turned, part, dz, e);
          ys[2 * part][2 * f + e] = da.x;
          ys[2 * part + 1][2 * f + e] = da.y;
        }
    }
    const uint32 to = here.at + along(here.key);
    store_tile(xs, x + to, here.left > 0, g);
    store_tile(ys, y + to, here.left > 0, g);
    __syncwarp();
  }
  wait<0>();
  __syncthreads();
  Sums& sums = shared.sums;
#pragma unroll
  for (int i = 0; i < 2; i++) {
    auto pair = [&](const float (&c)[4]) { return make_float2(c[2 * i], c[2 * i + 1]); };
#pragma unroll
    for (int n = 0; n < UT; n++) {
      const int unit = unit_place(8 * n + 2 * t, g);
#pragma unroll
      for (int f = 0; f < 2; f++) *(float2*)&sums.u[warp][key_of(2 * f + i, g) * UNITS + unit] = pair(acc_u[f][n]);
#pragma unroll
      for (int part = 0; part < PARTS; part++) {
        const int at = (16 * part + 8 * i + g) * UNITS + unit;
        *(float2*)&sums.w1[warp][at] = pair(acc_w1[part][n]);
        *(float2*)&sums.w2[warp][at] = pair(acc_w2[part][n]);
      }
    }
#pragma unroll
    for (int part = 0; part < PARTS; part++)
#pragma unroll
      for (int p = 0; p < 4; p++) *(float2*)&sums.c[warp][(16 * part + 8 * i + g) * KEYS + key_place(8 * t + 2 * p, g)] = pair(acc_c[part][p]);
  }
  __syncthreads();
  // The sums of the warps, in their order; line r is the distance of row m and key m + KEYS - 1 - r.
  constexpr int THREADS = 32 * WARPS;
  slot += ((long long)(blockIdx.y * (gridDim.z / SHARES) + blockIdx.z / SHARES) * slots + blockIdx.x * SHARES + blockIdx.z % SHARES) * slot_size;
  auto put = [&](int at, float sum) { slot[at] = add ? slot[at] + sum : sum; };
  for (int i = threadIdx.x; i < LINES * UNITS; i += THREADS) {
    float sum = 0.f;
#pragma unroll
    for (int row = 0; row < WARPS; row++) {
      const int key = row + KEYS - 1 - i / UNITS;
      if (key >= 0 && key < KEYS) sum += sums.u[row][key * UNITS + unit_place(i % UNITS, row_of(key))];
    }
    put(i, sum);
  }
  slot += LINES * UNITS;
  for (int i = threadIdx.x; i < HEADS * LINES; i += THREADS) {
    float sum = 0.f;
#pragma unroll
    for (int row = 0; row < WARPS; row++) {
      const int key = row + KEYS - 1 - i % LINES, head = i / LINES;
      if (key >= 0 && key < KEYS) sum += sums.c[row][head * KEYS + key_place(key, head)];
    }
    put(i, sum);
  }
  slot += HEADS * LINES;
  for (int i = threadIdx.x; i < HEADS * UNITS; i += THREADS) {
    const int from = i / UNITS * UNITS + unit_place(i % UNITS, i / UNITS);
    float sum_w1 = 0.f, sum_w2 = 0.f;
#pragma unroll
    for (int row = 0; row < WARPS; row++) { sum_w1 += sums.w1[row][from]; sum_w2 += sums.w2[row][from]; }
    put(i, sum_w1);
    put(HEADS * UNITS + i, sum_w2);
  }
}
#endif
