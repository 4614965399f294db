//! Where an etcd is, and how it is talked to.

use std::path::PathBuf;

/// The nodes of an etcd and the prefix of our keys in it: `etcd://HOST:PORT[,HOST:PORT…][/PREFIX]`, or `etcds://…` if it
/// speaks TLS.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct EtcdAddress {
    /// `http://HOST:PORT` or `https://HOST:PORT`, at least one.
    pub endpoints: Vec<String>,
    /// What every key begins with: `/reknit` unless another one was named. Without a slash at its end.
    pub prefix: String,
}

/// Why a text is no [`EtcdAddress`].
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("an etcd is named like etcd://HOST:2379,HOST:2379/PREFIX, not {0:?}")]
pub struct BadAddress(pub String);

/// The prefix of the keys if none is named.
const PREFIX: &str = "/reknit";

impl EtcdAddress {
    /// Reads an address; nothing if the text does not begin as one.
    ///
    /// # Errors
    /// [`BadAddress`] if it begins as one and goes on as none.
    pub fn parse(text: &str) -> Option<Result<EtcdAddress, BadAddress>> {
        let (scheme, rest) = match text.split_once("://")? {
            ("etcd", rest) => ("http", rest),
            ("etcds", rest) => ("https", rest),
            _ => return None,
        };
        let (nodes, prefix) = match rest.split_once('/') {
            Some((nodes, prefix)) => (nodes, format!("/{}", prefix.trim_matches('/'))),
            None => (rest, PREFIX.to_owned()),
        };
        let prefix = if prefix == "/" { PREFIX.to_owned() } else { prefix };
        let endpoints: Vec<String> =
            nodes.split(',').map(|node| format!("{scheme}://{}", node.trim())).collect();
        let is_node = |endpoint: &String| {
            tonic::transport::Endpoint::from_shared(endpoint.clone()).is_ok_and(|endpoint| {
                endpoint.uri().port().is_some() && !endpoint.uri().host().unwrap_or("").is_empty()
            })
        };
        if endpoints.iter().all(is_node) {
            Some(Ok(EtcdAddress { endpoints, prefix }))
        } else {
            Some(Err(BadAddress(text.to_owned())))
        }
    }

    /// Whether it speaks TLS.
    pub fn is_tls(&self) -> bool {
        self.endpoints.iter().any(|endpoint| endpoint.starts_with("https://"))
    }
}

impl std::fmt::Display for EtcdAddress {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let scheme = if self.is_tls() { "etcds" } else { "etcd" };
        let nodes: Vec<&str> =
            self.endpoints.iter().filter_map(|e| e.split_once("://").map(|(_, node)| node)).collect();
        write!(f, "{scheme}://{}{}", nodes.join(","), self.prefix)
    }
}

/// How a coordinator shows an etcd who it is. Files are read anew at every connection.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct EtcdCredentials {
    /// The authority that etcd's certificates must come from (PEM).
    pub ca: Option<PathBuf>,
    /// The certificate shown to etcd (PEM) …
    pub cert: Option<PathBuf>,
    /// … and its key (PEM).
    pub key: Option<PathBuf>,
    /// The user's name …
    pub user: Option<String>,
    /// … and the file that holds the password.
    pub password_file: Option<PathBuf>,
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_etcd_is_named_by_its_nodes_and_a_prefix() {
        let parsed =
            |text: &str| EtcdAddress::parse(text).map(|address| address.map(|a| (a.endpoints, a.prefix)));
        let address = |endpoints: &[&str], prefix: &str| {
            Some(Ok((endpoints.iter().map(|e| (*e).to_owned()).collect(), prefix.to_owned())))
        };
        assert_eq!(parsed("etcd://a:2379"), address(&["http://a:2379"], "/reknit"));
        assert_eq!(parsed("etcd://a:1,b:2/x/y/"), address(&["http://a:1", "http://b:2"], "/x/y"));
        assert_eq!(parsed("etcds://[::1]:2379/"), address(&["https://[::1]:2379"], "/reknit"));
        assert_eq!(parsed("reknit-data"), None);
        assert_eq!(parsed("/etcd://x"), None);
        for wrong in ["etcd://", "etcd://a", "etcd://a:1,,b:2", "etcd://:2379", "etcd://a:x"] {
            assert_eq!(parsed(wrong), Some(Err(BadAddress(wrong.to_owned()))));
        }
        let shown =
            EtcdAddress::parse("etcds://a:1,b:2").and_then(Result::ok).map(|address| address.to_string());
        assert_eq!(shown.as_deref(), Some("etcds://a:1,b:2/reknit"));
    }
}
