//! What a `Notifier` promises. The suite gets a function that tells what a person has seen so far: `raise KEY` for each
//! page or message, `resolve KEY` for each end.

use simulacro_core::ports::{Alert, Notifier};

/// An alert of that key.
pub fn alert(key: &str, priority: u8) -> Alert {
    let kind = key.split(':').next().unwrap_or(key).to_owned();
    Alert { dedup_key: key.into(), kind, priority, summary: "el día <17> & \"los\" demás no se publicó".into() }
}

/// Every promise in turn, for a notifier that nobody has called yet.
pub async fn check(notifier: &dyn Notifier, priority: u8, seen: impl Fn() -> Vec<String>) {
    let (one, other) = (alert("run_failed:diario:2024-03-17", priority), alert("run_failed:diario:2024-03-18", priority));
    let raised = || seen().into_iter().filter(|s| s.starts_with("raise")).collect::<Vec<_>>();
    for _ in 0..3 {
        notifier.raise(&one).await.expect("it is taken");
    }
    assert_eq!(raised(), [format!("raise {}", one.dedup_key)], "repeating a key does not page again");
    notifier.raise(&other).await.expect("it is taken");
    assert_eq!(raised().len(), 2, "another key is another incident");
    for _ in 0..2 {
        notifier.resolve(&one.dedup_key).await.expect("resolving is idempotent");
    }
    notifier.resolve("run_failed:nadie:2024-03-17").await.expect("an end of nothing is no error");
    assert_eq!(raised().len(), 2, "an end pages nobody");
    notifier.raise(&other).await.expect("it is taken");
    assert_eq!(raised().len(), 2, "the other incident is still open");
    notifier.raise(&one).await.expect("it is taken");
    assert_eq!(raised().len(), 3, "after its end it is a new incident");
}
