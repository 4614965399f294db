//! The report: one HTML file with everything in it, to be opened without a network.

use std::fmt::Write as _;

use super::outcome::{HEAD, Outcome};

const WIDTH: f64 = 1000.0;
const HEIGHT: f64 = 270.0;
const LEFT: f64 = 60.0;
const RIGHT: f64 = 20.0;
const TOP: f64 = 44.0;
const BOTTOM: f64 = 40.0;

/// Maps seconds and a value to a place in a chart.
struct Axes {
    seconds: f64,
    low: f64,
    high: f64,
}

impl Axes {
    fn x(&self, seconds: f64) -> f64 {
        LEFT + (WIDTH - LEFT - RIGHT) * (seconds / self.seconds.max(1e-9)).clamp(0.0, 1.0)
    }

    fn y(&self, value: f64) -> f64 {
        let share = ((value - self.low) / (self.high - self.low).max(1e-9)).clamp(0.0, 1.0);
        HEIGHT - BOTTOM - (HEIGHT - TOP - BOTTOM) * share
    }

    /// The frame: a line and a label for each tick.
    fn frame(&self, title: &str, ticks: &[(f64, String)]) -> String {
        let mut svg = format!("<text class='title' x='{LEFT}' y='18'>{}</text>", escape(title));
        for (value, label) in ticks {
            let y = self.y(*value);
            let _ = write!(
                svg,
                "<line class='grid' x1='{LEFT}' x2='{}' y1='{y:.1}' y2='{y:.1}'/>\
                 <text class='label' x='{}' y='{:.1}' text-anchor='end'>{}</text>",
                WIDTH - RIGHT,
                LEFT - 8.0,
                y + 4.0,
                escape(label)
            );
        }
        let step = tick_seconds(self.seconds);
        let mut at = 0.0;
        while at <= self.seconds {
            let _ = write!(
                svg,
                "<text class='label' x='{:.1}' y='{}' text-anchor='middle'>{at:.0} s</text>",
                self.x(at),
                HEIGHT - BOTTOM + 18.0
            );
            at += step;
        }
        svg
    }

    /// A band for the time without a coordinator, and a numbered mark for each recovery, with its cause as a tooltip.
    fn marks(&self, outcome: &Outcome, start_us: u64) -> String {
        let mut svg = String::new();
        if let Some((killed, back)) = outcome.coordinator_away() {
            let (from, to) = (self.x(seconds(killed.0, start_us)), self.x(seconds(back.0, start_us)));
            let _ = write!(
                svg,
                "<g class='away'><title>the coordinator was away</title><rect x='{from:.1}' width='{:.1}' y='{TOP}' \
                 height='{}'/><text x='{:.1}' y='{}' text-anchor='middle'>no coordinator</text></g>",
                to - from,
                HEIGHT - BOTTOM - TOP,
                (from + to) / 2.0,
                TOP - 4.0
            );
        }
        let recoveries = outcome.recoveries();
        for (number, recovery) in recoveries.iter().enumerate() {
            let x = self.x(seconds(recovery.at.0, start_us));
            let _ = write!(
                svg,
                "<g class='mark'><title>{}</title><line x1='{x:.1}' x2='{x:.1}' y1='{TOP}' y2='{}'/>\
                 <text x='{x:.1}' y='{}' text-anchor='middle'>{}</text></g>",
                escape(&format!("{}: {:.0} ms", recovery.cause, recovery.total_ms)),
                HEIGHT - BOTTOM,
                TOP - 4.0,
                number + 1
            );
        }
        svg
    }
}

fn tick_seconds(seconds: f64) -> f64 {
    [1.0, 2.0, 5.0, 10.0, 20.0, 30.0, 60.0].into_iter().find(|step| seconds / step <= 12.0).unwrap_or(300.0)
}

fn seconds(at_us: u64, start_us: u64) -> f64 {
    at_us.saturating_sub(start_us) as f64 / 1e6
}

fn escape(text: &str) -> String {
    text.replace('&', "&amp;")
        .replace('<', "&lt;")
        .replace('>', "&gt;")
        .replace('\'', "&#39;")
        .replace('"', "&quot;")
}

