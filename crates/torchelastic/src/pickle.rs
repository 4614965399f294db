//! Python's pickle format, as far as torchrun's rendezvous state needs it: a reader that can only yield data, and a writer.
//!
//! Unpickling runs whatever the pickle names. Agents unpickle the rendezvous state that others wrote, so whoever may write it may
//! run code on every machine of the job. This reader knows five names ([`Global`]), calls nothing, and refuses everything else; what
//! it has read is safe for agents to unpickle.
//!
//! The format is a program for a machine with a stack and a memo (`Lib/pickletools.py` in CPython describes every instruction).
//! Numbers in it are little-endian.

mod write;

use std::fmt;

pub use write::write;

/// How deep values may lie in each other, and how many there may be: a state needs few of either.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct PickleLimits {
    /// How deep.
    pub depth: usize,
    /// How many values, and bytes of texts, counting what is referred to twice twice.
    pub values: usize,
}

impl Default for PickleLimits {
    fn default() -> PickleLimits {
        PickleLimits { depth: 12, values: 2 << 20 }
    }
}

/// The names that a state may refer to.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Global {
    /// The state itself.
    State,
    /// What names an agent.
    Node,
    /// An instant.
    DateTime,
    /// A time zone …
    TimeZone,
    /// … is made of its distance from UTC.
    TimeDelta,
}

impl Global {
    const ALL: [Global; 5] =
        [Global::State, Global::Node, Global::DateTime, Global::TimeZone, Global::TimeDelta];

    /// Its module and its name.
    pub fn path(self) -> (&'static str, &'static str) {
        const RENDEZVOUS: &str = "torch.distributed.elastic.rendezvous.dynamic_rendezvous";
        match self {
            Global::State => (RENDEZVOUS, "_RendezvousState"),
            Global::Node => (RENDEZVOUS, "_NodeDesc"),
            Global::DateTime => ("datetime", "datetime"),
            Global::TimeZone => ("datetime", "timezone"),
            Global::TimeDelta => ("datetime", "timedelta"),
        }
    }
}

/// A Python value.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub enum Value {
    /// `None`.
    None,
    /// A `bool`.
    Bool(bool),
    /// An `int`.
    Int(i64),
    /// A `float`, as its bits.
    Float(u64),
    /// A `str`.
    Text(String),
    /// A `bytes`.
    Bytes(Vec<u8>),
    /// A `tuple`.
    Tuple(Vec<Value>),
    /// A `list`.
    List(Vec<Value>),
    /// A `dict`, in its order.
    Dict(Vec<(Value, Value)>),
    /// A `set`, in the order in which it was written.
    Set(Vec<Value>),
    /// One of the names.
    Global(Global),
    /// What a name makes of arguments: only instants and what they are made of.
    Made(Global, Vec<Value>),
    /// An object of a class, with its attributes.
    Object(Global, Vec<(Value, Value)>),
}

/// Why bytes are no pickle that may be read.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum PickleError {
    /// It ends in the middle.
    #[error("the pickle ends too soon")]
    Ends,
    /// It goes on after its end.
    #[error("there are bytes after the pickle's end")]
    Trailing,
    /// An instruction that no state needs.
    #[error("instruction 0x{0:02x} is not allowed in a rendezvous state")]
    Instruction(u8),
    /// A name that no state needs. This is what an attack looks like.
    #[error("the pickle names {module}.{name}, which is not allowed in a rendezvous state")]
    Name {
        /// The module.
        module: Shown,
        /// The name in it.
        name: Shown,
    },
    /// An instruction finds other values than it needs.
    #[error("the pickle makes no sense: {0}")]
    Nonsense(&'static str),
    /// It is too deep or too large.
    #[error("the pickle is deeper or has more values than a rendezvous state may have")]
    Large,
}

/// A text of somebody else's, shortened and made harmless for a log.
#[derive(Clone, PartialEq, Eq)]
pub struct Shown(String);

