// X <- X + W2 (phi(W1 X + U) - phi(U)), -inf for hidden keys; `mix.cuh` has the legend.
extern "C" __global__ void __launch_bounds__(32 * WARPS)
    mix(__half* x, const float* w1, const float* w2, const float* hidden_table, const uint8* mask, int rows, int keys,
        int table_size, int first_diagonal, int band_tile, int offset, int x_b, int x_t, int mask_b) {
  follow();
  struct Memory {
    Weights w;
    Tables tables[WARPS];
    Ring ring[WARPS][STAGES];
  };
  static_assert(sizeof(Memory) == SHARED, "what the launch asks for");
  extern __shared__ __align__(128) char memory[];
  Memory& shared = *(Memory*)memory;
  const Block block;
  const int q = block.diagonal + first_diagonal, warp = threadIdx.x / 32, lane = threadIdx.x % 32, g = lane / 4,
            t = lane % 4;
  const Place place(block, q, band_tile, rows, keys);
  const int m = place.row + warp, delta0 = q * KEYS + offset + m;
  if (place.first >= place.last) return;
  const Tables& tables = shared.tables[warp];
  load_weights(shared.w, w1, w2);
  load_tables(shared.tables[warp], hidden_table, nullptr, table_size, delta0, lane);
  __syncthreads();
  const Held w_in(shared.w.in, lane), w_out(shared.w.out, lane);
  x += (long long)block.group * x_b + g * BLOCK + 8 * t;
  mask += block.group * mask_b;
  Ring* const ring = shared.ring[warp];
  auto fetch = [&](int tile) {
    const int row = tile * ROWS + m, key = place.start + tile * ROWS;
    const bool inside = tile < place.last && row < rows;
    fetch_tile(ring[tile % STAGES], x + (inside ? row * x_t + along(key) : 0), inside, g, lane);
    commit();
  };
#pragma unroll
  for (int ahead = 0; ahead < STAGES - 1; ahead++) fetch(place.first + ahead);
  for (int tile = place.first; tile < place.last; tile++) {
    fetch(tile + STAGES - 1);
    const int row = tile * ROWS + m, key = place.start + tile * ROWS;
    const bool real_row = row < rows, whole = sees_all(delta0) && real_row && key + KEYS <= keys;
    wait<STAGES - 1>();
    __syncwarp();
    Own xs;
    take_tile(xs, ring[tile % STAGES], lane);
#pragma unroll
    for (int f = 0; f < 2; f++) {
      Half xf;
      uint32 seen[2];
      uint2 risen[UT], z[UT];
      take_half(xf, xs, f);
      if (!whole) {
        look(seen, f, real_row, delta0, key, t, keys, mask);
        hide(xf, seen);
      }
      first_layer(risen, z, xf, f, tables, w_in, lane);
#pragma unroll
      for (int part = 0; part < PARTS; part++)
#pragma unroll
        for (int e = 0; e < 2; e++) {
          const uint2 y = across_units(make_uint2(xf[2 * part][e], xf[2 * part + 1][e]), w_out, part, risen, e);
#pragma unroll
          for (int i = 0; i < 2; i++) {
            const int r = 2 * part + i;
            xs[r][2 * f + e] = i ? y.y : y.x;
            if (!whole) xs[r][2 * f + e] = (xs[r][2 * f + e] & seen[e]) | (0xfc00fc00u & ~seen[e]);  // -inf
          }
        }
    }
    store_tile(xs, x + row * x_t + along(key), real_row, g);
    __syncwarp();
  }
}
