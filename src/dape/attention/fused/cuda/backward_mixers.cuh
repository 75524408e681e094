// The mixer warps of `backward.cu`: X and Y of a tile into P and dA, and the sums for the gradients.

DEVICE __half2 half2_of(uint32 x) { return *(__half2*)&x; }
DEVICE uint32 bits(__half2 x) { return *(uint32*)&x; }
// leaky(w + U) - leaky(U), and in `slope` leaky'(w + U), for a pair of -U.
DEVICE uint32 rise(uint32 w, uint32 minus_u, uint32& slope) {
  const __half2 x = half2_of(w), y = half2_of(minus_u),
                risen = __hsub2(__hmax2(x, y), __hmax2(y, __float2half2_rn(0.f)));
  slope = bits(__hfma2(__hgt2(x, y), __float2half2_rn(1.f - SLOPE), __float2half2_rn(SLOPE)));
  return bits(__hfma2(risen, __float2half2_rn(1.f - SLOPE), __hmul2(x, __float2half2_rn(SLOPE))));
}
// Of the matrix of zeros and ones: row g, slots 2 t and 2 t + 1, for `s` = g + 2 t - 7 and a row of a block. Slot k of
// the row belongs to distance row - k, which is line row - k + 7.
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
template <int N>
DEVICE void clear(float (&c)[N][4]) {
#pragma unroll
  for (int i = 0; i < N; i++)
#pragma unroll
    for (int j = 0; j < 4; j++) c[i][j] = 0.f;
}
// start + W v for the heads of a fragment and units v.
DEVICE void across_units(uint32 (&out)[PAIRS][4], const uint32 (&start)[PAIRS][4], const uint32 (&v)[PAIRS][UT][2],
                         const uint32 (&w)[2][UT / 2][2]) {
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
// Where a lane finds its heads' pieces in shared memory: X of the first buffer, for padding the zeros and the sink.
// `flat` is for fragments [head, slot].
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

// 16 slots for each of PAIRS: two rows of a block, from row 2 u of the block on, whose first piece is `at` bytes into
// X. -U of the rows is in `minus_u`; C and the log-sum-exp of a lane's heads are at `c` and `lse`, a line for each row.
DEVICE void mix_slots(const Place& place, const uint32 (&at)[PAIRS], const uint32 (&minus_u)[PAIRS][2][UT],
                      const float* c, const float* lse, const uint32 (&picked)[PAIRS][4], const Weights& w,
                      Sums& sums) {
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
      const float4 fixed = *(const float4*)(c + (2 * q + i) * HEADS),
                   log_sum = *(const float4*)(lse + (2 * q + i) * HEADS);
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
  for (int q = 0; q < PAIRS; q++)
    store4_turned(place.to + (at[q] + TO_Y & place.real), p[q][0], p[q][1], p[q][2], p[q][3]);
}

struct Mixer {
  Shared& s;
  const Arguments& a;
  const int mixer, diagonal, sharer, lane, g, t;
  DEVICE Mixer(Shared& s, const Arguments& a, int mixer, int lane)
      : s(s), a(a), mixer(mixer), diagonal(mixer % KB), sharer(mixer / KB), lane(lane), g(lane >> 2), t(lane & 3) {}

  // U and C of a tile, from its last key and first row on.
  DEVICE void load_tables(int step) const {
    const int thread = 32 * mixer + lane, buffer = step & 1;
    if (a.first + step < a.last) {
      const long long first = a.distance0 - (long long)(a.first + step) * KEYS;
      for (int i = thread; i < SPAN * UNITS / 8; i += 32 * MIXERS)
        copy16(address(s.u[buffer]) + i * 16, a.hidden + first * UNITS + i * 8, true);
      for (int i = thread; i < SPAN * HEADS / 4; i += 32 * MIXERS)
        copy16(address(s.c[buffer]) + i * 16, a.fixed + first * HEADS + i * 4, true);
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
  DEVICE void mix_diagonal(int diagonal, int buffer, uint32 seen, const Place& place, const Weights& w,
                           Sums& sums) const {
    const int begin = max(0, diagonal), end = min(RB, diagonal + KB);
    if (begin >= end) return;
#pragma unroll
    for (int v = 0; v < 4 / SHARERS; v += PAIRS) {
      const int u = 4 / SHARERS * sharer + v;
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
            if constexpr (UT % 4)
              *(uint2*)(minus_u[q][i] + m) = *(const uint2*)(from + m);
            else
              *(uint4*)(minus_u[q][i] + m) = *(const uint4*)(from + m);
          picked[q][2 * i] = pick(g + 2 * t - 7, 2 * u + row);
          picked[q][2 * i + 1] = pick(g + 2 * t + 1, 2 * u + row);
        }
      for (int row = begin; row < end; row++) {
        const int column = row - diagonal;
        uint32 at[PAIRS];
#pragma unroll
        for (int q = 0; q < PAIRS; q++) at[q] = buffer * TO_OTHER + piece_at(8 * row + 2 * (u + q), column);
        mix_slots(place, at, minus_u, s.c[buffer] + line * HEADS + 4 * t,
                  (seen >> (8 * column + g) & 1 ? s.lse + (8 * row + 2 * u) * HEADS : s.never) + 4 * t, picked, w,
                  sums);
      }
    }
  }
  // Where a warp's sums go of the diagonal that ends in a step. Those of the first meet the next step's, too.
  DEVICE float* part(int sharer, int diagonal, int step) const {
    return s.parts[sharer][diagonal == 0 && (step & 1) ? KB : diagonal];
  }
  DEVICE void put(float* to, const float (&c)[4], int width, int column) const {
    *(float2*)(to + g * width + column + 2 * t) = make_float2(c[0], c[1]);
    *(float2*)(to + (g + 8) * width + column + 2 * t) = make_float2(c[2], c[3]);
  }
  DEVICE void end_diagonal(int step, Sums& sums) const {
    float* to = part(sharer, diagonal, step);
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
      const int line = i / (COLUMNS / 4), column = i % (COLUMNS / 4) * 4, own = line / 8, row = line % 8;
      float4 sum = make_float4(0.f, 0.f, 0.f, 0.f);
      auto add = [&](const float* from) {
        const float4 other = *(const float4*)from;
        sum = make_float4(sum.x + other.x, sum.y + other.y, sum.z + other.z, sum.w + other.w);
      };
#pragma unroll
      for (int k = 0; k < SHARERS; k++) {
        add(part(k, own, step) + (7 + row) * COLUMNS + column);
        if (row > 0 && (own + 1 < KB || step > 0))
          add((own + 1 < KB ? part(k, own + 1, step) : part(k, 0, step + 1)) + (row - 1) * COLUMNS + column);
      }
      *(float4*)(slot + i * 4) = sum;
    }
  }
  // The gradient of a matrix of weights: those of the warps, in their order, are added to the block's.
  DEVICE void add_weights(float* slot, const float (&sums)[UT][4]) const {
    float* const all = s.parts[0][0];
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
    static_assert(MIXERS * HEADS * UNITS <= SHARERS * (KB + 1) * PART, "gradients of weights fit");
    load_tables(0);
    const Weights w(a.w1, a.w2, g, t);
    const Place place(s, lane);
    const int ends = RB - KB + diagonal;
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
      meet<5>(32 *
              MIXERS);  // tables of this tile are there for all; those of the last, and the parts, are no longer read
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
