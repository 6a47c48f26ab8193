// What all kernels of this crate share, and the ones that change element types. src/device/kernels.rs appends the
// instantiations that are wanted, and generates those that transform.
//
// Compiled at run time for the GPU at hand by NVRTC, without any header; and by a C++ compiler under the shim of the
// tests, where a warp has one lane and threads run one after another. Hence conversions to and from 16 bits are written
// out, and lanes work together only through the functions below. Nothing fuses a multiplication with an addition
// (--fmad=false), so that float32 comes out as on the host.

typedef signed char i8;
typedef short i16;
typedef int i32;
typedef long long i64;
typedef unsigned char u8;
typedef unsigned short u16;
typedef unsigned int u32;
typedef unsigned long long u64;
typedef float f32;
typedef double f64;
struct b8 { u8 byte; };
struct f16 { u16 bits; };
struct bf16 { u16 bits; };

#ifndef ANNBATCH_SHIM
#define LANES 32
__device__ inline f64 sum_over_lanes(f64 x) {
  for (int apart = LANES / 2; apart > 0; apart /= 2) x += __shfl_xor_sync(0xffffffffu, x, apart);
  return x;
}
// What one lane wrote before, all lanes see after.
__device__ inline void lanes_meet() { __syncwarp(); }
#endif

__device__ inline i64 thread_number() { return (i64)blockIdx.x * blockDim.x + threadIdx.x; }
__device__ inline i64 thread_count() { return (i64)gridDim.x * blockDim.x; }
__device__ inline i64 warp_number() { return thread_number() / LANES; }
__device__ inline i64 warp_count() { return thread_count() / LANES; }
__device__ inline i64 lane() { return thread_number() % LANES; }

union Bits {
  f32 number;
  u32 bits;
};

__device__ inline u32 bits_of(f32 x) {
  Bits b;
  b.number = x;
  return b.bits;
}

__device__ inline f32 number_of(u32 bits) {
  Bits b;
  b.bits = bits;
  return b.number;
}

// IEEE 754 binary16, ties to even.
__device__ inline f16 to_f16(f32 value) {
  u32 x = bits_of(value);
  const u32 sign = (x >> 16) & 0x8000u;
  x &= 0x7fffffffu;
  u32 h;
  if (x > 0x7f800000u) {
    h = 0x7e00u;  // not a number
  } else if (x >= 0x477ff000u) {
    h = 0x7c00u;  // from 65520 on: infinite
  } else if (x >= 0x38800000u) {
    // the exponent's bias goes from 127 to 15; what is rounded up carries into it
    h = (x - 0x38000000u + 0xfffu + ((x >> 13) & 1u)) >> 13;
  } else if (x <= 0x33000000u) {
    h = 0;  // up to half of the smallest number
  } else {
    // below 2^-14: multiples of 2^-24
    const u32 shift = 126u - (x >> 23), digits = (x & 0x7fffffu) | 0x800000u;
    const u32 rest = digits & ((1u << shift) - 1u), half = 1u << (shift - 1u);
    h = digits >> shift;
    h += (rest > half || (rest == half && (h & 1u))) ? 1u : 0u;
  }
  f16 result;
  result.bits = (u16)(sign | h);
  return result;
}

__device__ inline f32 from_f16(f16 value) {
  const u32 h = value.bits, sign = (h & 0x8000u) << 16, exponent = (h >> 10) & 31u, digits = h & 0x3ffu;
  if (exponent == 0) return number_of(sign | bits_of((f32)digits * 5.9604644775390625e-8f));
  if (exponent == 31) return number_of(sign | 0x7f800000u | (digits << 13));
  return number_of(sign | ((exponent + 112u) << 23) | (digits << 13));
}

// The upper half of a float, ties to even.
__device__ inline bf16 to_bf16(f32 value) {
  const u32 x = bits_of(value);
  bf16 result;
  result.bits = (x & 0x7fffffffu) > 0x7f800000u ? (u16)((x >> 16) | 0x40u) : (u16)((x + 0x7fffu + ((x >> 16) & 1u)) >> 16);
  return result;
}

