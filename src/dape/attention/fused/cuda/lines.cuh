// Lines of queries, keys or values in shared memory, filled by copies and read by ldmatrix, for kernels with a warp for
// every head. An Element has two bytes. Elements lie in blocks of 64 columns, and 32 and 16 for the remaining columns.
// In a line the pieces of 16 bytes are permuted. Copies then fill whole lines, and ldmatrix finds eight lines in
// different banks.
//
// Macro: E, a multiple of 16.
// The block of column 16 e: first column and width.
__host__ __device__ constexpr int width_at(int e) { return 16 * e < E / 64 * 64 ? 64 : 16 * e < E / 32 * 32 ? 32 : 16; }
__host__ __device__ constexpr int block_at(int e) {
  return 16 * e < E / 64 * 64 ? 16 * e / 64 * 64 : 16 * e < E / 32 * 32 ? E / 64 * 64 : E / 32 * 32;
}
DEVICE constexpr int swap_of(int line, int width) {
  return width == 64 ? line & 7 : width == 32 ? line >> 1 & 3 : line >> 2 & 1;
}
// A lane's line of an ldmatrix of columns 16 e .. 16 e + 15 of COUNT lines; `line` is the place among 16 lines, `upper`
// is set for the upper 8 columns.
template <int COUNT>
DEVICE uint32 line_address(uint32 base, int p, int e, int line, int upper) {
  const int width = width_at(e), first = block_at(e);
  return base + (COUNT * first + (16 * p + line) * width) * 2 +
         (((16 * e - first) / 8) ^ upper ^ swap_of(line, width)) * 16;
}
// The copies of a lane for a block of columns; `from` is the lane's piece of the first line.
template <int COUNT, int WIDTH, int FIRST, int STRIDE, bool WHOLE>
DEVICE void load_block(uint32 to, const Element* from, int lines, int lane) {
  constexpr int PIECES = WIDTH / 8, STEP = 32 / PIECES;
  const int piece = lane % PIECES, line = lane / PIECES;
  const uint32 at = to + COUNT * FIRST * 2 + line * WIDTH * 2 + (piece ^ swap_of(line, WIDTH)) * 16;
#pragma unroll
  for (int j = 0; j < COUNT / STEP; j++) {
    const uint32 here = (at ^ (swap_of(j * STEP, WIDTH) * 16)) + j * STEP * WIDTH * 2;
    const bool real = WHOLE || line + j * STEP < lines;
    copy16(here, real ? from + j * STEP * STRIDE : from, real);
  }
}
template <int WIDTH, int STRIDE>
DEVICE int own_piece(int lane) {
  return lane / (WIDTH / 8) * STRIDE + lane % (WIDTH / 8) * 8;
}

// The lines of tile after tile, zero past the last.
template <int COUNT, int STRIDE>
struct Lines {
  const Element* from;  // the lane's piece of the next tile, in a block of 64 columns if E has such a block
  uint32 to;
  int left, lane;
  static constexpr int WIDEST = E >= 64 ? 64 : E >= 32 ? 32 : 16;
  DEVICE Lines(const Element* first, Element* stage, int keys, int lane)
      : from(first + own_piece<WIDEST, STRIDE>(lane)), to(address(stage)), left(keys), lane(lane) {}
  template <bool WHOLE>
  DEVICE void copy() const {
#pragma unroll
    for (int block = 0; block < E / 64; block++)
      load_block<COUNT, 64, 0, STRIDE, WHOLE>(to + COUNT * block * 128, from + 64 * block, left, lane);
    const Element* line = from - own_piece<WIDEST, STRIDE>(lane);
    if constexpr (E & 32)
      load_block<COUNT, 32, E / 64 * 64, STRIDE, WHOLE>(to, line + own_piece<32, STRIDE>(lane) + E / 64 * 64, left,
                                                        lane);
    if constexpr (E & 16)
      load_block<COUNT, 16, E / 32 * 32, STRIDE, WHOLE>(to, line + own_piece<16, STRIDE>(lane) + E / 32 * 32, left,
                                                        lane);
  }
  DEVICE void load() {
    if (left >= COUNT)
      copy<true>();
    else
      copy<false>();
    from += COUNT * STRIDE;
    left -= COUNT;
  }
};
