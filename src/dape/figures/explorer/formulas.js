"use strict";

// The formulas of dape/positions/bias.py: parameters -> B of a query at i and a key at j.
const BIASES = {
  NoBias: () => () => 0,
  ALiBi: ({ s }) => (i, j) => -s * Math.abs(i - j),
  Kerple: ({ p, a }) => (i, j) => -p * Math.log1p(a * Math.abs(i - j)),
  KerplePower: ({ p, a }) => (i, j) => -a * Math.abs(i - j) ** p,
  T5: ({ buckets, max_distance, weight }) => {
    const starts = bucketStarts(buckets, max_distance);
    return (i, j) => weight[starts.filter((start) => start <= Math.abs(i - j)).length];
  },
  Sandwich: ({ weight, d_bar }) => {
    const waves = Array.from({ length: d_bar / 2 }, (_, f) => 10000 ** ((-2 * f) / d_bar));
    return (i, j) => weight * waves.reduce((sum, w) => sum + Math.cos((i - j) * w), 0);
  },
  FIRE: ({ c, L, weight_in, bias_in, weight_out, bias_out }) => {
    const psi = (x) => Math.log1p(c * x);
    return (i, j) => {
      const ratio = psi(Math.abs(i - j)) / psi(Math.max(i, j, L));
      return weight_in.reduce(
        (sum, w, unit) => sum + weight_out[unit] * Math.max(0, w * ratio + bias_in[unit]),
        bias_out,
      );
    };
  },
};

// The first distance of each bucket of T5 but that of 0.
function bucketStarts(buckets, max_distance) {
  const exact = Math.floor(buckets / 2);
  const shared = buckets - exact;
  const powers = Array.from({ length: shared - 1 }, (_, n) =>
    Math.ceil(Math.round(exact * (max_distance / exact) ** ((n + 1) / shared) * 1e9) / 1e9),
  );
  return [...Array.from({ length: exact }, (_, n) => n + 1), ...powers];
}

function softmax(logits) {
  const largest = logits.reduce((most, x) => Math.max(most, x), -Infinity);
  const powers = logits.map((x) => Math.exp(x - largest));
  const sum = powers.reduce((total, x) => total + x, 0);
  return powers.map((x) => x / sum);
}
