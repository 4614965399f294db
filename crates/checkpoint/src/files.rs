//! The operations on files that saving is made of: the seam at which tests let disks fill up, syncs fail and machines
//! crash. The real ones are at the end.

use std::fs::{self, File, OpenOptions};
use std::io::{self, Read, Write};
use std::path::{Path, PathBuf};

use crate::names;

/// How much is handed to the system in one write, in bytes.
const WRITE_BYTES: usize = 4 << 20;
/// What unbuffered writes must be a multiple of, in memory, in the file and in length, in bytes.
pub(crate) const DIRECT_ALIGN: usize = 4096;

/// Why a file could not be written.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum FileError {
    /// The disk or the quota is full.
    #[error("there is no space left for {}", file.display())]
    NoSpace {
        /// What was being written.
        file: PathBuf,
        /// What the system said.
        source: io::Error,
    },
    /// A file of that name is there and holds something else. It was left as it is.
    #[error("{} exists and holds something else", file.display())]
    Exists {
        /// The name that is taken.
        file: PathBuf,
    },
    /// Anything else that went wrong.
    #[error("cannot {action} {}", file.display())]
    Io {
        /// What was tried, as a verb.
        action: &'static str,
        /// On what.
        file: PathBuf,
        /// What the system said.
        source: io::Error,
    },
}

impl FileError {
    pub(crate) fn new(action: &'static str, file: &Path, source: io::Error) -> FileError {
        let file = file.to_owned();
        match source.kind() {
            io::ErrorKind::StorageFull | io::ErrorKind::QuotaExceeded => FileError::NoSpace { file, source },
            _ => FileError::Io { action, file, source },
        }
    }

    /// What an operator can do about it.
    pub fn hint(&self) -> &'static str {
        match self {
            FileError::NoSpace { .. } => "free space or keep fewer checkpoints; the next save tries again",
            FileError::Exists { .. } => {
                "give each job, and each fresh start of a job, a directory of its own"
            }
            FileError::Io { source, .. } => match source.kind() {
                io::ErrorKind::PermissionDenied => {
                    "let the user that runs the training write to the directory"
                }
                io::ErrorKind::ReadOnlyFilesystem => {
                    "the file system is mounted read-only: look for disk errors"
                }
                io::ErrorKind::AlreadyExists | io::ErrorKind::NotADirectory => {
                    "something that is not a directory is in the way"
                }
                io::ErrorKind::NotFound => "something removed the directory while it was in use",
                io::ErrorKind::FileTooLarge => "raise the limit on the size of files (ulimit -f)",
                _ => "look for disk or network errors in the system's log",
            },
        }
    }
}

/// What saving does with files.
pub(crate) trait Files: Send + Sync {
    /// Makes a directory; one that is there already is fine.
    fn create_dir(&self, dir: &Path) -> io::Result<()>;
    /// Makes a new file; fails if the name is taken.
    fn create(&self, file: &Path) -> io::Result<Box<dyn NewFile>>;
    /// Gives a file another name in the same directory; fails if that is taken.
    fn rename_new(&self, from: &Path, to: &Path) -> io::Result<()>;
    /// Makes the names in a directory durable.
    fn sync_dir(&self, dir: &Path) -> io::Result<()>;
    /// Removes a file.
    fn remove(&self, file: &Path) -> io::Result<()>;
    /// The length of a file in bytes.
    fn len(&self, file: &Path) -> io::Result<u64>;
    /// Whether a file holds exactly `bytes`.
    fn holds(&self, file: &Path, bytes: &[u8]) -> io::Result<bool>;
}

/// A file that is being written.
pub(crate) trait NewFile {
    /// Appends `bytes`.
    fn write(&mut self, bytes: &[u8]) -> io::Result<()>;
    /// Makes what was written durable. After an error nobody knows what is: the file must be given up, never synced
    /// again, for a second sync may report success for data that the system has dropped.
    fn sync(&mut self) -> io::Result<()>;
}

