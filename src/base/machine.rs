//! What this machine gives a process: memory, CPUs, and how urgent its threads are.

use std::sync::atomic::{AtomicU64, Ordering};

/// How much nicer threads of ours are than the thread that started them. With two cores and a consumer that sleeps for
/// 1.2 times what loading takes, its waits fell from 4 to 2 per cent of its time.
pub(crate) const NICENESS: libc::c_int = 5;

/// Bytes of memory that this process can have: the machine's, or its cgroup's limit (a container's, a batch job's).
pub(crate) fn physical_memory() -> u64 {
    // 0 until known. No lock: the child of a fork would wait for ever for a thread that was making it.
    static BYTES: AtomicU64 = AtomicU64::new(0);
    let known = BYTES.load(Ordering::Relaxed);
    if known > 0 {
        return known;
    }
    // SAFETY: sysconf only reads a constant of the system.
    let (pages, size) = unsafe { (libc::sysconf(libc::_SC_PHYS_PAGES), libc::sysconf(libc::_SC_PAGESIZE)) };
    let machine = u64::try_from(pages).unwrap_or(u64::MAX).saturating_mul(u64::try_from(size).unwrap_or(1));
    let bytes = machine.min(cgroup_limit(&std::fs::read_to_string("/proc/self/cgroup").unwrap_or_default()));
    BYTES.store(bytes, Ordering::Relaxed);
    bytes
}

/// The smallest memory limit of the cgroups that `/proc/self/cgroup` names and of those above them (cgroups(7)).
fn cgroup_limit(membership: &str) -> u64 {
    let limits = membership.lines().filter_map(|line| {
        let mut fields = line.splitn(3, ':').skip(1);
        let (controllers, path) = (fields.next()?, fields.next()?);
        let (root, file) = match controllers {
            "" => ("/sys/fs/cgroup", "memory.max"),
            v1 if v1.split(',').any(|c| c == "memory") => ("/sys/fs/cgroup/memory", "memory.limit_in_bytes"),
            _ => return None,
        };
        let within = std::path::Path::new(path.trim_start_matches('/'));
        let limit = |dir: &std::path::Path| {
            std::fs::read_to_string(std::path::Path::new(root).join(dir).join(file)).ok()?.trim().parse::<u64>().ok()
        };
        within.ancestors().filter_map(limit).min()
    });
    limits.min().unwrap_or(u64::MAX)
}

/// Niceness of threads of ours, by that of the calling thread: loading runs ahead and can wait, a training step cannot.
pub(crate) fn niceness() -> libc::c_int {
    // SAFETY: only looks at the calling thread.
    NICENESS + unsafe { libc::getpriority(libc::PRIO_PROCESS, 0) }
}

/// Gives the calling thread a niceness. Threads inherit that of the one that starts them, so it is no difference.
pub(crate) fn set_niceness(niceness: libc::c_int) {
    // elsewhere the call is about the whole process
    if cfg!(target_os = "linux") {
        // SAFETY: only changes the scheduling of the calling thread; a refusal changes nothing.
        unsafe { libc::setpriority(libc::PRIO_PROCESS, 0, niceness) };
    }
}

/// CPUs that this process may use (affinity and cgroup), divided among the processes of a `torchrun` node.
pub(crate) fn default_threads() -> usize {
    let cpus = std::thread::available_parallelism().map_or(1, std::num::NonZero::get);
    (cpus / processes_of_node() as usize).max(1)
}

/// Processes that share this node, as `torchrun` says.
pub(crate) fn processes_of_node() -> u64 {
    std::env::var("LOCAL_WORLD_SIZE").ok().and_then(|s| s.parse().ok()).unwrap_or(1u64).max(1)
}

/// Has the calling thread wait its turn when it wakes up, rather than take a CPU from whoever runs there. Consumers wake the
/// driver when they take the last batch of a window, and waited 1.4 ms until it had set the tasks of the next one going.
pub(crate) fn set_patient() {
    #[cfg(target_os = "linux")]
    // SAFETY: looks at the calling thread and changes its scheduling; a refusal changes nothing, and whoever has chosen another
    // one keeps it.
    unsafe {
        if libc::sched_getscheduler(0) == libc::SCHED_OTHER {
            // all zero: batch threads have no priority but their niceness
            libc::sched_setscheduler(0, libc::SCHED_BATCH, &std::mem::zeroed());
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn memory_is_bounded_by_the_machine_and_unknown_cgroups_say_nothing() {
        assert!((1 << 20..1 << 60).contains(&physical_memory()));
        assert_eq!(cgroup_limit("0::/no/such/group\n5:cpu,cpuacct:/x\nnonsense"), cgroup_limit("0::/"));
        assert_eq!(cgroup_limit(""), u64::MAX);
    }
}
