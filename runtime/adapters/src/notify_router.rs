//! Where an alert goes: P1 to PagerDuty, P2 and P3 to Slack, everything to a webhook if there is one, and what has no
//! other place to the log.
//!
//! Each channel is told once of a key, until the key is resolved: a repeated call reaches only those that have not taken it.
//! That is remembered by this process alone. After a restart an end is told to the channels that fold by key, PagerDuty and
//! the webhook; Slack, which does not, is spared an end of something that it may never have heard of.

use std::{
    collections::{BTreeMap, BTreeSet},
    sync::{Arc, Mutex, MutexGuard, PoisonError},
};

use async_trait::async_trait;
use chrono::{DateTime, Utc};
use serde::{Deserialize, Serialize};
use simulacro_core::ports::{Alert, Disposition, Env, Notifier, PortError, Result};

use crate::{
    LogNotifier,
    notify_channels::{alertmanager, kind, pagerduty_resolve, pagerduty_trigger, slack_alert, slack_resolve},
    notify_http::{DeliverySettings, Secret, Sender},
};

/// Where PagerDuty takes events.
const PAGERDUTY: &str = "https://events.pagerduty.com/v2/enqueue";
/// Most keys that are remembered; the oldest are forgotten, and then repeated rather than lost.
const REMEMBERED_MAX: usize = 10_000;

/// PagerDuty, Events API v2.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct PagerDutySettings {
    /// Environment variable with the routing key of the integration.
    pub routing_key_env: String,
    /// Where events are taken; PagerDuty's own address when it is left out.
    #[serde(default)]
    pub url: Option<String>,
}

/// A Slack incoming webhook.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct SlackSettings {
    /// Environment variable with the webhook's address, which is a secret.
    pub webhook_url_env: String,
}

/// A receiver of Alertmanager's webhooks, version 4.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct WebhookSettings {
    /// Address.
    pub url: String,
    /// Environment variable with a bearer token.
    #[serde(default)]
    pub token_env: Option<String>,
}

/// Where alerts go. Without a channel for its priority an alert is logged.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct AlertSettings {
    /// For P1.
    pub pagerduty: Option<PagerDutySettings>,
    /// For P2 and P3.
    pub slack: Option<SlackSettings>,
    /// For all.
    pub webhook: Option<WebhookSettings>,
    /// How patient one is with each.
    pub delivery: DeliverySettings,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
enum Channel {
    PagerDuty,
    Slack,
    Webhook,
    Log,
}

/// What is known of an incident.
#[derive(Debug, Clone)]
struct Known {
    alert: Alert,
    since: DateTime<Utc>,
    /// Channels that have taken it.
    told: BTreeSet<Channel>,
    /// Channels that have taken its end.
    ended: BTreeSet<Channel>,
}

/// Sends alerts to the channels of their priority.
#[derive(Debug)]
pub struct AlertRouter {
    env: Arc<dyn Env>,
    pagerduty: Option<(Sender, Secret)>,
    slack: Option<Sender>,
    webhook: Option<Sender>,
    known: Mutex<BTreeMap<String, Known>>,
}

impl AlertRouter {
    /// Sets the channels up; `lookup` reads environment variables. Opens no connection yet.
    ///
    /// # Errors
    /// `Permanent`, naming the variable or the channel, when a secret is missing or an address is none.
    pub fn new(settings: &AlertSettings, env: Arc<dyn Env>, lookup: impl Fn(&str) -> Option<String>) -> Result<Self> {
        let sender = |name, url: &Secret, bearer| Sender::new(name, url, bearer, env.clone(), settings.delivery.clone());
        let pagerduty = match &settings.pagerduty {
            Some(PagerDutySettings { routing_key_env, url }) => {
                let url = Secret(url.clone().unwrap_or_else(|| PAGERDUTY.to_owned()));
                Some((sender("PagerDuty", &url, None)?, Secret::from_env(routing_key_env, &lookup)?))
            }
            None => None,
        };
        let slack = match &settings.slack {
            Some(slack) => Some(sender("Slack", &Secret::from_env(&slack.webhook_url_env, &lookup)?, None)?),
            None => None,
        };
        let webhook = match &settings.webhook {
            Some(WebhookSettings { url, token_env }) => {
                let token = token_env.as_deref().map(|variable| Secret::from_env(variable, &lookup)).transpose()?;
                Some(sender("the webhook", &Secret(url.clone()), token)?)
            }
            None => None,
        };
        Ok(Self { env, pagerduty, slack, webhook, known: Mutex::default() })
    }

