// The backward pass across heads in one kernel, for Hopper: scores and dO V^T are made where they are mixed, and P and dA alone go
// to the scratch (see docs/kernels.md). dQ, dK and dV are left to the kernels of one head.
//
// A block takes ROWS query rows of all heads and a span of tiles of KEYS keys. Each head has a warp, which makes X and Y of a tile and
// later copies P and dA to the scratch. Four mixer warps turn X and Y into P and dA. They meet in shared memory, where tiles alternate
// between two buffers.
//
//   x = scale q k^T        y = dO v^T / unit - delta
//   w = W1 x               r = leaky(w + U) - leaky(U)       P = exp(x + W2 r + C - lse)
//   dS = P y               dz = leaky'(w + U) W2^T dS        dA = dS + W1^T dz
//
// X and Y lie as [head][row][8 keys], pieces of 16 bytes that change places within two rows, so that eight rows of eight keys, and
// eight heads of one piece, are in different banks. ldmatrix.trans makes fragments [slot, head] of 16 slots: eight keys of two rows.
//
// A tile has blocks of 8 rows and 8 keys. A diagonal of blocks has 15 distances, and the sums of dS and dz over its slots are products
// with a matrix of zeros and ones [distance, slot]. A mixer warp has every fourth diagonal. The diagonal that began in one tile ends in
// the next, and its sums go to the shared memory of the mixers, where neighbouring diagonals meet. After each tile 32 distances are
// done and go to the block's slot; the last of a span come with one more step.
//
// Macros: H heads, D hidden units padded to UNITS, E head_dim, GROUP heads to a key head, K_T and V_T strides of rows, CAUSAL, MASKED,
// BF16 (dO and V; Q and K are fp16), ROWS of a tile, ONE_STAGE: K and V of a head take turns in one place, BLOCK keys of a head side
// by side in the scratch, HEAD_REGISTERS and MIXER_REGISTERS (0: as launched), SHARED bytes of shared memory.
#if BF16
typedef __nv_bfloat16 Element;
#else
typedef __half Element;
#endif
constexpr int KEYS = 32, HEADS = 16, MIXERS = 4;
constexpr int HEAD_WARPS = (H + 3) / 4 * 4, MEMBERS = 32 * (H + MIXERS), THREADS = 32 * (HEAD_WARPS + MIXERS);
constexpr int MT = ROWS / 16, RB = ROWS / 8, KB = KEYS / 8, ET = E / 16, UT = UNITS / 8;
constexpr int LINE = ROWS * KEYS + 8, SPAN = ROWS + KEYS, COLUMNS = UNITS + HEADS, PART = 16 * COLUMNS;
constexpr int PAIRS = UNITS <= 32 ? 2 : 1;  // of rows that a mixer warp has in work
static_assert(KB == MIXERS, "a mixer warp has a diagonal of each tile that ends, and one that begins");
constexpr float SLOPE = 0.01f, LOG2E = 1.4426950408889634f, LARGEST = 65504.f;
#define NEVER (-1.f / 0.f)
struct Shared {
  Number k[H][KEYS * E];
#if !ONE_STAGE
  Number v[H][KEYS * E];
#endif
  __half x[2][H][LINE], y[2][H][LINE];
  __half u[2][SPAN * UNITS];
  float c[2][SPAN * HEADS];
  float lse[ROWS * HEADS];
  float parts[MIXERS + 1][PART];
  float never[2 * PAIRS * HEADS];  // log-sum-exps of rows for keys that may not be seen: infinite
  __half zero[8], sink[64];        // what heads that are padding read, and where they write
};
constexpr int TO_Y = 2 * H * LINE * 2, TO_OTHER = H * LINE * 2;  // bytes from X to Y, and to the other buffer

