//! Giving way to other tasks of the same thread, and avoiding needless wake-ups of the thread.
//!
//! A thread that takes all its requests through one stage, and then all of them through the next, finds each stage's code in its
//! caches, and the receivers of its writes awake. So a request steps aside at the end of a stage: its neighbours' answers leave
//! before its own is counted and logged.

use std::cell::Cell;
use std::future::poll_fn;
use std::mem;
use std::task::Poll;
use std::time::Duration;

/// Least distance of a timer that is set without waking the thread.
const HEARTBEAT: Duration = Duration::from_secs(1);

/// Lets every other task that can run do so once. Unlike the runtime's own way to yield it does not look for events of the system.
pub(crate) async fn step_aside() {
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

/// Keeps a timer of this thread's runtime due soon at all times.
///
/// A runtime wakes itself, by two system calls, whenever a timer is set that is due before all others. Between
/// two requests there is no other, so the timer of each request would cost both, unless its deadline is nearer than this one.
///
/// Has to be called inside of a runtime. Each thread spawns one task, once, since each may have a runtime of its own; where threads
/// share one, a single task would do, and a second runtime on a thread has none. Neither does harm.
pub(crate) fn keep_heartbeat() {
    thread_local! {
        static BEATS: Cell<bool> = const { Cell::new(false) };
    }
    if BEATS.replace(true) {
        return;
    }
    tokio::spawn(async {
        loop {
            tokio::time::sleep(HEARTBEAT).await;
        }
    });
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::cell::RefCell;

    #[tokio::test]
    async fn a_thread_has_one_heartbeat() {
        let tasks = || tokio::runtime::Handle::current().metrics().num_alive_tasks();
        assert_eq!(tasks(), 0);
        keep_heartbeat();
        keep_heartbeat();
        assert_eq!(tasks(), 1);
    }

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
