//! Disks that fail and machines that crash, for the tests.

use std::collections::BTreeMap;
use std::io;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, MutexGuard};

use crate::common::Rng;
use crate::files::{Files, NewFile, RealFiles};

/// The real file system, except that one operation fails. Operations are counted from zero in the order of the calls.
#[derive(Clone)]
pub(crate) struct FailingFiles {
    fail_at: Option<usize>,
    error: i32,
    log: Arc<Mutex<Vec<String>>>,
    watch: Arc<dyn Fn(&str) + Send + Sync>,
}

impl FailingFiles {
    /// The operation number `fail_at` fails with the system's error number `error`.
    pub(crate) fn new(fail_at: usize, error: i32) -> FailingFiles {
        FailingFiles { fail_at: Some(fail_at), error, log: Arc::default(), watch: Arc::new(|_| ()) }
    }

    /// Calls `watch` before each operation, with its name and its file's.
    pub(crate) fn watched_by(self, watch: impl Fn(&str) + Send + Sync + 'static) -> FailingFiles {
        FailingFiles { watch: Arc::new(watch), ..self }
    }

    /// Nothing fails; for counting the operations.
    pub(crate) fn none() -> FailingFiles {
        FailingFiles { fail_at: None, ..FailingFiles::new(0, 0) }
    }

    /// What was done so far: the operations' names with their files'.
    pub(crate) fn log(&self) -> Vec<String> {
        self.log.lock().unwrap().clone()
    }

    fn count(&self, operation: &str, path: &Path) -> io::Result<()> {
        let name = path.file_name().map(|name| name.to_string_lossy().into_owned()).unwrap_or_default();
        // Temporary names are random from there on.
        let entry = format!("{operation} {}", name.split(".tmp-").next().unwrap());
        (self.watch)(&entry);
        let mut log = self.log.lock().unwrap();
        log.push(entry);
        if Some(log.len() - 1) == self.fail_at {
            Err(io::Error::from_raw_os_error(self.error))
        } else {
            Ok(())
        }
    }
}

impl Files for FailingFiles {
    fn create_dir(&self, dir: &Path) -> io::Result<()> {
        self.count("create_dir", dir)?;
        RealFiles { direct: false }.create_dir(dir)
    }
    fn create(&self, file: &Path) -> io::Result<Box<dyn NewFile>> {
        self.count("create", file)?;
        let (files, path) = (self.clone(), file.to_owned());
        Ok(Box::new(FailingFile {
            files,
            path,
            real: RealFiles { direct: false }.create(file)?,
            is_given_up: false,
        }))
    }
    fn rename_new(&self, from: &Path, to: &Path) -> io::Result<()> {
        self.count("rename", to)?;
        RealFiles { direct: false }.rename_new(from, to)
    }
    fn sync_dir(&self, dir: &Path) -> io::Result<()> {
        self.count("sync_dir", dir)?;
        RealFiles { direct: false }.sync_dir(dir)
    }
    fn remove(&self, file: &Path) -> io::Result<()> {
        self.count("remove", file)?;
        RealFiles { direct: false }.remove(file)
    }
    fn len(&self, file: &Path) -> io::Result<u64> {
        self.count("len", file)?;
        RealFiles { direct: false }.len(file)
    }
    fn holds(&self, file: &Path, bytes: &[u8]) -> io::Result<bool> {
        self.count("holds", file)?;
        RealFiles { direct: false }.holds(file, bytes)
    }
}

struct FailingFile {
    files: FailingFiles,
    path: PathBuf,
    real: Box<dyn NewFile>,
    /// A sync failed: rule K-3 forbids to use the file any more.
    is_given_up: bool,
}