// Scores of buffer `b` are there for the mixers; its P and dA are there for the heads.
DEVICE void scores_there(int b) { if (b) arrive<2>(MEMBERS); else arrive<1>(MEMBERS); }
DEVICE void await_scores(int b) { if (b) meet<2>(MEMBERS); else meet<1>(MEMBERS); }
DEVICE void gradients_there(int b) { if (b) arrive<4>(MEMBERS); else arrive<3>(MEMBERS); }
DEVICE void await_gradients(int b) { if (b) meet<4>(MEMBERS); else meet<3>(MEMBERS); }
constexpr int LAUNCHED = 65536 / THREADS / 8 * 8 < 255 ? 65536 / THREADS / 8 * 8 : 255;  // registers of a thread at the start
template <int N> DEVICE void set_registers() {
  if constexpr (N > LAUNCHED) more_registers<N>();
  else if constexpr (N > 0) fewer_registers<N>();
}
// Where a piece of 8 keys of a row lies in a line of X or Y, in bytes.
DEVICE constexpr int piece_at(int row, int block) { return (row * KB + (block ^ (row >> 1 & KB - 1))) * 16; }

struct Arguments {
  const __half *q, *k;
  const Element *grad, *v;
  __half *x, *y;
  const float *delta, *w1, *w2;
  const __half* hidden;
  const float* fixed;
  const uint8* mask;
  float *sums, *weights;
  int rows, keys, row0, first, last;  // the tiles of keys from `first` to `last`
  int distance0, delta_t, x_t;        // entry of the tables for the first row and key; strides
  float scale, part;
};

#ifdef PACK
// Tables from distance `low` on: -U in fp16, [distance][t][unit tile][pair], and C in base 2 with the causal mask, [distance][t][head
// tile][pair], so that a lane's units and heads are neighbours.
extern "C" __global__ void pack(
    const float* hidden_table, const float* static_table, __half* hidden, float* fixed, int table_size, int low, int distances) {
  const long long units = (long long)distances * UNITS, heads = (long long)distances * HEADS;
  for (long long i = blockIdx.x * blockDim.x + threadIdx.x; i < units + heads; i += gridDim.x * blockDim.x) {
    if (i < units) {
      const int entry = abs(low + (int)(i / UNITS)), place = i % UNITS;
      const int unit = 8 * (place / 2 % UT) + 2 * (place / (2 * UT)) + place % 2;
      const float u = entry < table_size && unit < D ? hidden_table[(long long)entry * D + unit] : 0.f;
      hidden[i] = __float2half_rn(fminf(fmaxf(-u, -LARGEST), LARGEST));
    } else {
      const int distance = low + (int)((i - units) / HEADS), entry = abs(distance), place = (i - units) % HEADS;
      const int head = 8 * (place / 2 % 2) + 2 * (place / 4) + place % 2;
      const float c = head < H && entry < table_size ? LOG2E * static_table[(long long)head * table_size + entry] : 0.f;
      fixed[i - units] = head >= H || (CAUSAL && distance < 0) ? NEVER : c;
    }
  }
}

#else
// ---- A head's warp.

DEVICE uint32 pack_half(float a, float b) { __half2 h = __floats2half2_rn(a, b); return *(uint32*)&h; }
template <bool OF_VALUES> DEVICE void multiply(float (&c)[4], const uint32 (&a)[4], uint32 b0, uint32 b1) {
#if BF16
  if constexpr (OF_VALUES) return mma_bf16(c, a[0], a[1], a[2], a[3], b0, b1);
#endif
  mma(c, a[0], a[1], a[2], a[3], b0, b1);
}
typedef uint32 Rows[MT][ET][4];
// A lane's fragments of the block's rows, zero past the last.
DEVICE void load_rows(Rows& to, const void* from, int stride, const Arguments& a, int lane) {
#pragma unroll
  for (int m = 0; m < MT; m++)
#pragma unroll
    for (int e = 0; e < ET; e++)
#pragma unroll
      for (int i = 0; i < 4; i++) {
        const int row = a.row0 + 16 * m + lane / 4 + 8 * (i & 1), column = 16 * e + 2 * (lane % 4) + 8 * (i >> 1);
        to[m][e][i] = row < a.rows ? *(const uint32*)((const Number*)from + (long long)row * stride + column) : 0;
      }
}
// X or Y of a tile: factor rows lines^T - less, to a line of shared memory.
template <bool OF_VALUES> DEVICE void product(uint32 to, const Rows& rows, uint32 lines, float factor, const float (&less)[MT][2], int lane) {
#pragma unroll
  for (int p = 0; p < KEYS / 16; p++) {
    float x[MT][2][4] = {};
#pragma unroll
    for (int e = 0; e < ET; e++) {
      uint32 b[4];
      load4(b, line_address<KEYS>(lines, p, e, (lane & 7) + 8 * (lane >> 4), lane >> 3 & 1));
#pragma unroll
      for (int m = 0; m < MT; m++) { multiply<OF_VALUES>(x[m][0], rows[m][e], b[0], b[1]); multiply<OF_VALUES>(x[m][1], rows[m][e], b[2], b[3]); }
    }
#pragma unroll
    for (int m = 0; m < MT; m++) {
      uint32 pairs[4];
#pragma unroll
      for (int i = 0; i < 4; i++) {
        const float *pair = x[m][i >> 1] + 2 * (i & 1), taken = OF_VALUES ? less[m][i & 1] : 0.f;
        pairs[i] = pack_finite(fmaf(pair[0], factor, -taken), fmaf(pair[1], factor, -taken));
      }
      store4(to + piece_at(16 * m + (lane & 15), 2 * p + (lane >> 4)), pairs[0], pairs[1], pairs[2], pairs[3]);
    }
  }
}

