//! The results as a table for people: the limits, then for each type, world and size ours and the peers', each peer beside
//! how many times as fast ours are.

use super::super::result::{Row, Target};
use super::super::stats::Spread;
use super::contender::Line;
use super::timed::{Timed, ratio};
use super::{CollectivesFigures, Forming, Overhead, targets};

pub(super) fn rows(figures: &CollectivesFigures) -> Vec<Row> {
    let CollectivesFigures { rows, limits, forming, overhead_of_elasticity, .. } = figures;
    let mut table: Vec<Row> =
        limits.lines().into_iter().map(|[what, much, beside]| Row::new(what, much).beside(beside)).collect();
    table.extend(results(rows));
    table.extend(forming.iter().map(formed));
    table.extend(overhead_of_elasticity.iter().map(overhead));
    table
}

fn results(rows: &[Timed]) -> Vec<Row> {
    let row = |timed: &Timed| {
        let Timed { world, bytes, number, median_us, p25_us, p75_us, rounds, line, .. } = timed;
        let what = format!("{}, {world} ranks, {}: {}", number.name(), size(*bytes), line.label());
        let mut measured = time(*median_us);
        if *rounds > 1 {
            measured = format!("{measured} ({} to {})", time(*p25_us), time(*p75_us));
        }
        let (beside, targets) = beside(timed, rows);
        targets.into_iter().fold(Row::new(what, measured).beside(beside), Row::target)
    };
    rows.iter().map(row).collect()
}

/// What is said beside a result, and what was promised of it.
fn beside(timed: &Timed, all: &[Timed]) -> (String, Vec<Target>) {
    let mut said = vec![format!("busbw {}", rate(timed.busbw_gbs))];
    let mut promised = Vec::new();
    if let Some(of_streams) = timed.of_streams {
        said.push(format!("{of_streams:.2} × its streams alone"));
        let limit = targets::of_streams(timed.cell());
        promised.extend(limit.map(|limit| Target::AtLeast { limit, measured: of_streams }));
    }
    said.extend(timed.algorithm.map(|algorithm| format!("by {algorithm}")));
    for ours in all.iter().filter(|ours| ours.cell() == timed.cell()) {
        let Line::Reknit(transport) = ours.line else { continue };
        if !timed.line.rivals(transport) {
            continue;
        }
        let measured = ratio(ours, timed);
        said.push(format!("reknit {} {} × as fast", transport.name(), digits(measured)));
        let limit = targets::speed_up(transport, timed.line, timed.cell());
        promised.extend(limit.map(|limit| Target::AtLeast { limit, measured }));
    }
    (said.join(", "), promised)
}

fn formed(Forming { transport, world, ms }: &Forming) -> Row {
    let Spread { n, p25, p50, p75, .. } = ms;
    let what = format!("a group of {world} forms: reknit {}", transport.name());
    let row = Row::new(what, format!("{p50:.1} ms ({p25:.1} to {p75:.1}, n={n})"));
    match targets::forming_ms(*world) {
        Some(limit) => row.target(Target::AtMost { limit, measured: *p50 }),
        None => row,
    }
}

fn overhead(Overhead { transport, word }: &Overhead) -> Row {
    let Spread { n, p25, p50, p75, .. } = word.cost_percent;
    let what = format!("elasticity, {} ranks, {}: reknit {}", word.ranks, size(word.bytes), transport.name());
    Row::new(what, format!("{p50:+.2} % ({p25:+.2} to {p75:+.2}, n={n})"))
        .beside(format!(
            "{} with the control word, {} without",
            time(word.with_us.p50),
            time(word.without_us.p50)
        ))
        .target(Target::AtMost { limit: targets::OVERHEAD_PERCENT_MAX, measured: p50 })
}

/// A size, in the largest binary unit of which it is a whole number.
pub(super) fn size(bytes: u64) -> String {
    let units = [(1 << 30, "GiB"), (1 << 20, "MiB"), (1 << 10, "KiB")];
    let unit = units.into_iter().find(|(unit, _)| bytes >= *unit && bytes.is_multiple_of(*unit));
    unit.map_or_else(|| format!("{bytes} B"), |(unit, name)| format!("{} {name}", bytes / unit))
}

/// Microseconds, with three digits that count, in a unit that people would choose.
pub(super) fn time(us: f64) -> String {
    match us {
        ..1e4 => format!("{} µs", digits(us)),
        1e4..1e7 => format!("{} ms", digits(us / 1e3)),
        _ => format!("{} s", digits(us / 1e6)),
    }
}

fn rate(gbs: f64) -> String {
    if gbs < 0.1 { format!("{} MB/s", digits(gbs * 1e3)) } else { format!("{} GB/s", digits(gbs)) }
}

fn digits(number: f64) -> String {
    match number {
        ..10.0 => format!("{number:.2}"),
        10.0..100.0 => format!("{number:.1}"),
        _ => format!("{number:.0}"),
    }
}

#[cfg(test)]
mod tests {
    use super::super::super::numbers::NumberType;
    use super::super::super::peers::{Sum, Wire};
    use super::super::super::transport::Transport;
    use super::*;

    fn timed(line: Line, bytes: u64, time_us: f64) -> Timed {
        let sum = Sum { number: NumberType::F32, elements: bytes / 4 };
        Timed::of(line, 2, sum, Spread::of([time_us]).unwrap())
    }

    #[test]
    fn a_peer_stands_beside_ours_of_the_same_size_and_kind() {
        let all = [
            timed(Line::Reknit(Transport::Tcp), 1 << 20, 200.0),
            timed(Line::Reknit(Transport::Tcp), 4 << 20, 1.0),
            timed(Line::Reknit(Transport::Shm), 1 << 20, 100.0),
            timed(Line::Gloo, 1 << 20, 1200.0),
            timed(Line::Mpi(Wire::Tcp), 1 << 20, 220.0),
        ];
        let at_least = |limit, measured| Target::AtLeast { limit, measured };
        let (said, promised) = beside(&all[3], &all);
        assert_eq!(said, "busbw 0.87 GB/s, reknit tcp 6.00 × as fast, reknit shm 12.0 × as fast");
        assert_eq!(promised, [at_least(5.0, 6.0)]);
        let (said, promised) = beside(&all[4], &all);
        assert_eq!(said, "busbw 4.77 GB/s, reknit tcp 1.10 × as fast");
        assert_eq!(promised, [at_least(1.2, 1.1)]);
        let mut streams = all[0].clone();
        streams.of_streams = Some(0.75);
        let (said, promised) = beside(&streams, &all);
        assert_eq!(said, "busbw 5.24 GB/s, 0.75 × its streams alone");
        assert_eq!(promised, [at_least(0.8, 0.75)]);
    }

    #[test]
    fn sizes_and_times_read_as_people_write_them() {
        assert_eq!(
            [4, 1000, 1024, 1 << 20, 3 << 19, 1 << 30].map(size),
            ["4 B", "1000 B", "1 KiB", "1 MiB", "1536 KiB", "1 GiB"]
        );
        assert_eq!(
            [0.25, 12.34, 5346.0, 21_400.0, 95.7e6].map(time),
            ["0.25 µs", "12.3 µs", "5346 µs", "21.4 ms", "95.7 s"]
        );
    }
}
