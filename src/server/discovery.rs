//! Model discovery: endpoints that the config wants asked are asked for their models, now and then. Each time takes a permit.

use std::sync::Arc;
use std::time::Duration;

use arc_swap::ArcSwap;
use async_trait::async_trait;
use pingora::server::ShutdownWatch;
use pingora::services::background::BackgroundService;

use crate::config::CallKind;
use crate::exchange::own_call::{OwnCall, OwnCalls};
use crate::ledger::{Drawn, Permit};
use crate::routing::pool::{Endpoint, Pool};
use crate::routing::router::ModelName;

/// Interval of looking whether an endpoint is due.
const LOOK_INTERVAL: Duration = Duration::from_secs(1);

/// Asks endpoints for their models.
pub(super) struct Discovery(pub(super) Arc<ArcSwap<Pool>>);

#[async_trait]
impl BackgroundService for Discovery {
    async fn start(&self, mut shutdown: ShutdownWatch) {
        let mut ticks = tokio::time::interval(LOOK_INTERVAL);
        ticks.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Delay);
        loop {
            tokio::select! {
                _ = ticks.tick() => self.round().await,
                _ = shutdown.changed() => return,
            }
        }
    }
}

impl Discovery {
    async fn round(&self) {
        let pool = self.0.load_full();
        let now = pool.clock().now;
        let mut asked = tokio::task::JoinSet::new();
        for endpoint in pool.endpoints.iter().filter(|endpoint| endpoint.config.usable()) {
            let Some(interval) = endpoint.config.discovery else { continue };
            if endpoint.live.discovered.list().is_none()
                && let Some(list) = pool.ledger.models_known().get(&endpoint.config.id)
            {
                endpoint.live.discovered.recall(list);
            }
            if endpoint.live.discovered.is_due(now, interval) {
                let (pool, endpoint) = (Arc::clone(&pool), Arc::clone(endpoint));
                asked.spawn(async move { discover(&pool, &endpoint, interval).await });
            }
        }
        asked.join_all().await;
    }
}

async fn discover(pool: &Pool, endpoint: &Endpoint, interval: Duration) {
    let id = &endpoint.config.id;
    match list(pool, endpoint).await {
        Ok(text) if endpoint.live.discovered.take(&text) => {
            endpoint.live.discovered.succeeded();
            if let Ok(text) = std::str::from_utf8(&text) {
                pool.ledger.keep_models(Arc::clone(id), text.into());
            }
        }
        other => {
            if endpoint.live.discovered.failed(pool.clock().now, interval) {
                let why = other.err().unwrap_or_else(|| "its answer does not hold a list of models".to_owned());
                log::warn!("endpoint {id}: its models cannot be listed: {why}; the last list stays");
            }
        }
    }
}

async fn list(pool: &Pool, endpoint: &Endpoint) -> Result<bytes::Bytes, String> {
    let addresses = endpoint.upstream_of(CallKind::Other).addresses().await.map_err(|error| error.to_string())?;
    let address = *addresses.first().ok_or("it has no address")?;
    let lane = endpoint.lane_for_own_call(&pool.clock());
    let mut permit = permit(pool, endpoint, lane).await?;
    permit.spend();
    let calls = OwnCalls::new(endpoint, (CallKind::Other, lane), address);
    let answer = calls.ask(OwnCall::get("/v1/models")).await.map_err(|(what, _)| what)?;
    if answer.status == 200 { Ok(answer.body) } else { Err(format!("it answered {}", answer.status)) }
}

async fn permit(pool: &Pool, endpoint: &Endpoint, lane: usize) -> Result<Permit, String> {
    match pool.draw_for_own_call(&endpoint.accounts_at(ModelName { name: "", in_config: true }, lane)).await {
        Drawn::Granted(_, permit) => Ok(permit),
        Drawn::Refused(_) => Err("it is at a limit".to_owned()),
        Drawn::Unavailable => Err("the ledger cannot be used".to_owned()),
    }
}
