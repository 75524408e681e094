// What kernels share that have a warp for each head and warps that mix: forward.cu, backward.cu.

// Gives a warp N registers a thread, of those a block of so many threads started with; 0 leaves what it has.
template <int N, int THREADS_OF_BLOCK>
DEVICE void set_registers() {
  constexpr int started = 65536 / THREADS_OF_BLOCK / 8 * 8;
  if constexpr (N > started)
    more_registers<N>();
  else if constexpr (N > 0)
    fewer_registers<N>();
}
DEVICE uint32 pack_half(float a, float b) {
  __half2 h = __floats2half2_rn(a, b);
  return *(uint32*)&h;
}
// d = a b + c in fp16, whose accumulators are the next product's operand.
DEVICE void mma_half(uint32 (&d)[2], const uint32 (&a)[4], const uint32 (&b)[2], uint32 c0, uint32 c1) {
  const uint2 sum = mma_half(make_uint4(a[0], a[1], a[2], a[3]), b[0], b[1], c0, c1);
  d[0] = sum.x;
  d[1] = sum.y;
}
