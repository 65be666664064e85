//! The plan: assets with the settings of a person over the defaults of the platform, checked as a whole.

use std::{
    collections::{BTreeMap, BTreeSet},
    sync::Arc,
};

use serde::{Deserialize, Serialize};

use super::{Asset, BreakerPolicy, RetryPolicy, Schedule, SourcePolicy, Work};

/// What is wrong with a plan. Each names the asset, the key, what was found and what is allowed.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum PlanError {
    /// No schedule.
    #[error("schedule {found:?}: {why}; expected five fields in UTC, for example 0 3 * * *")]
    Schedule {
        /// As written.
        found: String,
        /// What is wrong.
        why: String,
    },
    /// A value of an asset.
    #[error("asset {asset}, {key}: found {found}, expected {expected}")]
    Value {
        /// Name of the asset.
        asset: String,
        /// Which setting.
        key: &'static str,
        /// As written.
        found: String,
        /// What is allowed.
        expected: String,
    },
    /// Settings for an asset that there is not.
    #[error("asset {found} is not known; there are {known}")]
    Unknown {
        /// As written.
        found: String,
        /// Those that there are.
        known: String,
    },
    /// Assets that wait for each other.
    #[error("assets depend on each other in a circle: {0}")]
    Circle(String),
    /// A setting of the orchestrator itself.
    #[error("orchestrator, {key}: found {found}, expected {expected}")]
    Loop {
        /// Which setting.
        key: &'static str,
        /// As written.
        found: u64,
        /// What is allowed.
        expected: String,
    },
}

/// What a person may set of an asset; what is left out stays as the platform has it. See [`Asset`] for what each means.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct AssetSettings {
    /// Whether it is run at all.
    pub enabled: Option<bool>,
    /// Who answers for it.
    pub owner: Option<String>,
    /// Assets that come first.
    pub depends_on: Option<Vec<String>>,
    /// Cron expression in UTC.
    pub schedule: Option<String>,
    /// Days that it looks back.
    pub lag_days: Option<u32>,
    /// While its source is away.
    pub source_policy: Option<SourcePolicy>,
    /// Seconds.
    pub alert_after_s: Option<u64>,
    /// Seconds.
    pub timeout_s: Option<u64>,
    /// Tries.
    pub retry: Option<RetryPolicy>,
    /// Breaker.
    pub breaker: Option<BreakerPolicy>,
    /// Seconds.
    pub sla_s: Option<u64>,
    /// 1, 2 or 3.
    pub priority: Option<u8>,
}

impl AssetSettings {
    fn over(&self, mut asset: Asset) -> Result<Asset, PlanError> {
        fn set<T: Clone>(value: &Option<T>, to: &mut T) {
            if let Some(value) = value {
                to.clone_from(value);
            }
        }
        if let Some(text) = &self.schedule {
            asset.schedule = Schedule::parse(text).map_err(|e| PlanError::Value {
                asset: asset.name.clone(),
                key: "schedule",
                found: format!("{text:?}"),
                expected: format!("a cron expression ({e})"),
            })?;
        }
        set(&self.owner, &mut asset.owner);
        set(&self.depends_on, &mut asset.depends_on);
        set(&self.lag_days, &mut asset.lag_days);
        set(&self.source_policy, &mut asset.source_policy);
        set(&self.alert_after_s, &mut asset.alert_after_s);
        set(&self.timeout_s, &mut asset.timeout_s);
        set(&self.retry, &mut asset.retry);
        set(&self.breaker, &mut asset.breaker);
        set(&self.priority, &mut asset.priority);
        asset.sla_s = self.sla_s.or(asset.sla_s);
        Ok(asset)
    }
}

