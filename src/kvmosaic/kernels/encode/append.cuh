// The end of a decode step in a layer: its attention is joined, and its token stored, however a store's codes are written.
#pragma once
#include "attention/combine.cuh"

struct StepEnd {
  i64* length;         // [rows], to be one more; or null, and then
  const i64* slot;     // [rows], where it goes, among tokens that are written one by one; -1: nowhere
  u32* arrived;        // [rows], zeros between launches
  const int* live;     // 0: no token is written
  Fresh fresh;         // that token
  Joined joined;       // of the step's attention, which has read the store already; count 0 = none
  int heads;
};

// a block of threads a row for each query that is to be joined, one for its keys and one for its values, which
// keys(row, head, slot, token) and values(...) store
template <class Keys, class Values>
DEVICE void end_step(const StepEnd& w, Keys keys, Values values) {
  const i64 row = blockIdx.x, batch = blockIdx.x / w.heads, head = blockIdx.x % w.heads;
  const int side = (int)blockIdx.y - w.joined.count;
  if (side < 0) {
    combine(w.joined, row, gridDim.x, blockIdx.y);
    return;
  }
  const int live = *w.live, slot = (int)(w.slot == nullptr ? w.length : w.slot)[row];
  if (!live || slot < 0) return;
  const Fresh& f = w.fresh;
  if (side == 0)
    keys(row, (int)head, slot, f.keys + batch * f.key_strides[0] + head * f.key_strides[1]);
  else
    values(row, (int)head, slot, f.values + batch * f.value_strides[0] + head * f.value_strides[1]);
  barrier();  // each thread has read the length
  if (threadIdx.x == 0 && w.slot == nullptr && arrive_of_two(w.arrived + row)) w.length[row] = slot + 1;
}
