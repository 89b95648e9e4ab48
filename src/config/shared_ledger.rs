//! The address of a ledger that several machines share: `redis://`, with sentinels or as a cluster, with TLS or without.

use std::fmt;
use std::path::PathBuf;

use percent_encoding::percent_decode_str;

use super::Secret;
use super::checked::Check;
use super::file::{self, RedisFile};

/// Port of a server, if its address has none.
const PORT: u16 = 6379;
/// Port of a sentinel, likewise.
const SENTINEL_PORT: u16 = 26379;

/// A ledger on a server.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct SharedLedger {
    /// Where the server is.
    pub address: RedisAddress,
    /// What the names of its keys begin with.
    pub prefix: String,
    /// Certificates of authorities to trust in place of the system's, in PEM form.
    pub ca_file: Option<PathBuf>,
    /// Replicas that must have a permit before it counts.
    pub replicas: u32,
}

/// Address of a Redis or Valkey server.
#[derive(Clone, Debug)]
pub struct RedisAddress {
    /// How the servers are found.
    pub kind: RedisKind,
    /// True if connections are encrypted.
    pub tls: bool,
    /// Name of the ACL user.
    pub username: Option<String>,
    /// Its password.
    pub password: Option<Secret>,
    /// Hosts and ports: of the server, of the sentinels, or of some nodes of the cluster.
    pub hosts: Vec<(String, u16)>,
    /// Number of the database.
    pub database: i64,
}

/// How the servers are found.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum RedisKind {
    /// There is one.
    One,
    /// Sentinels say which one of this name leads.
    Sentinels(String),
    /// They are a cluster.
    Cluster,
}

/// True if a text names a server rather than a file.
pub(super) fn is_redis(text: &str) -> bool {
    text.split_once("://").is_some_and(|(scheme, _)| scheme.starts_with("redis"))
}

impl RedisAddress {
    /// Reads an address. The error says what is wrong with it.
    pub fn parse(text: &str) -> Result<Self, String> {
        let (scheme, rest) = text.split_once("://").ok_or("has no scheme")?;
        let (tls, kind) = match scheme {
            "redis" => (false, RedisKind::One),
            "rediss" => (true, RedisKind::One),
            "redis+sentinel" => (false, RedisKind::Sentinels(String::new())),
            "rediss+sentinel" => (true, RedisKind::Sentinels(String::new())),
            "redis+cluster" => (false, RedisKind::Cluster),
            "rediss+cluster" => (true, RedisKind::Cluster),
            _ => {
                return Err(format!(
                    "has the scheme {scheme:?}, which is none of redis, rediss, and these with +sentinel or +cluster"
                ));
            }
        };
        if rest.contains(['?', '#']) {
            return Err("has options behind a question mark, which are not read; server.redis has all there are".into());
        }
        let (authority, path) = rest.split_once('/').unwrap_or((rest, ""));
        let (user, hosts) = authority.rsplit_once('@').map_or((None, authority), |(user, hosts)| (Some(user), hosts));
        let decoded = |text: &str| percent_decode_str(text).decode_utf8_lossy().into_owned();
        let (username, password) = match user {
            None => (None, None),
            Some(user) => {
                let (name, password) = user.split_once(':').unwrap_or((user, ""));
                let some = |text: &str| Some(decoded(text)).filter(|text| !text.is_empty());
                (some(name), some(password).map(Secret::new))
            }
        };
        let port = if matches!(kind, RedisKind::Sentinels(_)) { SENTINEL_PORT } else { PORT };
        let hosts = hosts.split(',').map(|host| host_and_port(host, port)).collect::<Result<Vec<_>, _>>()?;
        if kind == RedisKind::One && hosts.len() > 1 {
            return Err("names several hosts; write redis+sentinel or redis+cluster before them".into());
        }
        let (kind, database) = match kind {
            RedisKind::Sentinels(_) => {
                let (name, database) = path.split_once('/').unwrap_or((path, ""));
                if name.is_empty() {
                    return Err("names no service of the sentinels: it stands behind the hosts, as in /mymaster".into());
                }
                (RedisKind::Sentinels(decoded(name)), database)
            }
            kind => (kind, path),
        };
        let database = match database {
            "" => 0,
            number => number.parse().map_err(|_| format!("has {number:?} for the number of a database"))?,
        };
        if kind == RedisKind::Cluster && database != 0 {
            return Err("names a database, and a cluster has only number 0".into());
        }
        Ok(Self { kind, tls, username, password, hosts, database })
    }
}

fn host_and_port(text: &str, default: u16) -> Result<(String, u16), String> {
    let (host, port) = match text.strip_prefix('[') {
        Some(rest) => {
            let (host, port) = rest.split_once(']').ok_or("has a bracket that is not closed")?;
            (host, port.strip_prefix(':'))
        }
        None => text.split_once(':').map_or((text, None), |(host, port)| (host, Some(port))),
    };
    if host.is_empty() {
        return Err("names no host".into());
    }
    let port = match port {
        None => default,
        Some(port) => port.parse().map_err(|_| format!("has {port:?} for a port"))?,
    };
    Ok((host.to_owned(), port))
}