/// How the orchestrator itself behaves. Durations are in seconds.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct LoopConfig {
    /// How long a lease lasts that is not renewed: the longest time without an orchestrator after a crash.
    pub lease_ttl_s: u64,
    /// How often it is renewed.
    pub renew_every_s: u64,
    /// How long before its lease ends a holder stops: the largest difference between the clocks of two machines that is
    /// harmless by itself. Beyond it, the token of the lease protects.
    pub clock_skew_s: u64,
    /// How often something is looked at again that another one must change: the lease, a pipeline that is run by hand, an
    /// asset that comes first.
    pub poll_s: u64,
    /// The first wait after an alert could not be delivered; it doubles, up to an hour.
    pub alert_backoff_s: u64,
    /// After it an alert that could not be delivered is given up, and counted as lost.
    pub alert_give_up_s: u64,
}

impl Default for LoopConfig {
    fn default() -> Self {
        Self { lease_ttl_s: 60, renew_every_s: 15, clock_skew_s: 10, poll_s: 15, alert_backoff_s: 30, alert_give_up_s: 86_400 }
    }
}

impl LoopConfig {
    /// Whether the times fit together.
    ///
    /// # Errors
    /// The first that does not, by name.
    pub fn check(&self) -> Result<(), PlanError> {
        let value = |key, found, expected: String| Err(PlanError::Loop { key, found, expected });
        if self.renew_every_s == 0 || self.renew_every_s + self.clock_skew_s >= self.lease_ttl_s {
            let most = self.lease_ttl_s.saturating_sub(self.clock_skew_s + 1);
            return value("renew_every_s", self.renew_every_s, format!("1 to {most}, below lease_ttl_s - clock_skew_s"));
        }
        if self.poll_s == 0 {
            return value("poll_s", 0, "at least 1".into());
        }
        if self.alert_backoff_s == 0 {
            return value("alert_backoff_s", 0, "at least 1".into());
        }
        Ok(())
    }
}

/// Assets with their work, in order of name, and how the orchestrator behaves.
#[derive(Debug, Clone)]
pub struct Plan {
    /// The orchestrator itself.
    pub config: LoopConfig,
    /// Assets with their work.
    pub assets: Vec<(Asset, Arc<dyn Work>)>,
}

fn is_name(name: &str) -> bool {
    !name.is_empty() && name.len() <= 60 && name.bytes().all(|b| b.is_ascii_lowercase() || b.is_ascii_digit() || b == b'_')
}

fn check(asset: &Asset, names: &BTreeSet<&str>) -> Result<(), PlanError> {
    let value = |key, found: String, expected: &str| {
        Err(PlanError::Value { asset: asset.name.clone(), key, found, expected: expected.into() })
    };
    if !is_name(&asset.name) {
        return value("name", format!("{:?}", asset.name), "1 to 60 lower-case letters, digits and _");
    }
    if !(1..=3).contains(&asset.priority) {
        return value("priority", asset.priority.to_string(), "1, 2 or 3");
    }
    if asset.timeout_s == 0 {
        return value("timeout_s", "0".into(), "at least 1");
    }
    if asset.breaker.open_s == 0 {
        return value("breaker.open_s", "0".into(), "at least 1");
    }
    if asset.lag_days > 366 {
        return value("lag_days", asset.lag_days.to_string(), "0 to 366");
    }
    if let Some(missing) = asset.depends_on.iter().find(|d| !names.contains(d.as_str())) {
        let all = names.iter().copied().collect::<Vec<_>>().join(", ");
        return value("depends_on", missing.clone(), &format!("an asset that is run: {all}"));
    }
    Ok(())
}

/// Takes away, again and again, what depends on nothing that is left; what then remains is a circle.
fn circle(assets: &[Asset]) -> Option<String> {
    let mut left: BTreeMap<&str, &[String]> = assets.iter().map(|a| (a.name.as_str(), a.depends_on.as_slice())).collect();
    loop {
        let free: Vec<&str> =
            left.iter().filter(|(_, deps)| deps.iter().all(|d| !left.contains_key(d.as_str()))).map(|(n, _)| *n).collect();
        if free.is_empty() {
            break;
        }
        left.retain(|name, _| !free.contains(name));
    }
    (!left.is_empty()).then(|| left.into_keys().collect::<Vec<_>>().join(", "))
}

