//! The arithmetic of transforms, over runs of values.
//!
//! Loops without branches over fixed operations, which the compiler turns into vectors; compiled for AVX2 as well and
//! chosen at run time. Neither build fuses a multiplication with an addition, so that all machines give the same bits.
//! `device/kernels.cu` says the same for GPUs; a change here is one there.

/// Adds up in eight sums, in an order that does not depend on the machine.
macro_rules! sum_in_lanes {
    ($values:expr) => {{
        let (chunks, rest) = $values.as_chunks::<8>();
        let mut sums = [0f64; 8];
        for chunk in chunks {
            for (sum, &value) in sums.iter_mut().zip(chunk) {
                *sum += f64::from(value);
            }
        }
        for (sum, &value) in sums.iter_mut().zip(rest) {
            *sum += f64::from(value);
        }
        ((sums[0] + sums[4]) + (sums[2] + sums[6])) + ((sums[1] + sums[5]) + (sums[3] + sums[7]))
    }};
}

macro_rules! builds {
    ($(#[$doc:meta])* $name:ident, $wide:ident, $body:ident, ($($arg:ident: $type:ty),*) -> $ret:ty) => {
        $(#[$doc])*
        pub(super) fn $name($($arg: $type),*) -> $ret {
            #[cfg(target_arch = "x86_64")]
            {
                #[target_feature(enable = "avx2")]
                fn $wide($($arg: $type),*) -> $ret {
                    $body($($arg),*)
                }
                if std::arch::is_x86_feature_detected!("avx2") {
                    // SAFETY: the CPU has the instructions that the function is compiled for.
                    return unsafe { $wide($($arg),*) };
                }
            }
            $body($($arg),*)
        }
    };
}

builds!(
    /// Sum of the values, in float64.
    sum_f32, sum_f32_avx2, sum_f32_body, (values: &[f32]) -> f64
);
builds!(
    /// `log(1 + value)` of every value, to two units in the last place.
    log1p_f32, log1p_f32_avx2, log1p_f32_body, (values: &mut [f32]) -> ()
);

builds!(
    /// The nearest bfloat16 of every value, of two as near the even one; as long as `to`.
    bf16_of_f32, bf16_of_f32_avx2, bf16_of_f32_body, (from: &[f32], to: &mut [u16]) -> ()
);

#[inline(always)]
fn bf16_of_f32_body(from: &[f32], to: &mut [u16]) {
    for (to, from) in to.iter_mut().zip(from) {
        let bits = from.to_bits();
        let even = (bits >> 16) & 1;
        let rounded = bits.wrapping_add(0x7fff + even) >> 16;
        // no number stays none, and quiet
        *to = if from.is_nan() { (bits >> 16) | 0x40 } else { rounded } as u16;
    }
}

#[inline(always)]
fn sum_f32_body(values: &[f32]) -> f64 {
    sum_in_lanes!(values)
}

/// Sum of the values.
pub(super) fn sum_f64(values: &[f64]) -> f64 {
    sum_in_lanes!(values)
}

/// `log(1 + value)` of every value.
pub(super) fn log1p_f64(values: &mut [f64]) {
    for value in values {
        *value = value.ln_1p();
    }
}

/// The upper part of log(2) with so few digits that its multiples by exponents are exact, and the rest.
const LN2_HIGH: f32 = 0.693_145_75;
const LN2_LOW: f32 = 1.428_606_8e-6;

#[inline(always)]
fn log1p_f32_body(values: &mut [f32]) {
    // outside of these the formula does not hold: -1 and below, infinity, no number
    let is_ordinary = |value: f32| value > -0.999 && value < 1e38;
    let mut ordinary = true;
    for &value in &*values {
        ordinary &= is_ordinary(value);
    }
    if !ordinary {
        // one by one: what becomes of a value does not hang on those beside it
        for value in values {
            *value = if is_ordinary(*value) { log1p_of_ordinary(*value) } else { value.ln_1p() };
        }
        return;
    }
    for value in values {
        *value = log1p_of_ordinary(*value);
    }
}

/// log(1 + x) = k log(2) + log(m) + c / y with y = 1 + x rounded = 2^k m, √½ ≤ m < √2, c = what rounding took off, and
/// log(m) = 2 artanh(s), s = (m - 1) / (m + 1), of which |s| ≤ 0.172 leaves five terms of the series.
#[expect(clippy::many_single_char_names, reason = "those of the formula")]
#[inline(always)]
fn log1p_of_ordinary(x: f32) -> f32 {
    const HALF_SQRT_BITS: u32 = 0x3f35_04f3;
    let y = 1.0 + x;
    // exact by Sterbenz' lemma, or by y being so large that x is too
    let c = if y < 2.0 { x - (y - 1.0) } else { 1.0 - (y - x) };
    let shifted = y.to_bits().wrapping_sub(HALF_SQRT_BITS);
    let k = (shifted as i32 >> 23) as f32;
    let m = f32::from_bits((shifted & 0x007f_ffff) + HALF_SQRT_BITS);
    let s = (m - 1.0) / (m + 1.0);
    let z = s * s;
    let tail = z * (0.666_666_7 + z * (0.4 + z * (0.285_714_3 + z * 0.222_222_2)));
    k * LN2_HIGH + (2.0 * s + (s * tail + (k * LN2_LOW + c / y)))
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn check(x: f32) -> Result<(), TestCaseError> {
        let (mut got, expected) = ([x], f64::from(x).ln_1p());
        log1p_f32(&mut got);
        let got = f64::from(got[0]);
        if expected.is_nan() {
            prop_assert!(got.is_nan(), "log1p({x}) = {got}");
        } else if expected.is_infinite() || expected == 0.0 {
            prop_assert!(got.total_cmp(&expected).is_eq() || (got == 0.0 && expected == 0.0), "log1p({x}) = {got}");
        } else {
            let unit = f64::from((expected as f32).abs().next_up()) - f64::from((expected as f32).abs());
            prop_assert!((got - expected).abs() <= 2.5 * unit, "log1p({x:e}) = {got:e}, expected {expected:e}");
        }
        Ok(())
    }

    proptest! {
        #![proptest_config(crate::base::fuzz::cases(20_000))]
        #[test]
        fn log1p_of_any_float(bits in any::<u32>()) {
            check(f32::from_bits(bits))?;
        }

        #[test]
        fn log1p_of_what_counts_become(x in 0f32..20_000.0) {
            check(x)?;
        }

        #[test]
        fn sums_are_those_of_a_loop(values in prop::collection::vec(0f32..1e4, 0..100)) {
            let slow: f64 = values.iter().map(|&v| f64::from(v)).sum();
            prop_assert!((sum_f32(&values) - slow).abs() <= 1e-9 * slow);
            let wide: Vec<f64> = values.iter().map(|&v| f64::from(v)).collect();
            prop_assert!(sum_f64(&wide).total_cmp(&sum_f32(&values)).is_eq());
        }
    }

    proptest! {
        #[test]
        fn bfloat16_is_that_of_the_crate(bits in prop::collection::vec(any::<u32>(), 0..70)) {
            let from: Vec<f32> = bits.into_iter().map(f32::from_bits).chain([f32::NAN, f32::MAX, 1.0 + 1.0 / 256.0, 0.0]).collect();
            let mut to = vec![0; from.len()];
            bf16_of_f32(&from, &mut to);
            prop_assert_eq!(to, from.iter().map(|&v| half::bf16::from_f32(v).to_bits()).collect::<Vec<_>>());
        }
    }

    #[test]
    fn log1p_of_every_count_and_of_edges() {
        for x in (0..70_000u32).map(|i| i as f32).chain([-0.0, -0.5, -0.9, -0.998_999, -0.999, -1.0, -2.0, 1e38, f32::MAX]) {
            check(x).unwrap();
        }
        for x in [f32::INFINITY, f32::NEG_INFINITY, f32::NAN, 1e-45, -1e-45, 1e-8, -1e-8, 1.0 - f32::EPSILON] {
            check(x).unwrap();
        }
    }
}
