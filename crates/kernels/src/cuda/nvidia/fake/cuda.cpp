// A CUDA driver on host memory, for tests of the bindings. Work is put off as on a GPU: a copy happens when somebody waits.
//
// Stricter than a real driver where that finds mistakes: every call wants its thread's context, copies want memory that is
// known, uploads want pinned memory, a launch wants the shared memory that was announced.

#include <stdint.h>
#include <stdlib.h>
#include <string.h>

#include <map>
#include <mutex>
#include <string>
#include <vector>

#ifndef VERSION
#define VERSION 12040
#endif
#ifndef DEVICES
#define DEVICES 1
#endif
#ifndef CAPABILITY
#define CAPABILITY 90
#endif
#ifndef POOLS
#define POOLS 1
#endif
#ifndef MEMORY
#define MEMORY (256ull << 20)
#endif

enum { INVALID_VALUE = 1, OUT_OF_MEMORY = 2, INVALID_DEVICE = 101, INVALID_CONTEXT = 201, INVALID_PTX = 218, NOT_FOUND = 500 };

struct Copy {
    char *to;
    const char *from;
    size_t bytes;
};
struct Module {
    std::string ptx;
};
struct Function {
    std::string name;
    int shared;
};

typedef int (*Hook)(const char *, const uint32_t *, uint32_t, uint32_t, int, void **);

static thread_local void *current;
static int retained, loads;
static char context;
static Hook hook;
static std::vector<Copy> queue;
static size_t done; // copies that have left the queue
static std::map<char *, size_t> live, idle, pinned;

// Does the first so many of all copies that were ever asked for.
static void work_until(size_t count) {
    size_t now = count > done ? count - done : 0;
    for (size_t i = 0; i < now; i++) {
        const Copy &copy = queue[i];
        if (copy.from) {
            memmove(copy.to, copy.from, copy.bytes);
        } else {
            memset(copy.to, 0, copy.bytes);
        }
    }
    queue.erase(queue.begin(), queue.begin() + now);
    done += now;
}

static void work() { work_until(done + queue.size()); }

// The one stream. The fake library finds here how to wait for what was asked for before.
static void (*stream)() = work;

static size_t sum(const std::map<char *, size_t> &pieces) {
    size_t bytes = 0;
    for (auto &piece : pieces) bytes += piece.second;
    return bytes;
}

static bool within(const std::map<char *, size_t> &pieces, const void *start, size_t bytes) {
    auto behind = pieces.upper_bound((char *)start);
    if (behind == pieces.begin()) return false;
    auto piece = std::prev(behind);
    return (char *)start + bytes <= piece->first + piece->second;
}

static std::recursive_mutex mutex;

// One thread at a time, and one that has the context.
#define WANTS_CONTEXT                                   \
    std::lock_guard<std::recursive_mutex> lock(mutex);  \
    if (current != &context || !retained) return INVALID_CONTEXT

