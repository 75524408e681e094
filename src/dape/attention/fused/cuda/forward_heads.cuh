// The head warps of `forward.cu`: scores, softmax and values of a head.

// Numbers of a head warp for its rows: O before the division, the running maximum in base 2, the sum of P, and the
// largest score.
struct Running {
  float o[MT][E / 8][4] = {}, top[MT][2], total[MT][2], largest = 0.f;
  DEVICE Running() {
#pragma unroll
    for (int m = 0; m < MT; m++) {
      top[m][0] = top[m][1] = NEVER;
      total[m][0] = total[m][1] = 0.f;
    }
  }
};
typedef float Scores[MT][NT][4];
typedef uint32 Weights[MT][NT][2];
#if QUERIES_SHARED
typedef uint32 Queries;  // an address in shared memory
#else
typedef uint32 Queries[MT][ET][4];
DEVICE void load_queries(Queries& q, const Arguments& a, int g, int t) {
#pragma unroll
  for (int m = 0; m < MT; m++)
#pragma unroll
    for (int e = 0; e < ET; e++)
#pragma unroll
      for (int i = 0; i < 4; i++) {
        int row = a.row0 + 16 * m + g + 8 * (i & 1);
        q[m][e][i] = row < a.rows ? *(const uint32*)(a.q + (long long)row * Q_T + 16 * e + 2 * t + 8 * (i >> 1)) : 0;
      }
}
#endif

// x += q k^T for the keys of a tile.
DEVICE void add_scores(Scores& x, const Queries& queries, uint32 to_k, int lane) {
#pragma unroll
  for (int e = 0; e < ET; e++) {
#if QUERIES_SHARED
    uint32 q[MT][ET][4];
#pragma unroll
    for (int m = 0; m < MT; m++)
      load4(q[m][e], line_address<ROWS>(queries, m, e, (lane & 7) + 8 * (lane >> 3 & 1), lane >> 4));
#else
    const Queries& q = queries;
#endif
#pragma unroll
    for (int p = 0; p < NT / 2; p++) {
      uint32 b[4];
      load4(b, line_address<KEYS>(to_k, p, e, (lane & 7) + 8 * (lane >> 4), lane >> 3 & 1));
#pragma unroll
      for (int m = 0; m < MT; m++) {
        mma(x[m][2 * p], q[m][e], b[0], b[1]);
        mma(x[m][2 * p + 1], q[m][e], b[2], b[3]);
      }
    }
  }
}
// Scores to the mixers, in the order of the accumulators.
DEVICE void store_scores(__half* to, const Scores& x, float& largest, int lane) {
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
      const float *low = x[m][2 * p], *high = x[m][2 * p + 1];
      *(uint4*)(to + (m * (NT / 2) + p) * 256 + lane * 8) =
          make_uint4(pack_half(low[0], low[1]), pack_half(low[2], low[3]), pack_half(high[0], high[1]),
                     pack_half(high[2], high[3]));
    }
}

