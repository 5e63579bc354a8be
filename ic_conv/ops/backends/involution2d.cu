// SPDX-License-Identifier: Apache-2.0
// Involution on CUDA: forward, gradient by input, gradient by weight. All are gathers, so results are
// deterministic. Sums are float. Image sizes are arguments; these macros are set when compiling:
//
//   SCALAR    1 float, 2 half, 3 bfloat16
//   WIDE      1 for tensors of 2^31 elements and more, else 0
//   KH, KW    kernel size
//   CHANNELS  channels of a group that a thread computes: it reads each weight once for all of them
//   ROWS      target rows, one dilation apart, that a thread computes: they share source rows (stride 1)
//   TAPS      taps of a kernel row that a thread of grad_weight computes: KW or 1
//
// CHANNELS = ROWS = TAPS = 1 is the plain kernel, one thread per output. No CUDA header is needed, and a
// plain C++ compiler that defines __global__, __device__, blockIdx, blockDim and threadIdx can compile this too.

#if WIDE
typedef long long Index;
#else
typedef int Index;
#endif

#if SCALAR == 1
typedef float Scalar;
__device__ float to_float(Scalar value) { return value; }
__device__ Scalar from_float(float value) { return value; }
#elif SCALAR == 2
typedef unsigned short Scalar;
__device__ float to_float(Scalar bits) {
    float value;
#ifdef __CUDA_ARCH__
    asm("cvt.f32.f16 %0, %1;" : "=f"(value) : "h"(bits));
#else
    value = (float)*(_Float16*)&bits;
#endif
    return value;
}
__device__ Scalar from_float(float value) {
    Scalar bits;
#ifdef __CUDA_ARCH__
    asm("cvt.rn.f16.f32 %0, %1;" : "=h"(bits) : "f"(value));
#else
    _Float16 half = (_Float16)value;
    bits = *(Scalar*)&half;
#endif
    return bits;
}
#else
typedef unsigned short Scalar;
union Word {
    unsigned bits;
    float value;
};
__device__ float to_float(Scalar bits) {
    Word word;
    word.bits = (unsigned)bits << 16;
    return word.value;
}
__device__ Scalar from_float(float value) {
    Word word;
    word.value = value;
    if (value != value) return (Scalar)(word.bits >> 16 | 0x40);  // stays NaN
    return (Scalar)((word.bits + 0x7fff + (word.bits >> 16 & 1)) >> 16);  // to nearest, ties to even
}
#endif

// Sizes: `groups` groups of `group_channels` channels; input (height, width), output (out_height, out_width).
// geometry holds dy, dx, py, px of each group. `slots` threads work on one unit, and the grid is as many
// blocks as the slots of one unit need, times the number of units.
#define SIZES                                                                                               \
    const int *geometry, long long groups, long long group_channels, long long height, long long width,     \
        long long out_height, long long out_width, long long stride_y, long long stride_x, long long slots

// What each thread works on.
struct Place {
    Index unit;
    int slot;
};

__device__ Place place(int slots) {
    const unsigned blocks = (slots + blockDim.x - 1) / blockDim.x;
    return {(Index)(blockIdx.x / blocks), (int)(blockIdx.x % blocks * blockDim.x + threadIdx.x)};
}

// The source position that a target position sees through a tap; negative if there is none. The source is
// the input for the forward pass; ADJOINT: the output's gradient for the input's gradient.
template <bool ADJOINT>
__device__ int seen(int target, int tap, int stride, int dilation, int padding, int size) {
    int source = ADJOINT ? target + padding - tap * dilation : target * stride - padding + tap * dilation;
    if (ADJOINT) {
        if (source % stride) return -1;
        source /= stride;
    }
    return source < size ? source : -1;
}

