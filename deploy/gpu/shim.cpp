// What the node needs of a CUDA libtorch and tch's C interface lacks: CUDA graphs, free memory, and giving memory back.
//
// `deploy/gpu/build-shim` compiles it against the libtorch at hand; services/node/src/engine/torch/shim.rs opens it. Every
// function returns 0, or 1 with a message of at most `room` bytes in `error`, its end included. No exception leaves it.
// One thread of a process calls it.

#include <ATen/Context.h>
#include <ATen/core/CachingHostAllocator.h>
#include <ATen/cuda/CUDAGraph.h>
#include <c10/cuda/CUDACachingAllocator.h>
#include <c10/cuda/CUDAException.h>
#include <c10/cuda/CUDAFunctions.h>
#include <c10/cuda/CUDAGuard.h>
#include <c10/cuda/CUDAStream.h>
#include <c10/util/Exception.h>

#include <cstdint>
#include <cstring>
#include <exception>
#include <memory>
#include <optional>

// ATen/cuda/CUDAContextLight.h has it, whose other includes want all of CUDA's libraries.
namespace at::cuda {
TORCH_CUDA_CPP_API void clearCublasWorkspaces();
}

namespace {

struct Capture : at::cuda::CUDAGraph {
    // From then on its end gives the pool back.
    bool has_ended() const { return capture_ended_; }
};

struct Graph {
    explicit Graph(c10::DeviceIndex device) : device(device) {}
    c10::DeviceIndex device;
    at::cuda::MempoolId_t pool{0, 0};
    Capture graph;
    // While the graph is recorded: its stream is this thread's current one.
    std::optional<c10::cuda::CUDAStreamGuard> stream;
    bool recorded = false;
};

// All graphs take their memory from one pool: their outputs are read before another one is replayed. A pool ends with
// its last graph, so the first graph makes a new one.
at::cuda::MempoolId_t pool;
int graphs = 0;
// All are recorded on one stream: cuBLAS keeps a workspace for each stream that it has seen.
std::optional<c10::cuda::CUDAStream> recorder;

c10::cuda::CUDAStream recorder_of(c10::DeviceIndex device) {
    if (!recorder || recorder->device_index() != device) recorder = c10::cuda::getStreamFromPool(false, device);
    return *recorder;
}

void tell(const char *text, char *error, size_t room) {
    if (room == 0) return;
    std::strncpy(error, text, room - 1);
    error[room - 1] = 0;
}

template <typename Work> int guarded(char *error, size_t room, const Work &work) noexcept {
    try {
        work();
        return 0;
    } catch (const c10::Error &e) {
        tell(e.what_without_backtrace(), error, room);
    } catch (const std::exception &e) {
        tell(e.what(), error, room);
    } catch (...) {
        tell("unknown exception", error, room);
    }
    return 1;
}

// Where a capture fails, libtorch leaves its allocators as if it went on: all later captures into this pool would fail, and
// it would never be given back. `begun`: the pool was taken for certain; otherwise it was if the allocator still records.
void abandon(const Graph &made, bool begun) noexcept {
    const auto give_back = [&](const auto &end, const auto &release) {
        char ignored[1];
        const bool recorded = guarded(ignored, 0, end) == 0;
        if ((begun || recorded) && !made.graph.has_ended()) guarded(ignored, 0, release);
    };
    give_back([&] { c10::cuda::CUDACachingAllocator::endAllocateToPool(made.device, made.pool); },
              [&] { c10::cuda::CUDACachingAllocator::releasePool(made.device, made.pool); });
    give_back([&] { at::getHostAllocator(at::kCUDA)->end_allocate_to_pool(made.pool); },
              [&] { at::getHostAllocator(at::kCUDA)->release_pool(made.pool); });
}

} // namespace