DEVICE void attend(Shared& s, const Arguments& a, int q_t, int grad_t, int h, int lane) {
  Lines<KEYS, K_T> key_lines(a.k + (long long)a.first * KEYS * K_T, s.k[h], a.keys - a.first * KEYS, lane);
#if ONE_STAGE
  Lines<KEYS, V_T> value_lines(a.v + (long long)a.first * KEYS * V_T, s.k[h], a.keys - a.first * KEYS, lane);
#else
  Lines<KEYS, V_T> value_lines(a.v + (long long)a.first * KEYS * V_T, s.v[h], a.keys - a.first * KEYS, lane);
#endif
  const uint32 to_k = key_lines.to, to_v = value_lines.to, line = address(s.x[0][h]);
  key_lines.load();
  commit();
#if !ONE_STAGE
  value_lines.load();
  commit();
#endif
  Rows query, grad;
  load_rows(query, a.q, q_t, a, lane);
  load_rows(grad, a.grad, grad_t, a, lane);
  float delta[MT][2];
#pragma unroll
  for (int m = 0; m < MT; m++)
#pragma unroll
    for (int i = 0; i < 2; i++) {
      const int row = a.row0 + 16 * m + 8 * i + lane / 4;
      delta[m][i] = row < a.rows ? a.delta[(long long)row * a.delta_t] : 0.f;
    }
  auto scores = [&](int n) {
    const int buffer = n - a.first & 1;
    const bool more = n + 1 < a.last;
    const uint32 to = line + buffer * TO_OTHER;
    wait<ONE_STAGE ? 0 : 1>();  // K of the tile
    __syncwarp();
    product<false>(to, query, to_k, a.scale, delta, lane);
    __syncwarp();
#if ONE_STAGE
    value_lines.load();
    commit();
    wait<0>();
#else
    if (more) key_lines.load();
    commit();
    wait<1>();  // V of the tile
#endif
    __syncwarp();
    product<true>(to + TO_Y, grad, to_v, a.part, delta, lane);
    __syncwarp();
#if ONE_STAGE
    if (more) key_lines.load();
#else
    if (more) value_lines.load();
#endif
    commit();
    scores_there(buffer);
  };
  auto copy_out = [&](int n) {
    const int buffer = n - a.first & 1;
    const char *p = (const char*)s.x[buffer][h], *da = (const char*)s.y[buffer][h];
#pragma unroll
    for (int j = 0; j < ROWS / 8; j++) {
      const int row = 8 * j + lane / 4, block = lane % 4, key = n * KEYS + 8 * block, from = piece_at(row, block);
      const long long at = (long long)(a.row0 + row) * a.x_t + (key & -BLOCK) * H + (key & (BLOCK - 1));
      if (a.row0 + row < a.rows) {
        *(uint4*)(a.x + at) = *(const uint4*)(p + from);
        *(uint4*)(a.y + at) = *(const uint4*)(da + from);
      }
    }
  };
  scores(a.first);
  for (int n = a.first; n < a.last; n++) {
    if (n + 1 < a.last) scores(n + 1);
    await_gradients(n - a.first & 1);
    copy_out(n);
    __syncwarp();  // the lane that writes a piece next is another
  }
}