// A stored number in the type that it is computed in: its own, but float for 16 bits.
template <class S> __device__ inline S loaded(S x) { return x; }
__device__ inline u8 loaded(b8 x) { return x.byte != 0; }
__device__ inline f32 loaded(f16 x) { return from_f16(x); }

// A computed number in the type that it is delivered in. From 64 bits to 16 it is rounded twice, by way of float.
template <class D> struct Deliver {
  template <class S> __device__ static D from(S x) { return (D)x; }
};
template <> struct Deliver<f16> {
  template <class S> __device__ static f16 from(S x) { return to_f16((f32)x); }
};
template <> struct Deliver<bf16> {
  template <class S> __device__ static bf16 from(S x) { return to_bf16((f32)x); }
};

template <int N> struct Alignment { static const int bytes = N > 16 ? 16 : N; };
template <class T> struct alignas(Alignment<4 * sizeof(T)>::bytes) Four { T at[4]; };

template <class S, class D> __device__ inline void widen(const S* in, D* out, i64 n) {
  i64 done = 0;
  if ((u64)in % alignof(Four<S>) == 0 && (u64)out % alignof(Four<D>) == 0) {
    const Four<S>* const from = (const Four<S>*)in;
    Four<D>* const to = (Four<D>*)out;
    for (i64 i = thread_number(); i < n / 4; i += thread_count()) {
      const Four<S> a = from[i];
      Four<D> b;
      for (int k = 0; k < 4; ++k) b.at[k] = Deliver<D>::from(loaded(a.at[k]));
      to[i] = b;
    }
    done = n / 4 * 4;
  }
  for (i64 i = done + thread_number(); i < n; i += thread_count()) out[i] = Deliver<D>::from(loaded(in[i]));
}

#define WIDEN(S, D) \
  extern "C" __global__ void widen_##S##_##D(const S* in, D* out, i64 n) { widen(in, out, n); }

// What a row of this sum is divided by to add up to `target`: rows of nothing stay as they are.
template <class C> __device__ inline C divisor(f64 sum, f64 target) { return sum == 0 ? (C)1 : (C)(sum / target); }

// What src/transform/math.rs does on the host, operation by operation.
__device__ inline f32 log_of_one_more(f32 x) {
  if (!(x > -0.999f && x < 1e38f)) return log1pf(x);
  const u32 half_sqrt_bits = 0x3f3504f3u;
  const f32 y = 1.0f + x;
  const f32 c = y < 2.0f ? x - (y - 1.0f) : 1.0f - (y - x);
  const u32 shifted = bits_of(y) - half_sqrt_bits;
  const f32 k = (f32)((i32)shifted >> 23);
  const f32 m = number_of((shifted & 0x007fffffu) + half_sqrt_bits);
  const f32 s = (m - 1.0f) / (m + 1.0f);
  const f32 z = s * s;
  const f32 tail = z * (0.6666667f + z * (0.4f + z * (0.2857143f + z * 0.2222222f)));
  return k * 0.69314575f + (2.0f * s + (s * tail + (k * 1.4286068e-6f + c / y)));
}
__device__ inline f64 log_of_one_more(f64 x) { return log1p(x); }

// What two entries of one column make, in the type that they are computed or delivered in.
template <class T> __device__ inline T plus(T a, T b) { return (T)(a + b); }
__device__ inline b8 plus(b8 a, b8 b) {
  a.byte |= b.byte;
  return a;
}
__device__ inline f16 plus(f16 a, f16 b) { return to_f16(from_f16(a) + from_f16(b)); }

// Zeros in all of a dense row, 16 bytes at a time where they are aligned.
template <class D> __device__ inline void zero_row(D* row, i64 n) {
  u8* const bytes = (u8*)row;
  const i64 size = n * (i64)sizeof(D), skew = (16 - (i64)((u64)bytes % 16)) % 16, head = skew < size ? skew : size;
  const i64 blocks = (size - head) / 16;
  const Four<u32> zeros = {};
  for (i64 i = lane(); i < head; i += LANES) bytes[i] = 0;
  for (i64 i = lane(); i < blocks; i += LANES) ((Four<u32>*)(bytes + head))[i] = zeros;
  for (i64 i = head + blocks * 16 + lane(); i < size; i += LANES) bytes[i] = 0;
}
