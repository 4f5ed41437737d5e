// guide_step: the specification and the reference are in guide_step.py.
#pragma once
#include "common.cuh"

// grid: x over a picture's cells, y over pictures. tickets (B,): zero before and after. The block that finishes last
// increments the picture's step, when no block reads it any more.
template <class T>
__device__ inline void guide_step(float* latents, int* step, int* tickets, const T* noise_pred, const int* decoder_of,
                                  const double* weights, const double* coefficients, int size) {
  int picture = blockIdx.y, cell = blockIdx.x * blockDim.x + threadIdx.x;
  if (cell < size) {
    const double* row = coefficients + 2 * (long long)step[picture];
    float* z = latents + (long long)picture * size + cell;
    float next = (float)row[0] * *z;
    for (int k = 0; k < 3; k++) {
      int from = decoder_of[3 * picture + k];
      if (from < 0) continue;
      float weight = (float)(row[1] * weights[3 * picture + k]);
      next += weight * widen(noise_pred[(long long)from * size + cell]);
    }
    *z = next;
  }
  if (last_of_block() && take_ticket(tickets + picture) == (int)gridDim.x - 1) {
    tickets[picture] = 0;
    step[picture] += 1;
  }
}