// ---- A mixer warp.

DEVICE __half2 half2_of(uint32 x) { return *(__half2*)&x; }
DEVICE uint32 bits(__half2 x) { return *(uint32*)&x; }
DEVICE void mma_half(uint32 (&d)[2], const uint32 (&a)[4], const uint32 (&b)[2], uint32 c0, uint32 c1) {
  const uint2 sum = mma_half(make_uint4(a[0], a[1], a[2], a[3]), b[0], b[1], c0, c1);
  d[0] = sum.x;
  d[1] = sum.y;
}
// leaky(w + U) - leaky(U), and in `slope` leaky'(w + U), for a pair of -U.
DEVICE uint32 rise(uint32 w, uint32 minus_u, uint32& slope) {
  const __half2 x = half2_of(w), y = half2_of(minus_u), risen = __hsub2(__hmax2(x, y), __hmax2(y, __float2half2_rn(0.f)));
  slope = bits(__hfma2(__hgt2(x, y), __float2half2_rn(1.f - SLOPE), __float2half2_rn(SLOPE)));
  return bits(__hfma2(risen, __float2half2_rn(1.f - SLOPE), __hmul2(x, __float2half2_rn(SLOPE))));
}
// Of the matrix of zeros and ones: row g, slots 2 t and 2 t + 1, for `s` = g + 2 t - 7 and a row of a block. Slot k of the row belongs to
// distance row - k, which is line row - k + 7.
DEVICE uint32 pick(int s, int row) { return s == row ? 0x3c00u : s + 1 == row ? 0x3c000000u : 0u; }

// A lane's fragments of the weights: W1 and W2, and both turned, as B operands.
struct Weights {
  uint32 in[UT][2], out[2][UT / 2][2], out_turned[UT][2], in_turned[2][UT / 2][2];
  DEVICE Weights(const float* w1, const float* w2, int g, int t) {
    auto w1_at = [&](int unit, int head) { return unit < D && head < H ? w1[unit * H + head] : 0.f; };
    auto w2_at = [&](int head, int unit) { return unit < D && head < H ? w2[head * D + unit] : 0.f; };
#pragma unroll
    for (int m = 0; m < UT; m++)
#pragma unroll
      for (int i = 0; i < 2; i++) {
        const int unit = 8 * m + g, head = 2 * t + 8 * i;
        in[m][i] = pack_half(w1_at(unit, head), w1_at(unit, head + 1));
        out_turned[m][i] = pack_half(w2_at(head, unit), w2_at(head + 1, unit));
      }
#pragma unroll
    for (int n = 0; n < 2; n++)
#pragma unroll
      for (int k = 0; k < UT / 2; k++)
#pragma unroll
        for (int i = 0; i < 2; i++) {
          const int head = 8 * n + g, unit = 16 * k + 2 * t + 8 * i;
          out[n][k][i] = pack_half(w2_at(head, unit), w2_at(head, unit + 1));
          in_turned[n][k][i] = pack_half(w1_at(unit, head), w1_at(unit + 1, head));
        }
  }
};
// Sums over pairs: of dz [distance, unit] and dS [head, distance], and the gradients of W1 and W2, [head, unit].
struct Sums {
  float u[UT][4], c[2][4], w1[UT][4], w2[UT][4];
};
template <int N> DEVICE void clear(float (&c)[N][4]) {
#pragma unroll
  for (int i = 0; i < N; i++)
#pragma unroll
    for (int j = 0; j < 4; j++) c[i][j] = 0.f;
}
// start + W v for the heads of a fragment and units v.
DEVICE void across_units(uint32 (&out)[PAIRS][4], const uint32 (&start)[PAIRS][4], const uint32 (&v)[PAIRS][UT][2], const uint32 (&w)[2][UT / 2][2]) {
#pragma unroll
  for (int k = 0; k < UT / 2; k++)
#pragma unroll
    for (int n = 0; n < 2; n++)
#pragma unroll
      for (int q = 0; q < PAIRS; q++) {
        const uint32 units[4] = {v[q][2 * k][0], v[q][2 * k][1], v[q][2 * k + 1][0], v[q][2 * k + 1][1]};
        uint32 sum[2];
        mma_half(sum, units, w[n][k], k ? out[q][2 * n] : start[q][2 * n], k ? out[q][2 * n + 1] : start[q][2 * n + 1]);
        out[q][2 * n] = sum[0];
        out[q][2 * n + 1] = sum[1];
      }
}
// Where a lane finds its heads' pieces in shared memory: X of the first buffer, for padding the zeros and the sink. `flat` is for
// fragments [head, slot].
struct Place {
  uint32 from, to, flat, real, flat_real;
  DEVICE Place(Shared& s, int lane) {
    const int low = lane >> 3 & 1, high = lane >> 4, head = (lane & 7) + 8 * high, flat_head = (lane & 7) + 8 * low;
    real = head < H ? ~0u : 0u;
    flat_real = flat_head < H ? ~0u : 0u;
    from = head < H ? address(s.x[0][head]) + low * KB * 16 : address(s.zero);
    to = head < H ? from : address(s.sink) + (lane & 7) * 16;
    flat = flat_head < H ? address(s.x[0][flat_head]) + high * KB * 16 : address(s.zero);
  }
};

