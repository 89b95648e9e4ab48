//! Memory that this process may use: the machine's, or less if a container or a service's `MemoryMax=` says so.

use std::path::{Path, PathBuf};

/// Assumed where nothing is known.
const UNKNOWN: u64 = 512 * 1024 * 1024;

/// Memory of the machine, or of the narrowest control group that this process is in, in bytes.
pub(super) fn memory_bytes() -> u64 {
    bytes_below(Path::new("/"))
}

/// The same, from a file system that begins at this folder.
fn bytes_below(root: &Path) -> u64 {
    let of_machine = read(&root.join("proc/meminfo")).and_then(|text| {
        let line = text.lines().find_map(|line| line.strip_prefix("MemTotal:"))?;
        Some(line.trim().strip_suffix("kB")?.trim().parse::<u64>().ok()?.saturating_mul(1024))
    });
    let of_groups = limit_files(root).into_iter().filter_map(|file| read(&file)?.trim().parse().ok());
    // A group of version 1 without a limit has a number that no machine reaches; one of version 2 says `max`.
    of_groups.chain(of_machine).min().unwrap_or(UNKNOWN)
}

/// Files with the limits of all groups that this process is in, from its own to the outermost that can be seen. Each limits all that
/// lie within it.
fn limit_files(root: &Path) -> Vec<PathBuf> {
    let groups = read(&root.join("proc/self/cgroup")).unwrap_or_default();
    let mounts = read(&root.join("proc/self/mountinfo")).unwrap_or_default();
    let mut files = Vec::new();
    for (hierarchy, file) in [(Hierarchy::Two, "memory.max"), (Hierarchy::One, "memory.limit_in_bytes")] {
        let group = groups.lines().find_map(|line| hierarchy.group(line)).unwrap_or("/");
        let Some(mount) = mounts.lines().find_map(|line| hierarchy.mount(line)) else { continue };
        // In a container the mount may begin at the container's own group, or show a part of the tree that ours is not in.
        let below = Path::new(group).strip_prefix(mount.root).unwrap_or(Path::new(""));
        let top = root.join(mount.point.trim_start_matches('/'));
        files.extend(below.ancestors().map(|ancestor| top.join(ancestor).join(file)));
    }
    files
}

/// Version of control groups: the unified one, or the one with a hierarchy for each controller.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Hierarchy {
    One,
    Two,
}

/// Where a hierarchy is mounted, and which part of it.
struct Mount<'a> {
    root: &'a str,
    point: &'a str,
}

impl Hierarchy {
    /// The group in a line of `/proc/self/cgroup`, such as `0::/system.slice/a.service` or `4:memory:/docker/1234`.
    fn group(self, line: &str) -> Option<&str> {
        let (number, rest) = line.split_once(':')?;
        let (controllers, group) = rest.split_once(':')?;
        let fits = match self {
            Self::Two => number == "0" && controllers.is_empty(),
            Self::One => controllers.split(',').any(|controller| controller == "memory"),
        };
        // In a namespace of its own, what lies outside is shown by steps upwards.
        fits.then(|| group.trim_start_matches("/.."))
    }

    /// A line of `/proc/self/mountinfo`: `26 25 0:23 ROOT POINT OPTIONS … - TYPE SOURCE SUPEROPTIONS`.
    fn mount(self, line: &str) -> Option<Mount<'_>> {
        let (fields, of_type) = line.split_once(" - ")?;
        let mut of_type = of_type.split(' ');
        let (kind, options) = (of_type.next()?, of_type.nth(1)?);
        let fits = match self {
            Self::Two => kind == "cgroup2",
            Self::One => kind == "cgroup" && options.split(',').any(|option| option == "memory"),
        };
        let mut fields = fields.split(' ').skip(3);
        fits.then_some(Mount { root: fields.next()?, point: fields.next()? })
    }
}

