// P and dA from X and Y = dP - delta, with the sums of all gradients; `taps.cuh` has the legend.

// Line l is the distance of row m and key m + KEYS - HALO - 1 - l of a window.
constexpr int LINES = OUT + ROWS;
// A window of X and of Y on its way.
struct Stage {
  Ring x, y;
};
// What a warp sums in its registers: gradients of W1 and W2, fragments [head, unit].
struct Accumulators {
  float w1[TAPS][UT][4] = {}, w2[TAPS][UT][4] = {};
};
typedef float4 Fragments[2 * TAPS * UT][32];
// What it sums in shared memory, lane by lane, by the keys of its window: dz and dS, and, of the first of all keys, dz,
// and dS, of the second too.
struct Sums {
  float4 u[HALF][UT][32], c[TILES][32], first[2][32];
  float2 begin[UT][32];
};
// What the warps have at the end. Sums of dS by line: of all keys, of the first of all keys, and of the second.
// leaky(U) of columns, of which that of tap t of line l is l + 2 - t: of all columns, and of that of the first of all
// keys.
struct End {
  float all[LINES][HEADS], first[LINES][HEADS], second[LINES][HEADS];
  float at_zero[LINES + 2][UNITS], begin[LINES + 2][UNITS];
  float room[THREADS];
};
// Sums of all warps, as a slot holds them.
struct Slot {
  float c[LINES][HEADS], u[LINES][TAPS][UNITS], w1[TAPS][UNITS][HEADS], w2[TAPS][UNITS][HEADS], b1[UNITS];
};
struct Cursor {
  int element, tile;
};
struct Row {  // log-sum-exp, times -log2(e), of heads g and g + 8
  float log_sum[2];
};