// 16 slots for each of PAIRS: two rows of a block, from row 2 u of the block on, whose first piece is `at` bytes into X. -U of the rows is
// in `minus_u`; C and the log-sum-exp of a lane's heads are at `c` and `lse`, a line for each row.
DEVICE void mix_slots(
    const Place& place, const uint32 (&at)[PAIRS], const uint32 (&minus_u)[PAIRS][2][UT], const float* c, const float* lse,
    const uint32 (&picked)[PAIRS][4], const Weights& w, Sums& sums) {
  uint32 x[PAIRS][4], y[PAIRS][4], p[PAIRS][4], slope[PAIRS][UT][2], r[PAIRS][UT][2], d[PAIRS][UT][2], turned[PAIRS][4];
#pragma unroll
  for (int q = 0; q < PAIRS; q++) load4_turned(x[q], place.from + (at[q] & place.real));
#pragma unroll
  for (int q = 0; q < PAIRS; q++) load4_turned(y[q], place.from + (at[q] + TO_Y & place.real));
#pragma unroll
  for (int m = 0; m < UT; m++)
#pragma unroll
    for (int q = 0; q < PAIRS; q++) {
      mma_half(r[q][m], x[q], w.in[m], 0, 0);
#pragma unroll
      for (int i = 0; i < 2; i++) r[q][m][i] = rise(r[q][m][i], minus_u[q][i][m], slope[q][m][i]);
    }
  across_units(p, x, r, w.out);
#pragma unroll
  for (int i = 0; i < 2; i++)
#pragma unroll
    for (int q = 0; q < PAIRS; q++) {
      const float4 fixed = *(const float4*)(c + (2 * q + i) * HEADS), log_sum = *(const float4*)(lse + (2 * q + i) * HEADS);
#pragma unroll
      for (int n = 0; n < 2; n++) {
        const float2 logits = __half22float2(half2_of(p[q][2 * n + i])), dp = __half22float2(half2_of(y[q][2 * n + i]));
        const float p0 = exp2_fast(fmaf(logits.x, LOG2E, n ? fixed.z - log_sum.z : fixed.x - log_sum.x));
        const float p1 = exp2_fast(fmaf(logits.y, LOG2E, n ? fixed.w - log_sum.w : fixed.y - log_sum.y));
        p[q][2 * n + i] = pack_half(p0, p1);
        y[q][2 * n + i] = pack_half(p0 * dp.x, p1 * dp.y);  // Y is dS from here on
      }
    }
#pragma unroll
  for (int q = 0; q < PAIRS; q++) {
    load4(x[q], place.flat + (at[q] & place.flat_real));
    store4_turned(place.to + (at[q] & place.real), p[q][0], p[q][1], p[q][2], p[q][3]);
  }
#pragma unroll
  for (int i = 0; i < 4; i++)
#pragma unroll
    for (int q = 0; q < PAIRS; q++) turned[q][2 * (i & 1) + (i >> 1)] = turn(y[q][i]);  // [head, slot], too
#pragma unroll
  for (int q = 0; q < PAIRS; q++) {
    multiply<false>(sums.c[0], turned[q], picked[q][0], picked[q][2]);
    multiply<false>(sums.c[1], turned[q], picked[q][1], picked[q][3]);
  }
#pragma unroll
  for (int m = 0; m < UT; m++)
#pragma unroll
    for (int q = 0; q < PAIRS; q++) {
      multiply<false>(sums.w2[m], turned[q], turn(r[q][m][0]), turn(r[q][m][1]));
      mma_half(d[q][m], y[q], w.out_turned[m], 0, 0);
#pragma unroll
      for (int i = 0; i < 2; i++) d[q][m][i] = bits(__hmul2(half2_of(d[q][m][i]), half2_of(slope[q][m][i])));
      const uint32 low = turn(d[q][m][0]), high = turn(d[q][m][1]);
      multiply<false>(sums.w1[m], x[q], low, high);
      multiply<false>(sums.u[m], picked[q], low, high);
    }
  across_units(p, y, d, w.in_turned);
#pragma unroll
  for (int q = 0; q < PAIRS; q++) store4_turned(place.to + (at[q] + TO_Y & place.real), p[q][0], p[q][1], p[q][2], p[q][3]);
}

