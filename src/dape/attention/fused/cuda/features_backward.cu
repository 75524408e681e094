// P and dA from X and Y = dP - delta, with the sums of all gradients; `features.cuh` has the legend.

// The two layers, and their transposes, of which a lane has those in registers for which there is room.
struct Layers {
  const Matrix &in, &rest;
  Held out, out_turned, in_turned;
  __device__ Layers(const Weights& w, const Matrix& rest, int lane)
      : in(w.in), rest(rest), out(w.out, lane), out_turned(w.out_turned, lane), in_turned(w.in_turned, lane) {}
};
// A tile of X and of Y under way, with the log-sum-exps of all heads of the row, and behind them its scale.
struct Stage {
  Ring x, y;
  float numbers[HEADS + 4];
};
// The sums of a warp in shared memory at last, besides those of pieces.
struct Sums {
  float w1[HEADS * UNITS], w2[HEADS * UNITS], psi[KEYS];
};
// A block's sums of all gradients.
struct Slot {
  PieceSums pieces;
  float w1[HEADS * UNITS], w2[HEADS * UNITS], psi[LINES];
};

// A warp's walk over a diagonal, element after element: the remaining tiles of an element, the remaining rows from the
// row of the tile on, the first key of the tile, and the place of the row.
struct Cursor {
  int tiles, left, key;
  uint32 at, stat, mask, pair;
};

// P in place of the scores of half f of a tile, dS in place of Y, from the logits.
DEVICE void softmax_backward(Own& xs, Half& yf, const float (&s)[2][4], int f, const Stage& stage, bool whole,
                             const uint32 (&seen)[2], int g) {
#pragma unroll
  for (int i = 0; i < HT; i++) {
    const float log_sum = -LOG2E * stage.numbers[8 * i + g];
#pragma unroll
    for (int e = 0; e < 2; e++) {
      const float2 v = __half22float2(half2_of(pack(s[e][2 * i], s[e][2 * i + 1]))),  // as in the forward pass
          y = __half22float2(half2_of(yf[i][e]));
      const float p0 = exp2_fast(fmaf(v.x, LOG2E, log_sum)), p1 = exp2_fast(fmaf(v.y, LOG2E, log_sum));
      xs[i][2 * f + e] = pack(p0, p1);
      yf[i][e] = pack(p0 * y.x, p1 * y.y);
    }
  }
  if (whole) return;
#pragma unroll
  for (int i = 0; i < HT; i++)
#pragma unroll
    for (int e = 0; e < 2; e++) xs[i][2 * f + e] &= seen[e];
  hide(yf, seen);
}
// d leaky'(z), by the sign of leaky(z).
DEVICE uint32 leaky_backward(uint32 d, uint32 r) {
  const __half2 positive = __hgt2(half2_of(r), __float2half2_rn(0.f));
  return bits(__hmul2(half2_of(d), __hfma2(positive, __float2half2_rn(0.99f), __float2half2_rn(0.01f))));
}
// dA in place of Y of half f of a tile, from dS, with its summands of all sums.
DEVICE void layers_backward(Own& ys, Accumulators& acc, Slots& slots, const Half& xf, const Half& ds,
                            const uint2 (&r)[UT], int f, const Layers& layers, const Track& track) {
  const uint4 ds_turned = turned(ds);
  uint2 dz[UT], dz_turned[UT];
#pragma unroll
  for (int s = 0; s < STEPS; s++) {
    const uint4 b = layers.out_turned.at(0, s);
    dz[2 * s] = mma_half(ds_turned, b.x, b.y, 0, 0);
    dz[2 * s + 1] = mma_half(ds_turned, b.z, b.w, 0, 0);
  }
#pragma unroll
  for (int n = 0; n < UT; n++) {
    dz[n] = make_uint2(leaky_backward(dz[n].x, r[n].x), leaky_backward(dz[n].y, r[n].y));
    dz_turned[n] = make_uint2(turn(dz[n].x), turn(dz[n].y));
    add_product(acc.w2[n], ds, 0, turn(r[n].x), turn(r[n].y));
    add_product(acc.w1[n], xf, 0, dz_turned[n].x, dz_turned[n].y);
  }
  sum_pieces(acc, slots, ds, ds_turned, dz, dz_turned, f, track);
#pragma unroll
  for (int e = 0; e < 2; e++) {
    float da[4] = {};
    add_heads(da, track.ones, ds_turned, e);
    add_units(da, layers.in_turned, dz, e);
    ys[0][2 * f + e] = pack(da[0], da[1]);
    ys[1][2 * f + e] = pack(da[2], da[3]);
  }
}
// P and dA in place of X and Y of a tile, with its summands of all sums, in acc.row those of its row's scale.
DEVICE void tile_backward(Own& xs, Own& ys, Accumulators& acc, Slots& slots, const Stage& stage, const Layers& layers,
                          Track& track, bool whole, int delta0, int key, int keys, const uint8* mask) {
  if (track.find(stage.numbers[HEADS])) slots.move(acc, track);
  track.line.tag[track.lane] =
      pack(fmaf(track.psi, track.scale, -lower_end(track.lower)), (float)track.line.at[track.lane].piece);
  __syncwarp();
  acc.row = 0.f;
  take_tile(xs, stage.x, track.lane);
  take_tile(ys, stage.y, track.lane);
#pragma unroll
  for (int f = 0; f < 2; f++) {
    Half xf, yf;
    uint32 seen[2];
    float s[2][4];
    uint2 r[UT];
    take_half(xf, xs, f);
    take_half(yf, ys, f);
    if (!whole) {
      look(seen, f, true, delta0, key, track.t, keys, mask);
      hide(xf, seen);
      hide(yf, seen);
    }
    both_layers(s, r, xf, f, layers.in, layers.rest, layers.out, track);
    softmax_backward(xs, yf, s, f, stage, whole, seen, track.g);
    layers_backward(ys, acc, slots, xf, yf, r, f, layers, track);
  }
#pragma unroll
  for (int lanes = 16; lanes; lanes /= 2) acc.row += __shfl_xor_sync(~0u, acc.row, lanes);
}