DEVICE void add4(float4& sum, float a, float b, float c, float d) {
  float4 own = sum;
  own.x += a, own.y += b, own.z += c, own.w += d;
  sum = own;
}
// Logits at scores of zero over the distance: of keys from the third on, of the first, and of the second.
DEVICE float c_of(const float* static_table, int size, int which, int head, int distance) {
  const bool real = head < H && distance >= 0 && distance < size;
  return real ? static_table[(long long)(which * H + head) * size + distance] : 0.f;
}
// `distance` is that of the first key of a window in row 0.
DEVICE void load_static(Tables& tables, const float* static_table, int size, int distance) {
#pragma unroll 4
  for (int i = threadIdx.x; i < (ROWS + TILES - 1) * 8 * HEADS; i += THREADS) {
    const int c = i % 8, head = i / 8 % HEADS, v = i / 8 / HEADS;
    tables.c[v][head][c] = c_of(static_table, size, 0, head, distance + v - (TILES - 1) - TILES * c);
  }
}
// P, and dS in place of Y, with its sums by key. The first two of all keys are keys 0 and 1 of a column, and have a C
// of their own.
DEVICE void softmax_backward(Heads& ps, Heads& ys, const Heads& xs, const Units& r, const Row& of_row, Sums& sums,
                             const Tables& tables, const float* static_table, int size, const Matrix& w_out,
                             const Window& window, int m, int lane) {
  const int g = lane / 4, t = lane % 4, key = window.key + 2 * TILES * t;
  const bool low = key == 0, high = key + TILES == 0;
#pragma unroll
  for (int p = 0; p < TILES; p++) {
    const uint2 logits = second_layer(xs, r, p, w_out, lane);
    ps[0][p + 1] = logits.x;
    ps[1][p + 1] = logits.y;
  }
  if (window.partial()) never(ps, window, t);
#pragma unroll
  for (int p = 0; p < TILES; p++) {
    float ds[2][2];
#pragma unroll
    for (int i = 0; i < 2; i++) {
      const float2 s = __half22float2(half2_of(ps[i][p + 1])), y = __half22float2(half2_of(ys[i][p + 1]));
      float2 c = *(const float2*)&tables.c[m - p + TILES - 1][8 * i + g][2 * t];
      if (p < 2 && (low || high)) {
        const float own = c_of(static_table, size, p + 1, 8 * i + g, window.distance + window.key - p);
        c = make_float2(low ? own : c.x, high ? own : c.y);
      }
      const float p0 = exp2_fast(fmaf(s.x + c.x, LOG2E, of_row.log_sum[i])),
                  p1 = exp2_fast(fmaf(s.y + c.y, LOG2E, of_row.log_sum[i]));
      ds[i][0] = p0 * y.x;
      ds[i][1] = p1 * y.y;
      ps[i][p + 1] = pack(p0, p1);
      ys[i][p + 1] = pack(ds[i][0], ds[i][1]);
    }
    add4(sums.c[p][lane], ds[0][0], ds[0][1], ds[1][0], ds[1][1]);
    if (p < 2 && low) add4(sums.first[p][lane], ds[0][0], 0.f, ds[1][0], 0.f);
    if (p < 2 && high) add4(sums.first[p][lane], 0.f, ds[0][1], 0.f, ds[1][1]);
  }
}
// Numbers of keys in the middle of the window alone, of a pair of columns 2 t and 2 t + 1 of tile p.
DEVICE uint32 middle(uint32 pair, int p, int t) {
  if (p < HALO && t == 0) pair &= 0xffff0000u;
  if (p >= TILES - HALO && t == 3) pair &= 0xffffu;
  return pair;
}
// dz of units 8 n .. 8 n + 7 in place of the hidden units, with its sums by key.
DEVICE void hidden_backward(Line& r, const Signs& signs, const Heads& ds_turned, Sums& sums, const Matrix& w_turned,
                            const Window& window, int n, int lane) {
  const int column = window.key + TILES * (lane / 4);
  uint2 b[TAPS];
#pragma unroll
  for (int tap = 0; tap < TAPS; tap++) b[tap] = ((const uint2*)&w_turned[tap][n / 2][lane])[n % 2];
#pragma unroll
  for (int i = 0; i < HALF; i++) {
    float dz[4] = {};
#pragma unroll
    for (int tap = 0; tap < TAPS; tap++) {
      const int p = i + 2 - tap;
      mma(dz, ds_turned[0][p], ds_turned[0][p + HALF], ds_turned[1][p], ds_turned[1][p + HALF], b[tap].x, b[tap].y);
    }
#pragma unroll
    for (int e = 0; e < 4; e++)
      if (!positive(signs, n, i, e)) dz[e] *= SLOPE;
    if (i == HALF - 1 && column + TILES == 0) dz[2] = dz[3] = 0.f;
    add4(sums.u[i][n][lane], dz[0], dz[1], dz[2], dz[3]);
    if (i == 0 && column == 0) {
      float2& begin = sums.begin[n][lane];
      begin = make_float2(begin.x + dz[0], begin.y + dz[1]);
    }
    r[i + 1] = pack(dz[0], dz[1]);
    r[i + 1 + HALF] = pack(dz[2], dz[3]);
  }
}
// dA in place of dS, with the sums of W1 and W2; dz takes the place of the hidden units.
DEVICE void layers_backward(Heads& ys, Units& r, const Signs& signs, Accumulators& acc, const Heads& xs, Sums& sums,
                            const Weights& w, const Window& window, int lane) {
  const int t = lane % 4;
  Heads turned;
#pragma unroll
  for (int i = 0; i < 2; i++) {
    turn_line(turned[i], ys[i]);
#pragma unroll
    for (int p = 0; p < TILES; p++) ys[i][p + 1] = middle(ys[i][p + 1], p, t);
  }
#pragma unroll
  for (int n = 0; n < UT; n++) {
    Line other;
#pragma unroll
    for (int p = 0; p < TILES + 2; p++) other[p] = turn(r[n][p]);
#pragma unroll
    for (int p = 1; p <= HALF; p++)
#pragma unroll
      for (int tap = 0; tap < TAPS; tap++)
        mma(acc.w2[tap][n], ys[0][p], ys[1][p], ys[0][p + HALF], ys[1][p + HALF], other[p + tap - 1],
            other[p + tap - 1 + HALF]);
    hidden_backward(r[n], signs, turned, sums, w.out_turned, window, n, lane);
#pragma unroll
    for (int p = 0; p < TILES; p++) other[p + 1] = middle(turn(r[n][p + 1]), p, t);
#pragma unroll
    for (int p = 1; p <= HALF; p++)
#pragma unroll
      for (int tap = 0; tap < TAPS; tap++) {
        const int from = p + tap - 1;
        mma(acc.w1[tap][n], xs[0][from], xs[1][from], xs[0][from + HALF], xs[1][from + HALF], other[p],
            other[p + HALF]);
      }
    extend(r[n]);
  }
#pragma unroll
  for (int p = 0; p < TILES; p++) {
    const float2 low = __half22float2(half2_of(ys[0][p + 1])), high = __half22float2(half2_of(ys[1][p + 1]));
    float da[4] = {low.x, low.y, high.x, high.y};
#pragma unroll
    for (int tap = 0; tap < TAPS; tap++)
#pragma unroll
      for (int k = 0; k < STEPS; k++) {
        const uint4 a = w.in_turned[tap][k][lane];
        mma(da, a.x, a.y, a.z, a.w, r[2 * k][p + 2 - tap], r[2 * k + 1][p + 2 - tap]);
      }
    ys[0][p + 1] = pack(da[0], da[1]);
    ys[1][p + 1] = pack(da[2], da[3]);
  }
  if (window.partial()) hide(ys, window, t);
}

