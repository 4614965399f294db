//! Certificates: what connections are served with, and what other coordinators are asked with.
//!
//! TLS 1.3 alone, with ring alone. The files are validated when the server starts, and read again when they change; what
//! makes no sense then is logged, and the certificates before it stay. Nothing is resumed: a client that comes back shows
//! its certificate again, so that one that has been withdrawn or has expired is not let in by an old ticket.

mod peers;

use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use rustls::client::WebPkiServerVerifier;
use rustls::client::danger::ServerCertVerifier as _;
use rustls::crypto::CryptoProvider;
use rustls::pki_types::pem::PemObject as _;
use rustls::pki_types::{CertificateDer, PrivateKeyDer, ServerName, UnixTime};
use rustls::server::{NoServerSessionStorage, WebPkiClientVerifier};
use rustls::{CertificateError, RootCertStore, ServerConfig};

pub use peers::{Peers, PeersError};

use crate::config::TlsFiles;
use crate::reload::{Current, Unreadable, watched};

/// What is agreed on in the handshake (ALPN).
const HTTP2: &[u8] = b"h2";
/// How long before its end a certificate is worth a warning.
const ENDS_SOON: Duration = Duration::from_secs(7 * 24 * 3600);

/// Why certificates cannot be used.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum TlsError {
    /// A file cannot be read.
    #[error(transparent)]
    Unreadable(#[from] Unreadable),
    /// A file holds no certificate.
    #[error("{} holds no certificate in PEM", path.display())]
    NoCertificate {
        /// The file.
        path: PathBuf,
    },
    /// A file holds no private key.
    #[error("{} holds no private key in PEM, or one that is protected by a password", path.display())]
    NoKey {
        /// The file.
        path: PathBuf,
    },
    /// The key is another certificate's.
    #[error("the key in {} does not belong to the certificate in {}", key.display(), cert.display())]
    KeyMismatch {
        /// The certificate's file.
        cert: PathBuf,
        /// The key's file.
        key: PathBuf,
    },
    /// The certificate's time is over.
    #[error("the certificate in {} has expired", path.display())]
    Expired {
        /// The file.
        path: PathBuf,
    },
    /// The certificate's time has not come.
    #[error("the certificate in {} is not valid yet; is this machine's clock right?", path.display())]
    NotYetValid {
        /// The file.
        path: PathBuf,
    },
    /// It is no certificate that a client would accept from a server.
    #[error("the certificate in {} cannot be a server's", path.display())]
    Unusable {
        /// The file.
        path: PathBuf,
        /// Why not.
        source: rustls::Error,
    },
    /// It is no certificate of an authority.
    #[error("{} cannot be used as an authority", path.display())]
    Authority {
        /// The file.
        path: PathBuf,
        /// Why not.
        source: Box<dyn std::error::Error + Send + Sync>,
    },
}

impl TlsError {
    /// What to do about it.
    pub fn hint(&self) -> &'static str {
        match self {
            TlsError::Unreadable(_) => {
                "name files that this user may read with --tls-cert, --tls-key and --tls-client-ca; `reknit certs` makes some"
            }
            TlsError::KeyMismatch { .. } => "give the --tls-key that was made together with the --tls-cert",
            TlsError::Expired { .. } => {
                "have it renewed; `reknit certs DIR --renew` does so for those that it made"
            }
            TlsError::NotYetValid { .. } => "set the clock, or wait",
            TlsError::NoCertificate { .. } | TlsError::NoKey { .. } => {
                "PEM files have lines like -----BEGIN CERTIFICATE----- and -----BEGIN PRIVATE KEY-----"
            }
            TlsError::Unusable { .. } => {
                "it must be a server's, not an authority's or a client's; `reknit certs` makes one to compare with"
            }
            TlsError::Authority { .. } => {
                "name the authority's own certificate, like the ca.pem of `reknit certs`"
            }
        }
    }
}

/// What connections are served with at present. Ends being kept up to date when the last clone is dropped.
pub(crate) fn serving(files: &TlsFiles) -> Result<Current<ServerConfig>, TlsError> {
    let mut paths = vec![files.cert.clone(), files.key.clone()];
    paths.extend(files.client_ca.clone());
    let files = files.clone();
    watched("TLS", paths, move |contents| {
        let now = UnixTime::now();
        let config = server_config(&files, contents, now)?;
        if expires_within(&contents[0], now, ENDS_SOON) {
            let cert = files.cert.display();
            tracing::warn!(%cert, "this coordinator's certificate expires within a week");
        }
        Ok(config)
    })
}