fn polyline(class: &str, points: impl Iterator<Item = (f64, f64)>) -> String {
    let points: Vec<String> = points.map(|(x, y)| format!("{x:.1},{y:.1}")).collect();
    format!("<polyline class='{class}' points='{}'/>", points.join(" "))
}

fn chart(content: &str) -> String {
    format!("<svg viewBox='0 0 {WIDTH} {HEIGHT}' role='img'>{content}</svg>")
}

/// From this long between two steps on it is seen that training stood still.
const STANDSTILL_US: u64 = 250_000;

fn loss_chart(outcome: &Outcome, start_us: u64, seconds_max: f64) -> String {
    // Losses span orders of magnitude: their logarithm is shown.
    let log = |loss: f64| loss.max(1e-6).log10();
    let losses = outcome.losses();
    let low = losses.iter().map(|done| log(done.loss)).fold(0.0, f64::min).floor();
    let high = losses.iter().map(|done| log(done.loss)).fold(low + 1.0, f64::max).ceil();
    let axes = Axes { seconds: seconds_max, low, high };
    let ticks: Vec<(f64, String)> = (low as i32..=high as i32)
        .map(|power| (f64::from(power), format!("{}", 10f64.powi(power))))
        .collect();
    let mut content = axes.frame("training loss of each committed step", &ticks);
    content.push_str(&axes.marks(outcome, start_us));
    // Where nobody trained there is no line.
    for run in losses.chunk_by(|before, after| after.at_us.saturating_sub(before.at_us) < STANDSTILL_US) {
        let points = run.iter().map(|done| (axes.x(seconds(done.at_us, start_us)), axes.y(log(done.loss))));
        content.push_str(&polyline("loss", points));
    }
    chart(&content)
}

fn world_chart(outcome: &Outcome, start_us: u64, seconds_max: f64) -> String {
    let recoveries = outcome.recoveries();
    let most = recoveries.iter().map(|recovery| recovery.after).max().unwrap_or(1);
    let axes = Axes { seconds: seconds_max, low: 0.0, high: f64::from(most) };
    let ticks: Vec<(f64, String)> = (0..=most).map(|n| (f64::from(n), n.to_string())).collect();
    let mut content = axes.frame("workers that train", &ticks);
    // A stall is shown as what it is: nobody trains.
    let mut points = vec![(0.0, 0.0)];
    for recovery in recoveries {
        let at = seconds(recovery.at.0, start_us);
        let stalled = (at - recovery.stall_ms / 1000.0).max(0.0);
        let before = points.last().map_or(0.0, |(_, workers)| *workers);
        points.extend([(stalled, before), (stalled, 0.0), (at, 0.0), (at, f64::from(recovery.after))]);
    }
    let last = points.last().map_or(0.0, |(_, workers)| *workers);
    points.push((seconds_max, last));
    content.push_str(&axes.marks(outcome, start_us));
    content.push_str(&polyline("world", points.into_iter().map(|(s, n)| (axes.x(s), axes.y(n)))));
    chart(&content)
}

fn table(outcome: &Outcome) -> String {
    let mut html = String::from("<table><thead><tr><th>#</th>");
    for head in HEAD {
        let _ = write!(html, "<th>{}</th>", escape(head));
    }
    html.push_str("</tr></thead><tbody>");
    for (number, (row, recovery)) in outcome.rows().iter().zip(outcome.recoveries()).enumerate() {
        let _ = write!(html, "<tr title='{}'><td>{}</td>", escape(&recovery.details), number + 1);
        for cell in row {
            let _ = write!(html, "<td>{}</td>", escape(cell));
        }
        html.push_str("</tr>");
    }
    html.push_str("</tbody></table>");
    html
}

