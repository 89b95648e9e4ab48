//! A range of addresses.

use std::fmt;
use std::net::{IpAddr, Ipv6Addr};
use std::str::FromStr;

/// The addresses that share their first `len` bits with `addr`. An IPv4 address written as IPv6
/// (`::ffff:10.0.0.1`) is the IPv4 address, in the range as well as in what is looked up.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct Cidr {
    addr: IpAddr,
    len: u8,
}

/// The text is no range of addresses.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct NoCidr;

/// Where IPv4 begins inside `::ffff:0:0/96`.
const MAPPED_PREFIX_BITS: u8 = 96;

impl Cidr {
    /// Whether the address is one of them.
    pub fn contains(&self, ip: IpAddr) -> bool {
        match (self.addr, ip.to_canonical()) {
            (IpAddr::V4(own), IpAddr::V4(ip)) => own.to_bits() & mask_v4(self.len) == ip.to_bits() & mask_v4(self.len),
            (IpAddr::V6(own), IpAddr::V6(ip)) => own.to_bits() & mask_v6(self.len) == ip.to_bits() & mask_v6(self.len),
            // `::/0` is everything, and other ranges around the mapped addresses hold them too.
            (IpAddr::V6(own), IpAddr::V4(ip)) => {
                self.len <= MAPPED_PREFIX_BITS && own.to_bits() & mask_v6(self.len) == mapped(ip) & mask_v6(self.len)
            }
            (IpAddr::V4(_), IpAddr::V6(_)) => false,
        }
    }
}

fn mapped(ip: std::net::Ipv4Addr) -> u128 {
    Ipv6Addr::to_bits(ip.to_ipv6_mapped())
}

fn mask_v4(len: u8) -> u32 {
    u32::MAX.checked_shl(32 - u32::from(len)).unwrap_or(0)
}

fn mask_v6(len: u8) -> u128 {
    u128::MAX.checked_shl(128 - u32::from(len)).unwrap_or(0)
}

impl FromStr for Cidr {
    type Err = NoCidr;

    fn from_str(text: &str) -> Result<Self, NoCidr> {
        let (addr, len) = match text.split_once('/') {
            Some((addr, len)) => (addr, Some(len)),
            None => (text, None),
        };
        let addr: IpAddr = addr.parse().map_err(|_| NoCidr)?;
        let len_max = if addr.is_ipv4() { 32 } else { 128 };
        let len = match len {
            None => len_max,
            Some(len) if len.bytes().all(|b| b.is_ascii_digit()) => len.parse().map_err(|_| NoCidr)?,
            Some(_) => return Err(NoCidr),
        };
        if len > len_max {
            return Err(NoCidr);
        }
        match addr.to_canonical() {
            canonical @ IpAddr::V4(_) if addr.is_ipv6() && len >= MAPPED_PREFIX_BITS => {
                Ok(Self { addr: canonical, len: len - MAPPED_PREFIX_BITS })
            }
            _ => Ok(Self { addr, len }),
        }
    }
}

impl fmt::Display for Cidr {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}/{}", self.addr, self.len)
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
            assert_eq!(text.parse::<Cidr>(), Err(NoCidr), "{text}");
        }
    }

    #[test]
    fn it_prints_as_it_means() {
        assert_eq!("::ffff:10.0.0.0/104".parse::<Cidr>().unwrap().to_string(), "10.0.0.0/8");
        assert_eq!("::1".parse::<Cidr>().unwrap().to_string(), "::1/128");
    }
}
