//! Giving way to other tasks of the same thread.
//!
//! A thread that takes all the requests at hand through one stage, and then all of them through the next, finds each stage's code in
//! its caches, and whoever it writes to awake. So a request steps aside where a stage ends that others can do without: its
//! neighbours' answers leave before its own is counted and logged.

use std::future::poll_fn;
use std::mem;
use std::task::Poll;

/// Lets every other task that can run do so once. Unlike the runtime's own way to yield it does not look for events of the system.
pub async fn step_aside() {
    let mut is_back = false;
    poll_fn(|context| {
        if mem::replace(&mut is_back, true) {
            return Poll::Ready(());
        }
        context.waker().wake_by_ref();
        Poll::Pending
    })
    .await;
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::cell::RefCell;

    #[tokio::test]
    async fn whoever_steps_aside_lets_the_others_go_first() {
        let order = RefCell::new(Vec::new());
        let one = |name: &'static str| {
            let order = &order;
            async move {
                order.borrow_mut().push((name, 1));
                step_aside().await;
                order.borrow_mut().push((name, 2));
            }
        };
        tokio::join!(biased; one("a"), one("b"));
        assert_eq!(*order.borrow(), [("a", 1), ("b", 1), ("a", 2), ("b", 2)]);
    }
}
