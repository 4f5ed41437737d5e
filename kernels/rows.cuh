// Rows gathered for Backend.take and Backend.take_step, and the NaN/Inf check.
#pragma once
#include "common.cuh"

// grid: x over a row's values, y over rows. out[r] = source[rows[r]], in the networks' precision.
template <class S, class T>
__device__ inline void take(const S* source, const int* rows, T* out, int size) {
  int i = blockIdx.x * blockDim.x + threadIdx.x;
  if (i < size) narrow(widen(source[(long long)rows[blockIdx.y] * size + i]), out + (long long)blockIdx.y * size + i);
}

// out[r] = table[step[pictures[r]], columns[r]] of a (S, K, size) table.
template <class T>
__device__ inline void take_step(const T* table, const int* step, const int* pictures, const int* columns, T* out,
                                 int num_columns, int size) {
  int i = blockIdx.x * blockDim.x + threadIdx.x, r = blockIdx.y;
  if (i >= size) return;
  long long from = (long long)step[pictures[r]] * num_columns + columns[r];
  out[(long long)r * size + i] = table[from * size + i];
}
