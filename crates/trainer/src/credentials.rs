//! What a program or an operator shows a coordinator, and checks it by.

mod trouble;

use std::path::{Path, PathBuf};

use reknit_proto::Token;
use reknit_proto::token::BadToken;
use rustls::pki_types::pem::PemObject as _;
use rustls::pki_types::{CertificateDer, PrivateKeyDer};
use tonic::service::Interceptor;
use tonic::transport::{Certificate, ClientTlsConfig, Endpoint, Identity};
use tonic::{Request, Status};

pub use trouble::TlsTrouble;

/// The authority's certificate by which a coordinator's is checked.
pub const CA: &str = "REKNIT_CA";
/// The certificate that is shown to it.
pub const CERT: &str = "REKNIT_CERT";
/// That certificate's private key.
pub const KEY: &str = "REKNIT_KEY";
/// The file that holds the token.
pub const TOKEN_FILE: &str = "REKNIT_TOKEN_FILE";
/// The token itself.
pub const TOKEN: &str = "REKNIT_TOKEN";

/// What is shown to a coordinator, and what it is checked by. All files are PEM, except the token's; they are read anew
/// for each connection, so they can be replaced while a program runs.
///
/// `ca` is needed for coordinators whose address begins with `https://`; `cert` and `key` for those that ask for a
/// certificate; a token for those that ask for one. The token is sent to every coordinator that is named, encrypted or
/// not: name one by `http://` only where nobody listens in.
#[derive(Debug, Clone, Default)]
pub struct Credentials {
    /// The certificate of the authority that coordinators' certificates must be of.
    pub ca: Option<PathBuf>,
    /// The certificate to show to a coordinator that asks for one.
    pub cert: Option<PathBuf>,
    /// Its private key.
    pub key: Option<PathBuf>,
    /// The token to show.
    pub token: Option<Token>,
    /// The file that holds the token to show; it goes before `token`.
    pub token_file: Option<PathBuf>,
}

/// Why credentials make no sense.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum CredentialsError {
    /// The coordinator's address is none.
    #[error("{url:?} is no address of a coordinator")]
    Url {
        /// The address.
        url: String,
        /// What is wrong with it.
        source: tonic::transport::Error,
    },
    /// A coordinator that speaks TLS, and nothing to check it by.
    #[error("{url} shows a certificate, and no authority is named to check it by")]
    NoAuthority {
        /// The address.
        url: String,
    },
    /// A certificate without its key, or the other way round.
    #[error("a certificate and its private key are shown together, and only one of them is named")]
    HalfIdentity,
    /// A file cannot be read.
    #[error("{} cannot be read", path.display())]
    Unreadable {
        /// The file.
        path: PathBuf,
        /// Why not.
        source: std::io::Error,
    },
    /// A file does not hold what it should.
    #[error("{} holds no {what} in PEM", path.display())]
    NotPem {
        /// The file.
        path: PathBuf,
        /// What it should hold.
        what: &'static str,
    },
    /// What should be a token is none.
    #[error("what {from} holds is no token")]
    Token {
        /// The file or the variable.
        from: String,
        /// Why not.
        source: BadToken,
    },
}

