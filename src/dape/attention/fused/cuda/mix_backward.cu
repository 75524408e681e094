// P and dA from X and Y = dP - delta, with the sums of all gradients; `mix.cuh` has the legend.

// The two layers of a lane, and their transposes.
struct Layers {
  Held in, out, out_turned, in_turned;
  __device__ Layers(const Weights& w, int lane)
      : in(w.in, lane), out(w.out, lane), out_turned(w.out_turned, lane), in_turned(w.in_turned, lane) {}
};
// A tile of X and of Y under way, with the log-sum-exps of all heads of the row.
struct Stage {
  Ring x, y;
  float lse[HEADS];
};
// The sums of a warp, in registers and in shared memory.
struct Accumulators {
  float u[2][UT][4] = {}, c[PARTS][4][4] = {}, w1[PARTS][UT][4] = {}, w2[PARTS][UT][4] = {};
};
struct Sums {
  float u[WARPS][KEYS * UNITS], c[WARPS][HEADS * KEYS], w1[WARPS][HEADS * UNITS], w2[WARPS][HEADS * UNITS];
};

// A warp's walk over a diagonal, element after element: the remaining tiles of an element, the remaining rows from the
// row of the tile on, the first key of the tile, and the place of the row.
struct Cursor {
  int tiles, left, key;
  uint32 at, stat, mask;
};

// P in place of the scores of half f of a tile, dS in place of Y; `risen` is phi(z) - phi(U).
DEVICE void softmax_backward(Own& xs, Half& yf, const Half& xf, int f, const Stage& stage, const Tables& tables,
                             const Held& w_out, const uint2 (&risen)[UT], bool whole, const uint32 (&seen)[2], int g,
                             int lane) {
#pragma unroll
  for (int part = 0; part < PARTS; part++)
#pragma unroll
    for (int e = 0; e < 2; e++) {
      const uint2 logits = across_units(make_uint2(xf[2 * part][e], xf[2 * part + 1][e]), w_out, part, risen, e);
#pragma unroll
      for (int i = 0; i < 2; i++) {
        const int r = 2 * part + i;
        const float log_sum = stage.lse[8 * r + g];
        const float2 c = tables.c[r][2 * f + e][lane], v = __half22float2(half2_of(i ? logits.y : logits.x)),
                     y = __half22float2(half2_of(yf[r][e]));
        float p0 = exp2_fast(fmaf(v.x - log_sum, LOG2E, c.x)), p1 = exp2_fast(fmaf(v.y - log_sum, LOG2E, c.y));
        if (!whole) {
          p0 = seen[e] & 0xffffu ? p0 : 0.f;
          p1 = seen[e] >> 16 ? p1 : 0.f;
        }
        xs[r][2 * f + e] = pack(p0, p1);
        yf[r][e] = pack(p0 * y.x, p1 * y.y);
      }
    }
}
// dA in place of Y of half f of a tile, from dS, with its summands of all sums.
DEVICE void layers_backward(Own& ys, Accumulators& acc, const Half& xf, const Half& ds, int f, const Layers& layers,
                            const uint2 (&risen)[UT], const uint2 (&z)[UT], uint32 ones) {
#pragma unroll
  for (int part = 0; part < PARTS; part++) {
    add_product(acc.c[part][2 * f], ds, part, ones, 0);
    add_product(acc.c[part][2 * f + 1], ds, part, 0, ones);
  }
  uint2 dz[UT] = {};
  across_heads(dz, ds, layers.out_turned);
#pragma unroll
  for (int n = 0; n < UT; n++) {
    dz[n] = make_uint2(leaky_backward(dz[n].x, z[n].x), leaky_backward(dz[n].y, z[n].y));
    const uint32 risen_low = turn(risen[n].x), risen_high = turn(risen[n].y), low = turn(dz[n].x), high = turn(dz[n].y);
#pragma unroll
    for (int part = 0; part < PARTS; part++) {
      add_product(acc.w2[part][n], ds, part, risen_low, risen_high);
      add_product(acc.w1[part][n], xf, part, low, high);
    }
    mma(acc.u[f][n], ones, 0, 0, ones, low, high);
  }
#pragma unroll
  for (int part = 0; part < PARTS; part++)
#pragma unroll
    for (int e = 0; e < 2; e++) {
      const uint2 da = across_units(make_uint2(ds[2 * part][e], ds[2 * part + 1][e]), layers.in_turned, part, dz, e);
      ys[2 * part][2 * f + e] = da.x;
      ys[2 * part + 1][2 * f + e] = da.y;
    }
}

