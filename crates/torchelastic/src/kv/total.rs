//! What several stores hold together: a limit on each says nothing of a thousand.

use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};

/// How much several stores may hold together.
#[derive(Debug, Clone)]
pub struct Total {
    limit: usize,
    held: Arc<AtomicUsize>,
}

impl Total {
    /// So many bytes, of keys and values and of what keeping them takes.
    pub fn new(limit: usize) -> Total {
        Total { limit, held: Arc::default() }
    }

    /// What the stores hold at present.
    pub fn held(&self) -> usize {
        self.held.load(Ordering::Relaxed)
    }
}

/// No limit but each store's own.
impl Default for Total {
    fn default() -> Total {
        Total::new(usize::MAX)
    }
}

/// How much of what several stores hold is one store's; none of it once it is dropped.
#[derive(Debug, Default)]
pub(super) struct Share {
    total: Total,
    pub(super) counted: usize,
}

impl Share {
    /// Nothing so far.
    pub(super) fn of(total: &Total) -> Share {
        Share { total: total.clone(), counted: 0 }
    }

    pub(super) fn limit(&self) -> usize {
        self.total.limit
    }

    /// Whether the store could hold so much.
    pub(super) fn has_room(&self, bytes: usize) -> bool {
        (self.total.held() - self.counted).saturating_add(bytes) <= self.total.limit
    }

    pub(super) fn set(&mut self, bytes: usize) {
        if bytes != self.counted {
            self.total.held.fetch_add(bytes.wrapping_sub(self.counted), Ordering::Relaxed);
            self.counted = bytes;
        }
    }
}

impl Drop for Share {
    fn drop(&mut self) {
        self.set(0);
    }
}
