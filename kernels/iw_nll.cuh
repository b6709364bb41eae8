// The importance-weighted NLL of images, from uint8 pixels and the decoder's output for K samples of each, in one pass
// over that output, and the gradient by it. The mathematics are those of the Triton kernels in iw_nll.py.
//
// Nothing here needs torch. iw_nll.cu binds it; tests/emulated.cpp runs it on a CPU.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>
#include <cuda_bf16.h>
#include <cuda_fp16.h>

namespace iw_nll {

constexpr int THREADS = 128, WARPS = THREADS / 32;
constexpr int LOADS = 4;  // 16-byte loads that a thread has in flight
constexpr float LOG_2PI = 1.8378770664093453f;

template <typename X, typename T>
struct Images {
    const X* x;     // [B, d] pixels, uint8 (divided by 255) or float
    const T* mean;  // [B, K, d] means or logits
    int64_t x_stride, mean_stride_b, mean_stride_k;
    int k, d;
    bool logits;
};

template <typename T, int V>
struct alignas(V * sizeof(T) < 16 ? V * sizeof(T) : 16) Pack {  // what one thread loads at once
    T value[V];
};

template <int V, typename T>
__device__ __forceinline__ Pack<T, V> load(const T* from) {
    return *reinterpret_cast<const Pack<T, V>*>(from);
}

// torch's flags for nvcc take the conversion operators away
__device__ __forceinline__ float number(float value) { return value; }
__device__ __forceinline__ float number(__half value) { return __half2float(value); }
__device__ __forceinline__ float number(__nv_bfloat16 value) { return __bfloat162float(value); }
__device__ __forceinline__ void assign(float& to, float value) { to = value; }
__device__ __forceinline__ void assign(__half& to, float value) { to = __float2half_rn(value); }
__device__ __forceinline__ void assign(__nv_bfloat16& to, float value) { to = __float2bfloat16_rn(value); }

__device__ __forceinline__ float pixel(float value) { return value; }
__device__ __forceinline__ float pixel(uint8_t value) {
    const uint32_t bits = 0x4b000000 | value;  // 2^23 + value: conversions run in the unit that the sigmoids fill
    float shifted;
    memcpy(&shifted, &bits, sizeof(shifted));
    return (shifted - 8388608) * (1 / 255.0f);
}

__device__ __forceinline__ float sigmoid(float logit) {
#ifdef __CUDA_ARCH__  // two operations of the special function unit; the exact quotient would bound the kernel
    return __fdividef(1, 1 + __expf(-logit));
#else
    return 1 / (1 + expf(-logit));
#endif
}

struct LogSumExp {
    float maximum = -INFINITY, sum = 0;  // log of (sum times exp(maximum))

    __device__ void add(float value) {
        if (value == maximum) {  // infinities too, whose difference would be NaN
            sum += 1;
        } else if (value > maximum) {
            sum = sum * expf(maximum - value) + 1;
            maximum = value;
        } else {  // NaN too
            sum += expf(value - maximum);
        }
    }