fn read(file: &Path) -> Option<String> {
    std::fs::read_to_string(file).ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    const GIB: u64 = 1024 * 1024 * 1024;

    /// The memory of a machine with 8 GiB and these files.
    fn bytes(files: &[(&str, &str)]) -> u64 {
        let root = tempfile::tempdir().unwrap();
        for (name, text) in [("proc/meminfo", "MemTotal:        8388608 kB\nMemFree: 1 kB\n")].iter().chain(files) {
            let file = root.path().join(name);
            std::fs::create_dir_all(file.parent().unwrap()).unwrap();
            std::fs::write(file, text).unwrap();
        }
        bytes_below(root.path())
    }

    #[test]
    fn a_service_has_the_narrowest_limit_of_its_slices() {
        let mount = "30 23 0:26 / /sys/fs/cgroup rw,nosuid - cgroup2 cgroup2 rw,nsdelegate";
        let of_service = |service: &str, slice: &str| {
            bytes(&[
                ("proc/self/cgroup", "0::/system.slice/api-together.service\n"),
                ("proc/self/mountinfo", &format!("22 1 0:5 / / rw - ext4 /dev/sda rw\n{mount}\n")),
                ("sys/fs/cgroup/system.slice/api-together.service/memory.max", service),
                ("sys/fs/cgroup/system.slice/memory.max", slice),
            ])
        };
        assert_eq!(of_service("max\n", "max\n"), 8 * GIB);
        assert_eq!(of_service("1073741824\n", "max\n"), GIB);
        assert_eq!(of_service("2147483648\n", "1073741824\n"), GIB);
        assert_eq!(of_service("99999999999999\n", "max\n"), 8 * GIB);
    }

    #[test]
    fn a_container_sees_its_own_group_at_the_top() {
        // With a namespace of its own.
        let files = [
            ("proc/self/cgroup", "0::/\n"),
            ("proc/self/mountinfo", "30 23 0:26 / /sys/fs/cgroup ro - cgroup2 cgroup rw\n"),
            ("sys/fs/cgroup/memory.max", "536870912\n"),
        ];
        assert_eq!(bytes(&files), GIB / 2);
        // Without one, the mount begins at the container's group.
        let files = [
            ("proc/self/cgroup", "0::/docker/12ab\n"),
            ("proc/self/mountinfo", "30 23 0:26 /docker/12ab /sys/fs/cgroup ro - cgroup2 cgroup rw\n"),
            ("sys/fs/cgroup/memory.max", "536870912\n"),
        ];
        assert_eq!(bytes(&files), GIB / 2);
        let files = [
            ("proc/self/cgroup", "0::/../../elsewhere\n"),
            ("proc/self/mountinfo", "30 23 0:26 / /sys/fs/cgroup ro - cgroup2 cgroup rw\n"),
            ("sys/fs/cgroup/memory.max", "536870912\n"),
        ];
        assert_eq!(bytes(&files), GIB / 2);
    }

    #[test]
    fn version_1_has_a_hierarchy_for_memory() {
        let mounts = "31 23 0:27 / /sys/fs/cgroup/cpu rw - cgroup cgroup rw,cpu\n\
                      32 23 0:28 / /sys/fs/cgroup/memory rw - cgroup cgroup rw,memory\n";
        let files = [
            ("proc/self/cgroup", "5:cpu,cpuacct:/x\n4:memory:/docker/12ab\n1:name=systemd:/y\n0::/z\n"),
            ("proc/self/mountinfo", mounts),
            ("sys/fs/cgroup/memory/docker/12ab/memory.limit_in_bytes", "268435456\n"),
            ("sys/fs/cgroup/memory/memory.limit_in_bytes", "9223372036854771712\n"),
        ];
        assert_eq!(bytes(&files), GIB / 4);
        assert_eq!(bytes(&files[..2]), 8 * GIB);
    }

    #[test]
    fn without_any_of_it_something_is_assumed() {
        assert_eq!(bytes(&[("proc/meminfo", "nothing\n")]), UNKNOWN);
        assert_eq!(bytes(&[("proc/self/cgroup", "garbage"), ("proc/self/mountinfo", "more - of it")]), 8 * GIB);
    }
}
