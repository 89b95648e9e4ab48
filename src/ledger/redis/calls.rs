//! The conversation with the server: numbered batches, each done once whatever becomes of its reply, and what the server has lost.

use std::time::{Duration, SystemTime};

use super::clock::Time;
use super::wire::{Arguments, Reply, Status, Write, account_name};
use super::{DEAD_AFTER, InDoubt, OFFERS_MAX, PART_OF_LEFT, RedisLedger, Server, server_slot_of, signed};
use crate::ledger::claims::{Claim, Claims, Grown, Part};
use crate::ledger::{Change, LedgerError, LimitedAccount};
use crate::limit::{SLOT, SPAN, Stamp};

impl<S: Server> RedisLedger<S> {
    /// Calls the script, and offers what the server has lost until it takes the call.
    pub(super) fn call(&mut self, number: u64, mode: &str, operations: &Arguments) -> Result<Reply, LedgerError> {
        let mut is_sure = false;
        for _ in 0..OFFERS_MAX {
            let reply = self.call_once((number, self.acknowledged), (mode, is_sure), operations.clone())?;
            match reply.status {
                Status::Behind => self.offer(reply.stored)?,
                Status::Late => is_sure = true,
                Status::Done | Status::Known | Status::Old => return Ok(reply),
            }
        }
        Err(self.unusable("loses what is written to it again and again"))
    }

    pub(super) fn call_once(
        &mut self,
        (number, acknowledged): (u64, u64),
        (mode, is_sure): (&str, bool),
        operations: Arguments,
    ) -> Result<Reply, LedgerError> {
        let millis = |time: Duration| u64::try_from(time.as_millis()).unwrap_or(u64::MAX);
        let (sent_at, mut arguments) = (self.time.boot(), Arguments::default());
        let test_ms = match &self.time {
            Time::Server(_) => 0,
            Time::Given(clock) => millis(clock().wall.duration_since(SystemTime::UNIX_EPOCH).unwrap_or_default()),
        };
        let estimate =
            self.ahead_ms.filter(|_| test_ms == 0).map_or(0, |ahead| signed(sent_at.0).saturating_add(ahead));
        arguments.text(&self.prefix).text(&self.member).number(number).number(acknowledged).text(mode);
        arguments.number(millis(SLOT)).number(millis(SPAN) / millis(SLOT)).number(millis(self.grace));
        arguments.number(millis(DEAD_AFTER)).number(PART_OF_LEFT).number(self.heard_to).number(estimate);
        arguments.number(u8::from(is_sure)).number(test_ms);
        arguments.0.extend(operations.0);
        let reply = match self.server.batch(arguments) {
            Ok(reply) => reply,
            Err(error) => {
                self.in_touch_since = None;
                return Err(error);
            }
        };
        let now = self.time.boot();
        self.in_touch_since.get_or_insert(now);
        self.heard_at = now;
        if reply.status != Status::Late {
            self.learn(&reply, sent_at, now);
        }
        Ok(reply)
    }

    /// Takes in what a reply says of the server.
    pub(super) fn learn(&mut self, reply: &Reply, sent_at: Stamp, received_at: Stamp) {
        // By the moment of sending, so that permits seem rather older than they are.
        let ahead = signed(reply.now).saturating_sub(signed(sent_at.0));
        // By the moment of receiving, so that no slot expires here before it does there.
        let least = signed(reply.now).saturating_sub(signed(received_at.0));
        let slots = least.div_euclid(i64::try_from(SLOT.as_millis()).unwrap_or(i64::MAX));
        let has_moved = self.ahead_ms.is_none() || slots < self.slots_ahead || slots > self.slots_ahead + 1;
        self.ahead_ms = Some(ahead);
        if has_moved {
            self.slots_ahead = slots;
        }
        if let Time::Server(clock) = &self.time {
            clock.set(signed(reply.wall).saturating_sub(signed(sent_at.0)));
        }
        if has_moved || reply.epoch != self.epoch || reply.open_at != self.open_at {
            // Counts that were read before may be of another server.
            self.trusted_since = self.generation + 1;
            if reply.epoch != self.epoch {
                self.heard_to = 0;
            }
            self.epoch.clone_from(&reply.epoch);
            self.open_at = reply.open_at;
        }
    }

