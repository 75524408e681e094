// A CPU that runs CUDA kernels: the threads of a block take turns, and what a warp does together happens when its
// last lane arrives. Copies to shared memory happen no sooner than they are waited for.
#pragma once
#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <deque>
#include <functional>
#include <memory>
#include <tuple>
#include <ucontext.h>
#include <utility>
#include <vector>

#define __global__
#define __device__
#define __host__
#define __forceinline__ inline
#define __launch_bounds__(...)
#define __shared__ thread_local
#define __align__(n) __attribute__((aligned(n)))
#define DEVICE inline
#define NEVER (-INFINITY)
#define _Pragma(x)

typedef unsigned int uint32;
typedef unsigned char uint8;
inline void follow() {}
using std::max;
using std::min;
struct dim3 { int x = 1, y = 1, z = 1; };
struct float2 { float x, y; };
struct alignas(16) float4 { float x, y, z, w; };
struct alignas(8) uint2 { uint32 x, y; };
struct alignas(16) uint4 { uint32 x, y, z, w; };
inline float2 make_float2(float x, float y) { return {x, y}; }
inline float4 make_float4(float x, float y, float z, float w) { return {x, y, z, w}; }
inline uint2 make_uint2(uint32 x, uint32 y) { return {x, y}; }
inline uint4 make_uint4(uint32 x, uint32 y, uint32 z, uint32 w) { return {x, y, z, w}; }

// Numbers of two bytes, by their bits.
struct __half { uint16_t bits; };
struct __half2 { __half x, y; };
struct __nv_bfloat16 { uint16_t bits; };
struct __nv_bfloat162 { __nv_bfloat16 x, y; };
inline float to_float(__half h) {
  const int sign = h.bits >> 15, exponent = h.bits >> 10 & 31, fraction = h.bits & 1023;
  const float size = exponent == 31 ? (fraction ? NAN : INFINITY) : exponent ? std::ldexp(1024.f + fraction, exponent - 25) : std::ldexp((float)fraction, -24);
  return sign ? -size : size;
}
inline __half to_half(double x) {
  const uint16_t sign = std::signbit(x) ? 0x8000 : 0;
  const double size = std::fabs(x);
  if (std::isnan(x)) return {0x7fff};
  if (size >= 65520) return {(uint16_t)(sign | 0x7c00)};
  const int exponent = size < std::ldexp(1.0, -14) ? -14 : std::ilogb(size);
  const int units = (int)std::nearbyint(std::ldexp(size, 10 - exponent));  // to even, by default
  return {(uint16_t)(sign | (units < 1024 ? units : ((exponent + 14) << 10) + units))};
}
inline float to_float(__nv_bfloat16 b) {
  const uint32 bits = (uint32)b.bits << 16;
  float x;
  memcpy(&x, &bits, 4);
  return x;
}
inline __nv_bfloat16 to_bfloat16(float x) {
  uint32 bits;
  memcpy(&bits, &x, 4);
  return {(uint16_t)(std::isnan(x) ? 0x7fff : (bits + 0x7fff + (bits >> 16 & 1)) >> 16)};
}
inline __half __float2half(float x) { return to_half(x); }
inline __half __float2half_rn(float x) { return to_half(x); }
inline __half2 __floats2half2_rn(float x, float y) { return {to_half(x), to_half(y)}; }
inline __half2 __float2half2_rn(float x) { return __floats2half2_rn(x, x); }
inline float2 __half22float2(__half2 v) { return {to_float(v.x), to_float(v.y)}; }
inline __nv_bfloat162 __floats2bfloat162_rn(float x, float y) { return {to_bfloat16(x), to_bfloat16(y)}; }
inline float2 __bfloat1622float2(__nv_bfloat162 v) { return {to_float(v.x), to_float(v.y)}; }
template <class F> __half2 each(F f, __half2 a, __half2 b, __half2 c) {
  return {to_half(f((double)to_float(a.x), (double)to_float(b.x), (double)to_float(c.x))), to_half(f((double)to_float(a.y), (double)to_float(b.y), (double)to_float(c.y)))};
}
inline __half2 __hmax2(__half2 a, __half2 b) { return each([](double x, double y, double) { return std::fmax(x, y); }, a, b, b); }
inline __half2 __hsub2(__half2 a, __half2 b) { return each([](double x, double y, double) { return x - y; }, a, b, b); }
inline __half2 __hmul2(__half2 a, __half2 b) { return each([](double x, double y, double) { return x * y; }, a, b, b); }
inline __half2 __hfma2(__half2 a, __half2 b, __half2 c) { return each([](double x, double y, double z) { return x * y + z; }, a, b, c); }
inline __half2 __hgt2(__half2 a, __half2 b) { return each([](double x, double y, double) { return x > y ? 1.0 : 0.0; }, a, b, b); }
inline uint32 __heq2_mask(__half2 a, __half2 b) { return (to_float(a.x) == to_float(b.x) ? 0xffffu : 0) | (to_float(a.y) == to_float(b.y) ? 0xffff0000u : 0); }

