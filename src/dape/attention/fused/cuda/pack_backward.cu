// Tables from distance `low` on: -U in fp16, [distance][t][unit tile][pair], and C in base 2 with the causal mask,
// [distance][t][head tile][pair], so that a lane's units and heads are neighbours.
extern "C" __global__ void pack_backward(const float* hidden_table, const float* static_table, __half* hidden,
                                         float* fixed, int table_size, int low, int distances) {
  const long long units = (long long)distances * UNITS, heads = (long long)distances * HEADS;
  for (long long i = blockIdx.x * blockDim.x + threadIdx.x; i < units + heads; i += gridDim.x * blockDim.x) {
    if (i < units) {
      const int entry = abs(low + (int)(i / UNITS)), place = i % UNITS;
      const int unit = 8 * (place / 2 % UT) + 2 * (place / (2 * UT)) + place % 2;
      const float u = entry < table_size && unit < D ? hidden_table[(long long)entry * D + unit] : 0.f;
      hidden[i] = __float2half_rn(fminf(fmaxf(-u, -LARGEST), LARGEST));
    } else {
      const int distance = low + (int)((i - units) / HEADS), entry = abs(distance), place = (i - units) % HEADS;
      const int head = 8 * (place / 2 % 2) + 2 * (place / 4) + place % 2;
      const float c = head < H && entry < table_size ? LOG2E * static_table[(long long)head * table_size + entry] : 0.f;
      fixed[i - units] = head >= H || (CAUSAL && distance < 0) ? NEVER : c;
    }
  }
}