/// Whether a server could serve with these contents (a certificate, its key, an authority), and a client that trusts the
/// authority would find the server to be `localhost`. For whoever makes such files.
///
/// # Errors
/// [`TlsError`] says what is wrong with which of them.
pub fn check(files: &TlsFiles, contents: &[Vec<u8>; 3]) -> Result<(), TlsError> {
    let now = UnixTime::now();
    server_config(files, contents, now)?;
    let path = files.client_ca.clone().unwrap_or_default();
    let chain = certificates(&files.cert, &contents[0])?;
    verify(&chain[0], authority(&path, &contents[2])?, now)
        .map_err(|why| TlsError::Authority { path, source: Box::new(why) })
}

fn provider() -> Arc<CryptoProvider> {
    Arc::new(rustls::crypto::ring::default_provider())
}

/// What the files hold: the certificate's, the key's and, if there is one, the authority's for clients.
fn server_config(files: &TlsFiles, contents: &[Vec<u8>], now: UnixTime) -> Result<ServerConfig, TlsError> {
    let chain = certificates(&files.cert, &contents[0])?;
    let key = PrivateKeyDer::from_pem_slice(&contents[1])
        .map_err(|_| TlsError::NoKey { path: files.key.clone() })?;
    let unusable = |source| TlsError::Unusable { path: files.cert.clone(), source };
    check_server(&chain[0], now).map_err(|why| match why {
        rustls::Error::InvalidCertificate(
            CertificateError::Expired | CertificateError::ExpiredContext { .. },
        ) => TlsError::Expired { path: files.cert.clone() },
        rustls::Error::InvalidCertificate(
            CertificateError::NotValidYet | CertificateError::NotValidYetContext { .. },
        ) => TlsError::NotYetValid { path: files.cert.clone() },
        why => unusable(why),
    })?;
    let builder = ServerConfig::builder_with_provider(provider())
        .with_protocol_versions(&[&rustls::version::TLS13])
        .map_err(unusable)?;
    let builder = match (&files.client_ca, contents.get(2)) {
        (Some(path), Some(contents)) => {
            let roots = Arc::new(authority(path, contents)?);
            let verifier = WebPkiClientVerifier::builder_with_provider(roots, provider())
                .build()
                .map_err(|why| TlsError::Authority { path: path.clone(), source: Box::new(why) })?;
            builder.with_client_cert_verifier(verifier)
        }
        _ => builder.with_no_client_auth(),
    };
    let mut config = builder.with_single_cert(chain, key).map_err(|why| match why {
        rustls::Error::InconsistentKeys(_) => {
            TlsError::KeyMismatch { cert: files.cert.clone(), key: files.key.clone() }
        }
        why => unusable(why),
    })?;
    config.alpn_protocols = vec![HTTP2.to_vec()];
    config.session_storage = Arc::new(NoServerSessionStorage {});
    config.send_tls13_tickets = 0;
    Ok(config)
}

/// The certificates that a file holds: at least one.
fn certificates(path: &Path, contents: &[u8]) -> Result<Vec<CertificateDer<'static>>, TlsError> {
    let found: Result<Vec<_>, _> = CertificateDer::pem_slice_iter(contents).collect();
    match found {
        Ok(found) if !found.is_empty() => Ok(found),
        _ => Err(TlsError::NoCertificate { path: path.to_owned() }),
    }
}

fn authority(path: &Path, contents: &[u8]) -> Result<RootCertStore, TlsError> {
    let mut roots = RootCertStore::empty();
    for certificate in certificates(path, contents)? {
        roots
            .add(certificate)
            .map_err(|why| TlsError::Authority { path: path.to_owned(), source: Box::new(why) })?;
    }
    Ok(roots)
}

/// Whether a client could accept this certificate from a server, leaving aside who signed it and for which name: it is
/// verified as a client does, with itself as the only authority.
fn check_server(leaf: &CertificateDer<'static>, now: UnixTime) -> Result<(), rustls::Error> {
    let mut roots = RootCertStore::empty();
    roots.add(leaf.clone())?;
    match verify(leaf, roots, now) {
        Ok(()) => Ok(()),
        // Its own properties are looked at before its issuer and its names are.
        Err(rustls::Error::InvalidCertificate(
            CertificateError::UnknownIssuer
            | CertificateError::BadSignature
            | CertificateError::NotValidForName
            | CertificateError::NotValidForNameContext { .. },
        )) => Ok(()),
        Err(why) => Err(why),
    }
}

