//! The queues of behaviours.

use std::collections::{HashMap, VecDeque};
use std::sync::Arc;

use super::behaviour::Behaviour;

/// The name that stands for all models without a script of their own.
const ANY_MODEL: &str = "*";
/// Begins names of scripts that are for requests with a key, whatever their model.
const KEY_PREFIX: &str = "key:";

/// Behaviours in one script; more than any test has requests, so only a mistake reaches it.
const MAX_BEHAVIOURS: usize = 100_000;

/// Models with a script; control calls come from outside and must not fill the memory.
const MAX_SCRIPTS: usize = 1_000;

pub(super) struct Scripts {
    by_model: HashMap<String, VecDeque<Arc<Behaviour>>>,
    default: Arc<Behaviour>,
}

/// A behaviour, and whether a script or a model's name asked for it.
pub(super) struct Chosen {
    pub(super) behaviour: Arc<Behaviour>,
    pub(super) scripted: bool,
}

impl Scripts {
    pub(super) fn new(default: Behaviour) -> Self {
        Self { by_model: HashMap::new(), default: Arc::new(default) }
    }

    pub(super) fn set(&mut self, model: &str, mut behaviours: Vec<Behaviour>) {
        if behaviours.is_empty() {
            self.by_model.remove(model);
            return;
        }
        if self.by_model.len() >= MAX_SCRIPTS && !self.by_model.contains_key(model) {
            log::warn!("simulator: more than {MAX_SCRIPTS} scripts, that of {model} is ignored");
            return;
        }
        if behaviours.len() > MAX_BEHAVIOURS {
            log::warn!("simulator: the script of {model} is cut to {MAX_BEHAVIOURS} behaviours");
            behaviours.truncate(MAX_BEHAVIOURS);
        }
        let queue = behaviours.into_iter().map(Arc::new).collect();
        self.by_model.insert(model.into(), queue);
    }

    pub(super) fn set_default(&mut self, behaviour: Behaviour) {
        self.default = Arc::new(behaviour);
    }

    pub(super) fn clear(&mut self) {
        self.by_model.clear();
    }

    /// Takes the behaviour for a request; an error when the model's name is not readable.
    pub(super) fn take(&mut self, model: Option<&str>, key: Option<&str>) -> Result<Chosen, String> {
        if let Some(behaviour) = key.and_then(|key| self.next(&format!("{KEY_PREFIX}{key}"))) {
            return Ok(Chosen { behaviour, scripted: true });
        }
        if let Some(model) = model {
            if let Some(behaviour) = self.next(model) {
                return Ok(Chosen { behaviour, scripted: true });
            }
            if let Some(spelled) = Behaviour::from_model(model) {
                return Ok(Chosen { behaviour: Arc::new(spelled?), scripted: true });
            }
        }
        Ok(self.take_any())
    }

    /// Takes the next behaviour of `*` or the default if it answers before the body is read.
    pub(super) fn take_early(&mut self) -> Option<Chosen> {
        let next = self.by_model.get(ANY_MODEL).and_then(VecDeque::front);
        next.unwrap_or(&self.default).early.then(|| self.take_any())
    }

    fn take_any(&mut self) -> Chosen {
        match self.next(ANY_MODEL) {
            Some(behaviour) => Chosen { behaviour, scripted: true },
            None => Chosen { behaviour: Arc::clone(&self.default), scripted: false },
        }
    }

    fn next(&mut self, model: &str) -> Option<Arc<Behaviour>> {
        let queue = self.by_model.get_mut(model)?;
        if queue.len() > 1 { queue.pop_front() } else { queue.front().cloned() }
    }
}
