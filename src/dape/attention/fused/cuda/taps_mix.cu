// Logits without C from X, to a scratch of their own; -inf if unseen; `taps.cuh` has the legend.
extern "C" __global__ void __launch_bounds__(THREADS, BLOCKS)
    taps_mix(const __half* x, __half* logits, const float* w1, const float* w2, const float* hidden_table,
             const float* bias, int rows, int keys, int table_size, int first_diagonal, int base, int offset, int x_b,
             int x_t) {
  follow();
  struct Memory {
    Weights w;
    Tables tables;
    Ring ring[ROWS][STAGES];
  };
  static_assert(sizeof(Memory) == SHARED, "what the launch asks for");
  extern __shared__ __align__(128) char memory[];
  Memory& shared = *(Memory*)memory;
  const int q = blockIdx.y + first_diagonal, m = threadIdx.x / 32, lane = threadIdx.x % 32, g = lane / 4, t = lane % 4;
  const Place place(base, q, rows, keys);
  const int distance = q * OUT + offset + HALO;
  if (place.first >= place.last) return;
  load_weights(shared.w, w1, w2);
  load_tables(shared.tables, hidden_table, bias, table_size, distance);
  __syncthreads();
  const uint32 first_row = (uint32)blockIdx.x * x_b + g * BLOCK;
  Ring* const ring = shared.ring[m];
  auto fetch = [&](int tile) {
    const int row = tile * ROWS + m;
    const bool real = tile < place.last && row < rows;
    fetch_window(ring[tile % STAGES], x, first_row + row * x_t, place.start + tile * ROWS, keys, real, g, lane);
    commit();
  };
#pragma unroll
  for (int ahead = 0; ahead < STAGES - 1; ahead++) fetch(place.first + ahead);
  for (int tile = place.first; tile < place.last; tile++) {
    fetch(tile + STAGES - 1);
    wait<STAGES - 1>();
    __syncwarp();
    const int row = tile * ROWS + m;
    if (row < rows) {
      const Window window = {place.start + tile * ROWS, distance + m};
      Heads xs, turned;
      Units r;
      Signs signs;
      take_window(xs, ring[tile % STAGES], lane);
      if (window.partial()) hide(xs, window, t);
      turn_line(turned[0], xs[0]);
      turn_line(turned[1], xs[1]);
      first_layer(r, signs, turned, shared.tables, shared.w, window, hidden_table, table_size, m, lane);
#pragma unroll
      for (int p = 0; p < TILES; p++) {
        const uint2 s = second_layer(xs, r, p, shared.w.out, lane);
        xs[0][p + 1] = s.x;
        xs[1][p + 1] = s.y;
      }
      if (window.partial()) never(xs, window, t);
      store_window(xs, logits, first_row + row * x_t, window.key + 2 * TILES * t, keys, g, t);
    }
    __syncwarp();
  }
}
