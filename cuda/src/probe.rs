//! What this machine has and lacks, in words.

use std::fmt;

use crate::driver::Driver;
use crate::library::Missing;
use crate::nccl::Nccl;
use crate::version::Feature;

/// What was found. Its text is for people.
#[derive(Debug)]
pub struct Probe {
    /// The driver, or why there is none.
    pub driver: Result<Driver, Missing>,
    /// NCCL, or why there is none.
    pub nccl: Result<Nccl, Missing>,
}

/// Looks for the driver, its devices and NCCL. It never panics and changes nothing.
pub fn probe() -> Probe {
    Probe { driver: Driver::load(), nccl: Nccl::load() }
}

impl Probe {
    /// Whether there is all that a [`Communicator`](crate::Communicator) needs.
    pub fn is_complete(&self) -> bool {
        let devices = self.driver.as_ref().map(|driver| driver.devices().unwrap_or(0)).unwrap_or(0);
        devices > 0 && self.nccl.is_ok()
    }
}

impl fmt::Display for Probe {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match &self.driver {
            Err(missing) => writeln!(f, "driver: missing: {missing}")?,
            Ok(driver) => {
                let (major, minor) = driver.version();
                writeln!(f, "driver: CUDA {major}.{minor}, {}", driver.path())?;
                match driver.devices() {
                    Ok(0) => writeln!(f, "devices: none")?,
                    Ok(count) => writeln!(f, "devices: {count}")?,
                    Err(error) => writeln!(f, "devices: cannot be counted: {error}")?,
                }
            }
        }
        match &self.nccl {
            Err(missing) => writeln!(f, "NCCL: missing: {missing}"),
            Ok(nccl) => {
                writeln!(f, "NCCL: {}, {}", nccl.version(), nccl.path())?;
                for feature in Feature::ALL.into_iter().filter(|feature| !nccl.version().has(*feature)) {
                    writeln!(f, "NCCL: without {feature}")?;
                }
                Ok(())
            }
        }
    }
}
