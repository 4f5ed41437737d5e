// What the stand-in for a GPU does: memory, streams, events, graphs, kernels, copies. stand_in.cpp says how it is used.
#pragma once
#include <dlfcn.h>

#include <algorithm>
#include <atomic>
#include <chrono>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <deque>
#include <functional>
#include <map>
#include <mutex>
#include <string>
#include <thread>
#include <utility>
#include <vector>

using Result = int;
enum : Result {
  SUCCESS = 0, INVALID_VALUE = 1, OUT_OF_MEMORY = 2, NO_DEVICE = 100, INVALID_CONTEXT = 201, INVALID_HANDLE = 400,
  NOT_FOUND = 500, NOT_READY = 600, ILLEGAL_ADDRESS = 700, NOT_SUPPORTED = 801, CAPTURE_UNSUPPORTED = 900,
  CAPTURE_UNMATCHED = 903,
};
using Address = unsigned long long;
using Work = std::function<void()>;

static std::recursive_mutex mutex;
static thread_local int locked;
struct Lock {
  Lock() { mutex.lock(), locked++; }
  ~Lock() { locked--, mutex.unlock(); }
};
#define LOCK Lock lock
// Work may call back into Python, whose own lock another thread may hold while it waits for ours.
static void unlocked(const Work& work) {
  int times = std::exchange(locked, 0);
  for (int i = 0; i < times; i++) mutex.unlock();
  work();
  for (int i = 0; i < times; i++) mutex.lock();
  locked = times;
}

static std::string setting(const char* name, const char* otherwise) {
  const char* value = getenv(name);
  return value ? value : otherwise;
}

// Memory

enum Kind { DEVICE, PINNED };
struct Block {
  size_t bytes;
  Kind kind;
};
static std::map<Address, Block> blocks;
static size_t live[2];
static std::atomic<size_t> launches, graph_launches, events;

static size_t memory_bytes() { return std::stoull(setting("STAND_IN_MEMORY_BYTES", "17179869184")); }
static const Block* block_of(Address address, size_t bytes, int kind = -1) {
  auto next = blocks.upper_bound(address);
  if (next == blocks.begin()) return nullptr;
  auto& [start, block] = *--next;
  return address + bytes <= start + block.bytes && (kind < 0 || kind == block.kind) ? &block : nullptr;
}
static Result allocate(Address* address, size_t bytes, Kind kind) {
  LOCK;
  if (!bytes) return INVALID_VALUE;
  if (kind == DEVICE && live[DEVICE] + bytes > memory_bytes()) return OUT_OF_MEMORY;
  size_t whole = (bytes + 255) / 256 * 256;
  void* memory = aligned_alloc(256, whole);
  memset(memory, 0xff, whole);
  *address = (Address)memory;
  blocks[*address] = {bytes, kind};
  live[kind] += bytes;
  return SUCCESS;
}
static Result release(Address address, Kind kind) {
  LOCK;
  auto block = blocks.find(address);
  if (block == blocks.end() || block->second.kind != kind) return INVALID_VALUE;
  memset((void*)address, 0xff, block->second.bytes);
  live[kind] -= block->second.bytes;
  blocks.erase(block);
  free((void*)address);
  return SUCCESS;
}

// Streams, events and graphs

struct UserObject {  // what graphs keep alive
  void* content;
  void (*destroy)(void*);
  unsigned count;

  void drop(unsigned references) {
    if ((count -= references)) return;
    destroy(content);
    delete this;
  }
};
struct Graph {
  std::vector<Work> work;
  std::vector<UserObject*> kept;

  Graph() = default;
  Graph(const Graph& graph) : work(graph.work), kept(graph.kept) {
    for (UserObject* object : kept) object->count++;
  }
  ~Graph() {
    for (UserObject* object : kept) object->drop(1);
  }
};
struct Stream {
  std::deque<Work> waiting;
  bool busy = false;
  Graph* capture = nullptr;
  Stream* origin = nullptr;  // of the capture
  int mode = 0;
};
struct Event {
  double ms = -1;
  Stream* stream = nullptr;  // where it waits, or was captured
  Graph* capture = nullptr;
};
static Stream default_stream;
static std::vector<Stream*> streams;
static char primary_context[64], memory_pool[64], library[64];
static thread_local void* current_context;

static Stream* of(Stream* handle) { return (size_t)handle <= 2 ? &default_stream : handle; }
static void finish(Stream* stream) {
  while (stream->busy || !stream->waiting.empty()) {
    if (stream->busy) {  // with another thread's wait
      unlocked(std::this_thread::yield);
      continue;
    }
    Work work = std::move(stream->waiting.front());
    stream->waiting.pop_front();
    stream->busy = true;
    unlocked(work);
    stream->busy = false;
  }
}
static void finish_all() {
  finish(&default_stream);
  for (Stream* stream : std::vector<Stream*>(streams)) finish(stream);
}
static bool forbidden_now() {  // by a capture that is not "relaxed"
  for (Stream* stream : streams)
    if (stream->capture && stream->mode != 2) return true;
  return false;
}
static Result enqueue(Stream* stream, Work work) {
  if (!current_context) return INVALID_CONTEXT;
  stream = of(stream);
  if (stream->capture)
    stream->capture->work.push_back(std::move(work));
  else if (setting("STAND_IN_EAGER", "0") != "0")
    unlocked(work);
  else
    stream->waiting.push_back(std::move(work));
  return SUCCESS;
}