DEVICE void lay_out(Sums& sums, const Accumulators& acc, float unit, int g, int t) {
#pragma unroll
  for (int n = 0; n < UT; n++)
#pragma unroll
    for (int i = 0; i < 2; i++) {
      const int at = (8 * i + g) * UNITS + 8 * n + 2 * t;
      *(float2*)&sums.w1[at] = make_float2(acc.w1[n][2 * i], acc.w1[n][2 * i + 1]);
      *(float2*)&sums.w2[at] = make_float2(acc.w2[n][2 * i], acc.w2[n][2 * i + 1]);
    }
#pragma unroll
  for (int p = 0; p < 4; p++) {
    float sum = acc.psi[p];
    sum += __shfl_xor_sync(~0u, sum, 1);
    sum += __shfl_xor_sync(~0u, sum, 2);
    if (t == 0) sums.psi[key_of(p, g)] = unit * sum;
  }
}
// The sums of the warps, in order, stored in a slot or added to a slot; line r is the distance of row m and key
// m + KEYS - 1 - r.
DEVICE void add_up(Slot& slot, const PieceSums (&pieces)[WARPS], const Sums (&sums)[WARPS], int add) {
  constexpr int THREADS = 32 * WARPS;
  auto put = [&](float& at, float sum) { at = add ? at + sum : sum; };
  for (int i = threadIdx.x; i < PIECES * 2 * CHANNELS; i += THREADS) {
    float sum = 0.f;
#pragma unroll
    for (int m = 0; m < WARPS; m++) sum += (&pieces[m][0][0][0])[i];
    put((&slot.pieces[0][0][0])[i], sum);
  }
  for (int i = threadIdx.x; i < HEADS * UNITS; i += THREADS) {
    float sum_w1 = 0.f, sum_w2 = 0.f;
#pragma unroll
    for (int m = 0; m < WARPS; m++) sum_w1 += sums[m].w1[i], sum_w2 += sums[m].w2[i];
    put(slot.w1[i], sum_w1);
    put(slot.w2[i], sum_w2);
  }
  for (int i = threadIdx.x; i < LINES; i += THREADS) {
    float sum = 0.f;
#pragma unroll
    for (int m = 0; m < WARPS; m++) {
      const int key = m + KEYS - 1 - i;
      if (key >= 0 && key < KEYS) sum += sums[m].psi[key];
    }
    put(slot.psi[i], sum);
  }
}