/// Makes a directory that survives a crash, and those above it as need be. Whoever made one that is there already has
/// seen to it.
pub(crate) fn create_dirs(files: &dyn Files, dir: &Path) -> Result<(), FileError> {
    let above = match dir.parent() {
        None => return Ok(()),
        Some(above) if above.as_os_str().is_empty() => Path::new("."),
        Some(above) => above,
    };
    if dir.is_dir() {
        return Ok(());
    }
    create_dirs(files, above)?;
    files.create_dir(dir).map_err(|e| FileError::new("create", dir, e))?;
    files.sync_dir(above).map_err(|e| FileError::new("sync", above, e))
}

/// Makes the directory `dir`, and those above it as need be, so that it survives a crash, and tries whether files can be
/// made in it.
///
/// # Errors
/// If it cannot be made, or not be written to.
pub fn prepare_dir(dir: &Path) -> Result<(), FileError> {
    prepare_dir_with(&RealFiles { direct: true }, dir)
}

pub(crate) fn prepare_dir_with(files: &dyn Files, dir: &Path) -> Result<(), FileError> {
    create_dirs(files, dir)?;
    let probe = dir.join(names::probe());
    drop(files.create(&probe).map_err(|e| FileError::new("create", &probe, e))?);
    match files.remove(&probe) {
        // Somebody who cleans up was faster.
        Err(e) if e.kind() != io::ErrorKind::NotFound => Err(FileError::new("remove", &probe, e)),
        _ => Ok(()),
    }
}

/// Gives `dir` a file `name` that holds `image`, at once and for good, or leaves nothing of it behind: when this
/// returns without an error, the file survives a crash. `go_on` is asked before each write whether to give up.
///
/// A file of that name that holds the same is as good.
pub(crate) fn publish<E: From<FileError>>(
    files: &dyn Files,
    dir: &Path,
    name: &str,
    image: &[u8],
    go_on: impl FnMut() -> Result<(), E>,
) -> Result<(), E> {
    let aside = dir.join(names::temporary(name));
    let place = dir.join(name);
    let written = write_aside(files, &aside, image, go_on);
    let moved = written.and_then(|()| match files.rename_new(&aside, &place) {
        Ok(()) => Ok(true),
        Err(e) if e.kind() == io::ErrorKind::AlreadyExists => match files.holds(&place, image) {
            Ok(true) => Ok(false),
            Ok(false) => Err(FileError::Exists { file: place.clone() }.into()),
            Err(e) => Err(FileError::new("read", &place, e).into()),
        },
        Err(e) => Err(FileError::new("rename a file to", &place, e).into()),
    });
    let is_ours = match moved {
        Ok(true) => true,
        Ok(false) | Err(_) => {
            // If this fails too, the leftover is cleaned away with the checkpoint.
            let _ = files.remove(&aside);
            moved?
        }
    };
    files.sync_dir(dir).map_err(|e| {
        if is_ours {
            // It may be gone after a crash, so nobody may rely on it: take it back.
            let _ = files.remove(&place);
        }
        FileError::new("sync", dir, e).into()
    })
}

fn write_aside<E: From<FileError>>(
    files: &dyn Files,
    aside: &Path,
    image: &[u8],
    mut go_on: impl FnMut() -> Result<(), E>,
) -> Result<(), E> {
    let mut file = files.create(aside).map_err(|e| FileError::new("create", aside, e))?;
    for block in image.chunks(WRITE_BYTES) {
        go_on()?;
        file.write(block).map_err(|e| FileError::new("write", aside, e))?;
    }
    go_on()?;
    file.sync().map_err(|e| FileError::new("sync", aside, e).into())
}

/// The file system.
pub(crate) struct RealFiles {
    /// Whether writes go past the page cache where the file system can do that.
    pub(crate) direct: bool,
}