impl Shown {
    fn new(text: &str) -> Shown {
        Shown(text.chars().take(64).flat_map(char::escape_default).collect())
    }
}

impl fmt::Display for Shown {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

impl fmt::Debug for Shown {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

/// The value of a pickle, and the version of the format that it says it has.
///
/// # Errors
/// [`PickleError`] if it is none, or one that may not be read.
pub fn read(bytes: &[u8], limits: &PickleLimits) -> Result<(Value, u8), PickleError> {
    let mut machine =
        Machine { bytes, at: 0, values: Vec::new(), stack: Vec::new(), memo: Vec::new(), protocol: 0 };
    let top = machine.run(limits)?;
    if machine.at != bytes.len() {
        return Err(PickleError::Trailing);
    }
    let mut budget = limits.values;
    let value = machine.build(top, limits.depth, &mut budget)?;
    Ok((value, machine.protocol))
}

/// A value while the program runs: others may refer to it and add to it.
enum Cell {
    Plain(Value),
    Tuple(Vec<usize>),
    List(Vec<usize>),
    Dict(Vec<(usize, usize)>),
    Set(Vec<usize>),
    Made(Global, usize),
    Object(Global, Option<usize>),
}

#[derive(Clone, Copy)]
enum Slot {
    Mark,
    Value(usize),
}

struct Machine<'a> {
    bytes: &'a [u8],
    at: usize,
    values: Vec<Cell>,
    stack: Vec<Slot>,
    memo: Vec<usize>,
    protocol: u8,
}

/// The instructions that states are written with, by CPython's names.
mod op {
    pub(super) const MARK: u8 = b'(';
    pub(super) const STOP: u8 = b'.';
    pub(super) const BININT: u8 = b'J';
    pub(super) const BININT1: u8 = b'K';
    pub(super) const BININT2: u8 = b'M';
    pub(super) const BINFLOAT: u8 = b'G';
    pub(super) const NONE: u8 = b'N';
    pub(super) const REDUCE: u8 = b'R';
    pub(super) const BINUNICODE: u8 = b'X';
    pub(super) const BUILD: u8 = b'b';
    pub(super) const APPEND: u8 = b'a';
    pub(super) const APPENDS: u8 = b'e';
    pub(super) const EMPTY_LIST: u8 = b']';
    pub(super) const EMPTY_DICT: u8 = b'}';
    pub(super) const EMPTY_TUPLE: u8 = b')';
    pub(super) const TUPLE: u8 = b't';
    pub(super) const BINGET: u8 = b'h';
    pub(super) const LONG_BINGET: u8 = b'j';
    pub(super) const SETITEM: u8 = b's';
    pub(super) const SETITEMS: u8 = b'u';
    pub(super) const PROTO: u8 = 0x80;
    pub(super) const NEWOBJ: u8 = 0x81;
    pub(super) const TUPLE1: u8 = 0x85;
    pub(super) const TUPLE2: u8 = 0x86;
    pub(super) const TUPLE3: u8 = 0x87;
    pub(super) const NEWTRUE: u8 = 0x88;
    pub(super) const NEWFALSE: u8 = 0x89;
    pub(super) const LONG1: u8 = 0x8a;
    pub(super) const BINBYTES: u8 = b'B';
    pub(super) const SHORT_BINBYTES: u8 = b'C';
    pub(super) const SHORT_BINUNICODE: u8 = 0x8c;
    pub(super) const EMPTY_SET: u8 = 0x8f;
    pub(super) const ADDITEMS: u8 = 0x90;
    pub(super) const STACK_GLOBAL: u8 = 0x93;
    pub(super) const MEMOIZE: u8 = 0x94;
    pub(super) const FRAME: u8 = 0x95;
}

impl Machine<'_> {
    fn run(&mut self, limits: &PickleLimits) -> Result<usize, PickleError> {
        loop {
            if self.values.len() > limits.values || self.memo.len() > limits.values {
                return Err(PickleError::Large);
            }
            let [instruction] = self.array()?;
            match instruction {
                op::PROTO => {
                    [self.protocol] = self.array()?;
                    if !(4..=5).contains(&self.protocol) {
                        return Err(PickleError::Nonsense("its version is neither 4 nor 5"));
                    }
                }
                // Only a hint for readers of files.
                op::FRAME => {
                    self.array::<8>()?;
                }
                op::MARK => self.stack.push(Slot::Mark),
                op::STOP => {
                    let top = self.pop()?;
                    return match self.stack.is_empty() {
                        true => Ok(top),
                        false => Err(PickleError::Nonsense("something is left over")),
                    };
                }
                op::NONE => self.push(Cell::Plain(Value::None)),
                op::NEWTRUE => self.push(Cell::Plain(Value::Bool(true))),
                op::NEWFALSE => self.push(Cell::Plain(Value::Bool(false))),
                op::BININT => {
                    let number = i32::from_le_bytes(self.array()?);
                    self.push(Cell::Plain(Value::Int(number.into())));
                }
                op::BININT1 => {
                    let [number] = self.array()?;
                    self.push(Cell::Plain(Value::Int(number.into())));
                }
                op::BININT2 => {
                    let number = u16::from_le_bytes(self.array()?);
                    self.push(Cell::Plain(Value::Int(number.into())));
                }
                op::LONG1 => {
                    let [length] = self.array()?;
                    let number = long(self.take(length.into())?)?;
                    self.push(Cell::Plain(Value::Int(number)));
                }
                op::BINFLOAT => {
                    let bits = u64::from_be_bytes(self.array()?);
                    self.push(Cell::Plain(Value::Float(bits)));
                }
                op::SHORT_BINUNICODE => {
                    let [length] = self.array()?;
                    self.text(length.into())?;
                }
                op::BINUNICODE => {
                    let length = u32::from_le_bytes(self.array()?);
                    self.text(length as usize)?;
                }
                op::SHORT_BINBYTES => {
                    let [length] = self.array()?;
                    self.byte_string(length.into())?;
                }
                op::BINBYTES => {
                    let length = u32::from_le_bytes(self.array()?);
                    self.byte_string(length as usize)?;
                }
                op::EMPTY_TUPLE => self.push(Cell::Tuple(Vec::new())),
                op::TUPLE1 => self.tuple(1)?,
                op::TUPLE2 => self.tuple(2)?,
                op::TUPLE3 => self.tuple(3)?,
                op::TUPLE => {
                    let items = self.pop_to_mark()?;
                    self.push(Cell::Tuple(items));
                }
                op::EMPTY_LIST => self.push(Cell::List(Vec::new())),
                op::EMPTY_DICT => self.push(Cell::Dict(Vec::new())),
                op::EMPTY_SET => self.push(Cell::Set(Vec::new())),
                op::APPEND => {
                    let item = self.pop()?;
                    self.append(vec![item])?;
                }
                op::APPENDS => {
                    let items = self.pop_to_mark()?;
                    self.append(items)?;
                }
                op::ADDITEMS => {
                    let items = self.pop_to_mark()?;
                    match self.top()? {
                        Cell::Set(set) => set.extend(items),
                        _ => return Err(PickleError::Nonsense("items are added to what is no set")),
                    }
                }
                op::SETITEM => {
                    let (value, key) = (self.pop()?, self.pop()?);
                    self.set_items(vec![key, value])?;
                }
                op::SETITEMS => {
                    let items = self.pop_to_mark()?;
                    self.set_items(items)?;
                }
                op::STACK_GLOBAL => self.global()?,
                op::NEWOBJ => {
                    let (arguments, class) = (self.pop()?, self.pop_global()?);
                    let plain = matches!(class, Global::State | Global::Node);
                    let without = matches!(&self.values[arguments], Cell::Tuple(items) if items.is_empty());
                    if !plain || !without {
                        return Err(PickleError::Nonsense("an object is made as none of a state's is"));
                    }
                    self.push(Cell::Object(class, None));
                }
                op::REDUCE => {
                    let (arguments, maker) = (self.pop()?, self.pop_global()?);
                    if matches!(maker, Global::State | Global::Node) {
                        return Err(PickleError::Nonsense("a class of the rendezvous is called"));
                    }
                    self.push(Cell::Made(maker, arguments));
                }
                op::BUILD => {
                    let attributes = self.pop()?;
                    match self.top()? {
                        Cell::Object(_, own @ None) => *own = Some(attributes),
                        _ => return Err(PickleError::Nonsense("attributes for what takes none")),
                    }
                }
                op::MEMOIZE => {
                    let top = self.peek()?;
                    self.memo.push(top);
                }
                op::BINGET => {
                    let [index] = self.array()?;
                    self.recall(index.into())?;
                }
                op::LONG_BINGET => {
                    let index = u32::from_le_bytes(self.array()?);
                    self.recall(index as usize)?;
                }
                other => return Err(PickleError::Instruction(other)),
            }
        }
    }

