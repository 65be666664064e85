//! The dimension API with faults that come and go by the clock, and what is known of its answers.

use std::sync::{Arc, Mutex, PoisonError};

use async_trait::async_trait;
use chrono::{DateTime, Utc};
use simulacro_core::{
    dimensions::paged::{PageRequest, PageResponse, Transport},
    ports::{Env, Result},
};

use super::Strikes;
use crate::dimension_api::{ApiFault, DirectLink, lock};

/// A fault of the API, from inclusive, to exclusive.
pub type Window = (DateTime<Utc>, DateTime<Utc>, ApiFault);

/// What the faults have done, and when the API really answered. Shared by the links of all processes.
#[derive(Debug, Default)]
pub struct ApiState {
    faults: Mutex<Vec<(Window, Strikes)>>,
    answered: Mutex<Vec<DateTime<Utc>>>,
}

impl ApiState {
    /// The faults that will strike.
    pub fn new(faults: Vec<Window>) -> Self {
        let faults = Mutex::new(faults.into_iter().map(|f| (f, Strikes::default())).collect());
        Self { faults, answered: Mutex::default() }
    }

    /// What each fault has done, in the order they were given.
    pub fn strikes(&self) -> Vec<Strikes> {
        self.faults.lock().unwrap_or_else(PoisonError::into_inner).iter().map(|(_, strikes)| *strikes).collect()
    }

    /// When it gave a page, or said that nothing has changed.
    pub fn answered(&self) -> Vec<DateTime<Utc>> {
        self.answered.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }
}

/// A link to the API, which faults strike.
#[derive(Debug)]
pub struct FaultyLink {
    /// The link.
    pub inner: DirectLink,
    /// The faults.
    pub state: Arc<ApiState>,
    /// True time.
    pub env: Arc<dyn Env>,
    /// The defence against staleness is off: an API that does not answer is taken for one that has nothing new.
    pub believes: bool,
}

#[async_trait]
impl Transport for FaultyLink {
    async fn get(&self, request: &PageRequest, what: &str) -> Result<PageResponse> {
        let now = self.env.now();
        let present = {
            let faults = self.state.faults.lock().unwrap_or_else(PoisonError::into_inner);
            let present = |(_, ((from, to, _), _)): &(usize, &(Window, Strikes))| (*from..*to).contains(&now);
            let present: Vec<usize> = faults.iter().enumerate().filter(present).map(|(index, _)| index).collect();
            let set = present.iter().map(|index| (faults[*index].0.2.clone(), faults[*index].1.hits)).collect();
            lock(&self.inner.service).set_faults(set);
            present
        };
        let answer = self.inner.get(request, what).await;
        {
            let mut faults = self.state.faults.lock().unwrap_or_else(PoisonError::into_inner);
            for (index, (_, hits)) in present.iter().zip(lock(&self.inner.service).injected()) {
                if *hits > faults[*index].1.hits {
                    faults[*index].1.strike(now);
                    faults[*index].1.hits = *hits;
                }
            }
        }
        match answer {
            Ok(response) if matches!(response.status, 200 | 304) => {
                self.state.answered.lock().unwrap_or_else(PoisonError::into_inner).push(now);
                Ok(response)
            }
            Ok(_) | Err(_) if self.believes && request.if_none_match.is_some() => Ok(PageResponse {
                status: 304,
                etag: request.if_none_match.clone(),
                retry_after: None,
                body: bytes::Bytes::new(),
            }),
            other => other,
        }
    }
}
