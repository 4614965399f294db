//! `ncclConfig_t`: how a communicator is to be made.

use std::ffi::{c_char, c_int, c_uint};
use std::ptr;

/// What NCCL takes for "not set". Zero is a setting.
const UNSET: c_int = c_int::MIN;

/// By which NCCL knows that the structure is one.
const MAGIC: c_uint = 0xcafe_beef;

/// The release whose layout this is. An older NCCL ignores what is new in it; a newer one reads no farther.
const LAYOUT: c_uint = 23007;

/// The structure of 2.30.7, as in its header.
#[derive(Debug, Clone)]
#[repr(C)]
pub(crate) struct Config {
    size: usize,
    magic: c_uint,
    version: c_uint,
    blocking: c_int,
    cga_cluster_size: c_int,
    min_ctas: c_int,
    max_ctas: c_int,
    net_name: *const c_char,
    split_share: c_int,
    traffic_class: c_int,
    comm_name: *const c_char,
    collnet_enable: c_int,
    cta_policy: c_int,
    shrink_share: c_int,
    nvls_ctas: c_int,
    channels_per_net_peer: c_int,
    nvlink_centric_sched: c_int,
    graph_usage_mode: c_int,
    rma_contexts: c_int,
    p2p_peers_max: c_int,
    graph_stream_ordering: c_int,
}

impl Config {
    /// A communicator whose calls return at once (rule G-1). All else is NCCL's own choice.
    pub(crate) fn non_blocking() -> Config {
        Config {
            size: size_of::<Config>(),
            magic: MAGIC,
            version: LAYOUT,
            blocking: 0,
            cga_cluster_size: UNSET,
            min_ctas: UNSET,
            max_ctas: UNSET,
            net_name: ptr::null(),
            split_share: UNSET,
            traffic_class: UNSET,
            comm_name: ptr::null(),
            collnet_enable: UNSET,
            cta_policy: UNSET,
            shrink_share: UNSET,
            nvls_ctas: UNSET,
            channels_per_net_peer: UNSET,
            nvlink_centric_sched: UNSET,
            graph_usage_mode: UNSET,
            rma_contexts: UNSET,
            p2p_peers_max: UNSET,
            graph_stream_ordering: UNSET,
        }
    }
}

#[cfg(test)]
mod tests {
    use std::mem::offset_of;

    use super::*;

    #[test]
    fn every_field_lies_where_the_header_has_it() {
        let offsets = [
            (offset_of!(Config, size), 0),
            (offset_of!(Config, magic), 8),
            (offset_of!(Config, version), 12),
            (offset_of!(Config, blocking), 16),
            (offset_of!(Config, cga_cluster_size), 20),
            (offset_of!(Config, min_ctas), 24),
            (offset_of!(Config, max_ctas), 28),
            (offset_of!(Config, net_name), 32),
            (offset_of!(Config, split_share), 40),
            (offset_of!(Config, traffic_class), 44),
            (offset_of!(Config, comm_name), 48),
            (offset_of!(Config, collnet_enable), 56),
            (offset_of!(Config, cta_policy), 60),
            (offset_of!(Config, shrink_share), 64),
            (offset_of!(Config, nvls_ctas), 68),
            (offset_of!(Config, channels_per_net_peer), 72),
            (offset_of!(Config, nvlink_centric_sched), 76),
            (offset_of!(Config, graph_usage_mode), 80),
            (offset_of!(Config, rma_contexts), 84),
            (offset_of!(Config, p2p_peers_max), 88),
            (offset_of!(Config, graph_stream_ordering), 92),
            (size_of::<Config>(), 96),
        ];
        for (ours, header) in offsets {
            assert_eq!(ours, header);
        }
    }

    #[test]
    fn what_is_not_chosen_is_unset_and_not_zero() {
        let config = Config::non_blocking();
        assert_eq!((config.size, config.magic, config.blocking), (96, 0xcafe_beef, 0));
        assert_eq!((config.shrink_share, config.graph_stream_ordering), (i32::MIN, i32::MIN));
        assert!(config.net_name.is_null() && config.comm_name.is_null());
    }
}