    fn take(&mut self, bytes: usize) -> Result<&[u8], PickleError> {
        let end = self.at.checked_add(bytes).ok_or(PickleError::Ends)?;
        let taken = self.bytes.get(self.at..end).ok_or(PickleError::Ends)?;
        self.at = end;
        Ok(taken)
    }

    fn array<const N: usize>(&mut self) -> Result<[u8; N], PickleError> {
        let mut array = [0; N];
        array.copy_from_slice(self.take(N)?);
        Ok(array)
    }

    fn push(&mut self, cell: Cell) {
        self.stack.push(Slot::Value(self.values.len()));
        self.values.push(cell);
    }

    fn peek(&self) -> Result<usize, PickleError> {
        match self.stack.last() {
            Some(Slot::Value(value)) => Ok(*value),
            Some(Slot::Mark) | None => Err(PickleError::Nonsense("a value is missing")),
        }
    }

    fn pop(&mut self) -> Result<usize, PickleError> {
        let value = self.peek()?;
        self.stack.pop();
        Ok(value)
    }

    fn top(&mut self) -> Result<&mut Cell, PickleError> {
        let value = self.peek()?;
        Ok(&mut self.values[value])
    }

    fn pop_global(&mut self) -> Result<Global, PickleError> {
        let value = self.pop()?;
        match &self.values[value] {
            Cell::Plain(Value::Global(global)) => Ok(*global),
            _ => Err(PickleError::Nonsense("what is called is no class")),
        }
    }

