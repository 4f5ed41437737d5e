// Shared by the kernels: number types, vectors, sampling. One source for NVRTC, nvcc and, through host.h, g++; it needs
// no other header. All arithmetic is float32; a half type is only a storage format.
#pragma once

#ifndef HOST
__device__ inline float float_of_bits(unsigned bits) { return __uint_as_float(bits); }
__device__ inline unsigned bits_of_float(float value) { return __float_as_uint(value); }
// True for one thread of each block, after all threads of the block have reached this call. Every thread must call it.
__device__ inline bool last_of_block() {
  __syncthreads();
  return threadIdx.x == 0;
}
// The number of tickets taken before.
__device__ inline int take_ticket(int* tickets) {
  __threadfence();
  return atomicAdd(tickets, 1);
}
// States that a pointer read from memory is a global address: the compiler cannot infer it, and generic loads are
// slower.
__device__ inline void assume_global(const void* address) { __builtin_assume(__isGlobal(address)); }
#endif

struct float16 {
  unsigned short bits;
};
struct bfloat16 {
  unsigned short bits;
};

__device__ inline float widen(float value) { return value; }
__device__ inline float widen(bfloat16 value) { return float_of_bits((unsigned)value.bits << 16); }
__device__ inline float widen(float16 value) {
#ifdef HOST
  return float_of_float16(value.bits);
#else
  float wide;
  asm("cvt.f32.f16 %0, %1;" : "=f"(wide) : "h"(value.bits));
  return wide;
#endif
}

// Rounded to nearest, ties to even.
__device__ inline void narrow(float value, float* out) { *out = value; }
__device__ inline void narrow(float value, float16* out) {
#ifdef HOST
  out->bits = float16_of_float(value);
#else
  asm("cvt.rn.f16.f32 %0, %1;" : "=h"(out->bits) : "f"(value));
#endif
}
__device__ inline void narrow(float value, bfloat16* out) {  // by hand: sm_75 has no instruction for it
  unsigned bits = bits_of_float(value);
  bool is_nan = (bits & 0x7fffffffu) > 0x7f800000u;
  out->bits = (unsigned short)((is_nan ? bits | 0x400000u : bits + 0x7fffu + (bits >> 16 & 1u)) >> 16);
}

// V neighbours, moved by one instruction.
template <class T, int V>
struct alignas(sizeof(T) * V) Vector {
  T of[V];
};

struct Box {  // in cells, half-open
  int x0, y0, x1, y1;
};

// A resize along one axis: `out` cells sampled from `in` cells.
struct Axis {
  int in, out;
  float inverse;  // of 2·out: a division costs more than all the rest of a sample
};
__device__ inline Axis axis_of(int in, int out) { return {in, out, 1.0f / (float)(2 * out)}; }

// Two inputs of an output cell, and the share of the second.
struct Taps {
  int first, second;
  float share;
};

// Bilinear, half-pixel centres, edges clamped, for output cell j. Its position (j + ½)·in/out − ½ is an integer over
// 2·out. `first` is computed with ½ added to that integer, which is then at least ½ from every multiple of 2·out: no
// rounding carries the product over a whole number (for in and out up to 1024). So `first` is exact, and the share is
// exactly zero where an output cell falls on an input cell.
__device__ inline Taps bilinear_taps(int j, Axis axis) {
  int position = (2 * j + 1) * axis.in - axis.out;  // over 2·out
  position = position < 0 ? 0 : position;
  int first = (int)(((float)position + 0.5f) * axis.inverse), last = axis.in - 1;
  return {first, first < last ? first + 1 : last, (float)(position - 2 * axis.out * first) * axis.inverse};
}

__device__ inline float mix(float a, float b, float share) { return (1.0f - share) * a + share * b; }

template <class T>
__device__ inline float sample_bilinear(const T* plane, int width, Taps y, Taps x) {
  const T *above = plane + (long long)y.first * width, *below = plane + (long long)y.second * width;
  return mix(mix(widen(above[x.first]), widen(above[x.second]), x.share),
             mix(widen(below[x.first]), widen(below[x.second]), x.share), y.share);
}

// The mean over the cells that output (j, i) covers, whole cells only.
template <class T>
__device__ inline float sample_area(const T* plane, int height, int width, int j, int i, int out_height,
                                    int out_width) {
  int y0 = j * height / out_height, y1 = ((j + 1) * height + out_height - 1) / out_height;
  int x0 = i * width / out_width, x1 = ((i + 1) * width + out_width - 1) / out_width;
  float sum = 0;
  for (int y = y0; y < y1; y++) {
    float row = 0;
    for (int x = x0; x < x1; x++) row += widen(plane[(long long)y * width + x]);
    sum += row;
  }
  return sum / (float)((y1 - y0) * (x1 - x0));
}