struct Mixer {
  Shared& s;
  const Arguments& a;
  const int mixer, lane, g, t;
  DEVICE Mixer(Shared& s, const Arguments& a, int mixer, int lane) : s(s), a(a), mixer(mixer), lane(lane), g(lane >> 2), t(lane & 3) {}

  // U and C of a tile, from its last key and first row on.
  DEVICE void load_tables(int step) const {
    const int thread = 32 * mixer + lane, buffer = step & 1;
    if (a.first + step < a.last) {
      const long long first = a.distance0 - (long long)(a.first + step) * KEYS;
      for (int i = thread; i < SPAN * UNITS / 8; i += 32 * MIXERS) copy16(address(s.u[buffer]) + i * 16, a.hidden + first * UNITS + i * 8, true);
      for (int i = thread; i < SPAN * HEADS / 4; i += 32 * MIXERS) copy16(address(s.c[buffer]) + i * 16, a.fixed + first * HEADS + i * 4, true);
    }
    commit();
  }
  // Which of a tile's keys may be seen.
  DEVICE uint32 keys_seen(int n) const {
    if (!MASKED && (n + 1) * KEYS <= a.keys) return ~0u;
    const int key = n * KEYS + lane;
    return __ballot_sync(~0u, key < a.keys && (!MASKED || a.mask[key]));
  }
  // The blocks of a tile on one diagonal: block row - block column.
  DEVICE void mix_diagonal(int diagonal, int buffer, uint32 seen, const Place& place, const Weights& w, Sums& sums) const {
    const int begin = max(0, diagonal), end = min(RB, diagonal + KB);
    if (begin >= end) return;
#pragma unroll
    for (int u = 0; u < 4; u += PAIRS) {
      const int line = 8 * diagonal + 2 * u - g + KEYS - 1;
      uint32 minus_u[PAIRS][2][UT], picked[PAIRS][4];
#pragma unroll
      for (int q = 0; q < PAIRS; q++)
#pragma unroll
        for (int i = 0; i < 2; i++) {
          const int row = 2 * q + i;
          const uint32* from = (const uint32*)(s.u[buffer] + (line + row) * UNITS) + t * UT;
#pragma unroll
          for (int m = 0; m < UT; m += UT % 4 ? 2 : 4)
            if constexpr (UT % 4) *(uint2*)(minus_u[q][i] + m) = *(const uint2*)(from + m);
            else *(uint4*)(minus_u[q][i] + m) = *(const uint4*)(from + m);
          picked[q][2 * i] = pick(g + 2 * t - 7, 2 * u + row);
          picked[q][2 * i + 1] = pick(g + 2 * t + 1, 2 * u + row);
        }
      for (int row = begin; row < end; row++) {
        const int column = row - diagonal;
        uint32 at[PAIRS];
#pragma unroll
        for (int q = 0; q < PAIRS; q++) at[q] = buffer * TO_OTHER + piece_at(8 * row + 2 * (u + q), column);
        mix_slots(
            place, at, minus_u, s.c[buffer] + line * HEADS + 4 * t,
            (seen >> (8 * column + g) & 1 ? s.lse + (8 * row + 2 * u) * HEADS : s.never) + 4 * t, picked, w, sums);
      }
    }
  }
  // Where the sums of the diagonal go that a warp ends in a step. Those of the first warp meet the next step's, too.
  DEVICE float* part(int warp, int step) const { return s.parts[warp == 0 && (step & 1) ? MIXERS : warp]; }
  DEVICE void put(float* to, const float (&c)[4], int width, int column) const {
    *(float2*)(to + g * width + column + 2 * t) = make_float2(c[0], c[1]);
    *(float2*)(to + (g + 8) * width + column + 2 * t) = make_float2(c[2], c[3]);
  }
  DEVICE void end_diagonal(int step, Sums& sums) const {
    float* to = part(mixer, step);
#pragma unroll
    for (int m = 0; m < UT; m++) put(to, sums.u[m], COLUMNS, 8 * m);
#pragma unroll
    for (int n = 0; n < 2; n++)
#pragma unroll
      for (int i = 0; i < 4; i++) to[(8 * n + 2 * t + (i & 1)) * COLUMNS + UNITS + g + 8 * (i >> 1)] = sums.c[n][i];
    clear(sums.u);
    clear(sums.c);
  }
  // 32 distances go to the slot, lines 7 to 14 of a diagonal and 0 to 6 of the one above.
  DEVICE void store_distances(int step) const {
    float* slot = a.sums + (long long)step * KEYS * COLUMNS;
    for (int i = 32 * mixer + lane; i < KEYS * COLUMNS / 4; i += 32 * MIXERS) {
      const int line = i / (COLUMNS / 4), column = i % (COLUMNS / 4) * 4, warp = line / 8, row = line % 8;
      float4 sum = *(const float4*)(part(warp, step) + (7 + row) * COLUMNS + column);
      if (row > 0 && (warp + 1 < MIXERS || step > 0)) {
        const float* above = warp + 1 < MIXERS ? part(warp + 1, step) : part(0, step + 1);
        const float4 other = *(const float4*)(above + (row - 1) * COLUMNS + column);
        sum = make_float4(sum.x + other.x, sum.y + other.y, sum.z + other.z, sum.w + other.w);
      }
      *(float4*)(slot + i * 4) = sum;
    }
  }
  // The gradient of a matrix of weights: those of the warps, in their order, are added to the block's.
  DEVICE void add_weights(float* slot, const float (&sums)[UT][4]) const {
    float* const all = s.parts[0];
    meet<5>(32 * MIXERS);
#pragma unroll
    for (int m = 0; m < UT; m++) put(all + mixer * HEADS * UNITS, sums[m], UNITS, 8 * m);
    meet<6>(32 * MIXERS);
    for (int i = 32 * mixer + lane; i < HEADS * UNITS; i += 32 * MIXERS) {
      float sum = slot[i];
#pragma unroll
      for (int warp = 0; warp < MIXERS; warp++) sum += all[warp * HEADS * UNITS + i];
      slot[i] = sum;
    }
  }
  DEVICE void run() const {
    static_assert(MIXERS * HEADS * UNITS <= (MIXERS + 1) * PART, "gradients of weights fit");
    load_tables(0);
    const Weights w(a.w1, a.w2, g, t);
    const Place place(s, lane);
    const int ends = RB - KB + mixer;
    Sums sums;
    clear(sums.u);
    clear(sums.c);
    clear(sums.w1);
    clear(sums.w2);
    const int steps = a.last - a.first;
    for (int step = 0; step < steps; step++) {
      const int buffer = step & 1;
      const uint32 seen = keys_seen(a.first + step);
      wait<0>();
      meet<5>(32 * MIXERS);  // tables of this tile are there for all; those of the last, and the parts, are no longer read
      load_tables(step + 1);
      await_scores(buffer);
      mix_diagonal(ends, buffer, seen, place, w, sums);
      end_diagonal(step, sums);
      mix_diagonal(ends - KB, buffer, seen, place, w, sums);
      gradients_there(buffer);
      meet<6>(32 * MIXERS);
      store_distances(step);
    }
    meet<5>(32 * MIXERS);
    end_diagonal(steps, sums);
    meet<6>(32 * MIXERS);
    store_distances(steps);
    add_weights(a.weights, sums.w1);
    add_weights(a.weights + HEADS * UNITS, sums.w2);
  }
};