// Logits of 16 rows in base 2 from the mixers' logits and C, by (row - key) / 8; -inf for hidden keys.
DEVICE void load_logits(float (&y)[NT][4], const __half* from, const float2 (&c)[MT * 2 + NT - 1], int m, float scale,
                        uint32 seen, int lane) {
#pragma unroll
  for (int p = 0; p < NT / 2; p++) {
    uint4 v = *(const uint4*)(from + (m * (NT / 2) + p) * 256 + lane * 8);
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
        if (!(seen >> (8 * tile + 2 * (lane & 3) + (i & 1)) & 1)) y[tile][i] = NEVER;
  }
}
// Updates the maximum of 16 rows for a difference beyond SLACK, and O and the sum with the maximum.
DEVICE void raise_top(Running& run, const float (&y)[NT][4], int m) {
  float most[2] = {y[0][0], y[0][2]};
#pragma unroll
  for (int tile = 0; tile < NT; tile++)
#pragma unroll
    for (int i = 0; i < 4; i++) most[i >> 1] = fmaxf(most[i >> 1], y[tile][i]);
  if (__any_sync(~0u, most[0] > run.top[m][0] + SLACK || most[1] > run.top[m][1] + SLACK)) {
#pragma unroll
    for (int r = 0; r < 2; r++) {
      float x = fmaxf(most[r], __shfl_xor_sync(~0u, most[r], 1));
      x = fmaxf(run.top[m][r], fmaxf(x, __shfl_xor_sync(~0u, x, 2)));
      float shrink = run.top[m][r] == NEVER ? 0.f : exp2_fast(run.top[m][r] - x);
      run.top[m][r] = x;
      run.total[m][r] *= shrink;
#pragma unroll
      for (int e = 0; e < E / 8; e++) {
        run.o[m][e][2 * r] *= shrink;
        run.o[m][e][2 * r + 1] *= shrink;
      }
    }
  }
}
// P of 16 rows, and if wanted the rounding error of P, which counts in the gradients of tables.
DEVICE void softmax(Weights& weight, Weights& weight_rest, Running& run, const float (&y)[NT][4], int m) {
#pragma unroll
  for (int r = 0; r < 2; r++) {
    float base = run.top[m][r] == NEVER ? 0.f : run.top[m][r];
#pragma unroll
    for (int tile = 0; tile < NT; tile++) {
      float low = exp2_fast(y[tile][2 * r] - base), high = exp2_fast(y[tile][2 * r + 1] - base);
      run.total[m][r] += low + high;
      weight[m][tile][r] = pack(low, high);
#if RESTED
      const float2 rounded = unpack(weight[m][tile][r]);
      weight_rest[m][tile][r] = pack(low - rounded.x, high - rounded.y);
#endif
    }
  }
}
// O += P V for the keys of a tile.
DEVICE void add_values(Running& run, const Weights& weight, const Weights& weight_rest, uint32 to_v, int lane) {
#pragma unroll
  for (int p = 0; p < NT / 2; p++)
#pragma unroll
    for (int e = 0; e < E / 16; e++) {
      uint32 b[4];
      load4_turned(b, line_address<KEYS>(to_v, p, e, (lane & 7) + 8 * (lane >> 3 & 1), lane >> 4));
#pragma unroll
      for (int m = 0; m < MT; m++) {
        uint32 w[4] = {weight[m][2 * p][0], weight[m][2 * p][1], weight[m][2 * p + 1][0], weight[m][2 * p + 1][1]};
        mma(run.o[m][2 * e], w, b[0], b[1]);
        mma(run.o[m][2 * e + 1], w, b[2], b[3]);
#if RESTED
        uint32 w_rest[4] = {weight_rest[m][2 * p][0], weight_rest[m][2 * p][1], weight_rest[m][2 * p + 1][0],
                            weight_rest[m][2 * p + 1][1]};
        mma(run.o[m][2 * e], w_rest, b[0], b[1]);
        mma(run.o[m][2 * e + 1], w_rest, b[2], b[3]);
#endif
      }
    }
}
// Output and log-sum-exp of the rows, and the flag for numbers beyond a limit, and for NaN.
DEVICE void store_rows(const Arguments& a, const Running& run, int g, int t) {
#pragma unroll
  for (int m = 0; m < MT; m++)
#pragma unroll
    for (int r = 0; r < 2; r++) {
      float sum = run.total[m][r];
      sum += __shfl_xor_sync(~0u, sum, 1);
      sum += __shfl_xor_sync(~0u, sum, 2);
      int row = a.row0 + 16 * m + g + 8 * r;
      float part = sum > 0.f ? 1.f / sum : 0.f;
      if (row < a.rows) {
        const float log_sum = sum != 0.f ? (run.top[m][r] + log2f(sum)) * LN2 : NEVER;
        if (t == 0) a.lse[row] = log_sum;
        if (run.largest > a.largest_score || (sum != 0.f && !(fabsf(log_sum) <= a.largest_sum))) *a.flag = 1;
#pragma unroll
        for (int e = 0; e < E / 8; e++) {
          const long long at = (long long)row * a.out_t + 8 * e + 2 * t;
          const float low = run.o[m][e][2 * r] * part, high = run.o[m][e][2 * r + 1] * part;
          const uint32 rounded = pack(low, high);
          *(uint32*)(a.out + at) = rounded;
#if RESTED
          *(uint32*)(a.rest + at) = pack(low - unpack(rounded).x, high - unpack(rounded).y);
#endif
        }
      }
    }
}

// The walk of a head warp over the tiles of keys: scores of the next tile first, then softmax and values of the
// present tile.
DEVICE void attend(Shared& s, const Arguments& a, int h, int lane) {
  const int g = lane >> 2, t = lane & 3;
  const uint32 to_k = address(s.k[h]), to_v = address(s.v[h]), to_c = address(s.c[h]);
  const float* fixed = a.fixed + (long long)h * a.distances;
  // C of a tile, from the largest distance down, and a copy shifted by 1, for aligned pairs in every lane.
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
  const Queries queries = address(s.q[h]);
#else
  commit();
  Queries queries;
  load_queries(queries, a, g, t);
#endif
  Running run;
  const float scale = a.scale * LOG2E;
  auto scores = [&](int n) {
    Scores x = {};
    add_scores(x, queries, to_k, lane);
    __syncwarp();
    if (n + 1 < a.tiles) key_lines.load();
    commit();
    store_scores(s.x[n & 1][h], x, run.largest, lane);
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
    wait<1>();  // V and C of the present tile
    await_logits(n & 1);
    float2 c[MT * 2 + NT - 1];
#pragma unroll
    for (int i = 0; i < MT * 2 + NT - 1; i++) {
      int at = 2 * t - g - 8 * (i - NT + 1) + ROWS - 1;
      c[i] = *(const float2*)(s.c[h] + (g & 1 ? at : COPY + at - 1));
    }
    Weights weight, weight_rest;
#pragma unroll
    for (int m = 0; m < MT; m++) {
      float y[NT][4];
      load_logits(y, s.x[n & 1][h], c, m, scale, seen, lane);
      raise_top(run, y, m);
      softmax(weight, weight_rest, run, y, m);
    }
    add_values(run, weight, weight_rest, to_v, lane);
    __syncwarp();
    if (n + 1 < a.tiles) {
      value_lines.load();
      load_static(n + 1);
    }
    commit();
  }
  store_rows(a, run, g, t);
}
