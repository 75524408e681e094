// Sums over the pairs of a piece, for `features_backward.cu`, and the gradient of the ratio.
//
// The sums are products with a matrix [slot, key] that has ones, and below them the ratios, where a key lies in the
// piece of a slot. A warp has 8 slots in its registers, for neighbouring pieces. The slots move, and leave their sums
// in shared memory, when a key lies in another piece.

// The sums of a warp: in registers those of slots, of W1 and W2, of psi by key, and of scale by row; in shared memory
// those of pieces, without and with the ratio.
struct Accumulators {
  float u[UT][4] = {}, c[HT][4] = {}, w1[UT][4] = {}, w2[UT][4] = {}, psi[4] = {}, row = 0.f;
};
typedef float PieceSums[PIECES][2][CHANNELS];

// The pieces of the slots, from `first` on, or several times 8 if the keys of a warp are `spread` over more; the number
// of the lane's slots in fp16, by row and by column of a product; and slopes [head or unit, slot].
struct Slots {
  PieceSums& sums;
  int first = 0;
  bool spread = false;
  uint32 of_row, of_column[2], of_heads[2], of_units[STEPS][2];
  __device__ Slots(PieceSums& sums, const Track& track) : sums(sums) {
    for (int i = track.lane; i < PIECES * 2 * CHANNELS; i += 32) (&sums[0][0][0])[i] = 0.f;
    load(track, 0);
    __syncwarp();
  }
  DEVICE void load(const Track& track, int to) {
    first = to;
    const float row = (float)(to + track.g), column = (float)(to + 2 * track.t);
    of_row = pack(row, row);
    of_column[0] = pack(0.f, column);
    of_column[1] = pack(0.f, column + 1.f);
    const uint32* const line = track.pieces.slope[min(to + track.g, PIECES - 1)] + track.t;
#pragma unroll
    for (int i = 0; i < 2; i++) {
      of_heads[i] = line[4 * i];
#pragma unroll
      for (int s = 0; s < STEPS; s++) of_units[s][i] = line[HEADS / 2 + 8 * s + 4 * i];
    }
  }
  DEVICE void leave(Accumulators& acc, const Track& track) {
    auto add = [&](float (&c)[4], int channel) {
#pragma unroll
      for (int i = 0; i < 2; i++) {
        if (first + track.g < PIECES) {
          float2& to = *(float2*)&sums[first + track.g][i][channel + 2 * track.t];
          to = make_float2(to.x + c[2 * i], to.y + c[2 * i + 1]);
        }
        c[2 * i] = c[2 * i + 1] = 0.f;
      }
    };
#pragma unroll
    for (int r = 0; r < HT; r++) add(acc.c[r], 8 * r);
#pragma unroll
    for (int n = 0; n < UT; n++) add(acc.u[n], HEADS + 8 * n);
    __syncwarp();
  }
  // Moves to the pieces of a row, if another row than before has others.
  DEVICE void move(Accumulators& acc, const Track& track) {
    spread = track.highest - track.lowest >= 8;
    if (spread || (track.lowest >= first && track.highest < first + 8)) return;
    leave(acc, track);
    load(track, track.lowest);
  }
};

// Sums over the pieces of half f of a tile, from dS and dz as they are and turned, and over psi and scale.
DEVICE void sum_pieces(Accumulators& acc, Slots& slots, const Half& ds, const uint4& ds_turned, const uint2 (&dz)[UT],
                       const uint2 (&dz_turned)[UT], int f, const Track& track) {
  const uint4 tags = *(const uint4*)&track.line.tag[8 * track.t + 4 * f];
  float drawn[2] = {};
  int first = track.lowest;
  do {  // nearly always once
    if (slots.spread) {
      slots.leave(acc, track);
      slots.load(track, first);
    }
    uint32 ones[2], ratios[2];
#pragma unroll
    for (int e = 0; e < 2; e++) {
      const uint32 a = e ? tags.z : tags.x, b = e ? tags.w : tags.y;
      const uint32 here = __heq2_mask(half2_of(__byte_perm(a, b, 0x7632)), half2_of(slots.of_row));
      ones[e] = here & 0x3c003c00u;
      ratios[e] = here & __byte_perm(a, b, 0x5410);
    }
#pragma unroll
    for (int r = 0; r < HT; r++) mma(acc.c[r], ones[0], ratios[0], ones[1], ratios[1], ds[r][0], ds[r][1]);
#pragma unroll
    for (int n = 0; n < UT; n++) mma(acc.u[n], ones[0], ratios[0], ones[1], ratios[1], dz_turned[n].x, dz_turned[n].y);
    float by_slot[4] = {};
    mma(by_slot, ds_turned.x, ds_turned.y, ds_turned.z, ds_turned.w, slots.of_heads[0], slots.of_heads[1]);
#pragma unroll
    for (int s = 0; s < STEPS; s++)
      mma(by_slot, dz[2 * s].x, dz[2 * s].y, dz[2 * s + 1].x, dz[2 * s + 1].y, slots.of_units[s][0],
          slots.of_units[s][1]);
#pragma unroll
    for (int e = 0; e < 2; e++) {
      const uint32 piece = track.line.tag[key_of(2 * f + e, track.g)] & 0xffff0000u;
#pragma unroll
      for (int i = 0; i < 2; i++) drawn[e] += piece == slots.of_column[i] ? by_slot[2 * e + i] : 0.f;
    }
  } while (slots.spread && (first += 8) <= track.highest);
#pragma unroll
  for (int e = 0; e < 2; e++) {
    acc.psi[2 * f + e] = fmaf(drawn[e], track.scale, acc.psi[2 * f + e]);
    acc.row = fmaf(drawn[e], track.line.psi[key_of(2 * f + e, track.g)], acc.row);
  }
}
