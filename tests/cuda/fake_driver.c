// A CUDA driver without a GPU: the functions of libcuda.so.1 that mvsplit_ops/_cuda/gpu.py calls.
//
// Each call writes a line with its arguments to the file that FAKE_CUDA_LOG names. A module must be
// a cubin that contains the requested kernel. The arguments of a launch are read as a real driver
// reads them: as many bytes as the kernel takes according to the cubin. FAKE_CUDA_FAIL names a
// function that fails, FAKE_CUDA_GPU the compute capability of the GPU: "9.0".
#define _GNU_SOURCE
#include <dlfcn.h>
#include <elf.h>
#include <stdarg.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#define API __attribute__((visibility("default"))) int
enum { SUCCESS = 0, INVALID_VALUE = 1, INVALID_IMAGE = 200, NOT_FOUND = 500 };

static __thread void* context[8];  // a stack for each thread
static __thread int depth = -1;

typedef struct {
    unsigned id;
    char pad[4];
    union {
        char bytes[64];
        unsigned cluster[3];
    };
} Attribute;
typedef struct {
    unsigned grid[3], block[3], shared;
    void* stream;
    Attribute* attributes;
    unsigned count;
} Config;
typedef struct {
    char name[64];
    const char* module;
    unsigned bytes;  // of the arguments
} Function;

static int call(const char* function, const char* format, ...) {
    const char *path = getenv("FAKE_CUDA_LOG"), *fails = getenv("FAKE_CUDA_FAIL");
    char line[8192];
    va_list values;
    va_start(values, format);
    vsnprintf(line, sizeof line, format, values);
    va_end(values);
    FILE* log = path ? fopen(path, "a") : NULL;
    if (log) fprintf(log, "%s %s\n", function, line), fclose(log);
    return fails && strcmp(fails, function) == 0 ? 700 : SUCCESS;
}

// Returns the section of a cubin with the name `prefix` + `kernel`, and its size.
static const unsigned char* section(const char* image, const char* prefix, const char* kernel,
                                    uint64_t* size) {
    const Elf64_Ehdr* file = (const void*)image;
    const Elf64_Shdr* table = (const void*)(image + file->e_shoff);
    const char* names = image + table[file->e_shstrndx].sh_offset;
    for (int i = 0; i < file->e_shnum; ++i) {
        const char* name = names + table[i].sh_name;
        size_t n = strlen(prefix);
        if (strncmp(name, prefix, n) || strcmp(name + n, kernel)) continue;
        *size = table[i].sh_size;
        return (const void*)(image + table[i].sh_offset);
    }
    return NULL;
}

// Returns the bytes of a kernel's arguments: attribute 0x19 of .nv.info.<kernel>.
static unsigned argument_bytes(const char* image, const char* kernel) {
    uint64_t size = 0;
    const unsigned char *at = section(image, ".nv.info.", kernel, &size), *end = at + size;
    while (at && at + 4 <= end) {
        unsigned value = at[2] | at[3] << 8;
        if (at[0] == 3 && at[1] == 0x19) return value;
        at += at[0] == 4 ? 4 + value : 4;  // format 4: `value` bytes follow
    }
    return 0;
}

