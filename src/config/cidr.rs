//! A range of addresses.

use std::fmt;
use std::net::IpAddr;
use std::str::FromStr;

use ipnet::{IpNet, Ipv4Net};

/// A range of addresses, such as `10.0.0.0/8`. An IPv4 address written as IPv6 (`::ffff:10.0.0.1`) is the IPv4 address, in the range
/// as well as in what is looked up.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct Cidr(IpNet);

/// The text is not a range of addresses.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct CidrError;

/// Bits of the prefix `::ffff:0:0/96`, which holds the IPv4 addresses.
const MAPPED_PREFIX_BITS: u8 = 96;

impl Cidr {
    /// True if the address is in the range.
    pub fn contains(&self, ip: IpAddr) -> bool {
        match (self.0, ip.to_canonical()) {
            // `::/0` is everything, and other ranges around the mapped addresses hold them too.
            (IpNet::V6(range), IpAddr::V4(ip)) => range.contains(&ip.to_ipv6_mapped()),
            (range, ip) => range.contains(&ip),
        }
    }
}

impl FromStr for Cidr {
    type Err = CidrError;

    fn from_str(text: &str) -> Result<Self, CidrError> {
        let range = match text.parse::<IpAddr>() {
            Ok(address) => address.into(),
            Err(_) => text.parse::<IpNet>().map_err(|_| CidrError)?,
        };
        let mapped = match range.addr().to_canonical() {
            IpAddr::V4(address) => range.prefix_len().checked_sub(MAPPED_PREFIX_BITS).zip(Some(address)),
            IpAddr::V6(_) => None,
        };
        let mapped = mapped.filter(|_| range.addr().is_ipv6()).and_then(|(len, ip)| Ipv4Net::new(ip, len).ok());
        Ok(Self(mapped.map_or(range, IpNet::V4)))
    }
}

impl fmt::Display for Cidr {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.fmt(f)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn holds(range: &str, ip: &str) -> bool {
        range.parse::<Cidr>().unwrap().contains(ip.parse().unwrap())
    }

    #[test]
    fn a_range_holds_its_addresses_and_no_others() {
        for (range, inside, outside) in [
            ("10.0.0.0/8", "10.255.1.2", "11.0.0.0"),
            ("10.1.2.3/8", "10.9.9.9", "9.1.2.3"),
            ("192.168.1.1", "192.168.1.1", "192.168.1.0"),
            ("192.168.1.128/25", "192.168.1.128", "192.168.1.127"),
            ("::1", "::1", "::2"),
            ("fd00::/8", "fdff::1", "fc00::1"),
            ("0.0.0.0/0", "8.8.8.8", "::1"),
            ("10.0.0.0/8", "::ffff:10.0.0.1", "::ffff:11.0.0.1"),
            ("::ffff:10.0.0.0/104", "10.2.3.4", "11.0.0.0"),
            ("2001:db8::/32", "2001:db8:1::", "10.0.0.1"),
        ] {
            assert!(holds(range, inside), "{range} {inside}");
            assert!(!holds(range, outside), "{range} {outside}");
        }
        assert!(holds("::/0", "8.8.8.8"));
    }

    #[test]
    fn other_texts_are_refused() {
        for text in ["", "x", "10.0.0.0/33", "::1/129", "10.0.0.0/", "10.0.0.0/-1", "10.0.0.0/+8", "10.0.0/8", "/8"] {
            assert_eq!(text.parse::<Cidr>(), Err(CidrError), "{text}");
        }
    }

    #[test]
    fn it_prints_as_it_means() {
        assert_eq!("::ffff:10.0.0.0/104".parse::<Cidr>().unwrap().to_string(), "10.0.0.0/8");
        assert_eq!("::1".parse::<Cidr>().unwrap().to_string(), "::1/128");
    }
}
