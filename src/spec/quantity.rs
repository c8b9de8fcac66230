//! Kubernetes quantities, as far as they are sizes in bytes: `256Mi`, `1.5G`, `1e9`.

use super::error::quote;

const SUFFIXES: &[(&str, u64)] = &[
    ("", 1),
    ("k", 1_000),
    ("M", 1_000_000),
    ("G", 1_000_000_000),
    ("T", 1_000_000_000_000),
    ("P", 1_000_000_000_000_000),
    ("E", 1_000_000_000_000_000_000),
    ("Ki", 1 << 10),
    ("Mi", 1 << 20),
    ("Gi", 1 << 30),
    ("Ti", 1 << 40),
    ("Pi", 1 << 50),
    ("Ei", 1 << 60),
];

/// Reads a size of at least one byte and less than 8 Ei; parts of a byte are rounded up, as Kubernetes does.
pub fn bytes(text: &str) -> Result<u64, String> {
    let invalid = || format!("{} is not a size: a number above 0 with an optional suffix, such as 256Mi", quote(text));
    // More digits than that cannot be a size, and keep the arithmetic below from overflowing.
    if text.len() > 20 {
        return Err(invalid());
    }
    let end = text.find(|c: char| !c.is_ascii_digit() && c != '.').unwrap_or(text.len());
    let (number, suffix) = text.split_at(end);
    let (whole, fraction) = number.split_once('.').unwrap_or((number, ""));
    if (whole.is_empty() && fraction.is_empty()) || fraction.contains('.') {
        return Err(invalid());
    }
    let scale = scale(suffix).ok_or_else(invalid)?;
    let divisor = 10u128.pow(fraction.len() as u32);
    let digits: u128 = format!("{whole}{fraction}").parse().map_err(|_| invalid())?;
    let size = digits.checked_mul(u128::from(scale)).ok_or_else(invalid)?.div_ceil(divisor);
    match u64::try_from(size) {
        Ok(size) if size > 0 && size <= i64::MAX as u64 => Ok(size),
        _ => Err(invalid()),
    }
}

fn scale(suffix: &str) -> Option<u64> {
    if let Some((_, scale)) = SUFFIXES.iter().find(|(known, _)| *known == suffix) {
        return Some(*scale);
    }
    let exponent = suffix.strip_prefix(['e', 'E'])?;
    let digits = exponent.chars().all(|c| c.is_ascii_digit());
    10u64.checked_pow(exponent.parse().ok().filter(|_| digits)?)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sizes_are_bytes() {
        for (text, size) in [
            ("1", 1),
            ("256Mi", 256 << 20),
            ("1G", 1_000_000_000),
            ("1.5Gi", 3 << 29),
            (".5k", 500),
            ("1e3", 1000),
            ("2E3", 2000),
            ("1E", 1_000_000_000_000_000_000),
            ("0.1", 1),
            ("007", 7),
        ] {
            assert_eq!(bytes(text), Ok(size), "{text}");
        }
    }

    #[test]
    fn anything_else_is_refused() {
        for text in [
            "",
            ".",
            "0",
            "0Gi",
            "-1",
            "+1",
            "1 Gi",
            "1gi",
            "1KB",
            "1m",
            "1..5",
            "1.2.3",
            "8Ei",
            "1e19",
            "1e+3",
            "e3",
            "99999999999999999999Ei",
            "1e99999999999",
            "Mi",
            "１",
        ] {
            assert!(bytes(text).is_err(), "{text}");
        }
    }
}
