// The two kernels across heads with explicit layouts, for fp16 scratch: see kernels.py for their place.
//
// A warp owns 32 neighbouring keys of one row and walks down a diagonal of tiles (ROWS rows, one a warp,
// times KEYS keys), so that its distances, and with them its entries of U and C, never change. Lane
// (g, t) = (lane / 4, lane % 4) loads 16 bytes for each of heads g and g + 8: keys 8 t .. 8 t + 7. Pair p of
// them is column pair (2 t, 2 t + 1) of key tile p, an 8 x 8 block [head, key] that mma.sync takes as it is
// and movmatrix turns into [key, head]. The next tiles are on their way meanwhile, by cp.async into a ring
// that is each warp's own: with few warps on a multiprocessor, latency is what costs. A block has WARPS of the
// rows of a tile, on a segment of the diagonal.
//
//   z[key, unit] = x[key, head] W1^T + U     hidden = leaky(z)      s[head, key] = x + C + W2 hidden^T
//   P = exp(s - lse), dS = P (dP - delta)    dz = leaky'(z) dS W2   dA[head, key] = dS + W1^T dz^T
//
// Products of layers are summed in fp16, since that is what the next one reads; sums over pairs in float32,
// on the tensor cores too: dU and dC are products with the unit matrix.
//
// Macros: H heads, D hidden units padded to UNITS (16 or 32), CAUSAL, MASKED, ROWS, KEYS of a tile, WARPS.
#include <cuda_fp16.h>
typedef unsigned int uint32;
typedef unsigned char uint8;
constexpr int SHARES = ROWS / WARPS, HEADS = 16, UT = UNITS / 8, STEPS = UNITS / 16, LINES = ROWS + KEYS, STAGES = 3;
constexpr float LOG2E = 1.4426950408889634f;
constexpr float NEVER = -1.f / 0.f;

__device__ __forceinline__ void mma(float (&c)[4], uint32 a0, uint32 a1, uint32 a2, uint32 a3, uint32 b0, uint32 b1) {
  asm("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
      : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3]) : "r"(a0), "r"(a1), "r"(a2), "r"(a3), "r"(b0), "r"(b1));
}
__device__ __forceinline__ uint2 mma_half(uint4 a, uint32 b0, uint32 b1, uint32 c0, uint32 c1) {
  uint2 d;
  asm("mma.sync.aligned.m16n8k16.row.col.f16.f16.f16.f16 {%0,%1}, {%2,%3,%4,%5}, {%6,%7}, {%8,%9};"
      : "=r"(d.x), "=r"(d.y) : "r"(a.x), "r"(a.y), "r"(a.z), "r"(a.w), "r"(b0), "r"(b1), "r"(c0), "r"(c1));
  return d;
}
__device__ __forceinline__ uint32 turn(uint32 block) {
  uint32 turned;
  asm("movmatrix.sync.aligned.m8n8.trans.b16 %0, %1;" : "=r"(turned) : "r"(block));
  return turned;
}
__device__ __forceinline__ __half2 half2_of(uint32 x) { return *(__half2*)&x; }
__device__ __forceinline__ uint32 bits(__half2 x) { return *(uint32*)&x; }
__device__ __forceinline__ uint32 pack(float a, float b) { return bits(__floats2half2_rn(a, b)); }
__device__ __forceinline__ uint32 leaky(uint32 z) { __half2 v = half2_of(z); return bits(__hmax2(v, __hmul2(v, __float2half2_rn(0.01f)))); }
// d leaky'(z): half of d (1 + slope) and half of d (1 - slope) with the sign of z.
__device__ __forceinline__ uint32 leaky_backward(uint32 d, uint32 z) {
  __half2 signed_d = half2_of(d ^ (z & 0x80008000u));
  return bits(__hfma2(half2_of(d), __float2half2_rn(0.505f), __hmul2(signed_d, __float2half2_rn(0.495f))));
}
__device__ __forceinline__ float exp2_fast(float x) { float y; asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x)); return y; }
// The key of a warp's 32 that is column c of key tile p.
__device__ __forceinline__ int key_of(int p, int c) { return 8 * (c >> 1) + 2 * p + (c & 1); }

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

