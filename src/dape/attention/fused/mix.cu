// The two kernels across heads with explicit layouts, for fp16 scratch: see kernels.py for their place.
//
// A warp owns 32 neighbouring keys of one row and walks down a diagonal of tiles (M = 8 rows, one a
// warp, times K = 32 keys), so that its distances, and with them its entries of U and C, never change.
// Lane (g, t) = (lane / 4, lane % 4) loads 16 bytes for each of heads g and g + 8: keys 8 t .. 8 t + 7.
// Pair p of them is column pair (2 t, 2 t + 1) of key tile p, an 8 x 8 block [head, key] that mma.sync
// takes as it is and movmatrix turns into [key, head]. The next tiles are on their way meanwhile, by
// cp.async into a ring that is each warp's own: with few warps on a multiprocessor, latency is what costs.
//
//   z[key, unit] = x[key, head] W1^T + U     hidden = leaky(z)      s[head, key] = x + W2 hidden^T + C
//   P = exp(s - lse), dS = P (dP - delta)    dz = leaky'(z) dS W2   dA[head, key] = dS + W1^T dz^T
//
// Macros: H heads padded to HEADS, D hidden units padded to UNITS (multiples of 16), CAUSAL, MASKED.
#include <cuda_fp16.h>
typedef unsigned int uint32;
constexpr int M = 8, K = 32, HT = HEADS / 16, DT = UNITS / 16, LINES = M + K;

__device__ __forceinline__ void mma(float* c, uint32 a0, uint32 a1, uint32 a2, uint32 a3, uint32 b0, uint32 b1) {
  asm volatile("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
               : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3]) : "r"(a0), "r"(a1), "r"(a2), "r"(a3), "r"(b0), "r"(b1));
}
__device__ __forceinline__ uint32 turn(uint32 block) {
  uint32 turned;
  asm volatile("movmatrix.sync.aligned.m8n8.trans.b16 %0, %1;" : "=r"(turned) : "r"(block));
  return turned;
}
__device__ __forceinline__ uint32 pack(float a, float b) { __half2 h = __floats2half2_rn(a, b); return *(uint32*)&h; }
__device__ __forceinline__ float2 unpack(uint32 x) { return __half22float2(*(__half2*)&x); }
__device__ __forceinline__ float leaky(float z) { return fmaxf(z, 0.01f * z); }
__device__ __forceinline__ float exp2_fast(float x) { float y; asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x)); return y; }
// The key of a warp's 32 that is column c of key tile p.
__device__ __forceinline__ int key_of(int p, int c) { return 8 * (c >> 1) + 2 * p + (c & 1); }

struct Place {  // where a warp stands on its diagonal
  int first, last, start;
  __device__ Place(int q, int band_tile, int rows, int keys) : start((band_tile - q) * K) {
    int low = 1 - start - K, high = keys - start;
    first = low > 0 ? (low + M - 1) / M : 0;
    last = high > 0 ? (min(rows, high) + M - 1) / M : 0;
  }
};

// Weights in shared memory as [row][column], read as fragments: `frag` is half of an A operand or a B operand.
struct Weights {
  __half in_units[UNITS][HEADS + 8], out_heads[HEADS][UNITS + 8];
#ifdef BACKWARD
  __half in_heads[HEADS][UNITS + 8], out_units[UNITS][HEADS + 8];
#endif
};
__device__ __forceinline__ uint32 frag(const __half* row_g, int column) { return *(const uint32*)(row_g + column); }

__device__ __forceinline__ void load_weights(Weights& w, const float* w1, const float* w2) {
  for (int i = threadIdx.x; i < UNITS * HEADS; i += blockDim.x) {
    int unit = i / HEADS, head = i % HEADS;
    bool real = unit < D && head < H;
    __half in = __float2half_rn(real ? w1[unit * H + head] : 0.f), out = __float2half_rn(real ? w2[head * D + unit] : 0.f);
    w.in_units[unit][head] = in; w.out_heads[head][unit] = out;
#ifdef BACKWARD
    w.in_heads[head][unit] = in; w.out_units[unit][head] = out;
#endif
  }
}

