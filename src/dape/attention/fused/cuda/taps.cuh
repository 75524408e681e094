// Heads mixed by convolutions of three taps along the keys, for an fp16 scratch: what `taps_mix.cu` and
// `taps_backward.cu` share.
//
//   w[c, unit] = sum_t W1_t x[c + t - 1]                  r = leaky(w + U) - leaky(U)
//   s[key, head] = x + sum_t W2_t r[key + t - 1]          P = exp(s + C - lse)      dS = P (dP - delta) = P Y
//   dz[c, unit] = leaky'(z) sum_t W2_t^T dS[c + 1 - t]    dA[key, head] = dS + sum_t W1_t^T dz[key + 1 - t]
//
// for U = b1 + sum_t U_t of a column, z = w + U, and logits C at scores of zero (`taps_at_zero.cu`). U and C are
// float32, and however large they are, r is no larger than w.
//
// A warp has a window of KEYS neighbouring keys of one row. Every layer loses a key at each end of the window, so the
// window overlaps its neighbours: it computes all layers from X alone, and keeps the OUT keys in its middle. Only
// X, Y, P and dA pass through memory. Results go to further scratches, since neighbouring windows read the same keys.
//
// Key TILES c + p of a window is column c of tile p, 8 columns a tile. A tap then is a neighbouring tile: the same
// register of another number. Products take tiles p and p + TILES / 2 together, which a shift keeps together. Only the
// taps of the first and the last tile lie in another column, which is a lane 4 further. Lane (g, t) = (lane / 4, lane %
// 4) loads the keys of columns 2 t and 2 t + 1 of heads g and g + 8.
//
// A block has ROWS rows, one a warp, and walks down a diagonal in steps of ROWS rows and keys. Its distances, and with
// them its entries of U and C, never change.
//
// Macros: H heads and D hidden units padded to UNITS (16 or 32), TILES (4 or 8), ROWS, BLOCK keys of a head side by
// side in the scratch, SHARED bytes of shared memory.
constexpr int HEADS = 16, TAPS = 3, HALO = 4, KEYS = 8 * TILES, OUT = KEYS - 2 * HALO, THREADS = 32 * ROWS;
constexpr int UT = UNITS / 8, STEPS = UNITS / 16, VECTORS = TILES / 4, HALF = TILES / 2;
static_assert(ROWS % 8 == 0, "windows begin with a vector of the scratch");

// X and P lie as [head, key], registers [8 heads][tile]; all else as [key, channel], registers [8 channels][tile]. Both
// have a tile more at each end.
typedef uint32 Line[TILES + 2];
typedef Line Heads[2];
typedef Line Units[UT];

constexpr float SLOPE = 0.01f;
DEVICE float leaky(float z) { return fmaxf(z, SLOPE * z); }
// leaky(w + u) - leaky(u), divided by 1 - SLOPE, which the fragments of W2 have as a factor.
DEVICE float rise(float w, float u) { return fmaf(SLOPE / (1.f - SLOPE), w, fmaxf(w, -u)) + fminf(u, 0.f); }
// The first or the second numbers of two pairs.
DEVICE uint32 lows(uint32 a, uint32 b) { return __byte_perm(a, b, 0x5410); }
DEVICE uint32 highs(uint32 a, uint32 b) { return __byte_perm(a, b, 0x7632); }
// The neighbours of the first and the last tile, of a line [key, channel]; the window's own ends meet anything finite.
DEVICE void extend(Line& line) {
  line[0] = __shfl_up_sync(~0u, line[TILES], 4);
  line[TILES + 1] = __shfl_down_sync(~0u, line[1], 4);
}
DEVICE void turn_line(Line& to, const Line& from) {
#pragma unroll
  for (int p = 1; p <= TILES; p++) to[p] = turn(from[p]);
  extend(to);
}

