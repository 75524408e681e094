// Tables for `forward`, from distance `low` on: -U in fp16, [distance][t][unit tile][pair], with the units of a lane as
// neighbours, C in base 2 with the causal mask, and s W2 W1, [head][head].

// Sets the flag to whether |W1| or |W2| |W1| may take scores of 1 beyond `most`, else to 0; by a block.
DEVICE void test_weights(const float* w1, const float* w2, int* flag, float most) {
  __shared__ float sums[D + H];
  for (int unit = threadIdx.x; unit < D; unit += blockDim.x) {
    float sum = 0.f;
    for (int head = 0; head < H; head++) sum += fabsf(w1[unit * H + head]);
    sums[unit] = sum;
  }
  __syncthreads();
  for (int head = threadIdx.x; head < H; head += blockDim.x) {
    float sum = 0.f;
    for (int unit = 0; unit < D; unit++) sum += fabsf(w2[head * D + unit]) * sums[unit];
    sums[D + head] = sum;
  }
  __syncthreads();
  if (threadIdx.x == 0) {
    float largest = 0.f;
    for (int i = 0; i < D + H; i++) largest = fmaxf(largest, sums[i]);
    *flag = largest > most;
  }
}

extern "C" __global__ void pack_tables(const float* hidden_table, const float* static_table, const float* w1,
                                       const float* w2, __half* hidden, float* fixed, float* linear, int* flag,
                                       double most, int table_size, int low, int distances) {
  follow();
  if (blockIdx.x == 0) test_weights(w1, w2, flag, (float)most);
  const long long units = (long long)distances * UNITS, heads = (long long)distances * H;
  for (long long i = blockIdx.x * blockDim.x + threadIdx.x; i < units + heads + H * H; i += gridDim.x * blockDim.x) {
    if (i < units) {
      const int entry = abs(low + (int)(i / UNITS)), place = i % UNITS, t = place / (2 * UT),
                unit = 8 * (place / 2 % UT) + 2 * t + place % 2;
      const float u = entry < table_size && unit < D ? hidden_table[(long long)entry * D + unit] : 0.f;
      hidden[i] = __float2half_rn(fminf(fmaxf(-u, -LARGEST), LARGEST));
    } else if (i < units + heads) {
      const int head = (i - units) / distances, distance = low + (int)((i - units) % distances), entry = abs(distance);
      const float c = entry < table_size ? LOG2E * static_table[(long long)head * table_size + entry] : 0.f;
      fixed[i - units] = CAUSAL && distance < 0 ? NEVER : c;
    } else {
      const int head = (i - units - heads) / H, from = (i - units - heads) % H;
      float sum = 0.f;
      for (int unit = 0; unit < D; unit++) sum += w2[head * D + unit] * w1[unit * H + from];
      linear[head * H + from] = SLOPE * sum;
    }
  }
}
