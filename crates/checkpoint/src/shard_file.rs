//! Reading a shard's file: nothing leaves here that was not verified.

use std::fs::{self, File};
use std::io;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};

use crate::digest::{digest, fold_file};
use crate::layout::ByteRange;
use crate::load::LoadError;
use crate::manifest::{Manifest, ShardEntry};
use crate::to_usize;

/// One shard's file, opened, its length and header verified.
pub(crate) struct ShardFile<'a> {
    path: PathBuf,
    file: File,
    entry: &'a ShardEntry,
    chunk_bytes: u64,
}

impl<'a> ShardFile<'a> {
    /// Opens the file of the shard with this index. `place` is the checkpoint's directory.
    pub(crate) fn open(
        place: &Path,
        manifest: &'a Manifest,
        shard: usize,
        buffer: &mut Vec<u8>,
    ) -> Result<ShardFile<'a>, LoadError> {
        let entry = &manifest.shards()[shard];
        let path = place.join(&entry.file);
        let (file, found) = open_regular(&path)?;
        let expected = entry.file_bytes;
        if found < expected {
            return Err(LoadError::Truncated { file: path, expected, found });
        }
        if found > expected {
            return Err(LoadError::Garbled { file: path, what: "has bytes after its end" });
        }
        let shard = ShardFile { path, file, entry, chunk_bytes: manifest.layout().chunk_bytes() };
        let header = shard.read(ByteRange::new(0, entry.data_at()), buffer)?;
        // The digest covers the header and the data's chunks, whose digests are known: so it tells of the header alone.
        if fold_file(digest(header), &entry.chunks) != entry.digest {
            return Err(LoadError::Garbled { file: shard.path, what: "has a torn or garbled header" });
        }
        Ok(shard)
    }

    /// The bytes of `chunk`, a chunk of the state that this shard holds, verified.
    pub(crate) fn chunk<'b>(&self, chunk: ByteRange, buffer: &'b mut Vec<u8>) -> Result<&'b [u8], LoadError> {
        let in_data = chunk.start - self.entry.range.start;
        let at = self.entry.data_at() + in_data;
        let range = ByteRange::new(at, at + chunk.len());
        let bytes = self.read(range, buffer)?;
        let (expected, found) = (self.entry.chunks[to_usize(in_data / self.chunk_bytes)], digest(bytes));
        if found != expected {
            return Err(LoadError::DigestMismatch { file: self.path.clone(), range, expected, found });
        }
        Ok(bytes)
    }

    fn read<'b>(&self, range: ByteRange, buffer: &'b mut Vec<u8>) -> Result<&'b [u8], LoadError> {
        let len = to_usize(range.len());
        if buffer.len() < len {
            buffer.resize(len, 0);
        }
        match self.file.read_exact_at(&mut buffer[..len], range.start) {
            Ok(()) => Ok(&buffer[..len]),
            Err(e) if e.kind() == io::ErrorKind::UnexpectedEof => {
                let found = self.file.metadata().map(|metadata| metadata.len()).unwrap_or(0);
                let expected = self.entry.file_bytes;
                Err(LoadError::Truncated { file: self.path.clone(), expected, found })
            }
            Err(source) => Err(LoadError::Io { file: self.path.clone(), source }),
        }
    }
}

/// Opens a file that must be a regular one (a pipe would keep the reader waiting), and gives its length in bytes.
pub(crate) fn open_regular(path: &Path) -> Result<(File, u64), LoadError> {
    let failed = |source: io::Error| match source.kind() {
        io::ErrorKind::NotFound | io::ErrorKind::NotADirectory => {
            LoadError::Missing { file: path.to_owned() }
        }
        _ => LoadError::Io { file: path.to_owned(), source },
    };
    if !fs::metadata(path).map_err(failed)?.is_file() {
        return Err(LoadError::Garbled { file: path.to_owned(), what: "is not a file" });
    }
    let file = File::open(path).map_err(failed)?;
    let len = file.metadata().map_err(failed)?.len();
    Ok((file, len))
}