/// What a client does that trusts `roots` and has asked for `localhost`.
fn verify(leaf: &CertificateDer<'static>, roots: RootCertStore, now: UnixTime) -> Result<(), rustls::Error> {
    let general = |why: &dyn std::error::Error| rustls::Error::General(why.to_string());
    let verifier = WebPkiServerVerifier::builder_with_provider(Arc::new(roots), provider())
        .build()
        .map_err(|why| general(&why))?;
    let name = ServerName::try_from("localhost").map_err(|why| general(&why))?;
    verifier.verify_server_cert(leaf, &[], &name, &[], now).map(|_| ())
}

fn expires_within(cert: &[u8], now: UnixTime, time: Duration) -> bool {
    let later = UnixTime::since_unix_epoch(Duration::from_secs(now.as_secs()) + time);
    CertificateDer::from_pem_slice(cert).is_ok_and(|leaf| check_server(&leaf, later).is_err())
}

#[cfg(test)]
mod tests {
    use super::*;
    use rcgen::{BasicConstraints, CertificateParams, ExtendedKeyUsagePurpose, IsCa, KeyPair, date_time_ymd};

    const NOW: UnixTime = UnixTime::since_unix_epoch(Duration::from_secs(1_800_000_000)); // 2027-01-15

    fn files(client_ca: Option<&str>) -> TlsFiles {
        let path = PathBuf::from;
        TlsFiles { cert: path("cert"), key: path("key"), client_ca: client_ca.map(path), ca: None }
    }

    /// A certificate and its key, valid in the year 2027, and changed by `change`.
    fn made(change: impl FnOnce(&mut CertificateParams)) -> [Vec<u8>; 2] {
        let key = KeyPair::generate().unwrap();
        let mut params = CertificateParams::new(["somewhere".to_owned()]).unwrap();
        (params.not_before, params.not_after) = (date_time_ymd(2027, 1, 1), date_time_ymd(2028, 1, 1));
        change(&mut params);
        let cert = params.self_signed(&key).unwrap();
        [cert.pem().into_bytes(), key.serialize_pem().into_bytes()]
    }

    fn config(contents: &[Vec<u8>]) -> Result<ServerConfig, String> {
        let files = files((contents.len() > 2).then_some("ca"));
        server_config(&files, contents, NOW).map_err(|why| why.to_string())
    }

    #[test]
    fn a_good_certificate_is_served_over_tls_13_and_http2_without_resumption() {
        let config = config(&made(|_| {})).unwrap();
        assert_eq!(config.alpn_protocols, [b"h2"]);
        assert_eq!(config.send_tls13_tickets, 0);
        assert!(!config.session_storage.can_cache());
    }

    #[test]
    fn a_certificate_that_clients_would_refuse_is_refused_at_the_start_with_the_reason() {
        let refused = |contents: &[Vec<u8>]| config(contents).err();
        let is = |text: &str| Some(text.to_owned());
        let good = made(|_| {});
        let past = made(|params| params.not_after = date_time_ymd(2027, 1, 2));
        assert_eq!(refused(&past), is("the certificate in cert has expired"));
        let future = made(|params| params.not_before = date_time_ymd(2027, 6, 1));
        assert_eq!(
            refused(&future),
            is("the certificate in cert is not valid yet; is this machine's clock right?")
        );
        let other = made(|_| {});
        let mixed = [good[0].clone(), other[1].clone()];
        assert_eq!(refused(&mixed), is("the key in key does not belong to the certificate in cert"));
        let authority = made(|params| params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained));
        assert_eq!(refused(&authority), is("the certificate in cert cannot be a server's"));
        let client = made(|params| params.extended_key_usages = vec![ExtendedKeyUsagePurpose::ClientAuth]);
        assert_eq!(refused(&client), is("the certificate in cert cannot be a server's"));
        let garbage = [b"garbage".to_vec(), good[1].clone()];
        assert_eq!(refused(&garbage), is("cert holds no certificate in PEM"));
        let two_certificates = [good[0].clone(), good[0].clone()];
        assert!(refused(&two_certificates).unwrap().starts_with("key holds no private key in PEM"));
        let bad_ca = [good[0].clone(), good[1].clone(), b"garbage".to_vec()];
        assert_eq!(refused(&bad_ca), is("ca holds no certificate in PEM"));
    }

    #[test]
    fn a_certificate_that_ends_within_a_week_is_seen() {
        let ends = |month, day| made(move |params| params.not_after = date_time_ymd(2027, month, day));
        assert!(expires_within(&ends(1, 20)[0], NOW, ENDS_SOON));
        assert!(!expires_within(&ends(1, 25)[0], NOW, ENDS_SOON));
    }
}
