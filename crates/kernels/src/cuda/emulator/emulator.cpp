// The emulator's scheduler: a block's threads as fibers on one system thread.

#include <map>

typedef unsigned char u8;
#include "emulator.hpp"

#include <sys/mman.h>
#if !defined(__x86_64__)
#include <ucontext.h>
#endif

namespace emulator {

thread_local Block* the_block;

static std::map<std::string, Entry>& entries() {
    static std::map<std::string, Entry> map;
    return map;
}

Registered::Registered(const char* name, Entry entry) {
    entries()[name] = entry;
}

// Not a power of two: the tops of all stacks would lie in the same few sets of the processor's cache.
constexpr size_t STACK = (128 << 10) + 67 * 64;
constexpr size_t MOST_THREADS = 1024;

#if defined(__x86_64__)
// Keeps the caller's registers on its stack, notes where in *from, and goes on at `to`.
extern "C" void emulator_switch(void** from, void* to);
asm(R"(
.text
.globl emulator_switch
.hidden emulator_switch
emulator_switch:
    pushq %rbp
    pushq %rbx
    pushq %r12
    pushq %r13
    pushq %r14
    pushq %r15
    movq %rsp, (%rdi)
    movq %rsi, %rsp
    popq %r15
    popq %r14
    popq %r13
    popq %r12
    popq %rbx
    popq %rbp
    ret
)");

static void* fresh(char* stack, void (*start)()) {
    void** top = reinterpret_cast<void**>(stack + STACK) - 2;
    *top = reinterpret_cast<void*>(start);
    // Six registers, and an alignment as at the start of a function.
    return top - 6;
}
#else
struct Context {
    ucontext_t context;
};
static thread_local std::vector<Context> contexts(MOST_THREADS + 1);
static void emulator_switch(void** from, void* to) {
    swapcontext(static_cast<ucontext_t*>(*from), static_cast<ucontext_t*>(to));
}
#endif

static void leave() {
    Block& b = block();
#if defined(__x86_64__)
    emulator_switch(&b.current->stack_pointer, b.scheduler_stack_pointer);
#else
    void* own = b.current->stack_pointer;
    emulator_switch(&own, b.scheduler_stack_pointer);
#endif
}

void meet_block() {
    block().current->waits_for = 1;
    leave();
}

void meet_warp() {
    block().current->waits_for = 2;
    leave();
}

static void run() {
    block().body(block().argument);
    block().current->done = true;
    leave();
    std::abort();
}

static char* stacks() {
    static thread_local char* memory = nullptr;
    if (!memory) {
        void* found = mmap(nullptr, STACK * MOST_THREADS, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
        if (found == MAP_FAILED) std::abort();
        memory = static_cast<char*>(found);
    }
    return memory;
}

constexpr size_t PAGE = 4096;

static size_t whole_pages(size_t bytes) {
    return (bytes + PAGE - 1) / PAGE * PAGE;
}

// Memory of `bytes` bytes, a multiple of 128, that ends where a page begins which cannot be touched.
static char* fenced(size_t bytes) {
    size_t whole = whole_pages(bytes);
    void* found = mmap(nullptr, whole + 2 * PAGE, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (found == MAP_FAILED) return nullptr;
    char* start = static_cast<char*>(found);
    mprotect(start, PAGE, PROT_NONE);
    mprotect(start + PAGE + whole, PAGE, PROT_NONE);
    return start + PAGE + whole - bytes;
}

static void unfence(char* memory, size_t bytes) {
    size_t whole = whole_pages(bytes);
    munmap(memory + bytes - whole - PAGE, whole + 2 * PAGE);
}

static void go_on(Block& b, Thread& thread) {
    b.current = &thread;
#if defined(__x86_64__)
    emulator_switch(&b.scheduler_stack_pointer, thread.stack_pointer);
#else
    void* own = b.scheduler_stack_pointer;
    emulator_switch(&own, thread.stack_pointer);
#endif
}

// Runs a warp's threads until each is done or waits for its block; false where some wait for their warp and others never
// come: a warp meets whole or not at all.
static bool run_warp(Block& b, Thread* lanes, bool backwards) {
    for (;;) {
        unsigned meeting = 0, resting = 0;
        for (unsigned i = 0; i < 32; i++) {
            Thread& thread = lanes[backwards ? 31 - i : i];
            if (!thread.done && thread.waits_for != 1) {
                thread.waits_for = 0;
                go_on(b, thread);
            }
            if (thread.done || thread.waits_for == 1) resting++;
            else meeting++;
        }
        if (resting == 32) return true;
        if (meeting != 32) return false;
    }
}

// Runs all threads of a block; threads that are done do not keep it waiting, as on a GPU.
static bool run_threads(Block& b, bool backwards) {
    size_t warps = b.warps.size();
    for (;;) {
        bool waiting = false;
        for (size_t w = 0; w < warps; w++) {
            Thread* lanes = &b.threads[32 * (backwards ? warps - 1 - w : w)];
            if (!run_warp(b, lanes, backwards)) return false;
            for (unsigned lane = 0; lane < 32; lane++) waiting |= !lanes[lane].done;
        }
        if (!waiting) return true;
        for (Thread& thread : b.threads) thread.waits_for = 0;
    }
}

static bool run_block(Block& b, bool backwards) {
    char* memory = stacks();
    for (size_t i = 0; i < b.threads.size(); i++) {
        Thread& thread = b.threads[i];
        thread.done = false;
        thread.waits_for = 0;
        thread.meetings = 0;
        thread.copies.resize(1);
        thread.copies[0].clear();
#if defined(__x86_64__)
        thread.stack_pointer = fresh(memory + i * STACK, &run);
#else
        ucontext_t& context = contexts[i].context;
        getcontext(&context);
        context.uc_stack.ss_sp = memory + i * STACK;
        context.uc_stack.ss_size = STACK;
        context.uc_link = nullptr;
        makecontext(&context, &run, 0);
        thread.stack_pointer = &context;
#endif
    }
    return run_threads(b, backwards);
}

}  // namespace emulator

using namespace emulator;

// 0; 1 for an unknown kernel; 2 for a block that is no whole number of warps; 3 where some threads wait at one meeting and
// others at another, or are done.
extern "C" int emulate(const char* name, const unsigned* grid, unsigned threads, unsigned shared_bytes, int backwards, void** arguments) {
    auto found = entries().find(name);
    if (found == entries().end()) return 1;
    if (threads == 0 || threads % 32 || threads > MOST_THREADS) return 2;
    static thread_local Block own;
    the_block = &own;
    Block& b = own;
    b.grid = {grid[0], grid[1], grid[2]};
    b.size = {threads, 1, 1};
    b.threads.resize(threads);
    b.warps.resize(threads / 32);
    for (unsigned i = 0; i < threads; i++) {
        b.threads[i].index = {i, 0, 0};
        b.threads[i].lane = i % 32;
        b.threads[i].warp = i / 32;
    }
    size_t shared_whole = (shared_bytes + 127) / 128 * 128;
    char* shared = fenced(shared_whole);
    if (!shared) std::abort();
    struct Call {
        Entry entry;
        void** arguments;
    } call_ = {found->second, arguments};
    b.argument = &call_;
    b.body = [](void* argument) {
        Call* call = static_cast<Call*>(argument);
        call->entry(call->arguments);
    };
#if !defined(__x86_64__)
    b.scheduler_stack_pointer = &contexts[MOST_THREADS].context;
#endif
    for (unsigned z = 0; z < grid[2]; z++)
        for (unsigned y = 0; y < grid[1]; y++)
            for (unsigned x = 0; x < grid[0]; x++) {
                b.index = {x, y, z};
                std::memset(shared, 0xff, shared_whole);
                b.dynamic_shared = reinterpret_cast<u8*>(shared);
                if (!run_block(b, backwards)) {
                    unfence(shared, shared_whole);
                    return 3;
                }
            }
    unfence(shared, shared_whole);
    return 0;
}

// Memory of the emulated GPU: `bytes` is a multiple of 256. Nothing before or behind it can be touched, beside the rest of its
// first page.
extern "C" void* emulator_allocate(size_t bytes) {
    char* memory = fenced(bytes);
    if (memory) std::memset(memory, 0xff, bytes);
    return memory;
}

extern "C" void emulator_free(void* memory, size_t bytes) {
    unfence(static_cast<char*>(memory), bytes);
}
