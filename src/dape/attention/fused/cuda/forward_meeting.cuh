// How the warps of `forward.cu` meet over a tile: scores are ready for the mixers, logits are ready for the heads. The
// warps of a block meet at named barriers. The warps of a cluster have barriers in the shared memory of every block.
#if CLUSTER > 1
DEVICE void begin_meeting(Shared& s) {
  if (threadIdx.x < 2) {
    begin_barrier(address(&s.scores[threadIdx.x]), H);
    begin_barrier(address(&s.logits[threadIdx.x]), MIXERS * CLUSTER);
  }
  meet_cluster();
}
DEVICE void end_meeting() { meet_cluster(); }  // no block ends while another reads from its memory
DEVICE void scores_there(Shared& s, int tile, int lane) {
  __syncwarp();
  if (lane < CLUSTER) arrive_remote(remote(address(&s.scores[tile & 1]), lane));
}
// The lanes of a warp meet too, and see each other's copies.
DEVICE void await_scores(Shared& s, int tile, int) {
  await_phase(address(&s.scores[tile & 1]), tile >> 1 & 1);
  __syncwarp();
}
DEVICE void logits_there(Shared& s, int tile, int lane) {
  __syncwarp();
  if (lane < CLUSTER) arrive_remote(remote(address(&s.logits[tile & 1]), lane));
}
DEVICE void await_logits(Shared& s, int tile, int) {
  await_phase(address(&s.logits[tile & 1]), tile >> 1 & 1);
  __syncwarp();
}

// Eight slots of a head, in the block that mixes them.
DEVICE void store_slots(Shared& s, int tile, int h, int slot, uint4 pairs) {
  store_remote(remote(address(&s.x[tile & 1][h][slot % SHARE]), slot / SHARE), pairs);
}
DEVICE uint4 load_slots(Shared& s, int tile, int h, int slot) {
  return load_remote(remote(address(&s.x[tile & 1][h][slot % SHARE]), slot / SHARE));
}
#else
DEVICE void begin_meeting(Shared&) { __syncthreads(); }
DEVICE void end_meeting() {}
DEVICE void scores_there(Shared&, int tile, int) {
  if (tile & 1)
    arrive<2>(MEMBERS);
  else
    arrive<1>(MEMBERS);
}
DEVICE void await_scores(Shared&, int tile, int) {
  if (tile & 1)
    meet<2>(MEMBERS);
  else
    meet<1>(MEMBERS);
}
DEVICE void logits_there(Shared&, int tile, int) {
  if (tile & 1)
    arrive<4>(MEMBERS);
  else
    arrive<3>(MEMBERS);
}
DEVICE void await_logits(Shared&, int tile, int) {
  if (tile & 1)
    meet<4>(MEMBERS);
  else
    meet<3>(MEMBERS);
}

DEVICE void store_slots(Shared& s, int tile, int h, int slot, uint4 pairs) { *(uint4*)&s.x[tile & 1][h][slot] = pairs; }
DEVICE uint4 load_slots(Shared& s, int tile, int h, int slot) { return *(const uint4*)&s.x[tile & 1][h][slot]; }
#endif