extern "C" {

int fake_retained() { return retained; }
int fake_loads() { return loads; }
int fake_live() { return live.size() + pinned.size(); }
void fake_hook(Hook of) { hook = of; }

int cuGetErrorName(int status, const char **text) {
    *text = status == OUT_OF_MEMORY ? "CUDA_ERROR_OUT_OF_MEMORY" : status == INVALID_PTX ? "CUDA_ERROR_INVALID_PTX" : 0;
    return 0;
}
int cuGetErrorString(int status, const char **text) {
    *text = status == OUT_OF_MEMORY ? "out of memory" : 0;
    return 0;
}
int cuInit(unsigned) { return 0; }
int cuDriverGetVersion(int *version) {
    *version = VERSION;
    return 0;
}
int cuDeviceGetCount(int *count) {
    *count = DEVICES;
    return 0;
}
int cuDeviceGet(int *device, int ordinal) {
    *device = ordinal + 40;
    return ordinal < DEVICES ? 0 : INVALID_DEVICE;
}
int cuDeviceGetName(char *name, int bytes, int device) {
    strncpy(name, device == 40 ? "Fake GPU" : "Second fake GPU", bytes);
    return 0;
}
int cuDeviceGetAttribute(int *value, int attribute, int) {
    switch (attribute) {
        case 16: *value = 132; return 0;
        case 75: *value = CAPABILITY / 10; return 0;
        case 76: *value = CAPABILITY % 10; return 0;
        case 97: *value = 227 << 10; return 0;
        case 115: *value = POOLS; return 0;
        default: return INVALID_VALUE;
    }
}
int cuDeviceTotalMem_v2(size_t *bytes, int) {
    *bytes = MEMORY;
    return 0;
}
int cuDeviceGetDefaultMemPool(void **pool, int) {
    *pool = &idle;
    return 0;
}
int cuDevicePrimaryCtxRetain(void **out, int device) {
    if (device < 40) return INVALID_DEVICE;
    retained++;
    *out = &context;
    return 0;
}
int cuDevicePrimaryCtxRelease_v2(int) {
    retained--;
    return 0;
}
int cuCtxSetCurrent(void *to) {
    current = to;
    return 0;
}
int cuStreamCreate(void **out, unsigned) {
    WANTS_CONTEXT;
    *out = &stream;
    return 0;
}
int cuStreamDestroy_v2(void *) { return 0; }
int cuStreamSynchronize(void *of) {
    WANTS_CONTEXT;
    if (of != &stream) return INVALID_VALUE;
    work();
    return 0;
}
// An event is how many copies had been asked for when it was recorded.
int cuEventCreate(void **event, unsigned) {
    *event = new size_t(0);
    return 0;
}
int cuEventDestroy_v2(void *event) {
    delete (size_t *)event;
    return 0;
}
int cuEventRecord(void *event, void *) {
    WANTS_CONTEXT;
    *(size_t *)event = done + queue.size();
    return 0;
}
int cuEventSynchronize(void *event) {
    WANTS_CONTEXT;
    work_until(*(size_t *)event);
    return 0;
}
int cuMemGetInfo_v2(size_t *free, size_t *total) {
    WANTS_CONTEXT;
    *free = MEMORY - sum(live) - sum(idle);
    *total = MEMORY;
    return 0;
}
int cuMemPoolSetAttribute(void *, int attribute, uint64_t *value) {
    return attribute == 4 && *value == UINT64_MAX ? 0 : INVALID_VALUE;
}
int cuMemPoolGetAttribute(void *, int attribute, uint64_t *value) {
    WANTS_CONTEXT;
    if (attribute != 5 && attribute != 7) return INVALID_VALUE;
    *value = sum(live) + (attribute == 5 ? sum(idle) : 0);
    return 0;
}
int cuMemPoolTrimTo(void *, size_t) {
    WANTS_CONTEXT;
    for (auto &piece : idle) free(piece.first);
    idle.clear();
    return 0;
}
#ifndef LACKS_MEM_ALLOC_ASYNC
int cuMemAllocAsync(uint64_t *address, size_t bytes, void *) {
    WANTS_CONTEXT;
    for (auto &piece : idle) {
        if (piece.second != bytes) continue;
        *address = (uint64_t)piece.first;
        live[piece.first] = bytes;
        idle.erase(piece.first);
        return 0;
    }
    if (sum(live) + sum(idle) + bytes > MEMORY) return OUT_OF_MEMORY;
    char *start = (char *)aligned_alloc(256, (bytes + 255) / 256 * 256);
    *address = (uint64_t)start;
    live[start] = bytes;
    return 0;
}
#endif
int cuMemFreeAsync(uint64_t address, void *) {
    WANTS_CONTEXT;
    auto piece = live.find((char *)address);
    if (piece == live.end()) return INVALID_VALUE;
    work();
    idle.insert(*piece);
    live.erase(piece);
    return 0;
}
int cuMemHostAlloc(void **start, size_t bytes, unsigned) {
    WANTS_CONTEXT;
    *start = malloc(bytes);
    pinned[(char *)*start] = bytes;
    return 0;
}
int cuMemFreeHost(void *start) {
    WANTS_CONTEXT;
    if (!pinned.erase((char *)start)) return INVALID_VALUE;
    free(start);
    return 0;
}
int cuMemcpyHtoDAsync_v2(uint64_t to, const void *from, size_t bytes, void *) {
    WANTS_CONTEXT;
    if (!within(live, (void *)to, bytes) || !within(pinned, from, bytes)) return INVALID_VALUE;
    queue.push_back({(char *)to, (const char *)from, bytes});
    return 0;
}
int cuMemcpyDtoHAsync_v2(void *to, uint64_t from, size_t bytes, void *) {
    WANTS_CONTEXT;
    if (!within(live, (void *)from, bytes)) return INVALID_VALUE;
    queue.push_back({(char *)to, (const char *)from, bytes});
    return 0;
}
int cuMemsetD8Async(uint64_t at, unsigned char value, size_t bytes, void *) {
    WANTS_CONTEXT;
    if (!within(live, (void *)at, bytes) || value) return INVALID_VALUE;
    queue.push_back({(char *)at, 0, bytes});
    return 0;
}
int cuModuleLoadDataEx(void **module, const void *image, unsigned options, int *names, void **values) {
    WANTS_CONTEXT;
    loads++;
    std::string ptx = (const char *)image;
    if (ptx.find("BROKEN") == std::string::npos) {
        *module = new Module{ptx};
        return 0;
    }
    for (unsigned option = 0; option < options; option++) {
        if (names[option] != 5) continue;
        size_t bytes = 0;
        for (unsigned other = 0; other < options; other++) {
            if (names[other] == 6) bytes = (size_t)values[other];
        }
        strncpy((char *)values[option], "ptxas fatal : line 3: BROKEN is no instruction\n", bytes);
    }
    return INVALID_PTX;
}
int cuModuleUnload(void *module) {
    delete (Module *)module;
    loads--;
    return 0;
}
int cuModuleGetFunction(void **function, void *module, const char *name) {
    WANTS_CONTEXT;
    if (((Module *)module)->ptx.find(std::string(".entry ") + name + "(") == std::string::npos) return NOT_FOUND;
    *function = new Function{name, 0};
    return 0;
}
int cuFuncSetAttribute(void *function, int attribute, int value) {
    WANTS_CONTEXT;
    if (attribute != 8 || value > 227 << 10) return INVALID_VALUE;
    ((Function *)function)->shared = value;
    return 0;
}
int cuLaunchKernel(void *function, unsigned x, unsigned y, unsigned z, unsigned threads, unsigned, unsigned, unsigned shared,
                   void *on, void **arguments, void **extra) {
    WANTS_CONTEXT;
    Function *of = (Function *)function;
    if ((int)shared > of->shared || on != &stream || extra) return INVALID_VALUE;
    work();
    uint32_t grid[3] = {x, y, z};
    return hook ? hook(of->name.c_str(), grid, threads, shared, 0, arguments) : 0;
}
}
