//! Why a coordinator that can be reached is not trusted, or does not trust this side.

use std::error::Error;
use std::fmt;
use std::io;

use rustls::{AlertDescription, CertificateError};

/// What stands between this side and a coordinator that it can reach.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[non_exhaustive]
pub enum TlsTrouble {
    /// Its certificate is not of the authority that this side was given.
    UnknownAuthority,
    /// Its certificate has expired.
    Expired,
    /// Its certificate is not valid yet.
    NotYetValid,
    /// Its certificate is for other names.
    WrongName,
    /// Its certificate is bad in another way.
    BadCertificate,
    /// It asks for a certificate, and this side shows none.
    CertificateRequired,
    /// It does not accept the certificate that this side shows.
    CertificateRefused,
    /// The two have no version or cipher of TLS in common.
    NoCommonVersion,
    /// One side speaks TLS and the other, it seems, does not.
    NotTls,
}

/// Alerts by which a server says what it thinks of a client.
const ALERTS: [(AlertDescription, TlsTrouble); 10] = [
    (AlertDescription::CertificateRequired, TlsTrouble::CertificateRequired),
    (AlertDescription::UnknownCA, TlsTrouble::CertificateRefused),
    (AlertDescription::BadCertificate, TlsTrouble::CertificateRefused),
    (AlertDescription::CertificateExpired, TlsTrouble::CertificateRefused),
    (AlertDescription::CertificateUnknown, TlsTrouble::CertificateRefused),
    (AlertDescription::UnsupportedCertificate, TlsTrouble::CertificateRefused),
    (AlertDescription::AccessDenied, TlsTrouble::CertificateRefused),
    (AlertDescription::DecryptError, TlsTrouble::CertificateRefused),
    (AlertDescription::ProtocolVersion, TlsTrouble::NoCommonVersion),
    (AlertDescription::HandshakeFailure, TlsTrouble::NoCommonVersion),
];