// U of the warp's keys as accumulators [key tile pair][unit tile]: constant along the diagonal.
__device__ __forceinline__ void load_hidden(uint32 (&u)[2][2 * DT][2], const float* table, int size, int delta0, int g, int t) {
#pragma unroll
  for (int f = 0; f < 2; f++)
#pragma unroll
    for (int n = 0; n < 2 * DT; n++)
#pragma unroll
      for (int e = 0; e < 2; e++) {
        int delta = abs(delta0 - key_of(2 * f + e, g)), unit = 8 * n + 2 * t;
        const float* row = table + delta * D + unit;
        bool inside = delta < size;
        u[f][n][e] = pack(inside && unit < D ? row[0] : 0.f, inside && unit + 1 < D ? row[1] : 0.f);
      }
}

// A tile on its way: 32 scores of heads g and g + 8 of each head tile, 16 bytes a lane.
typedef uint4 Tile[HT][2][32];
__device__ __forceinline__ void copy16(void* to, const void* from, bool real) {
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"((uint32)__cvta_generic_to_shared(to)), "l"(from), "r"(real ? 16 : 0));
}
__device__ __forceinline__ void copy4(void* to, const void* from, bool real) {
  asm volatile("cp.async.ca.shared.global [%0], [%1], 4, %2;" ::"r"((uint32)__cvta_generic_to_shared(to)), "l"(from), "r"(real ? 4 : 0));
}
__device__ __forceinline__ void commit() { asm volatile("cp.async.commit_group;"); }
template <int N> __device__ __forceinline__ void wait() { asm volatile("cp.async.wait_group %0;" ::"n"(N)); }
__device__ __forceinline__ void fetch_tile(Tile& ring, const __half* base, int stride_h, bool inside, int g, int lane) {
#pragma unroll
  for (int h = 0; h < HT; h++)
#pragma unroll
    for (int r = 0; r < 2; r++) {
      int head = 16 * h + 8 * r + g;
      bool real = inside && head < H;
      copy16(&ring[h][r][lane], real ? base + head * stride_h : base, real);
    }
}
// The scores of a tile that has arrived, zero where unseen.
__device__ __forceinline__ void take_tile(uint32 (&x)[HT][2][4], const Tile& ring, const uint32 (&seen)[4], int lane) {
#pragma unroll
  for (int h = 0; h < HT; h++)
#pragma unroll
    for (int r = 0; r < 2; r++) {
      uint4 v = ring[h][r][lane];
      x[h][r][0] = v.x & seen[0]; x[h][r][1] = v.y & seen[1]; x[h][r][2] = v.z & seen[2]; x[h][r][3] = v.w & seen[3];
    }
}
__device__ __forceinline__ void store_tile(const uint32 (&x)[HT][2][4], __half* base, int stride_h, bool inside, int g) {
#pragma unroll
  for (int h = 0; h < HT; h++)
#pragma unroll
    for (int r = 0; r < 2; r++) {
      int head = 16 * h + 8 * r + g;
      if (inside && head < H) *(uint4*)(base + head * stride_h) = make_uint4(x[h][r][0], x[h][r][1], x[h][r][2], x[h][r][3]);
    }
}

// z and hidden of key tiles 2 f and 2 f + 1; `xn` are their scores as [key, head].
__device__ __forceinline__ void first_layer(float (&z)[2 * DT][4], uint32 (&hidden)[2 * DT][2], const uint32 (&xn)[HT][2][2], const uint32 (&u)[2 * DT][2], const Weights& w, int g, int t) {
#pragma unroll
  for (int n = 0; n < 2 * DT; n++) {
    float2 low = unpack(u[n][0]), high = unpack(u[n][1]);
    z[n][0] = low.x; z[n][1] = low.y; z[n][2] = high.x; z[n][3] = high.y;
#pragma unroll
    for (int h = 0; h < HT; h++) {
      const __half* row = w.in_units[8 * n + g] + 16 * h + 2 * t;
      mma(z[n], xn[h][0][0], xn[h][0][1], xn[h][1][0], xn[h][1][1], frag(row, 0), frag(row, 8));
    }
    hidden[n][0] = pack(leaky(z[n][0]), leaky(z[n][1]));
    hidden[n][1] = pack(leaky(z[n][2]), leaky(z[n][3]));
  }
}
// c[head, key] += W[head, unit] v[unit, key] for key tile 2 f + e.
__device__ __forceinline__ void across_units(float (&c)[4], const __half (*w)[UNITS + 8], int h, const uint32 (&v)[2 * DT][2], int e, int g, int t) {
#pragma unroll
  for (int s = 0; s < DT; s++) {
    const __half *low = w[16 * h + g] + 16 * s + 2 * t, *high = w[16 * h + 8 + g] + 16 * s + 2 * t;
    mma(c, frag(low, 0), frag(high, 0), frag(low, 8), frag(high, 8), v[2 * s][e], v[2 * s + 1][e]);
  }
}

