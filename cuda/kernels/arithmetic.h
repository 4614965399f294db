// The arithmetic of the kernels, element by element: compiled for devices, and as C for the host, where it is compared
// with Rust's. It includes nothing, so that NVRTC needs no headers, and converts by bits, so that every compiler gives the same.
#pragma once

#ifdef __CUDACC__
#define INLINE static __device__ __forceinline__
#define TABLE static __device__ __constant__ const
#else
#define INLINE static inline
#define TABLE static const
#endif

typedef unsigned char u8;
typedef unsigned short u16;
typedef unsigned int u32;
typedef unsigned long long u64;

INLINE u32 bits_of(float number) {
    union { float number; u32 bits; } both;
    both.number = number;
    return both.bits;
}

INLINE float number_of(u32 bits) {
    union { float number; u32 bits; } both;
    both.bits = bits;
    return both.number;
}

// To bfloat16, the nearest and of two the even one. A NaN stays one: it becomes quiet.
INLINE u16 to_bf16(float number) {
    u32 bits = bits_of(number);
    if ((bits & 0x7fffffffu) > 0x7f800000u) return (u16)((bits >> 16) | 0x40u);
    return (u16)((bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16);
}

INLINE float from_bf16(u16 half) {
    return number_of((u32)half << 16);
}

// `value` without its last `shift` bits, rounded to the nearest and of two to the even one.
INLINE u32 shift_rounded(u32 value, u32 shift) {
    u32 kept = value >> shift, rest = value & ((1u << shift) - 1u), middle = 1u << (shift - 1u);
    return kept + ((rest > middle || (rest == middle && (kept & 1u))) ? 1u : 0u);
}

// To the 16-bit float of IEEE 754, rounded as above; what is too large becomes infinite, what is too small subnormal or zero.
INLINE u16 to_f16(float number) {
    u32 bits = bits_of(number), sign = (bits >> 16) & 0x8000u, rest = bits & 0x7fffffffu;
    if (rest > 0x7f800000u) return (u16)(sign | 0x7e00u | ((rest >> 13) & 0x3ffu));
    if (rest >= 0x47800000u) return (u16)(sign | 0x7c00u);
    // A carry out of the mantissa is one more in the exponent, up to infinity: which is right.
    if (rest >= 0x38800000u) return (u16)(sign | shift_rounded(rest - 0x38000000u, 13u));
    if (rest < 0x33000000u) return (u16)sign;
    u32 exponent = rest >> 23, mantissa = (rest & 0x7fffffu) | 0x800000u;
    return (u16)(sign | shift_rounded(mantissa, 126u - exponent));
}

INLINE float from_f16(u16 half) {
    u32 sign = ((u32)half & 0x8000u) << 16, exponent = ((u32)half >> 10) & 0x1fu, mantissa = (u32)half & 0x3ffu;
    if (exponent == 0x1fu) return number_of(sign | 0x7f800000u | (mantissa << 13) | (mantissa ? 0x400000u : 0u));
    if (exponent != 0) return number_of(sign | ((exponent + 112u) << 23) | (mantissa << 13));
    if (mantissa == 0) return number_of(sign);
    u32 shift = 0;
    while (!(mantissa & 0x400u)) {
        mantissa <<= 1;
        shift += 1;
    }
    return number_of(sign | ((113u - shift) << 23) | ((mantissa & 0x3ffu) << 13));
}

INLINE u32 is_finite(float number) {
    return (bits_of(number) & 0x7f800000u) != 0x7f800000u;
}

// The 128-bit XXH3 without a seed, of more than 240 bytes: what reknit's digests are. Bytes are taken in blocks of 1024, of 16
// stripes of 64 bytes, of 8 lanes. What a block adds to the lanes does not depend on what was before it: so the sums of all
// blocks are taken at once, and only eight numbers per block are chained one after the other.

#define XXH3_SHORT 240ull
#define XXH3_BLOCK 1024ull
#define XXH3_STRIPE 64ull

TABLE u64 xxh3_words[24] = {
    0xbe4ba423396cfeb8ull, 0x1cad21f72c81017cull, 0xdb979083e96dd4deull, 0x1f67b3b7a4a44072ull,
    0x78e5c0cc4ee679cbull, 0x2172ffcc7dd05a82ull, 0x8e2443f7744608b8ull, 0x4c263a81e69035e0ull,
    0xcb00c391bb52283cull, 0xa32e531b8b65d088ull, 0x4ef90da297486471ull, 0xd8acdea946ef1938ull,
    0x3f349ce33f76faa8ull, 0x1d4f0bc7c7bbdcf9ull, 0x3159b4cd4be0518aull, 0x647378d9c97e9fc8ull,
    0xc3ebd33483acc5eaull, 0xeb6313faffa081c5ull, 0x49daf0b751dd0d17ull, 0x9e68d429265516d3ull,
    0xfca1477d58be162bull, 0xce31d07ad1b8f88full, 0x280416958f3acb45ull, 0x7e404bbbcafbd7afull,
};

// Eight bytes of the secret, from any place in it.
INLINE u64 xxh3_secret(u32 at) {
    u32 word = at / 8u, shift = 8u * (at % 8u);
    return shift ? (xxh3_words[word] >> shift) | (xxh3_words[word + 1u] << (64u - shift)) : xxh3_words[word];
}

INLINE u64 read_u64(const u8 *bytes) {
#ifdef __CUDACC__
    // Everything but the last stripe begins at a multiple of 64.
    if (((u64)bytes & 7u) == 0) return *(const u64 *)bytes;
#endif
    u64 word = 0;
    for (u32 at = 0; at < 8u; at++) word |= (u64)bytes[at] << (8u * at);
    return word;
}

// What a stripe adds to lane `lane`; `secret` is where in the secret the stripe begins.
INLINE u64 xxh3_lane(const u8 *stripe, u32 lane, u32 secret) {
    u64 key = read_u64(stripe + 8u * lane) ^ xxh3_secret(secret + 8u * lane);
    return (key & 0xffffffffull) * (key >> 32) + read_u64(stripe + 8u * (lane ^ 1u));
}

// What a whole block adds to lane `lane`.
INLINE u64 xxh3_block(const u8 *block, u32 lane) {
    u64 sum = 0;
    for (u32 stripe = 0; stripe < 16u; stripe++) sum += xxh3_lane(block + 64u * stripe, lane, 8u * stripe);
    return sum;
}

// The product of two numbers, its upper half added to its lower one by xor.
INLINE u64 xxh3_fold(u64 a, u64 b) {
    u64 al = a & 0xffffffffull, ah = a >> 32, bl = b & 0xffffffffull, bh = b >> 32;
    u64 ll = al * bl, hl = ah * bl, lh = al * bh, hh = ah * bh;
    u64 cross = (ll >> 32) + (hl & 0xffffffffull) + lh;
    return ((cross << 32) | (ll & 0xffffffffull)) ^ (hh + (hl >> 32) + (cross >> 32));
}

INLINE u64 xxh3_merge(const u64 *lanes, u32 secret, u64 start) {
    u64 sum = start;
    for (u32 pair = 0; pair < 4u; pair++) {
        u32 at = secret + 16u * pair;
        sum += xxh3_fold(lanes[2u * pair] ^ xxh3_secret(at), lanes[2u * pair + 1u] ^ xxh3_secret(at + 8u));
    }
    sum ^= sum >> 37;
    sum *= 0x165667919e3779f9ull;
    return sum ^ (sum >> 32);
}

// The digest of `len` bytes, of which `sums` are the eight sums of each block that is followed by another byte. The lower half of
// it first.
INLINE void xxh3_chain(const u8 *bytes, u64 len, const u64 *sums, u64 *digest) {
    u64 lanes[8] = {
        0xc2b2ae3dull, 0x9e3779b185ebca87ull, 0xc2b2ae3d27d4eb4full, 0x165667b19e3779f9ull,
        0x85ebca77c2b2ae63ull, 0x85ebca77ull, 0x27d4eb2f165667c5ull, 0x9e3779b1ull,
    };
    u64 blocks = (len - 1u) / XXH3_BLOCK;
    for (u64 block = 0; block < blocks; block++) {
        for (u32 lane = 0; lane < 8u; lane++) {
            u64 sum = lanes[lane] + sums[8u * block + lane];
            sum ^= sum >> 47;
            sum ^= xxh3_secret(128u + 8u * lane);
            lanes[lane] = sum * 0x9e3779b1ull;
        }
    }
    const u8 *rest = bytes + blocks * XXH3_BLOCK;
    u32 stripes = (u32)((len - 1u - blocks * XXH3_BLOCK) / XXH3_STRIPE);
    for (u32 lane = 0; lane < 8u; lane++) {
        for (u32 stripe = 0; stripe < stripes; stripe++) {
            lanes[lane] += xxh3_lane(rest + XXH3_STRIPE * stripe, lane, 8u * stripe);
        }
        lanes[lane] += xxh3_lane(bytes + len - XXH3_STRIPE, lane, 121u);
    }
    digest[0] = xxh3_merge(lanes, 11u, len * 0x9e3779b185ebca87ull);
    digest[1] = xxh3_merge(lanes, 117u, ~(len * 0xc2b2ae3d27d4eb4full));
}