// The weights as fragments: W1 [unit, head] and W2^T [unit, head] as B operands of two unit tiles each, (1 - SLOPE) W2
// [head, unit] and W1^T [head, unit] as A operands of 16 units each. `rest` is what rounding left of W1: a hidden unit
// near zero has the gradient of its sign, and the rounding of a layer would turn the units of all keys alike.
typedef uint4 Matrix[TAPS][STEPS][32];
struct Weights {
  Matrix in, rest, out;
#ifdef BACKWARD
  Matrix out_turned, in_turned;
#endif
};
DEVICE void load_weights(Weights& weights, const float* w1, const float* w2) {
  auto in = [&](int tap, int unit, int head) { return unit < D && head < H ? w1[(tap * D + unit) * H + head] : 0.f; };
  auto out = [&](int tap, int head, int unit) {
    return unit < D && head < H ? w2[(head * TAPS + tap) * D + unit] : 0.f;
  };
  for (int i = threadIdx.x; i < TAPS * STEPS * 32; i += THREADS) {
    const int lane = i % 32, s = i / 32 % STEPS, tap = i / 32 / STEPS, g = lane / 4, t = lane % 4;
    const int unit = 16 * s + g, head = 2 * t, column = 16 * s + 2 * t;
    auto two_in = [&](int n, int h) { return pack(in(tap, n, h), in(tap, n, h + 1)); };
    auto two_out = [&](int h, int n) {
      return pack((1.f - SLOPE) * out(tap, h, n), (1.f - SLOPE) * out(tap, h, n + 1));
    };
    auto two_left = [&](int n, int h) {
      const float a = in(tap, n, h), b = in(tap, n, h + 1);
      const float2 rounded = __half22float2(half2_of(pack(a, b)));
      return pack(a - rounded.x, b - rounded.y);
    };
    weights.in[tap][s][lane] =
        make_uint4(two_in(unit, head), two_in(unit, head + 8), two_in(unit + 8, head), two_in(unit + 8, head + 8));
    weights.rest[tap][s][lane] = make_uint4(two_left(unit, head), two_left(unit, head + 8), two_left(unit + 8, head),
                                            two_left(unit + 8, head + 8));
    weights.out[tap][s][lane] =
        make_uint4(two_out(g, column), two_out(g + 8, column), two_out(g, column + 8), two_out(g + 8, column + 8));
#ifdef BACKWARD
    auto across_in = [&](int h, int n) { return pack(in(tap, n, h), in(tap, n + 1, h)); };
    auto across_out = [&](int n, int h) { return pack(out(tap, h, n), out(tap, h + 1, n)); };
    weights.out_turned[tap][s][lane] = make_uint4(across_out(unit, head), across_out(unit, head + 8),
                                                  across_out(unit + 8, head), across_out(unit + 8, head + 8));
    weights.in_turned[tap][s][lane] = make_uint4(across_in(g, column), across_in(g + 8, column),
                                                 across_in(g, column + 8), across_in(g + 8, column + 8));
#endif
  }
}

// U, and for P also C, over the distance. All rows of a block share them: row m and tile p meet entry m - p + TILES -
// 1, column by column. A line of U ends with 8 unused numbers, so that lanes of different g meet different banks.
struct Tables {
  float u[ROWS + TILES - 1][8][UNITS + 8];
#ifdef BACKWARD
  float c[ROWS + TILES - 1][HEADS][8];
#endif
};
DEVICE float u_of(const float* hidden_table, int size, int tap, int unit, int distance) {
  return distance >= 0 && distance < size ? hidden_table[((long long)distance * TAPS + tap) * D + unit] : 0.f;
}
// `distance` is that of the first key of a window in row 0.
DEVICE void load_tables(Tables& tables, const float* hidden_table, const float* bias, int size, int distance) {
#pragma unroll 5
  for (int i = threadIdx.x; i < (ROWS + TILES - 1) * 8 * UNITS; i += THREADS) {
    const int unit = i % UNITS, c = i / UNITS % 8, v = i / UNITS / 8, d = distance + v - (TILES - 1) - TILES * c;
    float sum = 0.f;
    if (unit < D) {
      sum = bias[unit];
#pragma unroll
      for (int tap = 0; tap < TAPS; tap++) sum += u_of(hidden_table, size, tap, unit, d + 1 - tap);
    }
    tables.u[v][c][unit] = sum;
  }
}