impl Files for RealFiles {
    fn create_dir(&self, dir: &Path) -> io::Result<()> {
        match fs::create_dir(dir) {
            Err(e) if e.kind() == io::ErrorKind::AlreadyExists && dir.is_dir() => Ok(()),
            other => other,
        }
    }

    fn create(&self, file: &Path) -> io::Result<Box<dyn NewFile>> {
        let mut options = OpenOptions::new();
        options.write(true).create_new(true);
        if self.direct
            && let Some(file) = open_direct(&options, file)?
        {
            return Ok(Box::new(RealFile { file, direct: true }));
        }
        Ok(Box::new(RealFile { file: options.open(file)?, direct: false }))
    }

    fn rename_new(&self, from: &Path, to: &Path) -> io::Result<()> {
        use rustix::fs::{CWD, RenameFlags, renameat_with};
        use rustix::io::Errno;
        match renameat_with(CWD, from, CWD, to, RenameFlags::NOREPLACE) {
            // NFS and some others cannot, but a link fails just so if the name is taken.
            Err(Errno::INVAL | Errno::NOSYS | Errno::OPNOTSUPP) => {
                fs::hard_link(from, to)?;
                fs::remove_file(from)
            }
            other => Ok(other?),
        }
    }

    fn sync_dir(&self, dir: &Path) -> io::Result<()> {
        File::open(dir)?.sync_all()
    }

    fn remove(&self, file: &Path) -> io::Result<()> {
        fs::remove_file(file)
    }

    fn len(&self, file: &Path) -> io::Result<u64> {
        Ok(fs::metadata(file)?.len())
    }

    fn holds(&self, file: &Path, mut bytes: &[u8]) -> io::Result<bool> {
        let mut file = File::open(file)?;
        if file.metadata()?.len() != bytes.len() as u64 {
            return Ok(false);
        }
        let mut block = vec![0; WRITE_BYTES.min(bytes.len())];
        while !bytes.is_empty() {
            let len = block.len().min(bytes.len());
            file.read_exact(&mut block[..len])?;
            if block[..len] != bytes[..len] {
                return Ok(false);
            }
            bytes = &bytes[len..];
        }
        Ok(true)
    }
}

/// Opens a file for writes that go past the page cache; `None` if the file system has no such thing.
#[cfg(target_os = "linux")]
fn open_direct(options: &OpenOptions, file: &Path) -> io::Result<Option<File>> {
    use std::os::unix::fs::OpenOptionsExt;
    let flag = i32::try_from(rustix::fs::OFlags::DIRECT.bits()).expect("a flag of open fits an int");
    match options.clone().custom_flags(flag).open(file) {
        Ok(file) => Ok(Some(file)),
        Err(e) if e.kind() == io::ErrorKind::InvalidInput => {
            // Some file systems make the file before they look at the flag.
            match fs::remove_file(file) {
                Err(e) if e.kind() != io::ErrorKind::NotFound => Err(e),
                _ => Ok(None),
            }
        }
        Err(e) => Err(e),
    }
}

#[cfg(not(target_os = "linux"))]
fn open_direct(_: &OpenOptions, _: &Path) -> io::Result<Option<File>> {
    Ok(None)
}

struct RealFile {
    file: File,
    direct: bool,
}

impl RealFile {
    /// From now on writes go through the page cache.
    fn stop_direct(&mut self) -> io::Result<()> {
        self.direct = false;
        #[cfg(target_os = "linux")]
        {
            use rustix::fs::{OFlags, fcntl_getfl, fcntl_setfl};
            fcntl_setfl(&self.file, fcntl_getfl(&self.file)? - OFlags::DIRECT)?;
        }
        Ok(())
    }
}