impl CredentialsError {
    /// What to do about it.
    pub fn hint(&self) -> &'static str {
        match self {
            CredentialsError::Url { .. } => "an address looks like https://HOST:PORT or http://HOST:PORT",
            CredentialsError::NoAuthority { .. } => {
                "name the authority's certificate (the ca.pem of `reknit certs`) with --ca or REKNIT_CA"
            }
            CredentialsError::HalfIdentity => {
                "give both --cert and --key (REKNIT_CERT and REKNIT_KEY), or neither"
            }
            CredentialsError::Unreadable { .. } | CredentialsError::NotPem { .. } => {
                "see REKNIT_CA, REKNIT_CERT, REKNIT_KEY and REKNIT_TOKEN_FILE, and the flags of the same names"
            }
            CredentialsError::Token { .. } => {
                "`reknit token` makes tokens; a token's file holds nothing else"
            }
        }
    }

    /// What went wrong and why, in one line.
    pub fn text(&self) -> String {
        let chain =
            std::iter::successors(Some(self as &(dyn std::error::Error + 'static)), |&why| why.source());
        chain.map(ToString::to_string).collect::<Vec<_>>().join(": ")
    }
}

impl Credentials {
    /// What the environment names: `REKNIT_CA`, `REKNIT_CERT`, `REKNIT_KEY`, `REKNIT_TOKEN_FILE`, `REKNIT_TOKEN`. A
    /// variable that is empty names nothing.
    ///
    /// # Errors
    /// [`CredentialsError::Token`] if `REKNIT_TOKEN` is none.
    pub fn from_env() -> Result<Credentials, CredentialsError> {
        let value = |name| std::env::var_os(name).filter(|value| !value.is_empty());
        let path = |name| value(name).map(PathBuf::from);
        let token = value(TOKEN).map(|text| parse_token(&text.to_string_lossy(), TOKEN)).transpose()?;
        Ok(Credentials {
            ca: path(CA),
            cert: path(CERT),
            key: path(KEY),
            token,
            token_file: path(TOKEN_FILE),
        })
    }

    /// How to reach the coordinator at `url`, as the files have it now.
    ///
    /// # Errors
    /// [`CredentialsError`] if the address or the files make no sense.
    pub fn endpoint(&self, url: &str) -> Result<Endpoint, CredentialsError> {
        let bad_url = |source| CredentialsError::Url { url: url.to_owned(), source };
        let endpoint = Endpoint::from_shared(url.to_owned()).map_err(bad_url)?;
        if endpoint.uri().scheme_str() != Some("https") {
            return Ok(endpoint);
        }
        let ca = self.ca.as_ref().ok_or_else(|| CredentialsError::NoAuthority { url: url.to_owned() })?;
        let mut tls = ClientTlsConfig::new().ca_certificate(Certificate::from_pem(certificates(ca)?));
        match (&self.cert, &self.key) {
            (Some(cert), Some(key)) => {
                tls = tls.identity(Identity::from_pem(certificates(cert)?, private_key(key)?));
            }
            (None, None) => {}
            _ => return Err(CredentialsError::HalfIdentity),
        }
        endpoint.tls_config(tls).map_err(bad_url)
    }

    /// What shows the token, as its file has it now, with every call.
    ///
    /// # Errors
    /// [`CredentialsError`] if the file holds none.
    pub fn authorization(&self) -> Result<Authorization, CredentialsError> {
        let Some(path) = &self.token_file else { return Ok(Authorization(self.token.clone())) };
        let text = String::from_utf8_lossy(&read(path)?).into_owned();
        Ok(Authorization(Some(parse_token(text.trim(), &path.display().to_string())?)))
    }
}

fn parse_token(text: &str, from: &str) -> Result<Token, CredentialsError> {
    Token::new(text).map_err(|source| CredentialsError::Token { from: from.to_owned(), source })
}

fn read(path: &Path) -> Result<Vec<u8>, CredentialsError> {
    std::fs::read(path).map_err(|source| CredentialsError::Unreadable { path: path.to_owned(), source })
}

/// A file's bytes, if they are certificates: what is underneath would pass over what it cannot read.
fn certificates(path: &Path) -> Result<Vec<u8>, CredentialsError> {
    let bytes = read(path)?;
    let found: Result<Vec<_>, _> = CertificateDer::pem_slice_iter(&bytes).collect();
    match found {
        Ok(found) if !found.is_empty() => Ok(bytes),
        _ => Err(CredentialsError::NotPem { path: path.to_owned(), what: "certificate" }),
    }
}

fn private_key(path: &Path) -> Result<Vec<u8>, CredentialsError> {
    let bytes = read(path)?;
    match PrivateKeyDer::from_pem_slice(&bytes) {
        Ok(_) => Ok(bytes),
        Err(_) => Err(CredentialsError::NotPem { path: path.to_owned(), what: "private key" }),
    }
}

/// Shows a token, if there is one, with every call.
#[derive(Debug, Clone)]
pub struct Authorization(Option<Token>);

impl Interceptor for Authorization {
    fn call(&mut self, mut request: Request<()>) -> Result<Request<()>, Status> {
        if let Some(token) = &self.0 {
            token.attach(request.metadata_mut());
        }
        Ok(request)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use rcgen::{CertificateParams, KeyPair};

    #[test]
    fn what_is_missing_or_makes_no_sense_is_named_with_its_file() {
        let dir = tempfile::tempdir().unwrap();
        let path = |name: &str| dir.path().join(name);
        let key = KeyPair::generate().unwrap();
        let cert = CertificateParams::new(["a".to_owned()]).unwrap().self_signed(&key).unwrap();
        std::fs::write(path("cert"), cert.pem()).unwrap();
        std::fs::write(path("key"), key.serialize_pem()).unwrap();
        let why =
            |credentials: &Credentials| credentials.endpoint("https://a:1").map(drop).unwrap_err().text();

        let nothing = Credentials::default();
        assert!(nothing.endpoint("http://a:1").is_ok());
        assert!(why(&nothing).contains("no authority is named"));
        let good = Credentials {
            ca: Some(path("cert")),
            cert: Some(path("cert")),
            key: Some(path("key")),
            ..Credentials::default()
        };
        assert!(good.endpoint("https://a:1").is_ok());
        assert!(why(&Credentials { key: None, ..good.clone() }).contains("only one of them"));
        let absent = why(&Credentials { ca: Some(path("absent")), ..good.clone() });
        assert!(absent.contains("absent cannot be read: No such file"), "{absent}");
        let swapped = why(&Credentials { key: Some(path("cert")), ..good.clone() });
        assert!(swapped.ends_with("cert holds no private key in PEM"), "{swapped}");
    }

    #[test]
    fn a_tokens_file_is_read_anew_and_an_error_repeats_nothing_of_it() {
        let dir = tempfile::tempdir().unwrap();
        let file = dir.path().join("token");
        let credentials = Credentials { token_file: Some(file.clone()), ..Credentials::default() };
        let shown = || {
            let request =
                credentials.authorization().map_err(|why| why.text())?.call(Request::new(())).unwrap();
            let value = request.metadata().get("authorization").unwrap().to_str().unwrap().to_owned();
            Ok::<String, String>(value)
        };
        assert!(shown().unwrap_err().contains("cannot be read"));
        std::fs::write(&file, "the-first-token-there-is\n").unwrap();
        assert_eq!(shown().as_deref(), Ok("Bearer the-first-token-there-is"));
        std::fs::write(&file, "the-second-token-there-is").unwrap();
        assert_eq!(shown().as_deref(), Ok("Bearer the-second-token-there-is"));
        std::fs::write(&file, "two words of a secret").unwrap();
        let why = shown().unwrap_err();
        assert!(why.contains("is no token") && !why.contains("words"), "{why}");
        let held = Credentials { token: Some(Token::new("held-in-memory-only").unwrap()), ..credentials };
        assert!(!format!("{held:?}").contains("held-in-memory"));
    }
}