template <bool ADJOINT>
__device__ void gather(const Scalar* source, const Scalar* weight, Scalar* target, SIZES) {
    const int source_height = ADJOINT ? out_height : height, source_width = ADJOINT ? out_width : width;
    const int target_height = ADJOINT ? height : out_height, target_width = ADJOINT ? width : out_width;
    const Index source_plane = (Index)source_height * source_width;
    const Index target_plane = (Index)target_height * target_width;
    const Index weight_plane = (Index)out_height * out_width;

    const Place here = place(slots);
    const Index chunk = here.unit, chunks = group_channels / CHANNELS, group = chunk / chunks;  // over the batch
    const int* pairs = geometry + group % groups * 4;
    const int dy = pairs[0], dx = pairs[1], py = pairs[2], px = pairs[3];
    const int row_slot = here.slot / target_width, column = here.slot % target_width;
    const int top = row_slot / dy * dy * ROWS + row_slot % dy;  // the thread's rows are top, top + dy, ...
    if (here.slot >= slots || top >= target_height) return;
    source += chunk * CHANNELS * source_plane;
    target += chunk * CHANNELS * target_plane;
    weight += group * KH * KW * weight_plane;

    float sums[ROWS][CHANNELS] = {};
#pragma unroll 1
    for (int k = 0; k < KH + ROWS - 1; ++k) {
        const int tap = ADJOINT ? k - (ROWS - 1) : k;  // through which the top row sees source row y
        const int y = seen<ADJOINT>(top, tap, stride_y, dy, py, source_height);
        if (y < 0) continue;
#pragma unroll
        for (int v = 0; v < KW; ++v) {
            const int x = seen<ADJOINT>(column, v, stride_x, dx, px, source_width);
            if (x < 0) continue;
            float scale[ROWS];
#pragma unroll
            for (int r = 0; r < ROWS; ++r) {
                const int u = ADJOINT ? tap + r : tap - r, row = top + r * dy;
                scale[r] = 0;
                if (u < 0 || u >= KH || row >= target_height) continue;
                const Index at = ADJOINT ? (Index)y * out_width + x : (Index)row * out_width + column;
                scale[r] = to_float(weight[(u * KW + v) * weight_plane + at]);
            }
#pragma unroll
            for (int c = 0; c < CHANNELS; ++c) {
                const float value = to_float(source[c * source_plane + (Index)y * source_width + x]);
#pragma unroll
                for (int r = 0; r < ROWS; ++r) {
                    const int u = ADJOINT ? tap + r : tap - r;
                    if (u >= 0 && u < KH) sums[r][c] += scale[r] * value;
                }
            }
        }
    }
#pragma unroll
    for (int r = 0; r < ROWS; ++r) {
        const int row = top + r * dy;
        if (row >= target_height) break;
#pragma unroll
        for (int c = 0; c < CHANNELS; ++c)
            target[c * target_plane + (Index)row * target_width + column] = from_float(sums[r][c]);
    }
}

// source x, weight, target y. A unit is CHANNELS channels of an image.
extern "C" __global__ void forward(const Scalar* x, const Scalar* weight, Scalar* y, SIZES) {
    gather<false>(x, weight, y, geometry, groups, group_channels, height, width, out_height, out_width,
                  stride_y, stride_x, slots);
}

// source: the gradient by y, target: the gradient by x.
extern "C" __global__ void grad_input(const Scalar* grad, const Scalar* weight, Scalar* grad_x, SIZES) {
    gather<true>(grad, weight, grad_x, geometry, groups, group_channels, height, width, out_height, out_width,
                 stride_y, stride_x, slots);
}

// A unit is TAPS taps of one kernel row, of one group of an image.
extern "C" __global__ void grad_weight(const Scalar* grad, const Scalar* x, Scalar* result, SIZES) {
    const Index plane = (Index)height * width, out_plane = (Index)out_height * out_width;
    const Place here = place(slots);
    if (here.slot >= slots) return;
    const Index group = here.unit / (KH * KW / TAPS);  // over the batch
    const int tap = here.unit % (KH * KW / TAPS) * TAPS;
    const int* pairs = geometry + group % groups * 4;
    const int row = here.slot / (int)out_width, column = here.slot % (int)out_width;
    grad += group * group_channels * out_plane + here.slot;
    x += group * group_channels * plane;
    result += (group * KH * KW + tap) * out_plane + here.slot;

    float sums[TAPS] = {};
    const int source_row = seen<false>(row, tap / KW, stride_y, pairs[0], pairs[2], height);
    int columns[TAPS];
#pragma unroll
    for (int v = 0; v < TAPS; ++v)
        columns[v] = seen<false>(column, tap % KW + v, stride_x, pairs[1], pairs[3], width);
    if (source_row >= 0) {
        for (int c = 0; c < (int)group_channels; ++c) {
            const float slope = to_float(grad[c * out_plane]);
            const Scalar* line = x + c * plane + (Index)source_row * width;
#pragma unroll
            for (int v = 0; v < TAPS; ++v)
                if (columns[v] >= 0) sums[v] += slope * to_float(line[columns[v]]);
        }
    }
#pragma unroll
    for (int v = 0; v < TAPS; ++v) result[v * out_plane] = from_float(sums[v]);
}
