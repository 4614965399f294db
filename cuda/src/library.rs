//! Finding a shared library at run time, and what is said when it, or a function in it, is not there.

use std::ffi::{OsStr, OsString, c_void};
use std::path::{Path, PathBuf};

use libloading::Library;

/// What this machine lacks, with what to do about it.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum Missing {
    /// No file of that name could be loaded.
    #[error("{library} could not be loaded (tried {}); {hint}", .tried.join("; "))]
    Library {
        /// Which library.
        library: &'static str,
        /// Where it was looked for, and what the loader said.
        tried: Vec<String>,
        /// What to do.
        hint: &'static str,
    },
    /// The file has not got a function that nothing works without.
    #[error("{path} has no function {symbol}: it is not {library}, or too old; {hint}")]
    Symbol {
        /// Which library it was taken for.
        library: &'static str,
        /// The file.
        path: String,
        /// The function.
        symbol: &'static str,
        /// What to do.
        hint: &'static str,
    },
    /// The file is there, but its release is not to be used.
    #[error("{path} is {library} {version}, which is not used: {why}")]
    Release {
        /// Which library.
        library: &'static str,
        /// The file.
        path: String,
        /// Its release, as it says itself.
        version: String,
        /// Why not.
        why: String,
    },
    /// The library is there, but what it needs is not.
    #[error("{library} is there, but cannot be used: {why}")]
    Unusable {
        /// Which library.
        library: &'static str,
        /// What it said.
        why: String,
    },
}

/// A library that is looked for.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Wanted {
    /// As people call it.
    pub(crate) name: &'static str,
    /// As the loader knows it: the newest release first.
    pub(crate) files: &'static [&'static str],
    /// The variable that names a file, or a directory that holds it.
    pub(crate) variable: Option<&'static str>,
    /// Where it is in a Python environment's packages.
    pub(crate) wheel: &'static [&'static str],
    pub(crate) hint: &'static str,
}

/// A library that was loaded. It is never unloaded: NCCL leaves threads behind that run its code.
#[derive(Debug)]
pub(crate) struct Loaded {
    library: std::mem::ManuallyDrop<Library>,
    pub(crate) path: String,
}

impl Wanted {
    /// What is missing if a function is that must be there.
    pub(crate) fn lacks(&self, loaded: &Loaded, symbol: &'static str) -> Missing {
        Missing::Symbol { library: self.name, path: loaded.path.clone(), symbol, hint: self.hint }
    }

    /// Loads it from the first place that has it. A place that was named is the only one.
    pub(crate) fn load(&self, named: Option<&Path>) -> Result<Loaded, Missing> {
        let mut tried = Vec::new();
        for place in self.places(named, &|variable| std::env::var_os(variable)) {
            match load(&place) {
                Ok(library) => {
                    let path = Path::new(&place).display().to_string();
                    return Ok(Loaded { library: std::mem::ManuallyDrop::new(library), path });
                }
                Err(error) => {
                    // What the loader said, which names the file if anything of it was the matter.
                    let said = std::error::Error::source(&error).map(ToString::to_string);
                    tried.push(said.unwrap_or_else(|| format!("{}: {error}", place.display())));
                }
            }
        }
        Err(Missing::Library { library: self.name, tried, hint: self.hint })
    }

    /// Where to look, in order.
    fn places(&self, named: Option<&Path>, variable: &dyn Fn(&str) -> Option<OsString>) -> Vec<OsString> {
        let set = |name: &str| variable(name).filter(|value| !value.is_empty());
        let asked = named.map(Path::to_owned).or_else(|| self.variable.and_then(set).map(PathBuf::from));
        if let Some(asked) = asked {
            let in_it = |file| asked.join(file);
            let files = if asked.is_dir() { self.files.iter().map(in_it).collect() } else { vec![asked] };
            return files.into_iter().map(PathBuf::into_os_string).collect();
        }
        let mut places: Vec<OsString> = self.files.iter().map(OsString::from).collect();
        let environments = ["VIRTUAL_ENV", "CONDA_PREFIX"].into_iter().filter_map(set).map(PathBuf::from);
        for lib in environments.map(|root| root.join("lib")) {
            // The one directory `python3.x` of the environment; sorted, should there be more.
            let entries = lib.read_dir().into_iter().flatten().flatten().map(|entry| entry.path());
            let is_python = |path: &PathBuf| {
                path.file_name().is_some_and(|name| name.as_encoded_bytes().starts_with(b"python"))
            };
            let mut pythons: Vec<PathBuf> = entries.filter(is_python).collect();
            pythons.sort();
            let dirs = pythons.iter().flat_map(|python| {
                self.wheel.iter().map(move |place| python.join("site-packages").join(place))
            });
            let files = dirs.flat_map(|dir| self.files.iter().map(move |file| dir.join(file)));
            places.extend(files.filter(|file| file.exists()).map(PathBuf::into_os_string));
        }
        places
    }
}