/// The assets with a person's settings over them, in order of name. Those that are not enabled are left out.
///
/// # Errors
/// The first thing that is wrong, by name.
pub fn settled(assets: Vec<Asset>, settings: &BTreeMap<String, AssetSettings>) -> Result<Vec<Asset>, PlanError> {
    let known: BTreeSet<String> = assets.iter().map(|a| a.name.clone()).collect();
    if let Some(found) = settings.keys().find(|name| !known.contains(*name)) {
        let known = known.into_iter().collect::<Vec<_>>().join(", ");
        return Err(PlanError::Unknown { found: found.clone(), known });
    }
    let mut out = Vec::new();
    for asset in assets {
        let settings = settings.get(&asset.name).cloned().unwrap_or_default();
        if settings.enabled != Some(false) {
            out.push(settings.over(asset)?);
        }
    }
    out.sort_by(|a, b| a.name.cmp(&b.name));
    if let Some(twice) = out.windows(2).find(|w| w[0].name == w[1].name) {
        let (asset, expected) = (twice[0].name.clone(), "one asset of that name".to_owned());
        return Err(PlanError::Value { asset, key: "name", found: "two".into(), expected });
    }
    let names: BTreeSet<&str> = out.iter().map(|a| a.name.as_str()).collect();
    for asset in &out {
        check(asset, &names)?;
    }
    match circle(&out) {
        Some(names) => Err(PlanError::Circle(names)),
        None => Ok(out),
    }
}

impl Plan {
    /// The assets with a person's settings over them; see [`settled`].
    ///
    /// # Errors
    /// The first thing that is wrong, by name.
    pub fn new(
        config: LoopConfig,
        assets: Vec<(Asset, Arc<dyn Work>)>,
        settings: &BTreeMap<String, AssetSettings>,
    ) -> Result<Self, PlanError> {
        config.check()?;
        let (assets, works): (Vec<_>, Vec<_>) = assets.into_iter().map(|(a, w)| (a.clone(), (a.name, w))).unzip();
        let works: BTreeMap<String, Arc<dyn Work>> = works.into_iter().collect();
        let settled = settled(assets, settings)?;
        let with_work = settled.into_iter().filter_map(|a| works.get(&a.name).cloned().map(|w| (a, w)));
        Ok(Self { config, assets: with_work.collect() })
    }

    /// The asset of that name.
    pub fn asset(&self, name: &str) -> Option<&Asset> {
        self.assets.iter().map(|(asset, _)| asset).find(|a| a.name == name)
    }
}

#[cfg(test)]
mod tests {
    use async_trait::async_trait;
    use chrono::NaiveDate;

    use super::*;
    use crate::{
        contract::check::QualityResult,
        orchestrator::{Job, Slot, WorkError},
        ports::PortError,
    };

    #[derive(Debug)]
    struct Nothing;

    #[async_trait]
    impl Work for Nothing {
        async fn ready(&self) -> Result<(), PortError> {
            Ok(())
        }
        async fn checks(&self, _slot: Slot) -> Vec<QualityResult> {
            Vec::new()
        }
        async fn floor(&self, _fecha: NaiveDate) -> Result<i64, PortError> {
            Ok(0)
        }
        async fn run(&self, _job: &Job) -> Result<serde_json::Value, WorkError> {
            Ok(serde_json::Value::Null)
        }
    }

    fn asset(name: &str) -> (Asset, Arc<dyn Work>) {
        let asset = Asset {
            name: name.into(),
            owner: "datos".into(),
            depends_on: Vec::new(),
            schedule: Schedule::parse("0 3 * * *").expect("a schedule"),
            lag_days: 1,
            source_policy: SourcePolicy::Wait { every_s: 60, deadline_s: 600 },
            alert_after_s: 60,
            timeout_s: 600,
            retry: RetryPolicy { retries: 3, backoff_s: 300, deadline_s: 9_000 },
            breaker: BreakerPolicy { open_s: 600, trials: 3 },
            sla_s: None,
            priority: 1,
        };
        (asset, Arc::new(Nothing))
    }