// C of heads g and g + 8 at the warp's keys, as scores lie: constant along the diagonal, and kept in fp16, like them.
__device__ __forceinline__ void load_static(uint32 (&c)[HT][2][4], const float* table, int size, int delta0, int g, int t) {
#pragma unroll
  for (int h = 0; h < HT; h++)
#pragma unroll
    for (int r = 0; r < 2; r++)
#pragma unroll
      for (int p = 0; p < 4; p++) {
        int head = 16 * h + 8 * r + g, low = abs(delta0 - 8 * t - 2 * p), high = abs(delta0 - 8 * t - 2 * p - 1);
        const float* line = table + head * size;
        c[h][r][p] = pack(head < H && low < size ? line[low] : 0.f, head < H && high < size ? line[high] : 0.f);
      }
}
// x + C of heads g and g + 8 at key tile p, as accumulators.
__device__ __forceinline__ void sum_static(float (&s)[4], const uint32 (&x)[2][4], const uint32 (&c)[2][4], int p) {
  float2 low = unpack(x[0][p]), high = unpack(x[1][p]), c_low = unpack(c[0][p]), c_high = unpack(c[1][p]);
  s[0] = low.x + c_low.x; s[1] = low.y + c_low.y; s[2] = high.x + c_high.x; s[3] = high.y + c_high.y;
}
// Which of the warp's keys the row sees, as masks of halves; `keep` is what the diagonal alone says.
__device__ __forceinline__ void visible(uint32 (&seen)[4], const uint32 (&keep)[4], bool inside, int key, int keys, const unsigned char* mask) {
#pragma unroll
  for (int p = 0; p < 4; p++) {
    int low = key + 2 * p, high = low + 1;
    bool sees_low = inside && low < keys && (!MASKED || mask[low]), sees_high = inside && high < keys && (!MASKED || mask[high]);
    seen[p] = keep[p] & ((sees_low ? 0xffffu : 0u) | (sees_high ? 0xffff0000u : 0u));
  }
}
__device__ __forceinline__ void visible_on_diagonal(uint32 (&keep)[4], int delta0, int t) {
#pragma unroll
  for (int p = 0; p < 4; p++) {
    int delta = delta0 - 8 * t - 2 * p;
    keep[p] = CAUSAL ? (delta >= 0 ? 0xffffu : 0u) | (delta >= 1 ? 0xffff0000u : 0u) : 0xffffffffu;
  }
}

