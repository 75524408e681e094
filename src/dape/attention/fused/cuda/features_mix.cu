// X <- X + W2 phi(W1 X + U f) + C f, -inf for hidden keys; `features.cuh` has the legend.
extern "C" __global__ void __launch_bounds__(32 * WARPS)
    features_mix(__half* x, const float* w1, const float* w2, const Pieces* pieces, const float* psi,
                 const float* scale, const uint8* mask, int rows, int keys, int table_size, int shift,
                 int first_diagonal, int band_tile, int offset, int x_b, int x_t, int mask_b) {
  follow();
  struct Stage {
    Ring x;
    float scale[4];
  };
  struct Memory {
    Pieces pieces;
    Weights w;
    Matrix rest;
    Line line[WARPS];
    Stage ring[WARPS][STAGES];
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
  load_weights(shared.w, w1, w2);
  load_rest(shared.rest, w1);
  load_pieces(shared.pieces, pieces);
  Track track(shared.pieces, shared.line[warp], psi, table_size, delta0, lane);
  __syncthreads();
  const Held out(shared.w.out, lane);
  x += (long long)block.group * x_b + g * BLOCK + 8 * t;
  mask += block.group * mask_b;
  Stage* const ring = shared.ring[warp];
  auto fetch = [&](int tile) {
    const int row = tile * ROWS + m, key = place.start + tile * ROWS;
    const bool inside = tile < place.last && row < rows, later = inside && shift + row >= 0;
    Stage& stage = ring[tile % STAGES];
    fetch_tile(stage.x, x + (inside ? row * x_t + along(key) : 0), inside, g, lane);
    if (lane == 0) copy4(address(stage.scale), scale + (later ? shift + row : 0), later);
    commit();
  };
#pragma unroll
  for (int ahead = 0; ahead < STAGES - 1; ahead++) fetch(place.first + ahead);
  for (int tile = place.first; tile < place.last; tile++) {
    fetch(tile + STAGES - 1);
    const int row = tile * ROWS + m, key = place.start + tile * ROWS;
    const bool whole = sees_all(delta0) && key + KEYS <= keys;
    wait<STAGES - 1>();
    __syncwarp();
    if (row < rows) {
      const Stage& stage = ring[tile % STAGES];
      Own xs;
      take_tile(xs, stage.x, lane);
      track.find(stage.scale[0]);
#pragma unroll
      for (int f = 0; f < 2; f++) {
        Half xf;
        uint32 seen[2];
        float s[2][4];
        uint2 r[UT];
        take_half(xf, xs, f);
        if (!whole) {
          look(seen, f, true, delta0, key, t, keys, mask);
          hide(xf, seen);
        }
        both_layers(s, r, xf, f, shared.w.in, shared.rest, out, track);
#pragma unroll
        for (int e = 0; e < 2; e++)
#pragma unroll
          for (int i = 0; i < HT; i++) {
            uint32& to = xs[i][2 * f + e];
            to = pack(s[e][2 * i], s[e][2 * i + 1]);
            if (!whole) to = (to & seen[e]) | (0xfc00fc00u & ~seen[e]);  // -inf
          }
      }
      store_tile(xs, x + row * x_t + along(key), true, g);
    }
    __syncwarp();
  }
}
