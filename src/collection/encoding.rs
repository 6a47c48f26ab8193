//! How anndata says what a stored node is.

use serde_json::Value;

use crate::base::error::{Error, Result};

/// Attributes that decide it. anndata before 0.7 wrote the last two, and nothing for dense arrays.
pub(super) const ATTRIBUTES: [&str; 4] = ["encoding-type", "shape", "h5sparse_format", "h5sparse_shape"];

/// What a node is read as.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Encoding {
    Dense,
    /// A group of `data`, `indices` and `indptr`.
    Csr {
        /// `[n_obs, n_var]`
        shape: [u64; 2],
    },
}

impl Encoding {
    /// The encoding of the group or array at `at` with these attributes.
    pub(super) fn of(is_group: bool, attributes: &Value, at: &str) -> Result<Self> {
        let text = |name: &str| attributes.get(name).and_then(Value::as_str);
        let unknown = |found: Option<&Value>| {
            let expected = "expected \"csr_matrix\" or \"array\" as written by anndata";
            Error::unsupported(at, format!("has encoding-type {}; {expected}", words(found)))
        };
        let encoding = attributes.get("encoding-type");
        if encoding.is_some_and(|value| !value.is_string()) {
            return Err(unknown(encoding));
        }
        let found = match (text("encoding-type"), text("h5sparse_format")) {
            (None, Some("csr")) => Some("csr_matrix"),
            (None, Some("csc")) => Some("csc_matrix"),
            (encoding, _) => encoding,
        };
        match (is_group, found) {
            (false, None | Some("array")) => Ok(Self::Dense),
            (true, Some("csr_matrix")) => Ok(Self::Csr { shape: csr_shape(attributes, at)? }),
            (true, Some("csc_matrix")) => Err(Error::unsupported(
                at,
                "is a csc_matrix, which stores columns, so one row is spread over the whole matrix; convert it with `.tocsr()` (X: adata.X = adata.X.tocsr()) and write it again",
            )),
            (_, other) => Err(unknown(other.map(Value::from).as_ref())),
        }
    }
}

fn csr_shape(attributes: &Value, at: &str) -> Result<[u64; 2]> {
    let (name, value) = match (attributes.get("shape"), attributes.get("h5sparse_shape")) {
        (None, old @ Some(_)) => ("h5sparse_shape", old),
        (shape, _) => ("shape", shape),
    };
    let numbers: Option<Vec<u64>> = value.and_then(Value::as_array).and_then(|s| s.iter().map(Value::as_u64).collect());
    match numbers.as_deref() {
        Some(&[n_obs, n_var]) => Ok([n_obs, n_var]),
        _ => Err(Error::corrupt(at, format!("attribute {name:?} is {}; expected two numbers", words(value)))),
    }
}

/// A value as JSON, or that there is none.
fn words(value: Option<&Value>) -> String {
    value.map_or_else(|| "nothing".into(), Value::to_string)
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    #[test]
    fn encodings_of_all_ages() {
        let of = |is_group, attributes| Encoding::of(is_group, &attributes, "X").map_err(|e| e.to_string());
        let csr = Ok(Encoding::Csr { shape: [3, 4] });
        assert_eq!(of(true, json!({"encoding-type": "csr_matrix", "shape": [3, 4]})), csr);
        assert_eq!(of(true, json!({"h5sparse_format": "csr", "h5sparse_shape": [3, 4]})), csr);
        assert_eq!(of(false, json!({})), Ok(Encoding::Dense));
        assert_eq!(of(false, json!({"encoding-type": "array"})), Ok(Encoding::Dense));
        for (is_group, attributes, expected) in [
            (true, json!({"encoding-type": "csc_matrix", "shape": [3, 4]}), "tocsr"),
            (true, json!({"h5sparse_format": "csc", "h5sparse_shape": [3, 4]}), "tocsr"),
            (true, json!({"encoding-type": "csr_matrix"}), "\"shape\" is nothing; expected two numbers"),
            (true, json!({"encoding-type": "csr_matrix", "shape": [-3, 4]}), "\"shape\" is [-3,4]; expected two numbers"),
            (true, json!({"h5sparse_format": "csr", "h5sparse_shape": [3]}), "\"h5sparse_shape\" is [3];"),
            (true, json!({"h5sparse_format": "csr", "h5sparse_shape": "3"}), "\"h5sparse_shape\" is \"3\";"),
            (true, json!({}), "encoding-type nothing;"),
            (false, json!({"encoding-type": null}), "encoding-type null;"),
            (false, json!({"encoding-type": 3}), "encoding-type 3;"),
            (true, json!({"encoding-type": "dataframe"}), "encoding-type \"dataframe\";"),
            (false, json!({"encoding-type": "string-array"}), "string-array"),
            (false, json!({"encoding-type": "csr_matrix", "shape": [3, 4]}), "csr_matrix"),
        ] {
            let error = of(is_group, attributes).unwrap_err();
            assert!(error.contains(expected), "{error}");
        }
    }
}
