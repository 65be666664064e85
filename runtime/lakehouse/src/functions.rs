//! Functions of SQL that the engine does not have, or has only in several steps.
//!
//! Both are pure: the same text gives the same value on every machine and in every version.

use std::sync::Arc;

use arrow::{
    array::{Array, ArrayRef, AsArray, Int64Builder, StringBuilder},
    compute::cast,
    datatypes::DataType,
};
use deltalake::datafusion::{
    error::{DataFusionError, Result as PlanResult},
    logical_expr::{ColumnarValue, ScalarFunctionArgs, ScalarUDF, ScalarUDFImpl, Signature, Volatility},
    scalar::ScalarValue,
};
use sha2::{Digest, Sha256};
use twox_hash::XxHash64;

/// The functions, to be registered with a session.
pub(crate) fn all() -> [ScalarUDF; 2] {
    let texts = |n| Signature::string(n, Volatility::Immutable);
    [ScalarUDF::from(HashBefore { signature: texts(2) }), ScalarUDF::from(Sha256Hex { signature: texts(1) })]
}

/// The texts of an argument, whichever layout they have.
fn texts(value: &ColumnarValue, rows: usize) -> PlanResult<ArrayRef> {
    Ok(cast(&value.to_array(rows)?, &DataType::Utf8)?)
}

/// `hash_before(text, 'separator')`: a hash of what stands before the first separator, or of the whole text where there is none or the
/// separator is empty; null of null. Equal beginnings have equal hashes; unequal ones rarely.
#[derive(Debug, PartialEq, Eq, Hash)]
struct HashBefore {
    signature: Signature,
}

impl ScalarUDFImpl for HashBefore {
    fn name(&self) -> &str {
        "hash_before"
    }
    fn signature(&self) -> &Signature {
        &self.signature
    }
    fn return_type(&self, _: &[DataType]) -> PlanResult<DataType> {
        Ok(DataType::Int64)
    }
    fn invoke_with_args(&self, args: ScalarFunctionArgs) -> PlanResult<ColumnarValue> {
        let separator = match args.args.get(1) {
            Some(ColumnarValue::Scalar(
                ScalarValue::Utf8(Some(text)) | ScalarValue::Utf8View(Some(text)) | ScalarValue::LargeUtf8(Some(text)),
            )) if text.len() <= 1 => text.bytes().next(),
            _ => return Err(DataFusionError::Plan("hash_before: expected a literal of at most one ASCII character".into())),
        };
        let array = texts(&args.args[0], args.number_rows)?;
        let mut out = Int64Builder::with_capacity(array.len());
        for text in array.as_string::<i32>() {
            out.append_option(text.map(|text| {
                let bytes = text.as_bytes();
                let end = separator.and_then(|s| bytes.iter().position(|b| *b == s)).unwrap_or(bytes.len());
                XxHash64::oneshot(0, &bytes[..end]).cast_signed()
            }));
        }
        Ok(ColumnarValue::Array(Arc::new(out.finish())))
    }
}

/// `sha256_hex(text)`: the sha256 of a text in 64 hexadecimal digits; null of null.
#[derive(Debug, PartialEq, Eq, Hash)]
struct Sha256Hex {
    signature: Signature,
}

impl ScalarUDFImpl for Sha256Hex {
    fn name(&self) -> &str {
        "sha256_hex"
    }
    fn signature(&self) -> &Signature {
        &self.signature
    }
    fn return_type(&self, _: &[DataType]) -> PlanResult<DataType> {
        Ok(DataType::Utf8)
    }
    fn invoke_with_args(&self, args: ScalarFunctionArgs) -> PlanResult<ColumnarValue> {
        const DIGITS: &[u8; 16] = b"0123456789abcdef";
        let array = texts(&args.args[0], args.number_rows)?;
        let mut out = StringBuilder::with_capacity(array.len(), array.len() * 64);
        for text in array.as_string::<i32>() {
            match text {
                None => out.append_null(),
                Some(text) => {
                    let mut hex = [0; 64];
                    for (pair, byte) in hex.chunks_exact_mut(2).zip(Sha256::digest(text.as_bytes())) {
                        pair[0] = DIGITS[usize::from(byte >> 4)];
                        pair[1] = DIGITS[usize::from(byte & 15)];
                    }
                    out.append_value(str::from_utf8(&hex).map_err(|e| DataFusionError::External(e.into()))?);
                }
            }
        }
        Ok(ColumnarValue::Array(Arc::new(out.finish())))
    }
}

#[cfg(test)]
mod tests {
    use arrow::{
        array::StringArray,
        datatypes::{DataType, Field},
    };
    use deltalake::datafusion::config::ConfigOptions;

    use super::*;

    fn call(function: &ScalarUDF, args: Vec<ColumnarValue>) -> PlanResult<ArrayRef> {
        let arg_fields = args.iter().map(|a| Arc::new(Field::new("a", a.data_type(), true))).collect();
        let return_field = Arc::new(Field::new("r", function.return_type(&[DataType::Utf8])?, true));
        let config_options = Arc::new(ConfigOptions::new());
        function
            .invoke_with_args(ScalarFunctionArgs { args, arg_fields, number_rows: 4, return_field, config_options })?
            .to_array(4)
    }

    fn column(texts: [Option<&str>; 4]) -> ColumnarValue {
        ColumnarValue::Array(Arc::new(StringArray::from(texts.to_vec())))
    }

    fn literal(text: &str) -> ColumnarValue {
        ColumnarValue::Scalar(ScalarValue::Utf8(Some(text.into())))
    }

    #[test]
    fn a_digest_is_the_one_that_other_tools_print() {
        let [_, sha256_hex] = all();
        let found = call(&sha256_hex, vec![column([Some("abc"), None, Some(""), Some("ñ")])]).expect("digests");
        let found: Vec<Option<&str>> = found.as_string::<i32>().iter().collect();
        // printf abc | sha256sum
        assert_eq!(found[0], Some("ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"));
        assert_eq!(found[1], None);
        assert_eq!(found[2], Some("e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855"));
        assert_eq!(found[3].map(str::len), Some(64));
    }

    #[test]
    fn texts_with_one_beginning_have_one_hash_and_null_has_none() {
        let [hash_before, _] = all();
        let found = call(&hash_before, vec![column([Some("o|1"), Some("o"), Some("o1|"), None]), literal("|")]).expect("hashes");
        let found: Vec<Option<i64>> = found.as_primitive::<arrow::datatypes::Int64Type>().iter().collect();
        assert_eq!(found[0], found[1]);
        assert_ne!(found[0], found[2]);
        assert_eq!(found[3], None);
        assert!(call(&hash_before, vec![column([None; 4]), literal("ab")]).is_err());
    }
}