// Threads, and what they wait for.
struct Copy { char* to; const void* from; int size; bool real; };
struct Barrier { int arrived = 0; unsigned turn = 0; };
struct Thread {
  ucontext_t context;
  std::unique_ptr<char[]> stack;
  dim3 place;
  bool done = false;
  std::vector<Copy> copies;
  std::deque<std::vector<Copy>> groups;
};
struct Warp { Barrier barrier; void* operands[32]; };
constexpr int STACK = 1 << 17, SHARED_BYTES = 1 << 18, BARRIERS = 16;
thread_local __attribute__((aligned(128))) char memory[SHARED_BYTES];
dim3 gridDim, blockDim, blockIdx;
#define threadIdx (threads[now].place)
std::vector<Thread> threads;
std::vector<Warp> warps;
Barrier barriers[BARRIERS];
ucontext_t scheduler;
int now;
long idle;

inline void pass() { swapcontext(&threads[now].context, &scheduler); }
inline bool enter(Barrier& barrier, int members) {
  if (++barrier.arrived < members) return false;
  barrier.arrived = 0;
  barrier.turn++;
  idle = 0;
  return true;
}
inline void meet_at(Barrier& barrier, int members) {
  const unsigned turn = barrier.turn;
  if (!enter(barrier, members))
    while (barrier.turn == turn) pass();
}
template <int ID> void meet(int members) { meet_at(barriers[ID], members); }
template <int ID> void arrive(int members) { enter(barriers[ID], members); }
inline void __syncthreads() { meet_at(barriers[0], (int)threads.size()); }
// Gives every lane's operands to `f`, in the order of the lanes, when all are there.
template <class T, class F> void together(T& own, F f) {
  Warp& warp = warps[now / 32];
  warp.operands[now % 32] = &own;
  const unsigned turn = warp.barrier.turn;
  if (warp.barrier.arrived == 31) f([&](int lane) -> T& { return *(T*)warp.operands[lane]; });
  if (!enter(warp.barrier, 32))
    while (warp.barrier.turn == turn) pass();
}
inline void __syncwarp() { int nothing = 0; together(nothing, [](auto) {}); }
inline uint32 __ballot_sync(uint32, bool holds) {
  std::pair<bool, uint32> own{holds, 0};
  together(own, [](auto of) {
    uint32 all = 0;
    for (int lane = 0; lane < 32; lane++) all |= (uint32)of(lane).first << lane;
    for (int lane = 0; lane < 32; lane++) of(lane).second = all;
  });
  return own.second;
}
inline bool __any_sync(uint32 mask, bool holds) { return __ballot_sync(mask, holds) != 0; }
template <class F> int reduced(int x, F f) {
  std::pair<int, int> own{x, 0};
  together(own, [&](auto of) {
    int all = of(0).first;
    for (int lane = 1; lane < 32; lane++) all = f(all, of(lane).first);
    for (int lane = 0; lane < 32; lane++) of(lane).second = all;
  });
  return own.second;
}
inline int __reduce_min_sync(uint32, int x) { return reduced(x, [](int a, int b) { return a < b ? a : b; }); }
inline int __reduce_max_sync(uint32, int x) { return reduced(x, [](int a, int b) { return a > b ? a : b; }); }
inline uint32 __float_as_uint(float x) {
  uint32 bits;
  std::memcpy(&bits, &x, 4);
  return bits;
}
inline uint32 __funnelshift_l(uint32 low, uint32 high, int n) {
  return (uint32)(((uint64_t)high << 32 | low) << n >> 32);
}
inline uint32 __byte_perm(uint32 a, uint32 b, uint32 selector) {
  const uint64_t bytes = (uint64_t)b << 32 | a;
  uint32 found = 0;
  for (int i = 0; i < 4; i++) found |= (uint32)(bytes >> (selector >> 4 * i & 7) * 8 & 255) << 8 * i;
  return found;
}
// Lanes past an end of the warp keep their own.
inline uint32 shift_lanes(uint32 x, int distance) {
  std::tuple<uint32, uint32, int> own{x, x, distance};
  together(own, [](auto of) {
    for (int lane = 0; lane < 32; lane++) {
      const int from = lane + std::get<2>(of(lane));
      if (from >= 0 && from < 32) std::get<1>(of(lane)) = std::get<0>(of(from));
    }
  });
  return std::get<1>(own);
}
inline uint32 __shfl_up_sync(uint32, uint32 x, int distance) { return shift_lanes(x, -distance); }
inline uint32 __shfl_down_sync(uint32, uint32 x, int distance) { return shift_lanes(x, distance); }
inline float __shfl_xor_sync(uint32, float x, int distance) {
  std::tuple<float, float, int> own{x, 0.f, distance};
  together(own, [](auto of) {
    for (int lane = 0; lane < 32; lane++) std::get<1>(of(lane)) = std::get<0>(of(lane ^ std::get<2>(of(lane))));
  });
  return std::get<1>(own);
}

