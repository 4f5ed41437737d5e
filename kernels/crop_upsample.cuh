// crop_upsample: the specification and the reference are in crop_upsample.py.
#pragma once
#include "common.cuh"

// grid: x over the canvas' cells, y over faces × channels. latents (B, C, H, W) → faces (F, C, canvas, canvas).
template <class T>
__device__ inline void crop_upsample(const float* latents, const int* pictures, const Box* boxes, T* faces,
                                     int channels, int height, int width, int canvas) {
  int cell = blockIdx.x * blockDim.x + threadIdx.x;
  if (cell >= canvas * canvas) return;
  int face = blockIdx.y / channels, channel = blockIdx.y % channels;
  Box box = boxes[face];
  const float* plane = latents + ((long long)pictures[face] * channels + channel) * height * width;
  const float* crop = plane + (long long)box.y0 * width + box.x0;
  Taps y = bilinear_taps(cell / canvas, axis_of(box.y1 - box.y0, canvas));
  Taps x = bilinear_taps(cell % canvas, axis_of(box.x1 - box.x0, canvas));
  narrow(sample_bilinear(crop, width, y, x), faces + (long long)blockIdx.y * canvas * canvas + cell);
}
