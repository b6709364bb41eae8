// The kernels of kernels/iw_nll.cuh on a CPU, thread for thread: each thread of a block is a coroutine that runs until
// the block's next barrier or exchange within a warp. The binding and its launches are those of kernels/iw_nll.cu.
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <ucontext.h>

#include <algorithm>
#include <cstdint>
#include <functional>
#include <vector>

#undef __launch_bounds__
#define __launch_bounds__(...)
#undef __shared__
#define __shared__ static  // a block runs alone

using std::min;

static struct { unsigned x; } threadIdx, blockIdx;
static ucontext_t scheduler;
static std::vector<ucontext_t> threads;
static std::vector<bool> ended;
static std::function<void()> body;

static void __syncthreads() { swapcontext(&threads[threadIdx.x], &scheduler); }

static float __shfl_xor_sync(unsigned, float value, int mask) {
    static float values[1024];
    values[threadIdx.x] = value;
    __syncthreads();
    const float other = values[threadIdx.x ^ mask];
    __syncthreads();
    return other;
}

static void run_thread() {
    body();
    ended[threadIdx.x] = true;
}

template <typename... P, typename... A>
void launch(void (*kernel)(P...), int64_t blocks, int count, uintptr_t, A... arguments) {
    std::vector<std::vector<char>> stacks(count, std::vector<char>(1 << 16));
    body = [&] { kernel(arguments...); };
    for (blockIdx.x = 0; blockIdx.x < blocks; blockIdx.x++) {
        threads.resize(count);
        ended.assign(count, false);
        for (int i = 0; i < count; i++) {
            getcontext(&threads[i]);
            threads[i].uc_stack.ss_sp = stacks[i].data();
            threads[i].uc_stack.ss_size = stacks[i].size();
            threads[i].uc_link = &scheduler;
            makecontext(&threads[i], run_thread, 0);
        }
        while (std::find(ended.begin(), ended.end(), false) != ended.end())
            for (threadIdx.x = 0; int(threadIdx.x) < count; threadIdx.x++)
                if (!ended[threadIdx.x]) swapcontext(&scheduler, &threads[threadIdx.x]);
    }
}

#include "../kernels/iw_nll.cu"
