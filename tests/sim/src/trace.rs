//! What happened, in words if somebody wants to read it, and in any case as one number: two runs of one seed have the
//! same.

/// See the module.
#[derive(Debug, Default)]
pub struct Trace {
    /// Whether the lines are kept.
    pub keep: bool,
    /// What happened, in order.
    pub lines: Vec<String>,
    /// Follows from all of it.
    pub digest: u64,
}

impl Trace {
    /// An empty one.
    pub fn new(keep: bool) -> Trace {
        Trace { keep, ..Trace::default() }
    }
}
