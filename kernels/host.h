// The kernels on a CPU, for the tests: g++ compiles the source that runs on a GPU; loops replace the grid. Threads of
// a block run one after the other, so a kernel may wait for its block only through `last_of_block`.
//
//   g++ -O2 -std=c++17 -shared -fPIC [-fopenmp] -x c++ host.h -o libkernels.so
#define HOST
#define __device__
#include <cstddef>
#include <cstring>
#include <utility>

struct Dim {
  unsigned x = 1, y = 1, z = 1;
};
static thread_local Dim gridDim, blockDim, blockIdx, threadIdx;

inline float float_of_bits(unsigned bits) {
  float value;
  std::memcpy(&value, &bits, sizeof value);
  return value;
}
inline unsigned bits_of_float(float value) {
  unsigned bits;
  std::memcpy(&bits, &value, sizeof bits);
  return bits;
}
inline float float_of_float16(unsigned short bits) {
  _Float16 half;
  std::memcpy(&half, &bits, sizeof half);
  return half;
}
inline unsigned short float16_of_float(float value) {
  _Float16 half = (_Float16)value;
  unsigned short bits;
  std::memcpy(&bits, &half, sizeof bits);
  return bits;
}
inline bool last_of_block() { return threadIdx.x == blockDim.x - 1; }
inline int take_ticket(int* tickets) { return __atomic_fetch_add(tickets, 1, __ATOMIC_SEQ_CST); }
inline void assume_global(const void*) {}

// A kernel, known at compile time, so that it is inlined into the loops.
template <auto kernel>
struct OnHost;
template <class... A, void (*kernel)(A...)>
struct OnHost<kernel> {
  static constexpr unsigned sizes[] = {sizeof(A)..., 0};  // of the parameters

  static void run(unsigned grid_x, unsigned grid_y, unsigned block, void** parameters) {
    run(grid_x, grid_y, block, parameters, std::index_sequence_for<A...>());
  }
  template <std::size_t... I>
  static void run(unsigned grid_x, unsigned grid_y, unsigned block, void** parameters, std::index_sequence<I...>) {
#pragma omp parallel for collapse(2)
    for (unsigned y = 0; y < grid_y; y++)
      for (unsigned x = 0; x < grid_x; x++) {
        gridDim = {grid_x, grid_y, 1}, blockDim = {block, 1, 1}, blockIdx = {x, y, 0};
        for (unsigned t = 0; t < block; t++) {
          threadIdx = {t, 0, 0};
          kernel(*(A*)parameters[I]...);
        }
      }
  }
};

// host_NAME(grid x, grid y, block, parameters): parameters as the CUDA driver takes them, an address each.
// host_NAME_sizes(): the bytes of each, zero after the last.
#define ENTRY(name, parameters, ...) \
  static void name##_kernel parameters { __VA_ARGS__; } \
  extern "C" void host_##name(unsigned x, unsigned y, unsigned block, void** given) { \
    OnHost<name##_kernel>::run(x, y, block, given); \
  } \
  extern "C" const unsigned* host_##name##_sizes() { return OnHost<name##_kernel>::sizes; }

#include "kernels.cu"