impl NewFile for FailingFile {
    fn write(&mut self, bytes: &[u8]) -> io::Result<()> {
        assert!(!self.is_given_up, "K-3: {:?} is written after its sync failed", self.path);
        match self.files.count("write", &self.path) {
            Ok(()) => self.real.write(bytes),
            Err(e) => {
                // A full disk takes what still fits.
                self.real.write(&bytes[..bytes.len() / 2])?;
                Err(e)
            }
        }
    }
    fn sync(&mut self) -> io::Result<()> {
        assert!(!self.is_given_up, "K-3: {:?} is synced again after its sync failed", self.path);
        let counted = self.files.count("sync", &self.path);
        self.is_given_up = counted.is_err();
        counted?;
        self.real.sync()
    }
}

/// A disk in memory that knows what would survive a crash: of a file what was synced, of a directory the names it had
/// when it was synced.
#[derive(Clone)]
pub(crate) struct ModelDisk(Arc<Mutex<Disk>>);

struct Disk {
    files: Vec<FileContent>,
    dirs: BTreeMap<PathBuf, Dir>,
    operations: usize,
    crash_at: usize,
}

#[derive(Clone, Default)]
struct FileContent {
    now: Vec<u8>,
    synced: Option<Vec<u8>>,
}

#[derive(Clone, Default)]
struct Dir {
    now: BTreeMap<String, Node>,
    synced: BTreeMap<String, Node>,
}

#[derive(Clone, Copy, PartialEq)]
enum Node {
    File(usize),
    Dir,
}

/// What a crash leaves of what was not synced.
#[derive(Debug, Clone, Copy)]
pub(crate) enum Luck {
    /// Nothing.
    None,
    /// All names, but of no file the content.
    NamesOnly,
    /// All of it.
    All,
    /// Any of it, by this seed; contents may be cut short.
    Mixed(u64),
}

impl ModelDisk {
    /// An empty disk with the directory `root` on it.
    pub(crate) fn new(root: &Path) -> ModelDisk {
        let dirs = BTreeMap::from([(root.to_owned(), Dir::default())]);
        ModelDisk(Arc::new(Mutex::new(Disk { files: vec![], dirs, operations: 0, crash_at: usize::MAX })))
    }

    /// How many operations there were.
    pub(crate) fn operations(&self) -> usize {
        self.disk().operations
    }

    /// The machine crashes before the operation with this number: it and all after it do nothing and fail.
    pub(crate) fn crash_at(&self, operation: usize) {
        self.disk().crash_at = operation;
    }

    /// Lays what is on the disk after the crash into the real directory `into`.
    pub(crate) fn restart(&self, root: &Path, into: &Path, luck: Luck) {
        let disk = self.disk();
        let mut rng = Rng::new(if let Luck::Mixed(seed) = luck { seed } else { 0 });
        disk.restart(root, into, luck, &mut rng);
    }

    fn disk(&self) -> MutexGuard<'_, Disk> {
        self.0.lock().unwrap()
    }

    /// The disk, if the machine is still up; counts the operation.
    fn up(&self) -> io::Result<MutexGuard<'_, Disk>> {
        let mut disk = self.disk();
        if disk.operations >= disk.crash_at {
            return Err(io::Error::other("the machine has crashed"));
        }
        disk.operations += 1;
        Ok(disk)
    }
}

impl Disk {
    fn dir(&mut self, path: &Path) -> io::Result<&mut Dir> {
        self.dirs.get_mut(path).ok_or_else(|| io::ErrorKind::NotFound.into())
    }

    fn node(&mut self, path: &Path) -> io::Result<Node> {
        let (dir, name) = split(path);
        self.dir(dir)?.now.get(&name).copied().ok_or_else(|| io::ErrorKind::NotFound.into())
    }

