//! The results as a picture: for each type and world the times over the sizes, and under them the bus bandwidths of the
//! sizes for which that is what counts. All axes are logarithmic.

use std::collections::BTreeSet;
use std::fmt::Write;

use super::super::numbers::NumberType;
use super::super::peers::Wire;
use super::super::transport::Transport;
use super::contender::Line;
use super::table::size;
use super::timed::Timed;

/// In pixels.
const PANEL_WIDTH: f64 = 440.0;
const PANEL_HEIGHT: f64 = 300.0;
const GAP_X: f64 = 80.0;
const GAP_Y: f64 = 76.0;
const MARGIN_LEFT: f64 = 76.0;
const MARGIN_RIGHT: f64 = 28.0;
const MARGIN_TOP: f64 = 96.0;
const MARGIN_BOTTOM: f64 = 28.0;
const LEGEND_ENTRY: f64 = 158.0;
const LEGEND_Y: f64 = 34.0;

/// From what size on bandwidth counts.
const BANDWIDTH_BYTES: u64 = 64 << 10;

/// Colours that people with any sight tell apart, with dashes for the peers.
fn stroke(line: Line) -> (&'static str, &'static str) {
    match line {
        Line::Reknit(Transport::Tcp) => ("#0072b2", ""),
        Line::Reknit(Transport::TcpBuffer) => ("#56b4e9", ""),
        Line::Reknit(Transport::Shm) => ("#009e73", ""),
        Line::Reknit(Transport::ShmBuffer) => ("#000000", ""),
        Line::Gloo => ("#d55e00", "7 4"),
        Line::Mpi(Wire::Tcp) => ("#cc79a7", "7 4"),
        Line::Mpi(Wire::Shm) => ("#e69f00", "7 4"),
    }
}

/// What a panel shows.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Quantity {
    Time,
    Bandwidth,
}

impl Quantity {
    fn of(self, timed: &Timed) -> Option<f64> {
        let value = match self {
            Quantity::Time => timed.median_us,
            Quantity::Bandwidth if timed.bytes >= BANDWIDTH_BYTES => timed.busbw_gbs,
            Quantity::Bandwidth => return None,
        };
        // Only these have logarithms.
        (value.is_finite() && value > 0.0 && timed.bytes > 0).then_some(value)
    }

    fn title(self) -> &'static str {
        match self {
            Quantity::Time => "time of one all-reduce",
            Quantity::Bandwidth => "bus bandwidth",
        }
    }

    fn label(self, value: f64) -> String {
        match self {
            Quantity::Time if value < 1e3 => format!("{value} µs"),
            Quantity::Time if value < 1e6 => format!("{} ms", value / 1e3),
            Quantity::Time => format!("{} s", value / 1e6),
            Quantity::Bandwidth => format!("{value} GB/s"),
        }
    }
}

/// A logarithmic axis: where a value is, from 0 to 1.
#[derive(Debug, Clone, Copy, PartialEq)]
struct Axis {
    min: f64,
    max: f64,
}

impl Axis {
    /// From the power of `base` below the smallest to the one above the largest.
    fn around(values: impl Iterator<Item = f64>, base: f64) -> Option<Axis> {
        let (mut min, mut max) = (f64::INFINITY, f64::NEG_INFINITY);
        for value in values {
            (min, max) = (min.min(value), max.max(value));
        }
        if min > max {
            return None;
        }
        let low = min.log(base).floor();
        // One value alone shall not be an axis without a length.
        let high = max.log(base).ceil().max(low + 1.0);
        Some(Axis { min: base.powf(low), max: base.powf(high) })
    }

    fn at(self, value: f64) -> f64 {
        (value / self.min).ln() / (self.max / self.min).ln()
    }

    /// Its powers of ten, and between them 2 and 5 times them if there are few.
    fn ticks(self) -> Vec<f64> {
        let decades = self.min.log10().round() as i32..=self.max.log10().round() as i32;
        let steps: &[f64] = if decades.clone().count() > 4 { &[1.0] } else { &[1.0, 2.0, 5.0] };
        let tick = |decade: i32| {
            let power = |step: &f64| {
                // Multiplying by 0.1 would leave digits that nobody wants to read.
                if decade < 0 { step / 10f64.powi(-decade) } else { step * 10f64.powi(decade) }
            };
            steps.iter().map(power).collect::<Vec<_>>()
        };
        decades.flat_map(tick).filter(|tick| (self.min * 0.999..=self.max * 1.001).contains(tick)).collect()
    }
}

