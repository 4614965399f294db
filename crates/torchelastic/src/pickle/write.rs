//! The writer: the same few instructions, each value written out, only names remembered.

use super::{Global, Value, op};

/// The pickle of a value, in that version of the format.
pub fn write(value: &Value, protocol: u8) -> Vec<u8> {
    let mut writer = Writer { bytes: vec![op::PROTO, protocol], remembered: Vec::new() };
    writer.value(value);
    writer.bytes.push(op::STOP);
    writer.bytes
}

struct Writer {
    bytes: Vec<u8>,
    /// Names that have been written once, in the order of the memo.
    remembered: Vec<Global>,
}

impl Writer {
    fn value(&mut self, value: &Value) {
        match value {
            Value::None => self.bytes.push(op::NONE),
            Value::Bool(true) => self.bytes.push(op::NEWTRUE),
            Value::Bool(false) => self.bytes.push(op::NEWFALSE),
            Value::Int(number) => self.int(*number),
            Value::Float(bits) => {
                self.bytes.push(op::BINFLOAT);
                self.bytes.extend_from_slice(&bits.to_be_bytes());
            }
            Value::Text(text) => self.counted(op::SHORT_BINUNICODE, op::BINUNICODE, text.as_bytes()),
            Value::Bytes(bytes) => self.counted(op::SHORT_BINBYTES, op::BINBYTES, bytes),
            Value::Tuple(items) if items.is_empty() => self.bytes.push(op::EMPTY_TUPLE),
            Value::Tuple(items) => self.marked(op::TUPLE, items.iter()),
            Value::List(items) => {
                self.bytes.push(op::EMPTY_LIST);
                self.marked(op::APPENDS, items.iter());
            }
            Value::Set(items) => {
                self.bytes.push(op::EMPTY_SET);
                self.marked(op::ADDITEMS, items.iter());
            }
            Value::Dict(items) => self.dict(items),
            Value::Global(global) => self.global(*global),
            Value::Made(maker, arguments) => {
                self.global(*maker);
                self.value(&Value::Tuple(arguments.clone()));
                self.bytes.push(op::REDUCE);
            }
            Value::Object(class, attributes) => {
                self.global(*class);
                self.bytes.extend_from_slice(&[op::EMPTY_TUPLE, op::NEWOBJ]);
                self.dict(attributes);
                self.bytes.push(op::BUILD);
            }
        }
    }

    fn int(&mut self, number: i64) {
        if let Ok(small) = u8::try_from(number) {
            self.bytes.extend_from_slice(&[op::BININT1, small]);
        } else if let Ok(middle) = i32::try_from(number) {
            self.bytes.push(op::BININT);
            self.bytes.extend_from_slice(&middle.to_le_bytes());
        } else {
            self.bytes.extend_from_slice(&[op::LONG1, 8]);
            self.bytes.extend_from_slice(&number.to_le_bytes());
        }
    }

    fn counted(&mut self, short: u8, long: u8, bytes: &[u8]) {
        match u8::try_from(bytes.len()) {
            Ok(length) => self.bytes.extend_from_slice(&[short, length]),
            Err(_) => {
                self.bytes.push(long);
                self.bytes.extend_from_slice(&(bytes.len() as u32).to_le_bytes());
            }
        }
        self.bytes.extend_from_slice(bytes);
    }

    fn marked<'a>(&mut self, end: u8, items: impl Iterator<Item = &'a Value>) {
        self.bytes.push(op::MARK);
        for item in items {
            self.value(item);
        }
        self.bytes.push(end);
    }

    fn dict(&mut self, items: &[(Value, Value)]) {
        self.bytes.push(op::EMPTY_DICT);
        self.marked(op::SETITEMS, items.iter().flat_map(|(key, value)| [key, value]));
    }

    fn global(&mut self, global: Global) {
        match self.remembered.iter().position(|known| *known == global) {
            // There are five of them.
            Some(index) => self.bytes.extend_from_slice(&[op::BINGET, index as u8]),
            None => {
                let (module, name) = global.path();
                self.value(&Value::Text(module.to_owned()));
                self.value(&Value::Text(name.to_owned()));
                self.bytes.extend_from_slice(&[op::STACK_GLOBAL, op::MEMOIZE]);
                self.remembered.push(global);
            }
        }
    }
}
