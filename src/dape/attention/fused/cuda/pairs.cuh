// Pairs of fp16 in a register.
constexpr float LOG2E = 1.4426950408889634f;

DEVICE __half2 half2_of(uint32 x) { return *(__half2*)&x; }
DEVICE uint32 bits(__half2 x) { return *(uint32*)&x; }
DEVICE uint32 pack(float a, float b) { return bits(__floats2half2_rn(a, b)); }