// The weights as fragments, 16 bytes a lane: W1 [unit, head] and W2^T [unit, head] as B operands of two unit tiles
// each, W2 [head, unit] and W1^T [head, unit] as A operands of 16 units each.
struct Weights {
  uint4 in[STEPS][32], out[STEPS][32];
#ifdef BACKWARD
  uint4 out_turned[STEPS][32], in_turned[STEPS][32];
#endif
};
__device__ __forceinline__ void load_weights(Weights& w, const float* w1, const float* w2) {
  if (threadIdx.x >= 32) return;
  const int lane = threadIdx.x, g = lane / 4, t = lane % 4;
  auto in = [&](int unit, int head) { return unit < D && head < H ? w1[unit * H + head] : 0.f; };
  auto out = [&](int head, int unit) { return unit < D && head < H ? w2[head * D + unit] : 0.f; };
#pragma unroll
  for (int s = 0; s < STEPS; s++) {
    int unit = 16 * s + g, head = 2 * t, line = g, column = 16 * s + 2 * t;
    w.in[s][lane] = make_uint4(pack(in(unit, head), in(unit, head + 1)), pack(in(unit, head + 8), in(unit, head + 9)),
                               pack(in(unit + 8, head), in(unit + 8, head + 1)), pack(in(unit + 8, head + 8), in(unit + 8, head + 9)));
    w.out[s][lane] = make_uint4(pack(out(line, column), out(line, column + 1)), pack(out(line + 8, column), out(line + 8, column + 1)),
                                pack(out(line, column + 8), out(line, column + 9)), pack(out(line + 8, column + 8), out(line + 8, column + 9)));
#ifdef BACKWARD
    w.out_turned[s][lane] = make_uint4(pack(out(head, unit), out(head + 1, unit)), pack(out(head + 8, unit), out(head + 9, unit)),
                                       pack(out(head, unit + 8), out(head + 1, unit + 8)), pack(out(head + 8, unit + 8), out(head + 9, unit + 8)));
    w.in_turned[s][lane] = make_uint4(pack(in(column, line), in(column + 1, line)), pack(in(column, line + 8), in(column + 1, line + 8)),
                                      pack(in(column + 8, line), in(column + 9, line)), pack(in(column + 8, line + 8), in(column + 9, line + 8)));
#endif
  }
}

// U and C at a warp's keys, constant along the diagonal: U as accumulators [key tile pair][unit tile], C, in base 2,
// as scores lie.
struct Tables { uint2 u[2][UT][32]; float2 c[2][4][32]; };
__device__ __forceinline__ void load_tables(Tables& tables, const float* hidden_table, const float* static_table, int size, int delta0, int lane) {
  const int g = lane / 4, t = lane % 4;
#pragma unroll
  for (int f = 0; f < 2; f++)
#pragma unroll
    for (int n = 0; n < UT; n++) {
      auto at = [&](int e) {
        int delta = abs(delta0 - key_of(2 * f + e, g)), unit = 8 * n + 2 * t;
        const float* row = hidden_table + delta * D + unit;
        return pack(delta < size && unit < D ? row[0] : 0.f, delta < size && unit + 1 < D ? row[1] : 0.f);
      };
      tables.u[f][n][lane] = make_uint2(at(0), at(1));
    }
#pragma unroll
  for (int r = 0; r < 2; r++) {
    const int head = 8 * r + g;
    const float* line = static_table + head * size;
    // Heads that are padding have no weight.
    auto at = [&](int delta) { return head < H ? delta < size ? LOG2E * line[delta] : 0.f : NEVER; };
#pragma unroll
    for (int p = 0; p < 4; p++) tables.c[r][p][lane] = make_float2(at(abs(delta0 - 8 * t - 2 * p)), at(abs(delta0 - 8 * t - 2 * p - 1)));
  }
}

