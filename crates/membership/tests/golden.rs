//! Golden scripts: every file in `tests/scripts` is a story of one job. A line that is not indented is a command, the
//! indented lines below it are what the core made of it: what is saved, who is told what, what is noted, and what the job
//! waits for then. `REKNIT_BLESS=1 cargo test -p reknit-membership --test golden` writes down what is so; the reviewer
//! reads the difference.
//!
//! ```text
//! job min=2 max=4            a new job              join a b            they attach, for the first time or again
//! job running=a,b            … that runs already    renew a             it renews its lease
//! ready a fresh:1            a answers its world    ready b l1/5        b holds step 5 as world 1 computed it
//! restored b                 b carried out its plan failed b culprit=a  b could not: a did not deliver
//! broken a suspects=b        a's ring broke         boundary a l1/5     a rests at a boundary
//! die b                      b's stream ends        hang b              b falls silent, its stream stays
//! wake b                     it speaks again        deaf b              it renews its lease, but hears nothing
//! notice b 30s               the cloud warns b      op drain b          an operator asks
//! wrote a 8 state=7          its checkpoint part    manifest a 8        the list of all parts is written
//! wait 3s                    time passes; whoever is attached and does not hang renews its lease
//! restart                    the coordinator dies and takes up again from the store
//! crash before|after COMMAND it dies of this command, before or after the record is saved
//! keep / put back            remembers the store, and puts it back as from a backup
//! ```

#[path = "golden/script.rs"]
mod script;
#[path = "golden/show.rs"]
mod show;

use std::path::{Path, PathBuf};

/// All scripts, in the order of their names.
fn scripts() -> Vec<PathBuf> {
    let dir = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/scripts");
    let entries = std::fs::read_dir(dir).expect("the scripts are there");
    let mut paths: Vec<PathBuf> = entries.map(|entry| entry.expect("a readable entry").path()).collect();
    paths.sort();
    paths
}

#[test]
fn every_script_tells_what_happens() {
    let bless = std::env::var_os("REKNIT_BLESS").is_some();
    let mut wrong = Vec::new();
    for path in scripts() {
        let told = std::fs::read_to_string(&path).expect("a readable script");
        println!("{}", path.display());
        let happened = script::play(&told);
        if told == happened {
            continue;
        }
        if bless {
            std::fs::write(&path, happened).expect("a writable script");
        } else {
            wrong.push(format!("{}\n{}", path.display(), first_difference(&told, &happened)));
        }
    }
    assert!(wrong.is_empty(), "REKNIT_BLESS=1 accepts this:\n{}", wrong.join("\n"));
}

fn first_difference(told: &str, happened: &str) -> String {
    let (told, happened): (Vec<_>, Vec<_>) = (told.lines().collect(), happened.lines().collect());
    let same = told.iter().zip(&happened).take_while(|(a, b)| a == b).count();
    let from = same.saturating_sub(3);
    let part = |lines: &[&str], mark: &str| -> String {
        lines.iter().skip(from).take(10).map(|line| format!("  {mark} {line}\n")).collect()
    };
    format!("line {}:\n{}{}", same + 1, part(&told, "-"), part(&happened, "+"))
}