// The tiles of a block: a segment of its diagonal. Tile n has rows ROWS n + m, and windows from `start` + ROWS n on.
struct Place {
  int first, last, start;
  __device__ Place(int base, int q, int rows, int keys) : start(base - q * OUT - 2 * HALO) {
    const int low = 1 + HALO - KEYS - start, high = keys + 1 - HALO - start;  // a hidden position past the last key
    first = low > 0 ? (low + ROWS - 1) / ROWS : 0;
    last = high > 0 ? (min(rows, high) + ROWS - 1) / ROWS : 0;
    const int share = (max(0, last - first) + gridDim.z - 1) / gridDim.z;
    first += blockIdx.z * share;
    last = min(last, first + share);
  }
};

// A window: its first key, and the distance to that.
struct Window {
  int key, distance;
  // Whether a row may not see some of the keys, since they come later, or before the first.
  DEVICE bool partial() const { return distance < KEYS - 1 || key < 0; }
  // Whether the first of all keys is in it, before which a tap has nothing.
  DEVICE bool begins() const { return key <= 0; }
  DEVICE uint32 seen(int p, int t) const {
    const int low = 2 * TILES * t + p, high = low + TILES;
    return (low <= distance && key + low >= 0 ? 0xffffu : 0) | (high <= distance && key + high >= 0 ? 0xffff0000u : 0);
  }
};

// A window on its way, by heads g and g + 8: vector 4 v + t of a head is a lane's copy v, so that a copy has whole
// sectors. Odd copies change places by pairs, and a lane finds its vectors in different banks.
typedef uint4 Ring[2][VECTORS][32];
// Where a key lies in a row of the scratch.
DEVICE int along(int key) { return (key & -BLOCK) * H + (key & (BLOCK - 1)); }
// `key` is the first of the window, `row` is where head g of its row lies, `keys` are those of the scratch.
DEVICE void fetch_window(Ring& ring, const __half* x, uint32 row, int key, int keys, bool real, int g, int lane) {
#pragma unroll
  for (int v = 0; v < VECTORS; v++) {
    const int at = key + 8 * (4 * v + lane % 4);
    const bool inside = real && at >= 0 && at < keys;
#pragma unroll
    for (int r = 0; r < 2; r++) {
      const bool wanted = inside && 8 * r + g < H;
      copy16(address(&ring[r][v][lane ^ v]), x + (wanted ? row + along(at) + r * 8 * BLOCK : 0), wanted);
    }
  }
}
DEVICE void take_window(Heads& x, const Ring& ring, int lane) {
#pragma unroll
  for (int r = 0; r < 2; r++) {
    uint32 own[TILES];
#pragma unroll
    for (int e = 0; e < VECTORS; e++) {
      const int vector = VECTORS * (lane % 4) + e, v = vector / 4;
      *(uint4*)&own[4 * e] = ring[r][v][((lane & -4) + vector % 4) ^ v];
    }
#pragma unroll
    for (int p = 0; p < TILES; p++) {
      const uint32 left = own[p / 2], right = own[TILES / 2 + p / 2];
      x[r][p + 1] = p % 2 ? highs(left, right) : lows(left, right);
    }
  }
}
// The keys in the middle of a window, in vectors and, at its ends, halves of vectors.
DEVICE void store_window(const Heads& x, __half* into, uint32 row, int key, int keys, int g, int t) {
#pragma unroll
  for (int r = 0; r < 2; r++) {
    if (8 * r + g >= H) continue;
    uint32 own[TILES];
#pragma unroll
    for (int i = 0; i < TILES / 2; i++) {
      own[i] = lows(x[r][2 * i + 1], x[r][2 * i + 2]);
      own[TILES / 2 + i] = highs(x[r][2 * i + 1], x[r][2 * i + 2]);
    }
#pragma unroll
    for (int v = 0; v < VECTORS; v++) {
      const int at = key + 8 * v;
      if (at < 0 || at >= keys) continue;
      __half* const to = into + row + along(at) + r * 8 * BLOCK;
      if (v == 0 && t == 0)
        *(uint2*)(to + HALO) = *(const uint2*)&own[2];
      else if (v == VECTORS - 1 && t == 3)
        *(uint2*)to = *(const uint2*)&own[4 * v];
      else
        *(uint4*)to = *(const uint4*)&own[4 * v];
    }
  }
}
// Zeros, or -inf, at keys that are not seen.
DEVICE void hide(Heads& x, const Window& window, int t) {
#pragma unroll
  for (int p = 0; p < TILES; p++) {
    const uint32 seen = window.seen(p, t);
    x[0][p + 1] &= seen;
    x[1][p + 1] &= seen;
  }
}
DEVICE void never(Heads& s, const Window& window, int t) {
#pragma unroll
  for (int p = 0; p < TILES; p++) {
    const uint32 seen = window.seen(p, t);
#pragma unroll
    for (int i = 0; i < 2; i++) s[i][p + 1] = (s[i][p + 1] & seen) | (0xfc00fc00u & ~seen);  // -inf
  }
}

