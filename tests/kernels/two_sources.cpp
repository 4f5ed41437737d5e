// The oracle of two_sources.py: relocate_merge as it was when it knew exactly two sources, a local and a global branch.
// Built with g++, beside the kernels of today. Not to be developed further.
#include "../../kernels/host.h"

namespace two_sources {

// One skip of the UNet and what is merged into it. Addresses are those of the networks' own buffers.
struct Level {
  const void *skips, *local, *global;  // (E, C, H, W), (P, C, h, w), (Q, C, H, W); not read where a branch has no rows
  void* out;                          // (R, C, H, W)
  int first_block;                    // of the grid: where this level begins
  int size;                           // C·H·W
  int height, width;                  // H, W
  int local_height, local_width;      // h, w
  int box_level;                      // which of every face's boxes
  int unused;
};

struct Scales {
  float local, global;
};

// The rows of both branches and their destinations: R decoder rows, at most N persons each, boxes of P local rows in L
// levels.
struct Rows {
  const int* encoder_of;    // (R,)
  const int* local_of;      // (R, N), -1 after the last
  const int* global_of;     // (R, N), -1 after the last
  const Box* boxes;         // (P, L)
  const Scales* scales;     // (R, 2)
  int rows, persons, box_levels;
};

enum Overlap { SUM, AVERAGE, PRIORITY };

__device__ inline bool same_injection(const Rows& rows, int a, int b) {
  if (rows.scales[a].local != rows.scales[b].local || rows.scales[a].global != rows.scales[b].global) return false;
  for (int p = 0; p < rows.persons; p++) {
    int i = a * rows.persons + p, j = b * rows.persons + p;
    if (rows.local_of[i] != rows.local_of[j] || rows.global_of[i] != rows.global_of[j]) return false;
  }
  return true;
}

// Adds one person's relocated local residual (C, h, w) to V cells of `placed`, and counts its cells in `covered`. The
// cells begin at line y, column x of channel c, and may go on in the next lines and channels.
template <class T, int V, bool AREA>
__device__ inline void place(const Level& level, const T* residual, Box box, int overlap, int c, int y, int x,
                             float* placed, float* covered) {
  if (x + V <= level.width && (y < box.y0 || y >= box.y1 || x + V <= box.x0 || x >= box.x1)) return;
  int height = level.local_height, width = level.local_width;
  Axis down = axis_of(height, box.y1 - box.y0), across = axis_of(width, box.x1 - box.x0);
  Taps line = bilinear_taps(y - box.y0, down);
  for (int v = 0; v < V; v++) {
    if (y >= box.y0 && y < box.y1 && x >= box.x0 && x < box.x1) {
      const T* plane = residual + (long long)c * height * width;
      float value = AREA ? sample_area(plane, height, width, y - box.y0, x - box.x0, down.out, across.out)
                         : sample_bilinear(plane, width, line, bilinear_taps(x - box.x0, across));
      placed[v] = overlap == PRIORITY ? value : placed[v] + value;
      covered[v] += 1;
    }
    if (++x == level.width) {
      x = 0;
      if (++y == level.height) y = 0, c++;
      line = bilinear_taps(y - box.y0, down);
    }
  }
}

// The injection into decoder row r in the V cells from `start` on: s_g · mean_p global + s_l · Σ_p R(local).
template <class T, int V, bool AREA>
__device__ inline void inject(const Level& level, const Rows& rows, int overlap, int r, int start, float* injected) {
  const int *local_of = rows.local_of + r * rows.persons, *global_of = rows.global_of + r * rows.persons;
  int plane_size = level.height * level.width, cell = start % plane_size;
  int c = start / plane_size, y = cell / level.width, x = cell % level.width;
  long long local_size = (long long)(level.size / plane_size) * level.local_height * level.local_width;
  float sum[V] = {}, placed[V] = {}, covered[V] = {};
  for (int p = 0; p < rows.persons && local_of[p] >= 0; p++) {
    int row = local_of[p];
    place<T, V, AREA>(level, (const T*)level.local + row * local_size,
                      rows.boxes[row * rows.box_levels + level.box_level], overlap, c, y, x, placed, covered);
  }
  int count = 0;
  for (; count < rows.persons && global_of[count] >= 0; count++) {
    long long first = (long long)global_of[count] * level.size + start;
    Vector<T, V> residual = *(const Vector<T, V>*)((const T*)level.global + first);
    for (int v = 0; v < V; v++) sum[v] += widen(residual.of[v]);
  }
  Scales scale = rows.scales[r];
  float global_share = count ? scale.global / (float)count : 0.0f;
  for (int v = 0; v < V; v++) {
    if (overlap == AVERAGE && covered[v] > 1) placed[v] /= covered[v];
    injected[v] = scale.local * placed[v] + global_share * sum[v];
  }
}

// grid: x over all levels' cells, V to a thread; a thread handles its cells of every decoder row. Consecutive rows with
// the same injection (the none and the text row of a picture) share its computation.
template <class T, int V, bool AREA>
__device__ inline void relocate_merge(const Level* levels, int num_levels, Rows rows, int overlap) {
  int index = 0;
  for (int l = 1; l < num_levels; l++) index += (int)blockIdx.x >= levels[l].first_block;
  Level level = levels[index];
  assume_global(level.skips), assume_global(level.local), assume_global(level.global), assume_global(level.out);
  int start = ((blockIdx.x - level.first_block) * blockDim.x + threadIdx.x) * V;
  if (start >= level.size) return;
  float injected[V];
  for (int r = 0; r < rows.rows; r++) {
    if (r == 0 || !same_injection(rows, r, r - 1)) inject<T, V, AREA>(level, rows, overlap, r, start, injected);
    const T* skip = (const T*)level.skips + (long long)rows.encoder_of[r] * level.size + start;
    Vector<T, V> merged = *(const Vector<T, V>*)skip;
    for (int v = 0; v < V; v++) narrow(widen(merged.of[v]) + injected[v], &merged.of[v]);
    *(Vector<T, V>*)((T*)level.out + (long long)r * level.size + start) = merged;
  }
}

}  // namespace two_sources

#define TWO_SOURCES(name, T, V, AREA) \
  ENTRY(two_sources_##name, \
        (const two_sources::Level* levels, int num_levels, const int* encoder_of, const int* local_of, \
         const int* global_of, const Box* boxes, const two_sources::Scales* scales, int rows, int persons, \
         int box_levels, int overlap), \
        two_sources::relocate_merge<T, V, AREA>( \
            levels, num_levels, {encoder_of, local_of, global_of, boxes, scales, rows, persons, box_levels}, overlap))

#define BOTH(type, T, V) \
  TWO_SOURCES(bilinear_##type, T, V, false) \
  TWO_SOURCES(area_##type, T, V, true) \
  TWO_SOURCES(bilinear_single_##type, T, 1, false) \
  TWO_SOURCES(area_single_##type, T, 1, true)

BOTH(float32, float, 4)
BOTH(float16, float16, 8)
BOTH(bfloat16, bfloat16, 8)
