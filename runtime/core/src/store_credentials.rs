//! What an object store says of credentials, under the one error that means it.
//!
//! S3 answers a token that has run out with 400, and its client takes every 400 for a fault that may pass. It does not pass,
//! and each further call is a failed login more. What this leaves out: getting new credentials, which is the operator's or
//! the client's own business.

use object_store::{Error, path::Path};

/// Codes of S3 that mean that the credentials as they are will never do.
const CODES: [&str; 3] = ["<Code>ExpiredToken</Code>", "<Code>InvalidToken</Code>", "<Code>TokenRefreshRequired</Code>"];

/// The same error, or [`Error::Unauthenticated`] when it speaks of credentials.
pub(crate) fn named(error: Error, location: &str) -> Error {
    match error {
        Error::Generic { source, .. } if CODES.iter().any(|code| chain(source.as_ref()).contains(code)) => {
            Error::Unauthenticated { path: Path::from(location).to_string(), source }
        }
        other => other,
    }
}

fn chain(error: &(dyn std::error::Error + 'static)) -> String {
    let (mut text, mut next) = (error.to_string(), error.source());
    while let Some(cause) = next {
        text.push_str(&cause.to_string());
        next = cause.source();
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_token_that_ran_out_is_told_from_a_fault_that_may_pass() {
        let said = |text: &str| named(Error::Generic { store: "S3", source: text.into() }, "a/b");
        let expired =
            "400 Bad Request: <Error><Code>ExpiredToken</Code><Message>The provided token has expired.</Message></Error>";
        assert!(matches!(said(expired), Error::Unauthenticated { path, .. } if path == "a/b"));
        assert!(matches!(said("503: <Error><Code>SlowDown</Code></Error>"), Error::Generic { .. }));
        assert!(matches!(said("400: <Error><Code>RequestTimeout</Code></Error>"), Error::Generic { .. }));
    }
}
