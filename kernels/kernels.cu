// The entry points, NAME_TYPE, of a cubin. launch.py launches them.
#include "crop_upsample.cuh"
#include "guide_step.cuh"
#include "relocate_merge.cuh"
#include "rows.cuh"

// Blocks of 256 threads, four to a multiprocessor: at most 64 registers to a thread.
#ifndef ENTRY  // host.h has its own
#define ENTRY(name, parameters, ...) \
  extern "C" __global__ void __launch_bounds__(256, 4) name parameters { __VA_ARGS__; }
#endif

#define CROP_UPSAMPLE(type, T) \
  ENTRY(crop_upsample_##type, \
        (const float* latents, const int* pictures, const Box* boxes, T* faces, int channels, int height, int width, \
         int canvas), \
        crop_upsample<T>(latents, pictures, boxes, faces, channels, height, width, canvas))

#define RELOCATE_MERGE(name, T, V, AREA) \
  ENTRY(relocate_merge_##name, \
        (const Level* levels, const Source* sources, const int* encoder_of, const int* rows_of, const float* scales, \
         const Rule* rules, const Box* boxes, int num_levels, int rows, int num_sources, int most_rows, \
         int box_levels, int overlap), \
        relocate_merge<T, V, AREA>(levels, sources, num_levels, \
                                   {encoder_of, rows_of, scales, rules, boxes, rows, num_sources, most_rows, \
                                    box_levels}, \
                                   overlap))

#define GUIDE_STEP(type, T) \
  ENTRY(guide_step_##type, \
        (float* latents, float* histories, int* step, int* tickets, const T* noise_pred, const int* decoder_of, \
         const double* weights, const double* matrix, const float* noise, float* preview, int num_histories, \
         int size), \
        guide_step<T>(latents, histories, step, tickets, noise_pred, decoder_of, weights, matrix, noise, preview, \
                      num_histories, size))

#define TAKE(types, S, T) \
  ENTRY(take_##types, (const S* source, const int* rows, T* out, int size), take<S, T>(source, rows, out, size))

#define TAKE_STEP(type, T) \
  ENTRY(take_step_##type, \
        (const T* table, const int* step, const int* pictures, const int* columns, T* out, int num_columns, int size), \
        take_step<T>(table, step, pictures, columns, out, num_columns, size))

// 16 bytes to a thread; "single" where a row is not a whole number of vectors.
#define ALL(type, T, V) \
  CROP_UPSAMPLE(type, T) \
  RELOCATE_MERGE(bilinear_##type, T, V, false) \
  RELOCATE_MERGE(area_##type, T, V, true) \
  RELOCATE_MERGE(bilinear_single_##type, T, 1, false) \
  RELOCATE_MERGE(area_single_##type, T, 1, true) \
  GUIDE_STEP(type, T) \
  TAKE(type, T, T) \
  TAKE_STEP(type, T)

ALL(float32, float, 4)
ALL(float16, float16, 8)
ALL(bfloat16, bfloat16, 8)
TAKE(float32_to_float16, float, float16)
TAKE(float32_to_bfloat16, float, bfloat16)