// Whether the hidden units are positive, a bit for each: the last one found is the lowest bit of its word.
typedef uint32 Signs[UT / 2];
DEVICE bool positive(const Signs& signs, int n, int i, int e) {
  return signs[n / 2] >> (8 * HALF - 1 - n % 2 * 4 * HALF - 4 * i - e) & 1;
}
// r from X. At the first of all keys a tap has nothing, which is taken off U, and the column before it, which key 0
// meets, is zero.
DEVICE void first_layer(Units& r, Signs& signs, const Heads& turned, const Tables& tables, const Weights& w,
                        const Window& window, const float* hidden_table, int size, int m, int lane) {
  const int g = lane / 4, t = lane % 4, column = window.key + TILES * g;
  float2 missing[UT] = {};
  if (window.begins()) {
#pragma unroll
    for (int n = 0; n < UT; n++) {
      auto at = [&](int unit) {
        return column == 0 && unit < D ? u_of(hidden_table, size, 0, unit, window.distance - TILES * g + 1) : 0.f;
      };
      missing[n] = make_float2(at(8 * n + 2 * t), at(8 * n + 2 * t + 1));
    }
  }
#pragma unroll
  for (int n = 0; n < UT; n++) {
    uint2 b[TAPS], rest[TAPS];
#pragma unroll
    for (int tap = 0; tap < TAPS; tap++) {
      b[tap] = ((const uint2*)&w.in[tap][n / 2][lane])[n % 2];
      rest[tap] = ((const uint2*)&w.rest[tap][n / 2][lane])[n % 2];
    }
#pragma unroll
    for (int i = 0; i < HALF; i++) {
      const float2 low = *(const float2*)&tables.u[m - i + TILES - 1][g][8 * n + 2 * t],
                   high = *(const float2*)&tables.u[m - i + HALF - 1][g][8 * n + 2 * t];
      float u[4] = {low.x, low.y, high.x, high.y}, wx[4] = {};
      if (i == 0) u[0] -= missing[n].x, u[1] -= missing[n].y;
#pragma unroll
      for (int tap = 0; tap < TAPS; tap++) {
        const int p = i + tap;
        mma(wx, turned[0][p], turned[0][p + HALF], turned[1][p], turned[1][p + HALF], b[tap].x, b[tap].y);
        mma(wx, turned[0][p], turned[0][p + HALF], turned[1][p], turned[1][p + HALF], rest[tap].x, rest[tap].y);
      }
      r[n][i + 1] = pack(rise(wx[0], u[0]), rise(wx[1], u[1]));
      r[n][i + 1 + HALF] = pack(rise(wx[2], u[2]), rise(wx[3], u[3]));
#ifdef BACKWARD
#pragma unroll
      for (int e = 0; e < 4; e++)  // the sign of -z
        signs[n / 2] = __funnelshift_l(__float_as_uint(-u[e] - wx[e]), signs[n / 2], 1);
#endif
    }
    if (column + TILES == 0) r[n][TILES] = 0;
    extend(r[n]);
  }
}
// Logits without C of tile p, from X and r, in fp16: pairs of heads g and g + 8.
DEVICE uint2 second_layer(const Heads& x, const Units& r, int p, const Matrix& w, int lane) {
  const float2 first = __half22float2(half2_of(x[0][p + 1])), second = __half22float2(half2_of(x[1][p + 1]));
  float s[4] = {first.x, first.y, second.x, second.y};
#pragma unroll
  for (int tap = 0; tap < TAPS; tap++)
#pragma unroll
    for (int k = 0; k < STEPS; k++) {
      const uint4 a = w[tap][k][lane];
      mma(s, a.x, a.y, a.z, a.w, r[2 * k][p + tap], r[2 * k + 1][p + tap]);
    }
  return make_uint2(pack(s[0], s[1]), pack(s[2], s[3]));
}