    __device__ float value() const { return maximum + logf(sum); }
};

__device__ __forceinline__ float warp_sum(float value) {
    for (int mask = 16; mask; mask /= 2) value += __shfl_xor_sync(~0u, value, mask);
    return value;
}

__device__ __forceinline__ float warp_maximum(float value) {
    for (int mask = 16; mask; mask /= 2) value = fmaxf(value, __shfl_xor_sync(~0u, value, mask));
    return value;
}

// A block takes S samples of an image at a time, which share its pixels. `blocks` of them share an image.
template <typename X, typename T, int V, int S>
__global__ void __launch_bounds__(THREADS, 8) forward(
    Images<X, T> images,
    const float* log_ratio,  // [B, K] log p(z) - log q(z|x), or null: 0
    const float* log_gamma,  // [] log of the variance
    float* squared_error,    // [B, K] out
    float* nll,              // [B, blocks] out: of the weights of one block alone, divided by K
    int blocks) {
    constexpr int C = S > 1 ? 1 : V > 4 ? 2 : LOADS, STEP = THREADS * V;
    __shared__ float of_warps[2][WARPS][S];  // of two turns, so that one barrier a turn is enough
    const auto [all_x, all_means, x_stride, stride_b, stride_k, n_k, d, logits] = images;
    const int64_t b = blockIdx.x / blocks;
    const X* x = all_x + b * x_stride;
    const float gamma_log = *log_gamma, precision = expf(-gamma_log);
    LogSumExp weights;
    int turn = 0;
    for (int k = blockIdx.x % blocks * S; k < n_k; k += blocks * S, turn ^= 1) {
        const T* mean = all_means + b * stride_b + k * stride_k;
        float total[S] = {};
#pragma unroll 1
        for (int start = threadIdx.x * V; start < d; start += STEP * C) {
            Pack<X, V> pixels[C];
            Pack<T, V> means[C][S];
#pragma unroll
            for (int c = 0; c < C; c++) {  // all loads before the first use
                if (start + c * STEP >= d) continue;
                pixels[c] = load<V>(x + start + c * STEP);
#pragma unroll
                for (int s = 0; s < S; s++)  // the last sample again, in the cache, in place of those beyond it
                    means[c][s] = load<V>(mean + min(s, n_k - 1 - k) * stride_k + start + c * STEP);
            }
#pragma unroll
            for (int c = 0; c < C; c++) {
                if (start + c * STEP >= d) continue;
#pragma unroll
                for (int s = 0; s < S; s++)
#pragma unroll
                    for (int v = 0; v < V; v++) {
                        const float m = number(means[c][s].value[v]);
                        const float difference = pixel(pixels[c].value[v]) - (logits ? sigmoid(m) : m);
                        total[s] += difference * difference;
                    }
            }
        }
#pragma unroll
        for (int s = 0; s < S; s++) {
            const float sum = warp_sum(total[s]);
            if (threadIdx.x % 32 == 0) of_warps[turn][threadIdx.x / 32][s] = sum;
        }
        __syncthreads();
        if (threadIdx.x) continue;
        for (int s = 0; s < S && k + s < n_k; s++) {
            float error = 0;
            for (int warp = 0; warp < WARPS; warp++) error += of_warps[turn][warp][s];
            const int64_t sample = b * n_k + k + s;
            squared_error[sample] = error;
            weights.add(-0.5f * (error * precision + d * (LOG_2PI + gamma_log)) + (log_ratio ? log_ratio[sample] : 0));
        }
    }
    if (threadIdx.x == 0) nll[blockIdx.x] = logf(n_k) - weights.value();
}

// A warp for each image: its blocks' NLLs become one.
__global__ void combine(const float* nll_of_blocks /* [B, blocks] */, float* nll /* [B] out */, int blocks) {
    LogSumExp weights;
    for (int i = threadIdx.x; i < blocks; i += 32) weights.add(-nll_of_blocks[int64_t(blockIdx.x) * blocks + i]);
    const float maximum = warp_maximum(weights.maximum);
    // equal infinities' difference would be NaN
    const float sum = warp_sum(weights.sum * (weights.maximum == maximum ? 1 : expf(weights.maximum - maximum)));
    if (threadIdx.x == 0) nll[blockIdx.x] = -(maximum + logf(sum));
}

// A thread takes V columns of up to LOADS samples of an image, which share its pixels.
template <typename X, typename T, int V>
__global__ void __launch_bounds__(THREADS) backward(
    Images<X, T> images,
    const float* grad_squared_error,  // [B, K]
    T* grad_mean) {                   // [B, K, d] out, with respect to means or logits
    const auto [x, mean, x_stride, stride_b, stride_k, n_k, d, logits] = images;
    const int across = (d + THREADS * V - 1) / (THREADS * V), tiles = (n_k + LOADS - 1) / LOADS;
    const int column = (blockIdx.x % across * THREADS + threadIdx.x) * V, k = blockIdx.x / across % tiles * LOADS;
    const int64_t b = blockIdx.x / across / tiles, sample = b * n_k + k;
    if (column >= d) return;
    const Pack<X, V> pixels = load<V>(x + b * x_stride + column);
    Pack<T, V> means[LOADS];
    float scale[LOADS];
#pragma unroll
    for (int s = 0; s < LOADS; s++) {
        if (k + s >= n_k) continue;
        means[s] = load<V>(mean + b * stride_b + (k + s) * stride_k + column);
        scale[s] = 2 * grad_squared_error[sample + s];
    }
#pragma unroll
    for (int s = 0; s < LOADS; s++) {
        if (k + s >= n_k) continue;
#pragma unroll
        for (int v = 0; v < V; v++) {
            const float m = number(means[s].value[v]), value = logits ? sigmoid(m) : m;
            const float grad = scale[s] * (value - pixel(pixels.value[v]));
            assign(means[s].value[v], logits ? grad * value * (1 - value) : grad);
        }
        *reinterpret_cast<Pack<T, V>*>(grad_mean + (sample + s) * d + column) = means[s];
    }
}

}  // namespace iw_nll