// P and dA of a band; the sums of U and C go to the slot of the block, [step][32 distances][COLUMNS], and those of W1 and W2 are added
// to another. Grid: (rows and spans, the last rows first, elements).
extern "C" __global__ void __launch_bounds__(THREADS, 1) backward(
    const __half* q, const __half* k, const Element* grad, const Element* v, __half* x, __half* y, const float* lse, const float* delta,
    const float* w1, const float* w2, const __half* hidden, const float* fixed, const uint8* mask, const float* unit, const int* gate,
    int gated, float* sums, float* weights, int rows, int keys, int row_tiles, int span, int shift, int low, double scale,
    int q_b, int q_h, int q_t, int k_b, int k_h, int grad_b, int grad_h, int grad_t, int v_b, int v_h, int x_b, int x_t,
    int stat_b, int stat_h, int stat_t, int mask_b) {
  static_assert(sizeof(Shared) == SHARED, "what the launch asks for");
  if (gated >= 0 && *gate != gated) return;
  extern __shared__ __align__(128) char memory[];
  Shared& s = *(Shared*)memory;
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, h = min(warp, H - 1);
  const long long b = blockIdx.y;
  const int row_tile = row_tiles - 1 - blockIdx.x % row_tiles, part = blockIdx.x / row_tiles, row0 = row_tile * ROWS;
  const int end = CAUSAL ? min(keys, min(rows, row0 + ROWS) + shift) : keys;
  const int first = part * span, last = min(first + span, (max(0, end) + KEYS - 1) / KEYS);
  if (first >= last) return;
  const long long block = (b * row_tiles + row_tile) * (gridDim.x / row_tiles) + part;
  const Arguments a = {
      q + b * q_b + (long long)h * q_h, k + b * k_b + (long long)(h / GROUP) * k_h,
      grad + b * grad_b + (long long)h * grad_h, v + b * v_b + (long long)(h / GROUP) * v_h,
      x + b * x_b + h * BLOCK, y + b * x_b + h * BLOCK, delta + b * stat_b + (long long)h * stat_h,
      w1, w2, hidden, fixed, mask + b * mask_b,
      sums + block * (span + 1) * KEYS * COLUMNS, weights + block * 2 * HEADS * UNITS,
      rows, keys, row0, first, last, row0 + shift - (KEYS - 1) - low, stat_t, x_t, (float)scale, 1.f / *unit};
  for (int i = threadIdx.x; i < ROWS * HEADS; i += THREADS) {
    const int row = row0 + i / HEADS, head = 8 * (i / 2 % 2) + 2 * (i / 4 % 4) + i % 2;
    const float sum = row < rows && head < H ? lse[b * stat_b + (long long)head * stat_h + (long long)row * stat_t] * LOG2E : NEVER;
    s.lse[i] = sum == NEVER ? -sum : sum;  // rows that see nothing have no weight
  }
  if (threadIdx.x < 2 * PAIRS * HEADS) s.never[threadIdx.x] = -NEVER;
  if (threadIdx.x < 8) s.zero[threadIdx.x] = __float2half_rn(0.f);
  __syncthreads();
  if (warp < HEAD_WARPS) {
    set_registers<HEAD_REGISTERS>();
    if (warp < H) attend(s, a, q_t, grad_t, warp, lane);
  } else {
    set_registers<MIXER_REGISTERS>();
    Mixer(s, a, warp - HEAD_WARPS, lane).run();
  }
}
#endif