impl PartialEq for RedisAddress {
    fn eq(&self, other: &Self) -> bool {
        let password = |of: &Self| of.password.as_ref().map(|secret| secret.expose().to_owned());
        self.to_string() == other.to_string() && self.username == other.username && password(self) == password(other)
    }
}

impl Eq for RedisAddress {}

/// As it is shown: without the password.
impl fmt::Display for RedisAddress {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let tls = if self.tls { "s" } else { "" };
        let kind = match self.kind {
            RedisKind::One => "",
            RedisKind::Sentinels(_) => "+sentinel",
            RedisKind::Cluster => "+cluster",
        };
        let host = |(host, port): &(String, u16)| {
            if host.contains(':') { format!("[{host}]:{port}") } else { format!("{host}:{port}") }
        };
        let hosts: Vec<String> = self.hosts.iter().map(host).collect();
        write!(f, "redis{tls}{kind}://{}", hosts.join(","))?;
        if let RedisKind::Sentinels(name) = &self.kind {
            write!(f, "/{name}")?;
        }
        if self.database != 0 { write!(f, "/{}", self.database) } else { Ok(()) }
    }
}

/// Checks the address of a ledger on a server, and its settings.
pub(super) fn shared_ledger(typed: &str, redis: RedisFile, check: &mut Check<'_>) -> Option<SharedLedger> {
    let address = match RedisAddress::parse(typed) {
        Ok(address) => address,
        Err(why) => {
            let hint = "write it as redis://user:password@host:6379/0, redis+sentinel://host1,host2/mymaster or \
                 redis+cluster://host1,host2; rediss in place of redis for TLS";
            check.report.error("server.ledger", format!("the address {why}"), hint);
            return None;
        }
    };
    let prefix = redis.prefix.unwrap_or_else(|| file::REDIS_PREFIX_DEFAULT.to_owned());
    if prefix.is_empty() || prefix.contains(|c: char| c.is_whitespace() || c.is_control() || "{}*?[]".contains(c)) {
        let hint = "use letters, digits, and - or _, such as api-together";
        check.report.error("server.redis.prefix", format!("{prefix:?} cannot be the beginning of a key"), hint);
        return None;
    }
    if redis.ca_file.is_some() && !address.tls {
        let hint = "write rediss in place of redis in server.ledger, or leave caFile off";
        check.report.error("server.redis.caFile", "is given, and the connection is not encrypted", hint);
    }
    let ca_file = redis.ca_file.and_then(|file| check.readable(&file, "server.redis.caFile"));
    Some(SharedLedger { address, prefix, ca_file, replicas: redis.replicas.unwrap_or_default() })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn read(text: &str) -> RedisAddress {
        RedisAddress::parse(text).unwrap()
    }

    #[test]
    fn every_kind_of_address_is_read() {
        let one = read("redis://localhost");
        assert_eq!(
            (one.kind, one.tls, one.hosts, one.database),
            (RedisKind::One, false, vec![("localhost".into(), 6379)], 0)
        );
        let with_all = read("rediss://ada:p%40ss@[::1]:7000/3");
        assert_eq!(with_all.username.as_deref(), Some("ada"));
        assert_eq!(with_all.password.as_ref().map(Secret::expose), Some("p@ss"));
        assert_eq!((with_all.tls, with_all.hosts, with_all.database), (true, vec![("::1".into(), 7000)], 3));
        let sentinels = read("redis+sentinel://:word@a,b:7/mymaster/2");
        assert_eq!(sentinels.kind, RedisKind::Sentinels("mymaster".into()));
        assert_eq!(sentinels.hosts, [("a".into(), 26379), ("b".into(), 7)]);
        assert_eq!((sentinels.username, sentinels.database), (None, 2));
        assert_eq!(read("rediss+cluster://a:1,b:2").kind, RedisKind::Cluster);
    }

    #[test]
    fn what_is_shown_has_no_password() {
        for (text, shown) in [
            ("rediss://ada:secret@h:1/3", "rediss://h:1/3"),
            ("redis+sentinel://:secret@a,b/m", "redis+sentinel://a:26379,b:26379/m"),
            ("redis+cluster://[::1]:7", "redis+cluster://[::1]:7"),
        ] {
            assert_eq!(read(text).to_string(), shown);
        }
    }

    #[test]
    fn what_is_wrong_is_said() {
        for (text, what) in [
            ("redis+tcp://h", "scheme"),
            ("redis://", "no host"),
            ("redis://h:x", "port"),
            ("redis://h/x", "database"),
            ("redis://a,b", "several hosts"),
            ("redis+sentinel://a", "no service"),
            ("redis+cluster://a/1", "only number 0"),
            ("redis://h?ssl=1", "question mark"),
            ("redis://[::1", "bracket"),
        ] {
            let error = RedisAddress::parse(text).unwrap_err();
            assert!(error.contains(what), "{text}: {error}");
        }
    }
}
