// Heads mixed by tables over the distance: the common part of `mix.cu` and `mix_backward.cu`; `tile.cuh` has the
// layouts. The entries of U and C of a warp never change.
//
//   w[key, unit] = x[key, head] W1^T         z = w + U              r = leaky(z) - leaky(U)
//   y[head, key] = x + W2 r^T                P = exp(y + C - lse)   dS = P (dP - delta) = P Y
//   dz = leaky'(z) dS W2                     dA[head, key] = dS + W1^T dz^T
//
// However large U is, r is no larger than w: relu(w + U) - relu(U) = max(w, -U) - max(-U, 0).
// Products of layers are summed in fp16, the input of the next layer. Sums over pairs are float32, on the tensor cores
// too: dU and dC are products with the unit matrix.

constexpr float LARGEST = 65504.f;
// leaky(w + U) - leaky(U), and in `z` w + U, for a pair of -U.
DEVICE uint32 rise(uint32 w, uint32 minus_u, uint32& z) {
  const __half2 x = half2_of(w), y = half2_of(minus_u),
                risen = __hsub2(__hmax2(x, y), __hmax2(y, __float2half2_rn(0.f)));
  z = bits(__hsub2(x, y));
  return bits(__hfma2(risen, __float2half2_rn(0.99f), __hmul2(x, __float2half2_rn(0.01f))));
}
// d leaky'(z): half of d (1 + slope) and half of d (1 - slope) with the sign of z.
DEVICE uint32 leaky_backward(uint32 d, uint32 z) {
  __half2 signed_d = half2_of(d ^ (z & 0x80008000u));
  return bits(__hfma2(half2_of(d), __float2half2_rn(0.505f), __hmul2(signed_d, __float2half2_rn(0.495f))));
}
// -U and C at a warp's keys, constant along the diagonal: -U as accumulators [key tile pair][unit tile], C, in base 2,
// in the order of the scores.
struct Tables {
  uint2 minus_u[2][UT][32];
#ifdef BACKWARD
  float2 c[HT][4][32];
#endif
};
DEVICE void load_tables(Tables& tables, const float* hidden_table, const float* static_table, int size, int delta0,
                        int lane) {
  const int g = lane / 4, t = lane % 4;
#pragma unroll
  for (int f = 0; f < 2; f++)
#pragma unroll
    for (int n = 0; n < UT; n++) {
      auto at = [&](int e) {
        const int delta = abs(delta0 - key_of(2 * f + e, g)), unit = 8 * n + 2 * t;
        const float* row = hidden_table + (long long)delta * D + unit;
        auto minus = [&](int i) {
          return delta < size && unit + i < D ? fminf(fmaxf(-row[i], -LARGEST), LARGEST) : 0.f;
        };
        return pack(minus(0), minus(1));
      };
      tables.minus_u[f][n][lane] = make_uint2(at(0), at(1));
    }
#ifdef BACKWARD
#pragma unroll
  for (int r = 0; r < HT; r++) {
    const int head = 8 * r + g;
    const float* line = static_table + head * size;
    // Padding heads have no weight.
    auto at = [&](int delta) { return head < H ? delta < size ? LOG2E * line[delta] : 0.f : NEVER; };
#pragma unroll
    for (int p = 0; p < 4; p++)
      tables.c[r][p][lane] = make_float2(at(abs(delta0 - 8 * t - 2 * p)), at(abs(delta0 - 8 * t - 2 * p - 1)));
  }
#endif
}

// The hidden units z of 16 keys, and how far leaky(z) is above leaky(U).
DEVICE void first_layer(uint2 (&risen)[UT], uint2 (&z)[UT], const Half& x, int f, const Tables& tables, const Held& w,
                        int lane) {
#pragma unroll
  for (int n = 0; n < UT; n++) risen[n] = make_uint2(0, 0);
  across_heads(risen, x, w);
#pragma unroll
  for (int n = 0; n < UT; n++) {
    const uint2 minus_u = tables.minus_u[f][n][lane];
    risen[n] = make_uint2(rise(risen[n].x, minus_u.x, z[n].x), rise(risen[n].y, minus_u.y, z[n].y));
  }
}
