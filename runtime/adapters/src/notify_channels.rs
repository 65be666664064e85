//! What PagerDuty, Slack and whoever reads Alertmanager's webhooks are sent, as functions from alerts to JSON.

use chrono::{DateTime, SecondsFormat, Utc};
use serde_json::{Value, json};
use simulacro_core::ports::Alert;

use crate::notify_http::{cut, fingerprint};

/// Longest key that PagerDuty takes, in bytes.
const KEY_BYTES_MAX: usize = 255;
/// Longest summary that PagerDuty takes.
const SUMMARY_BYTES_MAX: usize = 1_024;
/// Longest text of a message.
const TEXT_BYTES_MAX: usize = 3_000;

/// A key that PagerDuty takes: a longer one is cut, and told apart by a fingerprint.
fn pagerduty_key(key: &str) -> String {
    if key.len() <= KEY_BYTES_MAX {
        return key.to_owned();
    }
    format!("{}-{:016x}", cut(key, KEY_BYTES_MAX - 17), fingerprint(key))
}

/// The kind in front of a key.
pub(crate) fn kind(key: &str) -> &str {
    key.split(':').next().unwrap_or(key)
}

fn severity(priority: u8) -> &'static str {
    match priority {
        1 => "critical",
        2 => "error",
        3 => "warning",
        _ => "info",
    }
}

/// Events API v2, trigger.
pub(crate) fn pagerduty_trigger(routing_key: &str, alert: &Alert, now: DateTime<Utc>) -> Value {
    json!({
        "routing_key": routing_key,
        "event_action": "trigger",
        "dedup_key": pagerduty_key(&alert.dedup_key),
        "client": "simulacro",
        "payload": {
            "summary": cut(&alert.summary, SUMMARY_BYTES_MAX),
            "source": "simulacro",
            "severity": severity(alert.priority),
            "timestamp": now.to_rfc3339_opts(SecondsFormat::Millis, true),
            "component": alert.dedup_key.split(':').nth(1),
            "class": alert.kind,
            "custom_details": { "priority": alert.priority, "key": alert.dedup_key },
        },
    })
}

/// Events API v2, resolve.
pub(crate) fn pagerduty_resolve(routing_key: &str, key: &str) -> Value {
    json!({ "routing_key": routing_key, "event_action": "resolve", "dedup_key": pagerduty_key(key) })
}

/// The three characters that Slack's markup takes for itself.
fn escape(text: &str) -> String {
    text.replace('&', "&amp;").replace('<', "&lt;").replace('>', "&gt;")
}

/// Incoming webhook, an alert.
pub(crate) fn slack_alert(alert: &Alert) -> Value {
    let text = format!("*[P{}] {}* {}\n`{}`", alert.priority, alert.kind, escape(&alert.summary), escape(&alert.dedup_key));
    json!({ "text": cut(&text, TEXT_BYTES_MAX) })
}

/// Incoming webhook, the end of an incident.
pub(crate) fn slack_resolve(key: &str) -> Value {
    json!({ "text": format!("*[resolved] {}*\n`{}`", kind(key), escape(key)) })
}

/// Alertmanager's webhook, version 4, with one alert; `ended` is when it was resolved.
pub(crate) fn alertmanager(alert: &Alert, since: DateTime<Utc>, ended: Option<DateTime<Utc>>) -> Value {
    let status = if ended.is_some() { "resolved" } else { "firing" };
    let labels = json!({
        "alertname": alert.kind,
        "dedup_key": alert.dedup_key,
        "priority": format!("P{}", alert.priority),
        "severity": severity(alert.priority),
    });
    let annotations = json!({ "summary": alert.summary });
    let time = |t: DateTime<Utc>| t.to_rfc3339_opts(SecondsFormat::Millis, true);
    json!({
        "version": "4",
        "groupKey": format!("{{}}:{{dedup_key={:?}}}", alert.dedup_key),
        "truncatedAlerts": 0,
        "status": status,
        "receiver": "simulacro",
        "groupLabels": { "dedup_key": alert.dedup_key },
        "commonLabels": labels,
        "commonAnnotations": annotations,
        "externalURL": "",
        "alerts": [{
            "status": status,
            "labels": labels,
            "annotations": annotations,
            "startsAt": time(since),
            // Go's zero time: Alertmanager's way to say that it has no end yet.
            "endsAt": ended.map_or_else(|| "0001-01-01T00:00:00Z".to_owned(), time),
            "generatorURL": "",
            "fingerprint": format!("{:016x}", fingerprint(&alert.dedup_key)),
        }],
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_long_key_is_cut_and_still_its_own() {
        let (one, other) = (format!("{}1", "ñ".repeat(200)), format!("{}2", "ñ".repeat(200)));
        let (a, b) = (pagerduty_key(&one), pagerduty_key(&other));
        assert!(a.len() <= KEY_BYTES_MAX && b.len() <= KEY_BYTES_MAX && a != b, "{a} {b}");
        assert_eq!(pagerduty_key("run_failed:x"), "run_failed:x");
    }

    #[test]
    fn each_priority_has_its_severity() {
        assert_eq!([1, 2, 3, 4].map(severity), ["critical", "error", "warning", "info"]);
    }
}
