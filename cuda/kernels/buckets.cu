// What is done with gradients and states where they lie: packed into buckets, cast, weighted, looked through for what is not
// finite, and digested as the host digests them.
//
// Each kernel does the same for each of `count` elements, whatever the grid is. All arguments are of eight bytes. Compiled
// as C for the host, each is a function that takes pointers to its arguments, as the driver takes them.
#include "arithmetic.h"

#ifdef __CUDACC__
#define EACH(at, count)                                                                                  \
    for (u64 at = (u64)blockIdx.x * blockDim.x + threadIdx.x; at < (count); at += (u64)gridDim.x * blockDim.x)
#define KERNEL3(name, A, a, B, b, C, c) extern "C" __global__ void name(A a, B b, C c)
#define KERNEL4(name, A, a, B, b, C, c, D, d) extern "C" __global__ void name(A a, B b, C c, D d)
#define KERNEL5(name, A, a, B, b, C, c, D, d, E, e) extern "C" __global__ void name(A a, B b, C c, D d, E e)
#else
#define EACH(at, count) for (u64 at = 0; at < (count); at++)
#define KERNEL3(name, A, a, B, b, C, c)                                                                  \
    static void name##_each(A a, B b, C c);                                                              \
    void name(void **of) { name##_each(*(A *)of[0], *(B *)of[1], *(C *)of[2]); }              \
    static void name##_each(A a, B b, C c)
#define KERNEL4(name, A, a, B, b, C, c, D, d)                                                            \
    static void name##_each(A a, B b, C c, D d);                                                         \
    void name(void **of) { name##_each(*(A *)of[0], *(B *)of[1], *(C *)of[2], *(D *)of[3]); } \
    static void name##_each(A a, B b, C c, D d)
#define KERNEL5(name, A, a, B, b, C, c, D, d, E, e)                                                      \
    static void name##_each(A a, B b, C c, D d, E e);                                                    \
    void name(void **of) {                                                                    \
        name##_each(*(A *)of[0], *(B *)of[1], *(C *)of[2], *(D *)of[3], *(E *)of[4]);                    \
    }                                                                                                    \
    static void name##_each(A a, B b, C c, D d, E e)
#endif

// Into a bucket: each number times this rank's weight, in the bucket's type.

KERNEL4(pack_f32, const float *, from, float *, to, u64, count, double, weight) {
    EACH(at, count) to[at] = from[at] * (float)weight;
}

KERNEL4(pack_bf16, const float *, from, u16 *, to, u64, count, double, weight) {
    EACH(at, count) to[at] = to_bf16(from[at] * (float)weight);
}

KERNEL4(pack_f16, const float *, from, u16 *, to, u64, count, double, weight) {
    EACH(at, count) to[at] = to_f16(from[at] * (float)weight);
}

// Out of a bucket: each number times what makes the sum the mean.

KERNEL4(unpack_bf16, const u16 *, from, float *, to, u64, count, double, weight) {
    EACH(at, count) to[at] = from_bf16(from[at]) * (float)weight;
}

KERNEL4(unpack_f16, const u16 *, from, float *, to, u64, count, double, weight) {
    EACH(at, count) to[at] = from_f16(from[at]) * (float)weight;
}

// `found` becomes one if a number is infinite or none, and stays as it is otherwise. Who writes, writes the same.

KERNEL3(find_infinite_f32, const float *, from, u64 *, found, u64, count) {
    EACH(at, count) if (!is_finite(from[at])) *found = 1;
}

KERNEL3(find_infinite_bf16, const u16 *, from, u64 *, found, u64, count) {
    EACH(at, count) if (!is_finite(from_bf16(from[at]))) *found = 1;
}

KERNEL3(find_infinite_f16, const u16 *, from, u64 *, found, u64, count) {
    EACH(at, count) if (!is_finite(from_f16(from[at]))) *found = 1;
}

// The digests of the chunks of `chunk` bytes that `len` bytes consist of; the last may be shorter. `chunk` is a multiple of a
// block. First the sums of all blocks, then each chunk's chain. A chunk of 240 bytes or fewer gets zeros: XXH3 digests so little in
// another way, and the host does it.

INLINE u64 bytes_of_chunk(u64 len, u64 chunk, u64 at) {
    u64 left = len - at * chunk;
    return left < chunk ? left : chunk;
}

// `count` is eight for each block that a whole chunk has, times how many chunks there are.
KERNEL5(digest_blocks, const u8 *, bytes, u64, len, u64, chunk, u64 *, sums, u64, count) {
    u64 of_chunk = chunk / XXH3_BLOCK * 8u;
    EACH(at, count) {
        u64 number = at / of_chunk, block = at % of_chunk / 8u;
        if (block < (bytes_of_chunk(len, chunk, number) - 1u) / XXH3_BLOCK) {
            sums[at] = xxh3_block(bytes + number * chunk + block * XXH3_BLOCK, (u32)(at % 8u));
        }
    }
}

// `count` is how many chunks there are. A chunk's sums are replaced by its digest: the lower half of it, then the upper one.
KERNEL5(digest_chunks, const u8 *, bytes, u64, len, u64, chunk, u64 *, sums, u64, count) {
    u64 of_chunk = chunk / XXH3_BLOCK * 8u;
    EACH(at, count) {
        u64 of = bytes_of_chunk(len, chunk, at);
        u64 digest[2] = {0, 0};
        if (of > XXH3_SHORT) xxh3_chain(bytes + at * chunk, of, sums + at * of_chunk, digest);
        sums[at * of_chunk] = digest[0];
        sums[at * of_chunk + 1u] = digest[1];
    }
}