// Kernels

struct Kernel {
  void (*run)(unsigned, unsigned, unsigned, void**);
  const unsigned* sizes;
};
static std::map<std::string, Kernel> kernels;

static Result find_kernel(Kernel** kernel, const char* name) {
  LOCK;
  static void* host = dlopen(setting("STAND_IN_KERNELS", "").c_str(), RTLD_NOW | RTLD_LOCAL);
  if (!host) return fprintf(stderr, "[stand-in] STAND_IN_KERNELS: %s\n", dlerror()), NOT_FOUND;
  std::string symbol = std::string("host_") + name;
  void *run = dlsym(host, symbol.c_str()), *sizes = dlsym(host, (symbol + "_sizes").c_str());
  if (!run || !sizes) return NOT_FOUND;
  *kernel = &kernels.insert({name, {(decltype(Kernel::run))run, ((const unsigned* (*)())sizes)()}}).first->second;
  return SUCCESS;
}
static Result parameter(Kernel* kernel, size_t index, size_t* offset, size_t* size) {
  size_t end = 0;
  for (size_t i = 0; kernel->sizes[i]; i++) {
    size_t bytes = kernel->sizes[i], start = (end + bytes - 1) / bytes * bytes;
    if (i == index) return *offset = start, *size = bytes, SUCCESS;
    end = start + bytes;
  }
  return INVALID_VALUE;
}
static Result launch(Kernel* kernel, const unsigned* grid, const unsigned* block, unsigned shared_bytes,
                     Stream* stream, void** parameters) {
  LOCK;
  if (!grid[0] || !grid[1] || grid[1] > 65535 || grid[2] != 1 || !block[0] || block[0] > 1024 || block[1] != 1 ||
      block[2] != 1 || shared_bytes)
    return INVALID_VALUE;
  std::vector<Address> values;
  for (size_t i = 0; kernel->sizes[i]; i++) {
    values.push_back(0);
    memcpy(&values.back(), parameters[i], kernel->sizes[i]);
    // eight bytes are an address, or null for an array that is absent
    if (kernel->sizes[i] == 8 && values.back() && !block_of(values.back(), 1)) return ILLEGAL_ADDRESS;
  }
  return enqueue(stream, [=, x = grid[0], y = grid[1], threads = block[0]]() mutable {
    std::vector<void*> addresses;
    for (Address& value : values) addresses.push_back(&value);
    kernel->run(x, y, threads, addresses.data());
    launches++;
  });
}
struct LaunchConfig {
  unsigned grid[3], block[3], shared_bytes;
  Stream* stream;
  void* attributes;
  unsigned num_attributes;
};

// Copies

static Result copy(Address target, Address source, size_t bytes, Stream* stream) {
  LOCK;
  bool from_us = block_of(source, bytes), to_us = block_of(target, bytes);
  if (bytes && !from_us && !to_us) return INVALID_VALUE;
  if (!from_us && !of(stream)->capture) {  // pageable memory is read before the call returns
    std::vector<char> content((char*)source, (char*)source + bytes);
    return enqueue(stream, [=] { memcpy((void*)target, content.data(), bytes); });
  }
  Result result = enqueue(stream, [=] { memmove((void*)target, (void*)source, bytes); });
  if (!to_us && !of(stream)->capture) finish(of(stream));  // and written before
  return result;
}
static Result copy_now(Address target, Address source, size_t bytes) {
  LOCK;
  if (forbidden_now()) return CAPTURE_UNSUPPORTED;
  finish_all();
  Result result = copy(target, source, bytes, nullptr);
  finish(&default_stream);
  return result;
}
static Result to_device(Address target, Address source, size_t bytes, Stream* stream) {
  LOCK;
  return block_of(target, bytes, DEVICE) ? copy(target, source, bytes, stream) : INVALID_VALUE;
}
static Result to_host(Address target, Address source, size_t bytes, Stream* stream) {
  LOCK;
  return block_of(source, bytes, DEVICE) ? copy(target, source, bytes, stream) : INVALID_VALUE;
}
template <class T>
static Result fill(Address target, T value, size_t count, Stream* stream) {
  LOCK;
  if (!block_of(target, count * sizeof(T))) return INVALID_VALUE;
  return enqueue(stream, [=] {
    for (size_t i = 0; i < count; i++) ((T*)target)[i] = value;
  });
}
