//! What the system says of memory: what this process takes, and what there is for it. Known on Linux.

use std::fs;
use std::path::{Path, PathBuf};

/// The most bytes that this process has had so far (`VmHWM`).
pub fn peak_memory() -> Option<usize> {
    own("VmHWM:")
}

/// The bytes that this process has at the moment (`VmRSS`).
pub fn memory_in_use() -> Option<usize> {
    own("VmRSS:")
}

/// The bytes that this process may come to: those that it has, and those that are free for it by what the system has
/// to give (`MemAvailable`) and by the limits of its control groups, whichever is less.
pub fn available_memory() -> Option<usize> {
    let system = entry(&fs::read_to_string("/proc/meminfo").ok()?, "MemAvailable:")?;
    let membership = fs::read_to_string("/proc/self/cgroup").unwrap_or_default();
    let group = free_in_groups(Path::new("/sys/fs/cgroup"), &membership);
    Some(group.map_or(system, |group| group.min(system)) + memory_in_use()?)
}

fn own(name: &str) -> Option<usize> {
    entry(&fs::read_to_string("/proc/self/status").ok()?, name)
}

/// A line `name   1234 kB` in bytes.
fn entry(text: &str, name: &str) -> Option<usize> {
    let value = text.lines().find_map(|line| line.strip_prefix(name))?;
    let kibibytes: usize = value.trim().strip_suffix("kB")?.trim().parse().ok()?;
    Some(kibibytes * 1024)
}

/// The files of a memory controller: limit, use, and the entry of `memory.stat` for pages of files that it would
/// rather drop than refuse memory.
struct Controller {
    limit: &'static str,
    usage: &'static str,
    droppable: &'static str,
}

const VERSION_1: Controller = Controller {
    limit: "memory.limit_in_bytes",
    usage: "memory.usage_in_bytes",
    droppable: "total_inactive_file ",
};
const VERSION_2: Controller =
    Controller { limit: "memory.max", usage: "memory.current", droppable: "inactive_file " };

/// The least that is free in any of the control groups of a process; `membership` is its `/proc/self/cgroup`, `root`
/// where groups are mounted. A group counts with all those above it; in a container the path may be one that only
/// the host knows, and then the root is the container's own group.
fn free_in_groups(root: &Path, membership: &str) -> Option<usize> {
    let mut least: Option<usize> = None;
    for line in membership.lines() {
        let mut fields = line.splitn(3, ':').skip(1);
        let (Some(controllers), Some(path)) = (fields.next(), fields.next()) else { continue };
        let (controller, mount): (_, PathBuf) = match controllers {
            "" => (VERSION_2, root.into()),
            _ if controllers.split(',').any(|name| name == "memory") => (VERSION_1, root.join("memory")),
            _ => continue,
        };
        let group = mount.join(path.trim_start_matches('/'));
        for level in group.ancestors().take_while(|level| level.starts_with(&mount)) {
            least = match (least, controller.free(level)) {
                (Some(least), Some(free)) => Some(least.min(free)),
                (least, free) => least.or(free),
            };
        }
    }
    least
}

impl Controller {
    /// Bytes that a group has left; `None` where it has no limit (`max`), or is none.
    fn free(&self, group: &Path) -> Option<usize> {
        let read = |name: &str| fs::read_to_string(group.join(name)).ok();
        let number = |name: &str| read(name)?.trim().parse::<usize>().ok();
        let (limit, usage) = (number(self.limit)?, number(self.usage)?);
        let statistics = read("memory.stat").unwrap_or_default();
        let droppable = statistics.lines().find_map(|line| line.strip_prefix(self.droppable));
        let droppable = droppable.and_then(|bytes| bytes.trim().parse().ok()).unwrap_or(0);
        Some(limit.saturating_sub(usage.saturating_sub(droppable)))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn entries_are_read_in_bytes() {
        let text = "VmPeak:\t  9 kB\nVmHWM:\t   1234 kB\nVmRSS:\t many kB\nThreads:\t2\n";
        assert_eq!(entry(text, "VmHWM:"), Some(1234 * 1024));
        assert_eq!([entry(text, "VmRSS:"), entry(text, "Threads:"), entry(text, "VmSwap:")], [None; 3]);
    }

    /// Writes the files of a group.
    fn group(path: &Path, files: &[(&str, &str)]) {
        fs::create_dir_all(path).unwrap();
        files.iter().for_each(|(name, text)| fs::write(path.join(name), text).unwrap());
    }

    #[test]
    fn the_tightest_group_above_a_process_decides() {
        let root = tempfile::tempdir().unwrap();
        let root = root.path();
        group(&root.join("a"), &[("memory.max", "1000\n"), ("memory.current", "700\n")]);
        group(&root.join("a/b"), &[("memory.max", "max\n"), ("memory.current", "50\n")]);
        let stat = "anon 90\ninactive_file 200\nactive_file 3\n";
        group(
            &root.join("a/b/c"),
            &[("memory.max", "900"), ("memory.current", "650"), ("memory.stat", stat)],
        );
        assert_eq!(free_in_groups(root, "0::/a/b/c\n"), Some(300));
        assert_eq!(free_in_groups(root, "0::/a/b\n"), Some(300));
        fs::write(root.join("a/memory.current"), "100").unwrap();
        assert_eq!(free_in_groups(root, "0::/a/b/c\n"), Some(450));
        // A group that is over its limit has nothing left.
        fs::write(root.join("a/memory.current"), "5000").unwrap();
        assert_eq!(free_in_groups(root, "0::/a/b/c\n"), Some(0));
        assert_eq!(free_in_groups(root, "0::/\n"), None);
        assert_eq!(free_in_groups(root, "nonsense\n"), None);
    }

    #[test]
    fn the_first_version_of_groups_is_read_and_a_path_of_the_host_falls_back_to_the_root() {
        let root = tempfile::tempdir().unwrap();
        let root = root.path();
        let files = [("memory.limit_in_bytes", "800"), ("memory.usage_in_bytes", "300")];
        group(&root.join("memory"), &files);
        let stat = [("memory.stat", "inactive_file 7\ntotal_inactive_file 100\n")];
        group(&root.join("memory"), &stat);
        let membership = "5:cpu,cpuacct:/docker/x\n4:memory:/docker/x\n1:name=systemd:/\n";
        assert_eq!(free_in_groups(root, membership), Some(600));
    }

    #[cfg(target_os = "linux")]
    #[test]
    fn this_process_has_memory_and_there_is_some_for_it() {
        let (peak, now) = (peak_memory().unwrap(), memory_in_use().unwrap());
        assert!(now > 1 << 20 && peak >= now / 2, "{peak} {now}");
        assert!(available_memory().unwrap() >= now / 2);
    }
}