__device__ __forceinline__ void copy16(void* to, const void* from, bool real) {
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"((uint32)__cvta_generic_to_shared(to)), "l"(from), "r"(real ? 16 : 0));
}
__device__ __forceinline__ void copy4(void* to, const void* from, bool real) {
  asm volatile("cp.async.ca.shared.global [%0], [%1], 4, %2;" ::"r"((uint32)__cvta_generic_to_shared(to)), "l"(from), "r"(real ? 4 : 0));
}
__device__ __forceinline__ void commit() { asm volatile("cp.async.commit_group;" ::: "memory"); }
template <int N> __device__ __forceinline__ void wait() { asm volatile("cp.async.wait_group %0;" ::"n"(N) : "memory"); }

// A tile on its way, 32 scores of heads g and g + 8, 16 bytes a lane, and half of one in registers.
typedef uint4 Ring[2][32];
typedef uint32 Half[2][2];
__device__ __forceinline__ void fetch_tile(Ring& ring, const __half* from, int upper, bool inside, int g, int lane) {
#pragma unroll
  for (int r = 0; r < 2; r++) copy16(&ring[r][lane], from + r * upper, inside && 8 * r + g < H);
}
// Half f of a tile that has arrived, and back: 8 bytes of the lane's own 16.
__device__ __forceinline__ void take_half(Half& x, const Ring& ring, int f, int lane) {
#pragma unroll
  for (int r = 0; r < 2; r++) {
    const uint2 v = ((const uint2*)&ring[r][lane])[f];
    x[r][0] = v.x; x[r][1] = v.y;
  }
}
__device__ __forceinline__ void put_half(Ring& ring, const Half& x, int f, int lane) {
#pragma unroll
  for (int r = 0; r < 2; r++) ((uint2*)&ring[r][lane])[f] = make_uint2(x[r][0], x[r][1]);
}
__device__ __forceinline__ void store_tile(const Ring& ring, __half* to, int upper, bool inside, int g, int lane) {
#pragma unroll
  for (int r = 0; r < 2; r++)
    if (inside && 8 * r + g < H) *(uint4*)(to + r * upper) = ring[r][lane];
}

// Which keys of half f of a tile a warp's row sees, as masks of halves.
__device__ __forceinline__ void look(uint32 (&seen)[2], int f, bool real_row, int delta0, int first_key, int t, int keys, const uint8* mask) {
#pragma unroll
  for (int e = 0; e < 2; e++) {
    const int place = 8 * t + 4 * f + 2 * e, low = first_key + place, high = low + 1, delta = delta0 - place;
    const bool sees_low = real_row && low >= 0 && low < keys && (!CAUSAL || delta >= 0) && (!MASKED || mask[low]);
    const bool sees_high = real_row && high >= 0 && high < keys && (!CAUSAL || delta >= 1) && (!MASKED || mask[high]);
    seen[e] = (sees_low ? 0xffffu : 0u) | (sees_high ? 0xffff0000u : 0u);
  }
}
// Whether a row at that distance from the first of its keys may see them all.
__device__ __forceinline__ bool sees_all(int delta0) { return !MASKED && (!CAUSAL || delta0 >= KEYS - 1); }
__device__ __forceinline__ void hide(Half& x, const uint32 (&seen)[2]) {
#pragma unroll
  for (int r = 0; r < 2; r++)
#pragma unroll
    for (int e = 0; e < 2; e++) x[r][e] &= seen[e];
}

