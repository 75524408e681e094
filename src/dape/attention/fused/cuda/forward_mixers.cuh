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

// Two groups of 16 slots, 64 bytes apart: -U of rows g is in `first`, of rows g + 8 in `second`.
DEVICE void mix_pair(uint32 at, const uint32 (&first)[2][UT], const uint32 (&second)[2][UT], const uint32 (&w1)[UT][2],
                     const uint32 (&w2)[2][UT / 2][2], const uint32 (&w21)[2][2]) {
  uint32 x[2][4], y[2][2][2];
#pragma unroll
  for (int q = 0; q < 2; q++) load4_turned(x[q], at + q * 64);
#pragma unroll
  for (int q = 0; q < 2; q++) {
    uint32 z[UT][2];
#pragma unroll
    for (int m = 0; m < UT; m++) {
      mma_half(z[m], x[q], w1[m], 0, 0);
      z[m][0] = rise(z[m][0], first[q][m]);
      z[m][1] = rise(z[m][1], second[q][m]);
    }
#pragma unroll
    for (int half = 0; half < 2; half++) mma_half(y[q][half], x[q], w21[half], x[q][2 * half], x[q][2 * half + 1]);
#pragma unroll
    for (int k = 0; k < UT / 2; k++) {
      uint32 v[4] = {z[2 * k][0], z[2 * k][1], z[2 * k + 1][0], z[2 * k + 1][1]};
#pragma unroll
      for (int half = 0; half < 2; half++) mma_half(y[q][half], v, w2[half][k], y[q][half][0], y[q][half][1]);
    }
  }
#pragma unroll
  for (int q = 0; q < 2; q++) store4_turned(at + q * 64, y[q][0][0], y[q][0][1], y[q][1][0], y[q][1][1]);
}

DEVICE void mix(Shared& s, const Arguments& a, int mixer, int lane) {
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
  uint32 w1[UT][2], w2[2][UT / 2][2], w21[2][2];
  auto in = [&](int unit, int head) { return unit < D && head < H ? a.w1[unit * H + head] * a.scale : 0.f; };
  auto out = [&](int head, int unit) {
    return unit < D && head < H ? a.w2[head * D + unit] * (1.f - SLOPE) / a.scale : 0.f;
  };
  auto straight = [&](int head, int from) { return head < H && from < H ? a.linear[head * H + from] : 0.f; };
#pragma unroll
  for (int n = 0; n < UT; n++)
#pragma unroll
    for (int i = 0; i < 2; i++) w1[n][i] = pack_half(in(8 * n + g, 2 * t + 8 * i), in(8 * n + g, 2 * t + 8 * i + 1));
#pragma unroll
  for (int n = 0; n < 2; n++)
#pragma unroll
    for (int k = 0; k < UT / 2; k++)
#pragma unroll
      for (int i = 0; i < 2; i++)
        w2[n][k][i] = pack_half(out(8 * n + g, 16 * k + 2 * t + 8 * i), out(8 * n + g, 16 * k + 2 * t + 8 * i + 1));
#pragma unroll
  for (int n = 0; n < 2; n++)
#pragma unroll
    for (int i = 0; i < 2; i++)
      w21[n][i] = pack_half(straight(8 * n + g, 2 * t + 8 * i), straight(8 * n + g, 2 * t + 8 * i + 1));
  const int first = mixer * GROUPS, chunk = first / 16, pair0 = first % 16 / 2;
  const int row = 16 * (chunk / (NT / 2)) + pair0 + 8 * ((g >> 1) & 1),
            key = 16 * (chunk % (NT / 2)) + (g & 1) + 8 * (g >> 2);
  const int place = ((row - key + KEYS - 1) * UNITS + t * 2 * UT) * 2;
  const uint32 slot =
      address(s.x[0]) + (((lane & 7) + 8 * (lane >> 4)) * SLOTS + first * 16 + 8 * ((lane >> 3) & 1)) * 2;
  for (int n = 0; n < a.tiles; n++) {
    wait<0>();
    meet<5>(32 * MIXERS);  // all mixers have U of the present tile, and no mixer reads U of the last tile
    load_hidden(n + 1);
    const uint32 at = slot + (n & 1) * sizeof(s.x[0]);
    const char* u = (const char*)s.u[n & 1] + place;
    await_scores(n & 1);
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
        if (k >= 0 && k < GROUPS / 2) mix_pair(at + (2 * k + odd) * 32, high, low, w1, w2, w21);
      }
    }
    logits_there(n & 1);
  }
}
