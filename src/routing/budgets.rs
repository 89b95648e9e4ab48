//! What a request may take of its caller's budgets, at each of its candidates.

use std::sync::Arc;
use std::time::SystemTime;

use crate::config::OnOverrun;
use crate::ledger::budgets::{Amount, BudgetSet, Spends};
use crate::request::fields::ServiceTier;
use crate::request::token_bound::TokenBound;
use crate::routing::pool::Endpoint;
use crate::usage::prices::PricedTokens;

/// What a request may take of its caller's budgets.
#[derive(Clone, Debug)]
pub struct BudgetAsk {
    /// The budgets.
    pub set: Arc<BudgetSet>,
    /// The most tokens that it can take, as far as that can be foreseen.
    pub bound: TokenBound,
    /// Tier of service that it asks for.
    pub tier: Option<ServiceTier>,
    /// Tokens by which that grows if its answer is longer.
    pub step_tokens: u64,
    /// What becomes of such a stream if a budget has no room for it.
    pub on_overrun: OnOverrun,
}

impl BudgetAsk {
    /// What it may take at an endpoint; none if the model has no price there, and a budget is in dollars.
    pub fn spends(&self, endpoint: &Endpoint, model: &str, wall: SystemTime) -> Option<Spends> {
        let TokenBound { prompt, answer } = self.bound;
        let known = self.amount(endpoint, model, PricedTokens::plain(prompt, 0), wall)?;
        let reserved = self.amount(endpoint, model, PricedTokens::plain(prompt, answer), wall)?;
        Some(Spends { reserved, known })
    }

    /// What a step of a longer answer takes.
    pub fn step(&self, endpoint: &Endpoint, model: &str, wall: SystemTime) -> Amount {
        self.amount(endpoint, model, PricedTokens::plain(0, self.step_tokens), wall).unwrap_or_default()
    }

    fn amount(&self, endpoint: &Endpoint, model: &str, tokens: PricedTokens, wall: SystemTime) -> Option<Amount> {
        let price = endpoint.prices.cost(model, &tokens, self.tier, wall);
        let nano_usd = match price {
            Some(price) => price.0,
            None if self.set.counts_money() => return None,
            None => 0,
        };
        Some(Amount { tokens: tokens.input.saturating_add(tokens.output), nano_usd })
    }
}