    fn known(&self) -> MutexGuard<'_, BTreeMap<String, Known>> {
        self.known.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn channels(&self, priority: u8) -> Vec<Channel> {
        let own = match priority {
            1 if self.pagerduty.is_some() => Some(Channel::PagerDuty),
            2 | 3 if self.slack.is_some() => Some(Channel::Slack),
            _ => None,
        };
        let all = self.webhook.as_ref().map(|_| Channel::Webhook);
        let mut channels: Vec<Channel> = own.into_iter().chain(all).collect();
        if channels.is_empty() {
            channels.push(Channel::Log);
        }
        channels
    }

    async fn raise_at(&self, channel: Channel, known: &Known) -> Result<()> {
        let (alert, what) = (&known.alert, format!("raise {}", known.alert.dedup_key));
        match (channel, &self.pagerduty, &self.slack, &self.webhook) {
            (Channel::PagerDuty, Some((sender, key)), _, _) => {
                sender.post(&what, &pagerduty_trigger(&key.0, alert, known.since)).await
            }
            (Channel::Slack, _, Some(sender), _) => sender.post(&what, &slack_alert(alert)).await,
            (Channel::Webhook, _, _, Some(sender)) => sender.post(&what, &alertmanager(alert, known.since, None)).await,
            (Channel::PagerDuty | Channel::Slack | Channel::Webhook | Channel::Log, _, _, _) => LogNotifier.raise(alert).await,
        }
    }

    async fn resolve_at(&self, channel: Channel, known: &Known) -> Result<()> {
        let key = &known.alert.dedup_key;
        let what = format!("resolve {key}");
        match (channel, &self.pagerduty, &self.slack, &self.webhook) {
            (Channel::PagerDuty, Some((sender, routing)), _, _) => sender.post(&what, &pagerduty_resolve(&routing.0, key)).await,
            (Channel::Slack, _, Some(sender), _) => sender.post(&what, &slack_resolve(key)).await,
            (Channel::Webhook, _, _, Some(sender)) => {
                sender.post(&what, &alertmanager(&known.alert, known.since, Some(self.env.now()))).await
            }
            (Channel::PagerDuty | Channel::Slack | Channel::Webhook | Channel::Log, _, _, _) => LogNotifier.resolve(key).await,
        }
    }

    fn remember(&self, known: Known) {
        let mut all = self.known();
        all.insert(known.alert.dedup_key.clone(), known);
        while all.len() > REMEMBERED_MAX {
            let oldest = all.iter().min_by_key(|(_, k)| k.since).map(|(key, _)| key.clone());
            oldest.and_then(|key| all.remove(&key));
        }
    }
}

/// The error of several channels: one that may pass, if there is one, since a repetition reaches only those that failed.
fn worst(errors: Vec<PortError>) -> Result<()> {
    let mut errors = errors;
    let passing = errors.iter().position(|e| e.disposition != Disposition::Permanent).unwrap_or(0);
    if errors.is_empty() { Ok(()) } else { Err(errors.swap_remove(passing)) }
}

#[async_trait]
impl Notifier for AlertRouter {
    async fn raise(&self, alert: &Alert) -> Result<()> {
        let fresh = || Known { alert: alert.clone(), since: self.env.now(), told: BTreeSet::new(), ended: BTreeSet::new() };
        let present = self.known().get(&alert.dedup_key).cloned();
        let mut known = present.unwrap_or_else(fresh);
        let mut errors = Vec::new();
        for channel in self.channels(alert.priority) {
            if known.told.contains(&channel) {
                continue;
            }
            match self.raise_at(channel, &known).await {
                Ok(()) => drop(known.told.insert(channel)),
                Err(e) => errors.push(e),
            }
        }
        self.remember(known);
        worst(errors)
    }

    async fn resolve(&self, dedup_key: &str) -> Result<()> {
        let present = self.known().get(dedup_key).cloned();
        let mut known = present.unwrap_or_else(|| {
            let now = self.env.now();
            let (kind, summary) = (kind(dedup_key).to_owned(), String::new());
            let alert = Alert { dedup_key: dedup_key.into(), kind, priority: 0, summary };
            let folding = [(Channel::PagerDuty, self.pagerduty.is_some()), (Channel::Webhook, self.webhook.is_some())];
            let told = folding.into_iter().filter(|(_, is_there)| *is_there).map(|(channel, _)| channel).collect();
            Known { alert, since: now, told, ended: BTreeSet::new() }
        });
        let mut errors = Vec::new();
        for channel in known.told.clone() {
            if known.ended.contains(&channel) {
                continue;
            }
            match self.resolve_at(channel, &known).await {
                Ok(()) => drop(known.ended.insert(channel)),
                Err(e) => errors.push(e),
            }
        }
        if errors.is_empty() {
            self.known().remove(dedup_key);
        } else {
            self.remember(known);
        }
        worst(errors)
    }
}
