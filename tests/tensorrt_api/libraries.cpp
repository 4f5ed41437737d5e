// The C functions of NVIDIA's libraries that TensorRT's Python module is linked against. It asks for them when it is
// imported and calls them when something is built or run, which nothing here does.

#define NOTHING(name) \
    extern "C" void* name() { return nullptr; }

NOTHING(createInferBuilder_INTERNAL)
NOTHING(createInferRefitter_INTERNAL)
NOTHING(createInferRuntime_INTERNAL)
NOTHING(createNvOnnxParser_INTERNAL)
NOTHING(createNvOnnxParserRefitter_INTERNAL)
NOTHING(getBuilderPluginRegistry)
NOTHING(getNvOnnxParserVersion)
NOTHING(getPluginRegistry)
NOTHING(initLibNvInferPlugins)
