// The whole forward pass of an attention that mixes heads, in one kernel, for Hopper (see docs/kernels.md).
//
// A score that is too large for X, or a log-sum-exp, sets a flag, and another kernel then takes the call.
//
// A block takes ROWS query rows of all heads. Each head has a warp (scores, softmax, values), and four mixer
// warps take the scores of a tile across heads. They meet in shared memory, in X[head][slot] of fp16, where a
// slot is wherever the accumulator of q k^T already sits: a lane moves 16 bytes, the mixers read fragments
// [slot, head] by ldmatrix.trans and put logits back by stmatrix.trans. Tiles alternate between two buffers,
// so that heads compute the next scores while the mixers are busy with these.
//
//   x = q k^T      w = scale W1 x      y = x + W2 (leaky(w + U) - leaky(U)) / scale
//   P = exp(scale y + C), masked by C = -inf
//
// leaky(z) = s z + (1 - s) relu(z), and its linear part is no work: s W2 W1 is one more product with x. What is left of
// the first layer after its product is relu(w + U) - relu(U) = max(w, -U) - max(-U, 0): no larger than w, however large
// U is.
//
// Slot s of a chunk of 256 (16 rows, 16 keys) has lane s / 8 = 4 r + c / 2 and row r + 8 (s / 2 % 2), key
// c + s % 2 + 8 (s / 4 % 2), so that 16 slots are two lanes' and their distances lie close together.
//
// Macros: H heads, D hidden units padded to UNITS, E head_dim, GROUP heads to a key head, Q_T, K_T and
// V_T strides of rows, CAUSAL, MASKED, BF16, RESTED: what rounding left of the output is stored too, ROWS and KEYS of a tile, MIXERS warps, QUERIES_SHARED: queries
// in shared memory, not registers, HEAD_REGISTERS and MIXER_REGISTERS (0: as launched).
#if BF16
typedef __nv_bfloat16 Element;
#else
typedef __half Element;
#endif
constexpr int HEADS = 16, HEAD_WARPS = (H + 3) / 4 * 4, MEMBERS = 32 * (H + MIXERS), THREADS = 32 * (HEAD_WARPS + MIXERS);
constexpr int MT = ROWS / 16, NT = KEYS / 8, ET = E / 16, UT = UNITS / 8;
constexpr int SLOTS = ROWS * KEYS + 8, SPAN = 64, COPY = SPAN + 16, C_LINE = 2 * SPAN + 16;
constexpr int GROUPS = ROWS * KEYS / 16 / MIXERS;  // of 16 slots, for a mixer warp
constexpr float SLOPE = 0.01f, LOG2E = 1.4426950408889634f, LN2 = 0.6931471805599453f, LARGEST = 65504.f;
#define NEVER (-1.f / 0.f)
// A running maximum is only brought up to date when it is this far behind (base 2): P stays below 2^8.
constexpr float SLACK = 8.f;
struct Shared {
  Element k[H][KEYS * E], v[H][KEYS * E];
#if QUERIES_SHARED
  Element q[H][ROWS * E];
#endif
  __half x[2][HEADS][SLOTS];
  __half u[2][SPAN][UNITS];
  float c[H][C_LINE];
};

