// Heads mixed by tables over the features of FIRE: the common part of `features_mix.cu` and `features_backward.cu`;
// `tile.cuh` has the layouts, and `pieces.cuh` the tables.
//
//   ratio = psi[i - j] scale[i]              c[head] = a + b (ratio - m)            u[unit] likewise
//   z[key, unit] = x[key, head] W1^T + u     r = leaky(z)
//   s[head, key] = x + c + W2 r^T            P = exp(s - lse)                       dS = P (dP - delta) = P Y
//   dz = leaky'(z) dS W2                     dA[head, key] = dS + W1^T dz^T         dratio = b dS + b dz
//
// Along a diagonal psi never changes, and no ratio where scale does not either. All keys of a warp mostly lie in one
// piece, whose entries a lane has in registers. Otherwise a lane looks its entries up.

// The rounding error of W1 in fp16. A hidden unit near zero has the gradient of its sign, and the rounding of a layer
// would turn the units of all keys alike.
DEVICE void load_rest(Matrix& rest, const float* w1) {
  const int lane = threadIdx.x, g = lane / 4, t = lane % 4;
  if (lane >= 32) return;
  auto left = [&](int unit, int head) {
    const float a = unit < D && head < H ? w1[unit * H + head] : 0.f;
    const float b = unit < D && head + 1 < H ? w1[unit * H + head + 1] : 0.f;
    const float2 rounded = __half22float2(half2_of(pack(a, b)));
    return pack(a - rounded.x, b - rounded.y);
  };
#pragma unroll
  for (int s = 0; s < STEPS; s++) {
    const int unit = 16 * s + g, head = 2 * t;
    rest[0][s][lane] =
        make_uint4(left(unit, head), left(unit, head + 8), left(unit + 8, head), left(unit + 8, head + 8));
  }
}
DEVICE void load_pieces(Pieces& to, const Pieces* from) {
  for (int i = threadIdx.x; i < (int)(sizeof(Pieces) / 16); i += 32 * WARPS) ((uint4*)&to)[i] = ((const uint4*)from)[i];
}

// The keys of a warp: psi, the piece and its lower end, and ratio - m in fp16 below the piece in fp16.
struct Line {
  float psi[KEYS];
  struct {
    float m;
    int piece;
  } at[KEYS];
  uint32 tag[KEYS];
};
// The pieces of a warp's keys. Lane l follows the piece of key l. If all keys are `alike`, in one piece, every lane has
// its entries of that piece in registers.
struct Track {
  const Pieces& pieces;
  Line& line;
  const int lane, g, t;
  const uint32 ones;  // of the unit matrix, as an A operand
  float psi, scale = 0.f, lower = -NEVER, upper = NEVER;
  int lowest = 0, highest = 0;
  bool alike = false;
  float m;
  float4 u[UT];
  float2 c[HT];
  __device__ Track(const Pieces& pieces, Line& line, const float* psi_table, int size, int delta0, int lane)
      : pieces(pieces),
        line(line),
        lane(lane),
        g(lane / 4),
        t(lane % 4),
        ones(2 * t == g       ? 0x3c00u
             : 2 * t + 1 == g ? 0x3c000000u
                              : 0u),
        psi(psi_table[min(max(delta0 - lane, 0), size - 1)]) {
    line.psi[lane] = psi;
  }
  // Goes on to a row, and returns whether any key has another piece than before.
  DEVICE bool find(float of_row) {
    scale = of_row;
    const float ratio = psi * scale;
    if (!__any_sync(~0u, !(lower < ratio && ratio <= upper))) return false;
    int piece = 0;
#pragma unroll 8
    for (int p = 1; p < PIECES; p++) piece += pieces.edge[p] < ratio;
    lower = pieces.edge[piece];
    upper = pieces.edge[piece + 1];
    lowest = __reduce_min_sync(~0u, piece);
    highest = __reduce_max_sync(~0u, piece);
    line.at[lane].m = lower_end(lower);
    line.at[lane].piece = piece;
    alike = lowest == highest;
    m = lower_end(pieces.edge[lowest]);
#pragma unroll
    for (int n = 0; n < UT; n++) u[n] = pieces.u[lowest][n][t];
#pragma unroll
    for (int r = 0; r < HT; r++) c[r] = pieces.c[lowest][8 * r + g];
    __syncwarp();
    return true;
  }
};

