// Launches the kernels of iw_nll.cuh. cuda.py builds this file on first use, and calls it with tensors' addresses:
// torch's headers would take most of the build's time.
#include <pybind11/pybind11.h>

#include <stdexcept>
#include <tuple>

#include "iw_nll.cuh"

using namespace iw_nll;

#ifdef __CUDACC__
template <typename... P, typename... A>
void launch(void (*kernel)(P...), int64_t blocks, int threads, uintptr_t stream, A... arguments) {
    if (!blocks) return;
    kernel<<<blocks, threads, 0, reinterpret_cast<cudaStream_t>(stream)>>>(arguments...);
    if (const cudaError_t error = cudaGetLastError()) throw std::runtime_error(cudaGetErrorString(error));
}
#endif

struct Call {
    uintptr_t x, mean;
    bool x_is_uint8;  // else float32
    int mean_type;    // 0: float32, 1: bfloat16, 2: float16
    int64_t x_stride, mean_stride_b, mean_stride_k, b;
    int k, d;
    bool logits;
    uintptr_t stream;
};
using Fields = std::tuple<uintptr_t, uintptr_t, bool, int, int64_t, int64_t, int64_t, int64_t, int, int, bool,
                          uintptr_t>;

Call call_of(const Fields& fields) {
    return std::apply([](auto... field) { return Call{field...}; }, fields);
}

// Calls f with the images as their types are, and as `V` the values of a 16-byte load of the means, or 1 where d or an
// address does not allow it.
template <typename X, typename T, typename F>
void with_width(const Call& call, F f) {
    constexpr int V = 16 / sizeof(T);
    const Images<X, T> images{reinterpret_cast<const X*>(call.x), reinterpret_cast<const T*>(call.mean), call.x_stride,
                              call.mean_stride_b, call.mean_stride_k, call.k, call.d, call.logits};
    const uintptr_t of_means = call.mean | (call.mean_stride_b | call.mean_stride_k) * sizeof(T);
    const uintptr_t of_x = call.x | call.x_stride * sizeof(X);
    if (of_means % alignof(Pack<T, V>) || of_x % alignof(Pack<X, V>) || call.d % V)
        f(images, std::integral_constant<int, 1>());
    else
        f(images, std::integral_constant<int, V>());
}

template <typename F>
void with_types(const Call& call, F f) {
    const auto with_pixels = [&](auto pixel) {
        if (call.mean_type == 0) with_width<decltype(pixel), float>(call, f);
        else if (call.mean_type == 1) with_width<decltype(pixel), __nv_bfloat16>(call, f);
        else with_width<decltype(pixel), __half>(call, f);
    };
    call.x_is_uint8 ? with_pixels(uint8_t()) : with_pixels(float());
}

template <int V, int S, typename X, typename T, typename... A>
void launch_forward(const Call& call, Images<X, T> images, int blocks, A... arguments) {
    launch(forward<X, T, V, S>, call.b * blocks, THREADS, call.stream, images, arguments..., blocks);
}

float* floats(uintptr_t address) { return reinterpret_cast<float*>(address); }

void run_forward(const Fields& fields, uintptr_t log_ratio, uintptr_t log_gamma, uintptr_t squared_error,
                 uintptr_t nll_of_blocks, uintptr_t nll, int blocks) {
    const Call call = call_of(fields);
    with_types(call, [&](auto images, auto width) {
        const auto run = [&](auto samples) {
            launch_forward<width, samples>(call, images, blocks, floats(log_ratio), floats(log_gamma),
                                           floats(squared_error), floats(nll_of_blocks));
        };
        if (width > 1 && call.k > 1) run(std::integral_constant<int, (width > 1 ? LOADS : 1)>());
        else run(std::integral_constant<int, 1>());
    });
    if (blocks > 1) launch(combine, call.b, 32, call.stream, floats(nll_of_blocks), floats(nll), blocks);
}

template <int V, typename X, typename T>
void launch_backward(const Call& call, Images<X, T> images, uintptr_t grad_squared_error, uintptr_t grad_mean) {
    const int64_t across = (call.d + THREADS * V - 1) / (THREADS * V), tiles = (call.k + LOADS - 1) / LOADS;
    launch(backward<X, T, V>, call.b * tiles * across, THREADS, call.stream, images, floats(grad_squared_error),
           reinterpret_cast<T*>(grad_mean));
}

void run_backward(const Fields& fields, uintptr_t grad_squared_error, uintptr_t grad_mean) {
    const Call call = call_of(fields);
    with_types(call, [&](auto images, auto width) {
        launch_backward<width>(call, images, grad_squared_error, grad_mean);
    });
}

PYBIND11_MODULE(TORCH_EXTENSION_NAME, module) {
    module.def("forward", run_forward);
    module.def("backward", run_backward);
}
