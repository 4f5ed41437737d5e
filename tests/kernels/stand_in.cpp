// A stand-in for libcuda.so.1 on a machine without a GPU. The real cuda-python calls it; a launch of kernel NAME runs
// host_NAME of the library that STAND_IN_KERNELS names (kernels/host.h, built with g++). Device memory is the
// machine's own.
//
// Strict where a driver is strict: a stream's work waits until somebody waits for it (so that memory reused too early
// is seen), new memory holds NaN, a pointer outside live memory is refused, a thread needs a context, and what may not
// happen in a capture fails. A function that is not here says so on stderr and returns CUDA_ERROR_NOT_SUPPORTED.
//
// STAND_IN_CAPABILITY=9.0    compute capability, 0 for no GPU     STAND_IN_MEMORY_BYTES=…   what the device has
// STAND_IN_EAGER=1           work is done at once: for code that reads device memory behind the stream's back
#include "stand_in_device.h"

// The driver's functions, under the names by which cuGetProcAddress is asked

static const char* error_name(Result error) {
  static const std::map<Result, const char*> names = {
      {SUCCESS, "CUDA_SUCCESS"}, {INVALID_VALUE, "CUDA_ERROR_INVALID_VALUE"},
      {OUT_OF_MEMORY, "CUDA_ERROR_OUT_OF_MEMORY"}, {NO_DEVICE, "CUDA_ERROR_NO_DEVICE"},
      {INVALID_CONTEXT, "CUDA_ERROR_INVALID_CONTEXT"}, {INVALID_HANDLE, "CUDA_ERROR_INVALID_HANDLE"},
      {NOT_FOUND, "CUDA_ERROR_NOT_FOUND"}, {NOT_READY, "CUDA_ERROR_NOT_READY"},
      {ILLEGAL_ADDRESS, "CUDA_ERROR_ILLEGAL_ADDRESS"}, {NOT_SUPPORTED, "CUDA_ERROR_NOT_SUPPORTED"},
      {CAPTURE_UNSUPPORTED, "CUDA_ERROR_STREAM_CAPTURE_UNSUPPORTED"},
      {CAPTURE_UNMATCHED, "CUDA_ERROR_STREAM_CAPTURE_UNMATCHED"}};
  auto name = names.find(error);
  return name == names.end() ? "CUDA_ERROR_UNKNOWN" : name->second;
}
static int capability() { return (int)(10 * std::stod(setting("STAND_IN_CAPABILITY", "9.0")) + 0.5); }
static double now_ms() {
  return std::chrono::duration<double, std::milli>(std::chrono::steady_clock::now().time_since_epoch()).count();
}
static Result needs_context() { return current_context ? SUCCESS : INVALID_CONTEXT; }

static const std::map<std::string, void*>& functions();
static Result get_proc_address(const char* name, void** function, int, unsigned long long, int* status);

