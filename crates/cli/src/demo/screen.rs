//! What is shown while it runs: a moving line in a terminal, plain lines elsewhere.

use std::time::Duration;

use indicatif::{ProgressBar, ProgressStyle};

use crate::print;

/// Where progress goes.
pub(super) struct Screen {
    bar: ProgressBar,
}

impl Screen {
    pub(super) fn new(steps: u64) -> Screen {
        let bar = ProgressBar::new(steps);
        let style = "step {pos}/{len} {bar:30.cyan/blue} {msg}";
        if let Ok(style) = ProgressStyle::with_template(style) {
            bar.set_style(style);
        }
        bar.enable_steady_tick(Duration::from_millis(100));
        Screen { bar }
    }

    /// A line that stays.
    pub(super) fn say(&self, line: &str) {
        if self.bar.is_hidden() {
            print::talk(format_args!("{line}"));
        } else {
            self.bar.println(line);
        }
    }

    /// The moving line.
    pub(super) fn step(&self, steps: u64, workers: u32, generation: u64, loss: f64) {
        self.bar.set_position(steps);
        self.bar.set_message(format!("loss {loss:.3}  generation {generation}  workers {workers}"));
    }

    pub(super) fn done(&self) {
        self.bar.finish_and_clear();
    }
}
