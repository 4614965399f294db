//! Files that may be replaced while the server runs: what is made of them is made anew when they change.

use std::fmt;
use std::path::{Path, PathBuf};
use std::sync::{Arc, PoisonError, RwLock, Weak};
use std::time::Duration;

/// How often files are looked at. What they hold decides, not their times: those of a mounted secret say nothing.
const LOOK_EVERY: Duration = Duration::from_secs(1);
/// A file larger than this is not what it should be.
const FILE_BYTES_MAX: u64 = 1 << 20;

/// A file that cannot be read.
#[derive(Debug, thiserror::Error)]
#[error("{} cannot be read", path.display())]
pub struct Unreadable {
    /// The file.
    pub path: PathBuf,
    /// Why not.
    pub source: std::io::Error,
}

/// What the files came to when they last made sense. Clones share it.
pub(crate) struct Current<T>(Arc<RwLock<Arc<T>>>);

impl<T> Clone for Current<T> {
    fn clone(&self) -> Current<T> {
        Current(Arc::clone(&self.0))
    }
}

impl<T> Current<T> {
    pub(crate) fn get(&self) -> Arc<T> {
        Arc::clone(&self.0.read().unwrap_or_else(PoisonError::into_inner))
    }
}

/// Makes a `T` of what the files hold, now and whenever that changes. What makes no sense later on is logged, and the `T`
/// that there is stays. Ends when the last [`Current`] is dropped.
///
/// # Errors
/// If a file cannot be read, or makes no sense, now.
pub(crate) fn watched<T, E>(
    what: &'static str,
    files: Vec<PathBuf>,
    make: impl Fn(&[Vec<u8>]) -> Result<T, E> + Send + 'static,
) -> Result<Current<T>, E>
where
    T: Send + Sync + 'static,
    E: From<Unreadable> + std::error::Error + Send + 'static,
{
    let contents = read_all(&files)?;
    let current = Current(Arc::new(RwLock::new(Arc::new(make(&contents)?))));
    let shared = Arc::downgrade(&current.0);
    tokio::spawn(look_again(what, files, Watch { adopted: contents, failing: None }, make, shared));
    Ok(current)
}

async fn look_again<T, E>(
    what: &'static str,
    files: Vec<PathBuf>,
    mut watch: Watch,
    make: impl Fn(&[Vec<u8>]) -> Result<T, E>,
    shared: Weak<RwLock<Arc<T>>>,
) where
    E: From<Unreadable> + std::error::Error,
{
    let files = Arc::new(files);
    loop {
        tokio::time::sleep(LOOK_EVERY).await;
        if shared.strong_count() == 0 {
            return;
        }
        let to_read = Arc::clone(&files);
        // A file system that hangs holds up a thread of its own.
        let read = tokio::task::spawn_blocking(move || read_all(&to_read)).await;
        let Ok(read) = read else { return };
        match watch.look(read.map_err(|why| (why.to_string(), E::from(why))), &make) {
            Look::Same => {}
            Look::New(made) => {
                let Some(shared) = shared.upgrade() else { return };
                *shared.write().unwrap_or_else(PoisonError::into_inner) = Arc::new(made);
                tracing::info!(what, "files were replaced: what they hold counts from now on");
            }
            Look::Senseless(why) => {
                let error = crate::job::source_text(&why);
                tracing::error!(what, %error, "files were replaced by something that makes no sense: what they held before counts");
            }
        }
    }
}

/// What of some files is known.
struct Watch {
    adopted: Vec<Vec<u8>>,
    /// What made no sense when it was last looked at, and whether that was said.
    failing: Option<(Failing, bool)>,
}

#[derive(PartialEq, Eq)]
enum Failing {
    Contents(Vec<Vec<u8>>),
    Unreadable(String),
}

/// What came of a look.
#[derive(Debug, PartialEq, Eq)]
enum Look<T, E> {
    Same,
    New(T),
    Senseless(E),
}

impl Watch {
    /// Files that belong together are not replaced at the same instant: only what makes no sense twice in a row is said to.
    fn look<T, E>(
        &mut self,
        read: Result<Vec<Vec<u8>>, (String, E)>,
        make: impl Fn(&[Vec<u8>]) -> Result<T, E>,
    ) -> Look<T, E> {
        let (failing, why) = match read {
            Ok(contents) if contents == self.adopted => {
                self.failing = None;
                return Look::Same;
            }
            Ok(contents) => match make(&contents) {
                Ok(made) => {
                    (self.adopted, self.failing) = (contents, None);
                    return Look::New(made);
                }
                Err(why) => (Failing::Contents(contents), why),
            },
            Err((text, why)) => (Failing::Unreadable(text), why),
        };
        match self.failing.take() {
            Some((before, said)) if before == failing => {
                self.failing = Some((before, true));
                if said { Look::Same } else { Look::Senseless(why) }
            }
            _ => {
                self.failing = Some((failing, false));
                Look::Same
            }
        }
    }
}

fn read_all(files: &[PathBuf]) -> Result<Vec<Vec<u8>>, Unreadable> {
    files.iter().map(|path| read(path)).collect()
}

/// What a file holds, if it is one and not too large.
pub(crate) fn read(path: &Path) -> Result<Vec<u8>, Unreadable> {
    let unreadable = |source| Unreadable { path: path.to_owned(), source };
    let about = std::fs::metadata(path).map_err(unreadable)?;
    if !about.is_file() || about.len() > FILE_BYTES_MAX {
        let text = format!("it is no file of at most {FILE_BYTES_MAX} bytes");
        return Err(unreadable(std::io::Error::other(text)));
    }
    std::fs::read(path).map_err(unreadable)
}

impl<T: fmt::Debug> fmt::Debug for Current<T> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_tuple("Current").field(&self.get()).finish()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn number(contents: &[Vec<u8>]) -> Result<u32, String> {
        let text = String::from_utf8_lossy(&contents[0]).into_owned();
        text.parse().map_err(|_| text)
    }

    fn holds(text: &str) -> Result<Vec<Vec<u8>>, (String, String)> {
        Ok(vec![text.as_bytes().to_vec()])
    }

    #[test]
    fn d10_what_makes_no_sense_is_said_once_and_only_if_it_stays_that_way() {
        let mut watch = Watch { adopted: vec![b"1".to_vec()], failing: None };
        let mut look = |read| watch.look(read, number);
        assert_eq!(look(holds("1")), Look::Same);
        assert_eq!(look(holds("2")), Look::New(2));
        // Half way through being replaced.
        assert_eq!(look(holds("x")), Look::Same);
        assert_eq!(look(holds("3")), Look::New(3));
        assert_eq!(look(holds("x")), Look::Same);
        assert_eq!(look(holds("x")), Look::Senseless("x".to_owned()));
        assert_eq!(look(holds("x")), Look::Same);
        let gone = || Err(("gone".to_owned(), "gone".to_owned()));
        assert_eq!(look(gone()), Look::Same);
        assert_eq!(look(gone()), Look::Senseless("gone".to_owned()));
        assert_eq!(look(holds("3")), Look::Same, "what there was is there again");
        assert_eq!(look(holds("4")), Look::New(4));
    }

    #[test]
    fn a_directory_and_a_huge_file_are_no_settings() {
        let dir = tempfile::tempdir().unwrap();
        assert!(read(dir.path()).is_err());
        let huge = dir.path().join("huge");
        std::fs::File::create(&huge).unwrap().set_len(FILE_BYTES_MAX + 1).unwrap();
        assert!(read(&huge).unwrap_err().source.to_string().contains("1048576"));
    }
}