// The place of a float2 of row g within a line of sums. The lanes of a store meet different banks.
DEVICE int unit_place(int unit, int g) { return unit ^ 8 * (UNITS == 16 ? g >> 1 & 1 : g & 3); }
DEVICE int key_place(int key, int g) { return key ^ 2 * (g & 3); }
DEVICE int row_of(int key) { return 2 * (key >> 3) + (key & 1); }  // g of `key_of`
DEVICE void lay_out(Sums& sums, const Accumulators& acc, int warp, int g, int t) {
#pragma unroll
  for (int i = 0; i < 2; i++) {
    auto pair = [&](const float (&c)[4]) { return make_float2(c[2 * i], c[2 * i + 1]); };
#pragma unroll
    for (int n = 0; n < UT; n++) {
      const int unit = unit_place(8 * n + 2 * t, g);
#pragma unroll
      for (int f = 0; f < 2; f++) *(float2*)&sums.u[warp][key_of(2 * f + i, g) * UNITS + unit] = pair(acc.u[f][n]);
#pragma unroll
      for (int part = 0; part < PARTS; part++) {
        const int at = (16 * part + 8 * i + g) * UNITS + unit;
        *(float2*)&sums.w1[warp][at] = pair(acc.w1[part][n]);
        *(float2*)&sums.w2[warp][at] = pair(acc.w2[part][n]);
      }
    }
#pragma unroll
    for (int part = 0; part < PARTS; part++)
#pragma unroll
      for (int p = 0; p < 4; p++)
        *(float2*)&sums.c[warp][(16 * part + 8 * i + g) * KEYS + key_place(8 * t + 2 * p, g)] = pair(acc.c[part][p]);
  }
}
// The sums of the warps, in order, stored in a slot or added to a slot; line r is the distance of row m and key
// m + KEYS - 1 - r.
DEVICE void add_up(float* slot, const Sums& sums, int add) {
  constexpr int THREADS = 32 * WARPS;
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
    for (int row = 0; row < WARPS; row++) sum_w1 += sums.w1[row][from], sum_w2 += sums.w2[row][from];
    put(i, sum_w1);
    put(HEADS * UNITS + i, sum_w2);
  }
}

// X <- P, Y <- dA; the sums of U, C, W1 and W2 are stored in the block's slot, or added to the slot.
extern "C" __global__ void __launch_bounds__(32 * WARPS, BLOCKS)
    mix_backward(__half* x, __half* y, const float* w1, const float* w2, const float* hidden_table,
                 const float* static_table, const float* lse, const uint8* mask, const int* gate, int gated,
                 float* slot, int batch, int elements, int rows, int keys, int table_size, int first_diagonal,
                 int band_tile, int offset, int slots, int slot_size, int add, int x_b, int x_t, int stat_b, int stat_h,
                 int stat_t, int mask_b) {
  follow();
  struct Walk {
    Tables tables[WARPS];
    Stage ring[WARPS][STAGES];
  };
  struct Memory {
    Weights w;
    union {
      Walk walk;
      Sums sums;
    };
  };
  static_assert(sizeof(Memory) == SHARED, "what the launch asks for");
  if (gated >= 0 && *gate != gated) return;
  extern __shared__ __align__(128) char memory[];
  Memory& shared = *(Memory*)memory;
  const Block block;
  const int q = block.diagonal + first_diagonal, warp = threadIdx.x / 32, lane = threadIdx.x % 32, g = lane / 4,
            t = lane % 4;
  const Place place(block, q, band_tile, rows, keys);
  const int m = place.row + warp, delta0 = q * KEYS + offset + m;
  const int tiles = max(0, place.last - place.first), first_element = block.group * elements;
  const int total = tiles * max(0, min(elements, batch - first_element));
  if (add && total == 0) return;
  const Tables& tables = shared.walk.tables[warp];
  load_weights(shared.w, w1, w2);
  load_tables(shared.walk.tables[warp], hidden_table, static_table, table_size, delta0, lane);
  __syncthreads();
  const Layers layers(shared.w, lane);
  Accumulators acc;
  // The unit matrix as an A operand, and as a B operand of the lower and the upper 8 of 16 keys.
  const uint32 ones = 2 * t == g ? 0x3c00u : 2 * t + 1 == g ? 0x3c000000u : 0u;
  const int row0 = place.first * ROWS + m, key0 = place.start + place.first * ROWS,
            left0 = min(ROWS * tiles, rows - row0);
  const int step = ROWS * x_t, stat_step = ROWS * stat_t;
  Cursor here = {tiles,
                 left0,
                 key0,
                 (uint32)(first_element * x_b + row0 * x_t + g * BLOCK + 8 * t),
                 (uint32)(first_element * stat_b + row0 * stat_t),
                 (uint32)(first_element * mask_b)};
  Cursor next = here;
  auto advance = [&](Cursor& c) {
    c.left -= ROWS, c.key += ROWS, c.at += step, c.stat += stat_step;
    if (--c.tiles == 0) {
      c.tiles = tiles, c.left = left0, c.key = key0;
      c.at += x_b - tiles * step, c.stat += stat_b - tiles * stat_step, c.mask += mask_b;
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
    for (int i = lane; i < HEADS; i += 32)
      copy4(address(&ring[into].lse[i]), lse + (real ? next.stat + min(i, H - 1) * stat_h : 0), real);
    commit();
    advance(next);
  };
#pragma unroll
  for (int ahead = 0; ahead < STAGES - 1; ahead++) fetch(ahead);
  // All warps of a block walk equally far, and skip rows past the last.
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
      first_layer(risen, z, xf, f, tables, layers.in, lane);
      softmax_backward(xs, yf, xf, f, stage, tables, layers.out, risen, whole, seen, g, lane);
      layers_backward(ys, acc, xf, yf, f, layers, risen, z, ones);
    }
    const uint32 to = here.at + along(here.key);
    store_tile(xs, x + to, here.left > 0, g);
    store_tile(ys, y + to, here.left > 0, g);
    __syncwarp();
  }
  wait<0>();
  __syncthreads();
  lay_out(shared.sums, acc, warp, g, t);
  __syncthreads();
  slot += ((long long)(block.group * (gridDim.z / SHARES) + block.segment) * slots + block.diagonal * SHARES +
           block.share) *
          slot_size;
  add_up(slot, shared.sums, add);
}