#define F(name, parameters, ...) \
  {"cu" #name, (void*)(Result (*) parameters)[] parameters -> Result { LOCK; __VA_ARGS__; }}
static const std::map<std::string, void*>& functions() {
  static const std::map<std::string, void*> table = {
      {"cuGetProcAddress", (void*)get_proc_address},
      F(Init, (unsigned), return capability() ? SUCCESS : NO_DEVICE),
      F(DriverGetVersion, (int* version), return *version = 13020, SUCCESS),
      F(GetErrorName, (Result error, const char** name), return *name = error_name(error), SUCCESS),
      F(GetErrorString, (Result error, const char** text), return *text = error_name(error), SUCCESS),

      F(DeviceGetCount, (int* count), return *count = 1, SUCCESS),
      F(DeviceGet, (int* device, int ordinal), return *device = ordinal, ordinal ? 101 : SUCCESS),
      F(DeviceGetName, (char* name, int size, int), return snprintf(name, size, "stand-in"), SUCCESS),
      F(DeviceGetUuid, (char* uuid, int), return memcpy(uuid, "stand-in stand-i", 16), SUCCESS),
      F(DeviceTotalMem, (size_t* bytes, int), return *bytes = memory_bytes(), SUCCESS),
      F(DeviceGetAttribute, (int* value, int attribute, int),
        return *value = attribute == 75 ? capability() / 10 : attribute == 76 ? capability() % 10 : 1, SUCCESS),
      F(DevicePrimaryCtxRetain, (void** context, int), return *context = primary_context, SUCCESS),
      F(DevicePrimaryCtxRelease, (int), return SUCCESS),
      F(CtxGetCurrent, (void** context), return *context = current_context, SUCCESS),
      F(CtxSetCurrent, (void* context), return current_context = context, SUCCESS),
      F(CtxPushCurrent, (void* context), return current_context = context, SUCCESS),
      F(CtxPopCurrent, (void** context), return *context = current_context, current_context = nullptr, SUCCESS),
      F(CtxGetDevice, (int* device), return *device = 0, needs_context()),
      F(CtxGetStreamPriorityRange, (int* least, int* greatest), return *least = 0, *greatest = -5, needs_context()),
      F(CtxSynchronize, (), if (forbidden_now()) return CAPTURE_UNSUPPORTED; finish_all(); return needs_context()),

      F(MemAlloc, (Address* address, size_t bytes),
        if (!current_context) return INVALID_CONTEXT;
        return forbidden_now() ? CAPTURE_UNSUPPORTED : allocate(address, bytes, DEVICE)),
      F(MemFree, (Address address), finish_all(); return address ? release(address, DEVICE) : SUCCESS),
      F(MemAllocAsync, (Address* address, size_t bytes, Stream* stream),
        return of(stream)->capture ? CAPTURE_UNSUPPORTED : allocate(address, bytes, DEVICE)),
      F(MemAllocFromPoolAsync, (Address* address, size_t bytes, void*, Stream* stream),
        return of(stream)->capture ? CAPTURE_UNSUPPORTED : allocate(address, bytes, DEVICE)),
      F(MemFreeAsync, (Address address, Stream* stream),
        if (of(stream)->capture) return CAPTURE_UNSUPPORTED;
        if (!block_of(address, 1, DEVICE)) return INVALID_VALUE;
        finish(of(stream)); return release(address, DEVICE)),
      F(MemHostAlloc, (Address* address, size_t bytes, unsigned),
        return !current_context ? INVALID_CONTEXT : allocate(address, bytes, PINNED)),
      F(MemAllocHost, (Address* address, size_t bytes),
        return !current_context ? INVALID_CONTEXT : allocate(address, bytes, PINNED)),
      F(MemFreeHost, (Address address), finish_all(); return release(address, PINNED)),
      F(MemHostGetDevicePointer, (Address* address, Address host, unsigned), return *address = host, SUCCESS),
      F(MemGetInfo, (size_t* free_bytes, size_t* total),
        *total = memory_bytes(); *free_bytes = *total - live[DEVICE]; return needs_context()),
      F(PointerGetAttribute, (void* value, int attribute, Address address),
        const Block* block = block_of(address, 1); if (!block) return INVALID_VALUE;
        return *(int*)value = attribute == 2 ? (block->kind == DEVICE ? 2 : 1) : 0, SUCCESS),
      F(PointerGetAttributes, (unsigned count, int* attributes, void** values, Address address),
        const Block* block = block_of(address, 1);
        for (unsigned i = 0; i < count; i++)
          *(int*)values[i] = attributes[i] == 2 && block ? (block->kind == DEVICE ? 2 : 1) : 0;
        return SUCCESS),
      F(DeviceGetDefaultMemPool, (void** pool, int), return *pool = memory_pool, SUCCESS),
      F(DeviceGetMemPool, (void** pool, int), return *pool = memory_pool, SUCCESS),
      F(DeviceSetMemPool, (int, void*), return SUCCESS),
      F(MemGetDefaultMemPool, (void** pool, void*, int), return *pool = memory_pool, SUCCESS),
      F(MemGetMemPool, (void** pool, void*, int), return *pool = memory_pool, SUCCESS),
      F(MemPoolCreate, (void** pool, void*), return *pool = memory_pool, SUCCESS),
      F(MemPoolDestroy, (void*), return SUCCESS),
      F(MemPoolSetAttribute, (void*, int, void*), return SUCCESS),
      F(MemPoolGetAttribute, (void*, int, void* value), return *(unsigned long long*)value = 0, SUCCESS),
      F(MemPoolSetAccess, (void*, void*, size_t), return SUCCESS),
      F(MemPoolTrimTo, (void*, size_t), return SUCCESS),

      F(Memcpy, (Address target, Address source, size_t bytes), return copy_now(target, source, bytes)),
      F(MemcpyHtoD, (Address target, Address source, size_t bytes), return copy_now(target, source, bytes)),
      F(MemcpyDtoH, (Address target, Address source, size_t bytes), return copy_now(target, source, bytes)),
      F(MemcpyDtoD, (Address target, Address source, size_t bytes), return copy_now(target, source, bytes)),
      {"cuMemcpyAsync", (void*)copy}, {"cuMemcpyDtoDAsync", (void*)copy}, {"cuMemcpyHtoDAsync", (void*)to_device},
      {"cuMemcpyDtoHAsync", (void*)to_host}, {"cuMemsetD8Async", (void*)fill<unsigned char>},
      {"cuMemsetD16Async", (void*)fill<unsigned short>}, {"cuMemsetD32Async", (void*)fill<unsigned>},

      F(StreamCreateWithPriority, (Stream** stream, unsigned, int),
        return needs_context() ? INVALID_CONTEXT : (streams.push_back(*stream = new Stream()), SUCCESS)),
      F(StreamCreate, (Stream** stream, unsigned),
        return needs_context() ? INVALID_CONTEXT : (streams.push_back(*stream = new Stream()), SUCCESS)),
      F(StreamDestroy, (Stream* stream), finish(stream); std::erase(streams, stream); delete stream; return SUCCESS),
      F(StreamSynchronize, (Stream* stream),
        if (of(stream)->capture) return CAPTURE_UNSUPPORTED; finish(of(stream)); return needs_context()),
      F(StreamQuery, (Stream* stream),
        if (of(stream)->capture) return CAPTURE_UNSUPPORTED;
        bool done = of(stream)->waiting.empty(); finish(of(stream)); return done ? SUCCESS : NOT_READY),
      F(StreamGetCtx, (Stream*, void** context), return *context = primary_context, SUCCESS),
      F(StreamGetFlags, (Stream*, unsigned* flags), return *flags = 1, SUCCESS),
      F(StreamGetPriority, (Stream*, int* priority), return *priority = 0, SUCCESS),
      F(StreamGetDevice, (Stream*, int* device), return *device = 0, SUCCESS),
      F(StreamWaitEvent, (Stream* stream, Event* event, unsigned),
        stream = of(stream);
        if (event->capture) {  // the stream joins it
          stream->capture = event->capture, stream->origin = event->stream->origin, stream->mode = event->stream->mode;
        } else if (event->stream && event->stream != stream) {
          finish(event->stream);
        }
        return SUCCESS),

      F(EventCreate, (Event** event, unsigned),
        return needs_context() ? INVALID_CONTEXT : (*event = new Event(), events++, SUCCESS)),
      F(EventDestroy, (Event* event),
        if (event->stream && !event->capture) finish(event->stream);
        delete event; events--; return SUCCESS),
      F(EventRecord, (Event* event, Stream* stream),
        event->stream = of(stream); event->capture = event->stream->capture; event->ms = -1;
        if (event->capture) return SUCCESS;
        return enqueue(stream, [event] { event->ms = now_ms(), event->stream = nullptr; })),
      F(EventQuery, (Event* event), if (event->capture) return CAPTURE_UNSUPPORTED;
        if (!event->stream) return SUCCESS; finish(event->stream); return NOT_READY),
      F(EventSynchronize, (Event* event), if (event->capture) return CAPTURE_UNSUPPORTED;
        if (event->stream) finish(event->stream); return SUCCESS),
      F(EventElapsedTime, (float* ms, Event* from, Event* to),
        if (from->capture || to->capture) return INVALID_HANDLE;
        if (from->stream || to->stream) return NOT_READY;
        if (from->ms < 0 || to->ms < 0) return INVALID_HANDLE;
        return *ms = (float)(to->ms - from->ms), SUCCESS),

      F(StreamBeginCapture, (Stream* stream, int mode),
        if ((size_t)stream <= 2 || stream->capture) return CAPTURE_UNSUPPORTED;
        stream->capture = new Graph(); stream->origin = stream; stream->mode = mode; return SUCCESS),
      F(StreamEndCapture, (Stream* stream, Graph** graph),
        if (!stream->capture || stream->origin != stream) return CAPTURE_UNMATCHED;
        *graph = stream->capture;
        for (Stream* joined : streams) if (joined->capture == *graph) joined->capture = nullptr;
        return SUCCESS),
      F(StreamIsCapturing, (Stream* stream, int* status), return *status = of(stream)->capture ? 1 : 0, SUCCESS),
      F(StreamGetCaptureInfo, (Stream* stream, int* status, unsigned long long* id, Graph** graph),
        Graph* capture = of(stream)->capture; *status = capture ? 1 : 0;
        if (id) *id = (unsigned long long)capture;
        if (graph) *graph = capture;
        return SUCCESS),
      F(ThreadExchangeStreamCaptureMode, (int*), return SUCCESS),
      F(UserObjectCreate, (UserObject** object, void* content, void (*destroy)(void*), unsigned count, unsigned),
        return *object = new UserObject{content, destroy, count}, SUCCESS),
      F(UserObjectRetain, (UserObject* object, unsigned count), object->count += count; return SUCCESS),
      F(UserObjectRelease, (UserObject* object, unsigned count), object->drop(count); return SUCCESS),
      F(GraphRetainUserObject, (Graph* graph, UserObject* object, unsigned count, unsigned flags),
        graph->kept.insert(graph->kept.end(), count, object);
        if (!(flags & 1)) object->count += count;  // 1: the caller's reference moves
        return SUCCESS),
      F(GraphReleaseUserObject, (Graph* graph, UserObject* object, unsigned count),
        for (; count; count--) {
          auto kept = std::find(graph->kept.begin(), graph->kept.end(), object);
          if (kept == graph->kept.end()) return INVALID_VALUE;
          graph->kept.erase(kept);
          object->drop(1);
        }
        return SUCCESS),
      F(GraphDestroy, (Graph* graph), delete graph; return SUCCESS),
      F(GraphInstantiate, (Graph** executable, Graph* graph), return *executable = new Graph(*graph), SUCCESS),
      F(GraphInstantiateWithParams, (Graph** executable, Graph* graph, unsigned long long* parameters),
        *executable = new Graph(*graph); *(int*)(parameters + 3) = 0; return SUCCESS),  // result_out
      F(GraphExecDestroy, (Graph* executable), finish_all(); delete executable; return SUCCESS),
      F(GraphUpload, (Graph*, Stream*), return SUCCESS),
      F(GraphLaunch, (Graph* executable, Stream* stream),
        return enqueue(stream, [executable] { graph_launches++; for (Work& work : executable->work) work(); })),

      F(LibraryLoadData, (void** given, const void* code), return *given = library, code ? SUCCESS : INVALID_VALUE),
      F(LibraryUnload, (void*), return SUCCESS),
      F(LibraryGetKernel, (Kernel** kernel, void*, const char* name), return find_kernel(kernel, name)),
      F(KernelGetFunction, (Kernel** function, Kernel* kernel), return *function = kernel, SUCCESS),
      {"cuKernelGetParamInfo", (void*)parameter}, {"cuFuncGetParamInfo", (void*)parameter},
      F(KernelGetAttribute, (int* value, int, Kernel*, int), return *value = 0, SUCCESS),
      F(LaunchHostFunc, (Stream* stream, void (*function)(void*), void* data),
        return enqueue(stream, [=] { function(data); })),
      F(LaunchKernel, (Kernel* kernel, unsigned x, unsigned y, unsigned z, unsigned a, unsigned b, unsigned c,
                       unsigned shared_bytes, Stream* stream, void** parameters),
        unsigned grid[] = {x, y, z}, block[] = {a, b, c};
        return launch(kernel, grid, block, shared_bytes, stream, parameters)),
      F(LaunchKernelEx, (const LaunchConfig* config, Kernel* kernel, void** parameters),
        return launch(kernel, config->grid, config->block, config->shared_bytes, config->stream, parameters)),
  };
  return table;
}

// One function for each name that is missing, so that it can tell which it is.
static std::vector<std::string> missing;
template <int I>
static Result say_missing() {
  return fprintf(stderr, "[stand-in] %s is not implemented\n", missing[I].c_str()), NOT_SUPPORTED;
}
template <int... I>
static void* missing_function(int index, std::integer_sequence<int, I...>) {
  static void* const table[] = {(void*)say_missing<I>...};
  return table[index];
}
static Result get_proc_address(const char* name, void** function, int, unsigned long long, int* status) {
  LOCK;
  if (status) *status = 0;
  auto found = functions().find(name);
  if (found != functions().end()) return *function = found->second, SUCCESS;
  size_t index = 0;
  while (index < missing.size() && missing[index] != name) index++;
  if (index == missing.size()) missing.push_back(name);
  if (index >= 1000) return NOT_FOUND;
  *function = missing_function((int)index, std::make_integer_sequence<int, 1000>());
  return SUCCESS;
}

extern "C" {
Result cuGetProcAddress_v2(const char* name, void** function, int version, unsigned long long flags, int* status) {
  return get_proc_address(name, function, version, flags, status);
}
Result cuInit(unsigned) { return capability() ? SUCCESS : NO_DEVICE; }
// NVRTC asks for an undocumented table.
Result cuGetExportTable(const void** table, const void*) { return *table = nullptr, NOT_FOUND; }
// What tests ask.
size_t stand_in_live_bytes(int kind) { return live[kind]; }
size_t stand_in_launches() { return launches; }
size_t stand_in_graph_launches() { return graph_launches; }
size_t stand_in_live_events() { return events; }
}