API cuInit(unsigned flags) { return call("cuInit", "%u", flags); }
API cuDriverGetVersion(int* version) { return *version = 12040, SUCCESS; }
API cuDeviceGet(int* device, int index) {
    return *device = 70 + index, call("cuDeviceGet", "%d", index);
}
API cuDeviceGetAttribute(int* value, int attribute, int device) {
    const char* gpu = getenv("FAKE_CUDA_GPU");
    int major = gpu ? atoi(gpu) : 9, minor = gpu ? atoi(strchr(gpu, '.') + 1) : 0;
    switch (attribute) {
        case 75:
            *value = major;
            break;
        case 76:
            *value = minor;
            break;
        case 81:
            *value = 228 << 10;
            break;  // shared memory of an SM
        case 97:
            *value = 227 << 10;
            break;  // of a block
        case 120:
            *value = major >= 9;
            break;  // clusters
        default:
            return INVALID_VALUE;
    }
    return call("cuDeviceGetAttribute", "%d %d", attribute, device);
}
API cuDevicePrimaryCtxRetain(void** c, int device) {
    *c = (void*)(intptr_t)(0xc0de00 + device);
    return call("cuDevicePrimaryCtxRetain", "%d", device);
}
API cuCtxGetCurrent(void** c) { return *c = depth < 0 ? NULL : context[depth], SUCCESS; }
API cuCtxPushCurrent_v2(void* c) { return context[++depth] = c, call("cuCtxPushCurrent", "%p", c); }
API cuCtxPopCurrent_v2(void** c) {
    *c = context[depth--];
    return call("cuCtxPopCurrent", "%p", *c);
}
API cuCtxSetCurrent(void* c) { return depth = c ? 0 : -1, context[0] = c, SUCCESS; }
API cuModuleLoadData(void** module, const char* image) {
    const Elf64_Ehdr* file = (const void*)image;
    if (memcmp(image, ELFMAG, 4)) return INVALID_IMAGE;
    size_t size = file->e_shoff + file->e_shnum * sizeof(Elf64_Shdr);
    size_t last = file->e_phoff + file->e_phnum * sizeof(Elf64_Phdr);
    size = last > size ? last : size;
    *module = memcpy(malloc(size), image, size);
    return call("cuModuleLoadData", "%zu", size);
}
API cuModuleGetFunction(Function** function, const char* module, const char* name) {
    uint64_t size;
    if (!section(module, ".text.", name, &size)) return NOT_FOUND;
    *function = calloc(1, sizeof **function);
    snprintf((*function)->name, sizeof(*function)->name, "%s", name);
    (*function)->bytes = argument_bytes(module, name);
    return call("cuModuleGetFunction", "%s", name);
}
API cuFuncGetAttribute(int* value, int attribute, Function* f) {
    return *value = 0, call("cuFuncGetAttribute", "%s %d", f->name, attribute);
}
API cuFuncSetAttribute(Function* f, int attribute, int value) {
    return call("cuFuncSetAttribute", "%s %d %d", f->name, attribute, value);
}

static int launch(const char* function, const Config* c, const Function* f, const char* bytes) {
    char text[2048] = "", *end = text;
    for (unsigned i = 0; i < c->count; ++i)
        end +=
            sprintf(end, " attribute=%u:%u,%u,%u", c->attributes[i].id, c->attributes[i].cluster[0],
                    c->attributes[i].cluster[1], c->attributes[i].cluster[2]);
    return call(function, "%s grid=%u,%u,%u block=%u,%u,%u shared=%u stream=%p context=%p%s%s",
                f->name, c->grid[0], c->grid[1], c->grid[2], c->block[0], c->block[1], c->block[2],
                c->shared, c->stream, depth < 0 ? NULL : context[depth], text, bytes);
}
API cuOccupancyMaxActiveClusters(int* clusters, Function* f, const Config* config) {
    // Like an H200 with disabled multiprocessors: no room for a cluster of 16 blocks.
    *clusters = config->attributes->cluster[0] > 8 ? 0 : 3;
    return launch("cuOccupancyMaxActiveClusters", config, f, "");
}
API cuLaunchKernelEx(const Config* config, Function* f, void** arguments, void** extra) {
    if (depth < 0) return 201;  // CUDA_ERROR_INVALID_CONTEXT
    char bytes[8192] = " arguments=", *end = bytes + strlen(bytes);
    for (unsigned i = 0; i < f->bytes && i < 3500; ++i)
        end += sprintf(end, "%02x", ((unsigned char*)arguments[0])[i]);
    return extra ? INVALID_VALUE : launch("cuLaunchKernelEx", config, f, bytes);
}

API cuGetErrorName(int error, const char** text) {
    return *text = error == 700 ? "CUDA_ERROR_ILLEGAL_ADDRESS" : "CUDA_ERROR_OTHER", SUCCESS;
}
API cuGetErrorString(int error, const char** text) {
    return *text = error == 700 ? "an illegal memory access was encountered" : "another error",
           SUCCESS;
}

// NVRTC asks here for the driver's own cache of compiled kernels, which does not exist.
API cuGetExportTable(const void** table, const void* id) { return *table = NULL, INVALID_VALUE; }

// cuda-python finds all other functions through this one.
API cuGetProcAddress_v2(const char* name, void** function, int version, uint64_t flags,
                        int* found) {
    char second[128];
    snprintf(second, sizeof second, "%s_v2", name);
    *function = dlsym(RTLD_DEFAULT, second);
    if (!*function || strcmp(name, "cuGetProcAddress") == 0) *function = dlsym(RTLD_DEFAULT, name);
    if (found) *found = *function ? 0 : 1;
    return *function ? SUCCESS : NOT_FOUND;
}
API cuGetProcAddress(const char* name, void** function, int version, uint64_t flags) {
    return cuGetProcAddress_v2(name, function, version, flags, NULL);
}
