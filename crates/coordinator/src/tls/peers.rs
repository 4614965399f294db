//! How this coordinator reaches the others. This is all that the coordinator can dial with, and it dials no member.

use tonic::transport::{Certificate, ClientTlsConfig, Endpoint, Identity};

use super::{TlsError, authority, certificates};
use crate::config::TlsFiles;
use crate::reload::read;

/// Why another coordinator cannot be asked.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum PeersError {
    /// Its address is none.
    #[error("{url:?} is no address of a coordinator")]
    Url {
        /// The address.
        url: String,
        /// What is wrong with it.
        source: tonic::transport::Error,
    },
    /// One of the two speaks TLS and the other does not.
    #[error("{url} {}", if *tls { "does not speak TLS, and this coordinator does" } else { "speaks TLS, and this coordinator does not" })]
    Mixed {
        /// The address.
        url: String,
        /// Whether it is this coordinator that does.
        tls: bool,
    },
    /// There is nothing to check its certificate by.
    #[error(
        "no authority is named by which the certificates of other coordinators are checked: give --tls-ca"
    )]
    NoAuthority,
    /// This coordinator's own certificates make no sense at present.
    #[error(transparent)]
    Tls(#[from] TlsError),
}

/// Makes connections to other coordinators: with TLS if this one serves with it, checked by `--tls-ca` (or else
/// `--tls-client-ca`), with this coordinator's own certificate to show.
#[derive(Debug, Clone)]
pub struct Peers {
    files: Option<TlsFiles>,
}

impl Peers {
    /// What a server with these files reaches others with.
    pub fn new(files: Option<TlsFiles>) -> Peers {
        Peers { files }
    }

    /// How to reach the coordinator at `url`. The files are read anew each time, so that they can be replaced.
    ///
    /// # Errors
    /// [`PeersError`] says what stands against it.
    pub fn endpoint(&self, url: &str) -> Result<Endpoint, PeersError> {
        let bad_url = |source| PeersError::Url { url: url.to_owned(), source };
        let endpoint = Endpoint::from_shared(url.to_owned()).map_err(bad_url)?;
        let speaks_tls = endpoint.uri().scheme_str() == Some("https");
        let Some(files) = self.files.as_ref().filter(|_| speaks_tls) else {
            return match (&self.files, speaks_tls) {
                (None, false) => Ok(endpoint),
                (files, _) => Err(PeersError::Mixed { url: url.to_owned(), tls: files.is_some() }),
            };
        };
        endpoint.tls_config(client_config(files)?).map_err(bad_url)
    }
}

/// What this coordinator checks others by, and shows them.
fn client_config(files: &TlsFiles) -> Result<ClientTlsConfig, PeersError> {
    let ca_file = files.ca.as_ref().or(files.client_ca.as_ref()).ok_or(PeersError::NoAuthority)?;
    let read = |path| read(path).map_err(TlsError::from);
    let (ca, cert, key) = (read(ca_file)?, read(&files.cert)?, read(&files.key)?);
    // What is underneath would pass over what it cannot read.
    authority(ca_file, &ca)?;
    certificates(&files.cert, &cert)?;
    Ok(ClientTlsConfig::new()
        .ca_certificate(Certificate::from_pem(ca))
        .identity(Identity::from_pem(cert, key)))
}

#[cfg(test)]
mod tests {
    use super::*;
    use rcgen::{CertificateParams, KeyPair};

    #[test]
    fn coordinators_reach_each_other_with_tls_or_without_but_not_mixed() {
        let dir = tempfile::tempdir().unwrap();
        let key = KeyPair::generate().unwrap();
        let cert = CertificateParams::new(["a".to_owned()]).unwrap().self_signed(&key).unwrap();
        let path = |name: &str| dir.path().join(name);
        std::fs::write(path("cert"), cert.pem()).unwrap();
        std::fs::write(path("key"), key.serialize_pem()).unwrap();
        let files =
            TlsFiles { cert: path("cert"), key: path("key"), client_ca: None, ca: Some(path("cert")) };

        let plain = Peers::new(None);
        assert!(plain.endpoint("http://a:1").is_ok());
        assert!(matches!(plain.endpoint("https://a:1"), Err(PeersError::Mixed { tls: false, .. })));
        assert!(matches!(plain.endpoint("not a url"), Err(PeersError::Url { .. })));
        let secure = Peers::new(Some(files.clone()));
        assert!(secure.endpoint("https://a:1").is_ok());
        assert!(matches!(secure.endpoint("http://a:1"), Err(PeersError::Mixed { tls: true, .. })));
        let nobody = Peers::new(Some(TlsFiles { ca: None, ..files.clone() }));
        assert!(matches!(nobody.endpoint("https://a:1"), Err(PeersError::NoAuthority)));
        // The files are read anew.
        std::fs::write(path("cert"), "garbage").unwrap();
        let why = secure.endpoint("https://a:1").unwrap_err();
        assert!(matches!(why, PeersError::Tls(TlsError::NoCertificate { .. })), "{why:?}");
    }
}
