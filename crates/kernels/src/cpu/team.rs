//! Threads that do the tasks of one operation together and stay awake between operations.
//!
//! A step is a thousand operations of a tenth of a millisecond to ten: a thread that sleeps between two of them wakes
//! later than a small one ends. Members therefore look for work a while before they sleep, the caller is a member, and
//! one that is late is not waited for: whoever is awake takes the tasks one by one, and the caller leaves when none is
//! left and those who took some are done.

use std::any::Any;
use std::cell::UnsafeCell;
use std::panic::{AssertUnwindSafe, catch_unwind, resume_unwind};
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::thread::{JoinHandle, Thread};

/// How often a member looks for work before it gives its processor to others between two looks, and how often it then
/// looks before it sleeps: some 100 microseconds in all.
const LOOKS: usize = 2_000;
const PATIENT_LOOKS: usize = 50;

/// Set in [`Shared::joined`] while a job may be joined.
const OPEN: usize = 1 << (usize::BITS - 1);

/// A fixed number of threads, the caller of [`Team::each`] among them.
pub(crate) struct Team {
    shared: Arc<Shared>,
    members: Vec<Member>,
    /// Held by the caller whose job it is.
    turn: Mutex<()>,
}

struct Member {
    thread: Thread,
    handle: Option<JoinHandle<()>>,
    asleep: Arc<AtomicBool>,
}

struct Shared {
    /// The job, valid while it is open and until the last member that joined it has left.
    job: UnsafeCell<Option<Job>>,
    /// [`OPEN`], and the number of members at work.
    joined: AtomicUsize,
    /// The number of jobs so far: how a member sees that there is a new one.
    jobs: AtomicUsize,
    /// The next task.
    next: AtomicUsize,
    /// What the first task that panicked left.
    panic: Mutex<Option<Box<dyn Any + Send>>>,
    ended: AtomicBool,
}

#[derive(Clone, Copy)]
struct Job {
    work: *const (dyn Fn(usize) + Sync),
    count: usize,
}

#[expect(unsafe_code, reason = "the job is handed from thread to thread")]
// SAFETY: `job` is written only by the caller that holds `turn`, while the job is closed and nobody is joined to it, and
// is read only by those who have joined it; both sides go through `joined`. What its pointer leads to is `Sync`.
unsafe impl Sync for Shared {}
#[expect(unsafe_code, reason = "the job is handed from thread to thread")]
// SAFETY: as above.
unsafe impl Send for Shared {}

impl Team {
    /// A team of `threads` (at least 1), of which `threads - 1` are started.
    pub(crate) fn new(threads: usize) -> std::io::Result<Self> {
        let shared = Arc::new(Shared {
            job: UnsafeCell::new(None),
            joined: AtomicUsize::new(0),
            jobs: AtomicUsize::new(0),
            next: AtomicUsize::new(0),
            panic: Mutex::new(None),
            ended: AtomicBool::new(false),
        });
        let mut team = Team { shared, members: Vec::new(), turn: Mutex::new(()) };
        for index in 1..threads {
            let asleep = Arc::new(AtomicBool::new(false));
            let (shared, own) = (Arc::clone(&team.shared), Arc::clone(&asleep));
            let name = format!("kernels-{index}");
            let handle = std::thread::Builder::new().name(name).spawn(move || shared.serve(&own))?;
            team.members.push(Member { thread: handle.thread().clone(), handle: Some(handle), asleep });
        }
        Ok(team)
    }

    pub(crate) fn threads(&self) -> usize {
        self.members.len() + 1
    }