// The sums by key of row m: of dz at window key w, and of dS.
DEVICE float u_sum(const Sums& sums, int w, int unit) {
  const int c = w / TILES, p = w % TILES;
  return ((const float*)&sums.u[p % HALF][unit / 8][4 * c + unit % 8 / 2])[p / HALF * 2 + unit % 2];
}
DEVICE float c_sum(const float4 (*sums)[32], int w, int head) {
  const int c = w / TILES, p = w % TILES;
  return ((const float*)&sums[p][4 * (head % 8) + c / 2])[head / 8 * 2 + c % 2];
}
DEVICE float begin_sum(const Sums& sums, int w, int unit) {
  const float2 begin = sums.begin[unit / 8][4 * (w / TILES) + unit % 8 / 2];
  return w % TILES ? 0.f : unit % 2 ? begin.y : begin.x;
}
// Calls f(row, key) for the keys in the middle of the windows whose distance is that of a line.
template <class F>
DEVICE void along_line(int line, F f) {
#pragma unroll
  for (int m = 0; m < ROWS; m++) {
    const int w = m + KEYS - HALO - 1 - line;
    if (w >= HALO && w < KEYS - HALO) f(m, w);
  }
}
// `distance` is that of the first key of a window in row 0. If no window of the block `begins` with the first of all
// keys, the tables for that key stay out of use.
DEVICE void fill_end(End& end, const Sums (&sums)[ROWS], const Tables& tables, const float* hidden_table, int size,
                     int distance, bool begins) {
#pragma unroll 2
  for (int i = threadIdx.x; i < LINES * HEADS; i += THREADS) {
    const int line = i / HEADS, head = i % HEADS;
    float all = 0.f, first = 0.f, second = 0.f;
    along_line(line, [&](int m, int w) {
      all += c_sum(sums[m].c, w, head);
      if (w % TILES == 0) first += c_sum(sums[m].first, w, head);
      if (w % TILES == 1) second += c_sum(sums[m].first, w, head);
    });
    end.all[line][head] = all;
    end.first[line][head] = first;
    end.second[line][head] = second;
  }
#pragma unroll 4
  for (int i = threadIdx.x; i < (LINES + 2) * UNITS; i += THREADS) {
    const int n = i / UNITS, unit = i % UNITS, s = KEYS - HALO - n, m = max(0, -s), w = s + m;  // row m and key w
    const float u = tables.u[m - w % TILES + TILES - 1][w / TILES][unit];
    end.at_zero[n][unit] = leaky(u);
    if (begins) end.begin[n][unit] = leaky(u - (unit < D ? u_of(hidden_table, size, 0, unit, distance - s + 1) : 0.f));
  }
}
// The gradient of W2 has dS leaky(z), and a warp sums dS r. Here is dS leaky(U), in the order of the fragments of W2.
// At the first of all keys, a tap has nothing in U, and the column before has no hidden units.
typedef float Rest[TAPS * UNITS * HEADS / THREADS];
DEVICE void add_at_zero(Rest& rest, const End& end, bool begins) {
  constexpr int PAIRS = UNITS * HEADS / THREADS;
#pragma unroll
  for (int k = 0; k < PAIRS; k++) {
    const int i = threadIdx.x + k * THREADS, head = i % HEADS, unit = i / HEADS;
    float sums[TAPS] = {}, near = end.at_zero[0][unit], own = end.at_zero[1][unit];
    float own_begin = begins ? end.begin[1][unit] : 0.f;
#pragma unroll 4
    for (int line = 0; line < LINES; line++) {
      const float all = end.all[line][head], far = end.at_zero[line + 2][unit];
      float first = 0.f, second = 0.f, far_begin = 0.f;
      if (begins) {
        first = end.first[line][head], second = end.second[line][head], far_begin = end.begin[line + 2][unit];
        sums[0] = fmaf(second, far_begin, sums[0]);
        sums[1] = fmaf(first, own_begin, sums[1]);
      }
      sums[0] = fmaf(all - first - second, far, sums[0]);
      sums[1] = fmaf(all - first, own, sums[1]);
      sums[2] = fmaf(all, near, sums[2]);
      near = own, own = far, own_begin = far_begin;
    }
#pragma unroll
    for (int tap = 0; tap < TAPS; tap++) rest[tap * PAIRS + k] = sums[tap];
  }
}
// The sums of the warps by key, in their order, to a slot or added to it; `distance` is that of the first line.
DEVICE void add_tables(Slot& slot, End& end, const Sums (&sums)[ROWS], int distance, int add) {
  auto put = [&](float& at, float sum) { at = add ? at + sum : sum; };
  for (int i = threadIdx.x; i < LINES * HEADS; i += THREADS)
    put(slot.c[i / HEADS][i % HEADS], end.all[i / HEADS][i % HEADS]);
  static_assert(THREADS % UNITS == 0, "a thread has lines of one unit");
  float total = 0.f;
#pragma unroll 2
  for (int i = threadIdx.x; i < LINES * UNITS; i += THREADS) {
    const int line = i / UNITS, unit = i % UNITS;
    float sum = 0.f, begin = 0.f;
    along_line(line, [&](int m, int w) { sum += u_sum(sums[m], w, unit), begin += begin_sum(sums[m], w, unit); });
#pragma unroll
    for (int tap = 0; tap < TAPS; tap++)  // of keys that come later a tap has nothing
      put(slot.u[line][tap][unit], distance + line + 1 - tap < 0 ? 0.f : tap ? sum : sum - begin);
    total += sum;
  }
  end.room[threadIdx.x] = total;
  __syncthreads();
  if (threadIdx.x < UNITS) {
    float sum = 0.f;
#pragma unroll
    for (int i = 0; i < THREADS; i += UNITS) sum += end.room[i + threadIdx.x];
    put(slot.b1[threadIdx.x], sum);
  }
}
DEVICE void add_weights(Slot& slot, const Fragments (&fragments)[ROWS], const Rest& rest, int add) {
  constexpr int COUNT = TAPS * UNITS * HEADS / THREADS;
  float* const all = &slot.w1[0][0][0];
#pragma unroll
  for (int k = 0; k < 2 * COUNT; k++) {
    const int i = threadIdx.x + k * THREADS;
    const int head = i % HEADS, unit = i / HEADS % UNITS, layer = i / HEADS / UNITS;
    const int lane = 4 * (head % 8) + unit % 8 / 2, e = head / 8 * 2 + unit % 2;
    float sum = 0.f;
#pragma unroll
    for (int m = 0; m < ROWS; m++) sum += ((const float*)&fragments[m][layer * UT + unit / 8][lane])[e];
    if (k >= COUNT) sum = fmaf(1.f - SLOPE, sum, rest[k - COUNT]);
    all[i] = add ? all[i] + sum : sum;
  }
}
DEVICE void lay_out(Fragments& to, const Accumulators& acc, int lane) {
#pragma unroll
  for (int tap = 0; tap < TAPS; tap++)
#pragma unroll
    for (int n = 0; n < UT; n++) {
      const float (&w1)[4] = acc.w1[tap][n], (&w2)[4] = acc.w2[tap][n];
      to[tap * UT + n][lane] = make_float4(w1[0], w1[1], w1[2], w1[3]);
      to[(TAPS + tap) * UT + n][lane] = make_float4(w2[0], w2[1], w2[2], w2[3]);
    }
}

