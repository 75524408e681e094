// The mixer warps of `forward.cu`: the scores of a tile across heads.

DEVICE void load_units(uint32 (&u)[UT], const char* table, int distance) {
  const char* from = table + distance * UNITS * 2;
#pragma unroll
  for (int m = 0; m < UT; m += UT % 4 ? 2 : 4)
    if constexpr (UT % 4)
      *(uint2*)(u + m) = *(const uint2*)(from + m * 4);
    else
      *(uint4*)(u + m) = *(const uint4*)(from + m * 4);
}

// The weights of both layers, for HT blocks of 16 heads, and of the linear part if the part has a product of its own.
struct Layers {
  uint32 in[UT][HT][2], out[2 * HT][UT / 2][2], straight[2][2];
};
// Two groups of 16 slots, 64 bytes apart: -U of rows g is in `first`, of rows g + 8 in `second`.
DEVICE void mix_pair(uint32 at, const uint32 (&first)[2][UT], const uint32 (&second)[2][UT], const Layers& w) {
  uint32 x[2][HT][4], y[2][2 * HT][2];
#pragma unroll
  for (int q = 0; q < 2; q++)
#pragma unroll
    for (int i = 0; i < HT; i++) load4_turned(x[q][i], at + q * 64 + i * 16 * SLOTS * 2);
#pragma unroll
  for (int q = 0; q < 2; q++) {
    uint32 z[UT][2];
#pragma unroll
    for (int m = 0; m < UT; m++) {
      mma_half(z[m], x[q][0], w.in[m][0], 0, 0);
#pragma unroll
      for (int i = 1; i < HT; i++) mma_half(z[m], x[q][i], w.in[m][i], z[m][0], z[m][1]);
      z[m][0] = rise(z[m][0], first[q][m]);
      z[m][1] = rise(z[m][1], second[q][m]);
    }
#pragma unroll
    for (int n = 0; n < 2 * HT; n++) {
      const uint32 x0 = x[q][n / 2][n % 2 * 2], x1 = x[q][n / 2][n % 2 * 2 + 1];
      if constexpr (STRAIGHT) {
        mma_half(y[q][n], x[q][0], w.straight[n], x0, x1);
      } else {
        y[q][n][0] = x0;
        y[q][n][1] = x1;
      }
    }
#pragma unroll
    for (int k = 0; k < UT / 2; k++) {
      uint32 v[4] = {z[2 * k][0], z[2 * k][1], z[2 * k + 1][0], z[2 * k + 1][1]};
#pragma unroll
      for (int n = 0; n < 2 * HT; n++) mma_half(y[q][n], v, w.out[n][k], y[q][n][0], y[q][n][1]);
    }
  }
#pragma unroll
  for (int q = 0; q < 2; q++)
#pragma unroll
    for (int i = 0; i < HT; i++)
      store4_turned(at + q * 64 + i * 16 * SLOTS * 2, y[q][2 * i][0], y[q][2 * i][1], y[q][2 * i + 1][0],
                    y[q][2 * i + 1][1]);
}

DEVICE void mix(Shared& s, const Arguments& a, int block, int mixer, int lane) {
  const int g = lane >> 2, t = lane & 3, thread = 32 * mixer + lane;
  auto load_hidden = [&](int n) {
    const __half* from = a.hidden + (long long)(a.row0 + a.offset - (KEYS - 1) - n * KEYS - a.low) * UNITS;
    if (n < a.tiles)
#pragma unroll
      for (int i = thread; i < SPAN * UNITS / 8; i += 32 * MIXERS)
        copy16(address(s.u[n & 1]) + i * 16, from + i * 8, true);
    commit();
  };
  load_hidden(0);
  Layers w;
  auto in = [&](int unit, int head) { return unit < D && head < H ? a.w1[unit * H + head] * a.scale : 0.f; };
  auto out = [&](int head, int unit) {
    return unit < D && head < H ? a.w2[head * D + unit] * (1.f - SLOPE) / a.scale : 0.f;
  };
  auto straight = [&](int head, int from) { return head < H && from < H ? a.linear[head * H + from] : 0.f; };
#pragma unroll
  for (int n = 0; n < UT; n++)
#pragma unroll
    for (int i = 0; i < 2 * HT; i++)
      w.in[n][i / 2][i % 2] = pack_half(in(8 * n + g, 2 * t + 8 * i), in(8 * n + g, 2 * t + 8 * i + 1));
#pragma unroll
  for (int n = 0; n < 2 * HT; n++)
#pragma unroll
    for (int k = 0; k < UT / 2; k++)
#pragma unroll
      for (int i = 0; i < 2; i++)
        w.out[n][k][i] = pack_half(out(8 * n + g, 16 * k + 2 * t + 8 * i), out(8 * n + g, 16 * k + 2 * t + 8 * i + 1));
  if constexpr (STRAIGHT)
#pragma unroll
    for (int n = 0; n < 4; n++)
      w.straight[n / 2][n % 2] =
          pack_half(straight(n / 2 * 8 + g, 2 * t + n % 2 * 8), straight(n / 2 * 8 + g, 2 * t + n % 2 * 8 + 1));
  const int first = (block * MIXERS + mixer) * GROUPS, chunk = first / 16, pair0 = first % 16 / 2;
  const int row = 16 * (chunk / (NT / 2)) + pair0 + 8 * ((g >> 1) & 1),
            key = 16 * (chunk % (NT / 2)) + (g & 1) + 8 * (g >> 2);
  const int place = ((row - key + KEYS - 1) * UNITS + t * 2 * UT) * 2;
  const uint32 slot =
      address(s.x[0]) + (((lane & 7) + 8 * (lane >> 4)) * SLOTS + mixer * GROUPS * 16 + 8 * ((lane >> 3) & 1)) * 2;
  for (int n = 0; n < a.tiles; n++) {
    wait<0>();
    meet<5>(32 * MIXERS);  // all mixers have U of the present tile, and no mixer reads U of the last tile
    load_hidden(n + 1);
    const uint32 at = slot + (n & 1) * sizeof(s.x[0]);
    const char* u = (const char*)s.u[n & 1] + place;
    await_scores(s, n, lane);
    // Group 2 k of 16 slots has rows at distances k and k - 2, group 2 k + 1 at k - 4 and k - 6. A walk over the
    // distances d therefore reads every entry of U once.
    uint32 low[2][UT], high[2][UT];
    load_units(high[0], u, -6);
    load_units(high[1], u, -5);
#pragma unroll
    for (int d = -4; d < GROUPS / 2; d += 2) {
#pragma unroll
      for (int q = 0; q < 2; q++) {
#pragma unroll
        for (int m = 0; m < UT; m++) low[q][m] = high[q][m];
        load_units(high[q], u, d + q);
      }
#pragma unroll
      for (int odd = 1; odd >= 0; odd--) {
        const int k = d + 4 * odd;
        if (k >= 0 && k < GROUPS / 2) mix_pair(at + (2 * k + odd) * 32, high, low, w);
      }
    }
    logits_there(s, n, lane);
  }
}