// The logits' c and the hidden units' u of half f of a tile, as accumulators of products.
DEVICE void load_tables(float (&s)[2][4], float (&z)[UT][4], int f, const Track& track) {
  const Pieces& pieces = track.pieces;
  const Line& line = track.line;
  const int g = track.g, t = track.t, first = 8 * t + 4 * f;
  const float scale = track.scale;
  const float4 psi = *(const float4*)&line.psi[first];
  auto add_units = [&](int e, const float4(&own)[UT], float m) {
    const float risen = fmaf(line.psi[key_of(2 * f + e, g)], scale, -m);
#pragma unroll
    for (int n = 0; n < UT; n++) {
      z[n][2 * e] = fmaf(own[n].z, risen, own[n].x);
      z[n][2 * e + 1] = fmaf(own[n].w, risen, own[n].y);
    }
  };
  auto add_heads = [&](int e, int j, const float2(&own)[HT], float m) {
    const float risen = fmaf(e ? (j ? psi.w : psi.z) : (j ? psi.y : psi.x), scale, -m);
#pragma unroll
    for (int r = 0; r < HT; r++) s[e][2 * r + j] = fmaf(own[r].y, risen, own[r].x);
  };
  if (track.alike) {
#pragma unroll
    for (int e = 0; e < 2; e++) {
      add_units(e, track.u, track.m);
      add_heads(e, 0, track.c, track.m);
      add_heads(e, 1, track.c, track.m);
    }
  } else {
#pragma unroll
    for (int e = 0; e < 2; e++) {
      float4 u[UT];
      const int key = key_of(2 * f + e, g);
#pragma unroll
      for (int n = 0; n < UT; n++) u[n] = pieces.u[line.at[key].piece][n][t];
      add_units(e, u, line.at[key].m);
#pragma unroll
      for (int j = 0; j < 2; j++) {
        float2 c[HT];
        const int other = first + 2 * e + j;
#pragma unroll
        for (int r = 0; r < HT; r++) c[r] = pieces.c[line.at[other].piece][8 * r + g];
        add_heads(e, j, c, line.at[other].m);
      }
    }
  }
}
// [head, key] of half a tile as an A operand [key, head].
DEVICE uint4 turned(const Half& x) { return make_uint4(turn(x[0][0]), turn(x[0][1]), turn(x[1][0]), turn(x[1][1])); }
DEVICE void add_layer(float (&z)[UT][4], const uint4& x, const Matrix& w, const Matrix& rest, int lane) {
#pragma unroll
  for (int s = 0; s < STEPS; s++) {
    const uint4 b = w[0][s][lane], left = rest[0][s][lane];
    mma(z[2 * s], x.x, x.y, x.z, x.w, b.x, b.y);
    mma(z[2 * s + 1], x.x, x.y, x.z, x.w, b.z, b.w);
    mma(z[2 * s], x.x, x.y, x.z, x.w, left.x, left.y);
    mma(z[2 * s + 1], x.x, x.y, x.z, x.w, left.z, left.w);
  }
}
DEVICE uint32 leaky(float low, float high) {
  const __half2 z = half2_of(pack(low, high));
  return bits(__hmax2(z, __hmul2(z, __float2half2_rn(0.01f))));
}
// sum + W[head, unit] v[unit, key] for key tile e of the pair whose fragments [key, unit] are v.
DEVICE void add_units(float (&sum)[4], const Held& w, const uint2 (&v)[UT], int e) {
#pragma unroll
  for (int s = 0; s < STEPS; s++) {
    const uint4 a = w.at(0, s);
    mma(sum, a.x, a.y, a.z, a.w, e ? v[2 * s].y : v[2 * s].x, e ? v[2 * s + 1].y : v[2 * s + 1].x);
  }
}
// sum + v[head, key] for key tile e of the pair that was turned into `v`: a product with the unit matrix.
DEVICE void add_heads(float (&sum)[4], uint32 ones, const uint4& v, int e) {
  mma(sum, ones, 0, 0, ones, e ? v.y : v.x, e ? v.w : v.z);
}
// The logits of half f of a tile, in float32, and the hidden units r.
DEVICE void both_layers(float (&s)[2][4], uint2 (&r)[UT], const Half& xf, int f, const Matrix& in, const Matrix& rest,
                        const Held& out, const Track& track) {
  float z[UT][4];
  load_tables(s, z, f, track);
  const uint4 x = turned(xf);
  add_layer(z, x, in, rest, track.lane);
#pragma unroll
  for (int n = 0; n < UT; n++) r[n] = make_uint2(leaky(z[n][0], z[n][1]), leaky(z[n][2], z[n][3]));
#pragma unroll
  for (int e = 0; e < 2; e++) {
    add_heads(s[e], track.ones, x, e);
    add_units(s[e], out, r, e);
  }
}