// What `ptx.cuh` declares. Addresses in shared memory are relative to `memory`.
inline uint32 address(const void* p) { return (uint32)((const char*)p - memory); }
inline char* place_of(uint32 address) { return memory + (int32_t)address; }
inline void copy16(uint32 to, const void* from, bool real) { threads[now].copies.push_back({place_of(to), from, 16, real}); }
inline void copy4(uint32 to, const void* from, bool real) { threads[now].copies.push_back({place_of(to), from, 4, real}); }
inline void commit() { threads[now].groups.push_back(std::exchange(threads[now].copies, {})); }
template <int N> void wait() {
  for (auto& groups = threads[now].groups; groups.size() > N; groups.pop_front())
    for (const Copy& copy : groups.front())
      if (copy.real) memcpy(copy.to, copy.from, copy.size);
      else memset(copy.to, 0, copy.size);
}
template <int N> void more_registers() {}
template <int N> void fewer_registers() {}
inline float exp2_fast(float x) { return std::exp2(x); }

inline float low_of(uint32 pair) { return to_float(__half{(uint16_t)pair}); }
inline void slope_backward(float& low, float& high, uint32 pair, float slope) {
  if (!(low_of(pair) > 0)) low *= slope;
  if (!(low_of(pair >> 16) > 0)) high *= slope;
}
inline uint16_t part(uint32 pair, int upper) { return (uint16_t)(upper ? pair >> 16 : pair); }
// Number (row, column) of a matrix of 8 x 8 pairs of which lane (g, t) = (lane / 4, lane % 4) holds row g, columns 2 t and 2 t + 1.
template <class Of> uint16_t entry(Of of, int row, int column) { return part(of(4 * row + column / 2), column % 2); }

inline uint32 turn(uint32 block) {
  std::pair<uint32, uint32> own{block, 0};
  together(own, [](auto of) {
    auto at = [&](int row, int column) { return (uint32)entry([&](int lane) { return of(lane).first; }, row, column); };
    for (int lane = 0; lane < 32; lane++) of(lane).second = at(lane % 4 * 2, lane / 4) | at(lane % 4 * 2 + 1, lane / 4) << 16;
  });
  return own.second;
}
struct Matrices { uint32 address, r[4]; };
inline uint16_t* line_of(uint32 address) { return (uint16_t*)place_of(address); }
template <bool TURNED> void load(uint32 (&r)[4], uint32 address) {
  Matrices own{address, {}};
  together(own, [](auto of) {
    for (int lane = 0; lane < 32; lane++)
      for (int i = 0; i < 4; i++) {
        auto at = [&](int row, int column) { return (uint32)line_of(of(8 * i + row).address)[column]; };
        const int g = lane / 4, t = lane % 4;
        of(lane).r[i] = TURNED ? at(2 * t, g) | at(2 * t + 1, g) << 16 : at(g, 2 * t) | at(g, 2 * t + 1) << 16;
      }
  });
  std::copy(own.r, own.r + 4, r);
}
inline void load4(uint32 (&r)[4], uint32 address) { load<false>(r, address); }
inline void load4_turned(uint32 (&r)[4], uint32 address) { load<true>(r, address); }
inline void store4_turned(uint32 address, uint32 r0, uint32 r1, uint32 r2, uint32 r3) {
  Matrices own{address, {r0, r1, r2, r3}};
  together(own, [](auto of) {
    for (int lane = 0; lane < 32; lane++)
      for (int i = 0; i < 4; i++)
        for (int upper = 0; upper < 2; upper++) line_of(of(8 * i + lane % 4 * 2 + upper).address)[lane / 4] = part(of(lane).r[i], upper);
  });
}

