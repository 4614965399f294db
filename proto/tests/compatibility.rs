//! Rule P-3: what an older peer or an older server wrote keeps its meaning.
//!
//! `compatibility/fields.txt` lists every field there ever was, with its number and type; `compatibility/record-N.hex` is
//! a record as format N writes it. After an addition to the contract run the test with `REKNIT_BLESS=1` and look at the
//! difference: lines may come, none may change or go.

#![allow(clippy::unwrap_used, reason = "a test that cannot set itself up fails")]

mod common;

use std::collections::BTreeSet;
use std::path::PathBuf;

use prost::Message as _;
use prost_types::field_descriptor_proto::{Label, Type};
use prost_types::{DescriptorProto, EnumDescriptorProto, FileDescriptorSet};
use reknit_proto::{DESCRIPTORS, record};

fn kept(name: &str) -> PathBuf {
    PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("tests/compatibility").join(name)
}

fn is_blessed() -> bool {
    std::env::var_os("REKNIT_BLESS").is_some()
}

fn fields_of(path: &str, message: &DescriptorProto, into: &mut BTreeSet<String>) {
    let path = format!("{path}.{}", message.name());
    for field in &message.field {
        let label = if field.label() == Label::Repeated { "repeated " } else { "" };
        let kind = match field.r#type() {
            Type::Message | Type::Enum => field.type_name().to_owned(),
            scalar => format!("{scalar:?}").to_lowercase(),
        };
        into.insert(format!("{path} {} {} {label}{kind}", field.number(), field.name()));
    }
    message.nested_type.iter().for_each(|nested| fields_of(&path, nested, into));
    message.enum_type.iter().for_each(|nested| values_of(&path, nested, into));
}

fn values_of(path: &str, kind: &EnumDescriptorProto, into: &mut BTreeSet<String>) {
    for value in &kind.value {
        into.insert(format!("{path}.{} {} {}", kind.name(), value.number(), value.name()));
    }
}

#[test]
fn p3_no_field_number_is_used_for_something_else() {
    let mut now = BTreeSet::new();
    for file in FileDescriptorSet::decode(DESCRIPTORS).unwrap().file {
        file.message_type.iter().for_each(|message| fields_of(file.package(), message, &mut now));
        file.enum_type.iter().for_each(|kind| values_of(file.package(), kind, &mut now));
    }
    if is_blessed() {
        let text: Vec<&str> = now.iter().map(String::as_str).collect();
        std::fs::write(kept("fields.txt"), text.join("\n") + "\n").unwrap();
    }
    let before: BTreeSet<String> =
        std::fs::read_to_string(kept("fields.txt")).unwrap().lines().map(str::to_owned).collect();
    let gone: Vec<&String> = before.difference(&now).collect();
    assert!(gone.is_empty(), "older peers and stores still use {gone:#?}");
    let fresh: Vec<&String> = now.difference(&before).collect();
    assert!(fresh.is_empty(), "new, so run this with REKNIT_BLESS=1: {fresh:#?}");
}

#[test]
fn p3_a_record_of_every_format_there_was_is_read() {
    let current = kept(&format!("record-{}.hex", record::FORMAT));
    if is_blessed() && !current.exists() {
        let lines = common::records().into_iter().map(|saved| {
            let bytes = record::encode(&saved, &[3; 32]);
            bytes.iter().map(|byte| format!("{byte:02x}")).collect::<String>()
        });
        std::fs::write(&current, lines.collect::<Vec<_>>().join("\n") + "\n").unwrap();
    }
    for format in 1..=record::FORMAT {
        let text = std::fs::read_to_string(kept(&format!("record-{format}.hex"))).unwrap();
        let byte = |at: usize, line: &str| u8::from_str_radix(&line[at..at + 2], 16).unwrap();
        let read = text.lines().map(|line| {
            let bytes: Vec<u8> = (0..line.len()).step_by(2).map(|at| byte(at, line)).collect();
            record::decode(&bytes).unwrap()
        });
        let expected: Vec<_> = common::records().into_iter().map(|saved| (saved, [3; 32])).collect();
        assert_eq!(read.collect::<Vec<_>>(), expected, "format {format}");
    }
}