#ifndef BACKWARD
extern "C" __global__ void __launch_bounds__(32 * M) mix(
    __half* x, const float* w1, const float* w2, const float* hidden_table, const float* static_table, const unsigned char* mask,
    int rows, int keys, int table_size, int first_diagonal, int band_tile, int offset, int x_b, int x_h, int x_t, int mask_b) {
  constexpr int STAGES = 3;
  __shared__ Weights w;
  __shared__ Tile ring[M][STAGES];
  load_weights(w, w1, w2);
  __syncthreads();
  const int q = blockIdx.x + first_diagonal, m = threadIdx.x / 32, lane = threadIdx.x % 32, g = lane / 4, t = lane % 4;
  const int delta0 = q * K + offset + m;
  const Place place(q, band_tile, rows, keys);
  uint32 u[2][2 * DT][2], keep[4];
  uint32 c[HT][2][4];
  load_hidden(u, hidden_table, table_size, delta0, g, t);
  load_static(c, static_table, table_size, delta0, g, t);
  visible_on_diagonal(keep, delta0, t);
  __half* base = x + blockIdx.y * x_b + 8 * t;
  auto fetch = [&](int tile) {
    int row = tile * M + m, key = place.start + tile * M + 8 * t;
    bool inside = tile < place.last && row < rows && key >= 0 && key < keys;
    fetch_tile(ring[m][tile % STAGES], base + (inside ? row * x_t + key - 8 * t : 0), x_h, inside, g, lane);
    commit();
  };
#pragma unroll
  for (int ahead = 0; ahead < STAGES - 1; ahead++) fetch(place.first + ahead);
  for (int tile = place.first; tile < place.last; tile++) {
    fetch(tile + STAGES - 1);
    int row = tile * M + m, key = place.start + tile * M + 8 * t;
    bool inside = row < rows && key >= 0 && key < keys;
    __half* at = base + row * x_t + key - 8 * t;
    uint32 xt[HT][2][4], seen[4];
    visible(seen, keep, inside, key, keys, mask + blockIdx.y * mask_b);
    wait<STAGES - 1>();
    __syncwarp();
    take_tile(xt, ring[m][tile % STAGES], seen, lane);
#pragma unroll
    for (int f = 0; f < 2; f++) {
      uint32 xn[HT][2][2], hidden[2 * DT][2];
      float z[2 * DT][4];
#pragma unroll
      for (int h = 0; h < HT; h++)
#pragma unroll
        for (int r = 0; r < 2; r++) { xn[h][r][0] = turn(xt[h][r][2 * f]); xn[h][r][1] = turn(xt[h][r][2 * f + 1]); }
      first_layer(z, hidden, xn, u[f], w, g, t);
#pragma unroll
      for (int h = 0; h < HT; h++)
#pragma unroll
        for (int e = 0; e < 2; e++) {
          int p = 2 * f + e;
          float s[4];
          sum_static(s, xt[h], c[h], p);
          across_units(s, w.out_heads, h, hidden, e, g, t);
          xt[h][0][p] = (pack(s[0], s[1]) & seen[p]) | (0xfc00fc00u & ~seen[p]);
          xt[h][1][p] = (pack(s[2], s[3]) & seen[p]) | (0xfc00fc00u & ~seen[p]);
        }
    }
    store_tile(xt, at, x_h, inside, g);
  }
}
#else
// X <- P, Y <- dA; shares of the gradients of W1, W2, U, C are added to the diagonal's slot in a fixed order.
extern "C" __global__ void __launch_bounds__(32 * M, 1) mix_backward(
    __half* x, __half* y, const float* w1, const float* w2, const float* hidden_table, const float* static_table,
    const float* lse, const float* delta, const unsigned char* mask, float* grad_w1, float* grad_w2, float* grad_hidden, float* grad_static,
    int rows, int keys, int table_size, int first_diagonal, int band_tile, int offset, int slots,
    int x_b, int x_h, int x_t, int stat_b, int stat_h, int mask_b) {
  __shared__ Weights w;
  constexpr int STAGES = 2;
  struct Stage { Tile x, y; float stats[2 * HEADS]; };
  struct Sums { float u[LINES][UNITS], c[LINES][HEADS], w1[UNITS][HEADS], w2[HEADS][UNITS]; };
  __shared__ union { Stage ring[M][STAGES]; Sums sums; } memory;
  load_weights(w, w1, w2);
  __syncthreads();
  const int q = blockIdx.x + first_diagonal, b = blockIdx.y, m = threadIdx.x / 32, lane = threadIdx.x % 32, g = lane / 4, t = lane % 4;
  const int delta0 = q * K + offset + m;
  const Place place(q, band_tile, rows, keys);
  uint32 u[2][2 * DT][2], keep[4];
  uint32 c[HT][2][4];
  load_hidden(u, hidden_table, table_size, delta0, g, t);
  load_static(c, static_table, table_size, delta0, g, t);
  visible_on_diagonal(keep, delta0, t);
  float acc_u[2][2 * DT][4] = {}, acc_c[HT][4][4] = {}, acc_w1[HT][2 * DT][4] = {}, acc_w2[HT][2 * DT][4] = {};
  const float log2e = 1.4426950408889634f;
  auto fetch = [&](int tile) {
    int row = tile * M + m, key = place.start + tile * M + 8 * t;
    bool real_row = tile < place.last && row < rows, inside = real_row && key >= 0 && key < keys;
    int at = inside ? b * x_b + row * x_t + key : 0;
    Stage& stage = memory.ring[m][tile % STAGES];
    fetch_tile(stage.x, x + at, x_h, inside, g, lane);
    fetch_tile(stage.y, y + at, x_h, inside, g, lane);
#pragma unroll
    for (int i = lane; i < 2 * HEADS; i += 32) {
      bool real = real_row && i % HEADS < H;
      copy4(&stage.stats[i], (i < HEADS ? lse : delta) + (real ? b * stat_b + i % HEADS * stat_h + row : 0), real);
    }
    commit();
  };
#pragma unroll
  for (int ahead = 0; ahead < STAGES - 1; ahead++) fetch(place.first + ahead);
  for (int tile = place.first; tile < place.last; tile++) {
    fetch(tile + STAGES - 1);
    int row = tile * M + m, key = place.start + tile * M + 8 * t;
    bool inside = row < rows && key >= 0 && key < keys;
    int at = b * x_b + row * x_t + key;
    uint32 xt[HT][2][4], yt[HT][2][4], seen[4];
    visible(seen, keep, inside, key, keys, mask + b * mask_b);
    wait<STAGES - 1>();
    __syncwarp();
    const Stage& stage = memory.ring[m][tile % STAGES];
    take_tile(xt, stage.x, seen, lane);
    take_tile(yt, stage.y, seen, lane);
    float log_sum[HT][2], shared[HT][2];
#pragma unroll
    for (int h = 0; h < HT; h++)
#pragma unroll
      for (int r = 0; r < 2; r++) {
        log_sum[h][r] = stage.stats[16 * h + 8 * r + g] * log2e;
        shared[h][r] = stage.stats[HEADS + 16 * h + 8 * r + g];
      }
    __syncwarp();
#pragma unroll
    for (int f = 0; f < 2; f++) {
      uint32 xn[HT][2][2], hidden[2 * DT][2], ds[HT][2][2], dsn[HT][2][2], dz[2 * DT][2];
      float z[2 * DT][4], da[HT][2][4];
#pragma unroll
      for (int h = 0; h < HT; h++)
#pragma unroll
        for (int r = 0; r < 2; r++) { xn[h][r][0] = turn(xt[h][r][2 * f]); xn[h][r][1] = turn(xt[h][r][2 * f + 1]); }
      first_layer(z, hidden, xn, u[f], w, g, t);
      uint32 weight[HT][2][2];
#pragma unroll
      for (int h = 0; h < HT; h++)
#pragma unroll
        for (int e = 0; e < 2; e++) {
          int p = 2 * f + e;
          float s[4];
          sum_static(s, xt[h], c[h], p);
          across_units(s, w.out_heads, h, hidden, e, g, t);
#pragma unroll
          for (int r = 0; r < 2; r++) {
            bool real = 16 * h + 8 * r + g < H;
            float2 logit = unpack(pack(s[2 * r], s[2 * r + 1]));  // as the forward pass stored it
            float p0 = exp2_fast(logit.x * log2e - log_sum[h][r]);
            float p1 = exp2_fast(logit.y * log2e - log_sum[h][r]);
            p0 = real && (seen[p] & 0xffffu) ? p0 : 0.f;
            p1 = real && (seen[p] >> 16) ? p1 : 0.f;
            float2 dp = unpack(yt[h][r][p]);
            float s0 = p0 * (dp.x - shared[h][r]), s1 = p1 * (dp.y - shared[h][r]);
            weight[h][r][e] = pack(p0, p1);
            ds[h][r][e] = pack(s0, s1);
            dsn[h][r][e] = turn(ds[h][r][e]);
            da[h][e][2 * r] = s0; da[h][e][2 * r + 1] = s1;
            acc_c[h][p][2 * r] += s0; acc_c[h][p][2 * r + 1] += s1;
          }
        }
#pragma unroll
      for (int n = 0; n < 2 * DT; n++) {
        float dh[4] = {};
#pragma unroll
        for (int h = 0; h < HT; h++) {
          const __half* line = w.out_units[8 * n + g] + 16 * h + 2 * t;
          mma(dh, dsn[h][0][0], dsn[h][0][1], dsn[h][1][0], dsn[h][1][1], frag(line, 0), frag(line, 8));
        }
#pragma unroll
        for (int i = 0; i < 4; i++) { dh[i] = z[n][i] > 0.f ? dh[i] : 0.01f * dh[i]; acc_u[f][n][i] += dh[i]; }
        dz[n][0] = pack(dh[0], dh[1]); dz[n][1] = pack(dh[2], dh[3]);
        uint32 hidden0 = turn(hidden[n][0]), hidden1 = turn(hidden[n][1]), dz0 = turn(dz[n][0]), dz1 = turn(dz[n][1]);
#pragma unroll
        for (int h = 0; h < HT; h++) {
          mma(acc_w2[h][n], ds[h][0][0], ds[h][1][0], ds[h][0][1], ds[h][1][1], hidden0, hidden1);
          mma(acc_w1[h][n], xt[h][0][2 * f], xt[h][1][2 * f], xt[h][0][2 * f + 1], xt[h][1][2 * f + 1], dz0, dz1);
        }
      }
#pragma unroll
      for (int h = 0; h < HT; h++)
#pragma unroll
        for (int e = 0; e < 2; e++) {
          across_units(da[h][e], w.in_heads, h, dz, e, g, t);
          yt[h][0][2 * f + e] = pack(da[h][e][0], da[h][e][1]); yt[h][1][2 * f + e] = pack(da[h][e][2], da[h][e][3]);
          xt[h][0][2 * f + e] = weight[h][0][e]; xt[h][1][2 * f + e] = weight[h][1][e];
        }
    }
    store_tile(xt, x + at, x_h, inside, g);
    store_tile(yt, y + at, x_h, inside, g);
  }
  wait<0>();
  __syncthreads();
  Sums& sums = memory.sums;
  const int slot = b * slots + blockIdx.x;
  float *to_u = grad_hidden + slot * LINES * UNITS, *to_c = grad_static + slot * LINES * HEADS;
  float *to_w1 = grad_w1 + slot * UNITS * HEADS, *to_w2 = grad_w2 + slot * UNITS * HEADS;
  for (int i = threadIdx.x; i < LINES * UNITS; i += blockDim.x) sums.u[i / UNITS][i % UNITS] = to_u[i];
  for (int i = threadIdx.x; i < LINES * HEADS; i += blockDim.x) sums.c[i / HEADS][i % HEADS] = to_c[i];
  for (int i = threadIdx.x; i < UNITS * HEADS; i += blockDim.x) {
    sums.w1[i / HEADS][i % HEADS] = to_w1[i];
    sums.w2[i / UNITS][i % UNITS] = to_w2[i];
  }
  __syncthreads();
  // One warp after the other: the order of every sum is fixed, and a warp's own keys lie on different lines.
  for (int turn_of = 0; turn_of < M; turn_of++) {
    if (m == turn_of) {
#pragma unroll
      for (int n = 0; n < 2 * DT; n++)
#pragma unroll
        for (int i = 0; i < 4; i++) {
#pragma unroll
          for (int f = 0; f < 2; f++) sums.u[m - key_of(2 * f + (i >> 1), g) + K - 1][8 * n + 2 * t + (i & 1)] += acc_u[f][n][i];
#pragma unroll
          for (int h = 0; h < HT; h++) {
            int head = 16 * h + 8 * (i >> 1) + g, unit = 8 * n + 2 * t + (i & 1);
            sums.w1[unit][head] += acc_w1[h][n][i];
            sums.w2[head][unit] += acc_w2[h][n][i];
          }
        }
#pragma unroll
      for (int h = 0; h < HT; h++)
#pragma unroll
        for (int p = 0; p < 4; p++)
#pragma unroll
          for (int i = 0; i < 4; i++) sums.c[m - (8 * t + 2 * p + (i & 1)) + K - 1][16 * h + 8 * (i >> 1) + g] += acc_c[h][p][i];
    }
    __syncthreads();
  }
  for (int i = threadIdx.x; i < LINES * UNITS; i += blockDim.x) to_u[i] = sums.u[i / UNITS][i % UNITS];
  for (int i = threadIdx.x; i < LINES * HEADS; i += blockDim.x) to_c[i] = sums.c[i / HEADS][i % HEADS];
  for (int i = threadIdx.x; i < UNITS * HEADS; i += blockDim.x) {
    to_w1[i] = sums.w1[i / HEADS][i % HEADS];
    to_w2[i] = sums.w2[i / UNITS][i % UNITS];
  }
}
#endif