    /// Does `work` for all numbers below `count`, on any thread and in about that order.
    ///
    /// Within a task, or while another thread has the team, the caller does all of it alone.
    ///
    /// # Panics
    /// Where a task panics, when all others have ended.
    pub(crate) fn each(&self, count: usize, work: impl Fn(usize) + Sync) {
        let turn = match self.turn.try_lock() {
            Ok(turn) => Some(turn),
            Err(std::sync::TryLockError::Poisoned(poisoned)) => Some(poisoned.into_inner()),
            Err(std::sync::TryLockError::WouldBlock) => None,
        };
        if count < 2 || self.members.is_empty() || turn.is_none() {
            return (0..count).for_each(work);
        }
        self.shared.open(Job { work: erased(&work), count });
        for member in &self.members {
            if member.asleep.swap(false, Ordering::SeqCst) {
                member.thread.unpark();
            }
        }
        let own = catch_unwind(AssertUnwindSafe(|| self.shared.take_tasks(count, &work)));
        self.shared.close();
        let others = self.shared.panic.lock().unwrap_or_else(PoisonError::into_inner).take();
        drop(turn);
        if let Some(payload) = own.err().or(others) {
            resume_unwind(payload);
        }
    }
}

impl Team {
    /// The results of `work` on every item, in the items' order.
    pub(crate) fn map<T: Send, R: Send>(&self, items: Vec<T>, work: impl Fn(T) -> R + Sync) -> Vec<R> {
        let slots: Vec<Mutex<(Option<T>, Option<R>)>> =
            items.into_iter().map(|item| Mutex::new((Some(item), None))).collect();
        self.each(slots.len(), |task| {
            let mut slot = slots[task].lock().unwrap_or_else(PoisonError::into_inner);
            slot.1 = slot.0.take().map(&work);
        });
        let result =
            |slot: Mutex<(Option<T>, Option<R>)>| slot.into_inner().unwrap_or_else(PoisonError::into_inner).1;
        slots.into_iter().map(|slot| result(slot).expect("every task was done")).collect()
    }
}

