// guide_step: the specification and the reference are in guide_step.py.
#pragma once
#include "common.cuh"

// [z'; h1'; h2'; d] = matrix[step] · [z; m; h1; h2; noise] of one cell.
// grid: x over a picture's cells, y over pictures. histories, noise, preview: null where there is none. tickets (B,):
// zero before and after. The block that finishes last increments the picture's step, when no block reads it any more.
template <class T>
__device__ inline void guide_step(float* latents, float* histories, int* step, int* tickets, const T* noise_pred,
                                  const int* decoder_of, const double* weights, const double* matrix,
                                  const float* noise, float* preview, int num_histories, int size) {
  int picture = blockIdx.y, cell = blockIdx.x * blockDim.x + threadIdx.x;
  const int* rows = decoder_of + 3 * picture;
  if (rows[0] < 0 && rows[1] < 0 && rows[2] < 0) return;  // all threads of the block
  if (cell < size) {
    long long at = (long long)picture * size + cell;
    float* kept = histories + (at - cell) * num_histories + cell;
    float z = latents[at], predicted[3] = {}, history[2] = {}, drawn = noise ? noise[at] : 0.0f;
    for (int k = 0; k < 3; k++)
      if (rows[k] >= 0) predicted[k] = widen(noise_pred[(long long)rows[k] * size + cell]);
    for (int k = 0; k < 2; k++)
      if (k < num_histories) history[k] = kept[(long long)k * size];
    for (int j = 0; j < 4; j++) {
      if (j < 3 ? j > num_histories : !preview) continue;
      const double* row = matrix + 20 * (long long)step[picture] + 5 * j;
      float next = (float)row[0] * z;
      for (int k = 0; k < 3; k++)
        if (rows[k] >= 0) next += (float)(row[1] * weights[3 * picture + k]) * predicted[k];
      for (int k = 0; k < 2; k++)
        if (k < num_histories && row[2 + k] != 0) next += (float)row[2 + k] * history[k];
      if (noise && row[4] != 0) next += (float)row[4] * drawn;
      *(j == 0 ? latents + at : j == 3 ? preview + at : kept + (long long)(j - 1) * size) = next;
    }
  }
  if (last_of_block() && take_ticket(tickets + picture) == (int)gridDim.x - 1) {
    tickets[picture] = 0;
    step[picture] += 1;
  }
}