// X <- P, Y <- dA; the sums of a block are stored in its slot, or added to the slot, and the summands of scale are
// stored for every row and KEYS neighbouring keys.
extern "C" __global__ void __launch_bounds__(32 * WARPS, BLOCKS)
    features_backward(__half* x, __half* y, const float* w1, const float* w2, const Pieces* pieces, const float* psi,
                      const float* scale, const float* lse, const uint8* mask, const int* gate, int gated, Slot* slot,
                      float* pairs, int batch, int elements, int rows, int keys, int table_size, int shift,
                      int first_diagonal, int band_tile, int offset, int slots, int add, int x_b, int x_t, int stat_b,
                      int stat_h, int stat_t, int mask_b, int pair_b, int pair_t) {
  follow();
  struct Memory {
    Pieces pieces;
    Weights w;
    Matrix rest;
    Line line[WARPS];
    PieceSums piece_sums[WARPS];
    union {
      Stage ring[WARPS][STAGES];
      Sums sums[WARPS];
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
  load_weights(shared.w, w1, w2);
  load_rest(shared.rest, w1);
  load_pieces(shared.pieces, pieces);
  Track track(shared.pieces, shared.line[warp], psi, table_size, delta0, lane);
  __syncthreads();
  const Layers layers(shared.w, shared.rest, lane);
  Accumulators acc;
  Slots held(shared.piece_sums[warp], track);
  const int row0 = place.first * ROWS + m, key0 = place.start + place.first * ROWS,
            left0 = min(ROWS * tiles, rows - row0);
  const int step = ROWS * x_t, stat_step = ROWS * stat_t, pair_step = ROWS * pair_t;
  Cursor here = {tiles,
                 left0,
                 key0,
                 (uint32)(first_element * x_b + row0 * x_t + g * BLOCK + 8 * t),
                 (uint32)(first_element * stat_b + row0 * stat_t),
                 (uint32)(first_element * mask_b),
                 (uint32)(first_element * pair_b + row0 * pair_t)};
  Cursor next = here;
  auto advance = [&](Cursor& c) {
    c.left -= ROWS, c.key += ROWS, c.at += step, c.stat += stat_step, c.pair += pair_step;
    if (--c.tiles == 0) {
      c.tiles = tiles, c.left = left0, c.key = key0;
      c.at += x_b - tiles * step, c.stat += stat_b - tiles * stat_step, c.pair += pair_b - tiles * pair_step;
      c.mask += mask_b;
    }
  };
  Stage* const ring = shared.ring[warp];
  int fetched = 0;
  auto fetch = [&](int into) {
    const bool real = fetched++ < total && next.left > 0;
    const uint32 from = real ? next.at + along(next.key) : 0;
    fetch_tile(ring[into].x, x + from, real, g, lane);
    fetch_tile(ring[into].y, y + from, real, g, lane);
    const int index = shift + row0 + left0 - next.left;  // of the row
    const bool later = lane < HEADS ? real : real && index >= 0;
    const float* const number =
        lane < HEADS ? lse + (later ? next.stat + min(lane, H - 1) * stat_h : 0) : scale + (later ? index : 0);
    if (lane <= HEADS) copy4(address(&ring[into].numbers[lane]), number, later);
    commit();
    advance(next);
  };
#pragma unroll
  for (int ahead = 0; ahead < STAGES - 1; ahead++) fetch(ahead);
  // All warps of a block walk equally far, and skip rows past the last.
  for (int n = 0, stage_of = 0; n < total; n++, advance(here), stage_of = stage_of == STAGES - 1 ? 0 : stage_of + 1) {
    fetch(stage_of == 0 ? STAGES - 1 : stage_of - 1);
    const bool whole = sees_all(delta0) && here.key + KEYS <= keys;
    wait<STAGES - 1>();
    __syncwarp();
    if (here.left > 0) {
      Own xs, ys;
      tile_backward(xs, ys, acc, held, ring[stage_of], layers, track, whole, delta0, here.key, keys, mask + here.mask);
      const uint32 to = here.at + along(here.key);
      store_tile(xs, x + to, true, g);
      store_tile(ys, y + to, true, g);
      if (lane == 0) pairs[here.pair + here.key / KEYS] = shared.pieces.unit * acc.row;
    }
    __syncwarp();
  }
  wait<0>();
  held.leave(acc, track);
  __syncthreads();
  lay_out(shared.sums[warp], acc, shared.pieces.unit, g, t);
  __syncthreads();
  slot +=
      (long long)(block.group * (gridDim.z / SHARES) + block.segment) * slots + block.diagonal * SHARES + block.share;
  add_up(*slot, shared.piece_sums, shared.sums, add);
}