    #[derive(Debug, Deserialize)]
    #[serde(deny_unknown_fields)]
    struct File {
        #[serde(default)]
        orchestrator: LoopConfig,
        #[serde(default)]
        assets: BTreeMap<String, AssetSettings>,
    }

    fn plan(text: &str) -> Result<Plan, String> {
        let file: File = toml::from_str(text).map_err(|e| e.to_string())?;
        Plan::new(file.orchestrator, vec![asset("b"), asset("a")], &file.assets).map_err(|e| e.to_string())
    }

    #[test]
    fn what_is_left_out_stays_as_it_was() {
        let text = "[orchestrator]\nlease_ttl_s = 120\n[assets.a]\ndepends_on = ['b']\nschedule = '30 4 * * 0'\nsla_s = 60\n\
                    retry = { retries = 1, backoff_s = 2, deadline_s = 3 }";
        let plan = plan(text).expect("a plan");
        assert_eq!(plan.assets.iter().map(|(a, _)| a.name.as_str()).collect::<Vec<_>>(), ["a", "b"]);
        assert_eq!(plan.asset("b"), Some(&asset("b").0));
        let a = plan.asset("a").expect("an asset");
        assert_eq!((a.schedule.to_string().as_str(), a.sla_s, a.retry.retries), ("30 4 * * 0", Some(60), 1));
        assert_eq!((a.timeout_s, a.owner.as_str()), (600, "datos"));
        assert_eq!(plan.config, LoopConfig { lease_ttl_s: 120, ..LoopConfig::default() });
    }

    #[test]
    fn an_asset_that_is_not_enabled_is_left_out() {
        assert_eq!(plan("[assets.a]\nenabled = false").expect("a plan").assets.len(), 1);
    }

    #[test]
    fn what_is_wrong_is_named_with_what_is_allowed() {
        for (text, parts) in [
            ("[assets.a]\ntimeout = 3", vec!["timeout", "timeout_s"]),
            ("[orchestrator]\nlease_ttl = 3", vec!["lease_ttl", "lease_ttl_s"]),
            ("[asset.a]\ntimeout_s = 3", vec!["asset", "assets"]),
            ("[assets.c]\ntimeout_s = 3", vec!["asset c is not known", "a, b"]),
            ("[assets.a]\nschedule = '0 25 * * *'", vec!["asset a, schedule", "0 25 * * *"]),
            ("[assets.a]\ndepends_on = ['z']", vec!["asset a, depends_on", "found z", "a, b"]),
            ("[assets.b]\nenabled = false\n[assets.a]\ndepends_on = ['b']", vec!["found b", "is run: a"]),
            ("[assets.a]\ndepends_on = ['b']\n[assets.b]\ndepends_on = ['a']", vec!["circle", "a, b"]),
            ("[assets.a]\ndepends_on = ['a']", vec!["circle: a"]),
            ("[assets.a]\npriority = 4", vec!["priority", "found 4", "1, 2 or 3"]),
            ("[assets.a]\ntimeout_s = 0", vec!["timeout_s", "at least 1"]),
            ("[orchestrator]\nrenew_every_s = 50", vec!["renew_every_s", "found 50", "1 to 49"]),
            ("[assets.a]\nretry = { retries = 1, backoff_s = 2 }", vec!["deadline_s"]),
            ("[assets.a]\nsource_policy = { kind = 'wait', every_s = 2, deadline_s = 3, x = 1 }", vec!["`x`"]),
        ] {
            let error = plan(text).expect_err(text);
            for part in parts {
                assert!(error.contains(part), "{text}\n{part} is not in: {error}");
            }
        }
    }
}