// P and dA, to scratches of their own; the sums of C, U, W1, W2 and b1 go to the block's slot, or are added to it.
extern "C" __global__ void __launch_bounds__(THREADS, BLOCKS)
    taps_backward(const __half* x, const __half* y, __half* weights, __half* grad, const float* w1, const float* w2,
                  const float* hidden_table, const float* bias, const float* static_table, const float* lse,
                  const int* gate, int gated, Slot* slot, int batch, int elements, int rows, int keys, int table_size,
                  int first_diagonal, int base, int offset, int slots, int add, int x_b, int x_t, int stat_b,
                  int stat_h, int stat_t) {
  follow();
  struct Walk {
    union {
      Stage ring[ROWS][STAGES];
      End end;
    };
    Sums sums[ROWS];
  };
  struct Memory {
    Weights w;
    Tables tables;
    union {
      Walk walk;
      Fragments fragments[ROWS];
    };
  };
  static_assert(sizeof(Memory) == SHARED, "what the launch asks for");
  if (gated >= 0 && *gate != gated) return;
  extern __shared__ __align__(128) char memory[];
  Memory& shared = *(Memory*)memory;
  const int q = blockIdx.y + first_diagonal, m = threadIdx.x / 32, lane = threadIdx.x % 32, g = lane / 4, t = lane % 4;
  const Place place(base, q, rows, keys);
  const int distance = q * OUT + offset + HALO, tiles = max(0, place.last - place.first);
  const int first_element = blockIdx.x * elements, total = tiles * max(0, min(elements, batch - first_element));
  if (add && total == 0) return;
  Sums& sums = shared.walk.sums[m];
  load_weights(shared.w, w1, w2);
  load_tables(shared.tables, hidden_table, bias, table_size, distance);
  load_static(shared.tables, static_table, table_size, distance);
  for (int i = lane; i < (int)(sizeof(Sums) / 4); i += 32) ((float*)&sums)[i] = 0.f;
  __syncthreads();
  Accumulators acc;
  Stage* const ring = shared.walk.ring[m];
  // A warp walks over the same diagonal of some elements, one after the other.
  Cursor here = {first_element, place.first}, next = here;
  auto advance = [&](Cursor& c) {
    if (++c.tile == place.last) c.tile = place.first, c.element++;
  };
  auto row_at = [&](const Cursor& c) { return (uint32)(c.element * x_b + (c.tile * ROWS + m) * x_t + g * BLOCK); };
  auto fetch = [&](int n) {
    const bool real = n < total && next.tile * ROWS + m < rows;
    const int key = place.start + next.tile * ROWS;
    fetch_window(ring[n % STAGES].x, x, row_at(next), key, keys, real, g, lane);
    fetch_window(ring[n % STAGES].y, y, row_at(next), key, keys, real, g, lane);
    commit();
    advance(next);
  };
#pragma unroll
  for (int ahead = 0; ahead < STAGES - 1; ahead++) fetch(ahead);
  for (int n = 0; n < total; n++, advance(here)) {
    const int row = here.tile * ROWS + m;
    Row of_row;
#pragma unroll
    for (int i = 0; i < 2; i++) {
      const bool real = row < rows && 8 * i + g < H;
      const int at = real ? here.element * stat_b + row * stat_t + (8 * i + g) * stat_h : 0;
      of_row.log_sum[i] = real ? -LOG2E * lse[at] : NEVER;  // heads that are padding have no weight
    }
    fetch(n + STAGES - 1);
    wait<STAGES - 1>();
    __syncwarp();
    if (row < rows) {
      const Window window = {place.start + here.tile * ROWS, distance + m};
      const int key = window.key + 2 * TILES * t;
      const Stage& stage = ring[n % STAGES];
      Heads xs, ys, ps;
      Units r;
      Signs signs;
      take_window(xs, stage.x, lane);
      if (window.partial()) hide(xs, window, t);
      {
        Heads turned;
#pragma unroll
        for (int i = 0; i < 2; i++) {
          turn_line(turned[i], xs[i]);
          xs[i][0] = turn(turned[i][0]);
          xs[i][TILES + 1] = turn(turned[i][TILES + 1]);
        }
        first_layer(r, signs, turned, shared.tables, shared.w, window, hidden_table, table_size, m, lane);
      }
      take_window(ys, stage.y, lane);
      if (window.partial()) hide(ys, window, t);
      softmax_backward(ps, ys, xs, r, of_row, sums, shared.tables, static_table, table_size, shared.w.out, window, m,
                       lane);
      store_window(ps, weights, row_at(here), key, keys, g, t);
      layers_backward(ys, r, signs, acc, xs, sums, shared.w, window, lane);
      store_window(ys, grad, row_at(here), key, keys, g, t);
    }
    __syncwarp();
  }
  wait<0>();
  __syncthreads();
  slot += (long long)(blockIdx.x * gridDim.z + blockIdx.z) * slots + blockIdx.y;
  const bool begins = place.start + place.first * ROWS <= 0;
  End& end = shared.walk.end;
  fill_end(end, shared.walk.sums, shared.tables, hidden_table, table_size, distance, begins);
  __syncthreads();
  add_tables(*slot, end, shared.walk.sums, distance - (KEYS - HALO - 1), add);
  Rest rest;
  add_at_zero(rest, end, begins);
  __syncthreads();
  lay_out(shared.fragments[m], acc, lane);
  __syncthreads();
  add_weights(*slot, shared.fragments, rest, add);
}