    fn pop_to_mark(&mut self) -> Result<Vec<usize>, PickleError> {
        let mut items = Vec::new();
        loop {
            match self.stack.pop() {
                Some(Slot::Value(value)) => items.push(value),
                Some(Slot::Mark) => {
                    items.reverse();
                    return Ok(items);
                }
                None => return Err(PickleError::Nonsense("a mark is missing")),
            }
        }
    }

    fn tuple(&mut self, length: usize) -> Result<(), PickleError> {
        let mut items = (0..length).map(|_| self.pop()).collect::<Result<Vec<_>, _>>()?;
        items.reverse();
        self.push(Cell::Tuple(items));
        Ok(())
    }

    fn append(&mut self, items: Vec<usize>) -> Result<(), PickleError> {
        match self.top()? {
            Cell::List(list) => list.extend(items),
            _ => return Err(PickleError::Nonsense("items are appended to what is no list")),
        }
        Ok(())
    }

    fn set_items(&mut self, items: Vec<usize>) -> Result<(), PickleError> {
        let (pairs, rest) = items.as_chunks::<2>();
        if !rest.is_empty() {
            return Err(PickleError::Nonsense("a key has no value"));
        }
        match self.top()? {
            Cell::Dict(dict) => dict.extend(pairs.iter().map(|[key, value]| (*key, *value))),
            _ => return Err(PickleError::Nonsense("items are set in what is no dict")),
        }
        Ok(())
    }