impl TlsTrouble {
    /// What trouble with TLS an error comes from, if it comes from any: an error of a connection, or of a call.
    pub fn of(error: &(dyn Error + 'static)) -> Option<TlsTrouble> {
        std::iter::successors(Some(error), |&why| why.source()).find_map(TlsTrouble::of_one)
    }

    fn of_one(why: &(dyn Error + 'static)) -> Option<TlsTrouble> {
        if let Some(tls) = why.downcast_ref::<rustls::Error>() {
            return TlsTrouble::of_tls(tls);
        }
        // An IO error has what it was made of inside, and that error's source as its own.
        if let Some(io) = why.downcast_ref::<io::Error>() {
            let inside = TlsTrouble::of_one(io.get_ref()? as &(dyn Error + 'static));
            let hung_up = io.kind() == io::ErrorKind::UnexpectedEof && io.to_string().contains("handshake");
            return inside.or(hung_up.then_some(TlsTrouble::NotTls));
        }
        // In TLS 1.3 a server's verdict on a client arrives when the client already speaks HTTP/2; that layer keeps its
        // text alone.
        let text = why.to_string();
        ALERTS
            .iter()
            .find(|(alert, _)| text.contains(&rustls::Error::AlertReceived(*alert).to_string()))
            .map(|(_, trouble)| *trouble)
    }

    fn of_tls(why: &rustls::Error) -> Option<TlsTrouble> {
        Some(match why {
            rustls::Error::InvalidCertificate(why) => match why {
                CertificateError::UnknownIssuer | CertificateError::BadSignature => {
                    TlsTrouble::UnknownAuthority
                }
                CertificateError::Expired | CertificateError::ExpiredContext { .. } => TlsTrouble::Expired,
                CertificateError::NotValidYet | CertificateError::NotValidYetContext { .. } => {
                    TlsTrouble::NotYetValid
                }
                CertificateError::NotValidForName | CertificateError::NotValidForNameContext { .. } => {
                    TlsTrouble::WrongName
                }
                _ => TlsTrouble::BadCertificate,
            },
            rustls::Error::AlertReceived(alert) => {
                return ALERTS.iter().find(|(known, _)| known == alert).map(|(_, trouble)| *trouble);
            }
            rustls::Error::PeerIncompatible(_) => TlsTrouble::NoCommonVersion,
            rustls::Error::InvalidMessage(_) => TlsTrouble::NotTls,
            _ => return None,
        })
    }

    /// Whether it is this side that is not trusted.
    pub fn is_own(self) -> bool {
        matches!(self, TlsTrouble::CertificateRequired | TlsTrouble::CertificateRefused)
    }

    /// Whether it stays as it is until somebody puts it right. A coordinator that goes away during a handshake looks like
    /// one that does not speak TLS.
    pub fn is_certain(self) -> bool {
        self != TlsTrouble::NotTls
    }

    /// What to do about it.
    pub fn hint(self) -> &'static str {
        match self {
            TlsTrouble::UnknownAuthority => {
                "name the authority that made the coordinator's certificate with --ca or REKNIT_CA (the ca.pem of \
                 `reknit certs`)"
            }
            TlsTrouble::Expired => {
                "renew the coordinator's certificate (`reknit certs DIR --renew`); it takes the new one without a restart"
            }
            TlsTrouble::NotYetValid => "compare the clocks of the two machines",
            TlsTrouble::WrongName => {
                "name the coordinator as its certificate does, or make one for this name (`reknit certs DIR --host NAME \
                 --renew`)"
            }
            TlsTrouble::BadCertificate => "`reknit certs` makes one to compare with",
            TlsTrouble::CertificateRequired => {
                "show a certificate with --cert and --key, or REKNIT_CERT and REKNIT_KEY (the client.pem and client.key \
                 of `reknit certs`)"
            }
            TlsTrouble::CertificateRefused => {
                "show a certificate of the authority that the coordinator was given with --tls-client-ca, and see whether \
                 it has expired"
            }
            TlsTrouble::NoCommonVersion => {
                "the coordinator speaks TLS 1.3; whatever lies between must let it through"
            }
            TlsTrouble::NotTls => {
                "does the coordinator serve without TLS? then its address begins with http://, not https://"
            }
        }
    }
}

impl fmt::Display for TlsTrouble {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            TlsTrouble::UnknownAuthority => {
                "the coordinator's certificate is not of an authority that is trusted here"
            }
            TlsTrouble::Expired => "the coordinator's certificate has expired",
            TlsTrouble::NotYetValid => "the coordinator's certificate is not valid yet",
            TlsTrouble::WrongName => {
                "the coordinator's certificate is for another name than the one it was asked by"
            }
            TlsTrouble::BadCertificate => "the coordinator's certificate is not one that a server may show",
            TlsTrouble::CertificateRequired => "the coordinator asks for a certificate, and none was shown",
            TlsTrouble::CertificateRefused => {
                "the coordinator does not accept the certificate that was shown"
            }
            TlsTrouble::NoCommonVersion => "the coordinator and this side have no version of TLS in common",
            TlsTrouble::NotTls => "what answers there does not speak TLS",
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// An error as it arrives: inside one of IO, inside one of somebody else's.
    #[derive(Debug, thiserror::Error)]
    #[error("transport error")]
    struct Transport(#[source] io::Error);

    fn wrapped(tls: rustls::Error) -> Transport {
        Transport(io::Error::new(io::ErrorKind::InvalidData, tls))
    }

    #[test]
    fn each_trouble_is_found_inside_the_errors_around_it() {
        let certificate = |why| TlsTrouble::of(&wrapped(rustls::Error::InvalidCertificate(why)));
        assert_eq!(certificate(CertificateError::UnknownIssuer), Some(TlsTrouble::UnknownAuthority));
        assert_eq!(certificate(CertificateError::Expired), Some(TlsTrouble::Expired));
        assert_eq!(certificate(CertificateError::NotValidForName), Some(TlsTrouble::WrongName));
        for (alert, trouble) in ALERTS {
            let whole = rustls::Error::AlertReceived(alert);
            let text = io::Error::other(whole.to_string());
            assert_eq!(TlsTrouble::of(&wrapped(whole)), Some(trouble));
            assert_eq!(TlsTrouble::of(&Transport(text)), Some(trouble), "as text alone");
        }
        let hung_up = io::Error::new(io::ErrorKind::UnexpectedEof, "tls handshake eof");
        assert_eq!(TlsTrouble::of(&Transport(hung_up)), Some(TlsTrouble::NotTls));
        assert_eq!(TlsTrouble::of(&Transport(io::Error::other("refused"))), None);
        assert_eq!(TlsTrouble::of(&Transport(io::ErrorKind::ConnectionRefused.into())), None);
    }
}