// Fragments of a product: lane (g, t) has rows g and g + 8 of A and C, columns g of B, and pairs from 2 t and 2 t + 8 on.
struct Product { uint32 a[4], b[2]; double c[4]; };
template <class Number> void multiply(Product& own) {
  together(own, [](auto of) {
    double a[16][16], b[16][8];
    for (int lane = 0; lane < 32; lane++)
      for (int i = 0; i < 4; i++)
        for (int upper = 0; upper < 2; upper++) {
          const int row = lane / 4, pair = lane % 4 * 2 + upper;
          a[row + i % 2 * 8][pair + i / 2 * 8] = to_float(Number{part(of(lane).a[i], upper)});
          if (i < 2) b[pair + i * 8][row] = to_float(Number{part(of(lane).b[i], upper)});
        }
    for (int lane = 0; lane < 32; lane++)
      for (int i = 0; i < 4; i++)
        for (int k = 0; k < 16; k++) of(lane).c[i] += a[lane / 4 + i / 2 * 8][k] * b[k][lane % 4 * 2 + i % 2];
  });
}
template <class Number> void multiply_float(float (&c)[4], uint32 a0, uint32 a1, uint32 a2, uint32 a3, uint32 b0, uint32 b1) {
  Product own{{a0, a1, a2, a3}, {b0, b1}, {c[0], c[1], c[2], c[3]}};
  multiply<Number>(own);
  std::copy(own.c, own.c + 4, c);
}
inline void mma(float (&c)[4], uint32 a0, uint32 a1, uint32 a2, uint32 a3, uint32 b0, uint32 b1) { multiply_float<__half>(c, a0, a1, a2, a3, b0, b1); }
inline void mma_bf16(float (&c)[4], uint32 a0, uint32 a1, uint32 a2, uint32 a3, uint32 b0, uint32 b1) { multiply_float<__nv_bfloat16>(c, a0, a1, a2, a3, b0, b1); }
inline uint2 mma_half(uint4 a, uint32 b0, uint32 b1, uint32 c0, uint32 c1) {
  Product own{{a.x, a.y, a.z, a.w}, {b0, b1}, {low_of(c0), low_of(c0 >> 16), low_of(c1), low_of(c1 >> 16)}};
  multiply<__half>(own);
  auto pair = [&](int i) { return (uint32)to_half(own.c[i]).bits | (uint32)to_half(own.c[i + 1]).bits << 16; };
  return {pair(0), pair(2)};
}

// A launch, with every argument in the low bytes of a word.
std::function<void()> body;
inline void run() {
  body();
  threads[now].done = true;
  idle = 0;
  pass();
}
inline void run_block() {
  memset(memory, 0xff, SHARED_BYTES);  // NaN
  for (Barrier& barrier : barriers) barrier = {};
  warps.assign((threads.size() + 31) / 32, {});
  for (int i = 0; i < (int)threads.size(); i++) {
    Thread& thread = threads[i];
    thread.done = false;
    thread.copies.clear();
    thread.groups.clear();
    thread.place = {i, 0, 0};
    if (!thread.stack) thread.stack.reset(new char[STACK]);
    getcontext(&thread.context);
    thread.context.uc_stack.ss_sp = thread.stack.get();
    thread.context.uc_stack.ss_size = STACK;
    thread.context.uc_link = nullptr;
    makecontext(&thread.context, run, 0);
  }
  idle = 0;
  for (bool left = true; left;) {
    left = false;
    for (now = 0; now < (int)threads.size(); now++)
      if (!threads[now].done) {
        left = true;
        swapcontext(&scheduler, &threads[now].context);
      }
    if (++idle > 1000) {
      fprintf(stderr, "the threads of a block wait for each other for ever\n");
      abort();
    }
  }
}
template <class... Types, size_t... I> void prepare(void (*kernel)(Types...), const uint64_t* words, std::index_sequence<I...>) {
  auto value = [](auto type, uint64_t word) {
    decltype(type) x;
    memcpy(&x, &word, sizeof(x));
    return x;
  };
  std::tuple<Types...> values{value(Types{}, words[I])...};
  body = [=] { std::apply(kernel, values); };
}
template <class... Types> void launch(void (*kernel)(Types...), const uint64_t* words, const int* grid, int width) {
  prepare(kernel, words, std::index_sequence_for<Types...>{});
  gridDim = {grid[0], grid[1], grid[2]};
  blockDim = {width, 1, 1};
  threads.resize(width);
  for (blockIdx.z = 0; blockIdx.z < gridDim.z; blockIdx.z++)
    for (blockIdx.y = 0; blockIdx.y < gridDim.y; blockIdx.y++)
      for (blockIdx.x = 0; blockIdx.x < gridDim.x; blockIdx.x++) run_block();
}