    /// Offers what the server has lost of what this process has written since a batch.
    pub(super) fn offer(&mut self, stored: u64) -> Result<(), LedgerError> {
        let mut operations = Arguments::default();
        let lost = self.offers.since(stored);
        for write in &lost {
            write.encode(&mut operations);
        }
        let batches = self.acknowledged.saturating_sub(stored);
        log::warn!(
            "ledger {}: the server has lost the last {batches} batches of this process; they are counted again",
            self.server.name()
        );
        self.call_once((stored, self.acknowledged), ("offer", true), operations).map(drop)
    }

    /// Finds out what became of a batch that nothing was heard of. What it writes is written; what it has drawn is given back.
    pub(super) fn resolve(&mut self) -> Result<(), LedgerError> {
        let Some(InDoubt { writes, claims }) = self.in_doubt.take() else { return Ok(()) };
        let mut operations = Arguments::default();
        for write in &writes {
            write.encode(&mut operations);
        }
        operations.claims(&claims);
        let reply = match self.call(self.sent, "again", &operations) {
            Ok(reply) => reply,
            Err(error) => {
                self.in_doubt = Some(InDoubt { writes, claims });
                return Err(error);
            }
        };
        self.acknowledged = self.sent;
        let slot = server_slot_of(reply.counted_at);
        let mut written = writes;
        if reply.status == Status::Known
            && let Some((parts, growths)) = reply.parts(&claims)
        {
            written.extend(Self::granted(&claims, &parts, &growths, slot));
            self.returned.extend(Self::given_back(&claims, &parts, &growths, slot));
        }
        // Whatever became of it, what is in flight now is what counts.
        let shared = claims.draws.iter().flat_map(Claim::changes).filter(|(of, _)| of.shares_concurrency());
        let in_flight = shared.map(|(of, _)| Write::InFlight {
            account: account_name(of.account.id()),
            own: of.account.mirror().quota.own_in_flight(),
        });
        self.returned.extend(in_flight);
        self.offers.push(self.sent, self.time.boot(), written);
        Ok(())
    }

    /// What was granted, as writes: for a server that has lost it.
    pub(super) fn granted(claims: &Claims, parts: &[Part], growths: &[Grown], slot: u64) -> Vec<Write> {
        let mut writes = Vec::new();
        for (claim, part) in claims.draws.iter().zip(parts).filter(|(_, part)| part.draws > 0) {
            let counts = |of: &LimitedAccount, change| Write::Counts {
                account: account_name(of.account.id()),
                slot,
                days: of.limits.counted(claim.counted).days,
                change,
            };
            writes.extend(claim.changes_of(*part).map(|(of, change)| counts(of, change)));
            writes.extend(in_flight_after(claims, parts, claim));
            if let Some(made) = &claim.reservation {
                let reserve = |of: &_| Write::Reserve { owner: claims.owner, id: made.id, part: Clone::clone(of) };
                writes.extend(made.parts.iter().map(reserve));
            }
        }
        for (growth, _) in claims.growths.iter().zip(growths).filter(|(_, grown)| **grown == Grown::Done) {
            let reserve = |part: &_| Write::Reserve { owner: claims.owner, id: growth.id, part: Clone::clone(part) };
            writes.extend(growth.parts.iter().map(reserve));
        }
        writes
    }

    /// What gives back what was granted and nobody knows of.
    pub(super) fn given_back(claims: &Claims, parts: &[Part], growths: &[Grown], slot: u64) -> Vec<Write> {
        let of = |write| match write {
            Write::Counts { account, slot, days, change } => {
                let change = Change { attempts: -change.attempts, tokens: -change.tokens };
                Some(Write::Counts { account, slot, days, change })
            }
            Write::Reserve { owner, id, part } if !claims.growths.iter().any(|of| of.id == id) => {
                Some(Write::Settle { owner, id, row: part.row, spent: 0, if_gone: 0 })
            }
            // What has grown stays reserved until it is settled.
            _ => None,
        };
        Self::granted(claims, parts, growths, slot).into_iter().filter_map(of).collect()
    }
}

/// What a claim's accounts have in flight once the parts of all claims are granted.
pub(super) fn in_flight_after(claims: &Claims, parts: &[Part], claim: &Claim) -> Vec<Write> {
    let of = |(of, _): (&LimitedAccount, Change)| {
        let claimed = claims.draws.iter().zip(parts);
        let refused = claimed.map(|(claim, part)| {
            let draws = claim.draws_of(&of.account);
            if draws == 0 { 0 } else { draws.saturating_sub(part.draws) }
        });
        let own = of.account.mirror().quota.own_in_flight().saturating_sub(refused.sum());
        Write::InFlight { account: account_name(of.account.id()), own }
    };
    claim.changes().filter(|(of, _)| of.shares_concurrency()).map(of).collect()
}