// Scores of buffer `b` are there for the mixers; its logits are there for the heads.
DEVICE void scores_there(int b) { if (b) arrive<2>(MEMBERS); else arrive<1>(MEMBERS); }
DEVICE void await_scores(int b) { if (b) meet<2>(MEMBERS); else meet<1>(MEMBERS); }
DEVICE void logits_there(int b) { if (b) arrive<4>(MEMBERS); else arrive<3>(MEMBERS); }
DEVICE void await_logits(int b) { if (b) meet<4>(MEMBERS); else meet<3>(MEMBERS); }
DEVICE void mma(float (&c)[4], const uint32 (&a)[4], uint32 b0, uint32 b1) {
#if BF16
  mma_bf16(c, a[0], a[1], a[2], a[3], b0, b1);
#else
  mma(c, a[0], a[1], a[2], a[3], b0, b1);
#endif
}
// d = a b + c in fp16, whose accumulators are the next product's operand.
DEVICE void mma_half(uint32 (&d)[2], const uint32 (&a)[4], const uint32 (&b)[2], uint32 c0, uint32 c1) {
  const uint2 sum = mma_half(make_uint4(a[0], a[1], a[2], a[3]), b[0], b[1], c0, c1);
  d[0] = sum.x;
  d[1] = sum.y;
}
DEVICE uint32 pack_half(float a, float b) { __half2 h = __floats2half2_rn(a, b); return *(uint32*)&h; }
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
DEVICE uint32 rise(uint32 w, uint32 minus_u) {
  const __half2 x = *(__half2*)&w, y = *(__half2*)&minus_u, risen = __hsub2(__hmax2(x, y), __hmax2(y, __float2half2_rn(0.f)));
  return *(uint32*)&risen;
}
constexpr int LAUNCHED = 65536 / THREADS / 8 * 8;  // registers of a thread at the start
template <int N> DEVICE void set_registers() {
  if constexpr (N > LAUNCHED) more_registers<N>();
  else if constexpr (N > 0) fewer_registers<N>();
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

#ifdef PACK_TABLES
// Tables for `forward`, from distance `low` on: -U in fp16, [distance][t][unit tile][pair], so that a lane's units
// are neighbours, and C in base 2 with the causal mask; and s W2 W1, [head][head].
extern "C" __global__ void pack_tables(
    const float* hidden_table, const float* static_table, const float* w1, const float* w2, __half* hidden, float* fixed, float* linear,
    int table_size, int low, int distances) {
  const long long units = (long long)distances * UNITS, heads = (long long)distances * H;
  for (long long i = blockIdx.x * blockDim.x + threadIdx.x; i < units + heads + H * H; i += gridDim.x * blockDim.x) {
    if (i < units) {
      const int entry = abs(low + (int)(i / UNITS)), place = i % UNITS, t = place / (2 * UT), unit = 8 * (place / 2 % UT) + 2 * t + place % 2;
      const float u = entry < table_size && unit < D ? hidden_table[(long long)entry * D + unit] : 0.f;
      hidden[i] = __float2half_rn(fminf(fmaxf(-u, -LARGEST), LARGEST));
    } else if (i < units + heads) {
      const int head = (i - units) / distances, distance = low + (int)((i - units) % distances), entry = abs(distance);
      const float c = entry < table_size ? LOG2E * static_table[(long long)head * table_size + entry] : 0.f;
      fixed[i - units] = CAUSAL && distance < 0 ? NEVER : c;
    } else {
      const int head = (i - units - heads) / H, from = (i - units - heads) % H;
      float sum = 0.f;
      for (int unit = 0; unit < D; unit++) sum += w2[head * D + unit] * w1[unit * H + from];
      linear[head * H + from] = SLOPE * sum;
    }
  }
}

#else
DEVICE void attend(Shared& s, const Arguments& a, int h, int lane) {
  const int g = lane >> 2, t = lane & 3;
  const uint32 to_k = address(s.k[h]), to_v = address(s.v[h]), to_c = address(s.c[h]);
  const float* fixed = a.fixed + (long long)h * a.distances;
  // C of a tile, from the largest distance down, and a copy one place on: every lane then reads aligned pairs.
  auto load_static = [&](int n) {
    const float* from = fixed + a.row0 + a.offset + ROWS - 1 - n * KEYS - a.low;
#pragma unroll
    for (int i = lane; i < SPAN; i += 32) {
      copy4(to_c + i * 4, from - i, true);
      copy4(to_c + (COPY + i) * 4, from - i - 1, true);
    }
  };
  Lines<KEYS, K_T> key_lines(a.k, s.k[h], a.keys, lane);
  Lines<KEYS, V_T> value_lines(a.v, s.v[h], a.keys, lane);
  key_lines.load();
#if QUERIES_SHARED
  Lines<ROWS, Q_T>(a.q + (long long)a.row0 * Q_T, s.q[h], a.rows - a.row0, lane).load();
  commit();
  const uint32 to_q = address(s.q[h]);
#else
  commit();
  uint32 q[MT][ET][4];
#pragma unroll
  for (int m = 0; m < MT; m++)
#pragma unroll
    for (int e = 0; e < ET; e++)
#pragma unroll
      for (int i = 0; i < 4; i++) {
        int row = a.row0 + 16 * m + g + 8 * (i & 1);
        q[m][e][i] = row < a.rows ? *(const uint32*)(a.q + (long long)row * Q_T + 16 * e + 2 * t + 8 * (i >> 1)) : 0;
      }
#endif
  float o[MT][E / 8][4] = {}, top[MT][2], total[MT][2], largest = 0.f;
#pragma unroll
  for (int m = 0; m < MT; m++) { top[m][0] = top[m][1] = NEVER; total[m][0] = total[m][1] = 0.f; }
  const float scale = a.scale * LOG2E;

  auto scores = [&](int n) {
    float x[MT][NT][4] = {};
#pragma unroll
    for (int e = 0; e < ET; e++) {
#if QUERIES_SHARED
      uint32 q[MT][ET][4];
#pragma unroll
      for (int m = 0; m < MT; m++) load4(q[m][e], line_address<ROWS>(to_q, m, e, (lane & 7) + 8 * (lane >> 3 & 1), lane >> 4));
#endif
#pragma unroll
      for (int p = 0; p < NT / 2; p++) {
        uint32 b[4];
        load4(b, line_address<KEYS>(to_k, p, e, (lane & 7) + 8 * (lane >> 4), lane >> 3 & 1));
#pragma unroll
        for (int m = 0; m < MT; m++) { mma(x[m][2 * p], q[m][e], b[0], b[1]); mma(x[m][2 * p + 1], q[m][e], b[2], b[3]); }
      }
    }
    __syncwarp();
    if (n + 1 < a.tiles) key_lines.load();
    commit();
#pragma unroll
    for (int m = 0; m < MT; m++)
#pragma unroll
      for (int p = 0; p < NT; p++)
#pragma unroll
        for (int i = 0; i < 4; i++) largest = fmaxf(largest, fabsf(x[m][p][i]));
#pragma unroll
    for (int m = 0; m < MT; m++)
#pragma unroll
      for (int p = 0; p < NT / 2; p++) {
        float *low = x[m][2 * p], *high = x[m][2 * p + 1];
        *(uint4*)(s.x[n & 1][h] + (m * (NT / 2) + p) * 256 + lane * 8) = make_uint4(pack_half(low[0], low[1]), pack_half(low[2], low[3]), pack_half(high[0], high[1]), pack_half(high[2], high[3]));
      }
    scores_there(n & 1);
  };
  wait<0>();
  __syncwarp();
  scores(0);
  value_lines.load();
  load_static(0);
  commit();
  for (int n = 0; n < a.tiles; n++) {
    if (n + 1 < a.tiles) {
      wait<1>();  // K of the next tile
      __syncwarp();
      scores(n + 1);
    } else {
      commit();
    }
    uint32 seen = ~0u;
    if (MASKED || (n + 1) * KEYS > a.keys) {
      int key = n * KEYS + lane;
      seen = __ballot_sync(~0u, lane >= KEYS || (key < a.keys && (!MASKED || a.mask[key])));
    }
    wait<1>();  // V and C of this tile
    await_logits(n & 1);
    float2 c[MT * 2 + NT - 1];  // by (row - key) / 8
#pragma unroll
    for (int i = 0; i < MT * 2 + NT - 1; i++) {
      int at = 2 * t - g - 8 * (i - NT + 1) + ROWS - 1;
      c[i] = *(const float2*)(s.c[h] + (g & 1 ? at : COPY + at - 1));
    }
    uint32 weight[MT][NT][2];
#if RESTED
    uint32 weight_rest[MT][NT][2];  // what rounding took from P: the gradients of tables are sums in which it counts
#endif
#pragma unroll
    for (int m = 0; m < MT; m++) {
      float y[NT][4];
#pragma unroll
      for (int p = 0; p < NT / 2; p++) {
        uint4 v = *(const uint4*)(s.x[n & 1][h] + (m * (NT / 2) + p) * 256 + lane * 8);
        uint32 pairs[4] = {v.x, v.y, v.z, v.w};
#pragma unroll
        for (int i = 0; i < 4; i++) {
          int tile = 2 * p + (i >> 1), r = i & 1;
          float2 value = __half22float2(*(__half2*)&pairs[i]), fixed_part = c[2 * m + r - tile + NT - 1];
          y[tile][2 * r] = fmaf(value.x, scale, fixed_part.x);
          y[tile][2 * r + 1] = fmaf(value.y, scale, fixed_part.y);
        }
      }
      if (seen != ~0u) {
#pragma unroll
        for (int tile = 0; tile < NT; tile++)
#pragma unroll
          for (int i = 0; i < 4; i++)
            if (!(seen >> (8 * tile + 2 * t + (i & 1)) & 1)) y[tile][i] = NEVER;
      }
      float most[2] = {y[0][0], y[0][2]};
#pragma unroll
      for (int tile = 0; tile < NT; tile++)
#pragma unroll
        for (int i = 0; i < 4; i++) most[i >> 1] = fmaxf(most[i >> 1], y[tile][i]);
      if (__any_sync(~0u, most[0] > top[m][0] + SLACK || most[1] > top[m][1] + SLACK)) {
#pragma unroll
        for (int r = 0; r < 2; r++) {
          float x = fmaxf(most[r], __shfl_xor_sync(~0u, most[r], 1));
          x = fmaxf(top[m][r], fmaxf(x, __shfl_xor_sync(~0u, x, 2)));
          float shrink = top[m][r] == NEVER ? 0.f : exp2_fast(top[m][r] - x);
          top[m][r] = x;
          total[m][r] *= shrink;
#pragma unroll
          for (int e = 0; e < E / 8; e++) { o[m][e][2 * r] *= shrink; o[m][e][2 * r + 1] *= shrink; }
        }
      }
#pragma unroll
      for (int r = 0; r < 2; r++) {
        float base = top[m][r] == NEVER ? 0.f : top[m][r];
#pragma unroll
        for (int tile = 0; tile < NT; tile++) {
          float low = exp2_fast(y[tile][2 * r] - base), high = exp2_fast(y[tile][2 * r + 1] - base);
          total[m][r] += low + high;
          weight[m][tile][r] = pack(low, high);
#if RESTED
          const float2 rounded = unpack(weight[m][tile][r]);
          weight_rest[m][tile][r] = pack(low - rounded.x, high - rounded.y);
#endif
        }
      }
    }
#pragma unroll
    for (int p = 0; p < NT / 2; p++)
#pragma unroll
      for (int e = 0; e < E / 16; e++) {
        uint32 b[4];
        load4_turned(b, line_address<KEYS>(to_v, p, e, (lane & 7) + 8 * (lane >> 3 & 1), lane >> 4));
#pragma unroll
        for (int m = 0; m < MT; m++) {
          uint32 w[4] = {weight[m][2 * p][0], weight[m][2 * p][1], weight[m][2 * p + 1][0], weight[m][2 * p + 1][1]};
          mma(o[m][2 * e], w, b[0], b[1]);
          mma(o[m][2 * e + 1], w, b[2], b[3]);
#if RESTED
          uint32 w_rest[4] = {weight_rest[m][2 * p][0], weight_rest[m][2 * p][1], weight_rest[m][2 * p + 1][0], weight_rest[m][2 * p + 1][1]};
          mma(o[m][2 * e], w_rest, b[0], b[1]);
          mma(o[m][2 * e + 1], w_rest, b[2], b[3]);
#endif
        }
      }
    __syncwarp();
    if (n + 1 < a.tiles) {
      value_lines.load();
      load_static(n + 1);
    }
    commit();
  }
#pragma unroll
  for (int m = 0; m < MT; m++)
#pragma unroll
    for (int r = 0; r < 2; r++) {
      float sum = total[m][r];
      sum += __shfl_xor_sync(~0u, sum, 1);
      sum += __shfl_xor_sync(~0u, sum, 2);
      int row = a.row0 + 16 * m + g + 8 * r;
      float part = sum > 0.f ? 1.f / sum : 0.f;
      if (row < a.rows) {
        const float log_sum = sum > 0.f ? (top[m][r] + log2f(sum)) * LN2 : NEVER;
        if (t == 0) a.lse[row] = log_sum;
        if (largest > a.largest_score || (sum > 0.f && fabsf(log_sum) > a.largest_sum)) *a.flag = 1;
#pragma unroll
        for (int e = 0; e < E / 8; e++) {
          const long long at = (long long)row * a.out_t + 8 * e + 2 * t;
          const float low = o[m][e][2 * r] * part, high = o[m][e][2 * r + 1] * part;
          const uint32 rounded = pack(low, high);
          *(uint32*)(a.out + at) = rounded;
#if RESTED
          *(uint32*)(a.rest + at) = pack(low - unpack(rounded).x, high - unpack(rounded).y);
#endif
        }
      }
    }
}

DEVICE void load_units(uint32 (&u)[UT], const char* table, int distance) {
  const char* from = table + distance * UNITS * 2;
#pragma unroll
  for (int m = 0; m < UT; m += UT % 4 ? 2 : 4)
    if constexpr (UT % 4) *(uint2*)(u + m) = *(const uint2*)(from + m * 4);
    else *(uint4*)(u + m) = *(const uint4*)(from + m * 4);
}

// Two groups of 16 slots, 64 bytes apart: -U of their rows g is in `first`, of their rows g + 8 in `second`.
DEVICE void mix_pair(uint32 at, const uint32 (&first)[2][UT], const uint32 (&second)[2][UT], const uint32 (&w1)[UT][2], const uint32 (&w2)[2][UT / 2][2], const uint32 (&w21)[2][2]) {
  uint32 x[2][4], y[2][2][2];
#pragma unroll
  for (int q = 0; q < 2; q++) load4_turned(x[q], at + q * 64);
#pragma unroll
  for (int q = 0; q < 2; q++) {
    uint32 z[UT][2];
#pragma unroll
    for (int m = 0; m < UT; m++) {
      mma_half(z[m], x[q], w1[m], 0, 0);
      z[m][0] = rise(z[m][0], first[q][m]);
      z[m][1] = rise(z[m][1], second[q][m]);
    }
#pragma unroll
    for (int half = 0; half < 2; half++) mma_half(y[q][half], x[q], w21[half], x[q][2 * half], x[q][2 * half + 1]);
#pragma unroll
    for (int k = 0; k < UT / 2; k++) {
      uint32 v[4] = {z[2 * k][0], z[2 * k][1], z[2 * k + 1][0], z[2 * k + 1][1]};
#pragma unroll
      for (int half = 0; half < 2; half++) mma_half(y[q][half], v, w2[half][k], y[q][half][0], y[q][half][1]);
    }
  }
#pragma unroll
  for (int q = 0; q < 2; q++) store4_turned(at + q * 64, y[q][0][0], y[q][0][1], y[q][1][0], y[q][1][1]);
}

DEVICE void mix(Shared& s, const Arguments& a, int mixer, int lane) {
  const int g = lane >> 2, t = lane & 3, thread = 32 * mixer + lane;
  auto load_hidden = [&](int n) {
    const __half* from = a.hidden + (long long)(a.row0 + a.offset - (KEYS - 1) - n * KEYS - a.low) * UNITS;
    if (n < a.tiles)
#pragma unroll
      for (int i = thread; i < SPAN * UNITS / 8; i += 32 * MIXERS) copy16(address(s.u[n & 1]) + i * 16, from + i * 8, true);
    commit();
  };
  load_hidden(0);
  uint32 w1[UT][2], w2[2][UT / 2][2], w21[2][2];
  auto in = [&](int unit, int head) { return unit < D && head < H ? a.w1[unit * H + head] * a.scale : 0.f; };
  auto out = [&](int head, int unit) { return unit < D && head < H ? a.w2[head * D + unit] * (1.f - SLOPE) / a.scale : 0.f; };
  auto straight = [&](int head, int from) { return head < H && from < H ? a.linear[head * H + from] : 0.f; };
#pragma unroll
  for (int n = 0; n < UT; n++)
#pragma unroll
    for (int i = 0; i < 2; i++) w1[n][i] = pack_half(in(8 * n + g, 2 * t + 8 * i), in(8 * n + g, 2 * t + 8 * i + 1));
#pragma unroll
  for (int n = 0; n < 2; n++)
#pragma unroll
    for (int k = 0; k < UT / 2; k++)
#pragma unroll
      for (int i = 0; i < 2; i++) w2[n][k][i] = pack_half(out(8 * n + g, 16 * k + 2 * t + 8 * i), out(8 * n + g, 16 * k + 2 * t + 8 * i + 1));
#pragma unroll
  for (int n = 0; n < 2; n++)
#pragma unroll
    for (int i = 0; i < 2; i++) w21[n][i] = pack_half(straight(8 * n + g, 2 * t + 8 * i), straight(8 * n + g, 2 * t + 8 * i + 1));
  const int first = mixer * GROUPS, chunk = first / 16, pair0 = first % 16 / 2;
  const int row = 16 * (chunk / (NT / 2)) + pair0 + 8 * ((g >> 1) & 1), key = 16 * (chunk % (NT / 2)) + (g & 1) + 8 * (g >> 2);
  const int place = ((row - key + KEYS - 1) * UNITS + t * 2 * UT) * 2;
  const uint32 slot = address(s.x[0]) + (((lane & 7) + 8 * (lane >> 4)) * SLOTS + first * 16 + 8 * ((lane >> 3) & 1)) * 2;
  for (int n = 0; n < a.tiles; n++) {
    wait<0>();
    meet<5>(32 * MIXERS);  // U of this tile is there for all, and that of the last is no longer read
    load_hidden(n + 1);
    const uint32 at = slot + (n & 1) * sizeof(s.x[0]);
    const char* u = (const char*)s.u[n & 1] + place;
    await_scores(n & 1);
// Group 2 k of 16 slots has rows at distances k and k - 2, group 2 k + 1 at k - 4 and k - 6, so that a walk over the
    // distances d needs each entry of U once.
    uint32 low[2][UT], high[2][UT];
    load_units(high[0], u, -6);
    load_units(high[1], u, -5);
#pragma unroll
    for (int d = -4; d < GROUPS / 2; d += 2) {
#pragma unroll
      for (int q = 0; q < 2; q++) {
#pragma unroll
        for (int m = 0; m < UT; m++) low[q][m] = high[q][m];
        load_units(high[q], u, d + q);
      }
#pragma unroll
      for (int odd = 1; odd >= 0; odd--) {
        const int k = d + 4 * odd;
        if (k >= 0 && k < GROUPS / 2) mix_pair(at + (2 * k + odd) * 32, high, low, w1, w2, w21);
      }
    }
    logits_there(n & 1);
  }
}

extern "C" __global__ void __launch_bounds__(THREADS, 1) forward(
    const Element* q, const Element* k, const Element* v, Element* out, Element* rest, float* lse, const float* w1, const float* w2,
    const __half* hidden, const float* fixed, const float* linear, const uint8* mask, int* flag, int rows, int keys, int distances, int low, int offset, double scale, double largest_score, double largest_sum,
    int q_b, int q_h, int k_b, int k_h, int v_b, int v_h, int out_b, int out_h, int out_t,
    int lse_b, int lse_h, int mask_b) {
  extern __shared__ __align__(128) char memory[];
  Shared& s = *(Shared*)memory;
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, h = min(warp, H - 1);
  const long long b = blockIdx.y;
  const int row0 = (gridDim.x - 1 - blockIdx.x) * ROWS, last = CAUSAL ? min(keys, min(rows, row0 + ROWS) + offset) : keys;
  const Arguments a = {
      q + b * q_b + (long long)h * q_h, k + b * k_b + (long long)(h / GROUP) * k_h, v + b * v_b + (long long)(h / GROUP) * v_h,
      out + b * out_b + (long long)h * out_h, rest + b * out_b + (long long)h * out_h, lse + b * lse_b + (long long)h * lse_h, w1, w2, hidden, fixed, linear, mask + b * mask_b, flag, (float)(largest_score / fabs(scale)), (float)largest_sum,
      rows, keys, distances, low, offset, (float)scale, out_t, row0, (last + KEYS - 1) / KEYS};
  for (int line = H; line < HEADS; line++)
    for (int i = threadIdx.x; i < 2 * SLOTS; i += THREADS) s.x[i / SLOTS][line][i % SLOTS] = __float2half(0.f);
  __syncthreads();
  if (warp < HEAD_WARPS) {
    set_registers<HEAD_REGISTERS>();
    if (warp < H) attend(s, a, warp, lane);
  } else {
    set_registers<MIXER_REGISTERS>();
    mix(s, a, warp - HEAD_WARPS, lane);
  }
}
#endif