const STYLE: &str = "
:root { color-scheme: light dark; --ink: #1c2330; --dim: #6b7280; --grid: #d7dbe2; --page: #ffffff; --loss: #2563eb;
  --world: #15803d; --mark: #dc2626; }
@media (prefers-color-scheme: dark) { :root { --ink: #e5e7eb; --dim: #9ca3af; --grid: #374151; --page: #11151c;
  --loss: #60a5fa; --world: #4ade80; --mark: #f87171; } }
body { font: 15px/1.5 system-ui, sans-serif; max-width: 1080px; margin: 2rem auto; padding: 0 1rem; color: var(--ink);
  background: var(--page); }
h1 { font-size: 1.5rem; margin-bottom: 0.2rem; } .dim, .label { color: var(--dim); fill: var(--dim); }
.verdict { font-weight: 600; } .bad { color: var(--mark); } .good { color: var(--world); }
svg { width: 100%; height: auto; margin-top: 1rem; } .title { font-weight: 600; font-size: 14px; fill: var(--ink); }
.label { font-size: 12px; } .grid { stroke: var(--grid); stroke-width: 1; }
polyline { fill: none; stroke-width: 1.6; } .loss { stroke: var(--loss); } .world { stroke: var(--world); stroke-width: 2; }
.mark line { stroke: var(--mark); stroke-width: 1; stroke-dasharray: 3 3; } .mark text { fill: var(--mark); font-size: 12px; }
.away rect { fill: var(--grid); opacity: 0.6; } .away text { fill: var(--dim); font-size: 12px; }
.scroll { overflow-x: auto; } table { border-collapse: collapse; font-size: 13px; margin-top: 1rem; width: 100%; }
th, td { text-align: right; padding: 0.3rem 0.4rem; border-bottom: 1px solid var(--grid); white-space: nowrap; }
th { color: var(--dim); font-weight: 500; } td:nth-child(2), th:nth-child(2), td:last-child, th:last-child {
  text-align: left; }
";

/// The whole page.
pub(super) fn html(outcome: &Outcome) -> String {
    let losses = outcome.losses();
    let first = losses.first().map_or(0, |done| done.at_us);
    let start_us = outcome
        .recoveries()
        .first()
        .map_or(first, |recovery| recovery.at.0.saturating_sub((recovery.total_ms * 1000.0) as u64));
    let end_us = losses.iter().map(|done| done.at_us).max().unwrap_or(start_us);
    let seconds_max = seconds(end_us, start_us);
    let verdict = if outcome.ok() {
        "<p class='verdict good'>Everything held.</p>".to_owned()
    } else {
        let complaints: Vec<String> =
            outcome.complaints().iter().map(|complaint| format!("<li>{}</li>", escape(complaint))).collect();
        format!("<p class='verdict bad'>Not everything held:</p><ul class='bad'>{}</ul>", complaints.concat())
    };
    let summary: Vec<String> =
        outcome.summary().iter().map(|line| format!("<li>{}</li>", escape(line))).collect();
    format!(
        "<!doctype html><html lang='en'><head><meta charset='utf-8'>\
         <meta name='viewport' content='width=device-width, initial-scale=1'><title>reknit demo</title>\
         <style>{STYLE}</style></head><body><h1>One training run, and everything a spot fleet does to it</h1>\
         <p class='dim'>Handwritten digits, a small convolutional network, workers as processes of one machine. \
         The dashed lines are the changes of the world, numbered as in the table. \
         In the grey band there was no coordinator.</p>{verdict}\
         {}{}<div class='scroll'>{}</div><ul>{}</ul>\
         <p class='dim'>Times in milliseconds. DETECT: from the cause to the coordinator's knowledge of it. AGREE: until \
         the new world is saved and told (before a planned change training goes on for most of it). REBUILD: until \
         every member has the new ring. RESTORE: until every member has the same state. FIRST STEP: until a step is \
         committed. STALL: how long nobody trained. LOST: committed steps that were done again.</p></body></html>",
        loss_chart(outcome, start_us, seconds_max),
        world_chart(outcome, start_us, seconds_max),
        table(outcome),
        summary.concat(),
    )
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn text_cannot_become_markup() {
        assert_eq!(escape("<b title='x\">&"), "&lt;b title=&#39;x&quot;&gt;&amp;");
    }

    #[test]
    fn a_chart_keeps_its_points_inside_its_frame() {
        let axes = Axes { seconds: 10.0, low: -2.0, high: 1.0 };
        assert_eq!((axes.x(-5.0), axes.x(99.0)), (LEFT, WIDTH - RIGHT));
        assert_eq!((axes.y(-9.0), axes.y(9.0)), (HEIGHT - BOTTOM, TOP));
    }
}