impl NewFile for RealFile {
    fn write(&mut self, mut bytes: &[u8]) -> io::Result<()> {
        if self.direct && !bytes.len().is_multiple_of(DIRECT_ALIGN) {
            // Only the last write of a file is odd.
            self.stop_direct()?;
        }
        while !bytes.is_empty() {
            match self.file.write(bytes) {
                Ok(0) => return Err(io::ErrorKind::WriteZero.into()),
                Ok(written) => bytes = &bytes[written..],
                Err(e) if e.kind() == io::ErrorKind::Interrupted => {}
                // A device with larger blocks, or a write that was cut short at an odd place.
                Err(e) if self.direct && e.kind() == io::ErrorKind::InvalidInput => self.stop_direct()?,
                Err(e) => return Err(e),
            }
        }
        Ok(())
    }

    fn sync(&mut self) -> io::Result<()> {
        self.file.sync_all()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn publish_real(dir: &Path, direct: bool, image: &[u8]) -> Result<(), FileError> {
        publish(&RealFiles { direct }, dir, "f", image, || Ok(()))
    }

    #[test]
    fn what_is_published_is_there_whole_whatever_its_length() {
        for direct in [false, true] {
            for len in [0, 1, 4095, 4096, 4097, 3 * 4096, (4 << 20) + 4096, (4 << 20) + 5000] {
                let dir = tempfile::tempdir().unwrap();
                let image: Vec<u8> = (0..len).map(|i| (i % 251) as u8).collect();
                publish_real(dir.path(), direct, &image).unwrap();
                assert_eq!(fs::read(dir.path().join("f")).unwrap(), image);
                assert_eq!(fs::read_dir(dir.path()).unwrap().count(), 1);
            }
        }
    }

    #[test]
    fn k_1_what_is_there_stays_and_the_same_again_is_fine() {
        let dir = tempfile::tempdir().unwrap();
        publish_real(dir.path(), false, b"first").unwrap();
        publish_real(dir.path(), false, b"first").unwrap();
        for other in [&b"other"[..], b"", b"first and more"] {
            let error = publish_real(dir.path(), false, other).unwrap_err();
            assert!(matches!(error, FileError::Exists { file } if file == dir.path().join("f")));
        }
        assert_eq!(fs::read(dir.path().join("f")).unwrap(), b"first");
        assert_eq!(fs::read_dir(dir.path()).unwrap().count(), 1);
    }

    #[test]
    fn k_4_what_somebody_else_published_is_not_taken_back() {
        let dir = tempfile::tempdir().unwrap();
        publish_real(dir.path(), false, b"first").unwrap();
        // The same again up to the directory's sync: create, write, sync, rename, compare, remove.
        let files = crate::faults::FailingFiles::new(6, 5);
        let error = publish::<FileError>(&files, dir.path(), "f", b"first", || Ok(())).unwrap_err();
        assert!(matches!(error, FileError::Io { action: "sync", .. }), "{error:?}");
        assert_eq!(fs::read(dir.path().join("f")).unwrap(), b"first");
    }

    #[test]
    fn k_2_a_directory_that_is_made_is_synced_into_the_one_above() {
        let dir = tempfile::tempdir().unwrap();
        let name = dir.path().file_name().unwrap().to_string_lossy().into_owned();
        let files = crate::faults::FailingFiles::none();
        for _ in 0..2 {
            create_dirs(&files, &dir.path().join("a/b")).unwrap();
            create_dirs(&files, Path::new("/")).unwrap();
            create_dirs(&files, Path::new("src")).unwrap();
        }
        let expected = ["create_dir a".to_owned(), format!("sync_dir {name}"), "create_dir b".to_owned()];
        assert_eq!(files.log()[..3], expected);
        assert_eq!(files.log()[3..], ["sync_dir a"]);
        assert!(dir.path().join("a/b").is_dir());
    }

    #[test]
    fn giving_up_leaves_nothing() {
        let dir = tempfile::tempdir().unwrap();
        let stop = || Err(FileError::Exists { file: "stop".into() });
        publish(&RealFiles { direct: false }, dir.path(), "f", b"x", stop).unwrap_err();
        assert_eq!(fs::read_dir(dir.path()).unwrap().count(), 0);
    }
}
