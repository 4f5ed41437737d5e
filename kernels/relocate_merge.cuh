// relocate_merge: the specification and the reference are in relocate_merge.py.
#pragma once
#include "common.cuh"

// One skip of the UNet and the decoder's input made of it. Addresses are those of the networks' own buffers.
struct Level {
  const void* skips;  // (E, C, H, W)
  void* out;          // (R, C, H, W)
  int first_block;    // of the grid: where this level begins
  int size;           // C·H·W
  int height, width;  // H, W
  int box_level;      // which of every row's boxes
  int unused;
};

// The residuals of one source at one level, (P, C, h, w): h, w are H, W unless they are relocated.
struct Source {
  const void* residuals;
  int height, width;
};

enum Placement { EVERYWHERE, INSIDE, RELOCATED };
enum Overlap { SUM, AVERAGE, PRIORITY };

struct Rule {
  int placement, is_mean;
  int first_box;  // of the source's first row; -1 for EVERYWHERE
};

// R decoder rows and what each receives of S sources: at most N rows of each, with boxes in L levels.
struct Rows {
  const int* encoder_of;  // (R,)
  const int* rows_of;     // (R, S, N), -1 after the last
  const float* scales;    // (R, S)
  const Rule* rules;      // (S,)
  const Box* boxes;       // (ΣP, L), of the sources that have boxes, one after another
  int rows, sources, most_rows, box_levels;
};

__device__ inline bool same_injection(const Rows& rows, int a, int b) {
  for (int s = 0; s < rows.sources; s++)
    if (rows.scales[a * rows.sources + s] != rows.scales[b * rows.sources + s]) return false;
  int count = rows.sources * rows.most_rows;
  for (int n = 0; n < count; n++)
    if (rows.rows_of[a * count + n] != rows.rows_of[b * count + n]) return false;
  return true;
}

// V cells of a level, from `start` on: they begin at line y, column x of channel c, and may go on in the next lines and
// channels.
struct Cells {
  int start, c, y, x;
};

// How many boxes cover each of the V cells, a byte to a cell: V floats would cost registers, and so occupancy.
struct Counts {
  unsigned long long bytes = 0;
  __device__ void add(int v) { bytes += 1ull << 8 * v; }
  __device__ float of(int v) const { return (float)(unsigned)(bytes >> 8 * v & 255); }
};

// Adds one residual, (C, h, w), to those of the cells that lie in its box, and counts the box in `covered`.
template <class T, int V, bool AREA, bool RELOCATE>
__device__ inline void place(const Level& level, const Source& source, const T* residual, Box box, int overlap,
                             Cells cells, float* sum, Counts& covered) {
  int c = cells.c, y = cells.y, x = cells.x;
  if (x + V <= level.width && (y < box.y0 || y >= box.y1 || x + V <= box.x0 || x >= box.x1)) return;
  Axis down = axis_of(source.height, box.y1 - box.y0), across = axis_of(source.width, box.x1 - box.x0);
  Taps line = bilinear_taps(y - box.y0, down);
  Vector<T, V> map;
  if (!RELOCATE) map = *(const Vector<T, V>*)(residual + cells.start);
#pragma unroll  // where it is not, `sum` lies in memory: sm_100, mode "area"
  for (int v = 0; v < V; v++) {
    if (y >= box.y0 && y < box.y1 && x >= box.x0 && x < box.x1) {
      const T* plane = residual + (long long)c * source.height * source.width;
      float value;
      if (!RELOCATE)
        value = widen(map.of[v]);
      else if (AREA)
        value = sample_area(plane, source.height, source.width, y - box.y0, x - box.x0, down.out, across.out);
      else
        value = sample_bilinear(plane, source.width, line, bilinear_taps(x - box.x0, across));
      sum[v] = overlap == PRIORITY ? value : sum[v] + value;
      covered.add(v);
    }
    if (++x == level.width) {
      x = 0;
      if (++y == level.height) y = 0, c++;
      line = bilinear_taps(y - box.y0, down);
    }
  }
}

// The injection into decoder row r in the V cells from `start` on: Σ_s scale_s · acc_s.
template <class T, int V, bool AREA>
__device__ inline void inject(const Level& level, const Source* sources, const Rows& rows, int overlap, int r, int start,
                              float* injected) {
  int plane_size = level.height * level.width, cell = start % plane_size;
  Cells cells = {start, start / plane_size, cell / level.width, cell % level.width};
  for (int v = 0; v < V; v++) injected[v] = 0;
  for (int s = 0; s < rows.sources; s++) {
    const int* of = rows.rows_of + (r * rows.sources + s) * rows.most_rows;
    Source source = sources[s];
    const Rule& rule = rows.rules[s];
    assume_global(source.residuals);
    long long size = (long long)(level.size / plane_size) * source.height * source.width;
    float sum[V] = {};
    Counts covered;
    int count = 0;
    for (; count < rows.most_rows && of[count] >= 0; count++) {
      const T* residual = (const T*)source.residuals + of[count] * size;
      if (rule.placement == EVERYWHERE) {
        Vector<T, V> map = *(const Vector<T, V>*)(residual + start);
        for (int v = 0; v < V; v++) sum[v] += widen(map.of[v]);
      } else {
        Box box = rows.boxes[(rule.first_box + of[count]) * rows.box_levels + level.box_level];
        if (rule.placement == INSIDE)
          place<T, V, AREA, false>(level, source, residual, box, overlap, cells, sum, covered);
        else
          place<T, V, AREA, true>(level, source, residual, box, overlap, cells, sum, covered);
      }
    }
    if (count == 0) continue;
    float scale = rows.scales[r * rows.sources + s];
    if (rule.is_mean) scale /= (float)count;
    for (int v = 0; v < V; v++) {
      if (overlap == AVERAGE && covered.of(v) > 1) sum[v] /= covered.of(v);
      injected[v] += scale * sum[v];
    }
  }
}

// grid: x over all levels' cells, V to a thread; a thread handles its cells of every decoder row. Consecutive rows with
// the same injection (the none and the text row of a picture) share its computation.
template <class T, int V, bool AREA>
__device__ inline void relocate_merge(const Level* levels, const Source* sources, int num_levels, Rows rows,
                                      int overlap) {
  int index = 0;
  for (int l = 1; l < num_levels; l++) index += (int)blockIdx.x >= levels[l].first_block;
  const Level& level = levels[index];  // not a copy: kept in registers, its fields would cost occupancy
  sources += index * rows.sources;
  int start = ((blockIdx.x - level.first_block) * blockDim.x + threadIdx.x) * V;
  if (start >= level.size) return;
  const T* skips = (const T*)level.skips + start;
  T* out = (T*)level.out + start;
  assume_global(skips), assume_global(out);
  float injected[V];
  for (int r = 0; r < rows.rows; r++) {
    if (r == 0 || !same_injection(rows, r, r - 1))
      inject<T, V, AREA>(level, sources, rows, overlap, r, start, injected);
    Vector<T, V> merged = *(const Vector<T, V>*)(skips + (long long)rows.encoder_of[r] * level.size);
    for (int v = 0; v < V; v++) narrow(widen(merged.of[v]) + injected[v], &merged.of[v]);
    *(Vector<T, V>*)(out + (long long)r * level.size) = merged;
  }
}