extern "C" {

__attribute__((visibility("default"))) int infera_cuda_abi(void) { return 1; }

// Products of bf16 are summed in f32 to the end: libtorch allows partial sums in bf16 if nobody objects.
__attribute__((visibility("default"))) int infera_cuda_setup(int device, char *error, size_t room) {
    return guarded(error, room, [&] {
        (void)device;
        at::globalContext().setAllowBF16ReductionCuBLAS(false);
    });
}

// Bytes that the device has free, and all; what this process's allocator keeps for later counts as taken.
__attribute__((visibility("default"))) int infera_cuda_memory(int device, uint64_t *free, uint64_t *all, char *error, size_t room) {
    return guarded(error, room, [&] {
        c10::cuda::CUDAGuard guard(static_cast<c10::DeviceIndex>(device));
        size_t f = 0, a = 0;
        C10_CUDA_CHECK(cudaMemGetInfo(&f, &a));
        *free = f;
        *all = a;
    });
}

// Waits for all work, then gives what the allocators and cuBLAS keep back to the driver. The context stays, as long as the
// process: some hundred MiB that only its end frees.
__attribute__((visibility("default"))) int infera_cuda_release(int device, char *error, size_t room) {
    return guarded(error, room, [&] {
        c10::cuda::CUDAGuard guard(static_cast<c10::DeviceIndex>(device));
        c10::cuda::device_synchronize();
        at::cuda::clearCublasWorkspaces();
        c10::cuda::CUDACachingAllocator::emptyCache();
        at::getHostAllocator(at::kCUDA)->empty_cache();
    });
}

// Begins to record what this thread launches, on a stream of its own, after all earlier work.
__attribute__((visibility("default"))) int infera_graph_begin(int device, void **graph, char *error, size_t room) {
    return guarded(error, room, [&] {
        const auto index = static_cast<c10::DeviceIndex>(device);
        // Outlives the graph's guard of its stream, which goes back to the device that it found.
        c10::cuda::CUDAGuard guard(index);
        auto made = std::make_unique<Graph>(index);
        c10::cuda::device_synchronize();
        made->stream.emplace(recorder_of(index));
        if (graphs == 0) pool = at::cuda::graph_pool_handle();
        made->pool = pool;
        try {
            // Other threads of the process may call CUDA meanwhile: it is no part of the graph.
            made->graph.capture_begin(pool, cudaStreamCaptureModeThreadLocal);
        } catch (...) {
            abandon(*made, false);
            throw;
        }
        ++graphs;
        *graph = made.release();
    });
}

// Ends the recording; what was recorded was not computed.
__attribute__((visibility("default"))) int infera_graph_end(void *graph, char *error, size_t room) {
    auto *made = static_cast<Graph *>(graph);
    int failed = guarded(error, room, [&] {
        c10::cuda::CUDAGuard guard(made->device);
        made->recorded = true;
        made->graph.capture_end();
    });
    if (failed) abandon(*made, true);
    char ignored[1];
    failed |= guarded(failed ? ignored : error, failed ? 0 : room, [&] {
        c10::cuda::CUDAGuard guard(made->device);
        made->stream.reset();
    });
    return failed;
}

// Launches the graph on the current stream.
__attribute__((visibility("default"))) int infera_graph_replay(void *graph, char *error, size_t room) {
    return guarded(error, room, [&] {
        auto *made = static_cast<Graph *>(graph);
        c10::cuda::CUDAGuard guard(made->device);
        made->graph.replay();
    });
}

// Ends a recording that still goes on, and frees the graph and its memory.
__attribute__((visibility("default"))) void infera_graph_free(void *graph) {
    char ignored[1];
    auto *made = static_cast<Graph *>(graph);
    if (!made->recorded) infera_graph_end(graph, ignored, 0);
    guarded(ignored, 0, [&] {
        c10::cuda::CUDAGuard guard(made->device);
        // A graph's memory may be in use by work that was launched.
        c10::cuda::device_synchronize();
        delete made;
    });
    --graphs;
}
}