/// The same work without its lifetime: [`Team::each`] does not return before the last member has left the job.
#[expect(unsafe_code, reason = "a lifetime is left out")]
fn erased<'w>(work: &'w (dyn Fn(usize) + Sync + 'w)) -> *const (dyn Fn(usize) + Sync) {
    let work: *const (dyn Fn(usize) + Sync + 'w) = work;
    // SAFETY: pointers of one kind; only what is behind them has another lifetime, which the caller keeps.
    unsafe { std::mem::transmute::<*const (dyn Fn(usize) + Sync + 'w), *const (dyn Fn(usize) + Sync)>(work) }
}

impl Shared {
    #[expect(unsafe_code, reason = "writes the job")]
    fn open(&self, job: Job) {
        self.next.store(0, Ordering::Relaxed);
        // SAFETY: the caller has `turn`, and the last job was left by all who had joined it.
        unsafe { *self.job.get() = Some(job) };
        self.joined.store(OPEN, Ordering::Release);
        self.jobs.fetch_add(1, Ordering::SeqCst);
    }

    /// Lets nobody join any more and waits for those who have.
    fn close(&self) {
        self.joined.fetch_and(!OPEN, Ordering::AcqRel);
        let mut looks = 0;
        while self.joined.load(Ordering::Acquire) != 0 {
            looks += 1;
            rest(looks);
        }
    }

    fn take_tasks(&self, count: usize, work: &(dyn Fn(usize) + Sync)) {
        loop {
            let task = self.next.fetch_add(1, Ordering::Relaxed);
            if task >= count {
                return;
            }
            work(task);
        }
    }

    /// What a started thread does until the team ends.
    fn serve(&self, asleep: &AtomicBool) {
        let mut served = 0;
        while let Some(job) = self.wait_for_job(served, asleep) {
            served = job;
            self.join();
        }
    }

    /// The number of the next job; `None` where the team has ended.
    fn wait_for_job(&self, served: usize, asleep: &AtomicBool) -> Option<usize> {
        let mut looks = 0;
        loop {
            if self.ended.load(Ordering::Acquire) {
                return None;
            }
            let jobs = self.jobs.load(Ordering::SeqCst);
            if jobs != served {
                return Some(jobs);
            }
            looks += 1;
            if looks < LOOKS + PATIENT_LOOKS {
                rest(looks);
                continue;
            }
            asleep.store(true, Ordering::SeqCst);
            // A job that came before `asleep` was seen wakes nobody.
            if self.jobs.load(Ordering::SeqCst) == served && !self.ended.load(Ordering::Acquire) {
                std::thread::park();
            }
            asleep.store(false, Ordering::SeqCst);
            looks = 0;
        }
    }

    /// Takes part in the job, where it is still open.
    #[expect(unsafe_code, reason = "reads the job")]
    fn join(&self) {
        let joining = |joined: usize| (joined & OPEN != 0).then(|| joined + 1);
        if self.joined.fetch_update(Ordering::AcqRel, Ordering::Acquire, joining).is_err() {
            return;
        }
        // SAFETY: joined to an open job, which is not written nor gone before this thread has left it.
        let work = unsafe { (*self.job.get()).map(|job| (&*job.work, job.count)) };
        if let Some((work, count)) = work {
            let done = catch_unwind(AssertUnwindSafe(|| self.take_tasks(count, work)));
            if let Err(payload) = done {
                self.panic.lock().unwrap_or_else(PoisonError::into_inner).get_or_insert(payload);
            }
        }
        self.joined.fetch_sub(1, Ordering::AcqRel);
    }
}

/// Between two looks at something that changes soon.
fn rest(looks: usize) {
    if looks < LOOKS { std::hint::spin_loop() } else { std::thread::yield_now() }
}

impl Drop for Team {
    fn drop(&mut self) {
        self.shared.ended.store(true, Ordering::SeqCst);
        for member in &mut self.members {
            member.thread.unpark();
            if let Some(handle) = member.handle.take() {
                // Members catch what tasks throw, so that there is nothing to hear of.
                drop(handle.join());
            }
        }
    }
}

impl std::fmt::Debug for Team {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Team").field("threads", &self.threads()).finish_non_exhaustive()
    }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::*;

    fn counts(team: &Team, count: usize) -> Vec<usize> {
        let done: Vec<AtomicUsize> = (0..count).map(|_| AtomicUsize::new(0)).collect();
        team.each(count, |task| {
            done[task].fetch_add(1, Ordering::Relaxed);
        });
        done.into_iter().map(AtomicUsize::into_inner).collect()
    }

    #[test]
    fn every_task_is_done_once_by_any_number_of_threads() {
        for threads in 1..6 {
            let team = Team::new(threads).unwrap();
            for count in (0..40).chain([1000; 200]) {
                assert_eq!(counts(&team, count), vec![1; count], "{threads} threads");
            }
        }
    }

    #[test]
    fn members_that_have_gone_to_sleep_are_woken() {
        let team = Team::new(3).unwrap();
        for _ in 0..5 {
            std::thread::sleep(Duration::from_millis(20));
            let asleep = || team.members.iter().all(|member| member.asleep.load(Ordering::SeqCst));
            while !asleep() {
                std::thread::yield_now();
            }
            // Two tasks that wait for each other are done only where a second thread takes part.
            let met = AtomicUsize::new(0);
            team.each(2, |_| {
                met.fetch_add(1, Ordering::SeqCst);
                while met.load(Ordering::SeqCst) < 2 {
                    std::thread::yield_now();
                }
            });
        }
    }

    #[test]
    fn a_task_may_have_tasks_and_a_busy_team_leaves_a_caller_to_itself() {
        let team = Team::new(2).unwrap();
        let sum = AtomicUsize::new(0);
        std::thread::scope(|scope| {
            for _ in 0..3 {
                scope.spawn(|| {
                    team.each(10, |i| {
                        team.each(10, |j| {
                            sum.fetch_add(10 * i + j, Ordering::Relaxed);
                        });
                    });
                });
            }
        });
        assert_eq!(sum.into_inner(), 3 * (0..100).sum::<usize>());
    }

    #[test]
    fn a_panic_reaches_the_caller_and_the_team_goes_on() {
        let team = Team::new(3).unwrap();
        for bad in [0, 57, 99] {
            let thrown = catch_unwind(AssertUnwindSafe(|| {
                team.each(100, |task| assert_ne!(task, bad, "task {task}"));
            }));
            let message = thrown.unwrap_err().downcast::<String>().unwrap();
            assert!(message.contains(&format!("task {bad}")), "{message}");
            assert_eq!(counts(&team, 33), vec![1; 33]);
        }
    }
}