fn load(place: &OsStr) -> Result<Library, libloading::Error> {
    // SAFETY: loading runs the library's initialisers. Those of NVIDIA's libraries, and of the stand-ins, expect nothing
    // of the process; any other file at the place that was named is in the hands of who named it.
    unsafe { Library::new(place) }
}

impl Loaded {
    /// The address of a function, if the library has it.
    pub(crate) fn address(&self, symbol: &str) -> Option<*mut c_void> {
        // SAFETY: nothing is called or read here; the type is that of an address, and the library is never unloaded.
        let found = unsafe { self.library.get::<*mut c_void>(symbol.as_bytes()).ok()?.try_as_raw_ptr() };
        found.filter(|address| !address.is_null())
    }
}

/// A table of the functions of a library: `name: "symbol" (types) -> type;`. Those below `optional` may be absent.
macro_rules! function_table {
    (
        $(#[$doc:meta])*
        $table:ident {
            $($name:ident: $symbol:literal ($($arg:ty),*) -> $ret:ty;)*
            => optional {
                $($oname:ident: $osymbol:literal ($($oarg:ty),*) -> $oret:ty;)*
            }
        }
    ) => {
        $(#[$doc])*
        #[derive(Clone, Copy)]
        pub(crate) struct $table {
            $(pub(crate) $name: unsafe extern "C" fn($($arg),*) -> $ret,)*
            $(pub(crate) $oname: Option<unsafe extern "C" fn($($oarg),*) -> $oret>,)*
        }

        impl $table {
            /// All of its functions: those that must be there, then those that need not.
            #[cfg(test)]
            pub(crate) const SYMBOLS: (&[&str], &[&str]) = (&[$($symbol),*], &[$($osymbol),*]);

            /// The table of what `address` finds, or the first function that must be there and is not.
            pub(crate) fn resolve(
                address: impl Fn(&str) -> Option<*mut std::ffi::c_void>,
            ) -> Result<$table, &'static str> {
                Ok($table {
                    $($name: {
                        let found = address($symbol).ok_or($symbol)?;
                        // SAFETY: the address is not null, and the function of this name has this type in every
                        // release that has it: NVIDIA adds functions under new names, and changes none.
                        unsafe {
                            std::mem::transmute::<*mut std::ffi::c_void, unsafe extern "C" fn($($arg),*) -> $ret>(found)
                        }
                    },)*
                    $($oname: address($osymbol).map(|found| {
                        // SAFETY: as above.
                        unsafe {
                            std::mem::transmute::<*mut std::ffi::c_void, unsafe extern "C" fn($($oarg),*) -> $oret>(found)
                        }
                    }),)*
                })
            }
        }
    };
}

pub(crate) use function_table;

#[cfg(test)]
mod tests {
    use super::*;

    const WANTED: Wanted = Wanted {
        name: "NCCL",
        files: &["libnccl.so.2"],
        variable: Some("NCCL_LIB_PATH"),
        wheel: &["nvidia/nccl/lib"],
        hint: "install it",
    };

    #[test]
    fn a_library_that_is_not_there_says_where_it_was_looked_for_and_what_to_do() {
        let missing = WANTED.load(Some(Path::new("/nowhere/libnccl.so.2"))).unwrap_err().to_string();
        assert!(missing.contains("/nowhere/libnccl.so.2") && missing.ends_with("install it"), "{missing}");
    }

    #[test]
    fn a_file_that_is_no_library_is_told_from_none() {
        let file = std::env::current_dir().unwrap().join("Cargo.toml");
        let missing = WANTED.load(Some(&file)).unwrap_err().to_string();
        assert!(missing.contains("Cargo.toml"), "{missing}");
    }

    #[test]
    fn what_the_variable_names_is_the_only_place() {
        let variable = |name: &str| (name == "NCCL_LIB_PATH").then(|| OsString::from("/opt/libnccl.so"));
        assert_eq!(WANTED.places(None, &variable), ["/opt/libnccl.so"]);
        let variable = |name: &str| (name == "NCCL_LIB_PATH").then(|| OsString::from("/"));
        assert_eq!(WANTED.places(None, &variable), ["/libnccl.so.2"]);
        assert_eq!(WANTED.places(None, &|_| Some(OsString::new())), ["libnccl.so.2"]);
    }

    #[test]
    fn the_wheel_of_an_environment_is_found() {
        let root = std::env::temp_dir().join(format!("reknit-cuda-venv-{}", std::process::id()));
        let lib = root.join("lib/python3.11/site-packages/nvidia/nccl/lib");
        std::fs::create_dir_all(&lib).unwrap();
        std::fs::write(lib.join("libnccl.so.2"), "").unwrap();
        let at = root.clone();
        let places = WANTED.places(None, &move |name| (name == "VIRTUAL_ENV").then(|| at.clone().into()));
        assert_eq!(places, [OsString::from("libnccl.so.2"), lib.join("libnccl.so.2").into()]);
        std::fs::remove_dir_all(root).unwrap();
    }
}