// Half of a tile, [head, key] of key tiles 2 f and 2 f + 1, as the A operand [key, head].
__device__ __forceinline__ uint4 turn_half(const Half& x) { return make_uint4(turn(x[0][0]), turn(x[0][1]), turn(x[1][0]), turn(x[1][1])); }
// The hidden units of 16 keys: fragments [unit tile] of [key, unit].
__device__ __forceinline__ void first_layer(uint2 (&hidden)[UT], const Half& x, int f, const Tables& tables, const Weights& w, int lane) {
  uint4 turned = turn_half(x);
#pragma unroll
  for (int s = 0; s < STEPS; s++) {
    uint4 in = w.in[s][lane];
#pragma unroll
    for (int n = 2 * s; n < 2 * s + 2; n++) {
      uint2 u = tables.u[f][n][lane];
      hidden[n] = mma_half(turned, n % 2 ? in.z : in.x, n % 2 ? in.w : in.y, u.x, u.y);
      hidden[n] = make_uint2(leaky(hidden[n].x), leaky(hidden[n].y));
    }
  }
}
// start + W[head, unit] v[unit, key] for key tile e of the pair whose fragments [key, unit] are v.
__device__ __forceinline__ uint2 across_units(uint2 start, const uint4 (&w)[STEPS][32], const uint2 (&v)[UT], int e, int lane) {
#pragma unroll
  for (int s = 0; s < STEPS; s++) start = mma_half(w[s][lane], e ? v[2 * s].y : v[2 * s].x, e ? v[2 * s + 1].y : v[2 * s + 1].x, start.x, start.y);
  return start;
}