    fn restart(&self, dir: &Path, into: &Path, luck: Luck, rng: &mut Rng) {
        let Dir { now, synced } = &self.dirs[dir];
        let names: std::collections::BTreeSet<&String> = now.keys().chain(synced.keys()).collect();
        for name in names {
            let is_new = match luck {
                Luck::None => false,
                Luck::NamesOnly | Luck::All => true,
                Luck::Mixed(_) => rng.below(2) == 0,
            };
            match if is_new { now } else { synced }.get(name) {
                Some(Node::Dir) => {
                    std::fs::create_dir(into.join(name)).unwrap();
                    self.restart(&dir.join(name), &into.join(name), luck, rng);
                }
                Some(Node::File(index)) => {
                    let FileContent { now, synced } = &self.files[*index];
                    let synced = synced.as_deref().unwrap_or(&[]);
                    let content = match luck {
                        Luck::None | Luck::NamesOnly => synced,
                        Luck::All => now,
                        Luck::Mixed(_) if synced == &now[..] => synced,
                        Luck::Mixed(_) => &now[..rng.below(now.len() as u64 + 1) as usize],
                    };
                    std::fs::write(into.join(name), content).unwrap();
                }
                None => {}
            }
        }
    }
}

fn split(path: &Path) -> (&Path, String) {
    let name = path.file_name().expect("a path ends in a name");
    (path.parent().expect("a path starts in a directory"), name.to_string_lossy().into_owned())
}

impl Files for ModelDisk {
    fn create_dir(&self, path: &Path) -> io::Result<()> {
        let mut disk = self.up()?;
        let (dir, name) = split(path);
        if disk.dir(dir)?.now.insert(name, Node::Dir).is_none() {
            disk.dirs.insert(path.to_owned(), Dir::default());
        }
        Ok(())
    }
    fn create(&self, path: &Path) -> io::Result<Box<dyn NewFile>> {
        let mut disk = self.up()?;
        let index = disk.files.len();
        let (dir, name) = split(path);
        if disk.dir(dir)?.now.insert(name, Node::File(index)).is_some() {
            return Err(io::ErrorKind::AlreadyExists.into());
        }
        disk.files.push(FileContent::default());
        Ok(Box::new(ModelFile { disk: self.clone(), index }))
    }
    fn rename_new(&self, from: &Path, to: &Path) -> io::Result<()> {
        let mut disk = self.up()?;
        let node = disk.node(from)?;
        if disk.node(to).is_ok() {
            return Err(io::ErrorKind::AlreadyExists.into());
        }
        let ((dir, old), (_, new)) = (split(from), split(to));
        let dir = disk.dir(dir)?;
        dir.now.remove(&old);
        dir.now.insert(new, node);
        Ok(())
    }
    fn sync_dir(&self, path: &Path) -> io::Result<()> {
        let mut disk = self.up()?;
        let dir = disk.dir(path)?;
        dir.synced = dir.now.clone();
        Ok(())
    }
    fn remove(&self, path: &Path) -> io::Result<()> {
        let mut disk = self.up()?;
        disk.node(path)?;
        let (dir, name) = split(path);
        disk.dir(dir)?.now.remove(&name);
        Ok(())
    }
    fn len(&self, path: &Path) -> io::Result<u64> {
        let mut disk = self.up()?;
        match disk.node(path)? {
            Node::File(index) => Ok(disk.files[index].now.len() as u64),
            Node::Dir => Ok(0),
        }
    }
    fn holds(&self, path: &Path, bytes: &[u8]) -> io::Result<bool> {
        let mut disk = self.up()?;
        Ok(match disk.node(path)? {
            Node::File(index) => disk.files[index].now == bytes,
            Node::Dir => false,
        })
    }
}

struct ModelFile {
    disk: ModelDisk,
    index: usize,
}

impl NewFile for ModelFile {
    fn write(&mut self, bytes: &[u8]) -> io::Result<()> {
        self.disk.up()?.files[self.index].now.extend_from_slice(bytes);
        Ok(())
    }
    fn sync(&mut self) -> io::Result<()> {
        let mut disk = self.disk.up()?;
        let file = &mut disk.files[self.index];
        file.synced = Some(file.now.clone());
        Ok(())
    }
}
