// Instructions of the GPU without a name in C++, in front of every kernel. tests/attention/emulated.h has the
// instructions for a CPU.
#include <cuda_bf16.h>
#include <cuda_fp16.h>
typedef unsigned int uint32;
typedef unsigned char uint8;
#define DEVICE __device__ __forceinline__
#define NEVER __int_as_float(0xff800000)  // -inf; as a quotient it would be divided anew

// Wait for the results of the kernel before, which may still run when this one starts.
DEVICE void follow() {
#if __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.wait;" ::: "memory");
#endif
}

// Copies to shared memory under way: 16 bytes around the L1 cache, or 4, zeros if not `real`.
DEVICE uint32 address(const void* p) { return (uint32)__cvta_generic_to_shared(p); }
DEVICE void copy16(uint32 to, const void* from, bool real) {
  asm volatile("cp.async.cg.shared.global.L2::128B [%0], [%1], 16, %2;" ::"r"(to), "l"(from), "r"(real ? 16 : 0));
}
DEVICE void copy4(uint32 to, const void* from, bool real) {
  asm volatile("cp.async.ca.shared.global [%0], [%1], 4, %2;" ::"r"(to), "l"(from), "r"(real ? 4 : 0));
}
DEVICE void commit() { asm volatile("cp.async.commit_group;" ::: "memory"); }
template <int N>
DEVICE void wait() {
  asm volatile("cp.async.wait_group %0;" ::"n"(N) : "memory");
}

// Barriers of some threads of a block, with and without waiting.
template <int ID>
DEVICE void meet(int members) {
  asm volatile("bar.sync %0, %1;" ::"n"(ID), "r"(members) : "memory");
}
template <int ID>
DEVICE void arrive(int members) {
  asm volatile("bar.arrive %0, %1;" ::"n"(ID), "r"(members) : "memory");
}
template <int N>
DEVICE void more_registers() {
  asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(N));
}
template <int N>
DEVICE void fewer_registers() {
  asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(N));
}

// Four 8 x 8 matrices of two-byte numbers, a line from the address of every lane, or their transposes.
DEVICE void load4(uint32 (&r)[4], uint32 a) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0,%1,%2,%3}, [%4];"
               : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
               : "r"(a)
               : "memory");
}
DEVICE void load4_turned(uint32 (&r)[4], uint32 a) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0,%1,%2,%3}, [%4];"
               : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
               : "r"(a)
               : "memory");
}
DEVICE void store4_turned(uint32 a, uint32 r0, uint32 r1, uint32 r2, uint32 r3) {
  asm volatile("stmatrix.sync.aligned.m8n8.x4.trans.shared.b16 [%0], {%1,%2,%3,%4};" ::"r"(a), "r"(r0), "r"(r1),
               "r"(r2), "r"(r3)
               : "memory");
}
// The transpose of a matrix in registers.
DEVICE uint32 turn(uint32 block) {
  uint32 turned;
  asm("movmatrix.sync.aligned.m8n8.trans.b16 %0, %1;" : "=r"(turned) : "r"(block));
  return turned;
}

// c += a b for a of 16 x 16 and b of 16 x 8, in float32, or c + a b in fp16.
DEVICE void mma(float (&c)[4], uint32 a0, uint32 a1, uint32 a2, uint32 a3, uint32 b0, uint32 b1) {
  asm("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
      : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
      : "r"(a0), "r"(a1), "r"(a2), "r"(a3), "r"(b0), "r"(b1));
}
DEVICE void mma_bf16(float (&c)[4], uint32 a0, uint32 a1, uint32 a2, uint32 a3, uint32 b0, uint32 b1) {
  asm("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
      : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
      : "r"(a0), "r"(a1), "r"(a2), "r"(a3), "r"(b0), "r"(b1));
}
DEVICE uint2 mma_half(uint4 a, uint32 b0, uint32 b1, uint32 c0, uint32 c1) {
  uint2 d;
  asm("mma.sync.aligned.m16n8k16.row.col.f16.f16.f16.f16 {%0,%1}, {%2,%3,%4,%5}, {%6,%7}, {%8,%9};"
      : "=r"(d.x), "=r"(d.y)
      : "r"(a.x), "r"(a.y), "r"(a.z), "r"(a.w), "r"(b0), "r"(b1), "r"(c0), "r"(c1));
  return d;
}
// Multiplies what belongs to the numbers of a pair of fp16 by a slope, unless the number is positive.
DEVICE void slope_backward(float& low, float& high, uint32 pair, float slope) {
  asm("{.reg .pred p, q; setp.gt.f16x2 p|q, %2, %3; @!p mul.f32 %0, %0, %4; @!q mul.f32 %1, %1, %4;}"
      : "+f"(low), "+f"(high)
      : "r"(pair), "r"(0), "f"(slope));
}
DEVICE float exp2_fast(float x) {
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}