/// The picture. It has no panels if there is nothing to show.
pub(super) fn svg(rows: &[Timed]) -> String {
    let columns: Vec<u32> = BTreeSet::from_iter(rows.iter().map(|row| row.world)).into_iter().collect();
    let types: BTreeSet<NumberType> = rows.iter().map(|row| row.number).collect();
    let lines: BTreeSet<Line> = rows.iter().map(|row| row.line).collect();
    let panels = columns.len().max(1) as f64;
    let legend = MARGIN_LEFT + lines.len() as f64 * LEGEND_ENTRY;
    let width = (MARGIN_LEFT + panels * PANEL_WIDTH + (panels - 1.0) * GAP_X + MARGIN_RIGHT).max(legend);
    let mut body = String::new();
    legend_of(&mut body, &lines);
    let mut top = MARGIN_TOP;
    for number in types {
        for quantity in [Quantity::Time, Quantity::Bandwidth] {
            let shown: Vec<&Timed> =
                rows.iter().filter(|row| row.number == number && quantity.of(row).is_some()).collect();
            // The same for all worlds, so that they can be compared.
            let base = if quantity == Quantity::Time { 10.0 } else { 2.0 };
            let across = Axis::around(shown.iter().map(|row| row.bytes as f64), 2.0);
            let up = Axis::around(shown.iter().filter_map(|row| quantity.of(row)), base);
            let Some((across, up)) = across.zip(up) else { continue };
            for (column, world) in columns.iter().enumerate() {
                let left = MARGIN_LEFT + column as f64 * (PANEL_WIDTH + GAP_X);
                let title = format!("{}, {world} ranks, {}", quantity.title(), number.name());
                let rows: Vec<&Timed> = shown.iter().copied().filter(|row| row.world == *world).collect();
                Panel { left, top, across, up, quantity }.draw(&mut body, &title, &rows);
            }
            top += PANEL_HEIGHT + GAP_Y;
        }
    }
    let height = top - GAP_Y + 24.0 + MARGIN_BOTTOM;
    format!(
        "<svg xmlns=\"http://www.w3.org/2000/svg\" width=\"{width:.0}\" height=\"{height:.0}\" \
         viewBox=\"0 0 {width:.0} {height:.0}\" font-family=\"sans-serif\" font-size=\"13\">\n\
         <rect width=\"100%\" height=\"100%\" fill=\"#ffffff\"/>\n{body}</svg>\n"
    )
}

fn legend_of(out: &mut String, lines: &BTreeSet<Line>) {
    for (place, line) in lines.iter().enumerate() {
        let x = MARGIN_LEFT + place as f64 * LEGEND_ENTRY;
        path(out, *line, &[(x, LEGEND_Y - 4.5), (x + 26.0, LEGEND_Y - 4.5)]);
        text(out, (x + 32.0, LEGEND_Y), "", line.label());
    }
}

struct Panel {
    left: f64,
    top: f64,
    across: Axis,
    up: Axis,
    quantity: Quantity,
}

impl Panel {
    fn draw(&self, out: &mut String, title: &str, rows: &[&Timed]) {
        let Panel { left, top, up, quantity, .. } = *self;
        let bottom = top + PANEL_HEIGHT;
        text(out, (left, top - 12.0), " font-weight=\"bold\"", title);
        for tick in up.ticks() {
            let y = self.y(tick);
            rule(out, (left, y), (left + PANEL_WIDTH, y));
            text(out, (left - 8.0, y + 4.5), " text-anchor=\"end\"", &quantity.label(tick));
        }
        let mut labelled_to = f64::NEG_INFINITY;
        for bytes in BTreeSet::from_iter(rows.iter().map(|row| row.bytes)) {
            let x = self.x(bytes as f64);
            rule(out, (x, top), (x, bottom));
            // Labels that would run into each other say nothing.
            if x - labelled_to > 44.0 {
                labelled_to = x;
                text(out, (x, bottom + 19.0), " text-anchor=\"middle\"", &size(bytes));
            }
        }
        for line in BTreeSet::from_iter(rows.iter().map(|row| row.line)) {
            let mut points: Vec<(u64, f64)> = rows
                .iter()
                .filter(|row| row.line == line)
                .filter_map(|row| Some((row.bytes, quantity.of(row)?)))
                .collect();
            points.sort_by_key(|(bytes, _)| *bytes);
            let points: Vec<(f64, f64)> =
                points.into_iter().map(|(bytes, value)| (self.x(bytes as f64), self.y(value))).collect();
            path(out, line, &points);
        }
    }

    fn x(&self, value: f64) -> f64 {
        self.left + self.across.at(value) * PANEL_WIDTH
    }

    fn y(&self, value: f64) -> f64 {
        self.top + (1.0 - self.up.at(value)) * PANEL_HEIGHT
    }
}

fn rule(out: &mut String, (x1, y1): (f64, f64), (x2, y2): (f64, f64)) {
    // Writing to a string cannot fail.
    let _ = writeln!(
        out,
        "<line x1=\"{x1:.1}\" y1=\"{y1:.1}\" x2=\"{x2:.1}\" y2=\"{y2:.1}\" stroke=\"#e0e0e0\"/>"
    );
}

fn text(out: &mut String, (x, y): (f64, f64), how: &str, what: &str) {
    let _ = writeln!(out, "<text x=\"{x:.1}\" y=\"{y:.1}\" fill=\"#222222\"{how}>{}</text>", escaped(what));
}

