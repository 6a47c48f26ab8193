//! Host memory near a GPU, on machines whose memory is in several places.
//!
//! Page-locked pages are taken as the policy of the calling thread says, so it is changed around the allocation. It is a
//! preference: a node that is full, or a container that forbids the change, leaves pages elsewhere, where copies work too.

#[cfg(target_os = "linux")]
pub use linux::Preferring;
#[cfg(all(test, target_os = "linux"))]
pub(crate) use linux::policy;

/// The node that a PCI device is next to, where the machine has nodes and says so.
pub fn node_of_pci(domain: i32, bus: i32, device: i32) -> Option<u32> {
    let path = format!("/sys/bus/pci/devices/{domain:04x}:{bus:02x}:{device:02x}.0/numa_node");
    // -1: none in particular
    std::fs::read_to_string(path).ok()?.trim().parse().ok()
}

#[cfg(target_os = "linux")]
mod linux {
    use libc::{SYS_get_mempolicy, SYS_set_mempolicy, c_long, c_ulong};

    const PREFERRED: c_long = 1;
    /// Nodes that a mask has room for.
    const MAX_NODES: usize = 1024;
    const WORD_BITS: usize = c_ulong::BITS as usize;
    type Nodes = [c_ulong; MAX_NODES / WORD_BITS];

    /// This thread takes new pages from one node, if it can, until this is dropped.
    #[derive(Debug)]
    #[must_use]
    pub struct Preferring {
        before: (c_long, Nodes),
    }

    /// How this thread takes new pages.
    pub(crate) fn policy() -> Option<(c_long, Nodes)> {
        let (mut mode, mut nodes) = (0i32, [0; MAX_NODES / WORD_BITS]);
        let none = std::ptr::null_mut::<libc::c_void>();
        // SAFETY: the call writes the mode and at most as many nodes as there is room for.
        let called = unsafe { libc::syscall(SYS_get_mempolicy, &raw mut mode, nodes.as_mut_ptr(), MAX_NODES, none, 0) };
        (called == 0).then_some((mode.into(), nodes))
    }

    fn set(mode: c_long, nodes: &Nodes) -> bool {
        // the kernel takes one off the number of nodes
        // SAFETY: the call reads as many nodes as there are.
        unsafe { libc::syscall(SYS_set_mempolicy, mode, nodes.as_ptr(), MAX_NODES + 1) == 0 }
    }

    impl Preferring {
        /// Prefers `node`; `None` where that is not to be had.
        pub fn node(node: u32) -> Option<Self> {
            let before = policy()?;
            let mut nodes = [0; MAX_NODES / WORD_BITS];
            *nodes.get_mut(node as usize / WORD_BITS)? |= 1 << (node as usize % WORD_BITS);
            set(PREFERRED, &nodes).then_some(Self { before })
        }
    }

    impl Drop for Preferring {
        fn drop(&mut self) {
            let (mode, nodes) = self.before;
            set(mode, &nodes);
        }
    }
}

/// There is no choice here.
#[cfg(not(target_os = "linux"))]
#[derive(Debug)]
pub struct Preferring;

#[cfg(not(target_os = "linux"))]
impl Preferring {
    /// Nothing.
    pub fn node(_: u32) -> Option<Self> {
        None
    }
}

#[cfg(all(test, target_os = "linux"))]
mod tests {
    use super::*;

    #[test]
    fn a_preference_holds_until_it_is_dropped() {
        let before = policy();
        let Some(preferring) = Preferring::node(0) else {
            return println!("skipped: this system lets nobody choose where pages come from");
        };
        let (mode, nodes) = policy().unwrap();
        assert_eq!((mode, nodes[0]), (1, 1));
        drop(preferring);
        assert_eq!(policy(), before);
        assert!(Preferring::node(100_000).is_none());
        assert_eq!(policy(), before);
    }

    #[test]
    fn a_device_that_does_not_exist_is_next_to_nothing() {
        assert_eq!(node_of_pci(-1, -1, -1), None);
    }
}
