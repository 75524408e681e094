// A head's warp of `backward.cu`: X and Y of a tile, and P and dA to the scratch.

template <bool OF_VALUES>
DEVICE void multiply(float (&c)[4], const uint32 (&a)[4], uint32 b0, uint32 b1) {
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
        to[m][e][i] = row < a.rows ? *(const uint32*)((const Element*)from + (long long)row * stride + column) : 0;
      }
}
// X or Y of a tile: factor rows lines^T - less, to a line of shared memory.
template <bool OF_VALUES>
DEVICE void product(uint32 to, const Rows& rows, uint32 lines, float factor, const float (&less)[MT][2], int lane) {
#pragma unroll
  for (int p = 0; p < KEYS / 16; p++) {
    float x[MT][2][4] = {};
#pragma unroll
    for (int e = 0; e < ET; e++) {
      uint32 b[4];
      load4(b, line_address<KEYS>(lines, p, e, (lane & 7) + 8 * (lane >> 4), lane >> 3 & 1));
#pragma unroll
      for (int m = 0; m < MT; m++) {
        multiply<OF_VALUES>(x[m][0], rows[m][e], b[0], b[1]);
        multiply<OF_VALUES>(x[m][1], rows[m][e], b[2], b[3]);
      }
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
  Lines<KEYS, V_T> value_lines((const Element*)a.v + (long long)a.first * KEYS * V_T, s.k[h], a.keys - a.first * KEYS,
                               lane);
#else
  Lines<KEYS, V_T> value_lines((const Element*)a.v + (long long)a.first * KEYS * V_T, s.v[h], a.keys - a.first * KEYS,
                               lane);
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