    fn text(&mut self, length: usize) -> Result<(), PickleError> {
        let text = std::str::from_utf8(self.take(length)?);
        let text = text.map_err(|_| PickleError::Nonsense("a text is not UTF-8"))?.to_owned();
        self.push(Cell::Plain(Value::Text(text)));
        Ok(())
    }

    fn byte_string(&mut self, length: usize) -> Result<(), PickleError> {
        let bytes = self.take(length)?.to_vec();
        self.push(Cell::Plain(Value::Bytes(bytes)));
        Ok(())
    }

    fn global(&mut self) -> Result<(), PickleError> {
        let (name, module) = (self.pop()?, self.pop()?);
        let (Cell::Plain(Value::Text(module)), Cell::Plain(Value::Text(name))) =
            (&self.values[module], &self.values[name])
        else {
            return Err(PickleError::Nonsense("a name is no text"));
        };
        let known = Global::ALL.into_iter().find(|known| known.path() == (module.as_str(), name.as_str()));
        let Some(known) = known else {
            return Err(PickleError::Name { module: Shown::new(module), name: Shown::new(name) });
        };
        self.push(Cell::Plain(Value::Global(known)));
        Ok(())
    }

    fn recall(&mut self, index: usize) -> Result<(), PickleError> {
        let known = self.memo.get(index).copied();
        let value = known.ok_or(PickleError::Nonsense("what was never remembered is recalled"))?;
        self.stack.push(Slot::Value(value));
        Ok(())
    }

    /// The value that the program has made, as a tree. A value that lies within itself is deeper than any limit.
    fn build(&self, value: usize, depth: usize, budget: &mut usize) -> Result<Value, PickleError> {
        let bytes = match &self.values[value] {
            Cell::Plain(Value::Text(text)) => text.len(),
            Cell::Plain(Value::Bytes(bytes)) => bytes.len(),
            _ => 0,
        };
        *budget = budget.checked_sub(1 + bytes).ok_or(PickleError::Large)?;
        let depth = depth.checked_sub(1).ok_or(PickleError::Large)?;
        let mut all = |items: &[usize]| {
            items.iter().map(|item| self.build(*item, depth, budget)).collect::<Result<Vec<_>, _>>()
        };
        Ok(match &self.values[value] {
            Cell::Plain(value) => value.clone(),
            Cell::Tuple(items) => Value::Tuple(all(items)?),
            Cell::List(items) => Value::List(all(items)?),
            Cell::Set(items) => Value::Set(all(items)?),
            Cell::Dict(items) => Value::Dict(self.build_pairs(items, depth, budget)?),
            Cell::Made(maker, arguments) => match self.build(*arguments, depth, budget)? {
                Value::Tuple(arguments) => Value::Made(*maker, arguments),
                _ => return Err(PickleError::Nonsense("arguments are no tuple")),
            },
            Cell::Object(class, attributes) => {
                let attributes = attributes.ok_or(PickleError::Nonsense("an object has no attributes"))?;
                match self.build(attributes, depth, budget)? {
                    Value::Dict(attributes) => Value::Object(*class, attributes),
                    _ => return Err(PickleError::Nonsense("attributes are no dict")),
                }
            }
        })
    }

    fn build_pairs(
        &self,
        pairs: &[(usize, usize)],
        depth: usize,
        budget: &mut usize,
    ) -> Result<Vec<(Value, Value)>, PickleError> {
        let pair = |(key, value): &(usize, usize)| {
            Ok((self.build(*key, depth, budget)?, self.build(*value, depth, budget)?))
        };
        pairs.iter().map(pair).collect()
    }
}

/// A number of up to eight bytes.
fn long(bytes: &[u8]) -> Result<i64, PickleError> {
    let fill = if bytes.last().is_some_and(|last| last & 0x80 != 0) { 0xff } else { 0 };
    let mut whole = [fill; 8];
    match whole.get_mut(..bytes.len()) {
        Some(own) => own.copy_from_slice(bytes),
        None => return Err(PickleError::Nonsense("a number is too large")),
    }
    Ok(i64::from_le_bytes(whole))
}