#ifndef BACKWARD
extern "C" __global__ void __launch_bounds__(32 * WARPS) mix(
    __half* x, const float* w1, const float* w2, const float* hidden_table, const float* static_table, const uint8* mask,
    int rows, int keys, int table_size, int first_diagonal, int band_tile, int offset, int x_b, int x_h, int x_t, int mask_b) {
  __shared__ Weights w;
  __shared__ Tables tables_of[WARPS];
  __shared__ Ring ring[WARPS][STAGES];
  const int q = blockIdx.x + first_diagonal, warp = threadIdx.x / 32, lane = threadIdx.x % 32, g = lane / 4, t = lane % 4;
  const Place place(q, band_tile, rows, keys);
  const int m = place.row + warp, delta0 = q * KEYS + offset + m;
  if (place.first >= place.last) return;
  const bool all = sees_all(delta0);
  Tables& tables = tables_of[warp];
  load_weights(w, w1, w2);
  load_tables(tables, hidden_table, static_table, table_size, delta0, lane);
  __syncthreads();
  __half* base = x + (long long)blockIdx.y * x_b;
  mask += blockIdx.y * mask_b;
  auto fetch = [&](int tile) {
    int row = tile * ROWS + m, key = place.start + tile * ROWS + 8 * t;
    bool inside = tile < place.last && row < rows && key >= 0 && key < keys;
    fetch_tile(ring[warp][tile % STAGES], base + (inside ? g * x_h + row * x_t + key : 0), inside ? 8 * x_h : 0, inside, g, lane);
    commit();
  };
#pragma unroll
  for (int ahead = 0; ahead < STAGES - 1; ahead++) fetch(place.first + ahead);
  for (int tile = place.first; tile < place.last; tile++) {
    fetch(tile + STAGES - 1);
    int row = tile * ROWS + m, first_key = place.start + tile * ROWS, key = first_key + 8 * t;
    const bool real_row = row < rows, whole = all && real_row && first_key >= 0 && first_key + KEYS <= keys;
    Ring& stage = ring[warp][tile % STAGES];
    wait<STAGES - 1>();
    __syncwarp();
#pragma unroll
    for (int f = 0; f < 2; f++) {
      Half xf;
      uint32 seen[2];
      uint2 hidden[UT];
      take_half(xf, stage, f, lane);
      if (!whole) {
        look(seen, f, real_row, delta0, first_key, t, keys, mask);
        hide(xf, seen);
      }
      first_layer(hidden, xf, f, tables, w, lane);
#pragma unroll
      for (int e = 0; e < 2; e++) {
        const uint2 y = across_units(make_uint2(xf[0][e], xf[1][e]), w.out, hidden, e, lane);
#pragma unroll
        for (int r = 0; r < 2; r++) {
          const float2 c = tables.c[r][2 * f + e][lane], v = __half22float2(half2_of(r ? y.y : y.x));
          xf[r][e] = pack(fmaf(c.x, 1.f / LOG2E, v.x), fmaf(c.y, 1.f / LOG2E, v.y));
          if (!whole) xf[r][e] = (xf[r][e] & seen[e]) | (0xfc00fc00u & ~seen[e]);  // -inf
        }
      }
      put_half(stage, xf, f, lane);
    }
    store_tile(stage, base + g * x_h + row * x_t + key, 8 * x_h, real_row && key >= 0 && key < keys, g, lane);
    __syncwarp();
  }
}
#else
// X <- P, Y <- dA; shares of the gradients of W1, W2, U, C are added to the block's slot in a fixed order.
extern "C" __global__ void __launch_bounds__(32 * WARPS, BLOCKS) mix_backward(
    __half* x, __half* y, const float* w1, const float* w2, const float* hidden_table, const float* static_table,
    const float* lse, const float* delta, const uint8* mask, float* grad_w1, float* grad_w2, float* grad_hidden, float* grad_static,
    int rows, int keys, int table_size, int first_diagonal, int band_tile, int offset, int slots, int add,
    int x_b, int x_h, int x_t, int stat_b, int stat_h, int mask_b) {
  struct Stage { Ring x, y; float stats[2][HEADS]; };
  struct Sums { float u[WARPS][KEYS][UNITS], c[WARPS][HEADS][KEYS], w1[WARPS][HEADS][UNITS], w2[WARPS][HEADS][UNITS]; };
  struct Walk { Tables tables[WARPS]; Stage ring[WARPS][STAGES]; };
  __shared__ Weights w;
  __shared__ union { Walk walk; Sums sums; } memory;
  const int q = blockIdx.x + first_diagonal, b = blockIdx.y, warp = threadIdx.x / 32, lane = threadIdx.x % 32, g = lane / 4, t = lane % 4;
  const Place place(q, band_tile, rows, keys);
  const int m = place.row + warp, delta0 = q * KEYS + offset + m;
  if (add && place.first >= place.last) return;
  const Tables& tables = memory.walk.tables[warp];
  load_weights(w, w1, w2);
  load_tables(memory.walk.tables[warp], hidden_table, static_table, table_size, delta0, lane);
  __syncthreads();
  float acc_u[2][UT][4] = {}, acc_c[4][4] = {}, acc_w1[UT][4] = {}, acc_w2[UT][4] = {};
  // The unit matrix as an A operand, and as a B operand of the lower and the upper 8 of 16 keys.
  const uint32 ones = 2 * t == g ? 0x3c00u : 2 * t + 1 == g ? 0x3c000000u : 0u;
  // Everything that changes from tile to tile is in a few 32-bit registers, since the sums fill the others: the rows
  // that are left, the key, and the places of scores and statistics of the tile to come.
  int left = min(ROWS * (place.last - place.first), rows - (place.first * ROWS + m)), key = place.start + place.first * ROWS;
  uint32 at = b * x_b + g * x_h + (place.first * ROWS + m) * x_t + key + 8 * t;
  uint32 stat = b * stat_b + min(lane % HEADS, H - 1) * stat_h + place.first * ROWS + m;
  Stage* const ring = memory.walk.ring[warp];
  // The tile `ahead` tiles from this one, into a stage.
  auto fetch = [&](int ahead, int into) {
    const int there = key + ahead * ROWS + 8 * t;
    const bool real = left > ahead * ROWS, inside = real && there >= 0 && there < keys;
    const uint32 from = inside ? at + ahead * ROWS * (x_t + 1) : 0, upper = inside ? 8 * x_h : 0;
    fetch_tile(ring[into].x, x + from, upper, inside, g, lane);
    fetch_tile(ring[into].y, y + from, upper, inside, g, lane);
    copy4(&ring[into].stats[0][lane], (lane < HEADS ? lse : delta) + (real ? stat + ahead * ROWS : 0), real);
    commit();
  };
#pragma unroll
  for (int ahead = 0; ahead < STAGES - 1; ahead++) fetch(ahead, ahead);
  // Rows past the last are no work, but the walk of a warp is as long as that of its block.
  for (int tiles = place.last - place.first, stage_of = 0; tiles > 0; tiles--, left -= ROWS, key += ROWS, at += ROWS * (x_t + 1), stat += ROWS, stage_of = stage_of == STAGES - 1 ? 0 : stage_of + 1) {
    fetch(STAGES - 1, stage_of == 0 ? STAGES - 1 : stage_of - 1);
    const bool whole = sees_all(delta0) && left > 0 && key >= 0 && key + KEYS <= keys;
    wait<STAGES - 1>();
    __syncwarp();
    Stage& stage = ring[stage_of];
#pragma unroll
    for (int f = 0; f < 2; f++) {
      Half xf, yf, weight;
      uint32 seen[2];
      uint2 hidden[UT];
      take_half(xf, stage.x, f, lane);
      take_half(yf, stage.y, f, lane);
      if (!whole) {
        look(seen, f, left > 0, delta0, key, t, keys, mask + b * mask_b);
        hide(xf, seen);
        hide(yf, seen);
      }
      first_layer(hidden, xf, f, tables, w, lane);
#pragma unroll
      for (int e = 0; e < 2; e++) {
        const uint2 logits = across_units(make_uint2(xf[0][e], xf[1][e]), w.out, hidden, e, lane);
#pragma unroll
        for (int r = 0; r < 2; r++) {
          const float log_sum = stage.stats[0][8 * r + g], shared = stage.stats[1][8 * r + g];
          const float2 c = tables.c[r][2 * f + e][lane], v = __half22float2(half2_of(r ? logits.y : logits.x)), dp = __half22float2(half2_of(yf[r][e]));
          float p0 = exp2_fast(fmaf(v.x - log_sum, LOG2E, c.x)), p1 = exp2_fast(fmaf(v.y - log_sum, LOG2E, c.y));
          if (!whole) {
            p0 = seen[e] & 0xffffu ? p0 : 0.f;
            p1 = seen[e] >> 16 ? p1 : 0.f;
          }
          weight[r][e] = pack(p0, p1);
          yf[r][e] = pack(p0 * (dp.x - shared), p1 * (dp.y - shared));
        }
      }
      put_half(stage.x, weight, f, lane);
      const uint4 turned = turn_half(yf);  // Y is dS from here on
      mma(acc_c[2 * f], yf[0][0], yf[1][0], yf[0][1], yf[1][1], ones, 0);
      mma(acc_c[2 * f + 1], yf[0][0], yf[1][0], yf[0][1], yf[1][1], 0, ones);
      uint2 dz[UT];
#pragma unroll
      for (int s = 0; s < STEPS; s++) {
        uint4 out = w.out_turned[s][lane];
#pragma unroll
        for (int n = 2 * s; n < 2 * s + 2; n++) {
          dz[n] = mma_half(turned, n % 2 ? out.z : out.x, n % 2 ? out.w : out.y, 0, 0);
          dz[n] = make_uint2(leaky_backward(dz[n].x, hidden[n].x), leaky_backward(dz[n].y, hidden[n].y));
          mma(acc_w2[n], yf[0][0], yf[1][0], yf[0][1], yf[1][1], turn(hidden[n].x), turn(hidden[n].y));
          uint32 low = turn(dz[n].x), high = turn(dz[n].y);
          mma(acc_w1[n], xf[0][0], xf[1][0], xf[0][1], xf[1][1], low, high);
          mma(acc_u[f][n], ones, 0, 0, ones, low, high);
        }
      }
#pragma unroll
      for (int e = 0; e < 2; e++) {
        uint2 da = across_units(make_uint2(yf[0][e], yf[1][e]), w.in_turned, dz, e, lane);
        yf[0][e] = da.x; yf[1][e] = da.y;
      }
      put_half(stage.y, yf, f, lane);
    }
    const bool inside = left > 0 && key + 8 * t >= 0 && key + 8 * t < keys;
    store_tile(stage.x, x + at, 8 * x_h, inside, g, lane);
    store_tile(stage.y, y + at, 8 * x_h, inside, g, lane);
    __syncwarp();
  }
  wait<0>();
  __syncthreads();
  Sums& sums = memory.sums;
#pragma unroll
  for (int i = 0; i < 4; i++) {
#pragma unroll
    for (int n = 0; n < UT; n++) {
      int unit = 8 * n + 2 * t + (i & 1), head = 8 * (i >> 1) + g;
#pragma unroll
      for (int f = 0; f < 2; f++) sums.u[warp][key_of(2 * f + (i >> 1), g)][unit] = acc_u[f][n][i];
      sums.w1[warp][head][unit] = acc_w1[n][i];
      sums.w2[warp][head][unit] = acc_w2[n][i];
    }
#pragma unroll
    for (int p = 0; p < 4; p++) sums.c[warp][8 * (i >> 1) + g][8 * t + 2 * p + (i & 1)] = acc_c[p][i];
  }
  __syncthreads();
  // The sums of the warps, in their order; line r is the distance of row m and key m + KEYS - 1 - r. What the slot
  // holds, if bands add to it, is loaded first, all at once.
  const long long slot = ((long long)b * gridDim.z + blockIdx.z) * slots + blockIdx.x;
  grad_hidden += slot * LINES * UNITS;
  grad_static += slot * LINES * HEADS;
  grad_w1 += slot * HEADS * UNITS;
  grad_w2 += slot * HEADS * UNITS;
  constexpr int THREADS = 32 * WARPS, U_SHARE = LINES * UNITS / THREADS, C_SHARE = LINES * HEADS / THREADS, W_SHARE = HEADS * UNITS / THREADS;
  static_assert(LINES * UNITS % THREADS == 0 && LINES * HEADS % THREADS == 0 && HEADS * UNITS % THREADS == 0, "shares are whole");
  float u[U_SHARE], c[C_SHARE], w1_sum[W_SHARE], w2_sum[W_SHARE];
  const int thread = threadIdx.x;
#pragma unroll
  for (int k = 0; k < U_SHARE; k++) u[k] = add ? grad_hidden[k * THREADS + thread] : 0.f;
#pragma unroll
  for (int k = 0; k < C_SHARE; k++) c[k] = add ? grad_static[k * THREADS + thread] : 0.f;
#pragma unroll
  for (int k = 0; k < W_SHARE; k++) { w1_sum[k] = add ? grad_w1[k * THREADS + thread] : 0.f; w2_sum[k] = add ? grad_w2[k * THREADS + thread] : 0.f; }
#pragma unroll
  for (int row = 0; row < WARPS; row++) {
#pragma unroll
    for (int k = 0; k < U_SHARE; k++) {
      int i = k * THREADS + thread, key = place.row + row + KEYS - 1 - i / UNITS;
      if (key >= 0 && key < KEYS) u[k] += sums.u[row][key][i % UNITS];
    }
#pragma unroll
    for (int k = 0; k < C_SHARE; k++) {
      int i = k * THREADS + thread, key = place.row + row + KEYS - 1 - i / HEADS;
      if (key >= 0 && key < KEYS) c[k] += sums.c[row][i % HEADS][key];
    }
#pragma unroll
    for (int k = 0; k < W_SHARE; k++) {
      int i = k * THREADS + thread;
      w1_sum[k] += sums.w1[row][i % HEADS][i / HEADS];
      w2_sum[k] += sums.w2[row][i / UNITS][i % UNITS];
    }
  }
#pragma unroll
  for (int k = 0; k < U_SHARE; k++) grad_hidden[k * THREADS + thread] = u[k];
#pragma unroll
  for (int k = 0; k < C_SHARE; k++) grad_static[k * THREADS + thread] = c[k];
#pragma unroll
  for (int k = 0; k < W_SHARE; k++) { grad_w1[k * THREADS + thread] = w1_sum[k]; grad_w2[k * THREADS + thread] = w2_sum[k]; }
}
#endif