fn path(out: &mut String, line: Line, points: &[(f64, f64)]) {
    let (colour, dashes) = stroke(line);
    let dashes = if dashes.is_empty() { String::new() } else { format!(" stroke-dasharray=\"{dashes}\"") };
    let corners: Vec<String> = points.iter().map(|(x, y)| format!("{x:.1},{y:.1}")).collect();
    let _ = writeln!(
        out,
        "<polyline points=\"{}\" fill=\"none\" stroke=\"{colour}\" stroke-width=\"2.2\"{dashes}/>",
        corners.join(" ")
    );
    for (x, y) in points {
        let _ = writeln!(out, "<circle cx=\"{x:.1}\" cy=\"{y:.1}\" r=\"3\" fill=\"{colour}\"/>");
    }
}

fn escaped(text: &str) -> String {
    text.replace('&', "&amp;").replace('<', "&lt;").replace('>', "&gt;").replace('"', "&quot;")
}

#[cfg(test)]
mod tests {
    use super::super::super::peers::Sum;
    use super::super::super::stats::Spread;
    use super::*;

    fn timed(line: Line, world: u32, elements: u64, time_us: f64) -> Timed {
        Timed::of(line, world, Sum { number: NumberType::F32, elements }, Spread::of([time_us]).unwrap())
    }

    /// What is in the tags of a picture that is well formed: each of its elements ends, in its order.
    fn elements(svg: &str) -> Vec<String> {
        let (mut open, mut all) = (Vec::new(), Vec::new());
        for tag in svg.split('<').skip(1) {
            let (tag, _) = tag.split_once('>').expect("a tag ends");
            assert_eq!(tag.matches('"').count() % 2, 0, "{tag}");
            let name = |tag: &str| tag.split([' ', '\n']).next().unwrap().to_owned();
            match tag.strip_prefix('/') {
                Some(ended) => assert_eq!(open.pop().as_deref(), Some(ended)),
                None if tag.ends_with('/') => {}
                None => open.push(name(tag)),
            }
            all.push(name(tag));
        }
        assert_eq!(open, [""; 0]);
        all
    }

    #[test]
    fn a_picture_has_every_line_in_every_panel_and_is_well_formed() {
        let lines = [Line::Reknit(Transport::Tcp), Line::Gloo, Line::Mpi(Wire::Shm)];
        let mut rows = Vec::new();
        for (place, line) in lines.into_iter().enumerate() {
            for world in [2, 4] {
                for elements in [1, 256, 1 << 18, 1 << 26] {
                    let time_us = (place + 1) as f64 * elements as f64 / 1e3;
                    rows.push(timed(line, world, elements, time_us));
                }
            }
        }
        let svg = svg(&rows);
        let elements = elements(&svg);
        let count = |name: &str| elements.iter().filter(|element| *element == name).count();
        // Time and bandwidth of two worlds, and the legend.
        assert_eq!(count("polyline"), 3 * 2 * 2 + 3);
        // Each time, each bandwidth of the two larger sizes, and the legend's ends.
        assert_eq!(count("circle"), rows.len() + rows.len() / 2 + 2 * 3);
        for word in ["NaN", "inf", "Open MPI shm", "256 MiB", "2 ranks, f32", "bus bandwidth"] {
            assert_eq!(svg.contains(word), !["NaN", "inf"].contains(&word), "{word}");
        }
    }

    #[test]
    fn nothing_and_what_has_no_logarithm_make_a_picture_too() {
        for rows in [vec![], vec![timed(Line::Gloo, 2, 0, 1.0)], vec![timed(Line::Gloo, 2, 4, 0.0)]] {
            let svg = svg(&rows);
            elements(&svg);
            assert!(!svg.contains("NaN") && !svg.contains("inf"), "{svg}");
        }
    }

    #[test]
    fn an_axis_reaches_around_its_values_with_ticks_that_can_be_read() {
        let axis = Axis::around([3.0, 700.0].into_iter(), 10.0).unwrap();
        assert_eq!((axis.min, axis.max), (1.0, 1000.0));
        assert_eq!((axis.at(1.0), axis.at(1000.0)), (0.0, 1.0));
        assert_eq!(axis.ticks().len(), 10);
        let small = Axis::around([0.3].into_iter(), 10.0).unwrap();
        assert_eq!(small.ticks(), [0.1, 0.2, 0.5, 1.0]);
        assert_eq!(Axis::around(std::iter::empty(), 10.0), None);
        let labels = [0.1, 10.0, 1e3, 1e5, 1e6].map(|us| Quantity::Time.label(us));
        assert_eq!(labels, ["0.1 µs", "10 µs", "1 ms", "100 ms", "1 s"]);
    }

    #[test]
    fn what_means_something_to_a_picture_is_escaped() {
        assert_eq!(escaped("a<b & \"c\">"), "a&lt;b &amp; &quot;c&quot;&gt;");
    }
}
